//! Fleets for tests, and random ones from a seed.
#![allow(dead_code, unreachable_pub, reason = "each test uses its part")]
#![allow(clippy::expect_used, reason = "a test that cannot go on fails")]

use std::sync::Arc;
use std::time::Duration;

use isochrone_core::fleet::{Fleet, Sent};
use isochrone_core::geo::{Country, Location, Point};
use isochrone_core::health::Thresholds;
use isochrone_core::live::{Kind, Live, Probe, Rules, Told};
use isochrone_core::region::{Region, RegionIndex, RegionSet};
use isochrone_core::residency::{CountryRules, Permitted, Residency, TenantRule, permit};
use isochrone_core::retry::Mark;
use isochrone_core::steer::{Geometry, stable_hash};
use isochrone_core::{Time, course, limit, outlier, pushback, stall};

/// A small generator, so that a world is its seed and nothing else (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        isochrone_core::steer::mix(self.0)
    }

    /// Below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    /// From 0 to 1.
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    pub fn chance(&mut self, share: f64) -> bool {
        self.unit() < share
    }
}

pub fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

pub fn at_ms(n: u64) -> Time {
    Time(n * 1_000_000)
}

/// The gateway's defaults.
pub fn rules() -> Rules {
    Rules {
        thresholds: Thresholds { healthy: 2, unhealthy: 2, calm: ms(30_000) },
        round_trip_decay: ms(10_000),
        outlier: outlier::Rules {
            consecutive_failures: 3,
            failure_share: 0.3,
            failure_volume: 20,
            ejection: ms(1000),
            ejection_max: ms(30_000),
        },
        ejected_share: 0.5,
        pushback: pushback::Rules { in_a_row: 5, pause: ms(1000), pause_max: ms(30_000) },
        limit: limit::Rules { min: 4, max: 1024 },
        slow_start: ms(5000),
        overprovisioning: 1.4,
        report_fresh: ms(2000),
        error_penalty: ms(250),
        shift: ms(10_000),
    }
}

pub fn attempts() -> course::Rules {
    course::Rules { max: 3, budget_share: 0.2, budget_floor: 10 }
}

pub fn stall_rules() -> stall::Rules {
    stall::Rules { silence: ms(100), answer: ms(100), again: ms(500), slow_factor: 4.0, slow_unknown: ms(1000) }
}

pub fn geometry() -> Geometry {
    Geometry { route_inflation: 1.5, constant_ms: 2.0, gateway: Point::new(0.0, 0.0) }
}

pub fn country(code: &str) -> Country {
    Country::parse(code).expect("valid")
}

/// A region on the equator, so many degrees from the client of [`client`].
pub fn region(name: &str, degrees: f32) -> Region {
    let place = Point::new(0.0, degrees).expect("valid");
    Region { zones: vec![format!("z-{name}").into()], ..Region::new(name, country("DE"), place) }
}

/// A client on the equator.
pub fn client() -> Location {
    Location::from_record(Some(country("DE")), Point::new(0.0, 0.0))
}

/// An endpoint that a probe has found well.
pub fn well(name: &str) -> Arc<Live> {
    let live = unprobed(name);
    live.probed(answer(1.0), Time(1), &rules());
    live
}

pub fn unprobed(name: &str) -> Arc<Live> {
    let hash = stable_hash(name.as_bytes());
    Arc::new(Live::new(Kind { assert_region: true, http: true, grpc: true, hash, warm: true }))
}

pub fn answer(round_trip_ms: f32) -> Probe {
    Probe::Answered { right_region: true, ready: true, round_trip_ms, network_ms: round_trip_ms }
}

/// A fleet of such regions, each with so many well endpoints, that all declare the model `m`.
pub fn fleet(plan: Vec<(Region, usize)>) -> Fleet {
    let plan: Vec<_> = plan
        .into_iter()
        .map(|(region, count)| {
            let lives = (0..count).map(|at| well(&format!("{}/{at}", region.name))).collect();
            (region, lives)
        })
        .collect();
    fleet_of(plan)
}

pub fn fleet_of(plan: Vec<(Region, Vec<Arc<Live>>)>) -> Fleet {
    let all = RegionSet::of(plan.iter().map(|(region, _)| region), |_| true);
    Fleet::new(plan, [(Arc::from("m"), all)], geometry(), rules(), None)
}

pub fn permitted(fleet: &Fleet, residency: &Residency) -> Permitted {
    let regions: Vec<Region> = fleet.regions.iter().map(|region| region.region.clone()).collect();
    let rule = TenantRule::compile(residency, &regions, &[]);
    let all = RegionSet::of(&regions, |_| true);
    permit(all, None, &rule, &CountryRules::default(), &Location::UNKNOWN).expect("permitted")
}

/// Judges an endpoint by an attempt that has just begun.
pub fn judge(fleet: &Fleet, region: usize, endpoint: usize, mark: Mark, now: Time) -> Option<Told> {
    let place = (RegionIndex::new(region).expect("few"), endpoint);
    fleet.judge(place, Sent { began: now, model: Some(0), grpc: false }, mark, now)
}
