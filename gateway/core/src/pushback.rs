//! Overload replies in a row: the endpoint is left alone for a while, which is no ejection.
//!
//! Nothing is tried at its end: whoever comes is sent, under the limit that the same replies have lowered, and one more such
//! reply prolongs the pause. It doubles each time, up to the longest; an answer forgives it all.

use std::time::Duration;

use crate::Time;

/// How long the pauses are.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Replies in a row that begin one.
    pub in_a_row: u32,
    /// The first.
    pub pause: Duration,
    /// The longest.
    pub pause_max: Duration,
}

/// What one model at one endpoint has replied.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pushback {
    replies: u32,
    pauses: u32,
    since: Time,
    until: Time,
}

impl Pushback {
    /// Nothing more is sent before this time.
    pub fn until(&self) -> Time {
        self.until
    }

    /// Whether there is nothing to forgive.
    pub fn is_calm(&self) -> bool {
        self.replies == 0 && self.pauses == 0
    }

    /// A request that began then was refused for overload. Returns the length of a pause that this began.
    pub fn refused(&mut self, began: Time, now: Time, rules: &Rules) -> Option<Duration> {
        // Sent before the pause; it says nothing new.
        if self.pauses > 0 && began < self.since {
            return None;
        }
        self.replies = self.replies.saturating_add(1);
        if self.pauses == 0 && self.replies < rules.in_a_row {
            return None;
        }
        let length = rules.pause.saturating_mul(1 << self.pauses.min(16)).min(rules.pause_max);
        *self = Pushback { replies: 0, pauses: self.pauses.saturating_add(1), since: now, until: now + length };
        Some(length)
    }

    /// A request that began then was answered.
    pub fn answered(&mut self, began: Time) {
        if self.pauses == 0 || began >= self.since {
            *self = Pushback::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules = Rules { in_a_row: 3, pause: Duration::from_secs(1), pause_max: Duration::from_secs(4) };

    fn seconds(n: u64) -> Time {
        Time(n * 1_000_000_000)
    }

    #[test]
    fn pauses_double_and_an_answer_after_them_forgives() {
        let mut pushback = Pushback::default();
        let mut refused =
            |began, now| pushback.refused(seconds(began), seconds(now), &RULES).map(|long| long.as_secs());
        assert_eq!([refused(1, 1), refused(1, 1), refused(1, 2)], [None, None, Some(1)]);
        assert_eq!(refused(1, 2), None, "sent before the pause");
        assert_eq!([refused(3, 3), refused(6, 6), refused(11, 11)], [Some(2), Some(4), Some(4)]);
        pushback.answered(seconds(10));
        assert!(!pushback.is_calm(), "that request began before the last pause");
        pushback.answered(seconds(15));
        assert!(pushback.is_calm());
    }
}
