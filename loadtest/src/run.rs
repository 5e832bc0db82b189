//! One run: a fixed number of connections take the arrivals in turn, each at its intended time.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request};
use http_body_util::Full;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::arrival;
use crate::client::{Connection, Destination, Error};
use crate::clients::WorldClient;
use crate::report::{Report, Sample, Served};

/// What is sent, and how often.
pub struct Plan {
    /// To whom.
    pub destination: Destination,
    /// The path of each request.
    pub path: String,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Bytes,
    /// Who is played; nobody if empty.
    pub clients: Vec<WorldClient>,
    /// Intended starts a second.
    pub rate: f64,
    /// For how long.
    pub length: Duration,
    /// Connections. While all are busy, requests wait, and their latency counts.
    pub connections: usize,
    /// The longest wait for an answer.
    pub timeout: Duration,
    /// Decides the arrivals and who asks.
    pub seed: u64,
}

/// Runs it. `progress` is called about once a second with the number of requests that have ended.
///
/// # Errors
/// Nobody answers at all.
pub async fn run(plan: Plan, mut progress: impl FnMut(usize)) -> Result<Report, Error> {
    let arrivals: Arc<[Duration]> = arrival::poisson(plan.rate, plan.length, plan.seed).into();
    let plan = Arc::new(plan);
    // The first connection is opened before the clock starts: a wrong address should say so at once.
    let mut first = Some(plan.destination.connect().await?);
    let (next, ended) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let began = Instant::now();
    let mut workers = JoinSet::new();
    for _ in 0..plan.connections {
        let (plan, arrivals, next, ended) =
            (Arc::clone(&plan), Arc::clone(&arrivals), Arc::clone(&next), Arc::clone(&ended));
        let connection = first.take();
        workers.spawn(async move { work(&plan, &arrivals, &next, &ended, began, connection).await });
    }
    let mut samples = Vec::with_capacity(arrivals.len());
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    loop {
        tokio::select! {
            worker = workers.join_next() => match worker {
                Some(worker) => samples.extend(worker?),
                None => break,
            },
            _ = ticks.tick() => progress(ended.load(Relaxed)),
        }
    }
    Ok(Report::of(arrivals.len(), began.elapsed(), &samples)?)
}

async fn work(
    plan: &Plan,
    arrivals: &[Duration],
    next: &AtomicUsize,
    ended: &AtomicUsize,
    began: Instant,
    mut connection: Option<Connection>,
) -> Vec<Sample> {
    let mut samples = Vec::new();
    loop {
        let at = next.fetch_add(1, Relaxed);
        let Some(arrival) = arrivals.get(at) else { return samples };
        let intended = began + *arrival;
        tokio::time::sleep_until(intended).await;
        let client = (!plan.clients.is_empty()).then(|| {
            let mut random = fastrand::Rng::with_seed(plan.seed ^ (at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            plan.clients[random.usize(..plan.clients.len())]
        });
        let result = match tokio::time::timeout(plan.timeout, one(plan, client, &mut connection)).await {
            Ok(Ok(served)) => Ok(served),
            Ok(Err(error)) => {
                connection = None;
                Err(error.to_string())
            }
            Err(_) => {
                connection = None;
                Err("timeout".to_owned())
            }
        };
        samples.push(Sample { latency: intended.elapsed(), country: client.map(|client| client.country), result });
        ended.fetch_add(1, Relaxed);
    }
}

async fn one(plan: &Plan, client: Option<WorldClient>, slot: &mut Option<Connection>) -> Result<Served, Error> {
    let mut request = Request::new(Full::new(plan.body.clone()));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = plan.path.parse()?;
    *request.headers_mut() = plan.headers.clone();
    if let Some(client) = client {
        request.headers_mut().insert("x-forwarded-for", HeaderValue::from_static(client.address));
    }
    let connection = match slot.take_if(|connection| !connection.is_closed()) {
        Some(connection) => slot.insert(connection),
        None => slot.insert(plan.destination.connect().await?),
    };
    let answer = connection.send(request).await?;
    Ok(Served {
        status: answer.status.as_u16(),
        region: answer.header("isochrone-region").to_owned(),
        attempts: answer.header("isochrone-attempts").parse().unwrap_or(0),
    })
}
