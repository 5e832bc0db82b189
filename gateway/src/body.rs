//! Bodies in both directions. Frames are passed on as they come; none is copied.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderValue};
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use serde_json::json;
use tokio::time::Sleep;

use crate::attempt::Frames;
use crate::call::{self, BodyMode, Call, ModelIn};
use crate::error::Error;
use crate::respond::Finish;

/// How many bytes of a stream are read to find the model in its first message.
const PEEK_MAX: usize = 64 << 10;

/// The most that is read, and waited, of a body whose request is refused.
const DISCARD_MAX: usize = 64 << 10;
const DISCARD_FOR: Duration = Duration::from_millis(50);

/// Bytes that are kept and can be sent again.
#[derive(Clone, Debug)]
enum Chunks {
    /// The usual case, without an allocation.
    One(Option<Bytes>),
    Many(Arc<[Bytes]>),
}

impl Chunks {
    fn as_slice(&self) -> &[Bytes] {
        match self {
            Chunks::One(chunk) => chunk.as_slice(),
            Chunks::Many(chunks) => chunks,
        }
    }
}

/// A request's body as far as it has been received.
#[derive(Debug)]
pub(crate) struct Received {
    chunks: Chunks,
    /// What has not been read. Without it the body is whole and can be sent any number of times.
    rest: Option<Incoming>,
    /// The rest has been given to an attempt and cannot be had again.
    gone: bool,
    trailers: Option<HeaderMap>,
}

/// The bounds on receiving.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ReceiveLimits {
    pub(crate) whole_bytes: usize,
    pub(crate) keep_bytes: usize,
    pub(crate) timeout: Duration,
}

impl Received {
    /// Whether it can be sent once more after it has been sent.
    pub(crate) fn is_whole(&self) -> bool {
        self.rest.is_none() && !self.gone
    }

    /// Whether it can be sent now: it is whole, or its rest has not been touched.
    pub(crate) fn is_at_hand(&self) -> bool {
        !self.gone
    }

    /// The frames at hand.
    pub(crate) fn chunks(&self) -> &[Bytes] {
        self.chunks.as_slice()
    }

    /// The body for one attempt. What streams can be taken once: the caller asks [`is_whole`](Self::is_whole) before it
    /// sends a body again, or has it [put back](Self::put_back).
    pub(crate) fn for_attempt(&mut self) -> RequestBody {
        let rest = self.rest.take();
        self.gone |= rest.is_some();
        let client_broke = rest.is_some().then(Arc::default);
        RequestBody { chunks: self.chunks.clone(), next: 0, rest, trailers: self.trailers.clone(), client_broke }
    }

    /// The body once more, of a request whose body is whole.
    pub(crate) fn again(&self) -> RequestBody {
        debug_assert!(self.is_whole(), "a body that cannot be sent again");
        let (chunks, trailers) = (self.chunks.clone(), self.trailers.clone());
        RequestBody { chunks, next: 0, rest: None, trailers, client_broke: None }
    }

    /// Takes back a body of which nothing was sent.
    pub(crate) fn put_back(&mut self, unsent: Option<Box<RequestBody>>) {
        if let Some(unsent) = unsent {
            debug_assert_eq!(unsent.next, 0, "a body of which something was sent");
            self.gone &= unsent.rest.is_none();
            self.rest = unsent.rest;
        }
    }
}

/// The model that a call names, and its version if that is named too.
pub(crate) type Named = (Box<str>, Option<Box<str>>);

/// Receives as much of a body as its call needs before it can be sent on, and the model that it names.
///
/// # Errors
/// A body that is too large, too slow, broken off, or does not name the model that it must.
pub(crate) async fn receive(
    headers: &HeaderMap,
    body: Incoming,
    call: &Call,
    limits: ReceiveLimits,
) -> Result<(Received, Option<Named>), Error> {
    if body.is_end_stream() {
        let received = Received { chunks: Chunks::One(None), rest: None, gone: false, trailers: None };
        return model(headers, &received, call).map(|model| (received, model));
    }
    let declared = body.size_hint().lower();
    let most = match call.body {
        BodyMode::Whole if declared > limits.whole_bytes as u64 => return Err(Error::OversizeBody),
        BodyMode::Whole => limits.whole_bytes,
        // What will not fit is not collected at all; only the model is looked for.
        BodyMode::Keep if declared > limits.keep_bytes as u64 => 0,
        BodyMode::Keep => limits.keep_bytes,
        BodyMode::Stream => 0,
    };
    let collected = collect(headers, body, call, most);
    let received = tokio::time::timeout(limits.timeout, collected).await.map_err(|_| Error::SlowBody)??;
    if call.body == BodyMode::Whole && received.rest.is_some() {
        return Err(Error::OversizeBody);
    }
    let model = model(headers, &received, call)?;
    Ok((received, model))
}

