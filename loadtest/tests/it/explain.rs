//! `explain` says what the gateway then does.

use std::process::Command;

use http::StatusCode;
use isochrone_loadtest::clients::WORLD;
use serde_json::Value;

use crate::world::{Ask, GERMANY, Plan, World, binary};

/// Asks the command line, and gives its exit code and what it printed.
async fn command(world: &World, more: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(binary("isochrone"));
    command.arg("explain").args(more);
    if !more.contains(&"--admin") {
        command.arg("--config").arg(world.config());
    }
    let output = tokio::task::spawn_blocking(move || command.output()).await.expect("no panic").expect("runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
    (output.status.code().expect("a code"), text(output.stdout), text(output.stderr))
}

async fn json(world: &World, more: &[&str]) -> (i32, Value) {
    let (code, out, error) = command(world, &[more, &["--json"]].concat()).await;
    (code, serde_json::from_str(&out).unwrap_or_else(|_| panic!("no JSON: {out} {error}")))
}

/// In each state.
const CLIENTS: usize = 1_000;

#[tokio::test]
async fn what_is_explained_is_what_then_happens_to_clients_all_over_the_world_in_every_state() {
    let mut world = World::start("explain", Plan::default()).await;
    let (mut compared, mut unsettled) = (0, 0);
    let mut rng = fastrand::Rng::with_seed(11);
    for state in ["well", "drained", "by hand", "killed"] {
        match state {
            "drained" => world.write_region("us-east", true),
            "by hand" => {
                world.write_region("us-east", false);
                world.operate("POST", "/api/reload").await;
                world.operate("PUT", "/api/drain/ap-northeast").await;
            }
            "killed" => {
                world.operate("DELETE", "/api/drain/ap-northeast").await;
                world.workers.get_mut("eu-west").expect("started").kill();
            }
            _ => {}
        }
        // The state is in force, and every client has settled in it: what shifts slowly is not what this is about.
        world
            .until("the state is in force", async |world| {
                let answer = world.ask(Ask::from(GERMANY)).await;
                let regions = world.regions().await?.to_string();
                let drained = regions.contains("\"drain\":true") == matches!(state, "drained" | "by hand");
                let once = answer.header("isochrone-attempts") == "1";
                let killed = state != "killed" || answer.header("isochrone-reason").contains("eu-west is down");
                (drained && once && killed).then_some(())
            })
            .await;
        let mut connection = world.connect().await;
        for at in 0..CLIENTS {
            // From anywhere: places that the database knows and places that it does not, of both kinds of addresses.
            let address: std::net::IpAddr = match rng.u8(..4) {
                0 => std::net::Ipv6Addr::from((rng.u128(..) >> 3) | (1 << 125)).into(),
                1 => std::net::Ipv4Addr::from(rng.u32(..)).into(),
                _ => {
                    let known: std::net::Ipv4Addr = rng.choice(&WORLD).expect("some").address.parse().expect("one");
                    std::net::Ipv4Addr::from(u32::from(known) & 0xffff_0000 | rng.u32(..1 << 16)).into()
                }
            };
            let address = address.to_string();
            let tenant = if at % 3 == 0 { "demo-eu" } else { "demo" };
            let path = format!("/api/explain?ip={address}&tenant={tenant}&model=tiny");
            let explained = world.admin(&path).await.expect("an explanation");
            let ask = Ask { tenant, from: &address, ..Ask::default() };
            let answer = connection.send(ask.request()).await.expect("an answer");
            let again = world.admin(&path).await.expect("an explanation");
            if again["pick"] != explained["pick"] {
                // What is measured has changed just now, and the request may have been on either side of it.
                unsettled += 1;
                continue;
            }
            let asked = format!("{state}: {address} of {tenant}: {explained} {answer:?}");
            match explained["pick"].as_str() {
                Some(pick) if answer.status == StatusCode::OK => {
                    assert_eq!(answer.header("isochrone-region"), pick, "{asked}");
                    // The milliseconds may have moved in between: behind the first `;` are the words.
                    let words = |reason: &str| reason.split_once(';').expect("words").1.to_owned();
                    let explained = explained["reason"].as_str().expect("a reason");
                    assert_eq!(words(answer.header("isochrone-reason")), words(explained), "{asked}");
                }
                // Nobody who could answer: tried in a panic, or refused.
                _ => assert_eq!((answer.status.as_u16(), tenant, state), (503, "demo-eu", "killed"), "{asked}"),
            }
            compared += 1;
        }
    }
    eprintln!("{compared} compared; of {unsettled} the pick has changed meanwhile");
    assert!(compared >= 4 * CLIENTS * 99 / 100, "{compared} compared, {unsettled} not");
}

#[tokio::test]
async fn a_directory_alone_is_explained_with_its_rules_and_what_would_be_if() {
    let world = World::configured("explain-offline", Plan::default());
    let (code, explained) = json(&world, &["--ip", GERMANY, "--tenant", "demo", "--model", "tiny"]).await;
    assert_eq!((code, &explained["pick"], &explained["location"]["country"]), (0, &"eu-west".into(), &"DE".into()));
    assert_eq!(explained["failover"], serde_json::json!(["us-east", "ap-northeast"]));
    let distance = explained["candidates"][0]["parts"]["distance"].as_f64().expect("a number");
    assert!((distance - 21.7).abs() < 0.01, "{distance}");
    let down = ["--ip", GERMANY, "--tenant", "demo", "--model", "tiny", "--assume-down", "eu-west"];
    assert_eq!(json(&world, &down).await.1["pick"], "us-east");

    let (code, walled) = json(&world, &["--ip", GERMANY, "--tenant", "demo-eu", "--model", "tiny"]).await;
    assert_eq!((code, &walled["permitted"]), (0, &serde_json::json!(["eu-west"])));
    assert_eq!(walled["refused"][0]["why"], "the tenant demo-eu requires eu; it is in jp");
    let down = ["--ip", GERMANY, "--tenant", "demo-eu", "--assume-down", "eu-west"];
    let (code, nowhere) = json(&world, &down).await;
    assert_eq!((code, &nowhere["pick"]), (1, &Value::Null));
    assert!(nowhere["reason"].as_str().expect("a reason").starts_with("503"), "{nowhere}");

    // For people.
    let (code, table, _) = command(&world, &["--ip", GERMANY, "--tenant", "demo-eu", "--model", "tiny"]).await;
    assert_eq!(code, 0);
    for line in
        ["refused    us-east: the tenant demo-eu requires eu; it is in us", "pick       eu-west", "failover   none"]
    {
        assert!(table.contains(line), "{table}");
    }
    // Wrong questions.
    for (wrong, words) in [
        (vec!["--ip", GERMANY, "--tenant", "nobody"], "there is no tenant `nobody`"),
        (vec!["--ip", GERMANY, "--tenant", "demo", "--model", "gpt"], "no region serves this model: `gpt`"),
        (vec!["--ip", GERMANY, "--tenant", "demo", "--assume-down", "mars"], "there is no region `mars`"),
        (vec!["--ip", GERMANY], "Name a tenant"),
        (vec!["--ip", GERMANY, "--admin", "http://127.0.0.1:1"], "refused"),
    ] {
        let (code, _, error) = command(&world, &wrong).await;
        assert!(code == 2 && error.contains(words), "{wrong:?}: {code} {error}");
    }
}
