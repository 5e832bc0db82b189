//! Permission: the rules of the tenant, the country and the model turned into the set of regions that may see the request.

use isochrone_core::geo::Location;
use isochrone_core::region::{RegionIndex, RegionSet};
use isochrone_core::residency::{Permitted, permit as permit_regions};

use crate::body::Received;
use crate::call::{BodyMode, Call, ModelIn};
use crate::error::Error;
use crate::identity::Caller;
use crate::snapshot::{Model, Snapshot};

/// What is asked, as far as the rules care.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ask<'a> {
    pub(crate) tenant: usize,
    pub(crate) location: &'a Location,
    /// The model's name, and the version if the call names one.
    pub(crate) model: Option<(&'a str, Option<&'a str>)>,
}

/// Refuses, before any of the body is read, a tenant whose data may not be where this gateway stands.
///
/// # Errors
/// [`Error::GatewayOutside`].
pub(crate) fn admit(snapshot: &Snapshot, caller: &Caller) -> Result<(), Error> {
    if snapshot.tenants[caller.tenant].rule.allows_gateway() { Ok(()) } else { Err(Error::GatewayOutside) }
}

/// The model as the snapshot knows it.
///
/// # Errors
/// A model that no region declares, or that is not for this tenant.
pub(crate) fn model<'s>(snapshot: &'s Snapshot, caller: &Caller, name: &str) -> Result<&'s Model, Error> {
    let known = snapshot.models.get(name).ok_or(Error::UnknownModel)?;
    let tenant = &snapshot.config.tenants[caller.tenant];
    if tenant.models.is_empty() || tenant.models.contains(name) { Ok(known) } else { Err(Error::ModelForbidden) }
}

/// Refuses a call of which other models than the one that was read could be asked, to a tenant that may not use all:
/// a stream names one with each message, and a message that is not whole may name another at its end.
///
/// # Errors
/// [`Error::ModelForbidden`].
pub(crate) fn certain(snapshot: &Snapshot, caller: &Caller, call: &Call, body: &Received) -> Result<(), Error> {
    let limited = !snapshot.config.tenants[caller.tenant].models.is_empty();
    let others = call.body == BodyMode::Stream || !body.is_whole();
    if limited && call.model == ModelIn::FirstMessage && others { Err(Error::ModelForbidden) } else { Ok(()) }
}

/// Applies the rules.
///
/// # Errors
/// No region may see the request.
pub(crate) fn permit(snapshot: &Snapshot, ask: &Ask<'_>) -> Result<Permitted, Error> {
    let declaring = ask
        .model
        .map(|(name, version)| snapshot.models.get(name).map_or(RegionSet::EMPTY, |model| model.declaring(version)));
    let tenant = &snapshot.tenants[ask.tenant].rule;
    Ok(permit_regions(snapshot.all_regions, declaring, tenant, &snapshot.country_rules, ask.location)?)
}

/// Holds a later attempt to the newest rules as well: what they no longer permit is taken out, whatever the snapshot that
/// the request began with says. A tenant or a region that is gone is not permitted.
pub(crate) fn hold_to(newest: &Snapshot, begun: &Snapshot, permitted: Permitted, ask: &Ask<'_>) -> Permitted {
    let name = &begun.tenants[ask.tenant].name;
    let now = newest.tenants.iter().position(|tenant| tenant.name == *name).and_then(|tenant| {
        // Known by name to the newer snapshot, where the model may be declared by fewer regions.
        permit(newest, &Ask { tenant, ..*ask }).ok()
    });
    permitted.narrowed(|region| {
        let name = &begun.regions[region.get()].name;
        // One that has been drained meanwhile takes nothing new either.
        let still = |other: RegionIndex| newest.regions[other.get()].name == *name && !newest.fleet.is_drained(other);
        now.as_ref().is_some_and(|now| now.regions().iter().any(still))
    })
}
