//! One request's course: how often, of what budget, and when it is enough.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test that cannot go on fails, and one that is asked tells"
)]

mod world;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use isochrone_core::Time;
use isochrone_core::course::{Attempt, Body, Course, Next, NotBegun, Rules, Why};
use isochrone_core::fleet::Fleet;
use isochrone_core::geo::Location;
use isochrone_core::live::Told;
use isochrone_core::pick::{Nobody, Query};
use isochrone_core::residency::Residency;
use isochrone_core::retry::{Mark, Outcome};
use isochrone_core::stall::Hedge;
use isochrone_core::steer::{Client, Policy, Steering};
use world::*;

const NOW: Time = Time(100_000_000_000);
const BODY: Body = Body { replayable: true, at_hand: true };
const HEDGE: Hedge = Hedge { floor: std::time::Duration::ZERO, ceiling: std::time::Duration::ZERO, share: 0.05 };

/// One request of a client that is near the first region.
struct Asking<'a> {
    fleet: &'a Fleet,
    rules: Rules,
    course: Course,
}

impl<'a> Asking<'a> {
    fn new(fleet: &'a Fleet) -> Asking<'a> {
        Asking { fleet, rules: attempts(), course: Course::default() }
    }

    fn with<T>(&mut self, act: impl FnOnce(&mut Course, &Query<'_>) -> T) -> T {
        let (location, steering): (Location, Steering) = (client(), Steering::by(Policy::Nearest));
        let client = Client { location: &location, hash: 0 };
        let query = Query { client, model: Some(0), grpc: false, steering: &steering, affinity: None };
        act(&mut self.course, &query)
    }

    fn begin(&mut self, why: Why<'_>) -> Result<Attempt, NotBegun> {
        let (fleet, rules) = (self.fleet, self.rules);
        let any = permitted(fleet, &Residency::Any);
        self.with(|course, query| course.begin(fleet, query, &any, &rules, why, NOW, || 7))
    }

    fn end(&mut self, mut attempt: Attempt, outcome: Outcome, body: Body) -> (Next, Option<Told>) {
        let (fleet, rules, now) = (self.fleet, self.rules, Time(NOW.0 + 1_000_000));
        self.with(|course, query| course.ended(fleet, query, &rules, &mut attempt, (outcome, now), body))
    }
}

fn regions(count: usize, endpoints: usize) -> Fleet {
    fleet((0..count).map(|at| (region(&format!("r{at}"), 5.0 + at as f32 * 10.0), endpoints)).collect())
}

#[test]
fn attempts_are_as_many_as_there_may_be_each_elsewhere_whatever_asks_for_them() {
    let fleet = regions(6, 1);
    let mut asking = Asking::new(&fleet);
    for _ in 0..3 {
        let attempt = asking.begin(Why::Needed).expect("somebody");
        assert_eq!(asking.end(attempt, Outcome::Reset, Body { replayable: false, ..BODY }).0, Next::Stop);
    }
    assert_eq!(asking.course.tried(), [0, 1, 2]);
    for why in [Why::Needed, Why::Slow, Why::Hedge(&HEDGE)] {
        assert_eq!(asking.begin(why).err(), Some(NotBegun::Enough));
    }
}

#[test]
fn what_may_not_be_done_twice_goes_again_only_if_nothing_of_it_was_done() {
    let rows = [
        (Outcome::Reset, Body { replayable: false, at_hand: true }, Next::Stop),
        (Outcome::Reset, BODY, Next::Again),
        (Outcome::Hung, Body { replayable: false, at_hand: true }, Next::Stop),
        (Outcome::ConnectFailed, Body { replayable: false, at_hand: true }, Next::Again),
        (Outcome::ConnectFailed, Body { replayable: false, at_hand: false }, Next::Stop),
        (Outcome::Status(503), Body { replayable: false, at_hand: true }, Next::Again),
        (Outcome::Status(504), Body { replayable: false, at_hand: true }, Next::Stop),
        (Outcome::Status(500), BODY, Next::Answer),
        (Outcome::Status(200), BODY, Next::Answer),
    ];
    for (outcome, body, expected) in rows {
        let fleet = regions(2, 1);
        let mut asking = Asking::new(&fleet);
        let attempt = asking.begin(Why::Needed).expect("somebody");
        assert_eq!(asking.end(attempt, outcome, body).0, expected, "{outcome:?} {body:?}");
    }
}

#[test]
fn a_request_that_breaks_two_endpoints_is_not_sent_to_a_third() {
    let fleet = regions(3, 1);
    let mut asking = Asking::new(&fleet);
    for expected in [Next::Again, Next::Poisonous] {
        let attempt = asking.begin(Why::Needed).expect("somebody");
        assert_eq!(asking.end(attempt, Outcome::Reset, BODY).0, expected);
    }
}

#[test]
fn two_that_die_together_are_a_lost_machine_and_no_deadly_request() {
    for (lives_on, expected) in
        [(false, [Next::Again, Next::Again, Next::Poisonous]), (true, [Next::Again, Next::Poisonous, Next::Stop])]
    {
        let fleet = fleet(vec![(region("near", 5.0), 2), (region("far", 60.0), 1)]);
        let mut asking = Asking::new(&fleet);
        for (at, expected) in expected.into_iter().enumerate().take_while(|(_, next)| *next != Next::Stop) {
            let attempt = asking.begin(Why::Needed).expect("somebody");
            if at == 1 && lives_on {
                // The second has finished something since the first died.
                let place = (attempt.choice.region.get(), attempt.choice.endpoint);
                judge(&fleet, place.0, place.1, Mark::Success, Time(NOW.0 + 2_000_000));
            }
            assert_eq!(asking.end(attempt, Outcome::Reset, BODY).0, expected, "attempt {at}");
        }
    }
}

#[test]
fn extra_attempts_end_with_the_budgets_of_where_they_come_from_and_go_to() {
    let fleet = regions(2, 1);
    let mut extras = 0;
    for _ in 0..1000 {
        let mut asking = Asking::new(&fleet);
        let attempt = asking.begin(Why::Needed).expect("somebody");
        drop(attempt);
    }
    let mut refused = None;
    for _ in 0..1000 {
        let mut asking = Asking::new(&fleet);
        let first = asking.begin(Why::Needed).expect("somebody");
        let second = asking.begin(Why::Slow);
        match second {
            Ok(_) => extras += 1,
            Err(why) => refused = Some(why),
        }
        drop(first);
    }
    assert_eq!(refused, Some(NotBegun::BudgetSpent));
    // A fifth of the 2,000 and the floor of 10 seconds at the first, that floor at the second, which nobody asks first.
    assert!((590..=600).contains(&extras), "{extras}");
}

#[test]
fn hedges_are_a_twentieth_at_most_and_none_where_load_is_high() {
    let mut fleet = regions(2, 1);
    let hedges = |fleet: &Fleet| {
        let one = |_: &usize| {
            let mut asking = Asking::new(fleet);
            let first = asking.begin(Why::Needed).expect("somebody");
            let hedged = asking.begin(Why::Hedge(&HEDGE)).is_ok();
            drop(first);
            hedged
        };
        (0..1000).filter(one).count()
    };
    let sent = hedges(&fleet);
    assert!((45..=50).contains(&sent), "{sent} of 1000");
    fleet.regions.iter_mut().for_each(|region| region.region.soft_limit = 1);
    let held = Asking::new(&fleet).begin(Why::Needed).expect("somebody");
    let also = Asking::new(&fleet).begin(Why::Needed).expect("somebody");
    let mut asking = Asking::new(&fleet);
    let first = asking.begin(Why::Needed).expect("over soft, but needed");
    assert_eq!(asking.begin(Why::Hedge(&HEDGE)).err(), Some(NotBegun::NotWorthIt));
    assert_eq!(asking.begin(Why::Slow).err(), Some(NotBegun::NotWorthIt));
    drop((held, also, first));
}

#[test]
fn the_loser_counts_only_if_its_endpoint_finished_nothing_else_meanwhile() {
    for (finishes_another, expected) in [(true, Outcome::Cancelled), (false, Outcome::Outrun)] {
        let fleet = regions(2, 1);
        let mut asking = Asking::new(&fleet);
        let mut slow = asking.begin(Why::Needed).expect("somebody");
        let quick = asking.begin(Why::Slow).expect("somebody else");
        assert_ne!(slow.choice.endpoint, quick.choice.endpoint);
        let later = Time(NOW.0 + 2_000_000_000);
        if finishes_another {
            judge(&fleet, 0, 0, Mark::Success, Time(NOW.0 + 1_000_000_000));
        }
        assert_eq!(asking.end(quick, Outcome::Status(200), BODY).0, Next::Answer);
        let (outcome, _) = asking.with(|course, query| course.outrun(&fleet, query, &mut slow, later));
        assert_eq!(outcome, expected);
        drop(slow);
        assert_eq!(fleet.endpoints[0].in_flight(), 0);
    }
}

#[test]
fn while_another_attempt_runs_a_failure_waits_for_it() {
    let fleet = regions(3, 1);
    let mut asking = Asking::new(&fleet);
    let first = asking.begin(Why::Needed).expect("somebody");
    let second = asking.begin(Why::Slow).expect("somebody else");
    assert_eq!(asking.end(first, Outcome::Reset, BODY).0, Next::Wait);
    assert_eq!(asking.end(second, Outcome::Status(200), BODY).0, Next::Answer);
}

#[test]
fn a_trial_that_brings_nothing_is_given_back_at_once() {
    let fleet = regions(1, 1);
    (0..3).for_each(|_| {
        judge(&fleet, 0, 0, Mark::Failure, Time(NOW.0 - 1_000_000_000));
    });
    for _ in 0..3 {
        // Its client leaves: the next request may be the trial.
        let trial = Asking::new(&fleet).begin(Why::Needed).expect("the trial");
        assert!(!trial.choice.panic);
        let other = Asking::new(&fleet).begin(Why::Needed).expect("in a panic");
        assert!(other.choice.panic, "a second trial at once");
        drop((trial, other));
    }
}

#[test]
fn nobody_there_at_all_is_out_until_a_probe_finds_it() {
    let fleet = regions(2, 1);
    let told: Vec<_> = (0..3)
        .filter_map(|_| {
            let mut asking = Asking::new(&fleet);
            let attempt = asking.begin(Why::Needed).expect("somebody");
            asking.end(attempt, Outcome::ConnectFailed, BODY).1
        })
        .collect();
    assert_eq!(told, [Told::Condemned]);
    // No client is spent on trials, however long it takes.
    assert_eq!(Asking::new(&fleet).begin(Why::Needed).expect("the other").choice.endpoint, 1);
}

#[test]
fn the_hard_limit_holds_against_threads_that_race_for_the_last_place() {
    let mut fleet = regions(1, 1);
    fleet.regions[0].region.hard_limit = 5;
    let (fleet, most) = (Arc::new(fleet), AtomicU32::new(0));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..20_000 {
                    match Asking::new(&fleet).begin(Why::Needed) {
                        Ok(_held) => {
                            most.fetch_max(fleet.endpoints[0].in_flight(), Relaxed);
                        }
                        Err(why) => assert_eq!(why, NotBegun::Nobody(Nobody::Full)),
                    }
                }
            });
        }
    });
    assert!((1..=5).contains(&most.load(Relaxed)), "{most:?} in flight");
    assert_eq!((fleet.endpoints[0].in_flight(), fleet.regions[0].live.in_flight()), (0, 0));
}
