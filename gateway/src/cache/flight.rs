//! Single flight: of equal requests that come together one is sent, and the others get its answer.
//!
//! Whoever leads does so on its own time: if its client leaves, its deadline passes or it fails, one of those who wait leads
//! in its place, and each waits no longer than its own deadline.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

use super::Key;
use super::kept::Entry;

/// As many locks, so that cores hardly ever wait for one another.
const SHARDS: usize = 16;

/// How a flight has ended.
#[derive(Clone, Debug)]
pub(super) enum Ended {
    /// There is an answer for everybody.
    Kept(Arc<Entry>),
    /// There was one, but not for others.
    NotKept,
    /// There was none.
    Failed,
}

/// The questions that are on their way.
#[derive(Debug, Default)]
pub(super) struct Flights([Mutex<HashMap<Key, watch::Receiver<Option<Ended>>>>; SHARDS]);

/// What a request is to a flight.
#[derive(Debug)]
pub(super) enum Joined<'a> {
    Lead(Lead<'a>),
    Wait(Flight),
}

/// Whoever asks.
#[derive(Debug)]
pub(super) struct Lead<'a> {
    flights: &'a Flights,
    key: Key,
    outcome: watch::Sender<Option<Ended>>,
}

/// Somebody else asks.
#[derive(Debug)]
pub(super) struct Flight(watch::Receiver<Option<Ended>>);

impl Flights {
    fn shard(&self, key: &Key) -> &Mutex<HashMap<Key, watch::Receiver<Option<Ended>>>> {
        &self.0[usize::from(key.0[0]) % SHARDS]
    }

    pub(super) fn join(&self, key: Key) -> Joined<'_> {
        let mut flights = self.shard(&key).lock();
        if let Some(flight) = flights.get(&key) {
            return Joined::Wait(Flight(flight.clone()));
        }
        let (outcome, flight) = watch::channel(None);
        flights.insert(key, flight);
        Joined::Lead(Lead { flights: self, key, outcome })
    }
}

impl Lead<'_> {
    /// Tells those who wait.
    pub(super) fn ended(self, how: Ended) {
        self.outcome.send_replace(Some(how));
    }
}

impl Drop for Lead<'_> {
    fn drop(&mut self) {
        // Before anybody is told: whoever then joins begins anew.
        self.flights.shard(&self.key).lock().remove(&self.key);
        self.outcome.send_if_modified(|outcome| {
            let failed = outcome.is_none();
            if failed {
                *outcome = Some(Ended::Failed);
            }
            failed
        });
    }
}

impl Flight {
    /// Waits for the end.
    pub(super) async fn ended(mut self) -> Ended {
        match self.0.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(ended)) => ended.clone(),
            Ok(None) | Err(_) => Ended::Failed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_leads_and_one_succeeds_whoever_fails() {
        let (flights, key) = (Flights::default(), Key([7; 32]));
        let Joined::Lead(lead) = flights.join(key) else { panic!("nobody else does") };
        let Joined::Wait(first) = flights.join(key) else { panic!("somebody leads") };
        let Joined::Wait(second) = flights.join(key) else { panic!("somebody leads") };
        assert!(matches!(flights.join(Key([8; 32])), Joined::Lead(_)), "another question");
        drop(lead);
        assert!(matches!(first.ended().await, Ended::Failed));
        assert!(matches!(second.ended().await, Ended::Failed));
        let Joined::Lead(successor) = flights.join(key) else { panic!("nobody leads any more") };
        let Joined::Wait(other) = flights.join(key) else { panic!("one successor") };
        successor.ended(Ended::NotKept);
        assert!(matches!(other.ended().await, Ended::NotKept));
        assert!(matches!(flights.join(key), Joined::Lead(_)), "it is over");
    }
}
