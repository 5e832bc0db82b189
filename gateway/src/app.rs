//! The composition root: from a directory to a running gateway, and to its end. Nothing else wires parts together.

use std::hash::RandomState;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use isochrone_core::Time;
use isochrone_telemetry::log::Log;
use parking_lot::Mutex;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::config::{Config, Opened, Rejected};
use crate::metrics::Counts;
use crate::snapshot::Snapshot;
use crate::{admin, kept, listener, probe, reload};

/// What all cores share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) snapshot: ArcSwap<Snapshot>,
    pub(crate) counts: Counts,
    pub(crate) log: Log,
    pub(crate) config_state: Mutex<ConfigState>,
    /// The process is leaving: not ready any more, though it still serves.
    pub(crate) leaving: AtomicBool,
    /// The name of no region.
    pub(crate) nowhere: Arc<str>,
    /// The key of the digests by which queries of death are known again.
    pub(crate) digests: RandomState,
    clock: Instant,
}

/// Which state of the directory is in force, and which was refused since.
#[derive(Debug)]
pub(crate) struct ConfigState {
    pub(crate) accepted_at: SystemTime,
    pub(crate) rejected: Option<Rejected>,
}

impl Shared {
    /// Now, on the clock of all live state.
    pub(crate) fn now(&self) -> Time {
        Time(u64::try_from(self.clock.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }
}

/// What one serving thread has for itself.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) shared: Arc<Shared>,
    pub(crate) index: usize,
    in_flight: AtomicUsize,
}

impl Core {
    fn new(shared: Arc<Shared>, index: usize) -> Core {
        Core { shared, index, in_flight: AtomicUsize::new(0) }
    }

    /// Now, on the clock of all live state.
    pub(crate) fn now(&self) -> Time {
        self.shared.now()
    }

    /// Takes a place among the requests in flight; `None` if there is none left.
    pub(crate) fn admit(core: &Arc<Core>, snapshot: &Snapshot) -> Option<Permit> {
        let most = snapshot.config.limits.in_flight.div_ceil(snapshot.config.cores);
        if core.in_flight.fetch_add(1, Relaxed) >= most {
            core.in_flight.fetch_sub(1, Relaxed);
            return None;
        }
        Some(Permit(Arc::clone(core)))
    }
}

/// A place among the requests in flight.
#[derive(Debug)]
pub(crate) struct Permit(Arc<Core>);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Relaxed);
    }
}

/// Serves a directory until SIGTERM or SIGINT.
///
/// # Errors
/// What keeps it from starting, or ended it, each in a line for the operator.
pub fn serve(directory: &Path) -> Result<(), Vec<String>> {
    let mut opened = Opened::default();
    // Absolute, so that the directory has a parent: there its replacement is seen, and the accepted state is kept.
    let directory = std::path::absolute(directory).unwrap_or_else(|_| directory.to_owned());
    let (config, rejected) = kept::start(&directory, &mut opened)
        .map_err(|rejected| rejected.problems.iter().map(ToString::to_string).collect::<Vec<_>>())?;
    let admin = bind(config.admin, false).map_err(|error| vec![error])?;
    let sockets = sockets(&config)?;
    let log = Log::start(config.cores);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| vec![format!("no runtime: {error}")])?;
    let ended = runtime.block_on(control((directory, rejected), config, opened, admin, sockets, log.clone()));
    runtime.shutdown_timeout(Duration::from_secs(1));
    log.end();
    ended.map_err(|error| vec![error])
}

