//! Answers: an endpoint's passed on, or the gateway's own. No status is chosen elsewhere.

use std::sync::Arc;

use bytes::Bytes;
use http::header::{ALLOW, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER, TRANSFER_ENCODING, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};
use isochrone_core::retry::{Mark, Outcome};
use serde_json::json;
use smallvec::{SmallVec, smallvec};

use crate::app::Core;
use crate::attempt::{self, Answer, AnswerBody, Upstream};
use crate::body::{InBand, ResponseBody};
use crate::call::Dialect;
use crate::error::Error;
use crate::event::Record;
use crate::snapshot::Snapshot;
use crate::text;

const REGION: HeaderName = HeaderName::from_static("isochrone-region");
const ATTEMPTS: HeaderName = HeaderName::from_static("isochrone-attempts");
const REASON: HeaderName = HeaderName::from_static("isochrone-reason");
const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");
const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Whether a field of an endpoint's answer is not for the client: it ends at this hop, is between worker and gateway, or
/// is written anew.
fn is_withheld(name: &HeaderName) -> bool {
    matches!(
        name.as_str(),
        "connection"
            | "keep-alive"
            | "proxy-connection"
            | "transfer-encoding"
            | "upgrade"
            | "server"
            | "endpoint-load-metrics"
            | "age"
            | "isochrone-models"
            | "isochrone-attempts"
            | "isochrone-reason"
    )
}

/// What is done when an answer's body has ended.
#[derive(Debug)]
pub(crate) struct Finish {
    core: Arc<Core>,
    record: Record,
    upstream: Option<(Upstream, bool)>,
}

impl Finish {
    fn new(core: &Arc<Core>, record: Record, upstream: Option<(Upstream, bool)>) -> Box<Finish> {
        Box::new(Finish { core: Arc::clone(core), record, upstream })
    }

    /// Bytes went out.
    pub(crate) fn sent(&mut self, bytes: usize) {
        self.record.sent(bytes);
    }

    /// The whole body went out: the connection can carry the next request.
    pub(crate) fn complete(&mut self) {
        if let Some((upstream, grpc)) = self.upstream.take()
            && let Some((_, pools)) = upstream.endpoint.target(grpc)
        {
            upstream.lease.give_back(&pools[self.core.index], self.core.now());
        }
        self.record.end(true);
    }

    /// The endpoint broke off in the middle.
    pub(crate) fn broken(&mut self) {
        if let Some((upstream, _)) = self.upstream.take()
            && let Some((place, sent)) = upstream.place
        {
            let told = self.record.snapshot().fleet.judge(place, sent, Mark::Failure, self.core.now());
            attempt::tell(&upstream.endpoint, Outcome::Broken, told);
        }
        self.record.end(false);
    }
}

/// Passes an endpoint's answer on.
pub(crate) fn forward(
    core: &Arc<Core>,
    snapshot: &Snapshot,
    answer: Answer,
    dialect: Dialect,
    mut record: Record,
) -> Response<ResponseBody> {
    let Answer { mut head, body, upstream, region, .. } = answer;
    let grpc = dialect == Dialect::Grpc;
    record.answered(head.status, None);
    // Most answers have none of them, and looking at the few names there are is cheaper than asking for each.
    let mut withheld: SmallVec<[HeaderName; 4]> =
        head.headers.keys().filter(|name| is_withheld(name)).cloned().collect();
    if withheld.contains(&CONNECTION) {
        withheld.extend(nominated(&head.headers));
    }
    // Beside chunks a declared length says nothing (RFC 9112, section 6.3), and passed on it would split the answer; of an
    // answer that is at hand the length is known.
    if withheld.contains(&TRANSFER_ENCODING) || matches!(body, AnswerBody::Whole { .. }) {
        withheld.push(CONTENT_LENGTH);
    }
    withheld.iter().for_each(|name| drop(head.headers.remove(name)));
    head.headers.insert(REGION, snapshot.regions[region.get()].header.clone());
    decorate(&mut head.headers, &record);
    let finish = Finish::new(core, record, upstream.map(|upstream| (upstream, grpc)));
    let body = match body {
        AnswerBody::Whole { frames, trailers } => ResponseBody::whole(frames, trailers, finish),
        AnswerBody::Stream { frames, rest } => {
            let in_band = in_band(&head.headers, dialect);
            ResponseBody::stream(frames, rest, in_band, finish, snapshot.config.limits.answer_silence)
        }
    };
    Response::from_parts(head, body)
}

