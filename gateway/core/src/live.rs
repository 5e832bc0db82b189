//! The live state of one endpoint and of one region: what has been measured, and who is out.
//!
//! It outlives configurations. Everything that a pick reads is an atomic; the state machines behind them are locked only
//! when something goes wrong or a probe ends. [`Fleet`](crate::fleet::Fleet) judges, because the cap on ejections needs
//! the neighbours.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::budget::Budget;
use crate::ewma::Ewma;
use crate::health::{Health, Thresholds};
use crate::limit;
use crate::load::{Mean, ModelLive};
use crate::outlier::{self, Outlier, State};
use crate::pushback;
use crate::queue::Waiting;
use crate::term::Term;
use crate::{Time, invariant};

/// How live state changes.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Probes.
    pub thresholds: Thresholds,
    /// The memory of the measured round trip.
    pub round_trip_decay: Duration,
    /// Ejection.
    pub outlier: outlier::Rules,
    /// The largest share of a region's endpoints that may be ejected at once; one may always be.
    pub ejected_share: f32,
    /// Overload replies.
    pub pushback: pushback::Rules,
    /// The limit that each model at each endpoint finds for itself.
    pub limit: limit::Rules,
    /// How long a new or recovered endpoint takes to its full share.
    pub slow_start: Duration,
    /// How much more than its own share a region's endpoints can take: with 1.4, five of seven do for all.
    pub overprovisioning: f32,
    /// How long a load report counts.
    pub report_fresh: Duration,
    /// What a failed request costs in the eyes of the power of two choices, at least.
    pub error_penalty: Duration,
    /// The time in which a measured change takes all clients along.
    pub shift: Duration,
}

/// The round trip at which an endpoint is probed half as often.
const FAR_MS: f32 = 50.0;

/// The least share of a recovering endpoint.
const RAMP_MIN: f32 = 0.1;

/// Whether an endpoint can take a request now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Availability {
    /// Asserted, healthy and admitting.
    Ready,
    /// The same, but it has all that it can take.
    Full,
    /// Asserted, but its probes fail or it is ejected. Only a panic uses it.
    Unhealthy,
    /// It has not yet proven to stand in its file's region, does not speak the protocol asked for, or is drained. Never
    /// used: a mistyped URL must not leak.
    Excluded,
}

/// What an endpoint is, as far as decisions go.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    /// It has to name its region before it is used.
    pub assert_region: bool,
    /// It speaks HTTP, and so can be probed.
    pub http: bool,
    /// It speaks gRPC.
    pub grpc: bool,
    /// The same number for the same endpoint at every gateway.
    pub hash: u64,
    /// It is as warm as any other: it was there when the gateway started.
    pub warm: bool,
}

/// How one probe ended.
#[derive(Clone, Copy, Debug)]
pub enum Probe {
    /// It answered, and named the region of its file or another.
    Answered {
        /// It named the right one.
        right_region: bool,
        /// It says that it is ready.
        ready: bool,
        /// How long it took to answer on an open connection, in milliseconds.
        round_trip_ms: f32,
        /// How long TCP took to open one, in milliseconds: the network's part, whatever the server does.
        network_ms: f32,
    },
    /// Nobody is there.
    Gone,
    /// It did not answer in time, or not whole.
    Silent,
}

/// What a worker says of itself (ORCA's `endpoint-load-metrics`).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Report {
    /// Requests that it has taken in and not answered, whoever sent them.
    pub in_flight: u32,
    /// Of these, how many wait.
    pub queued: u32,
}

/// The live state of one endpoint.
#[derive(Debug)]
pub struct Live {
    kind: Kind,
    /// Extra attempts that this destination may still be sent.
    pub budget: Budget,
    /// Its operator wants it to take nothing new.
    drained: AtomicBool,
    healthy: AtomicBool,
    /// Its probe has named its region, and nothing since has cast a doubt on who is there: an answer that names another,
    /// nobody at the address, or a silence that made it unhealthy. Whoever comes back has to name the region anew.
    asserted: AtomicBool,
    probed_once: AtomicBool,
    /// The last probe failed: the next is not put off.
    doubtful: AtomicBool,
    probed: Mutex<Probed>,
    round_trip_us: AtomicU32,
    network_us: AtomicU32,
    outlier: Mutex<Outlier>,
    /// A success has something to change in the passive state.
    marked: AtomicBool,
    /// No request before this time (`Time`'s number); zero while admitting.
    ejected_until: AtomicU64,
    /// When its ramp began; zero if it has none.
    ramp_from: AtomicU64,
    in_flight: AtomicU32,
    succeeded_at: AtomicU64,
    /// Answers and failures: of the running five seconds, and of the five before.
    window: [[AtomicU32; 2]; 2],
    rotated: AtomicU64,
    report: [AtomicU32; 2],
    reported_at: AtomicU64,
    /// What is measured of each model here.
    pub(crate) models: ByModel<ModelLive>,
}

