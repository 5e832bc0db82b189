//! What happened to one request: gathered as it goes, told once at its end, as a log line, as counts and as spans.
//!
//! The steps do not count or log by themselves; they tell the [`Record`], and everything an operator sees derives from it.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant, SystemTime};

use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri};
use isochrone_core::course::{NotBegun, Why};
use isochrone_core::geo::Location;
use isochrone_core::pick::{Choice, Nobody, Passed, Query};
use isochrone_core::retry::Outcome;
use isochrone_core::steer::Score;
use isochrone_telemetry::{SPANS, timestamp, trace};
use serde::Serialize;
use smallvec::SmallVec;
use tracing::{Span, field, info_span};

use crate::app::{Core, Permit};
use crate::attempt::Failure;
use crate::cache::Status;
use crate::endpoint::Endpoint;
use crate::error::Error;
use crate::identity::Peer;
use crate::snapshot::Snapshot;
use crate::text;

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The longest request id that is taken over from a client.
const REQUEST_ID_MAX: usize = 128;

/// One request as it has gone so far.
#[derive(Debug)]
pub(crate) struct Record {
    pub(crate) request_id: HeaderValue,
    /// The server span; none if the request is not sampled.
    pub(crate) span: Span,
    /// The attempts so far.
    pub(crate) attempts: SmallVec<[Tried; 1]>,
    /// Which of them the client gets, or the last.
    decided: usize,
    undecided: Decision,
    pub(crate) started: Instant,
    /// When the head of the answer came.
    pub(crate) answered: Option<Instant>,
    method: Method,
    uri: Uri,
    client_ip: Option<IpAddr>,
    location: Location,
    tenant: Option<Arc<str>>,
    model: Option<Arc<str>>,
    status: StatusCode,
    error: Option<&'static str>,
    /// What the cache did.
    pub(crate) cache: Status,
    bytes: u64,
    snapshot: Arc<Snapshot>,
    core: Arc<Core>,
    /// The request's place among those in flight, held to the end of the answer.
    permit: Option<Permit>,
    ended: bool,
}

/// Where a request went, and why, in the words of `explain`.
#[derive(Debug)]
pub(crate) struct Decision {
    pub(crate) region: Arc<str>,
    pub(crate) reason: String,
}

/// One attempt.
#[derive(Debug)]
pub(crate) struct Tried {
    pub(crate) decision: Decision,
    outcome: Option<&'static str>,
}

/// A client that has left before there was an answer. The number is nginx's; no client ever sees it.
const CLIENT_LEFT: u16 = 499;

/// The access line.
#[derive(Serialize)]
struct Line<'a> {
    timestamp: String,
    level: &'static str,
    message: &'static str,
    request_id: &'a str,
    method: &'a str,
    path: &'a str,
    status: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a str>,
    client: Option<String>,
    country: Option<&'a str>,
    location_source: &'static str,
    tenant: Option<&'a str>,
    model: Option<&'a str>,
    region: Option<&'a str>,
    attempts: usize,
    outcomes: Vec<(&'a str, &'a str)>,
    reason: &'a str,
    cache: &'static str,
    duration_ms: f64,
    answer_ms: Option<f64>,
    bytes: u64,
    complete: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    trace_id: Option<String>,
    revision: &'a str,
}

impl Record {
    /// Begins the record of a request, and its trace if it is to be sampled.
    pub(crate) fn begin(core: &Arc<Core>, snapshot: &Arc<Snapshot>, peer: &Peer, head: &Parts) -> Record {
        let started = Instant::now();
        Record {
            request_id: request_id(&head.headers),
            span: server_span(snapshot, peer, head),
            attempts: SmallVec::new(),
            decided: 0,
            undecided: Decision { region: Arc::clone(&core.shared.nowhere), reason: String::new() },
            started,
            answered: None,
            method: head.method.clone(),
            uri: head.uri.clone(),
            client_ip: None,
            location: Location::UNKNOWN,
            tenant: None,
            model: None,
            status: StatusCode::from_u16(CLIENT_LEFT).unwrap_or(StatusCode::BAD_REQUEST),
            error: None,
            cache: Status::Bypass(""),
            bytes: 0,
            snapshot: Arc::clone(snapshot),
            core: Arc::clone(core),
            permit: None,
            ended: false,
        }
    }

