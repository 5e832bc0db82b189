//! One endpoint's answer, as far as it is had before the client gets any of it.
//!
//! A small answer to a request that may be done twice is read whole, so that one that breaks off in the middle can be had
//! elsewhere. Of a stream at least the first piece is waited for.

use std::sync::Arc;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderName, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use isochrone_core::region::RegionIndex;
use isochrone_core::retry::Outcome;
use smallvec::SmallVec;
use tracing::Span;

use super::race::Sending;
use super::{Answer, Upstream, head};
use crate::app::Core;
use crate::body::{Received, RequestBody};
use crate::call::BodyMode;
use crate::endpoint::Endpoint;
use crate::error::Error;
use crate::load_report;
use crate::upstream::{self, Fault, Outgoing, REGION, SendError};

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

/// The body of an answer.
#[derive(Debug)]
pub(crate) enum AnswerBody {
    /// All of it.
    Whole { frames: Frames, trailers: Option<HeaderMap> },
    /// What has been read, and the rest as it comes.
    Stream { frames: Frames, rest: Incoming },
}

/// Pieces of a body that have been read. One, mostly.
pub(crate) type Frames = SmallVec<[Bytes; 1]>;

/// Why an attempt gave no answer.
#[derive(Debug)]
pub(crate) enum Failure {
    Send(SendError),
    /// An answer began and broke off before the client got any of it.
    Broken(hyper::Error),
    /// It wants to speak another protocol, which nobody asked for (RFC 9110, section 15.2.2).
    Switched,
    /// It was silent, and did not say that it lives.
    Hung,
    Deadline,
}

impl Failure {
    pub(super) fn outcome(&self) -> Outcome {
        match self {
            Failure::Send(SendError::Connect { why, .. }) if why.fault == Fault::Here => Outcome::Unconnected,
            Failure::Send(SendError::Connect { .. }) => Outcome::ConnectFailed,
            Failure::Send(SendError::Reset(_)) => Outcome::Reset,
            Failure::Send(SendError::Refused(_)) => Outcome::Refused,
            Failure::Send(SendError::ClientBody) => Outcome::ClientBody,
            Failure::Broken(_) | Failure::Switched => Outcome::Broken,
            Failure::Hung => Outcome::Hung,
            Failure::Deadline => Outcome::ClientTimedOut,
        }
    }

    /// In words, for the trace and the log.
    pub(crate) fn why(&self) -> String {
        match self {
            Failure::Send(error) => error.to_string(),
            Failure::Broken(error) => format!("the answer broke off: {error}"),
            Failure::Switched => "it switches protocols, unasked".to_owned(),
            Failure::Hung => "silent, and no answer to a question about its health".to_owned(),
            Failure::Deadline => "no answer within the deadline".to_owned(),
        }
    }

    /// What the client is told if nothing better comes; a body of which nothing was sent is put back for the next attempt.
    pub(super) fn or_put_back(self, body: &mut Received, before: Error) -> Result<Error, Error> {
        match self {
            Failure::Send(SendError::Connect { unsent, .. }) => {
                body.put_back(unsent);
                Ok(before)
            }
            Failure::Send(SendError::Refused(_)) => Ok(before),
            Failure::Send(SendError::ClientBody) => Err(Error::BrokenBody),
            Failure::Send(SendError::Reset(_)) | Failure::Broken(_) | Failure::Switched | Failure::Hung => {
                Ok(Error::Broken)
            }
            Failure::Deadline => Err(Error::Deadline),
        }
    }
}

impl Answer {
    /// The status by which it is judged. gRPC says in a field of its own what HTTP says in the status
    /// (<https://grpc.github.io/grpc/core/md_doc_statuscodes.html>).
    pub(crate) fn status(&self) -> u16 {
        let trailers = match &self.body {
            AnswerBody::Whole { trailers, .. } => trailers.as_ref(),
            AnswerBody::Stream { .. } => None,
        };
        let status = self.head.headers.get(GRPC_STATUS).or_else(|| trailers?.get(GRPC_STATUS));
        match status.map(|status| status.as_bytes()) {
            // RESOURCE_EXHAUSTED, UNAVAILABLE; UNKNOWN and INTERNAL.
            Some(b"8") => 429,
            Some(b"14") => 503,
            Some(b"2" | b"13") => 500,
            _ => self.head.status.as_u16(),
        }
    }
}

/// Sends the request to one endpoint and takes in its answer.
pub(super) async fn send(
    sending: Sending<'_>,
    (endpoint, region, number): (&Arc<Endpoint>, RegionIndex, usize),
    body: RequestBody,
    span: Span,
) -> Result<Answer, Failure> {
    let Sending { core, request, state, .. } = sending;
    let (head, grpc) = (request.head, request.grpc());
    // The pick gives only endpoints that speak the protocol.
    let (target, pools) = endpoint.target(grpc).ok_or(Failure::Deadline)?;
    let headers = head::for_endpoint(head, &request.forwarded, request.deadline, grpc, &span);
    let outgoing = Outgoing { method: &head.method, uri: &head.uri, headers, grpc };
    let (attempts, pool) = (&request.snapshot.config.attempts, &pools[core.index]);
    let sent = upstream::send(endpoint, (target, pool), outgoing, body, attempts.connect_timeout, core.now());
    let (response, lease) = sent.await.map_err(Failure::Send)?;
    heed(core, endpoint, response.headers());
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        return Err(Failure::Switched);
    }
    let streams = !state.replayable || request.call.body == BodyMode::Stream;
    let (head, body) = received(response, state.replayable, streams, attempts.answer_bytes).await?;
    let upstream = match &body {
        AnswerBody::Whole { .. } => {
            lease.give_back(pool, core.now());
            None
        }
        // The load is the attempt's until that has been judged.
        AnswerBody::Stream { .. } => {
            Some(Upstream { endpoint: Arc::clone(endpoint), lease, in_flight: None, place: None })
        }
    };
    Ok(Answer { head, body, upstream, region, number })
}

/// What an endpoint says of itself with every answer: where it stands, and how much it has to do.
fn heed(core: &Core, endpoint: &Endpoint, headers: &HeaderMap) {
    if headers.get(REGION).is_some_and(|named| named.as_bytes() != endpoint.config.region.as_bytes()) {
        endpoint.live.doubt();
    }
    if let Some(report) = load_report::parse(headers) {
        endpoint.live.reported(report, core.now());
    }
}

/// Reads an answer's body as far as that is done before the client gets any of it.
async fn received(
    response: Response<Incoming>,
    replayable: bool,
    streams: bool,
    most: usize,
) -> Result<(http::response::Parts, AnswerBody), Failure> {
    let (head, mut body) = response.into_parts();
    let (mut frames, mut trailers, mut size) = (Frames::new(), None, 0);
    if body.is_end_stream() {
        return Ok((head, AnswerBody::Whole { frames, trailers }));
    }
    if !replayable {
        return Ok((head, AnswerBody::Stream { frames, rest: body }));
    }
    let events = head.headers.get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"));
    // What will not fit is not collected; its beginning is waited for.
    let most = if streams || events || body.size_hint().lower() > most as u64 { 0 } else { most };
    while let Some(frame) = body.frame().await {
        match frame.map_err(Failure::Broken)?.into_data() {
            Ok(data) => {
                size += data.len();
                frames.push(data);
                if body.is_end_stream() {
                    break;
                }
                if size > most {
                    return Ok((head, AnswerBody::Stream { frames, rest: body }));
                }
            }
            Err(frame) => trailers = frame.into_trailers().ok(),
        }
    }
    Ok((head, AnswerBody::Whole { frames, trailers }))
}
