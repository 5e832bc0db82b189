//! A serving thread: its sockets, the TLS of each connection, and the HTTP on top.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

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

/// The wait after a failed accept. It fails for want of descriptors or memory, which only time brings back.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// Serves until `stop`, then lets requests in flight end. Gives the reason for an end that was not asked for.
pub(crate) fn run(core: Arc<Core>, sockets: Vec<TcpListener>, stop: CancellationToken) -> String {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return format!("no runtime: {error}"),
    };
    runtime.block_on(async move {
        let limits = core.shared.snapshot.load().config.limits;
        let cores = core.shared.snapshot.load().config.cores;
        let places = Arc::new(Semaphore::new(limits.connections.div_ceil(cores)));
        let graceful = Arc::new(GracefulShutdown::new());
        let mut accepting = JoinSet::new();
        for socket in sockets {
            let (core, places, graceful, stop) =
                (Arc::clone(&core), Arc::clone(&places), Arc::clone(&graceful), stop.clone());
            accepting.spawn(async move { accept(core, socket, places, graceful, stop).await });
        }
        while let Some(ended) = accepting.join_next().await {
            match ended {
                Ok(Ok(())) => {}
                Ok(Err(why)) => return why,
                Err(error) => return error.to_string(),
            }
        }
        // Answers in flight are let out; idle connections are closed, and HTTP/2 clients get GOAWAY.
        let grace = core.shared.snapshot.load().config.shutdown.grace;
        if let Some(graceful) = Arc::into_inner(graceful) {
            let _ = tokio::time::timeout(grace, graceful.shutdown()).await;
        }
        "it was told to".into()
    })
}

async fn accept(
    core: Arc<Core>,
    socket: TcpListener,
    places: Arc<Semaphore>,
    graceful: Arc<GracefulShutdown>,
    stop: CancellationToken,
) -> Result<(), String> {
    let socket = tokio::net::TcpListener::from_std(socket).map_err(|error| error.to_string())?;
    let address = socket.local_addr().map_err(|error| error.to_string())?;
    loop {
        // A place first: beyond the limit, connections wait in the kernel's queue, which is bounded too.
        let accepted = async {
            let place = Arc::clone(&places).acquire_owned().await.map_err(|error| error.to_string())?;
            Ok::<_, String>((place, socket.accept().await))
        };
        let (place, accepted) = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            accepted = accepted => accepted?,
        };
        match accepted {
            Ok((stream, from)) => {
                let (core, watcher) = (Arc::clone(&core), graceful.watcher());
                tokio::spawn(connection(core, stream, from, address, watcher, place));
            }
            Err(error) => {
                tracing::warn!(%error, %address, "accept failed");
                tokio::time::sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
}

async fn connection(
    core: Arc<Core>,
    stream: TcpStream,
    from: SocketAddr,
    address: SocketAddr,
    watcher: Watcher,
    place: OwnedSemaphorePermit,
) {
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
            async move { Ok::<_, std::convert::Infallible>(request::serve(core, peer, request).await) }
        })
    };
    // What ends a connection is the client's affair; its requests have told their own ends.
    match tls {
        None => match tokio::time::timeout(limits.header_timeout, speaks_http2(&stream)).await {
            Ok(Ok(true)) => drop(watcher.watch(http2(&limits).serve_connection(TokioIo::new(stream), service)).await),
            Ok(Ok(false)) => drop(watcher.watch(http1(&limits).serve_connection(TokioIo::new(stream), service)).await),
            // It said nothing, or not enough to tell.
            Ok(Err(_)) | Err(_) => {}
        },
        Some(tls) => {
            let handshake = TlsAcceptor::from(tls).accept(stream);
            let Ok(Ok(stream)) = tokio::time::timeout(limits.header_timeout, handshake).await else {
                core.shared.counts.handshake_failures.fetch_add(1, Relaxed);
                return;
            };
            if stream.get_ref().1.alpn_protocol() == Some(b"h2") {
                drop(watcher.watch(http2(&limits).serve_connection(TokioIo::new(stream), service)).await);
            } else {
                drop(watcher.watch(http1(&limits).serve_connection(TokioIo::new(stream), service)).await);
            }
        }
    }
    drop(place);
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
