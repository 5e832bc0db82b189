//! The composition root of the worker: models, their threads, the API, and the end.

use std::collections::BTreeMap;
use std::future::IntoFuture;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use isochrone_telemetry::log::Log;
use opentelemetry::KeyValue;
use tokio::signal::unix::{SignalKind, signal};

use crate::model::{self, Found};
use crate::runner::{Bounds, Runner};
use crate::runtime::torch;
use crate::text::Tokenizer;
use crate::{Serve, api};

/// What all requests share.
pub(crate) struct State {
    pub(crate) region: axum::http::HeaderValue,
    /// By name, then by version.
    pub(crate) models: BTreeMap<String, BTreeMap<u64, Arc<Loaded>>>,
    pub(crate) log: Log,
    pub(crate) ready: AtomicBool,
    pub(crate) max_body: usize,
    pub(crate) in_flight_max: usize,
}

/// A model that can compute.
pub(crate) struct Loaded {
    pub(crate) found: Found,
    pub(crate) tokenizer: Option<Tokenizer>,
    pub(crate) runner: Runner,
    /// Requests that were answered, by success.
    pub(crate) succeeded: AtomicU64,
    pub(crate) failed: AtomicU64,
    pub(crate) computed_us: AtomicU64,
    pub(crate) queued_us: AtomicU64,
    pub(crate) version_header: axum::http::HeaderValue,
    pub(crate) digest_header: axum::http::HeaderValue,
}

impl State {
    /// A model by name and version, the newest where no version is asked for.
    pub(crate) fn model(&self, name: &str, version: Option<&str>) -> Option<&Arc<Loaded>> {
        let versions = self.models.get(name)?;
        match version {
            Some(version) => versions.get(&version.parse().ok()?),
            None => versions.last_key_value().map(|(_, loaded)| loaded),
        }
    }
}

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// What keeps it from starting, or ended it, each in a line for the operator.
pub(crate) fn serve(settings: &Serve) -> Result<(), Vec<String>> {
    let one = |error: String| vec![error];
    let region =
        axum::http::HeaderValue::try_from(&settings.region).map_err(|_| one("--region is not a name".into()))?;
    let found = model::scan(&settings.models)
        .map_err(|problems| problems.iter().map(ToString::to_string).collect::<Vec<_>>())?;
    torch::set_threads(settings.threads.max(1));
    let log = Log::start(1);
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| one(error.to_string()))?;
    let ended = runtime.block_on(run(settings, region, found, log.clone()));
    runtime.shutdown_timeout(Duration::from_secs(1));
    log.end();
    ended
}

async fn run(
    settings: &Serve,
    region: axum::http::HeaderValue,
    found: Vec<Found>,
    log: Log,
) -> Result<(), Vec<String>> {
    let one = |error: String| vec![error];
    let instance = format!("{}:{}", settings.region, std::process::id());
    let telemetry = isochrone_telemetry::start(
        &isochrone_telemetry::Settings {
            service: "isochrone-backend",
            instance: &instance,
            attributes: vec![KeyValue::new("isochrone.region", settings.region.clone())],
            otlp: settings.otlp.as_deref(),
        },
        log.clone(),
    )
    .map_err(one)?;

    let bounds = Bounds { queue: settings.queue.max(1), batch_rows: settings.batch_rows.max(1) };
    let mut models: BTreeMap<String, BTreeMap<u64, Arc<Loaded>>> = BTreeMap::new();
    let mut problems = Vec::new();
    for found in found {
        let directory = found.directory.clone();
        match load(found, bounds) {
            Ok(loaded) => {
                tracing::info!(
                    model = loaded.found.name,
                    version = loaded.found.version,
                    digest = loaded.found.digest,
                    "model loaded"
                );
                let version = loaded.found.version.parse().unwrap_or_default();
                models.entry(loaded.found.name.clone()).or_default().insert(version, Arc::new(loaded));
            }
            Err(error) => problems.push(format!("{}: {error}", directory.display())),
        }
    }
    if !problems.is_empty() {
        return Err(problems);
    }

    let listener = tokio::net::TcpListener::bind(settings.listen)
        .await
        .map_err(|error| one(format!("cannot listen on {}: {error}; `ss -ltnp` shows who does", settings.listen)))?;
    let state = Arc::new(State {
        region,
        models,
        log,
        ready: AtomicBool::new(true),
        max_body: settings.max_body,
        in_flight_max: settings.in_flight.max(1),
    });
    tracing::info!(address = %settings.listen, region = settings.region, threads = settings.threads, "serving");

    let (mut terminate, mut interrupt) = match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
        (Ok(terminate), Ok(interrupt)) => (terminate, interrupt),
        _ => return Err(one("no signal handlers".into())),
    };
    let (leave, left) = tokio::sync::oneshot::channel::<()>();
    let server = axum::serve(listener, api::router(Arc::clone(&state))).with_graceful_shutdown(async move {
        // A dropped sender means leaving too.
        let _ = left.await;
    });
    let server = tokio::spawn(server.into_future());
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    // Not ready first: gateways look away before connections are refused.
    state.ready.store(false, Relaxed);
    tracing::info!(lame_duck_ms = settings.lame_duck.as_millis(), grace_ms = settings.grace.as_millis(), "leaving");
    tokio::time::sleep(settings.lame_duck).await;
    drop(leave);
    let drained = tokio::time::timeout(settings.grace, server).await.is_ok();
    tracing::info!(drained, "stopped");
    tokio::task::spawn_blocking(move || drop(telemetry)).await.map_err(|error| one(error.to_string()))
}

fn load(found: Found, bounds: Bounds) -> Result<Loaded, String> {
    let tokenizer = Tokenizer::of(&found)?;
    let header = |text: &str| axum::http::HeaderValue::try_from(text).map_err(|error| error.to_string());
    let (version_header, digest_header) = (header(&found.version)?, header(&found.digest)?);
    let model = found.clone();
    let runner = Runner::start(&found.name, bounds, move || torch::load(&model))?;
    Ok(Loaded {
        found,
        tokenizer,
        runner,
        succeeded: AtomicU64::new(0),
        failed: AtomicU64::new(0),
        computed_us: AtomicU64::new(0),
        queued_us: AtomicU64::new(0),
        version_header,
        digest_header,
    })
}
