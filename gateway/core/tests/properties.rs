//! What holds of every pick, whatever the fleet: proptest makes the fleets, and shrinks those that break a rule.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test that cannot go on fails, and one that is asked tells"
)]

mod world;

use std::collections::BTreeSet;

use isochrone_core::Time;
use isochrone_core::course::{Course, Why};
use isochrone_core::fleet::Fleet;
use isochrone_core::geo::{Country, Location, Point};
use isochrone_core::invariant;
use isochrone_core::live::Report;
use isochrone_core::pick::{Nobody, Query, Tried, pick};
use isochrone_core::region::{Region, RegionIndex, RegionSet};
use isochrone_core::residency::{CountryRules, Residency, TenantRule, permit};
use isochrone_core::retry::{Mark, Outcome};
use isochrone_core::steer::{Client, Policy, Pool, Steering};
use proptest::prelude::*;
use world::{attempts, fleet_of, unprobed, well};

const NOW: Time = Time(100_000_000_000);
const ZONES: [&str; 4] = ["eu", "us", "jp", "br"];
const COUNTRIES: [&str; 4] = ["DE", "US", "JP", "BR"];

/// One region: where, zones, drained, limits, cost, and of each endpoint how it fares.
#[derive(Clone, Debug)]
struct Plan {
    at: (f32, f32),
    zones: BTreeSet<usize>,
    drain: bool,
    soft: u32,
    hard: u32,
    cost: f32,
    weight: f32,
    endpoints: Vec<Fares>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fares {
    Well,
    Unasserted,
    Dead,
    Ejected,
    Overloaded,
    Busy(u32),
}

fn fares() -> impl Strategy<Value = Fares> {
    prop_oneof![
        4 => Just(Fares::Well),
        1 => Just(Fares::Unasserted),
        1 => Just(Fares::Dead),
        1 => Just(Fares::Ejected),
        1 => Just(Fares::Overloaded),
        1 => (0_u32..40).prop_map(Fares::Busy),
    ]
}

fn plan() -> impl Strategy<Value = Plan> {
    let limits =
        prop_oneof![Just((u32::MAX, u32::MAX)), (0_u32..20, 0_u32..20).prop_map(|(a, b)| (a.min(b), a.max(b)))];
    let zones = proptest::collection::btree_set(0..ZONES.len(), 0..3);
    let place = (-80.0_f32..80.0, -180.0_f32..180.0);
    let endpoints = proptest::collection::vec(fares(), 1..5);
    (place, zones, any::<bool>(), limits, 0.0_f32..2.0, 0.0_f32..2.0, endpoints, 0..8_u8).prop_map(
        |(at, zones, drain, (soft, hard), cost, weight, endpoints, seldom)| Plan {
            at,
            zones,
            drain: drain && seldom == 0,
            soft,
            hard,
            cost,
            weight,
            endpoints,
        },
    )
}

fn zone_list() -> impl Strategy<Value = Vec<usize>> {
    proptest::collection::vec(0..ZONES.len(), 1..3)
}

fn names(zones: &[usize]) -> Vec<Box<str>> {
    zones.iter().map(|zone| ZONES[*zone].into()).collect()
}

fn residency() -> impl Strategy<Value = Residency> {
    prop_oneof![
        Just(Residency::Any),
        zone_list().prop_map(|zones| Residency::Require(names(&zones))),
        zone_list().prop_map(|zones| Residency::Prefer(names(&zones))),
    ]
}

fn steering() -> impl Strategy<Value = Steering> {
    let policy = prop_oneof![Just(Policy::Nearest), Just(Policy::Latency), Just(Policy::Weighted), Just(Policy::Pools)];
    let order = proptest::collection::vec(0_usize..6, 0..4);
    (policy, proptest::option::of(0.0_f32..200.0), order).prop_map(|(policy, max_detour_ms, order)| {
        let regions = order.into_iter().filter_map(RegionIndex::new).collect();
        let pools = vec![Pool { countries: vec![], continents: vec![], regions }];
        Steering { policy, max_detour_ms, pools }
    })
}

fn fleet(plans: &[Plan]) -> Fleet {
    let mut number = 0;
    let parts = plans.iter().enumerate().map(|(at, plan)| {
        let mut region = Region::new(
            &format!("r{at}"),
            Country::parse(COUNTRIES[at % 4]).expect("valid"),
            Point::new(plan.at.0, plan.at.1).expect("valid"),
        );
        region.zones = plan.zones.iter().map(|zone| ZONES[*zone].into()).collect();
        (region.drain, region.soft_limit, region.hard_limit) = (plan.drain, plan.soft, plan.hard);
        (region.cost, region.weight) = (plan.cost, plan.weight);
        let lives = plan.endpoints.iter().map(|fares| {
            number += 1;
            let name = format!("s{number}");
            if *fares == Fares::Unasserted { unprobed(&name) } else { well(&name) }
        });
        (region, lives.collect())
    });
    let fleet = fleet_of(parts.collect());
    for (at, plan) in plans.iter().enumerate() {
        for (endpoint, fares) in fleet.regions[at].endpoints.clone().zip(&plan.endpoints) {
            let judge = |mark, times| {
                for _ in 0..times {
                    world::judge(&fleet, at, endpoint, mark, NOW);
                }
            };
            match fares {
                Fares::Well | Fares::Unasserted => {}
                Fares::Dead => judge(Mark::Dead, 1),
                Fares::Ejected => judge(Mark::Failure, 3),
                Fares::Overloaded => judge(Mark::Overload, 5),
                Fares::Busy(in_flight) => {
                    fleet.endpoints[endpoint].reported(Report { in_flight: *in_flight, queued: 0 }, NOW);
                }
            }
        }
    }
    fleet.refresh(NOW);
    fleet
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_attempt_of_every_request_keeps_to_the_rules(
        plans in proptest::collection::vec(plan(), 1..8),
        residency in residency(),
        ruled in proptest::option::of((0..4_usize, zone_list())),
        country in proptest::option::of(0..4_usize),
        steering in steering(),
        affinity in proptest::option::of(any::<u64>()),
        hash in any::<u64>(),
        declares in any::<u8>(),
        random in any::<u64>(),
    ) {
        let fleet = fleet(&plans);
        let regions: Vec<Region> = fleet.regions.iter().map(|region| region.region.clone()).collect();
        let rules: Vec<_> = ruled.iter().map(|(country, zones)| {
            (vec![Country::parse(COUNTRIES[*country]).expect("valid")], names(zones))
        }).collect();
        let location = Location::from_record(country.and_then(|at| Country::parse(COUNTRIES[at])), None);
        let mut declaring = RegionSet::EMPTY;
        (0..regions.len()).filter(|at| declares & (1 << at) != 0).filter_map(RegionIndex::new)
            .for_each(|at| declaring.insert(at));
        let permitted = permit(
            RegionSet::of(&regions, |_| true),
            Some(declaring),
            &TenantRule::compile(&residency, &regions, &[]),
            &CountryRules::compile(&rules, &regions),
            &location,
        );
        // The rules once more, in other words.
        let may_see = |at: usize| {
            let shares = |zones: &[Box<str>]| zones.iter().any(|zone| regions[at].zones.contains(zone));
            let walled = match &residency { Residency::Require(zones) => shares(zones), _ => true };
            let applies = ruled.is_some() && (country.is_none() || country == ruled.as_ref().map(|rule| rule.0));
            declares & (1 << at) != 0 && walled && (!applies || rules.iter().all(|(_, zones)| shares(zones)))
        };
        let Ok(permitted) = permitted else {
            prop_assert!((0..regions.len()).all(|at| !may_see(at)));
            return Ok(());
        };
        for at in 0..regions.len() {
            prop_assert_eq!(permitted.contains(RegionIndex::new(at).expect("few")), may_see(at));
        }

        let client = Client { location: &location, hash };
        let query = Query { client, model: Some(0), grpc: false, steering: &steering, affinity };
        let mut course = Course::default();
        let mut next = random;
        let healthy_at = |region: RegionIndex, tried: &[u16]| fleet.look(region, false, Some(0), tried, NOW).healthy;
        loop {
            let before: Vec<u16> = course.tried().to_vec();
            let begun = course.begin(&fleet, &query, &permitted, &attempts(), Why::Needed, NOW, || {
                next = next.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                next
            });
            let Ok(mut attempt) = begun else { break };
            let region = attempt.choice.region;
            prop_assert!(may_see(region.get()), "{} may not see it", region.get());
            prop_assert!(!regions[region.get()].drain);
            prop_assert!(fleet.endpoints[attempt.choice.endpoint].is_asserted());
            prop_assert!(invariant::attempts_are_bounded(course.tried(), 3));
            prop_assert!(fleet.region(region).live.load() <= regions[region.get()].hard_limit);
            if attempt.choice.panic && steering.max_detour_ms.is_none() {
                let open = permitted.regions().iter().filter(|at| !regions[at.get()].drain);
                prop_assert_eq!(open.map(|at| healthy_at(at, &before)).sum::<usize>(), 0);
            }
            let ended = (Outcome::ConnectFailed, NOW);
            let body = isochrone_core::course::Body { replayable: true, at_hand: true };
            course.ended(&fleet, &query, &attempts(), &mut attempt, ended, body);
        }
        prop_assert!(fleet.endpoints.iter().all(|live| live.in_flight() == 0));
        for region in &fleet.regions {
            let lives = &fleet.endpoints[region.endpoints.clone()];
            let out = lives.iter().filter(|live| live.is_out()).count();
            prop_assert!(invariant::is_within_cap(out, lives.len(), fleet.rules.ejected_share));
        }
    }

    #[test]
    fn somebody_is_picked_whenever_a_permitted_endpoint_is_ready(
        plans in proptest::collection::vec(plan(), 1..8),
        steering in steering(),
        hash in any::<u64>(),
        random in any::<u64>(),
    ) {
        let fleet = fleet(&plans);
        let permitted = world::permitted(&fleet, &Residency::Any);
        let location = Location::UNKNOWN;
        let client = Client { location: &location, hash };
        let query = Query { client, model: Some(0), grpc: false, steering: &steering, affinity: None };
        let picked = pick(&fleet, &query, &permitted, Tried::default(), NOW, random);
        let able = |at: usize| {
            let region = &fleet.regions[at];
            let look = fleet.look(RegionIndex::new(at).expect("few"), false, Some(0), &[], NOW);
            look.ready > 0 && !region.region.drain && region.live.load() < region.region.hard_limit
        };
        // A detour that is too long leaves regions out on purpose.
        let unlimited = steering.max_detour_ms.is_none() || steering.policy != Policy::Nearest;
        if unlimited && (0..plans.len()).any(able) {
            prop_assert!(picked.is_ok_and(|choice| able(choice.region.get()) && !choice.panic), "{picked:?}");
        }
        if picked == Err(Nobody::Full) {
            let healthy = |at| fleet.look(RegionIndex::new(at).expect("few"), false, Some(0), &[], NOW).healthy > 0;
            prop_assert!((0..plans.len()).any(healthy));
        }
    }
}
