//! What an inference is, whatever protocol asks for it: inputs held to the model, texts to token ids, the run.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use isochrone_telemetry::trace;
use isochrone_tensor::answer::Answer;
use opentelemetry::KeyValue;
use tokio::sync::Semaphore;
use tracing::Span;

use crate::error::Error;
use crate::model::{Kind, TensorSpec};
use crate::repository::Loaded;
use crate::runner::{Done, RunError, Times};
use crate::runtime::Input;
use crate::tensor::{self, Datatype, Tensor, element_count};
use crate::text::{INLINE_BYTES_MAX, Tokenizer};

/// The most texts of one request.
pub(crate) const TEXTS_MAX: usize = 2048;

/// The largest size of a tensor that has no element.
const EMPTY_SIZE_MAX: i64 = 4096;

/// The longest text, in bytes. Only its first tokens count, but all of it has to be read to find them.
const TEXT_BYTES_MAX: usize = 1 << 20;

/// An input as it was given, but for its elements.
#[derive(Debug)]
pub(crate) struct Given<'a> {
    pub(crate) name: &'a str,
    pub(crate) datatype: &'a str,
    pub(crate) shape: &'a [i64],
}

/// The request's inputs in the model's order, each held to what the model takes. `elements` reads the data of the input at
/// an index, as so many elements of a datatype.
///
/// # Errors
/// What does not match, with the input's name, in words for the client.
pub(crate) fn matched(
    loaded: &Loaded,
    inputs: &[Given<'_>],
    elements: impl Fn(usize, Datatype, usize) -> Result<Bytes, String>,
) -> Result<Vec<Tensor>, String> {
    let specs = &loaded.found.spec.inputs;
    for (at, input) in inputs.iter().enumerate() {
        if !specs.iter().any(|spec| spec.name == input.name) {
            let known: Vec<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
            return Err(format!("the model has no input `{:.100}`; it takes {}", input.name, known.join(", ")));
        }
        if inputs[..at].iter().any(|other| other.name == input.name) {
            return Err(format!("input `{}` is given twice", input.name));
        }
    }
    let one = |spec: &TensorSpec| {
        let name = &spec.name;
        let at = inputs.iter().position(|input| input.name == *name);
        let at = at.ok_or_else(|| format!("input `{name}` is missing"))?;
        let Given { datatype, shape, .. } = inputs[at];
        if Datatype::named(datatype) != Some(spec.datatype) {
            return Err(format!("input `{name}` is {}, not {datatype:.40}", spec.datatype));
        }
        let fits = |(&size, &wanted): (&i64, &i64)| size >= 0 && (wanted == -1 || size == wanted);
        if shape.len() != spec.shape.len() || !shape.iter().zip(&spec.shape).all(fits) {
            let given = &shape[..shape.len().min(16)];
            return Err(format!("input `{name}` has shape {given:?}; the model takes {:?}", spec.shape));
        }
        let count = element_count(shape).ok_or_else(|| format!("input `{name}`: the shape {shape:?} is too large"))?;
        // Without elements nothing stands behind the sizes, and a module may still make much of them.
        if count == 0 && shape.iter().any(|&size| size > EMPTY_SIZE_MAX) {
            return Err(format!(
                "input `{name}`: the shape {shape:?} has no element, and a size above {EMPTY_SIZE_MAX}"
            ));
        }
        let data = elements(at, spec.datatype, count).map_err(|error| format!("input `{name}`: {error}"))?;
        Ok(Tensor { name: name.clone(), datatype: spec.datatype, shape: shape.to_vec(), data })
    };
    specs.iter().map(one).collect()
}

/// The model's input of matched tensors: texts become token ids, rows are counted.
///
/// # Errors
/// What the model cannot take, with the input's name, in words for the client.
pub(crate) async fn input(loaded: &Arc<Loaded>, tensors: Vec<Tensor>) -> Result<Input, String> {
    let spec = &loaded.found.spec;
    match spec.kind {
        Kind::SentenceEncoder => {
            let named = |error: String| format!("input `{}`: {error}", spec.inputs[0].name);
            // `matched` has made sure of one BYTES input.
            let count = tensors[0].shape.first().copied().unwrap_or_default();
            if count > TEXTS_MAX as i64 {
                return Err(named(format!("from 1 to {TEXTS_MAX} texts at once")));
            }
            let data = tensors.into_iter().next().map(|tensor| tensor.data).unwrap_or_default();
            let texts: Result<Vec<String>, String> = tensor::texts(&data)
                .map(|element| {
                    let text =
                        std::str::from_utf8(element?).map_err(|error| format!("a text is not UTF-8: {error}"))?;
                    Ok(text.to_owned())
                })
                .collect();
            Ok(Input::Tokens(tokens(loaded, texts.map_err(named)?).await.map_err(named)?))
        }
        Kind::Torchscript if spec.batching().max_batch_size > 1 => {
            let rows = tensors[0].shape[0];
            if let Some(other) = tensors.iter().find(|tensor| tensor.shape[0] != rows) {
                return Err(format!(
                    "input `{}` has {} rows, `{}` has {rows}: all have the same, the model is batched",
                    other.name, other.shape[0], tensors[0].name
                ));
            }
            Ok(Input::Tensors { tensors, rows: usize::try_from(rows).unwrap_or(0) })
        }
        Kind::Torchscript => Ok(Input::Tensors { tensors, rows: 1 }),
    }
}

/// Token ids of texts. A large amount is tokenized on another thread, so that others are served meanwhile.
///
/// # Errors
/// Too many texts or none, or the tokenizer's own words.
pub(crate) async fn tokens(loaded: &Arc<Loaded>, texts: Vec<String>) -> Result<Vec<Vec<u32>>, String> {
    if texts.is_empty() || texts.len() > TEXTS_MAX {
        return Err(format!("from 1 to {TEXTS_MAX} texts at once"));
    }
    if texts.iter().any(|text| text.len() > TEXT_BYTES_MAX) {
        return Err(format!("a text has at most {TEXT_BYTES_MAX} bytes"));
    }
    let encode = |tokenizer: &Tokenizer, texts: &[String]| texts.iter().map(|text| tokenizer.encode(text)).collect();
    let no_text = || "this model takes no text".to_owned();
    if texts.iter().map(String::len).sum::<usize>() <= INLINE_BYTES_MAX {
        return encode(loaded.tokenizer.as_ref().ok_or_else(no_text)?, &texts);
    }
    // Two at a time: more would only take the processors away from the models.
    static PLACES: Semaphore = Semaphore::const_new(2);
    let _place = PLACES.acquire().await.map_err(|error| error.to_string())?;
    let loaded = Arc::clone(loaded);
    tokio::task::spawn_blocking(move || encode(loaded.tokenizer.as_ref().ok_or_else(no_text)?, &texts))
        .await
        .map_err(|_| "the texts could not be tokenized".to_owned())?
}

/// The outputs that are asked for by name, in that order: all, unless some are named.
///
/// # Errors
/// A name that the model does not have.
pub(crate) fn requested<'a>(
    loaded: &'a Loaded,
    named: impl ExactSizeIterator<Item = &'a str>,
) -> Result<Vec<&'a TensorSpec>, String> {
    let specs = &loaded.found.spec.outputs;
    if named.len() == 0 {
        return Ok(specs.iter().collect());
    }
    let mut found: Vec<&TensorSpec> = Vec::new();
    for name in named {
        let spec = specs.iter().find(|spec| spec.name == name);
        let spec = spec.ok_or_else(|| format!("the model has no output `{name:.100}`"))?;
        // Each costs its size again.
        if found.iter().any(|other| other.name == spec.name) {
            return Err(format!("output `{name}` is asked for twice"));
        }
        found.push(spec);
    }
    Ok(found)
}

