//! A mean that forgets: an exponentially weighted moving average over time rather than over samples.
//!
//! A sample's weight depends on the time since the one before, `1 - e^(-Δt/decay)`, so that a burst of samples does not
//! outvote a quiet minute. `decay` is the time after which an old value still weighs 1/e.

use std::time::Duration;

use crate::Time;

/// A decaying mean. Empty until its first sample, which it takes as it is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ewma {
    value: Option<f32>,
    at: Time,
}

impl Ewma {
    /// The mean so far; `None` before the first sample.
    pub fn value(&self) -> Option<f32> {
        self.value
    }

    /// Takes in one sample. Not-a-number is ignored: it would stay for ever.
    pub fn observe(&mut self, sample: f32, now: Time, decay: Duration) {
        if !sample.is_finite() {
            return;
        }
        let mean = match self.value {
            None => sample,
            Some(old) => {
                let weight = 1.0 - (-now.since(self.at).as_secs_f32() / decay.as_secs_f32().max(1e-3)).exp();
                old + (sample - old) * weight
            }
        };
        *self = Ewma { value: Some(mean), at: now };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_value_weighs_one_over_e_after_the_decay() {
        let mut mean = Ewma::default();
        mean.observe(100.0, Time(0), Duration::from_secs(10));
        mean.observe(0.0, Time(10_000_000_000), Duration::from_secs(10));
        assert!((mean.value().expect("sampled") - 100.0 / std::f32::consts::E).abs() < 0.01);
    }

    #[test]
    fn a_burst_at_one_instant_does_not_move_it_and_nan_never_does() {
        let mut mean = Ewma::default();
        mean.observe(10.0, Time(5), Duration::from_secs(1));
        for _ in 0..1000 {
            mean.observe(999.0, Time(5), Duration::from_secs(1));
            mean.observe(f32::NAN, Time(900), Duration::from_secs(1));
        }
        assert_eq!(mean.value(), Some(10.0));
    }
}
