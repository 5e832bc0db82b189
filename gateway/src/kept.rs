//! The last accepted state of the configuration, kept beside its directory: a start with a broken directory comes up on it,
//! so that a bad push and a restart together are no outage.
//!
//! `conf/` is kept as `.conf.accepted/`. Beside it, not elsewhere, because files name others by paths relative to
//! themselves; what they name outside of the directory is not copied.

use std::path::{Path, PathBuf};

use crate::config::{self, Config, Opened, Rejected};

fn beside(directory: &Path, suffix: &str) -> Option<PathBuf> {
    let name = directory.file_name()?.to_str()?;
    Some(directory.with_file_name(format!(".{name}.{suffix}")))
}

/// Keeps a configuration that is in force, unless it is kept already.
///
/// # Errors
/// Why it could not be kept, for the log.
pub(crate) fn keep(config: &Config, directory: &Path, opened: &mut Opened) -> Result<(), String> {
    let place = |suffix| beside(directory, suffix).ok_or("the directory has no name".to_owned());
    let (kept, new, old) = (place("accepted")?, place("accepting")?, place("accepted.old")?);
    let told = |error: std::io::Error| format!("{}: {error}", kept.display());
    remove(&new).map_err(told)?;
    config::copy(config, directory, &new).map_err(told)?;
    // Read as a start would read it: the directory may have changed since, and a path may mean another file there.
    let read = config::load(&new, opened).map_err(|rejected| {
        let first = rejected.problems.first().map(ToString::to_string).unwrap_or_default();
        format!("a copy of it does not hold: {first}")
    })?;
    if read.revision != config.revision {
        // A newer state is being written; its own turn comes.
        return remove(&new).map_err(told);
    }
    remove(&old).map_err(told)?;
    if kept.exists() {
        std::fs::rename(&kept, &old).map_err(told)?;
    }
    std::fs::rename(&new, &kept).map_err(told)?;
    remove(&old).map_err(told)
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
pub(crate) fn start(directory: &Path, opened: &mut Opened) -> Result<(Config, Option<Rejected>), Rejected> {
    let rejected = match config::load(directory, opened) {
        Ok(config) => return Ok((config, None)),
        Err(rejected) => rejected,
    };
    // The second is there if the process ended between two renames.
    for suffix in ["accepted", "accepted.old"] {
        let kept = beside(directory, suffix).filter(|kept| kept.is_dir());
        if let Some(Ok(config)) = kept.map(|kept| config::load(&kept, opened)) {
            return Ok((config, Some(rejected)));
        }
    }
    Err(rejected)
}
