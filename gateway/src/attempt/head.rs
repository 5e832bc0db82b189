//! The head of a request as an endpoint gets it: what the client said, less what is not for others, plus what we know.

use std::time::Duration;

use http::header::{AUTHORIZATION, CONNECTION};
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue};
use isochrone_telemetry::trace;
use tokio::time::Instant;
use tracing::Span;

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const X_REQUEST_TIMEOUT: HeaderName = HeaderName::from_static("x-request-timeout-ms");
const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// The longest deadline that a client may ask for; beyond any request that is still of use to somebody.
const TIMEOUT_MAX: Duration = Duration::from_secs(24 * 3600);

/// What the gateway tells an endpoint about the client.
#[derive(Clone, Debug)]
pub(crate) struct Forwarded {
    pub(crate) client_ip: HeaderValue,
    pub(crate) secure: bool,
    pub(crate) request_id: HeaderValue,
}

/// How long the client wants to wait at most, if it says so.
pub(crate) fn asked_deadline(headers: &HeaderMap) -> Option<Duration> {
    let asked =
        headers.get(X_REQUEST_TIMEOUT).and_then(|value| value.to_str().ok()?.parse().ok()).map(Duration::from_millis);
    let grpc = headers.get(GRPC_TIMEOUT).and_then(|value| grpc_timeout(value.as_bytes()));
    [asked, grpc].into_iter().flatten().min().map(|asked| asked.min(TIMEOUT_MAX))
}

/// At most eight digits and a unit (<https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md>).
fn grpc_timeout(value: &[u8]) -> Option<Duration> {
    let (unit, digits) = value.split_last()?;
    if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let count = digits.iter().fold(0_u64, |count, digit| count * 10 + u64::from(digit - b'0'));
    Some(match unit {
        b'H' => Duration::from_secs(count * 3600),
        b'M' => Duration::from_secs(count * 60),
        b'S' => Duration::from_secs(count),
        b'm' => Duration::from_millis(count),
        b'u' => Duration::from_micros(count),
        b'n' => Duration::from_nanos(count),
        _ => return None,
    })
}

/// The headers for one attempt. Built anew for each: the client's own are still needed for the next.
pub(super) fn for_endpoint(
    head: &Parts,
    forwarded: &Forwarded,
    deadline: Instant,
    grpc: bool,
    span: &Span,
) -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(head.headers.len() + 6);
    let nominated = head.headers.get_all(CONNECTION);
    for (name, value) in &head.headers {
        if !is_withheld(name) && !is_nominated(name, nominated.iter()) {
            headers.append(name.clone(), value.clone());
        }
    }
    headers.insert(X_FORWARDED_FOR, forwarded.client_ip.clone());
    headers.insert(X_FORWARDED_PROTO, HeaderValue::from_static(if forwarded.secure { "https" } else { "http" }));
    headers.insert(X_REQUEST_ID, forwarded.request_id.clone());
    let left_ms = u64::try_from(deadline.saturating_duration_since(Instant::now()).as_millis()).unwrap_or(u64::MAX);
    headers.insert(X_REQUEST_TIMEOUT, HeaderValue::from(left_ms));
    if grpc && let Ok(value) = HeaderValue::try_from(format!("{}m", left_ms.clamp(1, 99_999_999))) {
        headers.insert(GRPC_TIMEOUT, value);
    }
    if !span.is_none() {
        trace::inject(span, &mut headers);
    }
    headers
}

/// What an endpoint does not get: fields that end at this hop (RFC 9110, section 7.6.1), the tenant's credentials, other
/// people's word on who the client is, and what is written anew.
fn is_withheld(name: &HeaderName) -> bool {
    if name == AUTHORIZATION {
        return true;
    }
    let name = name.as_str();
    matches!(
        name,
        "connection"
            | "keep-alive"
            | "proxy-connection"
            | "te"
            | "trailer"
            | "transfer-encoding"
            | "upgrade"
            | "expect"
            | "proxy-authorization"
            | "x-api-key"
            | "cookie"
            | "host"
            | "forwarded"
            | "via"
            | "x-real-ip"
            | "x-request-id"
            | "x-request-timeout-ms"
            | "grpc-timeout"
            | "traceparent"
            | "tracestate"
            | "baggage"
            | "http2-settings"
    ) || name.starts_with("x-forwarded-")
        || name.starts_with("isochrone-")
}

