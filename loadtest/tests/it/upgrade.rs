//! One process takes another's place, and no client is told.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use http::StatusCode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::world::{Ask, Plan, Process, World, binary, secrets};

/// New connections a second.
const RATE: u64 = 500;

/// Starts another gateway on the same directory, in the other's place.
fn successor(world: &World) -> Process {
    let mut command = Command::new(binary("isochrone"));
    command.arg("serve").arg("--take-over").arg("--config").arg(world.config());
    Process::start("successor", &mut command, &world.folder.join("gateway.log"))
}

/// Waits until a process has ended by itself.
async fn ended(process: &mut Process) -> bool {
    for _ in 0..3_000 {
        if let Some(status) = process.ended() {
            return status.success();
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("it does not end");
}

fn cores(world: &World, from: usize, to: usize) {
    let file = world.config().join("gateway.toml");
    let text = std::fs::read_to_string(&file).expect("readable");
    let changed = text.replace(&format!("cores = {from}"), &format!("cores = {to}"));
    assert_ne!(text, changed);
    world.replace(&file, &changed);
}

#[tokio::test]
async fn a_successor_takes_over_under_load_with_a_connection_for_each_request_and_none_fails() {
    let _alone = crate::faults::alone().await;
    let mut world = World::start("upgrade", Plan::default()).await;
    let (going, sent) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicUsize::new(0)));
    let destinations = [false, true].map(|http2| world.destination(http2));
    let load = tokio::spawn({
        let (going, sent) = (Arc::clone(&going), Arc::clone(&sent));
        async move {
            let mut requests = JoinSet::new();
            let mut ticks = tokio::time::interval(Duration::from_micros(1_000_000 / RATE));
            while going.load(Relaxed) {
                ticks.tick().await;
                let destination = destinations[sent.fetch_add(1, Relaxed) % 2].clone();
                requests.spawn(async move {
                    let answer = destination.connect().await?.send(Ask::default().request()).await?;
                    Ok::<_, isochrone_loadtest::client::Error>(answer.status)
                });
            }
            requests.join_all().await
        }
    });
    // Beside it, clients that keep their connection, as most do.
    let kept = [false, true].map(|http2| {
        let (destination, going) = (world.destination(http2), Arc::clone(&going));
        tokio::spawn(async move {
            let (mut connection, mut connections, mut requests) = (destination.connect().await?, 1, 0);
            while going.load(Relaxed) {
                if connection.is_closed() {
                    connection = destination.connect().await?;
                    connections += 1;
                }
                let answer = match connection.send(Ask::default().request()).await {
                    // Not sent: the end of the connection came between the look and the request.
                    Err(error) if error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_canceled) => {
                        connection = destination.connect().await?;
                        connections += 1;
                        continue;
                    }
                    answer => answer?,
                };
                assert_eq!(answer.status, StatusCode::OK);
                requests += 1;
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            Ok::<_, isochrone_loadtest::client::Error>((connections, requests))
        })
    });
    // The number of threads changes too, and with it how many sockets there are for each.
    for (from, to) in [(2, 3), (3, 1)] {
        let before = sent.load(Relaxed);
        world.until("the load flows", async |_| (sent.load(Relaxed) > before + 300).then_some(())).await;
        cores(&world, from, to);
        let next = successor(&world);
        let mut old = world.gateway.replace(next).expect("started");
        assert!(ended(&mut old).await, "{}", old.log());
        let before = sent.load(Relaxed);
        world.until("the load flows", async |_| (sent.load(Relaxed) > before + 300).then_some(())).await;
    }
    going.store(false, Relaxed);
    let answers = load.await.expect("no panic");
    let failed: Vec<_> = answers.iter().filter(|answer| !matches!(answer, Ok(StatusCode::OK))).collect();
    assert!(failed.is_empty(), "{} of {} failed: {:?}", failed.len(), answers.len(), failed[0]);
    assert!(answers.len() > 1_200, "{}", answers.len());
    for kept in kept {
        let (connections, requests) = kept.await.expect("no panic").expect("no request was lost");
        assert!(connections == 3 && requests > 300, "{connections} {requests}");
    }
    let log = world.gateway.as_ref().expect("started").log();
    assert_eq!(log.matches("in the place of its predecessor").count(), 2, "{log}");
    // It is a whole gateway: it hears its operator, and ends when it is told to.
    assert_eq!(world.admin_text("/readyz").await.as_deref(), Some(&b"ready\n"[..]));
    assert!(world.gateway.as_mut().expect("started").terminate().success());
}

