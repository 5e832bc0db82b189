//! The worker by itself: a TorchScript model of somebody else's, dropped in as it is.

use std::process::Command;

use http::{Request, StatusCode};
use http_body_util::Full;
use isochrone_loadtest::client::Destination;
use serde_json::{Value, json};

use crate::world::{PATIENCE, Process, binary, folder, free_port, root};

/// Silero VAD, as its publishers ship it: it takes a plain number beside a tensor, and keeps state between calls.
#[tokio::test]
async fn a_published_torchscript_model_gives_its_publishers_numbers() {
    let module = root().join(".local/test/silero_vad.jit");
    assert!(module.exists(), "{} is not there; ./deploy/local/test fetches it", module.display());
    let models = folder("silero");
    let version = models.join("silero/1");
    std::fs::create_dir_all(&version).expect("a folder");
    std::fs::copy(module, version.join("model.pt")).expect("copied");
    let toml = r#"
kind = "torchscript"
before_each = "reset_states"
[[inputs]]
name = "x"
datatype = "FP32"
shape = [-1, -1]
[[inputs]]
name = "sr"
datatype = "INT64"
shape = [1]
scalar = true
[[outputs]]
name = "speech"
datatype = "FP32"
shape = [-1, 1]
"#;
    std::fs::write(version.join("model.toml"), toml).expect("written");
    let checked =
        Command::new(binary("isochrone-backend")).args(["check", "--models"]).arg(&models).output().expect("runs");
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));

    let port = free_port();
    let mut command = Command::new(binary("isochrone-backend"));
    command.args(["serve", "--region", "eu-west", "--listen", &format!("127.0.0.1:{port}"), "--models"]).arg(&models);
    let mut worker = Process::start("silero", &mut command, &models.join("worker.log"));
    let destination = Destination::new(&format!("http://127.0.0.1:{port}"), None, false).expect("a URL");
    let since = std::time::Instant::now();
    let mut connection = loop {
        match destination.connect().await {
            Ok(connection) => break connection,
            Err(error) => assert!(since.elapsed() < PATIENCE, "{error}: {}", worker.log()),
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    };
    let data: Value =
        serde_json::from_slice(&std::fs::read(root().join("loadtest/tests/data/silero.json")).expect("the data"))
            .expect("JSON");
    let mut compared = 0;
    for case in data["cases"].as_array().expect("cases") {
        let real = |name: &str| case[name].as_f64().expect("a number");
        let whole = |name: &str| case[name].as_u64().expect("a number");
        let (rate, batch, samples) = (whole("sr"), whole("batch"), whole("samples"));
        let sine = |n: u64| {
            (real("amplitude") * (2.0 * std::f64::consts::PI * real("hertz") * n as f64 / rate as f64).sin()) as f32
        };
        let x: Vec<f32> = (0..batch).flat_map(|_| (0..samples).map(sine)).collect();
        let body = json!({ "inputs": [
            { "name": "sr", "datatype": "INT64", "shape": [1], "data": [rate] },
            { "name": "x", "datatype": "FP32", "shape": [batch, samples], "data": x },
        ] });
        // Twice: the state of the first call must not reach the second.
        for _ in 0..2 {
            let request = Request::post("/v2/models/silero/infer").body(Full::from(body.to_string())).expect("valid");
            let answer = connection.send(request).await.expect("an answer");
            assert_eq!(answer.status, StatusCode::OK, "{}", String::from_utf8_lossy(&answer.body));
            assert_eq!(answer.header("isochrone-region"), "eu-west");
            let answer: Value = serde_json::from_slice(&answer.body).expect("JSON");
            let got = answer["outputs"][0]["data"].as_array().expect("numbers");
            let expected = case["outputs"][0].as_array().expect("rows");
            assert_eq!(got.len(), expected.len());
            for (got, expected) in got.iter().zip(expected) {
                let (got, expected) = (got.as_f64().expect("a number"), expected[0].as_f64().expect("a number"));
                assert!((got - expected).abs() < 1e-6, "{case}: {got}");
                compared += 1;
            }
        }
    }
    assert!(compared >= 4, "{compared}");
    // The module itself refuses another rate: a failed request, not a dead worker, and none of its makers' paths.
    let body = json!({ "inputs": [
        { "name": "sr", "datatype": "INT64", "shape": [1], "data": [44_100] },
        { "name": "x", "datatype": "FP32", "shape": [1, 512], "data": vec![0.0; 512] },
    ] });
    let request = Request::post("/v2/models/silero/infer").body(Full::from(body.to_string())).expect("valid");
    let answer = connection.send(request).await.expect("an answer");
    assert_eq!(answer.status, StatusCode::INTERNAL_SERVER_ERROR);
    assert!(!String::from_utf8_lossy(&answer.body).contains('/'));
    let request = Request::get("/v2/health/ready").body(Full::default()).expect("valid");
    assert_eq!(connection.send(request).await.expect("an answer").status, StatusCode::OK);
    // What a module raises on is not kept: a hundred such requests of four megabytes each.
    let resident = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", worker.pid())).expect("it runs");
        let line = status.lines().find(|line| line.starts_with("VmRSS")).expect("a line");
        line.split_whitespace().nth(1).expect("a number").parse::<u64>().expect("kilobytes") / 1024
    };
    let before = resident();
    let head = br#"{"inputs":[{"name":"sr","datatype":"INT64","shape":[1],"data":[44100]},{"name":"x","datatype":"FP32","shape":[1,1000000],"parameters":{"binary_data_size":4000000}}]}"#;
    let body = [head.as_slice(), &vec![0; 4_000_000]].concat();
    for _ in 0..100 {
        let request = Request::post("/v2/models/silero/infer").header("inference-header-content-length", head.len());
        let answer = connection.send(request.body(Full::from(body.clone())).expect("valid")).await.expect("an answer");
        assert_eq!(answer.status, StatusCode::INTERNAL_SERVER_ERROR);
    }
    assert!(resident() < before + 150, "{before} MB before, {} MB after", resident());
    assert!(worker.terminate().success());
}
