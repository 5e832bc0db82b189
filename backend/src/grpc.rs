//! The Open Inference Protocol v2 over gRPC
//! (<https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_grpc.md>).

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State as Shared;
use axum::middleware::Next;
use axum::response::Response as HttpResponse;
use futures_util::{Stream, StreamExt};
use isochrone_tensor::proto::infer_parameter::ParameterChoice;
use isochrone_tensor::proto::model_instance_group::Kind;
use isochrone_tensor::proto::model_metadata_response::TensorMetadata;
use isochrone_tensor::proto::repository_index_response::ModelIndex;
use isochrone_tensor::proto::{
    DataType, InferBatchStatistics, InferParameter, InferStatistics, ModelConfig, ModelConfigRequest,
    ModelConfigResponse, ModelDynamicBatching, ModelInferRequest, ModelInferResponse, ModelInput, ModelInstanceGroup,
    ModelMetadataRequest, ModelMetadataResponse, ModelOutput, ModelParameter, ModelReadyRequest, ModelReadyResponse,
    ModelStatistics, ModelStatisticsRequest, ModelStatisticsResponse, ModelStreamInferResponse, RepositoryIndexRequest,
    RepositoryIndexResponse, RepositoryModelLoadRequest, RepositoryModelLoadResponse, RepositoryModelUnloadRequest,
    RepositoryModelUnloadResponse, ServerLiveRequest, ServerLiveResponse, ServerMetadataRequest,
    ServerMetadataResponse, ServerReadyRequest, ServerReadyResponse, StatisticDuration,
};
use tokio_util::task::AbortOnDropHandle;
use tonic::codec::CompressionEncoding;
use tonic::metadata::MetadataMap;
use tonic::service::Routes;
use tonic::{Code, Request, Response, Status, Streaming};
use tracing::Span;

use crate::api::{self, MODEL_DIGEST, MODEL_VERSION, RequestSpan, X_REQUEST_TIMEOUT};
use crate::app::State;
use crate::control::{Change, change, entries};
use crate::describe;
use crate::error::{Dialect, Error};
use crate::infer::{self, Given, since_epoch};
use crate::repository::Loaded;
use crate::statistics::Sum;
use crate::tensor;

#[allow(missing_docs, unreachable_pub, unused_qualifications, clippy::all, reason = "generated from the protocol")]
mod service {
    tonic::include_proto!("inference");
}

use service::grpc_inference_service_server::{GrpcInferenceService, GrpcInferenceServiceServer};

/// Answers of one stream that may be computed at once. They are sent in the order of their requests all the same.
const STREAM_AHEAD: usize = 16;

/// Everything that is answered over gRPC: the protocol, health, reflection.
///
/// # Errors
/// The description of the protocol cannot be read.
pub(crate) async fn router(state: Arc<State>) -> Result<(Router, Health), String> {
    let service = GrpcInferenceServiceServer::new(Service(Arc::clone(&state)))
        .max_decoding_message_size(state.max_body)
        .max_encoding_message_size(usize::MAX)
        .accept_compressed(CompressionEncoding::Gzip)
        // Answers are not: clients offer it unasked, and numbers hardly shrink.
        .accept_compressed(CompressionEncoding::Deflate);
    let described = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(tensor::DESCRIPTION)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    // The older version too: it is the only one that some clients ask for.
    let reflection = described().build_v1().map_err(|error| error.to_string())?;
    let old_reflection = described().build_v1alpha().map_err(|error| error.to_string())?;
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_serving::<GrpcInferenceServiceServer<Service>>().await;
    let mut routes = Routes::builder();
    routes.add_service(service).add_service(reflection).add_service(old_reflection).add_service(health);
    let router = routes.routes().into_axum_router();
    let bound = axum::middleware::from_fn_with_state(Arc::clone(&state), bounded);
    let around = axum::middleware::from_fn_with_state(state, api::around);
    Ok((router.layer(bound).layer(around), Health(reporter)))
}

