//! The only loop: pick, send, judge, stop or go again; within the attempts, the budget and the deadline.

mod head;

mod stall;

use std::sync::Arc;

use http::Response;
use http::request::Parts;
use hyper::body::Incoming;
use isochrone_core::pick::{Choice, Tried};
use isochrone_core::region::{RegionIndex, RegionSet};
use isochrone_core::residency::Permitted;
use isochrone_core::retry::{Outcome, Retry};
use smallvec::SmallVec;
use tokio::time::Instant;
use tracing::{Instrument, Span};

pub(crate) use self::head::{Forwarded, deadline};
use crate::app::Core;
use crate::body::Received;
use crate::call::{self, Call, Dialect};
use crate::config::ATTEMPTS_MAX;
use crate::endpoint::{Endpoint, InFlight};
use crate::error::Error;
use crate::event::{Decision, Record};
use crate::pick::pick;
use crate::policy::{self, Ask};
use crate::snapshot::Snapshot;
use crate::upstream::{self, Lease, Outgoing, REGION, SendError};

/// The most connections that one request may break before it is taken to be the cause.
const DEATHS_MAX: usize = 2;

/// Turns of the loop: the most attempts, and as many trials lost to other requests.
const TURNS_MAX: usize = 2 * ATTEMPTS_MAX;

/// A request as the loop needs it.
#[derive(Debug)]
pub(crate) struct Attempted<'a> {
    pub(crate) snapshot: &'a Arc<Snapshot>,
    pub(crate) permitted: Permitted,
    pub(crate) ask: Ask<'a>,
    pub(crate) call: &'a Call,
    pub(crate) head: &'a Parts,
    pub(crate) body: Received,
    pub(crate) deadline: Instant,
    /// The deadline is the gateway's own, not one that the client chose.
    pub(crate) own_deadline: bool,
    pub(crate) forwarded: Forwarded,
}

/// An endpoint's answer, with what must be kept until its body has ended.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) response: Response<Incoming>,
    pub(crate) lease: Lease,
    pub(crate) in_flight: InFlight,
    pub(crate) region: RegionIndex,
}

/// Tries until there is an answer for the client.
///
/// # Errors
/// Nobody permitted could answer.
pub(crate) async fn run(core: &Core, mut request: Attempted<'_>, record: &mut Record) -> Result<Answer, Error> {
    let snapshot = request.snapshot;
    let rules = &snapshot.config.attempts;
    let replayable = request.call.replayable
        && request.body.is_whole()
        && !call::may_be_sequence(request.head, request.body.chunks());
    let mut tried: SmallVec<[usize; 8]> = SmallVec::new();
    let mut suspect = RegionSet::EMPTY;
    let mut deaths = 0;
    // An answer that was not good enough, in case that no better one comes.
    let mut held: Option<(Answer, Decision)> = None;
    let mut failure = Error::Unavailable;

    // Each turn tries an endpoint that was not tried before, or loses one's trial to another request.
    for _ in 0..TURNS_MAX {
        let now = core.now();
        if !tried.is_empty() {
            request.permitted = hold_to_newest(core, &request);
        }
        let tries = Tried { endpoints: &tried, suspect };
        let picked = pick(snapshot, &request.permitted, request.ask.location, request.call.dialect, tries, now);
        let Some(choice) = picked else { break };
        debug_assert!(request.permitted.contains(choice.region), "an attempt outside the permitted set");
        let endpoint = &snapshot.endpoints[choice.endpoint];
        if !endpoint.admit(now, &snapshot.config, choice.panic) {
            continue;
        }
        tried.push(choice.endpoint);
        // A trial whose request ends without a verdict, because its client left, is free for the next.
        let trial = Trial { endpoint, core };
        if record.attempts == 0 {
            endpoint.budget.deposit(now);
        } else if !endpoint.budget.withdraw(now, rules.budget_share, rules.budget_floor) {
            record.budget_spent();
            break;
        }

        let span = record.attempt_begins(snapshot, &choice, endpoint);
        let permitted = request.permitted;
        let (ask, dialect, more) = (request.ask, request.call.dialect, usize::from(record.attempts) < rules.max);
        let elsewhere = || {
            let tries = Tried { endpoints: &tried, suspect };
            more && pick(snapshot, &permitted, ask.location, dialect, tries, core.now()).is_some()
        };
        let sending = attempt(core, &mut request, endpoint, &choice, replayable.then_some(elsewhere), &span);
        let result = sending.instrument(span.clone()).await;
        let outcome = outcome(&result, &request);
        record.attempt_ended(&span, endpoint, outcome, result.as_ref().err());
        let verdict = outcome.verdict();
        let ejected = endpoint.judge(verdict.endpoint, core.now(), &snapshot.config);
        drop(trial);
        if let Some(ejection) = ejected {
            tracing::warn!(region = %endpoint.config.region, endpoint = endpoint.name(), outcome = outcome.as_str(),
                seconds = ejection.as_secs_f32(), "endpoint ejected");
        }

        let again = match verdict.retry {
            Retry::No => false,
            Retry::Any => request.body.is_at_hand(),
            Retry::Replayable => replayable,
        };
        match result {
            Ok(answer) if verdict.retry == Retry::No => return Ok(answer),
            // Another may do better; if none does, the client gets this one.
            Ok(answer) => held = Some((answer, record.decision.clone())),
            Err(Failure::Send(SendError::Connect { .. } | SendError::Refused(_))) => {}
            // What hangs one endpoint, a lost network or machine, mostly hangs its neighbours too.
            Err(Failure::Hung) => {
                failure = Error::Broken;
                suspect.insert(choice.region);
            }
            Err(Failure::Send(SendError::Reset(_))) => {
                deaths += 1;
                failure = if deaths < DEATHS_MAX { Error::Broken } else { Error::Poisonous };
            }
            Err(Failure::Send(SendError::ClientBody)) => return Err(Error::BrokenBody),
            Err(Failure::Deadline) => return Err(Error::Deadline),
        }
        if !again || deaths >= DEATHS_MAX || usize::from(record.attempts) >= rules.max {
            break;
        }
        // One endpoint may be sick; two in one region are a sign that the region is.
        let region = &snapshot.regions[choice.region.get()].endpoints;
        if tried.iter().filter(|endpoint| region.contains(endpoint)).count() >= 2 {
            suspect.insert(choice.region);
        }
    }
    let (answer, decision) = held.ok_or(failure)?;
    record.decision = decision;
    Ok(answer)
}

