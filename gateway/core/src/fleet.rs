//! Regions and endpoints as decisions see them: what is configured, with what is live.
//!
//! A fleet is built for each configuration and is immutable; the live state in it is taken over from the one before, by
//! region, by endpoint and by model.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, PoisonError};

use crate::budget::Budget;
use crate::live::{Availability, Live, RegionLive, RegionModel, Rules, Told};
use crate::load::{Mean, ModelLive};
use crate::poison::Poison;
use crate::queue::Waiting;
use crate::region::{Region, RegionIndex, RegionSet};
use crate::retry::Mark;
use crate::steer::{Geometry, Measured, stable_hash};
use crate::{Time, invariant};

/// All regions of one configuration.
#[derive(Debug)]
pub struct Fleet {
    /// The regions; a [`RegionIndex`] is a place in here.
    pub regions: Vec<FleetRegion>,
    /// All endpoints; a region's are contiguous.
    pub endpoints: Vec<Arc<Live>>,
    /// The models that are declared.
    pub models: Vec<FleetModel>,
    /// What distances mean.
    pub geometry: Geometry,
    /// How live state changes.
    pub rules: Rules,
    /// Requests that wait for any endpoint to have room.
    pub waiting: Arc<Waiting>,
    /// Requests that endpoints died of.
    pub poison: Arc<Poison>,
    /// The regions that take no new requests.
    pub(crate) drained: RegionSet,
    /// Some region costs something: near-ties have to be looked for.
    pub(crate) has_costs: bool,
}

/// One region.
#[derive(Debug)]
pub struct FleetRegion {
    /// As configured.
    pub region: Region,
    /// Its endpoints.
    pub endpoints: Range<usize>,
    /// What is measured.
    pub live: Arc<RegionLive>,
    /// The round trip from this gateway that its distance explains.
    pub expected_ms: Option<f32>,
    /// The same number for the same name at every gateway.
    pub hash: u64,
}

/// One model.
#[derive(Debug)]
pub struct FleetModel {
    /// Its name.
    pub name: Arc<str>,
    /// Its measurements, by endpoint; `None` where it is not declared.
    pub endpoints: Vec<Option<Arc<ModelLive>>>,
    regions: Vec<Option<Arc<RegionModel>>>,
    /// The response time of a region where none is known: the best known one. Bits of an `f32`.
    presumed_ms: AtomicU32,
    /// Its requests and hedges.
    pub hedges: Arc<Budget>,
}

/// What was sent, as far as judging its end goes.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    /// When.
    pub began: Time,
    /// For which model.
    pub model: Option<usize>,
    /// Over gRPC rather than HTTP.
    pub grpc: bool,
}

/// What a region's endpoints amount to for one pick.
#[derive(Clone, Copy, Debug, Default)]
pub struct Look {
    /// Endpoints that are ready and have not been tried.
    pub ready: usize,
    /// Healthy endpoints that have not been tried: ready or full.
    pub healthy: usize,
    /// What they can take, of all that the region needs; at most 1.
    pub capacity: f32,
}

impl Fleet {
    /// Builds a fleet from regions with their endpoints, and models with the regions that declare them.
    pub fn new(
        plan: Vec<(Region, Vec<Arc<Live>>)>,
        models: impl IntoIterator<Item = (Arc<str>, RegionSet)>,
        geometry: Geometry,
        rules: Rules,
        before: Option<&Fleet>,
    ) -> Fleet {
        let (mut regions, mut endpoints) = (Vec::new(), Vec::new());
        for (region, lives) in plan {
            let known = before.and_then(|fleet| fleet.regions.iter().find(|known| known.region.name == region.name));
            let start = endpoints.len();
            endpoints.extend(lives);
            regions.push(FleetRegion {
                endpoints: start..endpoints.len(),
                live: known.map(|known| Arc::clone(&known.live)).unwrap_or_default(),
                expected_ms: geometry.gateway.map(|gateway| geometry.round_trip_ms(gateway, region.point)),
                hash: stable_hash(region.name.as_bytes()),
                region,
            });
        }
        let models: Vec<FleetModel> = models
            .into_iter()
            .map(|(name, declaring)| {
                let declares = |at: usize| RegionIndex::new(at).is_some_and(|at| declaring.contains(at));
                let known = before.and_then(|fleet| fleet.models.iter().find(|known| known.name == name));
                let in_region = regions.iter().enumerate();
                FleetModel {
                    endpoints: in_region
                        .clone()
                        .flat_map(|(at, region)| region.endpoints.clone().map(move |endpoint| (at, endpoint)))
                        .map(|(at, endpoint): (usize, usize)| {
                            declares(at).then(|| endpoints[endpoint].models.of(&name))
                        })
                        .collect(),
                    regions: in_region.map(|(at, region)| declares(at).then(|| region.live.models.of(&name))).collect(),
                    presumed_ms: AtomicU32::new(known.map_or(0, |known| known.presumed_ms.load(Relaxed))),
                    hedges: known.map(|known| Arc::clone(&known.hedges)).unwrap_or_default(),
                    name,
                }
            })
            .collect();
        let declared = |name: &str| models.iter().any(|model| &*model.name == name);
        endpoints.iter().for_each(|live: &Arc<Live>| live.models.keep(declared));
        regions.iter().for_each(|region| region.live.models.keep(declared));
        Fleet {
            drained: RegionSet::of(regions.iter().map(|region| &region.region), |region| region.drain),
            has_costs: regions.iter().any(|region| region.region.cost != 0.0),
            regions,
            endpoints,
            models,
            geometry,
            rules,
            waiting: before.map(|fleet| Arc::clone(&fleet.waiting)).unwrap_or_default(),
            poison: before.map(|fleet| Arc::clone(&fleet.poison)).unwrap_or_default(),
        }
    }

