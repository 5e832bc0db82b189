//! From a request to what it asks for, from an answer to what is kept of it, and back.

use std::borrow::Cow;
use std::io::Read;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{BufMut, Bytes, BytesMut};
use flate2::bufread::{GzDecoder, ZlibDecoder};
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode};
use isochrone_core::region::RegionIndex;
use isochrone_tensor::answer::{Answer as Tensors, Http};
use isochrone_tensor::request::{Inexact, Request};
use prost::Message;
use smallvec::smallvec;

use super::Key;
use super::control::Control;
use super::status::Status;
use crate::attempt::{Answer, AnswerBody, Attempted};
use crate::body::Received;
use crate::call::{self, Dialect};
use crate::catalog::Served;
use crate::upstream::REGION;

const HEADER_LENGTH: HeaderName = HeaderName::from_static("inference-header-content-length");
const VERSION: HeaderName = HeaderName::from_static("isochrone-model-version");
const DIGEST: HeaderName = HeaderName::from_static("isochrone-model-digest");
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

/// Bytes of an entry beside its tensors: the entry itself, the key, and what the map has for each.
const OVERHEAD: usize = 1270;

/// Bytes of a tensor beside its name, shape and elements.
const TENSOR: usize = 200;

/// A request whose answer can be kept.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) key: Key,
    pub(super) scope: &'static str,
    pub(super) control: Control,
    pub(super) request: Request,
    /// The version that it gets.
    pub(super) served: Served,
    pub(super) grpc: bool,
}

/// What is kept of an answer.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) answer: Tensors,
    /// Where it was computed.
    pub(super) region: Arc<str>,
    pub(super) tenant: Box<str>,
    pub(super) stored: Instant,
    /// Its digest as the worker says it on each answer.
    digest: HeaderValue,
    version: HeaderValue,
    /// In bytes.
    pub(super) cost: usize,
}

pub(super) fn is_grpc(request: &Attempted<'_>) -> bool {
    request.call.dialect == Dialect::Grpc
}

/// Whether it is an inference whose tensors can be read.
pub(super) fn is_inference(request: &Attempted<'_>) -> bool {
    let path = request.head.uri.path();
    match request.call.dialect {
        Dialect::Oip => request.head.method == Method::POST && path.ends_with("/infer"),
        Dialect::Grpc => path.ends_with("/ModelInfer"),
        Dialect::OpenAi => false,
    }
}

/// Whether another may be told something better than this answer.
pub(super) fn is_failure(answer: &Answer) -> bool {
    let trailers = match &answer.body {
        AnswerBody::Whole { trailers, .. } => trailers.as_ref(),
        AnswerBody::Stream { .. } => None,
    };
    let grpc = answer.head.headers.get(GRPC_STATUS).or_else(|| trailers?.get(GRPC_STATUS));
    // DEADLINE_EXCEEDED is the asking client's own, or the worker's.
    answer.status() >= 500 || answer.status() == 429 || grpc.is_some_and(|status| status.as_bytes() == b"4")
}

/// Reads what a request asks for.
///
/// # Errors
/// It cannot be mapped exactly.
pub(super) fn read(request: &Attempted<'_>, body: &Received) -> Result<Request, Inexact> {
    let headers = &request.head.headers;
    let bytes = joined(body.chunks());
    if is_grpc(request) {
        return Request::from_grpc(&message(headers, &bytes)?);
    }
    if headers.contains_key(CONTENT_ENCODING) {
        return Err(Inexact("encoded"));
    }
    Request::from_http(&bytes, headers.get(&HEADER_LENGTH).map(HeaderValue::as_bytes))
}

/// The one message of a gRPC body, without its prefix.
fn message(headers: &HeaderMap, body: &Bytes) -> Result<Bytes, Inexact> {
    let plain = match call::plain(headers, body).map_err(|_| Inexact("encoded"))?.ok_or(Inexact("malformed"))? {
        Cow::Borrowed(_) => body.clone(),
        Cow::Owned(inflated) => inflated.into(),
    };
    let length = plain.first_chunk::<5>().map(|[_, length @ ..]| u32::from_be_bytes(*length) as usize);
    if length.is_none_or(|length| plain.len() != 5 + length) {
        return Err(Inexact("malformed"));
    }
    Ok(plain.slice(5..))
}

fn joined(chunks: &[Bytes]) -> Bytes {
    match chunks {
        [one] => one.clone(),
        many => {
            let mut bytes = BytesMut::with_capacity(many.iter().map(Bytes::len).sum());
            many.iter().for_each(|chunk| bytes.extend_from_slice(chunk));
            bytes.freeze()
        }
    }
}

