//! The worker's HTTP side: routes, and what is done around each request, those over gRPC included.

mod control;

mod metrics;

mod oip;

mod openai;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant, SystemTime};

use axum::Router;
use axum::error_handling::HandleErrorLayer;
use axum::extract::{DefaultBodyLimit, Request, State as Shared};
use axum::http::{Extensions, HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, Version};
use axum::middleware::Next;
use axum::response::Response;
use axum::routing::{get, post};
use isochrone_telemetry::{SPANS, timestamp, trace};
use serde::Serialize;
use tower::ServiceBuilder;
use tower::limit::GlobalConcurrencyLimitLayer;
use tower_http::CompressionLevel;
use tower_http::compression::CompressionLayer;
use tower_http::decompression::RequestDecompressionLayer;
use tower_http::timeout::RequestBodyTimeoutLayer;
use tracing::{Instrument, Span, field, info_span};

use crate::app::State;
use crate::error::{Dialect, Error};
use crate::infer::milliseconds;
use crate::repository::Loaded;

const REGION: HeaderName = HeaderName::from_static("isochrone-region");
const LOAD_REPORT: HeaderName = HeaderName::from_static("endpoint-load-metrics");
pub(crate) const MODEL_VERSION: &str = "isochrone-model-version";
pub(crate) const MODEL_DIGEST: &str = "isochrone-model-digest";
const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
pub(crate) const X_REQUEST_TIMEOUT: &str = "x-request-timeout-ms";

/// The longest silence of a body that is being read.
const BODY_SILENCE_MAX: Duration = Duration::from_secs(30);

/// The largest body of a call to the repository, in bytes.
const CONTROL_BODY_MAX: usize = 64 << 10;

pub(crate) fn router(state: Arc<State>) -> Router {
    // Each request in flight holds its body: so many, and no more. Probes are never refused for want of a place.
    let bound = ServiceBuilder::new()
        .layer(HandleErrorLayer::new(overloaded))
        .load_shed()
        .layer(GlobalConcurrencyLimitLayer::with_semaphore(Arc::clone(&state.places)));
    // Inflated as it is read, and held to the same bound: a small body that swells is cut off there.
    let inflate = RequestDecompressionLayer::new();
    // A body that stands still gives its place back.
    let moving = RequestBodyTimeoutLayer::new(BODY_SILENCE_MAX);
    let infer = Router::new()
        .route("/v2/models/{model}/infer", post(oip::infer))
        .route("/v2/models/{model}/versions/{version}/infer", post(oip::infer_of_version))
        // Only here: OpenAI's SDKs offer gzip unasked, and floats in base64 are not worth its time.
        // And only answers: clients inflate no refusal.
        .route_layer(CompressionLayer::new().quality(CompressionLevel::Fastest).compress_when(is_answer));
    let computing = infer
        .route("/v1/embeddings", post(openai::embeddings))
        .route_layer(inflate)
        .route_layer(moving)
        .route_layer(bound);
    // Read before anybody has shown a key.
    let control = Router::new()
        .route("/v2/repository/index", post(control::index))
        .route("/v2/repository/models/{model}/load", post(control::load))
        .route("/v2/repository/models/{model}/unload", post(control::unload))
        .layer(DefaultBodyLimit::max(CONTROL_BODY_MAX));
    Router::new()
        .merge(computing)
        .route("/v2", get(oip::server))
        .route("/v2/", get(oip::server))
        .route("/v2/health/live", get(oip::live))
        .route("/v2/health/ready", get(oip::ready))
        .route("/v2/models/stats", get(oip::all_statistics))
        .route("/v2/models/{model}", get(oip::metadata))
        .route("/v2/models/{model}/ready", get(oip::model_ready))
        .route("/v2/models/{model}/config", get(oip::config))
        .route("/v2/models/{model}/stats", get(oip::statistics))
        .route("/v2/models/{model}/versions/{version}", get(oip::metadata_of_version))
        .route("/v2/models/{model}/versions/{version}/ready", get(oip::model_ready_of_version))
        .route("/v2/models/{model}/versions/{version}/config", get(oip::config_of_version))
        .route("/v2/models/{model}/versions/{version}/stats", get(oip::statistics_of_version))
        .route("/v1/models", get(openai::models))
        .route("/v1/models/{model}", get(openai::model))
        .route("/metrics", get(metrics::metrics))
        .fallback(nothing_here)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(state.max_body))
        .merge(control)
        .layer(axum::middleware::from_fn_with_state(Arc::clone(&state), around))
        .with_state(state)
}

