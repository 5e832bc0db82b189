//! Changes of the directory while the gateway runs.

use http::StatusCode;
use serde_json::Value;

use crate::world::{Ask, GERMANY, Plan, World};

#[tokio::test]
async fn a_region_drains_and_returns_by_its_file() {
    let world = World::start("drain-file", Plan::default()).await;
    let mut connection = world.connect().await;
    let mut region = async || {
        let answer = connection.send(Ask::from(GERMANY).request()).await.expect("an answer");
        assert_eq!((answer.status, answer.header("isochrone-attempts")), (StatusCode::OK, "1"));
        answer.header("isochrone-region").to_owned()
    };
    assert_eq!(region().await, "eu-west");
    let revision = async |world: &World| Some(world.admin("/api/config").await?["revision"].clone());
    let before = revision(&world).await.expect("a revision");

    world.write_region("eu-west", true);
    world.until("the change is in force", async |world| (revision(world).await? != before).then_some(())).await;
    assert_eq!(region().await, "us-east");

    // Edited in place this time, as `sed -i` or a person does.
    let text = std::fs::read_to_string(world.region_file("eu-west")).expect("readable");
    std::fs::write(world.region_file("eu-west"), text.replace("drain = true", "drain = false")).expect("written");
    world.until("the old revision is back", async |world| (revision(world).await? == before).then_some(())).await;
    assert_eq!(region().await, "eu-west");

    // A file taken away is a region taken away; the same connection goes on.
    std::fs::remove_file(world.region_file("eu-west")).expect("removed");
    world
        .until("the region is gone", async |world| (world.regions().await?.as_array()?.len() == 2).then_some(()))
        .await;
    assert_eq!(region().await, "us-east");
}

#[tokio::test]
async fn an_invalid_directory_changes_nothing_and_says_where_and_why() {
    let world = World::start("invalid", Plan::default()).await;
    let before = world.admin("/api/config").await.expect("a configuration");
    assert_eq!(before["rejected"], Value::Null);
    let good = std::fs::read_to_string(world.region_file("eu-west")).expect("readable");
    world.replace(
        &world.region_file("eu-west"),
        &good.replace("latitude", "lattitude").replace("country = \"IE\"", "country = \"QQ\""),
    );
    let after = world
        .until("the rejection is told", async |world| {
            let config = world.admin("/api/config").await?;
            config["rejected"].is_object().then_some(config)
        })
        .await;
    assert_eq!(after["revision"], before["revision"], "the old revision stays in force");
    let errors = after["rejected"]["errors"].to_string();
    assert!(errors.contains("unknown key `lattitude`, did you mean `latitude`?"), "{errors}");
    let first = &after["rejected"]["errors"][0];
    assert!(first["file"].as_str().is_some_and(|file| file.ends_with("regions/eu-west.toml")), "{first}");
    assert_eq!((first["line"].as_u64(), first["column"].as_u64()), (Some(2), Some(1)), "{errors}");
    let answer = world.ask(Ask::from(GERMANY)).await;
    assert_eq!((answer.status, answer.header("isochrone-region")), (StatusCode::OK, "eu-west"));
    assert_eq!(world.admin_text("/readyz").await.as_deref(), Some(&b"ready\n"[..]));
    let metrics = String::from_utf8(world.admin_text("/metrics").await.expect("metrics").to_vec()).expect("text");
    assert!(metrics.contains("isochrone_config_rejected 1\n"), "{metrics}");
    world
        .until("the log says it too", async |world| {
            let log = world.gateway.as_ref()?.log();
            (log.contains("configuration rejected") && log.contains("did you mean")).then_some(())
        })
        .await;
    // Half a file, as a copy in progress leaves it, is rejected as well; the whole one is taken.
    std::fs::write(world.region_file("eu-west"), &good[..good.len() / 2]).expect("written");
    std::fs::write(world.region_file("eu-west"), &good).expect("written");
    world
        .until("the good one is accepted", async |world| {
            (world.admin("/api/config").await?["rejected"] == Value::Null).then_some(())
        })
        .await;
}

