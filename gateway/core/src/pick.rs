//! The pick: the best permitted region that can take the request, and one endpoint of it.
//!
//! Between regions the order is [`steer`](crate::steer)'s; limits, health and recovery say who is passed over. Inside the
//! region it is the power of two choices (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001): of
//! two endpoints drawn at random, the one where peak response time × requests in flight is less. Choosing the cheapest of
//! all would send every gateway to the same endpoint at once. With an affinity it is rendezvous hashing with bounded loads
//! (Mirrokni, Thorup and Zadimoghaddam, "Consistent Hashing with Bounded Loads", 2017).

use crate::Time;
use crate::fleet::{Fleet, Look, is_in};
use crate::invariant;
use crate::live::Availability;
use crate::region::{RegionIndex, RegionSet};
use crate::residency::Permitted;
use crate::steer::{Client, Policy, Pool, Score, Steering, mix, weighted_rank};

/// How much more than the mean an endpoint is given for the sake of affinity.
const AFFINITY_LOAD: f32 = 1.25;

/// Regions within this share or this many milliseconds of the best are almost as good; cost decides between them.
const TIE_SHARE: f32 = 0.1;
const TIE_MS: f32 = 5.0;

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Query<'a> {
    /// For whom.
    pub client: Client<'a>,
    /// The model's place in the fleet; `None` for calls about the server.
    pub model: Option<usize>,
    /// Over gRPC rather than HTTP.
    pub grpc: bool,
    /// The route's steering.
    pub steering: &'a Steering,
    /// Requests of the same number go to the same endpoint of the region, as far as its load lets them.
    pub affinity: Option<u64>,
}

/// What earlier attempts of the same request have taught.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tried<'a> {
    /// Endpoints that must not be asked again.
    pub endpoints: &'a [u16],
    /// Regions to be avoided while another can take the request.
    pub suspect: RegionSet,
}

/// Why a better region was passed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passed {
    /// None of its endpoints is healthy.
    Down,
    /// This request has tried all of it that is healthy.
    Tried,
    /// Its endpoints have all that they can take.
    Full,
    /// It is over its soft limit, and another is not.
    OverSoftLimit,
    /// It is at its hard limit.
    AtHardLimit,
    /// Too much of it is out or still recovering for all of its clients.
    Recovering,
    /// Two of its endpoints have failed this request.
    Suspect,
}

impl Passed {
    /// In the words of `isochrone-reason`.
    pub fn as_str(self) -> &'static str {
        match self {
            Passed::Down => "is down",
            Passed::Tried => "was tried",
            Passed::Full => "is full",
            Passed::OverSoftLimit => "is over its soft limit",
            Passed::AtHardLimit => "is at its hard limit",
            Passed::Recovering => "is recovering",
            Passed::Suspect => "is suspect",
        }
    }
}

/// A picked endpoint and why.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// The endpoint.
    pub endpoint: usize,
    /// Its region.
    pub region: RegionIndex,
    /// The region's score.
    pub score: Score,
    /// No permitted endpoint was ready, so health was ignored.
    pub panic: bool,
    /// The region is over its soft limit: no place for hedges.
    pub over_soft: bool,
    /// The best region by its score, if that is another, and why it was passed over.
    pub instead_of: Option<(RegionIndex, Passed)>,
}

/// Why there is no choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nobody {
    /// No permitted endpoint is left to try.
    Left,
    /// Some are healthy, but have all that they can take. One may have room soon.
    Full,
}

/// A region in the order of steering.
#[derive(Clone, Copy, Debug)]
struct Ranked {
    region: RegionIndex,
    score: Score,
    tier: (bool, usize),
    rank: f32,
}

