//! `Cache-Status` (RFC 9211) and `Age`: what the cache did with a request.

use std::fmt::Write as _;
use std::time::Duration;

use http::header::AGE;
use http::{HeaderMap, HeaderName, HeaderValue};

const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");

/// What the cache did.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Status {
    /// It was not asked, and why; without a word if it never is.
    Bypass(&'static str),
    /// It gave what was kept, or what another request was given at that moment.
    Hit { age: Duration, ttl: Duration, scope: &'static str, collapsed: bool },
    /// It had nothing. If the answer was not kept, why.
    Miss { stored: Option<&'static str>, scope: &'static str },
}

impl Status {
    /// The word for it in the log.
    pub(crate) fn as_str(&self) -> &'static str {
        match self {
            Status::Bypass(_) => "bypass",
            Status::Hit { collapsed: true, .. } => "collapsed",
            Status::Hit { age, ttl, .. } if age >= ttl => "stale",
            Status::Hit { .. } => "hit",
            Status::Miss { stored: None, .. } => "stored",
            Status::Miss { .. } => "miss",
        }
    }

    /// Writes it onto an answer.
    pub(crate) fn write(&self, headers: &mut HeaderMap) {
        let mut text = String::with_capacity(64);
        text.push_str("isochrone; ");
        let _ = match self {
            // Nothing would ever be kept: that is no reason of this request's.
            Status::Bypass("") => write!(text, "fwd=bypass"),
            Status::Bypass(why) => write!(text, "fwd=bypass; detail={}", token(why)),
            Status::Miss { stored: None, scope } => write!(text, "fwd=miss; stored; detail={scope}"),
            Status::Miss { stored: Some(why), .. } => write!(text, "fwd=miss; detail={}", token(why)),
            Status::Hit { collapsed: true, scope, .. } => write!(text, "fwd=miss; collapsed; detail={scope}"),
            Status::Hit { age, ttl, scope, .. } => {
                let left =
                    i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX) - i64::try_from(age.as_secs()).unwrap_or(i64::MAX);
                headers.insert(AGE, HeaderValue::from(age.as_secs()));
                write!(text, "hit; ttl={left}; detail={scope}")
            }
        };
        if let Ok(value) = HeaderValue::try_from(text) {
            headers.insert(CACHE_STATUS, value);
        }
    }
}

/// Words as one token.
fn token(words: &str) -> String {
    words.replace(' ', "-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_said_in_the_words_of_the_rfc() {
        let seconds = Duration::from_secs;
        let hit = |age, collapsed| Status::Hit { age: seconds(age), ttl: seconds(60), scope: "tenant", collapsed };
        for (status, said, word) in [
            (Status::Bypass(""), "isochrone; fwd=bypass", "bypass"),
            (Status::Bypass("no-store"), "isochrone; fwd=bypass; detail=no-store", "bypass"),
            (hit(10, false), "isochrone; hit; ttl=50; detail=tenant", "hit"),
            (hit(70, false), "isochrone; hit; ttl=-10; detail=tenant", "stale"),
            (hit(0, true), "isochrone; fwd=miss; collapsed; detail=tenant", "collapsed"),
            (Status::Miss { stored: None, scope: "shared" }, "isochrone; fwd=miss; stored; detail=shared", "stored"),
            (
                Status::Miss { stored: Some("two words"), scope: "tenant" },
                "isochrone; fwd=miss; detail=two-words",
                "miss",
            ),
        ] {
            let mut headers = HeaderMap::new();
            status.write(&mut headers);
            assert_eq!((&headers[CACHE_STATUS], status.as_str()), (&HeaderValue::from_static(said), word));
            assert_eq!(headers.contains_key(AGE), word == "hit" || word == "stale");
        }
    }
}
