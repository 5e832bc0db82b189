//! What one model costs at one endpoint, and how much of it the endpoint takes on: a peak that decays, quantiles that roll,
//! a mean, a limit.
//!
//! Requests write, with a handful of atomics and no lock; [`Fleet::refresh`](crate::fleet::Fleet::refresh) turns what they
//! wrote into what picks, stalls and hedges read.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::Time;
use crate::ewma::Ewma;
use crate::limit::{self, Limit};
use crate::pushback::{self, Pushback};

/// After this long a peak still weighs 1/e.
const PEAK_DECAY: Duration = Duration::from_secs(10);

/// Buckets: four to each doubling from 64 µs on, so that a quantile is known to within a fifth. The last begins at 100 s.
const BUCKETS: usize = 84;
const FIRST_LOG2: u32 = 6;

/// How often the counts are halved, which makes the quantiles roll.
const ROLL: Duration = Duration::from_secs(10);

/// The live measurements of one model at one endpoint.
#[derive(Debug)]
pub struct ModelLive {
    /// Peak EWMA of the response time in milliseconds, as bits, and when it was set (Finagle's `peak_ewma`).
    peak_ms: AtomicU32,
    peak_at: AtomicU64,
    counts: [AtomicU32; BUCKETS],
    sum_us: AtomicU64,
    answers: AtomicU64,
    /// Requests sent from here and not ended.
    pub(crate) in_flight: AtomicU32,
    limit: Limit,
    pushback: Mutex<Pushback>,
    /// There is something to forgive.
    pushed_back: AtomicBool,
    /// No request before this time (`Time`'s number).
    paused_until: AtomicU64,
    // Published by `refresh`.
    samples: AtomicU32,
    p95_us: AtomicU32,
    p99_us: AtomicU32,
    /// What `refresh` has already taken in: sum and answers.
    taken: [AtomicU64; 2],
    rolled: AtomicU64,
}

impl Default for ModelLive {
    fn default() -> Self {
        ModelLive {
            peak_ms: AtomicU32::new(f32::NAN.to_bits()),
            peak_at: AtomicU64::new(0),
            counts: std::array::from_fn(|_| AtomicU32::new(0)),
            sum_us: AtomicU64::new(0),
            answers: AtomicU64::new(0),
            in_flight: AtomicU32::new(0),
            limit: Limit::default(),
            pushback: Mutex::default(),
            pushed_back: AtomicBool::new(false),
            paused_until: AtomicU64::new(0),
            samples: AtomicU32::new(0),
            p95_us: AtomicU32::new(0),
            p99_us: AtomicU32::new(0),
            taken: [AtomicU64::new(0), AtomicU64::new(0)],
            rolled: AtomicU64::new(0),
        }
    }
}

impl ModelLive {
    /// An answer came after `took`.
    pub fn answered(&self, took: Duration, now: Time) {
        self.observe_peak(took, now);
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.counts[bucket(us)].fetch_add(1, Relaxed);
        self.sum_us.fetch_add(us, Relaxed);
        self.answers.fetch_add(1, Relaxed);
    }

    /// Whether it has all that it can take.
    pub(crate) fn is_full(&self, now: Time, rules: limit::Rules) -> bool {
        self.is_paused(now) || self.in_flight.load(Relaxed) >= self.limit.get(rules)
    }

    pub(crate) fn is_paused(&self, now: Time) -> bool {
        now.0 < self.paused_until.load(Relaxed)
    }

    /// A request that began then was answered: the limit may rise, and earlier overload replies are forgiven.
    pub(crate) fn took_on(&self, began: Time, rules: limit::Rules) {
        self.limit.succeeded(self.in_flight.load(Relaxed), rules);
        if self.pushed_back.load(Relaxed) {
            let mut pushback = self.pushback();
            pushback.answered(began);
            self.publish(&pushback);
        }
    }

    /// A request that began then was refused for overload. Returns the length of a pause that this began.
    pub(crate) fn refused(
        &self,
        began: Time,
        now: Time,
        limits: limit::Rules,
        rules: &pushback::Rules,
    ) -> Option<Duration> {
        self.limit.overloaded(self.in_flight.load(Relaxed), now, limits);
        let mut pushback = self.pushback();
        let paused = pushback.refused(began, now, rules);
        self.publish(&pushback);
        paused
    }

