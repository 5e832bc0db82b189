//! The snapshot and the live state, as `isochrone_core::pick` wants to see them.

use std::ops::Range;

use isochrone_core::Time;
use isochrone_core::geo::Location;
use isochrone_core::pick::{self, Availability, Choice, Tried};
use isochrone_core::region::RegionIndex;
use isochrone_core::residency::Permitted;
use isochrone_core::steer::Score;

use crate::call::Dialect;
use crate::snapshot::Snapshot;

/// Picks an endpoint for one attempt.
pub(crate) fn pick(
    snapshot: &Snapshot,
    permitted: &Permitted,
    location: &Location,
    dialect: Dialect,
    tried: Tried<'_>,
    now: Time,
) -> Option<Choice> {
    let view = View { snapshot, location, grpc: dialect == Dialect::Grpc, now };
    pick::pick(&view, permitted, tried, fastrand::u64(..))
}

struct View<'a> {
    snapshot: &'a Snapshot,
    location: &'a Location,
    grpc: bool,
    now: Time,
}

impl pick::View for View<'_> {
    fn is_drained(&self, region: RegionIndex) -> bool {
        self.snapshot.config.regions[region.get()].region.drain
    }

    fn score(&self, region: RegionIndex) -> Score {
        // Of those that could answer: what a dead one measured in its better days says nothing.
        let endpoints = self.snapshot.endpoints[self.endpoints(region)].iter();
        let ready = endpoints.filter(|endpoint| endpoint.availability(self.now) == Availability::Ready);
        let round_trip_ms = ready.filter_map(|endpoint| endpoint.round_trip_ms()).reduce(f32::min);
        let place = self.snapshot.config.regions[region.get()].region.point;
        self.snapshot.config.steering.score(self.location.point, place, round_trip_ms)
    }

    fn endpoints(&self, region: RegionIndex) -> Range<usize> {
        self.snapshot.regions[region.get()].endpoints.clone()
    }

    fn availability(&self, endpoint: usize) -> Availability {
        let endpoint = &self.snapshot.endpoints[endpoint];
        let speaks = if self.grpc { endpoint.config.grpc.is_some() } else { endpoint.config.http.is_some() };
        if speaks { endpoint.availability(self.now) } else { Availability::Excluded }
    }

    fn cost(&self, endpoint: usize) -> u64 {
        self.snapshot.endpoints[endpoint].in_flight() as u64
    }
}
