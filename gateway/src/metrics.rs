//! Counts for Prometheus, kept as atomics and written out on demand.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use http::StatusCode;
use isochrone_core::course::Why;
use isochrone_core::retry::Outcome;
use parking_lot::RwLock;

use crate::app::Shared;

/// Upper bounds of the duration buckets, in seconds.
const BUCKETS: [f64; 14] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// What is counted of all requests.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    /// By status class, 1xx to 5xx.
    classes: [AtomicU64; 5],
    durations: Histogram,
    /// By region. Regions are few and rarely new: the lock is read.
    regions: RwLock<BTreeMap<Box<str>, RegionCounts>>,
    pub(crate) connections: AtomicU64,
    pub(crate) handshake_failures: AtomicU64,
    pub(crate) panics: AtomicU64,
    pub(crate) poisonous: AtomicU64,
}

#[derive(Debug, Default)]
struct RegionCounts {
    outcomes: [AtomicU64; OUTCOMES.len()],
    retries: AtomicU64,
    slow: AtomicU64,
    hedges: AtomicU64,
    durations: Histogram,
}

const OUTCOMES: [&str; 14] = [
    "ok",
    "unavailable",
    "server_error",
    "connect_failed",
    "unconnected",
    "refused",
    "reset",
    "cut_off",
    "broken",
    "hung",
    "outrun",
    "cancelled",
    "timed_out",
    "client_body",
];

#[derive(Debug, Default)]
struct Histogram {
    buckets: [AtomicU64; BUCKETS.len() + 1],
    sum_us: AtomicU64,
}

impl Histogram {
    fn observe(&self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let bucket = BUCKETS.partition_point(|bound| *bound < seconds);
        self.buckets[bucket].fetch_add(1, Relaxed);
        self.sum_us.fetch_add(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX), Relaxed);
    }

    fn write(&self, text: &mut String, name: &str, labels: &str) {
        let comma = if labels.is_empty() { "" } else { "," };
        let mut total = 0;
        for (count, bound) in self.buckets.iter().zip(BUCKETS.iter().map(f64::to_string).chain(["+Inf".to_owned()])) {
            total += count.load(Relaxed);
            let _ = writeln!(text, "{name}_bucket{{{labels}{comma}le=\"{bound}\"}} {total}");
        }
        let _ = writeln!(text, "{name}_sum{{{labels}}} {}", self.sum_us.load(Relaxed) as f64 / 1e6);
        let _ = writeln!(text, "{name}_count{{{labels}}} {total}");
    }
}

impl Counts {
    pub(crate) fn request(&self, status: StatusCode, duration: Duration) {
        let class = usize::from(status.as_u16() / 100).clamp(1, 5) - 1;
        self.classes[class].fetch_add(1, Relaxed);
        self.durations.observe(duration);
    }

    /// An attempt begins. Those that are needed are counted when they end.
    pub(crate) fn begun(&self, region: &str, why: Why<'_>) {
        match why {
            Why::Needed => {}
            Why::Slow => self.of(region, |counts| add(&counts.slow)),
            Why::Hedge(_) => self.of(region, |counts| add(&counts.hedges)),
        }
    }

    pub(crate) fn attempt(&self, region: &str, outcome: Outcome, retry: bool, duration: Duration) {
        self.of(region, |counts| counts.attempt(outcome, retry, duration));
    }

    fn of(&self, region: &str, count: impl Fn(&RegionCounts)) {
        if let Some(counts) = self.regions.read().get(region) {
            return count(counts);
        }
        count(self.regions.write().entry(region.into()).or_default());
    }
}

fn add(count: &AtomicU64) {
    count.fetch_add(1, Relaxed);
}

impl RegionCounts {
    fn attempt(&self, outcome: Outcome, retry: bool, duration: Duration) {
        if let Some(at) = OUTCOMES.iter().position(|name| *name == outcome.as_str()) {
            self.outcomes[at].fetch_add(1, Relaxed);
        }
        self.retries.fetch_add(u64::from(retry), Relaxed);
        self.durations.observe(duration);
    }
}

