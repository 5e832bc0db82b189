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
    /// When the shift began, biased; the lowest bit says that it is a way back.
    began: AtomicU64,
}

impl Default for Term {
    fn default() -> Self {
        let unknown = || AtomicU32::new(f32::NAN.to_bits());
        Term { from: unknown(), to: unknown(), began: AtomicU64::new(0) }
    }
}

impl Term {
    /// The value for a client at `share` (0 to 1, by its address): the lowest move first while the term shifts, and on the
    /// way back those who moved last are the first.
    pub fn value(&self, share: f32, now: Time, shift: Duration) -> Option<f32> {
        let (from, to) = (self.from.load(Relaxed), self.to.load(Relaxed));
        let (progress, back) = self.progress(now, shift);
        let moved = from == to || if back { share >= 1.0 - progress } else { share < progress };
        known(if moved { to } else { from })
    }

    /// The value that all clients have in the end.
    pub fn target(&self) -> Option<f32> {
        known(self.to.load(Relaxed))
    }

    /// Follows the measurement if it is out of the dead band. While a shift goes on, only back to where it began: what
    /// was a moment's hitch is not to be waited out. Returns whether it moved.
    ///
    /// `unknown` is what clients were given before the first measurement, and are shifted from. Without it the first
    /// measurement holds at once, for everybody.
    pub fn follow(&self, measured_ms: Option<f32>, unknown: Option<f32>, now: Time, shift: Duration) -> bool {
        let (from, to) = (self.from.load(Relaxed), self.to.load(Relaxed));
        let measured = measured_ms.filter(|ms| ms.is_finite());
        let (progress, back) = self.progress(now, shift);
        let goes_on = from != to && progress < 1.0;
        if !out_of_band(known(to), measured) || (goes_on && out_of_band(known(from), measured)) {
            return false;
        }
        let bits = measured.unwrap_or(f32::NAN).to_bits();
        if goes_on {
            // Those who have not moved yet are there already.
            let behind = u64::try_from(shift.mul_f32(1.0 - progress).as_nanos()).unwrap_or(u64::MAX);
            self.begin(to, bits, biased(now).saturating_sub(behind), !back);
        } else {
            match known(to).or(unknown) {
                Some(held) => self.begin(held.to_bits(), bits, biased(now), false),
                // There is nothing to shift from, and the next may follow at once.
                None => self.begin(bits, bits, 0, false),
            }
        }
        true
    }

    fn begin(&self, from: u32, to: u32, began: u64, back: bool) {
        self.from.store(from, Relaxed);
        self.began.store(began & !1 | u64::from(back), Relaxed);
        self.to.store(to, Relaxed);
    }

    /// How far the shift has come, from 0, and whether it is a way back.
    fn progress(&self, now: Time, shift: Duration) -> (f32, bool) {
        let began = self.began.load(Relaxed);
        let since = Duration::from_nanos(biased(now).saturating_sub(began & !1));
        let over = shift.is_zero() || began <= 1;
        (if over { 1.0 } else { since.as_secs_f32() / shift.as_secs_f32() }, began & 1 == 1)
    }
}

/// A time as it is stored: a way back may have begun before the clock did.
fn biased(now: Time) -> u64 {
    now.0.saturating_add(1 << 62)
}

fn known(bits: u32) -> Option<f32> {
    let value = f32::from_bits(bits);
    (!value.is_nan()).then_some(value)
}

