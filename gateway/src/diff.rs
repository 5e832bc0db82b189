//! Who would move if one configuration took another's place: asked of the code that requests run through.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::BufRead;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::Arc;

use isochrone_core::Time;
use isochrone_core::geo::{Country, Location};
use isochrone_core::residency::Residency;
use serde::Serialize;

use crate::config::{Config, Tenant};
use crate::explain::{self, Question};
use crate::policy::{self, Ask};
use crate::snapshot::Snapshot;

/// Addresses that are asked for where no access log is given.
const ADDRESSES: usize = 4_000;

/// A code that stands for no country: no rule names it.
const UNNAMED: &str = "ZZ";

/// Lines of an access log that are taken at most.
const LINES_MAX: usize = 100_000;

/// What would change.
#[derive(Debug, Default, Serialize)]
pub struct Diff {
    /// The revisions, old and new.
    pub revisions: [Box<str>; 2],
    /// Residency rules that let a tenant's data into more places than before.
    pub residency_widens: Vec<String>,
    /// Rules that let it into fewer.
    pub residency_narrows: Vec<String>,
    /// Tenants and models that have one region or none left, and had more.
    pub fallback_lost: Vec<String>,
    /// Requests that were asked about.
    pub asked: usize,
    /// Of these, how many would go to another region, by where from and where to; the largest first.
    pub moves: Vec<Move>,
    /// Endpoints, by region.
    pub endpoints_added: Vec<String>,
    /// Endpoints, by region.
    pub endpoints_removed: Vec<String>,
    /// Tenants.
    pub tenants_added: Vec<Box<str>>,
    /// Tenants: their keys are no longer known.
    pub tenants_removed: Vec<Box<str>>,
}

/// Requests that would go elsewhere.
#[derive(Debug, Serialize)]
pub struct Move {
    /// The region before; none if it was refused.
    pub from: Option<Box<str>>,
    /// The region after; none if it is refused.
    pub to: Option<Box<str>>,
    /// The share of all that were asked about.
    pub share: f64,
}

/// Compares two directories. `sample` is an access log whose requests are asked about, instead of addresses drawn at random
/// from all over the Internet.
///
/// # Errors
/// The problems of either directory or of the sample, each in a line.
pub fn diff(old: &Path, new: &Path, sample: Option<&Path>) -> Result<Diff, Vec<String>> {
    let (old, new) = (explain::well(old)?, explain::well(new)?);
    let asked = match sample {
        Some(file) => logged(file).map_err(|error| vec![format!("{}: {error}", file.display())])?,
        None => drawn(&old),
    };
    let mut diff = Diff {
        revisions: [old.config.revision.clone(), new.config.revision.clone()],
        asked: asked.len(),
        ..Diff::default()
    };
    moves(&mut diff, &old, &new, &asked);
    tenants(&mut diff, &old, &new);
    let endpoints = |snapshot: &Snapshot| -> BTreeSet<String> {
        snapshot.endpoints.iter().map(|endpoint| format!("{} {}", endpoint.config.region, endpoint.name())).collect()
    };
    let (before, after) = (endpoints(&old), endpoints(&new));
    diff.endpoints_added = after.difference(&before).cloned().collect();
    diff.endpoints_removed = before.difference(&after).cloned().collect();
    Ok(diff)
}

/// The requests of an access log, by its own words.
fn logged(file: &Path) -> Result<Vec<Question>, String> {
    #[derive(serde::Deserialize)]
    struct Line {
        client: Option<String>,
        tenant: Option<String>,
        model: Option<String>,
    }
    let file = std::fs::File::open(file).map_err(|error| error.to_string())?;
    let mut questions = Vec::new();
    for line in std::io::BufReader::new(file).lines() {
        let line = line.map_err(|error| error.to_string())?;
        // Other lines are among them, and the last may be cut off.
        let Ok(Line { client: Some(client), tenant, model }) = serde_json::from_str(&line) else { continue };
        // Logs tell a network where addresses are truncated.
        let Ok(ip) = client.split('/').next().unwrap_or_default().parse() else { continue };
        questions.push(Question { tenant, model, ..Question::about(ip) });
        if questions.len() == LINES_MAX {
            break;
        }
    }
    if questions.is_empty() { Err("it has no access line with a client's address".into()) } else { Ok(questions) }
}

