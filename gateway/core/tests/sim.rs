//! A seeded world: random regions, rules, faults, reloads and load, decided by the shipped code and judged by its own.
//!
//! Nothing here waits: time is a number. `ISOCHRONE_SIM_WORLDS` sets how many worlds are run, `ISOCHRONE_SIM_SEED` the one
//! that is replayed; a failure prints that seed. What is permitted is worked out here a second time, from the rules as
//! written, so that a mistake in the code under test is not its own judge.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test that cannot go on fails, and one that is asked tells"
)]

mod world;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use isochrone_core::Time;
use isochrone_core::course::{Attempt, Body, Course, Next, NotBegun, Why, kept_budget};
use isochrone_core::fleet::Fleet;
use isochrone_core::geo::{Country, Location, Point};
use isochrone_core::invariant;
use isochrone_core::live::{Availability, Live, Probe, Report};
use isochrone_core::pick::{Nobody, Query};
use isochrone_core::region::{Region, RegionIndex, RegionSet};
use isochrone_core::residency::{CountryRules, Permitted, Residency, TenantRule, permit};
use isochrone_core::retry::Outcome;
use isochrone_core::stall::{Due, Hedge, Watch};
use isochrone_core::steer::{Client, Policy, Steering};
use world::{Random, at_ms, attempts, country, geometry, rules, stall_rules, unprobed};

const COUNTRIES: [&str; 5] = ["DE", "US", "JP", "BR", "ZA"];
const ZONES: [&str; 5] = ["eu", "us", "jp", "br", "za"];
const LENGTH_MS: u64 = 20_000;
const TENANTS: usize = 4;
const HEDGE: Hedge = Hedge { floor: ms(20), ceiling: ms(400), share: 0.05 };

const fn ms(n: u64) -> std::time::Duration {
    std::time::Duration::from_millis(n)
}

/// What is wrong with a server.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    /// Nobody listens; what was pending broke.
    Crashed,
    /// It takes requests and answers nothing, questions neither.
    Hung,
    /// Packets vanish.
    Blackhole,
    /// Ten times as slow.
    Brownout,
    /// A third of the answers is 502.
    Partial,
    /// It says that it is overloaded, always.
    Overloaded,
    /// Somebody else is at the address.
    Stranger,
}

const FAULTS: [Fault; 7] = [
    Fault::Crashed,
    Fault::Hung,
    Fault::Blackhole,
    Fault::Brownout,
    Fault::Partial,
    Fault::Overloaded,
    Fault::Stranger,
];

/// A region's rules as written, and its endpoints.
#[derive(Clone)]
struct RegionPlan {
    region: Region,
    servers: Vec<usize>,
    declares: bool,
}

/// One configuration: as written, and as compiled.
struct Config {
    plan: Vec<RegionPlan>,
    residency: Vec<Residency>,
    ruled: Vec<(Vec<Country>, Vec<Box<str>>)>,
    fleet: Fleet,
    tenants: Vec<TenantRule>,
    countries: CountryRules,
    declaring: RegionSet,
    steering: Steering,
}

impl Config {
    fn compile(
        plan: Vec<RegionPlan>,
        residency: Vec<Residency>,
        ruled: Vec<(Vec<Country>, Vec<Box<str>>)>,
        policy: Policy,
        servers: &[Server],
        before: Option<&Config>,
    ) -> Config {
        let lives = |plan: &RegionPlan| plan.servers.iter().map(|at| Arc::clone(&servers[*at].live)).collect();
        let regions: Vec<Region> = plan.iter().map(|plan| plan.region.clone()).collect();
        let mut declaring = RegionSet::EMPTY;
        for (at, _) in plan.iter().enumerate().filter(|(_, plan)| plan.declares) {
            declaring.insert(RegionIndex::new(at).expect("few"));
        }
        let parts = plan.iter().map(|plan| (plan.region.clone(), lives(plan))).collect();
        Config {
            fleet: Fleet::new(parts, [(Arc::from("m"), declaring)], geometry(), rules(), before.map(|b| &b.fleet)),
            tenants: residency.iter().map(|rule| TenantRule::compile(rule, &regions, &[])).collect(),
            countries: CountryRules::compile(&ruled, &regions),
            declaring,
            steering: Steering::by(policy),
            plan,
            residency,
            ruled,
        }
    }