#[tokio::test]
async fn a_swapped_symbolic_link_and_sighup_are_seen() {
    // As Kubernetes mounts a ConfigMap: files are links through `..data`, which is swapped as a whole.
    let mut world = World::configured("symlink", Plan::default());
    let regions = world.config().join("regions");
    let (one, two) = (regions.join("..one"), regions.join("..two"));
    for (folder, drain) in [(&one, false), (&two, true)] {
        std::fs::create_dir(folder).expect("a folder");
        for (region, ..) in crate::world::REGIONS {
            world.write_region(region, drain && region == "eu-west");
            std::fs::rename(world.region_file(region), folder.join(format!("{region}.toml"))).expect("moved");
        }
    }
    std::os::unix::fs::symlink("..one", regions.join("..data")).expect("linked");
    for (region, ..) in crate::world::REGIONS {
        std::os::unix::fs::symlink(format!("..data/{region}.toml"), world.region_file(region)).expect("linked");
    }
    for region in ["ap-northeast", "eu-west", "us-east"] {
        world.start_worker(region);
    }
    world.start_gateway().await;
    assert_eq!(world.ask(Ask::from(GERMANY)).await.header("isochrone-region"), "eu-west");
    std::os::unix::fs::symlink("..two", regions.join("..next")).expect("linked");
    std::fs::rename(regions.join("..next"), regions.join("..data")).expect("swapped");
    world
        .until("the swap is seen", async |world| {
            (world.ask(Ask::from(GERMANY)).await.header("isochrone-region") == "us-east").then_some(())
        })
        .await;
    // Behind the watched folder nothing is seen to change; SIGHUP makes it read again.
    std::fs::copy(one.join("eu-west.toml"), two.join("eu-west.toml")).expect("copied");
    world.gateway.as_ref().expect("started").signal("HUP");
    world
        .until("SIGHUP is heard", async |world| {
            (world.ask(Ask::from(GERMANY)).await.header("isochrone-region") == "eu-west").then_some(())
        })
        .await;
}

#[tokio::test]
async fn a_tightened_residency_holds_at_once() {
    let world = World::start("tighten", Plan::default()).await;
    assert_eq!(world.ask(Ask::from(GERMANY)).await.header("isochrone-region"), "eu-west");
    let file = world.config().join("tenants.toml");
    let text = std::fs::read_to_string(&file).expect("readable");
    world.replace(&file, &text.replace("[tenants.demo]\n", "[tenants.demo]\nresidency = { require = [\"jp\"] }\n"));
    world
        .until("the wall is in force", async |world| {
            (world.ask(Ask::from(GERMANY)).await.header("isochrone-region") == "ap-northeast").then_some(())
        })
        .await;
    // A wall around nothing: residency, not health, is the reason.
    world.replace(&file, &text.replace("[tenants.demo]\n", "[tenants.demo]\nresidency = { require = [\"mars\"] }\n"));
    world
        .until("nothing is permitted", async |world| {
            (world.ask(Ask::from(GERMANY)).await.status.as_u16() == 451).then_some(())
        })
        .await;
}

#[tokio::test]
async fn a_start_with_a_broken_directory_comes_up_on_what_was_accepted_last() {
    let mut world = World::start("kept", Plan::default()).await;
    let revision = world.admin("/api/config").await.expect("a configuration")["revision"].clone();
    assert!(world.gateway.as_mut().expect("started").terminate().success());
    let good = std::fs::read_to_string(world.region_file("us-east")).expect("readable");
    std::fs::write(world.region_file("us-east"), good.replace("country", "contry")).expect("written");
    world.start_gateway().await;
    let config = world.admin("/api/config").await.expect("a configuration");
    assert_eq!(config["revision"], revision, "the accepted one");
    assert!(config["rejected"]["errors"].to_string().contains("did you mean `country`"), "{config}");
    world
        .until("the log says it too", async |world| {
            let log = world.gateway.as_ref()?.log();
            log.contains("started on the configuration that was accepted last").then_some(())
        })
        .await;
    let answer = world.ask(Ask::from(GERMANY)).await;
    assert_eq!((answer.status, answer.header("isochrone-region")), (StatusCode::OK, "eu-west"));
    // The directory is watched still: once it is whole, it counts.
    let changed = good.replace("latitude = 39.04", "latitude = 39.05");
    assert_ne!(changed, good);
    std::fs::write(world.region_file("us-east"), changed).expect("written");
    world
        .until("the whole one is accepted", async |world| {
            let config = world.admin("/api/config").await?;
            (config["rejected"] == Value::Null && config["revision"] != revision).then_some(())
        })
        .await;
}

