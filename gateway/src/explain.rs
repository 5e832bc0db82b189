//! Why a request goes where it goes: the code that requests run through, asked without sending anything.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use isochrone_core::Time;
use isochrone_core::course::ATTEMPTS_MAX;
use isochrone_core::fleet::Fleet;
use isochrone_core::geo::Location;
use isochrone_core::live::Probe;
use isochrone_core::pick::{Nobody, Query, Tried, order, pick};
use isochrone_core::region::{RegionIndex, RegionSet};
use isochrone_core::residency::{Permitted, Residency};
use isochrone_core::steer::{Client, Score};
use serde::Serialize;
use serde_json::Value;

use crate::config::{self, Config, Opened};
use crate::identity::Caller;
use crate::policy::{self, Ask};
use crate::snapshot::{Drains, Model, Snapshot};
use crate::{event, geo};

/// What is asked.
#[derive(Clone, Debug)]
pub struct Question {
    /// The client's address.
    pub ip: IpAddr,
    /// The tenant; the anonymous one, or else the only one, if none is named.
    pub tenant: Option<String>,
    /// The model; none for calls about the server.
    pub model: Option<String>,
    /// Its version, if the call names one.
    pub version: Option<String>,
    /// Regions that are taken to be down.
    pub assume_down: Vec<String>,
    /// Over gRPC rather than HTTP.
    pub grpc: bool,
}

/// What is answered.
#[derive(Debug, Serialize)]
pub struct Explanation {
    /// The configuration that was asked.
    pub revision: Box<str>,
    /// Where the client is.
    pub location: Place,
    /// Whose request it would be.
    pub tenant: Box<str>,
    /// The model.
    pub model: Option<String>,
    /// The policy that orders the regions for this client.
    pub policy: &'static str,
    /// The regions that may see the request.
    pub permitted: Vec<Box<str>>,
    /// The others, and what keeps each out.
    pub refused: Vec<Refused>,
    /// The permitted regions in the order of steering.
    pub candidates: Vec<Candidate>,
    /// Where the request would go.
    pub pick: Option<Box<str>>,
    /// In the words of `isochrone-reason`; or why there is no pick.
    pub reason: String,
    /// Where it would go after that, in order.
    pub failover: Vec<Box<str>>,
}

/// Where a client is, and by what that is known.
#[derive(Debug, Serialize)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Place {
    pub ip: IpAddr,
    pub country: Option<String>,
    pub latitude: Option<f32>,
    pub longitude: Option<f32>,
    pub source: &'static str,
}

/// A region that may not see the request.
#[derive(Debug, Serialize)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Refused {
    pub region: Box<str>,
    pub why: String,
}

/// A region that may see it.
#[derive(Debug, Serialize)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Candidate {
    pub region: Box<str>,
    pub score_ms: f32,
    pub parts: Parts,
    /// `ready`, or why it is passed over.
    pub state: &'static str,
}

/// The parts of a score, in milliseconds.
#[derive(Debug, Serialize)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Parts {
    pub distance: f32,
    pub excess: f32,
    pub probe: f32,
    pub wait: f32,
    pub service: f32,
}

/// Explains by a directory alone: everybody is taken to be well, and nothing is measured.
///
/// # Errors
/// The problems of the directory, or what is wrong with the question, each in a line.
pub fn offline(directory: &Path, question: &Question) -> Result<Explanation, Vec<String>> {
    explain(&well(directory)?, question, Time(2)).map_err(|error| vec![error])
}

/// A directory's snapshot in which everybody is well, and nothing is measured.
///
/// # Errors
/// The problems of the directory, each in a line.
pub(crate) fn well(directory: &Path) -> Result<Snapshot, Vec<String>> {
    let config = config::load_expired(directory, &mut Opened::default())
        .map_err(|rejected| rejected.problems.iter().map(ToString::to_string).collect::<Vec<_>>())?;
    let snapshot = Snapshot::compile(Arc::new(Config { cores: 1, ..config }), Drains::default(), None, Time::default());
    let well = Probe::Answered { right_region: true, ready: true, round_trip_ms: 0.0, network_ms: 0.0 };
    for endpoint in &snapshot.endpoints {
        // Not refreshed afterwards: that no round trip was measured is what steering is to see.
        endpoint.live.probed(well, Time(1), &snapshot.fleet.rules);
    }
    Ok(snapshot)
}

