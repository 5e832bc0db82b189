//! The configuration: public, typed, always valid.
//!
//! A directory is read in three steps: [`document`] reads each file and tells all of its problems, [`file`](mod@file) is
//! the form in which it is written, [`build`] turns that into what is here and opens what the files name (certificates,
//! databases, keys). Whoever holds a [`Config`] holds one that can be served.

mod build;

mod document;

mod file;

pub mod schema;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use isochrone_core::geo::{Country, Location};
use isochrone_core::region::Region;
use isochrone_core::residency::Residency;
use isochrone_core::{course, live, stall, steer};

pub(crate) use build::lexical;
pub use build::{copy, load, load_expired};
pub use document::Problem;

use crate::geo::Database;

/// Everything that one directory says.
#[derive(Debug)]
pub struct Config {
    /// A digest of the files: the name of this state of them.
    pub revision: Box<str>,
    /// `service.instance.id`.
    pub instance: Box<str>,
    /// Threads that serve requests.
    pub cores: usize,
    /// The zones that the gateway stands in.
    pub zones: Vec<Box<str>>,
    /// Where clients connect.
    pub listeners: Vec<Listener>,
    /// Where the operator connects.
    pub admin: SocketAddr,
    /// The tenant of requests without credentials.
    pub anonymous: Option<Box<str>>,
    /// The databases, in the order in which they are asked.
    pub geoip: Vec<Arc<Database>>,
    /// Locations above GeoIP, longest prefix first.
    pub overrides: Vec<(IpNet, Location)>,
    /// What distances mean.
    pub geometry: steer::Geometry,
    /// How some calls are treated, by model and tenant; the first that fits.
    pub routes: Vec<Route>,
    /// How the others are.
    pub default_route: Route,
    /// (countries, zones that their clients are held to).
    pub country_rules: Vec<(Vec<Country>, Vec<Box<str>>)>,
    /// Active health.
    pub probes: Probes,
    /// How live state changes: health, ejection, capacity.
    pub live: live::Rules,
    /// The queue for requests that find every permitted endpoint full.
    pub queue: Queue,
    /// When a silent endpoint is doubted.
    pub stall: stall::Rules,
    /// How a request is tried.
    pub attempts: Attempts,
    /// Kept answers.
    pub cache: Cache,
    /// Bounds.
    pub limits: Limits,
    /// How the process ends.
    pub shutdown: Shutdown,
    /// Traces and logs.
    pub telemetry: Telemetry,
    /// How long the directory must be quiet before a change is read.
    pub settle: Duration,
    /// Between two readings that nothing has asked for; zero: there are none.
    pub poll: Duration,
    /// The one revision that may remove more than half of the endpoints.
    pub allow_large_change: Box<str>,
    /// The regions, by name.
    pub regions: Vec<RegionConfig>,
    /// The tenants, by name.
    pub tenants: Vec<Tenant>,
    /// The files that the configuration names.
    pub files: BTreeSet<PathBuf>,
}

/// A directory that cannot be served, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// A digest of the files, as far as they could be read.
    pub revision: Box<str>,
    /// All that is wrong.
    pub problems: Vec<Problem>,
    /// The files that the configuration names, as far as it could be read.
    pub files: BTreeSet<PathBuf>,
}

/// One address that clients connect to.
#[derive(Clone, Debug)]
pub struct Listener {
    /// Where it listens.
    pub address: SocketAddr,
    /// Its certificate, unless it speaks plain HTTP.
    pub tls: Option<Arc<rustls::ServerConfig>>,
    /// When the certificate expires, in seconds since 1970.
    pub expires: Option<i64>,
    /// Whom to believe about the client's address.
    pub trust: Arc<Trust>,
}

/// Which peers are believed about the client's address, and where they say it.
#[derive(Clone, Debug)]
pub struct Trust {
    /// The believed peers.
    pub proxies: Vec<IpNet>,
    /// The one header that is read.
    pub source: ForwardedBy,
}