fn is_answer(status: StatusCode, _: Version, _: &HeaderMap, _: &Extensions) -> bool {
    status == StatusCode::OK
}

async fn overloaded(uri: Uri, _: tower::BoxError) -> Error {
    Error::overloaded(Dialect::of(uri.path()))
}

async fn nothing_here(request: Request) -> Error {
    Error::new(StatusCode::NOT_FOUND, Dialect::of(request.uri().path()), "there is nothing at this path")
}

async fn wrong_method(request: Request) -> Error {
    Error::new(StatusCode::METHOD_NOT_ALLOWED, Dialect::of(request.uri().path()), "this path does not take this method")
}

/// The span of the request, for the steps below it.
#[derive(Clone, Debug)]
pub(crate) struct RequestSpan(pub(crate) Span);

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
    grpc_status: Option<&'a str>,
    duration_ms: f64,
    region: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    trace_id: Option<String>,
}

/// How much there is to do, in ORCA's words (`xds.data.orca.v3.OrcaLoadReport`), so that gateways need not guess it from
/// their own share of the traffic.
fn load_report(state: &State) -> String {
    let models = state.repository.models();
    let loaded = || models.values().flat_map(|versions| versions.values());
    let (mut in_flight, mut queued) = (0, 0);
    for (all, waiting) in loaded().map(|loaded| loaded.runner.load()) {
        in_flight += all;
        queued += waiting;
    }
    let instances = loaded().map(|loaded| loaded.found.spec.instances).sum();
    let busy = || loaded().map(|loaded| loaded.runner.statistics().busy()).sum();
    let utilisation = state.utilisation.look(instances, busy);
    format!(
        "TEXT application_utilization={utilisation:.3}, named_metrics.in_flight={in_flight}, \
         named_metrics.queue_depth={queued}"
    )
}

/// What is done around every request: its span, its region, its line.
pub(crate) async fn around(Shared(state): Shared<Arc<State>>, mut request: Request, next: Next) -> Response {
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
    // A gRPC call that failed before its first message says so in its head.
    let grpc_status = response.headers().get("grpc-status").and_then(|status| status.to_str().ok());
    if response.status().is_server_error() || grpc_status.is_some_and(|status| status != "0") {
        span.record("otel.status_code", "ERROR");
    }
    // Probes and scrapes would bury the requests.
    let path = uri.path();
    if path.starts_with("/v2/health/") || path.starts_with("/grpc.health.") || path == "/metrics" {
        return response;
    }
    let text = |value: &HeaderValue| value.to_str().map(str::to_owned).unwrap_or_default();
    let line = Line {
        timestamp: timestamp(SystemTime::now()),
        level: "INFO",
        message: "access",
        request_id: &id.as_ref().map(text).unwrap_or_default(),
        method: method.as_str(),
        path,
        status: response.status().as_u16(),
        grpc_status,
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

/// When the client stops waiting, by its header.
fn deadline(headers: &HeaderMap) -> Option<Instant> {
    let text = headers.get(X_REQUEST_TIMEOUT)?.to_str().ok()?;
    Instant::now().checked_add(Duration::from_millis(text.parse().ok()?))
}

/// What every answer of a model carries: which one it was.
fn identify(response: &mut Response, loaded: &Loaded) {
    response.headers_mut().insert(MODEL_VERSION, loaded.version_header.clone());
    response.headers_mut().insert(MODEL_DIGEST, loaded.digest_header.clone());
}

/// Whether the worker takes requests: it has not begun to leave.
fn is_ready(state: &State) -> bool {
    state.ready.load(Relaxed)
}