/// Addresses from all over the Internet, the same each time, in turn for each tenant and model.
fn drawn(snapshot: &Snapshot) -> Vec<Question> {
    let mut whose: Vec<(String, Option<String>)> = Vec::new();
    for tenant in &snapshot.config.tenants {
        let may_use = |model: &&Arc<str>| tenant.models.is_empty() || tenant.models.contains(&***model);
        let mut models: Vec<String> = snapshot.models.keys().filter(may_use).map(|model| model.to_string()).collect();
        models.sort();
        whose.extend(models.into_iter().map(|model| (tenant.name.to_string(), Some(model))));
    }
    let mut random = fastrand::Rng::with_seed(1);
    let mut public = std::iter::repeat_with(|| Ipv4Addr::from(random.u32(1 << 24..224 << 24)))
        .filter(|address| !(address.is_private() || address.is_loopback() || address.is_link_local()));
    let turns = whose.iter().cycle().take(if whose.is_empty() { 0 } else { ADDRESSES });
    turns
        .filter_map(|(tenant, model)| {
            let about = Question::about(IpAddr::V4(public.next()?));
            Some(Question { tenant: Some(tenant.clone()), model: model.clone(), ..about })
        })
        .collect()
}

fn moves(diff: &mut Diff, old: &Snapshot, new: &Snapshot, asked: &[Question]) {
    let mut counts: BTreeMap<(Option<Box<str>>, Option<Box<str>>), usize> = BTreeMap::new();
    for question in asked {
        // A tenant or a model that is not there is nowhere.
        let pick = |snapshot| explain::explain(snapshot, question, Time(2)).ok().and_then(|explained| explained.pick);
        let (from, to) = (pick(old), pick(new));
        if from != to {
            *counts.entry((from, to)).or_default() += 1;
        }
    }
    let share = |count: usize| count as f64 / asked.len().max(1) as f64;
    diff.moves = counts.into_iter().map(|((from, to), count)| Move { from, to, share: share(count) }).collect();
    diff.moves.sort_by(|a, b| b.share.total_cmp(&a.share));
}

/// Compares what each tenant's data may see, for clients of every country that a rule names and of one that none does.
fn tenants(diff: &mut Diff, old: &Snapshot, new: &Snapshot) {
    let names = |snapshot: &Snapshot| -> BTreeSet<Box<str>> {
        snapshot.config.tenants.iter().map(|tenant| tenant.name.clone()).collect()
    };
    let (before, after) = (names(old), names(new));
    diff.tenants_added = after.difference(&before).cloned().collect();
    diff.tenants_removed = before.difference(&after).cloned().collect();
    let rules = old.config.country_rules.iter().chain(&new.config.country_rules);
    let mut countries: Vec<Option<Country>> = rules.flat_map(|(countries, _)| countries).copied().map(Some).collect();
    countries.sort();
    countries.dedup();
    // One that no rule names, and one that is not known: it is held to every rule.
    countries.extend([Country::parse(UNNAMED), None]);
    for (old_at, new_at) in pairs(old, new) {
        let (was, is) = (&old.config.tenants[old_at].name, &new.config.tenants[new_at].name);
        let name = if was == is { is.to_string() } else { format!("{was}, now {is}") };
        rule(diff, &name, &old.config.tenants[old_at], &new.config.tenants[new_at]);
        for country in &countries {
            let (was, is) = (permitted(old, old_at, *country, None), permitted(new, new_at, *country, None));
            let clients = match country {
                None => "clients of unknown country".to_owned(),
                Some(country) if country.as_str() == UNNAMED => "clients from anywhere else".to_owned(),
                Some(country) => format!("clients from {country}"),
            };
            // A new region inside the old rule is no change of the rule; one that was shut out before is.
            let more = both(&is, &was, &old.config);
            if !more.is_empty() {
                diff.residency_widens.push(format!("{name}: {clients} may now be served in {more}"));
            }
            let fewer = both(&was, &is, &new.config);
            if !fewer.is_empty() {
                diff.residency_narrows.push(format!("{name}: {clients} may no longer be served in {fewer}"));
            }
        }
        for model in old.models.keys().filter(|model| new.models.contains_key(*model)) {
            // A country that no rule names, so that only the tenant's own rule counts.
            let usable = |snapshot: &Snapshot, at: usize| {
                let drained: BTreeSet<&str> = snapshot
                    .config
                    .regions
                    .iter()
                    .filter(|config| config.region.drain || config.endpoints.iter().all(|endpoint| endpoint.drain))
                    .map(|config| &*config.region.name)
                    .collect();
                let mut regions = permitted(snapshot, at, Country::parse(UNNAMED), Some(model));
                regions.retain(|region| !drained.contains(&**region));
                regions
            };
            let (was, is) = (usable(old, old_at), usable(new, new_at));
            if is.len() < 2 && is.len() < was.len() {
                let left = is
                    .iter()
                    .next()
                    .map_or_else(|| "no region is left".to_owned(), |left| format!("only {left} is left"));
                diff.fallback_lost.push(format!("{name}, model {model}: {left} of {}", was.len()));
            }
        }
    }
}