/// Picks an endpoint. `random` is a fresh random number.
///
/// # Errors
/// See [`Nobody`].
pub fn pick(
    fleet: &Fleet,
    query: &Query<'_>,
    permitted: &Permitted,
    tried: Tried<'_>,
    now: Time,
    random: u64,
) -> Result<Choice, Nobody> {
    let picker = Picker { fleet, query, permitted, tried: tried.endpoints, now, random };
    let open = picker.without_detours(permitted.regions().difference(fleet.drained));

    let mut full = false;
    let (trusted, suspect) = (open.difference(tried.suspect), open.intersection(tried.suspect));
    let best = if suspect.is_empty() { None } else { picker.best(open) };
    let mut instead_of = best.filter(|best| suspect.contains(best.region)).map(|best| (best.region, Passed::Suspect));
    for mut left in [trusted, suspect] {
        // The best of those that are over their soft limit or recovering: better than none.
        let mut spare = None;
        while let Some(best) = picker.best(left) {
            left.remove(best.region);
            let region = fleet.region(best.region);
            let look = fleet.look(best.region, query.grpc, query.model, tried.endpoints, now);
            let load = region.live.load();
            let soft = region.region.soft_limit as f32 * look.capacity;
            let passed = if look.healthy == 0 {
                picker.gone(best.region)
            } else if look.ready == 0 {
                Passed::Full
            } else if load >= region.region.hard_limit {
                Passed::AtHardLimit
            } else if region.region.soft_limit != u32::MAX && load as f32 >= soft {
                Passed::OverSoftLimit
            } else if query.client.share() >= look.capacity {
                Passed::Recovering
            } else {
                let best = picker.cheapest_near(best, left);
                let instead_of = instead_of.filter(|(region, _)| *region != best.region);
                match picker.choose(best, instead_of, false, false) {
                    Some(choice) => return Ok(choice),
                    // Another request took the last place, or the trial, between the look and the choice.
                    None => Passed::Full,
                }
            };
            full |= matches!(passed, Passed::Full | Passed::AtHardLimit);
            if matches!(passed, Passed::OverSoftLimit | Passed::Recovering) {
                spare.get_or_insert((best, passed == Passed::OverSoftLimit));
            }
            instead_of.get_or_insert((best.region, passed));
        }
        if let Some((spare, over_soft)) = spare {
            let instead_of = instead_of.filter(|(region, _)| *region != spare.region);
            match picker.choose(spare, instead_of, false, over_soft) {
                Some(choice) => return Ok(choice),
                None => full = true,
            }
        }
    }
    if full {
        return Err(Nobody::Full);
    }
    picker.panic(open).ok_or(Nobody::Left)
}

/// The permitted regions in the order of steering, drained and unhealthy ones too, with their scores.
pub fn order(fleet: &Fleet, query: &Query<'_>, permitted: &Permitted, now: Time) -> Vec<(RegionIndex, Score)> {
    let picker = Picker { fleet, query, permitted, tried: &[], now, random: 0 };
    let mut left = permitted.regions();
    let mut ordered = Vec::with_capacity(left.len());
    while let Some(best) = picker.best(left) {
        left.remove(best.region);
        ordered.push((best.region, best.score));
    }
    ordered
}

struct Picker<'a> {
    fleet: &'a Fleet,
    query: &'a Query<'a>,
    permitted: &'a Permitted,
    tried: &'a [u16],
    now: Time,
    random: u64,
}

