//! Host cost of a step: page accounting, the attention plan, the schedule. No device.
//!
//! ```text
//! cargo bench --bench host
//! ```

use std::hint::black_box;

use concertina::compression::hidden::HiddenCodec;
use concertina::geometry::{Bytes, HeadGeometry};
use concertina::kernels::attention::CacheShape;
use concertina::kernels::plan::{AttentionPlan, Segment};
use concertina::kernels::prefill::PrefillSpec;
use concertina::kernels::sample::Sampling;
use concertina::pool::page_table::{PageTable, TableRanges, TableShape};
use concertina::pool::{PagePool, PoolLayout};
use concertina::schedule::simulation::Simulation;
use concertina::schedule::{Caches, Request, ScheduleConfig, Scheduler};
use criterion::{Criterion, criterion_group, criterion_main};

/// A model of 32 layers with 8 KV heads of 128 channels, pages of 64 tokens.
const SHAPE: TableShape = TableShape { num_layers: 32, num_kv_heads: 8, page_size: 64, page: Bytes(32 << 10) };

fn pool(gib: u64, arena: Bytes) -> PagePool {
    let layout = PoolLayout {
        budget: Bytes(gib << 30),
        staging: Bytes::ZERO,
        scratch: Bytes::ZERO,
        max_binding: arena,
        slab: Bytes(SHAPE.page.0 * 16),
        smallest_page: SHAPE.page,
    };
    PagePool::new(&layout).expect("a budget of gibibytes holds slabs")
}

fn take_and_release(c: &mut Criterion) {
    let mut pool = pool(8, Bytes(2 << 30));
    c.bench_function("pool: commit, take and release one page", |b| {
        b.iter(|| {
            pool.commit(SHAPE.page, 1).expect("free");
            let page = pool.take(SHAPE.page, 1).expect("committed");
            pool.release(black_box(page)).expect("in use");
        });
    });
}

fn plan(c: &mut Criterion) {
    let heads = HeadGeometry { num_qo_heads: 32, num_kv_heads: 8, head_dim: 128 };
    let shape = CacheShape { heads, page_size: 64, codec: HiddenCodec::F16 };
    for (name, gib, arena) in [("one arena", 64, Bytes(64 << 30)), ("2 GiB arenas", 64, Bytes(2 << 30))] {
        let mut pool = pool(gib, arena);
        let mut ranges = TableRanges::new(u32::try_from(pool.tables().0 / 4).expect("32 bits"));
        let mut tables = Vec::new();
        for _ in 0..16 {
            let mut table = PageTable::admit(&mut pool, &mut ranges, SHAPE, 16_384).expect("16 sessions of 2 GiB fit");
            table.grow(&mut pool, 16_000).expect("committed");
            tables.push(table);
        }
        let segments: Vec<_> = (0..)
            .zip(&tables)
            .map(|(row_lo, table)| Segment {
                table,
                row_lo,
                n_rows: 1,
                first_index: 15_999,
                decode: true,
                attend: true,
            })
            .collect();
        c.bench_function(&format!("plan: decode of 16 sessions x 16K tokens, 32 layers, {name}"), |b| {
            b.iter(|| AttentionPlan::new(&PrefillSpec { shape }, 32, black_box(&segments)));
        });
    }
}

fn schedule(c: &mut Criterion) {
    c.bench_function("schedule: 32 sessions to the end, simulated", |b| {
        b.iter(|| {
            let config = ScheduleConfig { max_rows: 256, max_sessions: 16, context_length: 8192 };
            let mut s = Scheduler::new(config, Caches::new(pool(8, Bytes(2 << 30)), SHAPE));
            for i in 0..32 {
                let prompt = vec![1; 500 + 40 * i];
                let request = Request { prompt, max_new: 64, sampling: Sampling::GREEDY, stop: Vec::new() };
                s.submit(request).expect("each fits alone");
            }
            let mut backend = Simulation::new(1, 1000);
            while !s.is_idle() {
                s.step(&mut backend).expect("a simulation does not fail");
            }
            backend.trace_hash()
        });
    });
}

criterion_group!(benches, take_and_release, plan, schedule);
criterion_main!(benches);
