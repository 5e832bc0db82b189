//! The files as they are written: a private mirror of the TOML. Unknown keys are refused. Nothing outside `config` sees it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer};

/// `gateway.toml`.
#[derive(Debug, Deserialize, JsonSchema)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(deny_unknown_fields)]
pub(super) struct Gateway {
    pub(super) gateway: Instance,
    #[serde(default)]
    pub(super) listeners: Vec<Listener>,
    pub(super) admin: Admin,
    pub(super) identity: Identity,
    pub(super) geoip: GeoIp,
    pub(super) steering: Steering,
    #[serde(default)]
    pub(super) routes: Vec<Route>,
    #[serde(default)]
    pub(super) country_rules: Vec<CountryRule>,
    pub(super) probes: Probes,
    pub(super) outlier: Outlier,
    pub(super) capacity: Capacity,
    pub(super) stall: Stall,
    pub(super) attempts: Attempts,
    pub(super) cache: Cache,
    pub(super) limits: Limits,
    pub(super) shutdown: Shutdown,
    pub(super) telemetry: Telemetry,
    pub(super) reload: Reload,
    /// Laid under the tables that they are for before those are read.
    #[serde(rename = "defaults")]
    _defaults: Defaults,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(deny_unknown_fields)]
pub(super) struct Instance {
    pub(super) instance: String,
    pub(super) cores: usize,
    pub(super) latitude: Option<f32>,
    pub(super) longitude: Option<f32>,
    pub(super) zones: Vec<Box<str>>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(deny_unknown_fields)]
pub(super) struct Listener {
    #[schemars(with = "Address")]
    pub(super) address: SocketAddr,
    pub(super) tls: Option<ListenerTls>,
    #[schemars(with = "Vec<Network>")]
    pub(super) trusted_proxies: Vec<IpNet>,
    pub(super) client_ip: ClientIp,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(deny_unknown_fields)]
pub(super) struct ListenerTls {
    pub(super) certificate: PathBuf,
    pub(super) key: PathBuf,
}

#[derive(Clone, Copy, Debug, Deserialize, JsonSchema, PartialEq, Eq)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(rename_all = "kebab-case")]
pub(super) enum ClientIp {
    Peer,
    XForwardedFor,
    Forwarded,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(deny_unknown_fields)]
pub(super) struct Admin {
    #[schemars(with = "Address")]
    pub(super) address: SocketAddr,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(deny_unknown_fields)]
pub(super) struct Identity {
    pub(super) anonymous: Option<Box<str>>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(deny_unknown_fields)]
pub(super) struct GeoIp {
    pub(super) files: Vec<PathBuf>,
    pub(super) optional: bool,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(deny_unknown_fields)]
pub(super) struct Steering {
    pub(super) policy: Policy,
    pub(super) route_inflation: f32,
    pub(super) constant: Length,
    pub(super) max_detour: Option<Length>,
    pub(super) shift: Length,
    #[serde(default)]
    pub(super) pools: Vec<Pool>,
}

#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(rename_all = "kebab-case")]
pub(super) enum Policy {
    Nearest,
    Latency,
    Pools,
    Weighted,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(deny_unknown_fields)]
pub(super) struct Pool {
    #[serde(default)]
    pub(super) countries: Vec<String>,
    #[serde(default)]
    pub(super) continents: Vec<Continent>,
    pub(super) regions: Vec<Box<str>>,
}

#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(rename_all = "kebab-case")]
pub(super) enum Continent {
    Africa,
    Antarctica,
    Asia,
    Europe,
    NorthAmerica,
    Oceania,
    SouthAmerica,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(deny_unknown_fields)]
pub(super) struct Route {
    #[serde(default)]
    pub(super) models: Vec<Box<str>>,
    #[serde(default)]
    pub(super) tenants: Vec<Box<str>>,
    pub(super) policy: Option<Policy>,
    pub(super) max_detour: Option<Length>,
    pub(super) timeout: Option<Length>,
    pub(super) replay: Option<bool>,
    pub(super) affinity: Option<String>,
    pub(super) hedge: Option<Hedge>,
    pub(super) cache: Option<CacheScope>,
}

#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(rename_all = "kebab-case")]
pub(super) enum CacheScope {
    Off,
    Tenant,
    Shared,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(deny_unknown_fields)]
pub(super) struct Cache {
    pub(super) bytes: Size,
    pub(super) entry: Size,
    pub(super) ttl: Length,
    pub(super) stale_while_revalidate: Length,
    pub(super) stale_if_error: Length,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(deny_unknown_fields)]