impl Picker<'_> {
    /// The best of some regions: by the tenant's preference, then the pool's order, then the score.
    fn best(&self, among: RegionSet) -> Option<Ranked> {
        let Query { client, steering, .. } = self.query;
        let pool = steering.pool(client.location);
        let from = client
            .location
            .point
            .filter(|point| steering.policy != Policy::Weighted && steering.by_distance(Some(*point)));
        let mut best: Option<Ranked> = None;
        for region in among.iter() {
            if let (Some(best), Some(from)) = (&best, from) {
                let tier = self.tier(region, pool);
                let hopeless =
                    || self.fleet.geometry.least_ms(from, self.fleet.region(region).region.point) > best.rank;
                if tier > best.tier || (tier == best.tier && hopeless()) {
                    continue;
                }
            }
            let ranked = self.ranked(region, pool);
            if best.is_none_or(|best| (ranked.tier, ranked.rank) < (best.tier, best.rank)) {
                best = Some(ranked);
            }
        }
        best
    }

    fn tier(&self, at: RegionIndex, pool: Option<&Pool>) -> (bool, usize) {
        (!self.permitted.prefers(at), pool.map_or(0, |pool| pool.place(at)))
    }

    fn ranked(&self, at: RegionIndex, pool: Option<&Pool>) -> Ranked {
        let Query { client, model, steering, .. } = self.query;
        let region = self.fleet.region(at);
        let measured = self.fleet.measured(at, *model, client.share(), self.now);
        let (point, expected) = (region.region.point, region.expected_ms);
        let score = steering.score(&self.fleet.geometry, client.location.point, point, expected, measured);
        let rank = match steering.policy {
            Policy::Weighted => weighted_rank(&region.region, region.hash, client.hash),
            _ => score.total_ms(),
        };
        Ranked { region: at, score, tier: self.tier(at, pool), rank }
    }

    /// Leaves out regions that are much farther from this gateway than the nearest candidate.
    fn without_detours(&self, open: RegionSet) -> RegionSet {
        let steering = self.query.steering;
        let Some(max_ms) = steering.max_detour_ms.filter(|_| steering.policy == Policy::Nearest) else { return open };
        let away = |at| self.fleet.region(at).expected_ms;
        // One that is full or at its limit is no candidate: the next nearest is then the best.
        let able = open.iter().filter(|at| {
            let region = self.fleet.region(*at);
            self.look(*at).ready > 0 && region.live.load() < region.region.hard_limit
        });
        let Some(nearest) = able.filter_map(away).reduce(f32::min) else { return open };
        let mut near = open;
        open.iter().filter(|at| away(*at).is_some_and(|ms| ms > nearest + max_ms)).for_each(|at| near.remove(at));
        near
    }

    /// The cheapest of the regions that are almost as good as the best and could take the request as well.
    fn cheapest_near(&self, best: Ranked, among: RegionSet) -> Ranked {
        if !self.fleet.has_costs || self.query.steering.policy == Policy::Weighted {
            return best;
        }
        let pool = self.query.steering.pool(self.query.client.location);
        let near = best.rank + f32::max(best.rank * TIE_SHARE, TIE_MS);
        let cost = |ranked: &Ranked| self.fleet.region(ranked.region).region.cost;
        let able = |ranked: &Ranked| {
            let (region, look) = (self.fleet.region(ranked.region), self.look(ranked.region));
            let below = region.region.soft_limit == u32::MAX
                || (region.live.load() as f32) < region.region.soft_limit as f32 * look.capacity;
            look.ready > 0 && below && self.query.client.share() < look.capacity
        };
        let others = among.iter().map(|region| self.ranked(region, pool));
        let near = others.filter(|other| other.tier == best.tier && other.rank <= near && cost(other) < cost(&best));
        near.filter(able)
            .min_by(|a, b| (cost(a), a.rank).partial_cmp(&(cost(b), b.rank)).unwrap_or(std::cmp::Ordering::Equal))
            .unwrap_or(best)
    }

    fn look(&self, region: RegionIndex) -> Look {
        self.fleet.look(region, self.query.grpc, self.query.model, self.tried, self.now)
    }

    /// Why a region has no healthy endpoint left for this request.
    fn gone(&self, region: RegionIndex) -> Passed {
        let tried_one = self.fleet.region(region).endpoints.clone().any(|endpoint| is_in(self.tried, endpoint));
        if tried_one { Passed::Tried } else { Passed::Down }
    }

    /// Health is ignored: what is asserted may be asked, in the order of steering.
    fn panic(&self, open: RegionSet) -> Option<Choice> {
        let mut left = open;
        while let Some(best) = self.best(left) {
            left.remove(best.region);
            let region = self.fleet.region(best.region);
            let (load, hard) = (region.live.load(), region.region.hard_limit);
            if load < hard
                && let Some(choice) = self.choose(best, None, true, false)
            {
                let healthy = open.iter().map(|region| self.look(region).healthy).sum();
                debug_assert!(invariant::may_panic(healthy, region.region.drain, load, hard), "a panic without need");
                return Some(choice);
            }
        }
        None
    }

    fn choose(
        &self,
        ranked: Ranked,
        instead_of: Option<(RegionIndex, Passed)>,
        panic: bool,
        over_soft: bool,
    ) -> Option<Choice> {
        let Ranked { region, score, .. } = ranked;
        debug_assert!(invariant::is_permitted(self.permitted, region), "a pick left the permitted set");
        let wanted = if panic { Availability::Unhealthy } else { Availability::Ready };
        let usable = |endpoint: &usize| {
            let availability = self.fleet.availability(*endpoint, self.query.grpc, self.query.model, self.now);
            availability == wanted && !is_in(self.tried, *endpoint)
        };
        let candidates = self.fleet.region(region).endpoints.clone().filter(usable);
        let endpoint = match self.query.affinity {
            Some(key) if !panic => self.bound_to(key, candidates),
            _ => self.two_choices(candidates),
        }?;
        Some(Choice { endpoint, region, score, panic, over_soft, instead_of })
    }

    fn two_choices(&self, mut candidates: impl Iterator<Item = usize> + Clone) -> Option<usize> {
        let count = candidates.clone().count();
        if count <= 1 {
            return candidates.next();
        }
        let first = (self.random & 0xffff_ffff) as usize % count;
        // The second is drawn from the others, so that it is never the first again.
        let second = (first + 1 + (self.random >> 32) as usize % (count - 1)) % count;
        let nth = |at| candidates.clone().nth(at);
        let (first, second) = (nth(first)?, nth(second)?);
        // One whose trial is due gets it: its past would otherwise make it the dearer for as long as its peak takes to fade.
        let is_due = |endpoint: &usize| self.fleet.endpoints[*endpoint].is_trial_due(self.now);
        if let Some(due) = [first, second].into_iter().find(is_due) {
            return Some(due);
        }
        // One that is being eased in takes part in a share of the draws, and then on equal terms.
        let draws = mix(self.random);
        let takes_part = |endpoint: usize, draw: u64| {
            let ramp = self.fleet.endpoints[endpoint].ramp(self.now, &self.fleet.rules);
            ramp >= 1.0 || ((draw & 0xffff) as f32) < ramp * 65_536.0
        };
        match (takes_part(first, draws), takes_part(second, draws >> 32)) {
            (true, false) => Some(first),
            (false, true) => Some(second),
            // The first drawn wins a tie, so that idle endpoints share.
            _ => Some(if self.is_dearer(first, second) { second } else { first }),
        }
    }

    /// Whether one more request costs more at `a` than at `b`.
    fn is_dearer(&self, a: usize, b: usize) -> bool {
        let load = |endpoint: usize| {
            let live = &self.fleet.endpoints[endpoint];
            let reported = live.report(self.now, &self.fleet.rules).map_or(0, |report| report.in_flight);
            (live.in_flight().max(reported) + 1) as f32
        };
        let peak = |endpoint| self.fleet.model_at(self.query.model, endpoint)?.peak_ms(self.now);
        match (peak(a), peak(b)) {
            (Some(peak_a), Some(peak_b)) => peak_a * load(a) > peak_b * load(b),
            // One of them is not known yet: its load is all there is to go by.
            _ => load(a) > load(b),
        }
    }

    /// The endpoint that the key belongs to, or the next if that has too much already.
    fn bound_to(&self, key: u64, candidates: impl Iterator<Item = usize> + Clone) -> Option<usize> {
        let load = |endpoint: usize| self.fleet.endpoints[endpoint].in_flight();
        let (count, total) = candidates.clone().fold((0, 0), |(count, total), at| (count + 1, total + load(at)));
        let most = ((total + 1) as f32 / count as f32 * AFFINITY_LOAD).ceil() as u32;
        candidates
            .filter(|endpoint| load(*endpoint) < most)
            .max_by_key(|endpoint| mix(key ^ self.fleet.endpoints[*endpoint].hash()))
    }
}
