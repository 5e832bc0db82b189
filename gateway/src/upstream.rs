//! Sending one request to one endpoint: a pooled connection of this core, or a new one.

mod connect;

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use bytes::Bytes;
use http::header::{HOST, TE};
use http::{HeaderName, HeaderValue, Method, Request, Response, Uri, Version};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use isochrone_core::Time;
use parking_lot::Mutex;

pub(crate) use self::connect::{Fault, Unreached};

use crate::body::{ClientBodyError, RequestBody};
use crate::config::Target;
use crate::endpoint::Endpoint;

/// The most idle connections that one core keeps to one target.
const IDLE_MAX: usize = 256;

/// The longest that a connection stays idle. Shorter than servers wait, so that they rarely close one under a request.
const IDLE_FOR: Duration = Duration::from_secs(20);

/// What every worker answers (Open Inference Protocol v2, "server ready").
const READY: &str = "/v2/health/ready";

/// The header in which a worker names its region, on every answer.
pub(crate) const REGION: HeaderName = HeaderName::from_static("isochrone-region");

/// Pooled connections that one request finds closed before it opens a new one.
const REUSES_MAX: usize = 8;

/// The longest wait for a pooled connection to be ready.
const READY_WAIT: Duration = Duration::from_millis(10);

/// One core's connections to one target.
///
/// The lock is never waited for: only the one thread of this core takes it, and never across an await.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    connections: Mutex<Connections>,
}

#[derive(Debug, Default)]
struct Connections {
    /// Idle ones, the last used last: it is the warmest.
    http1: Vec<(http1::SendRequest<RequestBody>, Time)>,
    http2: Option<http2::SendRequest<RequestBody>>,
}

/// A connection fit for one request.
#[derive(Debug)]
enum Connection {
    Http1(http1::SendRequest<RequestBody>),
    Http2(http2::SendRequest<RequestBody>),
}

/// Why there was no response.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendError {
    /// No connection: nothing was sent.
    #[error("no connection: {}", .why.why)]
    Connect {
        why: Unreached,
        /// The body, unused.
        unsent: Option<Box<RequestBody>>,
    },
    /// The endpoint did not take the request up.
    #[error("the endpoint refused the request unprocessed: {0}")]
    Refused(hyper::Error),
    /// The connection broke; something may have been sent.
    #[error("the connection broke: {0}")]
    Reset(hyper::Error),
    /// The client's body broke off while it was sent on.
    #[error("the client's body broke off")]
    ClientBody,
}

/// Puts a connection back once the body that it carried has ended.
#[derive(Debug)]
pub(crate) struct Lease(Option<http1::SendRequest<RequestBody>>);

impl Lease {
    /// Gives the connection back. Not called for a body that did not end, whose connection is then closed by its drop.
    pub(crate) fn give_back(self, pool: &Pool, now: Time) {
        if let Some(sender) = self.0 {
            let mut connections = pool.connections.lock();
            if connections.http1.len() < IDLE_MAX {
                connections.http1.push((sender, now));
            }
        }
    }
}

/// What is sent, independent of the endpoint.
#[derive(Debug)]
pub(crate) struct Outgoing<'a> {
    pub(crate) method: &'a Method,
    pub(crate) uri: &'a Uri,
    pub(crate) headers: http::HeaderMap,
    pub(crate) grpc: bool,
}