impl Config {
    /// The directories in which a change of a file can change what this configuration means. The parent is among them,
    /// so that the replacement of the whole directory is seen.
    /// `others` are files that a newer state of it names.
    pub fn watched(&self, directory: &std::path::Path, others: &BTreeSet<PathBuf>) -> BTreeSet<PathBuf> {
        let files = self.files.iter().chain(others).map(PathBuf::as_path);
        let parents = files.chain([directory]).filter_map(|file| file.parent());
        let parents = parents.filter(|parent| !parent.as_os_str().is_empty()).map(std::path::Path::to_owned);
        parents.chain([directory.to_owned(), directory.join("regions")]).collect()
    }
}

impl Trust {
    /// Whether the address is a trusted proxy's.
    pub fn trusts(&self, address: IpAddr) -> bool {
        self.proxies.iter().any(|net| net.contains(&address))
    }
}

/// How a trusted proxy says who its client is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ForwardedBy {
    /// It does not: the peer is the client.
    Peer,
    /// `X-Forwarded-For`.
    XForwardedFor,
    /// `Forwarded` (RFC 7239).
    Forwarded,
}

/// Active health.
#[derive(Clone, Copy, Debug)]
pub struct Probes {
    /// Between two probes of an endpoint.
    pub interval: Duration,
    /// Share of the interval by which each wait varies either way.
    pub jitter: f32,
    /// The longest wait for an answer.
    pub timeout: Duration,
    /// How many times less often an endpoint is probed that real traffic vouches for, or that is far; at most.
    pub relaxed: f32,
}

/// The queue for requests that find every permitted endpoint full.
#[derive(Clone, Copy, Debug)]
pub struct Queue {
    /// The most that wait.
    pub bound: usize,
    /// The longest wait.
    pub wait: Duration,
}

/// How some calls are treated.
#[derive(Clone, Debug)]
pub struct Route {
    /// Calls of these models; empty: all.
    pub models: BTreeSet<Box<str>>,
    /// Of these tenants; empty: all.
    pub tenants: BTreeSet<Box<str>>,
    /// In which order regions are asked.
    pub steering: steer::Steering,
    /// From the request's head to the response's.
    pub timeout: Duration,
    /// Whether calls may be done twice, whatever their kind.
    pub replay: Option<bool>,
    /// What binds requests to one endpoint.
    pub affinity: Option<Affinity>,
    /// Whether and when a second attempt starts beside the first.
    pub hedge: Option<stall::Hedge>,
    /// Whose kept answers they are given.
    pub cache: CacheScope,
}

/// Whose kept answers a call is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheScope {
    /// Nobody's.
    Off,
    /// Its own tenant's.
    Tenant,
    /// Those of all tenants of such routes that are held to the same zones.
    Shared,
}

/// Kept answers.
#[derive(Clone, Copy, Debug)]
pub struct Cache {
    /// All of them; 0: none.
    pub bytes: u64,
    /// The largest.
    pub entry_bytes: usize,
    /// How long one is given without asking again.
    pub ttl: Duration,
    /// How much longer while somebody has it renewed.
    pub stale_while_revalidate: Duration,
    /// How much longer where nobody can answer.
    pub stale_if_error: Duration,
}

/// What binds requests to one endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Affinity {
    /// The tenant.
    Tenant,
    /// The value of a header.
    Header(http::HeaderName),
}

/// How a request is tried.
#[derive(Clone, Copy, Debug)]
pub struct Attempts {
    /// How many, and of what budget.
    pub rules: course::Rules,
    /// The longest wait for a connection.
    pub connect_timeout: Duration,
    /// Bodies up to this many bytes can be sent again.
    pub replay_bytes: usize,
    /// Answers up to this many bytes are read whole before the client gets any of them.
    pub answer_bytes: usize,
    /// How long a request that broke two endpoints is refused.
    pub poison_for: Duration,
}

