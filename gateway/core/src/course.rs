//! The course of one request through its attempts: where it goes, what an outcome leads to, and when it has had enough.
//!
//! The gateway's loop and the simulation both do what this says; neither decides anything itself.

use std::sync::Arc;

use crate::Time;
use crate::budget::Budget;
use crate::fleet::{Fleet, Sent};
use crate::invariant;
use crate::live::{InFlight, Live, Told};
use crate::pick::{Choice, Nobody, Query, Tried, pick};
use crate::region::RegionSet;
use crate::residency::Permitted;
use crate::retry::{Mark, Outcome, Retry};
use crate::stall::Hedge;

/// The most attempts that a configuration may ask for.
pub const ATTEMPTS_MAX: usize = 8;

/// Endpoints that one request may break before it is taken to be the cause.
const DEATHS_MAX: u8 = 2;

/// Picks that may come to nothing before one attempt: another request may take a trial or the last place away.
const PICKS_MAX: usize = 8;

/// How a request is tried.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// The most sends, the first included; at most [`ATTEMPTS_MAX`].
    pub max: usize,
    /// Extra attempts as a share of a destination's requests.
    pub budget_share: f32,
    /// Extra attempts a second beyond the share.
    pub budget_floor: u32,
}

/// Why an attempt is made.
#[derive(Clone, Copy, Debug)]
pub enum Why<'a> {
    /// It is the first, or the one before it has failed.
    Needed,
    /// The one before it is slow.
    Slow,
    /// To cut the tail.
    Hedge(&'a Hedge),
}

/// What can be done with the request's body.
#[derive(Clone, Copy, Debug)]
pub struct Body {
    /// It can be sent once more, and doing it twice does no harm.
    pub replayable: bool,
    /// It can be sent, as far as it is at hand.
    pub at_hand: bool,
}

/// One attempt under way. Dropped without a verdict, it gives a trial back.
#[derive(Debug)]
pub struct Attempt {
    /// Where and why.
    pub choice: Choice,
    /// When it began.
    pub began: Time,
    /// Its load on the endpoint; an answer keeps it to the end of its body.
    pub in_flight: Option<InFlight>,
    trial: Option<Trial>,
}

#[derive(Debug)]
struct Trial(Arc<Live>);

impl Drop for Trial {
    fn drop(&mut self) {
        // After a verdict there is no trial left to release.
        self.0.release_trial();
    }
}

/// Why no attempt began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotBegun {
    /// There is nobody to ask.
    Nobody(Nobody),
    /// There would be, but for the budget.
    BudgetSpent,
    /// There would be, but what is only nice to have is not done there: it is over its soft limit, or unhealthy.
    NotWorthIt,
    /// There have been as many attempts as there may be.
    Enough,
}

/// What an outcome leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// It is the answer.
    Answer,
    /// Another attempt, and what came is kept in case that none does better.
    Again,
    /// Another attempt is under way already: wait for it.
    Wait,
    /// Enough: what was kept is the answer, or there is none.
    Stop,
    /// The request broke two endpoints: it is not sent to a third.
    Poisonous,
}

/// One request's course.
#[derive(Debug, Default)]
pub struct Course {
    tried: [u16; ATTEMPTS_MAX],
    attempts: usize,
    running: usize,
    suspect: RegionSet,
    deaths: u8,
    /// Where and when endpoints died of it, or with it.
    died_in: RegionSet,
    died_at: Time,
}

impl Course {
    /// The course of a request whose like broke endpoints before: one more is enough.
    pub fn on_trial() -> Course {
        Course { deaths: DEATHS_MAX - 1, ..Course::default() }
    }

    /// Attempts so far.
    pub fn attempts(&self) -> usize {
        self.attempts
    }

    /// The endpoints tried, in order.
    pub fn tried(&self) -> &[u16] {
        &self.tried[..self.attempts]
    }

