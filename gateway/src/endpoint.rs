//! One endpoint with its live state: health, ejection, load, connections.
//!
//! It outlives snapshots: a reload that leaves an endpoint as it is takes the same value over, so that what has been
//! measured is not lost. Everything the request path reads is an atomic; the state machines behind them are locked only
//! when something goes wrong or a probe ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use isochrone_core::Time;
use isochrone_core::budget::Budget;
use isochrone_core::ewma::{Ewma, Held};
use isochrone_core::health::Health;
use isochrone_core::outlier::{Outlier, State};
use isochrone_core::pick::Availability;
use isochrone_core::retry::Mark;
use parking_lot::Mutex;

use crate::app::Core;
use crate::config::{Config, EndpointConfig, Target};
use crate::upstream::{self, Pool};

/// One endpoint.
#[derive(Debug)]
pub(crate) struct Endpoint {
    pub(crate) config: EndpointConfig,
    /// Extra attempts that this destination may still be sent.
    pub(crate) budget: Budget,
    /// Connections for HTTP, and for gRPC, by core.
    http: Box<[Pool]>,
    grpc: Box<[Pool]>,
    probed: Mutex<Probed>,
    healthy: AtomicBool,
    /// Its probe has named its region, and nothing since has cast a doubt on who is there: an answer that names another,
    /// nobody at the address, or a silence that made it unhealthy. Whoever comes back has to name the region anew.
    asserted: AtomicBool,
    probed_once: AtomicBool,
    outlier: Mutex<Outlier>,
    /// The outlier state is not its default: a success has something to reset.
    marked: AtomicBool,
    /// No request before this time (`Time`'s number); zero while admitting.
    ejected_until: AtomicU64,
    in_flight: AtomicUsize,
    /// Held while it is asked, across an await: only requests that wait in silence ever want it.
    pulse: tokio::sync::Mutex<Pulse>,
    /// The round trip as published to steering, in microseconds plus one; zero before the first.
    round_trip_us: AtomicU32,
}

/// The last answer to [`Endpoint::is_alive`].
#[derive(Debug, Default)]
struct Pulse {
    asked: Time,
    alive: bool,
}

#[derive(Debug, Default)]
struct Probed {
    health: Health,
    round_trip: Ewma,
    held: Held,
    /// The region that it named last, if that was a wrong one: told once.
    wrong: Option<Option<String>>,
}

