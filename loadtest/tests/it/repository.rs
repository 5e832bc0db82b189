//! Models are loaded, replaced and unloaded at a worker that serves, by its operator and nobody else.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::Full;
use isochrone_loadtest::client::{Answer, Connection, Destination};
use isochrone_loadtest::run;
use serde_json::{Value, json};

use crate::world::{PATIENCE, Process, binary, copied, folder, free_port, root, secrets, tiny_body};

struct Worker {
    process: Process,
    port: u16,
    models: PathBuf,
}

impl Worker {
    /// A worker by itself, with the models that `fill` puts into its folder.
    async fn start(name: &str, fill: impl FnOnce(&Path)) -> Worker {
        Worker::start_with(name, &[], fill).await
    }

    async fn start_with(name: &str, arguments: &[&str], fill: impl FnOnce(&Path)) -> Worker {
        let models = folder(name);
        fill(&models);
        let port = free_port();
        let mut command = Command::new(binary("isochrone-backend"));
        command.args(["serve", "--region", "eu-west", "--listen", &format!("127.0.0.1:{port}")]);
        command.arg("--operator-key").arg(secrets().folder.join("operator")).arg("--models").arg(&models);
        command.args(["--max-body", "1000000"]).args(arguments);
        let process = Process::start(name, &mut command, &models.with_extension("log"));
        let worker = Worker { process, port, models };
        let since = Instant::now();
        while worker.destination().connect().await.is_err() {
            assert!(since.elapsed() < PATIENCE, "{}", worker.process.log());
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        worker
    }

    fn destination(&self) -> Destination {
        Destination::new(&format!("http://127.0.0.1:{}", self.port), None, false).expect("a URL")
    }

    async fn connect(&self) -> Connection {
        self.destination().connect().await.expect("it listens")
    }

    async fn send(&self, method: Method, path: &str, headers: &[(&str, &str)], body: impl Into<Vec<u8>>) -> Answer {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::from(body.into())).expect("valid");
        self.connect().await.send(request).await.expect("an answer")
    }

    async fn control(&self, what: &str) -> Answer {
        let key = [("authorization", "Bearer the key of the operator of these tests")];
        self.send(Method::POST, &format!("/v2/repository/models/{what}"), &key, "").await
    }

    async fn index(&self) -> Value {
        let key = [("authorization", "Bearer the key of the operator of these tests")];
        json_of(&self.send(Method::POST, "/v2/repository/index", &key, "").await)
    }

    fn resident_mb(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.pid())).expect("it runs");
        let line = status.lines().find(|line| line.starts_with("VmRSS")).expect("a line");
        line.split_whitespace().nth(1).expect("a number").parse::<u64>().expect("kilobytes") / 1024
    }
}

fn json_of(answer: &Answer) -> Value {
    assert_eq!(answer.status, StatusCode::OK, "{}", String::from_utf8_lossy(&answer.body));
    serde_json::from_slice(&answer.body).expect("JSON")
}

fn tiny() -> PathBuf {
    root().join("loadtest/models/tiny/1")
}

/// The same weights, served in another way.
fn changed(to: &Path) {
    copied(&tiny(), to);
    let toml = std::fs::read_to_string(to.join("model.toml")).expect("there");
    std::fs::write(to.join("model.toml"), format!("{toml}\n[batching]\nmax_batch_size = 8\n")).expect("written");
}

