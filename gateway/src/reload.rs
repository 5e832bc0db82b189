//! Hot reload: a change of a file, SIGHUP, or the operator's word leads to a new snapshot, or to nothing but an error in the
//! log.
//!
//! All is read, validated and built before one pointer is swapped. Directories are watched rather than files, so that an
//! atomic rename and a swapped symbolic link are seen like an edit.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant, SystemTime};

use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, mpsc, oneshot};

use crate::app::Shared;
use crate::config::{self, Config, Opened, Rejected};
use crate::kept;
use crate::probe::Probes;
use crate::snapshot::Snapshot;

/// However busy the directory, a change is read after so many settling times.
const SETTLES_MAX: usize = 20;

/// Asks for the directory to be read. The answer comes when its outcome is in force, whatever it is.
pub(crate) type Ask = oneshot::Sender<()>;

/// What is watched, and how far it has been read.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) directory: PathBuf,
    /// Where the accepted state is kept.
    pub(crate) place: kept::Place,
    pub(crate) opened: Opened,
    /// The directory was broken at the start; what was accepted last is in force.
    pub(crate) broken: bool,
}

/// Watches for ever. Gives the reason why it cannot.
pub(crate) async fn watch(
    source: Source,
    shared: Arc<Shared>,
    mut probes: Probes,
    mut asks: mpsc::Receiver<Ask>,
) -> String {
    let Source { directory, place, mut opened, broken } = source;
    let changed = Arc::new(Notify::new());
    let mut watched = Watched::new(Arc::clone(&changed), directory.clone());
    let Ok(mut hangup) = signal(SignalKind::hangup()) else { return "no handler for SIGHUP".into() };
    let mut named = BTreeSet::new();
    if let Err(error) = watched.follow(&shared.snapshot.load().config, &named) {
        return error.to_string();
    }
    // Nobody has told what changed between the first reading and the beginning of the watch.
    changed.notify_one();
    if !broken {
        opened = kept(&shared, &place, &directory, opened).await;
    }
    loop {
        let mut asked: Option<Ask> = None;
        let by_hand = tokio::select! {
            () = changed.notified() => {
                settle(&changed, &shared).await;
                false
            }
            () = polled(&shared) => false,
            _ = hangup.recv() => true,
            Some(ask) = asks.recv() => {
                asked = Some(ask);
                true
            }
        };
        // Before it is read: the directory may be another of the same name, and what is still being written is told of.
        follow(&mut watched, &shared, &named);
        let begun = Instant::now();
        let reading = directory.clone();
        let read = tokio::task::spawn_blocking(move || (config::load(&reading, &mut opened), opened)).await;
        let result;
        (result, opened) = match read {
            Ok(read) => read,
            Err(error) => return error.to_string(),
        };
        let small = |config| small_enough(&shared.snapshot.load().config, &config, &directory).map(|()| config);
        match result.and_then(small) {
            Ok(config) => {
                named.clone_from(&config.files);
                if accept(&shared, config, begun) {
                    probes.follow();
                    // A process that leaves lets its successor do so.
                    if !shared.leaving.load(Relaxed) {
                        opened = kept(&shared, &place, &directory, opened).await;
                    }
                }
            }
            Err(rejected) => {
                named.clone_from(&rejected.files);
                reject(&shared, &rejected, by_hand);
            }
        }
        if let Some(ask) = asked {
            // Whoever asked may have gone.
            let _ = ask.send(());
        }
        // Whether accepted or not. What was not watched while it was read has to be read once more.
        if follow(&mut watched, &shared, &named) {
            changed.notify_one();
        }
    }
}

/// A watch that cannot be renewed leaves the old one.
fn follow(watched: &mut Watched, shared: &Shared, named: &BTreeSet<PathBuf>) -> bool {
    watched.follow(&shared.snapshot.load().config, named).unwrap_or_else(|error| {
        tracing::error!(%error, "changes may not be seen; SIGHUP makes the gateway read them");
        false
    })
}

