//! What is asked for: the path and method turned into one of the calls that the gateway knows.

use std::borrow::Cow;
use std::io::Read;

use bytes::Bytes;
use flate2::bufread::{GzDecoder, ZlibDecoder};
use http::header::{CONTENT_ENCODING, CONTENT_TYPE};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method};

use crate::error::Error;

/// The protocol that the caller speaks, and in which it must be refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// Open Inference Protocol v2 over HTTP.
    Oip,
    /// OpenAI's API.
    OpenAi,
    /// gRPC.
    Grpc,
}

/// Where the model is named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ModelIn {
    /// Nowhere: the call is about the server.
    None,
    /// In the path.
    Path(Box<str>),
    /// In the member `model` of a JSON body, which has to be read whole.
    JsonBody,
    /// In field 1 of the first protobuf message.
    FirstMessage,
}

/// How the body is handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BodyMode {
    /// Read whole, refused beyond a bound.
    Whole,
    /// Kept for a second attempt while it is small, streamed otherwise.
    Keep,
    /// Streamed, once.
    Stream,
}

/// One call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) dialect: Dialect,
    pub(crate) model: ModelIn,
    /// The version, where the path names one.
    pub(crate) version: Option<Box<str>>,
    pub(crate) body: BodyMode,
    /// Doing it twice does no harm. A body can still say otherwise: see [`may_be_sequence`].
    pub(crate) replayable: bool,
    /// Answered by the gateway: the list of models.
    pub(crate) list_models: bool,
}

/// The dialect that a path belongs to, so that even a malformed request is refused in words its client reads.
pub(crate) fn dialect(head: &Parts) -> Dialect {
    let grpc = head.headers.get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"));
    match head.uri.path() {
        _ if grpc => Dialect::Grpc,
        path if path == "/v1" || path.starts_with("/v1/") => Dialect::OpenAi,
        _ => Dialect::Oip,
    }
}

/// Finds the call.
///
/// # Errors
/// A path or a method that is not served, or a call that is not for tenants.
pub(crate) fn parse(head: &Parts, dialect: Dialect) -> Result<Call, Error> {
    match dialect {
        Dialect::Grpc => grpc(head),
        Dialect::OpenAi => openai(head),
        Dialect::Oip => oip(head),
    }
}

/// OpenAI's API, as far as workers speak it.
fn openai(head: &Parts) -> Result<Call, Error> {
    let (method, replayable) = match head.uri.path() {
        "/v1/embeddings" => (Method::POST, true),
        // Generation is never replayed: its client may have begun to read.
        "/v1/completions" | "/v1/chat/completions" => (Method::POST, false),
        "/v1/models" => (Method::GET, true),
        path => match path.strip_prefix("/v1/models/") {
            Some(name) => {
                allow(head, &Method::GET)?;
                let model = named(name)?;
                let (version, body) = (None, BodyMode::Keep);
                let dialect = Dialect::OpenAi;
                return Ok(Call { dialect, model, version, body, replayable: true, list_models: false });
            }
            None => return Err(Error::NoRoute),
        },
    };
    allow(head, &method)?;
    let list_models = method == Method::GET;
    Ok(Call {
        dialect: Dialect::OpenAi,
        model: if list_models { ModelIn::None } else { ModelIn::JsonBody },
        version: None,
        body: BodyMode::Whole,
        replayable,
        list_models,
    })
}

