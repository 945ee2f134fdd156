//! Steps after each other: a planner that keeps its memory plans each like a new one.

use concertina::geometry::{Bytes, HeadGeometry};
use concertina::kernels::attention::CacheShape;
use concertina::kernels::plan::{AttentionPlan, Planner, Segment};
use concertina::pool::page_table::{Capacity, KeptTokens, Layers, PageTable, TableRanges, TableShape, Window};
use concertina::pool::{PagePool, PoolLayout};
use proptest::prelude::*;

use super::setup::{KV_HEADS, LAYERS, codecs};

const PAGE_SIZE: u32 = 32;
const TAIL: u32 = 400;
const ROWS: u32 = 128;
const SESSIONS: usize = 6;

/// What happens between two plans.
#[derive(Clone, Debug)]
enum Change {
    /// A session comes, in one of the codecs.
    Join(usize),
    /// One leaves.
    Leave(usize),
    /// Each list of one keeps its own number of tokens.
    Evict(usize, Vec<u32>),
    /// Those that the bits name get rows: one that decodes, or a chunk.
    Step(u32, u32),
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let lists = (LAYERS * KV_HEADS) as usize;
    let change = prop_oneof![
        2 => any::<usize>().prop_map(Change::Join),
        1 => any::<usize>().prop_map(Change::Leave),
        1 => (any::<usize>(), prop::collection::vec(0_u32..100, lists)).prop_map(|(at, kept)| Change::Evict(at, kept)),
        12 => (any::<u32>(), prop_oneof![3 => Just(1_u32), 1 => 2_u32..40]).prop_map(|(who, n)| Change::Step(who, n)),
    ];
    prop::collection::vec(change, 1..60)
}

struct Sessions {
    pool: PagePool,
    ranges: TableRanges,
    window: Window,
    tables: Vec<PageTable>,
    planner: Planner,
    /// Plans, and those of them whose layers share items under other arenas, or not at all.
    counted: [usize; 3],
}

impl Sessions {
    fn new(arena_slabs: u64) -> Self {
        let shape = Self::shape(0);
        let window = Window::new(shape.page, KV_HEADS, ROWS, true);
        let slab = Bytes(shape.open_page().0 * 4);
        let layout = PoolLayout {
            budget: Bytes::mib(48),
            staging: Bytes::ZERO,
            scratch: Bytes::ZERO,
            max_binding: Bytes(slab.0 * arena_slabs),
            slab,
            smallest_page: Bytes(1024),
            fixed_entries: window.entries(),
        };
        let pool = PagePool::new(&layout).expect("48 MiB hold slabs");
        let mut ranges = TableRanges::new(u32::try_from(pool.tables().0 / 4).expect("32 bits"));
        ranges.reserve(window.entries()).expect("the window's entries come first");
        Self { pool, ranges, window, tables: Vec::new(), planner: Planner::default(), counted: [0; 3] }
    }

    fn shape(codec: usize) -> TableShape {
        let heads = HeadGeometry { num_qo_heads: 3 * KV_HEADS, num_kv_heads: KV_HEADS, head_dim: 64 };
        let page = CacheShape { heads, page_size: PAGE_SIZE }.page();
        let codecs = codecs(PAGE_SIZE);
        TableShape {
            num_layers: LAYERS,
            num_kv_heads: KV_HEADS,
            page,
            codec: codecs[codec % codecs.len()],
            quest: None,
        }
    }

    fn admit(&mut self, shape: TableShape, capacity: Capacity) -> PageTable {
        PageTable::admit(&mut self.pool, &mut self.ranges, shape, &Layers::OWN, capacity).expect("six sessions fit")
    }

