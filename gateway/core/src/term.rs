//! A measured term as steering reads it: it moves only out of a dead band, and takes its clients along a few at a time.
//!
//! Two regions that measure almost the same would otherwise swap places with every probe, and their clients with them; and
//! a region that becomes a little better would be sent everybody at once. The band is on what is measured, not on each
//! client's pick, so that whoever asks for the reason of a pick gets the pick itself.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::Time;

/// The dead band: the larger of this share and this many milliseconds.
const BAND_SHARE: f32 = 0.1;
const BAND_MS: f32 = 5.0;

/// One term of a score, in milliseconds. Written by one task, read by every pick.
///
/// Its three parts are read one by one: a pick that falls into the middle of a change may see the old and the new value
/// swapped for this once, and either is a value that was measured.
#[derive(Debug)]
pub struct Term {
    /// Bits of an `f32`; not a number where nothing is known.
    from: AtomicU32,
    to: AtomicU32,
    began: AtomicU64,
}

impl Default for Term {
    fn default() -> Self {
        let unknown = || AtomicU32::new(f32::NAN.to_bits());
        Term { from: unknown(), to: unknown(), began: AtomicU64::new(0) }
    }
}

impl Term {
    /// The value for a client at `share` (0 to 1, by its address): those below move first while the term shifts.
    pub fn value(&self, share: f32, now: Time, shift: Duration) -> Option<f32> {
        let (from, to) = (self.from.load(Relaxed), self.to.load(Relaxed));
        let moved = from == to || share < self.progress(now, shift);
        let value = f32::from_bits(if moved { to } else { from });
        (!value.is_nan()).then_some(value)
    }

    /// The value that all clients have in the end.
    pub fn target(&self) -> Option<f32> {
        let value = f32::from_bits(self.to.load(Relaxed));
        (!value.is_nan()).then_some(value)
    }

    /// Follows the measurement if it is out of the dead band and the last shift is over. The first one holds at once, for
    /// everybody: there is nothing to shift from. Returns whether it moved.
    pub fn follow(&self, measured_ms: Option<f32>, now: Time, shift: Duration) -> bool {
        let (held, measured) = (self.target(), measured_ms.filter(|ms| ms.is_finite()));
        let moves = match (held, measured) {
            (Some(held), Some(measured)) => (measured - held).abs() > f32::max(held * BAND_SHARE, BAND_MS),
            (held, measured) => held.is_some() != measured.is_some(),
        };
        if !moves || (held.is_some() && self.progress(now, shift) < 1.0) {
            return false;
        }
        let bits = measured.unwrap_or(f32::NAN).to_bits();
        self.from.store(held.map_or(bits, f32::to_bits), Relaxed);
        // The first of all begins no shift: the next may follow at once.
        self.began.store(if held.is_some() { now.0 } else { 0 }, Relaxed);
        self.to.store(bits, Relaxed);
        true
    }

    fn progress(&self, now: Time, shift: Duration) -> f32 {
        let began = Time(self.began.load(Relaxed));
        if shift.is_zero() || began == Time(0) { 1.0 } else { now.since(began).as_secs_f32() / shift.as_secs_f32() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHIFT: Duration = Duration::from_secs(10);

    fn seconds(n: u64) -> Time {
        Time(n * 1_000_000_000)
    }

    #[test]
    fn the_dead_band_is_the_larger_of_ten_percent_and_five_milliseconds() {
        let (term, none) = (Term::default(), Duration::ZERO);
        for (measured, moves) in
            [(20.0, true), (24.9, false), (25.1, true), (200.0, true), (219.0, false), (221.0, true), (f32::NAN, true)]
        {
            assert_eq!(term.follow(Some(measured), seconds(1), none), moves, "{measured}");
        }
        assert_eq!(term.target(), None);
    }

    #[test]
    fn a_tenth_of_the_clients_moves_each_second_and_the_same_ones_stay_moved() {
        let term = Term::default();
        assert!(term.follow(Some(20.0), seconds(100), SHIFT));
        assert_eq!(term.value(0.99, seconds(100), SHIFT), Some(20.0), "the first value is everybody's");
        assert!(term.follow(Some(80.0), seconds(101), SHIFT));
        for second in 0..=10 {
            let moved = (0..100).filter(|&at| {
                term.value(at as f32 / 100.0, seconds(101 + second), SHIFT).is_some_and(|value| value > 50.0)
            });
            assert_eq!(moved.count() as u64, second * 10);
        }
        let next = Term::default();
        assert!(next.follow(Some(20.0), seconds(100), SHIFT) && next.follow(Some(80.0), seconds(101), SHIFT));
        assert!(!next.follow(Some(20.0), seconds(105), SHIFT), "in the middle of a shift");
        assert!(next.follow(Some(20.0), seconds(111), SHIFT));
    }
}
