//! TLS on both sides, by rustls with aws-lc.

use std::path::Path;
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::ProducesTickets;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use sha2::{Digest, Sha256};

/// What a listener presents to its clients.
pub(crate) struct Presented {
    pub(crate) config: ServerConfig,
    /// Of the certificate itself.
    pub(crate) digest: [u8; 32],
    /// From when and until when it holds, in seconds since 1970.
    begins: i64,
    pub(crate) expires: i64,
}

impl Presented {
    /// Whether it holds now.
    ///
    /// # Errors
    /// Why not.
    pub(crate) fn valid_now(&self) -> Result<(), String> {
        let now = now();
        let date = |seconds| isochrone_telemetry::timestamp(at(seconds));
        if now >= self.expires {
            Err(format!("the certificate expired at {}", date(self.expires)))
        } else if now < self.begins {
            Err(format!("the certificate is not valid before {}", date(self.begins)))
        } else {
            Ok(())
        }
    }
}

/// The time of day, in seconds since 1970.
pub(crate) fn now() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_secs()).unwrap_or(i64::MAX)
}

fn at(seconds: i64) -> std::time::SystemTime {
    std::time::UNIX_EPOCH + std::time::Duration::from_secs(u64::try_from(seconds).unwrap_or_default())
}

/// Reads what a listener presents. Resumption by tickets, HTTP/2 preferred.
///
/// # Errors
/// The entry at fault, `certificate` or `key`, and what is wrong with it.
pub(crate) fn server_config(
    certificate: &Path,
    key: &Path,
    ticketer: Arc<dyn ProducesTickets>,
) -> Result<Presented, (&'static str, String)> {
    let chain = certificates(certificate).map_err(|message| ("certificate", message))?;
    let (digest, validity) = {
        let first = chain.first().map(|first| &**first).unwrap_or_default();
        let (_, parsed) = x509_parser::parse_x509_certificate(first)
            .map_err(|error| ("certificate", format!("{}: no X.509 certificate: {error}", certificate.display())))?;
        (Sha256::digest(first).into(), parsed.validity().clone())
    };
    let private = PrivateKeyDer::from_pem_file(key)
        .map_err(|error| ("key", format!("{}: no private key in PEM form: {error}", key.display())))?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, private))
        .map_err(|error| {
            let pair = format!("{} and {}", certificate.display(), key.display());
            let message = match error {
                rustls::Error::InconsistentKeys(_) => format!("{pair}: the key is not the certificate's"),
                error => format!("{pair}: {error}"),
            };
            ("key", message)
        })?;
    config.ticketer = ticketer;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let (begins, expires) = (validity.not_before.timestamp(), validity.not_after.timestamp());
    Ok(Presented { config, digest, begins, expires })
}

/// The keys of session tickets, which rotate by themselves.
///
/// # Errors
/// No random numbers.
pub(crate) fn ticketer() -> Result<Arc<dyn ProducesTickets>, String> {
    rustls::crypto::aws_lc_rs::Ticketer::new()
        .map_err(|error| format!("no random numbers for session tickets: {error}"))
}

/// The authorities of a PEM file, and a digest of them.
///
/// # Errors
/// What is wrong with the file.
pub(crate) fn authorities(file: &Path) -> Result<(Arc<RootCertStore>, [u8; 32]), String> {
    let mut roots = RootCertStore::empty();
    let mut digest = Sha256::new();
    for certificate in certificates(file)? {
        digest.update(&certificate);
        roots.add(certificate).map_err(|error| format!("{}: {error}", file.display()))?;
    }
    Ok((Arc::new(roots), digest.finalize().into()))
}

/// How to speak to an endpoint whose certificate must come from `roots`.
pub(crate) fn client_config(roots: Arc<RootCertStore>, alpn: &[&[u8]]) -> Arc<ClientConfig> {
    #[expect(
        clippy::expect_used,
        reason = "the provider's own default versions; checked by a test of `https://` endpoints"
    )]
    let builder =
        ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions().expect("versions");
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    Arc::new(config)
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates = CertificateDer::pem_file_iter(file)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| format!("{}: no certificate in PEM form: {error}", file.display()))?;
    if certificates.is_empty() {
        return Err(format!("{}: there is no certificate in it", file.display()));
    }
    Ok(certificates)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}
