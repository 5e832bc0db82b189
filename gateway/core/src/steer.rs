//! Steering: in which order the permitted regions are asked.
//!
//! `nearest` = `distance + excess + wait + service`, in milliseconds; the lowest wins:
//! - *distance* estimates the round trip from the client to the region, from the great circle: kilometres × 2 ÷ 200 km/ms
//!   (light in fibre), times a factor for routes that are not straight, plus a constant for the last mile;
//! - *excess* is how much slower this gateway's probes find the region than its distance from the gateway explains:
//!   a sick link or an overloaded region loses to one a little farther. Never below zero, and zero where the gateway's
//!   own place is not known;
//! - *wait* is the queueing that the region's workers report, while the reports are fresh;
//! - *service* is the rest of the model's mean response time there. A region in which it has not been measured lately is
//!   taken to be as good as the best in which it has: it neither gains nor loses by being unknown.
//!
//! `latency` = `probe + wait + service`: this gateway's own measurement instead of the client's distance, right when
//! clients sit close to their gateway. `nearest` falls back to it for a client whose location is unknown.
//!
//! `pools` is an order written down, by the client's country or continent; within a pool, and for whom no pool is written,
//! it is `nearest`. `weighted` gives each region its share of the clients (weighted rendezvous hashing, Schindelhauer and
//! Schomaker, 2005): a client stays where it is unless its own region leaves.

use crate::geo::{Continent, Country, Location, Point};
use crate::region::{Region, RegionIndex};

/// Light in fibre, in kilometres a millisecond.
const FIBRE_KM_PER_MS: f32 = 200.0;

/// The probe of a region that has none and whose distance is not known: worse than any that was measured.
const UNMEASURED_MS: f32 = 1000.0;

/// How regions are ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// By the client's distance, corrected by what is measured.
    Nearest,
    /// By this gateway's measurements alone.
    Latency,
    /// By lists that the operator wrote.
    Pools,
    /// By shares that the operator wrote.
    Weighted,
}

impl Policy {
    /// The word in configuration, answers and `explain`.
    pub fn as_str(self) -> &'static str {
        match self {
            Policy::Nearest => "nearest",
            Policy::Latency => "latency",
            Policy::Pools => "pools",
            Policy::Weighted => "weighted",
        }
    }
}

/// The geometry that all routes share.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// How much longer than the great circle a route is.
    pub route_inflation: f32,
    /// The part of a round trip that does not depend on distance, in milliseconds.
    pub constant_ms: f32,
    /// Where the gateway stands.
    pub gateway: Option<Point>,
}

impl Geometry {
    /// The round trip that the distance explains, in milliseconds.
    pub fn round_trip_ms(&self, a: Point, b: Point) -> f32 {
        self.travel_ms(a.distance_km(b))
    }

    /// No score by distance is lower: a region for which this is too high need not be scored.
    pub fn least_ms(&self, a: Point, b: Point) -> f32 {
        self.travel_ms(a.chord_km(b))
    }

    fn travel_ms(&self, km: f32) -> f32 {
        km * (2.0 / FIBRE_KM_PER_MS) * self.route_inflation + self.constant_ms
    }
}

/// The steering of one route.
#[derive(Clone, Debug)]
pub struct Steering {
    /// The policy.
    pub policy: Policy,
    /// Regions that are so much farther from this gateway than the nearest candidate are left out by `nearest`: in proxy
    /// mode the bytes travel through here.
    pub max_detour_ms: Option<f32>,
    /// For `pools`, the first that fits.
    pub pools: Vec<Pool>,
}

/// An order of regions for some clients.
#[derive(Clone, Debug)]
pub struct Pool {
    /// Clients of these countries.
    pub countries: Vec<Country>,
    /// And of these continents. With neither, everybody.
    pub continents: Vec<Continent>,
    /// First to last; those not named come after them.
    pub regions: Vec<RegionIndex>,
}

/// A region's score and what it is made of, in milliseconds. What a policy does not use is zero.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Score {
    /// Estimated round trip from the client.
    pub distance_ms: f32,
    /// What the probes find beyond the gateway's distance.
    pub excess_ms: f32,
    /// The probe itself, where the client's distance is not used.
    pub probe_ms: f32,
    /// Queueing.
    pub wait_ms: f32,
    /// The rest of the response time.
    pub service_ms: f32,
}

impl Score {
    /// The sum of the parts.
    pub fn total_ms(&self) -> f32 {
        self.distance_ms + self.excess_ms + self.probe_ms + self.wait_ms + self.service_ms
    }
}

/// What is measured of a region, as one client sees it; in milliseconds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Measured {
    /// The round trip of this gateway's probes.
    pub probe_ms: Option<f32>,
    /// Queueing of the model.
    pub wait_ms: f32,
    /// The rest of the model's response time.
    pub service_ms: f32,
}

