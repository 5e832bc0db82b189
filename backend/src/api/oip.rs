//! The Open Inference Protocol v2 over HTTP, in JSON and with binary tensors
//! (<https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md>).

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Extension, Path, State as Shared};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header::CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::{RequestSpan, deadline, identify, is_ready};
use crate::app::State;
use crate::describe;
use crate::error::{Dialect, Error};
use crate::infer::{self, Given};
use crate::model::TensorSpec;
use crate::repository::Loaded;
use crate::tensor::answer::Http;
use crate::tensor::request::Wanted;
use crate::tensor::{self, Tensor, envelope};

const MODELS: HeaderName = HeaderName::from_static("isochrone-models");

/// The longest list of models that a header takes.
const MODELS_MAX: usize = 16 << 10;

const HEADER_LENGTH: HeaderName = HeaderName::from_static("inference-header-content-length");

pub(crate) async fn server() -> Json<Value> {
    let version = env!("CARGO_PKG_VERSION");
    Json(json!({ "name": describe::NAME, "version": version, "extensions": describe::EXTENSIONS }))
}

pub(crate) async fn live() -> Json<Value> {
    Json(json!({ "live": true }))
}

/// Says too which models are there: `[name, version, digest, deterministic]` each, for a gateway that keeps answers.
pub(crate) async fn ready(Shared(state): Shared<Arc<State>>) -> Response {
    let ready = is_ready(&state);
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let mut response = (status, Json(json!({ "ready": ready }))).into_response();
    let models = state.repository.models();
    let served = models.values().flat_map(|versions| versions.values()).map(|loaded| {
        let found = &loaded.found;
        json!([found.name, found.version, found.digest, found.spec.deterministic])
    });
    let models = Value::from_iter(served).to_string();
    if models.len() <= MODELS_MAX
        && let Ok(models) = HeaderValue::from_str(&models)
    {
        response.headers_mut().insert(MODELS, models);
    }
    response
}

/// The model and version of a path.
type Named = Path<(String, String)>;

pub(crate) async fn model_ready(state: Shared<Arc<State>>, Path(model): Path<String>) -> Result<Response, Error> {
    ready_of(&state, &model, None)
}

pub(crate) async fn model_ready_of_version(state: Shared<Arc<State>>, path: Named) -> Result<Response, Error> {
    ready_of(&state, &path.0.0, Some(&path.0.1))
}

fn ready_of(state: &State, model: &str, version: Option<&str>) -> Result<Response, Error> {
    let loaded = found(state, model, version)?;
    let ready = is_ready(state);
    // Clients look at the status alone.
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    Ok((status, Json(json!({ "name": loaded.found.name, "ready": ready }))).into_response())
}

pub(crate) async fn metadata(state: Shared<Arc<State>>, Path(model): Path<String>) -> Result<Response, Error> {
    metadata_of(&state, &model, None)
}

pub(crate) async fn metadata_of_version(state: Shared<Arc<State>>, path: Named) -> Result<Response, Error> {
    metadata_of(&state, &path.0.0, Some(&path.0.1))
}

fn metadata_of(state: &State, model: &str, version: Option<&str>) -> Result<Response, Error> {
    let loaded = found(state, model, version)?;
    let tensors = |specs: &[TensorSpec]| -> Vec<Value> {
        let one = |spec: &TensorSpec| json!({ "name": spec.name, "datatype": spec.datatype, "shape": spec.shape });
        specs.iter().map(one).collect()
    };
    let spec = &loaded.found.spec;
    let mut parameters = json!(describe::properties(state, &loaded));
    parameters["deterministic"] = json!(spec.deterministic);
    let mut response = Json(json!({
        "name": loaded.found.name,
        "versions": describe::versions(state, model),
        "platform": describe::platform(spec),
        "inputs": tensors(&spec.inputs),
        "outputs": tensors(&spec.outputs),
        "parameters": parameters,
    }))
    .into_response();
    identify(&mut response, &loaded);
    Ok(response)
}