    /// The rules once more, without the code under test: by name, straight from what is written.
    fn may_see(&self, name: &str, tenant: usize, country: Option<Country>) -> bool {
        let Some(plan) = self.plan.iter().find(|plan| &*plan.region.name == name) else { return false };
        let shares = |zones: &[Box<str>]| zones.iter().any(|zone| plan.region.zones.contains(zone));
        let tenant = match &self.residency[tenant] {
            Residency::Any | Residency::Prefer(_) => true,
            Residency::Require(zones) => shares(zones),
        };
        let ruled = |(countries, _): &&(Vec<Country>, Vec<Box<str>>)| country.is_none_or(|c| countries.contains(&c));
        tenant && plan.declares && self.ruled.iter().filter(ruled).all(|(_, zones)| shares(zones))
    }

    fn permit(&self, tenant: usize, location: &Location) -> Option<Permitted> {
        let all = RegionSet::of(self.plan.iter().map(|plan| &plan.region), |_| true);
        permit(all, Some(self.declaring), &self.tenants[tenant], &self.countries, location).ok()
    }
}

struct Server {
    live: Arc<Live>,
    fault: Fault,
    base_ms: u64,
    round_trip_ms: f32,
    /// Requests that it serves at once without getting slower.
    width: usize,
    /// (request, attempt) sent and not answered.
    pending: HashSet<(usize, usize)>,
    /// Answers that came due while it hung.
    stuck: Vec<(usize, usize)>,
    /// Load reports are sent.
    reports: bool,
}

struct Running {
    id: usize,
    attempt: Attempt,
    watch: Watch,
    server: usize,
}

struct Ongoing {
    config: Arc<Config>,
    tenant: usize,
    location: Location,
    hash: u64,
    permitted: Permitted,
    course: Course,
    running: Vec<Running>,
    deadline: Time,
    body: Body,
    hedged: bool,
    done: Option<bool>,
    attempts: usize,
    refused: Option<NotBegun>,
    /// A permitted server that had no fault all the while could have answered.
    answerable: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Refresh,
    Probe(usize),
    Fault,
    Heal(usize, bool),
    Reload,
    Arrive,
    Ended { request: usize, id: usize, status: u16 },
    Gone { request: usize, id: usize },
    Watch { request: usize, id: usize },
    Asked { request: usize, id: usize, alive: bool },
    Deadline(usize),
    Leaves(usize),
    BodyEnds(usize),
}

struct World {
    seed: u64,
    random: Random,
    now: Time,
    events: BinaryHeap<Reverse<(Time, u64, Event)>>,
    sequence: u64,
    servers: Vec<Server>,
    config: Arc<Config>,
    all_plans: Vec<RegionPlan>,
    requests: Vec<Ongoing>,
    bodies: HashMap<usize, isochrone_core::live::InFlight>,
    /// One fault at a time, and nothing else that could cost an answer.
    gentle: bool,
    rate_per_s: u64,
    next_id: usize,
    totals: Totals,
}

#[derive(Clone, Copy, Debug, Default)]
struct Totals {
    requests: u64,
    answered: u64,
    failed: u64,
    attempts: u64,
    reloads: u64,
    faults: u64,
    panics: u64,
    extras_slow: u64,
    extras_hedge: u64,
    poisonous: u64,
    full: u64,
}