/// Takes in the rest of a small body whose request is refused. Over HTTP/2 an answer before the body's end is followed by a
/// reset of the stream, which is in order (RFC 9113, section 8.1) but makes some clients forget the answer.
pub(crate) async fn discard(mut body: Incoming) {
    let all = async {
        let mut left = DISCARD_MAX;
        while let Some(Ok(frame)) = body.frame().await {
            match left.checked_sub(frame.data_ref().map_or(0, Bytes::len)) {
                Some(less) => left = less,
                None => return,
            }
        }
    };
    // A client that does not send it soon has to live with the reset.
    let _ = tokio::time::timeout(DISCARD_FOR, all).await;
}

/// Frames smaller than this are put together: as they came, each would cost more than it holds.
const SMALL: usize = 1 << 10;
const TOGETHER: usize = 16 << 10;

/// How often a stream's beginning is searched for its model at each frame; after that, whenever it has doubled.
const LOOKS: usize = 64;

/// What has been received of a body.
#[derive(Default)]
struct Kept {
    /// The usual case: one frame, and no allocation.
    one: Option<Bytes>,
    many: Vec<Bytes>,
    small: BytesMut,
    size: usize,
}

impl Kept {
    fn push(&mut self, data: Bytes) {
        self.size += data.len();
        if self.one.is_none() && self.many.is_empty() && self.small.is_empty() {
            self.one = Some(data);
            return;
        }
        if let Some(first) = self.one.take() {
            self.append(first);
        }
        self.append(data);
    }

    fn append(&mut self, data: Bytes) {
        if data.len() < SMALL {
            self.small.extend_from_slice(&data);
            if self.small.len() < TOGETHER {
                return;
            }
        }
        if !self.small.is_empty() {
            self.many.push(self.small.split().freeze());
        }
        if data.len() >= SMALL {
            self.many.push(data);
        }
    }

    fn joined(&self) -> Bytes {
        match &self.one {
            Some(one) => one.clone(),
            None => [self.many.concat().as_slice(), &self.small].concat().into(),
        }
    }

    fn finished(mut self) -> Chunks {
        if self.many.is_empty() && self.small.is_empty() {
            return Chunks::One(self.one);
        }
        if !self.small.is_empty() {
            self.many.push(self.small.freeze());
        }
        Chunks::Many(self.many.into())
    }
}

/// Reads frames until the body ends, or until there are more bytes than `most` and the model has been found.
async fn collect(headers: &HeaderMap, mut body: Incoming, call: &Call, most: usize) -> Result<Received, Error> {
    let (mut kept, mut trailers) = (Kept::default(), None);
    let needs_model = call.model == ModelIn::FirstMessage;
    let (mut looks, mut looked) = (0, 0);
    loop {
        if kept.size > most || (most == 0 && !needs_model) {
            if !needs_model || kept.size > PEEK_MAX {
                break;
            }
            if looks < LOOKS || kept.size >= looked * 2 {
                (looks, looked) = (looks + 1, kept.size);
                let joined = kept.joined();
                let plain = call::plain(headers, &joined)?;
                if plain.is_some_and(|plain| !matches!(call::model_in_message(&plain), Ok(None))) {
                    break;
                }
            }
        }
        let Some(frame) = body.frame().await else {
            return Ok(Received { chunks: kept.finished(), rest: None, gone: false, trailers });
        };
        match frame.map_err(|_| Error::BrokenBody)?.into_data() {
            Ok(data) => {
                kept.push(data);
                // Knowing the end without asking for one more frame saves a turn of the loop.
                if body.is_end_stream() {
                    return Ok(Received { chunks: kept.finished(), rest: None, gone: false, trailers });
                }
            }
            Err(frame) => trailers = frame.into_trailers().ok(),
        }
    }
    Ok(Received { chunks: kept.finished(), rest: Some(body), gone: false, trailers })
}

/// The model that the call names.
fn model(headers: &HeaderMap, received: &Received, call: &Call) -> Result<Option<Named>, Error> {
    let contiguous = || match received.chunks() {
        [one] => one.clone(),
        many => many.concat().into(),
    };
    match &call.model {
        ModelIn::None => Ok(None),
        ModelIn::Path(name) => Ok(Some((name.clone(), call.version.clone()))),
        ModelIn::JsonBody => call::model_in_json(&contiguous()).map(|name| Some((name.into(), None))),
        ModelIn::FirstMessage => {
            let body = contiguous();
            let none = || Error::Malformed("the first message names no model, or is too long for it to be found");
            let message = call::plain(headers, &body)?.ok_or_else(none)?;
            let name = call::model_in_message(&message)?.ok_or_else(none)?;
            Ok(Some((name.into(), call::version_in_message(&message).map(Into::into))))
        }
    }
}

