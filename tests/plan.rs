//! The attention plan, without a device: every row sees every token that it may see exactly once, every state is
//! written once and merged once, every new token is appended once.

use std::collections::BTreeMap;

use concertina::compression::hidden::HiddenCodec;
use concertina::geometry::{Bytes, HeadGeometry};
use concertina::kernels::attention::CacheShape;
use concertina::kernels::decode::DecodeSpec;
use concertina::kernels::plan::{AttentionPlan, Segment};
use concertina::kernels::prefill::PrefillSpec;
use concertina::pool::page_table::{PageTable, TableRanges, TableShape};
use concertina::pool::{PagePool, PoolLayout};
use proptest::prelude::*;

const PAGE: Bytes = Bytes(1 << 10);
const LAYERS: u32 = 3;

/// One sequence: tokens cached before, new rows, whether it decodes.
#[derive(Clone, Debug)]
struct Sequence {
    cached: u32,
    rows: u32,
    decode: bool,
}

fn sequences() -> impl Strategy<Value = Vec<Sequence>> {
    let one = (0_u32..1200, 1_u32..90, any::<bool>()).prop_map(|(cached, rows, decode)| {
        let rows = if decode { 1 } else { rows };
        Sequence { cached, rows, decode }
    });
    proptest::collection::vec(one, 1..5)
}

struct Setup {
    spec: PrefillSpec,
    tables: Vec<PageTable>,
}

/// Grows the sequences in turns, so that with small arenas their pages interleave.
fn setup(sequences: &[Sequence], group: u32, page_size: u32, arena_slabs: u64) -> Setup {
    let heads = HeadGeometry { num_qo_heads: 2 * group, num_kv_heads: 2, head_dim: 64 };
    let shape = CacheShape { heads, page_size, codec: HiddenCodec::F16 };
    let layout = PoolLayout {
        budget: Bytes::mib(16),
        staging: Bytes::ZERO,
        scratch: Bytes::ZERO,
        max_binding: Bytes(PAGE.0 * 16 * arena_slabs),
        slab: Bytes(PAGE.0 * 16),
        smallest_page: PAGE,
    };
    let mut pool = PagePool::new(&layout).expect("16 MiB hold slabs");
    let mut ranges = TableRanges::new(u32::try_from(pool.tables().0 / 4).expect("32 bits"));
    let table_shape = TableShape { num_layers: LAYERS, num_kv_heads: 2, page_size, page: PAGE };
    let mut tables: Vec<_> = sequences
        .iter()
        .map(|s| PageTable::admit(&mut pool, &mut ranges, table_shape, s.cached + s.rows).expect("all fit"))
        .collect();
    let mut left: Vec<u32> = sequences.iter().map(|s| s.cached + s.rows).collect();
    while left.iter().any(|n| *n > 0) {
        for (table, left) in tables.iter_mut().zip(&mut left) {
            let n = (*left).min(40);
            table.grow(&mut pool, n).expect("committed");
            *left -= n;
        }
    }
    Setup { spec: PrefillSpec { shape }, tables }
}

/// What the items of one layer say, token by token.
fn check(setup: &Setup, sequences: &[Sequence], plan: &AttentionPlan, layer: u32) {
    let group = setup.spec.shape.heads.group_size();
    let page_size = setup.spec.shape.page_size;
    let layer_plan = &plan.plans[plan.of_layer[layer as usize]];
    // Which page an entry of the table buffer holds in this layer.
    let mut entries = BTreeMap::new();
    for table in &setup.tables {
        for head in 0..2 {
            for (i, page) in (0..).zip(table.list(layer, head)) {
                entries.insert(table.list_entry(layer, head) + i, *page);
            }
        }
    }
    // For every state: its row and query head, and the tokens behind it, counted from its item's first page.
    let mut states: BTreeMap<u32, (u32, u32)> = BTreeMap::new();
    let mut write = |state: u32, row: u32, tokens: u32| {
        assert!(states.insert(state, (row, tokens)).is_none(), "state {state} is written twice");
    };
    let on_arena = |entry: u32, stride: u32, n_tokens: u32, arena: u16| {
        for page in 0..n_tokens.div_ceil(page_size) {
            let at = entry + layer * stride + page;
            assert_eq!(entries[&at].arena, arena, "every page of an item lies in its dispatch's arena");
        }
    };
    for (arena, range) in &layer_plan.decode {
        for item in &plan.decode[range.start as usize..range.end as usize] {
            on_arena(item.page_lo, item.layer_stride, item.n_tokens, *arena);
            assert!(item.n_tokens > 0 && item.n_tokens <= DecodeSpec::KV_CHUNK, "a run is not empty and not long");
            (0..group).for_each(|g| write(item.slot + g, item.q_row, item.n_tokens));
        }
    }
    for (arena, range) in &layer_plan.prefill {
        for item in &plan.prefill[range.start as usize..range.end as usize] {
            on_arena(item.page_lo, item.layer_stride, item.n_tokens, *arena);
            assert!(item.n_rows * group <= setup.spec.tile_rows(), "a tile holds its rows");
            for r in 0..item.n_rows {
                let last = item.first_index + r;
                let seen = (last + 1).saturating_sub(item.first_token).min(item.n_tokens);
                let row = (item.row_lo + r) * 2 + item.kv_head;
                (0..group).for_each(|g| write(item.slot + r * group + g, row, seen));
            }
        }
    }
    assert!(states.keys().all(|s| *s < plan.n_states), "states stay below their count");
    let mut row = 0;
    let mut merged = BTreeMap::new();
    for item in &plan.merge[layer_plan.merge.start as usize..layer_plan.merge.end as usize] {
        for g in 0..group {
            let mut tokens = 0;
            for i in 0..item.n_states {
                let (state_row, n) = states.remove(&(item.state_lo + g + i * item.stride)).expect("merged once");
                assert_eq!(state_row, item.q_row, "a state belongs to the row that it is merged into");
                tokens += n;
            }
            merged.insert((item.q_row, g), tokens);
        }
    }
    assert!(states.is_empty(), "every state is merged");
    for s in sequences {
        for r in 0..s.rows {
            for head in 0..2 {
                for g in 0..group {
                    let seen = merged.remove(&((row + r) * 2 + head, g));
                    assert_eq!(seen, Some(s.cached + r + 1), "a row sees all tokens up to its own, once");
                }
            }
        }
        row += s.rows;
    }
    assert!(merged.is_empty(), "no row is merged that was not asked for");
    check_append(setup, sequences, plan, layer, &entries);
}

