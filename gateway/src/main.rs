//! The command line of the gateway.

#![forbid(unsafe_code)]

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use isochrone_gateway::Serve;
use isochrone_gateway::apply::{self, Applied};
use isochrone_gateway::config::{self, Opened, schema};
use isochrone_gateway::diff;
use isochrone_gateway::explain::{self, Question};
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
        /// Keep the configuration that was accepted last, and the socket for a successor, in this directory instead of
        /// beside DIR.
        #[arg(long, value_name = "DIR")]
        state: Option<PathBuf>,
        /// Take the listening sockets over from the gateway that serves this directory now; that then drains and ends. No
        /// connection is lost. Without one: an ordinary start.
        #[arg(long)]
        take_over: bool,
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
    /// Tell where a client's request would go, and why. Exits 1 if nowhere.
    Explain(Explain),
    /// Tell who would move, lose a fallback, or be let into more places, if NEW took the place of OLD. Exits 1 if a
    /// residency widens.
    Diff {
        /// The configuration that is there.
        #[arg(value_name = "OLD_DIR")]
        old: PathBuf,
        /// The configuration that would be.
        #[arg(value_name = "NEW_DIR")]
        new: PathBuf,
        #[command(flatten)]
        options: DiffOptions,
    },
    /// Check a configuration, tell the difference, and put it into another's place in one step.
    Apply {
        /// The configuration that shall be.
        #[arg(value_name = "NEW_DIR")]
        new: PathBuf,
        /// The directory that a gateway serves. What was there is kept beside it, as .NAME.replaced.TIME.
        #[arg(long, value_name = "DIR")]
        config: PathBuf,
        #[command(flatten)]
        options: DiffOptions,
    },
    /// Print the JSON Schema of a file of the configuration, for editors.
    Schema {
        /// Of which.
        file: Kind,
    },
    /// Work with API keys.
    #[command(subcommand)]
    Key(Key),
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Kind {
    Gateway,
    Region,
    Tenants,
    Locations,
}

