//! Loading and unloading at run time, whatever protocol asks: behind the operator's key, never with a tenant's.

use std::sync::Arc;

use axum::http::StatusCode;
use sha2::{Digest, Sha256};

use crate::app::State;
use crate::error::{Dialect, Error};
use crate::repository::Entry;

/// The operator's key, as its digest: equal time to compare, and nothing to read out of memory.
pub(crate) struct OperatorKey([u8; 32]);

impl OperatorKey {
    /// Reads it from a file: its first line.
    ///
    /// # Errors
    /// The file cannot be read, or is too short for a key.
    pub(crate) fn read(path: &std::path::Path) -> Result<OperatorKey, String> {
        let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
        match text.lines().next().map(str::trim).filter(|key| key.len() >= 16) {
            Some(key) => Ok(OperatorKey(Sha256::digest(key).into())),
            None => Err(format!("{}: an operator's key has at least 16 characters", path.display())),
        }
    }
}

/// What is to be done with a model.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Change {
    Load,
    Unload,
}

/// Loads or unloads a model.
///
/// # Errors
/// The key is not the operator's, a parameter is not known here, or the model cannot be loaded or unloaded.
pub(crate) async fn change(
    state: &Arc<State>,
    what: Change,
    model: String,
    authorization: Option<&[u8]>,
    parameters: impl Iterator<Item = &str>,
) -> Result<(), Error> {
    permitted(state, authorization)?;
    for parameter in parameters {
        // Whether others go with it: models here depend on none.
        if parameter != "unload_dependents" {
            let message = format!("parameter `{parameter:.100}`: a model is loaded as its directory has it");
            return Err(Error::wrong(Dialect::Oip, message));
        }
    }
    let state = Arc::clone(state);
    let changed = move || match what {
        Change::Load => state.repository.load(&model),
        Change::Unload => state.repository.unload(&model),
    };
    let changed = tokio::task::spawn_blocking(changed).await;
    changed.map_err(|_| Error::internal("it failed; the worker's log says why"))?.map_err(Error::from)
}

fn permitted(state: &State, authorization: Option<&[u8]>) -> Result<(), Error> {
    let Some(OperatorKey(wanted)) = &state.operator else {
        let message = "models are not changed here: the worker was started without --operator-key";
        return Err(Error::new(StatusCode::FORBIDDEN, Dialect::Oip, message));
    };
    let key = authorization.and_then(|value| value.strip_prefix(b"Bearer "));
    // Digests: how far they agree tells nothing of the key.
    match key.map(|key| <[u8; 32]>::from(Sha256::digest(key))) {
        Some(digest) if digest == *wanted => Ok(()),
        Some(_) => Err(Error::new(StatusCode::FORBIDDEN, Dialect::Oip, "this is not the operator's key")),
        None => {
            let message = "the operator's key is needed: Authorization: Bearer KEY";
            Err(Error::new(StatusCode::UNAUTHORIZED, Dialect::Oip, message))
        }
    }
}

/// The models that there are, or the ready ones of them.
///
/// # Errors
/// The thread that reads the directory failed.
///
/// Why one is not ready may name files and a library's words, so only the operator is told.
pub(crate) async fn entries(
    state: &Arc<State>,
    ready: bool,
    authorization: Option<&[u8]>,
) -> Result<Vec<Entry>, Error> {
    let told = permitted(state, authorization).is_ok();
    let state = Arc::clone(state);
    let entries = tokio::task::spawn_blocking(move || state.repository.index()).await;
    let mut entries = entries.map_err(|_| Error::internal("the models could not be listed"))?;
    entries.retain(|entry| entry.ready || !ready);
    for entry in entries.iter_mut().filter(|entry| !told && !entry.reason.is_empty()) {
        entry.reason = "the operator's key shows the reason".to_owned();
    }
    Ok(entries)
}