impl World {
    fn new(seed: u64) -> World {
        let mut random = Random(seed);
        let gentle = random.chance(0.4);
        let count = if gentle { 2 + random.below(9) } else { 1 + random.below(40) } as usize;
        let mut servers: Vec<Server> = Vec::new();
        let mut plan = Vec::new();
        for at in 0..count {
            let place = random.below(COUNTRIES.len() as u64) as usize;
            let point = Point::new(random.unit() as f32 * 120.0 - 60.0, random.unit() as f32 * 360.0 - 180.0);
            let mut region = Region::new(&format!("r{at}"), country(COUNTRIES[place]), point.expect("valid"));
            // Now and then a region says nothing of its zones: no wall lets it in.
            region.zones = if random.chance(0.1) { vec![] } else { vec![ZONES[place].into()] };
            if random.chance(0.1) {
                region.zones.push(ZONES[random.below(5) as usize].into());
            }
            if !gentle && random.chance(0.3) {
                region.soft_limit = 2 + random.below(30) as u32;
                region.hard_limit = region.soft_limit + random.below(30) as u32;
            }
            region.weight = random.unit() as f32;
            region.cost = random.below(2) as f32;
            region.drain = !gentle && random.chance(0.05);
            let distance = geometry().round_trip_ms(geometry().gateway.expect("set"), region.point);
            let first = servers.len();
            for _ in 0..1 + random.below(4) {
                servers.push(Server {
                    live: unprobed(&format!("s{}", servers.len())),
                    fault: Fault::None,
                    base_ms: 2 + random.below(40),
                    round_trip_ms: distance,
                    width: 4 + random.below(28) as usize,
                    pending: HashSet::new(),
                    stuck: Vec::new(),
                    reports: random.chance(0.5),
                });
            }
            plan.push(RegionPlan { region, servers: (first..servers.len()).collect(), declares: random.chance(0.9) });
        }
        let residency = (0..TENANTS).map(|_| rule(&mut random)).collect();
        let ruled = if !gentle && random.chance(0.4) { country_rules(&mut random) } else { vec![] };
        let policy = [Policy::Nearest, Policy::Nearest, Policy::Latency, Policy::Weighted][random.below(4) as usize];
        let config = Config::compile(plan.clone(), residency, ruled, policy, &servers, None);
        let rate_per_s = if gentle { 20 + random.below(60) } else { 5 + random.below(120) };
        let mut world = World {
            seed,
            random,
            now: at_ms(1_000),
            events: BinaryHeap::new(),
            sequence: 0,
            servers,
            config: Arc::new(config),
            all_plans: plan,
            requests: Vec::new(),
            bodies: HashMap::new(),
            gentle,
            rate_per_s,
            next_id: 0,
            totals: Totals::default(),
        };
        for server in 0..world.servers.len() {
            world.at(0, Event::Probe(server));
        }
        world.at(5, Event::Refresh);
        world.at(300, Event::Arrive);
        world.at(2_000, Event::Fault);
        world.at(3_000, Event::Reload);
        world
    }

    fn at(&mut self, delay_ms: u64, event: Event) {
        self.on(self.now + ms(delay_ms), event);
    }

    fn on(&mut self, time: Time, event: Event) {
        self.sequence += 1;
        self.events.push(Reverse((time.max(self.now), self.sequence, event)));
    }

    fn run(mut self) -> Totals {
        let end = self.now + ms(LENGTH_MS);
        while let Some(Reverse((time, _, event))) = self.events.pop() {
            self.now = time;
            let over = time > end;
            match event {
                Event::Refresh => {
                    self.config.fleet.refresh(self.now);
                    if !over {
                        self.at(200, Event::Refresh);
                    }
                }
                Event::Probe(server) => {
                    self.probe(server);
                    if !over {
                        let jitter = 800 + self.random.below(400);
                        self.at(jitter, Event::Probe(server));
                    }
                }
                Event::Fault if !over => self.fault(),
                Event::Reload if !over => self.reload(),
                Event::Arrive if !over => self.arrive(),
                Event::Fault | Event::Reload | Event::Arrive => {}
                Event::Heal(server, _) => self.heal(server),
                Event::Ended { request, id, status } => self.answered(request, id, status),
                Event::Gone { request, id } => self.ended(request, id, Outcome::ConnectFailed),
                Event::Watch { request, id } => self.watch(request, id),
                Event::Asked { request, id, alive } => self.asked(request, id, alive),
                Event::Deadline(request) => self.deadline(request),
                Event::Leaves(request) => self.leave(request),
                Event::BodyEnds(id) => drop(self.bodies.remove(&id)),
            }
            self.check_caps();
        }
        self.finish()
    }