#[derive(Args)]
struct Explain {
    /// The directory; everybody is then taken to be well, and nothing is measured.
    #[arg(long, value_name = "DIR", required_unless_present = "admin")]
    config: Option<PathBuf>,
    /// A running gateway's admin address, such as http://127.0.0.1:9901: what it knows counts.
    #[arg(long, value_name = "URL", conflicts_with = "config")]
    admin: Option<String>,
    /// The client's address.
    #[arg(long, value_name = "ADDRESS")]
    ip: std::net::IpAddr,
    /// The tenant; the anonymous one, or else the only one, if none is named.
    #[arg(long, value_name = "NAME")]
    tenant: Option<String>,
    /// The model.
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// The model's version.
    #[arg(long, requires = "model")]
    version: Option<String>,
    /// A region that is taken to be down. May be given more than once.
    #[arg(long, value_name = "REGION")]
    assume_down: Vec<String>,
    /// A request over gRPC.
    #[arg(long)]
    grpc: bool,
    /// For programs.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct DiffOptions {
    /// A gateway's access log: its requests are asked about, instead of addresses from all over the Internet.
    #[arg(long, value_name = "FILE")]
    sample: Option<PathBuf>,
    /// A residency that widens is meant.
    #[arg(long)]
    allow_residency_change: bool,
    /// For programs.
    #[arg(long)]
    json: bool,
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
        Command::Serve { config, state, take_over } => serve(&Serve { directory: config, state, take_over }),
        Command::Check { config, json } => check(&config, json, &mut out),
        Command::Explain(arguments) => explain(arguments, &mut out),
        Command::Diff { old, new, options } => {
            compare(&old, &new, &options, &mut out).map(|well| if well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Command::Apply { new, config, options } => apply(&new, &config, &options, &mut out),
        Command::Schema { file } => print_schema(file, &mut out),
        Command::Key(Key::New { tenant, json }) => new_key(&tenant, json, &mut out),
    };
    // A reader that has gone away has read what it wanted.
    code.unwrap_or(ExitCode::SUCCESS)
}

fn serve(how: &Serve) -> std::io::Result<ExitCode> {
    let Err(problems) = isochrone_gateway::serve(how) else { return Ok(ExitCode::SUCCESS) };
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

fn explain(arguments: Explain, out: &mut impl Write) -> std::io::Result<ExitCode> {
    let Explain { config, admin, ip, tenant, model, version, assume_down, grpc, json } = arguments;
    let question = Question { ip, tenant, model, version, assume_down, grpc };
    let explained = match (&admin, &config) {
        (Some(admin), _) => explain::online(admin, &question),
        (None, Some(directory)) => explain::offline(directory, &question)
            .and_then(|explanation| serde_json::to_value(explanation).map_err(|error| vec![error.to_string()])),
        (None, None) => Err(vec!["--config or --admin".into()]),
    };
    let explanation = match explained {
        Ok(explanation) => explanation,
        Err(problems) => {
            let mut errors = std::io::stderr();
            problems.iter().try_for_each(|problem| writeln!(errors, "isochrone: {problem}"))?;
            return Ok(ExitCode::from(2));
        }
    };
    if json {
        writeln!(out, "{explanation}")?;
    } else {
        write!(out, "{}", explain::table(&explanation))?;
    }
    Ok(if explanation["pick"].is_null() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Tells the difference, and whether it may be.
fn compare(
    old: &std::path::Path,
    new: &std::path::Path,
    options: &DiffOptions,
    out: &mut impl Write,
) -> std::io::Result<bool> {
    match diff::diff(old, new, options.sample.as_deref()) {
        Ok(diff) => {
            if options.json {
                writeln!(out, "{}", json!(diff))?;
            } else {
                write!(out, "{}", diff.table())?;
            }
            let may = diff.residency_widens.is_empty() || options.allow_residency_change;
            if !may {
                writeln!(
                    std::io::stderr(),
                    "isochrone: a residency widens; --allow-residency-change says that it may"
                )?;
            }
            Ok(may)
        }
        Err(problems) => {
            problems.iter().try_for_each(|problem| writeln!(out, "{problem}"))?;
            Ok(false)
        }
    }
}

fn apply(
    new: &std::path::Path,
    directory: &std::path::Path,
    options: &DiffOptions,
    out: &mut impl Write,
) -> std::io::Result<ExitCode> {
    let may = match apply::standing(directory) {
        Some(standing) => compare(&standing, new, options, out)?,
        // There is nothing to be compared with. Where there should be, somebody has to say that it does not matter.
        None if directory.exists() && !options.allow_residency_change => {
            let why =
                "the directory is broken, and nothing was kept of it; --allow-residency-change goes without comparing";
            writeln!(std::io::stderr(), "isochrone: {why}")?;
            false
        }
        None => true,
    };
    if !may {
        writeln!(std::io::stderr(), "isochrone: not applied")?;
        return Ok(ExitCode::FAILURE);
    }
    match apply::apply(new, directory) {
        Ok(Applied::Nothing) => writeln!(std::io::stderr(), "it is in place already")?,
        Ok(Applied::New) => writeln!(std::io::stderr(), "applied; nothing was there before")?,
        Ok(Applied::Replaced(old)) => writeln!(std::io::stderr(), "applied; what was there: {}", old.display())?,
        Err(problems) => {
            problems.iter().try_for_each(|problem| writeln!(out, "{problem}"))?;
            return Ok(ExitCode::FAILURE);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn print_schema(file: Kind, out: &mut impl Write) -> std::io::Result<ExitCode> {
    let file = match file {
        Kind::Gateway => schema::File::Gateway,
        Kind::Region => schema::File::Region,
        Kind::Tenants => schema::File::Tenants,
        Kind::Locations => schema::File::Locations,
    };
    writeln!(out, "{:#}", schema::schema(file))?;
    Ok(ExitCode::SUCCESS)
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