/// Bounds on what clients may do.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The longest wait for a request's head.
    pub header_timeout: Duration,
    /// The longest wait for a body that is read whole.
    pub body_timeout: Duration,
    /// The longest wait between two pieces of an answer.
    pub answer_silence: Duration,
    /// The largest head.
    pub header_bytes: usize,
    /// The largest OpenAI body.
    pub openai_bytes: usize,
    /// Client connections.
    pub connections: usize,
    /// Requests at once on one HTTP/2 connection.
    pub streams: u32,
    /// Requests at once.
    pub in_flight: usize,
}

/// How the process ends.
#[derive(Clone, Copy, Debug)]
pub struct Shutdown {
    /// Not ready, but still accepting.
    pub delay: Duration,
    /// The longest wait for requests in flight.
    pub grace: Duration,
}

/// Traces and logs.
#[derive(Clone, Debug)]
pub struct Telemetry {
    /// The collector.
    pub otlp: Option<Box<str>>,
    /// The share of requests that is traced.
    pub sampling: f64,
    /// One line a request.
    pub access_log: bool,
    /// Whole client addresses in logs and traces.
    pub full_addresses: bool,
}

/// One region file.
#[derive(Debug)]
pub struct RegionConfig {
    /// What the decisions need.
    pub region: Region,
    /// Its endpoints.
    pub endpoints: Vec<EndpointConfig>,
    /// The models that it serves, with their versions; no version: all.
    pub models: BTreeMap<Box<str>, BTreeSet<Box<str>>>,
}

/// One endpoint of a region.
#[derive(Clone, Debug)]
pub struct EndpointConfig {
    /// Everything about it in one string: equal ids are the same endpoint, whose live state survives a reload.
    pub id: Box<str>,
    /// The region that its probe must name.
    pub region: Arc<str>,
    /// Where it takes HTTP.
    pub http: Option<Target>,
    /// Where it takes gRPC.
    pub grpc: Option<Target>,
    /// Whether it takes nothing new. No part of what it is.
    pub drain: bool,
    /// Whether its probe must name its region before it is used.
    pub assert_region: bool,
}

/// One address of an endpoint.
#[derive(Clone, Debug)]
pub struct Target {
    /// `host:port`, as in the URL.
    pub authority: http::HeaderValue,
    /// Whom to connect to.
    pub address: Address,
    /// TLS, with the authorities that it must be signed by.
    pub tls: Option<TargetTls>,
    /// HTTP/2 from the first byte, without TLS to agree on it.
    pub http2: bool,
}

/// How to speak TLS to an endpoint.
#[derive(Clone, Debug)]
pub struct TargetTls {
    /// Authorities and ALPN.
    pub config: Arc<rustls::ClientConfig>,
    /// The name that the certificate must have.
    pub server_name: rustls::pki_types::ServerName<'static>,
}

/// Whom to connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// An address, as it stands.
    Ip(SocketAddr),
    /// A host to be resolved, and a port.
    Name(Box<str>, u16),
}

/// One tenant.
#[derive(Debug)]
pub struct Tenant {
    /// Its name.
    pub name: Box<str>,
    /// SHA-256 of each of its keys.
    pub keys: Vec<[u8; 32]>,
    /// Where its requests may go.
    pub residency: Residency,
    /// The models that it may use; empty: all.
    pub models: BTreeSet<Box<str>>,
}

/// What outlives a reading: databases, so that a change of a region file does not read them again, and ticket keys.
#[derive(Debug, Default)]
pub struct Opened {
    databases: HashMap<PathBuf, (Stamp, Arc<Database>)>,
    /// Certificates that have been in force, by their digest: they may expire there.
    certificates: HashSet<[u8; 32]>,
    /// One for the process: clients resume their sessions across a change of the configuration.
    ticketer: Option<Arc<dyn rustls::server::ProducesTickets>>,
}

/// What changes when a file does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    modified: Option<SystemTime>,
    length: u64,
    inode: u64,
}
