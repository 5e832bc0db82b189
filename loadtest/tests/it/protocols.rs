//! The same answers over every listener and version of HTTP.

use http::StatusCode;
use isochrone_loadtest::client::Destination;
use serde_json::Value;

use crate::world::{Ask, Plan, World, root};

#[tokio::test]
async fn http1_and_http2_with_and_without_tls_give_the_models_numbers() {
    let world = World::start("protocols", Plan::default()).await;
    let data: Value =
        serde_json::from_slice(&std::fs::read(root().join("loadtest/tests/data/tiny.json")).expect("the data"))
            .expect("JSON");
    let plain = format!("http://127.0.0.1:{}", world.plain);
    let plain = |http2| Destination::new(&plain, None, http2).expect("a URL");
    for destination in [world.destination(false), world.destination(true), plain(false), plain(true)] {
        let mut connection = destination.connect().await.expect("connects");
        for case in data["cases"].as_array().expect("cases") {
            let rows = case["x"].as_array().expect("rows").len();
            let body = serde_json::json!({ "inputs": [{ "name": "x", "datatype": "FP32", "shape": [rows, 8], "data": case["x"] }] });
            let answer =
                connection.send(Ask { body: body.to_string(), ..Ask::default() }.request()).await.expect("an answer");
            assert_eq!(answer.status, StatusCode::OK, "{}", String::from_utf8_lossy(&answer.body));
            let answer: Value = serde_json::from_slice(&answer.body).expect("JSON");
            let got = answer["outputs"][0]["data"].as_array().expect("numbers").iter();
            let expected: Vec<f64> = case["y"]
                .as_array()
                .expect("rows")
                .iter()
                .flat_map(|row| row.as_array().expect("numbers"))
                .filter_map(Value::as_f64)
                .collect();
            assert_eq!(got.len(), expected.len());
            for (got, expected) in got.zip(&expected) {
                assert!((got.as_f64().expect("a number") - expected).abs() < 1e-5, "{got} {expected}");
            }
        }
        for path in [
            "/v2",
            "/v2/health/live",
            "/v2/health/ready",
            "/v2/models/tiny",
            "/v2/models/tiny/ready",
            "/v2/models/tiny/versions/1",
        ] {
            let answer = connection
                .send(Ask { path, body: String::new(), ..Ask::default() }.request())
                .await
                .expect("an answer");
            assert_eq!(answer.status, StatusCode::OK, "{path}");
        }
    }
}
