//! Load for Isochrone, and what its end-to-end tests share with that.

#![forbid(unsafe_code)]

pub mod arrival;

pub mod client;

pub mod clients;

pub mod report;

pub mod run;
