//! How much a region takes, and in which order regions are asked.

use std::time::{Duration, Instant};

use http::StatusCode;
use serde_json::Value;

use crate::faulty::{Faulty, Mode};
use crate::world::{Ask, BRAZIL, GERMANY, JAPAN, Plan, World};

/// A world whose eu-west is a slow server, with these limits.
async fn limited(name: &str, limits: &str, gateway: &str) -> (World, Faulty) {
    let faulty = Faulty::start("eu-west").await;
    let plan = Plan { endpoints: [("eu-west", faulty.endpoint())].into(), gateway: gateway.into(), ..Plan::default() };
    let world = World::start(name, plan).await;
    let file = world.region_file("eu-west");
    let text = std::fs::read_to_string(&file).expect("a region file");
    world.replace(&file, &format!("{limits}\n{text}"));
    world
        .until("the limits are in force", async |world| {
            let regions = world.regions().await?;
            let eu = regions.as_array()?.iter().find(|region| region["region"] == "eu-west")?.clone();
            eu["hard_limit"].is_number().then_some(())
        })
        .await;
    faulty.set(Mode::Slow);
    (world, faulty)
}

/// A request that is under way at eu-west.
async fn under_way(world: &World, ask: Ask<'static>) -> tokio::task::JoinHandle<(StatusCode, String)> {
    let destination = world.destination(false);
    let asking = tokio::spawn(async move {
        let mut connection = destination.connect().await.expect("connects");
        let answer = connection.send(ask.request()).await.expect("an answer");
        (answer.status, answer.header("isochrone-region").to_owned())
    });
    world
        .until("it is under way", async |world| {
            let regions = world.regions().await?;
            let eu = regions.as_array()?.iter().find(|region| region["region"] == "eu-west")?.clone();
            (eu["in_flight"] == 1).then_some(())
        })
        .await;
    asking
}

const PATIENT: &str = "[stall]\nslow_unknown = \"60s\"\n";

#[tokio::test]
async fn beyond_the_soft_limit_the_next_region_helps() {
    let (world, _faulty) = limited("soft", "soft_limit = 1\nhard_limit = 5", PATIENT).await;
    let first = under_way(&world, Ask::from(GERMANY)).await;
    let second = world.ask(Ask::from(GERMANY)).await;
    assert_eq!((second.status, second.header("isochrone-region")), (StatusCode::OK, "us-east"));
    assert!(second.header("isochrone-reason").contains("eu-west is over its soft limit"));
    assert_eq!(first.await.expect("no panic"), (StatusCode::OK, "eu-west".to_owned()));
    // The load fell with the end of the answer.
    let third = world.ask(Ask::from(GERMANY)).await;
    assert_eq!(third.header("isochrone-region"), "eu-west");
}

#[tokio::test]
async fn at_the_hard_limit_a_request_with_nowhere_else_waits_a_moment_and_is_refused() {
    let (world, _faulty) = limited("hard", "hard_limit = 1", PATIENT).await;
    let walled = Ask { tenant: "demo-eu", ..Ask::default() };
    let first = under_way(&world, walled.clone()).await;
    let since = Instant::now();
    let second = world.ask(walled.clone()).await;
    assert_eq!((second.status, second.header("retry-after")), (StatusCode::SERVICE_UNAVAILABLE, "1"));
    assert!(since.elapsed() >= Duration::from_millis(100), "{:?}", since.elapsed());
    assert_eq!(first.await.expect("no panic"), (StatusCode::OK, "eu-west".to_owned()));
}

