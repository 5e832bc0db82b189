//! Who asks: the client's address and the tenant.

mod api_key;

mod client_ip;

use std::net::IpAddr;

use http::HeaderMap;

use crate::config::Trust;
use crate::error::Error;
use crate::snapshot::Snapshot;

/// The other end of a client's connection, and the listener's word on whom to believe.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    pub(crate) address: IpAddr,
    pub(crate) trust: std::sync::Arc<Trust>,
    /// Over TLS.
    pub(crate) secure: bool,
}

impl Peer {
    /// Whether the peer is a proxy of ours: its word on addresses and on tracing counts.
    pub(crate) fn is_trusted(&self) -> bool {
        self.trust.trusts(client_ip::normalised(self.address))
    }
}

/// Who asks. The tenant is its place in the snapshot.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Caller {
    pub(crate) client_ip: IpAddr,
    pub(crate) tenant: usize,
}

/// The client's address: the peer's, unless the peer is trusted to name another.
pub(crate) fn client_ip(peer: &Peer, headers: &HeaderMap) -> IpAddr {
    client_ip::client_ip(peer.address, &peer.trust, headers)
}

/// Identifies the caller.
///
/// # Errors
/// No credentials where some are needed, or wrong ones.
pub(crate) fn identify(snapshot: &Snapshot, client_ip: IpAddr, headers: &HeaderMap) -> Result<Caller, Error> {
    let tenant = match api_key::presented(headers)? {
        Some(key) => api_key::tenant(snapshot, key).ok_or(Error::UnknownKey)?,
        None => snapshot.anonymous.ok_or(Error::NoKey)?,
    };
    Ok(Caller { client_ip, tenant })
}