/// What probes have found.
#[derive(Debug, Default)]
struct Probed {
    health: Health,
    round_trip: Ewma,
    network: Ewma,
}

/// What judging led to, for the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// Ejected for so long.
    Ejected(Duration),
    /// Down until its probes say otherwise.
    Condemned,
    /// Left alone for so long, because it says that it is overloaded.
    Paused(Duration),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic elsewhere leaves counters, not broken structure.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Something of each model, which outlives configurations.
#[derive(Debug)]
pub(crate) struct ByModel<T>(Mutex<Vec<(Arc<str>, Arc<T>)>>);

impl<T> Default for ByModel<T> {
    fn default() -> Self {
        ByModel(Mutex::default())
    }
}

impl<T: Default> ByModel<T> {
    /// That of one model, new if there is none yet.
    pub(crate) fn of(&self, name: &Arc<str>) -> Arc<T> {
        let mut models = lock(&self.0);
        match models.iter().find(|(known, _)| known == name) {
            Some((_, live)) => Arc::clone(live),
            None => {
                let live = Arc::<T>::default();
                models.push((Arc::clone(name), Arc::clone(&live)));
                live
            }
        }
    }

    /// Forgets models that are no longer declared.
    pub(crate) fn keep(&self, declared: impl Fn(&str) -> bool) {
        lock(&self.0).retain(|(name, _)| declared(name));
    }

    fn each(&self, act: impl Fn(&T)) {
        lock(&self.0).iter().for_each(|(_, live)| act(live));
    }

    /// Whether it holds of any.
    fn any(&self, holds: impl Fn(&T) -> bool) -> bool {
        lock(&self.0).iter().any(|(_, live)| holds(live))
    }
}

const WINDOW: Duration = Duration::from_secs(5);

impl Live {
    /// Nothing is known of it yet.
    pub fn new(kind: Kind) -> Live {
        // Without HTTP there is nothing to probe: real traffic alone judges it.
        let unprobed = !kind.http;
        Live {
            kind,
            budget: Budget::default(),
            drained: AtomicBool::new(false),
            healthy: AtomicBool::new(unprobed),
            asserted: AtomicBool::new(!kind.assert_region),
            probed_once: AtomicBool::new(unprobed),
            doubtful: AtomicBool::new(false),
            probed: Mutex::default(),
            round_trip_us: AtomicU32::new(0),
            network_us: AtomicU32::new(0),
            outlier: Mutex::default(),
            marked: AtomicBool::new(false),
            ejected_until: AtomicU64::new(0),
            ramp_from: AtomicU64::new(0),
            in_flight: AtomicU32::new(0),
            succeeded_at: AtomicU64::new(0),
            window: Default::default(),
            rotated: AtomicU64::new(0),
            report: Default::default(),
            reported_at: AtomicU64::new(0),
            models: ByModel::default(),
        }
    }

    /// The same number for the same endpoint at every gateway.
    pub fn hash(&self) -> u64 {
        self.kind.hash
    }

    /// Whether it speaks gRPC, or else HTTP.
    pub fn speaks(&self, grpc: bool) -> bool {
        if grpc { self.kind.grpc } else { self.kind.http }
    }

    /// Whether it takes nothing new, because its operator wants so. What is in flight there ends there.
    pub fn is_drained(&self) -> bool {
        self.drained.load(Relaxed)
    }

    /// Drains it, or lets it return. It returns as any other that recovers.
    pub fn drain(&self, drained: bool, now: Time) {
        if self.drained.swap(drained, Relaxed) && !drained {
            self.returns(now);
        }
    }

