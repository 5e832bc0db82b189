//! Kept answers of inference. Correctness comes before hits: what cannot be mapped exactly, what is not known to be
//! deterministic, and what is anybody else's is not served.
//!
//! A [`Key`] can only be made of a scope, the zones that the caller is held to, one version of one model with the digest of
//! its weights, and the request's own digest. So another tenant, another wall, another version and other tensors are another
//! entry, and a new version makes the old entries unreachable by itself. An entry records the region that it came from, and
//! is served only if that region is permitted to the caller.

mod control;

mod flight;

mod kept;

mod status;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use isochrone_core::region::RegionIndex;
use isochrone_core::residency::Residency;
use isochrone_tensor::request::{number, text};
use tokio::time::timeout_at;

use self::control::Control;
use self::flight::{Ended, Flights, Joined};
use self::kept::{Asked, Entry};
pub(crate) use self::status::Status;
use crate::app::Core;
use crate::attempt::{self, Answer, Attempted};
use crate::body::Received;
use crate::catalog;
use crate::config::{self, CacheScope};
use crate::error::Error;
use crate::event::Record;
use crate::policy::Ask;
use crate::snapshot::Snapshot;

/// How often a request waits for another's answer that then does not come, before it goes on its own.
const WAITS_MAX: usize = 3;

/// All kept answers, and the questions that are on their way.
#[derive(Debug)]
pub(crate) struct Cache {
    /// At most; 0: it is off until the next start.
    bytes: u64,
    entries: moka::sync::Cache<Key, Arc<Entry>>,
    flights: Flights,
    /// How often something was forgotten by hand: an answer that was asked for before is not kept.
    purges: AtomicU64,
    pub(crate) counts: Counts,
}

/// How requests that could be cached have gone.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) hits: AtomicU64,
    pub(crate) stale: AtomicU64,
    pub(crate) misses: AtomicU64,
    pub(crate) collapsed: AtomicU64,
    pub(crate) stored: AtomicU64,
    pub(crate) bypassed: AtomicU64,
}

/// What names an entry. See [`Key::new`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key([u8; 32]);

