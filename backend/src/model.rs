//! What a model directory holds: `NAME/VERSION/model.{pt,safetensors}` with a `model.toml` beside it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::tensor::{Datatype, element_count};

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
    /// Sentence encoders: the numbers that are computed with.
    #[serde(default)]
    pub(crate) precision: Precision,
    /// How many copies of the model compute at once, each on its own thread.
    #[serde(default = "one")]
    pub(crate) instances: usize,
    /// Threads within one operation of an instance; the worker's `--threads` if it is not said.
    pub(crate) threads: Option<usize>,
    /// What is computed together; one request at a time if it is not said, but for sentence encoders.
    #[serde(default)]
    pub(crate) batching: Option<Batching>,
    /// Shapes for which each instance computes once before it serves, so that no client pays for a first pass.
    #[serde(default)]
    pub(crate) warm_up: Vec<WarmUp>,
    /// In the order of the module's arguments.
    pub(crate) inputs: Vec<TensorSpec>,
    /// In the order of what it returns.
    pub(crate) outputs: Vec<TensorSpec>,
}

fn one() -> usize {
    1
}

/// `[batching]`
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub(crate) struct Batching {
    /// Rows that are computed together at most; 1 turns batching off. TorchScript: sizes along the first dimension.
    pub(crate) max_batch_size: usize,
    /// How long the first request of a batch waits for others. What waits already goes along without that.
    #[serde(default, deserialize_with = "duration")]
    pub(crate) max_queue_delay: Duration,
    /// Sentence encoders: tokens that are computed together at most, so that no short text waits behind many long ones.
    #[serde(default = "tokens_together")]
    pub(crate) max_batch_tokens: usize,
}

/// Beyond about two thousand tokens a CPU computes no faster for each; then they only wait for each other.
fn tokens_together() -> usize {
    2048
}

fn duration<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    let longest = Duration::from_secs(60);
    match humantime::parse_duration(&text) {
        Ok(duration) if duration <= longest => Ok(duration),
        Ok(_) => Err(serde::de::Error::custom("it is longer than 60s")),
        Err(error) => Err(serde::de::Error::custom(format!("{error}; a duration is written \"5ms\""))),
    }
}

/// `[[warm_up]]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct WarmUp {
    /// TorchScript: one shape for each input. Sentence encoders: one, of rows and tokens.
    pub(crate) shapes: Vec<Vec<i64>>,
}

/// What a sentence encoder computes with.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Precision {
    /// As published.
    #[default]
    F32,
    /// Weights and activations in bfloat16: about twice as fast where the processor has it, cosine > 0.999 to f32.
    Bf16,
}

impl Precision {
    /// The word for it in `model.toml` and metadata.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
        }
    }
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

impl Spec {
    /// What is computed together.
    pub(crate) fn batching(&self) -> Batching {
        let together = if self.kind == Kind::SentenceEncoder { 32 } else { 1 };
        let default =
            Batching { max_batch_size: together, max_queue_delay: Duration::ZERO, max_batch_tokens: tokens_together() };
        self.batching.unwrap_or(default)
    }
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
    /// SHA-256 over what decides its answers, weights, tokenizer and precision among it: two models with equal digests
    /// give equal vectors.
    pub(crate) digest: String,
    /// SHA-256 of `model.toml` as it is: how it is served may change without what it answers.
    pub(crate) settings: String,
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
    for name in names(directory).map_err(|problem| vec![problem])? {
        match versions(directory, &name) {
            Ok(models) => found.extend(models),
            Err(more) => problems.extend(more),
        }
    }
    if found.is_empty() && problems.is_empty() {
        problems.push(problem(directory, "there is no model here: NAME/VERSION/model.toml is expected"));
    }
    if problems.is_empty() { Ok(found) } else { Err(problems) }
}

/// The names of the models below `directory`.
///
/// # Errors
/// It cannot be read.
pub(crate) fn names(directory: &Path) -> Result<Vec<String>, Problem> {
    subdirectories(directory)
}

