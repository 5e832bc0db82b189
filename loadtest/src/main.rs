//! The command line of the load generator.

#![forbid(unsafe_code)]

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use bytes::Bytes;
use clap::{Args, Parser, Subcommand};
use http::{HeaderMap, HeaderValue};
use isochrone_loadtest::client::{Destination, Error};
use isochrone_loadtest::clients::WORLD;
use isochrone_loadtest::run::{Plan, run};

/// Open-loop load for an Isochrone gateway or worker.
#[derive(Parser)]
#[command(name = "isochrone-loadtest", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Send requests at a rate, whatever the answers do, and tell latencies from the intended start.
    Run(Run),
}

#[derive(Args)]
struct Run {
    /// The gateway or worker.
    #[arg(long, default_value = "https://localhost:8443")]
    url: String,
    /// The authority to believe, for https.
    #[arg(long, value_name = "FILE", default_value = ".local/tls/ca.pem")]
    ca: PathBuf,
    /// A file with the API key.
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// The path of each request.
    #[arg(long, default_value = "/v1/embeddings")]
    path: String,
    /// A file with each request's body. Without it: one sentence to be embedded.
    #[arg(long, value_name = "FILE")]
    body: Option<PathBuf>,
    /// The model, where no body is given.
    #[arg(long, default_value = "minilm")]
    model: String,
    /// Requests a second.
    #[arg(long, default_value_t = 50.0)]
    rate: f64,
    /// For how long.
    #[arg(long, default_value = "10s", value_parser = duration)]
    duration: Duration,
    /// Connections; requests wait while all are busy, and that counts.
    #[arg(long, default_value_t = 32)]
    connections: usize,
    /// The longest wait for an answer.
    #[arg(long, default_value = "10s", value_parser = duration)]
    timeout: Duration,
    /// Do not play clients all over the world by X-Forwarded-For.
    #[arg(long)]
    here: bool,
    /// Speak HTTP/2.
    #[arg(long)]
    http2: bool,
    /// Decides the arrivals and who asks.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// For programs.
    #[arg(long)]
    json: bool,
}

fn duration(text: &str) -> Result<Duration, humantime::DurationError> {
    humantime::parse_duration(text)
}

fn main() -> ExitCode {
    let Command::Run(arguments) = Arguments::parse().command;
    match plan(&arguments).and_then(|plan| load(plan, arguments.json)) {
        // A run with errors is a "no" to whoever asks whether all went well.
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            // Nobody to tell where standard error is closed.
            let _ = writeln!(std::io::stderr(), "isochrone-loadtest: {error}");
            ExitCode::FAILURE
        }
    }
}

fn plan(arguments: &Run) -> Result<Plan, Error> {
    if !(arguments.rate > 0.0 && arguments.rate <= 1e6) || arguments.connections == 0 {
        return Err("--rate is above 0 and at most 1000000; --connections at least 1".into());
    }
    let ca = arguments.url.starts_with("https").then_some(arguments.ca.as_path());
    let mut headers = HeaderMap::new();
    headers.insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if let Some(file) = &arguments.key_file {
        let key = std::fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))?;
        headers.insert(http::header::AUTHORIZATION, HeaderValue::try_from(format!("Bearer {}", key.trim()))?);
    }
    let body = match &arguments.body {
        Some(file) => Bytes::from(std::fs::read(file).map_err(|error| format!("{}: {error}", file.display()))?),
        None => Bytes::from(serde_json::json!({ "model": arguments.model, "input": "hello world" }).to_string()),
    };
    Ok(Plan {
        destination: Destination::new(&arguments.url, ca, arguments.http2)
            .map_err(|error| format!("{} with {}: {error}", arguments.url, arguments.ca.display()))?,
        path: arguments.path.clone(),
        headers,
        body,
        clients: if arguments.here { Vec::new() } else { WORLD.to_vec() },
        rate: arguments.rate,
        length: arguments.duration,
        connections: arguments.connections,
        timeout: arguments.timeout,
        seed: arguments.seed,
    })
}

fn load(plan: Plan, json: bool) -> Result<usize, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let expected = plan.rate * plan.length.as_secs_f64();
    let report = runtime.block_on(run(plan, |ended| {
        // Progress is for people; a closed standard error is no reason to stop.
        let _ = writeln!(std::io::stderr(), "{ended} of about {expected:.0} requests ended");
    }))?;
    let mut out = std::io::stdout();
    if json {
        writeln!(out, "{}", serde_json::to_string(&report)?)?;
    } else {
        write!(out, "{report}")?;
    }
    Ok(report.errors)
}
