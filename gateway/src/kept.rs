//! The last accepted state of the configuration, kept beside its directory: a start with a broken directory comes up on it,
//! so that a bad push and a restart together are no outage.
//!
//! `conf/` is kept as `.conf.accepted/`. Beside it, unless the operator names another place, because files name others by
//! paths relative to themselves; what they name outside of the directory is not copied.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::config::{self, Config, Opened, Rejected};

/// Where a directory is kept.
#[derive(Clone, Debug)]
pub(crate) struct Place(PathBuf);

impl Place {
    /// Beside the directory, or in `state`.
    pub(crate) fn of(directory: &Path, state: Option<&Path>) -> Place {
        Place(match (state, directory.file_name().and_then(|name| name.to_str())) {
            // Another directory of the same name is another's.
            (Some(state), Some(name)) => {
                let digest = Sha256::digest(directory.as_os_str().as_encoded_bytes());
                let digits: String = digest[..4].iter().map(|byte| format!("{byte:02x}")).collect();
                state.join(format!("{name}-{digits}"))
            }
            _ => directory.to_owned(),
        })
    }

    /// The socket at which a successor asks.
    pub(crate) fn socket(&self) -> PathBuf {
        self.with("sockets").unwrap_or_default()
    }

    fn with(&self, suffix: &str) -> Option<PathBuf> {
        let name = self.0.file_name()?.to_str()?;
        Some(self.0.with_file_name(format!(".{name}.{suffix}")))
    }
}

/// Keeps a configuration that is in force. If that fails nothing is kept: an older one would be served as the last, with
/// the keys and the rules that it had.
///
/// # Errors
/// Why it could not be kept, for the log.
pub(crate) fn keep(config: &Config, directory: &Path, place: &Place, opened: &mut Opened) -> Result<(), String> {
    let place = |suffix| place.with(suffix).ok_or("the directory has no name".to_owned());
    let [kept, old] = [place("accepted")?, place("accepted.old")?];
    // Of this process: another gateway may serve the same directory.
    let own = format!("accepting.{}", std::process::id());
    let new = place(&own)?;
    // One at a time: a process that drains and its successor see the same changes.
    let lock = std::fs::File::create(place("accepting.lock")?).map_err(|error| error.to_string())?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).map_err(|error| error.to_string())?;
    let done = replace(config, directory, opened, (&kept, &new, &old));
    if done.is_err() {
        for place in [&new, &kept, &old] {
            // What cannot be removed could not be written either.
            let _ = remove(place);
        }
    }
    done
}

fn replace(
    config: &Config,
    directory: &Path,
    opened: &mut Opened,
    (kept, new, old): (&Path, &Path, &Path),
) -> Result<(), String> {
    let told = |error: std::io::Error| format!("{}: {error}", kept.display());
    remove(new).map_err(told)?;
    config::copy(config, directory, new).map_err(told)?;
    // Read as a start would read it: the directory may have changed since, and a path may mean another file there.
    let read = config::load(new, opened).map_err(|rejected| {
        let first = rejected.problems.first().map(ToString::to_string).unwrap_or_default();
        format!("a copy of it does not hold: {first}")
    })?;
    if read.revision != config.revision {
        return Err("it has changed again, or names other files from beside its place".to_owned());
    }
    remove(old).map_err(told)?;
    if kept.exists() {
        std::fs::rename(kept, old).map_err(told)?;
    }
    std::fs::rename(new, kept).map_err(told)?;
    remove(old).map_err(told)
}

/// What was kept of a directory, if it still holds.
pub(crate) fn kept(place: &Place, opened: &mut Opened) -> Option<(PathBuf, Config)> {
    // The second is there if the process ended between two renames.
    ["accepted", "accepted.old"].into_iter().find_map(|suffix| {
        let kept = place.with(suffix).filter(|kept| kept.is_dir())?;
        Some((kept.clone(), config::load_expired(&kept, opened).ok()?))
    })
}

fn remove(directory: &Path) -> std::io::Result<()> {
    match std::fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// What a start serves: the directory, or if that is broken what was accepted last, with what is wrong.
///
/// # Errors
/// The directory is broken, and nothing was kept that still holds.
pub(crate) fn start(
    directory: &Path,
    place: &Place,
    opened: &mut Opened,
) -> Result<(Config, Option<Rejected>), Rejected> {
    // A certificate that has expired is no reason not to start: whoever restarts would be worse off than before.
    let rejected = match config::load_expired(directory, opened) {
        Ok(config) => return Ok((config, None)),
        Err(rejected) => rejected,
    };
    match kept(place, opened) {
        Some((_, config)) => Ok((config, Some(rejected))),
        None => Err(rejected),
    }
}
