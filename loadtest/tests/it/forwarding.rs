//! What an upstream gets and a client gets back, byte for byte and no more than that.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use isochrone_loadtest::client::Destination;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::stub::{self, Body, endpoint, full};
use crate::world::{Ask, GERMANY, JAPAN, Plan, World, secrets};

type Seen = Arc<Mutex<Vec<(http::request::Parts, Bytes)>>>;

/// Answers 200 to everything and remembers what it was sent, probes apart.
fn recorder(
    seen: &Seen,
) -> impl Fn(Request<Incoming>) -> std::pin::Pin<Box<dyn Future<Output = Response<Body>> + Send>> + Clone + use<> {
    let seen = Arc::clone(seen);
    move |request| {
        let seen = Arc::clone(&seen);
        Box::pin(async move {
            let (head, body) = request.into_parts();
            let body = body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
            if !head.uri.path().starts_with("/v2/health") {
                seen.lock().expect("no panic").push((head, body));
            }
            let mut response = Response::new(full("{}"));
            response.headers_mut().insert("endpoint-load-metrics", http::HeaderValue::from_static("TEXT cpu=1"));
            response.headers_mut().insert("isochrone-region", http::HeaderValue::from_static("mars"));
            response.headers_mut().insert("x-model", http::HeaderValue::from_static("kept"));
            response
        })
    }
}

fn plan(port: u16) -> Plan {
    let mut plan = Plan::default();
    for (region, ..) in crate::world::REGIONS {
        plan.endpoints.insert(region, endpoint(&format!("http = \"http://127.0.0.1:{port}\"")));
    }
    plan
}

#[tokio::test]
async fn an_endpoint_gets_the_request_without_credentials_and_the_client_the_answer_without_internals() {
    let seen = Seen::default();
    let port = stub::serve(None, recorder(&seen)).await;
    let world = World::start("forwarding", plan(port)).await;
    let headers = vec![
        ("x-custom", "1".to_owned()),
        ("x-request-id", "given-7".to_owned()),
        ("isochrone-region", "mars".to_owned()),
        ("forwarded", "for=1.2.3.4".to_owned()),
        ("connection", "x-hop".to_owned()),
        ("x-hop", "1".to_owned()),
    ];
    let answer = world.ask(Ask { headers, path: "/v2/models/tiny/infer?a=b%20c", ..Ask::default() }).await;
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!((answer.header("isochrone-region"), answer.header("x-model")), ("eu-west", "kept"));
    assert_eq!((answer.header("endpoint-load-metrics"), answer.header("x-request-id")), ("", "given-7"));
    let (head, body) = seen.lock().expect("no panic").remove(0);
    assert_eq!(head.uri, "/v2/models/tiny/infer?a=b%20c");
    assert_eq!(body, crate::world::tiny_body());
    let has = |name: &str| head.headers.contains_key(name);
    assert!(
        !has("authorization") && !has("x-hop") && !has("forwarded") && !has("isochrone-region"),
        "{:?}",
        head.headers
    );
    assert_eq!(head.headers["x-custom"], "1");
    assert_eq!(head.headers["x-forwarded-for"], GERMANY);
    assert_eq!(head.headers["x-forwarded-proto"], "https");
    assert_eq!(head.headers["x-request-id"], "given-7");
    assert_eq!(head.headers["host"], format!("127.0.0.1:{port}"));
    let key = &secrets().keys["demo"];
    assert!(!format!("{:?}", head.headers).contains(key.as_str()));
    assert!(!world.gateway.as_ref().expect("started").log().contains(key.as_str()));
}

