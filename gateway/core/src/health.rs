//! Active health: probe results, judged by thresholds each way so that one lost probe moves no traffic.

/// How many results in a row change the judgement.
#[derive(Clone, Copy, Debug)]
pub struct Thresholds {
    /// Successes that make an unhealthy endpoint healthy.
    pub healthy: u32,
    /// Failures that make a healthy endpoint unhealthy.
    pub unhealthy: u32,
}

/// What the probes say of one endpoint.
#[derive(Clone, Copy, Debug, Default)]
pub struct Health {
    healthy: bool,
    /// Results in a row that disagree with `healthy`.
    against: u32,
    /// It has been healthy before.
    known: bool,
}

impl Health {
    /// Whether the probes find it ready. Not before the first success.
    pub fn is_healthy(&self) -> bool {
        self.healthy
    }

    /// It is known to be down, without waiting for the threshold: it has to earn its return like any other.
    pub fn condemn(&mut self) {
        *self = Health { healthy: false, against: 0, known: true };
    }

    /// Takes in one result. Returns the new judgement if it changed.
    ///
    /// The very first success counts at once: there is nothing better to go by, and waiting for the threshold would make
    /// every start slow. An endpoint that has failed after that has to earn it.
    pub fn observe(&mut self, success: bool, thresholds: Thresholds) -> Option<bool> {
        if success == self.healthy {
            self.against = 0;
            return None;
        }
        self.against += 1;
        let needed = if success { thresholds.healthy } else { thresholds.unhealthy };
        if self.against < needed && self.known {
            return None;
        }
        *self = Health { healthy: success, against: 0, known: true };
        Some(success)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO_THREE: Thresholds = Thresholds { healthy: 2, unhealthy: 3 };

    #[test]
    fn thresholds_hold_each_way() {
        let mut health = Health::default();
        let script = [
            (true, Some(true)), // The first ever.
            (false, None),
            (false, None),
            (true, None), // Interrupts the row.
            (false, None),
            (false, None),
            (false, Some(false)),
            (true, None),
            (false, None),
            (true, None),
            (true, Some(true)),
        ];
        for (at, (success, expected)) in script.into_iter().enumerate() {
            assert_eq!(health.observe(success, TWO_THREE), expected, "step {at}");
        }
    }

    #[test]
    fn the_condemned_are_down_at_once_and_return_by_the_threshold() {
        let mut health = Health::default();
        assert_eq!(health.observe(true, TWO_THREE), Some(true));
        health.condemn();
        assert!(!health.is_healthy());
        assert_eq!(health.observe(true, TWO_THREE), None);
        assert_eq!(health.observe(true, TWO_THREE), Some(true));
    }

    #[test]
    fn an_endpoint_that_is_still_starting_is_healthy_with_its_first_success() {
        let mut health = Health::default();
        assert_eq!(health.observe(false, TWO_THREE), None);
        assert_eq!(health.observe(true, TWO_THREE), Some(true));
    }
}