#[tokio::test]
async fn versions_come_and_go_under_load_and_no_request_fails() {
    let worker = Worker::start("swap", |models| copied(&tiny(), &models.join("tiny/1"))).await;
    let mut headers = HeaderMap::new();
    headers.insert("content-type", "application/json".parse().expect("valid"));
    let running = tokio::spawn(run::run(
        run::Plan {
            destination: worker.destination(),
            path: "/v2/models/tiny/infer".into(),
            headers,
            body: tiny_body().into(),
            clients: Vec::new(),
            rate: 300.0,
            length: std::time::Duration::from_secs(5),
            connections: 16,
            timeout: PATIENCE,
            seed: 3,
        },
        |_| {},
    ));
    let (mut served, mut digests) = (Vec::new(), Vec::new());
    for turn in 0..4 {
        // A second version comes, changes, and goes.
        let second = worker.models.join("tiny/2");
        match turn {
            0 => copied(&tiny(), &second),
            1 => {
                std::fs::remove_dir_all(&second).expect("removed");
                changed(&second);
            }
            2 => std::fs::remove_dir_all(&second).expect("removed"),
            _ => changed(&second),
        }
        let loaded = worker.control("tiny/load").await;
        assert_eq!(loaded.status, StatusCode::OK, "{}", String::from_utf8_lossy(&loaded.body));
        let answer = worker.send(Method::POST, "/v2/models/tiny/infer", &[], tiny_body()).await;
        let config = json_of(&worker.send(Method::GET, "/v2/models/tiny/config", &[], "").await);
        served.push((answer.header("isochrone-model-version").to_owned(), config["max_batch_size"].clone()));
        digests.push(answer.header("isochrone-model-digest").to_owned());
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    }
    assert_eq!(json!(served), json!([["2", 0], ["2", 8], ["1", 0], ["2", 8]]));
    digests.dedup();
    assert!(matches!(digests.as_slice(), [one] if one.len() == 64), "equal answers, equal digests: {digests:?}");
    let report = running.await.expect("no panic").expect("a report");
    assert_eq!((report.errors, report.ended > 1_000), (0, true), "{report:?}");
}

/// Requests that are computed as one get each its own answer: those of the reference, whoever is beside them.
#[tokio::test]
async fn joined_requests_get_their_own_answers() {
    let worker = Worker::start("joined", |models| changed(&models.join("tiny/1"))).await;
    let file = root().join("loadtest/tests/data/tiny.json");
    let data: Value = serde_json::from_slice(&std::fs::read(file).expect("the data")).expect("JSON");
    let cases: Vec<(Value, Vec<f64>)> = data["cases"].as_array().expect("cases").iter().map(case).collect();
    let mut asked = tokio::task::JoinSet::new();
    for turn in 0..240 {
        let (destination, (body, expected)) = (worker.destination(), cases[turn % cases.len()].clone());
        asked.spawn(async move {
            let request = Request::post("/v2/models/tiny/infer").body(Full::from(body.to_string())).expect("valid");
            let answer =
                json_of(&destination.connect().await.expect("it listens").send(request).await.expect("an answer"));
            let got = answer["outputs"][0]["data"].as_array().expect("numbers").iter();
            let got: Vec<f64> = got.map(|number| number.as_f64().expect("a number")).collect();
            assert_eq!(got.len(), expected.len());
            assert!(
                got.iter().zip(&expected).all(|(got, expected)| (got - expected).abs() < 1e-5),
                "{got:?} {expected:?}"
            );
        });
    }
    while let Some(checked) = asked.join_next().await {
        checked.expect("its own answer");
    }
    let stats = json_of(&worker.send(Method::GET, "/v2/models/tiny/stats", &[], "").await);
    let batches = stats["model_stats"][0]["execution_count"].as_u64().expect("a count");
    assert!(batches < 240, "{batches} batches of 240 requests: none was joined");
}

fn case(case: &Value) -> (Value, Vec<f64>) {
    let rows = case["x"].as_array().expect("rows");
    let body = json!({ "inputs": [{ "name": "x", "datatype": "FP32", "shape": [rows.len(), 8], "data": rows }] });
    let flat = case["y"].as_array().expect("rows").iter().flat_map(|row| row.as_array().expect("a row"));
    (body, flat.map(|number| number.as_f64().expect("a number")).collect())
}

