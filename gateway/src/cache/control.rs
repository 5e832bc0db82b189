//! What a client says of caching (RFC 9111, section 5.2.1).

use std::time::Duration;

use http::HeaderMap;
use http::header::{CACHE_CONTROL, PRAGMA};

/// The directives that are honoured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Control {
    /// Nothing of this is kept, nor is anything kept given.
    pub(super) no_store: bool,
    /// Nothing kept is given.
    pub(super) no_cache: bool,
    pub(super) only_if_cached: bool,
    max_age: Option<Duration>,
}

impl Control {
    pub(super) fn parse(headers: &HeaderMap) -> Control {
        let mut control = Control::default();
        let mut said = headers.get_all(CACHE_CONTROL).iter().peekable();
        // Where there is no other word (RFC 9111, section 5.4).
        control.no_cache = said.peek().is_none() && headers.get(PRAGMA).is_some_and(|value| value == "no-cache");
        for directive in said.filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(',')) {
            let (name, value) = directive.split_once('=').unwrap_or((directive, ""));
            match name.trim().to_ascii_lowercase().as_str() {
                "no-store" => control.no_store = true,
                "no-cache" => control.no_cache = true,
                "only-if-cached" => control.only_if_cached = true,
                // What is no number is taken for the strictest.
                "max-age" => {
                    let seconds = value.trim().trim_matches('"').parse().unwrap_or(0);
                    control.max_age = Some(Duration::from_secs(seconds));
                    // Nothing that somebody else is given at this moment, either.
                    control.no_cache |= seconds == 0;
                }
                _ => {}
            }
        }
        control
    }

    /// Whether the client takes an answer of this age.
    pub(super) fn takes(&self, age: Duration) -> bool {
        self.max_age.is_none_or(|max_age| age <= max_age && !max_age.is_zero())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(values: &[&str]) -> Control {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(CACHE_CONTROL, value.parse().expect("a value"));
        }
        Control::parse(&headers)
    }

    #[test]
    fn directives_are_read_wherever_they_stand() {
        assert_eq!(parsed(&[]), Control::default());
        assert!(parsed(&["No-Store"]).no_store);
        assert!(parsed(&["max-age=5, no-cache"]).no_cache);
        assert!(parsed(&["max-stale", "only-if-cached"]).only_if_cached);
        let seconds = Duration::from_secs;
        assert!(parsed(&["max-age=5"]).takes(seconds(5)) && !parsed(&["max-age=5"]).takes(seconds(6)));
        for nothing in ["max-age=0", "max-age=", "max-age=x", "max-age=-1"] {
            assert!(!parsed(&[nothing]).takes(Duration::ZERO), "{nothing}");
        }
        let mut headers = HeaderMap::new();
        headers.insert(PRAGMA, "no-cache".parse().expect("a value"));
        assert!(Control::parse(&headers).no_cache);
    }
}