/// The Open Inference Protocol v2 over HTTP
/// (<https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md>), with the
/// statistics and repository extensions.
fn oip(head: &Parts) -> Result<Call, Error> {
    let path = head.uri.path();
    let mut segments = path.strip_prefix("/v2").ok_or(Error::NoRoute)?.split('/');
    if segments.next() != Some("") {
        return Err(Error::NoRoute);
    }
    let segments: [Option<&str>; 6] = std::array::from_fn(|_| segments.next());
    let get = |model| (Method::GET, model, BodyMode::Keep);
    let (method, model, body) = match segments {
        [None, ..] | [Some(""), None, ..] => get(ModelIn::None),
        [Some("health"), Some("live" | "ready"), None, ..] => get(ModelIn::None),
        [Some("models"), Some(model), None, ..] => get(named(model)?),
        [Some("models"), Some(model), Some("ready" | "config" | "stats"), None, ..] => get(named(model)?),
        [Some("models"), Some(model), Some("versions"), Some(_), None, _] => get(named(model)?),
        [Some("models"), Some(model), Some("versions"), Some(_), Some("ready" | "config" | "stats"), None] => {
            get(named(model)?)
        }
        [Some("models"), Some(model), Some("infer"), None, ..]
        | [Some("models"), Some(model), Some("versions"), Some(_), Some("infer"), None] => {
            (Method::POST, named(model)?, BodyMode::Keep)
        }
        [Some("repository"), Some("index"), None, ..] => (Method::POST, ModelIn::None, BodyMode::Keep),
        [Some("repository"), ..] => return Err(Error::CallForbidden),
        _ => return Err(Error::NoRoute),
    };
    allow(head, &method)?;
    let version = match segments {
        [Some("models"), _, Some("versions"), Some(version), ..] => match named(version)? {
            ModelIn::Path(version) if is_plain(&version) => Some(version),
            _ => return Err(Error::Malformed("a version is made of letters, digits, `.`, `_` and `-`")),
        },
        _ => None,
    };
    Ok(Call { dialect: Dialect::Oip, model, version, body, replayable: true, list_models: false })
}

/// Whether nobody could read anything but a name into it: `..` or `%2f` in a path is another path to some servers.
fn is_plain(segment: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    segment.bytes().all(plain) && !segment.bytes().all(|byte| byte == b'.')
}

/// Each path takes one method. HEAD is for whoever takes GET (RFC 9110, section 9.3.2), but workers do not.
fn allow(head: &Parts, method: &Method) -> Result<(), Error> {
    if head.method == *method {
        return Ok(());
    }
    Err(Error::MethodNotAllowed(if *method == Method::GET { "GET" } else { "POST" }))
}

fn named(segment: &str) -> Result<ModelIn, Error> {
    if segment.is_empty() {
        return Err(Error::NoRoute);
    }
    let name = percent_decoded(segment).ok_or(Error::Malformed("the model's name is not UTF-8"))?;
    let dots = |part: &str| matches!(part, "." | "..");
    if name.split(['/', '\\']).any(dots) || name.contains(|letter: char| letter.is_control() || letter == '\\') {
        return Err(Error::Malformed("the model's name has dot segments or control characters"));
    }
    Ok(ModelIn::Path(name.into()))
}

/// RFC 3986, section 2.1.
fn percent_decoded(segment: &str) -> Option<Cow<'_, str>> {
    if !segment.contains('%') {
        return Some(Cow::Borrowed(segment));
    }
    let mut decoded = Vec::with_capacity(segment.len());
    let mut bytes = segment.bytes();
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => {
                let mut digit = || char::from(bytes.next()?).to_digit(16);
                u8::try_from(digit()? * 16 + digit()?).ok()?
            }
            byte => byte,
        });
    }
    String::from_utf8(decoded).ok().map(Cow::Owned)
}

/// The protocol's gRPC service (`inference.GRPCInferenceService`) and gRPC's own health service.
fn grpc(head: &Parts) -> Result<Call, Error> {
    allow(head, &Method::POST)?;
    let call = |model, body, replayable| {
        Ok(Call { dialect: Dialect::Grpc, model, version: None, body, replayable, list_models: false })
    };
    let Some(method) = head.uri.path().strip_prefix("/inference.GRPCInferenceService/") else {
        return match head.uri.path() {
            "/grpc.health.v1.Health/Check" => call(ModelIn::None, BodyMode::Keep, true),
            "/grpc.health.v1.Health/Watch" => call(ModelIn::None, BodyMode::Keep, false),
            _ => Err(Error::NoRoute),
        };
    };
    match method {
        "ServerLive" | "ServerReady" | "ServerMetadata" | "RepositoryIndex" => {
            call(ModelIn::None, BodyMode::Keep, true)
        }
        // The model's name is field 1 of each of these requests.
        "ModelReady" | "ModelMetadata" | "ModelInfer" | "ModelConfig" | "ModelStatistics" => {
            call(ModelIn::FirstMessage, BodyMode::Keep, true)
        }
        "ModelStreamInfer" => call(ModelIn::FirstMessage, BodyMode::Stream, false),
        "RepositoryModelLoad" | "RepositoryModelUnload" => Err(Error::CallForbidden),
        _ => Err(Error::NoRoute),
    }
}