    pub(crate) fn admitted(&mut self, permit: Permit) {
        self.permit = Some(permit);
    }

    pub(crate) fn identified(&mut self, client_ip: IpAddr, tenant: &Arc<str>) {
        self.client_ip = Some(client_ip);
        self.tenant = Some(Arc::clone(tenant));
        self.span.record("isochrone.tenant", &**tenant);
    }

    pub(crate) fn addressed(&mut self, client_ip: IpAddr) {
        self.client_ip = Some(client_ip);
    }

    pub(crate) fn located(&mut self, location: Location) {
        self.location = location;
        if !self.span.is_none() {
            let country = location.country;
            let country = country.as_ref().map_or("unknown", |country| country.as_str());
            let span = info_span!(target: SPANS, parent: &self.span, "location", "geo.country.iso_code" = country,
                "isochrone.location.source" = location.source.as_str());
            drop(span);
            self.span.record("geo.country.iso_code", country);
        }
    }

    pub(crate) fn permitted(&mut self, model: Option<&Arc<str>>, regions: usize) {
        self.model = model.cloned();
        if !self.span.is_none() {
            let model = model.map_or("", |model| &**model);
            drop(info_span!(target: SPANS, parent: &self.span, "permission", "isochrone.permitted_regions" = regions));
            self.span.record("gen_ai.request.model", model);
        }
    }

    /// An attempt begins. Gives its span, as a child of which the endpoint's own will appear.
    pub(crate) fn attempt_begins(
        &mut self,
        snapshot: &Snapshot,
        query: &Query<'_>,
        choice: &Choice,
        why: Why<'_>,
        endpoint: &Endpoint,
    ) -> Span {
        let before = self.attempts.last();
        let mut reason = reason_begins(snapshot, query, choice);
        match (why, before) {
            (Why::Slow, Some(before)) => push(&mut reason, &["; beside slow ", &before.decision.region]),
            (Why::Hedge(_), Some(before)) => push(&mut reason, &["; hedge of ", &before.decision.region]),
            (Why::Needed, Some(Tried { decision, outcome: Some(outcome) })) => {
                push(&mut reason, &["; after ", &decision.region, " ", outcome]);
            }
            _ => {}
        }
        reason_ends(&mut reason, snapshot, choice);
        let region = Arc::clone(&snapshot.regions[choice.region.get()].name);
        self.core.shared.counts.begun(&region, why);
        self.decided = self.attempts.len();
        self.attempts.push(Tried { decision: Decision { region, reason }, outcome: None });
        if self.span.is_none() {
            return Span::none();
        }
        let Decision { region, reason } = self.decision();
        drop(info_span!(target: SPANS, parent: &self.span, "pick", "isochrone.region" = &**region,
            "isochrone.reason" = reason.as_str()));
        let kind = match why {
            Why::Needed => "needed",
            Why::Slow => "slow",
            Why::Hedge(_) => "hedge",
        };
        info_span!(target: SPANS, parent: &self.span, "attempt", "otel.kind" = "client",
            "isochrone.attempt" = self.attempts.len(), "isochrone.region" = &**region,
            "isochrone.endpoint" = endpoint.name(), "server.address" = endpoint.name(), "isochrone.attempt.why" = kind,
            "isochrone.outcome" = field::Empty, "http.response.status_code" = field::Empty,
            "otel.status_code" = field::Empty, "otel.status_description" = field::Empty)
    }

