//! From the mirror to [`Config`]: every rule that the types cannot hold, with all problems told together.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write as _;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use isochrone_core::course::{self, ATTEMPTS_MAX};
use isochrone_core::geo::{Continent, Country, Location, Point, Source};
use isochrone_core::region::{REGIONS_MAX, Region, RegionIndex};
use isochrone_core::residency::Residency;
use isochrone_core::{health, limit, live, outlier, pushback, stall, steer};
use sha2::{Digest, Sha256};
use toml::de::{DeTable, DeValue};

use super::document::{Document, Problem, lay_under, regular};
use super::{
    Address, Affinity, Attempts, Cache, CacheScope, Config, EndpointConfig, ForwardedBy, Limits, Listener, Opened,
    Probes, Queue, RegionConfig, Rejected, Route, Shutdown, Stamp, Target, TargetTls, Telemetry, Tenant, Trust, file,
};
use crate::geo::Database;
use crate::tls::{self, Presented};

/// Every setting with its default.
pub(super) const REFERENCE: &str = include_str!("../../../config/reference.toml");

/// The setting that permits one revision.
const PERMISSION: &str = "allow_large_change";

/// The longest pause after overload replies.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// The most endpoints of all regions together: requests note in 16 bits which they have tried.
const ENDPOINTS_MAX: usize = 60_000;

/// The largest certificate, key or hash, and the largest database.
const SECRET_MAX: u64 = 4 << 20;
const DATABASE_MAX: u64 = 8 << 30;

/// Reads a directory. `opened` remembers the databases between two readings.
///
/// # Errors
/// Every problem of every file.
pub fn load(directory: &Path, opened: &mut Opened) -> Result<Config, Rejected> {
    read(directory, opened, false)
}

/// The same, but certificates may have expired: of what is served, or was.
///
/// # Errors
/// Every other problem of every file.
pub fn load_expired(directory: &Path, opened: &mut Opened) -> Result<Config, Rejected> {
    read(directory, opened, true)
}

fn read(directory: &Path, opened: &mut Opened, expired: bool) -> Result<Config, Rejected> {
    let (problems, digest) = (Vec::new(), Sha256::new());
    let (files, certificates) = (BTreeSet::new(), Vec::new());
    let mut builder = Builder { directory, opened, problems, digest, files, certificates, expired };
    match builder.build() {
        Some(config) if builder.problems.is_empty() => {
            builder.opened.certificates.extend(builder.certificates);
            Ok(config)
        }
        _ => {
            let revision = builder.revision();
            let mut problems = builder.problems;
            problems.sort_by(|a, b| (&a.file, a.line, a.column).cmp(&(&b.file, b.line, b.column)));
            Err(Rejected { revision, problems, files: builder.files })
        }
    }
}

struct Builder<'a> {
    directory: &'a Path,
    opened: &'a mut Opened,
    problems: Vec<Problem>,
    digest: Sha256,
    /// The files named in the configuration.
    files: BTreeSet<PathBuf>,
    /// The digests of its certificates.
    certificates: Vec<[u8; 32]>,
    /// They may have expired.
    expired: bool,
}