#[tokio::test]
async fn a_change_that_would_empty_the_fleet_has_to_be_meant() {
    let world = World::start("large", Plan::default()).await;
    // Out of the directory at once, as a bad checkout does it.
    for region in ["eu-west", "us-east"] {
        std::fs::rename(world.region_file(region), world.folder.join(region)).expect("moved");
    }
    let refused = world
        .until("the refusal is told", async |world| {
            let config = world.admin("/api/config").await?;
            config["rejected"].is_object().then_some(config)
        })
        .await;
    let revision = refused["rejected"]["revision"].as_str().expect("a revision").to_owned();
    let errors = refused["rejected"]["errors"].to_string();
    assert!(errors.contains("2 of 3 endpoints") && errors.contains(&revision), "{errors}");
    assert_eq!(world.regions().await.expect("regions").as_array().map(Vec::len), Some(3));
    let file = world.config().join("gateway.toml");
    let text = std::fs::read_to_string(&file).expect("readable");
    // It permits that revision, and is no part of it.
    world.replace(&file, &format!("{text}\n[reload]\nallow_large_change = \"{revision}\"\n"));
    world
        .until("it is accepted", async |world| {
            let config = world.admin("/api/config").await?;
            (config["revision"] == revision.as_str()).then_some(())
        })
        .await;
    assert_eq!(world.regions().await.expect("regions").as_array().map(Vec::len), Some(1));
}

#[tokio::test]
async fn a_change_at_the_very_start_is_not_missed() {
    let mut world = World::configured("early", Plan::default());
    let good = std::fs::read_to_string(world.region_file("eu-west")).expect("readable");
    for round in 0..8 {
        world.spawn_gateway();
        // The first moment in which anybody can know that it has read the directory.
        world.until("it answers", async |world| world.admin("/api/config").await.map(|_| ())).await;
        world.replace(&world.region_file("eu-west"), &good.replace("drain = false", "drain = true"));
        let drained = async |world: &World| {
            world.regions().await?.as_array()?.iter().find(|region| region["region"] == "eu-west")?["drain"].as_bool()
        };
        world.until("the change is in force", async |world| drained(world).await?.then_some(())).await;
        assert!(world.gateway.as_mut().expect("started").terminate().success(), "round {round}");
        world.replace(&world.region_file("eu-west"), &good);
    }
}

#[tokio::test]
async fn the_operator_can_have_the_directory_read_and_is_told_what_came_of_it() {
    let world = World::start("reread", Plan::default()).await;
    let good = std::fs::read_to_string(world.region_file("eu-west")).expect("readable");
    world.replace(&world.region_file("eu-west"), &good.replace("latitude", "lattitude"));
    let (status, told) = world.operate("POST", "/api/reload").await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
    assert!(told["rejected"]["errors"].to_string().contains("lattitude"), "{told}");
    world.replace(&world.region_file("eu-west"), &good.replace("drain = false", "drain = true"));
    let (status, told) = world.operate("POST", "/api/reload").await;
    assert_eq!((status, &told["rejected"]), (StatusCode::OK, &Value::Null));
    assert_eq!(world.ask(Ask::from(GERMANY)).await.header("isochrone-region"), "us-east");
}

