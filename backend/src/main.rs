//! The command line of the worker.

mod api;

mod app;

mod batch;

mod bench;

mod control;

mod describe;

mod error;

mod grpc;

mod infer;

mod model;

mod repository;

mod runner;

mod runtime;

mod statistics;

mod text;

use isochrone_tensor as tensor;

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::runtime::torch::Place;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A worker of Isochrone: libtorch models behind the Open Inference Protocol v2 and OpenAI embeddings.
#[derive(Parser)]
#[command(name = "isochrone-backend", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Load the models and serve them.
    Serve(Serve),
    /// Tell what is wrong with a model directory. Exits 1 if anything is.
    Check {
        /// The directory: NAME/VERSION/model.toml and its files.
        #[arg(long, value_name = "DIR")]
        models: PathBuf,
        #[command(flatten)]
        compute: Compute,
    },
    /// Compute one model in a loop, in this process, as fast as it goes: what no server can exceed.
    Bench(Bench),
}

/// What is computed on.
#[derive(Args, Clone, Debug)]
struct Compute {
    /// auto (a GPU if there is one), cpu, or cuda:N.
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: Place,
    /// Threads within one operation, where model.toml does not say. More instances with one thread each serve more than
    /// one with more threads.
    #[arg(long, value_name = "N", default_value_t = 1)]
    threads: usize,
    /// On AMD processors, leave the slow matrix products of MKL as they are.
    #[arg(long)]
    no_fast_matrices: bool,
}

/// How to measure.
#[derive(Args, Clone, Debug)]
struct Bench {
    /// The models: NAME/VERSION/model.toml with its files.
    #[arg(long, value_name = "DIR")]
    models: PathBuf,
    /// Which of them; a sentence encoder.
    #[arg(long, value_name = "NAME")]
    model: String,
    /// Texts, one a line, taken in turn.
    #[arg(long, value_name = "FILE")]
    texts: PathBuf,
    /// Texts that are computed together.
    #[arg(long, value_name = "N", default_value_t = 32)]
    batch: usize,
    /// For how long.
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    seconds: u64,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    compute: Compute,
}

/// How to serve.
#[derive(Args, Clone, Debug)]
struct Serve {
    /// The models: NAME/VERSION/model.toml with model.pt or model.safetensors beside it.
    #[arg(long, value_name = "DIR")]
    models: PathBuf,
    /// The region that this worker stands in. Gateways send nothing to a worker that names another than their file's.
    #[arg(long, value_name = "NAME")]
    region: String,
    /// Where to serve HTTP.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:9101")]
    listen: SocketAddr,
    /// Where to serve gRPC; nowhere if it is not said.
    #[arg(long, value_name = "HOST:PORT")]
    grpc_listen: Option<SocketAddr>,
    /// The file with the operator's key: who shows it may load and unload models. Without it nobody may.
    #[arg(long, value_name = "FILE")]
    operator_key: Option<PathBuf>,
    #[command(flatten)]
    compute: Compute,
    /// Send traces here, by OTLP over gRPC; only of requests whose caller is traced.
    #[arg(long, value_name = "URL")]
    otlp: Option<String>,
    /// Requests that may wait for a model; more are refused at once.
    #[arg(long, value_name = "N", default_value_t = 256)]
    queue: usize,
    /// Requests in flight, whatever their model; more are refused at once.
    #[arg(long, value_name = "N", default_value_t = 512)]
    in_flight: usize,
    /// The largest request body, in bytes.
    #[arg(long, value_name = "BYTES", default_value_t = 64 << 20)]
    max_body: usize,
    /// After SIGTERM: not ready, but still serving, for this long.
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = duration)]
    lame_duck: Duration,
    /// The longest wait for requests in flight after that.
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = duration)]
    grace: Duration,
}

fn duration(text: &str) -> Result<Duration, humantime::DurationError> {
    humantime::parse_duration(text)
}

fn main() -> ExitCode {
    let problems = match Arguments::parse().command {
        Command::Serve(serve) => app::serve(&serve),
        Command::Check { models, compute } => check(&models, &compute),
        Command::Bench(bench) => bench::bench(&bench).map_err(|error| vec![error]),
    };
    let mut errors = std::io::stderr();
    match problems {
        Ok(()) => ExitCode::SUCCESS,
        Err(problems) => {
            for problem in problems {
                // Nobody to tell where standard error is closed.
                let _ = writeln!(errors, "isochrone-backend: {problem}");
            }
            ExitCode::FAILURE
        }
    }
}

/// Reads the directory and loads each model, as `serve` would.
fn check(directory: &std::path::Path, compute: &Compute) -> Result<(), Vec<String>> {
    let options = app::options(compute, 1).map_err(|error| vec![error])?;
    let found =
        model::scan(directory).map_err(|problems| problems.iter().map(ToString::to_string).collect::<Vec<_>>())?;
    let mut problems = Vec::new();
    for model in found {
        let (name, version, place) = (model.name.clone(), model.version.clone(), model.directory.clone());
        let digest = model.digest.clone();
        match repository::load(model, options) {
            // Nobody to tell where standard output is closed.
            Ok(_) => drop(writeln!(std::io::stdout(), "{name} version {version}: no problem; digest {digest}")),
            Err(error) => problems.push(format!("{}: {error}", place.display())),
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(problems) }
}