    fn probe(&mut self, at: usize) {
        let server = &self.servers[at];
        let round_trip_ms = server.round_trip_ms + self.random.unit() as f32 * 2.0;
        let probe = match server.fault {
            Fault::Crashed | Fault::Blackhole => Probe::Gone,
            Fault::Hung => Probe::Silent,
            Fault::Stranger => {
                Probe::Answered { right_region: false, ready: true, round_trip_ms, network_ms: round_trip_ms }
            }
            _ => Probe::Answered { right_region: true, ready: true, round_trip_ms, network_ms: round_trip_ms },
        };
        server.live.probed(probe, self.now, &rules());
    }

    fn fault(&mut self) {
        let server = self.random.below(self.servers.len() as u64) as usize;
        let fault = FAULTS[self.random.below(FAULTS.len() as u64) as usize];
        let length = 200 + self.random.below(5_000);
        // A partition takes a whole region; a flapping server falls again soon.
        let partition = !self.gentle && self.random.chance(0.2);
        let plan = self.all_plans.iter().find(|plan| plan.servers.contains(&server)).expect("of a region");
        let struck = if partition { plan.servers.clone() } else { vec![server] };
        for server in struck {
            if self.servers[server].fault == Fault::None {
                self.strike(server, if partition { Fault::Blackhole } else { fault });
                let flaps = !self.gentle && self.random.chance(0.2);
                self.at(length, Event::Heal(server, flaps));
                self.totals.faults += 1;
            }
        }
        // In a gentle world the next comes when the last is long over.
        let next = if self.gentle { length + 4_000 } else { 100 + self.random.below(2_000) };
        self.at(next, Event::Fault);
    }

    fn strike(&mut self, server: usize, fault: Fault) {
        self.servers[server].fault = fault;
        self.unsettle();
        if matches!(fault, Fault::Crashed) {
            let mut pending: Vec<_> = self.servers[server].pending.iter().copied().collect();
            pending.sort_unstable();
            for (request, id) in pending {
                self.ended(request, id, Outcome::Reset);
            }
        }
    }

    /// Requests under way lose the ground that was sure.
    fn unsettle(&mut self) {
        let names: Vec<Box<str>> = self.unfaulted();
        for request in self.requests.iter_mut().filter(|request| request.done.is_none()) {
            request.answerable &=
                names.iter().any(|name| request.config.may_see(name, request.tenant, request.location.country));
        }
    }

    /// Regions, not drained, that have a server without fault.
    fn unfaulted(&self) -> Vec<Box<str>> {
        let well = |plan: &&RegionPlan| {
            !plan.region.drain
                && plan.servers.iter().any(|server| {
                    let server = &self.servers[*server];
                    let availability = {
                        let fleet = &self.config.fleet;
                        let at =
                            fleet.endpoints.iter().position(|live| Arc::ptr_eq(live, &server.live)).expect("known");
                        fleet.availability(at, false, Some(0), self.now)
                    };
                    server.fault == Fault::None && availability == Availability::Ready && !server.live.is_out()
                })
        };
        self.config.plan.iter().filter(well).map(|plan| plan.region.name.clone()).collect()
    }

    fn heal(&mut self, server: usize) {
        let was = std::mem::replace(&mut self.servers[server].fault, Fault::None);
        let mut stuck = std::mem::take(&mut self.servers[server].stuck);
        stuck.sort_unstable();
        for (request, id) in stuck {
            if was == Fault::Hung {
                self.at(1, Event::Ended { request, id, status: 200 });
            } else {
                self.ended(request, id, Outcome::Reset);
            }
        }
    }

    fn reload(&mut self) {
        let later = 500 + self.random.below(3_000);
        self.at(later, Event::Reload);
        if self.gentle {
            return;
        }
        self.totals.reloads += 1;
        let mut plan: Vec<RegionPlan> = Vec::new();
        for known in &self.all_plans {
            if self.random.chance(0.1) && self.all_plans.len() > 1 {
                // The region's file is gone for now.
                continue;
            }
            let mut next = known.clone();
            next.region.drain = self.random.chance(0.1);
            next.declares = self.random.chance(0.9);
            if self.random.chance(0.1) {
                next.region.zones = vec![ZONES[self.random.below(5) as usize].into()];
            }
            plan.push(next);
        }
        if plan.is_empty() {
            return;
        }
        let residency = (0..TENANTS).map(|_| rule(&mut self.random)).collect();
        let ruled = if self.random.chance(0.4) { country_rules(&mut self.random) } else { vec![] };
        let policy = self.config.steering.policy;
        let next = Config::compile(plan, residency, ruled, policy, &self.servers, Some(&self.config));
        self.config = Arc::new(next);
        for server in &self.servers {
            server.live.drain(self.random.chance(0.05), self.now);
        }
        self.unsettle();
    }

