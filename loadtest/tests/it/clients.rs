//! Real clients, unmodified, at the worker itself and through the gateway: see `loadtest/clients/`.

use std::process::Command;

use crate::world::{Plan, World, root, secrets};

/// Python with the libraries that `./deploy/local/test` has installed.
fn python() -> Command {
    let libraries = root().join(".local/clients");
    assert!(libraries.exists(), "{} is not there; ./deploy/local/test fetches it", libraries.display());
    let mut command = Command::new("python3");
    command.env("PYTHONPATH", libraries).env("PYTHONDONTWRITEBYTECODE", "1");
    command
}

async fn run(mut command: Command) -> (bool, String) {
    let output = tokio::task::spawn_blocking(move || command.output().expect("python3 runs")).await.expect("no panic");
    let text = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    (output.status.success(), text)
}

pub async fn passes(name: &str, arguments: &[&str]) {
    let mut command = python();
    command.arg(root().join("loadtest/clients").join(name)).args(arguments);
    let (well, told) = run(command).await;
    assert!(well && told.contains("ok "), "{name} {arguments:?}:\n{told}");
    eprintln!("{name}: {}", told.trim_end());
}

const SCRIPTS: [&str; 4] = ["triton_http.py", "triton_grpc.py", "openai_sdk.py", "langchain_client.py"];

#[tokio::test]
async fn real_clients_find_a_worker_as_they_expect_it() {
    let world = World::start("clients", Plan::both("clients-models")).await;
    let http = format!("http://127.0.0.1:{}", world.worker_ports["eu-west"]);
    let grpc = format!("127.0.0.1:{}", world.grpc_ports["eu-west"]);
    for name in SCRIPTS {
        passes(name, &["--http", &http, "--grpc", &grpc]).await;
    }
}

#[tokio::test]
async fn real_clients_find_the_gateway_as_they_expect_a_worker() {
    let world = World::start("clients-gateway", Plan::both("clients-models")).await;
    let (http, grpc) = (format!("https://localhost:{}", world.tls), format!("localhost:{}", world.tls));
    let ca = secrets().folder.join("ca.pem").display().to_string();
    let key = &secrets().keys["demo"];
    let arguments = ["--http", &http, "--grpc", &grpc, "--grpc-tls", "--ca", &ca, "--key", key, "--through-gateway"];
    for name in SCRIPTS {
        passes(name, &arguments).await;
    }
    // The file that users are shown for Locust.
    let arguments = ["-m", "locust", "-H", &http, "--headless", "-u", "8", "-r", "8", "-t", "5s"];
    let mut command = python();
    command
        .args(arguments)
        .args(["--exit-code-on-error", "1", "-f"])
        .arg(root().join("loadtest/clients/locustfile.py"));
    command.env("ISOCHRONE_KEY", key).env("ISOCHRONE_CA", &ca);
    let (well, told) = run(command).await;
    assert!(well, "{told}");
}

#[tokio::test]
async fn editors_find_what_is_wrong_by_the_schemas() {
    let config = root().join("config");
    let mut command = python();
    command.arg(root().join("loadtest/clients/schemas.py")).arg(config.join("schema")).arg(&config);
    command.args(crate::startup::examples());
    let (well, told) = run(command).await;
    assert!(well && told.contains("ok "), "{told}");
}