/// Every version of one model.
///
/// # Errors
/// All problems at once.
pub(crate) fn versions(directory: &Path, name: &str) -> Result<Vec<Found>, Vec<Problem>> {
    let home = directory.join(name);
    let versions = subdirectories(&home).map_err(|problem| vec![problem])?;
    if versions.is_empty() {
        return Err(vec![problem(&home, "no version: the model's files belong into NAME/1/")]);
    }
    let (found, problems): (Vec<_>, Vec<_>) =
        versions.iter().map(|version| read(name, version, home.join(version))).partition(Result::is_ok);
    let problems: Vec<Problem> = problems.into_iter().filter_map(Result::err).collect();
    if problems.is_empty() { Ok(found.into_iter().filter_map(Result::ok).collect()) } else { Err(problems) }
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
    let digest = digest(&directory, &spec)?;
    let settings = hex(&Sha256::digest(&text));
    Ok(Found { name: name.into(), version: version.into(), directory, spec, digest, settings })
}

fn check(spec: &Spec) -> Result<(), String> {
    if spec.inputs.is_empty() || spec.outputs.is_empty() {
        return Err("a model has at least one [[inputs]] and one [[outputs]]".into());
    }
    if spec.inputs.iter().chain(&spec.outputs).any(|tensor| tensor.shape.iter().any(|&size| size < -1)) {
        return Err("a size is -1 (any), 0 or more".into());
    }
    if !(1..=64).contains(&spec.instances) || spec.threads.is_some_and(|threads| !(1..=256).contains(&threads)) {
        return Err("instances are from 1 to 64, threads from 1 to 256".into());
    }
    let batching = spec.batching();
    if batching.max_batch_size == 0 || batching.max_batch_tokens == 0 {
        return Err("[batching]: max_batch_size and max_batch_tokens are at least 1; 1 turns batching off".into());
    }
    for (at, warm_up) in spec.warm_up.iter().enumerate() {
        // What it fills is computed, and must fit into memory.
        if warm_up.shapes.iter().any(|shape| element_count(shape).is_none_or(|count| count > 1 << 26)) {
            return Err(format!("[[warm_up]] {}: a shape has at most 67108864 elements, and no negative size", at + 1));
        }
    }
    match spec.kind {
        Kind::SentenceEncoder => {
            if spec.inputs.len() != 1 || spec.inputs[0].datatype != Datatype::Bytes || spec.outputs.len() != 1 {
                return Err("a sentence-encoder has one BYTES input and one output".into());
            }
            if spec.max_tokens.is_none_or(|most| most < 3) {
                return Err("a sentence-encoder needs max_tokens, at least 3".into());
            }
            if spec.outputs[0].datatype != Datatype::Fp32 {
                return Err("a sentence-encoder's output is FP32, whatever it computes with".into());
            }
            if spec.before_each.is_some() {
                return Err("before_each is for TorchScript".into());
            }
            if spec.warm_up.iter().any(|warm_up| !matches!(warm_up.shapes.as_slice(), [shape] if shape.len() == 2)) {
                return Err("[[warm_up]]: a sentence-encoder's is one shape, of rows and tokens".into());
            }
        }
        Kind::Torchscript => {
            let held = |tensor: &TensorSpec| {
                !matches!(tensor.datatype, Datatype::Bytes | Datatype::Uint16 | Datatype::Uint32 | Datatype::Uint64)
            };
            if let Some(tensor) = spec.inputs.iter().chain(&spec.outputs).find(|tensor| !held(tensor)) {
                return Err(format!("`{}`: a TorchScript module takes and gives no {}", tensor.name, tensor.datatype));
            }
            if spec.max_tokens.is_some() || spec.precision != Precision::F32 {
                return Err(
                    "max_tokens and precision are for sentence encoders; a TorchScript module has its own".into()
                );
            }
            if batching.max_batch_size > 1 {
                let along_rows = |tensor: &TensorSpec| tensor.shape.first() == Some(&-1) && !tensor.scalar;
                if !spec.inputs.iter().chain(&spec.outputs).all(along_rows) {
                    return Err(
                        "[batching]: every input and output must have -1 as its first size, and none be scalar".into(),
                    );
                }
                if spec.before_each.is_some() {
                    return Err("[batching]: a module that keeps state (before_each) is not batched".into());
                }
            }
            if spec.warm_up.iter().any(|warm_up| warm_up.shapes.len() != spec.inputs.len()) {
                return Err("[[warm_up]]: there is one shape for each input".into());
            }
            if spec.inputs.iter().any(|input| input.scalar && input.datatype != Datatype::Int64) {
                return Err("a scalar input is INT64".into());
            }
        }
    }
    Ok(())
}

