//! Picks in fleets where the right answer is plain.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test that cannot go on fails, and one that is asked tells"
)]

mod world;

use std::sync::Arc;

use isochrone_core::Time;
use isochrone_core::course::{Body, Course, Why};
use isochrone_core::fleet::Fleet;
use isochrone_core::live::{Live, Probe, Report, Told};
use isochrone_core::pick::{Choice, Nobody, Passed, Query, Tried, pick};
use isochrone_core::region::{Region, RegionIndex, RegionSet};
use isochrone_core::residency::{Permitted, Residency};
use isochrone_core::retry::{Mark, Outcome};
use isochrone_core::steer::{Client, Policy, Pool, Steering, mix};
use world::*;

const NOW: Time = Time(100_000_000_000);

struct Asked {
    steering: Steering,
    share: u64,
    affinity: Option<u64>,
    now: Time,
}

impl Default for Asked {
    fn default() -> Self {
        Asked { steering: Steering::by(Policy::Nearest), share: 0, affinity: None, now: NOW }
    }
}

impl Asked {
    fn of(policy: Policy) -> Asked {
        Asked { steering: Steering::by(policy), ..Asked::default() }
    }

    /// A client at this share of the traffic, from 0 to 100.
    fn at(share: u64) -> Asked {
        Asked { share, ..Asked::default() }
    }

    fn pick(&self, fleet: &Fleet, permitted: &Permitted, tried: Tried<'_>, random: u64) -> Result<Choice, Nobody> {
        let location = client();
        // 1.0 is not reached: shares are below it.
        let hash = ((self.share as f64 / 100.0).min(0.999_999) * (1_u64 << 24) as f64) as u64;
        let client = Client { location: &location, hash: hash << 40 };
        let query = Query { client, model: Some(0), grpc: false, steering: &self.steering, affinity: self.affinity };
        pick(fleet, &query, permitted, tried, self.now, random)
    }

    fn region(&self, fleet: &Fleet) -> Result<usize, Nobody> {
        let any = permitted(fleet, &Residency::Any);
        self.pick(fleet, &any, Tried::default(), 7).map(|choice| choice.region.get())
    }
}

fn three() -> Fleet {
    fleet(vec![(region("near", 5.0), 1), (region("far", 60.0), 1), (region("middle", 20.0), 1)])
}

fn condemn(fleet: &Fleet, region: usize) {
    fleet.regions[region].endpoints.clone().for_each(|endpoint| condemn_one(fleet, region, endpoint));
}

fn condemn_one(fleet: &Fleet, region: usize, endpoint: usize) {
    judge(fleet, region, endpoint, Mark::Dead, NOW);
}

fn picked(fleet: &Fleet, permitted: &Permitted, tried: &[u16]) -> Result<(usize, bool), Nobody> {
    let tried = Tried { endpoints: tried, suspect: RegionSet::EMPTY };
    Asked::default().pick(fleet, permitted, tried, 7).map(|choice| (choice.endpoint, choice.panic))
}

#[test]
fn the_nearest_region_that_can_then_the_next_and_never_a_drained_one() {
    let drained = Region { drain: true, ..region("near", 5.0) };
    let fleet = fleet(vec![(drained, 1), (region("far", 60.0), 1), (region("middle", 20.0), 1)]);
    let any = permitted(&fleet, &Residency::Any);
    assert_eq!(picked(&fleet, &any, &[]), Ok((2, false)));
    assert_eq!(picked(&fleet, &any, &[2]), Ok((1, false)));
    assert_eq!(picked(&fleet, &any, &[1, 2]), Err(Nobody::Left), "a drained region is never a last resort");
}