#[tokio::test]
async fn a_successor_that_cannot_serve_changes_nothing() {
    let mut world = World::start("upgrade-refused", Plan::default()).await;
    // A broken directory: what was accepted last is served already.
    let file = world.config().join("gateway.toml");
    let good = std::fs::read_to_string(&file).expect("readable");
    world.replace(&file, &good.replace("certificate = ", "certificat = "));
    let refused = Command::new(binary("isochrone"))
        .args(["serve", "--take-over", "--config"])
        .arg(world.config())
        .output()
        .expect("runs");
    assert_eq!(refused.status.code(), Some(1), "{}", String::from_utf8_lossy(&refused.stderr));
    world.replace(&file, &good);
    // One to which no endpoint seems well: the old one may know better.
    let workers: Vec<&str> = world.workers.keys().copied().collect();
    for worker in &workers {
        world.workers[worker].signal("STOP");
    }
    let mut blind = successor(&world);
    for _ in 0..3_000 {
        if blind.ended().is_some() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(blind.ended().is_some_and(|status| !status.success()), "{}", blind.log());
    for worker in &workers {
        world.workers[worker].signal("CONT");
    }
    world.well().await;
    // One that is told to end while it still asks around, and one that dies with the sockets in its hands; one that is a stranger's and says nothing.
    let mut leaving = successor(&world);
    leaving.signal("TERM");
    leaving.terminate();
    let mut dying = successor(&world);
    dying.signal("STOP");
    dying.kill();
    // A path through the folder's descriptor, however long the folder's own is.
    let folder = std::fs::File::open(&world.folder).expect("opens");
    let path = format!("/proc/self/fd/{}/.config.sockets", std::os::fd::AsRawFd::as_raw_fd(&folder));
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).expect("it is there").permissions());
    assert_eq!(mode & 0o777, 0o600);
    drop(std::os::unix::net::UnixStream::connect(path).expect("connects"));
    for _ in 0..20 {
        assert_eq!(world.ask(Ask::default()).await.status, StatusCode::OK);
    }
    assert!(world.gateway.as_mut().expect("started").ended().is_none());
    // And then one that can.
    let next = successor(&world);
    let mut old = world.gateway.replace(next).expect("started");
    assert!(ended(&mut old).await, "{}", old.log());
    assert_eq!(world.ask(Ask::default()).await.status, StatusCode::OK);
    // Without the word, the port is taken.
    let second =
        Command::new(binary("isochrone")).args(["serve", "--config"]).arg(world.config()).output().expect("runs");
    assert!(String::from_utf8_lossy(&second.stderr).contains("in use"));
}

/// What a service manager does: it listens, and hands the socket to whoever it starts.
const MANAGER: &str = r#"
import os, socket, sys
ports, command = sys.argv[1].split(","), sys.argv[2:]
sockets = [socket.create_server(("127.0.0.1", int(port)), backlog=512) for port in ports]
for at, held in enumerate(sockets):
    os.set_inheritable(held.fileno(), True)
    os.dup2(held.fileno(), 100 + at)
for at in range(len(sockets)):
    os.dup2(100 + at, 3 + at)
os.environ.update(LISTEN_FDS=str(len(sockets)), LISTEN_PID=str(os.getpid()))
os.execvp(command[0], command)
"#;

#[tokio::test]
async fn sockets_that_a_service_manager_holds_are_served() {
    let mut world = World::configured("activation", Plan::default());
    for region in ["ap-northeast", "eu-west", "us-east"] {
        world.start_worker(region);
    }
    // Two of three listeners and the admin address; the third is this process's own.
    let ports = format!("{},{},{}", world.tls, world.admin, world.plain);
    let mut command = Command::new("python3");
    command.args(["-c", MANAGER, &ports]).arg(binary("isochrone")).args(["serve", "--config"]).arg(world.config());
    let log = world.folder.join("gateway.log");
    world.gateway = Some(Process::start("gateway", command.stdin(Stdio::null()), &log));
    world.well().await;
    for port in [world.tls, world.untrusting] {
        assert!(TcpStream::connect(("127.0.0.1", port)).await.is_ok());
    }
    for _ in 0..20 {
        assert_eq!(world.ask(Ask::default()).await.status, StatusCode::OK);
    }
    // They pass on to a successor like its own.
    let next = successor(&world);
    let mut old = world.gateway.replace(next).expect("started");
    assert!(ended(&mut old).await, "{}", old.log());
    assert_eq!(world.ask(Ask::default()).await.status, StatusCode::OK);
}

#[tokio::test]
async fn what_waits_to_be_accepted_when_the_process_leaves_is_served() {
    let mut world = World::start("queue-drain", Plan::default()).await;
    let gateway = world.gateway.as_mut().expect("started");
    gateway.signal("STOP");
    let mut waiting = Vec::new();
    for _ in 0..40 {
        // The kernel alone accepts these.
        let mut stream = TcpStream::connect(("127.0.0.1", world.plain)).await.expect("connects");
        let request = format!(
            "GET /v2/models/tiny HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {}\r\n\r\n",
            secrets().keys["demo"]
        );
        stream.write_all(request.as_bytes()).await.expect("sent");
        waiting.push(stream);
    }
    gateway.signal("TERM");
    gateway.signal("CONT");
    for mut stream in waiting {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("an answer, and an end");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
    assert!(ended(gateway).await);
}

#[tokio::test]
async fn a_client_on_its_old_connection_is_answered_and_told_to_go_elsewhere() {
    let mut world = World::start("linger", Plan::default()).await;
    let mut connection = world.connect().await;
    assert_eq!(connection.send(Ask::default().request()).await.expect("an answer").status, StatusCode::OK);
    world.gateway.as_ref().expect("started").signal("TERM");
    let refused = async |world: &World| TcpStream::connect(("127.0.0.1", world.tls)).await.is_err().then_some(());
    world.until("nobody else is taken", refused).await;
    let answer = connection.send(Ask::default().request()).await.expect("an answer");
    assert_eq!((answer.status, answer.header("connection")), (StatusCode::OK, "close"), "{answer:?}");
    assert!(ended(world.gateway.as_mut().expect("started")).await);
}
