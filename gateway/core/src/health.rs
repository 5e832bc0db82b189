//! Active health: probe results, judged by thresholds each way so that one lost probe moves no traffic.
//!
//! An endpoint that goes down again soon after its return has to show more the next time: the successes that it needs
//! double with each such flap, so that one that flaps moves its clients ever more rarely.

use std::time::Duration;

use crate::Time;

/// The longest row of successes that is asked for.
const HEALTHY_MAX: u32 = 32;

/// How many results in a row change the judgement.
#[derive(Clone, Copy, Debug)]
pub struct Thresholds {
    /// Successes that make an unhealthy endpoint healthy.
    pub healthy: u32,
    /// Failures that make a healthy endpoint unhealthy.
    pub unhealthy: u32,
    /// How long it must have been healthy for its earlier falls to be forgotten.
    pub calm: Duration,
}

/// What the probes say of one endpoint.
#[derive(Clone, Copy, Debug, Default)]
pub struct Health {
    healthy: bool,
    /// Results in a row that disagree with `healthy`.
    against: u32,
    /// It has been healthy before.
    known: bool,
    /// Falls in a row that came soon after a return.
    flaps: u32,
    returned: Time,
    rises: u32,
}

impl Health {
    /// Whether the probes find it ready. Not before the first success.
    pub fn is_healthy(&self) -> bool {
        self.healthy
    }

    /// How often it has become healthy.
    pub fn rises(&self) -> u32 {
        self.rises
    }

    /// It is known to be down, without waiting for the threshold: it has to earn its return like any other.
    pub fn condemn(&mut self, now: Time, thresholds: Thresholds) {
        if self.healthy {
            self.fall(now, thresholds);
        }
        (self.against, self.known) = (0, true);
    }

    /// Takes in one result. Returns the new judgement if it changed.
    ///
    /// The very first success counts at once: there is nothing better to go by, and waiting for the threshold would make
    /// every start slow. An endpoint that has failed after that has to earn it.
    pub fn observe(&mut self, success: bool, now: Time, thresholds: Thresholds) -> Option<bool> {
        if success == self.healthy {
            self.against = 0;
            return None;
        }
        self.against += 1;
        let needed = if success {
            thresholds.healthy.saturating_mul(1 << self.flaps.min(16)).min(HEALTHY_MAX.max(thresholds.healthy))
        } else {
            thresholds.unhealthy
        };
        if self.against < needed && self.known {
            return None;
        }
        if success {
            (self.healthy, self.returned) = (true, now);
            self.rises = self.rises.saturating_add(1);
        } else {
            self.fall(now, thresholds);
        }
        (self.against, self.known) = (0, true);
        Some(success)
    }

    fn fall(&mut self, now: Time, thresholds: Thresholds) {
        // The first rise is no return: one that falls soon after its start has not flapped yet.
        let soon = self.rises > 1 && now.since(self.returned) < thresholds.calm;
        self.flaps = if soon { self.flaps + 1 } else { 0 };
        self.healthy = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Thresholds = Thresholds { healthy: 2, unhealthy: 3, calm: Duration::from_secs(30) };

    fn seconds(n: u64) -> Time {
        Time(n * 1_000_000_000)
    }

    #[test]
    fn thresholds_hold_each_way() {
        let mut health = Health::default();
        let script = [
            (true, Some(true)), // The first ever.
            (false, None),
            (false, None),
            (true, None), // Interrupts the row.
            (false, None),
            (false, None),
            (false, Some(false)),
            (true, None),
            (false, None),
            (true, None),
            (true, Some(true)),
        ];
        for (at, (success, expected)) in script.into_iter().enumerate() {
            // Slowly: none of this is flapping.
            assert_eq!(health.observe(success, seconds(at as u64 * 60), RULES), expected, "step {at}");
        }
    }

    #[test]
    fn the_condemned_are_down_at_once_and_return_by_the_threshold() {
        let mut health = Health::default();
        assert_eq!(health.observe(true, seconds(0), RULES), Some(true));
        health.condemn(seconds(60), RULES);
        assert!(!health.is_healthy());
        assert_eq!(health.observe(true, seconds(61), RULES), None);
        assert_eq!(health.observe(true, seconds(62), RULES), Some(true));
    }

    #[test]
    fn an_endpoint_that_is_still_starting_is_healthy_with_its_first_success() {
        let mut health = Health::default();
        assert_eq!(health.observe(false, seconds(0), RULES), None);
        assert_eq!(health.observe(true, seconds(1), RULES), Some(true));
    }

    #[test]
    fn one_that_flaps_has_to_show_twice_as_much_each_time_until_it_has_been_calm() {
        let mut health = Health::default();
        let mut now = 100;
        assert_eq!(health.observe(true, seconds(now), RULES), Some(true));
        let mut successes_to_return = |calm: u64| {
            now += calm;
            health.condemn(seconds(now), RULES);
            let needed = (1..100).find(|_| {
                now += 1;
                health.observe(true, seconds(now), RULES) == Some(true)
            });
            needed.expect("it returns")
        };
        assert_eq!([60, 1, 1, 1, 1, 1, 60].map(&mut successes_to_return), [2, 4, 8, 16, 32, 32, 2]);
    }
}
