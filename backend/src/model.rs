//! What a model directory holds: `NAME/VERSION/model.{pt,safetensors}` with a `model.toml` beside it.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::tensor::Datatype;

/// `model.toml`: what the model takes and gives. The worker refuses a request that does not match.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Spec {
    /// How the files are to be read.
    pub(crate) kind: Kind,
    /// Equal inputs give equal outputs, so that answers may be cached.
    #[serde(default)]
    pub(crate) deterministic: bool,
    /// Sentence encoders: longer texts are cut to this, special tokens included.
    pub(crate) max_tokens: Option<usize>,
    /// TorchScript: a method without arguments to be called before each request, for modules that keep state.
    pub(crate) before_each: Option<String>,
    /// In the order of the module's arguments.
    pub(crate) inputs: Vec<TensorSpec>,
    /// In the order of what it returns.
    pub(crate) outputs: Vec<TensorSpec>,
}

/// How a model's files are to be read.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kind {
    /// `model.safetensors`, `config.json` and `tokenizer.json` of a BERT-like encoder, mean-pooled to unit length.
    SentenceEncoder,
    /// `model.pt`, any TorchScript module.
    Torchscript,
}

/// One input or output.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TensorSpec {
    /// Its name in requests.
    pub(crate) name: String,
    /// Its datatype.
    pub(crate) datatype: Datatype,
    /// Sizes; -1 is any.
    pub(crate) shape: Vec<i64>,
    /// TorchScript: the module takes a plain number here, not a tensor.
    #[serde(default)]
    pub(crate) scalar: bool,
}

/// A model on disk.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    /// Its name: the directory's.
    pub(crate) name: String,
    /// Its version: the directory's below.
    pub(crate) version: String,
    /// Where its files are.
    pub(crate) directory: PathBuf,
    /// What it says of itself.
    pub(crate) spec: Spec,
    /// SHA-256 over the files that decide what it computes: two models with equal digests give equal vectors.
    pub(crate) digest: String,
}

/// A model directory that cannot be served.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Problem {
    /// The file or directory.
    pub(crate) file: PathBuf,
    /// Line and column from 1, where there are such.
    pub(crate) place: Option<(usize, usize)>,
    /// What is wrong, and what to do.
    pub(crate) message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.file.display())?;
        if let Some((line, column)) = self.place {
            write!(f, "{line}:{column}:")?;
        }
        write!(f, " {}", self.message)
    }
}

fn problem(file: &Path, message: impl Into<String>) -> Problem {
    Problem { file: file.to_owned(), place: None, message: message.into() }
}

/// Finds every version of every model below `directory`.
///
/// # Errors
/// All problems at once.
pub(crate) fn scan(directory: &Path) -> Result<Vec<Found>, Vec<Problem>> {
    let mut found = Vec::new();
    let mut problems = Vec::new();
    for name in subdirectories(directory).map_err(|problem| vec![problem])? {
        match subdirectories(&directory.join(&name)) {
            Ok(versions) => {
                if versions.is_empty() {
                    problems.push(problem(&directory.join(&name), "no version: the model's files belong into NAME/1/"));
                }
                for version in versions {
                    match read(&name, &version, directory.join(&name).join(&version)) {
                        Ok(model) => found.push(model),
                        Err(problem) => problems.push(problem),
                    }
                }
            }
            Err(problem) => problems.push(problem),
        }
    }
    if found.is_empty() && problems.is_empty() {
        problems.push(problem(directory, "there is no model here: NAME/VERSION/model.toml is expected"));
    }
    if problems.is_empty() { Ok(found) } else { Err(problems) }
}

fn subdirectories(directory: &Path) -> Result<Vec<String>, Problem> {
    let entries = std::fs::read_dir(directory).map_err(|error| problem(directory, error.to_string()))?;
    let mut names: Vec<String> = entries
        .filter_map(Result::ok)
        .filter(|entry| entry.path().is_dir())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| !name.starts_with('.'))
        .collect();
    names.sort();
    Ok(names)
}

fn read(name: &str, version: &str, directory: PathBuf) -> Result<Found, Problem> {
    // `01` and `1` would be one version with two contents.
    if version.parse::<u64>().map(|number| number.to_string()).as_deref() != Ok(version) {
        return Err(problem(&directory, "a version is a plain number: 1, 2, …"));
    }
    let file = directory.join("model.toml");
    let text = std::fs::read_to_string(&file).map_err(|error| problem(&file, error.to_string()))?;
    let spec: Spec = toml::from_str(&text).map_err(|error| {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or("");
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        Problem {
            file: file.clone(),
            place: Some((before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)),
            message: error.message().to_owned(),
        }
    })?;
    check(&spec).map_err(|message| problem(&file, message))?;
    let digest = digest(&directory, spec.kind)?;
    Ok(Found { name: name.into(), version: version.into(), directory, spec, digest })
}

fn check(spec: &Spec) -> Result<(), String> {
    if spec.inputs.is_empty() || spec.outputs.is_empty() {
        return Err("a model has at least one [[inputs]] and one [[outputs]]".into());
    }
    if spec.inputs.iter().chain(&spec.outputs).any(|tensor| tensor.shape.iter().any(|&size| size < -1)) {
        return Err("a size is -1 (any), 0 or more".into());
    }
    match spec.kind {
        Kind::SentenceEncoder => {
            if spec.inputs.len() != 1 || spec.inputs[0].datatype != Datatype::Bytes || spec.outputs.len() != 1 {
                return Err("a sentence-encoder has one BYTES input and one output".into());
            }
            if spec.max_tokens.is_none_or(|most| most < 3) {
                return Err("a sentence-encoder needs max_tokens, at least 3".into());
            }
        }
        Kind::Torchscript => {
            if spec.inputs.iter().any(|input| input.datatype == Datatype::Bytes) {
                return Err("a TorchScript module takes no BYTES".into());
            }
            if spec.inputs.iter().any(|input| input.scalar && input.datatype != Datatype::Int64) {
                return Err("a scalar input is INT64".into());
            }
        }
    }
    Ok(())
}

fn digest(directory: &Path, kind: Kind) -> Result<String, Problem> {
    let files: &[&str] = match kind {
        Kind::SentenceEncoder => &["model.safetensors", "config.json", "tokenizer.json", "model.toml"],
        Kind::Torchscript => &["model.pt", "model.toml"],
    };
    let mut digest = Sha256::new();
    for name in files {
        let path = directory.join(name);
        let bytes = std::fs::read(&path).map_err(|error| problem(&path, error.to_string()))?;
        digest.update(Sha256::digest(bytes));
    }
    Ok(digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
