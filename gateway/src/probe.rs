//! Probes: one task for each endpoint asks it whether it is ready, and measures how long that takes.

use std::collections::HashMap;
use std::sync::Arc;

use http::StatusCode;
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::app::Shared;
use crate::endpoint::{Change, Endpoint, ProbeResult};
use crate::load_report;
use crate::upstream::{self, Fault, ProbeError, REGION, Unreached};
use crate::{catalog, config};

/// The running probes, by endpoint. Dropping one's guard ends it.
pub(crate) struct Probes {
    shared: Arc<Shared>,
    ended: mpsc::Sender<String>,
    running: HashMap<Box<str>, DropGuard>,
}

impl Probes {
    /// Starts a probe for each endpoint of the snapshot in force.
    pub(crate) fn start(shared: Arc<Shared>, ended: mpsc::Sender<String>) -> Probes {
        let mut probes = Probes { shared, ended, running: HashMap::new() };
        probes.follow();
        probes
    }

    /// Ends the probes of endpoints that are gone and starts those of new ones.
    pub(crate) fn follow(&mut self) {
        let snapshot = self.shared.snapshot.load_full();
        self.running.retain(|id, _| snapshot.endpoints.iter().any(|endpoint| endpoint.config.id == *id));
        for endpoint in snapshot.endpoints.iter().filter(|endpoint| endpoint.config.http.is_some()) {
            self.running.entry(endpoint.config.id.clone()).or_insert_with(|| {
                let stop = CancellationToken::new();
                let (shared, endpoint, stopped) = (Arc::clone(&self.shared), Arc::clone(endpoint), stop.clone());
                let ended = self.ended.clone();
                let probing = tokio::spawn(async move { stopped.run_until_cancelled(probe(shared, endpoint)).await });
                tokio::spawn(async move {
                    // Told to stop is one thing; a probe that died would leave its endpoint judged for ever.
                    if let Err(error) = probing.await {
                        let _ = ended.try_send(format!("a probe ended: {error}"));
                    }
                });
                stop.drop_guard()
            });
        }
    }
}

async fn probe(shared: Arc<Shared>, endpoint: Arc<Endpoint>) {
    loop {
        let rules = shared.snapshot.load().config.probes;
        let result = tokio::time::timeout(rules.timeout, ask(&endpoint)).await;
        let silent = || Ok(ProbeResult::Silent(format!("no answer within {:?}", rules.timeout)));
        let result = match result.unwrap_or_else(|_| silent()) {
            Ok(result) => result,
            Err(why) => {
                // Not an endpoint's fault: what is known of it stays. Told each time, since it is this machine that is ill.
                tracing::error!(region = %endpoint.config.region, endpoint = endpoint.name(), why, "this gateway cannot probe");
                tokio::time::sleep(jittered(&rules)).await;
                continue;
            }
        };
        let changed = endpoint.probed(result, shared.now(), &shared.snapshot.load().config.live);
        if let Some(change) = changed {
            tell(&endpoint, &change);
        }
        let relaxation = endpoint.live.relaxation(rules.interval, rules.relaxed, shared.now());
        // A failure cuts the wait short, but no shorter than the usual one.
        let usual = jittered(&rules);
        tokio::time::sleep(usual).await;
        let _ = tokio::time::timeout(usual.mul_f32(relaxation - 1.0), endpoint.wake.notified()).await;
    }
}

/// The error is why this gateway could not even ask.
async fn ask(endpoint: &Endpoint) -> Result<ProbeResult, String> {
    Ok(match upstream::probe(endpoint).await {
        Ok((head, took, connected)) => ProbeResult::Answered {
            region: head.headers.get(REGION).and_then(|name| name.to_str().ok()).map(str::to_owned),
            ready: if head.status == StatusCode::OK { Ok(()) } else { Err(format!("it answers {}", head.status)) },
            round_trip_ms: took.as_secs_f32() * 1000.0,
            network_ms: connected.as_secs_f32() * 1000.0,
            report: load_report::parse(&head.headers),
            models: catalog::parse(&head.headers),
        },
        Err(ProbeError::Connect(Unreached { why, fault })) => match fault {
            Fault::Gone => ProbeResult::Gone(why),
            Fault::There => ProbeResult::Silent(why),
            Fault::Here => return Err(why),
        },
        Err(ProbeError::Answer(why)) => ProbeResult::Silent(why),
    })
}

/// Without jitter the probes of many gateways fall into step and arrive as one burst.
fn jittered(rules: &config::Probes) -> std::time::Duration {
    rules.interval.mul_f32(1.0 + rules.jitter * (fastrand::f32() * 2.0 - 1.0))
}

fn tell(endpoint: &Endpoint, change: &Change) {
    let (region, address) = (&endpoint.config.region, endpoint.name());
    match change {
        Change::Healthy => tracing::info!(%region, endpoint = address, "endpoint healthy"),
        Change::Unhealthy(why) => tracing::warn!(%region, endpoint = address, why, "endpoint unhealthy"),
        Change::WrongRegion(named) => {
            let named = named.as_deref().unwrap_or("none");
            tracing::error!(%region, endpoint = address, named, "the endpoint does not name its file's region; \
                it gets no request. Correct its URL, or the worker's --region");
        }
    }
}