/// Runs one request on its model, counts it, and draws its steps into its trace.
///
/// # Errors
/// Why there is no result.
pub(crate) async fn run(loaded: &Loaded, input: Input, deadline: Option<Instant>, span: &Span) -> Result<Done, Error> {
    let (began, rows) = (Instant::now(), input.rows());
    match loaded.runner.run(input, deadline).await {
        Ok(done) => {
            loaded.runner.statistics().succeeded(rows, done.times);
            draw(loaded, &done, span);
            Ok(done)
        }
        Err(error) => {
            loaded.runner.statistics().failed(began.elapsed());
            if let RunError::Failed(reason) = &error {
                tracing::error!(model = loaded.found.name, reason = %reason, "the model failed");
            }
            Err(Error::from(error))
        }
    }
}

fn draw(loaded: &Loaded, done: &Done, span: &Span) {
    let Times { queued, taken, began, ended } = done.times;
    if !span.is_none() {
        let model = KeyValue::new("gen_ai.request.model", loaded.found.name.clone());
        let size = KeyValue::new("isochrone.batch.requests", done.batch as i64);
        trace::child(span, "queue", queued, taken, Vec::new());
        trace::child(span, "batch", taken, began, vec![size.clone()]);
        trace::child(span, "execute", began, ended, vec![model, size]);
    }
}

/// The output of a name.
///
/// # Errors
/// The runtime did not give it.
pub(crate) fn output<'a>(done: &'a Done, name: &str) -> Result<&'a Tensor, Error> {
    done.outputs.iter().find(|tensor| tensor.name == name).ok_or_else(|| {
        tracing::error!(output = name, "the runtime gave no such output");
        Error::internal("an output is missing")
    })
}

/// The answer of a model.
pub(crate) fn answer(loaded: &Loaded, outputs: Vec<Tensor>) -> Answer {
    let parameters = BTreeMap::from([("digest".to_owned(), loaded.found.digest.clone())]);
    Answer { model: loaded.found.name.clone(), version: loaded.found.version.clone(), parameters, outputs }
}

/// What the instants of a request's steps are to a statistic.
pub(crate) fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// Milliseconds since the epoch.
pub(crate) fn since_epoch(time: Option<SystemTime>) -> u64 {
    let since = time.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok()).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
