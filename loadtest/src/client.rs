//! One HTTP connection to the gateway or to a worker, over TLS or not.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// Errors as text: whoever sees them is a person.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// Where to connect, and how.
#[derive(Clone)]
pub struct Destination {
    /// Scheme, host and port.
    pub url: Uri,
    tls: Option<TlsConnector>,
    /// Speak HTTP/2: by ALPN over TLS, from the first byte otherwise.
    pub http2: bool,
}

impl Destination {
    /// `ca` is the authority to believe, for `https`.
    ///
    /// # Errors
    /// A URL without host, or a file that holds no certificate.
    pub fn new(url: &str, ca: Option<&Path>, http2: bool) -> Result<Destination, Error> {
        let url: Uri = url.parse()?;
        url.host().ok_or("the URL names no host")?;
        let tls = match (url.scheme_str(), ca) {
            (Some("https"), Some(ca)) => {
                let mut roots = rustls::RootCertStore::empty();
                for certificate in CertificateDer::pem_file_iter(ca)? {
                    roots.add(certificate?)?;
                }
                let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
                let mut config = rustls::ClientConfig::builder_with_provider(provider)
                    .with_safe_default_protocol_versions()?
                    .with_root_certificates(roots)
                    .with_no_client_auth();
                config.alpn_protocols = vec![if http2 { b"h2".to_vec() } else { b"http/1.1".to_vec() }];
                Some(TlsConnector::from(Arc::new(config)))
            }
            (Some("https"), None) => return Err("https needs the CA to believe (--ca)".into()),
            _ => None,
        };
        Ok(Destination { url, tls, http2 })
    }

    fn authority(&self) -> &str {
        self.url.authority().map_or("", |authority| authority.as_str())
    }

    /// Opens a connection.
    ///
    /// # Errors
    /// No TCP, no TLS, no HTTP.
    pub async fn connect(&self) -> Result<Connection, Error> {
        let host = self.url.host().ok_or("no host")?;
        let port = self.url.port_u16().unwrap_or(if self.tls.is_some() { 443 } else { 80 });
        let stream = TcpStream::connect((host.trim_matches(['[', ']']), port)).await?;
        stream.set_nodelay(true)?;
        match &self.tls {
            None => self.handshake(TokioIo::new(stream)).await,
            Some(tls) => {
                let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned())?;
                self.handshake(TokioIo::new(tls.connect(name, stream).await?)).await
            }
        }
    }

    async fn handshake<I>(&self, io: I) -> Result<Connection, Error>
    where
        I: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
    {
        if self.http2 {
            let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await?;
            // Its error reaches whoever waits for an answer on it.
            tokio::spawn(async move { drop(connection.await) });
            Ok(Connection { sender: Sender::Http2(sender), destination: self.clone() })
        } else {
            let (sender, connection) = http1::handshake(io).await?;
            tokio::spawn(async move { drop(connection.await) });
            Ok(Connection { sender: Sender::Http1(sender), destination: self.clone() })
        }
    }
}

/// An open connection.
pub struct Connection {
    sender: Sender,
    destination: Destination,
}

enum Sender {
    Http1(http1::SendRequest<Full<Bytes>>),
    Http2(http2::SendRequest<Full<Bytes>>),
}

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    /// Its status.
    pub status: StatusCode,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Bytes,
    /// Its trailers.
    pub trailers: Option<HeaderMap>,
}

impl Answer {
    /// A header as text; empty if it is absent.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }
}

impl Connection {
    /// Sends a request whose target is a path, and reads the whole answer.
    ///
    /// # Errors
    /// The connection broke before the end of the answer.
    pub async fn send(&mut self, request: Request<Full<Bytes>>) -> Result<Answer, Error> {
        let response = self.start(request).await?;
        let (head, body) = response.into_parts();
        let collected = body.collect().await?;
        let trailers = collected.trailers().cloned();
        Ok(Answer { status: head.status, headers: head.headers, body: collected.to_bytes(), trailers })
    }

    /// Sends a request and gives the answer as soon as its head is there.
    ///
    /// # Errors
    /// The connection broke before that.
    pub async fn start(&mut self, mut request: Request<Full<Bytes>>) -> Result<Response<Incoming>, Error> {
        match &mut self.sender {
            Sender::Http1(sender) => {
                let host = http::HeaderValue::from_str(self.destination.authority())?;
                request.headers_mut().entry(http::header::HOST).or_insert(host);
                sender.ready().await?;
                Ok(sender.send_request(request).await?)
            }
            Sender::Http2(sender) => {
                let scheme = if self.destination.tls.is_some() { "https" } else { "http" };
                let path = request.uri().path_and_query().map_or("/", |path| path.as_str()).to_owned();
                let uri = Uri::builder().scheme(scheme).authority(self.destination.authority()).path_and_query(path);
                *request.uri_mut() = uri.build()?;
                sender.ready().await?;
                Ok(sender.send_request(request).await?)
            }
        }
    }

    /// Whether it can carry no further request.
    pub fn is_closed(&self) -> bool {
        match &self.sender {
            Sender::Http1(sender) => sender.is_closed(),
            Sender::Http2(sender) => sender.is_closed(),
        }
    }
}