/// A gigabyte goes through, and is never in memory.
#[tokio::test]
async fn a_large_upload_streams() {
    const CHUNK: usize = 1 << 16;
    const CHUNKS: usize = 16 * 1024;
    let port = stub::serve(None, |request: Request<Incoming>| async move {
        let mut body = request.into_body();
        let mut size = 0_u64;
        while let Some(Ok(frame)) = body.frame().await {
            size += frame.data_ref().map_or(0, |data| data.len() as u64);
        }
        Response::new(full(size.to_string()))
    })
    .await;
    let world = World::start("upload", plan(port)).await;
    let pid = world.gateway.as_ref().expect("started").pid();
    let before = resident_kib(pid);
    let mut stream = TcpStream::connect(("127.0.0.1", world.plain)).await.expect("connects");
    let head = format!(
        "POST /v2/models/tiny/infer HTTP/1.1\r\nhost: a\r\nx-api-key: {}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        secrets().keys["demo"],
        CHUNK * CHUNKS
    );
    stream.write_all(head.as_bytes()).await.expect("sent");
    let chunk = vec![b'x'; CHUNK];
    let mut peak = before;
    for at in 0..CHUNKS {
        stream.write_all(&chunk).await.expect("sent");
        if at % 512 == 0 {
            peak = peak.max(resident_kib(pid));
        }
    }
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with(&(CHUNK * CHUNKS).to_string()), "{answer}");
    assert!(peak < before + 32 * 1024, "resident: {before} KiB before, {peak} KiB at most");
}

fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("alive");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("a size");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number")
}