    /// Whether it can take a request now.
    pub fn availability(&self, grpc: bool, model: Option<&ModelLive>, now: Time, rules: &Rules) -> Availability {
        if !self.speaks(grpc) || !self.asserted.load(Relaxed) || self.is_drained() {
            Availability::Excluded
        } else if !self.healthy.load(Relaxed) || now.0 < self.ejected_until.load(Relaxed) {
            Availability::Unhealthy
        } else if model.is_some_and(|model| model.is_full(now, rules.limit)) {
            Availability::Full
        } else {
            Availability::Ready
        }
    }

    /// Its share of what it will take when warm.
    pub fn ramp(&self, now: Time, rules: &Rules) -> f32 {
        match self.ramp_from.load(Relaxed) {
            0 => 1.0,
            from => {
                let share = now.since(Time(from)).as_secs_f32() / rules.slow_start.as_secs_f32().max(1e-3);
                share.clamp(RAMP_MIN, 1.0)
            }
        }
    }

    /// Asks to send it a request. Returns whether to send, and whether it is a trial, of which there is one at a time.
    pub(crate) fn admit(&self, now: Time, rules: &Rules) -> (bool, bool) {
        if !self.marked.load(Relaxed) {
            return (true, false);
        }
        let mut outlier = lock(&self.outlier);
        let admitted = outlier.try_trial(now, &rules.outlier);
        self.publish(&outlier);
        admitted
    }

    /// Whether its ejection is over and nobody has tried it since.
    pub(crate) fn is_trial_due(&self, now: Time) -> bool {
        let until = self.ejected_until.load(Relaxed);
        until != 0 && until <= now.0
    }

    /// A request ended without a verdict. If it was the trial, the next one may be.
    pub(crate) fn release_trial(&self) {
        let mut outlier = lock(&self.outlier);
        outlier.release_trial();
        self.publish(&outlier);
    }

    pub(crate) fn succeeded(&self, began: Time, now: Time) {
        self.window[0][0].fetch_add(1, Relaxed);
        self.succeeded_at.store(now.0, Relaxed);
        // The usual case costs one load.
        if self.marked.load(Relaxed) {
            let mut outlier = lock(&self.outlier);
            let back = outlier.success(began, now);
            self.publish(&outlier);
            drop(outlier);
            if back {
                self.returns(now);
            }
        }
    }

    /// It is back: it is eased in, and what its failures cost it in the eyes of the power of two choices is forgiven.
    fn returns(&self, now: Time) {
        self.ramp_from.store(now.0.max(1), Relaxed);
        self.models.each(ModelLive::forgive);
    }

    /// Counts a failure. Returns whether it ought to be ejected for it.
    pub(crate) fn failed(&self, began: Time, now: Time, rules: &Rules) -> bool {
        self.window[0][1].fetch_add(1, Relaxed);
        let [ok, bad] = [0, 1].map(|at| self.window[0][at].load(Relaxed) + self.window[1][at].load(Relaxed));
        let mut outlier = lock(&self.outlier);
        let in_a_row = outlier.failure(began, now, &rules.outlier);
        let share = outlier.state() == State::Admitting
            && ok + bad >= rules.outlier.failure_volume
            && bad as f32 >= rules.outlier.failure_share * (ok + bad) as f32;
        self.publish(&outlier);
        in_a_row || share
    }

    /// Ejects it, unless it is ejected already. A trial that failed is not that.
    pub(crate) fn eject(&self, now: Time, rules: &Rules) -> Option<Duration> {
        let mut outlier = lock(&self.outlier);
        if matches!(outlier.state(), State::Ejected { until } if now < until) {
            return None;
        }
        let length = outlier.eject(now, &rules.outlier);
        self.paid_for();
        self.publish(&outlier);
        Some(length)
    }

    /// It is known to be down: whatever else is sent there waits in vain. Its assertion stays: whoever has nowhere else to
    /// go may still wait for it. Returns whether that is news.
    pub(crate) fn condemn(&self, now: Time, rules: &Rules) -> bool {
        lock(&self.probed).health.condemn(now, rules.thresholds);
        let mut outlier = lock(&self.outlier);
        outlier.forgive();
        self.paid_for();
        self.publish(&outlier);
        self.healthy.swap(false, Relaxed)
    }

    /// What led to an ejection does not count towards the next.
    fn paid_for(&self) {
        self.window.iter().flatten().for_each(|count| count.store(0, Relaxed));
    }

    /// Whether there are probes that could find it again.
    pub(crate) fn is_probeable(&self) -> bool {
        self.kind.http
    }

    /// Whether it is ejected, or tried after an ejection.
    pub fn is_out(&self) -> bool {
        self.ejected_until.load(Relaxed) != 0
    }