/// Takes a place before a message is read: each in flight holds its own. The requests of a stream take theirs one by one,
/// and probes are never refused for want of a place.
async fn bounded(Shared(state): Shared<Arc<State>>, request: axum::extract::Request, next: Next) -> HttpResponse {
    let method = request.uri().path().strip_prefix("/inference.GRPCInferenceService/");
    let free = method.is_none_or(|method| matches!(method, "ServerLive" | "ServerReady" | "ModelStreamInfer"));
    let place = if free { None } else { state.places.try_acquire().ok() };
    if !free && place.is_none() {
        return Status::from(Error::overloaded(Dialect::Oip)).into_http();
    }
    let mut response = next.run(request).await;
    // What cannot be read is the client's mistake; the library below calls it ours, and a gateway would hold that against us.
    const UNREADABLE: [&str; 3] = ["failed to decode Protobuf", "Error decompressing", "Unexpected EOF"];
    let status = Status::from_header_map(response.headers());
    if let Some(status) = status.filter(|status| status.code() == Code::Internal)
        && UNREADABLE.iter().any(|words| status.message().starts_with(words))
    {
        response = Status::invalid_argument(status.message()).into_http();
    }
    response
}

/// Says over gRPC's health protocol whether the worker takes requests.
pub(crate) struct Health(tonic_health::server::HealthReporter);

impl Health {
    /// The worker is about to leave.
    pub(crate) async fn leave(&self) {
        self.0.set_not_serving::<GrpcInferenceServiceServer<Service>>().await;
        self.0.set_service_status("", tonic_health::ServingStatus::NotServing).await;
    }
}

/// The protocol's calls.
pub(crate) struct Service(Arc<State>);

impl Service {
    fn found(&self, name: &str, version: &str) -> Result<Arc<Loaded>, Status> {
        let version = some(version);
        let loaded = self.0.repository.model(name, version);
        Ok(loaded.ok_or_else(|| Error::no_model(Dialect::Oip, name, version))?)
    }
}