pub(crate) async fn config(state: Shared<Arc<State>>, Path(model): Path<String>) -> Result<Json<Value>, Error> {
    Ok(Json(describe::config(&*found(&state, &model, None)?, state.gpu)))
}

pub(crate) async fn config_of_version(state: Shared<Arc<State>>, path: Named) -> Result<Json<Value>, Error> {
    Ok(Json(describe::config(&*found(&state, &path.0.0, Some(&path.0.1))?, state.gpu)))
}

pub(crate) async fn all_statistics(state: Shared<Arc<State>>) -> Result<Json<Value>, Error> {
    statistics_of(&state, None, None)
}

pub(crate) async fn statistics(state: Shared<Arc<State>>, Path(model): Path<String>) -> Result<Json<Value>, Error> {
    statistics_of(&state, Some(&model), None)
}

pub(crate) async fn statistics_of_version(state: Shared<Arc<State>>, path: Named) -> Result<Json<Value>, Error> {
    statistics_of(&state, Some(&path.0.0), Some(&path.0.1))
}

fn statistics_of(state: &State, model: Option<&str>, version: Option<&str>) -> Result<Json<Value>, Error> {
    let counted = describe::counted(state, model, version);
    let counted = counted.ok_or_else(|| Error::no_model(Dialect::Oip, model.unwrap_or_default(), version))?;
    let stats: Vec<Value> = counted.iter().map(|loaded| describe::statistics(loaded)).collect();
    Ok(Json(json!({ "model_stats": stats })))
}

fn found(state: &State, model: &str, version: Option<&str>) -> Result<Arc<Loaded>, Error> {
    state.repository.model(model, version).ok_or_else(|| Error::no_model(Dialect::Oip, model, version))
}

#[derive(Deserialize)]
struct InferRequest<'a> {
    #[serde(borrow)]
    id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    inputs: Vec<InferInput<'a>>,
    #[serde(borrow, default)]
    outputs: Option<Vec<InferOutput<'a>>>,
    #[serde(borrow, default)]
    parameters: Option<Parameters<'a>>,
}

/// The parameters that are acted on; others are passed over, as the protocol has it.
#[derive(Default, Deserialize)]
struct Parameters<'a> {
    /// Outputs are binary unless one says otherwise.
    #[serde(default)]
    binary_data_output: bool,
    /// Microseconds that the client waits.
    timeout: Option<u64>,
    /// A number or a text, whose absence or zero means none.
    #[serde(borrow)]
    sequence_id: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct InferInput<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
    /// Read with its input's name at hand, for the refusal.
    #[serde(borrow)]
    shape: &'a RawValue,
    #[serde(borrow)]
    datatype: Cow<'a, str>,
    #[serde(borrow)]
    data: Option<&'a RawValue>,
    #[serde(default)]
    parameters: Option<InputParameters>,
}

#[derive(Default, Deserialize)]
struct InputParameters {
    binary_data_size: Option<u64>,
    shared_memory_region: Option<IgnoredAny>,
}

#[derive(Deserialize)]
struct InferOutput<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
    #[serde(default)]
    parameters: Option<OutputParameters>,
}

