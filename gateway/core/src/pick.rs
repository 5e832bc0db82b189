//! The pick: the best permitted region that has an endpoint able to answer, and one endpoint of it.
//!
//! Between regions the score decides. Inside the region it is the power of two choices (Mitzenmacher, "The Power of Two
//! Choices in Randomized Load Balancing", 2001): of two endpoints drawn at random, the cheaper; choosing the cheapest of
//! all would send every gateway to the same endpoint at once.

use std::ops::Range;

use crate::region::{RegionIndex, RegionSet};
use crate::residency::Permitted;
use crate::steer::Score;

/// Whether an endpoint can take a request now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Availability {
    /// Asserted, healthy and admitting.
    Ready,
    /// Asserted, but its probes fail or it is ejected. Only a panic uses it.
    Unhealthy,
    /// It has not yet proven to stand in its file's region, or does not speak the protocol asked for. Never used:
    /// a mistyped URL must not leak.
    Excluded,
}

/// The live world as a pick sees it. Endpoints are numbered through the snapshot; a region's are contiguous.
pub trait View {
    /// Whether the region takes no new requests by its file.
    fn is_drained(&self, region: RegionIndex) -> bool;
    /// The region's score for this client.
    fn score(&self, region: RegionIndex) -> Score;
    /// The region's endpoints.
    fn endpoints(&self, region: RegionIndex) -> Range<usize>;
    /// Whether the endpoint can take a request now.
    fn availability(&self, endpoint: usize) -> Availability;
    /// What one more request would cost there; lower is better.
    fn cost(&self, endpoint: usize) -> u64;
}

/// What earlier attempts of the same request have taught.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tried<'a> {
    /// Endpoints that must not be asked again.
    pub endpoints: &'a [usize],
    /// Regions to be avoided while another has a ready endpoint.
    pub suspect: RegionSet,
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
}

/// Picks an endpoint. `random` is a fresh random number. `None` if no permitted endpoint is left to try.
pub fn pick(view: &impl View, permitted: &Permitted, tried: Tried<'_>, random: u64) -> Option<Choice> {
    let mut open = permitted.regions();
    permitted.regions().iter().filter(|&region| view.is_drained(region)).for_each(|region| open.remove(region));

    let ready = |endpoint| view.availability(endpoint) == Availability::Ready;
    let able = |endpoint| view.availability(endpoint) != Availability::Excluded;
    let mut trusted = open;
    tried.suspect.iter().for_each(|region| trusted.remove(region));

    let choose = |among, usable: &dyn Fn(usize) -> bool, panic| {
        best(view, permitted, among, tried.endpoints, usable, random).map(|(region, score, endpoint)| Choice {
            endpoint,
            region,
            score,
            panic,
        })
    };
    choose(trusted, &ready, false).or_else(|| choose(open, &ready, false)).or_else(|| choose(open, &able, true))
}

/// The region of least (tier, score) with a usable endpoint, and an endpoint of it.
fn best(
    view: &impl View,
    permitted: &Permitted,
    among: RegionSet,
    tried: &[usize],
    usable: &dyn Fn(usize) -> bool,
    random: u64,
) -> Option<(RegionIndex, Score, usize)> {
    let usable = |endpoint: &usize| !tried.contains(endpoint) && usable(*endpoint);
    let mut found: Option<(RegionIndex, Score)> = None;
    for region in among.iter() {
        let score = view.score(region);
        let beats = found.is_none_or(|(other, least)| {
            let tier = |region| !permitted.prefers(region);
            (tier(region), score.total_ms()) < (tier(other), least.total_ms())
        });
        if beats && view.endpoints(region).any(|endpoint| usable(&endpoint)) {
            found = Some((region, score));
        }
    }
    let (region, score) = found?;
    debug_assert!(permitted.contains(region), "a pick left the permitted set");
    two_choices(view, view.endpoints(region).filter(usable), random).map(|endpoint| (region, score, endpoint))
}