    /// The attempt of this number, from 0, has ended.
    pub(crate) fn attempt_ended(
        &mut self,
        span: &Span,
        endpoint: &Endpoint,
        number: usize,
        outcome: Outcome,
        took: Duration,
        failure: Option<&Failure>,
    ) {
        if let Some(tried) = self.attempts.get_mut(number) {
            tried.outcome = Some(outcome.as_str());
        }
        self.core.shared.counts.attempt(&endpoint.config.region, outcome, number > 0, took);
        span.record("isochrone.outcome", outcome.as_str());
        if let Outcome::Status(status) = outcome {
            span.record("http.response.status_code", status);
        }
        if let Some(failure) = failure {
            let why = failure.why();
            span.record("otel.status_code", "ERROR");
            span.record("otel.status_description", why.as_str());
            tracing::info!(region = %endpoint.config.region, endpoint = endpoint.name(), outcome = outcome.as_str(), why,
                request_id = self.request_id.to_str().unwrap_or_default(), attempt = number + 1, "attempt failed");
        }
    }

    /// The answer is one that was kept, of this region.
    pub(crate) fn kept(&mut self, region: &Arc<str>, cache: Status) {
        self.cache = cache;
        self.decided = usize::MAX;
        self.undecided.region = Arc::clone(region);
        self.undecided.reason.clear();
        push(&mut self.undecided.reason, &["kept answer of ", region]);
    }

    /// No attempt began. If one would have been possible but for the budget, that is part of the reason.
    pub(crate) fn not_begun(&mut self, why: NotBegun) {
        let words = match why {
            NotBegun::BudgetSpent => "; retry budget spent",
            NotBegun::Nobody(Nobody::Full) => "; every permitted region that is up has all that it can take",
            NotBegun::Nobody(Nobody::Left) if self.attempts.is_empty() => {
                "no permitted region is able: down, drained, not yet proven to be in its region, or without this protocol"
            }
            NotBegun::Nobody(Nobody::Left) | NotBegun::NotWorthIt | NotBegun::Enough => return,
        };
        match self.attempts.get_mut(self.decided) {
            Some(tried) => tried.decision.reason.push_str(words),
            None => self.undecided.reason.push_str(words.trim_start_matches("; ")),
        }
    }

    /// The answer that the client gets is that of the attempt of this number.
    pub(crate) fn decided(&mut self, number: usize) {
        self.decided = number;
    }

    /// The snapshot that the request sees.
    pub(crate) fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// Where the answer is from, or the last attempt went, and why.
    pub(crate) fn decision(&self) -> &Decision {
        self.attempts.get(self.decided).map_or(&self.undecided, |tried| &tried.decision)
    }

    /// The request broke two endpoints.
    pub(crate) fn poisonous(&mut self) {
        let (request_id, tenant) = (self.request_id.to_str().unwrap_or_default(), self.tenant.as_deref());
        self.core.shared.counts.poisonous.fetch_add(1, Relaxed);
        tracing::error!(
            request_id,
            tenant,
            path = self.uri.path(),
            "query of death: two endpoints broke off while they \
            had it; it is not sent to a third, and refused for a while"
        );
    }

    /// The head of the answer is known.
    pub(crate) fn answered(&mut self, status: StatusCode, error: Option<Error>) {
        self.answered = Some(Instant::now());
        self.status = status;
        self.error = error.map(Error::code);
        if self.span.is_none() {
            return;
        }
        self.span.record("http.response.status_code", status.as_u16());
        self.span.record("isochrone.request_id", self.request_id.to_str().unwrap_or_default());
        self.span.record("isochrone.attempts", self.attempts.len());
        self.span.record("isochrone.reason", self.decision().reason.as_str());
        self.span.record("isochrone.region", &*self.decision().region);
        if let Some(error) = self.error {
            self.span.record("error.type", error);
        }
        if status.is_server_error() {
            self.span.record("otel.status_code", "ERROR");
        }
    }

    /// Bytes of the answer's body that went out.
    pub(crate) fn sent(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
    }