/// Everything in the Prometheus text format
/// (<https://prometheus.io/docs/instrumenting/exposition_formats/>). Names follow OpenTelemetry's where it has one.
pub(crate) fn text(shared: &Shared) -> String {
    let snapshot = shared.snapshot.load();
    let counts = &shared.counts;
    let now = shared.now();
    let mut text = String::with_capacity(8192);
    let mut family = |name: &str, kind: &str, help: &str, rows: &mut dyn FnMut(&mut String)| {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        rows(&mut text);
    };
    family("isochrone_requests_total", "counter", "Requests ended, by status class.", &mut |text| {
        for (class, count) in counts.classes.iter().enumerate() {
            let _ = writeln!(text, "isochrone_requests_total{{code=\"{}xx\"}} {}", class + 1, count.load(Relaxed));
        }
    });
    family(
        "http_server_request_duration_seconds",
        "histogram",
        "From a request's head to the end of its answer.",
        &mut |text| {
            counts.durations.write(text, "http_server_request_duration_seconds", "");
        },
    );
    let regions = counts.regions.read();
    family("isochrone_attempts_total", "counter", "Sends to a region, by outcome.", &mut |text| {
        for (region, counts) in regions.iter() {
            for (outcome, count) in OUTCOMES.iter().zip(&counts.outcomes) {
                let count = count.load(Relaxed);
                let _ = writeln!(text, "isochrone_attempts_total{{region=\"{region}\",outcome=\"{outcome}\"}} {count}");
            }
        }
    });
    let extras: [(&str, &str, fn(&RegionCounts) -> &AtomicU64); 3] = [
        ("isochrone_retries_total", "Sends to a region beyond a request's first.", |counts| &counts.retries),
        ("isochrone_slow_attempts_total", "Sends to a region beside a slow one.", |counts| &counts.slow),
        ("isochrone_hedges_total", "Hedges sent to a region.", |counts| &counts.hedges),
    ];
    for (name, help, count) in extras {
        family(name, "counter", help, &mut |text| {
            for (region, counts) in regions.iter() {
                let _ = writeln!(text, "{name}{{region=\"{region}\"}} {}", count(counts).load(Relaxed));
            }
        });
    }
    family(
        "http_client_request_duration_seconds",
        "histogram",
        "From a send to the head of its answer.",
        &mut |text| {
            for (region, counts) in regions.iter() {
                counts.durations.write(text, "http_client_request_duration_seconds", &format!("region=\"{region}\""));
            }
        },
    );
    for (name, help, value) in [
        ("isochrone_endpoint_healthy", "Whether probes find the endpoint ready.", 0),
        ("isochrone_endpoint_asserted", "Whether the endpoint has proven to stand in its region.", 1),
        ("isochrone_endpoint_ejected", "Whether failed requests keep the endpoint out.", 2),
        ("isochrone_endpoint_in_flight", "Requests sent and not ended.", 3),
        ("isochrone_endpoint_drained", "Whether the endpoint takes no new requests.", 5),
        ("isochrone_endpoint_overloaded", "Whether its overload replies keep requests away.", 4),
    ] {
        family(name, "gauge", help, &mut |text| {
            for endpoint in &snapshot.endpoints {
                let value = match value {
                    0 => u32::from(endpoint.live.is_healthy()),
                    1 => u32::from(endpoint.live.is_asserted()),
                    2 => u32::from(endpoint.live.is_ejected(now)),
                    3 => endpoint.live.in_flight(),
                    5 => u32::from(endpoint.live.is_drained()),
                    _ => u32::from(endpoint.live.is_paused(now)),
                };
                let (region, address) = (&endpoint.config.region, endpoint.name());
                let _ = writeln!(text, "{name}{{region=\"{region}\",endpoint=\"{address}\"}} {value}");
            }
        });
    }
    family(
        "isochrone_probe_round_trip_seconds",
        "gauge",
        "The mean round trip of an endpoint's probes.",
        &mut |text| {
            for endpoint in &snapshot.endpoints {
                if let Some(ms) = endpoint.live.round_trip_ms() {
                    let (region, address) = (&endpoint.config.region, endpoint.name());
                    let seconds = f64::from(ms) / 1000.0;
                    let _ = writeln!(
                        text,
                        "isochrone_probe_round_trip_seconds{{region=\"{region}\",endpoint=\"{address}\"}} {seconds}"
                    );
                }
            }
        },
    );
    family("isochrone_region_drained", "gauge", "Whether the region takes no new requests.", &mut |text| {
        for region in &snapshot.fleet.regions {
            let (name, drained) = (&region.region.name, u8::from(region.region.drain));
            let _ = writeln!(text, "isochrone_region_drained{{region=\"{name}\"}} {drained}");
        }
    });
    let state = shared.config_state.lock();
    family("isochrone_config_info", "gauge", "The revision in force.", &mut |text| {
        let _ = writeln!(text, "isochrone_config_info{{revision=\"{}\"}} 1", snapshot.config.revision);
    });
    family("isochrone_config_rejected", "gauge", "Whether a newer state of the directory was rejected.", &mut |text| {
        let _ = writeln!(text, "isochrone_config_rejected {}", u8::from(state.rejected.is_some()));
    });
    family("isochrone_config_rejected_info", "gauge", "The revision that was rejected last, if any.", &mut |text| {
        if let Some(rejected) = &state.rejected {
            let _ = writeln!(text, "isochrone_config_rejected_info{{revision=\"{}\"}} 1", rejected.revision);
        }
    });
    family(
        "isochrone_certificate_expiry_timestamp_seconds",
        "gauge",
        "When the certificate of a listener expires.",
        &mut |text| {
            for listener in &snapshot.config.listeners {
                if let Some(expires) = listener.expires {
                    let address = listener.address;
                    let _ = writeln!(
                        text,
                        "isochrone_certificate_expiry_timestamp_seconds{{listener=\"{address}\"}} {expires}"
                    );
                }
            }
        },
    );
    family("isochrone_config_age_seconds", "gauge", "Since the revision in force was accepted.", &mut |text| {
        let age = state.accepted_at.elapsed().unwrap_or_default().as_secs_f64();
        let _ = writeln!(text, "isochrone_config_age_seconds {age}");
    });
    family("isochrone_geoip_build_timestamp_seconds", "gauge", "When the database was made.", &mut |text| {
        for (at, database) in snapshot.config.geoip.iter().enumerate() {
            let _ =
                writeln!(text, "isochrone_geoip_build_timestamp_seconds{{file=\"{at}\"}} {}", database.build_epoch());
        }
    });
    let cache = &shared.cache.counts;
    family("isochrone_cache_requests_total", "counter", "Requests, by what the cache did.", &mut |text| {
        for (result, count) in [
            ("hit", &cache.hits),
            ("stale", &cache.stale),
            ("collapsed", &cache.collapsed),
            ("miss", &cache.misses),
            ("bypass", &cache.bypassed),
        ] {
            let _ = writeln!(text, "isochrone_cache_requests_total{{result=\"{result}\"}} {}", count.load(Relaxed));
        }
    });
    let (entries, bytes) = shared.cache.size();
    for (name, help, value) in [
        ("isochrone_cache_entries", "Kept answers.", entries),
        ("isochrone_cache_bytes", "What they cost in memory.", bytes),
    ] {
        family(name, "gauge", help, &mut |text| {
            let _ = writeln!(text, "{name} {value}");
        });
    }
    for (name, help, value) in [
        ("isochrone_cache_stored_total", "Answers that were kept.", cache.stored.load(Relaxed)),
        ("isochrone_connections_total", "Client connections accepted.", counts.connections.load(Relaxed)),
        ("isochrone_handshake_failures_total", "TLS handshakes that failed.", counts.handshake_failures.load(Relaxed)),
        ("isochrone_panics_total", "Requests that ended in a panic, answered 500.", counts.panics.load(Relaxed)),
        ("isochrone_queries_of_death_total", "Requests that broke two endpoints.", counts.poisonous.load(Relaxed)),
        (
            "isochrone_queries_of_death_refused_total",
            "Requests refused because an equal one broke two endpoints.",
            snapshot.fleet.poison.refused() as u64,
        ),
        (
            "isochrone_queue_shed_total",
            "Requests refused because the queue for a full fleet was full.",
            snapshot.fleet.waiting.shed() as u64,
        ),
        ("isochrone_log_dropped_total", "Log lines dropped because their buffer was full.", shared.log.dropped()),
    ] {
        family(name, "counter", help, &mut |text| {
            let _ = writeln!(text, "{name} {value}");
        });
    }
    text
}