/// Explains by a snapshot with its live state.
///
/// # Errors
/// What is wrong with the question.
pub(crate) fn explain(snapshot: &Snapshot, question: &Question, now: Time) -> Result<Explanation, String> {
    let tenant = tenant(snapshot, question)?;
    let mut down: Vec<u16> = Vec::new();
    for name in &question.assume_down {
        let region = snapshot.regions.iter().find(|region| &*region.name == name.as_str());
        let endpoints = region.ok_or_else(|| format!("there is no region `{name}`"))?.endpoints.clone();
        down.extend(endpoints.filter_map(|endpoint| u16::try_from(endpoint).ok()));
    }
    let location = geo::locate(&snapshot.config, question.ip);
    let caller = Caller { client_ip: question.ip, tenant };
    let model: Option<&Model> = match &question.model {
        None => None,
        Some(name) => Some(policy::model(snapshot, &caller, name).map_err(|error| format!("{error}: `{name}`"))?),
    };
    let version = question.version.as_deref();
    let ask = Ask { tenant, location: &location, model: model.map(|model| (&*model.name, version)) };
    let permitted = policy::permit(snapshot, &ask);
    let route = snapshot.route(tenant, model);
    let query = Query {
        client: Client { location: &location, hash: geo::client_hash(question.ip) },
        model: model.map(|model| model.index),
        grpc: question.grpc,
        steering: &route.steering,
        affinity: None,
    };
    let names = |set: RegionSet| set.iter().map(|region| name(snapshot, region)).collect();
    let mut explanation = Explanation {
        revision: snapshot.config.revision.clone(),
        location: place(question.ip, &location),
        tenant: snapshot.config.tenants[tenant].name.clone(),
        model: question.model.clone(),
        policy: route.steering.policy_for(location.point).as_str(),
        permitted: permitted.as_ref().map_or_else(|_| Vec::new(), |permitted| names(permitted.regions())),
        refused: refused(snapshot, &ask, model, permitted.as_ref().ok()),
        candidates: Vec::new(),
        pick: None,
        reason: String::new(),
        failover: Vec::new(),
    };
    let permitted = match permitted {
        Ok(permitted) => permitted,
        Err(error) => {
            explanation.reason = format!("{}: {error}", error.status().as_u16());
            return Ok(explanation);
        }
    };
    explanation.candidates = order(&snapshot.fleet, &query, &permitted, now)
        .into_iter()
        .map(|(region, score)| Candidate {
            region: name(snapshot, region),
            score_ms: rounded(score.total_ms()),
            parts: parts(&score),
            state: state(&snapshot.fleet, region, &query, &down, now),
        })
        .collect();
    let mut tried = down;
    for turn in 0..ATTEMPTS_MAX {
        let tries = Tried { endpoints: &tried, suspect: RegionSet::EMPTY };
        match pick(&snapshot.fleet, &query, &permitted, tries, now, 0) {
            Ok(choice) => {
                if turn == 0 {
                    explanation.reason = event::reason(snapshot, &query, &choice);
                    explanation.pick = Some(name(snapshot, choice.region));
                } else {
                    explanation.failover.push(name(snapshot, choice.region));
                }
                let range = snapshot.regions[choice.region.get()].endpoints.clone();
                tried.extend(range.filter_map(|endpoint| u16::try_from(endpoint).ok()));
            }
            Err(nobody) => {
                if turn == 0 {
                    let why = if nobody == Nobody::Full { "all permitted regions are full" } else { "none is able to" };
                    explanation.reason = format!("503: permitted regions exist, but {why}");
                }
                break;
            }
        }
    }
    Ok(explanation)
}

fn tenant(snapshot: &Snapshot, question: &Question) -> Result<usize, String> {
    let tenants = &snapshot.config.tenants;
    match &question.tenant {
        Some(name) => {
            let found = tenants.iter().position(|tenant| *tenant.name == **name);
            found.ok_or_else(|| format!("there is no tenant `{name}`"))
        }
        None => match snapshot.anonymous {
            Some(anonymous) => Ok(anonymous),
            None if tenants.len() == 1 => Ok(0),
            None => Err("whose request? Name a tenant: none is anonymous".into()),
        },
    }
}

fn name(snapshot: &Snapshot, region: RegionIndex) -> Box<str> {
    Box::from(&*snapshot.regions[region.get()].name)
}

fn place(ip: IpAddr, location: &Location) -> Place {
    Place {
        ip,
        country: location.country.map(|country| country.to_string()),
        latitude: location.point.map(|point| point.latitude()),
        longitude: location.point.map(|point| point.longitude()),
        source: location.source.as_str(),
    }
}

