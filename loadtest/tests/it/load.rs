//! The load generator against the real thing.

use std::process::Command;

use serde_json::Value;

use crate::world::{Plan, World, binary, secrets, tiny_body};

#[tokio::test]
async fn a_run_spreads_clients_over_the_regions_without_an_error() {
    let world = World::start("load", Plan::default()).await;
    std::fs::write(world.folder.join("key"), &secrets().keys["demo"]).expect("written");
    std::fs::write(world.folder.join("body"), tiny_body()).expect("written");
    let mut command = Command::new(binary("isochrone-loadtest"));
    command.args(["run", "--url", &format!("https://localhost:{}", world.tls), "--path", "/v2/models/tiny/infer"]);
    command.args(["--rate", "300", "--duration", "4s", "--connections", "16", "--json"]);
    command.arg("--ca").arg(secrets().folder.join("ca.pem"));
    command.arg("--key-file").arg(world.folder.join("key")).arg("--body").arg(world.folder.join("body"));
    let output = tokio::task::spawn_blocking(move || command.output()).await.expect("no panic").expect("runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(report["errors"], 0, "{report}");
    assert!(report["ended"].as_u64().is_some_and(|ended| (1000..1400).contains(&ended)), "{report}");
    for region in ["eu-west", "us-east", "ap-northeast"] {
        assert!(report["regions"][region].as_f64().is_some_and(|share| share > 0.1), "{report}");
    }
    for (country, region) in
        [("DE", "eu-west"), ("JP", "ap-northeast"), ("BR", "us-east"), ("US", "us-east"), ("GB", "eu-west")]
    {
        let served = report["countries"][country].as_object().expect("served");
        assert!(served.len() == 1 && served.contains_key(region), "{country}: {served:?}");
    }
}