impl Builder<'_> {
    fn build(&mut self) -> Option<Config> {
        let gateway_file = self.directory.join("gateway.toml");
        let main = self.read(&gateway_file)?;
        // The defaults for region files and tenants stand in gateway.toml, so nothing can be read without it.
        let gateway = main.parse::<file::Gateway>(lay_gateway_defaults, &mut self.problems);
        let defaults = Defaults::of(&main);

        let regions = self.regions(&defaults);
        let tenants = self.tenants(&defaults);
        let overrides = self.locations();
        let gateway = gateway?;

        let listeners = self.listeners(&main, &gateway);
        let geoip = self.geoip(&main, &gateway.geoip);
        let country_rules = self.country_rules(&main, &gateway.country_rules);
        let (geometry, live) = (self.geometry(&main, &gateway), live_rules(&gateway));
        let (routes, default_route) = self.routes(&main, &gateway, &regions, &tenants);
        self.bounds(&main, &gateway);
        if self.problems.is_empty() {
            self.idle_rules(&main, &gateway);
            if tenants.is_empty() {
                let message = "there is no tenant, so nobody could be served; is it still being written?".into();
                let file = self.directory.join("tenants.toml");
                self.problems.push(Problem { file, line: 0, column: 0, message });
            }
        }
        if let Some(name) = &gateway.identity.anonymous
            && !tenants.iter().any(|tenant| tenant.name == *name)
        {
            self.say(&main, &["identity", "anonymous"], format!("there is no tenant `{name}` in tenants.toml"));
        }
        Some(Config {
            revision: self.revision(),
            instance: instance(&gateway.gateway.instance),
            cores: match gateway.gateway.cores {
                0 => std::thread::available_parallelism().map_or(1, Into::into),
                cores => cores,
            },
            zones: sorted(gateway.gateway.zones),
            listeners,
            admin: gateway.admin.address,
            anonymous: gateway.identity.anonymous,
            geoip,
            overrides,
            geometry,
            routes,
            default_route,
            country_rules,
            probes: Probes {
                interval: gateway.probes.interval.0,
                jitter: gateway.probes.jitter,
                timeout: gateway.probes.timeout.0,
                relaxed: gateway.probes.relaxed,
            },
            live,
            queue: Queue { bound: gateway.capacity.queue, wait: gateway.capacity.queue_wait.0 },
            stall: stall::Rules {
                silence: gateway.stall.silence.0,
                answer: gateway.stall.answer.0,
                again: gateway.stall.again.0,
                slow_factor: gateway.stall.slow_factor,
                slow_unknown: gateway.stall.slow_unknown.0,
            },
            attempts: Attempts {
                rules: course::Rules {
                    max: gateway.attempts.max,
                    budget_share: gateway.attempts.budget_share,
                    budget_floor: gateway.attempts.budget_floor_per_second,
                },
                connect_timeout: gateway.attempts.connect_timeout.0,
                replay_bytes: bytes(gateway.attempts.replay_buffer),
                answer_bytes: bytes(gateway.attempts.answer_buffer),
                poison_for: gateway.attempts.poison_for.0,
            },
            cache: Cache {
                bytes: gateway.cache.bytes.0.as_u64(),
                entry_bytes: bytes(gateway.cache.entry),
                ttl: gateway.cache.ttl.0,
                stale_while_revalidate: gateway.cache.stale_while_revalidate.0,
                stale_if_error: gateway.cache.stale_if_error.0,
            },
            limits: Limits {
                header_timeout: gateway.limits.header_timeout.0,
                body_timeout: gateway.limits.body_timeout.0,
                answer_silence: gateway.limits.answer_silence.0,
                header_bytes: bytes(gateway.limits.header_bytes),
                openai_bytes: bytes(gateway.limits.openai_body),
                connections: gateway.limits.connections,
                streams: gateway.limits.streams,
                in_flight: gateway.limits.in_flight,
            },
            shutdown: Shutdown { delay: gateway.shutdown.delay.0, grace: gateway.shutdown.grace.0 },
            telemetry: Telemetry {
                otlp: gateway.telemetry.otlp.map(Into::into),
                sampling: gateway.telemetry.sampling,
                access_log: gateway.telemetry.access_log,
                full_addresses: gateway.telemetry.full_addresses,
            },
            settle: gateway.reload.settle.0,
            poll: gateway.reload.poll.0,
            allow_large_change: gateway.reload.allow_large_change,
            regions,
            tenants,
            files: self.files.clone(),
        })
    }

    fn revision(&self) -> Box<str> {
        hex(&self.digest.clone().finalize()[..6]).into()
    }

    /// Reads one file into the digest.
    fn read(&mut self, path: &Path) -> Option<Document> {
        match Document::read(path) {
            Ok(document) => {
                // Name and length too, so that moving text from one file to the next is another revision.
                self.digest.update(path.file_name().unwrap_or_default().as_encoded_bytes());
                // A permission for a revision is no part of it, nor is what has to be written around it: it could not be
                // named in itself.
                let counts = |line: &&str| {
                    let code = line.split('#').next().unwrap_or_default().trim();
                    !(line.is_empty() || code == "[reload]" || code.starts_with(PERMISSION))
                };
                let text: String =
                    document.text.lines().map(str::trim).filter(counts).flat_map(|line| [line, "\n"]).collect();
                self.digest.update(text.len().to_le_bytes());
                self.digest.update(&text);
                Some(document)
            }
            Err(problem) => {
                self.problems.push(problem);
                None
            }
        }
    }

    fn say(&mut self, document: &Document, path: &[&str], message: impl Into<String>) {
        self.problems.push(document.problem(path, message));
    }

    fn bounds(&mut self, main: &Document, gateway: &file::Gateway) {
        let positive = |length: &file::Length| !length.0.is_zero();
        let otlp = gateway.telemetry.otlp.as_ref().is_none_or(|url| {
            url.parse::<http::Uri>().is_ok_and(|url| url.host().is_some() && url.scheme_str() == Some("http"))
        });
        let checks: [(bool, &[&str], &str); 40] = [
            (gateway.gateway.cores <= 1024, &["gateway", "cores"], "at most 1024"),
            (
                !gateway.listeners.is_empty(),
                &["listeners"],
                "add a [[listeners]] table: without one nobody can connect",
            ),
            ((0.0..=1.0).contains(&gateway.telemetry.sampling), &["telemetry", "sampling"], "from 0.0 to 1.0"),
            ((1..=ATTEMPTS_MAX).contains(&gateway.attempts.max), &["attempts", "max"], "from 1 to 8"),
            ((0.0..=1.0).contains(&gateway.attempts.budget_share), &["attempts", "budget_share"], "from 0.0 to 1.0"),
            (
                gateway.attempts.budget_floor_per_second <= 100_000,
                &["attempts", "budget_floor_per_second"],
                "at most 100000",
            ),
            (!gateway.attempts.timeout.0.is_zero(), &["attempts", "timeout"], "longer than zero"),
            (!gateway.attempts.connect_timeout.0.is_zero(), &["attempts", "connect_timeout"], "longer than zero"),
            (gateway.probes.interval.0 >= Duration::from_millis(10), &["probes", "interval"], "at least \"10ms\""),
            (!gateway.probes.timeout.0.is_zero(), &["probes", "timeout"], "longer than zero"),
            ((0.0..=0.9).contains(&gateway.probes.jitter), &["probes", "jitter"], "from 0.0 to 0.9"),
            (
                gateway.probes.healthy.min(gateway.probes.unhealthy) >= 1,
                &["probes", "healthy"],
                "thresholds are at least 1",
            ),
            (gateway.outlier.consecutive_failures >= 1, &["outlier", "consecutive_failures"], "at least 1"),
            (gateway.limits.header_bytes.0.as_u64() >= 8192, &["limits", "header_bytes"], "at least \"8KiB\""),
            (gateway.limits.connections >= 1, &["limits", "connections"], "at least 1"),
            (positive(&gateway.limits.header_timeout), &["limits", "header_timeout"], "longer than zero"),
            (positive(&gateway.limits.body_timeout), &["limits", "body_timeout"], "longer than zero"),
            (positive(&gateway.limits.answer_silence), &["limits", "answer_silence"], "longer than zero"),
            (positive(&gateway.stall.silence), &["stall", "silence"], "longer than zero"),
            (positive(&gateway.stall.answer), &["stall", "answer"], "longer than zero"),
            (positive(&gateway.stall.again), &["stall", "again"], "longer than zero"),
            (positive(&gateway.outlier.ejection), &["outlier", "ejection"], "longer than zero"),
            ((0.0..=1.0).contains(&gateway.outlier.failure_share), &["outlier", "failure_share"], "from 0.0 to 1.0"),
            (gateway.outlier.failure_volume >= 1, &["outlier", "failure_volume"], "at least 1"),
            ((0.0..=1.0).contains(&gateway.outlier.ejected_share), &["outlier", "ejected_share"], "from 0.0 to 1.0"),
            (
                gateway.outlier.ejection_max.0 >= gateway.outlier.ejection.0,
                &["outlier", "ejection_max"],
                "not shorter than `ejection`",
            ),
            ((1.0..=100.0).contains(&gateway.probes.relaxed), &["probes", "relaxed"], "from 1.0 to 100.0"),
            (
                (1.0..=10.0).contains(&gateway.capacity.overprovisioning),
                &["capacity", "overprovisioning"],
                "from 1.0 to 10.0",
            ),
            (gateway.capacity.overload_replies >= 1, &["capacity", "overload_replies"], "at least 1"),
            (gateway.capacity.concurrency_min >= 1, &["capacity", "concurrency_min"], "at least 1"),
            (
                gateway.capacity.concurrency_max >= gateway.capacity.concurrency_min
                    && gateway.capacity.concurrency_max <= 1_000_000,
                &["capacity", "concurrency_max"],
                "from `concurrency_min` to 1000000",
            ),
            (gateway.capacity.queue <= 100_000, &["capacity", "queue"], "at most 100000"),
            ((1.0..=100.0).contains(&gateway.stall.slow_factor), &["stall", "slow_factor"], "from 1.0 to 100.0"),
            (
                gateway.attempts.answer_buffer.0.as_u64() <= 64 << 20,
                &["attempts", "answer_buffer"],
                "at most \"64MiB\"",
            ),
            (
                gateway.attempts.poison_for.0 <= Duration::from_secs(86_400),
                &["attempts", "poison_for"],
                "at most \"1d\"",
            ),
            (
                gateway.reload.poll.0.is_zero() || gateway.reload.poll.0 >= Duration::from_secs(1),
                &["reload", "poll"],
                "\"0s\" for never, or at least \"1s\"",
            ),
            (gateway.cache.entry.0.as_u64() <= 64 << 20, &["cache", "entry"], "at most \"64MiB\""),
            (
                [gateway.cache.ttl, gateway.cache.stale_while_revalidate, gateway.cache.stale_if_error]
                    .iter()
                    .all(|length| length.0 <= Duration::from_secs(31_536_000)),
                &["cache"],
                "at most \"1y\"",
            ),
            (otlp, &["telemetry", "otlp"], "an OTLP endpoint is http://HOST:PORT"),
            (gateway.limits.streams >= 1 && gateway.limits.in_flight >= 1, &["limits"], "limits are at least 1"),
        ];
        for (holds, path, message) in checks {
            if !holds {
                self.say(main, path, message);
            }
        }
    }

    /// Rules that hold for nobody, which cannot be meant. A zone or a model that no region has any more is no such mistake:
    /// whoever takes the last region of a zone away wants that to hold at once, and its tenants are refused.
    fn idle_rules(&mut self, main: &Document, gateway: &file::Gateway) {
        for (at, _) in gateway.country_rules.iter().enumerate().filter(|(_, rule)| rule.countries.is_empty()) {
            let place = ["country_rules", &at.to_string(), "countries"];
            self.say(main, &place, "a rule for no country holds for nobody");
        }
        let detours = gateway.routes.iter().map(|route| route.max_detour).chain([gateway.steering.max_detour]);
        if gateway.gateway.latitude.is_none() && detours.flatten().next().is_some() {
            let message = "`max_detour` counts from this gateway: it needs [gateway] latitude and longitude";
            self.say(main, &["steering"], message);
        }
    }

    fn listeners(&mut self, main: &Document, gateway: &file::Gateway) -> Vec<Listener> {
        let mut listeners: Vec<Listener> = Vec::new();
        for (at, listener) in gateway.listeners.iter().enumerate() {
            let at = at.to_string();
            if listeners.iter().any(|other| other.address == listener.address) {
                self.say(main, &["listeners", &at, "address"], format!("{} is listened on twice", listener.address));
            }
            if listener.address.port() == 0 {
                self.say(main, &["listeners", &at, "address"], "a port that clients can know: from 1 to 65535");
            }
            let tls = listener.tls.as_ref().and_then(|tls| {
                let (certificate, key) = (self.beside(main, &tls.certificate), self.beside(main, &tls.key));
                match self.server_config(&certificate, &key) {
                    Ok(presented) => Some(presented),
                    Err((entry, message)) => {
                        self.say(main, &["listeners", &at, "tls", entry], message);
                        None
                    }
                }
            });
            let source = match listener.client_ip {
                file::ClientIp::Peer => ForwardedBy::Peer,
                file::ClientIp::XForwardedFor => ForwardedBy::XForwardedFor,
                file::ClientIp::Forwarded => ForwardedBy::Forwarded,
            };
            let trust = Arc::new(Trust { proxies: listener.trusted_proxies.clone(), source });
            let (tls, expires) = tls.map(|Presented { config, expires, .. }| (Arc::new(config), expires)).unzip();
            listeners.push(Listener { address: listener.address, tls, expires, trust });
        }
        listeners
    }

    fn server_config(&mut self, certificate: &Path, key: &Path) -> Result<Presented, (&'static str, String)> {
        let ticketer = match &self.opened.ticketer {
            Some(ticketer) => Arc::clone(ticketer),
            None => Arc::clone(self.opened.ticketer.insert(tls::ticketer().map_err(|message| ("key", message))?)),
        };
        for (entry, path) in [("certificate", certificate), ("key", key)] {
            regular(path, SECRET_MAX).map_err(|message| (entry, format!("{}: {message}", path.display())))?;
        }
        // A renewed certificate is another state of the directory, though no TOML file has changed.
        self.digest.update(std::fs::read(certificate).unwrap_or_default());
        let presented = tls::server_config(certificate, key, ticketer)?;
        self.certificates.push(presented.digest);
        // One that has expired while it was in force stays there: a change of something else must remain possible.
        if !(self.expired || self.opened.certificates.contains(&presented.digest)) {
            presented
                .valid_now()
                .map_err(|message| ("certificate", format!("{}: {message}", certificate.display())))?;
        }
        Ok(presented)
    }

    fn geoip(&mut self, main: &Document, geoip: &file::GeoIp) -> Vec<Arc<Database>> {
        let mut databases = Vec::new();
        let mut opened = HashMap::new();
        for (at, path) in geoip.files.iter().enumerate() {
            let path = self.beside(main, path);
            match self.database(&path) {
                Ok(database) => {
                    self.digest.update(database.1.build_epoch().to_le_bytes());
                    self.digest.update(database.0.length.to_le_bytes());
                    databases.push(Arc::clone(&database.1));
                    opened.insert(absolute(&path), database);
                }
                Err(_) if geoip.optional && !path.exists() => {}
                Err(message) => {
                    let remedy = if path.exists() { "" } else { "; correct the path, or set geoip.optional = true" };
                    self.say(
                        main,
                        &["geoip", "files", &at.to_string()],
                        format!("{}: {message}{remedy}", path.display()),
                    );
                }
            }
        }
        self.opened.databases = opened;
        databases
    }

    fn database(&self, path: &Path) -> Result<(Stamp, Arc<Database>), String> {
        regular(path, DATABASE_MAX)?;
        let metadata = std::fs::metadata(path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => "there is no such file".to_owned(),
            _ => format!("it cannot be read: {error}"),
        })?;
        let stamp = Stamp { modified: metadata.modified().ok(), length: metadata.len(), inode: metadata.ino() };
        match self.opened.databases.get(&absolute(path)) {
            Some((known, database)) if *known == stamp => Ok((stamp, Arc::clone(database))),
            _ => Ok((stamp, Arc::new(Database::open(path)?))),
        }
    }

    fn country_rules(&mut self, main: &Document, rules: &[file::CountryRule]) -> Vec<(Vec<Country>, Vec<Box<str>>)> {
        let mut built = Vec::new();
        for (at, rule) in rules.iter().enumerate() {
            let countries = rule
                .countries
                .iter()
                .filter_map(|code| self.country(main, &["country_rules", &at.to_string(), "countries"], code));
            built.push((countries.collect(), rule.require.clone()));
        }
        built
    }

    fn geometry(&mut self, main: &Document, gateway: &file::Gateway) -> steer::Geometry {
        let steering = &gateway.steering;
        if !(1.0..=10.0).contains(&steering.route_inflation) {
            self.say(main, &["steering", "route_inflation"], "from 1.0 (a straight line) to 10.0");
        }
        let place = match (gateway.gateway.latitude, gateway.gateway.longitude) {
            (None, None) => None,
            (latitude, longitude) => {
                let point = Point::new(latitude.unwrap_or(f32::NAN), longitude.unwrap_or(f32::NAN));
                if point.is_none() {
                    self.say(main, &["gateway"], "latitude and longitude go together, within ±90 and ±180");
                }
                point
            }
        };
        steer::Geometry {
            route_inflation: steering.route_inflation,
            constant_ms: steering.constant.0.as_secs_f32() * 1000.0,
            gateway: place,
        }
    }

    /// The routes as written, and the one that fits all.
    fn routes(
        &mut self,
        main: &Document,
        gateway: &file::Gateway,
        regions: &[RegionConfig],
        tenants: &[Tenant],
    ) -> (Vec<Route>, Route) {
        let pools = self.pools(main, &gateway.steering.pools, regions);
        let steering = |policy: file::Policy, max_detour: Option<&file::Length>| steer::Steering {
            policy: match policy {
                file::Policy::Nearest => steer::Policy::Nearest,
                file::Policy::Latency => steer::Policy::Latency,
                file::Policy::Pools => steer::Policy::Pools,
                file::Policy::Weighted => steer::Policy::Weighted,
            },
            max_detour_ms: max_detour.map(|length| length.0.as_secs_f32() * 1000.0),
            pools: pools.clone(),
        };
        let (policy, detour, timeout) =
            (gateway.steering.policy, gateway.steering.max_detour.as_ref(), gateway.attempts.timeout.0);
        let mut routes = Vec::new();
        for (at, route) in gateway.routes.iter().enumerate() {
            let at = at.to_string();
            for model in &route.models {
                if !regions.iter().any(|region| region.models.contains_key(model)) {
                    let message = format!("no region file declares a model `{model}`");
                    self.say(main, &["routes", &at, "models"], message);
                }
            }
            for name in &route.tenants {
                if !tenants.iter().any(|tenant| tenant.name == *name) {
                    self.say(main, &["routes", &at, "tenants"], format!("there is no tenant `{name}` in tenants.toml"));
                }
            }
            if route.timeout.as_ref().is_some_and(|timeout| timeout.0.is_zero()) {
                self.say(main, &["routes", &at, "timeout"], "longer than zero");
            }
            let affinity = route.affinity.as_deref().and_then(|affinity| match affinity {
                "tenant" => Some(Affinity::Tenant),
                header => match header.strip_prefix("header:").map(str::parse) {
                    Some(Ok(name)) => Some(Affinity::Header(name)),
                    _ => {
                        self.say(main, &["routes", &at, "affinity"], "\"tenant\", or \"header:NAME\"");
                        None
                    }
                },
            });
            let hedge = route.hedge.as_ref().map(|hedge| {
                if hedge.floor.0 > hedge.ceiling.0 || !(0.0..=0.05).contains(&hedge.share) {
                    let message = "`floor` is not above `ceiling`, and `share` is from 0.0 to 0.05";
                    self.say(main, &["routes", &at, "hedge"], message);
                }
                stall::Hedge { floor: hedge.floor.0, ceiling: hedge.ceiling.0, share: hedge.share }
            });
            routes.push(Route {
                models: route.models.iter().cloned().collect(),
                tenants: route.tenants.iter().cloned().collect(),
                steering: steering(route.policy.unwrap_or(policy), route.max_detour.as_ref().or(detour)),
                timeout: route.timeout.as_ref().map_or(timeout, |timeout| timeout.0),
                replay: route.replay,
                affinity,
                hedge,
                cache: match route.cache {
                    Some(file::CacheScope::Off) => CacheScope::Off,
                    None | Some(file::CacheScope::Tenant) => CacheScope::Tenant,
                    Some(file::CacheScope::Shared) => CacheScope::Shared,
                },
            });
        }
        if pools.is_empty() && routes.iter().any(|route: &Route| route.steering.policy == steer::Policy::Pools)
            || (pools.is_empty() && matches!(policy, file::Policy::Pools))
        {
            self.say(main, &["steering"], "the policy \"pools\" needs a [[steering.pools]] table");
        }
        let default_route = Route {
            models: BTreeSet::new(),
            tenants: BTreeSet::new(),
            steering: steering(policy, detour),
            timeout,
            replay: None,
            affinity: None,
            hedge: None,
            cache: CacheScope::Tenant,
        };
        (routes, default_route)
    }

    fn pools(&mut self, main: &Document, pools: &[file::Pool], regions: &[RegionConfig]) -> Vec<steer::Pool> {
        let mut built = Vec::new();
        for (at, pool) in pools.iter().enumerate() {
            let at = at.to_string();
            let place = ["steering", "pools", at.as_str()];
            let countries = pool.countries.iter().filter_map(|code| self.country(main, &place, code)).collect();
            let continents = pool.continents.iter().map(|continent| match continent {
                file::Continent::Africa => Continent::Africa,
                file::Continent::Antarctica => Continent::Antarctica,
                file::Continent::Asia => Continent::Asia,
                file::Continent::Europe => Continent::Europe,
                file::Continent::NorthAmerica => Continent::NorthAmerica,
                file::Continent::Oceania => Continent::Oceania,
                file::Continent::SouthAmerica => Continent::SouthAmerica,
            });
            let mut order = Vec::new();
            for name in &pool.regions {
                let known = regions.iter().position(|region| region.region.name == *name).and_then(RegionIndex::new);
                match known {
                    Some(region) => order.push(region),
                    None => self.say(main, &place, format!("there is no region `{name}`")),
                }
            }
            built.push(steer::Pool { countries, continents: continents.collect(), regions: order });
        }
        built
    }

    fn regions(&mut self, defaults: &Defaults<'_>) -> Vec<RegionConfig> {
        let directory = self.directory.join("regions");
        let files = match toml_files(&directory) {
            Ok(files) => files,
            Err(error) => {
                let message = format!("it cannot be listed: {error}; region files belong here");
                self.problems.push(Problem { file: directory, line: 0, column: 0, message });
                return Vec::new();
            }
        };
        if files.is_empty() || files.len() > REGIONS_MAX {
            let message = match files.len() {
                0 => "there is no region file here".to_owned(),
                count => format!("{count} region files; at most {REGIONS_MAX}"),
            };
            self.problems.push(Problem { file: directory, line: 0, column: 0, message });
        }
        let regions: Vec<RegionConfig> = files.iter().filter_map(|path| self.region(path, defaults)).collect();
        let endpoints: usize = regions.iter().map(|region| region.endpoints.len()).sum();
        if endpoints > ENDPOINTS_MAX {
            let message = format!("{endpoints} endpoints; at most {ENDPOINTS_MAX}");
            self.problems.push(Problem { file: self.directory.join("regions"), line: 0, column: 0, message });
        }
        regions
    }

    fn region(&mut self, path: &Path, defaults: &Defaults<'_>) -> Option<RegionConfig> {
        let document = self.read(path)?;
        let region: file::Region = document.parse(|table| defaults.lay_under_region(table), &mut self.problems)?;
        let before = self.problems.len();
        let name: Box<str> = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default().into();
        if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) {
            self.say(&document, &[], "a region's file name is made of letters, digits, `-`, `_` and `.`");
        }
        if let Some(other) = region.name.filter(|other| *other != name) {
            self.say(
                &document,
                &["name"],
                format!("the file is named `{name}.toml`, but the region `{other}`; make them one"),
            );
        }
        let country = self.country(&document, &["country"], &region.country);
        let point = Point::new(region.latitude, region.longitude);
        if point.is_none() {
            self.say(&document, &["latitude"], "latitude is within ±90, longitude within ±180");
        }
        if region.endpoints.is_empty() {
            self.say(&document, &["endpoints"], "a region needs an [[endpoints]] table");
        }
        if region.models.is_empty() {
            self.say(&document, &["models"], "a region needs a model: [models.NAME] for each that it serves");
        }
        if !(0.0..=1e6).contains(&region.weight) || !(0.0..=1e9).contains(&region.cost) {
            self.say(&document, &["weight"], "`weight` is from 0 to 1000000, `cost` from 0 to 1000000000");
        }
        let limits = (region.soft_limit.or(region.hard_limit), region.hard_limit);
        if limits.0 == Some(0) || limits.1.is_some_and(|hard| limits.0.is_some_and(|soft| soft > hard)) {
            self.say(&document, &["soft_limit"], "limits are at least 1, and `soft_limit` is not above `hard_limit`");
        }
        let endpoints = region.endpoints.iter().enumerate();
        for (at, endpoint) in region.endpoints.iter().enumerate() {
            let same = |other: &file::Endpoint| (&other.http, &other.grpc) == (&endpoint.http, &endpoint.grpc);
            if region.endpoints[..at].iter().any(same) {
                self.say(&document, &["endpoints", &at.to_string()], "the same endpoint stands here twice");
            }
        }
        let endpoints: Vec<_> =
            endpoints.filter_map(|(at, endpoint)| self.endpoint(&document, &name, &at.to_string(), endpoint)).collect();
        if self.problems.len() > before {
            return None;
        }
        Some(RegionConfig {
            region: Region {
                name,
                country: country?,
                point: point?,
                zones: sorted(region.zones),
                drain: region.drain,
                weight: region.weight,
                cost: region.cost,
                soft_limit: limits.0.unwrap_or(u32::MAX),
                hard_limit: limits.1.unwrap_or(u32::MAX),
            },
            endpoints,
            models: region
                .models
                .into_iter()
                .map(|(name, model)| (name, model.versions.into_iter().collect()))
                .collect(),
        })
    }

    fn endpoint(
        &mut self,
        document: &Document,
        region: &str,
        at: &str,
        endpoint: &file::Endpoint,
    ) -> Option<EndpointConfig> {
        let place = ["endpoints", at];
        if endpoint.http.is_none() && endpoint.grpc.is_none() {
            self.say(document, &place, "an endpoint needs `http`, `grpc` or both");
            return None;
        }
        let assert_region = endpoint.region_assertion == file::RegionAssertion::Probe;
        if endpoint.http.is_none() && assert_region {
            let message =
                "without `http` there is no probe to name the region: add it, or region_assertion = \"trust-config\"";
            self.say(document, &place, message);
        }
        let authorities = endpoint.tls.as_ref().map(|tls| {
            let path = self.beside(document, &tls.ca);
            let found = regular(&path, SECRET_MAX).and_then(|()| tls::authorities(&path));
            found
                .inspect(|(_, digest)| self.digest.update(digest))
                .map_err(|message| self.say(document, &["endpoints", at, "tls", "ca"], message))
        });
        let mut target = |kind: &str, url: &Option<String>, http2_only: bool| {
            let url = url.as_ref()?;
            let tls = endpoint.tls.as_ref().and_then(|tls| tls.server_name.as_deref());
            let authorities = authorities.as_ref().map(|found| found.as_ref().ok());
            match target(url, tls, authorities, endpoint.protocol, http2_only) {
                Ok(target) => Some(target),
                Err(message) => {
                    self.say(document, &["endpoints", at, kind], message);
                    None
                }
            }
        };
        let http = target("http", &endpoint.http, false);
        let grpc = target("grpc", &endpoint.grpc, true);
        let authorities = authorities.and_then(Result::ok).map(|(_, digest)| digest);
        let mut id = String::new();
        // Everything that a connection or a judgement depends on: a change of any makes it another endpoint.
        let _ = write!(id, "{region} {:?} {:?} {authorities:?} ", endpoint.http, endpoint.grpc);
        let _ = write!(
            id,
            "{:?} {:?} {:?}",
            endpoint.tls.as_ref().map(|tls| &tls.server_name),
            endpoint.protocol,
            assert_region
        );
        Some(EndpointConfig {
            id: id.into(),
            region: Arc::from(region),
            http,
            grpc,
            drain: endpoint.drain,
            assert_region,
        })
    }

    fn tenants(&mut self, defaults: &Defaults<'_>) -> Vec<Tenant> {
        let path = self.directory.join("tenants.toml");
        if !path.exists() {
            return Vec::new();
        }
        let Some(document) = self.read(&path) else { return Vec::new() };
        let file = document.parse::<file::Tenants>(|table| defaults.lay_under_tenants(table), &mut self.problems);
        let Some(file) = file else { return Vec::new() };
        let mut holders: BTreeMap<[u8; 32], Box<str>> = BTreeMap::new();
        let mut tenants = Vec::new();
        for (name, tenant) in file.tenants {
            if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b)) {
                self.say(&document, &["tenants", &name], "a tenant's name is made of letters, digits, `-` and `_`");
            }
            let mut keys = Vec::new();
            for (at, key) in tenant.keys.iter().enumerate() {
                let place = ["tenants", &*name, "keys", &at.to_string()];
                match self.key(&document, key) {
                    Ok(key) => {
                        if let Some(other) = holders.insert(key, name.clone()) {
                            self.say(
                                &document,
                                &place,
                                format!("the same key stands twice, here and at tenant `{other}`"),
                            );
                        }
                        keys.push(key);
                    }
                    Err(message) => self.say(&document, &place, message),
                }
            }
            let residency = match tenant.residency {
                None => Residency::Any,
                Some(file::Residency::Require(zones)) => Residency::Require(zones),
                Some(file::Residency::Prefer(zones)) => Residency::Prefer(zones),
            };
            tenants.push(Tenant { name, keys, residency, models: tenant.models.into_iter().collect() });
        }
        tenants
    }

    fn key(&mut self, document: &Document, key: &file::Key) -> Result<[u8; 32], String> {
        let parse = |hash: &str| {
            let digits = hash.trim().strip_prefix("sha256:").filter(|digits| digits.len() == 64);
            digits.and_then(|digits| {
                let mut key = [0; 32];
                for (byte, at) in key.iter_mut().zip((0..64).step_by(2)) {
                    *byte = u8::from_str_radix(digits.get(at..at + 2)?, 16).ok()?;
                }
                Some(key)
            })
        };
        let expected = "a key's hash is `sha256:` and 64 hexadecimal digits; `isochrone key new` prints one";
        match key {
            file::Key::Inline { hash } => parse(hash).ok_or_else(|| expected.to_owned()),
            file::Key::Environment { hash_env } => {
                let value = std::env::var(hash_env)
                    .map_err(|_| format!("the environment has no text in a variable `{hash_env}`"))?;
                self.digest.update(&value);
                parse(&value).ok_or_else(|| format!("the environment's `{hash_env}`: {expected}"))
            }
            file::Key::File { hash_file } => {
                let path = self.beside(document, hash_file);
                regular(&path, SECRET_MAX).map_err(|message| format!("{}: {message}", path.display()))?;
                let text = std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
                self.digest.update(&text);
                parse(&text).ok_or_else(|| format!("{}: {expected}", path.display()))
            }
        }
    }

    fn locations(&mut self) -> Vec<(ipnet::IpNet, Location)> {
        let path = self.directory.join("locations.toml");
        if !path.exists() {
            return Vec::new();
        }
        let Some(document) = self.read(&path) else { return Vec::new() };
        let Some(file) = document.parse::<file::Locations>(|_| {}, &mut self.problems) else { return Vec::new() };
        let mut overrides = Vec::new();
        for (at, location) in file.locations.iter().enumerate() {
            let at = at.to_string();
            let code = location.country.as_ref();
            let country = code.and_then(|code| self.country(&document, &["locations", &at, "country"], code));
            let point = match (location.latitude, location.longitude) {
                (None, None) => country.and_then(Country::centroid),
                (latitude, longitude) => {
                    let point = Point::new(latitude.unwrap_or(f32::NAN), longitude.unwrap_or(f32::NAN));
                    if point.is_none() {
                        let message = "latitude and longitude go together, within ±90 and ±180";
                        self.say(&document, &["locations", &at], message);
                    }
                    point
                }
            };
            overrides.push((location.cidr, Location { country, point, source: Source::Override }));
        }
        overrides.sort_by_key(|(net, _)| std::cmp::Reverse(net.prefix_len()));
        overrides
    }

    fn country(&mut self, document: &Document, path: &[&str], code: &str) -> Option<Country> {
        let country = Country::parse(code).filter(|country| country.is_known());
        if country.is_none() {
            self.say(document, path, format!("`{code}` is no ISO 3166-1 country code of two letters"));
        }
        country
    }

    /// A path as written in a file, relative to that file.
    fn beside(&mut self, document: &Document, path: &Path) -> PathBuf {
        let path = document.file.parent().unwrap_or(self.directory).join(path);
        self.files.insert(path.clone());
        path
    }
}

