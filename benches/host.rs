//! Host cost of a step: page accounting, the attention plan, the schedule; and of codecs, page by page. No device.
//!
//! ```text
//! cargo bench --bench host
//! ```

use std::hint::black_box;

use concertina::compression::Compression;
use concertina::compression::hidden::{HeadParameters, HiddenCodec, PageContext};
use concertina::geometry::{Bytes, HeadGeometry, PageGeometry};
use concertina::kernels::attention::CacheShape;
use concertina::kernels::plan::{Planner, Segment};
use concertina::pool::page_table::{Capacity, Layers, PageTable, TableRanges, TableShape, Window};
use concertina::pool::{PagePool, PoolLayout};
use concertina::schedule::simulation::Simulation;
use concertina::schedule::{Abilities, Caches, HostConfig, Request, ScheduleConfig, Scheduler};
use criterion::{Criterion, criterion_group, criterion_main};

/// A model of 32 layers with 8 KV heads of 128 channels, pages of 64 tokens.
const SHAPE: TableShape = TableShape {
    num_layers: 32,
    num_kv_heads: 8,
    page: PageGeometry { page_size: 64, head_dim: 128 },
    codec: HiddenCodec::F16,
    quest: None,
};

fn kivi4() -> Compression {
    "kivi4".parse().expect("a codec")
}

fn window(max_rows: u32) -> Window {
    Window::new(SHAPE.page, SHAPE.num_kv_heads, max_rows, true)
}

fn pool(gib: u64, arena: Bytes, window: &Window) -> PagePool {
    let layout = PoolLayout {
        budget: Bytes(gib << 30),
        staging: Bytes::ZERO,
        scratch: Bytes::ZERO,
        max_binding: arena,
        slab: Bytes(SHAPE.open_page().0 * 16),
        smallest_page: kivi4().hidden.page_bytes(SHAPE.page),
        fixed_entries: window.entries(),
    };
    PagePool::new(&layout).expect("a budget of gibibytes holds slabs")
}

fn take_and_release(c: &mut Criterion) {
    let mut pool = pool(8, Bytes(2 << 30), &window(0));
    let page = SHAPE.open_page();
    c.bench_function("pool: commit, take and release one page", |b| {
        b.iter(|| {
            pool.commit(page, 1).expect("free");
            let page = pool.take(page, 1).expect("committed");
            pool.release(black_box(page)).expect("in use");
        });
    });
}

fn plan(c: &mut Criterion) {
    let heads = HeadGeometry { num_qo_heads: 32, num_kv_heads: 8, head_dim: 128 };
    let shape = CacheShape { heads, page_size: 64 };
    let arenas = [("one arena", Bytes(64 << 30)), ("2 GiB arenas", Bytes(2 << 30))];
    let codecs = [("f16", HiddenCodec::F16), ("kivi4", kivi4().hidden)];
    for ((place, arena), (name, codec)) in arenas.into_iter().flat_map(|a| codecs.map(|codec| (a, codec))) {
        let mut window = window(256);
        let mut pool = pool(64, arena, &window);
        let mut ranges = TableRanges::new(u32::try_from(pool.tables().0 / 4).expect("32 bits"));
        ranges.reserve(window.entries()).expect("the window's entries come first");
        let table_shape = TableShape { codec, ..SHAPE };
        let mut tables = Vec::new();
        for _ in 0..16 {
            let capacity = Capacity::tokens(16_384);
            let table = PageTable::admit(&mut pool, &mut ranges, table_shape, &Layers::OWN, capacity);
            let mut table = table.expect("16 sessions of at most 2 GiB fit");
            while table.n_tokens() < 16_000 {
                window.clear();
                table.grow(&mut pool, &mut window, 64).expect("committed");
                table.retire();
            }
            tables.push(table);
        }
        // The first row of a page: what is before it is sealed, and the step seals nothing.
        window.clear();
        for table in &mut tables {
            table.grow(&mut pool, &mut window, 1).expect("committed");
        }
        let segments: Vec<_> = (0..)
            .zip(&tables)
            .map(|(row_lo, table)| Segment {
                table,
                row_lo,
                n_rows: 1,
                first_index: 16_000,
                decode: true,
                attend_below: u32::MAX,
                scores: Vec::new(),
            })
            .collect();
        c.bench_function(&format!("plan: decode of 16 {name} sessions x 16K tokens, 32 layers, {place}"), |b| {
            let mut planner = Planner::default();
            b.iter(|| planner.plan(&shape, 32, black_box(&segments)).n_states);
        });
    }
}

