//! Queries of death: requests that two endpoints died of, refused for a while so that they do not walk the world.
//!
//! What looks like one may be a harmless request that was in flight when a machine was lost. So after a second the next of
//! its like is let through, as a trial: if it is answered, all is forgiven; if it breaks one more endpoint, the refusal is
//! twice as long, up to a longest.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::Time;

/// The most digests that are remembered; beyond it the oldest goes.
const DIGESTS_MAX: usize = 1024;

/// The first refusal.
const FIRST: Duration = Duration::from_secs(1);

/// The remembered digests.
#[derive(Debug, Default)]
pub struct Poison {
    /// Nearly always false, and then nobody works out a digest.
    any: AtomicBool,
    known: Mutex<Vec<Known>>,
    refused: AtomicUsize,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    digest: u64,
    length: Duration,
    /// Refused until then; after that the next is a trial.
    until: Time,
}

/// What is to become of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing is known against it.
    Clean,
    /// Its like broke endpoints; this one shows whether it still does.
    Trial,
    /// It is refused.
    Refused,
}

impl Poison {
    /// Whether a digest has to be worked out at all.
    pub fn is_empty(&self) -> bool {
        !self.any.load(Relaxed)
    }

    /// A request of this digest broke its endpoints: its like is refused, at most for `longest`.
    pub fn remember(&self, digest: u64, now: Time, longest: Duration) {
        let mut known = self.known();
        let before = known.iter().position(|known| known.digest == digest).map(|at| known.remove(at));
        // Those that broke at the same time are one occasion.
        let length = match before {
            Some(before) if before.until > now => before.length,
            Some(before) => before.length.saturating_mul(2),
            None => FIRST,
        };
        if known.len() >= DIGESTS_MAX {
            known.remove(0);
        }
        let length = length.min(longest);
        known.push(Known { digest, length, until: now + length });
        self.any.store(true, Relaxed);
    }

    /// What is to become of a request of this digest.
    pub fn ask(&self, digest: u64, now: Time, longest: Duration) -> Verdict {
        let mut known = self.known();
        // What nobody has sent for so long is forgotten.
        known.retain(|known| known.until + longest > now);
        self.any.store(!known.is_empty(), Relaxed);
        match known.iter_mut().find(|known| known.digest == digest) {
            None => Verdict::Clean,
            Some(known) if now >= known.until => {
                // The others of its like wait for how this one fares.
                known.until = now + known.length;
                Verdict::Trial
            }
            Some(_) => {
                self.refused.fetch_add(1, Relaxed);
                Verdict::Refused
            }
        }
    }

    /// The trial was answered.
    pub fn forgive(&self, digest: u64) {
        let mut known = self.known();
        known.retain(|known| known.digest != digest);
        self.any.store(!known.is_empty(), Relaxed);
    }

    /// How many were refused so far.
    pub fn refused(&self) -> usize {
        self.refused.load(Relaxed)
    }

    fn known(&self) -> MutexGuard<'_, Vec<Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONGEST: Duration = Duration::from_secs(60);

    fn ms(n: u64) -> Time {
        Time(n * 1_000_000)
    }

    #[test]
    fn it_is_refused_then_tried_once_and_forgiven_or_refused_for_longer() {
        let poison = Poison::default();
        assert!(poison.is_empty());
        poison.remember(7, ms(0), LONGEST);
        // Another of its like that was under way at the same time.
        poison.remember(7, ms(1), LONGEST);
        let ask = |digest, now| poison.ask(digest, ms(now), LONGEST);
        assert_eq!([ask(7, 500), ask(8, 500)], [Verdict::Refused, Verdict::Clean]);
        assert_eq!([ask(7, 1002), ask(7, 1003)], [Verdict::Trial, Verdict::Refused], "one trial at a time");
        poison.remember(7, ms(2100), LONGEST);
        assert_eq!([ask(7, 4000), ask(7, 4200)], [Verdict::Refused, Verdict::Trial]);
        poison.forgive(7);
        assert!(poison.is_empty());
        assert_eq!((ask(7, 4300), poison.refused()), (Verdict::Clean, 3));
    }

    #[test]
    fn the_table_is_bounded_and_forgets() {
        let poison = Poison::default();
        (0..3000).for_each(|digest| poison.remember(digest, ms(0), LONGEST));
        assert_eq!(poison.known().len(), DIGESTS_MAX);
        assert_eq!(poison.ask(2999, ms(1), LONGEST), Verdict::Refused);
        assert_eq!(poison.ask(0, ms(1), LONGEST), Verdict::Clean);
        assert_eq!(poison.ask(2999, ms(70_000), LONGEST), Verdict::Clean);
        assert!(poison.is_empty());
    }
}