fn live_rules(gateway: &file::Gateway) -> live::Rules {
    let file::Gateway { probes, outlier, capacity, .. } = gateway;
    live::Rules {
        thresholds: health::Thresholds { healthy: probes.healthy, unhealthy: probes.unhealthy, calm: probes.calm.0 },
        round_trip_decay: probes.decay.0,
        outlier: outlier::Rules {
            consecutive_failures: outlier.consecutive_failures,
            failure_share: outlier.failure_share,
            failure_volume: outlier.failure_volume,
            ejection: outlier.ejection.0,
            ejection_max: outlier.ejection_max.0,
        },
        ejected_share: outlier.ejected_share,
        pushback: pushback::Rules {
            in_a_row: capacity.overload_replies,
            pause: outlier.ejection.0,
            // Its end costs nobody a trial, so it need not be long.
            pause_max: outlier.ejection_max.0.min(PAUSE_MAX),
        },
        limit: limit::Rules { min: capacity.concurrency_min, max: capacity.concurrency_max },
        slow_start: capacity.slow_start.0,
        overprovisioning: capacity.overprovisioning,
        report_fresh: capacity.report_fresh.0,
        error_penalty: outlier.error_penalty.0,
        shift: gateway.steering.shift.0,
    }
}

/// The tables of gateway.toml (over the reference's) that are laid under other tables.
pub(super) struct Defaults<'i> {
    root: DeTable<'i>,
}