/// The time for another look, where file systems do not tell of changes.
async fn polled(shared: &Shared) {
    match shared.snapshot.load().config.poll {
        Duration::ZERO => std::future::pending().await,
        poll => tokio::time::sleep(poll).await,
    }
}

/// Waits until the directory is quiet: an editor writes more than once, and a copy takes more than one file.
async fn settle(changed: &Notify, shared: &Shared) {
    let settle = shared.snapshot.load().config.settle;
    for _ in 0..SETTLES_MAX {
        if tokio::time::timeout(settle, changed.notified()).await.is_err() {
            return;
        }
    }
}

/// Whether it is another than the one in force.
fn accept(shared: &Shared, config: Config, begun: Instant) -> bool {
    let before = shared.snapshot.load_full();
    if before.config.revision == config.revision && before.config.files == config.files {
        // Touched, or put back as it was. (The state that was kept is the same in another place.)
        shared.config_state.lock().rejected = None;
        return false;
    }
    for (what, same) in [
        ("listeners.address", addresses(&before.config) == addresses(&config)),
        ("limits.connections", before.config.limits.connections == config.limits.connections),
        ("admin.address", before.config.admin == config.admin),
        ("gateway.cores", before.config.cores == config.cores),
        ("cache.bytes", before.config.cache.bytes == config.cache.bytes),
        ("telemetry.otlp", before.config.telemetry.otlp == config.telemetry.otlp),
    ] {
        if !same {
            tracing::warn!(setting = what, "a change of this setting takes effect at the next start");
        }
    }
    // The threads, and with them the pools, are as many as at the start: `cores` asks for a restart.
    let config = Config { cores: before.config.cores, ..config };
    let snapshot = Snapshot::compile(Arc::new(config), before.drains.clone(), Some(&before), shared.now());
    let (regions, endpoints) = (snapshot.regions.len(), snapshot.endpoints.len());
    let revision = snapshot.config.revision.clone();
    if before.config.cache.bytes > 0 && snapshot.config.cache.bytes == 0 {
        // Whoever turns it off may not want what it has, ever.
        shared.cache.purge(None, None);
    }
    shared.snapshot.store(Arc::new(snapshot));
    let took_ms = begun.elapsed().as_millis();
    tracing::info!(%revision, regions, endpoints, took_ms, "configuration accepted");
    let mut state = shared.config_state.lock();
    state.accepted_at = SystemTime::now();
    state.rejected = None;
    true
}

/// A directory that was emptied by mistake must not empty the fleet.
///
/// # Errors
/// More than half of the endpoints would be gone, and nobody has said that it is meant.
pub(crate) fn small_enough(before: &Config, after: &Config, directory: &Path) -> Result<(), Rejected> {
    // By their addresses: one that is spoken to in another way is still there.
    let addresses = |config: &Config| -> BTreeSet<(Arc<str>, Vec<u8>)> {
        let endpoints = config.regions.iter().flat_map(|region| &region.endpoints);
        let target = |endpoint: &config::EndpointConfig| {
            let target = endpoint.http.as_ref().or(endpoint.grpc.as_ref());
            target.map(|target| (Arc::clone(&endpoint.region), target.authority.as_bytes().to_vec()))
        };
        endpoints.filter_map(target).collect()
    };
    let (old, new) = (addresses(before), addresses(after));
    let gone = old.difference(&new).count();
    if gone * 2 <= old.len() || after.allow_large_change == after.revision {
        return Ok(());
    }
    let message = format!(
        "this would remove {gone} of {} endpoints; if it is meant, write allow_large_change = \"{}\" below [reload]",
        old.len(),
        after.revision
    );
    let file = directory.join("gateway.toml");
    let problem = config::Problem { file, line: 0, column: 0, message };
    Err(Rejected { revision: after.revision.clone(), problems: vec![problem], files: after.files.clone() })
}

