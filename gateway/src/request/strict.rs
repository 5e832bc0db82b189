//! What HTTP parsers let through and a proxy must not: requests that two servers could read in two ways.

use http::header::{HOST, TRANSFER_ENCODING};
use http::request::Parts;
use http::uri::Authority;
use http::{HeaderName, HeaderValue, Method, Version};

use crate::error::Error;

/// Refuses an ambiguous or oversize head.
///
/// # Errors
/// What makes it ambiguous.
pub(super) fn check(head: &Parts, bytes_max: usize) -> Result<(), Error> {
    let refuse = |why| Err(Error::Malformed(why));
    // hyper stops reading near its bound, not at it.
    let field = |(name, value): (&HeaderName, &HeaderValue)| name.as_str().len() + value.len() + 4;
    if head.headers.iter().map(field).sum::<usize>() > bytes_max {
        return Err(Error::OversizeHead);
    }
    if head.method == Method::CONNECT || !head.uri.path().starts_with('/') {
        return refuse("the target is not a path");
    }
    if head.uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
        // RFC 9110, section 4.2.4; RFC 9113, section 8.3.1.
        return refuse("user information in the target");
    }
    let mut hosts = head.headers.get_all(HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        // RFC 9112, section 3.2.
        return refuse("more than one Host");
    }
    match (host, head.version) {
        (None, Version::HTTP_11) => return refuse("no Host"),
        (None, _) => {}
        (Some(host), _) => {
            let host = host.as_bytes();
            let parsed = Authority::try_from(host).ok().filter(|host| !host.as_str().contains('@'));
            if parsed.is_none() && !(host.is_empty() && head.uri.authority().is_none()) {
                return refuse("Host is no host");
            }
            // An absolute target and :authority say again what Host says.
            if let (Some(target), Some(host)) = (head.uri.authority(), parsed)
                && *target != host
            {
                return refuse("Host is not the target's");
            }
        }
    }
    let mut encodings = head.headers.get_all(TRANSFER_ENCODING).iter();
    if let Some(encoding) = encodings.next() {
        // RFC 9112, section 6.1: what smuggling is made of. A Content-Length beside it has been taken out by hyper, and what
        // is sent on is framed anew.
        if encodings.next().is_some() || !encoding.as_bytes().eq_ignore_ascii_case(b"chunked") {
            return refuse("a Transfer-Encoding other than chunked");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn checked(version: Version, target: &str, headers: &[(&str, &str)]) -> Result<(), Error> {
        let mut request = Request::builder().method("POST").version(version).uri(target);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        check(&request.body(()).expect("valid").into_parts().0, 1 << 16)
    }

    #[test]
    fn ambiguous_heads_are_refused() {
        let (v1, v2) = (Version::HTTP_11, Version::HTTP_2);
        let good: [(Version, &str, &[(&str, &str)]); 7] = [
            (v1, "/a", &[("host", "example.com")]),
            (v1, "/a", &[("host", "")]),
            (v1, "http://example.com/a", &[("host", "EXAMPLE.com")]),
            (v1, "/a", &[("host", "[::1]:8443"), ("transfer-encoding", "Chunked")]),
            (Version::HTTP_10, "/a", &[]),
            (v2, "https://example.com/a", &[]),
            (v2, "https://example.com/a", &[("host", "example.com")]),
        ];
        for (version, target, headers) in good {
            assert_eq!(checked(version, target, headers), Ok(()), "{version:?} {target} {headers:?}");
        }
        let bad: [(Version, &str, &[(&str, &str)]); 11] = [
            (v1, "/a", &[]),
            (v1, "/a", &[("host", "a"), ("host", "b")]),
            (v1, "/a", &[("host", "a"), ("host", "a")]),
            (v1, "/a", &[("host", "user@a")]),
            (v1, "/a", &[("host", "a/b")]),
            (v1, "/a", &[("host", "a b")]),
            (v1, "http://a/", &[("host", "b")]),
            (v2, "https://user@a/", &[]),
            (v2, "https://a/", &[("host", "b")]),
            (v1, "/a", &[("host", "a"), ("transfer-encoding", "gzip, chunked")]),
            (v1, "/a", &[("host", "a"), ("transfer-encoding", "chunked"), ("transfer-encoding", "chunked")]),
        ];
        for (version, target, headers) in bad {
            assert!(checked(version, target, headers).is_err(), "{version:?} {target} {headers:?}");
        }
    }
}