#[tokio::test]
async fn a_model_that_does_not_load_leaves_the_old_one_serving_and_says_why() {
    let worker = Worker::start("bad-model", |models| copied(&tiny(), &models.join("tiny/1"))).await;
    let second = worker.models.join("tiny/2");
    std::fs::create_dir_all(&second).expect("a folder");
    std::fs::copy(tiny().join("model.toml"), second.join("model.toml")).expect("copied");
    std::fs::write(second.join("model.pt"), b"no archive").expect("written");
    let refused = worker.control("tiny/load").await;
    assert_eq!(refused.status, StatusCode::BAD_REQUEST);
    assert!(String::from_utf8_lossy(&refused.body).contains("model.pt"), "{:?}", refused.body);
    let answer = worker.send(Method::POST, "/v2/models/tiny/infer", &[], tiny_body()).await;
    assert_eq!((answer.status, answer.header("isochrone-model-version")), (StatusCode::OK, "1"));
    let index = worker.index().await;
    assert_eq!((index[0]["state"].as_str(), index[0]["version"].as_str()), (Some("READY"), Some("1")));
    assert!(index[0]["reason"].as_str().is_some_and(|reason| reason.contains("model.pt")), "{index}");
    let anybody = json_of(&worker.send(Method::POST, "/v2/repository/index", &[], "").await);
    assert!(anybody[0]["reason"].as_str().is_some_and(|reason| !reason.contains('/')), "{anybody}");
    std::fs::write(second.join("model.toml"), "kind = \"torchscript\"\nthreds = 1\n").expect("written");
    let refused = worker.control("tiny/load").await;
    assert!(String::from_utf8_lossy(&refused.body).contains("model.toml:2:1"), "{:?}", refused.body);
}

#[tokio::test]
async fn only_the_operator_changes_models() {
    let worker = Worker::start("operator", |models| copied(&tiny(), &models.join("tiny/1"))).await;
    let path = "/v2/repository/models/tiny/unload";
    let without = worker.send(Method::POST, path, &[], "").await;
    assert_eq!(without.status, StatusCode::UNAUTHORIZED);
    let wrong = worker.send(Method::POST, path, &[("authorization", "Bearer something else entirely")], "").await;
    assert_eq!(wrong.status, StatusCode::FORBIDDEN);
    for name in ["nobody", "..%2Ftiny", "%2e%2e", ".hidden"] {
        let answer = worker.control(&format!("{name}/load")).await;
        assert_eq!(answer.status, StatusCode::NOT_FOUND, "{name}");
    }
    let key = [("authorization", "Bearer the key of the operator of these tests")];
    let body = r#"{"parameters":{"config":"{}"}}"#;
    let parameter = worker.send(Method::POST, "/v2/repository/models/tiny/load", &key, body).await;
    assert_eq!(parameter.status, StatusCode::BAD_REQUEST);
    let answer = worker.send(Method::POST, "/v2/models/tiny/infer", &[], tiny_body()).await;
    assert_eq!(answer.status, StatusCode::OK, "nothing has changed");
}

#[tokio::test]
async fn an_unloaded_model_is_gone_with_its_memory_and_comes_back() {
    let minilm = root().join(".local/models/minilm/1");
    let fill = |models: &Path| {
        copied(&tiny(), &models.join("tiny/1"));
        copied(&minilm, &models.join("minilm/1"));
    };
    let worker = Worker::start("unload", fill).await;
    let body = json!({ "model": "minilm", "input": vec!["a text of some words"; 32] }).to_string();
    let embed = async || worker.send(Method::POST, "/v1/embeddings", &[], body.clone()).await.status;
    assert_eq!(embed().await, StatusCode::OK);
    let loaded = worker.resident_mb();
    assert_eq!(worker.control("minilm/unload").await.status, StatusCode::OK);
    let unloaded = worker.resident_mb();
    // The weights alone are 87 MB.
    assert!(unloaded + 70 < loaded, "{loaded} MB with the model, {unloaded} MB without");
    assert_eq!(embed().await, StatusCode::NOT_FOUND);
    assert_eq!(worker.control("minilm/unload").await.status, StatusCode::NOT_FOUND);
    let index = worker.index().await;
    let minilm = index.as_array().expect("a list").iter().find(|entry| entry["name"] == "minilm").expect("still there");
    assert_eq!((minilm["state"].as_str(), minilm["reason"].as_str()), (Some("UNAVAILABLE"), Some("unloaded")));
    assert_eq!(worker.control("minilm/load").await.status, StatusCode::OK);
    assert_eq!(embed().await, StatusCode::OK);
}

/// Texts that take a while.
fn long() -> String {
    json!({ "model": "minilm", "input": vec!["word ".repeat(200); 4] }).to_string()
}

