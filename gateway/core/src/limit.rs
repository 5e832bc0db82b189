//! How many requests one endpoint is given at once: a limit that it finds by itself.
//!
//! Additive increase, multiplicative decrease (Chiu and Jain, "Analysis of the Increase and Decrease Algorithms for
//! Congestion Avoidance", 1989): each success near the limit raises it a little, an overload reply (429, 503,
//! RESOURCE_EXHAUSTED) lowers it by a tenth, at most ten times a second, because many fail together.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::Time;

/// The bounds of the limit.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Never fewer.
    pub min: u32,
    /// Never more, and the start.
    pub max: u32,
}

const LOWER_TO: f32 = 0.9;
const LOWER_EVERY: Duration = Duration::from_millis(100);

/// Sixteenths: a success adds one, so that the limit rises by one for each sixteen.
const ONE: u32 = 16;

/// One endpoint's limit.
#[derive(Debug, Default)]
pub struct Limit {
    /// In sixteenths, as lowered; 0: not yet lowered, the limit is the maximum.
    sixteenths: AtomicU32,
    lowered: AtomicU64,
}

impl Limit {
    /// The limit now.
    pub fn get(&self, rules: Rules) -> u32 {
        match self.sixteenths.load(Relaxed) {
            0 => rules.max,
            sixteenths => (sixteenths / ONE).clamp(rules.min, rules.max),
        }
    }

    /// A request succeeded while so many were in flight: if the limit was being used, it rises.
    pub fn succeeded(&self, in_flight: u32, rules: Rules) {
        let sixteenths = self.sixteenths.load(Relaxed);
        if sixteenths != 0 && in_flight.saturating_mul(2) >= sixteenths / ONE {
            // Two cores that race count once.
            let raised = sixteenths.saturating_add(1);
            self.sixteenths.store(if raised / ONE >= rules.max { 0 } else { raised }, Relaxed);
        }
    }

    /// The endpoint said that so many in flight are too many.
    pub fn overloaded(&self, in_flight: u32, now: Time, rules: Rules) {
        if now.since(Time(self.lowered.load(Relaxed))) < LOWER_EVERY && self.lowered.load(Relaxed) != 0 {
            return;
        }
        self.lowered.store(now.0.max(1), Relaxed);
        // From what there was rather than from a limit that was never reached.
        let from = self.get(rules).min(in_flight.max(1));
        let lowered = (from as f32 * LOWER_TO * ONE as f32) as u32;
        self.sixteenths.store(lowered.max(rules.min * ONE), Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules = Rules { min: 4, max: 100 };

    #[test]
    fn it_falls_from_what_was_in_flight_at_most_ten_times_a_second_and_not_below_the_least() {
        let limit = Limit::default();
        assert_eq!(limit.get(RULES), 100);
        limit.overloaded(50, Time(1_000_000_000), RULES);
        assert_eq!(limit.get(RULES), 45);
        limit.overloaded(45, Time(1_050_000_000), RULES);
        assert_eq!(limit.get(RULES), 45, "within the same tenth of a second");
        for at in 12..60 {
            limit.overloaded(100, Time(at * 100_000_000), RULES);
        }
        assert_eq!(limit.get(RULES), RULES.min);
    }

    #[test]
    fn it_rises_only_while_it_is_used_and_to_the_most() {
        let limit = Limit::default();
        limit.overloaded(20, Time(1), RULES);
        assert_eq!(limit.get(RULES), 18);
        (0..1000).for_each(|_| limit.succeeded(1, RULES));
        assert_eq!(limit.get(RULES), 18, "it is not what holds anybody back");
        (0..16).for_each(|_| limit.succeeded(18, RULES));
        assert_eq!(limit.get(RULES), 19);
        (0..10_000).for_each(|_| limit.succeeded(100, RULES));
        assert_eq!(limit.get(RULES), 100);
    }
}