#[tokio::test]
async fn the_operator_drains_a_region_or_an_endpoint_without_an_edit() {
    let world = World::start("drain-hand", Plan::default()).await;
    let region = async || world.ask(Ask::from(GERMANY)).await.header("isochrone-region").to_owned();
    assert_eq!(region().await, "eu-west");
    let (status, drained) = world.operate("PUT", "/api/drain/eu-west").await;
    assert_eq!((status, &drained["regions"]), (StatusCode::OK, &serde_json::json!(["eu-west"])));
    assert_eq!(region().await, "us-east");
    // It holds through a change of the files.
    world.write_region("ap-northeast", true);
    let (status, told) = world.operate("POST", "/api/reload").await;
    assert_eq!((status, region().await.as_str()), (StatusCode::OK, "us-east"), "{told}");
    let explained = world.admin(&format!("/api/explain?ip={GERMANY}&tenant=demo&model=tiny")).await.expect("told");
    let state = |name: &str| {
        let candidates = explained["candidates"].as_array().expect("a list");
        candidates.iter().find(|row| row["region"] == name).expect("a candidate")["state"].clone()
    };
    assert_eq!((state("eu-west"), state("us-east")), ("drained".into(), "ready".into()));
    // The last one too: nobody is left, and nobody is tried.
    let address = format!("127.0.0.1:{}", world.worker_ports["us-east"]);
    let (status, drained) = world.operate("PUT", &format!("/api/drain/us-east/{address}")).await;
    assert_eq!((status, &drained["endpoints"][0]["address"]), (StatusCode::OK, &address.as_str().into()));
    assert_eq!(world.ask(Ask::from(GERMANY)).await.status, StatusCode::SERVICE_UNAVAILABLE);
    let regions = world.regions().await.expect("regions");
    assert!(
        regions[2]["endpoints"][0]["drained"] == true && regions[2]["endpoints"][0]["healthy"] == true,
        "{regions}"
    );
    world.operate("DELETE", &format!("/api/drain/us-east/{address}")).await;
    assert_eq!(region().await, "us-east");
    let (_, drained) = world.operate("DELETE", "/api/drain/eu-west").await;
    assert_eq!(drained, serde_json::json!({ "regions": [], "endpoints": [] }));
    assert_eq!(region().await, "eu-west");
    // By the file, an endpoint alone.
    let text = std::fs::read_to_string(world.region_file("eu-west")).expect("readable");
    world.replace(&world.region_file("eu-west"), &text.replace("[[endpoints]]", "[[endpoints]]\ndrain = true"));
    assert_eq!(world.operate("POST", "/api/reload").await.0, StatusCode::OK);
    assert_eq!(region().await, "us-east");
    // What is not there cannot be drained; a page of another site cannot drain anything.
    for path in ["/api/drain/mars", "/api/drain/eu-west/127.0.0.1:1"] {
        assert_eq!(world.operate("PUT", path).await.0, StatusCode::NOT_FOUND);
    }
    let own = format!("http://127.0.0.1:{}", world.admin);
    for (origin, status) in [("http://evil.example:9901", 403), ("null", 403), (own.as_str(), 200)] {
        let destination = isochrone_loadtest::client::Destination::new(&own, None, false).expect("a URL");
        let request = http::Request::put("/api/drain/us-east").header("origin", origin).body(Default::default());
        let answer = destination.connect().await.expect("connects").send(request.expect("valid")).await.expect("told");
        assert_eq!(answer.status.as_u16(), status, "{origin}");
    }
}

/// Writes a certificate that holds from an hour ago until so many seconds from now, and its key.
fn certificate(folder: &std::path::Path, seconds: i64) -> i64 {
    let now = time::OffsetDateTime::now_utc();
    let mut parameters = rcgen::CertificateParams::new(["localhost".to_owned()]).expect("a name");
    parameters.not_before = now - time::Duration::HOUR;
    parameters.not_after = now + time::Duration::seconds(seconds);
    let key = rcgen::KeyPair::generate().expect("a key");
    let certificate = parameters.self_signed(&key).expect("signed");
    // Both in one step, as a renewal does it with a link: half a pair is no pair.
    let next = folder.with_extension("next");
    std::fs::create_dir_all(&next).expect("a folder");
    std::fs::write(next.join("cert.pem"), certificate.pem()).expect("written");
    std::fs::write(next.join("key.pem"), key.serialize_pem()).expect("written");
    let _ = std::fs::remove_dir_all(folder);
    std::fs::rename(&next, folder).expect("renamed");
    parameters.not_after.unix_timestamp()
}