#[test]
fn a_drained_endpoint_gets_nothing_and_is_not_missed() {
    let fleet = fleet(vec![(region("near", 5.0), 2), (region("far", 60.0), 1)]);
    let any = permitted(&fleet, &Residency::Any);
    fleet.endpoints[0].drain(true, NOW);
    for random in 0..100 {
        let choice = Asked::at(99).pick(&fleet, &any, Tried::default(), mix(random)).expect("somebody");
        assert_eq!(choice.endpoint, 1, "the last client too stays in the region");
    }
    assert_eq!(picked(&fleet, &any, &[1]), Ok((2, false)));
    assert_eq!(picked(&fleet, &any, &[1, 2]), Err(Nobody::Left), "it is never a last resort");
    fleet.endpoints[0].drain(false, NOW);
    assert_eq!(picked(&fleet, &any, &[1]), Ok((0, false)));
    assert!(fleet.endpoints[0].ramp(NOW, &fleet.rules) < 1.0, "it is eased in");
}

#[test]
fn preferred_zones_come_before_nearer_regions_while_they_can() {
    let fleet = three();
    let far_first = permitted(&fleet, &Residency::Prefer(vec!["z-far".into()]));
    assert_eq!(picked(&fleet, &far_first, &[]), Ok((1, false)));
    assert_eq!(picked(&fleet, &far_first, &[1]), Ok((0, false)));
}

#[test]
fn panic_stays_inside_the_permitted_set_and_never_uses_the_unasserted() {
    let plan = vec![
        (region("near", 5.0), vec![well("a")]),
        (region("middle", 20.0), vec![well("b"), unprobed("c")]),
        (region("far", 60.0), vec![well("d")]),
    ];
    let fleet = fleet_of(plan);
    condemn(&fleet, 1);
    condemn(&fleet, 2);
    let walled = permitted(&fleet, &Residency::Require(vec!["z-middle".into(), "z-far".into()]));
    assert_eq!(picked(&fleet, &walled, &[]), Ok((1, true)));
    assert_eq!(picked(&fleet, &walled, &[1]), Ok((3, true)));
    assert_eq!(picked(&fleet, &walled, &[1, 3]), Err(Nobody::Left));
}

#[test]
fn health_is_not_ignored_while_a_healthy_endpoint_is_only_full() {
    let mut fleet = three();
    fleet.regions.iter_mut().for_each(|region| region.region.hard_limit = 0);
    condemn(&fleet, 1);
    assert_eq!(Asked::default().region(&fleet), Err(Nobody::Full));
}

#[test]
fn a_suspect_region_is_used_only_when_no_other_can() {
    let fleet = fleet(vec![(region("near", 5.0), 2), (region("far", 60.0), 1)]);
    let any = permitted(&fleet, &Residency::Any);
    let mut suspect = RegionSet::EMPTY;
    suspect.insert(RegionIndex::new(0).expect("valid"));
    let choice = |tried: &[u16]| {
        let choice = Asked::default().pick(&fleet, &any, Tried { endpoints: tried, suspect }, 7).expect("somebody");
        (choice.endpoint, choice.instead_of.map(|(region, why)| (region.get(), why)))
    };
    assert_eq!(choice(&[0]), (2, Some((0, Passed::Suspect))));
    assert_eq!(choice(&[0, 2]).0, 1);
}

/// Requests that stay in flight.
fn load(fleet: &Fleet, count: usize) -> Vec<(usize, isochrone_core::course::Attempt)> {
    let (any, location, steering) = (permitted(fleet, &Residency::Any), client(), Steering::by(Policy::Nearest));
    let query = Query {
        client: Client { location: &location, hash: 0 },
        model: Some(0),
        grpc: false,
        steering: &steering,
        affinity: None,
    };
    let begin = |at: usize| {
        let random = || mix(at as u64);
        Course::default().begin(fleet, &query, &any, &attempts(), Why::Needed, NOW, random).expect("somebody")
    };
    (0..count).map(begin).map(|attempt| (attempt.choice.region.get(), attempt)).collect()
}

