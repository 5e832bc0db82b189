//! What the local world needs beside the product. Not for production: the certificate's authority lies next to it.

#![forbid(unsafe_code)]

mod certs;

mod viewer;

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Helpers of ./deploy/local/up.
#[derive(Parser)]
#[command(name = "isochrone-local", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make a development CA and a certificate for localhost.
    Certs {
        /// Where ca.pem, ca.key, cert.pem and key.pem go.
        directory: PathBuf,
        /// Only tell, by the exit status, whether those there will do for another week.
        #[arg(long)]
        check: bool,
    },
    /// Collect traces in memory and show them in the Jaeger UI.
    Viewer {
        /// Where to take OTLP over gRPC.
        #[arg(long, default_value = "127.0.0.1:4317")]
        otlp: SocketAddr,
        /// Where to take OTLP over HTTP (protobuf).
        #[arg(long, default_value = "127.0.0.1:4318")]
        otlp_http: SocketAddr,
        /// Where the UI is.
        #[arg(long, default_value = "127.0.0.1:16686")]
        ui: SocketAddr,
    },
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Certs { directory, check: true } => certs::check(&directory),
        Command::Certs { directory, check: false } => certs::make(&directory),
        Command::Viewer { otlp, otlp_http, ui } => viewer::run(otlp, otlp_http, ui),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody to tell where standard error is closed.
            let _ = writeln!(std::io::stderr(), "isochrone-local: {error}");
            ExitCode::FAILURE
        }
    }
}