/// Frees an endpoint's trial when its attempt is over, however that comes. A verdict has ended the trial before.
struct Trial<'a> {
    endpoint: &'a Endpoint,
    core: &'a Core,
}

impl Drop for Trial<'_> {
    fn drop(&mut self) {
        self.endpoint.release_trial(self.core.now());
    }
}

/// Why an attempt gave no answer.
#[derive(Debug)]
pub(crate) enum Failure {
    Send(SendError),
    /// It was silent, and did not say that it lives.
    Hung,
    Deadline,
}

/// Sends the request to one endpoint and waits for the head of its answer. `elsewhere` tells whether there is another
/// endpoint to go to; `None` if the request may go to no other.
async fn attempt(
    core: &Core,
    request: &mut Attempted<'_>,
    endpoint: &Arc<Endpoint>,
    choice: &Choice,
    elsewhere: Option<impl Fn() -> bool>,
    span: &Span,
) -> Result<Answer, Failure> {
    let in_flight = InFlight::new(endpoint);
    let grpc = request.call.dialect == Dialect::Grpc;
    // The pick gives only endpoints that speak the protocol.
    let (target, pools) = endpoint.target(grpc).ok_or(Failure::Deadline)?;
    let headers = head::for_endpoint(request.head, &request.forwarded, request.deadline, grpc, span);
    let outgoing = Outgoing { method: &request.head.method, uri: &request.head.uri, headers, grpc };
    let connect_timeout = request.snapshot.config.attempts.connect_timeout;
    let body = request.body.for_attempt();
    let sent = upstream::send(endpoint, (target, &pools[core.index]), outgoing, body, connect_timeout, core.now());
    // Only what can go elsewhere is watched, and only who can be asked.
    let watchable = elsewhere.is_some() && endpoint.config.http.is_some();
    let rules = watchable.then_some(request.snapshot.config.stall);
    let elsewhere = || elsewhere.as_ref().is_some_and(|elsewhere| elsewhere());
    match stall::watched(core, endpoint, rules, request.deadline, elsewhere, sent).await? {
        Err(SendError::Connect { why, unsent }) => {
            request.body.put_back(unsent);
            Err(Failure::Send(SendError::Connect { why, unsent: None }))
        }
        Err(error) => Err(Failure::Send(error)),
        Ok((response, lease)) => {
            if response.headers().get(REGION).is_some_and(|named| named.as_bytes() != endpoint.config.region.as_bytes())
            {
                endpoint.doubt();
            }
            Ok(Answer { response, lease, in_flight, region: choice.region })
        }
    }
}

fn outcome(result: &Result<Answer, Failure>, request: &Attempted<'_>) -> Outcome {
    match result {
        Ok(answer) => Outcome::Status(answer.response.status().as_u16()),
        Err(Failure::Send(SendError::Connect { .. })) => Outcome::ConnectFailed,
        Err(Failure::Send(SendError::Reset(_))) => Outcome::Reset,
        Err(Failure::Send(SendError::Refused(_))) => Outcome::Refused,
        Err(Failure::Send(SendError::ClientBody)) => Outcome::ClientBody,
        Err(Failure::Hung) => Outcome::Hung,
        Err(Failure::Deadline) if request.own_deadline && request.body.is_whole() => Outcome::TimedOut,
        Err(Failure::Deadline) => Outcome::ClientTimedOut,
    }
}

/// What the rules permit now, if they have been reloaded since the request began.
fn hold_to_newest(core: &Core, request: &Attempted<'_>) -> Permitted {
    let newest = core.shared.snapshot.load();
    if Arc::ptr_eq(&newest, request.snapshot) {
        return request.permitted;
    }
    policy::hold_to(&newest, request.snapshot, request.permitted, &request.ask)
}
