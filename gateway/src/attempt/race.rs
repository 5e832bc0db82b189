//! One attempt, and now and then a second beside it: a hedge, or because the first is slow. The first to answer wins.

use std::future::Future;
use std::pin::{Pin, pin};
use std::task::Poll;

use isochrone_core::course::{self, Course, Next, Why};
use isochrone_core::fleet::Sent;
use isochrone_core::retry::Outcome;
use isochrone_core::stall::{Due, Watch};
use smallvec::SmallVec;
use tokio::time::Sleep;
use tracing::Instrument;

use super::answer::{Failure, send};
use super::{Answer, Attempted, Begun, begin, hold_to_newest, instant, tell};
use crate::app::Core;
use crate::body::{Received, RequestBody};
use crate::event::Record;

/// What every attempt of a request has in common.
#[derive(Clone, Copy)]
pub(super) struct Sending<'a> {
    pub(super) core: &'a Core,
    pub(super) request: &'a Attempted<'a>,
    pub(super) body: &'a Received,
    pub(super) state: course::Body,
}

/// How it ended: the last attempt's result, and what it leads to.
pub(super) struct Ended {
    pub(super) next: Next,
    pub(super) result: Result<Answer, Failure>,
}

type Answering<'p> = dyn Future<Output = Result<Answer, Failure>> + Send + 'p;

/// The first attempt's future stays where it is; the second, which is rare, is put on the heap.
enum Slot<'p> {
    Here(Pin<&'p mut Answering<'p>>),
    Boxed(Pin<Box<Answering<'p>>>),
}

struct Rival<'p> {
    begun: Begun<'p>,
    sent: Slot<'p>,
    /// The watch, unless nothing would come of it: no other may be sent to, or there is nobody to ask.
    watch: Option<Watch>,
    /// A question about its health is out.
    asking: Option<Pin<Box<dyn Future<Output = bool> + Send + 'p>>>,
}

#[expect(clippy::large_enum_variant, reason = "moved once or twice a request, which costs less than an allocation")]
enum Event {
    /// An attempt has ended.
    Ended(usize, Result<Answer, Failure>),
    /// An endpoint has said that it lives, or has not.
    Asked(usize, bool),
    /// Something is due, or the deadline has passed.
    Time,
}

/// Sends the first attempt, begins a second where that is due, and judges each as it ends.
pub(super) async fn race<'a>(
    sending: Sending<'a>,
    course: &mut Course,
    first: Begun<'a>,
    outgoing: RequestBody,
    held: &mut Option<Answer>,
    record: &mut Record,
) -> Ended {
    let Sending { core, request, .. } = sending;
    let place = (first.endpoint, first.attempt.choice.region, first.number);
    let sent = pin!(send(sending, place, outgoing, first.span.clone()).instrument(first.span.clone()));
    let mut rivals: SmallVec<[Rival<'_>; 2]> = SmallVec::new();
    rivals.push(Rival { watch: watch(sending, &first), begun: first, sent: Slot::Here(sent), asking: None });
    loop {
        let now = core.now();
        let due = rivals.iter().filter(|rival| rival.asking.is_none());
        let due = due.filter_map(|rival| rival.watch.as_ref().map(|watch| watch.next())).min();
        let until = due.map_or(request.deadline, |due| instant(core, due).min(request.deadline));
        let mut timer = pin!(tokio::time::sleep_until(until));
        match next_event(&mut rivals, timer.as_mut()).await {
            Event::Ended(at, result) => {
                let rival = rivals.remove(at);
                let took = core.now().since(rival.begun.attempt.began);
                let outcome = request.outcome(&result, sending.body.is_whole(), took);
                let (next, result) = judge(sending, course, rival, outcome, result, record);
                match next {
                    Next::Wait => *held = result.ok().or(held.take()),
                    _ => {
                        outrun(sending, course, rivals, &result, record);
                        return Ended { next, result };
                    }
                }
            }
            Event::Asked(at, alive) => {
                let query = request.query();
                let elsewhere = || {
                    let (fleet, rules) = (&request.snapshot.fleet, &request.snapshot.config.attempts.rules);
                    course.has_elsewhere(fleet, &query, &hold_to_newest(core, request), rules, core.now())
                };
                // A client with nowhere else to go loses nothing by waiting.
                if !alive && (rivals.len() > 1 || elsewhere()) {
                    let rival = rivals.remove(at);
                    let (next, result) = judge(sending, course, rival, Outcome::Hung, Err(Failure::Hung), record);
                    if next != Next::Wait {
                        return Ended { next, result };
                    }
                } else if let Some(watch) = &mut rivals[at].watch {
                    watch.lives(core.now());
                }
            }
            Event::Time if tokio::time::Instant::now() >= request.deadline => {
                let late = || Err(Failure::Deadline);
                let mut last = None;
                for rival in rivals.drain(..) {
                    let took = core.now().since(rival.begun.attempt.began);
                    let outcome = request.outcome(&late(), sending.body.is_whole(), took);
                    last = Some(judge(sending, course, rival, outcome, late(), record));
                }
                let (_, result) = last.unwrap_or((Next::Stop, late()));
                return Ended { next: Next::Stop, result };
            }
            Event::Time => {
                let dues = rivals.iter_mut().enumerate();
                let due: SmallVec<[(usize, Due); 2]> = dues
                    .filter(|(_, rival)| rival.asking.is_none())
                    .filter_map(|(at, rival)| Some((at, rival.watch.as_mut()?.due(now.max(core.now()))?)))
                    .collect();
                for (at, due) in due {
                    let why = match (due, &request.route.hedge) {
                        (Due::Ask, _) => {
                            ask(core, &mut rivals[at]);
                            continue;
                        }
                        (Due::Slow, _) => Why::Slow,
                        (Due::Hedge, Some(hedge)) => Why::Hedge(hedge),
                        (Due::Hedge, None) => continue,
                    };
                    if rivals.len() == 1
                        && let Ok(second) = begin(core, request, course, why, record)
                    {
                        rivals.push(beside(sending, second));
                    }
                }
            }
        }
    }
}

/// A second attempt. Only bodies that are whole get here, and those can be sent any number of times.
fn beside<'a>(sending: Sending<'a>, begun: Begun<'a>) -> Rival<'a> {
    let place = (begun.endpoint, begun.attempt.choice.region, begun.number);
    let sent = send(sending, place, sending.body.again(), begun.span.clone()).instrument(begun.span.clone());
    Rival { watch: watch(sending, &begun), begun, sent: Slot::Boxed(Box::pin(sent)), asking: None }
}

/// The watch over an attempt, if anything could come of it.
fn watch(sending: Sending<'_>, begun: &Begun<'_>) -> Option<Watch> {
    let Sending { request, state, .. } = sending;
    let watchable = state.replayable && begun.endpoint.config.http.is_some();
    watchable.then(|| {
        let fleet = &request.snapshot.fleet;
        let model = fleet.model_at(request.model, begun.attempt.choice.endpoint).map(|model| &**model);
        // Of the first attempt only: a hedge of a hedge would be a third at once.
        let hedge = request.route.hedge.as_ref().filter(|_| begun.number == 0).map(|hedge| hedge.delay(model));
        let (rules, round_trip) = (&request.snapshot.config.stall, begun.endpoint.live.network_ms());
        Watch::new(begun.attempt.began, rules, round_trip, model, hedge)
    })
}

fn ask<'p>(core: &'p Core, rival: &mut Rival<'p>) {
    let (endpoint, sent, since) = (rival.begun.endpoint, rival.begun.attempt.began, core.now());
    let wait = rival.watch.as_ref().map_or_else(Default::default, |watch| watch.answer);
    rival.asking = Some(Box::pin(endpoint.is_alive(core, sent, since, wait)));
}

