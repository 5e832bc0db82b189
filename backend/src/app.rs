//! The composition root of the worker: models, their threads, the API, and the end.

use std::future::IntoFuture;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use axum::http::HeaderValue;
use axum::serve::{Listener, ListenerExt};
use isochrone_telemetry::log::Log;
use opentelemetry::KeyValue;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Semaphore;

use crate::control::OperatorKey;
use crate::repository::{Options, Repository};
use crate::runtime::{processor, torch};
use crate::statistics::Utilisation;
use crate::{Compute, Serve, api, grpc};

/// What all requests share.
pub(crate) struct State {
    pub(crate) region: HeaderValue,
    pub(crate) repository: Repository,
    pub(crate) operator: Option<OperatorKey>,
    pub(crate) log: Log,
    pub(crate) ready: AtomicBool,
    pub(crate) max_body: usize,
    /// One for each request in flight, whatever its protocol.
    pub(crate) places: Arc<Semaphore>,
    pub(crate) utilisation: Utilisation,
    /// Whether the models compute on a GPU.
    pub(crate) gpu: bool,
}

/// Finds the device and decides how it is computed on.
///
/// # Errors
/// The device is not there.
pub(crate) fn options(compute: &Compute, queue: usize) -> Result<Options, String> {
    processor::fast_matrices(!compute.no_fast_matrices);
    let placed = torch::place(compute.device)?;
    Ok(Options { queue: queue.max(1), threads: compute.threads.clamp(1, 256), placed })
}

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// What keeps it from starting, or ended it, each in a line for the operator.
pub(crate) fn serve(settings: &Serve) -> Result<(), Vec<String>> {
    let one = |error: String| vec![error];
    let region = HeaderValue::try_from(&settings.region).map_err(|_| one("--region is not a name".into()))?;
    let operator = settings.operator_key.as_deref().map(OperatorKey::read).transpose().map_err(one)?;
    let log = Log::start(1);
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| one(error.to_string()))?;
    let ended = runtime.block_on(run(settings, region, operator, log.clone()));
    runtime.shutdown_timeout(Duration::from_secs(1));
    log.end();
    ended
}

async fn run(
    settings: &Serve,
    region: HeaderValue,
    operator: Option<OperatorKey>,
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

    let options = options(&settings.compute, settings.queue).map_err(one)?;
    let repository = Repository::open(settings.models.clone(), options)?;
    let state = Arc::new(State {
        region,
        repository,
        operator,
        log,
        ready: AtomicBool::new(true),
        max_body: settings.max_body,
        places: Arc::new(Semaphore::new(settings.in_flight.clamp(1, Semaphore::MAX_PERMITS))),
        utilisation: Utilisation::default(),
        gpu: options.placed.is_gpu(),
    });
    // Opened after the models are loaded: who can connect is served.
    let listener = listen(settings.listen).await.map_err(one)?;
    let grpc = match settings.grpc_listen {
        Some(address) => {
            Some((listen(address).await.map_err(one)?, grpc::router(Arc::clone(&state)).await.map_err(one)?))
        }
        None => None,
    };
    tracing::info!(
        address = %settings.listen,
        grpc = settings.grpc_listen.map(|address| address.to_string()),
        region = settings.region,
        threads = settings.compute.threads,
        gpu = state.gpu,
        "serving"
    );

    let (mut terminate, mut interrupt) = match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
        (Ok(terminate), Ok(interrupt)) => (terminate, interrupt),
        _ => return Err(one("no signal handlers".into())),
    };
    let (leave, left) = tokio::sync::watch::channel(());
    let until_leaving = || {
        let mut left = left.clone();
        async move {
            // A dropped sender means leaving too.
            let _ = left.changed().await;
        }
    };
    let mut servers = tokio::task::JoinSet::new();
    let router = api::router(Arc::clone(&state));
    servers.spawn(axum::serve(at_once(listener), router).with_graceful_shutdown(until_leaving()).into_future());
    let mut health = None;
    if let Some((listener, (router, reporter))) = grpc {
        servers.spawn(axum::serve(at_once(listener), router).with_graceful_shutdown(until_leaving()).into_future());
        health = Some(reporter);
    }
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    // Not ready first: gateways look away before connections are refused.
    state.ready.store(false, Relaxed);
    if let Some(health) = &health {
        health.leave().await;
    }
    tracing::info!(lame_duck_ms = settings.lame_duck.as_millis(), grace_ms = settings.grace.as_millis(), "leaving");
    tokio::time::sleep(settings.lame_duck).await;
    drop(leave);
    let ended = async { while servers.join_next().await.is_some() {} };
    let drained = tokio::time::timeout(settings.grace, ended).await.is_ok();
    let unloaded = Arc::clone(&state);
    tokio::task::spawn_blocking(move || unloaded.repository.close()).await.map_err(|error| one(error.to_string()))?;
    tracing::info!(drained, "stopped");
    tokio::task::spawn_blocking(move || drop(telemetry)).await.map_err(|error| one(error.to_string()))
}

/// Small answers are sent as they are made, not when the one before them has been acknowledged.
fn at_once(listener: TcpListener) -> impl Listener<Io = tokio::net::TcpStream, Addr = std::net::SocketAddr> {
    // A connection that refuses the option is slower, and no worse.
    listener.tap_io(|connection| drop(connection.set_nodelay(true)))
}

async fn listen(address: std::net::SocketAddr) -> Result<TcpListener, String> {
    let listener = TcpListener::bind(address).await;
    listener.map_err(|error| format!("cannot listen on {address}: {error}; `ss -ltnp` shows who does"))
}