    fn publish(&self, outlier: &Outlier) {
        let until = match outlier.state() {
            State::Admitting => 0,
            State::Ejected { until } | State::Probing { until } => until.0.max(1),
        };
        self.ejected_until.store(until, Relaxed);
        self.marked.store(!outlier.is_calm(), Relaxed);
    }

    /// Takes in one probe. Returns the new judgement if it changed.
    pub fn probed(&self, probe: Probe, now: Time, rules: &Rules) -> Option<bool> {
        let mut probed = lock(&self.probed);
        let success = match probe {
            Probe::Answered { right_region, ready, round_trip_ms, network_ms } => {
                let right = right_region || !self.kind.assert_region;
                self.asserted.store(right, Relaxed);
                if right {
                    let publish = |mean: &mut Ewma, sample: f32, published: &AtomicU32| {
                        mean.observe(sample, now, rules.round_trip_decay);
                        published.store((mean.value().unwrap_or(0.0) * 1000.0) as u32 + 1, Relaxed);
                    };
                    publish(&mut probed.round_trip, round_trip_ms, &self.round_trip_us);
                    publish(&mut probed.network, network_ms, &self.network_us);
                }
                right && ready
            }
            Probe::Gone => {
                self.asserted.store(!self.kind.assert_region, Relaxed);
                false
            }
            Probe::Silent => false,
        };
        self.doubtful.store(!success, Relaxed);
        let changed = probed.health.observe(success, now, rules.thresholds);
        if matches!(probe, Probe::Silent) && changed == Some(false) {
            self.asserted.store(!self.kind.assert_region, Relaxed);
        }
        // A worker that only starts after its gateway is as warm as one that started before it.
        let warm = self.kind.warm && probed.health.rises() <= 1;
        if changed == Some(true) && !warm {
            self.returns(now);
        }
        self.probed_once.store(true, Relaxed);
        self.healthy.store(probed.health.is_healthy(), Relaxed);
        changed
    }

    /// How many times the usual interval the next probe may wait, from 1 to `most`: longer while real traffic vouches for the
    /// endpoint, or the farther it is, so that the probes of many gateways stay bounded. Not while anything is in doubt.
    pub fn relaxation(&self, interval: Duration, most: f32, now: Time) -> f32 {
        let doubt = self.doubtful.load(Relaxed) || !self.is_healthy() || !self.is_asserted() || self.is_out();
        if doubt {
            return 1.0;
        }
        let vouched = self.succeeded_at() > Time(0) && now.since(self.succeeded_at()) < interval;
        if vouched { most } else { (1.0 + self.round_trip_ms().unwrap_or(0.0) / FAR_MS).min(most) }
    }

    /// An answer to a request named another region: somebody else is at the address.
    pub fn doubt(&self) {
        if self.kind.assert_region {
            self.asserted.store(false, Relaxed);
        }
    }

    /// Takes in a load report.
    pub fn reported(&self, report: Report, now: Time) {
        self.report[0].store(report.in_flight, Relaxed);
        self.report[1].store(report.queued, Relaxed);
        self.reported_at.store(now.0.max(1), Relaxed);
    }

    /// The last load report, while it is fresh.
    pub fn report(&self, now: Time, rules: &Rules) -> Option<Report> {
        let at = self.reported_at.load(Relaxed);
        (at != 0 && now.since(Time(at)) < rules.report_fresh)
            .then(|| Report { in_flight: self.report[0].load(Relaxed), queued: self.report[1].load(Relaxed) })
    }

    /// When it last finished a request.
    pub fn succeeded_at(&self) -> Time {
        Time(self.succeeded_at.load(Relaxed))
    }

    /// Whether a probe has ended, either way.
    pub fn is_probed(&self) -> bool {
        self.probed_once.load(Relaxed)
    }

    /// Whether the probes find it healthy.
    pub fn is_healthy(&self) -> bool {
        self.healthy.load(Relaxed)
    }

    /// Whether it has proven to stand in its region.
    pub fn is_asserted(&self) -> bool {
        self.asserted.load(Relaxed)
    }

    /// Whether failed requests keep it out now.
    pub fn is_ejected(&self, now: Time) -> bool {
        now.0 < self.ejected_until.load(Relaxed)
    }

    /// Whether its overload replies keep requests of some model away now.
    pub fn is_paused(&self, now: Time) -> bool {
        self.models.any(|model| model.is_paused(now))
    }