/// How one probe ended.
#[derive(Debug)]
pub(crate) enum ProbeResult {
    /// It answered; `region` as far as it named one.
    Answered { region: Option<String>, ready: Result<(), String>, round_trip_ms: f32 },
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
    pub(crate) fn new(config: EndpointConfig, cores: usize) -> Endpoint {
        let asserted = !config.assert_region;
        // Without HTTP there is nothing to probe: real traffic alone judges it.
        let unprobed = config.http.is_none();
        Endpoint {
            config,
            budget: Budget::default(),
            http: (0..cores).map(|_| Pool::default()).collect(),
            grpc: (0..cores).map(|_| Pool::default()).collect(),
            probed: Mutex::default(),
            healthy: AtomicBool::new(unprobed),
            asserted: AtomicBool::new(asserted),
            probed_once: AtomicBool::new(unprobed),
            outlier: Mutex::default(),
            marked: AtomicBool::new(false),
            ejected_until: AtomicU64::new(0),
            in_flight: AtomicUsize::new(0),
            pulse: tokio::sync::Mutex::default(),
            round_trip_us: AtomicU32::new(0),
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

    /// Whether it can take a request now.
    pub(crate) fn availability(&self, now: Time) -> Availability {
        if !self.asserted.load(Relaxed) {
            Availability::Excluded
        } else if self.healthy.load(Relaxed) && now.0 >= self.ejected_until.load(Relaxed) {
            Availability::Ready
        } else {
            Availability::Unhealthy
        }
    }

    /// Asks to send it a request. False for an ejected endpoint whose one trial is already out.
    pub(crate) fn admit(&self, now: Time, config: &Config, panic: bool) -> bool {
        if panic || !self.marked.load(Relaxed) {
            return true;
        }
        let mut outlier = self.outlier.lock();
        let admitted = outlier.try_trial(now, &config.outlier);
        self.publish(&outlier);
        admitted
    }

    /// Takes in how a request went. Returns the length of an ejection that this led to.
    pub(crate) fn judge(&self, mark: Mark, now: Time, config: &Config) -> Option<Duration> {
        match mark {
            Mark::None => {
                self.release_trial(now);
                None
            }
            Mark::Success => {
                // The usual case costs one load.
                if self.marked.load(Relaxed) {
                    let mut outlier = self.outlier.lock();
                    outlier.success();
                    self.publish(&outlier);
                }
                None
            }
            Mark::Failure | Mark::Dead => {
                if mark == Mark::Dead && self.config.http.is_some() {
                    // Down until its probes say otherwise, so that no client is spent on trials, each of which would double
                    // the ejection. Its assertion stays: whoever has nowhere else to go may still wait for it.
                    self.probed.lock().health.condemn();
                    self.healthy.store(false, Relaxed);
                }
                let mut outlier = self.outlier.lock();
                let ejected = match mark {
                    Mark::Dead => outlier.condemn(now, &config.outlier),
                    _ => outlier.failure(now, &config.outlier),
                };
                self.publish(&outlier);
                ejected
            }
        }
    }

    /// A request ended without a verdict. If it was the trial, the next one may be.
    pub(crate) fn release_trial(&self, now: Time) {
        if self.marked.load(Relaxed) {
            let mut outlier = self.outlier.lock();
            outlier.release_trial(now);
            self.publish(&outlier);
        }
    }

    fn publish(&self, outlier: &Outlier) {
        let until = match outlier.state() {
            State::Admitting => 0,
            State::Ejected { until } | State::Probing { until } => until.0,
        };
        self.ejected_until.store(until, Relaxed);
        self.marked.store(!outlier.is_default(), Relaxed);
    }

    /// Takes in one probe.
    pub(crate) fn probed(&self, result: ProbeResult, now: Time, config: &Config) -> Option<Change> {
        let mut probed = self.probed.lock();
        let first = !self.probed_once.load(Relaxed);
        let mut told = None;
        let silent = matches!(result, ProbeResult::Silent(_));
        let ready = match result {
            ProbeResult::Answered { region, ready, round_trip_ms } => {
                let right = !self.config.assert_region || region.as_deref() == Some(&*self.config.region);
                self.asserted.store(right, Relaxed);
                if right {
                    probed.wrong = None;
                    probed.round_trip.observe(round_trip_ms, now, config.probes.decay);
                    let mean = probed.round_trip.value().unwrap_or(round_trip_ms);
                    if probed.held.follow(mean) {
                        self.round_trip_us.store((mean * 1000.0) as u32 + 1, Relaxed);
                    }
                    ready
                } else {
                    let named = Some(region.clone());
                    if std::mem::replace(&mut probed.wrong, named.clone()) != named {
                        told = Some(Change::WrongRegion(region));
                    }
                    Err("it is not in its file's region".to_owned())
                }
            }
            ProbeResult::Gone(why) => {
                self.asserted.store(!self.config.assert_region, Relaxed);
                Err(why)
            }
            ProbeResult::Silent(why) => Err(why),
        };
        let changed = probed.health.observe(ready.is_ok(), config.probes.thresholds);
        if silent && changed == Some(false) {
            self.asserted.store(!self.config.assert_region, Relaxed);
        }
        self.healthy.store(probed.health.is_healthy(), Relaxed);
        self.probed_once.store(true, Relaxed);
        told.or(match (changed, ready) {
            (Some(true), _) => Some(Change::Healthy),
            // One that is down from the start never was healthy, but is to be told of.
            (Some(false), Err(why)) => Some(Change::Unhealthy(why)),
            (None, Err(why)) if first => Some(Change::Unhealthy(why)),
            _ => None,
        })
    }

    /// An answer to a request named another region: somebody else is at the address.
    pub(crate) fn doubt(&self) {
        if self.config.assert_region {
            self.asserted.store(false, Relaxed);
        }
    }

    /// Whether it answers anything at all, asked at `since` or later. One request asks at a time, and the others that are
    /// pending here take its answer: a hung endpoint with a thousand of them is asked once, not once after the other.
    pub(crate) async fn is_alive(&self, core: &Core, since: Time, wait: Duration) -> bool {
        let mut pulse = self.pulse.lock().await;
        if pulse.asked < since {
            let asked = core.now();
            let alive = matches!(tokio::time::timeout(wait, upstream::probe(self)).await, Ok(Ok(_)));
            *pulse = Pulse { asked, alive };
        }
        pulse.alive
    }

    /// Whether a probe has ended, either way.
    pub(crate) fn is_probed(&self) -> bool {
        self.probed_once.load(Relaxed)
    }

    /// Whether the probes find it healthy.
    pub(crate) fn is_healthy(&self) -> bool {
        self.healthy.load(Relaxed)
    }

    /// Whether it has proven to stand in its region.
    pub(crate) fn is_asserted(&self) -> bool {
        self.asserted.load(Relaxed)
    }

    /// Whether failed requests keep it out now.
    pub(crate) fn is_ejected(&self, now: Time) -> bool {
        now.0 < self.ejected_until.load(Relaxed)
    }

    /// The measured round trip in milliseconds, moved only out of its dead band.
    pub(crate) fn round_trip_ms(&self) -> Option<f32> {
        self.round_trip_us.load(Relaxed).checked_sub(1).map(|us| us as f32 / 1000.0)
    }

    /// Requests sent and not ended.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.load(Relaxed)
    }
}

/// One request in flight at an endpoint. Falls when dropped, which for an answer is at the end of its body.
#[derive(Debug)]
pub(crate) struct InFlight(Arc<Endpoint>);

impl InFlight {
    pub(crate) fn new(endpoint: &Arc<Endpoint>) -> InFlight {
        endpoint.in_flight.fetch_add(1, Relaxed);
        InFlight(Arc::clone(endpoint))
    }

    pub(crate) fn endpoint(&self) -> &Arc<Endpoint> {
        &self.0
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let before = self.0.in_flight.fetch_sub(1, Relaxed);
        debug_assert!(before > 0, "the in-flight count fell below zero");
    }
}
