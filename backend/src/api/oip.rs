//! The Open Inference Protocol v2 over HTTP, in JSON
//! (<https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md>).

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Extension, Path, State as Shared};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::error::{Dialect, Error};
use super::{RequestSpan, identify, run, tokens};
use crate::app::{Loaded, State};
use crate::model::{Kind, TensorSpec};
use crate::runtime::Input;
use crate::tensor::{Data, Datatype, Tensor, element_count};

pub(crate) async fn server() -> Json<Value> {
    Json(json!({ "name": "isochrone-backend", "version": env!("CARGO_PKG_VERSION"), "extensions": [] }))
}

pub(crate) async fn live() -> Json<Value> {
    Json(json!({ "live": true }))
}

pub(crate) async fn ready(Shared(state): Shared<Arc<State>>) -> (StatusCode, Json<Value>) {
    let ready = state.ready.load(Relaxed);
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(json!({ "ready": ready })))
}

pub(crate) async fn model_ready(state: Shared<Arc<State>>, Path(model): Path<String>) -> Result<Json<Value>, Error> {
    is_ready(&state, &model, None)
}

pub(crate) async fn model_ready_of_version(
    state: Shared<Arc<State>>,
    Path((model, version)): Path<(String, String)>,
) -> Result<Json<Value>, Error> {
    is_ready(&state, &model, Some(&version))
}

fn is_ready(state: &State, model: &str, version: Option<&str>) -> Result<Json<Value>, Error> {
    let loaded = found(state, model, version)?;
    Ok(Json(json!({ "name": loaded.found.name, "ready": state.ready.load(Relaxed) })))
}

pub(crate) async fn metadata(state: Shared<Arc<State>>, Path(model): Path<String>) -> Result<Response, Error> {
    describe(&state, &model, None)
}

pub(crate) async fn metadata_of_version(
    state: Shared<Arc<State>>,
    Path((model, version)): Path<(String, String)>,
) -> Result<Response, Error> {
    describe(&state, &model, Some(&version))
}

fn describe(state: &State, model: &str, version: Option<&str>) -> Result<Response, Error> {
    let loaded = found(state, model, version)?;
    let tensors = |specs: &[TensorSpec]| -> Vec<Value> {
        let one = |spec: &TensorSpec| json!({ "name": spec.name, "datatype": spec.datatype, "shape": spec.shape });
        specs.iter().map(one).collect()
    };
    let versions = state.models.get(model).map(|versions| versions.keys().map(u64::to_string).collect::<Vec<_>>());
    let mut response = Json(json!({
        "name": loaded.found.name,
        "versions": versions,
        "platform": match loaded.found.spec.kind {
            Kind::SentenceEncoder => "isochrone_sentence_encoder",
            Kind::Torchscript => "pytorch_torchscript",
        },
        "inputs": tensors(&loaded.found.spec.inputs),
        "outputs": tensors(&loaded.found.spec.outputs),
        "parameters": {
            "version": loaded.found.version,
            "digest": loaded.found.digest,
            "deterministic": loaded.found.spec.deterministic,
            "region": state.region.to_str().unwrap_or_default(),
        },
    }))
    .into_response();
    identify(&mut response, loaded);
    Ok(response)
}

fn found<'a>(state: &'a State, model: &str, version: Option<&str>) -> Result<&'a Arc<Loaded>, Error> {
    state.model(model, version).ok_or_else(|| Error::no_model(Dialect::Oip, model))
}

#[derive(Deserialize)]
struct InferRequest<'a> {
    #[serde(borrow)]
    id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    inputs: Vec<InferInput<'a>>,
    #[serde(borrow, default)]
    outputs: Option<Vec<InferOutput<'a>>>,
}

#[derive(Deserialize)]
struct InferInput<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
    shape: Vec<i64>,
    datatype: Datatype,
    #[serde(borrow)]
    data: &'a RawValue,
}

#[derive(Deserialize)]
struct InferOutput<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
}

#[derive(Serialize)]
struct InferResponse<'a> {
    model_name: &'a str,
    model_version: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    outputs: Vec<InferResult<'a>>,
}

#[derive(Serialize)]
struct InferResult<'a> {
    name: &'a str,
    datatype: Datatype,
    shape: &'a [i64],
    data: &'a Data,
}

type Body = Result<Bytes, BytesRejection>;