/// The body of one attempt: what was kept, then the rest as it comes.
#[derive(Debug)]
pub(crate) struct RequestBody {
    chunks: Chunks,
    next: usize,
    rest: Option<Incoming>,
    trailers: Option<HeaderMap>,
    /// Set when the client's side of `rest` breaks.
    client_broke: Option<Arc<AtomicBool>>,
}

/// The client's side of a body broke: not the endpoint's fault.
#[derive(Debug, thiserror::Error)]
#[error("the client's body broke off")]
pub(crate) struct ClientBodyError(#[source] hyper::Error);

impl RequestBody {
    /// A body of nothing.
    pub(crate) fn empty() -> RequestBody {
        RequestBody { chunks: Chunks::One(None), next: 0, rest: None, trailers: None, client_broke: None }
    }

    /// Whether the client's side has broken, to be asked when the body itself is gone.
    pub(crate) fn client_broke(&self) -> Option<Arc<AtomicBool>> {
        self.client_broke.clone()
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = ClientBodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, ClientBodyError>>> {
        if let Some(chunk) = self.chunks.as_slice().get(self.next).cloned() {
            self.next += 1;
            return Poll::Ready(Some(Ok(Frame::data(chunk))));
        }
        match &mut self.rest {
            Some(rest) => Pin::new(rest).poll_frame(context).map_err(|error| {
                if let Some(broke) = &self.client_broke {
                    broke.store(true, Relaxed);
                }
                ClientBodyError(error)
            }),
            None => Poll::Ready(self.trailers.take().map(|trailers| Ok(Frame::trailers(trailers)))),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.next >= self.chunks.as_slice().len()
            && self.trailers.is_none()
            && self.rest.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        let kept = self.chunks.as_slice().iter().skip(self.next).map(|chunk| chunk.len() as u64).sum();
        let rest = self.rest.as_ref().map_or(SizeHint::with_exact(0), Body::size_hint);
        let mut hint = SizeHint::new();
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper.saturating_add(kept));
        }
        hint.set_lower(rest.lower().saturating_add(kept));
        hint
    }
}

/// The body of an answer: the gateway's own words, or an endpoint's frames, read already or as they come. At its end,
/// however that comes, the request's last things are done: the connection goes back to its pool, the load falls, the line is
/// logged.
#[derive(Debug)]
pub(crate) struct ResponseBody {
    /// What has been read already, from `next` on.
    frames: Frames,
    next: usize,
    rest: Option<Rest>,
    trailers: Option<HeaderMap>,
    finish: Option<Box<Finish>>,
}

/// The part of an endpoint's answer that is passed on as it comes.
#[derive(Debug)]
struct Rest {
    body: Incoming,
    /// Set while a frame is waited for. Most answers come in one piece and never have it.
    silence: Option<Pin<Box<Sleep>>>,
    silence_max: Duration,
    in_band: InBand,
}

/// How a stream that breaks off says so: a truncated success would be the worst of all answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum InBand {
    /// It has no words for it: the client's connection or stream is broken off too.
    None,
    /// Server-sent events: one more event, in the caller's dialect.
    Events { openai: bool },
    /// gRPC: trailers with a status.
    Grpc,
}

/// What a stream says in its own words.
const BROKE_OFF: &str = "the region broke off in the middle of its answer";

/// Why an answer breaks off.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AnswerError {
    #[error("the endpoint broke off: {0}")]
    Broken(#[from] hyper::Error),
    #[error("the endpoint fell silent")]
    Silent,
}

impl ResponseBody {
    /// A body that is at hand.
    pub(crate) fn whole(mut frames: Frames, trailers: Option<HeaderMap>, finish: Box<Finish>) -> ResponseBody {
        // An answer of headers alone, as gRPC's refusals are, must end with them.
        frames.retain(|frame| !frame.is_empty());
        ResponseBody { frames, next: 0, rest: None, trailers, finish: Some(finish) }.begun()
    }

    /// A body that comes from an endpoint, as far as it has not been read. `silence_max` is the longest wait between two
    /// frames.
    pub(crate) fn stream(
        frames: Frames,
        body: Incoming,
        in_band: InBand,
        finish: Box<Finish>,
        silence_max: Duration,
    ) -> ResponseBody {
        let rest = Rest { body, silence: None, silence_max, in_band };
        ResponseBody { frames, next: 0, rest: Some(rest), trailers: None, finish: Some(finish) }.begun()
    }

