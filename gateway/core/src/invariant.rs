//! What must never happen, as predicates: asserted where it is decided (in debug builds), in the property tests, and by the
//! simulation. The numbers are those of the list in `gateway/ARCHITECTURE.md`.

use crate::region::RegionIndex;
use crate::residency::Permitted;

/// 1. No byte of a request goes to a region outside its permitted set: first attempt, retry or hedge.
pub fn is_permitted(permitted: &Permitted, region: RegionIndex) -> bool {
    permitted.contains(region)
}

/// 2. What is permitted later is never more than what was permitted before: a newer configuration only takes away.
pub fn only_shrinks(before: &Permitted, after: &Permitted) -> bool {
    after.regions().intersection(before.regions()) == after.regions()
}

/// 3. No more attempts than the most, and none to one endpoint twice.
pub fn attempts_are_bounded(tried: &[u16], max: usize) -> bool {
    tried.len() <= max && tried.iter().enumerate().all(|(at, endpoint)| !tried[..at].contains(endpoint))
}

/// 4. No more extra attempts to a destination than its budget: a share of its requests, plus a floor.
pub fn is_within_budget(extras: u64, requests: u64, share: f32, floor: u64) -> bool {
    extras as f64 <= requests as f64 * f64::from(share) + floor as f64
}

/// 5. The count of requests in flight never falls below zero; the simulation sees that it ends there.
pub fn can_fall(before: u32) -> bool {
    before > 0
}

/// 6. The ejected share of a region never exceeds the cap; one endpoint may always be out.
pub fn is_within_cap(ejected: usize, endpoints: usize, share: f32) -> bool {
    ejected <= 1 || ejected as f32 <= endpoints as f32 * share
}

/// 7. Health is ignored only when there is no healthy endpoint left that this request has not tried; drain and hard limit
///    are not ignored then either.
pub fn may_panic(healthy_untried: usize, drained: bool, load: u32, hard_limit: u32) -> bool {
    healthy_untried == 0 && !drained && load < hard_limit
}

/// 8. No queue is longer than its bound.
pub fn is_bounded(length: usize, bound: usize) -> bool {
    length <= bound
}