/// The tenants that the same callers are, before and after: by name, by key, and without any key.
fn pairs(old: &Snapshot, new: &Snapshot) -> BTreeSet<(usize, usize)> {
    let named = |name: &str| new.config.tenants.iter().position(|tenant| *tenant.name == *name);
    let by_name = old.config.tenants.iter().enumerate().filter_map(|(at, tenant)| Some((at, named(&tenant.name)?)));
    let by_key = old.keys.iter().filter_map(|(key, &at)| Some((at, *new.keys.get(key)?)));
    by_name.chain(by_key).chain(old.anonymous.zip(new.anonymous)).collect()
}

/// The regions of one set and not of the other that a configuration has, in words.
fn both(of: &BTreeSet<Box<str>>, not_of: &BTreeSet<Box<str>>, config: &Config) -> String {
    let has = |region: &str| config.regions.iter().any(|config| *config.region.name == *region);
    of.difference(not_of).map(|region| &**region).filter(|region| has(region)).collect::<Vec<_>>().join(", ")
}

/// The rule itself, whether or not a region makes use of it yet.
fn rule(diff: &mut Diff, name: &str, old: &Tenant, new: &Tenant) {
    let Residency::Require(before) = &old.residency else { return };
    match &new.residency {
        Residency::Require(after) => {
            let more: Vec<&str> = after.iter().filter(|zone| !before.contains(zone)).map(|zone| &**zone).collect();
            if !more.is_empty() {
                diff.residency_widens.push(format!("{name}: it now allows {} as well", more.join(", ")));
            }
        }
        _ => diff.residency_widens.push(format!("{name}: it no longer requires {}", before.join(", "))),
    }
}

fn permitted(snapshot: &Snapshot, tenant: usize, country: Option<Country>, model: Option<&str>) -> BTreeSet<Box<str>> {
    let location = Location { country, ..Location::UNKNOWN };
    let ask = Ask { tenant, location: &location, model: model.map(|model| (model, None)) };
    let permitted = policy::permit(snapshot, &ask);
    let regions = permitted.map(|permitted| permitted.regions().iter().collect::<Vec<_>>()).unwrap_or_default();
    regions.into_iter().map(|region| Box::from(&*snapshot.regions[region.get()].name)).collect()
}

impl Diff {
    /// For people.
    pub fn table(&self) -> String {
        let mut text = String::new();
        let [old, new] = &self.revisions;
        let _ = writeln!(text, "revision {old} -> {new}");
        let mut list = |title: &str, lines: &[String]| {
            if !lines.is_empty() {
                let _ = writeln!(text, "\n{title}");
                for line in lines {
                    let _ = writeln!(text, "  {line}");
                }
            }
        };
        list("RESIDENCY WIDENS", &self.residency_widens);
        list("RESIDENCY NARROWS", &self.residency_narrows);
        list("last fallback lost", &self.fallback_lost);
        let named = |names: &[Box<str>]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        list("tenants added", &named(&self.tenants_added));
        list("tenants removed: their keys are no longer known", &named(&self.tenants_removed));
        list("endpoints added", &self.endpoints_added);
        list("endpoints removed", &self.endpoints_removed);
        let region = |region: &Option<Box<str>>| region.as_deref().unwrap_or("refused").to_owned();
        let line =
            |moved: &Move| format!("{:>6.2} %  {} -> {}", moved.share * 100.0, region(&moved.from), region(&moved.to));
        let all: f64 = self.moves.iter().map(|moved| moved.share).sum();
        list(
            &format!("{:.2} % of {} requests would go elsewhere, if everybody is well", all * 100.0, self.asked),
            &self.moves.iter().map(line).collect::<Vec<_>>(),
        );
        if self.moves.is_empty() {
            let _ = writeln!(text, "\nnone of {} requests would go elsewhere, if everybody is well", self.asked);
        }
        text
    }
}