pub(super) struct Hedge {
    pub(super) floor: Length,
    pub(super) ceiling: Length,
    pub(super) share: f32,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(deny_unknown_fields)]
pub(super) struct CountryRule {
    pub(super) countries: Vec<String>,
    pub(super) require: Vec<Box<str>>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(deny_unknown_fields)]
pub(super) struct Probes {
    pub(super) interval: Length,
    pub(super) jitter: f32,
    pub(super) timeout: Length,
    pub(super) healthy: u32,
    pub(super) unhealthy: u32,
    pub(super) calm: Length,
    pub(super) decay: Length,
    pub(super) relaxed: f32,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(deny_unknown_fields)]
pub(super) struct Outlier {
    pub(super) consecutive_failures: u32,
    pub(super) failure_share: f32,
    pub(super) failure_volume: u32,
    pub(super) ejection: Length,
    pub(super) ejection_max: Length,
    pub(super) ejected_share: f32,
    pub(super) error_penalty: Length,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(deny_unknown_fields)]
pub(super) struct Capacity {
    pub(super) slow_start: Length,
    pub(super) overprovisioning: f32,
    pub(super) overload_replies: u32,
    pub(super) concurrency_min: u32,
    pub(super) concurrency_max: u32,
    pub(super) queue: usize,
    pub(super) queue_wait: Length,
    pub(super) report_fresh: Length,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(deny_unknown_fields)]
pub(super) struct Stall {
    pub(super) silence: Length,
    pub(super) answer: Length,
    pub(super) again: Length,
    pub(super) slow_factor: f32,
    pub(super) slow_unknown: Length,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(deny_unknown_fields)]
pub(super) struct Attempts {
    pub(super) max: usize,
    pub(super) budget_share: f32,
    pub(super) budget_floor_per_second: u32,
    pub(super) connect_timeout: Length,
    pub(super) timeout: Length,
    pub(super) replay_buffer: Size,
    pub(super) answer_buffer: Size,
    pub(super) poison_for: Length,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(deny_unknown_fields)]
pub(super) struct Limits {
    pub(super) header_timeout: Length,
    pub(super) body_timeout: Length,
    pub(super) answer_silence: Length,
    pub(super) header_bytes: Size,
    pub(super) openai_body: Size,
    pub(super) connections: usize,
    pub(super) streams: u32,
    pub(super) in_flight: usize,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(deny_unknown_fields)]
pub(super) struct Shutdown {
    pub(super) delay: Length,
    pub(super) grace: Length,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(deny_unknown_fields)]
pub(super) struct Telemetry {
    pub(super) otlp: Option<String>,
    pub(super) sampling: f64,
    pub(super) access_log: bool,
    pub(super) full_addresses: bool,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(deny_unknown_fields)]
pub(super) struct Reload {
    pub(super) settle: Length,
    pub(super) poll: Length,
    pub(super) allow_large_change: Box<str>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(deny_unknown_fields)]
struct Defaults {
    #[serde(rename = "listener")]
    #[schemars(with = "serde_json::Value")]
    _listener: toml::Table,
    #[serde(rename = "region")]
    #[schemars(with = "serde_json::Value")]
    _region: toml::Table,
    #[serde(rename = "endpoint")]
    #[schemars(with = "serde_json::Value")]
    _endpoint: toml::Table,
    #[serde(rename = "tenant")]
    #[schemars(with = "serde_json::Value")]
    _tenant: toml::Table,
}

/// `regions/NAME.toml`.
#[derive(Debug, Deserialize, JsonSchema)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(deny_unknown_fields)]
pub(super) struct Region {
    /// The same as the file's; it need not stand here.
    pub(super) name: Option<Box<str>>,
    /// Where it stands: the country, as two letters of ISO 3166-1.
    pub(super) country: String,
    /// Degrees north.
    pub(super) latitude: f32,
    /// Degrees east.
    pub(super) longitude: f32,
    pub(super) zones: Vec<Box<str>>,
    pub(super) drain: bool,
    pub(super) weight: f32,
    pub(super) cost: f32,
    pub(super) soft_limit: Option<u32>,
    pub(super) hard_limit: Option<u32>,
    #[serde(default)]
    /// Its workers.
    pub(super) endpoints: Vec<Endpoint>,
    #[serde(default)]
    /// The models that it serves, by name.
    pub(super) models: BTreeMap<Box<str>, Model>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(deny_unknown_fields)]
