//! The page: one request from its head to its answer.
//!
//! identify -> locate -> admit -> receive -> permit -> cache -> attempt -> respond. Every step either gives what the next one
//! demands or an error, which [`respond::refuse`] turns into an answer; there is no other way out.

mod strict;

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use futures_util::FutureExt;
use http::request::Parts;
use http::{Request, Response, Version};
use hyper::body::Incoming;
use isochrone_core::geo::Location;
use isochrone_core::residency::Permitted;
use serde_json::json;
use tokio::time::Instant;

use crate::app::Core;
use crate::attempt::{self, Answer, Attempted, Forwarded};
use crate::body::{self, ReceiveLimits, ResponseBody};
use crate::cache;
use crate::call::{self, Dialect, ModelIn};
use crate::error::Error;
use crate::event::Record;
use crate::identity::{self, Caller, Peer};
use crate::policy::{self, Ask};
use crate::snapshot::{Model, Snapshot};
use crate::{geo, respond, text};

/// What a request leads to.
#[expect(clippy::large_enum_variant, reason = "moved once or twice a request, which costs less than an allocation")]
enum Outcome {
    Forward(Answer),
    Own(serde_json::Value),
}

/// Serves one request.
pub(crate) async fn serve(core: Arc<Core>, peer: Arc<Peer>, request: Request<Incoming>) -> Response<ResponseBody> {
    let snapshot = core.shared.snapshot.load_full();
    let (head, body) = request.into_parts();
    let mut body = Some(body);
    let dialect = call::dialect(&head);
    let mut record = Record::begin(&core, &snapshot, &peer, &head);

    let outcome = match Core::admit(&core, &snapshot) {
        None => Err(Error::Overloaded),
        Some(permit) => {
            record.admitted(permit);
            let answering = answer(&core, &snapshot, &peer, &head, &mut body, dialect, &mut record);
            // A panic is a mistake of ours: it costs this request, not the others on the connection or the process.
            AssertUnwindSafe(answering).catch_unwind().await.unwrap_or_else(|_| {
                core.shared.counts.panics.fetch_add(1, Relaxed);
                Err(Error::Internal)
            })
        }
    };
    match outcome {
        Ok(Outcome::Forward(answer)) => respond::forward(&core, &snapshot, answer, dialect, record),
        Ok(Outcome::Own(document)) => respond::json(&core, &document, record),
        Err(error) => {
            // A payload that may not be here is not read, be it to throw it away.
            let discardable = head.version == Version::HTTP_2 && error != Error::GatewayOutside;
            if let Some(unread) = body.filter(|_| discardable) {
                body::discard(unread).await;
            }
            respond::refuse(&core, error, dialect, record)
        }
    }
}

async fn answer(
    core: &Core,
    snapshot: &Arc<Snapshot>,
    peer: &Peer,
    head: &Parts,
    body: &mut Option<Incoming>,
    dialect: Dialect,
    record: &mut Record,
) -> Result<Outcome, Error> {
    let config = &snapshot.config;
    let client_ip = identity::client_ip(peer, &head.headers);
    record.addressed(client_ip);
    strict::check(head, config.limits.header_bytes)?;
    let call = call::parse(head, dialect)?;
    let caller = identity::identify(snapshot, client_ip, &head.headers)?;
    record.identified(client_ip, &snapshot.tenants[caller.tenant].name);
    let location = geo::locate(config, client_ip);
    record.located(location);
    policy::admit(snapshot, &caller)?;
    if call.list_models {
        return Ok(Outcome::Own(models(snapshot, &caller, &location)));
    }

    let (begun, asked) = (Instant::now(), attempt::asked_deadline(&head.headers));
    let limits = ReceiveLimits {
        whole_bytes: config.limits.openai_bytes,
        keep_bytes: config.attempts.replay_bytes,
        timeout: config.limits.body_timeout,
    };
    // What the head alone decides is refused before the body is read.
    if let ModelIn::Path(name) = &call.model {
        permission(snapshot, &caller, &location, Some(name), call.version.as_deref())?;
    }
    let incoming = body.take().ok_or(Error::Internal)?;
    let (body, named) = body::receive(&head.headers, incoming, &call, limits).await?;
    let name = named.as_ref().map(|(name, _)| &**name);
    let version = named.as_ref().and_then(|(_, version)| version.as_deref());
    let (model, permitted) = permission(snapshot, &caller, &location, name, version)?;
    policy::certain(snapshot, &caller, &call, &body)?;
    record.permitted(model.map(|model| &model.name), permitted.regions().len());

    let route = snapshot.route(caller.tenant, model);
    let attempted = Attempted {
        snapshot,
        route,
        permitted,
        ask: Ask { tenant: caller.tenant, location: &location, model: model.map(|model| (&*model.name, version)) },
        // What other calls take says nothing of the model's speed, and they are not what its limits are for.
        model: model.filter(|_| call::is_inference(head)).map(|model| model.index),
        client: geo::client_hash(caller.client_ip),
        call: &call,
        head,
        deadline: begun + asked.map_or(route.timeout, |asked| asked.min(route.timeout)),
        own_deadline: asked.is_none_or(|asked| asked >= route.timeout),
        forwarded: forwarded(&caller, peer, record),
    };
    cache::through(core, &attempted, body, record).await.map(Outcome::Forward)
}

/// The model, and the regions that may see the request.
fn permission<'s>(
    snapshot: &'s Snapshot,
    caller: &Caller,
    location: &Location,
    name: Option<&str>,
    version: Option<&str>,
) -> Result<(Option<&'s Model>, Permitted), Error> {
    let model = name.map(|name| policy::model(snapshot, caller, name)).transpose()?;
    let named = model.map(|model| (&*model.name, version));
    let permitted = policy::permit(snapshot, &Ask { tenant: caller.tenant, location, model: named })?;
    Ok((model, permitted))
}

fn forwarded(caller: &Caller, peer: &Peer, record: &Record) -> Forwarded {
    Forwarded { client_ip: text::address(caller.client_ip), secure: peer.secure, request_id: record.request_id.clone() }
}

/// The models that this caller could be served, in OpenAI's form.
fn models(snapshot: &Snapshot, caller: &Caller, location: &Location) -> serde_json::Value {
    let served = |name: &&str| permission(snapshot, caller, location, Some(name), None).is_ok();
    let mut names: Vec<&str> = snapshot.models.keys().map(|name| &**name).filter(served).collect();
    names.sort_unstable();
    let one = |name: &&str| json!({ "id": name, "object": "model", "created": 0, "owned_by": "isochrone" });
    json!({ "object": "list", "data": names.iter().map(one).collect::<Vec<_>>() })
}