impl Asked {
    /// What is kept of an answer.
    ///
    /// # Errors
    /// Why it is not, in a word.
    pub(super) fn entry(&self, request: &Attempted<'_>, answer: &Answer) -> Result<Entry, &'static str> {
        let config = &request.snapshot.config.cache;
        let AnswerBody::Whole { frames, trailers } = &answer.body else { return Err("size") };
        let headers = &answer.head.headers;
        let said = |name: &HeaderName| headers.get(name).map(HeaderValue::as_bytes);
        let grpc_status = said(&GRPC_STATUS).or_else(|| trailers.as_ref()?.get(GRPC_STATUS).map(HeaderValue::as_bytes));
        if answer.head.status != StatusCode::OK || (self.grpc && grpc_status != Some(b"0")) {
            return Err("status");
        }
        // It stands elsewhere than its file says: what it has computed is nobody else's.
        let region = &request.snapshot.regions[answer.region.get()].name;
        if said(&REGION).is_some_and(|named| named != region.as_bytes()) {
            return Err("other region");
        }
        // Another version may have answered than the one that was expected.
        if said(&VERSION) != Some(self.served.version.as_bytes())
            || said(&DIGEST) != Some(self.served.digest.as_bytes())
        {
            return Err("other version");
        }
        let bytes = joined(frames);
        let body = if self.grpc { bytes } else { inflated(headers, bytes, config.entry_bytes)? };
        let read = if self.grpc {
            Tensors::from_grpc(message(headers, &body).map_err(|why| why.0)?)
        } else {
            Tensors::from_http(&body, said(&HEADER_LENGTH))
        };
        let tensors = read.map_err(|why| why.0)?;
        // Only what can be written again byte for byte is understood.
        let (again, header) = self.written(&tensors).ok_or("inexact")?;
        let same = again == body && header.map(|header| header.to_string()) == text(headers, &HEADER_LENGTH);
        if !same || !tensors.answers(&self.request) || *tensors.model != *self.served.name {
            return Err("inexact");
        }
        let cost = cost(&tensors);
        if cost > config.entry_bytes {
            return Err("size");
        }
        // Of their own: they are slices of the whole answer.
        let outputs = tensors.outputs.into_iter().map(|mut tensor| {
            tensor.data = Bytes::copy_from_slice(&tensor.data);
            tensor
        });
        let value = |text: &str| HeaderValue::from_str(text).map_err(|_| "inexact");
        Ok(Entry {
            answer: Tensors { outputs: outputs.collect(), ..tensors },
            region: Arc::clone(region),
            tenant: request.snapshot.config.tenants[request.ask.tenant].name.clone(),
            stored: super::now(),
            digest: value(&self.served.digest)?,
            version: value(&self.served.version)?,
            cost,
        })
    }

    /// What is told of an entry that is given.
    pub(super) fn hit(&self, entry: &Entry, ttl: Duration, collapsed: bool) -> Status {
        Status::Hit { age: entry.stored.elapsed(), ttl, scope: self.scope, collapsed }
    }

    /// An answer as this request wants it: the body, and where its binary part begins.
    fn written(&self, tensors: &Tensors) -> Option<(Bytes, Option<usize>)> {
        let id = self.request.id.as_deref();
        if self.grpc {
            let message = tensors.to_grpc(id);
            let length = message.encoded_len();
            let mut body = BytesMut::with_capacity(5 + length);
            body.put_u8(0);
            body.put_u32(u32::try_from(length).ok()?);
            message.encode(&mut body).ok()?;
            return Some((body.freeze(), None));
        }
        let Http { body, header } = tensors.to_http(id, &self.request.outputs, self.request.binary).ok()?;
        Some((body.into(), header))
    }

    /// What is kept, as an answer to this request. `None`: its encoding cannot say it.
    pub(super) fn rendered(&self, entry: &Entry, region: RegionIndex) -> Option<Answer> {
        let (body, header) = self.written(&entry.answer)?;
        let mut head = Response::new(()).into_parts().0;
        head.headers.insert(VERSION, entry.version.clone());
        head.headers.insert(DIGEST, entry.digest.clone());
        let kind = match header {
            _ if self.grpc => "application/grpc",
            None => "application/json",
            Some(header) => {
                head.headers.insert(HEADER_LENGTH, HeaderValue::from(header));
                "application/octet-stream"
            }
        };
        head.headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
        if !self.grpc {
            head.headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
        }
        let trailers = self.grpc.then(|| HeaderMap::from_iter([(GRPC_STATUS, HeaderValue::from_static("0"))]));
        let body = AnswerBody::Whole { frames: smallvec![body], trailers };
        Some(Answer { head, body, upstream: None, region, number: 0 })
    }
}

/// What an entry costs in memory, in bytes.
fn cost(answer: &Tensors) -> usize {
    let texts = answer.parameters.iter().map(|(name, value)| name.len() + value.len());
    let tensors =
        answer.outputs.iter().map(|tensor| TENSOR + tensor.name.len() + tensor.shape.len() * 8 + tensor.data.len());
    OVERHEAD + answer.model.len() + answer.version.len() + texts.sum::<usize>() + tensors.sum::<usize>()
}

fn text(headers: &HeaderMap, name: &HeaderName) -> Option<String> {
    headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned)
}

