//! The command line of the gateway.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use isochrone_gateway::config::{self, Opened};
use serde_json::json;
use sha2::{Digest, Sha256};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A global inference gateway: each request goes to the nearest healthy region that is allowed to serve it.
#[derive(Parser)]
#[command(name = "isochrone", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the gateway. Changes of the directory are taken over as they are made; SIGTERM drains and ends it.
    Serve {
        /// The configuration: a directory with gateway.toml, regions/, tenants.toml and locations.toml.
        #[arg(long, value_name = "DIR")]
        config: PathBuf,
    },
    /// Tell every problem of a configuration, each as file:line:column. Exits 1 if there is any.
    Check {
        /// The directory.
        #[arg(long, value_name = "DIR")]
        config: PathBuf,
        /// For programs.
        #[arg(long)]
        json: bool,
    },
    /// Work with API keys.
    #[command(subcommand)]
    Key(Key),
}

#[derive(Subcommand)]
enum Key {
    /// Make a key. It is shown once; tenants.toml gets its hash.
    New {
        /// The tenant whose key it will be.
        #[arg(long, value_name = "NAME")]
        tenant: String,
        /// For programs.
        #[arg(long)]
        json: bool,
    },
}

fn main() -> ExitCode {
    let mut out = std::io::stdout();
    let code = match Arguments::parse().command {
        Command::Serve { config } => serve(&config),
        Command::Check { config, json } => check(&config, json, &mut out),
        Command::Key(Key::New { tenant, json }) => new_key(&tenant, json, &mut out),
    };
    // A reader that has gone away has read what it wanted.
    code.unwrap_or(ExitCode::SUCCESS)
}

fn serve(directory: &std::path::Path) -> std::io::Result<ExitCode> {
    let Err(problems) = isochrone_gateway::serve(directory) else { return Ok(ExitCode::SUCCESS) };
    let mut errors = std::io::stderr();
    for problem in problems {
        writeln!(errors, "isochrone: {problem}")?;
    }
    Ok(ExitCode::FAILURE)
}

fn check(directory: &std::path::Path, json: bool, out: &mut impl Write) -> std::io::Result<ExitCode> {
    let (revision, problems) = match config::load(directory, &mut Opened::default()) {
        Ok(config) => (config.revision, Vec::new()),
        Err(rejected) => (rejected.revision, rejected.problems),
    };
    if json {
        writeln!(out, "{}", json!({ "revision": revision, "errors": problems }))?;
    } else if problems.is_empty() {
        writeln!(out, "{}: no problem; revision {revision}", directory.display())?;
    }
    let code = if problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    for problem in problems.into_iter().filter(|_| !json) {
        writeln!(out, "{problem}")?;
    }
    Ok(code)
}

fn new_key(tenant: &str, json: bool, out: &mut impl Write) -> std::io::Result<ExitCode> {
    if tenant.is_empty() || !tenant.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b)) {
        writeln!(std::io::stderr(), "isochrone: a tenant's name is made of letters, digits, `-` and `_`")?;
        return Ok(ExitCode::from(2));
    }
    let mut random = [0_u8; 32];
    if let Err(error) = rustls::crypto::aws_lc_rs::default_provider().secure_random.fill(&mut random) {
        writeln!(std::io::stderr(), "isochrone: no random numbers: {error:?}")?;
        return Ok(ExitCode::FAILURE);
    }
    let digits = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    // The tenant's name in the key tells whoever finds one whose it is; the rest is 256 random bits.
    let key = format!("iso_{tenant}_{}", digits(&random));
    let hash = format!("sha256:{}", digits(&Sha256::digest(&key)));
    if json {
        writeln!(out, "{}", json!({ "key": key, "hash": hash }))?;
    } else {
        writeln!(
            out,
            "key (shown only now): {key}\nin tenants.toml:\n  [tenants.{tenant}]\n  keys = [{{ hash = \"{hash}\" }}]"
        )?;
    }
    Ok(ExitCode::SUCCESS)
}
