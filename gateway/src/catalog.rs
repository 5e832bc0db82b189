//! Which models an endpoint says that it has, with their weights: what its probe's answer carries.

use http::{HeaderMap, HeaderName};

use crate::snapshot::Snapshot;
use isochrone_core::region::RegionSet;

/// A JSON array of `[name, version, digest, deterministic]`, on the answer to a probe.
const MODELS: HeaderName = HeaderName::from_static("isochrone-models");

/// One version of a model at an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
pub(crate) struct Served {
    pub(crate) name: Box<str>,
    pub(crate) version: Box<str>,
    /// Of weights, tokenizer and precision.
    pub(crate) digest: Box<str>,
    /// Equal inputs have equal outputs.
    pub(crate) deterministic: bool,
}

/// Reads what a probe's answer says. Nothing, if it says nothing that can be read.
pub(crate) fn parse(headers: &HeaderMap) -> Vec<Served> {
    headers.get(MODELS).and_then(|value| serde_json::from_slice(value.as_bytes()).ok()).unwrap_or_default()
}

/// The version that a call of a model gets wherever it goes: the one that is asked for, or else the newest of every endpoint
/// that it could go to.
///
/// # Errors
/// Why there is no such version, in words.
pub(crate) fn resolve(
    snapshot: &Snapshot,
    permitted: RegionSet,
    (model, version): (&str, Option<&str>),
    grpc: bool,
) -> Result<Served, &'static str> {
    // Where all are down, what they had still tells which kept answers are the newest.
    let found = [true, false].into_iter().find_map(|well| agreed(snapshot, permitted, (model, version), grpc, well));
    match found.unwrap_or(Err("unknown version"))? {
        served if served.deterministic => Ok(served),
        _ => Err("not deterministic"),
    }
}

/// What all endpoints that are well, or else all that are not, agree on.
fn agreed(
    snapshot: &Snapshot,
    permitted: RegionSet,
    (model, version): (&str, Option<&str>),
    grpc: bool,
    well: bool,
) -> Option<Result<Served, &'static str>> {
    let mut known: Option<Served> = None;
    for region in permitted.iter().filter(|region| !snapshot.fleet.is_drained(*region)) {
        for endpoint in &snapshot.endpoints[snapshot.regions[region.get()].endpoints.clone()] {
            let live = &endpoint.live;
            let is_well = live.is_healthy() && live.is_asserted();
            if is_well != well || live.is_drained() || !live.speaks(grpc) {
                continue;
            }
            let catalog = endpoint.catalog.load();
            if well && catalog.is_empty() {
                // It may have a newer one, and does not say so.
                return Some(Err("unknown version"));
            }
            let fits =
                |served: &&Served| *served.name == *model && version.is_none_or(|version| *served.version == *version);
            let Some(newest) = catalog.iter().filter(fits).max_by(|a, b| order(&a.version).cmp(&order(&b.version)))
            else {
                continue;
            };
            match &known {
                None => known = Some(newest.clone()),
                Some(known) if known == newest => {}
                // A canary, or a roll-out on its way.
                Some(known) if known.version != newest.version => return Some(Err("mixed versions")),
                Some(_) => return Some(Err("mixed weights")),
            }
        }
    }
    known.map(Ok)
}

/// Versions are numbers, mostly.
fn order(version: &str) -> (u64, &str) {
    (version.parse().unwrap_or(0), version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_probe_says_is_read_or_passed_over() {
        let read = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(MODELS, text.parse().expect("a value"));
            parse(&headers)
        };
        let served = read(r#"[["m","1","ab",true],["n","2","cd",false]]"#);
        assert_eq!((served.len(), &*served[1].version, served[0].deterministic), (2, "2", true));
        for bad in ["", "[", "{}", r#"[["m","1"]]"#, r#"[["m",1,"ab",true]]"#] {
            assert_eq!(read(bad), [], "{bad}");
        }
        assert!(order("10") > order("9") && order("b") > order("a"));
    }
}
