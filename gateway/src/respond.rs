//! Answers: an endpoint's passed on, or the gateway's own. No status is chosen elsewhere.

use std::sync::Arc;

use bytes::Bytes;
use http::header::{ALLOW, CONNECTION, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};
use serde_json::json;
use smallvec::SmallVec;

use crate::app::Core;
use crate::attempt::Answer;
use crate::body::ResponseBody;
use crate::call::Dialect;
use crate::endpoint::InFlight;
use crate::error::Error;
use crate::event::Record;
use crate::snapshot::Snapshot;
use crate::text;
use crate::upstream::Lease;

const REGION: HeaderName = HeaderName::from_static("isochrone-region");
const ATTEMPTS: HeaderName = HeaderName::from_static("isochrone-attempts");
const REASON: HeaderName = HeaderName::from_static("isochrone-reason");
const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");
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
            | "isochrone-attempts"
            | "isochrone-reason"
    )
}

/// What is done when an answer's body has ended.
#[derive(Debug)]
pub(crate) struct Finish {
    core: Arc<Core>,
    record: Record,
    upstream: Option<(InFlight, Lease, bool)>,
}

impl Finish {
    fn new(core: &Arc<Core>, record: Record, upstream: Option<(InFlight, Lease, bool)>) -> Box<Finish> {
        Box::new(Finish { core: Arc::clone(core), record, upstream })
    }

    /// Bytes went out.
    pub(crate) fn sent(&mut self, bytes: usize) {
        self.record.sent(bytes);
    }

    /// The whole body went out: the connection can carry the next request.
    pub(crate) fn complete(&mut self) {
        if let Some((in_flight, lease, grpc)) = self.upstream.take()
            && let Some((_, pools)) = in_flight.endpoint().target(grpc)
        {
            lease.give_back(&pools[self.core.index], self.core.now());
        }
        self.record.end(true);
    }

    /// The endpoint broke off in the middle. The client sees that the answer is not whole: its own connection or stream
    /// is broken off too.
    pub(crate) fn broken(&mut self) {
        self.upstream = None;
        self.record.end(false);
    }
}

/// Passes an endpoint's answer on.
pub(crate) fn forward(
    core: &Arc<Core>,
    snapshot: &Snapshot,
    answer: Answer,
    grpc: bool,
    mut record: Record,
) -> Response<ResponseBody> {
    let (mut head, body) = answer.response.into_parts();
    record.answered(head.status, None);
    // Most answers have none of them, and looking at the few names there are is cheaper than asking for each.
    let mut withheld: SmallVec<[HeaderName; 4]> =
        head.headers.keys().filter(|name| is_withheld(name)).cloned().collect();
    if withheld.contains(&CONNECTION) {
        withheld.extend(nominated(&head.headers));
    }
    withheld.iter().for_each(|name| drop(head.headers.remove(name)));
    head.headers.insert(REGION, snapshot.regions[answer.region.get()].header.clone());
    decorate(&mut head.headers, &record);
    let finish = Finish::new(core, record, Some((answer.in_flight, answer.lease, grpc)));
    Response::from_parts(head, ResponseBody::endpoint(body, finish, snapshot.config.limits.answer_silence))
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
    let mut response = Response::new(ResponseBody::own(body, Finish::new(core, record, None)));
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

/// What every answer carries.
fn decorate(headers: &mut HeaderMap, record: &Record) {
    headers.insert(X_REQUEST_ID, record.request_id.clone());
    // There is no cache yet, and RFC 9211 has a word for an answer that did not look into one.
    headers.insert(CACHE_STATUS, HeaderValue::from_static("isochrone; fwd=bypass"));
    let answered = record.answered.unwrap_or(record.started);
    let mut timing = String::with_capacity(32);
    timing.push_str("total;dur=");
    let microseconds = u64::try_from((answered - record.started).as_micros()).unwrap_or(u64::MAX);
    text::push_milliseconds(&mut timing, microseconds);
    insert(headers, SERVER_TIMING, timing);
    if record.attempts > 0 {
        headers.insert(
            ATTEMPTS,
            match record.attempts {
                1 => HeaderValue::from_static("1"),
                attempts => HeaderValue::from(u16::from(attempts)),
            },
        );
        insert(headers, REASON, record.decision.reason.clone());
    }
}

fn insert(headers: &mut HeaderMap, name: HeaderName, value: String) {
    if let Some(value) = text::header(value) {
        headers.insert(name, value);
    }
}