#[test]
fn below_soft_the_nearest_between_soft_and_hard_the_next_at_hard_nobody() {
    let mut fleet = three();
    let limits = [(10, 20), (30, 30), (5, 15)];
    for (region, (soft, hard)) in fleet.regions.iter_mut().zip(limits) {
        (region.region.soft_limit, region.region.hard_limit) = (soft, hard);
    }
    let held = load(&fleet, 65);
    let regions: Vec<usize> = held.iter().map(|(region, _)| *region).collect();
    // near to its soft limit, middle to its own, far to its own; then each to its hard limit, nearest first.
    let expected = [vec![0; 10], vec![2; 5], vec![1; 30], vec![0; 10], vec![2; 10]].concat();
    assert_eq!(regions, expected);
    assert_eq!(Asked::default().region(&fleet), Err(Nobody::Full));
    drop(held);
    assert_eq!(Asked::default().region(&fleet), Ok(0));
    assert!(fleet.regions.iter().all(|region| region.live.in_flight() == 0));
}

#[test]
fn what_all_gateways_send_counts_when_workers_report_it() {
    let mut fleet = three();
    fleet.regions[0].region.soft_limit = 10;
    fleet.endpoints[0].reported(Report { in_flight: 50, queued: 0 }, NOW);
    fleet.refresh(NOW);
    assert_eq!(Asked::default().region(&fleet), Ok(2));
    // A stale report says nothing.
    let later = Time(NOW.0 + 3_000_000_000);
    fleet.refresh(later);
    assert_eq!(Asked { now: later, ..Asked::default() }.region(&fleet), Ok(0));
}

#[test]
fn a_region_that_has_lost_much_keeps_the_share_that_it_can_bear() {
    let fleet = fleet(vec![(region("near", 5.0), 4), (region("far", 60.0), 4)]);
    let at = |share: u64| Asked::at(share).region(&fleet).expect("somebody");
    let eject = |endpoint: usize| {
        let ejected = (0..3).filter_map(|_| judge(&fleet, 0, endpoint, Mark::Failure, NOW));
        assert_eq!(ejected.count(), usize::from(endpoint < 2), "the cap is half of the four");
    };
    eject(0);
    // Three of four bear it all (1.4 × 0.75).
    assert_eq!(at(99), 0);
    eject(1);
    assert_eq!([0, 69, 71, 99].map(at), [0, 0, 1, 1]);
    // A third is not ejected, however much it fails.
    eject(2);
}

#[test]
fn a_recovered_region_gets_its_clients_back_a_few_at_a_time() {
    let fleet = three();
    condemn(&fleet, 0);
    assert_eq!(Asked::at(0).region(&fleet), Ok(2));
    let back = Time(NOW.0 + 2_000_000_000);
    (0..2).for_each(|_| {
        fleet.endpoints[0].probed(answer(1.0), back, &fleet.rules);
    });
    let share = |seconds: u64| {
        let now = Time(back.0 + seconds * 1_000_000_000);
        (0..100).filter(|share| Asked { now, ..Asked::at(*share) }.region(&fleet) == Ok(0)).count()
    };
    // 1.4 × a tenth at least, then in proportion to the five seconds.
    for (second, expected) in [14_usize, 28, 56, 84, 100].into_iter().enumerate() {
        assert!(share(second as u64).abs_diff(expected) <= 1, "{} in second {second}", share(second as u64));
    }
}

#[test]
fn a_recovered_endpoint_takes_part_at_once_and_on_equal_terms_in_the_end() {
    let fleet = fleet(vec![(region("near", 5.0), 2)]);
    let (any, model) = (permitted(&fleet, &Residency::Any), |at: usize| fleet.models[0].endpoints[at].clone());
    model(0).expect("declared").answered(ms(20), NOW);
    // It hung: its peak is high.
    model(1).expect("declared").failed(ms(200), ms(250), NOW);
    condemn_one(&fleet, 0, 1);
    let back = NOW.0 + 2_000_000_000;
    (0..2).for_each(|_| {
        fleet.endpoints[1].probed(answer(1.0), Time(back), &fleet.rules);
    });
    let share = |seconds: u64| {
        let asked = Asked { now: Time(back + seconds * 1_000_000_000), ..Asked::default() };
        let pick = |random| asked.pick(&fleet, &any, Tried::default(), mix(random)).expect("somebody").endpoint;
        (0..1000).filter(|random| pick(*random) == 1).count()
    };
    // A tenth of the draws and half of those, then half of all: nothing is known of it, and both are idle.
    assert!((20..90).contains(&share(0)), "{}", share(0));
    assert!((450..550).contains(&share(5)), "{}", share(5));
}