/// Whether `Connection` names the field as one for this hop only.
fn is_nominated<'h>(name: &HeaderName, mut connection: impl Iterator<Item = &'h HeaderValue>) -> bool {
    connection.any(|value| {
        let value = value.as_bytes();
        // The one value that nearly every client sends.
        !value.eq_ignore_ascii_case(b"keep-alive")
            && value
                .split(|&byte| byte == b',')
                .any(|item| item.trim_ascii().eq_ignore_ascii_case(name.as_str().as_bytes()))
    })
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn sent(headers: &[(&str, &str)]) -> HeaderMap {
        let mut request = Request::builder();
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let head = request.body(()).expect("valid").into_parts().0;
        let forwarded = Forwarded {
            client_ip: HeaderValue::from_static("203.0.113.7"),
            secure: true,
            request_id: HeaderValue::from_static("id"),
        };
        for_endpoint(&head, &forwarded, Instant::now() + Duration::from_secs(9), false, &Span::none())
    }

    #[test]
    fn an_endpoint_gets_neither_credentials_nor_hop_by_hop_fields_nor_spoofed_ones() {
        let headers = sent(&[
            ("authorization", "Bearer secret"),
            ("x-api-key", "secret"),
            ("cookie", "session=secret"),
            ("proxy-authorization", "Basic secret"),
            ("connection", "keep-alive, X-Hop"),
            ("x-hop", "secret"),
            ("transfer-encoding", "chunked"),
            ("te", "trailers"),
            ("forwarded", "for=1.2.3.4"),
            ("x-forwarded-for", "1.2.3.4"),
            ("x-forwarded-host", "evil"),
            ("x-real-ip", "1.2.3.4"),
            ("isochrone-region", "mars"),
            ("x-request-timeout-ms", "99999999"),
            ("content-type", "application/json"),
            ("x-custom", "a"),
            ("x-custom", "b"),
        ]);
        let mut names: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        let expected = [
            "content-type",
            "x-custom",
            "x-forwarded-for",
            "x-forwarded-proto",
            "x-request-id",
            "x-request-timeout-ms",
        ];
        assert_eq!(names, expected);
        assert_eq!(headers.get_all("x-custom").iter().count(), 2);
        assert_eq!(headers["x-forwarded-for"], "203.0.113.7");
        assert!(headers.values().all(|value| !value.to_str().expect("text").contains("secret")));
        let left: u64 = headers["x-request-timeout-ms"].to_str().expect("text").parse().expect("a number");
        assert!((8000..=9000).contains(&left));
    }

    #[test]
    fn the_earliest_deadline_wins_and_nonsense_is_ignored() {
        let rows: [(&[(&'static str, &'static str)], Option<u64>); 8] = [
            (&[], None),
            (&[("x-request-timeout-ms", "250")], Some(250)),
            (&[("grpc-timeout", "3S")], Some(3000)),
            (&[("grpc-timeout", "3S"), ("x-request-timeout-ms", "250")], Some(250)),
            (&[("x-request-timeout-ms", "999999999999")], Some(86_400_000)),
            (&[("x-request-timeout-ms", "-1")], None),
            (&[("grpc-timeout", "123456789S")], None),
            (&[("grpc-timeout", "3")], None),
        ];
        for (headers, expected) in rows {
            let headers = HeaderMap::from_iter(
                headers.iter().map(|&(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))),
            );
            assert_eq!(asked_deadline(&headers), expected.map(Duration::from_millis), "{headers:?}");
        }
    }
}
