//! Upstreams that are no workers: to see what the gateway sends, and how it passes on what it gets.

use std::convert::Infallible;
use std::future::Future;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

pub type Body = BoxBody<Bytes, Infallible>;

pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).boxed()
}

/// Serves on a free port until the runtime of the test ends. Over TLS if `tls` has a certificate and a key, with HTTP/2
/// offered.
pub async fn serve<F, R>(tls: Option<&Path>, handle: F) -> u16
where
    F: Fn(Request<Incoming>) -> R + Clone + Send + Sync + 'static,
    R: Future<Output = Response<Body>> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    serve_on(listener, tls, handle);
    port
}

/// Serves on a port that another process has just left.
pub async fn serve_at<F, R>(port: u16, handle: F)
where
    F: Fn(Request<Incoming>) -> R + Clone + Send + Sync + 'static,
    R: Future<Output = Response<Body>> + Send + 'static,
{
    serve_on(TcpListener::bind(("127.0.0.1", port)).await.expect("the port"), None, handle);
}

fn serve_on<F, R>(listener: TcpListener, tls: Option<&Path>, handle: F)
where
    F: Fn(Request<Incoming>) -> R + Clone + Send + Sync + 'static,
    R: Future<Output = Response<Body>> + Send + 'static,
{
    let acceptor = tls.map(|folder| {
        let chain = vec![CertificateDer::from_pem_file(folder.join("cert.pem")).expect("a certificate")];
        let key = PrivateKeyDer::from_pem_file(folder.join("key.pem")).expect("a key");
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let mut config = builder.expect("versions").with_no_client_auth().with_single_cert(chain, key).expect("a pair");
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        TlsAcceptor::from(Arc::new(config))
    });
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (handle, acceptor) = (handle.clone(), acceptor.clone());
            tokio::spawn(async move {
                let service = service_fn(move |request| {
                    let answer = handle(request);
                    async move { Ok::<_, Infallible>(answer.await) }
                });
                let builder = auto::Builder::new(TokioExecutor::new());
                // Connections end when their clients do.
                match acceptor {
                    None => drop(builder.serve_connection(TokioIo::new(stream), service).await),
                    Some(acceptor) => {
                        let Ok(stream) = acceptor.accept(stream).await else { return };
                        drop(builder.serve_connection(TokioIo::new(stream), service).await);
                    }
                }
            });
        }
    });
}

/// An endpoint table for a server that names no region.
pub fn endpoint(lines: &str) -> String {
    format!("[[endpoints]]\nregion_assertion = \"trust-config\"\n{lines}")
}
