//! Faults at a steady 500 requests a second: what clients see of them is nothing.
//!
//! Numbers in brackets are rows of the project's list of faults. The tests run one after the other: two of them at once
//! would measure each other.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode};
use isochrone_loadtest::clients::{WORLD, WorldClient};
use isochrone_loadtest::report::Report;
use isochrone_loadtest::run;
use tokio::sync::{Mutex, MutexGuard};

use crate::faulty::{Faulty, Mode};
use crate::world::{Ask, GERMANY, Plan, Process, World, binary, secrets, tiny_body};

pub async fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::const_new(());
    ALONE.lock().await
}

const RATE: f64 = 500.0;
const LENGTH: Duration = Duration::from_secs(6);
const STRUCK: Duration = Duration::from_millis(1500);
const HEALED: Duration = Duration::from_millis(3500);

fn load(world: &World, tenant: &str, id: Option<&'static str>, rate: f64, length: Duration) -> run::Plan {
    let mut headers = HeaderMap::new();
    let key = format!("Bearer {}", secrets().keys[tenant]);
    headers.insert("authorization", HeaderValue::try_from(key).expect("a value"));
    headers.insert("content-type", HeaderValue::from_static("application/json"));
    if let Some(id) = id {
        headers.insert("x-request-id", HeaderValue::from_static(id));
    }
    let germans: Vec<WorldClient> = WORLD.into_iter().filter(|client| client.country == "DE").collect();
    run::Plan {
        destination: world.destination(false),
        path: "/v2/models/tiny/infer".into(),
        headers,
        body: Bytes::from(tiny_body()),
        clients: germans,
        rate,
        length,
        connections: 64,
        timeout: Duration::from_secs(20),
        seed: 7,
    }
}

/// Load while something is done to the world.
async fn under_load(world: &mut World, strike: impl FnOnce(&mut World), heal: impl FnOnce(&mut World)) -> Report {
    let running = tokio::spawn(run::run(load(world, "demo", None, RATE, LENGTH), |_| {}));
    // From when it flows, however long a busy machine takes to begin.
    world
        .until("the load flows", async |world| {
            let metrics = String::from_utf8(world.admin_text("/metrics").await?.to_vec()).ok()?;
            (count(&metrics, "ok") > 100).then_some(())
        })
        .await;
    tokio::time::sleep(STRUCK).await;
    strike(world);
    tokio::time::sleep(HEALED - STRUCK).await;
    heal(world);
    running.await.expect("no panic").expect("a report")
}

/// No client saw anything, and it did not cost more than a fifth of attempts.
async fn unseen(world: &World, report: &Report) -> String {
    assert_eq!(report.errors, 0, "{report:?}");
    assert!(report.ended > 2_500, "{report:?}");
    let metrics = world.admin_text("/metrics").await.expect("metrics");
    let metrics = String::from_utf8(metrics.to_vec()).expect("text");
    let attempts: u64 = counts(&metrics, "isochrone_attempts_total", "").map(|(_, count)| count).sum();
    let ratio = attempts as f64 / report.ended as f64;
    assert!(ratio <= 1.2, "{ratio} attempts a request");
    eprintln!("{ratio:.3} attempts a request, the longest took {} ms", report.latency_ms["max"]);
    metrics
}

fn counts<'m>(metrics: &'m str, name: &'m str, label: &'m str) -> impl Iterator<Item = (&'m str, u64)> {
    let lines = metrics.lines().filter(move |line| line.starts_with(name) && line.contains(label));
    lines.filter_map(|line| line.rsplit_once(' ')).filter_map(|(name, count)| Some((name, count.parse().ok()?)))
}

fn count(metrics: &str, outcome: &str) -> u64 {
    let label = format!("region=\"eu-west\",outcome=\"{outcome}\"");
    counts(metrics, "isochrone_attempts_total", &label).map(|(_, count)| count).sum()
}