/// Sends one request to an endpoint over a connection of this core and waits for the response's head.
///
/// # Errors
/// See [`SendError`]. A pooled connection that turns out to be closed before anything was sent is replaced, silently.
pub(crate) async fn send(
    endpoint: &Endpoint,
    (target, pool): (&Target, &Pool),
    outgoing: Outgoing<'_>,
    body: RequestBody,
    connect_timeout: Duration,
    now: Time,
) -> Result<(Response<Incoming>, Lease), SendError> {
    let path = outgoing.uri.path_and_query().map_or("/", |path| path.as_str());
    let client_broke = body.client_broke();
    let mut request = Request::new(body);
    *request.method_mut() = outgoing.method.clone();
    *request.headers_mut() = outgoing.headers;
    let mut reuses = 0;
    loop {
        let pooled = if reuses < REUSES_MAX { pool.take(now).await } else { None };
        let reused = pooled.is_some();
        reuses += 1;
        let connection = match pooled {
            Some(connection) => connection,
            None => match pool.open(endpoint, target, outgoing.grpc, connect_timeout).await {
                Ok(connection) => connection,
                Err(why) => return Err(unsent(why, request)),
            },
        };
        let (sent, lease) = match connection {
            Connection::Http1(mut sender) => {
                *request.version_mut() = Version::HTTP_11;
                *request.uri_mut() = outgoing.uri.path_and_query().cloned().map_or_else(Uri::default, Uri::from);
                request.headers_mut().insert(HOST, target.authority.clone());
                (sender.try_send_request(request).await, Lease(Some(sender)))
            }
            Connection::Http2(mut sender) => {
                *request.version_mut() = Version::HTTP_2;
                *request.uri_mut() = match target.uri(path) {
                    Ok(uri) => uri,
                    Err(error) => return Err(unsent(Unreached::there(error), request)),
                };
                request.headers_mut().remove(HOST);
                if outgoing.grpc {
                    // The one hop-by-hop field of HTTP/2 (RFC 9113, section 8.2.2); gRPC demands it.
                    request.headers_mut().insert(TE, HeaderValue::from_static("trailers"));
                }
                (sender.try_send_request(request).await, Lease(None))
            }
        };
        match sent {
            Ok(response) => return Ok((response, lease)),
            Err(mut error) => match error.take_message() {
                // It was closed while idle, and nothing has been sent: another connection.
                Some(message) if reused => request = message,
                Some(message) => return Err(unsent(Unreached::there(error.into_error()), message)),
                // hyper keeps the cause to itself over HTTP/2, and a client must not have an endpoint blamed for its own body.
                None if client_broke.is_some_and(|broke| broke.load(Relaxed)) => return Err(SendError::ClientBody),
                None => return Err(reason(error.into_error())),
            },
        }
    }
}

/// Nothing of the request was sent: its body can be had back.
fn unsent(why: Unreached, request: Request<RequestBody>) -> SendError {
    SendError::Connect { why, unsent: Some(Box::new(request.into_body())) }
}

fn reason(error: hyper::Error) -> SendError {
    match std::error::Error::source(&error) {
        Some(source) if source.is::<ClientBodyError>() => SendError::ClientBody,
        // RFC 9113, section 8.7: neither was processed, and both may be tried again.
        Some(source)
            if source.downcast_ref::<h2::Error>().is_some_and(|error| {
                error.reason() == Some(h2::Reason::REFUSED_STREAM) || (error.is_go_away() && error.is_remote())
            }) =>
        {
            SendError::Refused(error)
        }
        _ => SendError::Reset(error),
    }
}

impl Target {
    fn uri(&self, path: &str) -> Result<Uri, http::Error> {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        Uri::builder().scheme(scheme).authority(self.authority.as_bytes()).path_and_query(path).build()
    }
}

impl Pool {
    /// A pooled connection that is ready. Closed and over-aged ones are dropped on the way.
    async fn take(&self, now: Time) -> Option<Connection> {
        loop {
            let (mut sender, since) = {
                let mut connections = self.connections.lock();
                if let Some(sender) = &connections.http2 {
                    if !sender.is_closed() {
                        return Some(Connection::Http2(sender.clone()));
                    }
                    connections.http2 = None;
                }
                connections.http1.pop()?
            };
            if now.since(since) > IDLE_FOR {
                // The older ones lie below it.
                self.connections.lock().http1.clear();
                return None;
            }
            // Not ready yet may only mean that its task has not run since the last body ended. Or it is still taking in a
            // body that its endpoint has already answered: that one is not waited for.
            if sender.is_ready() || matches!(tokio::time::timeout(READY_WAIT, sender.ready()).await, Ok(Ok(()))) {
                return Some(Connection::Http1(sender));
            }
        }
    }

