//! Open-loop arrivals: when requests are meant to start, decided beforehand and whatever the answers do.
//!
//! Latency is counted from there. A load generator that waits for an answer before it sends the next request does not see
//! the requests that it failed to send meanwhile ("coordinated omission", Tene, 2013).

use std::time::Duration;

/// The times at which requests are meant to start, from the beginning of the run, in order.
///
/// Poisson arrivals: the gaps are exponential, as those of many clients that know nothing of each other. `seed` makes them
/// the same again.
pub fn poisson(rate: f64, length: Duration, seed: u64) -> Vec<Duration> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut at = 0.0;
    let mut arrivals = Vec::with_capacity((rate * length.as_secs_f64()) as usize);
    loop {
        // `f64` gives zero too, whose logarithm is no gap.
        at -= (1.0 - random.f64()).ln() / rate;
        if at >= length.as_secs_f64() {
            return arrivals;
        }
        arrivals.push(Duration::from_secs_f64(at));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept_and_the_seed_decides() {
        let arrivals = poisson(500.0, Duration::from_secs(20), 7);
        assert!((9_600..10_400).contains(&arrivals.len()), "{}", arrivals.len());
        assert!(arrivals.windows(2).all(|pair| pair[0] <= pair[1]));
        assert_eq!(arrivals, poisson(500.0, Duration::from_secs(20), 7));
        assert_ne!(arrivals, poisson(500.0, Duration::from_secs(20), 8));
    }
}
