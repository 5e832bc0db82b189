//! Isochrone, the gateway: each request goes to the nearest healthy region that is allowed to serve it.
//!
//! `ARCHITECTURE.md` beside this crate is the map. [`request`] is the page to open first.

#![forbid(unsafe_code)]

pub mod config;

mod app;

mod reload;

mod kept;

mod snapshot;

mod listener;

mod tls;

mod request;

mod call;

mod body;

mod identity;

mod geo;

mod policy;

mod attempt;

mod load_report;

mod upstream;

mod endpoint;

mod respond;

mod error;

mod event;

mod text;

pub mod explain;

pub mod diff;

pub mod apply;

mod probe;

mod catalog;

mod cache;

mod handover;

mod admin;

mod metrics;

pub use app::{Serve, serve};

/// The product's own, so that what tests measure of memory is what it takes there.
#[cfg(test)]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;