fn out_of_band(held: Option<f32>, measured: Option<f32>) -> bool {
    match (held, measured) {
        (Some(held), Some(measured)) => (measured - held).abs() > f32::max(held * BAND_SHARE, BAND_MS),
        (held, measured) => held.is_some() != measured.is_some(),
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
            assert_eq!(term.follow(Some(measured), None, seconds(1), none), moves, "{measured}");
        }
        assert_eq!(term.target(), None);
    }

    #[test]
    fn a_tenth_of_the_clients_moves_each_second_and_the_same_ones_stay_moved() {
        let term = Term::default();
        assert!(term.follow(Some(20.0), None, seconds(100), SHIFT));
        assert_eq!(term.value(0.99, seconds(100), SHIFT), Some(20.0), "the first value is everybody's");
        assert!(term.follow(Some(80.0), None, seconds(101), SHIFT));
        for second in 0..=10 {
            let moved = (0..100).filter(|&at| {
                term.value(at as f32 / 100.0, seconds(101 + second), SHIFT).is_some_and(|value| value > 50.0)
            });
            assert_eq!(moved.count() as u64, second * 10);
        }
        let next = Term::default();
        assert!(
            next.follow(Some(20.0), None, seconds(100), SHIFT) && next.follow(Some(80.0), None, seconds(101), SHIFT)
        );
        assert!(!next.follow(Some(120.0), None, seconds(105), SHIFT), "in the middle of a shift");
        assert!(next.follow(Some(120.0), None, seconds(111), SHIFT));
    }

    fn moved(term: &Term, now: Time, beyond: f32) -> usize {
        (0..100).filter(|&at| term.value(at as f32 / 100.0, now, SHIFT).is_some_and(|value| value > beyond)).count()
    }

    #[test]
    fn the_first_measurement_takes_its_clients_along_a_few_at_a_time_too() {
        let term = Term::default();
        // A burst at the start: nobody has waited so far, and now the queue is long.
        assert!(term.follow(Some(300.0), Some(0.0), seconds(100), SHIFT));
        assert_eq!(moved(&term, seconds(100), 150.0), 0);
        assert_eq!(moved(&term, seconds(103), 150.0), 30);
    }

    #[test]
    fn a_hitch_is_not_waited_out_and_nobody_jumps_on_the_way_back() {
        let term = Term::default();
        assert!(
            term.follow(Some(20.0), None, seconds(100), SHIFT) && term.follow(Some(80.0), None, seconds(101), SHIFT)
        );
        assert_eq!(moved(&term, seconds(104), 50.0), 30);
        assert!(!term.follow(Some(120.0), None, seconds(104), SHIFT), "elsewhere than where it came from");
        assert!(term.follow(Some(21.0), None, seconds(104), SHIFT));
        for (second, still) in [(104, 30), (105, 20), (106, 10), (107, 0)] {
            let now = moved(&term, seconds(second), 50.0);
            assert!(now.abs_diff(still) <= 1, "{now} at {second}");
        }
        // And forth again, from the middle of the way back.
        let term = Term::default();
        assert!(
            term.follow(Some(20.0), None, seconds(100), SHIFT) && term.follow(Some(80.0), None, seconds(101), SHIFT)
        );
        assert!(term.follow(Some(20.0), None, seconds(105), SHIFT));
        assert!(moved(&term, seconds(107), 50.0).abs_diff(20) <= 1);
        assert!(term.follow(Some(80.0), None, seconds(107), SHIFT));
        assert!(moved(&term, seconds(107), 50.0).abs_diff(20) <= 1);
        assert!(moved(&term, seconds(109), 50.0).abs_diff(40) <= 1);
    }

    #[test]
    fn a_hitch_in_the_first_seconds_of_the_clock_is_no_exception() {
        let term = Term::default();
        assert!(term.follow(Some(300.0), Some(0.0), seconds(1), SHIFT));
        assert!(term.follow(Some(0.0), None, seconds(2), SHIFT));
        assert!(moved(&term, seconds(2), 150.0).abs_diff(10) <= 1 && moved(&term, seconds(3), 150.0) <= 1);
    }

    #[test]
    fn what_is_lost_on_the_way_and_found_again_makes_nobody_jump() {
        let term = Term::default();
        assert!(term.follow(Some(20.0), None, seconds(100), SHIFT) && term.follow(None, None, seconds(101), SHIFT));
        assert!(term.follow(Some(20.0), Some(0.0), seconds(103), SHIFT));
        let at = |share| term.value(share, seconds(103), SHIFT);
        assert_eq!((at(0.1), at(0.5)), (None, Some(20.0)));
    }
}