/// Events reach the client as they are made, not when the answer ends; and an answer that breaks off is not passed for
/// a whole one.
#[tokio::test]
async fn an_answer_streams_and_breaks_off_as_it_does() {
    let (send, receive) = tokio::sync::mpsc::channel::<Result<Frame<Bytes>, std::convert::Infallible>>(1);
    let receive = Arc::new(Mutex::new(Some(receive)));
    let port = stub::serve(None, move |request: Request<Incoming>| {
        let receive = Arc::clone(&receive);
        async move {
            if request.uri().path().starts_with("/v2/health") {
                return Response::new(full("{}"));
            }
            let receive = receive.lock().expect("no panic").take().expect("one request");
            let events = futures_util::stream::unfold(receive, async |mut receive| {
                receive.recv().await.map(|event| (event, receive))
            });
            Response::builder()
                .header("content-type", "text/event-stream")
                .body(StreamBody::new(events).boxed())
                .expect("valid")
        }
    })
    .await;
    let world = World::start("events", plan(port)).await;
    let ask = Ask { path: "/v1/chat/completions", body: r#"{"model":"tiny","stream":true}"#.into(), ..Ask::default() };
    let response = world.connect().await.start(ask.request()).await.expect("a head");
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let mut body = response.into_body();
    for event in ["data: 1\n\n", "data: 2\n\n"] {
        send.send(Ok(Frame::data(Bytes::from_static(event.as_bytes())))).await.expect("taken");
        let frame = body.frame().await.expect("a frame").expect("unbroken").into_data().expect("data");
        assert_eq!(frame, event, "each event on its own, before the next is made");
    }
    drop(send);
    assert!(body.frame().await.is_none());
    world
        .until("nothing is in flight", async |world| {
            let regions = world.regions().await?.to_string();
            (!regions.contains("\"in_flight\":1")).then_some(())
        })
        .await;
}

#[tokio::test]
async fn endpoints_over_tls_with_a_private_ca_speak_http2_and_others_are_not_believed() {
    let seen = Seen::default();
    let port = stub::serve(Some(&secrets().folder), recorder(&seen)).await;
    let mut plan = Plan::default();
    let other = crate::world::folder("other-ca");
    let made = std::process::Command::new(crate::world::binary("isochrone-local")).arg("certs").arg(&other).status();
    assert!(made.expect("runs").success());
    let https = |ca: &std::path::Path| {
        endpoint(&format!("http = \"https://localhost:{port}\"\ntls = {{ ca = \"{}/ca.pem\" }}", ca.display()))
    };
    plan.endpoints.insert("eu-west", https(&secrets().folder));
    plan.endpoints.insert("us-east", https(&secrets().folder));
    plan.endpoints.insert("ap-northeast", https(&other));
    let mut world = World::configured("private-ca", plan);
    world.spawn_gateway();
    world
        .until("the right CA is believed", async |world| {
            let regions = world.regions().await?;
            (regions[1]["endpoints"][0]["healthy"] == true && regions[2]["endpoints"][0]["healthy"] == true)
                .then_some(())
        })
        .await;
    assert_eq!(world.regions().await.expect("regions")[0]["endpoints"][0]["healthy"], false);
    let answer = world.ask(Ask::from(JAPAN)).await;
    // As the crow flies: Dublin is nearer to Tokyo than Ashburn.
    assert_eq!((answer.status, answer.header("isochrone-region")), (StatusCode::OK, "eu-west"));
    let (head, _) = seen.lock().expect("no panic").remove(0);
    assert_eq!(head.version, http::Version::HTTP_2);
    assert_eq!(head.uri.authority().map(|authority| authority.as_str()), Some(&*format!("localhost:{port}")));
}

#[tokio::test]
async fn grpc_passes_with_its_trailers_and_is_steered_by_its_model() {
    let port = stub::serve(None, |request: Request<Incoming>| async move {
        let te = request.headers().get("te").cloned();
        let timeout = request.headers().contains_key("grpc-timeout");
        let body = request.into_body().collect().await.expect("a body").to_bytes();
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", http::HeaderValue::from_static("0"));
        trailers.insert("x-te", te.unwrap_or(http::HeaderValue::from_static("none")));
        trailers.insert("x-timeout", http::HeaderValue::from_static(if timeout { "yes" } else { "no" }));
        let frames = futures_util::stream::iter([Ok(Frame::data(body)), Ok(Frame::trailers(trailers))]);
        Response::builder()
            .header("content-type", "application/grpc")
            .body(StreamBody::new(frames).boxed())
            .expect("valid")
    })
    .await;
    let mut plan = Plan::default();
    for (region, ..) in crate::world::REGIONS {
        plan.endpoints.insert(region, endpoint(&format!("grpc = \"http://127.0.0.1:{port}\"")));
    }
    let world = World::start("grpc", plan).await;
    let message = |model: &str| {
        let field = [b"\x0a", &[u8::try_from(model.len()).expect("short")][..], model.as_bytes()].concat();
        let length = u32::try_from(field.len()).expect("short").to_be_bytes();
        [&[0][..], &length, &field].concat()
    };
    let call = |path: &'static str, body: Vec<u8>| {
        let mut request = Ask { path, ..Ask::from(JAPAN) }.request();
        request.headers_mut().insert("content-type", http::HeaderValue::from_static("application/grpc"));
        request.headers_mut().insert("te", http::HeaderValue::from_static("trailers"));
        *request.body_mut() = http_body_util::Full::from(body);
        request
    };
    let mut connection = world.destination(true).connect().await.expect("connects");
    let infer = "/inference.GRPCInferenceService/ModelInfer";
    let answer = connection.send(call(infer, message("tiny"))).await.expect("an answer");
    assert_eq!((answer.status, answer.header("isochrone-region")), (StatusCode::OK, "ap-northeast"));
    assert_eq!(answer.body, message("tiny"));
    let trailers = answer.trailers.expect("trailers");
    assert_eq!(
        (&trailers["grpc-status"], &trailers["x-te"], &trailers["x-timeout"]),
        (
            &http::HeaderValue::from(0),
            &http::HeaderValue::from_static("trailers"),
            &http::HeaderValue::from_static("yes")
        )
    );
    // Refusals are in gRPC's own words.
    for (path, model, status) in [
        (infer, "unknown", "5"),
        ("/inference.GRPCInferenceService/RepositoryModelLoad", "tiny", "7"),
        ("/a.B/C", "tiny", "12"),
    ] {
        let answer = connection.send(call(path, message(model))).await.expect("an answer");
        assert_eq!((answer.status, answer.header("grpc-status")), (StatusCode::OK, status), "{path} {model}");
        assert!(!answer.header("grpc-message").is_empty());
    }
}

