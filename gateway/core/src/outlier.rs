//! Passive outlier detection: an endpoint that fails real requests is ejected for a while, whatever its probes say.
//!
//! ```text
//! Admitting --failures in a row, or too large a share of them--> Ejected --time over--> Probing --the trial succeeds--> Admitting
//!                                                                   ^--------------------the trial fails--'
//! ```
//! The time doubles with each ejection and is bounded; an endpoint that has been calm for as long as the longest ejection
//! starts anew. How many may be out at once is [`Fleet`](crate::fleet::Fleet)'s to say, which sees the others.

use std::time::Duration;

use crate::Time;

/// When to eject, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Failures in a row that eject.
    pub consecutive_failures: u32,
    /// The share of failed requests of the last ten seconds that ejects, from `failure_volume` requests on.
    pub failure_share: f32,
    /// See there.
    pub failure_volume: u32,
    /// Length of the first ejection.
    pub ejection: Duration,
    /// Longest ejection.
    pub ejection_max: Duration,
}

/// Where an endpoint stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Takes requests. Enough failures lead to `Ejected`.
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
    ejected: Time,
    returned: Time,
}

impl Default for Outlier {
    fn default() -> Self {
        Outlier { state: State::Admitting, failures: 0, ejections: 0, ejected: Time(0), returned: Time(0) }
    }
}

impl Outlier {
    /// The state as last changed; an ejection whose time is over still reads `Ejected` until a trial begins.
    pub fn state(&self) -> State {
        self.state
    }

    /// Whether there is nothing that a success would change.
    pub fn is_calm(&self) -> bool {
        self.state == State::Admitting && self.failures == 0
    }

    /// A request that began then succeeded. Returns whether the endpoint is back by it: one that was sent before the
    /// ejection says nothing new.
    pub fn success(&mut self, began: Time, now: Time) -> bool {
        let was_out = self.state != State::Admitting;
        if was_out && began < self.ejected {
            return false;
        }
        if was_out {
            self.returned = now;
        }
        (self.state, self.failures) = (State::Admitting, 0);
        was_out
    }

    /// A request that began then failed in a way that counts. Returns whether the endpoint ought to be ejected for it.
    pub fn failure(&mut self, began: Time, now: Time, rules: &Rules) -> bool {
        if self.state != State::Admitting && began < self.ejected {
            return false;
        }
        self.failures = self.failures.saturating_add(1);
        match self.state {
            State::Admitting => self.failures >= rules.consecutive_failures,
            State::Ejected { until } => now >= until,
            State::Probing { .. } => true,
        }
    }

    /// It is known to be down in another way: what led there is paid for.
    pub fn forgive(&mut self) {
        self.failures = 0;
    }

    /// Ejects it. Returns for how long.
    pub fn eject(&mut self, now: Time, rules: &Rules) -> Duration {
        if self.state == State::Admitting && now.since(self.returned) >= rules.ejection_max {
            self.ejections = 0;
        }
        let length = rules.ejection.saturating_mul(1 << self.ejections.min(16)).min(rules.ejection_max);
        self.ejections = self.ejections.saturating_add(1);
        self.failures = 0;
        self.ejected = now;
        self.state = State::Ejected { until: now + length };
        length
    }

    /// Asks to send one request. For an ejected endpoint whose time is over that is the trial, of which there is one at a
    /// time. Returns whether to send, and whether it is the trial.
    pub fn try_trial(&mut self, now: Time, rules: &Rules) -> (bool, bool) {
        match self.state {
            State::Admitting => (true, false),
            State::Ejected { until } | State::Probing { until } if now >= until => {
                self.state = State::Probing { until: now + rules.ejection_max };
                (true, true)
            }
            State::Ejected { .. } | State::Probing { .. } => (false, false),
        }
    }

