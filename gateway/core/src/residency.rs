//! Residency: which regions may see a request at all.
//!
//! `permitted = regions declaring the model ∩ the tenant's residency ∩ the rules for the client's country`.
//!
//! [`Permitted`] is the proof. Its fields are private and [`permit`] is the only function that makes one, so whoever
//! holds it (pick, retry, cache) has been through the rules; and it can only shrink: there is no way to add a region.

use std::collections::HashMap;

use crate::geo::{Country, Location};
use crate::region::{Region, RegionIndex, RegionSet};

/// A tenant's residency as written: zones that are a wall, or zones that come first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Residency {
    /// No rule: any region.
    #[default]
    Any,
    /// A wall: only regions of one of these zones.
    Require(Vec<Box<str>>),
    /// An order: regions of these zones first, the others after them.
    Prefer(Vec<Box<str>>),
}

/// [`Residency`] compiled against one set of regions.
#[derive(Clone, Copy, Debug)]
pub struct TenantRule {
    allowed: RegionSet,
    preferred: RegionSet,
    gateway_allowed: bool,
}

impl TenantRule {
    /// `gateway_zones` are the zones that the gateway itself declares to stand in; empty where it declares none.
    pub fn compile(residency: &Residency, regions: &[Region], gateway_zones: &[Box<str>]) -> TenantRule {
        let all = RegionSet::of(regions, |_| true);
        let in_zones = |zones: &[Box<str>]| RegionSet::of(regions, |region| shares_zone(zones, &region.zones));
        match residency {
            Residency::Any => TenantRule { allowed: all, preferred: all, gateway_allowed: true },
            Residency::Prefer(zones) => TenantRule { allowed: all, preferred: in_zones(zones), gateway_allowed: true },
            Residency::Require(zones) => {
                let allowed = in_zones(zones);
                let gateway_allowed = gateway_zones.is_empty() || shares_zone(zones, gateway_zones);
                TenantRule { allowed, preferred: allowed, gateway_allowed }
            }
        }
    }

    /// Whether this gateway may see the tenant's payload. Asked from the request's head, before the body is read:
    /// once TLS ends here, the payload is here.
    pub fn allows_gateway(&self) -> bool {
        self.gateway_allowed
    }
}

fn shares_zone(wanted: &[Box<str>], zones: &[Box<str>]) -> bool {
    wanted.iter().any(|zone| zones.contains(zone))
}

/// The rules for clients of certain countries, compiled. They tighten only.
#[derive(Clone, Debug, Default)]
pub struct CountryRules {
    by_country: HashMap<Country, RegionSet>,
    /// What a client of unknown country is held to: all rules at once, since any of them may be its own.
    unknown: Option<RegionSet>,
}

impl CountryRules {
    /// `rules` are (countries, zones that their clients are held to); several for one country all hold.
    pub fn compile(rules: &[(Vec<Country>, Vec<Box<str>>)], regions: &[Region]) -> CountryRules {
        let mut compiled = CountryRules::default();
        for (countries, zones) in rules {
            let allowed = RegionSet::of(regions, |region| shares_zone(zones, &region.zones));
            for &country in countries {
                let entry = compiled.by_country.entry(country).or_insert(allowed);
                *entry = entry.intersection(allowed);
            }
            compiled.unknown = Some(compiled.unknown.map_or(allowed, |set| set.intersection(allowed)));
        }
        compiled
    }

    fn allowed(&self, country: Option<Country>) -> Option<RegionSet> {
        match country {
            _ if self.by_country.is_empty() => None,
            Some(country) => self.by_country.get(&country).copied(),
            None => self.unknown,
        }
    }
}

/// The regions that may see this request, and which of them the tenant prefers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permitted {
    regions: RegionSet,
    preferred: RegionSet,
}

impl Permitted {
    /// The permitted regions.
    pub fn regions(&self) -> RegionSet {
        self.regions
    }

    /// Whether the region is permitted.
    pub fn contains(&self, region: RegionIndex) -> bool {
        self.regions.contains(region)
    }

    /// Whether the tenant would rather be served here than in a permitted region outside its preferred zones.
    pub fn prefers(&self, region: RegionIndex) -> bool {
        self.preferred.contains(region)
    }

    /// Keeps only the regions for which `still` holds: a later attempt under a newer configuration.
    #[must_use]
    pub fn narrowed(&self, still: impl Fn(RegionIndex) -> bool) -> Permitted {
        let mut regions = self.regions;
        self.regions.iter().filter(|&region| !still(region)).for_each(|region| regions.remove(region));
        Permitted { regions, preferred: self.preferred }
    }
}

/// Why no region may serve the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// No region declares the model.
    UnknownModel,
    /// Regions declare it, but the rules permit none of them.
    Residency,
    /// The gateway itself stands where the tenant's data may not be.
    GatewayOutside,
}