    fn pushback(&self) -> MutexGuard<'_, Pushback> {
        self.pushback.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, pushback: &Pushback) {
        self.pushed_back.store(!pushback.is_calm(), Relaxed);
        self.paused_until.store(pushback.until().0, Relaxed);
    }

    /// A failure, as if it had taken `penalty` at least: fast failures would otherwise look like a fast endpoint and attract
    /// everybody. Nor does it bring the peak down.
    pub fn failed(&self, took: Duration, penalty: Duration, now: Time) {
        let peak = Duration::try_from_secs_f32(self.peak_ms(now).unwrap_or(0.0) / 1000.0).unwrap_or_default();
        self.observe_peak(took.max(penalty).max(peak), now);
    }

    /// The peak is forgotten.
    pub(crate) fn forgive(&self) {
        self.peak_ms.store(f32::NAN.to_bits(), Relaxed);
    }

    /// Something that took so long, an attempt that was given up for instance: it makes the endpoint dearer without counting
    /// as an answer.
    pub fn observe_peak(&self, took: Duration, now: Time) {
        let took_ms = took.as_secs_f32() * 1000.0;
        let peak = match self.peak_ms(now) {
            // Two that race may lose one sample.
            Some(peak) if peak > took_ms => {
                let weight = 1.0 - self.decay(now);
                // `peak` has decayed already; the sample pulls it no lower than itself.
                peak.max(peak + (took_ms - peak) * weight)
            }
            _ => took_ms,
        };
        self.peak_ms.store(peak.to_bits(), Relaxed);
        self.peak_at.store(now.0, Relaxed);
    }

    /// The peak as decayed until now, in milliseconds; `None` before the first sample.
    pub fn peak_ms(&self, now: Time) -> Option<f32> {
        let peak = f32::from_bits(self.peak_ms.load(Relaxed));
        (!peak.is_nan()).then(|| peak * self.decay(now))
    }

    fn decay(&self, now: Time) -> f32 {
        let age = now.since(Time(self.peak_at.load(Relaxed)));
        (-age.as_secs_f32() / PEAK_DECAY.as_secs_f32()).exp()
    }

    /// The rolling 95th percentile of the response time, once there are `least` samples.
    pub fn p95(&self, least: u32) -> Option<Duration> {
        self.quantile(&self.p95_us, least)
    }

    /// The rolling 99th percentile of the response time, once there are `least` samples.
    pub fn p99(&self, least: u32) -> Option<Duration> {
        self.quantile(&self.p99_us, least)
    }

    fn quantile(&self, published: &AtomicU32, least: u32) -> Option<Duration> {
        (self.samples.load(Relaxed) >= least).then(|| Duration::from_micros(published.load(Relaxed).into()))
    }

    /// Publishes quantiles, and gives sum (microseconds) and count of the answers since the last time.
    pub(crate) fn refresh(&self, now: Time) -> (u64, u64) {
        let counts: [u32; BUCKETS] = std::array::from_fn(|at| self.counts[at].load(Relaxed));
        let total: u32 = counts.iter().sum();
        self.p95_us.store(quantile(&counts, total, 0.95), Relaxed);
        self.p99_us.store(quantile(&counts, total, 0.99), Relaxed);
        self.samples.store(total, Relaxed);
        if now.since(Time(self.rolled.load(Relaxed))) >= ROLL {
            self.rolled.store(now.0, Relaxed);
            for (count, read) in self.counts.iter().zip(counts) {
                count.fetch_sub(read.div_ceil(2), Relaxed);
            }
        }
        let since = |total: &AtomicU64, taken: &AtomicU64| {
            let total = total.load(Relaxed);
            total - taken.swap(total, Relaxed)
        };
        let answers = since(&self.answers, &self.taken[1]);
        (since(&self.sum_us, &self.taken[0]), answers)
    }
}

/// The memory of a mean response time.
const MEAN_DECAY: Duration = Duration::from_secs(10);

/// After so long without an answer it is unknown again.
const MEAN_FRESH: Duration = Duration::from_secs(20);

/// Answers that make one sample of it. A model's first answers after its start are slow; if one of them counted, a region
/// would lose its clients for as long as nobody else measures it.
const MEAN_OF: u64 = 20;

/// The mean response time of one model in one region.
#[derive(Debug, Default)]
pub struct Mean {
    ewma: Ewma,
    /// Sum (microseconds) and count of answers that are not a sample yet.
    pending: (u64, u64),
    last: Time,
}

