//! The models of a directory: loaded, replaced and unloaded while others are served.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use arc_swap::ArcSwap;
use axum::http::HeaderValue;
use parking_lot::Mutex;

use crate::batch::Policy;
use crate::model::{self, Found, Problem};
use crate::runner::{Bounds, Runner};
use crate::runtime::processor::give_memory_back;
use crate::runtime::torch::{self, Placed};
use crate::text::Tokenizer;

/// How models are loaded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Options {
    /// Requests that may wait for a model.
    pub(crate) queue: usize,
    /// Threads within one operation, where `model.toml` does not say.
    pub(crate) threads: usize,
    /// Where models compute.
    pub(crate) placed: Placed,
}

/// A model that can compute.
pub(crate) struct Loaded {
    pub(crate) found: Found,
    pub(crate) tokenizer: Option<Tokenizer>,
    pub(crate) runner: Runner,
    pub(crate) version_header: HeaderValue,
    pub(crate) digest_header: HeaderValue,
}

/// By name, then by version.
pub(crate) type Models = BTreeMap<String, BTreeMap<u64, Arc<Loaded>>>;

/// Why a model was not loaded or unloaded.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// There is no such model.
    Unknown(String),
    /// Its files are wrong; what was served before is served still.
    Bad(String),
}

/// A line of the index.
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) ready: bool,
    /// Why it is not, or what is wrong with its files now.
    pub(crate) reason: String,
}

/// The models that are served, and the directory that they come from.
pub(crate) struct Repository {
    directory: PathBuf,
    options: Options,
    models: ArcSwap<Models>,
    /// Held while models are loaded or unloaded: one after the other.
    changing: Mutex<()>,
    /// Why a model is not served, or the last attempt to load it failed.
    reasons: Mutex<BTreeMap<String, String>>,
}

impl Repository {
    /// Loads every version of every model.
    ///
    /// # Errors
    /// All problems at once: a worker that lacks a model would be sent its requests all the same.
    pub(crate) fn open(directory: PathBuf, options: Options) -> Result<Repository, Vec<String>> {
        let lines = |problems: Vec<Problem>| problems.iter().map(ToString::to_string).collect::<Vec<_>>();
        let found = model::scan(&directory).map_err(lines)?;
        let repository = Repository {
            directory,
            options,
            models: ArcSwap::from_pointee(Models::new()),
            changing: Mutex::new(()),
            reasons: Mutex::new(BTreeMap::new()),
        };
        let (mut models, mut problems) = (Models::new(), Vec::new());
        for found in found {
            match repository.start(found) {
                Ok((version, loaded)) => {
                    models.entry(loaded.found.name.clone()).or_default().insert(version, loaded);
                }
                Err(error) => problems.push(error),
            }
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        repository.models.store(Arc::new(models));
        Ok(repository)
    }

    /// What is served now.
    pub(crate) fn models(&self) -> Arc<Models> {
        self.models.load_full()
    }

    /// A model by name and version, the newest where no version is asked for.
    pub(crate) fn model(&self, name: &str, version: Option<&str>) -> Option<Arc<Loaded>> {
        let models = self.models.load();
        let versions = models.get(name)?;
        match version {
            // Its name as the directory has it: neither 01 nor +1.
            Some(version) => versions.values().find(|loaded| loaded.found.version == version).cloned(),
            None => versions.last_key_value().map(|(_, loaded)| Arc::clone(loaded)),
        }
    }

    /// Loads every version of a model that is new or has changed, and then takes the place of what was served before, in
    /// one step. Blocks.
    ///
    /// # Errors
    /// There is no such model, or a version does not load: then nothing has changed.
    pub(crate) fn load(&self, name: &str) -> Result<(), Refused> {
        let _changing = self.changing.lock();
        // A name out of a request must not lead out of the directory.
        if !model::names(&self.directory).is_ok_and(|names| names.iter().any(|known| known == name)) {
            return Err(Refused::Unknown(format!("there is no model `{name}` in the model directory")));
        }
        let served = self.models().get(name).cloned().unwrap_or_default();
        let load = || -> Result<BTreeMap<u64, Arc<Loaded>>, String> {
            let found = model::versions(&self.directory, name)
                .map_err(|problems| problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))?;
            let mut versions = BTreeMap::new();
            for found in found {
                let same = |known: &Found| {
                    (&known.version, &known.digest, &known.settings) == (&found.version, &found.digest, &found.settings)
                };
                let known = served.values().find(|known| same(&known.found));
                let (version, loaded) = match known {
                    Some(known) => (found.version.parse().unwrap_or_default(), Arc::clone(known)),
                    None => self.start(found)?,
                };
                versions.insert(version, loaded);
            }
            Ok(versions)
        };
        let loaded = load();
        // Whoever holds on to the old ones keeps them from ending.
        drop(served);
        match loaded {
            Ok(versions) => {
                self.reasons.lock().remove(name);
                self.replace(name, Some(versions));
                Ok(())
            }
            Err(reason) => {
                tracing::error!(model = name, reason, "model not loaded; what was served before is served still");
                self.reasons.lock().insert(name.to_owned(), reason.clone());
                Err(Refused::Bad(reason))
            }
        }
    }