fn check_append(
    setup: &Setup,
    sequences: &[Sequence],
    plan: &AttentionPlan,
    layer: u32,
    entries: &BTreeMap<u32, concertina::pool::PageId>,
) {
    let page_size = setup.spec.shape.page_size;
    let mut expected = BTreeMap::new();
    let mut row = 0;
    for (s, table) in sequences.iter().zip(&setup.tables) {
        for r in 0..s.rows {
            for head in 0..2 {
                let index = s.cached + r;
                let entry = table.list_entry(layer, head) + index / page_size;
                expected.insert((row + r, head), (entry, index % page_size));
            }
        }
        row += s.rows;
    }
    for (arena, range) in &plan.plans[plan.of_layer[layer as usize]].append {
        for item in &plan.append[range.start as usize..range.end as usize] {
            let entry = item.page_entry + layer * item.layer_stride;
            assert_eq!(entries[&entry].arena, *arena, "an append goes to its dispatch's arena");
            for r in 0..item.n_rows {
                let slot = expected.remove(&(item.row_lo + r, item.kv_head));
                assert_eq!(slot, Some((entry, item.slot_in_page + r)), "a row goes to its own slot, once");
            }
        }
    }
    assert!(expected.is_empty(), "every row is appended");
}

fn segments<'t>(sequences: &[Sequence], tables: &'t [PageTable]) -> Vec<Segment<'t>> {
    let mut row_lo = 0;
    let segment = |(s, table): (&Sequence, &'t PageTable)| {
        let n_rows = s.rows;
        let segment = Segment { table, row_lo, n_rows, first_index: s.cached, decode: s.decode, attend: true };
        row_lo += n_rows;
        segment
    };
    sequences.iter().zip(tables).map(segment).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_row_sees_every_token_once(
        sequences in sequences(),
        group in prop::sample::select(vec![1_u32, 3, 7, 8, 20]),
        page_size in prop::sample::select(vec![16_u32, 64]),
        arena_slabs in prop::sample::select(vec![1_u64, 4, 4096]),
    ) {
        let setup = setup(&sequences, group, page_size, arena_slabs);
        let segments = segments(&sequences, &setup.tables);
        let plan = AttentionPlan::new(&setup.spec, LAYERS, &segments);
        prop_assert_eq!(plan.of_layer.len(), LAYERS as usize);
        if arena_slabs == 4096 {
            prop_assert_eq!(plan.plans.len(), 1, "with one arena all layers share their lists");
        }
        for layer in 0..LAYERS {
            check(&setup, &sequences, &plan, layer);
        }
        let again = AttentionPlan::new(&setup.spec, LAYERS, &segments);
        prop_assert_eq!((again.decode, again.prefill, again.merge), (plan.decode, plan.prefill, plan.merge));
    }
}

#[test]
fn a_split_depends_on_the_sequence_alone() {
    let long = Sequence { cached: 1100, rows: 1, decode: true };
    let other = Sequence { cached: 37, rows: 1, decode: true };
    // The runs of the sequence at `place`.
    let lengths = |sequences: &[Sequence], place: u32| -> Vec<u32> {
        let setup = setup(sequences, 3, 64, 4096);
        let plan = AttentionPlan::new(&setup.spec, 1, &segments(sequences, &setup.tables));
        plan.decode.iter().filter(|i| i.q_row == place * 2).map(|i| i.n_tokens).collect()
    };
    assert_eq!(lengths(std::slice::from_ref(&long), 0), [512, 512, 77], "runs of at most a chunk");
    for place in 0..4 {
        let mut company = vec![other.clone(); 3];
        company.insert(place, long.clone());
        let place = u32::try_from(place).expect("small");
        assert_eq!(lengths(&company, place), [512, 512, 77], "in company, at place {place}");
    }
}
