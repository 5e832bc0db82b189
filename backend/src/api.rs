//! The worker's HTTP API: parse, run, render. What both dialects share is here.

mod error;

mod oip;

mod openai;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant, SystemTime};

use axum::Router;
use axum::error_handling::HandleErrorLayer;
use axum::extract::{DefaultBodyLimit, Request, State as Shared};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use isochrone_telemetry::{SPANS, timestamp, trace};
use opentelemetry::KeyValue;
use serde::Serialize;
use tower::ServiceBuilder;
use tracing::{Instrument, Span, field, info_span};

use self::error::{Dialect, Error};
use crate::app::{Loaded, State};
use crate::runner::{Done, Runner, Times, deadline};
use crate::runtime::Input;
use crate::text::{INLINE_BYTES_MAX, Tokenizer};

const REGION: HeaderName = HeaderName::from_static("isochrone-region");
const LOAD_REPORT: HeaderName = HeaderName::from_static("endpoint-load-metrics");
const MODEL_VERSION: HeaderName = HeaderName::from_static("isochrone-model-version");
const MODEL_DIGEST: HeaderName = HeaderName::from_static("isochrone-model-digest");
const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const X_REQUEST_TIMEOUT: HeaderName = HeaderName::from_static("x-request-timeout-ms");

/// The most texts of one request.
const TEXTS_MAX: usize = 2048;

pub(crate) fn router(state: Arc<State>) -> Router {
    // Each request in flight holds its body: so many, and no more. Probes are never refused for want of a place.
    let bound = ServiceBuilder::new()
        .layer(HandleErrorLayer::new(overloaded))
        .load_shed()
        .concurrency_limit(state.in_flight_max);
    let computing = Router::new()
        .route("/v2/models/{model}/infer", post(oip::infer))
        .route("/v2/models/{model}/versions/{version}/infer", post(oip::infer_of_version))
        .route("/v1/embeddings", post(openai::embeddings))
        .route_layer(bound);
    Router::new()
        .merge(computing)
        .route("/v2", get(oip::server))
        .route("/v2/", get(oip::server))
        .route("/v2/health/live", get(oip::live))
        .route("/v2/health/ready", get(oip::ready))
        .route("/v2/models/{model}", get(oip::metadata))
        .route("/v2/models/{model}/ready", get(oip::model_ready))
        .route("/v2/models/{model}/versions/{version}", get(oip::metadata_of_version))
        .route("/v2/models/{model}/versions/{version}/ready", get(oip::model_ready_of_version))
        .route("/v1/models", get(openai::models))
        .route("/metrics", get(metrics))
        .fallback(nothing_here)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(state.max_body))
        .layer(axum::middleware::from_fn_with_state(Arc::clone(&state), around))
        .with_state(state)
}

async fn overloaded(uri: Uri, _: tower::BoxError) -> Error {
    let message = "the worker is at its limit of requests in flight";
    Error::new(StatusCode::SERVICE_UNAVAILABLE, Dialect::of(uri.path()), message)
}

async fn nothing_here(request: Request) -> Error {
    Error::new(StatusCode::NOT_FOUND, Dialect::of(request.uri().path()), "there is nothing at this path")
}

async fn wrong_method(request: Request) -> Error {
    Error::new(StatusCode::METHOD_NOT_ALLOWED, Dialect::of(request.uri().path()), "this path does not take this method")
}

/// The span of the request, for the steps below it.
#[derive(Clone, Debug)]
pub(crate) struct RequestSpan(Span);

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
    duration_ms: f64,
    region: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    trace_id: Option<String>,
}

/// How much there is to do, in ORCA's words (`xds.data.orca.v3.OrcaLoadReport`), so that gateways need not guess it from
/// their own share of the traffic.
fn load_report(state: &State) -> String {
    let runners = || state.models.values().flat_map(BTreeMap::values).map(|loaded| &loaded.runner);
    let in_flight: usize = runners().map(Runner::waiting).sum();
    let queued: usize = runners().map(Runner::queued).sum();
    format!("TEXT named_metrics.in_flight={in_flight}, named_metrics.queue_depth={queued}")
}

/// What is done around every request: its span, its region, its line.
async fn around(Shared(state): Shared<Arc<State>>, mut request: Request, next: Next) -> Response {
    let began = Instant::now();
    let span = server_span(&request);
    let (method, uri) = (request.method().clone(), request.uri().clone());
    let id = request.headers().get(X_REQUEST_ID).cloned();
    request.extensions_mut().insert(RequestSpan(span.clone()));
    let mut response = next.run(request).instrument(span.clone()).await;
    response.headers_mut().insert(REGION, state.region.clone());
    if let Ok(report) = HeaderValue::try_from(load_report(&state)) {
        response.headers_mut().insert(LOAD_REPORT, report);
    }
    if let Some(id) = &id {
        response.headers_mut().insert(X_REQUEST_ID, id.clone());
    }
    span.record("http.response.status_code", response.status().as_u16());
    if response.status().is_server_error() {
        span.record("otel.status_code", "ERROR");
    }
    // Probes and scrapes would bury the requests.
    if uri.path().starts_with("/v2/health/") || uri.path() == "/metrics" {
        return response;
    }
    let text = |value: &HeaderValue| value.to_str().map(str::to_owned).unwrap_or_default();
    let line = Line {
        timestamp: timestamp(SystemTime::now()),
        level: "INFO",
        message: "access",
        request_id: &id.as_ref().map(text).unwrap_or_default(),
        method: method.as_str(),
        path: uri.path(),
        status: response.status().as_u16(),
        duration_ms: milliseconds(began.elapsed()),
        region: state.region.to_str().unwrap_or_default(),
        trace_id: if span.is_none() { None } else { trace::trace_id(&span) },
    };
    if let Ok(line) = serde_json::to_vec(&line) {
        state.log.line(0, &line);
    }
    response
}