    /// Whether a region takes nothing new, because its operator wants so.
    pub fn is_drained(&self, at: RegionIndex) -> bool {
        self.drained.contains(at)
    }

    /// The region of an index.
    pub fn region(&self, at: RegionIndex) -> &FleetRegion {
        &self.regions[at.get()]
    }

    /// The measurements of a model at an endpoint.
    pub fn model_at(&self, model: Option<usize>, endpoint: usize) -> Option<&Arc<ModelLive>> {
        self.models.get(model?)?.endpoints[endpoint].as_ref()
    }

    /// What is measured of a region, for a client at `share`.
    pub fn measured(&self, at: RegionIndex, model: Option<usize>, share: f32, now: Time) -> Measured {
        let shift = self.rules.shift;
        let probe_ms = self.region(at).live.round_trip.value(share, now, shift);
        let Some(model) = model.and_then(|model| self.models.get(model)) else {
            return Measured { probe_ms, ..Measured::default() };
        };
        let terms = model.regions[at.get()].as_deref();
        let presumed = || f32::from_bits(model.presumed_ms.load(Relaxed));
        Measured {
            probe_ms,
            wait_ms: terms.and_then(|terms| terms.wait.value(share, now, shift)).unwrap_or(0.0),
            service_ms: terms.and_then(|terms| terms.service.value(share, now, shift)).unwrap_or_else(presumed),
        }
    }

    /// Looks at a region's endpoints.
    pub fn look(&self, at: RegionIndex, grpc: bool, model: Option<usize>, tried: &[u16], now: Time) -> Look {
        let range = self.region(at).endpoints.clone();
        let (mut count, mut look, mut warm) = (0_u16, Look::default(), 0.0);
        for endpoint in range {
            let live = &self.endpoints[endpoint];
            // One that is drained is not missed: whoever drains it has thought of the others.
            count += u16::from(live.speaks(grpc) && !live.is_drained());
            let availability = self.availability(endpoint, grpc, model, now);
            if !matches!(availability, Availability::Ready | Availability::Full) {
                continue;
            }
            warm += live.ramp(now, &self.rules);
            if !is_in(tried, endpoint) {
                look.healthy += 1;
                look.ready += usize::from(availability == Availability::Ready);
            }
        }
        look.capacity = (warm * self.rules.overprovisioning / f32::from(count.max(1))).min(1.0);
        look
    }

    /// Whether an endpoint can take a request for a model now.
    pub fn availability(&self, endpoint: usize, grpc: bool, model: Option<usize>, now: Time) -> Availability {
        let model = self.model_at(model, endpoint).map(|model| &**model);
        self.endpoints[endpoint].availability(grpc, model, now, &self.rules)
    }

    /// Takes in what an attempt that began then says of its endpoint.
    pub fn judge(&self, (region, endpoint): (RegionIndex, usize), sent: Sent, mark: Mark, now: Time) -> Option<Told> {
        let (live, rules, began) = (&self.endpoints[endpoint], &self.rules, sent.began);
        let model = self.model_at(sent.model, endpoint);
        match mark {
            Mark::None => None,
            Mark::Success => {
                model.inspect(|model| model.took_on(began, rules.limit));
                live.succeeded(began, now);
                None
            }
            Mark::Overload => model?.refused(began, now, rules.limit, &rules.pushback).map(Told::Paused),
            Mark::Failure | Mark::Unreachable if !live.failed(began, now, rules) => None,
            // Nobody is there, or it hangs: down until a probe says otherwise, so that no client is spent on trials. The
            // probe is by HTTP, and would find one well whose gRPC alone is dead.
            Mark::Unreachable | Mark::Dead if live.is_probeable() && !sent.grpc => {
                live.condemn(now, rules).then_some(Told::Condemned)
            }
            Mark::Failure | Mark::Unreachable | Mark::Dead => self.eject(region, live, now),
        }
    }