#[tokio::test]
async fn a_request_that_waits_is_served_when_another_has_ended() {
    let gateway = format!("{PATIENT}[capacity]\nqueue_wait = \"10s\"\nqueue = 1\n");
    let (world, _faulty) = limited("queue", "hard_limit = 1", &gateway).await;
    let walled = |timeout: &str| Ask {
        tenant: "demo-eu",
        headers: vec![("x-request-timeout-ms", timeout.to_owned())],
        ..Ask::default()
    };
    let first = under_way(&world, walled("20000")).await;
    let (second, third) = (walled("20000"), walled("9000"));
    let (second, third) = tokio::join!(world.ask(second), world.ask(third));
    // One place to wait: the nearer deadline is shed, whichever came first.
    assert_eq!((second.status, second.header("isochrone-region")), (StatusCode::OK, "eu-west"));
    assert_eq!(third.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(first.await.expect("no panic").0, StatusCode::OK);
    let metrics = world.admin_text("/metrics").await.expect("metrics");
    assert!(String::from_utf8_lossy(&metrics).contains("isochrone_queue_shed_total 1"));
}

#[tokio::test]
async fn pools_are_an_order_by_continent_and_routes_have_policies_of_their_own() {
    let gateway = "[[steering.pools]]\ncontinents = [\"europe\"]\nregions = [\"ap-northeast\", \"eu-west\"]\n\
                   [[routes]]\ntenants = [\"demo\"]\npolicy = \"pools\"\n";
    let mut world = World::start("pools", Plan { gateway: gateway.into(), ..Plan::default() }).await;
    for (from, region) in [(GERMANY, "ap-northeast"), (BRAZIL, "us-east"), (JAPAN, "ap-northeast")] {
        let answer = world.ask(Ask::from(from)).await;
        assert_eq!(answer.header("isochrone-region"), region, "{}", answer.header("isochrone-reason"));
        assert!(answer.header("isochrone-reason").starts_with("pools "));
    }
    // Another tenant takes another route.
    let walled = world.ask(Ask { tenant: "demo-eu", ..Ask::default() }).await;
    assert!(walled.header("isochrone-reason").starts_with("nearest eu-west"), "{}", walled.header("isochrone-reason"));
    world.workers.get_mut("ap-northeast").expect("started").kill();
    world
        .until("the second of the pool has it", async |world| {
            (world.ask(Ask::from(GERMANY)).await.header("isochrone-region") == "eu-west").then_some(())
        })
        .await;
}

#[tokio::test]
async fn what_a_worker_reports_of_its_load_is_heard() {
    let world = World::start("report", Plan::default()).await;
    assert_eq!(world.ask(Ask::from(GERMANY)).await.header("isochrone-region"), "eu-west");
    let regions = world.regions().await.expect("regions");
    let of = |name: &str| -> Value {
        let region = regions.as_array().expect("a list").iter().find(|region| region["region"] == name);
        region.expect("there")["endpoints"][0]["reported"].clone()
    };
    assert_eq!(of("eu-west")["queue_depth"], 0);
    // Nobody asked that one but the probes, which hear it too.
    assert_eq!(of("us-east")["in_flight"], 0);
}

#[tokio::test]
async fn a_version_is_looked_for_where_it_is_declared() {
    let world = World::start("version", Plan::default()).await;
    for (region, versions) in [("eu-west", "\"9\""), ("us-east", "\"1\""), ("ap-northeast", "\"1\", \"2\"")] {
        let file = world.region_file(region);
        let text = std::fs::read_to_string(&file).expect("a region file");
        world.replace(&file, &text.replace("[models.tiny]", &format!("[models.tiny]\nversions = [{versions}]")));
    }
    let ask = |version: &str, tenant| Ask {
        path: Box::leak(format!("/v2/models/tiny/versions/{version}/infer").into_boxed_str()),
        tenant,
        ..Ask::default()
    };
    world
        .until("versions count", async |world| {
            (world.ask(ask("1", "demo")).await.header("isochrone-region") == "us-east").then_some(())
        })
        .await;
    // Declared by nobody; declared, but not where this tenant may go.
    assert_eq!(world.ask(ask("7", "demo")).await.status, StatusCode::NOT_FOUND);
    assert_eq!(world.ask(ask("1", "demo-eu")).await.status, StatusCode::UNAVAILABLE_FOR_LEGAL_REASONS);
    // Without a version the nearest that has the model.
    assert_eq!(world.ask(Ask::from(GERMANY)).await.header("isochrone-region"), "eu-west");
}