/// How this answer can say that it broke off.
fn in_band(headers: &HeaderMap, dialect: Dialect) -> InBand {
    let events = headers.get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"));
    match dialect {
        Dialect::Grpc => InBand::Grpc,
        // With a declared length one more event would be one too many.
        _ if events && !headers.contains_key(CONTENT_LENGTH) => InBand::Events { openai: dialect == Dialect::OpenAi },
        _ => InBand::None,
    }
}

/// The fields that `Connection` names: they end at this hop (RFC 9110, section 7.6.1).
fn nominated(headers: &HeaderMap) -> Vec<HeaderName> {
    let values = headers.get_all(CONNECTION).iter().flat_map(|value| value.as_bytes().split(|&byte| byte == b','));
    values.filter_map(|name| HeaderName::from_bytes(name.trim_ascii()).ok()).collect()
}

/// Refuses, in the caller's dialect.
pub(crate) fn refuse(core: &Arc<Core>, error: Error, dialect: Dialect, mut record: Record) -> Response<ResponseBody> {
    record.answered(error.status(), Some(error));
    let mut headers = HeaderMap::new();
    if let Some(seconds) = error.retry_after() {
        headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    if let Error::MethodNotAllowed(allowed) = error {
        // RFC 9110, section 15.5.6: a 405 says what would be allowed.
        headers.insert(ALLOW, HeaderValue::from_static(allowed));
    }
    if error.status() == StatusCode::UNAUTHORIZED {
        // RFC 9110, section 11.6.1: a 401 says how to authenticate.
        headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    let (status, body) = match dialect {
        Dialect::Grpc => {
            // Trailers-Only: status and message in the one and only header block.
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            headers.insert("grpc-status", HeaderValue::from(u16::from(error.grpc_code())));
            if let Ok(message) = HeaderValue::try_from(error.to_string()) {
                headers.insert("grpc-message", message);
            }
            (StatusCode::OK, Bytes::new())
        }
        Dialect::OpenAi => {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            let kind = if error.status().is_client_error() { "invalid_request_error" } else { "server_error" };
            let body =
                json!({ "error": { "message": error.to_string(), "type": kind, "param": null, "code": error.code() } });
            (error.status(), Bytes::from(body.to_string()))
        }
        Dialect::Oip => {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            (error.status(), Bytes::from(json!({ "error": error.to_string() }).to_string()))
        }
    };
    decorate(&mut headers, &record);
    own(core, status, headers, body, record)
}

/// Answers with a JSON document of the gateway's own.
pub(crate) fn json(core: &Arc<Core>, document: &serde_json::Value, mut record: Record) -> Response<ResponseBody> {
    record.answered(StatusCode::OK, None);
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    decorate(&mut headers, &record);
    own(core, StatusCode::OK, headers, Bytes::from(document.to_string()), record)
}

fn own(
    core: &Arc<Core>,
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
    mut record: Record,
) -> Response<ResponseBody> {
    record.sent(body.len());
    let mut response = Response::new(ResponseBody::whole(smallvec![body], None, Finish::new(core, record, None)));
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

/// What every answer carries.
fn decorate(headers: &mut HeaderMap, record: &Record) {
    headers.insert(X_REQUEST_ID, record.request_id.clone());
    record.cache.write(headers);
    let answered = record.answered.unwrap_or(record.started);
    let mut timing = String::with_capacity(32);
    timing.push_str("total;dur=");
    let microseconds = u64::try_from((answered - record.started).as_micros()).unwrap_or(u64::MAX);
    text::push_milliseconds(&mut timing, microseconds);
    insert(headers, SERVER_TIMING, timing);
    if !record.attempts.is_empty() {
        headers.insert(
            ATTEMPTS,
            match record.attempts.len() {
                1 => HeaderValue::from_static("1"),
                attempts => HeaderValue::from(attempts),
            },
        );
    }
    if !record.decision().reason.is_empty() {
        insert(headers, REASON, record.decision().reason.clone());
    }
}

fn insert(headers: &mut HeaderMap, name: HeaderName, value: String) {
    if let Some(value) = text::header(value) {
        headers.insert(name, value);
    }
}