pub(super) struct Endpoint {
    /// Where it takes HTTP: `http://HOST:PORT`, or `https://` with `tls`.
    pub(super) http: Option<String>,
    /// Where it takes gRPC.
    pub(super) grpc: Option<String>,
    /// Whose certificates to believe.
    pub(super) tls: Option<EndpointTls>,
    pub(super) protocol: Protocol,
    pub(super) region_assertion: RegionAssertion,
    pub(super) drain: bool,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(deny_unknown_fields)]
pub(super) struct EndpointTls {
    pub(super) ca: PathBuf,
    pub(super) server_name: Option<String>,
}

#[derive(Clone, Copy, Debug, Deserialize, JsonSchema, PartialEq, Eq, Hash)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(rename_all = "kebab-case")]
pub(super) enum Protocol {
    Auto,
    Http1,
    Http2,
}

#[derive(Clone, Copy, Debug, Deserialize, JsonSchema, PartialEq, Eq)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(rename_all = "kebab-case")]
pub(super) enum RegionAssertion {
    Probe,
    TrustConfig,
}

/// A model that the region serves.
#[derive(Debug, Deserialize, JsonSchema)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(deny_unknown_fields)]
pub(super) struct Model {
    #[serde(default)]
    /// The versions that are there. Absent: any.
    pub(super) versions: Vec<Box<str>>,
}

/// `tenants.toml`.
#[derive(Debug, Deserialize, JsonSchema)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(deny_unknown_fields)]
pub(super) struct Tenants {
    #[serde(default)]
    pub(super) tenants: BTreeMap<Box<str>, Tenant>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(deny_unknown_fields)]
pub(super) struct Tenant {
    /// Hashes of its API keys; `isochrone key new` prints one.
    pub(super) keys: Vec<Key>,
    /// `require`: its requests go to regions in these zones and nowhere else. `prefer`: to these first.
    pub(super) residency: Option<Residency>,
    pub(super) models: Vec<Box<str>>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(
    untagged,
    deny_unknown_fields,
    expecting = "expected { hash = \"sha256:…\" }, { hash_file = \"path\" } or { hash_env = \"NAME\" }"
)]
pub(super) enum Key {
    Inline { hash: String },
    File { hash_file: PathBuf },
    Environment { hash_env: String },
}

#[derive(Debug, Deserialize, JsonSchema)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(rename_all = "kebab-case")]
pub(super) enum Residency {
    Require(Vec<Box<str>>),
    Prefer(Vec<Box<str>>),
}

/// `locations.toml`.
#[derive(Debug, Deserialize, JsonSchema)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(deny_unknown_fields)]
pub(super) struct Locations {
    #[serde(default)]
    pub(super) locations: Vec<Location>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(deny_unknown_fields)]
pub(super) struct Location {
    #[schemars(with = "Network")]
    pub(super) cidr: IpNet,
    pub(super) country: Option<String>,
    pub(super) latitude: Option<f32>,
    pub(super) longitude: Option<f32>,
}

/// A duration with its unit: `"250ms"`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Length(pub(super) Duration);

/// A number of bytes with its unit: `"64KiB"`.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(transparent)]
pub(super) struct Size(pub(super) bytesize::ByteSize);

/// An address with its port, as [`SocketAddr`] reads it.
struct Address;

/// A range of addresses, as [`IpNet`] reads it.
struct Network;

/// What a text has to look like, for editors.
macro_rules! text {
    ($($of:ty: $pattern:literal),*) => {
        $(impl JsonSchema for $of {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($of).into()
            }

            fn inline_schema() -> bool {
                true
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({ "type": "string", "pattern": $pattern })
            }
        })*
    };
}

text! {
    Length: "^[0-9]+ *[a-z]+",
    Size: "^[0-9.]+ *[KMGTkmgt]?i?[Bb]?$",
    Address: ":[0-9]+$",
    Network: "/[0-9]+$"
}

#[cfg(test)]
impl serde::Serialize for Length {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&humantime::format_duration(self.0))
    }
}

#[cfg(test)]
impl serde::Serialize for Size {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{}B", self.0.as_u64()))
    }
}

impl<'de> Deserialize<'de> for Length {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Length, D::Error> {
        let text = toml::Value::deserialize(deserializer)?;
        let expected = || serde::de::Error::custom("expected a duration with its unit, such as \"250ms\" or \"2s\"");
        let text = text.as_str().ok_or_else(expected)?;
        humantime::parse_duration(text).map(Length).map_err(|_| expected())
    }
}
