//! Two hundred changes of the directory, good and bad, while it is in use.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Response, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use isochrone_loadtest::client::Error;
use isochrone_loadtest::clients::WORLD;
use serde_json::Value;
use tokio::task::JoinSet;

use crate::stub;
use crate::world::{Ask, Plan, World};

const CHANGES: usize = 200;
const STREAMS: usize = 10;
/// Clients that ask all the time, and how often each of them.
const CLIENTS: u64 = 16;
const PAUSE: Duration = Duration::from_millis(30);

/// What one accepted state of the directory says about where requests may go.
#[derive(Clone, Debug, Default, PartialEq)]
struct Said {
    drained: BTreeSet<&'static str>,
    /// The zone that the tenant is held to.
    walled: Option<&'static str>,
    /// Something that concerns no request.
    probes_ms: u64,
}

impl Said {
    fn permits(&self, region: &str) -> bool {
        let zones = [("eu-west", "eu"), ("us-east", "us")];
        !self.drained.contains(region)
            && zones.iter().any(|(name, zone)| *name == region && self.walled.is_none_or(|walled| walled == *zone))
    }
}

/// Serves answers that have no end until `enough`: numbers, one after the other.
async fn endless(enough: Arc<AtomicBool>) -> u16 {
    stub::serve(None, move |request: http::Request<hyper::body::Incoming>| {
        let enough = Arc::clone(&enough);
        async move {
            if request.uri().path().starts_with("/v2/health") {
                return Response::new(stub::full("{}"));
            }
            let (sender, receiver) = tokio::sync::mpsc::channel::<Result<Frame<Bytes>, Infallible>>(1);
            tokio::spawn(async move {
                let mut number = 0_u64;
                while !enough.load(Relaxed) {
                    let event = Frame::data(format!("data: {number}\n\n").into());
                    if sender.send(Ok(event)).await.is_err() {
                        return;
                    }
                    number += 1;
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                let _ = sender.send(Ok(Frame::data("data: [DONE]\n\n".into()))).await;
            });
            let events = futures_util::stream::unfold(receiver, async |mut receiver| {
                let event = receiver.recv().await?;
                Some((event, receiver))
            });
            Response::builder()
                .header("content-type", "text/event-stream")
                .body(StreamBody::new(events).boxed())
                .expect("valid")
        }
    })
    .await
}

/// Reads a stream of numbers to its end, and gives how many there were.
async fn follow(world: &World) -> impl Future<Output = Result<u64, Error>> + use<> {
    let mut connection = world.connect().await;
    let body = r#"{"model":"numbers","stream":true,"messages":[]}"#.to_owned();
    let ask = Ask { path: "/v1/chat/completions", body, ..Ask::default() };
    let answer = connection.start(ask.request()).await.expect("an answer");
    assert_eq!(answer.status(), StatusCode::OK);
    async move {
        // Held to the end: it is the connection.
        let _connection = connection;
        let text = answer.into_body().collect().await?.to_bytes();
        let text = String::from_utf8(text.to_vec())?;
        let (numbers, rest) = text.split_once("data: [DONE]\n\n").ok_or("cut")?;
        assert_eq!(rest, "");
        let count = numbers.split_terminator("\n\n").enumerate();
        Ok(count.map(|(at, event)| assert_eq!(event, format!("data: {at}"))).count() as u64)
    }
}

#[tokio::test]
async fn two_hundred_changes_under_load_fail_no_request_cut_no_stream_and_mix_no_two_states() {
    let _alone = crate::faults::alone().await;
    let enough = Arc::new(AtomicBool::new(false));
    let port = endless(Arc::clone(&enough)).await;
    let endpoint = stub::endpoint(&format!("http = \"http://127.0.0.1:{port}\""));
    let mut world =
        World::configured("storm", Plan { endpoints: [("ap-northeast", endpoint)].into(), ..Plan::default() });
    // Streams alone go there; it changes as well.
    let numbers = std::fs::read_to_string(world.region_file("ap-northeast")).expect("readable");
    world.replace(&world.region_file("ap-northeast"), &numbers.replace("[models.tiny]", "[models.numbers]"));
    let file = world.config().join("gateway.toml");
    let gateway = std::fs::read_to_string(&file).expect("readable");
    world.start_worker("eu-west");
    world.start_worker("us-east");
    world.start_gateway().await;

    let mut streams = JoinSet::new();
    for _ in 0..STREAMS {
        streams.spawn(follow(&world).await);
    }
    // The load.
    let begun = Instant::now();
    let (going, sent) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicU64::new(0)));
    let mut clients = JoinSet::new();
    for client in 0..CLIENTS {
        let (going, sent) = (Arc::clone(&going), Arc::clone(&sent));
        let destination = world.destination(client % 2 == 0);
        clients.spawn(async move {
            let mut connection = destination.connect().await?;
            let mut ticks = tokio::time::interval(PAUSE);
            while going.load(Relaxed) {
                ticks.tick().await;
                let number = sent.fetch_add(1, Relaxed);
                let from = WORLD[number as usize % WORLD.len()].address;
                let ask = Ask { headers: vec![("x-request-id", format!("storm-{number}"))], ..Ask::from(from) };
                let answer = connection.send(ask.request()).await?;
                if answer.status != StatusCode::OK {
                    return Err(format!("{number}: {answer:?}").into());
                }
            }
            Ok::<_, Error>(())
        });
    }

    let config = world.admin("/api/config").await.expect("a configuration");
    let revision = |config: &Value| config["revision"].as_str().expect("a revision").to_owned();
    let mut now = Said { probes_ms: 1_000, ..Said::default() };
    let mut states = BTreeMap::from([(revision(&config), now.clone())]);
    let mut rng = fastrand::Rng::with_seed(5);
    let (mut accepted, mut rejected, mut last) = (0, 0, revision(&config));
    let tenants = std::fs::read_to_string(world.config().join("tenants.toml")).expect("readable");
    for _ in 0..CHANGES {
        let mut next = now.clone();
        let path = match rng.u8(..4) {
            0 => {
                next.drained = if next.drained.is_empty() { BTreeSet::from(["us-east"]) } else { BTreeSet::new() };
                world.region_file("us-east")
            }
            1 => {
                next.walled = if next.walled.is_none() { Some("eu") } else { None };
                world.config().join("tenants.toml")
            }
            2 => {
                next.probes_ms = 500 + rng.u64(..1_000);
                file.clone()
            }
            // One that no request depends on.
            _ => world.region_file("ap-northeast"),
        };
        let before = std::fs::read_to_string(&path).expect("readable");
        if rng.u8(..5) < 2 {
            // A bad one: half a file, a misspelt key, nothing, a value of another kind. Then it is put back.
            let bad = match rng.u8(..4) {
                0 => before[..before.len() / 2].to_owned() + "\n[",
                1 => before.clone() + "\n[nobody.knows]\nthis = 1\n",
                2 => "\0\0\0".to_owned(),
                _ => before.replace("= [", "= 7 # ") + "\n= 3\n",
            };
            std::fs::write(&path, bad).expect("written");
            let (status, told) = world.operate("POST", "/api/reload").await;
            assert_eq!((status, revision(&told)), (StatusCode::UNPROCESSABLE_ENTITY, last.clone()), "{told}");
            rejected += 1;
            std::fs::write(&path, before).expect("written");
            continue;
        }
        let text = match path.file_stem().and_then(|stem| stem.to_str()).expect("a name") {
            "us-east" if next.drained.is_empty() => before.replace("drain = true", "drain = false"),
            "us-east" => before.replace("drain = false", "drain = true"),
            "tenants" => match next.walled {
                None => tenants.clone(),
                Some(zone) => tenants.replace(
                    "[tenants.demo]\n",
                    &format!("[tenants.demo]\nresidency = {{ require = [\"{zone}\", \"jp\"] }}\n"),
                ),
            },
            "gateway" => format!("{gateway}\n[probes]\ninterval = \"{}ms\"\n", next.probes_ms),
            _ => before.split("# ").next().unwrap_or_default().to_owned() + &format!("# {}\n", rng.u64(..)),
        };
        if rng.bool() {
            world.replace(&path, &text);
        } else {
            std::fs::write(&path, &text).expect("written");
        }
        let (status, told) = world.operate("POST", "/api/reload").await;
        assert_eq!((status, &told["rejected"]), (StatusCode::OK, &Value::Null), "{told}");
        last = revision(&told);
        let known = states.insert(last.clone(), next.clone());
        assert!(known.is_none_or(|known| known == next), "one name for two states");
        now = next;
        accepted += 1;
    }
    going.store(false, Relaxed);
    let length = begun.elapsed();
    for ended in clients.join_all().await {
        ended.expect("no request failed");
    }
    enough.store(true, Relaxed);
    for counted in streams.join_all().await {
        let counted = counted.expect("no stream was cut");
        assert!(counted > 50, "{counted}");
    }

    // Each answer is of one state: it went where that state lets it go, and most of them to the nearest such place.
    let sent = sent.load(Relaxed) as usize;
    let lines = world
        .until("every request is in the log", async |world| {
            let log = world.gateway.as_ref()?.log();
            let lines = log.lines().filter(|line| line.contains("\"request_id\":\"storm-"));
            let lines: Vec<Value> = lines.filter_map(|line| serde_json::from_str(line).ok()).collect();
            (lines.len() >= sent).then_some(lines)
        })
        .await;
    let mut seen = BTreeSet::new();
    for line in &lines {
        let (revision, region) = (line["revision"].as_str().expect("one"), line["region"].as_str().expect("one"));
        let state = states.get(revision).unwrap_or_else(|| panic!("a state that never was: {line}"));
        assert!(state.permits(region), "{state:?} does not permit {line}");
        seen.insert(revision);
    }
    let rate = sent as f64 / length.as_secs_f64();
    assert!(rate > 250.0, "{rate} requests a second are no load");
    eprintln!(
        "{accepted} accepted, {rejected} rejected, {sent} requests at {rate:.0}/s in {} of {} states",
        seen.len(),
        states.len()
    );
    assert!(accepted + rejected == CHANGES && rejected > 40 && seen.len() > 40, "{accepted} {rejected} {}", seen.len());
}
