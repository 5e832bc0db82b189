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

use crate::cache::Cache;
use crate::config::{Config, Opened, Rejected};
use crate::endpoint::Endpoint;
use crate::handover::{self, Predecessor};
use crate::metrics::Counts;
use crate::snapshot::{Drains, Snapshot};
use crate::{admin, kept, listener, probe, reload, tls};

/// What all cores share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) snapshot: ArcSwap<Snapshot>,
    pub(crate) counts: Counts,
    pub(crate) cache: Cache,
    pub(crate) log: Log,
    pub(crate) config_state: Mutex<ConfigState>,
    /// Asks for the directory to be read now.
    pub(crate) reread: mpsc::Sender<reload::Ask>,
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
    /// It accepts no more: clients are told to go elsewhere.
    pub(crate) closing: AtomicBool,
}

impl Core {
    fn new(shared: Arc<Shared>, index: usize) -> Core {
        Core { shared, index, in_flight: AtomicUsize::new(0), closing: AtomicBool::new(false) }
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

/// What is served, and how the process comes to it.
#[derive(Debug)]
pub struct Serve {
    /// The configuration.
    pub directory: PathBuf,
    /// Where the accepted state is kept; absent: beside the directory.
    pub state: Option<PathBuf>,
    /// In the place of the gateway that serves now, if there is one.
    pub take_over: bool,
}

/// Serves a directory until SIGTERM or SIGINT, or until a successor has taken over.
///
/// # Errors
/// What keeps it from starting, or ended it, each in a line for the operator.
pub fn serve(how: &Serve) -> Result<(), Vec<String>> {
    let mut opened = Opened::default();
    // Absolute, so that the directory has a parent: there its replacement is seen, and the accepted state is kept.
    let directory = std::path::absolute(&how.directory).unwrap_or_else(|_| how.directory.clone());
    let place = kept::Place::of(&directory, how.state.as_deref());
    let (config, rejected) = kept::start(&directory, &place, &mut opened)
        .map_err(|rejected| rejected.problems.iter().map(ToString::to_string).collect::<Vec<_>>())?;
    if let Some(rejected) = rejected.as_ref().filter(|_| how.take_over) {
        // Whoever brings a successor means what is in the directory, and the predecessor serves what was accepted.
        return Err(rejected.problems.iter().map(ToString::to_string).collect());
    }
    let predecessor = how.take_over.then(|| place.socket());
    let sockets = Sockets::open(&config, predecessor.as_deref())?;
    let log = Log::start(config.cores);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| vec![format!("no runtime: {error}")])?;
    let source = reload::Source { directory, place, opened, broken: rejected.is_some() };
    let ended = runtime.block_on(control((source, rejected), config, sockets, log.clone()));
    runtime.shutdown_timeout(Duration::from_secs(1));
    log.end();
    ended.map_err(|error| vec![error])
}

/// The control thread: signals, probes, reloads, the admin listener. It serves no request.
async fn control(
    (source, rejected): (reload::Source, Option<Rejected>),
    config: Config,
    sockets: Sockets,
    log: Log,
) -> Result<(), String> {
    let told = |kind| signal(kind).map_err(|error| format!("no handler for signals: {error}"));
    let (mut terminate, mut interrupt) = (told(SignalKind::terminate())?, told(SignalKind::interrupt())?);
    let settings = isochrone_telemetry::Settings {
        service: "isochrone-gateway",
        instance: &config.instance,
        attributes: Vec::new(),
        otlp: config.telemetry.otlp.as_deref(),
    };
    let telemetry = isochrone_telemetry::start(&settings, log.clone())?;
    let clock = Instant::now();
    let snapshot = Snapshot::compile(Arc::new(config), Drains::default(), None, Time::default());
    tracing::info!(revision = %snapshot.config.revision, regions = snapshot.regions.len(),
        endpoints = snapshot.endpoints.len(), cores = snapshot.config.cores, "configuration accepted");
    for listener in &snapshot.config.listeners {
        if let Some(expires) = listener.expires.filter(|expires| *expires <= tls::now()) {
            tracing::error!(listener = %listener.address, expires, "the certificate has expired; clients will refuse it");
        }
    }
    if let Some(rejected) = &rejected {
        reload::tell(rejected);
        tracing::error!(revision = %snapshot.config.revision,
            "started on the configuration that was accepted last: the directory is broken");
    }
    let cache = Cache::new(&snapshot.config.cache);
    let (reread, asks) = mpsc::channel(8);
    let shared = Arc::new(Shared {
        snapshot: ArcSwap::from_pointee(snapshot),
        counts: Counts::default(),
        cache,
        log,
        config_state: Mutex::new(ConfigState { accepted_at: SystemTime::now(), rejected }),
        reread,
        leaving: AtomicBool::new(false),
        nowhere: Arc::from(""),
        digests: RandomState::new(),
        clock,
    });

    let offered = sockets.offered().map_err(|error| format!("no descriptor: {error}"))?;
    let Sockets { admin, cores, predecessor } = sockets;
    let stop = CancellationToken::new();
    // Everything that must live as long as the process tells here how it ended; the first to end ends the process.
    let (ended, mut endings) = mpsc::channel::<String>(16);
    let probes = probe::Probes::start(Arc::clone(&shared), ended.clone());
    watched("the digest of what is measured", &ended, refresh(Arc::clone(&shared)));
    let socket = source.place.socket();
    watched("the watch on the configuration", &ended, reload::watch(source, Arc::clone(&shared), probes, asks));
    let succeeded = CancellationToken::new();
    let mut threads = Vec::new();
    let serving = async {
        if let Some(predecessor) = &predecessor
            && let Err(why) = known(&shared).await
            && predecessor.serves()
        {
            return Err(why);
        }
        watched("the admin listener", &ended, admin::serve(admin, Arc::clone(&shared), succeeded.clone())?);
        let (begun, mut beginnings) = mpsc::channel(cores.len());
        for (index, listeners) in cores.into_iter().enumerate() {
            let core = Arc::new(Core::new(Arc::clone(&shared), index));
            let (stop, ended, begun) = (stop.clone(), ended.clone(), begun.clone());
            let run = move || {
                let run = std::panic::AssertUnwindSafe(|| listener::run(core, listeners, stop, &begun));
                let why = std::panic::catch_unwind(run).unwrap_or_else(|_| "it panicked".into());
                // A full channel means that somebody else's end is already being told.
                let _ = ended.try_send(format!("a serving thread ended: {why}"));
            };
            let thread = std::thread::Builder::new().name(format!("core-{index}")).spawn(run);
            threads.push(thread.map_err(|error| format!("no thread: {error}"))?);
        }
        for _ in 0..threads.len() {
            beginnings.recv().await;
        }
        if let Some(predecessor) = predecessor {
            tokio::task::spawn_blocking(|| predecessor.release()).await.map_err(|error| error.to_string())??;
            tracing::info!("this process serves in the place of its predecessor");
        }
        handover::succeeded(socket, offered).await;
        succeeded.cancel();
        Ok(())
    };
    // The predecessor is not told to go by a process that is told to, or that has lost a part of itself.
    let outcome = tokio::select! {
        biased;
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        Some(why) = endings.recv() => Err(why),
        ended = serving => ended,
    };
    let shutdown = shared.snapshot.load().config.shutdown;
    tracing::info!(
        delay_ms = shutdown.delay.as_millis(),
        grace_ms = shutdown.grace.as_millis(),
        successor = succeeded.is_cancelled(),
        "leaving"
    );
    // Load balancers look away before connections are refused. With a successor, none will be.
    shared.leaving.store(true, Relaxed);
    if outcome.is_ok() && !succeeded.is_cancelled() {
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

/// The longest that a successor keeps its predecessor waiting for the first answers of its endpoints.
const WARM_UP: Duration = Duration::from_secs(10);

/// Waits until every endpoint has been probed: before that a pick would be a guess, while the predecessor's is none.
///
/// # Errors
/// None of them can take a request: the predecessor may know better.
async fn known(shared: &Shared) -> Result<(), String> {
    let probed = async {
        while !shared.snapshot.load().endpoints.iter().all(|endpoint| endpoint.live.is_probed()) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    if tokio::time::timeout(WARM_UP, probed).await.is_err() {
        tracing::warn!("not every endpoint has been probed yet; serving all the same");
    }
    let able = |endpoint: &Arc<Endpoint>| endpoint.live.is_healthy() && endpoint.live.is_asserted();
    // One success does not make an endpoint healthy.
    let some = async {
        while !shared.snapshot.load().endpoints.iter().any(able) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(WARM_UP, some).await.map_err(|_| {
        "from here no endpoint is healthy, so the predecessor serves on; to start all the same, end it first".to_owned()
    })
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

/// Where connections come in.
struct Sockets {
    admin: TcpListener,
    /// Every listener's, by core: each thread accepts from its own, so that the kernel spreads connections and none is
    /// handed from thread to thread.
    cores: Vec<Vec<TcpListener>>,
    predecessor: Option<Predecessor>,
}

impl Sockets {
    /// Those that were passed to this process or that it takes over, and new ones for the rest.
    fn open(config: &Config, from: Option<&Path>) -> Result<Sockets, Vec<String>> {
        let one = |error: String| vec![error];
        let mut inherited = handover::passed().map_err(one)?;
        let mut predecessor = None;
        if let Some(from) = from
            && let Some((sockets, serves)) = handover::take_over(from).map_err(one)?
        {
            (inherited, predecessor) = (sockets.or(inherited), Some(serves));
        }
        let mut problems = Vec::new();
        let mut told = |bound: Result<TcpListener, String>| bound.map_err(|error| problems.push(error)).ok();
        let admin = inherited.take(config.admin).pop().or_else(|| told(bind(config.admin, false)));
        let listeners: Vec<Vec<TcpListener>> = config
            .listeners
            .iter()
            .map(|listener| match inherited.take(listener.address) {
                // SO_REUSEPORT would let a second gateway share a port in silence; a plain bind first finds the first one.
                none if none.is_empty() && told(bind(listener.address, false)).is_some() => {
                    (0..config.cores).filter_map(|_| told(bind(listener.address, true))).collect()
                }
                sockets => sockets,
            })
            .collect();
        let (Some(admin), true) = (admin, problems.is_empty()) else { return Err(problems) };
        for address in inherited.left() {
            tracing::warn!(%address, "a socket that was passed on belongs to no listener; it is closed");
        }
        let cores = spread(&listeners, config.cores).map_err(|error| vec![format!("no descriptor: {error}")])?;
        Ok(Sockets { admin, cores, predecessor })
    }

    /// All of them once more, to be passed on.
    fn offered(&self) -> std::io::Result<Vec<TcpListener>> {
        self.cores.iter().flatten().chain([&self.admin]).map(TcpListener::try_clone).collect()
    }
}

/// Gives each core of every listener's sockets at least one, and every socket a core. There may be more of them than cores or
/// fewer, if they were made for another number.
fn spread(listeners: &[Vec<TcpListener>], cores: usize) -> std::io::Result<Vec<Vec<TcpListener>>> {
    let mut by_core: Vec<Vec<TcpListener>> = (0..cores).map(|_| Vec::new()).collect();
    for sockets in listeners.iter().filter(|sockets| !sockets.is_empty()) {
        for at in 0..cores.max(sockets.len()) {
            by_core[at % cores].push(sockets[at % sockets.len()].try_clone()?);
        }
    }
    Ok(by_core)
}

fn bind(address: std::net::SocketAddr, shared: bool) -> Result<TcpListener, String> {
    let bind = || {
        let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(shared)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(listener::QUEUE)?;
        Ok(TcpListener::from(socket))
    };
    bind().map_err(|error: std::io::Error| match error.kind() {
        std::io::ErrorKind::AddrInUse => {
            format!("{address} is in use by another process; `ss -ltnp` shows which. Stop it, or change the address")
        }
        _ => format!("cannot listen on {address}: {error}"),
    })
}