/// A request whose connection breaks at two endpoints is not sent to a third.
#[tokio::test]
async fn a_query_of_death_does_not_walk_the_world() {
    let hits = Arc::new(Mutex::new(0));
    let counted = Arc::clone(&hits);
    // Reads a head and hangs up, except on probes.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = [0; 4096];
            let size = stream.read(&mut head).await.unwrap_or(0);
            if head[..size].starts_with(b"GET /v2/health") {
                // A client that is gone needs no answer.
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").await;
            } else {
                *counted.lock().expect("no panic") += 1;
            }
        }
    });
    let world = World::start("death", plan(port)).await;
    let answer = world.ask(Ask::default()).await;
    assert_eq!((answer.status, answer.header("isochrone-attempts")), (StatusCode::BAD_GATEWAY, "2"));
    assert_eq!(*hits.lock().expect("no panic"), 2);
    // What must not be done twice is not even sent to a second.
    let once = Ask { path: "/v1/chat/completions", body: r#"{"model":"tiny"}"#.into(), from: JAPAN, ..Ask::default() };
    assert_eq!(world.ask(once).await.status, StatusCode::BAD_GATEWAY);
    let sequence =
        Ask { body: r#"{"parameters":{"sequence_id":1},"inputs":[]}"#.into(), from: JAPAN, ..Ask::default() };
    assert_eq!(world.ask(sequence).await.status, StatusCode::BAD_GATEWAY);
    assert_eq!(*hits.lock().expect("no panic"), 4);
}

#[tokio::test]
async fn heads_and_bodies_beyond_the_bounds_are_refused() {
    let seen = Seen::default();
    let port = stub::serve(None, recorder(&seen)).await;
    let mut plan = plan(port);
    plan.gateway = "[limits]\nopenai_body = \"1MiB\"\nheader_timeout = \"500ms\"\nbody_timeout = \"500ms\"\n".into();
    let world = World::start("bounds", plan).await;
    let key = &secrets().keys["demo"];
    let raw = async |text: String| {
        let mut stream = TcpStream::connect(("127.0.0.1", world.plain)).await.expect("connects");
        stream.write_all(text.as_bytes()).await.expect("sent");
        let mut answer = vec![0; 4096];
        let size = stream.read(&mut answer).await.unwrap_or(0);
        String::from_utf8_lossy(&answer[..size]).lines().next().unwrap_or_default().to_owned()
    };
    let post = |path: &str, rest: &str| format!("POST {path} HTTP/1.1\r\nhost: a\r\nx-api-key: {key}\r\n{rest}");
    let rows = [
        (post("/v1/embeddings", "content-length: 2000000\r\n\r\n"), "413"),
        (post("/v1/embeddings", "content-length: 10\r\n\r\n{"), "408"),
        (post("/v2/models/tiny/infer", &format!("x: {}\r\n\r\n", "y".repeat(70_000))), "431"),
        (post("/v2/models/tiny/infer", "host: b\r\ncontent-length: 0\r\n\r\n"), "400"),
        ("GET /v2/health/ready HTTP/1.1\r\n\r\n".to_owned(), "400"),
        (post("/v2/models/tiny/infer", "transfer-encoding: gzip\r\n\r\n"), "400"),
        // A head that never ends is not waited for.
        ("GET / HTTP/1.1\r\n".to_owned(), ""),
    ];
    for (text, status) in rows {
        let line = raw(text.clone()).await;
        let got = line.split(' ').nth(1).unwrap_or_default();
        assert_eq!(got, status, "…{}", &text[text.len().saturating_sub(60)..]);
    }
    // Chunks without a declared length count as they come.
    let destination = Destination::new(&format!("http://127.0.0.1:{}", world.plain), None, false).expect("a URL");
    let large = Ask {
        path: "/v1/embeddings",
        body: format!("{{\"model\":\"tiny\",\"input\":\"{}\"}}", "x".repeat(1 << 21)),
        ..Ask::default()
    };
    let answer = destination.connect().await.expect("connects").send(large.request()).await;
    assert!(answer.is_err() || answer.is_ok_and(|answer| answer.status == StatusCode::PAYLOAD_TOO_LARGE));
    assert!(seen.lock().expect("no panic").is_empty(), "something reached the endpoint");
}