#[test]
fn one_that_flaps_moves_its_clients_ever_more_rarely() {
    let fleet = three();
    let (mut now, mut returns) = (NOW.0, Vec::new());
    for _ in 0..4 {
        judge(&fleet, 0, 0, Mark::Dead, Time(now));
        let seconds = (1..100).find(|_| {
            now += 1_000_000_000;
            fleet.endpoints[0].probed(answer(1.0), Time(now), &fleet.rules) == Some(true)
        });
        returns.push(seconds.expect("it returns"));
    }
    assert_eq!(returns, [2, 4, 8, 16]);
}

#[test]
fn cost_decides_between_regions_that_are_almost_as_good() {
    let mut fleet = fleet(vec![(region("near", 5.0), 1), (region("almost", 6.0), 1), (region("far", 60.0), 1)]);
    assert_eq!(Asked::default().region(&fleet), Ok(0));
    for (region, cost) in fleet.regions.iter_mut().zip([3.0, 2.0, 1.0]) {
        region.region.cost = cost;
    }
    // The flag is worked out when a fleet is built.
    let plan =
        fleet.regions.iter().map(|region| (region.region.clone(), fleet.endpoints[region.endpoints.clone()].to_vec()));
    let fleet = fleet_of(plan.collect());
    assert_eq!(Asked::default().region(&fleet), Ok(1));
    condemn(&fleet, 1);
    assert_eq!(Asked::default().region(&fleet), Ok(0));
}

#[test]
fn pools_are_an_order_and_weights_are_shares() {
    let mut fleet = three();
    let index = |at| RegionIndex::new(at).expect("valid");
    let pool = Pool { countries: vec![country("DE")], continents: vec![], regions: vec![index(1), index(2)] };
    let asked = Asked { steering: Steering { pools: vec![pool], ..Steering::by(Policy::Pools) }, ..Asked::default() };
    assert_eq!(asked.region(&fleet), Ok(1));
    condemn(&fleet, 1);
    assert_eq!(asked.region(&fleet), Ok(2));
    condemn(&fleet, 2);
    assert_eq!(asked.region(&fleet), Ok(0), "those not named come last");
    fleet = three();
    fleet.regions[0].region.weight = 0.0;
    assert!((0..100).all(|share| Asked { share, ..Asked::of(Policy::Weighted) }.region(&fleet) != Ok(0)));
}

#[test]
fn bytes_are_not_hauled_farther_than_the_detour_allows() {
    // The gateway stands at the client's place; the near region is slow, so that the far one would win.
    let fleet = three();
    let steering = |max_detour_ms| Steering { max_detour_ms, ..Steering::by(Policy::Nearest) };
    let asked = |max| Asked { steering: steering(max), ..Asked::default() };
    // 5 degrees are 556 km, or 10 ms; 20 are 35 ms, 60 are 102 ms.
    condemn(&fleet, 0);
    assert_eq!(asked(Some(50.0)).region(&fleet), Ok(2));
    condemn(&fleet, 2);
    assert_eq!(asked(Some(50.0)).region(&fleet), Ok(1), "the nearest candidate is never too far");
    assert_eq!(asked(None).region(&fleet), Ok(1));
}

#[test]
fn idle_endpoints_share_and_the_dearest_is_not_taken() {
    let fleet = fleet(vec![(region("near", 5.0), 4)]);
    let any = permitted(&fleet, &Residency::Any);
    let picks = || {
        let mut seen = [0; 4];
        for random in 0..10_000_u64 {
            let choice = Asked::default().pick(&fleet, &any, Tried::default(), mix(random)).expect("somebody");
            seen[choice.endpoint] += 1;
        }
        seen
    };
    assert!(picks().iter().all(|count| (2300..2700).contains(count)), "{:?}", picks());
    for (endpoint, took) in [(0, 900), (1, 10), (2, 20), (3, 30)] {
        fleet.models[0].endpoints[endpoint].as_ref().expect("declared").answered(ms(took), NOW);
    }
    let seen = picks();
    assert_eq!(seen[0], 0);
    // Of the six equal pairs of four, the cheapest is in three, the second decides two, the third one.
    for (count, share) in seen[1..].iter().zip([3.0 / 6.0, 2.0 / 6.0, 1.0 / 6.0]) {
        assert!((f64::from(*count) / 10_000.0 - share).abs() < 0.03, "{seen:?}");
    }
}