    fn arrive(&mut self) {
        let gap = 1 + self.random.below(2_000 / self.rate_per_s);
        self.at(gap, Event::Arrive);
        let place = self.random.below(6) as usize;
        let location = match COUNTRIES.get(place) {
            None => Location::UNKNOWN,
            Some(code) => Location::from_record(Country::parse(code), None),
        };
        let tenant = self.random.below(TENANTS as u64) as usize;
        let config = Arc::clone(&self.config);
        let Some(permitted) = config.permit(tenant, &location) else {
            let nobody = config.plan.iter().all(|plan| !config.may_see(&plan.region.name, tenant, location.country));
            assert!(nobody, "seed {}: refused, but a region may see it", self.seed);
            return;
        };
        let replayable = self.random.chance(0.9);
        let length = if self.random.chance(0.1) { 50 + self.random.below(500) } else { 10_000 };
        let answerable = self.unfaulted().iter().any(|name| config.may_see(name, tenant, location.country));
        let request = self.requests.len();
        self.requests.push(Ongoing {
            config,
            tenant,
            location,
            hash: self.random.next(),
            permitted,
            course: Course::default(),
            running: Vec::new(),
            deadline: self.now + ms(length),
            body: Body { replayable, at_hand: true },
            hedged: self.random.chance(0.3),
            done: None,
            attempts: 0,
            refused: None,
            answerable: answerable && replayable && length == 10_000,
        });
        self.totals.requests += 1;
        self.on(self.now + ms(length), Event::Deadline(request));
        if self.random.chance(0.02) {
            let after = self.random.below(100);
            self.at(after, Event::Leaves(request));
            self.requests[request].answerable = false;
        }
        self.begin(request, Why::Needed);
        self.settle(request);
    }

    /// Begins an attempt, and sees to it that it is one that may be.
    fn begin(&mut self, request: usize, why: Why<'_>) -> bool {
        let newest = Arc::clone(&self.config);
        let now = self.now;
        let World { requests, random, servers, seed, totals, .. } = self;
        let ongoing = &mut requests[request];
        let config = Arc::clone(&ongoing.config);
        let before = ongoing.permitted;
        if ongoing.attempts > 0 && !Arc::ptr_eq(&newest, &config) {
            let still = newest.permit(ongoing.tenant, &ongoing.location);
            let name = |at: RegionIndex, config: &Config| config.plan[at.get()].region.name.clone();
            ongoing.permitted = ongoing.permitted.narrowed(|at| {
                still.is_some_and(|still| still.regions().iter().any(|now| name(now, &newest) == name(at, &config)))
            });
        }
        assert!(invariant::only_shrinks(&before, &ongoing.permitted), "seed {seed}");
        let client = Client { location: &ongoing.location, hash: ongoing.hash };
        let query = Query { client, model: Some(0), grpc: false, steering: &config.steering, affinity: None };
        let course = &mut ongoing.course;
        let begun = course.begin(&config.fleet, &query, &ongoing.permitted, &attempts(), why, now, || random.next());
        let attempt = match begun {
            Ok(attempt) => attempt,
            Err(why) => {
                ongoing.refused = Some(why);
                if why == NotBegun::Nobody(Nobody::Full) {
                    // Where every region is at its limit the gateway lets a request wait, which is not simulated here. How
                    // often that is so is held to a bound in the end.
                    self.totals.full += 1;
                    self.requests[request].answerable = false;
                }
                return false;
            }
        };
        // What must never happen.
        let region = config.fleet.region(attempt.choice.region);
        let name = &region.region.name;
        assert!(config.may_see(name, ongoing.tenant, ongoing.location.country), "seed {seed}: {name} may not see it");
        assert!(
            ongoing.attempts == 0 || newest.may_see(name, ongoing.tenant, ongoing.location.country),
            "seed {seed}: {name} may not see it any more"
        );
        assert!(!region.region.drain, "seed {seed}: {name} is drained");
        assert!(ongoing.done.is_none() && now < ongoing.deadline, "seed {seed}: an attempt after the end");
        assert!(invariant::attempts_are_bounded(course.tried(), attempts().max), "seed {seed}: {:?}", course.tried());
        assert!(region.live.in_flight() <= region.region.hard_limit, "seed {seed}: {name} over its hard limit");
        let live = &config.fleet.endpoints[attempt.choice.endpoint];
        assert!(!live.is_drained(), "seed {seed}: a drained endpoint");
        assert!(live.is_asserted(), "seed {seed}: an endpoint that has not named its region");
        if ongoing.attempts > 0 {
            let left = usize::from(course.tried()[ongoing.attempts - 1]);
            let kept = kept_budget(&live.budget, &attempts(), now)
                || kept_budget(&config.fleet.endpoints[left].budget, &attempts(), now);
            assert!(kept, "seed {seed}: beyond the budget");
        }
        ongoing.attempts += 1;
        totals.attempts += 1;
        totals.panics += u64::from(attempt.choice.panic);
        match why {
            Why::Needed => {}
            Why::Slow => totals.extras_slow += 1,
            Why::Hedge(_) => totals.extras_hedge += 1,
        }
        let server = servers.iter().position(|server| Arc::ptr_eq(&server.live, live)).expect("known");
        self.send(request, attempt, server);
        true
    }