    fn apply(&mut self, change: &Change) {
        let n = self.tables.len();
        match change {
            Change::Join(codec) if n < SESSIONS => {
                let table = self.admit(Self::shape(*codec), Capacity::tokens(TAIL));
                self.tables.push(table);
            }
            Change::Leave(at) if n > 0 => {
                let table = self.tables.remove(at % n);
                table.release(&mut self.pool, &mut self.ranges).expect("the pool agrees");
            }
            Change::Evict(at, kept) if n > 0 => {
                let before = self.tables.remove(at % n);
                let (shape, seen) = (*before.shape(), before.n_tokens());
                before.release(&mut self.pool, &mut self.ranges).expect("the pool agrees");
                let kept: Vec<KeptTokens> = kept.iter().map(|n| Some((0..seen.min(*n)).collect()).into()).collect();
                let (lists, of_list) = (LAYERS * KV_HEADS, 100_u32.div_ceil(PAGE_SIZE));
                let (kept_pages, tail_tokens) = (lists * of_list, TAIL);
                let capacity = Capacity { tail_tokens, kept_pages, kept_pages_of_list: of_list, ..Capacity::default() };
                let mut table = self.admit(shape, capacity);
                table.keep(&mut self.pool, kept, &[], seen).expect("committed");
                self.tables.push(table);
            }
            Change::Step(who, rows) => self.step(*who, *rows),
            _ => {}
        }
    }

    /// Plans a step with the planner that has planned all others, and with a new one.
    fn step(&mut self, who: u32, rows: u32) {
        let Self { pool, window, tables, planner, counted, .. } = self;
        window.clear();
        let (mut row_lo, mut segments) = (0, Vec::new());
        for (at, table) in tables.iter_mut().enumerate().filter(|(at, _)| who >> at & 1 == 1) {
            // Every second one decodes, if they are asked for a chunk.
            let n = if at % 2 == 0 { 1 } else { table.cut(rows) };
            let (n_rows, first_index) = (n.min(TAIL - table.tail()).min(ROWS - row_lo), table.n_tokens());
            let n_rows = table.cut(n_rows);
            table.grow(pool, window, n_rows).expect("committed");
            let (decode, attend_below) = (n_rows == 1, if at == 3 && n_rows != 1 { 2 } else { u32::MAX });
            segments.push(Segment { table, row_lo, n_rows, first_index, decode, attend_below, scores: Vec::new() });
            row_lo += n_rows;
        }
        let shape = CacheShape {
            heads: HeadGeometry { num_qo_heads: 3 * KV_HEADS, num_kv_heads: KV_HEADS, head_dim: 64 },
            page_size: PAGE_SIZE,
        };
        let plan = planner.plan(&shape, LAYERS, &segments);
        assert_eq!(*plan, AttentionPlan::new(&shape, LAYERS, &segments), "a planner that has planned before");
        let firsts = plan.plans.iter().map(|plan| plan.first_layer);
        counted[0] += 1;
        counted[1] += usize::from(firsts.clone().zip(firsts.clone().skip(1)).any(|(a, b)| a == b));
        counted[2] += usize::from(firsts.clone().any(|layer| layer > 0));
        tables.iter_mut().for_each(PageTable::retire);
    }
}

fn run(changes: &[Change], arena_slabs: u64) -> [usize; 3] {
    let mut sessions = Sessions::new(arena_slabs);
    changes.iter().for_each(|change| sessions.apply(change));
    sessions.counted
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_planner_that_has_planned_before_plans_like_a_new_one(
        changes in changes(),
        arena_slabs in prop::sample::select(vec![2_u64, 300, 4096]),
    ) {
        run(&changes, arena_slabs);
    }
}

/// What the property is about does happen: steps whose layers share items under other arenas, and steps whose layers do not.
#[test]
fn steps_share_items_until_lists_differ() {
    let steps = |n: usize| vec![Change::Step(u32::MAX, 1); n];
    let join = [Change::Join(0), Change::Join(2)];
    let plain = [&join[..], &steps(70)].concat();
    assert_eq!(run(&plain, 4096), [70, 0, 0], "one arena: one plan for all layers");
    assert_eq!(run(&plain, 300), [70, 70, 0], "an arena for each layer: the same items, other arenas");
    let kept = (0..LAYERS * KV_HEADS).map(|list| 10 * list).collect();
    let ragged = [&plain[..], &[Change::Evict(0, kept)], &steps(10)].concat();
    assert_eq!(run(&ragged, 4096), [80, 0, 10], "lists that differ have items of their own");
}
