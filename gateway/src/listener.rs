//! A serving thread: its sockets, the TLS of each connection, and the HTTP on top.

use std::net::{SocketAddr, TcpListener};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use http::{HeaderValue, Request, Version, header};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulConnection;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::app::Core;
use crate::config::{Limits, Listener};
use crate::identity::Peer;
use crate::request;

/// The longest that sent bytes stay unacknowledged, or a full receive window stays full.
const READER_TIMEOUT: Duration = Duration::from_secs(45);

/// What HTTP/2 begins with (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The pause before looking again whether more of a preface has come.
const PREFACE_PAUSE: Duration = Duration::from_millis(5);

/// The most connections that wait to be accepted, for each socket.
pub(crate) const QUEUE: i32 = 4096;

/// How long a process that leaves waits for one more request of an HTTP/1.1 connection, whose answer then tells the client
/// to go elsewhere. There is no other way to tell it: a request that is on its way when an idle connection is closed is lost.
/// HTTP/2 has GOAWAY.
const LINGER: Duration = Duration::from_secs(1);

/// The wait after a failed accept. It fails for want of descriptors or memory, which only time brings back.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// Serves until `stop`, then lets requests in flight end. Gives the reason for an end that was not asked for.
/// Tells `begun` once it accepts.
pub(crate) fn run(
    core: Arc<Core>,
    sockets: Vec<TcpListener>,
    stop: CancellationToken,
    begun: &mpsc::Sender<()>,
) -> String {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return format!("no runtime: {error}"),
    };
    runtime.block_on(async move {
        let limits = core.shared.snapshot.load().config.limits;
        let cores = core.shared.snapshot.load().config.cores;
        let places = Arc::new(Semaphore::new(limits.connections.div_ceil(cores)));
        // One of this thread's own: every connection looks at it whenever it wakes.
        let ground =
            Ground { core: Arc::clone(&core), places, connections: TaskTracker::new(), stop: stop.child_token() };
        let mut accepting = JoinSet::new();
        for socket in sockets {
            match tokio::net::TcpListener::from_std(socket) {
                Ok(socket) => drop(accepting.spawn(accept(ground.clone(), socket))),
                Err(error) => return format!("a listener: {error}"),
            }
        }
        // Whoever waits for it may have gone.
        let _ = begun.try_send(());
        while let Some(ended) = accepting.join_next().await {
            match ended {
                Ok(Ok(())) => {}
                Ok(Err(why)) => return why,
                Err(error) => return error.to_string(),
            }
        }
        // Answers in flight are let out; idle connections are closed, and HTTP/2 clients get GOAWAY.
        let grace = core.shared.snapshot.load().config.shutdown.grace;
        ground.connections.close();
        if tokio::time::timeout(grace, ground.connections.wait()).await.is_err() {
            let connections = ground.connections.len();
            tracing::warn!(connections, "broken off: the time to finish is over");
        }
        "it was told to".into()
    })
}

/// What the connections of a thread share.
#[derive(Clone)]
struct Ground {
    core: Arc<Core>,
    places: Arc<Semaphore>,
    connections: TaskTracker,
    stop: CancellationToken,
}