impl<'i> Defaults<'i> {
    pub(super) fn of(main: &'i Document) -> Defaults<'i> {
        let mut root = DeTable::parse_recoverable(&main.text).0.into_inner();
        lay_under(&mut root, reference().get_ref());
        Defaults { root }
    }

    fn table(&self, name: &str) -> Option<&DeTable<'i>> {
        self.root.get("defaults")?.get_ref().as_table()?.get(name)?.get_ref().as_table()
    }

    pub(super) fn lay_under_region<'t>(&self, region: &mut DeTable<'t>)
    where
        'i: 't,
    {
        if let Some(defaults) = self.table("region") {
            lay_under(region, defaults);
        }
        lay_under_each(region.get_mut("endpoints"), self.table("endpoint"));
    }

    pub(super) fn lay_under_tenants<'t>(&self, root: &mut DeTable<'t>)
    where
        'i: 't,
    {
        lay_under_each(root.get_mut("tenants"), self.table("tenant"));
    }
}

/// Lays defaults under each table of an array or of a table of tables.
fn lay_under_each<'i>(value: Option<&mut toml::Spanned<DeValue<'i>>>, defaults: Option<&DeTable<'i>>) {
    let (Some(value), Some(defaults)) = (value, defaults) else { return };
    let lay = |entry: &mut toml::Spanned<DeValue<'i>>| {
        if let DeValue::Table(entry) = entry.get_mut() {
            lay_under(entry, defaults);
        }
    };
    match value.get_mut() {
        DeValue::Array(array) => array.iter_mut().for_each(lay),
        DeValue::Table(table) => table.iter_mut().map(|(_, entry)| entry).for_each(lay),
        _ => {}
    }
}

