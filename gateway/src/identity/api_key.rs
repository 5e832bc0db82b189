//! API keys. The gateway knows their digests only; a key itself is never stored, logged or sent on.

use http::HeaderMap;
use http::header::AUTHORIZATION;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::error::Error;
use crate::snapshot::Snapshot;

/// The longest key looked at.
const KEY_MAX: usize = 512;

/// The key that the request presents, in `Authorization: Bearer` or in `x-api-key`.
///
/// # Errors
/// Credentials of another kind, or two that differ: it would not be clear who asks.
pub(super) fn presented(headers: &HeaderMap) -> Result<Option<&[u8]>, Error> {
    let mut found: Option<&[u8]> = None;
    let bearer = headers.get_all(AUTHORIZATION).iter().map(|value| bearer(value.as_bytes()));
    let plain = headers.get_all("x-api-key").iter().map(|value| Some(value.as_bytes()));
    for key in bearer.chain(plain) {
        let key = key.filter(|key| !key.is_empty() && key.len() <= KEY_MAX).ok_or(Error::UnknownKey)?;
        if found.is_some_and(|other| other != key) {
            return Err(Error::UnknownKey);
        }
        found = Some(key);
    }
    Ok(found)
}

/// RFC 6750, section 2.1; the scheme's case does not matter (RFC 9110, section 11.1).
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, key) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii())
}

/// The tenant whose key this is.
///
/// A key is 256 random bits, so one round of SHA-256 is enough to keep it; found by its digest, a guess learns nothing
/// from the time that the look-up takes.
pub(super) fn tenant(snapshot: &Snapshot, key: &[u8]) -> Option<usize> {
    let digest: [u8; 32] = Sha256::digest(key).into();
    let (known, tenant) = snapshot.keys.get_key_value(&digest)?;
    bool::from(known.ct_eq(&digest)).then_some(*tenant)
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};

    use super::*;

    fn presented_in(rows: &[(&'static str, &'static str)]) -> Result<Option<String>, ()> {
        let headers = HeaderMap::from_iter(
            rows.iter().map(|&(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))),
        );
        presented(&headers).map(|key| key.map(|key| String::from_utf8_lossy(key).into_owned())).map_err(|_| ())
    }

    #[test]
    fn keys_are_found_in_either_header_and_never_guessed_at() {
        let rows: [(&[(&str, &str)], Result<Option<&str>, ()>); 9] = [
            (&[], Ok(None)),
            (&[("authorization", "Bearer abc")], Ok(Some("abc"))),
            (&[("authorization", "bEaReR  abc ")], Ok(Some("abc"))),
            (&[("x-api-key", "abc")], Ok(Some("abc"))),
            (&[("authorization", "Bearer abc"), ("x-api-key", "abc")], Ok(Some("abc"))),
            (&[("authorization", "Bearer abc"), ("x-api-key", "xyz")], Err(())),
            (&[("authorization", "Basic abc")], Err(())),
            (&[("authorization", "Bearer ")], Err(())),
            (&[("x-api-key", "")], Err(())),
        ];
        for (headers, expected) in rows {
            let headers: Vec<(&'static str, &'static str)> = headers.to_vec();
            assert_eq!(presented_in(&headers), expected.map(|key| key.map(str::to_owned)), "{headers:?}");
        }
    }
}