    /// Stops serving a model. Requests that it has already are answered; then its memory is free. Blocks, up to a while,
    /// until that is so.
    ///
    /// # Errors
    /// It is not served.
    pub(crate) fn unload(&self, name: &str) -> Result<(), Refused> {
        let _changing = self.changing.lock();
        if !self.models().contains_key(name) {
            return Err(Refused::Unknown(format!("the model `{name}` is not loaded")));
        }
        self.reasons.lock().insert(name.to_owned(), "unloaded".to_owned());
        self.replace(name, None);
        Ok(())
    }

    /// Unloads everything, before the process ends: what libtorch holds must be gone when its own end comes. Blocks.
    pub(crate) fn close(&self) {
        let _changing = self.changing.lock();
        for name in self.models().keys() {
            self.replace(name, None);
        }
    }

    fn replace(&self, name: &str, versions: Option<BTreeMap<u64, Arc<Loaded>>>) {
        let before = self.models();
        let mut models = Models::clone(&before);
        let old = models.remove(name).unwrap_or_default();
        if let Some(versions) = versions {
            models.insert(name.to_owned(), versions);
        }
        let kept = models.get(name).cloned().unwrap_or_default();
        self.models.store(Arc::new(models));
        drop(before);
        for (version, loaded) in old {
            if !kept.get(&version).is_some_and(|kept| Arc::ptr_eq(kept, &loaded)) {
                tracing::info!(model = name, version, digest = loaded.found.digest, "model unloaded");
                wait_for_the_last(loaded);
            }
        }
        give_memory_back();
    }

    /// Everything in the directory and everything that is served.
    pub(crate) fn index(&self) -> Vec<Entry> {
        let models = self.models();
        let reasons = self.reasons.lock();
        let mut entries = Vec::new();
        for (name, versions) in &*models {
            for loaded in versions.values() {
                let reason = reasons.get(name).cloned().unwrap_or_default();
                entries.push(Entry { name: name.clone(), version: loaded.found.version.clone(), ready: true, reason });
            }
        }
        for name in model::names(&self.directory).unwrap_or_default() {
            if !models.contains_key(&name) {
                let reason = reasons.get(&name).cloned().unwrap_or_else(|| "not loaded".to_owned());
                entries.push(Entry { name, version: String::new(), ready: false, reason });
            }
        }
        entries
    }

    fn start(&self, found: Found) -> Result<(u64, Arc<Loaded>), String> {
        let place = found.directory.display().to_string();
        let told = |error: String| format!("{place}: {error}");
        let loaded = load(found, self.options).map_err(told)?;
        let (model, version, digest) = (&loaded.found.name, &loaded.found.version, &loaded.found.digest);
        tracing::info!(model, version, digest, precision = loaded.found.spec.precision.name(), "model loaded");
        Ok((version.parse().unwrap_or_default(), Arc::new(loaded)))
    }
}

/// Waits until a model that is no longer served has answered what it had, and its threads have given their memory back.
/// Bounded: one that computes for longer gives it back later.
fn wait_for_the_last(loaded: Arc<Loaded>) {
    const STEP: Duration = Duration::from_millis(10);
    let mut waiting = Some(loaded);
    let mut threads = Vec::new();
    for _ in 0..500 {
        if let Some(loaded) = waiting.take() {
            match Arc::try_unwrap(loaded) {
                Ok(loaded) => threads = loaded.runner.stop(),
                Err(still) => waiting = Some(still),
            }
        }
        if waiting.is_none() && threads.iter().all(JoinHandle::is_finished) {
            return;
        }
        std::thread::sleep(STEP);
    }
}

/// Loads a model and its tokenizer.
///
/// # Errors
/// What is wrong with its files.
pub(crate) fn load(found: Found, options: Options) -> Result<Loaded, String> {
    let tokenizer = Tokenizer::of(&found)?;
    let header = |text: &str| HeaderValue::try_from(text).map_err(|error| error.to_string());
    let (version_header, digest_header) = (header(&found.version)?, header(&found.digest)?);
    let batching = found.spec.batching();
    let bounds = Bounds {
        queue: options.queue,
        instances: found.spec.instances,
        batch: Policy {
            rows_max: batching.max_batch_size,
            cost_max: if tokenizer.is_some() { batching.max_batch_tokens } else { usize::MAX },
            delay: batching.max_queue_delay,
        },
    };
    let model = found.clone();
    let runner = Runner::start(&found.name, bounds, move || torch::load(&model, options.threads, options.placed))?;
    Ok(Loaded { found, tokenizer, runner, version_header, digest_header })
}
