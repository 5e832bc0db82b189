//! OpenAI's embeddings, as its SDKs call them (<https://platform.openai.com/docs/api-reference/embeddings>).

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Extension, Path, State as Shared};
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use base64::Engine;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{RequestSpan, deadline, identify};
use crate::app::State;
use crate::error::{Dialect, Error};
use crate::infer::{self, TEXTS_MAX, tokens};
use crate::runtime::Input;

#[derive(Deserialize)]
struct EmbeddingsRequest {
    model: String,
    input: EmbeddingsInput,
    encoding_format: Option<Encoding>,
    dimensions: Option<usize>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "`input` is a text, a list of texts, a list of token ids, or a list of such lists")]
enum EmbeddingsInput {
    Text(String),
    Texts(Vec<String>),
    Ids(Vec<u32>),
    RowsOfIds(Vec<Vec<u32>>),
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Encoding {
    #[default]
    Float,
    /// Little-endian 32-bit floats.
    Base64,
}

#[derive(Serialize)]
struct Embedding<'a> {
    object: &'static str,
    index: usize,
    embedding: Vector<'a>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Vector<'a> {
    Float(&'a [f32]),
    Base64(String),
}

pub(crate) async fn embeddings(
    Shared(state): Shared<Arc<State>>,
    Extension(span): Extension<RequestSpan>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Error> {
    let wrong = |message: String| Error::wrong(Dialect::OpenAi, message);
    let body = body.map_err(|rejection| Error::new(rejection.status(), Dialect::OpenAi, rejection.body_text()))?;
    let request: EmbeddingsRequest =
        serde_json::from_slice(&body).map_err(|error| wrong(format!("the body: {error}")))?;
    let loaded = state.repository.model(&request.model, None);
    let loaded = &loaded.ok_or_else(|| Error::no_model(Dialect::OpenAi, &request.model, None))?;
    let tokenizer = loaded.tokenizer.as_ref().ok_or_else(|| wrong(format!("`{}` embeds no text", request.model)))?;
    let deadline = deadline(&headers);
    let size = loaded.found.spec.outputs[0].shape.last().and_then(|&size| usize::try_from(size).ok()).unwrap_or(0);
    let kept = request.dimensions.unwrap_or(size);
    // Before anything is computed. A model with a tokenizer has one output [rows, size].
    if !(1..=size).contains(&kept) {
        return Err(wrong(format!("`dimensions` is from 1 to {size}")));
    }
    let rows = match request.input {
        EmbeddingsInput::Text(text) => tokens(loaded, vec![text]).await,
        EmbeddingsInput::Texts(texts) => tokens(loaded, texts).await,
        EmbeddingsInput::Ids(ids) => tokenizer.checked(ids).map(|row| vec![row]),
        EmbeddingsInput::RowsOfIds(rows) if rows.is_empty() || rows.len() > TEXTS_MAX => {
            Err(format!("from 1 to {} rows at once", TEXTS_MAX))
        }
        EmbeddingsInput::RowsOfIds(rows) => rows.into_iter().map(|row| tokenizer.checked(row)).collect(),
    };
    let rows = rows.map_err(|error| wrong(format!("`input`: {error}")))?;
    let prompt_tokens: usize = rows.iter().map(Vec::len).sum();
    let done = infer::run(loaded, Input::Tokens(rows), deadline, &span.0).await;
    let done = done.map_err(|error| error.in_dialect(Dialect::OpenAi))?;
    let [output] = done.outputs.as_slice() else {
        return Err(Error::internal("the model gave no embeddings").in_dialect(Dialect::OpenAi));
    };
    let (numbers, _) = output.data.as_chunks::<4>();
    let vectors: Vec<Vec<f32>> = numbers.chunks_exact(size).map(|row| shortened(row, kept)).collect();
    let data: Vec<Embedding<'_>> = vectors
        .iter()
        .enumerate()
        .map(|(index, vector)| Embedding {
            object: "embedding",
            index,
            embedding: encoded(vector, request.encoding_format.unwrap_or_default()),
        })
        .collect();
    let usage = json!({ "prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens });
    let answer = json!({ "object": "list", "model": request.model, "usage": usage });
    let mut response = Json(List { rest: answer, data }).into_response();
    identify(&mut response, loaded);
    Ok(response)
}

#[derive(Serialize)]
struct List<'a> {
    #[serde(flatten)]
    rest: Value,
    data: Vec<Embedding<'a>>,
}

/// The first numbers of a vector, brought back to unit length: what `dimensions` means.
fn shortened(row: &[[u8; 4]], kept: usize) -> Vec<f32> {
    let mut vector: Vec<f32> = row[..kept].iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    if kept < row.len() {
        let length = vector.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-12);
        vector.iter_mut().for_each(|x| *x /= length);
    }
    vector
}

fn encoded(vector: &[f32], encoding: Encoding) -> Vector<'_> {
    match encoding {
        Encoding::Float => Vector::Float(vector),
        Encoding::Base64 => {
            let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
            Vector::Base64(base64::engine::general_purpose::STANDARD.encode(bytes))
        }
    }
}

pub(crate) async fn models(Shared(state): Shared<Arc<State>>) -> Json<Value> {
    let data: Vec<Value> = state.repository.models().keys().map(|name| described(name)).collect();
    Json(json!({ "object": "list", "data": data }))
}

pub(crate) async fn model(state: Shared<Arc<State>>, Path(name): Path<String>) -> Result<Json<Value>, Error> {
    let known = state.repository.model(&name, None).is_some();
    if known { Ok(Json(described(&name))) } else { Err(Error::no_model(Dialect::OpenAi, &name, None)) }
}

fn described(name: &str) -> Value {
    json!({ "id": name, "object": "model", "created": 0, "owned_by": "isochrone" })
}