#[test]
fn an_endpoint_that_fails_fast_attracts_nobody() {
    let fleet = fleet(vec![(region("near", 5.0), 2)]);
    let (any, location, steering) = (permitted(&fleet, &Residency::Any), client(), Steering::by(Policy::Nearest));
    let client = Client { location: &location, hash: 0 };
    let query = Query { client, model: Some(0), grpc: false, steering: &steering, affinity: None };
    let mut random = Random(1);
    let mut counts = [0; 2];
    for at in 0..2000_u64 {
        let now = Time(NOW.0 + at * 10_000_000);
        let mut course = Course::default();
        let mut attempt =
            course.begin(&fleet, &query, &any, &attempts(), Why::Needed, now, || random.next()).expect("somebody");
        counts[attempt.choice.endpoint] += 1;
        // Endpoint 0 fails at once, every fifth time; endpoint 1 takes a while.
        let fails = attempt.choice.endpoint == 0 && at.is_multiple_of(5);
        let (outcome, took) = if fails { (Outcome::Status(503), 1) } else { (Outcome::Status(200), 30) };
        let ended = (outcome, Time(now.0 + took * 1_000_000));
        course.ended(&fleet, &query, &attempts(), &mut attempt, ended, Body { replayable: true, at_hand: true });
    }
    assert!(counts[0] < counts[1] / 4, "{counts:?}");
}

#[test]
fn affinity_holds_to_one_endpoint_until_that_has_too_much() {
    let fleet = fleet(vec![(region("near", 5.0), 5)]);
    let any = permitted(&fleet, &Residency::Any);
    let pick = |key| {
        let asked = Asked { affinity: Some(mix(key)), ..Asked::default() };
        asked.pick(&fleet, &any, Tried::default(), 7).expect("somebody").endpoint
    };
    let mut homes = [0; 5];
    for key in 0..5000 {
        assert_eq!(pick(key), pick(key));
        homes[pick(key)] += 1;
    }
    assert!(homes.iter().all(|count| (850..1150).contains(count)), "{homes:?}");
    // Hold requests of one key: they spill to others rather than pile up.
    let (location, steering) = (client(), Steering::by(Policy::Nearest));
    let client = Client { location: &location, hash: 0 };
    let query = Query { client, model: Some(0), grpc: false, steering: &steering, affinity: Some(mix(1)) };
    let held: Vec<_> = (0..100)
        .map(|_| Course::default().begin(&fleet, &query, &any, &attempts(), Why::Needed, NOW, || 7).expect("somebody"))
        .collect();
    let most = fleet.endpoints.iter().map(|live| live.in_flight()).max();
    assert!(most <= Some(26), "{most:?} of {}", held.len());
}

#[test]
fn overload_replies_steer_and_do_not_eject() {
    let fleet = three();
    (0..5).for_each(|_| {
        judge(&fleet, 0, 0, Mark::Overload, NOW);
    });
    assert!(!fleet.endpoints[0].is_ejected(NOW) && fleet.endpoints[0].is_healthy());
    assert_eq!(Asked::default().region(&fleet), Ok(2));
    // One request may look whether that has passed.
    let later = Time(NOW.0 + 1_000_000_000);
    assert_eq!(Asked { now: later, ..Asked::default() }.region(&fleet), Ok(0));
}

