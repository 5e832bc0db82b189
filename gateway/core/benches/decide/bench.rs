//! A fleet that has run for a while, and one decision in it.

use isochrone_core::Time;
use isochrone_core::fleet::Fleet;
use isochrone_core::geo::{Location, Point};
use isochrone_core::pick::{Choice, Query, Tried, pick};
use isochrone_core::residency::{Permitted, Residency};
use isochrone_core::steer::{Client, Policy, Steering, mix};

use crate::world::{country, fleet, ms, permitted, region};

const NOW: Time = Time(100_000_000_000);

pub(crate) struct Bench {
    fleet: Fleet,
    permitted: Permitted,
    steering: Steering,
    location: Location,
}

impl Bench {
    /// Everything measured and everybody well, as in a gateway that has run for a while.
    pub(crate) fn new(endpoints: usize, regions: usize) -> Bench {
        let plan = (0..regions).map(|at| {
            // Around the globe, in no order of distance from anybody: files are sorted by name.
            let degrees = (at * 7 % regions) as f32 * 300.0 / regions as f32 - 150.0;
            (region(&format!("region-{at}"), degrees), endpoints / regions)
        });
        let fleet = fleet(plan.collect());
        for (at, live) in fleet.models[0].endpoints.iter().flatten().enumerate() {
            (0..200).for_each(|_| live.answered(ms(5 + at as u64 % 7), NOW));
        }
        fleet.refresh(NOW);
        let location = Location::from_record(Some(country("DE")), Point::new(52.5, 13.4));
        let permitted = permitted(&fleet, &Residency::Any);
        Bench { fleet, permitted, steering: Steering::by(Policy::Nearest), location }
    }

    pub(crate) fn decide(&self, random: u64) -> Choice {
        let client = Client { location: &self.location, hash: mix(random) };
        let query = Query { client, model: Some(0), grpc: false, steering: &self.steering, affinity: None };
        pick(&self.fleet, &query, &self.permitted, Tried::default(), NOW, random).expect("everybody is well")
    }
}
