//! The deciding half of Isochrone: where a request may go, where it goes, and whether it may go again.
//!
//! Everything here is a plain function or a small state machine of (state, facts, [`Time`]).
//! Nothing here opens a socket, reads a clock or draws a random number: callers pass those in, so that each decision
//! can be tested exactly and replayed from a seed.
//!
//! One decision, in order:
//! [`residency`] turns the rules into a [`Permitted`](residency::Permitted) set of regions, and is the only code that can;
//! [`steer`] puts those in order, by a score in milliseconds made of distance and of what [`term`]s and [`load`] measure;
//! [`pick`] takes the best region of the [`fleet`] that can take the request, and one endpoint of it;
//! [`live`] says which endpoints those are, by [`health`], [`outlier`] and [`limit`];
//! [`course`] makes attempts of it: [`stall`] says when to doubt that an answer will come, [`retry`] and [`budget`] whether
//! to try again, [`poison`] what is not tried at all, [`queue`] how to wait for room.

#![forbid(unsafe_code)]

pub mod geo;

pub mod region;

pub mod residency;

pub mod ewma;

pub mod term;

pub mod load;

pub mod steer;

pub mod health;

pub mod outlier;

pub mod limit;

pub mod pushback;

pub mod live;

pub mod fleet;

pub mod pick;

pub mod course;

pub mod budget;

pub mod retry;

pub mod stall;

pub mod poison;

pub mod queue;

pub mod invariant;

use std::time::Duration;

/// An instant on a monotonic clock, in nanoseconds since a start that the caller chose.
///
/// A plain number rather than `std::time::Instant`, so that it fits an atomic and a test can make one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(pub u64);

impl Time {
    /// The time that has passed since `earlier`; zero if `earlier` is later.
    pub fn since(self, earlier: Time) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl std::ops::Add<Duration> for Time {
    type Output = Time;

    fn add(self, length: Duration) -> Time {
        Time(self.0.saturating_add(u64::try_from(length.as_nanos()).unwrap_or(u64::MAX)))
    }
}