    /// The end: `complete` unless the answer's body broke off or the client left.
    pub(crate) fn end(&mut self, complete: bool) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        self.permit = None;
        let core = &self.core;
        let duration = self.started.elapsed();
        core.shared.counts.request(self.status, duration);
        if !complete {
            self.span.record("error.type", "incomplete");
        }
        let telemetry = &self.snapshot.config.telemetry;
        if !telemetry.access_log {
            return;
        }
        let country = self.location.country;
        let line = Line {
            timestamp: timestamp(SystemTime::now()),
            level: "INFO",
            message: "access",
            request_id: self.request_id.to_str().unwrap_or_default(),
            method: self.method.as_str(),
            path: self.uri.path(),
            status: self.status.as_u16(),
            error: self.error,
            client: self.client_ip.map(|ip| shown(ip, telemetry.full_addresses)),
            country: country.as_ref().map(|country| country.as_str()),
            location_source: self.location.source.as_str(),
            tenant: self.tenant.as_deref(),
            model: self.model.as_deref(),
            region: Some(&*self.decision().region).filter(|region| !region.is_empty()),
            attempts: self.attempts.len(),
            outcomes: self
                .attempts
                .iter()
                .map(|tried| (&*tried.decision.region, tried.outcome.unwrap_or("ended")))
                .collect(),
            reason: &self.decision().reason,
            cache: self.cache.as_str(),
            duration_ms: milliseconds(duration),
            answer_ms: self.answered.map(|at| milliseconds(at - self.started)),
            bytes: self.bytes,
            complete,
            trace_id: if self.span.is_none() { None } else { trace::trace_id(&self.span) },
            revision: &self.snapshot.config.revision,
        };
        // JSON escapes control characters, so that a client cannot write lines of its own.
        if let Ok(line) = serde_json::to_vec(&line) {
            core.shared.log.line(core.index, &line);
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        // The client left: before the answer, or in the middle of it.
        self.end(false);
    }
}

/// Why the first attempt of such a request goes where it goes: what `explain` says.
pub(crate) fn reason(snapshot: &Snapshot, query: &Query<'_>, choice: &Choice) -> String {
    let mut reason = reason_begins(snapshot, query, choice);
    reason_ends(&mut reason, snapshot, choice);
    reason
}

fn reason_begins(snapshot: &Snapshot, query: &Query<'_>, choice: &Choice) -> String {
    let point = query.client.location.point;
    let country = query.client.location.country;
    let country = country.as_ref().map_or("??", |country| country.as_str());
    // Roomy enough for the usual one, so that it is allocated once.
    let mut reason = String::with_capacity(160);
    let region = &*snapshot.regions[choice.region.get()].name;
    push(&mut reason, &[query.steering.policy_for(point).as_str(), " ", region, " "]);
    score(&mut reason, &choice.score, query.steering.by_distance(point));
    push(&mut reason, &["; client ", country, " by ", query.client.location.source.as_str()]);
    reason
}

fn reason_ends(reason: &mut String, snapshot: &Snapshot, choice: &Choice) {
    // What was tried is named already, with what came of it.
    if let Some((region, why)) = choice.instead_of.filter(|(_, why)| *why != Passed::Tried) {
        push(reason, &["; ", &*snapshot.regions[region.get()].name, " ", why.as_str()]);
    }
    if choice.panic {
        reason.push_str("; panic");
    }
}

/// The score of a region and its parts, without those that a policy does not use.
fn score(reason: &mut String, score: &Score, by_distance: bool) {
    text::push_tenths(reason, score.total_ms());
    let parts: [(&str, f32); 2] = if by_distance {
        [("ms (distance ", score.distance_ms), (" + excess ", score.excess_ms)]
    } else {
        [("ms (probe ", score.probe_ms), ("", 0.0)]
    };
    for (name, ms) in parts.into_iter().filter(|(name, _)| !name.is_empty()) {
        reason.push_str(name);
        text::push_tenths(reason, ms);
    }
    for (name, ms) in [(" + wait ", score.wait_ms), (" + service ", score.service_ms)] {
        if ms >= 0.05 {
            reason.push_str(name);
            text::push_tenths(reason, ms);
        }
    }
    reason.push(')');
}

