//! A hung endpoint told from a slow one.
//!
//! Both are silent. A server that computes answers a question about its health meanwhile; one that hangs does not. So after
//! a silence it is asked, and what is pending there goes elsewhere only if it does not answer that either. Waiting for a
//! timeout instead would cost every pending client that timeout; moving at the first silence would double the load of a
//! worker that is only busy.

use std::time::Duration;

/// How long to wait.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Silence after which the endpoint is asked.
    pub silence: Duration,
    /// The longest wait for its answer.
    pub answer: Duration,
    /// From an answer to the next question, while the silence lasts.
    pub again: Duration,
}

impl Rules {
    /// The rules for an endpoint this far away: both waits grow by twice its measured round trip.
    #[must_use]
    pub fn at_distance(self, round_trip_ms: Option<f32>) -> Rules {
        let margin = Duration::try_from_secs_f32(round_trip_ms.unwrap_or(0.0) * 2.0 / 1000.0).unwrap_or_default();
        Rules { silence: self.silence + margin, answer: self.answer + margin, again: self.again }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn far_endpoints_are_given_longer_and_nonsense_changes_nothing() {
        let ms = Duration::from_millis;
        let rules = Rules { silence: ms(100), answer: ms(100), again: ms(500) };
        let far = rules.at_distance(Some(150.0));
        assert_eq!((far.silence.as_millis(), far.answer.as_millis(), far.again), (400, 400, ms(500)));
        for nonsense in [None, Some(f32::NAN), Some(-5.0), Some(f32::INFINITY)] {
            assert_eq!(rules.at_distance(nonsense).silence, ms(100));
        }
    }
}
