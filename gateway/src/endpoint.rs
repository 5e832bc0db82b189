//! One endpoint: its live state, and what only the gateway has of it: its addresses and its connections.
//!
//! It outlives snapshots: a reload that leaves an endpoint as it is takes the same value over, so that what has been
//! measured is not lost.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use isochrone_core::Time;
use isochrone_core::live::{Kind, Live, Probe, Report, Rules};
use isochrone_core::steer::stable_hash;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::app::Core;
use crate::catalog::Served;
use crate::config::{EndpointConfig, Target};
use crate::upstream::{self, Fault, Pool, ProbeError};

/// One endpoint.
#[derive(Debug)]
pub(crate) struct Endpoint {
    pub(crate) config: EndpointConfig,
    pub(crate) live: Arc<Live>,
    /// Connections for HTTP, and for gRPC, by core.
    http: Box<[Pool]>,
    grpc: Box<[Pool]>,
    /// Held while it is asked, across an await: only requests that wait in silence ever want it.
    pulse: tokio::sync::Mutex<Pulse>,
    /// Told when it fails: its next probe is not put off.
    pub(crate) wake: Notify,
    /// The models that it has, as its last probe's answer said.
    pub(crate) catalog: ArcSwap<Vec<Served>>,
    /// The region that it named last, if that was a wrong one: told once.
    wrong: Mutex<Option<Option<String>>>,
}

/// How long a silence speaks for requests that were sent before it.
const SILENCE_COUNTS: Duration = Duration::from_secs(1);

/// The last answer to [`Endpoint::is_alive`].
#[derive(Debug, Default)]
struct Pulse {
    asked: Time,
    alive: bool,
}

/// How one probe ended.
#[derive(Debug)]
pub(crate) enum ProbeResult {
    /// It answered; `region` as far as it named one.
    Answered {
        region: Option<String>,
        ready: Result<(), String>,
        round_trip_ms: f32,
        network_ms: f32,
        report: Option<Report>,
        models: Vec<Served>,
    },
    /// Nobody is there.
    Gone(String),
    /// It did not answer in time, or not whole.
    Silent(String),
}

/// What a probe changed, for the log.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Change {
    Healthy,
    Unhealthy(String),
    /// It named another region than its file, or none: it gets nothing.
    WrongRegion(Option<String>),
}

impl Endpoint {
    /// `warm`: it was there when the gateway started, and is not eased in.
    pub(crate) fn new(config: EndpointConfig, cores: usize, warm: bool) -> Endpoint {
        let kind = Kind {
            assert_region: config.assert_region,
            http: config.http.is_some(),
            grpc: config.grpc.is_some(),
            hash: stable_hash(config.id.as_bytes()),
            warm,
        };
        Endpoint {
            config,
            live: Arc::new(Live::new(kind)),
            http: (0..cores).map(|_| Pool::default()).collect(),
            grpc: (0..cores).map(|_| Pool::default()).collect(),
            pulse: tokio::sync::Mutex::default(),
            wake: Notify::new(),
            catalog: ArcSwap::default(),
            wrong: Mutex::default(),
        }
    }

    /// Its address for a protocol, and its connections there.
    pub(crate) fn target(&self, grpc: bool) -> Option<(&Target, &[Pool])> {
        if grpc {
            self.config.grpc.as_ref().map(|target| (target, &*self.grpc))
        } else {
            self.config.http.as_ref().map(|target| (target, &*self.http))
        }
    }

    /// Its address, for the operator's eyes.
    pub(crate) fn name(&self) -> &str {
        let target = self.config.http.as_ref().or(self.config.grpc.as_ref());
        target.and_then(|target| target.authority.to_str().ok()).unwrap_or_default()
    }

    /// Takes in one probe.
    pub(crate) fn probed(&self, result: ProbeResult, now: Time, rules: &Rules) -> Option<Change> {
        let first = !self.live.is_probed();
        let (probe, why, told) = match result {
            ProbeResult::Answered { region, ready, round_trip_ms, network_ms, report, models } => {
                let right_region = !self.config.assert_region || region.as_deref() == Some(&*self.config.region);
                let probe = Probe::Answered { right_region, ready: ready.is_ok(), round_trip_ms, network_ms };
                if let Some(report) = report.filter(|_| right_region) {
                    self.live.reported(report, now);
                }
                if right_region && **self.catalog.load() != models {
                    self.catalog.store(Arc::new(models));
                }
                let named = (!right_region).then_some(region);
                let told = std::mem::replace(&mut *self.wrong.lock(), named.clone()) != named;
                let why = if right_region { ready.err() } else { Some("it is not in its file's region".into()) };
                (probe, why, named.filter(|_| told))
            }
            ProbeResult::Gone(why) => (Probe::Gone, Some(why), None),
            ProbeResult::Silent(why) => (Probe::Silent, Some(why), None),
        };
        let changed = self.live.probed(probe, now, rules);
        told.map(Change::WrongRegion).or(match (changed, why) {
            (Some(true), _) => Some(Change::Healthy),
            // One that is down from the start never was healthy, but is to be told of.
            (Some(false), Some(why)) => Some(Change::Unhealthy(why)),
            (None, Some(why)) if first => Some(Change::Unhealthy(why)),
            _ => None,
        })
    }

    /// Whether it answers anything at all, asked at `since` or later. One request asks at a time, and the others that are
    /// pending here take its answer: a hung endpoint with a thousand of them is asked once, not once after the other.
    /// If it has been silent to a question that was put after the request was sent, at `sent`, it need not be asked again.
    pub(crate) async fn is_alive(&self, core: &Core, sent: Time, since: Time, wait: Duration) -> bool {
        let mut pulse = self.pulse.lock().await;
        let is_old = core.now().since(pulse.asked) > SILENCE_COUNTS;
        if is_old || pulse.asked < if pulse.alive { since } else { sent } {
            let asked = core.now();
            let alive = match tokio::time::timeout(wait, upstream::probe(self)).await {
                // This gateway cannot ask: that is no silence of the endpoint's.
                Ok(Err(ProbeError::Connect(why))) => why.fault == Fault::Here,
                Ok(answer) => answer.is_ok(),
                Err(_) => false,
            };
            *pulse = Pulse { asked, alive };
        }
        pulse.alive
    }
}