fn asked(worker: &Worker, count: usize) -> tokio::task::JoinSet<(StatusCode, String)> {
    let mut asked = tokio::task::JoinSet::new();
    for _ in 0..count {
        let destination = worker.destination();
        asked.spawn(async move {
            let request = Request::post("/v1/embeddings").body(Full::from(long())).expect("valid");
            let answer = destination.connect().await.expect("it listens").send(request).await.expect("an answer");
            (answer.status, answer.header("retry-after").to_owned())
        });
    }
    asked
}

#[tokio::test]
async fn a_full_queue_is_said_at_once_and_what_was_taken_is_answered() {
    let minilm = root().join(".local/models/minilm/1");
    let fill = |models: &Path| copied(&minilm, &models.join("minilm/1"));
    let worker = Worker::start_with("full", &["--queue", "2"], fill).await;
    let began = Instant::now();
    let (mut refused, mut answered) = (Vec::new(), 0);
    let mut asked = asked(&worker, 12);
    while let Some(answer) = asked.join_next().await {
        match answer.expect("no panic") {
            (StatusCode::OK, _) => answered += 1,
            (StatusCode::SERVICE_UNAVAILABLE, retry) => refused.push((retry, began.elapsed())),
            (other, _) => panic!("{other}"),
        }
    }
    let whole = began.elapsed();
    assert!(answered >= 3 && refused.len() >= 6, "{answered} answered, {} refused", refused.len());
    assert!(refused.iter().all(|(retry, after)| retry == "1" && *after < whole / 2), "{refused:?} of {whole:?}");
}

#[tokio::test]
async fn a_worker_that_leaves_answers_what_it_has_taken() {
    let minilm = root().join(".local/models/minilm/1");
    let fill = |models: &Path| copied(&minilm, &models.join("minilm/1"));
    let mut worker = Worker::start_with("leaving", &["--lame-duck", "300ms", "--grace", "30s"], fill).await;
    let mut asked = asked(&worker, 8);
    // All are inside, by the worker's own report.
    let since = Instant::now();
    loop {
        let answer = worker.send(Method::GET, "/v2/health/ready", &[], "").await;
        if answer.header("endpoint-load-metrics").contains("in_flight=8") {
            break;
        }
        assert!(since.elapsed() < PATIENCE, "{}", answer.header("endpoint-load-metrics"));
    }
    worker.process.signal("TERM");
    // Not ready, and still there, so that gateways look away before connections are refused.
    let since = Instant::now();
    while worker.send(Method::GET, "/v2/health/ready", &[], "").await.status != StatusCode::SERVICE_UNAVAILABLE {
        assert!(since.elapsed() < PATIENCE);
    }
    while let Some(answer) = asked.join_next().await {
        assert_eq!(answer.expect("no panic").0, StatusCode::OK);
    }
    assert!(worker.process.terminate().success());
}

