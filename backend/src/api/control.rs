//! The model repository extension: what there is, load, unload
//! (<https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_model_repository.md>).

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Path, State as Shared};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header::AUTHORIZATION};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::app::State;
use crate::control::{Change, change, entries};
use crate::error::{Dialect, Error};

#[derive(Default, Deserialize)]
struct Index {
    #[serde(default)]
    ready: bool,
}

/// A body that is small enough, or why there is none.
type Body = Result<Bytes, BytesRejection>;

pub(crate) async fn index(state: Shared<Arc<State>>, headers: HeaderMap, body: Body) -> Result<Json<Value>, Error> {
    let asked: Index = parsed(body)?;
    let entries = entries(&state, asked.ready, authorization(&headers)).await?;
    let one = |entry: &crate::repository::Entry| {
        let state = if entry.ready { "READY" } else { "UNAVAILABLE" };
        json!({ "name": entry.name, "version": entry.version, "state": state, "reason": entry.reason })
    };
    Ok(Json(entries.iter().map(one).collect()))
}

#[derive(Default, Deserialize)]
struct Asked {
    #[serde(default)]
    parameters: Map<String, Value>,
}

pub(crate) async fn load(
    state: Shared<Arc<State>>,
    Path(model): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Result<StatusCode, Error> {
    changed(&state, Change::Load, model, &headers, body).await
}

pub(crate) async fn unload(
    state: Shared<Arc<State>>,
    Path(model): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Result<StatusCode, Error> {
    changed(&state, Change::Unload, model, &headers, body).await
}

async fn changed(
    state: &Arc<State>,
    what: Change,
    model: String,
    headers: &HeaderMap,
    body: Body,
) -> Result<StatusCode, Error> {
    let asked: Asked = parsed(body)?;
    let parameters = asked.parameters.keys().map(String::as_str);
    change(state, what, model, authorization(headers), parameters).await?;
    Ok(StatusCode::OK)
}

fn authorization(headers: &HeaderMap) -> Option<&[u8]> {
    headers.get(AUTHORIZATION).map(HeaderValue::as_bytes)
}

fn parsed<T: Default + for<'de> Deserialize<'de>>(body: Body) -> Result<T, Error> {
    let body = body.map_err(|rejection| Error::new(rejection.status(), Dialect::Oip, rejection.body_text()))?;
    if body.is_empty() {
        return Ok(T::default());
    }
    serde_json::from_slice(&body).map_err(|error| Error::wrong(Dialect::Oip, format!("the body: {error}")))
}
