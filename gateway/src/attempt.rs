//! The only loop: begin, send, judge, stop or go again. What it does is `isochrone_core::course`'s to say; here it is done.

mod answer;

mod head;

mod race;

use std::hash::{BuildHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use http::request::Parts;
use isochrone_core::Time;
use isochrone_core::course::{self, Attempt, Course, Next, NotBegun, Why};
use isochrone_core::fleet::Sent;
use isochrone_core::live::{InFlight, Told};
use isochrone_core::pick::{Nobody, Query};
use isochrone_core::poison::Verdict;
use isochrone_core::queue::Turn;
use isochrone_core::region::RegionIndex;
use isochrone_core::residency::Permitted;
use isochrone_core::retry::Outcome;
use isochrone_core::steer::{Client, stable_hash};
use tokio::time::{Instant, timeout_at};
use tracing::Span;

pub(crate) use self::answer::{AnswerBody, Failure, Frames};
pub(crate) use self::head::{Forwarded, asked_deadline};
use self::race::{Ended, Sending, race};
use crate::app::Core;
use crate::body::Received;
use crate::call::{self, Call, Dialect};
use crate::config::{Affinity, Route};
use crate::endpoint::Endpoint;
use crate::error::Error;
use crate::event::Record;
use crate::policy::{self, Ask};
use crate::snapshot::Snapshot;
use crate::upstream::{Lease, SendError};

/// A request as the loop needs it.
#[derive(Debug)]
pub(crate) struct Attempted<'a> {
    pub(crate) snapshot: &'a Arc<Snapshot>,
    pub(crate) route: &'a Route,
    pub(crate) permitted: Permitted,
    pub(crate) ask: Ask<'a>,
    /// The model's place in the fleet.
    pub(crate) model: Option<usize>,
    /// A stable hash of the client's address prefix.
    pub(crate) client: u64,
    pub(crate) call: &'a Call,
    pub(crate) head: &'a Parts,
    pub(crate) deadline: Instant,
    /// The deadline is the gateway's own, not one that the client chose.
    pub(crate) own_deadline: bool,
    pub(crate) forwarded: Forwarded,
}

/// An endpoint's answer, with what must be kept until its body has ended.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) head: http::response::Parts,
    pub(crate) body: AnswerBody,
    /// The connection and the load, unless the body has been read already.
    pub(crate) upstream: Option<Upstream>,
    pub(crate) region: RegionIndex,
    /// Which attempt it is the answer to.
    pub(crate) number: usize,
}

/// What an answer holds of its endpoint until its body has ended.
#[derive(Debug)]
pub(crate) struct Upstream {
    pub(crate) endpoint: Arc<Endpoint>,
    pub(crate) lease: Lease,
    pub(crate) in_flight: Option<InFlight>,
    /// Where it is in the fleet and what was sent there, for judging an answer that breaks off.
    pub(crate) place: Option<((RegionIndex, usize), Sent)>,
}

/// An attempt that has begun.
struct Begun<'a> {
    attempt: Attempt,
    endpoint: &'a Arc<Endpoint>,
    span: Span,
    /// From 0.
    number: usize,
}

/// Tries until there is an answer for the client.
///
/// `stateless`: the body has been read, and is of no sequence.
///
/// # Errors
/// Nobody permitted could answer.
pub(crate) async fn run(
    core: &Core,
    request: &Attempted<'_>,
    mut body: Received,
    stateless: bool,
    record: &mut Record,
) -> Result<Answer, Error> {
    // A route's word overrules what the call is taken for.
    let may_repeat = || request.call.replayable && (stateless || !call::may_be_sequence(request.head, body.chunks()));
    let replayable = body.is_whole() && request.route.replay.unwrap_or_else(may_repeat);
    let (poison, longest) = (&request.snapshot.fleet.poison, request.snapshot.config.attempts.poison_for);
    let asked = if replayable && !poison.is_empty() {
        poison.ask(digest(core, request, &body), core.now(), longest)
    } else {
        Verdict::Clean
    };
    let mut course = match asked {
        Verdict::Clean => Course::default(),
        Verdict::Trial => Course::on_trial(),
        Verdict::Refused => return Err(Error::Poisonous),
    };
    // An answer that was not good enough, in case that no better one comes.
    let mut held: Option<Answer> = None;
    let mut failure = Error::Unavailable;
    // Each turn makes an attempt, of which the course allows a few.
    loop {
        let begun = match begin_or_wait(core, request, &mut course, record).await {
            Ok(begun) => begun,
            Err(why) => {
                record.not_begun(why);
                break;
            }
        };
        let state = course::Body { replayable, at_hand: true };
        let outgoing = body.for_attempt();
        let sending = Sending { core, request, body: &body, state };
        let Ended { next, result } = race(sending, &mut course, begun, outgoing, &mut held, record).await;
        match result {
            Ok(answer) if next == Next::Answer => {
                record.decided(answer.number);
                if asked == Verdict::Trial {
                    poison.forgive(digest(core, request, &body));
                }
                return Ok(answer);
            }
            // Another may do better; if none does, the client gets this one.
            Ok(answer) => held = Some(answer),
            Err(error) => failure = error.or_put_back(&mut body, failure)?,
        }
        match next {
            Next::Again => {}
            Next::Poisonous => {
                failure = Error::Poisonous;
                poison.remember(digest(core, request, &body), core.now(), longest);
                record.poisonous();
                break;
            }
            Next::Answer | Next::Wait | Next::Stop => break,
        }
    }
    let answer = held.ok_or(failure)?;
    record.decided(answer.number);
    Ok(answer)
}