/// What keeps each region out that is not permitted.
fn refused(snapshot: &Snapshot, ask: &Ask<'_>, model: Option<&Model>, permitted: Option<&Permitted>) -> Vec<Refused> {
    let tenant = &snapshot.config.tenants[ask.tenant];
    let out =
        snapshot.all_regions.iter().filter(|region| !permitted.is_some_and(|permitted| permitted.contains(*region)));
    let why = |region: RegionIndex| {
        let zones = &snapshot.config.regions[region.get()].region.zones;
        let shares = |wanted: &[Box<str>]| wanted.iter().any(|zone| zones.contains(zone));
        let list = |zones: &[Box<str>]| zones.join(", ");
        if let (Some(model), Some((name, version))) = (model, ask.model)
            && !model.declaring(version).contains(region)
        {
            let version = version.map(|version| format!(" in version {version}")).unwrap_or_default();
            return format!("it does not declare the model {name}{version}");
        }
        if let Residency::Require(wanted) = &tenant.residency
            && !shares(wanted)
        {
            return format!("the tenant {} requires {}; it is in {}", tenant.name, list(wanted), none_or(&list(zones)));
        }
        let ruled = snapshot.config.country_rules.iter().find(|(countries, wanted)| {
            !shares(wanted) && ask.location.country.is_none_or(|country| countries.contains(&country))
        });
        match (ruled, ask.location.country) {
            (Some((_, wanted)), Some(country)) => format!("clients from {country} are held to {}", list(wanted)),
            (Some((_, wanted)), None) => {
                format!("clients of unknown country are held to every rule, and one requires {}", list(wanted))
            }
            (None, _) => "this gateway stands where the tenant's data may not be".into(),
        }
    };
    out.map(|region| Refused { region: name(snapshot, region), why: why(region) }).collect()
}

fn none_or(list: &str) -> &str {
    if list.is_empty() { "no zone" } else { list }
}

fn state(fleet: &Fleet, at: RegionIndex, query: &Query<'_>, down: &[u16], now: Time) -> &'static str {
    let (region, look) = (fleet.region(at), fleet.look(at, query.grpc, query.model, down, now));
    let load = region.live.load();
    let lives = &fleet.endpoints[region.endpoints.clone()];
    if fleet.is_drained(at) || lives.iter().all(|live| live.is_drained()) {
        "drained"
    } else if region.endpoints.clone().any(|endpoint| down.iter().any(|down| usize::from(*down) == endpoint)) {
        "assumed down"
    } else if look.healthy == 0 {
        "down"
    } else if look.ready == 0 {
        "full"
    } else if load >= region.region.hard_limit {
        "at its hard limit"
    } else if load >= region.region.soft_limit {
        "over its soft limit"
    } else if query.client.share() >= look.capacity {
        "recovering"
    } else {
        "ready"
    }
}

fn parts(score: &Score) -> Parts {
    Parts {
        distance: rounded(score.distance_ms),
        excess: rounded(score.excess_ms),
        probe: rounded(score.probe_ms),
        wait: rounded(score.wait_ms),
        service: rounded(score.service_ms),
    }
}

/// Tenths of a millisecond: the rest is no knowledge.
fn rounded(ms: f32) -> f32 {
    (ms * 10.0).round() / 10.0
}

impl Question {
    /// Reads the query of `GET /api/explain`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn parse(query: &str) -> Result<Question, String> {
        let (mut ip, mut question) = (None, Question::about(IpAddr::from([0, 0, 0, 0])));
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            match &*key {
                "ip" => ip = Some(value.parse().map_err(|_| format!("`{value}` is no address"))?),
                "tenant" => question.tenant = Some(value.into_owned()),
                "model" => question.model = Some(value.into_owned()),
                "version" => question.version = Some(value.into_owned()),
                "assume_down" => question.assume_down.push(value.into_owned()),
                "grpc" => question.grpc = value == "true",
                other => return Err(format!("no parameter is called `{other}`")),
            }
        }
        Ok(Question { ip: ip.ok_or("for which client? ip=ADDRESS")?, ..question })
    }

    /// A question about one address, and nothing else.
    pub fn about(ip: IpAddr) -> Question {
        Question { ip, tenant: None, model: None, version: None, assume_down: Vec::new(), grpc: false }
    }

    /// The query of `GET /api/explain`.
    fn query(&self) -> String {
        let mut query = form_urlencoded::Serializer::new(String::new());
        query.append_pair("ip", &self.ip.to_string());
        let named = [("tenant", &self.tenant), ("model", &self.model), ("version", &self.version)];
        let named = named.into_iter().filter_map(|(key, value)| Some((key, value.as_ref()?)));
        query.extend_pairs(named.chain(self.assume_down.iter().map(|region| ("assume_down", region))));
        if self.grpc {
            query.append_pair("grpc", "true");
        }
        query.finish()
    }
}