#[derive(Default, Deserialize)]
struct OutputParameters {
    binary_data: Option<bool>,
    classification: Option<IgnoredAny>,
    shared_memory_region: Option<IgnoredAny>,
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
    path: Named,
    span: Extension<RequestSpan>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Error> {
    compute(&state, &path.0.0, Some(&path.0.1), &span, &headers, body).await
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
    let (began, asked_by) = (Instant::now(), deadline(headers));
    let loaded = found(state, model, version)?;
    let body = body.map_err(|rejection| Error::new(rejection.status(), Dialect::Oip, rejection.body_text()))?;
    let (json, binary) = envelope::part(&body, headers.get(HEADER_LENGTH).map(HeaderValue::as_bytes)).map_err(wrong)?;
    let request: InferRequest<'_> =
        serde_json::from_slice(&json).map_err(|error| wrong(format!("the body: {error}")))?;
    let parameters = request.parameters.unwrap_or_default();
    if parameters.sequence_id.is_some_and(|id| !matches!(id.get(), "0" | "\"\"")) {
        return Err(wrong("sequence_id: no model here keeps state between requests".into()));
    }
    let asked = request.outputs.unwrap_or_default();
    let outputs = infer::requested(&loaded, asked.iter().map(|output| &*output.name)).map_err(wrong)?;
    for output in &asked {
        if output.parameters.as_ref().is_some_and(|p| p.classification.is_some() || p.shared_memory_region.is_some()) {
            return Err(wrong(format!(
                "output `{:.100}`: neither classes nor shared memory are given here",
                output.name
            )));
        }
    }
    let tensors = read(&loaded, &request.inputs, &binary).map_err(wrong)?;
    let input = infer::input(&loaded, tensors).await.map_err(wrong)?;
    // Zero is none.
    let own = parameters.timeout.filter(|&micros| micros > 0).map(Duration::from_micros);
    let deadline = [asked_by, own.and_then(|own| began.checked_add(own))].into_iter().flatten().min();
    let done = infer::run(&loaded, input, deadline, &span.0).await?;

    let outputs = outputs.iter().map(|spec| infer::output(&done, &spec.name).cloned());
    let answer = infer::answer(&loaded, outputs.collect::<Result<_, _>>()?);
    let wanted: Vec<Wanted> = asked
        .iter()
        .map(|output| Wanted {
            name: output.name.clone().into_owned(),
            binary: output.parameters.as_ref().and_then(|parameters| parameters.binary_data),
        })
        .collect();
    let written = answer.to_http(request.id.as_deref(), &wanted, parameters.binary_data_output);
    let Http { body, header } = written.map_err(|error| Error::internal(format!("an output: {error}")))?;
    let mut response = match header {
        None => ([(CONTENT_TYPE, "application/json")], body).into_response(),
        Some(header) => {
            let mut response = ([(CONTENT_TYPE, "application/octet-stream")], body).into_response();
            response.headers_mut().insert(HEADER_LENGTH, HeaderValue::from(header));
            response
        }
    };
    identify(&mut response, &loaded);
    Ok(response)
}

/// The request's tensors, from the JSON or from the bytes behind it.
fn read(loaded: &Loaded, inputs: &[InferInput<'_>], binary: &Bytes) -> Result<Vec<Tensor>, String> {
    let name = |at: usize| &*inputs[at].name;
    let sizes = inputs.iter().map(|input| input.parameters.as_ref()?.binary_data_size);
    let parts = envelope::distribute(binary, sizes).map_err(|(at, error)| match at {
        Some(at) => format!("input `{:.100}`: {error}", name(at)),
        None => error,
    })?;
    if let Some(at) =
        inputs.iter().position(|i| i.parameters.as_ref().is_some_and(|p| p.shared_memory_region.is_some()))
    {
        return Err(format!("input `{:.100}`: shared memory is not taken here", name(at)));
    }
    let shapes: Vec<Vec<i64>> = inputs
        .iter()
        .map(|input| {
            let shape = serde_json::from_str(input.shape.get());
            shape.map_err(|error| format!("input `{:.100}`: the shape: {error}", input.name))
        })
        .collect::<Result<_, _>>()?;
    let given: Vec<Given<'_>> = inputs
        .iter()
        .zip(&shapes)
        .map(|(input, shape)| Given { name: &input.name, datatype: &input.datatype, shape })
        .collect();
    infer::matched(loaded, &given, |at, datatype, count| match (&parts[at], inputs[at].data) {
        (Some(_), Some(_)) => Err("it has both `data` and `binary_data_size`".into()),
        (Some(part), None) => tensor::checked(datatype, count, part).map(|()| part.clone()),
        (None, Some(json)) => tensor::from_json(datatype, count, json.get()),
        (None, None) => Err("it has neither `data` nor `binary_data_size`".into()),
    })
}