pub(super) fn lay_gateway_defaults(root: &mut DeTable<'_>) {
    lay_under(root, reference().get_ref());
    let defaults = root.get("defaults").and_then(|value| value.get_ref().as_table());
    let listener = defaults.and_then(|table| table.get("listener")?.get_ref().as_table().cloned());
    lay_under_each(root.get_mut("listeners"), listener.as_ref());
}

fn reference() -> toml::Spanned<DeTable<'static>> {
    // Compiled in, and parsed by a test.
    DeTable::parse_recoverable(REFERENCE).0
}

/// Parses an endpoint's URL.
fn target(
    url: &str,
    server_name: Option<&str>,
    authorities: Option<Option<&(Arc<rustls::RootCertStore>, [u8; 32])>>,
    protocol: file::Protocol,
    http2_only: bool,
) -> Result<Target, String> {
    let uri: http::Uri = url.parse().map_err(|error| format!("`{url}` is no URL: {error}"))?;
    let (scheme, authority) = match (uri.scheme_str(), uri.authority()) {
        (Some(scheme @ ("http" | "https")), Some(authority)) => (scheme, authority),
        _ => return Err(format!("`{url}`: an endpoint's URL is http://HOST:PORT or https://HOST:PORT")),
    };
    if uri.path().len() > 1 || uri.query().is_some() || authority.as_str().contains('@') {
        return Err(format!("`{url}`: an endpoint's URL has no path, query or user"));
    }
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    // What stands behind the host is a port, or nothing.
    let port = match authority.as_str().strip_prefix(authority.host()) {
        Some("") => Some(if scheme == "https" { 443 } else { 80 }),
        Some(port) => port.strip_prefix(':').and_then(|port| port.parse().ok()).filter(|&port: &u16| port > 0),
        None => None,
    };
    let Some(port) = port.filter(|_| !host.is_empty()) else {
        return Err(format!("`{url}`: an endpoint's URL has a host, and a port from 1 to 65535"));
    };
    let address = match host.parse() {
        Ok(ip) => Address::Ip(std::net::SocketAddr::new(ip, port)),
        Err(_) => Address::Name(host.into(), port),
    };
    let http2 = http2_only || protocol == file::Protocol::Http2;
    let tls = match (scheme, authorities) {
        ("http", None) => None,
        ("http", Some(_)) => return Err("`tls` is for https:// endpoints; this one is http://".into()),
        (_, None) => {
            return Err("an https:// endpoint needs tls = { ca = \"FILE\" }: whose certificates to believe".into());
        }
        // The authorities could not be read, which has been told.
        (_, Some(None)) => None,
        (_, Some(Some((roots, _)))) => {
            let alpn: &[&[u8]] = match protocol {
                _ if http2_only => &[b"h2"],
                file::Protocol::Auto => &[b"h2", b"http/1.1"],
                file::Protocol::Http1 => &[b"http/1.1"],
                file::Protocol::Http2 => &[b"h2"],
            };
            let server_name = server_name.unwrap_or(host).to_owned();
            let server_name = rustls::pki_types::ServerName::try_from(server_name)
                .map_err(|error| format!("the server's name: {error}"))?;
            Some(TargetTls { config: tls::client_config(Arc::clone(roots), alpn), server_name })
        }
    };
    let authority = http::HeaderValue::from_str(authority.as_str()).map_err(|error| error.to_string())?;
    Ok(Target { authority, address, tls, http2 })
}

