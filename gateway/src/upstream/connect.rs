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

/// Opens one, and tells how long TCP took to: one round trip of the network, without what the server then does.
pub(super) async fn connect(target: &Target) -> Result<(Opened, Duration), String> {
    let (stream, took) = tcp(&target.address).await.map_err(|error| error.to_string())?;
    stream.set_nodelay(true).map_err(|error| error.to_string())?;
    let Some(tls) = &target.tls else { return Ok((handshake(stream, target.http2).await?, took)) };
    let connector = TlsConnector::from(std::sync::Arc::clone(&tls.config));
    let stream = connector.connect(tls.server_name.clone(), stream).await.map_err(|error| format!("TLS: {error}"))?;
    let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
    Ok((handshake(stream, http2).await?, took))
}

/// The first of a name's addresses that can be connected to.
async fn tcp(address: &Address) -> std::io::Result<(TcpStream, Duration)> {
    let timed = async |address: SocketAddr| {
        let began = Instant::now();
        TcpStream::connect(address).await.map(|stream| (stream, began.elapsed()))
    };
    match address {
        Address::Ip(address) => timed(*address).await,
        Address::Name(host, port) => {
            let mut last = std::io::Error::new(std::io::ErrorKind::NotFound, "the name has no address");
            for address in tokio::net::lookup_host((&**host, *port)).await? {
                match timed(address).await {
                    Ok(connected) => return Ok(connected),
                    Err(error) => last = error,
                }
            }
            Err(last)
        }
    }
}

async fn handshake<S>(stream: S, http2: bool) -> Result<Opened, String>
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
            .map_err(|error| error.to_string())?;
        // Its error reaches the requests that wait on it.
        tokio::spawn(async move { drop(connection.await) });
        Ok(Opened::Http2(sender))
    } else {
        let (sender, connection) = http1::handshake(io).await.map_err(|error| error.to_string())?;
        tokio::spawn(async move { drop(connection.await) });
        Ok(Opened::Http1(sender))
    }
}