fn two_choices(view: &impl View, mut candidates: impl Iterator<Item = usize> + Clone, random: u64) -> Option<usize> {
    let count = candidates.clone().count();
    if count <= 1 {
        return candidates.next();
    }
    let first = (random & 0xffff_ffff) as usize % count;
    // The second is drawn from the others, so that it is never the first again.
    let second = (first + 1 + (random >> 32) as usize % (count - 1)) % count;
    let nth = |at| candidates.clone().nth(at);
    // The first drawn wins a tie, so that idle endpoints share.
    [nth(first), nth(second)].into_iter().flatten().min_by_key(|&endpoint| view.cost(endpoint))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geo::{Country, Location, Point};
    use crate::region::Region;
    use crate::residency::{CountryRules, Residency, TenantRule, permit};

    /// Regions with (score, drained, endpoints as (availability, cost)).
    struct World(Vec<(f32, bool, Vec<(Availability, u64)>)>);

    impl World {
        fn at(&self, endpoint: usize) -> (Availability, u64) {
            self.0.iter().flat_map(|region| &region.2).copied().nth(endpoint).expect("in range")
        }

        fn permitted(&self, residency: &Residency) -> Permitted {
            let regions: Vec<Region> = (0..self.0.len())
                .map(|at| Region {
                    name: format!("r{at}").into(),
                    country: Country::parse("DE").expect("valid"),
                    point: Point::new(0.0, 0.0).expect("valid"),
                    zones: vec![format!("z{at}").into()],
                    drain: false,
                })
                .collect();
            let rule = TenantRule::compile(residency, &regions, &[]);
            let all = RegionSet::of(&regions, |_| true);
            permit(all, None, &rule, &CountryRules::default(), &Location::UNKNOWN).expect("permitted")
        }
    }

    impl View for World {
        fn is_drained(&self, region: RegionIndex) -> bool {
            self.0[region.get()].1
        }
        fn score(&self, region: RegionIndex) -> Score {
            Score { distance_ms: self.0[region.get()].0, ..Score::default() }
        }
        fn endpoints(&self, region: RegionIndex) -> Range<usize> {
            let start = self.0[..region.get()].iter().map(|region| region.2.len()).sum();
            start..start + self.0[region.get()].2.len()
        }
        fn availability(&self, endpoint: usize) -> Availability {
            self.at(endpoint).0
        }
        fn cost(&self, endpoint: usize) -> u64 {
            self.at(endpoint).1
        }
    }

    use Availability::{Excluded, Ready, Unhealthy};

    fn picked(world: &World, permitted: &Permitted, tried: &[usize]) -> Option<(usize, bool)> {
        pick(world, permitted, Tried { endpoints: tried, suspect: RegionSet::EMPTY }, 7)
            .map(|choice| (choice.endpoint, choice.panic))
    }

    #[test]
    fn the_nearest_ready_region_then_the_next() {
        let world = World(vec![
            (50.0, false, vec![(Ready, 0)]),
            (10.0, false, vec![(Ready, 0)]),
            (5.0, true, vec![(Ready, 0)]),
            (20.0, false, vec![(Ready, 0)]),
        ]);
        let permitted = world.permitted(&Residency::Any);
        assert_eq!(picked(&world, &permitted, &[]), Some((1, false)));
        assert_eq!(picked(&world, &permitted, &[1]), Some((3, false)));
        assert_eq!(picked(&world, &permitted, &[1, 3]), Some((0, false)));
        assert_eq!(picked(&world, &permitted, &[0, 1, 3]), None, "a drained region is never a last resort");
    }

    #[test]
    fn preferred_zones_come_before_nearer_regions_while_they_are_ready() {
        let world = World(vec![(10.0, false, vec![(Ready, 0)]), (90.0, false, vec![(Ready, 0)])]);
        let permitted = world.permitted(&Residency::Prefer(vec!["z1".into()]));
        assert_eq!(picked(&world, &permitted, &[]), Some((1, false)));
        assert_eq!(picked(&world, &permitted, &[1]), Some((0, false)));
    }

    #[test]
    fn panic_stays_inside_the_permitted_set_and_never_uses_the_unasserted() {
        let world = World(vec![
            (1.0, false, vec![(Ready, 0)]),
            (10.0, false, vec![(Unhealthy, 0), (Excluded, 0)]),
            (20.0, false, vec![(Unhealthy, 0)]),
        ]);
        let permitted = world.permitted(&Residency::Require(vec!["z1".into(), "z2".into()]));
        assert_eq!(picked(&world, &permitted, &[]), Some((1, true)));
        assert_eq!(picked(&world, &permitted, &[1]), Some((3, true)));
        assert_eq!(picked(&world, &permitted, &[1, 3]), None);
    }

    #[test]
    fn a_suspect_region_is_used_only_when_no_other_is_ready() {
        let world = World(vec![(1.0, false, vec![(Ready, 0), (Ready, 0)]), (90.0, false, vec![(Ready, 0)])]);
        let permitted = world.permitted(&Residency::Any);
        let mut suspect = RegionSet::EMPTY;
        suspect.insert(RegionIndex::new(0).expect("valid"));
        let choice = |tried: &[usize]| {
            pick(&world, &permitted, Tried { endpoints: tried, suspect }, 7).map(|choice| choice.endpoint)
        };
        assert_eq!(choice(&[0]), Some(2));
        assert_eq!(choice(&[0, 2]), Some(1));
    }

    #[test]
    fn idle_endpoints_share() {
        let world = World(vec![(1.0, false, vec![(Ready, 0), (Ready, 0)])]);
        let permitted = world.permitted(&Residency::Any);
        let picks = |random| pick(&world, &permitted, Tried::default(), random).expect("ready endpoints").endpoint;
        assert_eq!(((0..1000).map(picks)).sum::<usize>(), 500);
    }

    #[test]
    fn two_choices_never_takes_the_dearest_and_draws_them_all() {
        let world = World(vec![(1.0, false, vec![(Ready, 9), (Ready, 1), (Ready, 2), (Ready, 3)])]);
        let permitted = world.permitted(&Residency::Any);
        let mut seen = [0; 4];
        for random in 0..10_000_u64 {
            // Spread the bits: both halves of the number are used.
            let random = random.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let choice = pick(&world, &permitted, Tried::default(), random).expect("ready endpoints");
            seen[choice.endpoint] += 1;
        }
        assert_eq!(seen[0], 0);
        // Of the six equal pairs of four, the cheapest is in three, the second decides two, the third one.
        for (count, share) in seen[1..].iter().zip([3.0 / 6.0, 2.0 / 6.0, 1.0 / 6.0]) {
            assert!((f64::from(*count) / 10_000.0 - share).abs() < 0.03, "{seen:?}");
        }
    }
}
