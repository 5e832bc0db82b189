//! The model repository extension: what there is, load, unload
//! (<https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_model_repository.md>).

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
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

pub(crate) async fn index(state: Shared<Arc<State>>, body: Bytes) -> Result<Json<Value>, Error> {
    let asked: Index = parsed(&body)?;
    let entries = entries(&state, asked.ready).await?;
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
    body: Bytes,
) -> Result<StatusCode, Error> {
    changed(&state, Change::Load, model, &headers, &body).await
}

pub(crate) async fn unload(
    state: Shared<Arc<State>>,
    Path(model): Path<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<StatusCode, Error> {
    changed(&state, Change::Unload, model, &headers, &body).await
}

async fn changed(
    state: &Arc<State>,
    what: Change,
    model: String,
    headers: &HeaderMap,
    body: &Bytes,
) -> Result<StatusCode, Error> {
    let asked: Asked = parsed(body)?;
    let parameters = asked.parameters.keys().map(String::as_str);
    change(state, what, model, headers.get(AUTHORIZATION).map(HeaderValue::as_bytes), parameters).await?;
    Ok(StatusCode::OK)
}

fn parsed<T: Default + for<'de> Deserialize<'de>>(body: &Bytes) -> Result<T, Error> {
    if body.is_empty() {
        return Ok(T::default());
    }
    serde_json::from_slice(body).map_err(|error| Error::wrong(Dialect::Oip, format!("the body: {error}")))
}
