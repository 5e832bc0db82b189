//! The operator's listener: health, metrics, and which configuration is in force. Never on a data port.

use std::future::Future;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use axum::extract::{RawQuery, State};
use axum::http::{HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use isochrone_telemetry::timestamp;
use serde_json::{Value, json};

use crate::app::Shared;
use crate::endpoint::Endpoint;
use crate::{explain, metrics};

/// Requests at once; more wait.
const REQUESTS_MAX: usize = 32;

/// Serves for ever; the future gives the reason for an end.
///
/// # Errors
/// The socket cannot be used.
pub(crate) fn serve(socket: TcpListener, shared: Arc<Shared>) -> Result<impl Future<Output = String>, String> {
    let listener = tokio::net::TcpListener::from_std(socket).map_err(|error| error.to_string())?;
    let router = Router::new()
        .route("/", get(index))
        .route("/livez", get(|| async { "live\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(prometheus))
        .route("/api/config", get(config))
        .route("/api/regions", get(regions))
        .route("/api/explain", get(explained))
        // A scraper gone wild costs the data path nothing.
        .layer(tower::limit::ConcurrencyLimitLayer::new(REQUESTS_MAX))
        .with_state(shared);
    Ok(
        async move { axum::serve(listener, router).await.map_or_else(|error| error.to_string(), |()| "it stopped".into()) },
    )
}

async fn index() -> &'static str {
    "Isochrone\n\n/livez       the process works\n/readyz      it may get traffic\n/metrics     Prometheus\n\
     /api/config  the revision in force and the rejected one\n/api/regions regions and endpoints as they are now\n\
     /api/explain?ip=ADDRESS&tenant=NAME&model=NAME  why such a request goes where it goes\n"
}

/// Ready once every endpoint has been probed, either way: before that a pick would be a guess. A region that is down does
/// not make the gateway unready; leaving does.
async fn ready(State(shared): State<Arc<Shared>>) -> (StatusCode, &'static str) {
    let snapshot = shared.snapshot.load();
    if shared.leaving.load(Relaxed) {
        (StatusCode::SERVICE_UNAVAILABLE, "leaving\n")
    } else if snapshot.endpoints.iter().all(|endpoint| endpoint.live.is_probed()) {
        (StatusCode::OK, "ready\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not every endpoint has been probed yet\n")
    }
}

async fn prometheus(State(shared): State<Arc<Shared>>) -> Response {
    const KIND: (HeaderName, &str) = (header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8");
    ([KIND], metrics::text(&shared)).into_response()
}

async fn explained(State(shared): State<Arc<Shared>>, RawQuery(query): RawQuery) -> Response {
    match explain::answer(&shared.snapshot.load_full(), &query.unwrap_or_default(), shared.now()) {
        Ok(explanation) => Json(explanation).into_response(),
        Err(error) => (StatusCode::BAD_REQUEST, Json(json!({ "error": error }))).into_response(),
    }
}

async fn config(State(shared): State<Arc<Shared>>) -> Json<Value> {
    let state = shared.config_state.lock();
    let rejected = state.rejected.as_ref();
    Json(json!({
        "revision": shared.snapshot.load().config.revision,
        "accepted_at": timestamp(state.accepted_at),
        "rejected": rejected.map(|rejected| json!({ "revision": rejected.revision, "errors": rejected.problems })),
    }))
}

/// Microseconds are enough; the rest is noise of binary fractions.
fn rounded(ms: f32) -> f64 {
    (f64::from(ms) * 1000.0).round() / 1000.0
}

async fn regions(State(shared): State<Arc<Shared>>) -> Json<Value> {
    let snapshot = shared.snapshot.load();
    let now = shared.now();
    let endpoint = |endpoint: &Arc<Endpoint>| {
        json!({
            "address": endpoint.name(),
            "healthy": endpoint.live.is_healthy(),
            "region_asserted": endpoint.live.is_asserted(),
            "ejected": endpoint.live.is_ejected(now),
            "overloaded": endpoint.live.is_paused(now),
            "in_flight": endpoint.live.in_flight(),
            "reported": endpoint.live.report(now, &snapshot.fleet.rules).map(|report| {
                json!({ "in_flight": report.in_flight, "queue_depth": report.queued })
            }),
            "round_trip_ms": endpoint.live.round_trip_ms().map(rounded),
        })
    };
    let limit = |limit: u32| (limit != u32::MAX).then_some(limit);
    let regions = snapshot.regions.iter().zip(&snapshot.config.regions).zip(&snapshot.fleet.regions);
    let regions = regions.map(|((entry, config), fleet)| {
        json!({
            "region": &*entry.name,
            "country": config.region.country.as_str(),
            "latitude": config.region.point.latitude(),
            "longitude": config.region.point.longitude(),
            "zones": config.region.zones,
            "drain": config.region.drain,
            "in_flight": fleet.live.load(),
            "soft_limit": limit(config.region.soft_limit),
            "hard_limit": limit(config.region.hard_limit),
            "models": config.models,
            "endpoints": snapshot.endpoints[entry.endpoints.clone()].iter().map(endpoint).collect::<Vec<_>>(),
        })
    });
    Json(Value::from_iter(regions))
}