/// Copies what a configuration consists of to another directory: its files, and those they name that lie among them.
///
/// # Errors
/// A file cannot be read or written.
pub fn copy(config: &Config, from: &Path, to: &Path) -> std::io::Result<()> {
    // As closed as where they come from, before anything is in them.
    let folder = |from: &Path, to: &Path| {
        std::fs::create_dir_all(to)?;
        std::fs::set_permissions(to, std::fs::metadata(from)?.permissions())
    };
    folder(from, to)?;
    let mut files = toml_files(from)?;
    files.extend(toml_files(&from.join("regions"))?);
    files.extend(config.files.iter().cloned());
    for file in files.iter().filter(|file| file.is_file()) {
        // As written it may lead out and in again: `regions/../tls/ca.pem`.
        let file = lexical(file);
        let Ok(name) = file.strip_prefix(from) else { continue };
        let mut path = PathBuf::new();
        for part in name.parent().into_iter().flat_map(Path::components) {
            path.push(part);
            folder(&from.join(&path), &to.join(&path))?;
        }
        std::fs::copy(&file, to.join(name))?;
    }
    Ok(())
}

/// A path without the steps that it takes back.
pub(crate) fn lexical(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            std::path::Component::ParentDir => drop(plain.pop()),
            part => plain.push(part),
        }
    }
    plain
}

/// The TOML files of a directory by name, without those that editors leave about.
fn toml_files(directory: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if !hidden && path.extension().is_some_and(|extension| extension == "toml") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// The same file however its path is written: one reading may be of a relative one, another of the directory that was kept.
fn absolute(path: &Path) -> PathBuf {
    std::fs::canonicalize(path).or_else(|_| std::path::absolute(path)).unwrap_or_else(|_| path.to_owned())
}

fn instance(written: &str) -> Box<str> {
    if !written.is_empty() {
        return written.into();
    }
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{}:{}", host.trim(), std::process::id()).into()
}

fn sorted(mut zones: Vec<Box<str>>) -> Vec<Box<str>> {
    zones.sort();
    zones
}

fn bytes(size: file::Size) -> usize {
    usize::try_from(size.0.as_u64()).unwrap_or(usize::MAX)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}