fn push(text: &mut String, parts: &[&str]) {
    parts.iter().for_each(|part| text.push_str(part));
}

fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// An address as logs show it: cut to /24 or /48 unless the operator wants it whole.
fn shown(address: IpAddr, full: bool) -> String {
    let kept = match address {
        _ if full => return address.to_string(),
        IpAddr::V4(_) => 24,
        IpAddr::V6(_) => 48,
    };
    ipnet::IpNet::new(address, kept).map_or_else(|_| String::new(), |net| net.trunc().to_string())
}

/// The client's own id for the request if it is a sane one, else a new one.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let sane =
        |id: &&HeaderValue| (1..=REQUEST_ID_MAX).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic);
    headers
        .get(X_REQUEST_ID)
        .filter(sane)
        .cloned()
        .unwrap_or_else(|| text::header(text::hex(fastrand::u128(..))).unwrap_or_else(|| HeaderValue::from_static("-")))
}

/// The span of the whole request, or none. A trusted proxy's decision is followed; otherwise the configured share is drawn.
fn server_span(snapshot: &Snapshot, peer: &Peer, head: &Parts) -> Span {
    let telemetry = &snapshot.config.telemetry;
    if telemetry.otlp.is_none() {
        return Span::none();
    }
    let parent = if peer.is_trusted() { trace::parent(&head.headers) } else { None };
    let sampled = match &parent {
        Some(parent) => trace::is_sampled(parent),
        None => telemetry.sampling >= 1.0 || fastrand::f64() < telemetry.sampling,
    };
    if !sampled {
        return Span::none();
    }
    let span = info_span!(target: SPANS, parent: None, "request", "otel.kind" = "server",
        "otel.name" = %format_args!("{} {}", head.method, route(head.uri.path())),
        "http.request.method" = head.method.as_str(), "url.path" = head.uri.path(),
        "isochrone.revision" = &*snapshot.config.revision,
        "isochrone.tenant" = field::Empty, "gen_ai.request.model" = field::Empty,
        "geo.country.iso_code" = field::Empty, "isochrone.region" = field::Empty, "isochrone.reason" = field::Empty,
        "isochrone.attempts" = field::Empty, "isochrone.request_id" = field::Empty,
        "http.response.status_code" = field::Empty, "error.type" = field::Empty, "otel.status_code" = field::Empty);
    if let Some(parent) = parent {
        trace::adopt(&span, parent);
    }
    span
}

/// The path without what differs from request to request, so that operations can be told apart and counted.
fn route(path: &str) -> &str {
    match path.strip_prefix("/v2/models/") {
        Some(rest) if rest.ends_with("/infer") => "/v2/models/{model}/infer",
        Some(_) => "/v2/models/{model}",
        None => path,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_cut_unless_wanted_whole() {
        let rows = [("203.0.113.77", "203.0.113.0/24"), ("2001:db8:1:2::3", "2001:db8:1::/48")];
        for (address, cut) in rows {
            let address: IpAddr = address.parse().expect("valid");
            assert_eq!(shown(address, false), cut);
            assert_eq!(shown(address, true), address.to_string());
        }
    }

    #[test]
    fn only_sane_request_ids_are_taken_over() {
        let id = |value: &[u8]| {
            let value = HeaderValue::from_bytes(value).expect("a header value");
            request_id(&HeaderMap::from_iter([(X_REQUEST_ID, value.clone())])) == value
        };
        assert!(id(b"abc-123"));
        assert!(!id(b""));
        assert!(!id(b"a b"));
        assert!(!id("ä".as_bytes()));
        assert!(!id(&[b'x'; 129]));
        assert_ne!(request_id(&HeaderMap::new()), request_id(&HeaderMap::new()));
    }
}