    /// Ejects an endpoint, unless too many of its region are out already.
    fn eject(&self, region: RegionIndex, live: &Arc<Live>, now: Time) -> Option<Told> {
        let region = self.region(region);
        let _one_at_a_time = region.live.judging.lock().unwrap_or_else(PoisonError::into_inner);
        let neighbours = &self.endpoints[region.endpoints.clone()];
        let within = |counts: fn(&Live) -> bool| {
            let counted = || neighbours.iter().filter(|other| counts(other));
            let out = counted().filter(|other| !Arc::ptr_eq(other, live) && other.is_out()).count();
            invariant::is_within_cap(out + 1, counted().count(), self.rules.ejected_share)
        };
        // Of those that are not drained as well: the others carry nothing.
        if !within(|_| true) || !within(|other| !other.is_drained()) {
            return None;
        }
        live.eject(now, &self.rules).map(Told::Ejected)
    }

    /// Turns what was measured since the last time into what picks read. To be called several times a second, by one task.
    pub fn refresh(&self, now: Time) {
        self.endpoints.iter().for_each(|live| live.refresh(now));
        for region in &self.regions {
            let lives = &self.endpoints[region.endpoints.clone()];
            // Of those that could answer: what a dead one measured in its better days says nothing.
            let well = lives.iter().filter(|live| live.is_healthy() && !live.is_ejected(now));
            if let Some(nearest) = well.filter_map(|live| live.round_trip_ms()).reduce(f32::min) {
                region.live.round_trip.follow(Some(nearest), None, now, self.rules.shift);
            }
            let reports = || lives.iter().map(|live| (live.report(now, &self.rules), live.in_flight()));
            let fresh = reports().any(|(report, _)| report.is_some());
            let total = reports().map(|(report, own)| report.map_or(own, |report| report.in_flight.max(own)));
            region.live.reported.store(if fresh { total.sum() } else { 0 }, Relaxed);
        }
        self.models.iter().for_each(|model| self.refresh_model(model, now));
    }

    fn refresh_model(&self, model: &FleetModel, now: Time) {
        let mut best: Option<f32> = None;
        // While nothing was measured anywhere the first measurement is everybody's at once: it is presumed of the others in
        // the same moment, so that nobody moves for it.
        let presumed = Some(f32::from_bits(model.presumed_ms.load(Relaxed))).filter(|ms| *ms > 0.0);
        for (region, terms) in self.regions.iter().zip(&model.regions) {
            let Some(terms) = terms else { continue };
            let at = region.endpoints.clone();
            let answered = model.endpoints[at.clone()].iter().flatten().map(|live| live.refresh(now));
            let (sum_us, count) = answered.fold((0, 0), |(sum, count), (us, one)| (sum + us, count + one));
            let mut mean = terms.mean.lock().unwrap_or_else(PoisonError::into_inner);
            if count > 0 {
                mean.answered(sum_us, count, now);
            } else if mean.is_stale(now) {
                *mean = Mean::default();
            }
            let Some(response_ms) = mean.value_ms() else {
                // Until it is done: while a shift goes on it is refused.
                terms.service.follow(None, None, now, self.rules.shift);
                terms.wait.follow(None, None, now, self.rules.shift);
                continue;
            };
            let way_ms = region.live.round_trip.target().unwrap_or(0.0);
            let served_ms = (response_ms - way_ms).max(0.0);
            // Little's law at each endpoint that reports: those who wait leave at the rate of those who are served.
            let waits: Vec<f32> = self.endpoints[at]
                .iter()
                .filter_map(|live| live.report(now, &self.rules))
                .map(|report| {
                    let served = report.in_flight.saturating_sub(report.queued).max(1);
                    report.queued as f32 * served_ms / served as f32
                })
                .collect();
            let wait_ms = waits.iter().sum::<f32>() / waits.len().max(1) as f32;
            // Nobody waits where nothing is known.
            terms.wait.follow(Some(wait_ms), Some(0.0), now, self.rules.shift);
            // What a request waited is in the mean already.
            terms.service.follow(Some((served_ms - wait_ms).max(0.0)), presumed, now, self.rules.shift);
            let service_ms = terms.service.target().unwrap_or(0.0);
            best = Some(best.map_or(service_ms, |best| best.min(service_ms)));
        }
        if let Some(best) = best {
            model.presumed_ms.store(best.to_bits(), Relaxed);
        }
    }
}

/// Whether an endpoint is among those tried.
pub(crate) fn is_in(tried: &[u16], endpoint: usize) -> bool {
    tried.iter().any(|tried| usize::from(*tried) == endpoint)
}