    fn send(&mut self, request: usize, attempt: Attempt, at: usize) {
        let id = self.next_id;
        self.next_id += 1;
        let ongoing = &mut self.requests[request];
        let model = ongoing.config.fleet.model_at(Some(0), attempt.choice.endpoint).map(|model| &**model);
        let hedge = (ongoing.hedged && ongoing.attempts == 1).then(|| HEDGE.delay(model));
        let server = &mut self.servers[at];
        let watch = Watch::new(self.now, &stall_rules(), server.live.network_ms(), model, hedge);
        let next = watch.next();
        ongoing.running.push(Running { id, attempt, watch, server: at });
        let queued = server.pending.len().div_ceil(server.width).max(1) as u64;
        let slow = if server.fault == Fault::Brownout { 10 } else { 1 };
        let spread = self.random.below(server.base_ms) + server.base_ms / 2;
        let took = server.round_trip_ms as u64 + spread * queued * slow;
        let status = match server.fault {
            Fault::Partial if self.random.chance(0.33) => 502,
            Fault::Overloaded => 503,
            _ => 200,
        };
        match server.fault {
            // A stranger is found out on the new connection, before anything is sent.
            Fault::Crashed | Fault::Stranger => return self.at(1, Event::Gone { request, id }),
            Fault::Blackhole => return self.at(1_000, Event::Gone { request, id }),
            _ => {}
        }
        server.pending.insert((request, id));
        if server.reports {
            let in_flight = server.pending.len() as u32;
            let queued = in_flight.saturating_sub(server.width as u32);
            server.live.reported(Report { in_flight, queued }, self.now);
        }
        self.at(took, Event::Ended { request, id, status });
        if self.requests[request].body.replayable {
            self.on(next, Event::Watch { request, id });
        }
    }

    fn answered(&mut self, request: usize, id: usize, status: u16) {
        let Some(running) = self.requests[request].running.iter().find(|running| running.id == id) else { return };
        let server = running.server;
        match self.servers[server].fault {
            Fault::Hung | Fault::Blackhole => self.servers[server].stuck.push((request, id)),
            _ => self.ended(request, id, Outcome::Status(status)),
        }
    }