/// What is left empty is not said.
fn some(text: &str) -> Option<&str> {
    Some(text).filter(|text| !text.is_empty())
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl GrpcInferenceService for Service {
    async fn server_live(&self, _: Request<ServerLiveRequest>) -> Answer<ServerLiveResponse> {
        Ok(Response::new(ServerLiveResponse { live: true }))
    }

    async fn server_ready(&self, _: Request<ServerReadyRequest>) -> Answer<ServerReadyResponse> {
        Ok(Response::new(ServerReadyResponse { ready: self.0.ready.load(Relaxed) }))
    }

    async fn model_ready(&self, request: Request<ModelReadyRequest>) -> Answer<ModelReadyResponse> {
        let ModelReadyRequest { name, version } = request.into_inner();
        // One that is not here is not ready: whoever has unloaded it asks just that.
        let ready = self.found(&name, &version).is_ok() && self.0.ready.load(Relaxed);
        Ok(Response::new(ModelReadyResponse { ready }))
    }

    async fn server_metadata(&self, _: Request<ServerMetadataRequest>) -> Answer<ServerMetadataResponse> {
        Ok(Response::new(ServerMetadataResponse {
            name: describe::NAME.into(),
            version: env!("CARGO_PKG_VERSION").into(),
            extensions: describe::EXTENSIONS.map(str::to_owned).into(),
        }))
    }

    async fn model_metadata(&self, request: Request<ModelMetadataRequest>) -> Answer<ModelMetadataResponse> {
        let ModelMetadataRequest { name, version } = request.into_inner();
        let loaded = self.found(&name, &version)?;
        let spec = &loaded.found.spec;
        let tensors = |specs: &[crate::model::TensorSpec]| {
            let one = |spec: &crate::model::TensorSpec| TensorMetadata {
                name: spec.name.clone(),
                datatype: spec.datatype.to_string(),
                shape: spec.shape.clone(),
            };
            specs.iter().map(one).collect()
        };
        let properties = describe::properties(&self.0, &loaded);
        let answer = ModelMetadataResponse {
            versions: describe::versions(&self.0, &name),
            name,
            platform: describe::platform(spec).into(),
            inputs: tensors(&spec.inputs),
            outputs: tensors(&spec.outputs),
            properties: properties.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
        };
        Ok(identified(answer, &loaded))
    }

    async fn model_infer(&self, request: Request<ModelInferRequest>) -> Answer<ModelInferResponse> {
        let deadline = timeout(request.metadata()).and_then(|waits| Instant::now().checked_add(waits));
        let span = span(&request);
        let (answer, loaded) = infer(&self.0, request.into_inner(), deadline, &span).await?;
        Ok(identified(answer, &loaded))
    }

    type ModelStreamInferStream = Pin<Box<dyn Stream<Item = Result<ModelStreamInferResponse, Status>> + Send>>;

    async fn model_stream_infer(
        &self,
        request: Request<Streaming<ModelInferRequest>>,
    ) -> Answer<Self::ModelStreamInferStream> {
        let state = Arc::clone(&self.0);
        let span = span(&request);
        let answers = request.into_inner().map(move |asked| {
            let (state, span) = (Arc::clone(&state), span.clone());
            // A task of its own, so that it ends and gives its place back though its client reads nothing.
            let answered = tokio::spawn(async move {
                // What breaks the stream itself ends it; what is wrong with one request is its own answer.
                let asked = asked?;
                let id = asked.id.clone();
                let answer = match state.places.try_acquire() {
                    Ok(_place) => infer(&state, asked, None, &span).await,
                    Err(_) => Err(Error::overloaded(Dialect::Oip).into()),
                };
                Ok(match answer {
                    Ok((mut answer, _)) => {
                        // Each request has one answer, which is its last.
                        let last = InferParameter { parameter_choice: Some(ParameterChoice::BoolParam(true)) };
                        answer.parameters.insert("triton_final_response".to_owned(), last);
                        ModelStreamInferResponse { error_message: String::new(), infer_response: Some(answer) }
                    }
                    Err(status) => ModelStreamInferResponse {
                        error_message: status.message().to_owned(),
                        infer_response: Some(ModelInferResponse { id, ..ModelInferResponse::default() }),
                    },
                })
            });
            let answered = AbortOnDropHandle::new(answered);
            async move { answered.await.unwrap_or_else(|_| Err(Error::internal("it failed").into())) }
        });
        // After a broken request there is no other: the stream ends with its status.
        let answers = answers.buffered(STREAM_AHEAD).scan(false, |broken, answer| {
            let ended = std::mem::replace(broken, answer.is_err());
            std::future::ready((!ended).then_some(answer))
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn model_config(&self, request: Request<ModelConfigRequest>) -> Answer<ModelConfigResponse> {
        let ModelConfigRequest { name, version } = request.into_inner();
        let loaded = self.found(&name, &version)?;
        Ok(Response::new(ModelConfigResponse { config: Some(config(&loaded, self.0.gpu)) }))
    }

    async fn model_statistics(&self, request: Request<ModelStatisticsRequest>) -> Answer<ModelStatisticsResponse> {
        let ModelStatisticsRequest { name, version } = request.into_inner();
        let counted = describe::counted(&self.0, some(&name), some(&version));
        let counted = counted.ok_or_else(|| Error::no_model(Dialect::Oip, &name, some(&version)))?;
        let model_stats = counted.iter().map(|loaded| statistics(loaded)).collect();
        Ok(Response::new(ModelStatisticsResponse { model_stats }))
    }

    async fn repository_index(&self, request: Request<RepositoryIndexRequest>) -> Answer<RepositoryIndexResponse> {
        let (metadata, _, RepositoryIndexRequest { ready, .. }) = request.into_parts();
        let entries = entries(&self.0, ready, authorization(&metadata)).await?;
        let one = |entry: crate::repository::Entry| ModelIndex {
            name: entry.name,
            version: entry.version,
            state: if entry.ready { "READY" } else { "UNAVAILABLE" }.into(),
            reason: entry.reason,
        };
        Ok(Response::new(RepositoryIndexResponse { models: entries.into_iter().map(one).collect() }))
    }

    async fn repository_model_load(
        &self,
        request: Request<RepositoryModelLoadRequest>,
    ) -> Answer<RepositoryModelLoadResponse> {
        let (metadata, _, RepositoryModelLoadRequest { model_name, parameters, .. }) = request.into_parts();
        let parameters = parameters.keys().map(String::as_str);
        change(&self.0, Change::Load, model_name, authorization(&metadata), parameters).await?;
        Ok(Response::new(RepositoryModelLoadResponse {}))
    }

    async fn repository_model_unload(
        &self,
        request: Request<RepositoryModelUnloadRequest>,
    ) -> Answer<RepositoryModelUnloadResponse> {
        let (metadata, _, RepositoryModelUnloadRequest { model_name, parameters, .. }) = request.into_parts();
        let parameters = parameters.keys().map(String::as_str);
        change(&self.0, Change::Unload, model_name, authorization(&metadata), parameters).await?;
        Ok(Response::new(RepositoryModelUnloadResponse {}))
    }
}

fn authorization(metadata: &MetadataMap) -> Option<&[u8]> {
    metadata.get("authorization").map(|value| value.as_bytes())
}

fn span<T>(request: &Request<T>) -> Span {
    request.extensions().get::<RequestSpan>().map_or_else(Span::none, |span| span.0.clone())
}

/// How long the client waits: gRPC's own header (a number of at most eight digits and a unit), or ours.
fn timeout(metadata: &MetadataMap) -> Option<Duration> {
    let text = |name: &str| metadata.get(name).and_then(|value| value.to_str().ok());
    let own = text("grpc-timeout").and_then(|value| {
        let (number, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
        let number: u64 = number.parse().ok().filter(|_| number.len() <= 8)?;
        Some(match unit {
            "H" => Duration::from_secs(number * 3600),
            "M" => Duration::from_secs(number * 60),
            "S" => Duration::from_secs(number),
            "m" => Duration::from_millis(number),
            "u" => Duration::from_micros(number),
            "n" => Duration::from_nanos(number),
            _ => return None,
        })
    });
    let ours = text(X_REQUEST_TIMEOUT).and_then(|value| value.parse().ok()).map(Duration::from_millis);
    own.into_iter().chain(ours).min()
}

/// Which model it was, as HTTP says it.
fn identified<T>(answer: T, loaded: &Loaded) -> Response<T> {
    let mut response = Response::new(answer);
    for (name, value) in [(MODEL_VERSION, &loaded.found.version), (MODEL_DIGEST, &loaded.found.digest)] {
        if let Ok(value) = value.parse() {
            response.metadata_mut().insert(name, value);
        }
    }
    response
}

async fn infer(
    state: &State,
    request: ModelInferRequest,
    deadline: Option<Instant>,
    span: &Span,
) -> Result<(ModelInferResponse, Arc<Loaded>), Status> {
    let wrong = |message: String| Error::wrong(Dialect::Oip, message);
    let version = some(&request.model_version);
    let loaded = state.repository.model(&request.model_name, version);
    let loaded = loaded.ok_or_else(|| Error::no_model(Dialect::Oip, &request.model_name, version))?;
    let parameter = |name: &str| request.parameters.get(name).and_then(|value| value.parameter_choice.as_ref());
    let stateless = match parameter("sequence_id") {
        None | Some(ParameterChoice::Int64Param(0) | ParameterChoice::Uint64Param(0)) => true,
        Some(ParameterChoice::StringParam(id)) => id.is_empty(),
        Some(_) => false,
    };
    if !stateless {
        return Err(wrong("sequence_id: no model here keeps state between requests".into()).into());
    }
    // Microseconds, as over HTTP.
    let own = match parameter("timeout") {
        Some(ParameterChoice::Int64Param(micros)) => u64::try_from(*micros).ok(),
        Some(ParameterChoice::Uint64Param(micros)) => Some(*micros),
        _ => None,
    };
    // Zero is none.
    let own = own.filter(|&micros| micros > 0).map(Duration::from_micros);
    let deadline = own.and_then(|own| Instant::now().checked_add(own)).into_iter().chain(deadline).min();
    if let Some(output) = request.outputs.iter().find(|output| {
        output.parameters.contains_key("classification") || output.parameters.contains_key("shared_memory_region")
    }) {
        let message = format!("output `{:.100}`: neither classes nor shared memory are given here", output.name);
        return Err(wrong(message).into());
    }
    let outputs = infer::requested(&loaded, request.outputs.iter().map(|output| &*output.name)).map_err(wrong)?;
    let raw = &request.raw_input_contents;
    if !raw.is_empty() && raw.len() != request.inputs.len() {
        let message = format!("{} inputs have {} raw_input_contents", request.inputs.len(), raw.len());
        return Err(wrong(message).into());
    }
    let given: Vec<Given<'_>> = request
        .inputs
        .iter()
        .map(|input| Given { name: &input.name, datatype: &input.datatype, shape: &input.shape })
        .collect();
    let tensors = infer::matched(&loaded, &given, |at, datatype, count| {
        tensor::request::elements(&request.inputs[at], raw.get(at), datatype, count)
    });
    let input = infer::input(&loaded, tensors.map_err(wrong)?).await.map_err(wrong)?;
    let done = infer::run(&loaded, input, deadline, span).await?;
    let outputs = outputs.into_iter().map(|spec| infer::output(&done, &spec.name).cloned());
    let answer = infer::answer(&loaded, outputs.collect::<Result<_, _>>()?);
    let id = some(&request.id);
    Ok((answer.to_grpc(id), loaded))
}

fn config(loaded: &Loaded, gpu: bool) -> ModelConfig {
    let spec = &loaded.found.spec;
    let batching = spec.batching();
    let count = |number: usize| i32::try_from(number).unwrap_or(i32::MAX);
    let data_type = |datatype| DataType::from_str_name(&describe::config_type(datatype)).unwrap_or_default().into();
    let text = |value: String| ModelParameter { string_value: value };
    ModelConfig {
        name: loaded.found.name.clone(),
        platform: describe::platform(spec).into(),
        max_batch_size: count(describe::max_batch_size(spec)),
        input: spec
            .inputs
            .iter()
            .map(|tensor| ModelInput {
                name: tensor.name.clone(),
                data_type: data_type(tensor.datatype),
                dims: describe::dims(spec, tensor).to_vec(),
            })
            .collect(),
        output: spec
            .outputs
            .iter()
            .map(|tensor| ModelOutput {
                name: tensor.name.clone(),
                data_type: data_type(tensor.datatype),
                dims: describe::dims(spec, tensor).to_vec(),
            })
            .collect(),
        instance_group: vec![ModelInstanceGroup {
            name: loaded.found.name.clone(),
            count: count(spec.instances),
            kind: if gpu { Kind::Gpu } else { Kind::Cpu }.into(),
        }],
        default_model_filename: String::new(),
        dynamic_batching: (describe::max_batch_size(spec) > 0).then(|| ModelDynamicBatching {
            preferred_batch_size: vec![count(batching.max_batch_size)],
            max_queue_delay_microseconds: u64::try_from(batching.max_queue_delay.as_micros()).unwrap_or(u64::MAX),
        }),
        parameters: BTreeMap::from([
            ("precision".to_owned(), text(spec.precision.name().to_owned())),
            ("deterministic".to_owned(), text(spec.deterministic.to_string())),
            ("rows_together".to_owned(), text(batching.max_batch_size.to_string())),
        ]),
        backend: "isochrone".into(),
    }
}

fn statistics(loaded: &Loaded) -> ModelStatistics {
    let counts = loaded.runner.statistics().snapshot();
    let sum = |sum: Sum| Some(StatisticDuration { count: sum.count, ns: describe::nanoseconds(sum) });
    let none = sum(Sum::default());
    ModelStatistics {
        name: loaded.found.name.clone(),
        version: loaded.found.version.clone(),
        last_inference: since_epoch(counts.last),
        inference_count: counts.rows,
        execution_count: counts.busy().count,
        inference_stats: Some(InferStatistics {
            success: sum(counts.success),
            fail: sum(counts.fail),
            queue: sum(counts.queue),
            compute_input: none,
            compute_infer: sum(counts.execute),
            compute_output: none,
            cache_hit: none,
            cache_miss: none,
        }),
        batch_stats: counts
            .batches
            .iter()
            .map(|(&size, &batch)| InferBatchStatistics {
                batch_size: size as u64,
                compute_input: none,
                compute_infer: sum(batch),
                compute_output: none,
            })
            .collect(),
    }
}
