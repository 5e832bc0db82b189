//! The snapshot: one immutable view of the configuration, compiled for reading, with the endpoints of that moment.
//!
//! A request takes it once and sees nothing else, whatever is reloaded meanwhile.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use http::HeaderValue;
use isochrone_core::region::{RegionIndex, RegionSet};
use isochrone_core::residency::{CountryRules, TenantRule};

use crate::config::Config;
use crate::endpoint::Endpoint;

/// The compiled view.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) config: Config,
    pub(crate) all_regions: RegionSet,
    pub(crate) regions: Vec<RegionEntry>,
    /// All endpoints; a region's are contiguous.
    pub(crate) endpoints: Vec<Arc<Endpoint>>,
    /// The regions that declare each model.
    pub(crate) models: HashMap<Arc<str>, RegionSet>,
    pub(crate) tenants: Vec<TenantEntry>,
    /// Tenants by the digest of their keys.
    pub(crate) keys: HashMap<[u8; 32], usize>,
    pub(crate) anonymous: Option<usize>,
    pub(crate) country_rules: CountryRules,
}

/// A region as the request path needs it.
#[derive(Debug)]
pub(crate) struct RegionEntry {
    pub(crate) name: Arc<str>,
    pub(crate) header: HeaderValue,
    pub(crate) endpoints: Range<usize>,
}

/// A tenant as the request path needs it.
#[derive(Debug)]
pub(crate) struct TenantEntry {
    pub(crate) name: Arc<str>,
    pub(crate) rule: TenantRule,
}

impl Snapshot {
    /// Compiles a configuration. Endpoints that `before` already has are taken over with their state.
    pub(crate) fn compile(config: Config, before: Option<&Snapshot>) -> Snapshot {
        let known: HashMap<&str, &Arc<Endpoint>> = before
            .into_iter()
            .flat_map(|before| &before.endpoints)
            .map(|endpoint| (&*endpoint.config.id, endpoint))
            .collect();
        // The threads, and with them the pools, are as many as at the start: `cores` asks for a restart.
        let cores = before.map_or(config.cores, |before| before.config.cores);
        let core_regions: Vec<_> = config.regions.iter().map(|region| region.region.clone()).collect();
        let mut regions = Vec::new();
        let mut endpoints: Vec<Arc<Endpoint>> = Vec::new();
        let mut models: HashMap<Arc<str>, RegionSet> = HashMap::new();
        for (at, region) in config.regions.iter().enumerate() {
            let start = endpoints.len();
            endpoints.extend(region.endpoints.iter().map(|endpoint| match known.get(&*endpoint.id) {
                Some(known) => Arc::clone(known),
                None => Arc::new(Endpoint::new(endpoint.clone(), cores)),
            }));
            for model in &region.models {
                let declaring = models.entry(Arc::from(&**model)).or_default();
                RegionIndex::new(at).into_iter().for_each(|index| declaring.insert(index));
            }
            let name = &region.region.name;
            regions.push(RegionEntry {
                name: Arc::from(&**name),
                // Names are made of letters, digits and `-_.`, which `config` has made sure of.
                header: HeaderValue::from_str(name).unwrap_or_else(|_| HeaderValue::from_static("?")),
                endpoints: start..endpoints.len(),
            });
        }
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
            models,
            tenants,
            keys: keys.flat_map(|(at, tenant)| tenant.keys.iter().map(move |key| (*key, at))).collect(),
            anonymous: config.tenants.iter().position(|tenant| Some(&tenant.name) == config.anonymous.as_ref()),
            country_rules: CountryRules::compile(&config.country_rules, &core_regions),
            config: Config { cores, ..config },
        }
    }

    /// The model's name as the snapshot holds it, and the regions that declare it.
    pub(crate) fn model(&self, name: &str) -> Option<(&Arc<str>, RegionSet)> {
        self.models.get_key_value(name).map(|(name, regions)| (name, *regions))
    }
}