/// Whether the call asks a model to compute.
pub(crate) fn is_inference(head: &Parts) -> bool {
    let path = head.uri.path();
    head.method == Method::POST
        && (path.starts_with("/v1/") || path.ends_with("/infer") || path.ends_with("/ModelInfer"))
        || path.ends_with("/ModelStreamInfer")
}

/// The member `model` of a JSON body.
///
/// # Errors
/// A body that is no JSON object, or has no such member.
pub(crate) fn model_in_json(body: &[u8]) -> Result<Cow<'_, str>, Error> {
    #[derive(serde::Deserialize)]
    struct Named<'a> {
        #[serde(borrow)]
        model: Option<Cow<'a, str>>,
    }
    let named: Named<'_> =
        serde_json::from_slice(body).map_err(|_| Error::Malformed("the body is no JSON object that names a model"))?;
    named.model.ok_or(Error::Malformed("the body has no member `model`"))
}

/// The largest message that is inflated to read its model. A few kilobytes can swell to gigabytes.
const INFLATED_MAX: u64 = 8 << 20;

/// The first message that the body holds as it would be without compression, behind gRPC's prefix of five bytes.
/// `Ok(None)`: it is compressed, and more bytes are needed.
///
/// # Errors
/// It is compressed in a way that is not known, or is larger than what is inflated.
pub(crate) fn plain<'b>(head: &HeaderMap, body: &'b [u8]) -> Result<Option<Cow<'b, [u8]>>, Error> {
    let Some((&[1, length @ ..], rest)) = body.split_first_chunk::<5>() else { return Ok(Some(Cow::Borrowed(body))) };
    let Some(packed) = rest.get(..u32::from_be_bytes(length) as usize) else { return Ok(None) };
    let mut inflated = vec![0; 5];
    let (read, rest) = match head.get("grpc-encoding").map(HeaderValue::as_bytes) {
        Some(b"gzip") => {
            let mut inflater = GzDecoder::new(packed).take(INFLATED_MAX);
            (inflater.read_to_end(&mut inflated), inflater.into_inner().into_inner())
        }
        // As HTTP has it: within zlib's frame.
        Some(b"deflate") => {
            let mut inflater = ZlibDecoder::new(packed).take(INFLATED_MAX);
            (inflater.read_to_end(&mut inflated), inflater.into_inner().into_inner())
        }
        _ => return Err(Error::Malformed("the first message is compressed in a way that is not known here")),
    };
    match read {
        Ok(size) if size as u64 == INFLATED_MAX => Err(Error::OversizeBody),
        // Some inflate what follows as well, and would read another model there.
        Ok(_) if !rest.is_empty() => Err(Error::Malformed("the first message goes on behind what is compressed")),
        Ok(size) => {
            inflated[1..5].copy_from_slice(&(size as u32).to_be_bytes());
            Ok(Some(Cow::Owned(inflated)))
        }
        Err(_) => Err(Error::Malformed("the first message is not compressed as its head says")),
    }
}

