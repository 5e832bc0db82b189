//! The operator's listener: health, metrics, and which configuration is in force. Never on a data port.

use std::future::Future;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use axum::extract::{ConnectInfo, Path, RawQuery, Request, State};
use axum::http::{HeaderMap, HeaderName, Method, StatusCode, Uri, header};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use isochrone_telemetry::timestamp;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::app::Shared;
use crate::endpoint::Endpoint;
use crate::snapshot::Snapshot;
use crate::{explain, metrics};

/// Requests at once; more wait.
const REQUESTS_MAX: usize = 32;

/// Serves until a successor does; the future gives the reason for an end.
///
/// # Errors
/// The socket cannot be used.
pub(crate) fn serve(
    socket: TcpListener,
    shared: Arc<Shared>,
    succeeded: CancellationToken,
) -> Result<impl Future<Output = String>, String> {
    let listener = tokio::net::TcpListener::from_std(socket).map_err(|error| error.to_string())?;
    let router = Router::new()
        .route("/", get(index))
        .route("/livez", get(|| async { "live\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(prometheus))
        .route("/api/config", get(config))
        .route("/api/regions", get(regions))
        .route("/api/explain", get(explained))
        .route("/api/reload", post(reread))
        .route("/api/drain", get(drains))
        .route("/api/drain/{region}", put(drain_region).delete(undrain_region))
        .route("/api/drain/{region}/{endpoint}", put(drain_endpoint).delete(undrain_endpoint))
        .route("/api/cache", get(kept).delete(purge))
        .layer(from_fn(operator))
        // A scraper gone wild costs the data path nothing.
        .layer(tower::limit::ConcurrencyLimitLayer::new(REQUESTS_MAX))
        .with_state(shared);
    Ok(async move {
        let router = router.into_make_service_with_connect_info::<SocketAddr>();
        let served = axum::serve(listener, router).with_graceful_shutdown(succeeded.cancelled_owned()).await;
        served.map_or_else(|error| error.to_string(), |()| "it stopped".into())
    })
}

async fn index() -> &'static str {
    "Isochrone\n\n/livez       the process works\n/readyz      it may get traffic\n/metrics     Prometheus\n\
     /api/config  the revision in force and the rejected one\n/api/regions regions and endpoints as they are now\n\
     /api/explain?ip=ADDRESS&tenant=NAME&model=NAME  why such a request goes where it goes\n\n\
     POST /api/reload  reads the directory now\nGET /api/drain    what is drained by hand\n\
     PUT, DELETE /api/drain/REGION[/ENDPOINT]  drains it, or lets it return\n\
     GET, DELETE /api/cache[?model=NAME][&tenant=NAME]  what is kept, or forgets it\n"
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

/// Reads the directory now, and tells what came of it: 200 if it is in force, 422 if it was rejected.
async fn reread(state: State<Arc<Shared>>) -> (StatusCode, Json<Value>) {
    let (ask, done) = tokio::sync::oneshot::channel();
    if state.reread.try_send(ask).is_err() || done.await.is_err() {
        let busy = json!({ "error": "the directory is being read already; ask again" });
        return (StatusCode::SERVICE_UNAVAILABLE, Json(busy));
    }
    let rejected = state.config_state.lock().rejected.is_some();
    let status = if rejected { StatusCode::UNPROCESSABLE_ENTITY } else { StatusCode::OK };
    (status, config(state).await)
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

/// Lets only this machine change anything: whoever may read metrics need not be allowed to drain a region. And refuses what a
/// page of another site makes an operator's browser do: programs send no `Origin`, a browser always does with such methods.
async fn operator(ConnectInfo(from): ConnectInfo<SocketAddr>, request: Request, next: Next) -> Response {
    let error = match *request.method() {
        Method::GET | Method::HEAD => return next.run(request).await,
        _ if !from.ip().to_canonical().is_loopback() => "changes are made from this machine only",
        _ if !is_own(request.headers()) => "a page of another site cannot ask for this",
        _ => return next.run(request).await,
    };
    (StatusCode::FORBIDDEN, Json(json!({ "error": error }))).into_response()
}

/// A name, other than that of this machine, may be one that an attacker has made to lead here.
fn is_own(headers: &HeaderMap) -> bool {
    let Some(origin) = headers.get(header::ORIGIN) else { return true };
    let origin = origin.to_str().ok().and_then(|origin| origin.parse::<Uri>().ok());
    let Some(authority) = origin.as_ref().and_then(Uri::authority) else { return false };
    let host = authority.host().trim_matches(['[', ']']);
    let named = host == "localhost" || host.parse::<std::net::IpAddr>().is_ok();
    named && headers.get(header::HOST).is_some_and(|host| host.as_bytes() == authority.as_str().as_bytes())
}

async fn kept(State(shared): State<Arc<Shared>>) -> Json<Value> {
    let (entries, bytes) = shared.cache.size();
    let counts = &shared.cache.counts;
    let of = |count: &AtomicU64| count.load(Relaxed);
    Json(json!({ "entries": entries, "bytes": bytes, "hits": of(&counts.hits), "stale": of(&counts.stale),
        "misses": of(&counts.misses), "collapsed": of(&counts.collapsed), "stored": of(&counts.stored) }))
}

/// Forgets what is kept: of `?model=`, of `?tenant=`, of both together, or all.
async fn purge(state: State<Arc<Shared>>, RawQuery(query): RawQuery) -> Response {
    let (mut model, mut tenant) = (None, None);
    for (key, value) in form_urlencoded::parse(query.unwrap_or_default().as_bytes()) {
        match &*key {
            "model" => model = Some(value.into()),
            "tenant" => tenant = Some(value.into()),
            // A misspelt name must not forget everything.
            other => {
                let error = format!("no parameter is called `{other}`");
                return (StatusCode::BAD_REQUEST, Json(json!({ "error": error }))).into_response();
            }
        }
    }
    tracing::info!(model, tenant, "kept answers are forgotten, by the operator");
    state.cache.purge(model, tenant);
    kept(state).await.into_response()
}

async fn drains(State(shared): State<Arc<Shared>>) -> Json<Value> {
    let snapshot = shared.snapshot.load();
    let endpoints = snapshot.drains.endpoints.iter();
    let endpoints = endpoints.map(|(region, address)| json!({ "region": region, "address": address }));
    Json(json!({ "regions": snapshot.drains.regions, "endpoints": endpoints.collect::<Vec<_>>() }))
}

async fn drain_region(state: State<Arc<Shared>>, Path(region): Path<Box<str>>) -> Response {
    drain(state, &region, None, true).await
}

async fn undrain_region(state: State<Arc<Shared>>, Path(region): Path<Box<str>>) -> Response {
    drain(state, &region, None, false).await
}

async fn drain_endpoint(state: State<Arc<Shared>>, Path((region, address)): Path<(Box<str>, Box<str>)>) -> Response {
    drain(state, &region, Some(&address), true).await
}

async fn undrain_endpoint(state: State<Arc<Shared>>, Path((region, address)): Path<(Box<str>, Box<str>)>) -> Response {
    drain(state, &region, Some(&address), false).await
}

/// Drains, or lets return, and tells all that is drained. What is gone meanwhile can be taken back, but not drained.
async fn drain(state: State<Arc<Shared>>, region: &str, address: Option<&str>, on: bool) -> Response {
    let before = state.snapshot.load_full();
    let known = before.regions.iter().find(|entry| *entry.name == *region).is_some_and(|entry| {
        let endpoints = &before.endpoints[entry.endpoints.clone()];
        address.is_none_or(|address| endpoints.iter().any(|endpoint| endpoint.name() == address))
    });
    let mut wanted = before.drains.clone();
    let changed = match (address, on) {
        (_, true) if !known => false,
        (None, true) => wanted.regions.insert(region.into()) || known,
        (None, false) => wanted.regions.remove(region) || known,
        (Some(address), true) => wanted.endpoints.insert((region.into(), address.into())) || known,
        (Some(address), false) => wanted.endpoints.remove(&(region.into(), address.into())) || known,
    };
    if !changed {
        let what = address.map_or_else(|| format!("region `{region}`"), |at| format!("endpoint `{at}` in `{region}`"));
        return (StatusCode::NOT_FOUND, Json(json!({ "error": format!("there is no {what}") }))).into_response();
    }
    tracing::info!(region, endpoint = address, drained = on, "by the operator");
    // Nothing is awaited between the look at the snapshot and its successor, and all of this is one thread's.
    let next = Snapshot::compile(Arc::clone(&before.config), wanted, Some(&before), state.now());
    state.snapshot.store(Arc::new(next));
    drains(state).await.into_response()
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
            "drained": endpoint.live.is_drained(),
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
            "drain": fleet.region.drain,
            "in_flight": fleet.live.load(),
            "soft_limit": limit(config.region.soft_limit),
            "hard_limit": limit(config.region.hard_limit),
            "models": config.models,
            "endpoints": snapshot.endpoints[entry.endpoints.clone()].iter().map(endpoint).collect::<Vec<_>>(),
        })
    });
    Json(Value::from_iter(regions))
}
