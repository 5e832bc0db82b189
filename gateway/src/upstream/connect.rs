//! Opening a connection: address, TCP, TLS, and the protocol that the two sides agree on.

use std::time::Duration;

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

pub(super) async fn connect(target: &Target) -> Result<Opened, String> {
    let stream = match &target.address {
        Address::Ip(address) => TcpStream::connect(address).await,
        Address::Name(host, port) => TcpStream::connect((&**host, *port)).await,
    }
    .map_err(|error| error.to_string())?;
    stream.set_nodelay(true).map_err(|error| error.to_string())?;
    let Some(tls) = &target.tls else { return handshake(stream, target.http2).await };
    let connector = TlsConnector::from(std::sync::Arc::clone(&tls.config));
    let stream = connector.connect(tls.server_name.clone(), stream).await.map_err(|error| format!("TLS: {error}"))?;
    let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
    handshake(stream, http2).await
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