/// Begins the next attempt. If every permitted endpoint has all that it can take, it waits for room, for a short while and
/// in a short queue.
async fn begin_or_wait<'a>(
    core: &Core,
    request: &'a Attempted<'_>,
    course: &mut Course,
    record: &mut Record,
) -> Result<Begun<'a>, NotBegun> {
    const FULL: NotBegun = NotBegun::Nobody(Nobody::Full);
    let (waiting, queue) = (&request.snapshot.fleet.waiting, request.snapshot.config.queue);
    match begin(core, request, course, Why::Needed, record) {
        Err(FULL) if queue.bound > 0 => {}
        begun => return begun,
    }
    let until = request.deadline.min(Instant::now() + queue.wait);
    let deadline = core.now() + request.deadline.saturating_duration_since(Instant::now());
    let mut passing = 0;
    loop {
        let place = waiting.join(deadline, queue.bound);
        // Something may have been released just before this request joined, or it is its turn.
        let begun = begin(core, request, course, Why::Needed, record);
        if begun.is_err() {
            // What this one's turn was for is of no use to it: the next may look.
            waiting.pass(passing);
        }
        match begun {
            Err(FULL) => {}
            begun => return begun,
        }
        passing = match timeout_at(until, place).await {
            Ok(Turn::Look(others)) => others,
            Ok(Turn::Shed) | Err(_) => return Err(FULL),
        };
    }
}

/// Begins an attempt now, or says why there is none.
fn begin<'a>(
    core: &Core,
    request: &'a Attempted<'_>,
    course: &mut Course,
    why: Why<'_>,
    record: &mut Record,
) -> Result<Begun<'a>, NotBegun> {
    let (now, snapshot) = (core.now(), request.snapshot);
    // The first attempt too: its body may have been long in coming.
    let permitted = hold_to_newest(core, request);
    let rules = &snapshot.config.attempts.rules;
    let query = request.query();
    let attempt = course.begin(&snapshot.fleet, &query, &permitted, rules, why, now, || fastrand::u64(..))?;
    let endpoint = &snapshot.endpoints[attempt.choice.endpoint];
    let span = record.attempt_begins(snapshot, &query, &attempt.choice, why, endpoint);
    Ok(Begun { attempt, endpoint, span, number: course.attempts() - 1 })
}

impl Attempted<'_> {
    fn grpc(&self) -> bool {
        self.call.dialect == Dialect::Grpc
    }

    /// What a pick is asked.
    fn query(&self) -> Query<'_> {
        let affinity = self.route.affinity.as_ref().and_then(|affinity| match affinity {
            Affinity::Tenant => Some(stable_hash(self.snapshot.tenants[self.ask.tenant].name.as_bytes())),
            Affinity::Header(name) => self.head.headers.get(name).map(|value| stable_hash(value.as_bytes())),
        });
        Query {
            client: Client { location: self.ask.location, hash: self.client },
            model: self.model,
            grpc: self.grpc(),
            steering: &self.route.steering,
            affinity,
        }
    }

    fn outcome(&self, result: &Result<Answer, Failure>, whole: bool, took: Duration) -> Outcome {
        match result {
            // The worker's answer to a deadline that the client chose: that is the client's answer.
            Ok(answer) if answer.status() == 504 && !self.own_deadline => Outcome::ClientTimedOut,
            Ok(answer) => Outcome::Status(answer.status()),
            // An endpoint that was asked late, after a slow body or another's failure, is not to blame for the deadline.
            Err(Failure::Deadline) if self.own_deadline && whole && took >= self.route.timeout / 2 => Outcome::TimedOut,
            Err(Failure::Send(SendError::Reset(_))) if !whole => Outcome::CutOff,
            Err(failure) => failure.outcome(),
        }
    }
}

/// What the rules permit now, if they have been reloaded since the request began.
pub(crate) fn hold_to_newest(core: &Core, request: &Attempted<'_>) -> Permitted {
    let newest = core.shared.snapshot.load();
    if Arc::ptr_eq(&newest, request.snapshot) {
        return request.permitted;
    }
    policy::hold_to(&newest, request.snapshot, request.permitted, &request.ask)
}

/// The digest by which a request that broke two endpoints is known again: of one tenant, so that nobody can have another's
/// requests refused, and by a key of this process.
fn digest(core: &Core, request: &Attempted<'_>, body: &Received) -> u64 {
    let tenant = &*request.snapshot.tenants[request.ask.tenant].name;
    let path = request.head.uri.path_and_query().map_or("", |path| path.as_str());
    let mut hasher = core.shared.digests.build_hasher();
    (tenant, path).hash(&mut hasher);
    // However it was cut into frames.
    body.chunks().iter().for_each(|chunk| hasher.write(chunk));
    hasher.finish()
}

/// Tells what an attempt did to its endpoint. Whatever that was, a probe is not to wait until its time.
pub(crate) fn tell(endpoint: &Endpoint, outcome: Outcome, told: Option<Told>) {
    if told.is_some() {
        endpoint.wake.notify_one();
    }
    let (region, address, outcome) = (&endpoint.config.region, endpoint.name(), outcome.as_str());
    match told {
        None => {}
        Some(Told::Ejected(length)) => {
            tracing::warn!(%region, endpoint = address, outcome, seconds = length.as_secs_f32(), "endpoint ejected");
        }
        Some(Told::Condemned) => {
            tracing::warn!(%region, endpoint = address, outcome, "endpoint down until its probes find it");
        }
        Some(Told::Paused(length)) => {
            let seconds = length.as_secs_f32();
            tracing::warn!(%region, endpoint = address, outcome, seconds, "endpoint overloaded; left alone for a while");
        }
    }
}

/// Now, and an instant on tokio's clock as a time on the live state's.
fn instant(core: &Core, at: Time) -> Instant {
    Instant::now() + at.since(core.now())
}
