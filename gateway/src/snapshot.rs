//! The snapshot: one immutable view of the configuration, compiled for reading, with the endpoints of that moment.
//!
//! A request takes it once and sees nothing else, whatever is reloaded meanwhile.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::sync::Arc;

use http::HeaderValue;
use isochrone_core::Time;
use isochrone_core::fleet::Fleet;
use isochrone_core::live::Live;
use isochrone_core::region::{Region, RegionIndex, RegionSet};
use isochrone_core::residency::{CountryRules, TenantRule};

use crate::config::{Config, Route};
use crate::endpoint::Endpoint;

/// The compiled view.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) config: Arc<Config>,
    /// What the operator drains beside what the files say.
    pub(crate) drains: Drains,
    pub(crate) all_regions: RegionSet,
    pub(crate) regions: Vec<RegionEntry>,
    /// All endpoints; a region's are contiguous, and the places are those of the fleet.
    pub(crate) endpoints: Vec<Arc<Endpoint>>,
    /// The same regions and endpoints as decisions see them, with what is measured.
    pub(crate) fleet: Fleet,
    /// The models that are declared.
    pub(crate) models: HashMap<Arc<str>, Model>,
    pub(crate) tenants: Vec<TenantEntry>,
    /// Tenants by the digest of their keys.
    pub(crate) keys: HashMap<[u8; 32], usize>,
    pub(crate) anonymous: Option<usize>,
    pub(crate) country_rules: CountryRules,
}

/// What takes nothing new because the operator has said so, until he takes it back or the process ends.
#[derive(Clone, Debug, Default)]
pub(crate) struct Drains {
    pub(crate) regions: BTreeSet<Box<str>>,
    /// Regions and addresses.
    pub(crate) endpoints: BTreeSet<(Box<str>, Box<str>)>,
}

/// A region as the request path needs it.
#[derive(Debug)]
pub(crate) struct RegionEntry {
    pub(crate) name: Arc<str>,
    pub(crate) header: HeaderValue,
    pub(crate) endpoints: Range<usize>,
}

/// A model as the request path needs it.
#[derive(Debug)]
pub(crate) struct Model {
    pub(crate) name: Arc<str>,
    /// Its place in the fleet.
    pub(crate) index: usize,
    /// The regions that declare it.
    pub(crate) declaring: RegionSet,
    /// Those that declare it without naming versions: any version may be there.
    any_version: RegionSet,
    versions: HashMap<Box<str>, RegionSet>,
}

impl Model {
    /// The regions that declare this version of it.
    pub(crate) fn declaring(&self, version: Option<&str>) -> RegionSet {
        match version {
            None => self.declaring,
            Some(version) => {
                let named = self.versions.get(version).copied().unwrap_or_default();
                self.any_version.union(named)
            }
        }
    }
}

/// A tenant as the request path needs it.
#[derive(Debug)]
pub(crate) struct TenantEntry {
    pub(crate) name: Arc<str>,
    pub(crate) rule: TenantRule,
}

