//! So many decisions in a fleet of so many endpoints, for `instructions.sh` to count.

#![allow(missing_docs, clippy::expect_used, reason = "a benchmark has no users")]

#[path = "decide/bench.rs"]
mod bench;
#[path = "../tests/world/mod.rs"]
mod world;

fn main() {
    let numbers: Vec<usize> = std::env::args().filter_map(|argument| argument.parse().ok()).collect();
    // Under `cargo test` and `cargo bench` there are none.
    let [endpoints, regions, decisions] = numbers[..] else { return };
    let bench = bench::Bench::new(endpoints, regions);
    let picked: usize = (0..decisions).map(|at| bench.decide(at as u64).endpoint).sum();
    std::hint::black_box(picked);
}
