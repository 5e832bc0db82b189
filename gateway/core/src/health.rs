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
    probed: bool,
}

impl Health {
    /// Whether the probes find it ready. Not before the first success.
    pub fn is_healthy(&self) -> bool {
        self.healthy
    }

    /// Takes in one result. Returns the new judgement if it changed.
    ///
    /// The very first success counts at once: a gateway that has just started has nothing better to go by, and waiting
    /// for the threshold would make every start slow.
    pub fn observe(&mut self, success: bool, thresholds: Thresholds) -> Option<bool> {
        let first = !std::mem::replace(&mut self.probed, true);
        if success == self.healthy {
            self.against = 0;
            return None;
        }
        self.against += 1;
        let needed = if success { thresholds.healthy } else { thresholds.unhealthy };
        if self.against < needed && !(first && success) {
            return None;
        }
        *self = Health { healthy: success, against: 0, probed: true };
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
    fn an_endpoint_that_began_by_failing_needs_the_whole_threshold() {
        let mut health = Health::default();
        assert_eq!(health.observe(false, TWO_THREE), None);
        assert_eq!(health.observe(true, TWO_THREE), None);
        assert_eq!(health.observe(true, TWO_THREE), Some(true));
    }
}