#[tokio::test]
async fn an_expired_certificate_is_refused_unless_it_was_in_force() {
    let mut world = World::configured("expiry", Plan::default());
    let (file, pair) = (world.config().join("gateway.toml"), world.config().join("pair"));
    let text = std::fs::read_to_string(&file).expect("readable");
    let secrets = crate::world::secrets().folder.display().to_string();
    std::fs::write(
        &file,
        text.replace(&format!("{secrets}/cert"), "pair/cert").replace(&format!("{secrets}/key"), "pair/key"),
    )
    .expect("written");
    // It does not start with one, and `check` says why.
    certificate(&pair, -60);
    let check = |world: &World| {
        let mut command = std::process::Command::new(crate::world::binary("isochrone"));
        let output = command.args(["check", "--config"]).arg(world.config()).output().expect("runs");
        (output.status.code(), String::from_utf8(output.stdout).expect("text"))
    };
    let (code, said) = check(&world);
    assert!(code == Some(1) && said.contains("the certificate expired at 20"), "{said}");
    for region in ["ap-northeast", "eu-west", "us-east"] {
        world.start_worker(region);
    }
    let soon = certificate(&pair, 4);
    world.start_gateway().await;
    let expiry = async |world: &World| {
        let metrics = String::from_utf8(world.admin_text("/metrics").await?.to_vec()).ok()?;
        let line = metrics.lines().find(|line| line.starts_with("isochrone_certificate_expiry_timestamp_seconds{"))?;
        line.rsplit_once(' ')?.1.parse::<i64>().ok()
    };
    assert_eq!(expiry(&world).await, Some(soon));
    let is_expired = async |_: &World| (time::OffsetDateTime::now_utc().unix_timestamp() > soon).then_some(());
    world.until("it has expired", is_expired).await;
    // Everything else can still be changed.
    world.write_region("eu-west", true);
    assert_eq!(world.operate("POST", "/api/reload").await.0, StatusCode::OK);
    // A restart is not the moment to stop serving what was served.
    assert!(world.gateway.as_mut().expect("started").terminate().success());
    world.start_gateway().await;
    let told =
        async |world: &World| world.gateway.as_ref()?.log().contains("the certificate has expired").then_some(());
    world.until("the log says so", told).await;
    assert_eq!(world.admin("/api/config").await.expect("a configuration")["rejected"], Value::Null);
    // Another one that has expired is refused; one that holds is taken, without a word to the gateway.
    certificate(&pair, -60);
    assert_eq!(world.operate("POST", "/api/reload").await.0, StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(expiry(&world).await, Some(soon));
    let later = certificate(&pair, 3_600);
    world.until("the new one is presented", async |world| (expiry(world).await? == later).then_some(())).await;
    assert_eq!(world.admin("/api/config").await.expect("a configuration")["rejected"], Value::Null);
}

#[tokio::test]
async fn what_lies_outside_is_watched_still_when_the_directory_has_been_replaced() {
    let world = World::configured("outside", Plan::default());
    // Named through the directory, as the shipped configuration does it; and one that lies right beside it.
    let (keys, beside) = (world.folder.join("keys"), world.folder.join("demo-eu.hash"));
    std::fs::create_dir(&keys).expect("a folder");
    let secrets = &crate::world::secrets().folder;
    std::fs::copy(secrets.join("demo.hash"), keys.join("demo.hash")).expect("copied");
    std::fs::copy(secrets.join("demo-eu.hash"), &beside).expect("copied");
    let file = world.config().join("tenants.toml");
    let text = std::fs::read_to_string(&file).expect("readable");
    let text = text.replace(&format!("{}/demo.hash", secrets.display()), "../keys/demo.hash");
    std::fs::write(&file, text.replace(&format!("{}/demo-eu.hash", secrets.display()), "../demo-eu.hash"))
        .expect("written");
    let mut world = world;
    for region in ["ap-northeast", "eu-west", "us-east"] {
        world.start_worker(region);
    }
    world.start_gateway().await;
    let revision = async |world: &World| Some(world.admin("/api/config").await?["revision"].clone());
    // Replaced as a whole, as `apply` does it.
    let (next, old) = (world.folder.join("next"), world.folder.join("old"));
    let copied = std::process::Command::new("cp").arg("-r").arg(world.config()).arg(&next).status().expect("cp runs");
    assert!(copied.success());
    let before = revision(&world).await.expect("a revision");
    std::fs::rename(world.config(), &old).expect("renamed");
    std::fs::rename(&next, world.config()).expect("renamed");
    world.write_region("us-east", true);
    let changed = async |world: &World, before: &Value| (revision(world).await? != *before).then_some(());
    world.until("the new directory is read", async |world| changed(world, &before).await).await;
    // A key is changed where nothing else is.
    for (file, tenant) in [(keys.join("demo.hash"), "demo"), (beside, "demo-eu")] {
        assert_eq!(world.ask(Ask { tenant, ..Ask::default() }).await.status, StatusCode::OK);
        world.replace(&file, &format!("sha256:{}", "0".repeat(63) + if tenant == "demo" { "1" } else { "2" }));
        let refused = async |world: &World| {
            (world.ask(Ask { tenant, ..Ask::default() }).await.status == StatusCode::UNAUTHORIZED).then_some(())
        };
        world.until("the old key is refused", refused).await;
    }
}