/// Who may be given an entry.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Scope<'a> {
    /// One tenant.
    Tenant(&'a str),
    /// The tenants of a route that are held to the same zones.
    Shared(&'a BTreeSet<Box<str>>),
}

impl Key {
    /// The key of a request: BLAKE3 over everything that an answer depends on, each part behind its length.
    fn new(scope: Scope<'_>, zones: &str, model: [&str; 3], request: &isochrone_tensor::request::Request) -> Key {
        static CONTEXT: LazyLock<blake3::Hasher> =
            LazyLock::new(|| blake3::Hasher::new_derive_key("isochrone inference cache 1"));
        let mut hasher = CONTEXT.clone();
        match scope {
            Scope::Tenant(tenant) => {
                number(&mut hasher, 1);
                text(&mut hasher, tenant);
            }
            Scope::Shared(tenants) => {
                number(&mut hasher, 2);
                number(&mut hasher, tenants.len());
                tenants.iter().for_each(|tenant| text(&mut hasher, tenant));
            }
        }
        text(&mut hasher, zones);
        model.into_iter().for_each(|part| text(&mut hasher, part));
        request.digest(&mut hasher);
        Key(hasher.finalize().into())
    }
}

impl Cache {
    /// An empty one. How much it holds, and the longest that it holds anything, is as at the start of the process.
    pub(crate) fn new(config: &config::Cache) -> Cache {
        let longest = config.ttl + config.stale_while_revalidate.max(config.stale_if_error);
        let entries = moka::sync::Cache::builder()
            .max_capacity(config.bytes)
            // What is not found any more, for a new version has come, must not be taken for what is asked often.
            .time_to_live(longest)
            .weigher(|_: &Key, entry: &Arc<Entry>| u32::try_from(entry.cost).unwrap_or(u32::MAX))
            .support_invalidation_closures()
            .build();
        let (flights, purges, counts) = (Flights::default(), AtomicU64::new(0), Counts::default());
        Cache { bytes: config.bytes, entries, flights, purges, counts }
    }

    /// Entries, and the bytes that they cost.
    pub(crate) fn size(&self) -> (u64, u64) {
        self.entries.run_pending_tasks();
        (self.entries.entry_count(), self.entries.weighted_size())
    }

    /// Forgets the entries of a model, of the tenant whose request they answered first, or of both; all, if neither is named.
    pub(crate) fn purge(&self, model: Option<Box<str>>, tenant: Option<Box<str>>) {
        self.purges.fetch_add(1, Relaxed);
        if model.is_none() && tenant.is_none() {
            return self.entries.invalidate_all();
        }
        let fits = move |_: &Key, entry: &Arc<Entry>| {
            model.as_ref().is_none_or(|model| *entry.answer.model == **model)
                && tenant.as_ref().is_none_or(|tenant| entry.tenant == *tenant)
        };
        // It fails only where closures are not supported, which they are.
        let _ = self.entries.invalidate_entries_if(fits);
    }
}

/// Answers a request with what is kept, or else tries the endpoints and keeps what they answer.
///
/// # Errors
/// Nobody permitted could answer, and nothing is kept that may be given instead.
pub(crate) async fn through(
    core: &Core,
    request: &Attempted<'_>,
    body: Received,
    record: &mut Record,
) -> Result<Answer, Error> {
    let (cache, config) = (&core.shared.cache, &request.snapshot.config.cache);
    let asked = match ask(cache, request, &body) {
        Ok(asked) => asked,
        Err(why) => {
            cache.counts.bypassed.fetch_add(1, Relaxed);
            record.cache = Status::Bypass(why);
            return attempt::run(core, request, body, false, record).await;
        }
    };
    let purges = cache.purges.load(Relaxed);
    let found = if asked.control.no_cache { None } else { look(core, request, &asked) };
    let age = |entry: &Entry| entry.stored.elapsed();
    if let Some((entry, region)) = &found
        && asked.control.takes(age(entry))
        && age(entry) < config.ttl
        && let Some(answer) = asked.rendered(entry, *region)
    {
        cache.counts.hits.fetch_add(1, Relaxed);
        record.kept(&entry.region, asked.hit(entry, config.ttl, false));
        return Ok(answer);
    }
    // Too old to be given at once; better than nothing, for a while.
    let stale = |within: Duration, record: &mut Record| {
        let (entry, _) = found.as_ref().filter(|(entry, _)| age(entry) < config.ttl + within)?;
        if !asked.control.takes(age(entry)) {
            return None;
        }
        // By the rules of this moment: they may be why there is no other answer.
        let answer = asked.rendered(entry, place(core, request, entry)?)?;
        cache.counts.stale.fetch_add(1, Relaxed);
        record.kept(&entry.region, asked.hit(entry, config.ttl, false));
        Some(answer)
    };
    record.cache = Status::Miss { stored: Some("no answer"), scope: asked.scope };
    if asked.control.only_if_cached {
        return Err(Error::NotKept);
    }
    let mut lead = None;
    for _ in 0..WAITS_MAX {
        // Whoever wants it fresh, or has less time than others, asks on its own.
        if asked.control.no_cache || asked.request.hurried {
            break;
        }
        match cache.flights.join(asked.key) {
            Joined::Lead(first) => {
                lead = Some(first);
                break;
            }
            Joined::Wait(flight) => {
                // Somebody has it renewed already.
                if let Some(answer) = stale(config.stale_while_revalidate, record) {
                    return Ok(answer);
                }
                // Half of the time that is left is kept for asking on its own: whoever leads may be stuck.
                let now = tokio::time::Instant::now();
                let until = now + request.deadline.saturating_duration_since(now) / 2;
                let Ok(ended) = timeout_at(until, flight.ended()).await else { break };
                match ended {
                    Ended::Kept(entry) => {
                        let region = place(core, request, &entry);
                        if let Some(answer) = region.and_then(|region| asked.rendered(&entry, region)) {
                            cache.counts.collapsed.fetch_add(1, Relaxed);
                            record.kept(&entry.region, asked.hit(&entry, config.ttl, true));
                            return Ok(answer);
                        }
                        break;
                    }
                    ended => {
                        // Somebody has just tried.
                        if let Some(answer) = stale(config.stale_if_error, record) {
                            return Ok(answer);
                        }
                        // What it got is for nobody else: asking one after the other would only take longer. If it got
                        // nothing, one of those who waited goes on in its place.
                        if matches!(ended, Ended::NotKept) {
                            break;
                        }
                    }
                }
            }
        }
    }
    cache.counts.misses.fetch_add(1, Relaxed);
    let result = attempt::run(core, request, body, true, record).await;
    let failed = result.as_ref().map_or(true, kept::is_failure);
    if failed {
        // One of those who wait asks next.
        drop(lead);
        return match stale(config.stale_if_error, record) {
            Some(answer) => Ok(answer),
            None => result,
        };
    }
    let answer = result?;
    let kept = asked.entry(request, &answer);
    record.cache = Status::Miss { stored: kept.as_ref().err().copied(), scope: asked.scope };
    let kept = kept.ok().map(Arc::new).filter(|_| cache.purges.load(Relaxed) == purges);
    if let Some(entry) = &kept {
        cache.counts.stored.fetch_add(1, Relaxed);
        cache.entries.insert(asked.key, Arc::clone(entry));
    }
    if let Some(lead) = lead {
        lead.ended(kept.map_or(Ended::NotKept, Ended::Kept));
    }
    Ok(answer)
}

/// What a request asks for, if its answer can be kept.
///
/// # Errors
/// Why it cannot, in a word.
fn ask(cache: &Cache, request: &Attempted<'_>, body: &Received) -> Result<Asked, &'static str> {
    let snapshot = request.snapshot;
    if cache.bytes == 0 || snapshot.config.cache.bytes == 0 {
        return Err("");
    }
    let (name, version) = request.ask.model.filter(|_| kept::is_inference(request)).ok_or("no inference")?;
    let shared = match request.route.cache {
        CacheScope::Off => return Err("route"),
        CacheScope::Tenant => false,
        CacheScope::Shared => true,
    };
    let control = Control::parse(&request.head.headers);
    if control.no_store {
        return Err("no-store");
    }
    if !body.is_whole() {
        return Err("size");
    }
    // Its answer is passed on as it comes.
    if request.route.replay == Some(false) {
        return Err("not replayable");
    }
    let grpc = kept::is_grpc(request);
    let served = catalog::resolve(snapshot, request.permitted.regions(), (name, version), grpc)?;
    let mut wanted = kept::read(request, body).map_err(|why| why.0)?;
    let tenant = &snapshot.config.tenants[request.ask.tenant].name;
    let scope = if shared { Scope::Shared(&request.route.tenants) } else { Scope::Tenant(tenant) };
    let key = Key::new(scope, &zones(snapshot, &request.ask), [&served.name, &served.version, &served.digest], &wanted);
    let scope = if shared { "shared" } else { "tenant" };
    // They have been digested, and can be much larger than the body that they came in.
    wanted.inputs = Vec::new();
    Ok(Asked { key, scope, control, request: wanted, served, grpc })
}

/// The zones that a caller is held to, as a text that is the same for those who are held to the same.
fn zones(snapshot: &Snapshot, ask: &Ask<'_>) -> String {
    let mut walls: Vec<String> = Vec::new();
    let mut wall = |zones: &[Box<str>]| {
        let mut zones: Vec<&str> = zones.iter().map(|zone| &**zone).collect();
        zones.sort_unstable();
        zones.dedup();
        walls.push(zones.join(","));
    };
    if let Residency::Require(zones) = &snapshot.config.tenants[ask.tenant].residency {
        wall(zones);
    }
    for (countries, zones) in &snapshot.config.country_rules {
        if ask.location.country.is_none_or(|country| countries.contains(&country)) {
            wall(zones);
        }
    }
    walls.sort_unstable();
    walls.dedup();
    if walls.is_empty() { "any".to_owned() } else { walls.join("&") }
}

/// What is kept for a request, and the region it is from.
fn look(core: &Core, request: &Attempted<'_>, asked: &Asked) -> Option<(Arc<Entry>, RegionIndex)> {
    let entry = core.shared.cache.entries.get(&asked.key)?;
    let region = place(core, request, &entry)?;
    Some((entry, region))
}

/// The region of an entry, if it is permitted to this caller, by the newest rules too.
fn place(core: &Core, request: &Attempted<'_>, entry: &Entry) -> Option<RegionIndex> {
    let permitted = attempt::hold_to_newest(core, request);
    permitted.regions().iter().find(|region| request.snapshot.regions[region.get()].name == entry.region)
}

/// Now, for ages.
fn now() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use isochrone_tensor::request::Request;

    use super::*;

    fn request() -> Request {
        let body = br#"{"inputs":[{"name":"x","datatype":"INT8","shape":[1],"data":[1]}]}"#;
        Request::from_http(&Bytes::from_static(body), None).expect("exact")
    }

    /// Whatever an answer depends on makes another key, and nothing of one part is read as of the next.
    #[test]
    fn no_two_scopes_walls_or_versions_share_a_key() {
        let set = |names: &[&str]| names.iter().map(|name| Box::from(*name)).collect::<BTreeSet<Box<str>>>();
        let (none, one, two) = (set(&[]), set(&["a"]), set(&["a", "b"]));
        let scopes = [
            Scope::Tenant("a"),
            Scope::Tenant("b"),
            Scope::Tenant("ab"),
            Scope::Shared(&none),
            Scope::Shared(&one),
            Scope::Shared(&two),
        ];
        let models =
            [["m", "1", "d"], ["m", "2", "d"], ["m", "1", "e"], ["m1", "", "d"], ["", "m1", "d"], ["m", "1d", ""]];
        let mut keys = std::collections::HashSet::new();
        for scope in scopes {
            for zones in ["any", "eu", "eu,us", "eu&us", ""] {
                for model in models {
                    assert!(keys.insert(Key::new(scope, zones, model, &request())), "{scope:?} {zones} {model:?}");
                }
            }
        }
        assert_eq!(keys.len(), 180);
    }
}