#[test]
fn an_endpoint_that_fails_its_trials_is_out_for_longer_each_time() {
    let fleet = three();
    let fail = |now| judge(&fleet, 0, 0, Mark::Failure, Time(now));
    let mut told: Vec<_> = (0..3).filter_map(|_| fail(NOW.0)).collect();
    let mut now = NOW.0;
    for seconds in [1_u64, 2, 4] {
        assert_eq!(Asked { now: Time(now + 1), ..Asked::default() }.region(&fleet), Ok(2));
        now += seconds * 1_000_000_000;
        // The trial, and with it nobody else.
        let (any, location, steering) = (permitted(&fleet, &Residency::Any), client(), Steering::by(Policy::Nearest));
        let client = Client { location: &location, hash: 0 };
        let query = Query { client, model: Some(0), grpc: false, steering: &steering, affinity: None };
        let begin = || Course::default().begin(&fleet, &query, &any, &attempts(), Why::Needed, Time(now), || 7);
        let (trial, other) = (begin().expect("the trial"), begin().expect("another"));
        assert_eq!((trial.choice.region.get(), other.choice.region.get()), (0, 2));
        told.extend(fail(now));
    }
    assert_eq!(told, [1000, 2000, 4000, 8000].map(|length| Told::Ejected(ms(length))));
}

#[test]
fn probes_are_fewer_where_traffic_vouches_and_far_away_and_never_while_in_doubt() {
    let second = ms(1000);
    let fleet = fleet(vec![(region("near", 5.0), 2)]);
    let live = &fleet.endpoints[0];
    let relaxation = |now| live.relaxation(second, 4.0, now);
    assert!((1.0..1.1).contains(&relaxation(NOW)), "near, and without traffic");
    judge(&fleet, 0, 0, Mark::Success, NOW);
    assert_eq!(relaxation(Time(NOW.0 + 500_000_000)), 4.0);
    assert!(relaxation(Time(NOW.0 + 1_500_000_000)) < 1.1, "that traffic was long ago");
    let far = well("far");
    (1..100).for_each(|at| {
        far.probed(answer(100.0), Time(NOW.0 + at * 1_000_000_000), &fleet.rules);
    });
    assert!((2.9..3.1).contains(&far.relaxation(second, 4.0, Time(NOW.0 + 200_000_000_000))));
    live.probed(Probe::Silent, NOW, &fleet.rules);
    assert_eq!(relaxation(NOW), 1.0, "one probe was lost");
}

#[test]
fn one_model_that_is_too_much_leaves_the_others_of_its_endpoint_alone() {
    let plan = vec![(region("near", 5.0), vec![well("a")]), (region("far", 60.0), vec![well("b")])];
    let all = RegionSet::of(plan.iter().map(|(region, _)| region), |_| true);
    let fleet = Fleet::new(plan, [(Arc::from("m"), all), (Arc::from("n"), all)], geometry(), rules(), None);
    (0..5).for_each(|_| {
        judge(&fleet, 0, 0, Mark::Overload, NOW);
    });
    let (any, location, steering) = (permitted(&fleet, &Residency::Any), client(), Steering::by(Policy::Nearest));
    let client = Client { location: &location, hash: 0 };
    let picked = |model| {
        let query = Query { client, model: Some(model), grpc: false, steering: &steering, affinity: None };
        pick(&fleet, &query, &any, Tried::default(), NOW, 7).map(|choice| choice.region.get())
    };
    assert_eq!([picked(0), picked(1)], [Ok(1), Ok(0)]);
}

#[test]
fn one_whose_trial_is_due_gets_it_however_dear_it_was() {
    let fleet = fleet(vec![(region("near", 5.0), 2)]);
    let any = permitted(&fleet, &Residency::Any);
    let model = |at: usize| fleet.models[0].endpoints[at].clone().expect("declared");
    model(0).answered(ms(5), NOW);
    model(1).failed(ms(900), ms(250), NOW);
    (0..3).for_each(|_| {
        judge(&fleet, 0, 1, Mark::Failure, NOW);
    });
    let picks = |now| {
        let asked = Asked { now, ..Asked::default() };
        let pick = |random| asked.pick(&fleet, &any, Tried::default(), mix(random)).expect("somebody").endpoint;
        (0..100).map(pick).sum::<usize>()
    };
    assert_eq!([picks(NOW), picks(Time(NOW.0 + 1_000_000_000))], [0, 100]);
}

