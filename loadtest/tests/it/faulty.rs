//! A worker that misbehaves on demand, down to the TCP connection: no HTTP library would do these things.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// What it does with a request, from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Mode {
    /// It answers.
    Well,
    /// It accepts, and then says nothing, to probes neither.
    Silent,
    /// It sends half of an answer and resets the connection.
    HalfAnswer,
    /// It says that it is overloaded. Its probes are well.
    Overloaded,
    /// It answers after a second and a half. Its probes are well.
    Slow,
    /// It begins an event stream and breaks it off.
    BrokenEvents,
}

/// One misbehaving worker.
pub struct Faulty {
    pub port: u16,
    mode: Arc<AtomicU8>,
}

impl Faulty {
    /// Serves on a free port, as a worker of this region. Whatever its mode, a request with `poison` in its body resets the
    /// connection, as if the process had died of it.
    pub async fn start(region: &'static str) -> Faulty {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let mode = Arc::new(AtomicU8::new(0));
        let shared = Arc::clone(&mode);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let mode = Arc::clone(&shared);
                // A connection that breaks is what this is for.
                tokio::spawn(async move { drop(serve(stream, region, &mode).await) });
            }
        });
        Faulty { port, mode }
    }

    pub fn set(&self, mode: Mode) {
        self.mode.store(mode as u8, Relaxed);
    }

    /// Its endpoint table.
    pub fn endpoint(&self) -> String {
        format!("[[endpoints]]\nhttp = \"http://127.0.0.1:{}\"", self.port)
    }
}

async fn serve(mut stream: TcpStream, region: &str, mode: &AtomicU8) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut read = Vec::new();
    loop {
        let Some((head, body)) = request(&mut stream, &mut read).await? else { return Ok(()) };
        let is_probe = head.starts_with(b"GET /v2/health/ready");
        let is = |wanted: Mode| mode.load(Relaxed) == wanted as u8;
        while is(Mode::Silent) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let common = format!("isochrone-region: {region}\r\ncontent-type: application/json\r\n");
        let json = r#"{"model_name":"tiny","outputs":[]}"#;
        if is_probe {
            stream.write_all(format!("HTTP/1.1 200 OK\r\n{common}content-length: 0\r\n\r\n").as_bytes()).await?;
            continue;
        }
        if memchr(&body, b"poison") {
            return reset(&stream);
        }
        if is(Mode::HalfAnswer) {
            let half = format!("HTTP/1.1 200 OK\r\n{common}content-length: {}\r\n\r\n{{\"half", json.len());
            stream.write_all(half.as_bytes()).await?;
            return reset(&stream);
        }
        if is(Mode::BrokenEvents) {
            let events = format!(
                "HTTP/1.1 200 OK\r\nisochrone-region: {region}\r\ncontent-type: text/event-stream\r\n\
                 transfer-encoding: chunked\r\n\r\n11\r\ndata: {{\"n\":1}}\n\n\n\n\r\n7\r\ndata: {{\r\n"
            );
            stream.write_all(events.as_bytes()).await?;
            tokio::time::sleep(Duration::from_millis(50)).await;
            return reset(&stream);
        }
        if is(Mode::Overloaded) {
            let refusal =
                format!("HTTP/1.1 503 Service Unavailable\r\n{common}retry-after: 1\r\ncontent-length: 2\r\n\r\n{{}}");
            stream.write_all(refusal.as_bytes()).await?;
            continue;
        }
        if is(Mode::Slow) {
            tokio::time::sleep(Duration::from_millis(1500)).await;
        }
        let answer = format!("HTTP/1.1 200 OK\r\n{common}content-length: {}\r\n\r\n{json}", json.len());
        stream.write_all(answer.as_bytes()).await?;
    }
}

/// Reads one request whose length is declared.
async fn request(stream: &mut TcpStream, read: &mut Vec<u8>) -> std::io::Result<Option<(Vec<u8>, Vec<u8>)>> {
    loop {
        if let Some(end) = read.windows(4).position(|four| four == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&read[..end]).to_ascii_lowercase();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok());
            let whole = end + 4 + length.unwrap_or(0);
            if read.len() >= whole {
                let body = read[end + 4..whole].to_vec();
                let head = read[..end].to_vec();
                read.drain(..whole);
                return Ok(Some((head, body)));
            }
        }
        if stream.read_buf(read).await? == 0 {
            return Ok(None);
        }
    }
}

/// Lets the connection end by RST rather than in order, once it is dropped.
fn reset(stream: &TcpStream) -> std::io::Result<()> {
    socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO))
}

fn memchr(body: &[u8], word: &[u8]) -> bool {
    body.windows(word.len()).any(|window| window == word)
}
