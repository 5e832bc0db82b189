//! One decision: from a client's place to an endpoint. Run with `cargo bench -p isochrone-core`; `instructions.sh` beside this
//! file counts what no other process disturbs.

#![allow(missing_docs, clippy::expect_used, reason = "a benchmark has no users")]

#[path = "decide/bench.rs"]
mod bench;
#[path = "../tests/world/mod.rs"]
mod world;

use std::hint::black_box;

use bench::Bench;
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};

/// Endpoints, and the regions that they stand in.
const SIZES: [(usize, usize); 3] = [(3, 3), (30, 10), (300, 30)];

fn decide(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decide");
    for (endpoints, regions) in SIZES {
        let bench = Bench::new(endpoints, regions);
        let mut random = 0_u64;
        group.bench_function(BenchmarkId::from_parameter(endpoints), |bencher| {
            bencher.iter(|| {
                random = random.wrapping_add(0x9e37_79b9_7f4a_7c15);
                black_box(bench.decide(black_box(random)))
            });
        });
    }
    group.finish();
}

criterion_group!(benches, decide);
criterion_main!(benches);
