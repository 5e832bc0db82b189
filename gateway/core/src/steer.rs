//! Steering: a score in milliseconds for each permitted region; the lowest wins.
//!
//! `nearest` = `distance + excess`:
//! - *distance* estimates the round trip from the client to the region, from the great circle: kilometres × 2 ÷ 200 km/ms
//!   (light in fibre), times a factor for routes that are not straight, plus a constant for the last mile;
//! - *excess* is how much slower this gateway's probes find the region than its distance from the gateway explains:
//!   a sick link or an overloaded region loses to one a little farther. Never below zero, and zero where the gateway's
//!   own place is not known.
//!
//! `latency` = *probe*: this gateway's own measurement, right when clients sit close to their gateway.
//! `nearest` falls back to it for a client whose location is unknown.

use crate::geo::Point;

/// Light in fibre, in kilometres a millisecond.
const FIBRE_KM_PER_MS: f32 = 200.0;

/// The probe of a region that has none and whose distance is not known: worse than any that was measured.
const UNMEASURED_MS: f32 = 1000.0;

/// How regions are scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// By the client's distance, corrected by what the probes find.
    Nearest,
    /// By this gateway's probes alone.
    Latency,
}

impl Policy {
    /// The word in configuration, answers and `explain`.
    pub fn as_str(self) -> &'static str {
        match self {
            Policy::Nearest => "nearest",
            Policy::Latency => "latency",
        }
    }
}

/// The steering of one configuration.
#[derive(Clone, Copy, Debug)]
pub struct Steering {
    /// The policy.
    pub policy: Policy,
    /// How much longer than the great circle a route is.
    pub route_inflation: f32,
    /// The part of a round trip that does not depend on distance, in milliseconds.
    pub constant_ms: f32,
    /// Where the gateway stands.
    pub gateway: Option<Point>,
}

/// A region's score and what it is made of, in milliseconds. What a policy does not use is zero.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Score {
    /// Estimated round trip from the client.
    pub distance_ms: f32,
    /// What the probes find beyond the gateway's distance.
    pub excess_ms: f32,
    /// The probe itself, where the policy is `latency`.
    pub probe_ms: f32,
}

impl Score {
    /// The sum of the parts.
    pub fn total_ms(&self) -> f32 {
        self.distance_ms + self.excess_ms + self.probe_ms
    }
}

impl Steering {
    /// The policy for one client: `nearest` needs to know where it is.
    pub fn policy_for(&self, client: Option<Point>) -> Policy {
        if client.is_some() { self.policy } else { Policy::Latency }
    }

    /// Scores one region. `probe_ms` is the round trip that the probes measure to it, `None` before the first.
    pub fn score(&self, client: Option<Point>, region: Point, probe_ms: Option<f32>) -> Score {
        let expected_ms = self.gateway.map(|gateway| self.round_trip_ms(gateway, region));
        match (self.policy, client) {
            (Policy::Nearest, Some(client)) => Score {
                distance_ms: self.round_trip_ms(client, region),
                excess_ms: match (probe_ms, expected_ms) {
                    (Some(probe), Some(expected)) => (probe - expected).max(0.0),
                    _ => 0.0,
                },
                probe_ms: 0.0,
            },
            // The distance stands in until the first measurement.
            _ => Score { probe_ms: probe_ms.or(expected_ms).unwrap_or(UNMEASURED_MS), ..Score::default() },
        }
    }

    fn round_trip_ms(&self, a: Point, b: Point) -> f32 {
        a.distance_km(b) * 2.0 / FIBRE_KM_PER_MS * self.route_inflation + self.constant_ms
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(latitude: f32, longitude: f32) -> Point {
        Point::new(latitude, longitude).expect("valid")
    }

    fn steering(policy: Policy, gateway: Option<Point>) -> Steering {
        Steering { policy, route_inflation: 1.5, constant_ms: 2.0, gateway }
    }

    const ASHBURN: (f32, f32) = (39.04, -77.49);
    const DUBLIN: (f32, f32) = (53.35, -6.26);
    const TOKYO: (f32, f32) = (35.68, 139.69);

    #[test]
    fn the_nearest_region_wins_over_the_world() {
        let steering = steering(Policy::Nearest, None);
        let rows = [
            ((52.5, 13.4), "dublin"),
            ((-23.5, -46.6), "ashburn"),
            ((34.7, 135.5), "tokyo"),
            ((-33.9, 151.2), "tokyo"),
            ((19.4, -99.1), "ashburn"),
            ((6.5, 3.4), "dublin"),
        ];
        for ((latitude, longitude), expected) in rows {
            let client = Some(point(latitude, longitude));
            let best = [("ashburn", ASHBURN), ("dublin", DUBLIN), ("tokyo", TOKYO)]
                .into_iter()
                .min_by(|a, b| {
                    let score = |at: (f32, f32)| steering.score(client, point(at.0, at.1), None).total_ms();
                    score(a.1).total_cmp(&score(b.1))
                })
                .map(|best| best.0);
            assert_eq!(best, Some(expected), "client at {latitude}, {longitude}");
        }
    }

    #[test]
    fn excess_is_what_distance_does_not_explain_and_never_negative() {
        let (gateway, region) = (point(51.5, -0.1), point(DUBLIN.0, DUBLIN.1));
        let client = Some(point(52.5, 13.4));
        let steering = steering(Policy::Nearest, Some(gateway));
        let expected = steering.round_trip_ms(gateway, region);
        assert_eq!(steering.score(client, region, Some(expected + 40.0)).excess_ms, 40.0);
        assert_eq!(steering.score(client, region, Some(0.1)).excess_ms, 0.0);
        assert_eq!(steering.score(client, region, None).excess_ms, 0.0);
    }

    #[test]
    fn an_unknown_client_is_steered_by_the_probes_and_by_distance_before_them() {
        let steering = steering(Policy::Nearest, Some(point(51.5, -0.1)));
        assert_eq!(steering.policy_for(None), Policy::Latency);
        let near = steering.score(None, point(DUBLIN.0, DUBLIN.1), None).total_ms();
        let far = steering.score(None, point(TOKYO.0, TOKYO.1), None).total_ms();
        assert!(near < far);
        assert_eq!(steering.score(None, point(DUBLIN.0, DUBLIN.1), Some(33.0)).total_ms(), 33.0);
    }
}