    fn ended(&mut self, request: usize, id: usize, outcome: Outcome) {
        let ongoing = &mut self.requests[request];
        let Some(at) = ongoing.running.iter().position(|running| running.id == id) else { return };
        let mut running = ongoing.running.remove(at);
        self.servers[running.server].pending.remove(&(request, id));
        let (config, location) = (Arc::clone(&ongoing.config), ongoing.location);
        let client = Client { location: &location, hash: ongoing.hash };
        let query = Query { client, model: Some(0), grpc: false, steering: &config.steering, affinity: None };
        let (body, now) = (ongoing.body, self.now);
        let (next, _) =
            ongoing.course.ended(&config.fleet, &query, &attempts(), &mut running.attempt, (outcome, now), body);
        match next {
            Next::Answer => {
                let good = matches!(outcome, Outcome::Status(status) if status < 500);
                if good {
                    // The load falls with the end of the body.
                    let after = self.random.below(50);
                    if let Some(in_flight) = running.attempt.in_flight.take() {
                        self.bodies.insert(id, in_flight);
                        self.at(after, Event::BodyEnds(id));
                    }
                }
                self.close(request, good);
            }
            Next::Again => {
                drop(running);
                // The loop that this stands for looks at the deadline first, where both fall on one instant.
                let over = self.now >= self.requests[request].deadline;
                if over || !self.begin(request, Why::Needed) {
                    self.close(request, false);
                }
            }
            Next::Wait => {}
            Next::Stop => self.close(request, false),
            Next::Poisonous => {
                self.totals.poisonous += 1;
                self.close(request, false);
            }
        }
    }

    /// A request that could not even begin is refused.
    fn settle(&mut self, request: usize) {
        if self.requests[request].running.is_empty() && self.requests[request].attempts == 0 {
            self.close(request, false);
        }
    }

    fn watch(&mut self, request: usize, id: usize) {
        let (now, ongoing) = (self.now, &mut self.requests[request]);
        let Some(running) = ongoing.running.iter_mut().find(|running| running.id == id) else { return };
        let (due, answer) = (running.watch.due(now), running.watch.answer);
        let fault = self.servers[running.server].fault;
        match due {
            Some(Due::Ask) => {
                let alive = !matches!(fault, Fault::Hung | Fault::Crashed | Fault::Blackhole);
                let after = if alive { ms(1) } else { answer };
                return self.on(now + after, Event::Asked { request, id, alive });
            }
            Some(Due::Slow) => drop(self.begin(request, Why::Slow)),
            Some(Due::Hedge) => drop(self.begin(request, Why::Hedge(&HEDGE))),
            None => {}
        }
        let running = self.requests[request].running.iter().find(|running| running.id == id).expect("still there");
        let next = running.watch.next().max(now + ms(1));
        self.on(next, Event::Watch { request, id });
    }

    fn asked(&mut self, request: usize, id: usize, alive: bool) {
        let (now, ongoing) = (self.now, &mut self.requests[request]);
        let Some(running) = ongoing.running.iter_mut().find(|running| running.id == id) else { return };
        if !alive {
            let client = Client { location: &ongoing.location, hash: ongoing.hash };
            let config = &ongoing.config;
            let query = Query { client, model: Some(0), grpc: false, steering: &config.steering, affinity: None };
            let elsewhere = ongoing.course.has_elsewhere(&config.fleet, &query, &ongoing.permitted, &attempts(), now);
            if elsewhere {
                return self.ended(request, id, Outcome::Hung);
            }
        }
        running.watch.lives(now);
        let next = running.watch.next();
        self.on(next, Event::Watch { request, id });
    }

    fn deadline(&mut self, request: usize) {
        while let Some(id) = self.requests[request].running.first().map(|running| running.id) {
            self.ended(request, id, Outcome::TimedOut);
        }
        if self.requests[request].done.is_none() {
            self.close(request, false);
        }
    }

    fn leave(&mut self, request: usize) {
        if self.requests[request].done.is_none() {
            self.close(request, true);
        }
    }

    /// The request is over: what else runs is cancelled.
    fn close(&mut self, request: usize, good: bool) {
        let (now, ongoing) = (self.now, &mut self.requests[request]);
        if ongoing.done.is_some() {
            return;
        }
        ongoing.done = Some(good);
        let (config, location) = (Arc::clone(&ongoing.config), ongoing.location);
        let client = Client { location: &location, hash: ongoing.hash };
        let query = Query { client, model: Some(0), grpc: false, steering: &config.steering, affinity: None };
        for mut loser in std::mem::take(&mut ongoing.running) {
            self.servers[loser.server].pending.remove(&(request, loser.id));
            if good {
                ongoing.course.outrun(&config.fleet, &query, &mut loser.attempt, now);
            }
        }
        if good {
            self.totals.answered += 1;
        } else {
            self.totals.failed += 1;
            let ongoing = &self.requests[request];
            assert!(
                !(self.gentle && ongoing.answerable),
                "seed {}: request {request} failed at {:?} although a permitted region was well all the while: {:?} {:?}",
                self.seed,
                now,
                ongoing.course,
                ongoing.refused
            );
        }
    }

