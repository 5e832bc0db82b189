//! A development CA and a certificate for localhost that it has signed.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use time::{Duration, OffsetDateTime};

const DAYS: i64 = 365;

/// Beside the certificate, the second at which it ends: so that its age is known without parsing it.
const NOT_AFTER: &str = "not_after";

pub(crate) fn make(directory: &Path) -> Result<(), String> {
    let text = |error: rcgen::Error| error.to_string();
    let now = OffsetDateTime::now_utc();
    let not_after = now + Duration::days(DAYS);

    let mut ca = CertificateParams::default();
    ca.distinguished_name.push(DnType::CommonName, "Isochrone development CA");
    ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    (ca.not_before, ca.not_after) = (now - Duration::days(1), not_after);
    let ca_key = KeyPair::generate().map_err(text)?;
    let ca_certificate = ca.self_signed(&ca_key).map_err(text)?;

    let names = ["localhost", "127.0.0.1", "::1"].map(str::to_owned).to_vec();
    let mut leaf = CertificateParams::new(names).map_err(text)?;
    leaf.distinguished_name.push(DnType::CommonName, "localhost");
    (leaf.not_before, leaf.not_after) = (now - Duration::days(1), not_after);
    let key = KeyPair::generate().map_err(text)?;
    let certificate = leaf.signed_by(&key, &Issuer::from_params(&ca, &ca_key)).map_err(text)?;

    std::fs::create_dir_all(directory).map_err(|error| format!("{}: {error}", directory.display()))?;
    write(directory, "ca.key", &ca_key.serialize_pem(), 0o600)?;
    write(directory, "ca.pem", &ca_certificate.pem(), 0o644)?;
    write(directory, "key.pem", &key.serialize_pem(), 0o600)?;
    write(directory, "cert.pem", &certificate.pem(), 0o644)?;
    write(directory, NOT_AFTER, &not_after.unix_timestamp().to_string(), 0o644)
}

pub(crate) fn check(directory: &Path) -> Result<(), String> {
    for name in ["ca.pem", "cert.pem", "key.pem"] {
        if !directory.join(name).exists() {
            return Err(format!("{}: not there", directory.join(name).display()));
        }
    }
    let ends = std::fs::read_to_string(directory.join(NOT_AFTER)).map_err(|error| error.to_string())?;
    let ends: u64 = ends.trim().parse().map_err(|error| format!("{NOT_AFTER}: {error}"))?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(|error| error.to_string())?.as_secs();
    if ends < now + 7 * 24 * 3600 { Err("the certificate ends within a week".into()) } else { Ok(()) }
}

/// Replaces a file at once, so that nobody reads half of it.
fn write(directory: &Path, name: &str, content: &str, mode: u32) -> Result<(), String> {
    let path = directory.join(name);
    let part = directory.join(format!(".{name}.part"));
    let write = || {
        // A remnant of an interrupted run may have other permissions.
        let _ = std::fs::remove_file(&part);
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&part)?;
        file.write_all(content.as_bytes())?;
        std::fs::rename(&part, &path)
    };
    write().map_err(|error| format!("{}: {error}", path.display()))
}