/// An answer without its content coding, which a worker uses where the client takes it.
fn inflated(headers: &HeaderMap, body: Bytes, most: usize) -> Result<Bytes, &'static str> {
    let mut plain = Vec::new();
    let most = most as u64 + 1;
    let read = match headers.get(CONTENT_ENCODING).map(HeaderValue::as_bytes) {
        None | Some(b"identity") => return Ok(body),
        Some(b"gzip") => GzDecoder::new(&*body).take(most).read_to_end(&mut plain),
        Some(b"deflate") => ZlibDecoder::new(&*body).take(most).read_to_end(&mut plain),
        Some(_) => return Err("encoded"),
    };
    match read {
        Ok(size) if size as u64 == most => Err("size"),
        Ok(_) => Ok(plain.into()),
        Err(_) => Err("encoded"),
    }
}

#[cfg(test)]
mod tests {
    use isochrone_tensor::{Datatype, Tensor};

    use super::*;
    use crate::cache::Cache;

    /// A small answer, as a worker's embedding of so many numbers.
    fn entry(numbers: usize) -> Entry {
        let data: Vec<u8> = (0..numbers * 4).map(|at| at as u8).collect();
        let output =
            Tensor { name: "y".into(), datatype: Datatype::Fp32, shape: vec![1, numbers as i64], data: data.into() };
        let parameters = std::collections::BTreeMap::from([("digest".to_owned(), "0123456789abcdef".repeat(4))]);
        let answer = Tensors { model: "tiny".into(), version: "1".into(), parameters, outputs: vec![output] };
        let value = |text: String| HeaderValue::from_str(&text).expect("a value");
        Entry {
            cost: cost(&answer),
            answer,
            region: "eu-west".into(),
            tenant: "demo".into(),
            stored: Instant::now(),
            digest: value("0123456789abcdef".repeat(4)),
            version: value("1".into()),
        }
    }

    fn resident() -> f64 {
        let statm = std::fs::read_to_string("/proc/self/statm").expect("readable");
        statm.split(' ').nth(1).and_then(|pages| pages.parse::<f64>().ok()).expect("a number") * 4096.0
    }

    /// Fills a cache with `count` entries and more, and compares what the process has grown by with what was configured.
    fn measured(numbers: usize, count: u64) {
        let one = entry(numbers).cost as u64;
        let config = crate::config::Cache {
            bytes: one * count,
            entry_bytes: 1 << 20,
            ttl: Duration::from_secs(3600),
            stale_while_revalidate: Duration::ZERO,
            stale_if_error: Duration::ZERO,
        };
        let before = resident();
        let cache = Cache::new(&config);
        for number in 0..count * 11 / 10 {
            let key: [u8; 32] = *blake3::hash(&number.to_le_bytes()).as_bytes();
            cache.entries.insert(Key(key), Arc::new(entry(numbers)));
        }
        let (entries, bytes) = cache.size();
        let ratio = (resident() - before) / bytes as f64;
        eprintln!("{entries} entries of {numbers} numbers, weighed at {one} bytes each; resident: {ratio:.2} of that");
        assert!((0.9..1.1).contains(&ratio), "{ratio}");
    }

    /// `cargo test --release -p isochrone-gateway --lib -- --ignored --nocapture million_small`; each by itself.
    #[test]
    #[ignore = "it takes gigabytes, and measures alone"]
    fn a_million_small_entries_cost_what_they_are_weighed_at() {
        measured(4, 1_000_000);
    }

    /// `… many_large`.
    #[test]
    #[ignore = "it takes gigabytes, and measures alone"]
    fn many_large_entries_cost_what_they_are_weighed_at() {
        measured(384, 1_000_000);
    }
}
