//! A trace viewer in one process: OTLP in, the Jaeger UI out, the newest traces in memory. A viewer, not a store.

use std::future::IntoFuture;
use std::net::SocketAddr;

use axum::Router;
use axum::body::Bytes;
use axum::extract::State as Shared;
use axum::http::StatusCode;
use axum::routing::post;
use otlp_embedded::proto::collector::trace::v1::ExportTraceServiceRequest;
use otlp_embedded::{Config, State, StateRef, TraceService, TraceServiceImpl, TraceServiceServer, ui_app};
use prost::Message;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tonic::codec::CompressionEncoding;

/// The bounds of what is remembered.
const TRACES_MAX: u32 = 10_000;
const MEMORY_MAX: usize = 256 << 20;

pub(crate) fn run(otlp: SocketAddr, otlp_http: SocketAddr, ui: SocketAddr) -> Result<(), String> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| error.to_string())?;
    runtime.block_on(serve(otlp, otlp_http, ui))
}

async fn serve(otlp: SocketAddr, otlp_http: SocketAddr, ui: SocketAddr) -> Result<(), String> {
    let state = State::new(Config { max_length: TRACES_MAX, max_memory_usage: MEMORY_MAX });
    let (ui, http) = (bind(ui).await?, bind(otlp_http).await?);
    let ui = axum::serve(ui, ui_app(state.clone(), "/"));
    let http = axum::serve(http, Router::new().route("/v1/traces", post(over_http)).with_state(state.clone()));
    // Exporters that compress would otherwise lose their spans.
    let service = TraceServiceServer::new(TraceServiceImpl::new(state)).accept_compressed(CompressionEncoding::Gzip);
    let grpc = tonic::transport::Server::builder().add_service(service).serve(otlp);
    let mut terminate = signal(SignalKind::terminate()).map_err(|error| error.to_string())?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|error| error.to_string())?;
    tokio::select! {
        ended = ui.into_future() => ended.map_err(|error| error.to_string()),
        ended = http.into_future() => ended.map_err(|error| error.to_string()),
        ended = grpc => ended.map_err(|error| format!("{otlp}: {error}")),
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    }
}

async fn bind(address: SocketAddr) -> Result<TcpListener, String> {
    TcpListener::bind(address).await.map_err(|error| format!("cannot listen on {address}: {error}"))
}

/// OTLP over HTTP, protobuf only.
async fn over_http(Shared(state): Shared<StateRef>, body: Bytes) -> StatusCode {
    let Ok(request) = ExportTraceServiceRequest::decode(body) else { return StatusCode::BAD_REQUEST };
    match TraceServiceImpl::new(state).export(tonic::Request::new(request)).await {
        Ok(_) => StatusCode::OK,
        Err(_) => StatusCode::SERVICE_UNAVAILABLE,
    }
}