impl Snapshot {
    /// Compiles a configuration. Endpoints that `before` already has are taken over with their state.
    pub(crate) fn compile(config: Arc<Config>, drains: Drains, before: Option<&Snapshot>, now: Time) -> Snapshot {
        let known: HashMap<&str, &Arc<Endpoint>> = before
            .into_iter()
            .flat_map(|before| &before.endpoints)
            .map(|endpoint| (&*endpoint.config.id, endpoint))
            .collect();
        let cores = config.cores;
        let core_regions: Vec<Region> = config.regions.iter().map(|region| region.region.clone()).collect();
        let mut regions = Vec::new();
        let mut endpoints: Vec<Arc<Endpoint>> = Vec::new();
        let mut plan: Vec<(Region, Vec<Arc<Live>>)> = Vec::new();
        for region in &config.regions {
            let start = endpoints.len();
            let name = &region.region.name;
            endpoints.extend(region.endpoints.iter().map(|config| {
                let endpoint = match known.get(&*config.id) {
                    Some(known) => Arc::clone(known),
                    None => Arc::new(Endpoint::new(config.clone(), cores, before.is_none())),
                };
                let by_hand =
                    drains.endpoints.iter().any(|(region, address)| region == name && **address == *endpoint.name());
                endpoint.live.drain(config.drain || by_hand, now);
                endpoint
            }));
            let drain = region.region.drain || drains.regions.contains(name);
            plan.push((
                Region { drain, ..region.region.clone() },
                endpoints[start..].iter().map(|endpoint| Arc::clone(&endpoint.live)).collect(),
            ));
            regions.push(RegionEntry {
                name: Arc::from(&**name),
                // Names are made of letters, digits and `-_.`, which `config` has made sure of.
                header: HeaderValue::from_str(name).unwrap_or_else(|_| HeaderValue::from_static("?")),
                endpoints: start..endpoints.len(),
            });
        }
        // An endpoint that is drained and changed in one edit is another, but what stands at its address is not.
        for old in before.into_iter().flat_map(|before| &before.endpoints) {
            let same = |new: &&Arc<Endpoint>| new.config.region == old.config.region && new.name() == old.name();
            if let Some(new) = endpoints.iter().find(same).filter(|new| !Arc::ptr_eq(new, old) && new.live.is_drained())
            {
                old.live.drain(new.live.is_drained(), now);
            }
        }
        let models = models(&config);
        let mut in_order: Vec<&Model> = models.values().collect();
        in_order.sort_by_key(|model| model.index);
        let declared = in_order.iter().map(|model| (Arc::clone(&model.name), model.declaring));
        let fleet = Fleet::new(plan, declared, config.geometry, config.live, before.map(|before| &before.fleet));
        let tenants: Vec<_> = config
            .tenants
            .iter()
            .map(|tenant| TenantEntry {
                name: Arc::from(&*tenant.name),
                rule: TenantRule::compile(&tenant.residency, &core_regions, &config.zones),
            })
            .collect();
        let keys = config.tenants.iter().enumerate();
        Snapshot {
            all_regions: RegionSet::of(&core_regions, |_| true),
            regions,
            endpoints,
            fleet,
            models,
            tenants,
            keys: keys.flat_map(|(at, tenant)| tenant.keys.iter().map(move |key| (*key, at))).collect(),
            anonymous: config.tenants.iter().position(|tenant| Some(&tenant.name) == config.anonymous.as_ref()),
            country_rules: CountryRules::compile(&config.country_rules, &core_regions),
            config,
            drains,
        }
    }

    /// The route that a call takes: the first that fits.
    pub(crate) fn route(&self, tenant: usize, model: Option<&Model>) -> &Route {
        let tenant = &self.config.tenants[tenant].name;
        let fits = |route: &&Route| {
            (route.models.is_empty() || model.is_some_and(|model| route.models.contains(&*model.name)))
                && (route.tenants.is_empty() || route.tenants.contains(tenant))
        };
        self.config.routes.iter().find(fits).unwrap_or(&self.config.default_route)
    }
}

fn models(config: &Config) -> HashMap<Arc<str>, Model> {
    let mut models: HashMap<Arc<str>, Model> = HashMap::new();
    for (at, region) in config.regions.iter().enumerate() {
        let Some(region_index) = RegionIndex::new(at) else { continue };
        for (name, versions) in &region.models {
            let index = models.len();
            let model = models.entry(Arc::from(&**name)).or_insert_with_key(|name| Model {
                name: Arc::clone(name),
                index,
                declaring: RegionSet::EMPTY,
                any_version: RegionSet::EMPTY,
                versions: HashMap::new(),
            });
            model.declaring.insert(region_index);
            if versions.is_empty() {
                model.any_version.insert(region_index);
            }
            for version in versions {
                model.versions.entry(version.clone()).or_default().insert(region_index);
            }
        }
    }
    models
}
