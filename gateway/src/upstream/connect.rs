//! Opening a connection: address, TCP, TLS, and the protocol that the two sides agree on.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::body::RequestBody;
use crate::config::{Address, Target};

/// An open connection, driven by a task of its own that ends with its last handle.
#[derive(Debug)]
pub(super) enum Opened {
    Http1(http1::SendRequest<RequestBody>),
    Http2(http2::SendRequest<RequestBody>),
}

/// Why there is no connection.
#[derive(Debug)]
pub(crate) struct Unreached {
    /// In words for the operator.
    pub(crate) why: String,
    pub(crate) fault: Fault,
}

/// Whose fault that is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nobody is at the address.
    Gone,
    /// The endpoint, or the way there.
    There,
    /// This gateway has no descriptor or port left, or cannot resolve the name: it says nothing about the endpoint.
    Here,
}

impl Unreached {
    pub(crate) fn there<E: std::fmt::Display>(why: E) -> Unreached {
        Unreached { why: format!("{why}"), fault: Fault::There }
    }

    fn by(error: &std::io::Error) -> Unreached {
        use std::io::ErrorKind::{AddrInUse, AddrNotAvailable, ConnectionRefused, ConnectionReset, OutOfMemory};
        // Without a name in std: too many descriptors, of this process or of the system, and no buffers.
        const LOCAL: [i32; 3] = [24, 23, 105];
        let fault = match error.kind() {
            ConnectionRefused | ConnectionReset => Fault::Gone,
            AddrInUse | AddrNotAvailable | OutOfMemory => Fault::Here,
            _ if error.raw_os_error().is_some_and(|code| LOCAL.contains(&code)) => Fault::Here,
            _ => Fault::There,
        };
        Unreached { why: error.to_string(), fault }
    }
}

/// Opens one, and tells how long TCP took to: one round trip of the network, without what the server then does.
pub(super) async fn connect(target: &Target) -> Result<(Opened, Duration), Unreached> {
    let (stream, took) = tcp(&target.address).await?;
    stream.set_nodelay(true).map_err(Unreached::there)?;
    let Some(tls) = &target.tls else { return Ok((handshake(stream, target.http2).await?, took)) };
    let connector = TlsConnector::from(std::sync::Arc::clone(&tls.config));
    let stream = connector
        .connect(tls.server_name.clone(), stream)
        .await
        .map_err(|error| Unreached::there(format!("TLS: {error}")))?;
    let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
    Ok((handshake(stream, http2).await?, took))
}

/// The first of a name's addresses that can be connected to.
async fn tcp(address: &Address) -> Result<(TcpStream, Duration), Unreached> {
    let timed = async |address: SocketAddr| {
        let began = Instant::now();
        let stream = TcpStream::connect(address).await.map_err(|error| Unreached::by(&error))?;
        Ok((stream, began.elapsed()))
    };
    match address {
        Address::Ip(address) => timed(*address).await,
        Address::Name(host, port) => {
            let unresolved = |why: String| Unreached { why: format!("{host}: {why}"), fault: Fault::Here };
            let mut last = unresolved("the name has no address".into());
            let found = tokio::net::lookup_host((&**host, *port)).await;
            for address in found.map_err(|error| unresolved(error.to_string()))? {
                match timed(address).await {
                    Ok(connected) => return Ok(connected),
                    Err(error) => last = error,
                }
            }
            Err(last)
        }
    }
}

async fn handshake<S>(stream: S, http2: bool) -> Result<Opened, Unreached>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let io = TokioIo::new(stream);
    if http2 {
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .adaptive_window(true)
            // A peer that vanished without a word is found while requests wait on it.
            .keep_alive_interval(Duration::from_secs(5))
            .keep_alive_timeout(Duration::from_secs(5))
            .handshake(io)
            .await
            .map_err(Unreached::there)?;
        // Its error reaches the requests that wait on it.
        tokio::spawn(async move { drop(connection.await) });
        Ok(Opened::Http2(sender))
    } else {
        let (sender, connection) = http1::handshake(io).await.map_err(Unreached::there)?;
        tokio::spawn(async move { drop(connection.await) });
        Ok(Opened::Http1(sender))
    }
}