fn digest(directory: &Path, spec: &Spec) -> Result<String, Problem> {
    let files: &[&str] = match spec.kind {
        Kind::SentenceEncoder => &["model.safetensors", "config.json", "tokenizer.json"],
        Kind::Torchscript => &["model.pt"],
    };
    let mut digest = Sha256::new();
    for name in files {
        let path = directory.join(name);
        let bytes = std::fs::read(&path).map_err(|error| problem(&path, error.to_string()))?;
        digest.update(Sha256::digest(bytes));
    }
    // Of model.toml only what an answer depends on: regions may batch differently and still give the same vectors.
    // Spelt out here, not derived: a field that is added to the types must not change the digests of all models.
    let kind = if spec.kind == Kind::SentenceEncoder { "sentence-encoder" } else { "torchscript" };
    digest.update(format!("{kind}\n{}\n{:?}\n{:?}\n", spec.precision.name(), spec.max_tokens, spec.before_each));
    for tensor in spec.inputs.iter().chain(&spec.outputs) {
        let TensorSpec { name, datatype, shape, scalar } = tensor;
        digest.update(format!("{name:?} {datatype} {shape:?} {scalar}\n"));
    }
    Ok(hex(&digest.finalize()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TINY: &str = r#"
kind = "torchscript"
[[inputs]]
name = "x"
datatype = "FP32"
shape = [-1, 8]
[[outputs]]
name = "y"
datatype = "FP32"
shape = [-1, 4]
"#;

    fn parsed(head: &str, tail: &str) -> Result<Spec, String> {
        let spec: Spec = toml::from_str(&format!("{head}{TINY}{tail}")).map_err(|error| error.to_string())?;
        check(&spec).map(|()| spec)
    }

    #[test]
    fn what_cannot_be_served_is_refused_with_the_reason() {
        assert!(parsed("", "").is_ok());
        for (head, tail, reason) in [
            ("instances = 0\n", "", "instances"),
            ("threads = 1000\n", "", "threads"),
            ("precision = \"bf16\"\n", "", "precision"),
            ("precision = \"int8\"\n", "", "int8"),
            ("max_tokens = 9\n", "", "max_tokens"),
            ("", "[batching]\nmax_batch_size = 0\n", "max_batch_size"),
            ("", "[batching]\nmax_batch_size = 8\nmax_queue_delay = 5\n", "max_queue_delay"),
            ("", "[batching]\nmax_batch_size = 8\nmax_queue_delay = \"5\"\n", "a duration is written"),
            ("", "[batching]\nmax_batch_size = 8\nmax_queue_delay = \"5h\"\n", "60s"),
            ("before_each = \"reset\"\n", "[batching]\nmax_batch_size = 8\n", "before_each"),
            ("", "[[inputs]]\nname = \"z\"\ndatatype = \"INT64\"\nshape = [1]\n[batching]\nmax_batch_size = 8\n", "-1"),
            ("", "[[inputs]]\nname = \"z\"\ndatatype = \"UINT16\"\nshape = [1]\n", "UINT16"),
            ("", "[[inputs]]\nname = \"z\"\ndatatype = \"BYTES\"\nshape = [1]\n", "BYTES"),
            ("", "[[inputs]]\nname = \"z\"\ndatatype = \"FP32\"\nshape = [-2]\n", "size"),
            ("", "[[warm_up]]\nshapes = []\n", "one shape for each input"),
            ("", "[[warm_up]]\nshapes = [[9999999999, 8]]\n", "elements"),
            ("", "[batchin]\nmax_batch_size = 8\n", "batchin"),
        ] {
            let refused = parsed(head, tail).map(|_| ()).expect_err(tail);
            assert!(refused.contains(reason), "{head}{tail}: {refused}");
        }
    }

    #[test]
    fn texts_are_batched_unless_said_otherwise_and_modules_are_not() {
        assert_eq!(parsed("", "").expect("valid").batching().max_batch_size, 1);
        let batched = parsed("", "[batching]\nmax_batch_size = 8\nmax_queue_delay = \"2ms\"\n").expect("valid");
        assert_eq!(batched.batching().max_queue_delay, Duration::from_millis(2));
    }
}
