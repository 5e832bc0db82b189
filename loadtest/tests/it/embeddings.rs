//! The embeddings are those of the Python library, in both dialects, through the gateway.

use http::StatusCode;
use isochrone_loadtest::client::Answer;
use serde_json::{Value, json};

use crate::world::{Ask, Plan, World, embeddings_body, root};

/// (text, vector) as computed once by sentence-transformers; see `make_minilm.py` beside the data.
fn references() -> Vec<(String, Vec<f32>)> {
    let file = root().join("loadtest/tests/data/minilm.json");
    let data: Value = serde_json::from_slice(&std::fs::read(file).expect("the data")).expect("JSON");
    let cases = data["cases"].as_array().expect("cases").iter();
    cases.map(|case| (case["text"].as_str().expect("a text").to_owned(), vector(&case["embedding"]))).collect()
}

fn vector(value: &Value) -> Vec<f32> {
    value.as_array().expect("numbers").iter().map(|x| x.as_f64().expect("a number") as f32).collect()
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

fn json_of(answer: &Answer) -> Value {
    assert_eq!(answer.status, StatusCode::OK, "{}", String::from_utf8_lossy(&answer.body));
    serde_json::from_slice(&answer.body).expect("JSON")
}

fn ask(path: &'static str, body: String) -> Ask<'static> {
    Ask { path, body, ..Ask::default() }
}

#[tokio::test]
async fn embeddings_are_those_of_the_reference() {
    let world = World::start("embeddings", Plan::minilm()).await;
    let references = references();
    assert!(references.len() >= 20);

    // One by one, so that a batch's padding cannot make up for a mistake; and all at once, so that it cannot make one.
    let texts: Vec<&str> = references.iter().map(|(text, _)| text.as_str()).collect();
    let together = json_of(&world.ask(ask("/v1/embeddings", embeddings_body(&texts))).await);
    let mut connection = world.connect().await;
    for (at, (text, expected)) in references.iter().enumerate() {
        let alone = connection
            .send(ask("/v1/embeddings", embeddings_body(&[text.as_str()])).request())
            .await
            .expect("an answer");
        let alone = json_of(&alone);
        for (how, got) in [
            ("alone", vector(&alone["data"][0]["embedding"])),
            ("together", vector(&together["data"][at]["embedding"])),
        ] {
            assert_eq!(got.len(), 384);
            let similarity = cosine(&got, expected);
            assert!(similarity > 0.9999, "{how} {text:?}: cosine {similarity}");
            let length = got.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
            assert!((length - 1.0).abs() < 1e-4, "{how} {text:?}: length {length}");
        }
    }
    assert_eq!(together["data"].as_array().map(Vec::len), Some(texts.len()));
    assert!(together["usage"]["prompt_tokens"].as_u64().is_some_and(|tokens| tokens > texts.len() as u64));
}

#[tokio::test]
async fn the_inference_protocol_gives_the_same_vectors() {
    let world = World::start("oip", Plan::minilm()).await;
    let (text, expected) = references().swap_remove(0);
    let body = json!({ "id": "42", "inputs": [{ "name": "text", "datatype": "BYTES", "shape": [2], "data": [text, "other"] }] });
    let answer = world.ask(ask("/v2/models/minilm/infer", body.to_string())).await;
    assert_eq!(answer.header("isochrone-region"), "eu-west");
    let answer = json_of(&answer);
    assert_eq!(
        (&answer["id"], &answer["model_name"], &answer["model_version"]),
        (&json!("42"), &json!("minilm"), &json!("1"))
    );
    let output = &answer["outputs"][0];
    assert_eq!(
        (&output["name"], &output["datatype"], &output["shape"]),
        (&json!("embedding"), &json!("FP32"), &json!([2, 384]))
    );
    let data = vector(&output["data"]);
    assert!(cosine(&data[..384], &expected) > 0.9999);
    assert!(cosine(&data[384..], &expected) < 0.9, "two texts, two vectors");

    // OpenAI's SDK asks for base64 by default: the same numbers, little-endian.
    let body = json!({ "model": "minilm", "input": text, "encoding_format": "base64" }).to_string();
    let base64 = json_of(&world.ask(ask("/v1/embeddings", body)).await);
    let encoded = base64["data"][0]["embedding"].as_str().expect("base64").to_owned();
    let bytes = base64_decoded(&encoded);
    let decoded: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    assert!(cosine(&decoded, &expected) > 0.9999);
    // Token ids are taken as they are; `dimensions` shortens to unit length again.
    let body = json!({ "model": "minilm", "input": [[101, 7592, 2088, 102]], "dimensions": 128 }).to_string();
    let short = vector(&json_of(&world.ask(ask("/v1/embeddings", body)).await)["data"][0]["embedding"]);
    let hello = references().into_iter().find(|(text, _)| text == "hello world").expect("in the data").1;
    assert_eq!(short.len(), 128);
    assert!(cosine(&short, &hello[..128]) > 0.9999);
}

fn base64_decoded(text: &str) -> Vec<u8> {
    let digit = |c: u8| match c {
        b'A'..=b'Z' => c - b'A',
        b'a'..=b'z' => c - b'a' + 26,
        b'0'..=b'9' => c - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        other => panic!("no base64: {other}"),
    };
    let digits: Vec<u32> = text.trim_end_matches('=').bytes().map(|c| u32::from(digit(c))).collect();
    let group = |group: &[u32]| {
        let bits = group.iter().fold(0, |bits, digit| bits << 6 | digit) << (6 * (4 - group.len()));
        bits.to_be_bytes()[1..group.len()].to_vec()
    };
    digits.chunks(4).flat_map(group).collect()
}

#[tokio::test]
async fn bad_input_is_refused_in_words_that_help() {
    let world = World::start("bad-input", Plan::minilm()).await;
    let infer = |input: Value| json!({ "inputs": [input] }).to_string();
    let rows = [
        ("/v1/embeddings", json!({ "model": "minilm", "input": [] }).to_string(), 400, "input"),
        ("/v1/embeddings", json!({ "model": "minilm", "input": { "a": 1 } }).to_string(), 400, "input"),
        ("/v1/embeddings", json!({ "model": "minilm", "input": [[99_999_999]] }).to_string(), 400, "token"),
        ("/v1/embeddings", json!({ "model": "minilm", "input": "a", "dimensions": 0 }).to_string(), 400, "dimensions"),
        ("/v1/embeddings", json!({ "input": "a" }).to_string(), 400, "model"),
        ("/v1/embeddings", "{".to_owned(), 400, "JSON"),
        ("/v1/embeddings", json!({ "model": "other", "input": "a" }).to_string(), 404, "model"),
        ("/v2/models/other/infer", infer(json!({})), 404, "model"),
        (
            "/v2/models/minilm/infer",
            infer(json!({ "name": "x", "datatype": "BYTES", "shape": [1], "data": ["a"] })),
            400,
            "`x`",
        ),
        (
            "/v2/models/minilm/infer",
            infer(json!({ "name": "text", "datatype": "FP32", "shape": [1], "data": [1] })),
            400,
            "BYTES",
        ),
        (
            "/v2/models/minilm/infer",
            infer(json!({ "name": "text", "datatype": "BYTES", "shape": [2], "data": ["a"] })),
            400,
            "elements",
        ),
        (
            "/v2/models/minilm/infer",
            infer(json!({ "name": "text", "datatype": "BYTES", "shape": [-1], "data": ["a"] })),
            400,
            "shape",
        ),
        (
            "/v2/models/minilm/infer",
            infer(json!({ "name": "text", "datatype": "BYTES", "shape": [1], "data": [1] })),
            400,
            "text",
        ),
        ("/v2/models/minilm/infer", json!({ "inputs": [] }).to_string(), 400, "missing"),
        ("/v2/models/minilm/versions/9/infer", infer(json!({})), 404, "version"),
        ("/v2/repository/models/minilm/unload", "{}".to_owned(), 403, "worker"),
        ("/v3/other", "{}".to_owned(), 404, "path"),
    ];
    for (path, body, status, word) in rows {
        let answer = world.ask(ask(path, body.clone())).await;
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        assert_eq!(
            (answer.status.as_u16(), text.contains(word)),
            (status, true),
            "{path} {body}: {} {text}",
            answer.status
        );
        let error: Value = serde_json::from_slice(&answer.body).expect("JSON");
        let in_dialect =
            if path.starts_with("/v1") { error["error"]["message"].is_string() } else { error["error"].is_string() };
        assert!(in_dialect, "{text}");
        assert!(!text.contains("127.0.0.1"), "an internal address: {text}");
    }
}
