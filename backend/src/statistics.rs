//! What a model has done, counted once and told three times: as OIP statistics, as metrics, and as a load report.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;

use crate::runner::Times;

/// So many times, so long together.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sum {
    pub(crate) count: u64,
    pub(crate) time: Duration,
}

impl Sum {
    fn add(&mut self, time: Duration) {
        self.count += 1;
        self.time += time;
    }
}

/// The counts of one model's version since it was loaded.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counts {
    /// Requests that were answered, from their arrival to their result.
    pub(crate) success: Sum,
    /// Requests that were refused or failed.
    pub(crate) fail: Sum,
    /// The answered ones' time in the queue.
    pub(crate) queue: Sum,
    /// The answered ones' time at the model, that of others in their batch included.
    pub(crate) execute: Sum,
    /// Rows that were answered.
    pub(crate) rows: u64,
    /// Batches by their number of rows.
    pub(crate) batches: BTreeMap<usize, Sum>,
    /// Time that was computed for nobody: the client had left, or its deadline passed meanwhile.
    pub(crate) wasted: Duration,
    /// When the last answer was made.
    pub(crate) last: Option<SystemTime>,
}

impl Counts {
    /// Time at work, and how many batches that were.
    pub(crate) fn busy(&self) -> Sum {
        self.batches
            .values()
            .fold(Sum::default(), |sum, batch| Sum { count: sum.count + batch.count, time: sum.time + batch.time })
    }
}

/// Counts from several threads.
#[derive(Default)]
pub(crate) struct Statistics(Mutex<Counts>);

impl Statistics {
    /// A batch was computed.
    pub(crate) fn batch(&self, rows: usize, took: Duration) {
        // A module's rows are whatever a client sends: each number of them has a line, but not without end.
        self.0.lock().batches.entry(rows.min(4096)).or_default().add(took);
    }

    /// Time was spent for nobody.
    pub(crate) fn wasted(&self, time: Duration) {
        self.0.lock().wasted += time;
    }

    /// A request was answered.
    pub(crate) fn succeeded(&self, rows: usize, times: Times) {
        let between = |from: SystemTime, to: SystemTime| to.duration_since(from).unwrap_or_default();
        let mut counts = self.0.lock();
        counts.success.add(between(times.queued, times.ended));
        counts.queue.add(between(times.queued, times.taken));
        counts.execute.add(between(times.began, times.ended));
        counts.rows += rows as u64;
        counts.last = Some(times.ended);
    }

    /// A request was refused by the model or failed.
    pub(crate) fn failed(&self, took: Duration) {
        self.0.lock().fail.add(took);
    }

    /// All counts of one instant.
    pub(crate) fn snapshot(&self) -> Counts {
        self.0.lock().clone()
    }

    /// Time at work so far.
    pub(crate) fn busy(&self) -> Duration {
        self.0.lock().busy().time
    }
}

/// The share of the last moments in which models were at work: 0 to 1 for each instance.
#[derive(Debug)]
pub(crate) struct Utilisation(Mutex<(Instant, Duration, f64)>);

impl Default for Utilisation {
    fn default() -> Utilisation {
        Utilisation(Mutex::new((Instant::now(), Duration::ZERO, 0.0)))
    }
}

impl Utilisation {
    /// Looks again at most every half second, so that a report costs nothing.
    pub(crate) fn look(&self, instances: usize, busy: impl Fn() -> Duration) -> f64 {
        let mut last = self.0.lock();
        let elapsed = last.0.elapsed();
        if elapsed >= Duration::from_millis(500) {
            let busy = busy();
            // A model that was unloaded took its time with it.
            let share = busy.saturating_sub(last.1).as_secs_f64() / (elapsed.as_secs_f64() * instances.max(1) as f64);
            *last = (Instant::now(), busy, share.min(1.0));
        }
        last.2
    }
}