/// Applies the rules. `declaring` are the regions that declare the model, `None` where the call names no model.
pub fn permit(
    all: RegionSet,
    declaring: Option<RegionSet>,
    tenant: &TenantRule,
    countries: &CountryRules,
    location: &Location,
) -> Result<Permitted, Refused> {
    if !tenant.allows_gateway() {
        return Err(Refused::GatewayOutside);
    }
    let declaring = declaring.unwrap_or(all);
    if declaring.is_empty() {
        return Err(Refused::UnknownModel);
    }
    let mut regions = declaring.intersection(tenant.allowed);
    if let Some(allowed) = countries.allowed(location.country) {
        regions = regions.intersection(allowed);
    }
    if regions.is_empty() {
        return Err(Refused::Residency);
    }
    Ok(Permitted { regions, preferred: tenant.preferred })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geo::Point;

    fn region(name: &str, country: &str, zones: &[&str]) -> Region {
        let place = Point::new(0.0, 0.0).expect("valid");
        let zones = zones.iter().map(|&zone| zone.into()).collect();
        Region { zones, ..Region::new(name, Country::parse(country).expect("valid"), place) }
    }

    fn world() -> Vec<Region> {
        vec![
            region("us-east", "US", &["us"]),
            region("eu-west", "IE", &["eu"]),
            region("eu-north", "SE", &["eu", "nordic"]),
            // A region whose file names no zone is in none: a wall keeps it out.
            region("nowhere", "BR", &[]),
        ]
    }

    fn names(regions: &[Region], permitted: Result<Permitted, Refused>) -> Vec<&str> {
        permitted.expect("permitted").regions().iter().map(|at| &*regions[at.get()].name).collect()
    }

    fn zones(names: &[&str]) -> Vec<Box<str>> {
        names.iter().map(|&name| name.into()).collect()
    }

    fn ask(
        regions: &[Region],
        residency: &Residency,
        rules: &CountryRules,
        country: &str,
    ) -> Result<Permitted, Refused> {
        let rule = TenantRule::compile(residency, regions, &[]);
        let location = Location::from_record(Country::parse(country), None);
        permit(RegionSet::of(regions, |_| true), None, &rule, rules, &location)
    }

    #[test]
    fn require_is_a_wall_and_prefer_an_order() {
        let regions = world();
        let none = CountryRules::default();
        let walled = ask(&regions, &Residency::Require(zones(&["eu"])), &none, "DE");
        assert_eq!(names(&regions, walled), ["eu-west", "eu-north"]);
        let ordered = ask(&regions, &Residency::Prefer(zones(&["nordic"])), &none, "DE").expect("permitted");
        assert_eq!(ordered.regions().len(), 4);
        assert!(ordered.prefers(RegionIndex::new(2).expect("valid")));
        assert!(!ordered.prefers(RegionIndex::new(0).expect("valid")));
    }

    #[test]
    fn a_zone_that_no_region_has_permits_nothing() {
        let asked = ask(&world(), &Residency::Require(zones(&["mars"])), &CountryRules::default(), "DE");
        assert_eq!(asked, Err(Refused::Residency));
    }

    #[test]
    fn country_rules_tighten_and_fail_closed_on_an_unknown_country() {
        let regions = world();
        let country = |code| Country::parse(code).expect("valid");
        let rules = CountryRules::compile(
            &[(vec![country("DE"), country("SE")], zones(&["eu"])), (vec![country("SE")], zones(&["nordic"]))],
            &regions,
        );
        assert_eq!(names(&regions, ask(&regions, &Residency::Any, &rules, "DE")), ["eu-west", "eu-north"]);
        assert_eq!(names(&regions, ask(&regions, &Residency::Any, &rules, "SE")), ["eu-north"]);
        assert_eq!(names(&regions, ask(&regions, &Residency::Any, &rules, "US")).len(), 4);
        // Unknown: it may be a client of any ruled country, so every rule holds.
        assert_eq!(names(&regions, ask(&regions, &Residency::Any, &rules, "")), ["eu-north"]);
        // A rule never widens what the tenant's wall left.
        let us_only = Residency::Require(zones(&["us"]));
        assert_eq!(ask(&regions, &us_only, &rules, "DE"), Err(Refused::Residency));
    }

    #[test]
    fn a_gateway_outside_the_wall_refuses_before_anything_else() {
        let regions = world();
        let rule = TenantRule::compile(&Residency::Require(zones(&["eu"])), &regions, &zones(&["us"]));
        let asked = permit(RegionSet::EMPTY, None, &rule, &CountryRules::default(), &Location::UNKNOWN);
        assert_eq!(asked, Err(Refused::GatewayOutside));
        // A preference is no wall.
        assert!(TenantRule::compile(&Residency::Prefer(zones(&["eu"])), &regions, &zones(&["us"])).allows_gateway());
    }

    #[test]
    fn a_model_that_no_region_declares_is_unknown_rather_than_forbidden() {
        let regions = world();
        let rule = TenantRule::compile(&Residency::Any, &regions, &[]);
        let all = RegionSet::of(&regions, |_| true);
        let asked = permit(all, Some(RegionSet::EMPTY), &rule, &CountryRules::default(), &Location::UNKNOWN);
        assert_eq!(asked, Err(Refused::UnknownModel));
    }

    #[test]
    fn narrowing_never_adds() {
        let regions = world();
        let permitted =
            ask(&regions, &Residency::Require(zones(&["eu"])), &CountryRules::default(), "DE").expect("permitted");
        assert_eq!(permitted.narrowed(|_| true), permitted);
        let narrowed = permitted.narrowed(|at| at.get() == 2);
        assert_eq!(names(&regions, Ok(narrowed)), ["eu-north"]);
    }
}