async fn in_use_again(world: &World) {
    let since = Instant::now();
    world
        .until("eu-west is in use again", async |world| {
            (world.ask(Ask::from(GERMANY)).await.header("isochrone-region") == "eu-west").then_some(())
        })
        .await;
    // It has been back for 2.5 s when the load ends; slow start takes its clients back within 5 s.
    assert!(since.elapsed() < Duration::from_secs(10), "{:?}", since.elapsed());
}

/// When a log line was written, in seconds of its hour.
fn seconds(line: &str) -> f64 {
    let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
    let time = line["timestamp"].as_str().expect("a time");
    let (minutes, seconds) = (&time[14..16], time[17..].trim_end_matches('Z'));
    minutes.parse::<f64>().expect("minutes") * 60.0 + seconds.parse::<f64>().expect("seconds")
}

/// [1]
#[tokio::test]
async fn a_kill_under_load_is_not_seen() {
    let _alone = alone().await;
    let mut world = World::start("fault-kill", Plan::default()).await;
    let kill = |world: &mut World| world.workers.get_mut("eu-west").expect("started").kill();
    let report = under_load(&mut world, kill, |world| world.start_worker("eu-west")).await;
    let metrics = unseen(&world, &report).await;
    assert!(count(&metrics, "connect_failed") + count(&metrics, "reset") >= 3, "{metrics}");
    // Three failures and it is out: what fails after those was on its way already.
    let log = world.gateway.as_ref().expect("started").log();
    let failed: Vec<f64> = log.lines().filter(|line| line.contains("attempt failed")).map(seconds).collect();
    let spread = failed.iter().copied().fold(f64::MIN, f64::max) - failed.iter().copied().fold(f64::MAX, f64::min);
    // The turn of an hour may lie between them.
    assert!(spread.min(3600.0 - spread) < 0.5, "{} attempts failed over {spread} s", failed.len());
    in_use_again(&world).await;
}

/// [2]
#[tokio::test]
async fn a_hang_under_load_is_not_seen() {
    let _alone = alone().await;
    let mut world = World::start("fault-hang", Plan::default()).await;
    let stop = |world: &mut World| world.workers["eu-west"].signal("STOP");
    let report = under_load(&mut world, stop, |world| world.workers["eu-west"].signal("CONT")).await;
    let metrics = unseen(&world, &report).await;
    assert!(count(&metrics, "hung") > 0, "{metrics}");
    assert!(report.latency_ms["max"] < 2_000.0, "{report:?}");
    in_use_again(&world).await;
}

async fn faulty(name: &str, region: &'static str) -> (World, Faulty) {
    let faulty = Faulty::start(region).await;
    let plan = Plan { endpoints: [(region, faulty.endpoint())].into(), ..Plan::default() };
    (World::start(name, plan).await, faulty)
}

/// [6], [7]: half of an answer is no answer, and is had elsewhere while the client has not seen any of it.
#[tokio::test]
async fn answers_that_break_off_in_the_middle_are_not_seen() {
    let _alone = alone().await;
    let (mut world, faulty) = faulty("fault-half", "eu-west").await;
    let report = under_load(&mut world, |_| faulty.set(Mode::HalfAnswer), |_| faulty.set(Mode::Well)).await;
    let metrics = unseen(&world, &report).await;
    let broken = count(&metrics, "broken");
    assert!((1..=40).contains(&broken), "{broken}");
    in_use_again(&world).await;
}

/// [2], [5]
#[tokio::test]
async fn a_worker_that_accepts_and_is_silent_is_not_seen() {
    let _alone = alone().await;
    let (mut world, faulty) = faulty("fault-silent", "eu-west").await;
    let report = under_load(&mut world, |_| faulty.set(Mode::Silent), |_| faulty.set(Mode::Well)).await;
    let metrics = unseen(&world, &report).await;
    assert!(count(&metrics, "hung") > 0, "{metrics}");
    in_use_again(&world).await;
}