    /// Opens a connection, on which the other side names its region before anything of a request is sent: whoever took over
    /// an address since its last probe gets nothing, not even once.
    async fn open(
        &self,
        endpoint: &Endpoint,
        target: &Target,
        grpc: bool,
        timeout: Duration,
    ) -> Result<Connection, Unreached> {
        let late = |_| Unreached::there(format!("not within {timeout:?}"));
        // Boxed: they are large and rare, and would make every request's future as large.
        let opening = Box::pin(connect::connect(target));
        let (mut opened, _) = tokio::time::timeout(timeout, opening).await.map_err(late)??;
        // A gRPC address has no such path; there the endpoint's HTTP probe has to do.
        if endpoint.config.assert_region && !grpc {
            let asking = Box::pin(ask(&mut opened, target, READY));
            let head = tokio::time::timeout(timeout, asking).await.map_err(late)?.map_err(Unreached::there)?;
            if head.headers.get(REGION).is_none_or(|named| named.as_bytes() != endpoint.config.region.as_bytes()) {
                endpoint.live.doubt();
                return Err(Unreached::there("it does not name its file's region"));
            }
        }
        Ok(match opened {
            connect::Opened::Http1(mut sender) => {
                let ready = tokio::time::timeout(timeout, sender.ready()).await.map_err(late)?;
                ready.map_err(|error| {
                    Unreached::there(format!("it closes the connection on which it named its region: {error}"))
                })?;
                Connection::Http1(sender)
            }
            connect::Opened::Http2(sender) => {
                // Of several opened at once the last is kept; the others end with their requests.
                self.connections.lock().http2 = Some(sender.clone());
                Connection::Http2(sender)
            }
        })
    }
}

/// The longest body of a probe's answer that is read.
const PROBE_BODY_MAX: usize = 64 << 10;

/// Why a probe found nothing.
#[derive(Debug)]
pub(crate) enum ProbeError {
    /// No connection.
    Connect(Unreached),
    /// No whole answer on it.
    Answer(String),
}

/// Asks an endpoint whether it is ready over a connection of its own, so that a probe measures the network and not a queue
/// of requests. Gives the head of the answer, how long it took on the open connection, and how long TCP took to open that.
///
/// # Errors
/// See [`ProbeError`].
pub(crate) async fn probe(endpoint: &Endpoint) -> Result<(http::response::Parts, Duration, Duration), ProbeError> {
    let target =
        endpoint.config.http.as_ref().ok_or_else(|| ProbeError::Connect(Unreached::there("it has no HTTP address")))?;
    let (mut opened, connected) = Box::pin(connect::connect(target)).await.map_err(ProbeError::Connect)?;
    let began = std::time::Instant::now();
    let head = ask(&mut opened, target, READY).await.map_err(ProbeError::Answer)?;
    Ok((head, began.elapsed(), connected))
}

/// Asks for a path on an open connection, which can be used again afterwards if the other side lets it.
async fn ask(
    opened: &mut connect::Opened,
    target: &Target,
    path: &'static str,
) -> Result<http::response::Parts, String> {
    let no_answer = |error: &dyn std::fmt::Display| format!("no whole answer: {error}");
    let mut request = Request::new(RequestBody::empty());
    let response = match opened {
        connect::Opened::Http1(sender) => {
            *request.uri_mut() = Uri::from_static(path);
            request.headers_mut().insert(HOST, target.authority.clone());
            sender.send_request(request).await
        }
        connect::Opened::Http2(sender) => {
            *request.uri_mut() = target.uri(path).map_err(|error| no_answer(&error))?;
            sender.send_request(request).await
        }
    };
    let (head, body) = response.map_err(|error| no_answer(&error))?.into_parts();
    let body = http_body_util::Limited::new(body, PROBE_BODY_MAX).collect();
    body.await.map(http_body_util::Collected::<Bytes>::to_bytes).map_err(|error| no_answer(&error))?;
    Ok(head)
}