/// The control thread: signals, probes, reloads, the admin listener. It serves no request.
async fn control(
    (directory, rejected): (PathBuf, Option<Rejected>),
    config: Config,
    mut opened: Opened,
    admin: TcpListener,
    sockets: Vec<Vec<TcpListener>>,
    log: Log,
) -> Result<(), String> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    let settings = isochrone_telemetry::Settings {
        service: "isochrone-gateway",
        instance: &config.instance,
        attributes: Vec::new(),
        otlp: config.telemetry.otlp.as_deref(),
    };
    let telemetry = isochrone_telemetry::start(&settings, log.clone())?;
    let snapshot = Snapshot::compile(config, None);
    tracing::info!(revision = %snapshot.config.revision, regions = snapshot.regions.len(),
        endpoints = snapshot.endpoints.len(), cores = snapshot.config.cores, "configuration accepted");
    let shared = Arc::new(Shared {
        snapshot: ArcSwap::from_pointee(snapshot),
        counts: Counts::default(),
        log,
        config_state: Mutex::new(ConfigState { accepted_at: SystemTime::now(), rejected: None }),
        leaving: AtomicBool::new(false),
        nowhere: Arc::from(""),
        digests: RandomState::new(),
        clock: Instant::now(),
    });

    let stop = CancellationToken::new();
    // Everything that must live as long as the process tells here how it ended; the first to end ends the process.
    let (ended, mut endings) = mpsc::channel::<String>(16);
    let probes = probe::Probes::start(Arc::clone(&shared), ended.clone());
    watched("the digest of what is measured", &ended, refresh(Arc::clone(&shared)));
    watched("the admin listener", &ended, admin::serve(admin, Arc::clone(&shared))?);
    match &rejected {
        None => opened = reload::kept(&shared, &directory, opened).await,
        Some(rejected) => {
            reload::reject(&shared, rejected);
            tracing::error!(revision = %shared.snapshot.load().config.revision,
                "started on the configuration that was accepted last: the directory is broken");
        }
    }
    watched("the watch on the configuration", &ended, reload::watch(directory, Arc::clone(&shared), opened, probes));

    let mut threads = Vec::new();
    for (index, listeners) in sockets.into_iter().enumerate() {
        let core = Arc::new(Core::new(Arc::clone(&shared), index));
        let (stop, ended) = (stop.clone(), ended.clone());
        let run = move || {
            let run = std::panic::AssertUnwindSafe(|| listener::run(core, listeners, stop));
            let why = std::panic::catch_unwind(run).unwrap_or_else(|_| "it panicked".into());
            // A full channel means that somebody else's end is already being told.
            let _ = ended.try_send(format!("a serving thread ended: {why}"));
        };
        let thread = std::thread::Builder::new().name(format!("core-{index}")).spawn(run);
        threads.push(thread.map_err(|error| format!("no thread: {error}"))?);
    }

    let interrupted = async {
        let first = async { Some(interrupt.as_mut().ok()?.recv().await) };
        first.await
    };
    let terminated = async { Some(terminate.as_mut().ok()?.recv().await) };
    let outcome = tokio::select! {
        _ = terminated => Ok(()),
        _ = interrupted => Ok(()),
        Some(why) = endings.recv() => Err(why),
    };
    let shutdown = shared.snapshot.load().config.shutdown;
    tracing::info!(delay_ms = shutdown.delay.as_millis(), grace_ms = shutdown.grace.as_millis(), "leaving");
    // Load balancers look away before connections are refused.
    shared.leaving.store(true, Relaxed);
    if outcome.is_ok() {
        tokio::time::sleep(shutdown.delay).await;
    }
    stop.cancel();
    let joined = tokio::task::spawn_blocking(move || threads.into_iter().for_each(|thread| drop(thread.join())));
    // The threads bound their own drain; this bound is for one that hangs.
    let drained = tokio::time::timeout(shutdown.grace + Duration::from_secs(2), joined).await.is_ok();
    tracing::info!(drained, "stopped");
    tokio::task::spawn_blocking(move || drop(telemetry)).await.map_err(|error| error.to_string())?;
    outcome
}

/// Between two digests of what is measured.
const REFRESH: Duration = Duration::from_millis(200);

/// Turns what requests and probes have measured into what picks read, several times a second.
async fn refresh(shared: Arc<Shared>) -> String {
    let mut ticks = tokio::time::interval(REFRESH);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        shared.snapshot.load().fleet.refresh(shared.now());
    }
}

/// Runs a task that must live as long as the process, and tells if it does not, be it by a panic.
pub(crate) fn watched(
    task: &'static str,
    ended: &mpsc::Sender<String>,
    future: impl Future<Output = String> + Send + 'static,
) {
    let (running, ended) = (tokio::spawn(future), ended.clone());
    tokio::spawn(async move {
        let why = running.await.unwrap_or_else(|error| error.to_string());
        let _ = ended.try_send(format!("{task} ended: {why}"));
    });
}

/// Every listener's sockets, by core: each thread accepts from its own, so that the kernel spreads connections and none
/// is handed from thread to thread.
fn sockets(config: &Config) -> Result<Vec<Vec<TcpListener>>, Vec<String>> {
    // SO_REUSEPORT would let a second gateway share a port in silence; a plain bind first finds the first one.
    let problems: Vec<String> =
        config.listeners.iter().filter_map(|listener| bind(listener.address, false).err()).collect();
    if !problems.is_empty() {
        return Err(problems);
    }
    (0..config.cores)
        .map(|_| config.listeners.iter().map(|listener| bind(listener.address, true)).collect())
        .collect::<Result<_, String>>()
        .map_err(|error| vec![error])
}

fn bind(address: std::net::SocketAddr, shared: bool) -> Result<TcpListener, String> {
    let bind = || {
        let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(shared)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(4096)?;
        Ok(TcpListener::from(socket))
    };
    bind().map_err(|error: std::io::Error| match error.kind() {
        std::io::ErrorKind::AddrInUse => {
            format!("{address} is in use by another process; `ss -ltnp` shows which. Stop it, or change the address")
        }
        _ => format!("cannot listen on {address}: {error}"),
    })
}