    fn check_caps(&self) {
        let fleet = &self.config.fleet;
        for region in &fleet.regions {
            let lives = &fleet.endpoints[region.endpoints.clone()];
            let out = lives.iter().filter(|live| live.is_out()).count();
            let cap = fleet.rules.ejected_share;
            assert!(invariant::is_within_cap(out, lives.len(), cap), "seed {}: {out} of {}", self.seed, lives.len());
        }
    }

    fn finish(self) -> Totals {
        for (at, request) in self.requests.iter().enumerate() {
            assert!(request.done.is_some(), "seed {}: request {at} never ended", self.seed);
        }
        assert!(self.bodies.is_empty(), "seed {}", self.seed);
        for server in &self.servers {
            assert_eq!(server.live.in_flight(), 0, "seed {}: load that never fell", self.seed);
        }
        for region in &self.config.fleet.regions {
            assert_eq!(region.live.in_flight(), 0, "seed {}: load that never fell", self.seed);
        }
        self.totals
    }
}

fn rule(random: &mut Random) -> Residency {
    let mut zones = || (0..1 + random.below(2)).map(|_| ZONES[random.below(5) as usize].into()).collect();
    let zones = zones();
    match random.below(3) {
        0 => Residency::Any,
        1 => Residency::Require(zones),
        _ => Residency::Prefer(zones),
    }
}

fn country_rules(random: &mut Random) -> Vec<(Vec<Country>, Vec<Box<str>>)> {
    let mut one = || {
        let countries = vec![country(COUNTRIES[random.below(5) as usize])];
        (countries, (0..2).map(|_| ZONES[random.below(5) as usize].into()).collect())
    };
    vec![one(), one()]
}

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

#[test]
fn nothing_that_must_never_happen_happens_in_any_world() {
    if let Some(seed) = setting("ISOCHRONE_SIM_SEED") {
        println!("{:?}", World::new(seed).run());
        return;
    }
    let worlds = setting("ISOCHRONE_SIM_WORLDS").unwrap_or(3_000);
    let next = AtomicU64::new(0);
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    let run = || {
        let mut sum = Totals::default();
        loop {
            let seed = next.fetch_add(1, Relaxed);
            if seed >= worlds {
                return sum;
            }
            let totals = std::panic::catch_unwind(|| World::new(seed).run()).unwrap_or_else(|_| {
                panic!("replay it: ISOCHRONE_SIM_SEED={seed} cargo test -p isochrone-core --test sim");
            });
            sum = sum.plus(totals);
        }
    };
    let sum = std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
        running.into_iter().fold(Totals::default(), |sum, thread| sum.plus(thread.join().expect("a world failed")))
    });
    println!("{worlds} worlds: {sum:?}");
    // A simulation in which nothing happens proves nothing.
    assert!(sum.requests > worlds * 100 && sum.answered > sum.requests / 2, "{sum:?}");
    let happened = [sum.reloads, sum.faults, sum.panics, sum.extras_slow, sum.extras_hedge, sum.poisonous];
    assert!(worlds < 1_000 || happened.iter().all(|count| *count > 0), "{sum:?}");
    let extras = sum.attempts as f64 / sum.requests as f64;
    assert!(extras <= 1.2, "{extras} attempts a request");
    assert!(sum.full * 100 <= sum.requests, "{sum:?}");
}

impl Totals {
    fn plus(self, other: Totals) -> Totals {
        Totals {
            requests: self.requests + other.requests,
            answered: self.answered + other.answered,
            failed: self.failed + other.failed,
            attempts: self.attempts + other.attempts,
            reloads: self.reloads + other.reloads,
            faults: self.faults + other.faults,
            panics: self.panics + other.panics,
            extras_slow: self.extras_slow + other.extras_slow,
            extras_hedge: self.extras_hedge + other.extras_hedge,
            poisonous: self.poisonous + other.poisonous,
            full: self.full + other.full,
        }
    }
}