/// Field 1 of the protobuf message that the body begins with, behind gRPC's prefix of five bytes.
/// `Ok(None)`: more bytes are needed.
///
/// # Errors
/// A message that is malformed, or gives the field twice: a worker would take the last, and a check of the first would
/// have checked another model.
pub(crate) fn model_in_message(body: &[u8]) -> Result<Option<&str>, Error> {
    const MALFORMED: Error = Error::Malformed("the message is no protobuf that names one model");
    let Some((&[compressed, length @ ..], rest)) = body.split_first_chunk::<5>() else { return Ok(None) };
    if compressed != 0 {
        return Err(Error::Malformed("the first message is compressed; its model cannot be read"));
    }
    let length = u32::from_be_bytes(length) as usize;
    let whole = rest.len() >= length;
    let mut message = &rest[..rest.len().min(length)];
    let mut found = None;
    // Field 1 comes first in practice, but protobuf does not promise it.
    while !message.is_empty() {
        let field = field(&mut message).map_err(|()| MALFORMED)?;
        match field {
            // A field that does not end within a whole message never will; in a part of one it may.
            None if whole => return Err(MALFORMED),
            None => return Ok(found),
            Some((1, name)) => {
                let name = std::str::from_utf8(name).map_err(|_| MALFORMED)?;
                if found.replace(name).is_some() {
                    return Err(MALFORMED);
                }
            }
            Some(_) => {}
        }
    }
    // A message that has ended without the field has its default: no name, which no region declares.
    Ok(found.or(whole.then_some("")))
}

/// Field 2 of the protobuf message that the body begins with: the version, of each call that names a model in field 1.
/// An empty one is none. One that cannot be read is [`UNREAD_VERSION`], which no region declares: only those that declare any
/// version are left.
pub(crate) fn version_in_message(body: &[u8]) -> Option<&str> {
    let (&[_, length @ ..], rest) = body.split_first_chunk::<5>()?;
    let length = u32::from_be_bytes(length) as usize;
    let Some(mut message) = rest.get(..length) else { return Some(UNREAD_VERSION) };
    let mut found: &[u8] = b"";
    while let Ok(Some((number, bytes))) = field(&mut message) {
        if number == 2 {
            found = bytes;
        }
    }
    let version = std::str::from_utf8(found).unwrap_or(UNREAD_VERSION);
    (!version.is_empty()).then_some(version)
}

/// What a version is taken for that is not there yet or is no text.
const UNREAD_VERSION: &str = "\u{fffd}";