/// The worker traces what its caller traces, and nothing of its own accord.
fn server_span(request: &Request) -> Span {
    match trace::parent(request.headers()).filter(trace::is_sampled) {
        None => Span::none(),
        Some(parent) => {
            let span = info_span!(target: SPANS, parent: None, "infer", "otel.kind" = "server",
                "http.request.method" = request.method().as_str(), "url.path" = request.uri().path(),
                "http.response.status_code" = field::Empty, "otel.status_code" = field::Empty);
            trace::adopt(&span, parent);
            span
        }
    }
}

/// Runs one request on a model and tells its steps.
async fn run(loaded: &Loaded, input: Input, headers: &HeaderMap, span: &Span) -> Result<Done, Error> {
    let timeout_ms = headers.get(X_REQUEST_TIMEOUT).and_then(|value| value.to_str().ok()?.parse().ok());
    let result = loaded.runner.run(input, deadline(timeout_ms)).await;
    match result {
        Ok(done) => {
            loaded.succeeded.fetch_add(1, Relaxed);
            tell(loaded, &done, span);
            Ok(done)
        }
        Err(error) => {
            loaded.failed.fetch_add(1, Relaxed);
            if let crate::runner::RunError::Failed(reason) = &error {
                tracing::error!(model = loaded.found.name, reason = %reason, "the model failed");
            }
            Err(Error::from(error))
        }
    }
}

fn tell(loaded: &Loaded, done: &Done, span: &Span) {
    let Times { queued, taken, began, ended } = done.times;
    let microseconds = |from: SystemTime, to: SystemTime| {
        to.duration_since(from).ok().and_then(|length| u64::try_from(length.as_micros()).ok()).unwrap_or(0)
    };
    loaded.queued_us.fetch_add(microseconds(queued, taken), Relaxed);
    loaded.computed_us.fetch_add(microseconds(began, ended), Relaxed);
    if !span.is_none() {
        let model = KeyValue::new("gen_ai.request.model", loaded.found.name.clone());
        let size = KeyValue::new("isochrone.batch.requests", done.batch as i64);
        trace::child(span, "queue", queued, taken, Vec::new());
        trace::child(span, "batch", taken, began, vec![size.clone()]);
        trace::child(span, "execute", began, ended, vec![model, size]);
    }
}

/// Token ids of texts. A large amount is tokenized on another thread, so that others are served meanwhile.
async fn tokens(loaded: &Arc<Loaded>, texts: Vec<String>) -> Result<Vec<Vec<u32>>, String> {
    if texts.is_empty() || texts.len() > TEXTS_MAX {
        return Err(format!("from 1 to {TEXTS_MAX} texts at once"));
    }
    let encode = |tokenizer: &Tokenizer, texts: &[String]| texts.iter().map(|text| tokenizer.encode(text)).collect();
    let no_text = || "this model takes no text".to_owned();
    if texts.iter().map(String::len).sum::<usize>() <= INLINE_BYTES_MAX {
        return encode(loaded.tokenizer.as_ref().ok_or_else(no_text)?, &texts);
    }
    let loaded = Arc::clone(loaded);
    tokio::task::spawn_blocking(move || encode(loaded.tokenizer.as_ref().ok_or_else(no_text)?, &texts))
        .await
        .map_err(|_| "the texts could not be tokenized".to_owned())?
}

/// What every answer of a model carries: which one it was.
fn identify(response: &mut Response, loaded: &Loaded) {
    response.headers_mut().insert(MODEL_VERSION, loaded.version_header.clone());
    response.headers_mut().insert(MODEL_DIGEST, loaded.digest_header.clone());
}

fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

async fn metrics(Shared(state): Shared<Arc<State>>) -> Response {
    let mut text = String::new();
    let mut family = |name: &str, kind: &str, help: &str, value: &dyn Fn(&Loaded) -> f64| {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for loaded in state.models.values().flat_map(|versions| versions.values()) {
            let (model, version) = (&loaded.found.name, &loaded.found.version);
            let _ = writeln!(text, "{name}{{model=\"{model}\",version=\"{version}\"}} {}", value(loaded));
        }
    };
    let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Relaxed) as f64;
    let seconds = |counter: &std::sync::atomic::AtomicU64| counter.load(Relaxed) as f64 / 1e6;
    family("isochrone_backend_requests_total", "counter", "Requests that a model answered or failed.", &|loaded| {
        count(&loaded.succeeded) + count(&loaded.failed)
    });
    family("isochrone_backend_failures_total", "counter", "Requests refused or failed by a model.", &|loaded| {
        count(&loaded.failed)
    });
    family("isochrone_backend_queue_seconds_total", "counter", "Time that requests waited.", &|loaded| {
        seconds(&loaded.queued_us)
    });
    family("isochrone_backend_execute_seconds_total", "counter", "Time that requests were computed.", &|loaded| {
        seconds(&loaded.computed_us)
    });
    family("isochrone_backend_waiting", "gauge", "Requests that wait or are computed.", &|loaded| {
        loaded.runner.waiting() as f64
    });
    text.into_response()
}