    /// Whether there is somebody else to ask: a client with nowhere else to go loses nothing by waiting.
    pub fn has_elsewhere(
        &self,
        fleet: &Fleet,
        query: &Query<'_>,
        permitted: &Permitted,
        rules: &Rules,
        now: Time,
    ) -> bool {
        let tried = Tried { endpoints: self.tried(), suspect: self.suspect };
        let picked = pick(fleet, query, permitted, tried, now, 0);
        self.attempts < rules.max.min(ATTEMPTS_MAX) && picked.is_ok_and(|choice| !choice.panic)
    }

    /// Begins the next attempt.
    ///
    /// # Errors
    /// See [`NotBegun`].
    #[expect(
        clippy::too_many_arguments,
        reason = "the world, the request and the moment; a struct of them would say no more"
    )]
    pub fn begin(
        &mut self,
        fleet: &Fleet,
        query: &Query<'_>,
        permitted: &Permitted,
        rules: &Rules,
        why: Why<'_>,
        now: Time,
        mut random: impl FnMut() -> u64,
    ) -> Result<Attempt, NotBegun> {
        if self.attempts >= rules.max.min(ATTEMPTS_MAX) {
            return Err(NotBegun::Enough);
        }
        let mut nobody = Nobody::Full;
        for _ in 0..PICKS_MAX {
            let tried = Tried { endpoints: self.tried(), suspect: self.suspect };
            let choice = match pick(fleet, query, permitted, tried, now, random()) {
                Ok(choice) => choice,
                Err(none) => {
                    nobody = none;
                    break;
                }
            };
            if !matches!(why, Why::Needed) && (choice.over_soft || choice.panic) {
                return Err(NotBegun::NotWorthIt);
            }
            let (live, region) = (&fleet.endpoints[choice.endpoint], fleet.region(choice.region));
            let (admitted, is_trial) = if choice.panic { (true, false) } else { live.admit(now, &fleet.rules) };
            let trial = is_trial.then(|| Trial(Arc::clone(live)));
            if !admitted {
                continue;
            }
            let hard_limit = region.region.hard_limit;
            let measured = fleet.model_at(query.model, choice.endpoint);
            let in_flight = InFlight::acquire(live, &region.live, measured, &fleet.waiting, hard_limit);
            let Some(in_flight) = in_flight else { continue };
            let model = query.model.and_then(|model| fleet.models.get(model));
            if self.attempts == 0 {
                live.budget.deposit(now);
                model.inspect(|model| model.hedges.deposit(now));
            } else {
                let hedge_allowed = match (why, model) {
                    (Why::Hedge(hedge), Some(model)) => model.hedges.withdraw(now, hedge.share, 0),
                    (Why::Hedge(_), None) => false,
                    _ => true,
                };
                // From the destination's budget, or else from that of the endpoint it leaves: whoever goes to an idle region
                // because a busy one died would otherwise find no budget there.
                let left = self.tried().last().map(|last| &fleet.endpoints[usize::from(*last)].budget);
                let withdraw = |budget: &Budget| budget.withdraw(now, rules.budget_share, rules.budget_floor);
                if !hedge_allowed || !(withdraw(&live.budget) || left.is_some_and(withdraw)) {
                    return Err(NotBegun::BudgetSpent);
                }
            }
            // Endpoints beyond 65,535 are refused with the configuration.
            self.tried[self.attempts] = choice.endpoint as u16;
            self.attempts += 1;
            self.running += 1;
            debug_assert!(invariant::attempts_are_bounded(self.tried(), rules.max), "{:?}", self.tried());
            return Ok(Attempt { choice, began: now, in_flight: Some(in_flight), trial });
        }
        Err(NotBegun::Nobody(nobody))
    }

    /// An attempt has ended. Says what that leads to, and what it did to its endpoint.
    pub fn ended(
        &mut self,
        fleet: &Fleet,
        query: &Query<'_>,
        rules: &Rules,
        attempt: &mut Attempt,
        (outcome, now): (Outcome, Time),
        body: Body,
    ) -> (Next, Option<Told>) {
        self.running = self.running.saturating_sub(1);
        let Choice { region, endpoint, .. } = attempt.choice;
        let verdict = outcome.verdict();
        let took = now.since(attempt.began);
        if let Some(model) = fleet.model_at(query.model, endpoint) {
            match verdict.endpoint {
                // What was refused for its input says nothing of the model's speed.
                Mark::Success if matches!(outcome, Outcome::Status(..300)) => model.answered(took, now),
                Mark::Success => {}
                Mark::None if matches!(outcome, Outcome::Status(500..)) => {
                    model.failed(took, fleet.rules.error_penalty, now);
                }
                Mark::Failure | Mark::Unreachable | Mark::Overload | Mark::Dead => {
                    model.failed(took, fleet.rules.error_penalty, now);
                }
                Mark::None => {}
            }
        }
        let sent = Sent { began: attempt.began, model: query.model, grpc: query.grpc };
        let told = fleet.judge((region, endpoint), sent, verdict.endpoint, now);
        attempt.trial = None;

        match outcome {
            // What hangs one endpoint, a lost network or machine, mostly hangs its neighbours too.
            Outcome::Hung => self.suspect.insert(region),
            Outcome::Reset if body.replayable => {
                // Two that die together are a lost machine, not a deadly request: the second counts if it stands elsewhere,
                // or has finished something since the first died.
                let lived_on = fleet.endpoints[endpoint].succeeded_at() > self.died_at;
                if !self.died_in.contains(region) || lived_on {
                    self.deaths += 1;
                }
                self.died_in.insert(region);
                self.died_at = now;
            }
            _ => {}
        }
        // One endpoint may be sick; two in one region are a sign that the region is.
        let range = &fleet.region(region).endpoints;
        if self.tried().iter().filter(|tried| range.contains(&usize::from(**tried))).count() >= 2 {
            self.suspect.insert(region);
        }
        let again = match verdict.retry {
            Retry::No => return (Next::Answer, told),
            Retry::Any => body.at_hand,
            Retry::Replayable => body.replayable,
        };
        let next = if self.deaths >= DEATHS_MAX {
            Next::Poisonous
        } else if self.running > 0 {
            Next::Wait
        } else if again && self.attempts < rules.max.min(ATTEMPTS_MAX) {
            Next::Again
        } else {
            Next::Stop
        };
        (next, told)
    }

    /// Another attempt answered first, and this one is cancelled. What it took makes its endpoint dearer; it counts against
    /// it only if the endpoint finished nothing else meanwhile.
    pub fn outrun(
        &mut self,
        fleet: &Fleet,
        query: &Query<'_>,
        attempt: &mut Attempt,
        now: Time,
    ) -> (Outcome, Option<Told>) {
        self.running = self.running.saturating_sub(1);
        let Choice { region, endpoint, .. } = attempt.choice;
        let took = now.since(attempt.began);
        if let Some(model) = fleet.model_at(query.model, endpoint) {
            model.observe_peak(took, now);
        }
        let idle = fleet.endpoints[endpoint].succeeded_at() < attempt.began && attempt.began < now;
        let slow = took >= fleet.rules.error_penalty;
        let outcome = if idle && slow { Outcome::Outrun } else { Outcome::Cancelled };
        let sent = Sent { began: attempt.began, model: query.model, grpc: query.grpc };
        let told = fleet.judge((region, endpoint), sent, outcome.verdict().endpoint, now);
        attempt.trial = None;
        (outcome, told)
    }
}

/// Whether a destination has kept to its budget, for the simulation.
pub fn kept_budget(budget: &Budget, rules: &Rules, now: Time) -> bool {
    let (requests, extras) = budget.counts(now);
    invariant::is_within_budget(extras, requests, rules.budget_share, u64::from(rules.budget_floor) * 10)
}