/// Overload steers: the rest of the traffic goes elsewhere, and nobody is ejected.
#[tokio::test]
async fn a_worker_that_answers_503_is_not_seen() {
    let _alone = alone().await;
    let (mut world, faulty) = faulty("fault-503", "eu-west").await;
    let report = under_load(&mut world, |_| faulty.set(Mode::Overloaded), |_| faulty.set(Mode::Well)).await;
    let metrics = unseen(&world, &report).await;
    assert!((5..=60).contains(&count(&metrics, "unavailable")), "{metrics}");
    let log = world.gateway.as_ref().expect("started").log();
    assert!(log.contains("endpoint overloaded") && !log.contains("endpoint ejected"), "{log}");
    in_use_again(&world).await;
}

/// A query of death does not walk the world, and costs nobody else anything.
#[tokio::test]
async fn a_request_that_kills_is_stopped_after_two_and_refused_when_it_comes_again() {
    let _alone = alone().await;
    let [eu, us] = [Faulty::start("eu-west").await, Faulty::start("us-east").await];
    let endpoints = [("eu-west", eu.endpoint()), ("us-east", us.endpoint())];
    let mut world = World::start("fault-poison", Plan { endpoints: endpoints.into(), ..Plan::default() }).await;
    let running = tokio::spawn(run::run(load(&world, "demo", None, RATE, Duration::from_secs(3)), |_| {}));
    tokio::time::sleep(Duration::from_secs(1)).await;
    let poison = Ask { body: tiny_body().replacen('{', r#"{"id":"poison","#, 1), ..Ask::default() };
    let answer = world.ask(poison.clone()).await;
    assert_eq!((answer.status, answer.header("isochrone-attempts")), (StatusCode::BAD_GATEWAY, "2"));
    let again = world.ask(poison.clone()).await;
    assert_eq!((again.status, again.header("isochrone-attempts")), (StatusCode::BAD_GATEWAY, ""));
    // Another tenant's equal request is its own: nobody can have somebody else's refused.
    let other = world.ask(Ask { tenant: "demo-eu", ..poison.clone() }).await;
    assert_eq!((other.status, other.header("isochrone-attempts")), (StatusCode::BAD_GATEWAY, "1"));
    let report = running.await.expect("no panic").expect("a report");
    assert_eq!(report.errors, 0, "{report:?}");
    assert!(!world.workers["ap-northeast"].log().contains("poison"));
    let metrics = world.admin_text("/metrics").await.expect("metrics");
    let metrics = String::from_utf8(metrics.to_vec()).expect("text");
    assert!(metrics.contains("isochrone_queries_of_death_total 1"), "{metrics}");
    assert!(metrics.contains("isochrone_queries_of_death_refused_total 1"), "{metrics}");
    let log = world.gateway.as_ref().expect("started").log();
    assert!(log.contains("query of death"), "{log}");
    // After a second the next is let through, as a trial, and one more death is enough.
    world
        .until("the trial", async |world| {
            let trial = world.ask(poison.clone()).await;
            assert_eq!(trial.status, StatusCode::BAD_GATEWAY);
            (trial.header("isochrone-attempts") == "1").then_some(())
        })
        .await;
    assert_eq!(world.ask(poison.clone()).await.header("isochrone-attempts"), "");
    world.gateway.as_mut().expect("started").terminate();
}

/// A machine with all of a region's workers is lost while a popular request is in flight there: nobody takes that for a
/// query of death.
#[tokio::test]
async fn a_lost_machine_is_not_seen_and_poisons_nobody() {
    let _alone = alone().await;
    let mut world = World::start("fault-machine", Plan::default()).await;
    let mut second = with_a_second_endpoint(&world).await;
    let kill = |world: &mut World| {
        second.signal("KILL");
        world.workers.get_mut("eu-west").expect("started").kill();
        second.kill();
    };
    let report = under_load(&mut world, kill, |world| world.start_worker("eu-west")).await;
    let metrics = unseen(&world, &report).await;
    assert!(metrics.contains("isochrone_queries_of_death_refused_total 0"), "{metrics}");
}

/// A slow worker is told from a hung one: it keeps its work, and the client is answered by another that is quicker.
#[tokio::test]
async fn beside_a_slow_answer_another_is_asked_for() {
    let _alone = alone().await;
    let faulty = Faulty::start("eu-west").await;
    let plan = Plan {
        endpoints: [("eu-west", faulty.endpoint())].into(),
        gateway: "[stall]\nslow_unknown = \"300ms\"\n".into(),
        ..Plan::default()
    };
    let world = World::start("slow", plan).await;
    faulty.set(Mode::Slow);
    let since = Instant::now();
    let answer = world.ask(Ask::from(GERMANY)).await;
    assert!(since.elapsed() < Duration::from_millis(1400), "{:?}", since.elapsed());
    assert_eq!((answer.status, answer.header("isochrone-region")), (StatusCode::OK, "us-east"));
    assert!(answer.header("isochrone-reason").contains("beside slow eu-west"), "{}", answer.header("isochrone-reason"));
    let regions = world.regions().await.expect("regions");
    let eu = regions.as_array().expect("a list").iter().find(|region| region["region"] == "eu-west").expect("there");
    assert_eq!(eu["endpoints"][0]["healthy"], true, "slow is not hung");
    // The loser is cancelled: nothing is left in flight.
    world
        .until("the loser is gone", async |world| {
            let regions = world.regions().await?.to_string();
            (!regions.contains("\"in_flight\":1")).then_some(())
        })
        .await;
}

/// Hedges, where they are asked for: the tail is cut, within their share.
#[tokio::test]
async fn a_hedge_answers_first_where_the_first_is_late() {
    let _alone = alone().await;
    let faulty = Faulty::start("eu-west").await;
    let route = "[[routes]]\nmodels = [\"tiny\"]\nhedge = { floor = \"20ms\", ceiling = \"60ms\", share = 0.05 }\n";
    let plan = Plan { endpoints: [("eu-west", faulty.endpoint())].into(), gateway: route.into(), ..Plan::default() };
    let world = World::start("hedge", plan).await;
    // Requests that earn the share.
    for _ in 0..40 {
        assert_eq!(world.ask(Ask::from(GERMANY)).await.header("isochrone-attempts"), "1");
    }
    faulty.set(Mode::Slow);
    let since = Instant::now();
    let answer = world.ask(Ask::from(GERMANY)).await;
    assert!(since.elapsed() < Duration::from_millis(1000), "{:?}", since.elapsed());
    assert!(answer.header("isochrone-reason").contains("hedge of eu-west"), "{}", answer.header("isochrone-reason"));
    // Two of 41, and no third.
    let reasons = [world.ask(Ask::from(GERMANY)).await, world.ask(Ask::from(GERMANY)).await];
    let hedged = reasons.iter().filter(|answer| answer.header("isochrone-reason").contains("hedge")).count();
    assert!(hedged <= 1, "{hedged} more hedges of 43 requests");
}

/// A stream says that it broke off; it never ends as if it were whole.
#[tokio::test]
async fn a_stream_that_breaks_off_says_so_in_its_own_words() {
    let faulty = Faulty::start("eu-west").await;
    let plan = Plan { endpoints: [("eu-west", faulty.endpoint())].into(), ..Plan::default() };
    let world = World::start("stream", plan).await;
    faulty.set(Mode::BrokenEvents);
    let body = r#"{"model":"tiny","stream":true,"messages":[]}"#.to_owned();
    let answer = world.ask(Ask { path: "/v1/chat/completions", body, ..Ask::default() }).await;
    let text = String::from_utf8(answer.body.to_vec()).expect("text");
    assert_eq!(answer.status, StatusCode::OK);
    let last = text.trim_end().rsplit("\n\n").next().expect("events");
    let error: serde_json::Value = serde_json::from_str(last.trim_start_matches("data: ")).expect("JSON");
    assert_eq!(error["error"]["code"], "broken_response", "{text}");
    assert!(!text.contains("[DONE]"));
}

/// [36]: every endpoint that a walled tenant may use dies, hangs and returns; nobody else ever sees a request of its.
#[tokio::test]
async fn a_walled_tenant_is_seen_by_nobody_else_whatever_happens() {
    let _alone = alone().await;
    let mut world = World::start("torture", Plan::default()).await;
    let mut second = with_a_second_endpoint(&world).await;
    let length = Duration::from_secs(12);
    let walled = tokio::spawn(run::run(load(&world, "demo-eu", Some("walled"), 150.0, length), |_| {}));
    let open = tokio::spawn(run::run(load(&world, "demo", Some("open"), 150.0, length), |_| {}));
    let pause = async |ms| tokio::time::sleep(Duration::from_millis(ms)).await;
    pause(1000).await;
    world.workers.get_mut("eu-west").expect("started").kill();
    pause(1500).await;
    second.signal("STOP");
    pause(1500).await;
    world.start_worker("eu-west");
    pause(1500).await;
    world.workers["eu-west"].signal("STOP");
    pause(1000).await;
    second.signal("CONT");
    second.kill();
    pause(1000).await;
    world.workers["eu-west"].signal("CONT");
    // A reload in the middle of it.
    world.write_region("ap-northeast", true);
    second = second_worker(&world, second.1);
    let (walled, open) = (walled.await.expect("no panic"), open.await.expect("no panic"));
    let (walled, open) = (walled.expect("a report"), open.expect("a report"));
    // The others lost nothing: they may go elsewhere.
    assert_eq!(open.errors, 0, "{open:?}");
    // The walled were served or refused; nothing else.
    assert!(walled.ended > 1000 && walled.errors < walled.ended, "{walled:?}");
    assert!(walled.regions.keys().all(|region| region == "eu-west"), "{walled:?}");
    world
        .until("the zone serves again", async |world| {
            let ask = Ask { tenant: "demo-eu", headers: vec![("x-request-id", "walled-end".into())], ..Ask::default() };
            (world.ask(ask).await.status == StatusCode::OK).then_some(())
        })
        .await;
    let logs = |world: &World| format!("{}{}", world.workers["eu-west"].log(), second.log());
    world.until("the logs are written", async |world| logs(world).contains("walled-end").then_some(())).await;
    world
        .until("us-east has helped", async |world| world.workers["us-east"].log().contains("\"open\"").then_some(()))
        .await;
    for region in ["us-east", "ap-northeast"] {
        assert!(!world.workers[region].log().contains("walled"), "{region} saw a request of the walled tenant");
    }
}

/// A second worker in eu-west, once the gateway finds it healthy.
async fn with_a_second_endpoint(world: &World) -> Second {
    let second = second_worker(world, crate::world::free_port());
    let file = world.region_file("eu-west");
    let text = std::fs::read_to_string(&file).expect("a region file");
    let more = format!("[[endpoints]]\nhttp = \"http://127.0.0.1:{}\"\n[models.tiny]", second.1);
    world.replace(&file, &text.replace("[models.tiny]", &more));
    world
        .until("both endpoints are healthy", async |world| {
            let regions = world.regions().await?;
            let eu = regions.as_array()?.iter().find(|region| region["region"] == "eu-west")?.clone();
            let all = eu["endpoints"].as_array()?.clone();
            (all.len() == 2 && all.iter().all(|endpoint| endpoint["healthy"] == true)).then_some(())
        })
        .await;
    second
}

fn second_worker(world: &World, port: u16) -> Second {
    let mut command = std::process::Command::new(binary("isochrone-backend"));
    command.args(["serve", "--region", "eu-west", "--listen", &format!("127.0.0.1:{port}"), "--models"]);
    command.arg(&world.plan.models);
    Second(Process::start("eu-west-2", &mut command, &world.folder.join("eu-west-2.log")), port)
}

/// A worker beside the world's own, and its port.
struct Second(Process, u16);

impl std::ops::Deref for Second {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.0
    }
}

impl std::ops::DerefMut for Second {
    fn deref_mut(&mut self) -> &mut Process {
        &mut self.0
    }
}