    /// The mean time in which it answers a probe on an open connection, in milliseconds.
    pub fn round_trip_ms(&self) -> Option<f32> {
        self.round_trip_us.load(Relaxed).checked_sub(1).map(|us| us as f32 / 1000.0)
    }

    /// The mean round trip of the network alone, in milliseconds.
    pub fn network_ms(&self) -> Option<f32> {
        self.network_us.load(Relaxed).checked_sub(1).map(|us| us as f32 / 1000.0)
    }

    /// Requests sent from here and not ended.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Relaxed)
    }

    /// Lets the windows roll.
    pub(crate) fn refresh(&self, now: Time) {
        if now.since(Time(self.rotated.load(Relaxed))) >= WINDOW {
            self.rotated.store(now.0, Relaxed);
            for at in [0, 1] {
                self.window[1][at].store(self.window[0][at].swap(0, Relaxed), Relaxed);
            }
        }
    }
}

/// The live state of one region.
#[derive(Debug, Default)]
pub struct RegionLive {
    in_flight: AtomicU32,
    /// As its workers report it, from all gateways; 0 if no report is fresh.
    pub(crate) reported: AtomicU32,
    /// The round trip of its probes.
    pub(crate) round_trip: Term,
    /// What each model costs here.
    pub(crate) models: ByModel<RegionModel>,
    /// Held while an ejection is weighed against the cap.
    pub(crate) judging: Mutex<()>,
}

/// What one model costs in one region, beyond the way there.
#[derive(Debug, Default)]
pub struct RegionModel {
    /// Queueing, as far as fresh load reports tell.
    pub wait: Term,
    /// The rest of the response time.
    pub service: Term,
    /// The mean response time.
    pub(crate) mean: Mutex<Mean>,
}

impl RegionLive {
    /// Requests in flight there: as the workers report them, if that is more than this gateway's own.
    pub fn load(&self) -> u32 {
        self.in_flight.load(Relaxed).max(self.reported.load(Relaxed))
    }

    /// Requests sent from here and not ended.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Relaxed)
    }
}

/// One request in flight at an endpoint. Falls when dropped, which for an answer is at the end of its body.
#[derive(Debug)]
pub struct InFlight {
    endpoint: Arc<Live>,
    region: Arc<RegionLive>,
    model: Option<Arc<ModelLive>>,
    waiting: Arc<Waiting>,
}

impl InFlight {
    /// Counts one, unless the region is at its hard limit.
    pub(crate) fn acquire(
        endpoint: &Arc<Live>,
        region: &Arc<RegionLive>,
        model: Option<&Arc<ModelLive>>,
        waiting: &Arc<Waiting>,
        hard_limit: u32,
    ) -> Option<InFlight> {
        if region.in_flight.fetch_add(1, Relaxed) >= hard_limit {
            region.in_flight.fetch_sub(1, Relaxed);
            return None;
        }
        endpoint.in_flight.fetch_add(1, Relaxed);
        if let Some(model) = model {
            model.in_flight.fetch_add(1, Relaxed);
        }
        let (endpoint, region, waiting) = (Arc::clone(endpoint), Arc::clone(region), Arc::clone(waiting));
        Some(InFlight { endpoint, region, model: model.map(Arc::clone), waiting })
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let model = self.model.as_deref().map(|model| &model.in_flight);
        for count in [&self.endpoint.in_flight, &self.region.in_flight].into_iter().chain(model) {
            let before = count.fetch_sub(1, Relaxed);
            debug_assert!(invariant::can_fall(before), "the in-flight count fell below zero");
        }
        self.waiting.released();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_place_is_given_once_whoever_looked_before() {
        let kind = Kind { assert_region: false, http: true, grpc: false, hash: 0, warm: true };
        let (live, region) = (Arc::new(Live::new(kind)), Arc::<RegionLive>::default());
        let waiting = Arc::<Waiting>::default();
        let acquire = || InFlight::acquire(&live, &region, None, &waiting, 2);
        let (first, second) = (acquire(), acquire());
        assert!(first.is_some() && second.is_some() && acquire().is_none());
        assert_eq!((live.in_flight(), region.in_flight()), (2, 2));
        drop(first);
        assert!(acquire().is_some());
        drop(second);
        assert_eq!((live.in_flight(), region.in_flight()), (0, 0));
    }
}