/// Takes one field off the front: its number, and its bytes if it has a length. `None`: it is cut off.
fn field<'m>(message: &mut &'m [u8]) -> Result<Option<(u64, &'m [u8])>, ()> {
    let Some(tag) = varint(message) else { return Ok(None) };
    let size = match tag & 7 {
        0 => varint(message).map(|_| 0),
        1 => Some(8),
        2 => varint(message),
        5 => Some(4),
        _ => return Err(()),
    };
    let split = size.and_then(|size| message.split_at_checked(usize::try_from(size).ok()?));
    Ok(split.map(|(bytes, rest)| {
        *message = rest;
        // Only a field with a length can be the name.
        (if tag & 7 == 2 { tag >> 3 } else { 0 }, bytes)
    }))
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// Whether the body may ask for a stateful sequence (`sequence_id` among its parameters), which must not be sent twice.
///
/// A search for the name, which stands as it is in JSON and in protobuf alike. Where it could stand in another form (JSON's
/// `\u` escapes, a compressed body) the answer is that it may: the body is then sent once.
pub(crate) fn may_be_sequence(head: &Parts, chunks: &[Bytes]) -> bool {
    let joined;
    let body: &[u8] = match chunks {
        [] => return false,
        [one] => one,
        many => {
            joined = many.concat();
            &joined
        }
    };
    let has = |name: &[u8]| memchr::memmem::find(body, name).is_some();
    let packed = || head.headers.contains_key(CONTENT_ENCODING) || head.headers.contains_key("grpc-encoding");
    let hidden = || packed() || (has(b"\\u") && has(b"\"parameters\""));
    has(b"sequence_id") || hidden()
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn parsed(method: &str, path: &str, grpc: bool) -> Result<Call, Error> {
        let kind = if grpc { "application/grpc+proto" } else { "application/json" };
        let request = Request::builder().method(method).uri(path).header(CONTENT_TYPE, kind).body(());
        let head = request.expect("valid").into_parts().0;
        parse(&head, dialect(&head))
    }

    #[test]
    fn the_calls_of_the_clients_are_known() {
        let model = |name: &str| ModelIn::Path(name.into());
        let rows = [
            ("GET", "/v2", ModelIn::None),
            ("GET", "/v2/", ModelIn::None),
            ("GET", "/v2/health/live", ModelIn::None),
            ("GET", "/v2/health/ready", ModelIn::None),
            ("GET", "/v2/models/m", model("m")),
            ("GET", "/v2/models/m/ready", model("m")),
            ("GET", "/v2/models/m/config", model("m")),
            ("GET", "/v2/models/m/stats", model("m")),
            ("GET", "/v2/models/m/versions/1", model("m")),
            ("GET", "/v2/models/m/versions/1/ready", model("m")),
            ("POST", "/v2/models/m/infer", model("m")),
            ("POST", "/v2/models/m/versions/1/infer", model("m")),
            ("POST", "/v2/models/org%2Fm/infer", model("org/m")),
            ("POST", "/v2/repository/index", ModelIn::None),
            ("POST", "/v1/embeddings", ModelIn::JsonBody),
            ("POST", "/v1/chat/completions", ModelIn::JsonBody),
            ("GET", "/v1/models", ModelIn::None),
            ("GET", "/v1/models/m", model("m")),
        ];
        for (method, path, expected) in rows {
            assert_eq!(parsed(method, path, false).map(|call| call.model), Ok(expected), "{method} {path}");
        }
    }

    #[test]
    fn what_is_not_served_is_refused_with_its_reason() {
        let rows = [
            ("GET", "/", Error::NoRoute),
            ("GET", "/v2x", Error::NoRoute),
            ("GET", "/v2/models", Error::NoRoute),
            ("GET", "/v2/models/", Error::NoRoute),
            ("GET", "/v2/models/m/infer", Error::MethodNotAllowed("POST")),
            ("POST", "/v2/models/m/infer/more", Error::NoRoute),
            ("POST", "/v2/models/m/versions/1/infer/more", Error::NoRoute),
            ("POST", "/v2/models/%ff/infer", Error::Malformed("the model's name is not UTF-8")),
            ("POST", "/v2/repository/models/m/load", Error::CallForbidden),
            ("POST", "/v2/repository/models/m/unload", Error::CallForbidden),
            ("GET", "/v1/embeddings", Error::MethodNotAllowed("POST")),
            ("POST", "/v1/files", Error::NoRoute),
        ];
        for (method, path, expected) in rows {
            assert_eq!(parsed(method, path, false), Err(expected), "{method} {path}");
        }
        for (path, expected) in [
            ("/inference.GRPCInferenceService/RepositoryModelLoad", Error::CallForbidden),
            ("/inference.GRPCInferenceService/Other", Error::NoRoute),
            ("/other.Service/ModelInfer", Error::NoRoute),
        ] {
            assert_eq!(parsed("POST", path, true), Err(expected), "{path}");
        }
    }

    #[test]
    fn generation_and_streams_are_never_replayed() {
        for path in ["/v1/chat/completions", "/v1/completions"] {
            assert!(!parsed("POST", path, false).expect("known").replayable);
        }
        assert!(!parsed("POST", "/inference.GRPCInferenceService/ModelStreamInfer", true).expect("known").replayable);
        assert!(parsed("POST", "/inference.GRPCInferenceService/ModelInfer", true).expect("known").replayable);
    }

    #[test]
    fn the_model_is_read_from_json() {
        assert_eq!(model_in_json(br#"{"input":["a"],"model":"m\u0031"}"#).as_deref(), Ok("m1"));
        for bad in ["", "[]", "{", r#"{"input":1}"#, r#"{"model":1}"#, r#"{"model":null}"#, r#"{"model":"m"} x"#] {
            assert!(model_in_json(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    fn message(compressed: u8, bytes: &[u8]) -> Vec<u8> {
        [&[compressed], &(bytes.len() as u32).to_be_bytes()[..], bytes].concat()
    }

    #[test]
    fn the_model_is_read_from_the_first_message_wherever_it_stands() {
        let first = message(0, b"\x0a\x01m\x12\x011");
        assert_eq!(model_in_message(&first), Ok(Some("m")));
        // Version first, then a varint, a fixed 64, a fixed 32, then the name.
        let later = message(0, b"\x12\x011\x18\x96\x01\x21\0\0\0\0\0\0\0\0\x2d\0\0\0\0\x0a\x02mm");
        assert_eq!(model_in_message(&later), Ok(Some("mm")));
        for at in 0..later.len() - 1 {
            assert_eq!(model_in_message(&later[..at]), Ok(None), "{at} bytes");
        }
        assert!(model_in_message(&message(0, b"\x0a\x01m\x0a\x01n")).is_err(), "two names: the last would count");
        assert_eq!(model_in_message(&message(0, b"")), Ok(Some("")));
        assert!(model_in_message(&message(1, b"\x0a\x01m")).is_err());
        assert!(model_in_message(&message(0, b"\x0a\x05m")).is_err(), "a length beyond the message");
        assert!(model_in_message(&message(0, b"\x0a\x01\xff")).is_err(), "no UTF-8");
        assert!(model_in_message(&message(0, b"\x0f")).is_err(), "no such wire type");
        assert!(model_in_message(&message(0, &[0x80; 20])).is_err(), "an endless number");
        assert!(model_in_message(&message(0, b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")).is_err());
    }

    #[test]
    fn a_compressed_message_is_read_within_its_bound() {
        let packed = |bytes: &[u8]| {
            let mut packed = Vec::new();
            flate2::bufread::GzEncoder::new(bytes, flate2::Compression::fast())
                .read_to_end(&mut packed)
                .expect("memory");
            message(1, &packed)
        };
        let head = |encoding: &'static str| {
            let mut head = HeaderMap::new();
            head.insert("grpc-encoding", HeaderValue::from_static(encoding));
            head
        };
        let named = b"\x0a\x01m\x12\x011";
        let body = packed(named);
        assert_eq!(plain(&head("gzip"), &body).expect("sound").as_deref(), Some(&*message(0, named)));
        for at in 5..body.len() {
            assert_eq!(plain(&head("gzip"), &body[..at]), Ok(None), "{at} bytes");
        }
        assert_eq!(plain(&head("gzip"), &message(0, named)).expect("sound").as_deref(), Some(&*message(0, named)));
        let twice = [&body[5..], &packed(b"\x0a\x01n")[5..]].concat();
        assert!(plain(&head("gzip"), &message(1, &twice)).is_err(), "a second member names another");
        assert!(plain(&head("zstd"), &body).is_err() && plain(&HeaderMap::new(), &body).is_err());
        assert!(plain(&head("deflate"), &body).is_err(), "another compression than its head says");
        let bomb = packed(&vec![0; INFLATED_MAX as usize + 1]);
        assert!(bomb.len() < 64 << 10);
        assert_eq!(plain(&head("gzip"), &bomb), Err(Error::OversizeBody));
    }

    #[test]
    fn a_sequence_is_seen_in_any_frames_and_suspected_where_it_could_hide() {
        let see = |encoding: Option<&str>, parts: &[&'static str]| {
            let mut request = Request::builder();
            if let Some(encoding) = encoding {
                request = request.header(CONTENT_ENCODING, encoding);
            }
            let head = request.body(()).expect("valid").into_parts().0;
            let chunks: Vec<Bytes> = parts.iter().map(|part| Bytes::from_static(part.as_bytes())).collect();
            may_be_sequence(&head, &chunks)
        };
        assert!(see(None, &[r#"{"parameters":{"sequence_id":7}}"#]));
        assert!(see(None, &[r#"{"parameters":{"sequ"#, "ence", r#"_id":7}}"#]));
        assert!(see(None, &[r#"{"parameters":{"sequence\u005fid":7}}"#]));
        assert!(see(Some("gzip"), &["x"]));
        assert!(!see(None, &[r#"{"parameters":{"sequ"#, r#"ential":7}}"#]));
        assert!(!see(None, &[r#"{"inputs":["\u00fc"]}"#]));
        assert!(!see(None, &[]));
    }
}