    /// hyper does not ask an empty body for frames.
    fn begun(mut self) -> ResponseBody {
        if self.is_end_stream() {
            self.complete();
        }
        self
    }

    fn complete(&mut self) {
        if let Some(mut finish) = self.finish.take() {
            finish.complete();
        }
    }

    /// The endpoint broke off in the middle.
    fn broken(&mut self, error: AnswerError) -> Option<Result<Frame<Bytes>, AnswerError>> {
        let in_band = self.rest.take().map_or(InBand::None, |rest| rest.in_band);
        if let Some(mut finish) = self.finish.take() {
            finish.broken();
        }
        match in_band {
            InBand::None => Some(Err(error)),
            InBand::Events { openai } => {
                let words = BROKE_OFF;
                let error = if openai {
                    json!({ "message": words, "type": "server_error", "code": Error::Broken.code() })
                } else {
                    json!(words)
                };
                // An event that was cut off is ended first, so that this one is not taken for a part of it.
                let event = format!("\n\ndata: {}\n\n", json!({ "error": error }));
                Some(Ok(Frame::data(event.into())))
            }
            InBand::Grpc => {
                let mut trailers = HeaderMap::new();
                trailers.insert("grpc-status", HeaderValue::from(u16::from(Error::Broken.grpc_code())));
                if let Ok(words) = HeaderValue::try_from(BROKE_OFF) {
                    trailers.insert("grpc-message", words);
                }
                Some(Ok(Frame::trailers(trailers)))
            }
        }
    }
}

impl Rest {
    fn poll_frame(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, AnswerError>>> {
        match Pin::new(&mut self.body).poll_frame(context) {
            Poll::Ready(frame) => {
                self.silence = None;
                Poll::Ready(frame.map(|frame| frame.map_err(AnswerError::Broken)))
            }
            Poll::Pending => {
                let silence = self.silence.get_or_insert_with(|| Box::pin(tokio::time::sleep(self.silence_max)));
                silence.as_mut().poll(context).map(|()| Some(Err(AnswerError::Silent)))
            }
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = AnswerError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, AnswerError>>> {
        let this = &mut *self;
        let frame = if let Some(frame) = this.frames.get_mut(this.next) {
            this.next += 1;
            Some(Ok(Frame::data(std::mem::take(frame))))
        } else if let Some(rest) = &mut this.rest {
            std::task::ready!(rest.poll_frame(context))
        } else {
            this.trailers.take().map(|trailers| Ok(Frame::trailers(trailers)))
        };
        match frame {
            Some(Ok(frame)) => {
                if let (Some(finish), Some(data)) = (&mut this.finish, frame.data_ref()) {
                    finish.sent(data.len());
                }
                if this.is_end_stream() {
                    this.complete();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => Poll::Ready(this.broken(error)),
            None => {
                this.complete();
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.next >= self.frames.len()
            && self.trailers.is_none()
            && self.rest.as_ref().is_none_or(|rest| rest.body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        let kept = self.frames.iter().skip(self.next).map(|frame| frame.len() as u64).sum();
        let Some(rest) = &self.rest else { return SizeHint::with_exact(kept) };
        let hint = rest.body.size_hint();
        match hint.exact() {
            Some(rest) => SizeHint::with_exact(kept + rest),
            None => SizeHint::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_kept_in_order_and_small_ones_together() {
        let frames = [3, 5000, 10, 10, 2000, 1, 1023, 1024, 7].map(|length| Bytes::from(vec![length as u8; length]));
        let all = frames.concat();
        let mut kept = Kept::default();
        frames.into_iter().for_each(|frame| kept.push(frame));
        assert_eq!((kept.joined(), kept.size), (all.clone().into(), all.len()));
        let chunks = kept.finished();
        assert_eq!(chunks.as_slice().concat(), all);
        assert_eq!(chunks.as_slice().len(), 7, "10 and 10, and 1 and 1023, went together");

        let mut bytes = Kept::default();
        (0..100_000_u32).for_each(|at| bytes.push(Bytes::copy_from_slice(&[at as u8])));
        let chunks = bytes.finished();
        assert!(chunks.as_slice().len() < 10, "{}", chunks.as_slice().len());
        assert!(chunks.as_slice().concat().iter().enumerate().all(|(at, byte)| *byte == at as u8));

        let mut one = Kept::default();
        one.push(Bytes::from_static(b"all"));
        assert!(matches!(one.finished(), Chunks::One(Some(_))));
    }
}