async fn accept(ground: Ground, socket: tokio::net::TcpListener) -> Result<(), String> {
    let address = socket.local_addr().map_err(|error| error.to_string())?;
    loop {
        // A place first: beyond the limit, connections wait in the kernel's queue, which is bounded too.
        let accepted = async {
            let place = Arc::clone(&ground.places).acquire_owned().await.map_err(|error| error.to_string())?;
            Ok::<_, String>((place, socket.accept().await))
        };
        let (place, accepted) = tokio::select! {
            () = ground.stop.cancelled() => break,
            accepted = accepted => accepted?,
        };
        match accepted {
            Ok((stream, from)) => {
                ground.connections.spawn(connection(ground.clone(), stream, from, address, place));
            }
            Err(error) => {
                tracing::warn!(%error, %address, "accept failed");
                tokio::time::sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
    ground.core.closing.store(true, Relaxed);
    // What cannot be taken any more is lost either way.
    empty(&ground, socket, address).or(Ok(()))
}

/// Takes what waits in the queue of a socket that is about to be closed: the kernel has told those clients that they are
/// connected, and would reset them.
fn empty(ground: &Ground, socket: tokio::net::TcpListener, address: SocketAddr) -> std::io::Result<()> {
    let socket = socket.into_std()?;
    for _ in 0..QUEUE {
        let Ok(place) = Arc::clone(&ground.places).try_acquire_owned() else { return Ok(()) };
        let (stream, from) = match socket.accept() {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(()),
            accepted => accepted?,
        };
        stream.set_nonblocking(true)?;
        let stream = TcpStream::from_std(stream)?;
        ground.connections.spawn(connection(ground.clone(), stream, from, address, place));
    }
    Ok(())
}

async fn connection(
    ground: Ground,
    stream: TcpStream,
    from: SocketAddr,
    address: SocketAddr,
    place: OwnedSemaphorePermit,
) {
    let Ground { core, stop, .. } = ground;
    core.shared.counts.connections.fetch_add(1, Relaxed);
    // Answers are written whole; waiting for more to fill a segment only delays them.
    let _ = stream.set_nodelay(true);
    // A client that takes nothing of its answer any more is given up by the kernel.
    let _ = socket2::SockRef::from(&stream).set_tcp_user_timeout(Some(READER_TIMEOUT));
    let snapshot = core.shared.snapshot.load_full();
    let limits = snapshot.config.limits;
    // Taken anew for each connection, so that a renewed certificate is presented at once.
    let Some(Listener { tls, trust, .. }) = snapshot.config.listeners.iter().find(|l| l.address == address).cloned()
    else {
        // A listener taken out of the configuration accepts until the restart that closes it, and serves nobody.
        return;
    };
    let peer = Arc::new(Peer { address: from.ip(), trust, secure: tls.is_some() });
    drop(snapshot);
    let service = {
        let core = Arc::clone(&core);
        service_fn(move |request: Request<Incoming>| {
            let (core, peer) = (Arc::clone(&core), Arc::clone(&peer));
            async move {
                let is_http1 = request.version() <= Version::HTTP_11;
                let mut answer = request::serve(Arc::clone(&core), peer, request).await;
                if is_http1 && core.closing.load(Relaxed) {
                    answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
                }
                Ok::<_, std::convert::Infallible>(answer)
            }
        })
    };
    // What ends a connection is the client's affair; its requests have told their own ends.
    match tls {
        None => match soon(speaks_http2(&stream), limits.header_timeout, &stop).await {
            Some(Ok(true)) => {
                drive(http2(&limits).serve_connection(TokioIo::new(stream), service), &stop, Duration::ZERO).await;
            }
            Some(Ok(false)) => {
                drive(http1(&limits).serve_connection(TokioIo::new(stream), service), &stop, LINGER).await;
            }
            // It said nothing, or not enough to tell.
            Some(Err(_)) | None => {}
        },
        Some(tls) => {
            let handshake = TlsAcceptor::from(tls).accept(stream);
            let Some(Ok(stream)) = soon(handshake, limits.header_timeout, &stop).await else {
                core.shared.counts.handshake_failures.fetch_add(1, Relaxed);
                return;
            };
            if stream.get_ref().1.alpn_protocol() == Some(b"h2") {
                drive(http2(&limits).serve_connection(TokioIo::new(stream), service), &stop, Duration::ZERO).await;
            } else {
                drive(http1(&limits).serve_connection(TokioIo::new(stream), service), &stop, LINGER).await;
            }
        }
    }
    drop(place);
}

/// Serves a connection to its end. When the process leaves, what has begun is finished, and then the connection closed;
/// one that is idle is closed after `linger`.
async fn drive<C: GracefulConnection>(connection: C, stop: &CancellationToken, linger: Duration) {
    let mut connection = pin!(connection);
    tokio::select! {
        biased;
        _ = connection.as_mut() => return,
        () = async { stop.cancelled().await; tokio::time::sleep(linger).await } => {}
    }
    connection.as_mut().graceful_shutdown();
    let _ = connection.await;
}

/// What a client has to do within a time, and soon if the process leaves. `None`: it has not.
async fn soon<T>(what: impl Future<Output = T>, time: Duration, stop: &CancellationToken) -> Option<T> {
    let leaving = async {
        stop.cancelled().await;
        tokio::time::sleep(LINGER).await;
    };
    tokio::select! {
        biased;
        done = what => Some(done),
        () = tokio::time::sleep(time) => None,
        () = leaving => None,
    }
}

/// Whether a connection without TLS begins like HTTP/2. The bytes are looked at and left where they are.
async fn speaks_http2(stream: &TcpStream) -> std::io::Result<bool> {
    let mut begin = [0; PREFACE.len()];
    loop {
        let size = stream.peek(&mut begin).await?;
        if size == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        if size == PREFACE.len() || !PREFACE.starts_with(&begin[..size]) {
            return Ok(begin == PREFACE);
        }
        // Readable already, so there is no event to wait for; hardly any client sends it in pieces.
        tokio::time::sleep(PREFACE_PAUSE).await;
    }
}

/// HTTP/1.1 as a public listener speaks it.
fn http1(limits: &Limits) -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(limits.header_timeout).max_buf_size(limits.header_bytes);
    builder
}

/// HTTP/2 as a public listener speaks it.
fn http2(limits: &Limits) -> http2::Builder<TokioExecutor> {
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.streams)
        .max_header_list_size(u32::try_from(limits.header_bytes).unwrap_or(u32::MAX))
        // Enough for a tensor of a megabyte without waiting for the window.
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(4 << 20)
        // A client that vanished holds its requests for no longer than this.
        .keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(10));
    builder
}
