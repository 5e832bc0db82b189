//! Waiting for an answer, and making sure meanwhile that the endpoint lives.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;

use isochrone_core::stall::Rules;
use tokio::time::{Instant, timeout_at};

use super::Failure;
use crate::app::Core;
use crate::endpoint::Endpoint;

/// Waits for `sent` until the deadline. With `rules`, an endpoint that is silent is asked for its health in between, and
/// given up if it does not answer while there is an `elsewhere`: a client with nowhere else to go loses nothing by waiting.
///
/// # Errors
/// [`Failure::Deadline`] or [`Failure::Hung`].
pub(super) async fn watched<T>(
    core: &Core,
    endpoint: &Arc<Endpoint>,
    rules: Option<Rules>,
    deadline: Instant,
    elsewhere: impl Fn() -> bool,
    sent: impl Future<Output = T>,
) -> Result<T, Failure> {
    let mut sent = pin!(sent);
    let Some(rules) = rules.map(|rules| rules.at_distance(endpoint.round_trip_ms())) else {
        return timeout_at(deadline, sent).await.map_err(|_| Failure::Deadline);
    };
    let (mut wait, mut since) = (rules.silence, core.now());
    loop {
        // One timer at a time: the usual request ends within the first.
        let until = deadline.min(Instant::now() + wait);
        if let Ok(answer) = timeout_at(until, &mut sent).await {
            return Ok(answer);
        }
        if until == deadline {
            return Err(Failure::Deadline);
        }
        let alive = tokio::select! {
            biased;
            answer = &mut sent => return Ok(answer),
            alive = endpoint.is_alive(core, since, rules.answer) => alive,
        };
        if !alive && elsewhere() {
            return Err(Failure::Hung);
        }
        (wait, since) = (rules.again, core.now());
    }
}
