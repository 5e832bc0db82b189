//! What is said of the worker and its models, whatever protocol asks.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Value, json};

use crate::app::State;
use crate::infer::since_epoch;
use crate::model::{Batching, Kind, Spec, TensorSpec};
use crate::repository::Loaded;
use crate::statistics::Sum;
use crate::tensor::Datatype;

/// The name that metadata gives.
pub(crate) const NAME: &str = "isochrone-backend";

/// The extensions of the protocol that are spoken over HTTP.
pub(crate) const EXTENSIONS: [&str; 5] = [
    "binary_tensor_data",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "statistics",
];

/// The word for how a model is computed.
pub(crate) fn platform(spec: &Spec) -> &'static str {
    match spec.kind {
        Kind::SentenceEncoder => "isochrone_sentence_encoder",
        Kind::Torchscript => "pytorch_libtorch",
    }
}

/// The versions of a model that are served.
pub(crate) fn versions(state: &State, name: &str) -> Vec<String> {
    state
        .repository
        .models()
        .get(name)
        .map(|versions| versions.keys().map(u64::to_string).collect())
        .unwrap_or_default()
}

/// What decides a vector beyond its input, and where it is made.
pub(crate) fn properties(state: &State, loaded: &Loaded) -> BTreeMap<&'static str, String> {
    let spec = &loaded.found.spec;
    BTreeMap::from([
        ("version", loaded.found.version.clone()),
        ("digest", loaded.found.digest.clone()),
        ("precision", spec.precision.name().to_owned()),
        ("deterministic", spec.deterministic.to_string()),
        ("region", state.region.to_str().unwrap_or_default().to_owned()),
    ])
}

/// The name of a datatype in a model's configuration.
pub(crate) fn config_type(datatype: Datatype) -> String {
    match datatype {
        Datatype::Bytes => "TYPE_STRING".to_owned(),
        other => format!("TYPE_{other}"),
    }
}

/// The sizes in a model's configuration: without the rows, where the model is batched.
pub(crate) fn dims<'a>(spec: &Spec, tensor: &'a TensorSpec) -> &'a [i64] {
    if max_batch_size(spec) > 0 { &tensor.shape[1..] } else { &tensor.shape }
}

/// 0 says that the first dimension is not one of rows. Texts have no other dimension, so for them it stays.
pub(crate) fn max_batch_size(spec: &Spec) -> usize {
    match (spec.kind, spec.batching().max_batch_size) {
        (Kind::Torchscript, size) if size > 1 => size,
        _ => 0,
    }
}

/// A model's configuration, in the words of the extension.
pub(crate) fn config(loaded: &Loaded, gpu: bool) -> Value {
    let spec = &loaded.found.spec;
    let tensors = |tensors: &[TensorSpec]| -> Vec<Value> {
        let one = |tensor: &TensorSpec| json!({ "name": tensor.name, "data_type": config_type(tensor.datatype), "dims": dims(spec, tensor) });
        tensors.iter().map(one).collect()
    };
    let Batching { max_batch_size: together, max_queue_delay, .. } = spec.batching();
    let delay = u64::try_from(max_queue_delay.as_micros()).unwrap_or(u64::MAX);
    let mut config = json!({
        "name": loaded.found.name,
        "platform": platform(spec),
        "backend": "isochrone",
        "version_policy": { "all": {} },
        "max_batch_size": max_batch_size(spec),
        "input": tensors(&spec.inputs),
        "output": tensors(&spec.outputs),
        "instance_group": [{
            "name": loaded.found.name, "count": spec.instances, "kind": if gpu { "KIND_GPU" } else { "KIND_CPU" },
        }],
        "parameters": {
            "precision": { "string_value": spec.precision.name() },
            "deterministic": { "string_value": spec.deterministic.to_string() },
            "rows_together": { "string_value": together.to_string() },
        },
    });
    // The extension knows batches only along a first dimension that its sizes leave out.
    if max_batch_size(spec) > 0 {
        config["dynamic_batching"] =
            json!({ "preferred_batch_size": [together], "max_queue_delay_microseconds": delay });
    }
    config
}

/// A model's counts, in the words of the extension.
pub(crate) fn statistics(loaded: &Loaded) -> Value {
    let counts = loaded.runner.statistics().snapshot();
    let sum = |sum: Sum| json!({ "count": sum.count, "ns": nanoseconds(sum) });
    let none = sum(Sum::default());
    let batches: Vec<Value> = counts
        .batches
        .iter()
        .map(|(size, &batch)| {
            json!({ "batch_size": size, "compute_input": none, "compute_infer": sum(batch), "compute_output": none })
        })
        .collect();
    json!({
        "name": loaded.found.name,
        "version": loaded.found.version,
        "last_inference": since_epoch(counts.last),
        "inference_count": counts.rows,
        "execution_count": counts.busy().count,
        "inference_stats": {
            "success": sum(counts.success),
            "fail": sum(counts.fail),
            "queue": sum(counts.queue),
            "compute_input": none,
            "compute_infer": sum(counts.execute),
            "compute_output": none,
            "cache_hit": none,
            "cache_miss": none,
        },
        "batch_stats": batches,
    })
}

/// The models whose statistics are asked for: one, one version of it, or all. `None` if there is no such.
pub(crate) fn counted(state: &State, name: Option<&str>, version: Option<&str>) -> Option<Vec<Arc<Loaded>>> {
    let models = state.repository.models();
    match (name, version) {
        (None, _) => Some(models.values().flat_map(BTreeMap::values).cloned().collect()),
        (Some(name), None) => Some(models.get(name)?.values().cloned().collect()),
        (Some(name), Some(version)) => Some(vec![state.repository.model(name, Some(version))?]),
    }
}

/// Nanoseconds, as the extension counts.
pub(crate) fn nanoseconds(sum: Sum) -> u64 {
    u64::try_from(sum.time.as_nanos()).unwrap_or(u64::MAX)
}