/// Lists of different lengths: every layer has work lists of its own.
fn ragged_plan(c: &mut Criterion) {
    let heads = HeadGeometry { num_qo_heads: 32, num_kv_heads: 8, head_dim: 128 };
    let shape = CacheShape { heads, page_size: 64 };
    let mut pool = pool(64, Bytes(64 << 30), &window(0));
    let mut ranges = TableRanges::new(u32::try_from(pool.tables().0 / 4).expect("32 bits"));
    let lists = SHAPE.num_lists();
    let kept = |list: u32| Some((0..2_000 + 13 * list).collect());
    let capacity = Capacity { tail_tokens: 256, kept_pages: 90 * lists, kept_pages_of_list: 90, ..Capacity::default() };
    let mut tables = Vec::new();
    for _ in 0..16 {
        let table = PageTable::admit(&mut pool, &mut ranges, SHAPE, &Layers::OWN, capacity);
        let mut table = table.expect("16 sessions of a quarter of 16K tokens fit");
        table.keep(&mut pool, (0..lists).map(kept).map(Into::into).collect(), &[], 16_000).expect("committed");
        table.grow(&mut pool, &mut window(0), 1).expect("committed");
        tables.push(table);
    }
    let segment = |(row_lo, table)| {
        let (n_rows, first_index, decode, attend) = (1, 16_000, true, true);
        Segment {
            table,
            row_lo,
            n_rows,
            first_index,
            decode,
            attend_below: if attend { u32::MAX } else { 0 },
            scores: Vec::new(),
        }
    };
    let segments: Vec<_> = (0..).zip(&tables).map(segment).collect();
    c.bench_function("plan: decode of 16 ragged sessions x 2K to 5K of 16K tokens, 32 layers, one arena", |b| {
        let mut planner = Planner::default();
        b.iter(|| planner.plan(&shape, 32, black_box(&segments)).n_states);
    });
}

fn schedule(c: &mut Criterion) {
    let streaming = "streaming:256:every64".parse().expect("a policy");
    for (name, compression) in [("f16", Compression::default()), ("kivi4", kivi4()), ("streaming", streaming)] {
        c.bench_function(&format!("schedule: 32 {name} sessions to the end, simulated"), |b| {
            b.iter(|| {
                let config = ScheduleConfig {
                    max_rows: 256,
                    max_sessions: 16,
                    context_length: 8192,
                    host: HostConfig::default(),
                };
                let window = window(config.max_rows);
                let pool = pool(8, Bytes(2 << 30), &window);
                let abilities = Abilities { codecs: vec![kivi4().hidden], slots: Some(0), ..Abilities::default() };
                let mut s = Scheduler::new(config, Caches::new(pool, SHAPE, window, abilities));
                for (i, n) in (0..32).zip((500..).step_by(40)) {
                    // Nothing in common to share.
                    let prompt = vec![i; n];
                    let request = Request { compression: compression.clone(), ..Request::new(prompt, 64) };
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
}

/// The definitions that shaders follow: what `eval` and caches in files run on the host.
fn codecs(c: &mut Criterion) {
    let page = SHAPE.page;
    let n = u32::try_from(page.elements()).expect("a page is small");
    // Any numbers that differ will do.
    let side = |seed: u32| -> Vec<f32> {
        let word = |i: u32| (i.wrapping_mul(2_654_435_761) ^ seed) >> 21;
        (0..n).map(|i| half::f16::from_f32(word(i) as f32 / 512.0 - 2.0).to_f32()).collect()
    };
    let (k, v) = (side(0), side(0x5555_5555));
    let parameters = HeadParameters::default();
    let context = PageContext::at(&parameters, 64);
    for name in ["f16", "fp8", "int8", "kivi4", "kivi2", "rot4"] {
        let codec: HiddenCodec = name.parse().expect("a codec");
        let words = codec.encode(page, context, &k, &v);
        c.bench_function(&format!("codec: encode a page of 64 x 128, {name}"), |b| {
            b.iter(|| codec.encode(page, context, black_box(&k), black_box(&v)));
        });
        c.bench_function(&format!("codec: decode a page of 64 x 128, {name}"), |b| {
            b.iter(|| codec.decode(page, context, black_box(&words)));
        });
    }
}

criterion_group!(benches, take_and_release, plan, ragged_plan, schedule, codecs);
criterion_main!(benches);