impl Mean {
    /// So many answers took so many microseconds together.
    pub fn answered(&mut self, sum_us: u64, count: u64, now: Time) {
        self.pending = (self.pending.0 + sum_us, self.pending.1 + count);
        self.last = now;
        if self.pending.1 >= MEAN_OF {
            let (sum_us, count) = std::mem::take(&mut self.pending);
            self.ewma.observe(sum_us as f32 / count as f32 / 1000.0, now, MEAN_DECAY);
        }
    }

    /// In milliseconds, once there are answers enough.
    pub fn value_ms(&self) -> Option<f32> {
        self.ewma.value()
    }

    /// Whether it has not been measured for too long.
    pub fn is_stale(&self, now: Time) -> bool {
        self.ewma.value().is_some() && now.since(self.last) >= MEAN_FRESH
    }
}

fn bucket(us: u64) -> usize {
    let us = us.max(1 << FIRST_LOG2);
    let log2 = 63 - us.leading_zeros();
    let quarter = (us >> (log2 - 2)) & 3;
    (((log2 - FIRST_LOG2) * 4) as usize + quarter as usize).min(BUCKETS - 1)
}

/// The upper end of a bucket, in microseconds.
fn upper_us(bucket: usize) -> u32 {
    let (octave, quarter) = ((bucket / 4) as u32, (bucket % 4) as u32);
    (5 + quarter) << (octave + FIRST_LOG2 - 2)
}

fn quantile(counts: &[u32; BUCKETS], total: u32, share: f64) -> u32 {
    let rank = (f64::from(total) * share).ceil() as u32;
    let mut seen = 0;
    let found = counts.iter().position(|count| {
        seen += count;
        seen >= rank && seen > 0
    });
    found.map_or(0, upper_us)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn quantiles_are_known_to_within_a_fifth_and_roll() {
        let live = ModelLive::default();
        assert_eq!(live.p99(0), Some(Duration::ZERO));
        (1..=1000).for_each(|at| live.answered(Duration::from_micros(at * 100), Time(0)));
        let (sum, count) = live.refresh(Time(1));
        assert_eq!((sum, count), (50_050_000, 1000));
        assert_eq!(live.refresh(Time(1)), (0, 0));
        for (quantile, exact) in [(live.p95(100), ms(95)), (live.p99(100), ms(99))] {
            let quantile = quantile.expect("samples");
            assert!(quantile >= exact && quantile <= exact.mul_f32(1.25), "{quantile:?} for {exact:?}");
        }
        assert_eq!(live.p99(1001), None);
        // What was long ago is outweighed.
        for minute in 1..10 {
            (0..1000).for_each(|_| live.answered(ms(1), Time(0)));
            live.refresh(Time(minute * 60_000_000_000));
        }
        assert!(live.p99(100).expect("samples") < ms(2));
    }

    #[test]
    fn one_slow_answer_is_no_mean_and_an_old_one_is_forgotten() {
        let mut mean = Mean::default();
        mean.answered(900_000, 1, Time(0));
        assert_eq!(mean.value_ms(), None);
        mean.answered(19 * 10_000, 19, Time(1));
        assert_eq!(mean.value_ms(), Some(54.5));
        assert!(!mean.is_stale(Time(19_000_000_000)) && mean.is_stale(Time(21_000_000_000)));
    }

    #[test]
    fn each_bucket_holds_what_it_says() {
        for us in [0, 1, 63, 64, 79, 80, 1000, 123_456, 1_000_000, 99_000_000] {
            let at = bucket(us);
            assert!(us < u64::from(upper_us(at)), "{us}");
            assert!(at == 0 || us >= u64::from(upper_us(at - 1)), "{us}");
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn a_peak_is_taken_at_once_and_forgotten_slowly() {
        let live = ModelLive::default();
        assert_eq!(live.peak_ms(Time(0)), None);
        live.answered(ms(10), Time(0));
        live.answered(ms(500), Time(0));
        live.answered(ms(10), Time(0));
        assert_eq!(live.peak_ms(Time(0)), Some(500.0));
        let later = live.peak_ms(Time(10_000_000_000)).expect("sampled");
        assert!((later - 500.0 / std::f32::consts::E).abs() < 1.0, "{later}");
        (1..=100).for_each(|second| live.answered(ms(10), Time(second * 1_000_000_000)));
        let settled = live.peak_ms(Time(100_000_000_000)).expect("sampled");
        assert!((9.9..12.0).contains(&settled), "{settled}");
    }
}
