//! One configuration takes another's place in one step: a gateway that watches sees the old one or the new one, never a
//! half, as a checkout in place would show it.

use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use crate::config::{self, Opened};
use crate::{kept, reload};

/// What was done.
#[derive(Debug)]
pub enum Applied {
    /// It was in place already.
    Nothing,
    /// It is in place, where nothing was before.
    New,
    /// It is in place; what was there before is kept here.
    Replaced(PathBuf),
}

/// Copies `new` beside `directory`, reads the copy as a gateway would, and exchanges the two.
///
/// # Errors
/// The problems of the new configuration, at its own place or at the other's, or what the file system refused, each in a
/// line. Then nothing has changed.
pub fn apply(new: &Path, directory: &Path) -> Result<Applied, Vec<String>> {
    let lines = |rejected: config::Rejected| rejected.problems.iter().map(ToString::to_string).collect::<Vec<_>>();
    let told = |place: &Path, error: &dyn std::fmt::Display| vec![format!("{}: {error}", place.display())];
    let absolute = |path: &Path| std::path::absolute(path).map_err(|error| told(path, &error));
    let (new, directory) = (absolute(new)?, absolute(directory)?);
    // What stands first: a certificate that has expired there may stay.
    let opened = &mut Opened::default();
    let now = config::load_expired(&directory, opened);
    let wanted = config::load(&new, opened).map_err(lines)?;
    if let Ok(now) = now {
        if now.revision == wanted.revision {
            return Ok(Applied::Nothing);
        }
        // A gateway would refuse it, and serve on what is no longer there.
        reload::small_enough(&now, &wanted, &new).map_err(lines)?;
    }
    if directory.is_symlink() {
        return Err(told(&directory, &"it is a link; check the new directory and point the link there"));
    }
    let name =
        directory.file_name().and_then(|name| name.to_str()).ok_or_else(|| told(&directory, &"it has no name"))?;
    let beside = |word: String| directory.with_file_name(format!(".{name}.{word}"));
    let ready = beside(format!("applying.{}", std::process::id()));
    match std::fs::remove_dir_all(&ready) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(told(&ready, &error)),
        _ => {}
    }
    config::copy(&wanted, &new, &ready).map_err(|error| told(&ready, &error))?;
    // Paths in it are relative: they mean other files here, and must mean equal ones.
    let there = config::load(&ready, opened).map_err(lines)?;
    if there.revision != wanted.revision {
        return Err(told(
            &new,
            &"what its files name is not the same from the other place; write those paths absolute",
        ));
    }
    if !directory.exists() {
        std::fs::rename(&ready, &directory).map_err(|error| told(&directory, &error))?;
        return Ok(Applied::New);
    }
    renameat_with(CWD, &ready, CWD, &directory, RenameFlags::EXCHANGE).map_err(|error| told(&directory, &error))?;
    // Never over another, and never removed: more may lie there than a configuration.
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let replaced = beside(format!("replaced.{}", now.as_millis()));
    match std::fs::rename(&ready, &replaced) {
        Ok(()) => Ok(Applied::Replaced(replaced)),
        Err(_) => Ok(Applied::Replaced(ready)),
    }
}

/// What a new configuration is compared with: the directory, or where that is broken what was accepted last.
pub fn standing(directory: &Path) -> Option<PathBuf> {
    let directory = std::path::absolute(directory).ok()?;
    let opened = &mut Opened::default();
    let whole = config::load_expired(&directory, opened).is_ok();
    if whole { Some(directory) } else { kept::kept(&kept::Place::of(&directory, None), opened).map(|(kept, _)| kept) }
}