/// Waits for whatever comes first. An answer goes before a question about its endpoint, and both before the time.
async fn next_event(rivals: &mut SmallVec<[Rival<'_>; 2]>, mut timer: Pin<&mut Sleep>) -> Event {
    std::future::poll_fn(|context| {
        for (at, rival) in rivals.iter_mut().enumerate() {
            let polled = match &mut rival.sent {
                Slot::Here(sent) => sent.as_mut().poll(context),
                Slot::Boxed(sent) => sent.as_mut().poll(context),
            };
            if let Poll::Ready(result) = polled {
                return Poll::Ready(Event::Ended(at, result));
            }
        }
        for (at, rival) in rivals.iter_mut().enumerate() {
            if let Some(Poll::Ready(alive)) = rival.asking.as_mut().map(|asking| asking.as_mut().poll(context)) {
                rival.asking = None;
                return Poll::Ready(Event::Asked(at, alive));
            }
        }
        timer.as_mut().poll(context).map(|()| Event::Time)
    })
    .await
}

/// Judges an attempt that has ended.
fn judge(
    sending: Sending<'_>,
    course: &mut Course,
    rival: Rival<'_>,
    outcome: Outcome,
    mut result: Result<Answer, Failure>,
    record: &mut Record,
) -> (Next, Result<Answer, Failure>) {
    let Sending { core, request, body, state } = sending;
    let Begun { mut attempt, endpoint, span, number } = rival.begun;
    let (fleet, rules) = (&request.snapshot.fleet, &request.snapshot.config.attempts.rules);
    let unsent = matches!(&result, Err(Failure::Send(crate::upstream::SendError::Connect { unsent: Some(_), .. })));
    let state = course::Body { at_hand: body.is_at_hand() || unsent, ..state };
    let now = core.now();
    record.attempt_ended(&span, endpoint, number, outcome, now.since(attempt.began), result.as_ref().err());
    let (next, told) = course.ended(fleet, &request.query(), rules, &mut attempt, (outcome, now), state);
    tell(endpoint, outcome, told);
    if let Ok(Answer { upstream: Some(upstream), .. }) = &mut result {
        upstream.in_flight = attempt.in_flight.take();
        let sent = Sent { began: attempt.began, model: request.model, grpc: request.grpc() };
        upstream.place = Some(((attempt.choice.region, attempt.choice.endpoint), sent));
    }
    (next, result)
}

/// The others are cancelled: dropping them closes their connection, or resets their stream.
fn outrun(
    sending: Sending<'_>,
    course: &mut Course,
    rivals: SmallVec<[Rival<'_>; 2]>,
    result: &Result<Answer, Failure>,
    record: &mut Record,
) {
    let Sending { core, request, .. } = sending;
    for rival in rivals {
        let Begun { mut attempt, endpoint, span, number } = rival.begun;
        let now = core.now();
        let (outcome, told) = course.outrun(&request.snapshot.fleet, &request.query(), &mut attempt, now);
        record.attempt_ended(&span, endpoint, number, outcome, now.since(attempt.began), None);
        if result.is_ok() {
            tell(endpoint, outcome, told);
        }
    }
}
