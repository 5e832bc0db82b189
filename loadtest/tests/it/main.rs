//! End to end: the real gateway and real workers as processes on free ports, real models, real GeoIP data, real TLS.
//!
//! One binary, so that it is linked once. `./deploy/local/test` builds what it starts.

#![allow(unreachable_pub, reason = "one binary: nothing here is for others")]
#![allow(clippy::expect_used, clippy::panic, reason = "a test that cannot go on fails")]

mod cache;

mod capacity;

mod clients;

mod diff;

mod embeddings;

mod explain;

mod failover;

mod faults;

mod faulty;

mod forwarding;

mod load;

mod protocols;

mod reload;

mod repository;

mod startup;

mod storm;

mod steering;

mod stub;

mod traces;

mod upgrade;

mod worker;

mod world;
