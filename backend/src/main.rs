//! The command line of the worker.

mod api;

mod app;

mod model;

mod runner;

mod runtime;

mod tensor;

mod text;

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

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
    },
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
    /// Send traces here, by OTLP over gRPC; only of requests whose caller is traced.
    #[arg(long, value_name = "URL")]
    otlp: Option<String>,
    /// Threads within one operation. More workers with one thread each serve more than one worker with more.
    #[arg(long, value_name = "N", default_value_t = 1)]
    threads: usize,
    /// Requests that may wait for a model; more are refused at once.
    #[arg(long, value_name = "N", default_value_t = 256)]
    queue: usize,
    /// Rows that are computed together, if so many wait.
    #[arg(long, value_name = "N", default_value_t = 32)]
    batch_rows: usize,
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
        Command::Check { models } => check(&models),
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
fn check(directory: &std::path::Path) -> Result<(), Vec<String>> {
    let found =
        model::scan(directory).map_err(|problems| problems.iter().map(ToString::to_string).collect::<Vec<_>>())?;
    let mut problems = Vec::new();
    for model in &found {
        match runtime::torch::load(model).and_then(|_| text::Tokenizer::of(model)) {
            Ok(_) => {
                let _ = writeln!(
                    std::io::stdout(),
                    "{} version {}: no problem; digest {}",
                    model.name,
                    model.version,
                    model.digest
                );
            }
            Err(error) => problems.push(format!("{}: {error}", model.directory.display())),
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(problems) }
}