impl Steering {
    /// Steering by one policy and nothing else.
    pub fn by(policy: Policy) -> Steering {
        Steering { policy, max_detour_ms: None, pools: Vec::new() }
    }

    /// Whether the client's distance is what counts.
    pub fn by_distance(&self, client: Option<Point>) -> bool {
        client.is_some() && self.policy != Policy::Latency
    }

    /// The policy for one client: `nearest` needs to know where it is.
    pub fn policy_for(&self, client: Option<Point>) -> Policy {
        if self.policy == Policy::Nearest && client.is_none() { Policy::Latency } else { self.policy }
    }

    /// Scores one region. `expected_ms` is the round trip that its distance from this gateway explains.
    pub fn score(
        &self,
        geometry: &Geometry,
        client: Option<Point>,
        region: Point,
        expected_ms: Option<f32>,
        measured: Measured,
    ) -> Score {
        let Measured { probe_ms, wait_ms, service_ms } = measured;
        match client.filter(|_| self.by_distance(client)) {
            Some(client) => Score {
                distance_ms: geometry.round_trip_ms(client, region),
                excess_ms: match (probe_ms, expected_ms) {
                    (Some(probe), Some(expected)) => (probe - expected).max(0.0),
                    _ => 0.0,
                },
                probe_ms: 0.0,
                wait_ms,
                service_ms,
            },
            // The distance stands in until the first measurement.
            None => Score {
                probe_ms: probe_ms.or(expected_ms).unwrap_or(UNMEASURED_MS),
                wait_ms,
                service_ms,
                ..Score::default()
            },
        }
    }

    /// The pool of a client, where the policy is `pools` and one fits.
    pub fn pool(&self, location: &Location) -> Option<&Pool> {
        let continent = location.country.and_then(Country::continent);
        self.pools.iter().filter(|_| self.policy == Policy::Pools).find(|pool| {
            (pool.countries.is_empty() && pool.continents.is_empty())
                || location.country.is_some_and(|country| pool.countries.contains(&country))
                || continent.is_some_and(|continent| pool.continents.contains(&continent))
        })
    }
}

impl Pool {
    /// The place of a region in the order; those not named share the last.
    pub fn place(&self, region: RegionIndex) -> usize {
        self.regions.iter().position(|named| *named == region).unwrap_or(self.regions.len())
    }
}

/// The rank of a region for a client under `weighted`: the lowest wins, each with the probability of its weight.
pub fn weighted_rank(region: &Region, region_hash: u64, client: u64) -> f32 {
    if region.weight <= 0.0 {
        return f32::MAX;
    }
    // 24 bits, never 0: uniform in (0, 1).
    let uniform = ((mix(client ^ region_hash) >> 40) as f32 + 0.5) / (1 << 24) as f32;
    -uniform.ln() / region.weight
}

/// Spreads the bits of a number over all of it (splitmix64's finaliser, Steele et al., 2014). Stable: gateways agree by it.
pub fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// A hash of some bytes that is the same at every gateway and in every version (FNV-1a, then mixed).
pub fn stable_hash(bytes: &[u8]) -> u64 {
    let fnv = bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    mix(fnv)
}

/// How a client is known to steering: where it is, and a number for its address that says when it moves.
#[derive(Clone, Copy, Debug)]
pub struct Client<'a> {
    /// Where it is.
    pub location: &'a Location,
    /// A stable hash of its address prefix (/24 or /48).
    pub hash: u64,
}

