//! Who is served where, and who is believed about where that is.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use http::{HeaderValue, Request, Response, StatusCode};
use hyper::body::Incoming;
use serde_json::Value;

use crate::stub;
use crate::world::{Ask, BRAZIL, GERMANY, JAPAN, Plan, World};

#[tokio::test]
async fn clients_are_served_by_the_region_nearest_to_them() {
    let world = World::start("steering", Plan::default()).await;
    let rows = [
        (GERMANY, "eu-west", "DE"),
        (JAPAN, "ap-northeast", "JP"),
        (BRAZIL, "us-east", "BR"),
        ("2001:638::1", "eu-west", "DE"),
        ("::ffff:133.11.0.1", "ap-northeast", "JP"),
    ];
    for http2 in [false, true] {
        let mut connection = world.destination(http2).connect().await.expect("connects");
        for (client, region, country) in rows {
            let answer = connection.send(Ask::from(client).request()).await.expect("an answer");
            assert_eq!(answer.status, StatusCode::OK, "{}", String::from_utf8_lossy(&answer.body));
            assert_eq!(answer.header("isochrone-region"), region, "{client}");
            assert_eq!(answer.header("isochrone-attempts"), "1");
            let reason = answer.header("isochrone-reason");
            assert!(reason.starts_with(&format!("nearest {region} ")), "{reason}");
            assert!(reason.contains(&format!("client {country} by city")), "{reason}");
            assert!(
                !answer.header("x-request-id").is_empty() && answer.header("server-timing").starts_with("total;dur=")
            );
            assert_eq!(answer.header("cache-status"), "isochrone; fwd=bypass");
        }
    }
}

#[tokio::test]
async fn only_a_trusted_peer_says_who_its_client_is() {
    let world = World::start("trust", Plan::default()).await;
    let url = format!("http://127.0.0.1:{}", world.untrusting);
    let untrusting = isochrone_loadtest::client::Destination::new(&url, None, false).expect("a URL");
    let answer =
        untrusting.connect().await.expect("connects").send(Ask::from(JAPAN).request()).await.expect("an answer");
    // Loopback is nowhere: steered by the probes, not to Japan for the asking.
    assert!(
        answer.header("isochrone-reason").contains("client ?? by unknown"),
        "{}",
        answer.header("isochrone-reason")
    );
    // Of a list only what the trusted proxy added counts.
    let spoofed = Ask { from: "133.11.0.1, 141.20.1.1", ..Ask::default() };
    assert_eq!(world.ask(spoofed).await.header("isochrone-region"), "eu-west");
}

#[tokio::test]
async fn credentials_decide_who_asks() {
    let world = World::start("credentials", Plan::default()).await;
    let none = world.ask(Ask { tenant: "", ..Ask::default() }).await;
    assert_eq!((none.status.as_u16(), none.header("www-authenticate")), (401, "Bearer"));
    let wrong = Ask { tenant: "", headers: vec![("authorization", "Bearer iso_demo_0000".into())], ..Ask::default() };
    assert_eq!(world.ask(wrong).await.status.as_u16(), 401);
    // The walled tenant is served in its zone, wherever it asks from.
    let walled = world.ask(Ask { tenant: "demo-eu", from: JAPAN, ..Ask::default() }).await;
    assert_eq!((walled.status.as_u16(), walled.header("isochrone-region")), (200, "eu-west"));
    let models = Ask { path: "/v1/models", body: String::new(), ..Ask::default() };
    let models: Value = serde_json::from_slice(&world.ask(models).await.body).expect("JSON");
    assert_eq!(models["data"][0]["id"], "tiny");
}

#[tokio::test]
async fn a_worker_that_names_another_region_gets_nothing() {
    // Its file says eu-west, the worker us-east: a mistyped URL.
    let mut world = World::configured("assertion", Plan::default());
    let (eu, us) = (world.worker_ports["eu-west"], world.worker_ports["us-east"]);
    world.worker_ports.insert("eu-west", us);
    world.write_region("eu-west", false);
    for region in ["ap-northeast", "us-east"] {
        world.start_worker(region);
    }
    world.spawn_gateway();
    world
        .until("the gateway is ready", async |world| {
            world.admin_text("/readyz").await.filter(|text| &text[..] == b"ready\n").map(drop)
        })
        .await;
    let walled = world
        .ask(Ask { tenant: "demo-eu", headers: vec![("x-request-id", "walled-1".into())], ..Ask::default() })
        .await;
    assert_eq!((walled.status.as_u16(), walled.header("retry-after")), (503, "1"));
    assert!(!world.workers["us-east"].log().contains("walled-1"));
    world
        .until("the log says why", async |world| {
            world.gateway.as_ref()?.log().contains("does not name its file's region").then_some(())
        })
        .await;
    // The right URL is taken over by reload, and then it is served.
    world.worker_ports.insert("eu-west", eu);
    world.start_worker("eu-west");
    world.write_region("eu-west", false);
    world
        .until("the tenant is served", async |world| {
            let answer = world.ask(Ask { tenant: "demo-eu", ..Ask::default() }).await;
            (answer.status == StatusCode::OK).then_some(())
        })
        .await;
}

/// A worker dies, and at once somebody else answers at its address: another region's server, or one that says nothing of
/// regions. Not one request of the walled tenant may reach it.
#[tokio::test]
async fn a_stranger_at_a_known_address_gets_nothing() {
    for named in [Some("us-east"), None] {
        let mut world = World::start("stranger", Plan::default()).await;
        let walled = || Ask { tenant: "demo-eu", ..Ask::default() };
        assert_eq!(world.ask(walled()).await.status, StatusCode::OK);
        let port = world.worker_ports["eu-west"];
        let seen = Arc::new(AtomicUsize::new(0));
        world.workers.get_mut("eu-west").expect("started").kill();
        let counted = Arc::clone(&seen);
        stub::serve_at(port, move |request: Request<Incoming>| {
            if !request.uri().path().starts_with("/v2/health") {
                counted.fetch_add(1, Relaxed);
            }
            let mut response = Response::new(stub::full("{}"));
            if let Some(named) = named {
                response.headers_mut().insert("isochrone-region", HeaderValue::from_static(named));
            }
            async { response }
        })
        .await;
        // Over several probe intervals, without a pause: before the first probe, and after many.
        let since = Instant::now();
        let mut refused = 0;
        while since.elapsed() < Duration::from_secs(4) {
            let answer = world.ask(walled()).await;
            assert_eq!((answer.status.as_u16(), answer.header("retry-after")), (503, "1"));
            refused += 1;
        }
        assert!(refused > 100, "{refused}");
        assert_eq!(seen.load(Relaxed), 0, "requests reached the stranger");
    }
}