/// Each is refused in the protocol's form, names the input where it is one, and the worker goes on.
#[tokio::test]
async fn hostile_tensors_are_refused_by_name_and_cost_nothing() {
    let worker = Worker::start("hostile", |models| copied(&tiny(), &models.join("tiny/1"))).await;
    let input = |rest: &str| format!(r#"{{"inputs":[{{"name":"x",{rest}}}]}}"#);
    let eight = "[1,2,3,4,5,6,7,8]";
    let plain: Vec<(String, &str)> = vec![
        (input(&format!(r#""shape":[1,7],"datatype":"FP32","data":{eight}"#)), "`x`"),
        (input(&format!(r#""shape":[2,8],"datatype":"FP32","data":{eight}"#)), "`x`"),
        (input(&format!(r#""shape":[-1,8],"datatype":"FP32","data":{eight}"#)), "`x`"),
        (input(&format!(r#""shape":[4611686018427387904,8],"datatype":"FP32","data":{eight}"#)), "`x`"),
        (input(&format!(r#""shape":[100000000,8],"datatype":"FP32","data":{eight}"#)), "`x`"),
        (input(&format!(r#""shape":[99999999999999999999,8],"datatype":"FP32","data":{eight}"#)), "shape"),
        (input(r#""shape":[9223372036854775807,8],"datatype":"FP32","data":[]"#), "`x`"),
        (input(r#""shape":[4097,8],"datatype":"FP32","data":[]"#), "`x`"),
        (tiny_body().replacen('{', r#"{"outputs":[{"name":"y"},{"name":"y"}],"#, 1), "twice"),
        (input(&format!(r#""shape":[1,8],"datatype":"FP64","data":{eight}"#)), "`x`"),
        (input(&format!(r#""shape":[1,8],"datatype":"NONSENSE","data":{eight}"#)), "`x`"),
        (input(r#""shape":[1,8],"datatype":"FP32","data":[1,2,3,4,5,6,7,NaN]"#), "body"),
        (input(r#""shape":[1,8],"datatype":"FP32","data":[1,2,3,4,5,6,7,"8"]"#), "`x`"),
        (input(r#""shape":[1,8],"datatype":"FP32","data":[1,2,3,4,5,6,7,1e39]"#), "`x`"),
        (input(r#""shape":[1,8],"datatype":"FP32""#), "`x`"),
        (
            input(&format!(r#""shape":[1,8],"datatype":"FP32","data":{eight},"parameters":{{"binary_data_size":0}}"#)),
            "`x`",
        ),
        (input(r#""shape":[1,8],"datatype":"FP32","parameters":{"binary_data_size":1000000000}"#), "`x`"),
        (format!(r#"{{"inputs":[{{"name":"y","shape":[1,8],"datatype":"FP32","data":{eight}}}]}}"#), "`y`"),
        (r#"{"inputs":[]}"#.to_owned(), "`x`"),
        (r#"{"inputs":"#.to_owned(), "body"),
        ("[".repeat(100_000), "body"),
        (tiny_body().replacen('{', r#"{"outputs":[{"name":"z"}],"#, 1), "`z`"),
        (tiny_body().replacen('{', r#"{"parameters":{"sequence_id":7},"#, 1), "sequence_id"),
    ];
    for (body, named) in plain {
        let answer = worker.send(Method::POST, "/v2/models/tiny/infer", &[], body.clone()).await;
        let told: Value = serde_json::from_slice(&answer.body).expect("JSON");
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{body:.200}: {told}");
        assert!(told["error"].as_str().is_some_and(|error| error.contains(named)), "{body:.200}: {told}");
    }
    let binary = input(r#""shape":[1,8],"datatype":"FP32","parameters":{"binary_data_size":32}"#);
    for (header, tail, named) in [
        (binary.len().to_string(), 31, "`x`"),
        (binary.len().to_string(), 33, "bytes"),
        ("1000000000".to_owned(), 32, "Inference-Header"),
        ("-1".to_owned(), 32, "Inference-Header"),
        ("nonsense".to_owned(), 32, "Inference-Header"),
        ("3".to_owned(), 32, "body"),
    ] {
        let body = [binary.as_bytes(), &vec![0; tail]].concat();
        let headers = [("inference-header-content-length", header.as_str())];
        let answer = worker.send(Method::POST, "/v2/models/tiny/infer", &headers, body).await;
        let told = String::from_utf8_lossy(&answer.body).into_owned();
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{header} {tail}: {told}");
        assert!(told.contains(named), "{header} {tail}: {told}");
    }
    for (encoding, body, status) in [
        ("gzip", b"no gzip".to_vec(), StatusCode::BAD_REQUEST),
        ("br", b"whatever".to_vec(), StatusCode::UNSUPPORTED_MEDIA_TYPE),
        // 300 MB of zeros in as many kilobytes.
        ("gzip", bomb(), StatusCode::PAYLOAD_TOO_LARGE),
    ] {
        let answer = worker.send(Method::POST, "/v2/models/tiny/infer", &[("content-encoding", encoding)], body).await;
        assert_eq!(answer.status, status, "{encoding}: {}", String::from_utf8_lossy(&answer.body));
    }
    assert!(worker.resident_mb() < 400, "{} MB", worker.resident_mb());
    let answer = worker.send(Method::POST, "/v2/models/tiny/infer", &[], tiny_body()).await;
    assert_eq!(answer.status, StatusCode::OK);
}

/// gzip members one behind the other are one file: a megabyte of zeros, three hundred times.
fn bomb() -> Vec<u8> {
    let member = Command::new("sh").args(["-c", "head -c 1048576 /dev/zero | gzip -9"]).output().expect("gzip runs");
    member.stdout.repeat(300)
}