impl Client<'_> {
    /// The client's place between 0 and 1 when traffic moves a share at a time.
    pub fn share(&self) -> f32 {
        (self.hash >> 40) as f32 / (1 << 24) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(latitude: f32, longitude: f32) -> Point {
        Point::new(latitude, longitude).expect("valid")
    }

    fn geometry(gateway: Option<Point>) -> Geometry {
        Geometry { route_inflation: 1.5, constant_ms: 2.0, gateway }
    }

    fn probed(probe_ms: f32) -> Measured {
        Measured { probe_ms: Some(probe_ms), ..Measured::default() }
    }

    const ASHBURN: (f32, f32) = (39.04, -77.49);
    const DUBLIN: (f32, f32) = (53.35, -6.26);
    const TOKYO: (f32, f32) = (35.68, 139.69);

    #[test]
    fn the_nearest_region_wins_over_the_world() {
        let steering = Steering::by(Policy::Nearest);
        let rows = [
            ((52.5, 13.4), "dublin"),
            ((-23.5, -46.6), "ashburn"),
            ((34.7, 135.5), "tokyo"),
            ((-33.9, 151.2), "tokyo"),
            ((19.4, -99.1), "ashburn"),
            ((6.5, 3.4), "dublin"),
        ];
        for ((latitude, longitude), expected) in rows {
            let client = Some(point(latitude, longitude));
            let score = |at: (f32, f32)| {
                steering.score(&geometry(None), client, point(at.0, at.1), None, Measured::default()).total_ms()
            };
            let best = [("ashburn", ASHBURN), ("dublin", DUBLIN), ("tokyo", TOKYO)]
                .into_iter()
                .min_by(|a, b| score(a.1).total_cmp(&score(b.1)))
                .map(|best| best.0);
            assert_eq!(best, Some(expected), "client at {latitude}, {longitude}");
        }
    }

    #[test]
    fn excess_is_what_distance_does_not_explain_and_never_negative() {
        let (gateway, region) = (point(51.5, -0.1), point(DUBLIN.0, DUBLIN.1));
        let (client, geometry) = (Some(point(52.5, 13.4)), geometry(Some(gateway)));
        let expected = geometry.round_trip_ms(gateway, region);
        let excess = |measured| {
            Steering::by(Policy::Nearest).score(&geometry, client, region, Some(expected), measured).excess_ms
        };
        assert_eq!(excess(probed(expected + 40.0)), 40.0);
        assert_eq!(excess(probed(0.1)), 0.0);
        assert_eq!(excess(Measured::default()), 0.0);
    }

    #[test]
    fn a_slow_region_near_by_loses_to_a_fast_one_a_little_farther() {
        let (steering, geometry) = (Steering::by(Policy::Nearest), geometry(None));
        let client = Some(point(52.5, 13.4));
        let score = |at: (f32, f32), service_ms| {
            let measured = Measured { service_ms, ..Measured::default() };
            steering.score(&geometry, client, point(at.0, at.1), None, measured).total_ms()
        };
        assert!(score(DUBLIN, 20.0) < score(ASHBURN, 20.0));
        assert!(score(DUBLIN, 300.0) > score(ASHBURN, 20.0));
    }

    #[test]
    fn an_unknown_client_is_steered_by_the_probes_and_by_distance_before_them() {
        let steering = Steering::by(Policy::Nearest);
        assert_eq!(steering.policy_for(None), Policy::Latency);
        let (gateway, geometry) = (point(51.5, -0.1), geometry(Some(point(51.5, -0.1))));
        let score = |at: (f32, f32), measured| {
            let region = point(at.0, at.1);
            let expected = geometry.round_trip_ms(gateway, region);
            steering.score(&geometry, None, region, Some(expected), measured).total_ms()
        };
        assert!(score(DUBLIN, Measured::default()) < score(TOKYO, Measured::default()));
        assert_eq!(score(DUBLIN, probed(33.0)), 33.0);
    }

    #[test]
    fn weights_are_the_shares_of_clients_and_a_leaving_region_moves_only_its_own() {
        let region = |name: &str, weight| {
            let place = Country::parse("DE").expect("valid");
            Region { weight, ..Region::new(name, place, point(0.0, 0.0)) }
        };
        let regions = [region("a", 8.0), region("b", 1.0), region("c", 1.0), region("d", 0.0)];
        let chosen = |client: u64, without: usize| {
            let rank =
                |at: &usize| weighted_rank(&regions[*at], stable_hash(regions[*at].name.as_bytes()), mix(client));
            (0..4).filter(|at| *at != without).min_by(|a, b| rank(a).total_cmp(&rank(b))).expect("a region")
        };
        let mut counts = [0; 4];
        for client in 0..20_000 {
            let region = chosen(client, 9);
            counts[region] += 1;
            assert!(region == 1 || chosen(client, 1) == region, "a client of another region was moved");
        }
        for (count, share) in counts.iter().zip([0.8, 0.1, 0.1, 0.0]) {
            assert!((f64::from(*count) / 20_000.0 - share).abs() < 0.01, "{counts:?}");
        }
    }

    #[test]
    fn the_first_pool_that_fits_counts_and_the_unnamed_come_last() {
        let index = |at| RegionIndex::new(at).expect("valid");
        let country = |code| Country::parse(code).expect("valid");
        let steering = Steering {
            pools: vec![
                Pool { countries: vec![country("CH")], continents: vec![], regions: vec![index(2)] },
                Pool { countries: vec![], continents: vec![Continent::Europe], regions: vec![index(1), index(0)] },
            ],
            ..Steering::by(Policy::Pools)
        };
        let places = |code| {
            let location = Location::from_record(Country::parse(code), None);
            steering.pool(&location).map(|pool| [0, 1, 2].map(|at| pool.place(index(at))))
        };
        assert_eq!(places("CH"), Some([1, 1, 0]));
        assert_eq!(places("FR"), Some([1, 0, 2]));
        assert_eq!(places("JP"), None);
    }
}
