//! One budget for all extra attempts to a destination: a share of its recent requests, plus a floor.
//!
//! Retries multiply load exactly when a destination can bear it least; the budget bounds that multiplication, whatever the
//! rules for single requests say. After the retry budgets of Finagle and of `tower`, here in a ring of one-second slots.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::Time;

const SLOTS: usize = 10;

/// Counts requests and extra attempts over the last ten seconds.
///
/// Shared by all cores without a lock: a race at the turn of a second can misplace a few counts by one slot, which the
/// share does not notice.
#[derive(Debug, Default)]
pub struct Budget {
    slots: [Slot; SLOTS],
}

#[derive(Debug, Default)]
struct Slot {
    /// The second that the counts belong to, plus one: zero is a slot never used.
    second: AtomicU64,
    requests: AtomicU64,
    extras: AtomicU64,
}

impl Budget {
    /// Counts one request, which earns its share.
    pub fn deposit(&self, now: Time) {
        self.slot(now).requests.fetch_add(1, Relaxed);
    }

    /// Takes one extra attempt if `share` of the requests plus `floor_per_second` of the last ten seconds allow it.
    pub fn withdraw(&self, now: Time, share: f32, floor_per_second: u32) -> bool {
        let (requests, extras) = self.counts(now);
        let allowed = requests as f32 * share + (floor_per_second as usize * SLOTS) as f32;
        let withdrawn = (extras as f32) < allowed.floor();
        if withdrawn {
            self.slot(now).extras.fetch_add(1, Relaxed);
        }
        withdrawn
    }

    /// Requests and extra attempts of the last ten seconds.
    pub fn counts(&self, now: Time) -> (u64, u64) {
        let second = second_of(now);
        let recent = self.slots.iter().filter(|slot| slot.second.load(Relaxed) + SLOTS as u64 > second);
        recent.fold((0, 0), |(requests, extras), slot| {
            (requests + slot.requests.load(Relaxed), extras + slot.extras.load(Relaxed))
        })
    }

    fn slot(&self, now: Time) -> &Slot {
        let second = second_of(now);
        let slot = &self.slots[(second % SLOTS as u64) as usize];
        let held = slot.second.load(Relaxed);
        if held != second && slot.second.compare_exchange(held, second, Relaxed, Relaxed).is_ok() {
            slot.requests.store(0, Relaxed);
            slot.extras.store(0, Relaxed);
        }
        slot
    }
}

fn second_of(now: Time) -> u64 {
    now.0 / 1_000_000_000 + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(n: u64) -> Time {
        Time(n * 1_000_000_000)
    }

    fn withdrawals(budget: &Budget, now: Time, share: f32, floor: u32) -> usize {
        (0..100_000).take_while(|_| budget.withdraw(now, share, floor)).count()
    }

    #[test]
    fn a_fifth_of_the_requests_and_no_more() {
        let budget = Budget::default();
        (0..1000).for_each(|_| budget.deposit(seconds(5)));
        assert_eq!(withdrawals(&budget, seconds(5), 0.2, 0), 200);
        assert_eq!(withdrawals(&budget, seconds(14), 0.2, 0), 0);
    }

    #[test]
    fn the_floor_serves_a_quiet_destination() {
        let budget = Budget::default();
        assert_eq!(withdrawals(&budget, seconds(0), 0.2, 10), 100);
        assert_eq!(withdrawals(&budget, seconds(9), 0.2, 10), 0);
        assert_eq!(withdrawals(&budget, seconds(10), 0.2, 10), 100);
    }

    #[test]
    fn what_is_older_than_ten_seconds_is_forgotten() {
        let budget = Budget::default();
        (0..1000).for_each(|_| budget.deposit(seconds(5)));
        assert_eq!(withdrawals(&budget, seconds(15), 0.2, 0), 0);
    }
}