/// Asks a running gateway, whose live state it knows.
///
/// # Errors
/// It cannot be asked, or finds something wrong with the question.
pub fn online(admin: &str, question: &Question) -> Result<Value, Vec<String>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let asked = runtime.map_err(|error| error.to_string()).and_then(|runtime| runtime.block_on(ask(admin, question)));
    asked.map_err(|error| vec![format!("{admin}: {error}")])
}

async fn ask(admin: &str, question: &Question) -> Result<Value, String> {
    use http_body_util::BodyExt;
    let words = |error: &dyn std::fmt::Display| error.to_string();
    let url: http::Uri = admin.parse().map_err(|error| words(&error))?;
    let authority = url.authority().ok_or("an admin address is http://HOST:PORT")?;
    let port = authority.port_u16().unwrap_or(80);
    let stream = tokio::net::TcpStream::connect((authority.host(), port)).await.map_err(|error| words(&error))?;
    let io = hyper_util::rt::TokioIo::new(stream);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.map_err(|error| words(&error))?;
    tokio::spawn(async move { drop(connection.await) });
    let request = http::Request::get(format!("/api/explain?{}", question.query()))
        .header(http::header::HOST, authority.as_str())
        .body(http_body_util::Empty::<bytes::Bytes>::new())
        .map_err(|error| words(&error))?;
    let answer = sender.send_request(request).await.map_err(|error| words(&error))?;
    let status = answer.status();
    let body = answer.into_body().collect().await.map_err(|error| words(&error))?.to_bytes();
    let value: Value = serde_json::from_slice(&body).map_err(|error| words(&error))?;
    match value.get("error").and_then(Value::as_str) {
        Some(error) => Err(error.to_owned()),
        None if status.is_success() => Ok(value),
        None => Err(format!("it answers {status}")),
    }
}

/// An explanation for people.
pub fn table(explanation: &Value) -> String {
    let mut text = String::new();
    let of = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let list = |values: &Value| {
        let names: Vec<&str> = values.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        if names.is_empty() { "none".to_owned() } else { names.join(", ") }
    };
    let location = &explanation["location"];
    let place = match (&location["latitude"], &location["longitude"]) {
        (Value::Number(north), Value::Number(east)) => format!(" at {north:.2}, {east:.2}"),
        _ => String::new(),
    };
    let country = location["country"].as_str().unwrap_or("an unknown country");
    let _ = writeln!(text, "client     {} in {country}{place}, by {}", of(&location["ip"]), of(&location["source"]));
    let _ = writeln!(text, "tenant     {}", of(&explanation["tenant"]));
    if let Some(model) = explanation["model"].as_str() {
        let _ = writeln!(text, "model      {model}");
    }
    let _ = writeln!(text, "policy     {}", of(&explanation["policy"]));
    let _ = writeln!(text, "permitted  {}", list(&explanation["permitted"]));
    for refused in explanation["refused"].as_array().into_iter().flatten() {
        let _ = writeln!(text, "refused    {}: {}", of(&refused["region"]), of(&refused["why"]));
    }
    let candidates = explanation["candidates"].as_array();
    if candidates.is_some_and(|candidates| !candidates.is_empty()) {
        let _ = write!(
            text,
            "
{:<20}",
            "candidate"
        );
        for column in ["score ms", "distance", "excess", "probe", "wait", "service"] {
            let _ = write!(text, "{column:>10}");
        }
        let _ = writeln!(text, "  state");
    }
    for candidate in candidates.into_iter().flatten() {
        let _ = write!(text, "{:<20}{:>10.1}", of(&candidate["region"]), candidate["score_ms"].as_f64().unwrap_or(0.0));
        for part in ["distance", "excess", "probe", "wait", "service"] {
            let _ = write!(text, "{:>10.1}", candidate["parts"][part].as_f64().unwrap_or(0.0));
        }
        let _ = writeln!(text, "  {}", of(&candidate["state"]));
    }
    let pick = explanation["pick"].as_str().unwrap_or("none");
    let _ = writeln!(text, "\npick       {pick}\nreason     {}", of(&explanation["reason"]));
    let _ = writeln!(text, "failover   {}", list(&explanation["failover"]));
    text
}

/// Answers `GET /api/explain`.
pub(crate) fn answer(snapshot: &Arc<Snapshot>, query: &str, now: Time) -> Result<Explanation, String> {
    explain(snapshot, &Question::parse(query)?, now)
}