/// Keeps what is in force beside the directory.
async fn kept(shared: &Arc<Shared>, place: &kept::Place, directory: &Path, mut opened: Opened) -> Opened {
    let (snapshot, directory, place) = (shared.snapshot.load_full(), directory.to_owned(), place.clone());
    let keep = move || (kept::keep(&snapshot.config, &directory, &place, &mut opened), opened);
    match tokio::task::spawn_blocking(keep).await {
        Ok((Ok(()), opened)) => opened,
        Ok((Err(why), opened)) => {
            tracing::warn!(
                why,
                "the accepted configuration is not kept, nor an older one: a start with a broken directory will fail"
            );
            opened
        }
        Err(_) => Opened::default(),
    }
}

fn addresses(config: &Config) -> BTreeSet<std::net::SocketAddr> {
    config.listeners.iter().map(|listener| listener.address).collect()
}

/// Notes what was refused. What was told already is told again only to somebody who asks.
fn reject(shared: &Shared, rejected: &Rejected, by_hand: bool) {
    let known = shared.config_state.lock().rejected.replace(rejected.clone());
    if known.as_ref() == Some(rejected) && !by_hand {
        return;
    }
    tell(rejected);
}

pub(crate) fn tell(rejected: &Rejected) {
    for problem in &rejected.problems {
        tracing::error!(file = %problem.file.display(), line = problem.line, column = problem.column,
            reason = problem.message, rejected = %rejected.revision, "configuration rejected; the old one stays in force");
    }
}

/// What is watched.
struct Watched {
    changed: Arc<Notify>,
    directory: PathBuf,
    watcher: Option<RecommendedWatcher>,
    seen: Seen,
}

/// What a watch depends on.
#[derive(Debug, Default, PartialEq)]
struct Seen {
    /// Which directories they are: another of the same name is another, and may have the number of the one that is gone.
    directories: BTreeMap<PathBuf, Option<(u64, u64, Option<SystemTime>)>>,
    files: BTreeSet<PathBuf>,
}

impl Watched {
    fn new(changed: Arc<Notify>, directory: PathBuf) -> Watched {
        Watched { changed, directory, watcher: None, seen: Seen::default() }
    }

    /// Watches what this configuration depends on, and the files that a newer state of it names, and no more. Whether
    /// something may have changed that was not watched.
    ///
    /// All is watched anew if anything of it is another: with a directory that goes, the watcher forgets what is named by a
    /// path through it, and two paths to one directory as soon as one of them goes.
    fn follow(&mut self, config: &Config, named: &BTreeSet<PathBuf>) -> notify::Result<bool> {
        let identity = |path: &Path| {
            let metadata = std::fs::metadata(path).ok()?;
            Some((metadata.dev(), metadata.ino(), metadata.created().ok()))
        };
        let directories = config.watched(&self.directory, named).into_iter();
        let wanted = Seen {
            directories: directories.map(|path| (path.clone(), identity(&path))).collect(),
            files: config.files.iter().chain(named).map(|file| config::lexical(file)).collect(),
        };
        if wanted == self.seen {
            return Ok(false);
        }
        let directory = config::lexical(&self.directory);
        // The parent is watched for the directory's own replacement, and for files that lie there: whatever else changes there
        // is not ours.
        let parent = directory.parent().map(Path::to_owned).unwrap_or_default();
        let (files, changed) = (wanted.files.clone(), Arc::clone(&self.changed));
        let ours = move |path: &PathBuf| {
            let path = config::lexical(path);
            path.parent() != Some(&parent) || path == directory || files.contains(&path)
        };
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Reading is no change; an overflow or an error may hide one.
            if event
                .is_ok_and(|event| !matters(event.kind) || !(event.paths.is_empty() || event.paths.iter().any(&ours)))
            {
                return;
            }
            changed.notify_one();
        })?;
        for path in wanted.directories.keys() {
            if let Err(error) = watcher.watch(path, RecursiveMode::NonRecursive) {
                tracing::warn!(directory = %path.display(), %error, "not watched; SIGHUP makes the gateway read changes there");
            }
        }
        // The old one only now, so that there is always one that watches.
        self.watcher = Some(watcher);
        self.seen = wanted;
        Ok(true)
    }
}

fn matters(kind: EventKind) -> bool {
    match kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) => true,
        EventKind::Access(_) => false,
        _ => true,
    }
}