#[test]
fn a_mistyped_address_never_gets_a_request() {
    let stranger: Arc<Live> = unprobed("stranger");
    let wrong = Probe::Answered { right_region: false, ready: true, round_trip_ms: 1.0, network_ms: 1.0 };
    stranger.probed(wrong, Time(1), &rules());
    let fleet = fleet_of(vec![(region("near", 5.0), vec![stranger])]);
    assert_eq!(Asked::default().region(&fleet), Err(Nobody::Left));
    fleet.endpoints[0].probed(answer(1.0), Time(2), &rules());
    assert_eq!(Asked::default().region(&fleet), Ok(0));
    fleet.endpoints[0].doubt();
    assert_eq!(Asked::default().region(&fleet), Err(Nobody::Left));
}

#[test]
fn the_first_that_is_measured_of_a_model_moves_nobody() {
    // Of either region alone: the other is presumed to be as slow from the same moment on.
    for measured in [0, 1] {
        let fleet = fleet(vec![(region("near", 5.0), 1), (region("far", 20.0), 1)]);
        let model = fleet.models[0].endpoints[measured].as_ref().expect("declared");
        for second in 0..20 {
            let now = Time(NOW.0 + second * 1_000_000_000);
            (0..20).for_each(|_| model.answered(ms(60), now));
            fleet.refresh(now);
            let near = (0..100).filter(|share| Asked { now, ..Asked::at(*share) }.region(&fleet) == Ok(0)).count();
            assert_eq!(near, 100, "{measured} at {second} s");
        }
    }
}

#[test]
fn the_first_queue_that_is_reported_sends_nobody_away_at_once() {
    let fleet = fleet(vec![(region("near", 5.0), 1), (region("far", 20.0), 1)]);
    let model = fleet.models[0].endpoints[0].as_ref().expect("declared");
    let near = |second: u64| {
        let now = Time(NOW.0 + second * 1_000_000_000);
        (0..20).for_each(|_| model.answered(ms(60), now));
        fleet.endpoints[0].reported(Report { in_flight: 64, queued: 60 }, now);
        fleet.refresh(now);
        (0..100).filter(|share| Asked { now, ..Asked::at(*share) }.region(&fleet) == Ok(0)).count()
    };
    let stay: Vec<usize> = (0..12).map(near).collect();
    assert_eq!(stay[0], 100);
    assert!(stay.windows(2).all(|pair| pair[0] - pair[1] <= 11), "{stay:?}");
    assert_eq!(stay.last(), Some(&0), "it does help in the end: {stay:?}");
}

#[test]
fn a_region_that_has_become_slow_loses_a_tenth_of_its_clients_a_second() {
    let fleet = fleet(vec![(region("near", 5.0), 1), (region("far", 20.0), 1)]);
    let model = |endpoint: usize| fleet.models[0].endpoints[endpoint].as_ref().expect("declared");
    let answered = |took: [u64; 2], second: u64| {
        let now = Time(NOW.0 + second * 1_000_000_000);
        for endpoint in [0, 1].repeat(20) {
            model(endpoint).answered(ms(took[endpoint]), now);
        }
        fleet.refresh(now);
        (0..100).filter(|share| Asked { now, ..Asked::at(*share) }.region(&fleet) == Ok(0)).count()
    };
    assert_eq!(answered([20, 20], 0), 100);
    assert_eq!(answered([20, 20], 1), 100);
    // Ten times as slow: the mean takes a moment to say so, then the clients move.
    let stay: Vec<usize> = (2..40).map(|second| answered([200, 20], second)).collect();
    let steps = stay.windows(2).map(|pair| pair[0] - pair[1]);
    // The shares of this test are whole percents, give or take one.
    assert!(steps.clone().all(|step| step <= 11), "{stay:?}");
    assert_eq!(stay.last(), Some(&0), "{stay:?}");
}