pub(crate) async fn infer(
    state: Shared<Arc<State>>,
    Path(model): Path<String>,
    span: Extension<RequestSpan>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Error> {
    compute(&state, &model, None, &span, &headers, body).await
}

pub(crate) async fn infer_of_version(
    state: Shared<Arc<State>>,
    Path((model, version)): Path<(String, String)>,
    span: Extension<RequestSpan>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Error> {
    compute(&state, &model, Some(&version), &span, &headers, body).await
}

async fn compute(
    state: &State,
    model: &str,
    version: Option<&str>,
    span: &RequestSpan,
    headers: &HeaderMap,
    body: Body,
) -> Result<Response, Error> {
    let wrong = |message: String| Error::wrong(Dialect::Oip, message);
    let loaded = found(state, model, version)?;
    let body = body.map_err(|rejection| Error::new(rejection.status(), Dialect::Oip, rejection.body_text()))?;
    if headers.contains_key("inference-header-content-length") {
        return Err(wrong("binary tensors are not taken here; send the data as JSON".into()));
    }
    let request: InferRequest<'_> =
        serde_json::from_slice(&body).map_err(|error| wrong(format!("the body: {error}")))?;
    let outputs = requested(loaded, request.outputs.as_deref())?;
    let tensors = matched(loaded, &request.inputs).map_err(wrong)?;
    let input = match loaded.found.spec.kind {
        Kind::Torchscript => Input::Tensors(tensors),
        Kind::SentenceEncoder => {
            // `matched` has made sure of one BYTES input.
            let texts = tensors.into_iter().flat_map(|tensor| match tensor.data {
                Data::Bytes(texts) => texts,
                _ => Vec::new(),
            });
            let name = &loaded.found.spec.inputs[0].name;
            let rows = tokens(loaded, texts.collect()).await;
            Input::Tokens(rows.map_err(|error| wrong(format!("input `{name}`: {error}")))?)
        }
    };
    let done = run(loaded, input, headers, &span.0).await?;
    let mut results = Vec::new();
    for spec in outputs {
        let tensor = done.outputs.iter().find(|tensor| tensor.name == spec.name);
        let tensor = tensor
            .ok_or_else(|| Error::new(StatusCode::INTERNAL_SERVER_ERROR, Dialect::Oip, "an output is missing"))?;
        let Tensor { name, shape, data } = tensor;
        if !data.is_finite() {
            let message = format!("output `{name}` has numbers that are not finite, which JSON cannot say");
            return Err(Error::new(StatusCode::INTERNAL_SERVER_ERROR, Dialect::Oip, message));
        }
        results.push(InferResult { name, datatype: datatype(data), shape, data });
    }
    let answer = InferResponse {
        model_name: &loaded.found.name,
        model_version: &loaded.found.version,
        id: request.id.as_deref(),
        outputs: results,
    };
    let mut response = Json(answer).into_response();
    identify(&mut response, loaded);
    Ok(response)
}

/// The outputs that are asked for: all, unless some are named.
fn requested<'a>(loaded: &'a Loaded, named: Option<&[InferOutput<'_>]>) -> Result<Vec<&'a TensorSpec>, Error> {
    let specs = &loaded.found.spec.outputs;
    let Some(named) = named.filter(|named| !named.is_empty()) else { return Ok(specs.iter().collect()) };
    let find = |output: &InferOutput<'_>| {
        let found = specs.iter().find(|spec| spec.name == output.name);
        found.ok_or_else(|| Error::wrong(Dialect::Oip, format!("the model has no output `{}`", output.name)))
    };
    named.iter().map(find).collect()
}

/// The request's inputs in the model's order, each held to what the model takes.
fn matched(loaded: &Loaded, inputs: &[InferInput<'_>]) -> Result<Vec<Tensor>, String> {
    let specs = &loaded.found.spec.inputs;
    for (at, input) in inputs.iter().enumerate() {
        if !specs.iter().any(|spec| spec.name == input.name) {
            let known: Vec<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
            return Err(format!("the model has no input `{}`; it takes {}", input.name, known.join(", ")));
        }
        if inputs[..at].iter().any(|other| other.name == input.name) {
            return Err(format!("input `{}` is given twice", input.name));
        }
    }
    let tensor = |spec: &TensorSpec| {
        let name = &spec.name;
        let input =
            inputs.iter().find(|input| input.name == *name).ok_or_else(|| format!("input `{name}` is missing"))?;
        if input.datatype != spec.datatype {
            return Err(format!("input `{name}` is {}, not {}", spec.datatype, input.datatype));
        }
        let fits = |(&size, &wanted): (&i64, &i64)| size >= 0 && (wanted == -1 || size == wanted);
        if input.shape.len() != spec.shape.len() || !input.shape.iter().zip(&spec.shape).all(fits) {
            return Err(format!("input `{name}` has shape {:?}; the model takes {:?}", input.shape, spec.shape));
        }
        let count = element_count(&input.shape)
            .ok_or_else(|| format!("input `{name}`: the shape {:?} is too large", input.shape))?;
        let data =
            Data::from_json(spec.datatype, input.data.get()).map_err(|error| format!("input `{name}`: {error}"))?;
        if data.len() != count {
            return Err(format!(
                "input `{name}` has {} elements; its shape {:?} means {count}",
                data.len(),
                input.shape
            ));
        }
        Ok(Tensor { name: name.clone(), shape: input.shape.clone(), data })
    };
    specs.iter().map(tensor).collect()
}

fn datatype(data: &Data) -> Datatype {
    match data {
        Data::Bool(_) => Datatype::Bool,
        Data::Uint8(_) => Datatype::Uint8,
        Data::Int8(_) => Datatype::Int8,
        Data::Int16(_) => Datatype::Int16,
        Data::Int32(_) => Datatype::Int32,
        Data::Int64(_) => Datatype::Int64,
        Data::Fp32(_) => Datatype::Fp32,
        Data::Fp64(_) => Datatype::Fp64,
        Data::Bytes(_) => Datatype::Bytes,
    }
}
