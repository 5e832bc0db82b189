//! What a change would do is told before it is made, and it is made in one step.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use http::StatusCode;
use serde_json::Value;

use crate::world::{Ask, GERMANY, Plan, World, binary};

/// The same configuration beside the world's own, to be changed.
fn beside(world: &World, name: &str) -> PathBuf {
    let new = world.folder.join(name);
    let copied = Command::new("cp").arg("-r").arg(world.config()).arg(&new).status().expect("cp runs");
    assert!(copied.success());
    new
}

fn change(file: &Path, from: &str, to: &str) {
    let text = std::fs::read_to_string(file).expect("readable");
    assert!(text.contains(from), "{from} in {text}");
    std::fs::write(file, text.replace(from, to)).expect("written");
}

fn isochrone(arguments: &[&str], paths: &[&Path]) -> Output {
    Command::new(binary("isochrone")).args(arguments).args(paths).output().expect("runs")
}

fn said(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned()).concat()
}

#[test]
fn a_difference_is_told_by_who_moves_and_what_widens() {
    let world = World::configured("diff", Plan::default());
    let old = world.config();
    let same = isochrone(&["diff"], &[&old, &old]);
    assert!(same.status.success() && said(&same).contains("none of 4000 requests"), "{}", said(&same));

    // Europe drains: its clients move, and the tenant that is held to it has nowhere to go.
    let drained = beside(&world, "drained");
    for region in ["eu-west", "us-east"] {
        change(&drained.join(format!("regions/{region}.toml")), "drain = false", "drain = true");
    }
    let output = isochrone(&["diff", "--json"], &[&old, &drained]);
    assert!(output.status.success(), "{}", said(&output));
    let diff: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let moves = diff["moves"].as_array().expect("a list");
    let share = |from: &str, to: Value| {
        let found = moves.iter().find(|moved| moved["from"] == from && moved["to"] == to);
        found.and_then(|moved| moved["share"].as_f64()).unwrap_or(0.0)
    };
    assert!(share("eu-west", "ap-northeast".into()) > 0.03 && share("us-east", "ap-northeast".into()) > 0.1, "{diff}");
    assert!(share("eu-west", Value::Null) > 0.3, "half of the questions are those of demo-eu: {diff}");
    let lost = diff["fallback_lost"].to_string();
    assert!(lost.contains("demo, model tiny: only ap-northeast is left of 3"), "{lost}");
    assert!(lost.contains("demo-eu, model tiny: no region is left of 1"), "{lost}");
    assert_eq!(diff["residency_widens"], serde_json::json!([]));

    // A log says who asks; only its requests count.
    let log = world.folder.join("sample.log");
    let line = r#"{"message":"access","client":"141.20.1.0/24","tenant":"demo","model":"tiny"}"#;
    std::fs::write(&log, format!("not JSON\n{line}\n{line}\n{{\"message\":\"other\"}}\n")).expect("written");
    let output = isochrone(&["diff", "--sample"], &[&log, &old, &drained]);
    assert!(said(&output).contains("100.00 %  eu-west -> ap-northeast"), "{}", said(&output));

    // More places for a tenant's data: in capitals, and no.
    let widened = beside(&world, "widened");
    change(&widened.join("tenants.toml"), r#"require = ["eu"]"#, r#"require = ["eu", "jp"]"#);
    let output = isochrone(&["diff"], &[&old, &widened]);
    assert_eq!(output.status.code(), Some(1));
    let text = said(&output);
    assert!(text.contains("RESIDENCY WIDENS") && text.contains("demo-eu: it now allows jp as well"), "{text}");
    assert!(text.contains("may now be served in ap-northeast"), "{text}");
    assert!(isochrone(&["diff", "--allow-residency-change"], &[&old, &widened]).status.success());
    // The other way round it narrows, which needs nobody's leave.
    let output = isochrone(&["diff"], &[&widened, &old]);
    assert!(output.status.success() && said(&output).contains("RESIDENCY NARROWS"), "{}", said(&output));

    // A region that joins a zone opens itself to those who are held to that zone.
    let joined = beside(&world, "joined");
    change(&joined.join("regions/us-east.toml"), r#"zones = ["us"]"#, r#"zones = ["us", "eu"]"#);
    let output = isochrone(&["diff"], &[&old, &joined]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        said(&output).contains("demo-eu: clients of unknown country may now be served in us-east"),
        "{}",
        said(&output)
    );

    // Also where a rule for other clients hides it from those of unknown country, who are held to every rule.
    let rule = |directory: &Path| {
        let file = directory.join("gateway.toml");
        let text = std::fs::read_to_string(&file).expect("readable");
        std::fs::write(&file, format!("{text}\n[[country_rules]]\ncountries = [\"DE\"]\nrequire = [\"jp\"]\n"))
            .expect("written");
    };
    let (ruled, ruled_joined) = (beside(&world, "ruled"), world.folder.join("ruled-joined"));
    rule(&ruled);
    assert!(Command::new("cp").arg("-r").arg(&joined).arg(&ruled_joined).status().expect("cp runs").success());
    rule(&ruled_joined);
    let output = isochrone(&["diff"], &[&ruled, &ruled_joined]);
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(
        said(&output).contains("demo-eu: clients from anywhere else may now be served in us-east"),
        "{}",
        said(&output)
    );

    // The same callers under another name and another rule.
    let renamed = beside(&world, "renamed");
    change(&renamed.join("tenants.toml"), "[tenants.demo-eu]", "[tenants.renamed]");
    change(&renamed.join("tenants.toml"), r#"residency = { require = ["eu"] }"#, "");
    let output = isochrone(&["diff"], &[&old, &renamed]);
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains("demo-eu, now renamed: it no longer requires eu"), "{}", said(&output));

    let broken = beside(&world, "broken");
    change(&broken.join("regions/us-east.toml"), "drain", "drian");
    let output = isochrone(&["diff"], &[&old, &broken]);
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("did you mean `drain`"), "{}", said(&output));
}

#[tokio::test]
async fn what_is_applied_is_in_force_and_what_is_broken_is_not_applied() {
    let world = World::start("apply", Plan::default()).await;
    let new = beside(&world, "new");
    change(&new.join("regions/eu-west.toml"), "drain = false", "drain = true");
    let apply = |new: &Path, more: &[&str]| {
        let config = world.config();
        isochrone(&[&["apply", "--config", &config.display().to_string()], more].concat(), &[new])
    };
    let output = apply(&new, &[]);
    assert!(output.status.success() && said(&output).contains("eu-west ->"), "{}", said(&output));
    world
        .until("it is in force", async |world| {
            (world.ask(Ask::from(GERMANY)).await.header("isochrone-region") == "us-east").then_some(())
        })
        .await;
    assert!(said(&apply(&new, &[])).contains("in place already"));
    // Back again, to what the first said that it had kept.
    let told = said(&output);
    let before = PathBuf::from(told.trim_end().rsplit("what was there: ").next().expect("a path"));
    let output = apply(&before, &[]);
    assert!(output.status.success() && before.join("gateway.toml").exists(), "{}", said(&output));
    world
        .until("it is as it was", async |world| {
            (world.ask(Ask::from(GERMANY)).await.header("isochrone-region") == "eu-west").then_some(())
        })
        .await;
    assert!(apply(&new, &[]).status.success());
    world
        .until("it is in force again", async |world| {
            (world.ask(Ask::from(GERMANY)).await.header("isochrone-region") == "us-east").then_some(())
        })
        .await;

    change(&new.join("regions/eu-west.toml"), "drain = true", "drain = maybe");
    let output = apply(&new, &[]);
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    change(&new.join("regions/eu-west.toml"), "drain = maybe", "drain = false");
    change(&new.join("tenants.toml"), r#"require = ["eu"]"#, r#"prefer = ["eu"]"#);
    let output = apply(&new, &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("demo-eu: it no longer requires eu"), "{}", said(&output));
    let config = world.admin("/api/config").await.expect("a configuration");
    assert_eq!(config["rejected"], Value::Null, "nothing of it was seen");
    let answer = world.ask(Ask::from(GERMANY)).await;
    assert_eq!((answer.status, answer.header("isochrone-region")), (StatusCode::OK, "us-east"));
    assert!(apply(&new, &["--allow-residency-change"]).status.success());
}
