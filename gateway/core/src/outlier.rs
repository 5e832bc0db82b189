//! Passive outlier detection: an endpoint that fails real requests is ejected for a while, whatever its probes say.
//!
//! ```text
//! Admitting --failures in a row--> Ejected --time over--> Probing --the trial succeeds--> Admitting
//!                                     ^----------------------the trial fails--'
//! ```
//! The time doubles with each ejection in a row and is bounded; a success after the last one resets it.

use std::time::Duration;

use crate::Time;

/// When to eject, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Failures in a row that eject.
    pub consecutive_failures: u32,
    /// Length of the first ejection.
    pub ejection: Duration,
    /// Longest ejection.
    pub ejection_max: Duration,
}

/// Where an endpoint stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Takes requests. Enough failures in a row lead to `Ejected`.
    Admitting,
    /// Takes none until the time. Then, asked by [`Outlier::try_trial`], it leads to `Probing`.
    Ejected {
        /// The end of the ejection.
        until: Time,
    },
    /// One request is out to test it. Its success leads to `Admitting`, its failure to `Ejected` for longer.
    Probing {
        /// When the trial is given up for lost: its caller may vanish without a result.
        until: Time,
    },
}

/// One endpoint's passive state.
#[derive(Clone, Copy, Debug)]
pub struct Outlier {
    state: State,
    failures: u32,
    ejections: u32,
}

impl Default for Outlier {
    fn default() -> Self {
        Outlier { state: State::Admitting, failures: 0, ejections: 0 }
    }
}

impl Outlier {
    /// The state as last changed; an ejection whose time is over still reads `Ejected` until a trial begins.
    pub fn state(&self) -> State {
        self.state
    }

    /// Whether there is nothing that a success would reset.
    pub fn is_default(&self) -> bool {
        self.state == State::Admitting && self.failures == 0 && self.ejections == 0
    }

    /// A request succeeded. Returns whether the endpoint has returned by it.
    pub fn success(&mut self) -> bool {
        let returned = self.state != State::Admitting;
        *self = Outlier::default();
        returned
    }

    /// A request failed in a way that counts. Returns the length of the ejection if it ejected.
    pub fn failure(&mut self, now: Time, rules: &Rules) -> Option<Duration> {
        self.failures = self.failures.saturating_add(1);
        match self.state {
            State::Admitting if self.failures < rules.consecutive_failures => None,
            // Sent before the ejection; it says nothing new.
            State::Ejected { until } if now < until => None,
            _ => Some(self.eject(now, rules)),
        }
    }

    /// The endpoint is known to be dead: it is ejected without waiting for more failures. Returns the length of the ejection
    /// if this began it.
    pub fn condemn(&mut self, now: Time, rules: &Rules) -> Option<Duration> {
        match self.state {
            State::Ejected { until } if now < until => None,
            _ => Some(self.eject(now, rules)),
        }
    }

    /// Asks to send one trial request. True at most once an ejection.
    pub fn try_trial(&mut self, now: Time, rules: &Rules) -> bool {
        match self.state {
            State::Admitting => true,
            State::Ejected { until } | State::Probing { until } if now >= until => {
                self.state = State::Probing { until: now + rules.ejection_max };
                true
            }
            State::Ejected { .. } | State::Probing { .. } => false,
        }
    }

    /// The trial ended without a verdict: its client left, or the answer said nothing. The next request may be it.
    pub fn release_trial(&mut self, now: Time) {
        if let State::Probing { .. } = self.state {
            self.state = State::Ejected { until: now };
        }
    }

    fn eject(&mut self, now: Time, rules: &Rules) -> Duration {
        let length = rules.ejection.saturating_mul(1 << self.ejections.min(16)).min(rules.ejection_max);
        self.ejections = self.ejections.saturating_add(1);
        self.failures = 0;
        self.state = State::Ejected { until: now + length };
        length
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules =
        Rules { consecutive_failures: 3, ejection: Duration::from_secs(1), ejection_max: Duration::from_secs(4) };

    fn seconds(n: u64) -> Time {
        Time(n * 1_000_000_000)
    }

    fn ejected(until: u64) -> State {
        State::Ejected { until: seconds(until) }
    }

    #[test]
    fn failures_in_a_row_eject_and_a_success_between_them_does_not_let_them() {
        let mut outlier = Outlier::default();
        assert_eq!(outlier.failure(seconds(0), &RULES), None);
        assert_eq!(outlier.failure(seconds(0), &RULES), None);
        assert!(!outlier.success());
        assert_eq!(outlier.failure(seconds(0), &RULES), None);
        assert_eq!(outlier.failure(seconds(0), &RULES), None);
        assert_eq!(outlier.failure(seconds(0), &RULES), Some(Duration::from_secs(1)));
        assert_eq!(outlier.state(), ejected(1));
    }

    #[test]
    fn the_ejection_doubles_to_its_bound_and_one_trial_is_sent_each_time() {
        let mut outlier = Outlier::default();
        let mut now = 0;
        (0..3).for_each(|_| {
            let _ = outlier.failure(seconds(now), &RULES);
        });
        for length in [1, 2, 4, 4] {
            assert_eq!(outlier.state(), ejected(now + length));
            assert!(!outlier.try_trial(seconds(now), &RULES));
            now += length;
            assert!(outlier.try_trial(seconds(now), &RULES));
            assert!(!outlier.try_trial(seconds(now), &RULES), "a second trial at once");
            assert!(outlier.failure(seconds(now), &RULES).is_some());
        }
        now += 4;
        assert!(outlier.try_trial(seconds(now), &RULES));
        assert!(outlier.success());
        assert_eq!(outlier.state(), State::Admitting);
        // The back-off starts anew.
        (0..3).for_each(|_| {
            let _ = outlier.failure(seconds(now), &RULES);
        });
        assert_eq!(outlier.state(), ejected(now + 1));
    }

    #[test]
    fn failures_of_requests_sent_before_the_ejection_do_not_lengthen_it() {
        let mut outlier = Outlier::default();
        (0..50).for_each(|_| {
            let _ = outlier.failure(seconds(0), &RULES);
        });
        assert_eq!(outlier.state(), ejected(1));
    }

    #[test]
    fn the_condemned_are_out_at_once_and_once() {
        let mut outlier = Outlier::default();
        assert_eq!(outlier.condemn(seconds(0), &RULES), Some(Duration::from_secs(1)));
        assert_eq!(outlier.condemn(seconds(0), &RULES), None, "the others that were pending there");
        assert!(!outlier.try_trial(seconds(0), &RULES));
        assert!(outlier.try_trial(seconds(1), &RULES));
        assert_eq!(outlier.condemn(seconds(1), &RULES), Some(Duration::from_secs(2)));
    }

    #[test]
    fn a_trial_whose_result_never_comes_is_given_up() {
        let mut outlier = Outlier::default();
        (0..3).for_each(|_| {
            let _ = outlier.failure(seconds(0), &RULES);
        });
        assert!(outlier.try_trial(seconds(1), &RULES));
        assert!(!outlier.try_trial(seconds(4), &RULES));
        assert!(outlier.try_trial(seconds(5), &RULES));
        // One that is known to have brought nothing is given up at once.
        outlier.release_trial(seconds(6));
        assert!(outlier.try_trial(seconds(6), &RULES));
    }
}
