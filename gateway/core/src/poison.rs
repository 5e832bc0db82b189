//! Queries of death: requests that two endpoints died of, remembered for a while so that they do not walk the world.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::Time;

/// The most digests that are remembered; beyond it the oldest goes.
const DIGESTS_MAX: usize = 1024;

/// The remembered digests.
#[derive(Debug, Default)]
pub struct Poison {
    /// Nearly always false, and then nobody works out a digest.
    any: AtomicBool,
    digests: Mutex<Vec<(u64, Time)>>,
    refused: AtomicUsize,
}

impl Poison {
    /// Whether a digest has to be worked out at all.
    pub fn is_empty(&self) -> bool {
        !self.any.load(Relaxed)
    }

    /// Remembers a digest until `now` and `length`.
    pub fn remember(&self, digest: u64, now: Time, length: Duration) {
        let mut digests = self.digests.lock().unwrap_or_else(PoisonError::into_inner);
        digests.retain(|(known, until)| *known != digest && *until > now);
        if digests.len() >= DIGESTS_MAX {
            digests.remove(0);
        }
        digests.push((digest, now + length));
        self.any.store(true, Relaxed);
    }

    /// Whether the request is to be refused.
    pub fn refuses(&self, digest: u64, now: Time) -> bool {
        let mut digests = self.digests.lock().unwrap_or_else(PoisonError::into_inner);
        digests.retain(|(_, until)| *until > now);
        self.any.store(!digests.is_empty(), Relaxed);
        let refuses = digests.iter().any(|(known, _)| *known == digest);
        self.refused.fetch_add(usize::from(refuses), Relaxed);
        refuses
    }

    /// How many were refused so far.
    pub fn refused(&self) -> usize {
        self.refused.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_refused_for_a_while_and_the_table_is_bounded() {
        let (poison, second) = (Poison::default(), Duration::from_secs(1));
        assert!(poison.is_empty());
        poison.remember(7, Time(0), second);
        assert!(!poison.is_empty() && poison.refuses(7, Time(1)) && !poison.refuses(8, Time(1)));
        assert!(!poison.refuses(7, Time(1_000_000_000)) && poison.is_empty());
        (0..3000).for_each(|digest| poison.remember(digest, Time(0), second));
        assert!(poison.refuses(2999, Time(1)) && !poison.refuses(0, Time(1)));
        assert_eq!(poison.digests.lock().expect("no panic").len(), DIGESTS_MAX);
        assert_eq!(poison.refused(), 2);
    }
}
