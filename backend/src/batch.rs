//! Which of the waiting requests are computed next, and when. No clock, no threads: what is decided is tested alone.

use std::time::{Duration, Instant};

/// A request that waits, as far as it matters here.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Waiting {
    /// Rows that it brings.
    pub(crate) rows: usize,
    /// What it costs to compute: tokens of texts, else rows.
    pub(crate) cost: usize,
    /// Only requests of equal class can be computed together: their tensors differ along the first dimension alone.
    pub(crate) class: u64,
    /// When it came.
    pub(crate) since: Instant,
    /// When nobody waits for it any more.
    pub(crate) deadline: Option<Instant>,
}

/// The bounds of a batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Policy {
    /// Rows at most, but for a request that has more by itself.
    pub(crate) rows_max: usize,
    /// Cost at most, likewise.
    pub(crate) cost_max: usize,
    /// The longest wait for company.
    pub(crate) delay: Duration,
}

/// What to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Nothing until then, or until another request comes.
    Wait(Option<Instant>),
    /// Compute so many of the first in the queue together.
    Take(usize),
}

/// Decides over the queue, oldest first. `idle` instances could compute now, the one that asks among them.
///
/// A batch is always the front of the queue: requests are computed in the order in which they came, so none can be
/// overtaken for ever. With several instances idle, what waits is shared among them.
pub(crate) fn decide(
    queue: impl Iterator<Item = Waiting> + Clone,
    policy: Policy,
    idle: usize,
    now: Instant,
) -> Decision {
    let mut front = queue.clone();
    let Some(first) = front.next() else { return Decision::Wait(None) };
    let all_rows = queue.map(|waiting| waiting.rows).fold(0, usize::saturating_add);
    let share = all_rows.div_ceil(idle.max(1));
    let (mut count, mut rows, mut cost) = (1, first.rows, first.cost);
    let mut due = due(&first, policy.delay);
    let mut full = rows >= policy.rows_max || cost >= policy.cost_max;
    for next in front {
        let fits = next.class == first.class
            && rows.saturating_add(next.rows) <= policy.rows_max
            && cost.saturating_add(next.cost) <= policy.cost_max;
        if full || !fits {
            // Nobody who comes later could go along.
            full = true;
            break;
        }
        due = due.min(self::due(&next, policy.delay));
        if rows >= share {
            // Another idle instance takes the rest.
            break;
        }
        count += 1;
        rows += next.rows;
        cost += next.cost;
    }
    if full || all_rows >= policy.rows_max || cost >= policy.cost_max || due <= now {
        Decision::Take(count)
    } else {
        Decision::Wait(Some(due))
    }
}

/// When a request has waited enough for company: after the delay, or as long before its deadline.
fn due(waiting: &Waiting, delay: Duration) -> Instant {
    let waited = waiting.since + delay;
    match waiting.deadline.and_then(|deadline| deadline.checked_sub(delay)) {
        Some(early) => waited.min(early.max(waiting.since)),
        None => waited,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const POLICY: Policy = Policy { rows_max: 4, cost_max: 100, delay: Duration::from_millis(10) };

    fn waiting(since: Instant, rows: usize, cost: usize) -> Waiting {
        Waiting { rows, cost, class: 0, since, deadline: None }
    }

    fn decided(queue: &[Waiting], idle: usize, now: Instant) -> Decision {
        decide(queue.iter().copied(), POLICY, idle, now)
    }

    #[test]
    fn a_lone_request_waits_for_company_and_no_longer() {
        let began = Instant::now();
        let queue = [waiting(began, 1, 1)];
        assert_eq!(decided(&[], 1, began), Decision::Wait(None));
        assert_eq!(decided(&queue, 1, began), Decision::Wait(Some(began + POLICY.delay)));
        assert_eq!(decided(&queue, 1, began + POLICY.delay), Decision::Take(1));
    }

    #[test]
    fn a_full_batch_goes_at_once() {
        let began = Instant::now();
        let four = [waiting(began, 1, 1); 4];
        assert_eq!(decided(&four, 1, began), Decision::Take(4));
        assert_eq!(decided(&[waiting(began, 3, 1), waiting(began, 2, 1)], 1, began), Decision::Take(1));
        assert_eq!(decided(&[waiting(began, 1, 60), waiting(began, 1, 60)], 1, began), Decision::Take(1));
        assert_eq!(decided(&[waiting(began, 9, 900)], 1, began), Decision::Take(1));
        let other = Waiting { class: 1, ..waiting(began, 1, 1) };
        assert_eq!(decided(&[waiting(began, 1, 1), other], 1, began), Decision::Take(1));
    }

    #[test]
    fn a_close_deadline_is_not_waited_out() {
        let began = Instant::now();
        let soon = Waiting { deadline: Some(began + Duration::from_millis(12)), ..waiting(began, 1, 1) };
        assert_eq!(decided(&[soon], 1, began), Decision::Wait(Some(began + Duration::from_millis(2))));
        let close = Waiting { deadline: Some(began + Duration::from_millis(3)), ..soon };
        assert_eq!(decided(&[waiting(began, 1, 1), close], 1, began), Decision::Take(2));
    }

    #[test]
    fn a_close_deadline_counts_beyond_the_share() {
        let began = Instant::now();
        let close = Waiting { deadline: Some(began + Duration::from_millis(3)), ..waiting(began, 1, 1) };
        assert_eq!(decided(&[waiting(began, 1, 1), close], 2, began), Decision::Take(1));
        assert_eq!(decided(&[waiting(began, 1, 1); 4], 2, began), Decision::Take(2), "a full batch, shared");
    }

    #[test]
    fn idle_instances_share_what_waits() {
        let began = Instant::now() - POLICY.delay;
        assert_eq!(decided(&[waiting(began, 1, 1); 2], 2, began + POLICY.delay), Decision::Take(1));
        assert_eq!(decided(&[waiting(began, 1, 1); 3], 2, began + POLICY.delay), Decision::Take(2));
    }

    proptest! {
        /// Whatever waits: batches keep their bounds and the order, and nobody is left for ever.
        #[test]
        fn everything_is_taken_once_in_order_within_the_bounds(
            jobs in prop::collection::vec((1_usize..7, 1_usize..150, 0_u64..2, prop::option::of(0_u64..40)), 0..40),
            idle in 1_usize..4,
        ) {
            let began = Instant::now();
            let mut queue: Vec<Waiting> = jobs
                .iter()
                .map(|&(rows, cost, class, deadline)| {
                    let deadline = deadline.map(|ms| began + Duration::from_millis(ms));
                    Waiting { rows, cost, class, since: began, deadline }
                })
                .collect();
            let mut now = began;
            while !queue.is_empty() {
                match decided(&queue, idle, now) {
                    Decision::Wait(until) => {
                        let until = until.expect("something waits");
                        prop_assert!(until > now && until <= began + POLICY.delay, "the wait is bounded");
                        now = until;
                    }
                    Decision::Take(count) => {
                        let batch: Vec<Waiting> = queue.drain(..count).collect();
                        prop_assert!(count >= 1);
                        prop_assert!(batch.iter().all(|job| job.class == batch[0].class));
                        let (rows, cost): (usize, usize) =
                            (batch.iter().map(|job| job.rows).sum(), batch.iter().map(|job| job.cost).sum());
                        prop_assert!(count == 1 || (rows <= POLICY.rows_max && cost <= POLICY.cost_max));
                    }
                }
            }
        }
    }
}
