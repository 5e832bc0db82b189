//! One trace for one request, across gateway and worker, as a person sees it in the Jaeger UI.

use std::collections::BTreeMap;
use std::process::Command;

use http::{Request, StatusCode};
use http_body_util::Full;
use isochrone_loadtest::client::Destination;
use serde_json::Value;

use crate::world::{Ask, GERMANY, Plan, Process, World, binary, free_port};

/// A span as far as the test cares.
#[derive(Debug)]
struct Span {
    operation: String,
    service: String,
    parent: Option<String>,
    tags: BTreeMap<String, String>,
}

#[tokio::test]
async fn a_failed_over_request_is_one_trace_with_each_of_its_steps() {
    let (otlp, http, ui) = (free_port(), free_port(), free_port());
    let mut plan = Plan::minilm();
    plan.gateway = format!("[telemetry]\notlp = \"http://127.0.0.1:{otlp}\"\nsampling = 1.0\n");
    let folder = crate::world::folder("viewer");
    let mut command = Command::new(binary("isochrone-local"));
    command.arg("viewer").args(["--otlp", &format!("127.0.0.1:{otlp}")]);
    command.args(["--otlp-http", &format!("127.0.0.1:{http}"), "--ui", &format!("127.0.0.1:{ui}")]);
    let _viewer = Process::start("viewer", &mut command, &folder.join("viewer.log"));
    let mut world = World::start("traces", plan).await;

    world.workers.get_mut("eu-west").expect("started").kill();
    let ask = Ask {
        path: "/v1/embeddings",
        body: crate::world::embeddings_body(&["hello world"]),
        headers: vec![("x-request-id", "traced-1".into())],
        ..Ask::from(GERMANY)
    };
    let answer = world.ask(ask).await;
    assert_eq!(
        (answer.status, answer.header("isochrone-region"), answer.header("isochrone-attempts")),
        (StatusCode::OK, "us-east", "2")
    );

    let spans = world
        .until("the trace is whole", async |_| {
            let spans = trace(ui).await?;
            ["request", "location", "permission", "pick", "attempt", "infer", "queue", "batch", "execute"]
                .iter()
                .all(|name| {
                    spans.values().any(|span| span.operation == *name || (*name == "request" && span.parent.is_none()))
                })
                .then_some(spans)
        })
        .await;
    let all = |operation: &str| -> Vec<(&String, &Span)> {
        spans.iter().filter(|(_, span)| span.operation == operation).collect()
    };
    let roots: Vec<_> = spans.iter().filter(|(_, span)| span.parent.is_none()).collect();
    assert_eq!(roots.len(), 1, "{spans:#?}");
    let (root_id, root) = roots[0];
    assert_eq!((root.service.as_str(), root.operation.as_str()), ("isochrone-gateway", "POST /v1/embeddings"));
    for (tag, value) in [
        ("geo.country.iso_code", "DE"),
        ("isochrone.tenant", "demo"),
        ("isochrone.region", "us-east"),
        ("isochrone.attempts", "2"),
        ("isochrone.request_id", "traced-1"),
    ] {
        assert_eq!(root.tags.get(tag).map(String::as_str), Some(value), "{tag} of {:#?}", root.tags);
    }
    assert_eq!(all("location")[0].1.tags["geo.country.iso_code"], "DE");
    let attempts = all("attempt");
    let outcome = |region: &str| {
        let (id, span) = attempts.iter().find(|(_, span)| span.tags["isochrone.region"] == region).expect("an attempt");
        assert_eq!(span.parent.as_ref(), Some(root_id));
        assert!(span.tags.contains_key("isochrone.endpoint"));
        ((*id).clone(), span.tags["isochrone.outcome"].clone())
    };
    assert_eq!(attempts.len(), 2);
    assert_eq!(outcome("eu-west").1, "connect_failed");
    let (served, how) = outcome("us-east");
    assert_eq!(how, "ok");
    // The worker's spans hang below the attempt that reached it.
    let (infer_id, infer) = all("infer")[0];
    assert_eq!((infer.service.as_str(), infer.parent.as_ref()), ("isochrone-backend", Some(&served)));
    for step in ["queue", "batch", "execute"] {
        assert_eq!(all(step)[0].1.parent.as_ref(), Some(infer_id), "{step}");
    }
    // The log leads to the trace.
    world
        .until("the access line is written", async |world| {
            let log = world.gateway.as_ref()?.log();
            let line = log.lines().find(|line| line.contains("traced-1") && line.contains("\"access\""))?.to_owned();
            line.contains("\"trace_id\":").then_some(())
        })
        .await;
}

/// The spans of the newest trace of the embeddings route, by id.
async fn trace(ui: u16) -> Option<BTreeMap<String, Span>> {
    let destination = Destination::new(&format!("http://127.0.0.1:{ui}"), None, false).expect("a URL");
    let path = "/api/traces?service=isochrone-gateway&limit=20";
    let answer =
        destination.connect().await.ok()?.send(Request::get(path).body(Full::default()).expect("valid")).await.ok()?;
    let found: Value = serde_json::from_slice(&answer.body).ok()?;
    let trace = found["data"].as_array()?.iter().find(|trace| trace.to_string().contains("traced-1"))?;
    let processes = &trace["processes"];
    let spans = trace["spans"].as_array()?.iter().map(|span| {
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let tags = span["tags"].as_array().into_iter().flatten().map(|tag| (text(&tag["key"]), text(&tag["value"])));
        let parent = span["references"].as_array().and_then(|all| Some(text(&all.first()?["spanID"])));
        let service = text(&processes[text(&span["processID"])]["serviceName"]);
        (text(&span["spanID"]), Span { operation: text(&span["operationName"]), service, parent, tags: tags.collect() })
    });
    Some(spans.collect())
}