    /// The trial ended without a verdict: its client left, or the answer said nothing. The next request may be it.
    pub fn release_trial(&mut self) {
        if let State::Probing { .. } = self.state {
            self.state = State::Ejected { until: Time(0) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules = Rules {
        consecutive_failures: 3,
        failure_share: 0.5,
        failure_volume: 20,
        ejection: Duration::from_secs(1),
        ejection_max: Duration::from_secs(4),
    };

    fn seconds(n: u64) -> Time {
        Time(n * 1_000_000_000)
    }

    /// As the fleet does it, with nobody else out.
    fn fail(outlier: &mut Outlier, now: u64) -> Option<u64> {
        outlier.failure(seconds(now), seconds(now), &RULES).then(|| outlier.eject(seconds(now), &RULES).as_secs())
    }

    #[test]
    fn failures_in_a_row_eject_and_a_success_between_them_does_not_let_them() {
        let mut outlier = Outlier::default();
        assert_eq!([fail(&mut outlier, 100), fail(&mut outlier, 100)], [None, None]);
        outlier.success(seconds(100), seconds(100));
        assert_eq!([100; 3].map(|now| fail(&mut outlier, now)), [None, None, Some(1)]);
        assert_eq!(outlier.state(), State::Ejected { until: seconds(101) });
    }

    #[test]
    fn the_ejection_doubles_to_its_bound_with_one_trial_each_time_and_calm_forgives() {
        let mut outlier = Outlier::default();
        let mut now = 100;
        let _ = [100; 2].map(|now| fail(&mut outlier, now));
        assert_eq!(fail(&mut outlier, now), Some(1));
        for (length, next) in [(1, 2), (2, 4), (4, 4)] {
            assert_eq!(outlier.try_trial(seconds(now), &RULES), (false, false));
            now += length;
            assert_eq!(outlier.try_trial(seconds(now), &RULES), (true, true));
            assert_eq!(outlier.try_trial(seconds(now), &RULES), (false, false), "a second trial at once");
            assert_eq!(fail(&mut outlier, now), Some(next));
        }
        now += 4;
        assert_eq!(outlier.try_trial(seconds(now), &RULES), (true, true));
        assert!(outlier.success(seconds(now), seconds(now)));
        assert_eq!(outlier.try_trial(seconds(now), &RULES), (true, false));
        // One success does not wash a flapping endpoint clean.
        assert_eq!([now; 3].map(|now| fail(&mut outlier, now)), [None, None, Some(4)]);
        assert_eq!(outlier.try_trial(seconds(now + 4), &RULES), (true, true));
        assert!(outlier.success(seconds(now + 4), seconds(now + 4)));
        assert_eq!([now + 8; 3].map(|now| fail(&mut outlier, now)), [None, None, Some(1)]);
    }

    #[test]
    fn requests_sent_before_the_ejection_neither_end_it_nor_fail_its_trial() {
        let mut outlier = Outlier::default();
        let _ = [100; 3].map(|now| fail(&mut outlier, now));
        assert!(!outlier.success(seconds(99), seconds(100)));
        assert_eq!(outlier.state(), State::Ejected { until: seconds(101) });
        assert_eq!(outlier.try_trial(seconds(101), &RULES), (true, true));
        assert!(!outlier.failure(seconds(99), seconds(102), &RULES) && !outlier.success(seconds(99), seconds(102)));
        assert!(outlier.success(seconds(101), seconds(102)), "the trial itself");
    }

    #[test]
    fn failures_of_requests_sent_before_the_ejection_do_not_lengthen_it() {
        let mut outlier = Outlier::default();
        let lengths: Vec<_> = (0..50).filter_map(|_| fail(&mut outlier, 100)).collect();
        assert_eq!(lengths, [1]);
    }

    #[test]
    fn a_trial_whose_result_never_comes_is_given_up() {
        let mut outlier = Outlier::default();
        let _ = [100; 3].map(|now| fail(&mut outlier, now));
        assert_eq!(outlier.try_trial(seconds(101), &RULES), (true, true));
        assert_eq!(outlier.try_trial(seconds(104), &RULES), (false, false));
        assert_eq!(outlier.try_trial(seconds(105), &RULES), (true, true));
        // One that is known to have brought nothing is given up at once.
        outlier.release_trial();
        assert_eq!(outlier.try_trial(seconds(105), &RULES), (true, true));
    }
}
