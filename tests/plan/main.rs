//! The attention plan, without a device: every row sees every token that it may see exactly once and in the form that
//! it should have, every state is written once and merged once, every new token is appended once, every page that is
//! sealed is sealed once, and every token that observed rows see is scored once. Lists are as evictions leave them:
//! unequally long, some closed, some read by several layers.

mod check;
mod setup;
mod steps;

use std::ops::Range;

use check::check;
use concertina::compression::hidden::HiddenCodec;
use concertina::geometry::PageGeometry;
use concertina::kernels::abi::ScoreItem;
use concertina::kernels::plan::{AttentionPlan, Dispatch, ObservedRows, ScoredRows, Segment};
use concertina::kernels::score;
use concertina::pool::PageId;
use concertina::pool::arena_map::ArenaMap;
use concertina::pool::page_table::TableShape;
use proptest::prelude::*;
use setup::{CAPACITY, Evicted, KV_HEADS, LAYERS, Sequence, Setup, codecs, segments, sequences, setup};

fn batches() -> impl Strategy<Value = (u32, Vec<Sequence>)> {
    prop::sample::select(vec![16_u32, 64])
        .prop_flat_map(|page_size| sequences(page_size).prop_map(move |sequences| (page_size, sequences)))
}

/// Whether dispatches share out all items of a list, which layers that are alike have in common.
fn shared_out<'d, P: 'd>(dispatches: impl Iterator<Item = &'d (P, Range<u32>)>, items: usize) -> bool {
    let mut ranges: Vec<_> = dispatches.map(|(_, range)| (range.start, range.end)).collect();
    ranges.sort_unstable();
    ranges.dedup();
    let joined = ranges.windows(2).all(|w| w[0].1 == w[1].0);
    joined && ranges.first().is_none_or(|r| r.0 == 0) && ranges.last().map_or(0, |r| r.1) as usize == items
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_row_sees_every_token_once_in_its_form(
        (page_size, sequences) in batches(),
        group in prop::sample::select(vec![1_u32, 3, 7, 8, 20]),
        arena_slabs in prop::sample::select(vec![1_u64, 4, 4096]),
    ) {
        let setup = setup(&sequences, group, page_size, arena_slabs);
        let segments = segments(&setup);
        let plan = AttentionPlan::new(&setup.shape, LAYERS, &segments);
        prop_assert_eq!(plan.of_layer.len(), LAYERS as usize);
        for layer in 0..LAYERS {
            check(&setup, &plan, layer).map_err(TestCaseError::fail)?;
        }
        for layer in 1..LAYERS {
            // Lists that are equally long, spread alike, and of layers that follow each other and share with none.
            let mut arenas = ArenaMap::default();
            let alike = setup.tables.iter().all(|table| table.alike(layer - 1, layer, &mut arenas));
            let [before, here] = [layer - 1, layer].map(|layer| plan.of_layer[layer as usize]);
            prop_assert_eq!(before == here, alike && arenas.is_identity(), "layers {} and {}", layer - 1, layer);
            let [before, here] = [before, here].map(|at| plan.plans[at].first_layer);
            prop_assert_eq!(before == here, alike, "items of layers {} and {}", layer - 1, layer);
        }
        let plain = |s: &Sequence| s.evicted.is_none() && (0..LAYERS).all(|layer| s.owns(layer));
        if arena_slabs == 4096 && sequences.iter().all(plain) {
            prop_assert_eq!(plan.plans.len(), 1, "with one arena all layers share their lists");
        }
        prop_assert!(shared_out(plan.plans.iter().flat_map(|p| &p.append), plan.append.len()));
        prop_assert!(shared_out(plan.plans.iter().flat_map(|p| &p.seal), plan.seal.len()));
        prop_assert!(shared_out(plan.plans.iter().flat_map(|p| &p.decode), plan.decode.len()));
        prop_assert!(shared_out(plan.plans.iter().flat_map(|p| &p.prefill), plan.prefill.len()));
        prop_assert!(shared_out(plan.plans.iter().flat_map(|p| &p.score), plan.score.len()));
        let again = AttentionPlan::new(&setup.shape, LAYERS, &segments);
        prop_assert_eq!(again, plan);
    }

    #[test]
    fn rows_that_leave_a_page_end_on_an_edge_and_as_late_as_possible(
        page_size in prop::sample::select(vec![16_u32, 64]),
        (first, n) in (0_u32..1000, 0_u32..300),
        codec in 0_usize..4,
    ) {
        let codec = codecs(page_size)[codec % codecs(page_size).len()];
        let page = PageGeometry { page_size, head_dim: 64 };
        let shape = TableShape { num_layers: 1, num_kv_heads: 1, page, codec, quest: None };
        let allowed = |rows: u32| {
            let end = first + rows;
            !codec.seals() || end.is_multiple_of(page_size) || end / page_size == first / page_size
        };
        let longest = (0..=n).rev().find(|rows| allowed(*rows));
        prop_assert_eq!(Some(shape.cut(first, n)), longest, "{}", codec);
        prop_assert_eq!(shape.cut(first, n) == 0, n == 0, "a step should always make progress");
    }
}

fn codec(text: &str) -> HiddenCodec {
    text.parse().expect("a codec")
}

/// Two sequences that pass pages through the window, one that decodes into a full page, and one without compression.
fn mixed() -> Vec<Sequence> {
    vec![
        Sequence { codec: codec("kivi4"), ..Sequence::full(700, 200, false) },
        Sequence { codec: codec("rot3"), ..Sequence::full(127, 1, true) },
        Sequence { codec: codec("lowrank:48"), ..Sequence::full(30, 162, false) },
        Sequence::full(600, 1, true),
    ]
}

/// Of 1000 tokens of a document, lists keep 100 to 800 of which none is where its index says; one list is closed.
fn ragged(layers: u32) -> Evicted {
    let of_list = |list: u32| (200 - 10 * list..1000 - 110 * list).collect();
    let kept = (0..layers * KV_HEADS).map(|list| (list != 3).then(|| of_list(list))).collect();
    Evicted { kept, n_tokens: 1000 }
}

/// Ragged lists that layers share, with rows that are scored: a question behind a document, and two decode rows.
fn evicted() -> Vec<Sequence> {
    let shared = |codec, rows, decode| Sequence {
        codec,
        owners: vec![0, 0, 2, 2],
        evicted: Some(ragged(2)),
        scores: vec![(rows / 2, false), (0, true)],
        ..Sequence::full(70, rows, decode)
    };
    let own = Sequence { evicted: Some(ragged(LAYERS)), ..Sequence::full(90, 60, false) };
    vec![shared(codec("rot3"), 1, true), shared(HiddenCodec::F16, 40, false), shared(codec("kivi4"), 10, false), own]
}

#[test]
fn a_step_seals_through_the_window_and_plans_codecs_apart() {
    let setup = setup(&mixed(), 3, 64, 4096);
    let plan = AttentionPlan::new(&setup.shape, LAYERS, &segments(&setup));
    check(&setup, &plan, 0).unwrap_or_else(|e| panic!("{e}"));
    let count = |dispatches: &[Dispatch], arena: u16| -> u32 {
        dispatches.iter().filter(|(place, _)| place.arena == arena).map(|(_, range)| range.end - range.start).sum()
    };
    let layer = &plan.plans[0];
    // 700 to 896 leaves page 10 and fills 11 to 13; 127 fills page 1; 30 to 192 fills pages 0 to 2.
    assert_eq!(setup.sequences[0].rows, 196, "the rows are cut where a page ends");
    assert_eq!(plan.seal.len(), 2 * (4 + 1 + 3), "full pages per KV head");
    assert_eq!(count(&layer.seal, PageId::WINDOW), 2 * (3 + 2), "all but the first were filled in the window");
    assert_eq!(plan.turned_pages, [0, 64, 128], "pages whose keys become latents");
    let codecs: Vec<_> = layer.decode.iter().map(|(place, _)| place.codec.to_string()).collect();
    assert_eq!(codecs, ["f16", "rot3"], "sealed and open pages in dispatches of their own");
}

#[test]
fn layers_whose_lists_differ_have_plans_of_their_own() {
    let setup_of = |sequences: &[Sequence]| setup(sequences, 3, 64, 4096);
    let of_layer = |sequences: &[Sequence]| {
        let setup = setup_of(sequences);
        let plan = AttentionPlan::new(&setup.shape, LAYERS, &segments(&setup));
        (0..LAYERS).for_each(|layer| check(&setup, &plan, layer).unwrap_or_else(|e| panic!("layer {layer}: {e}")));
        plan.of_layer
    };
    // Layers of 150 and 90 tokens a head, two of each.
    let pairs: Vec<_> = (0..LAYERS).flat_map(|layer| vec![Some((0..150 - layer / 2 * 60).collect()); 2]).collect();
    let pairs = Evicted { kept: pairs, n_tokens: 200 };
    let in_pairs = Sequence { evicted: Some(pairs.clone()), ..Sequence::full(70, 1, true) };
    assert_eq!(of_layer(&[in_pairs.clone(), Sequence::full(9, 1, true)]), [0, 0, 1, 1], "as long as their neighbour's");
    // Where a position differs, but not how many there are.
    let mut moved = pairs.clone();
    moved.kept[2] = Some((50..200).collect());
    assert_eq!(
        of_layer(&[Sequence { evicted: Some(moved), ..in_pairs.clone() }]),
        [0, 0, 1, 1],
        "positions are no matter"
    );
    // As long as the page: one list is closed, the other keeps nothing yet.
    let mut closed = pairs;
    (closed.kept[0], closed.kept[2]) = (None, Some(Vec::new()));
    assert_eq!(of_layer(&[Sequence { evicted: Some(closed), ..in_pairs.clone() }]), [0, 1, 2, 2], "one has a tail");
    let shared = Sequence { owners: vec![0, 0, 2, 3], ..Sequence::full(70, 1, true) };
    assert_eq!(of_layer(&[shared]), [0, 1, 2, 2], "who shares has a plan of its own: it appends nothing");
}

/// Every layer finds room in the arena that it prefers.
#[test]
fn layers_that_are_spread_alike_over_other_arenas_share_their_items() {
    let sequence = Sequence::full(12 * 64 - 1, 1, true);
    let setup_of = |slabs| setup(std::slice::from_ref(&sequence), 3, 64, slabs);
    let plan_of = |setup: &Setup| AttentionPlan::new(&setup.shape, LAYERS, &segments(setup));
    let whole = plan_of(&setup_of(4096));
    let setup = setup_of(40);
    let plan = plan_of(&setup);
    (0..LAYERS).for_each(|layer| check(&setup, &plan, layer).unwrap_or_else(|e| panic!("layer {layer}: {e}")));
    assert_eq!(plan.of_layer, [0, 1, 2, 3], "every layer reads an arena of its own");
    assert_eq!((plan.decode, plan.merge), (whole.decode, whole.merge), "and the items of the first");
    let mut wrong = plan_of(&setup);
    wrong.of_layer[2] = 1;
    assert!(check(&setup, &wrong, 2).is_err(), "a layer that reads the arenas of another is noticed");
}

#[test]
fn lists_without_tokens_give_rows_nothing_to_merge() {
    let kept = (0..LAYERS * KV_HEADS).map(|list| (list % 2 == 0).then(|| (0..40).collect())).collect();
    let evicted = Some(Evicted { kept, n_tokens: 100 });
    let one = |decode| Sequence { evicted: evicted.clone(), scores: vec![(0, false)], ..Sequence::full(5, 1, decode) };
    let setup = setup(&[one(true), one(false)], 3, 64, 4096);
    let plan = AttentionPlan::new(&setup.shape, LAYERS, &segments(&setup));
    (0..LAYERS).for_each(|layer| check(&setup, &plan, layer).unwrap_or_else(|e| panic!("{e}")));
    let states: Vec<_> = plan.merge.iter().map(|item| (item.q_row % KV_HEADS, item.n_states)).collect();
    assert_eq!(states, [(0, 2), (1, 0), (0, 2), (1, 0)], "the second head of every layer is closed");
    assert!(plan.append.iter().all(|item| item.kv_head == 0), "and takes no rows");
}

/// More rows than one lane may loop over are scored one piece after another.
#[test]
fn many_rows_of_wide_groups_are_scored_in_pieces() {
    let sequence = Sequence { scores: vec![(0, false), (16, true)], ..Sequence::full(295, 200, false) };
    let setup = setup(&[sequence], 20, 64, 4096);
    let rows_max = score::rows_max(&setup.shape);
    assert!((1..184).contains(&rows_max), "{rows_max} rows leave several pieces of each score");
    let plan = AttentionPlan::new(&setup.shape, LAYERS, &segments(&setup));
    (0..LAYERS).for_each(|layer| check(&setup, &plan, layer).unwrap_or_else(|e| panic!("{e}")));
    let mut wrong = plan.clone();
    wrong.plans[0].score.rotate_left(1);
    assert!(check(&setup, &wrong, 0).is_err(), "pieces in another order add in another order");
}

/// Segments of one session add to the same scores, which no two items of a dispatch may.
#[test]
fn rows_of_one_session_are_scored_in_dispatches_of_their_own() {
    let setup = setup(&[Sequence::full(100, 9, false), Sequence::full(50, 3, false)], 3, 64, 4096);
    let [table, other] = &setup.tables[..] else { panic!("two sequences") };
    let score = |first, largest| vec![ScoredRows { first, at: 0, capacity: CAPACITY, largest }];
    let segment = |table, row_lo, n_rows, first_index, scores| {
        let (decode, attend) = (false, true);
        Segment { table, row_lo, n_rows, first_index, decode, attend_below: if attend { u32::MAX } else { 0 }, scores }
    };
    let plan = AttentionPlan::new(
        &setup.shape,
        LAYERS,
        &[
            segment(table, 0, 4, 100, score(2, false)),
            segment(other, 4, 3, 50, score(0, true)),
            segment(table, 7, 5, 104, score(0, false)),
            // Beyond the rows that there are: nothing.
            segment(other, 12, 1, 50, score(1, true)),
        ],
    );
    let found: Vec<_> = (plan.plans[0].score.iter())
        .map(|(place, range)| {
            let items = &plan.score[range.start as usize..range.end as usize];
            let rows = |item: &ScoreItem| (item.row_lo, item.n_rows);
            (place.pass.0, place.largest, rows(&items[0]), items.iter().map(|item| item.n_tokens).sum::<u32>())
        })
        .collect();
    let expected = [(0, false, (2, 2), 2 * 104), (0, true, (4, 3), 2 * 53), (1, false, (7, 5), 2 * 109)];
    assert_eq!(found, expected, "pass, kind, rows and tokens of both heads");
}

#[test]
fn observed_queries_are_named_by_their_rows() {
    let mut plan = AttentionPlan::default();
    plan.observe(&[
        ObservedRows { row_lo: 3, n_rows: 5, moments: 70 },
        ObservedRows { row_lo: 9, n_rows: 1, moments: 0 },
    ]);
    let found: Vec<_> = plan.moments.iter().map(|item| (item.row_lo, item.n_rows, item.moments)).collect();
    assert_eq!(found, [(3, 5, 70), (9, 1, 0)], "rows, and where their moments are");
}

type Change<'c> = Box<dyn Fn(&mut AttentionPlan) + 'c>;

/// Checks that each change is noticed in a plan that is good.
fn noticed(sequences: &[Sequence], changes: impl Fn(&AttentionPlan) -> Vec<(&'static str, Change<'static>)>) {
    let setup = setup(sequences, 3, 64, 4096);
    let good = AttentionPlan::new(&setup.shape, LAYERS, &segments(&setup));
    let wrong = |plan: &AttentionPlan| (0..LAYERS).find_map(|layer| check(&setup, plan, layer).err());
    assert_eq!(wrong(&good), None, "without a change");
    for (what, change) in changes(&good) {
        let mut plan = good.clone();
        change(&mut plan);
        assert!(wrong(&plan).is_some(), "{what} should be noticed");
    }
}

/// The first item of a dispatch in some codec.
fn first_of(dispatches: &[Dispatch], codec: &str) -> (usize, usize) {
    let found = dispatches.iter().position(|(place, _)| place.codec.to_string() == codec);
    let at = found.unwrap_or_else(|| panic!("no dispatch of {codec}"));
    (at, dispatches[at].1.start as usize)
}

#[test]
fn a_wrong_plan_is_noticed() {
    noticed(&mixed(), |good| {
        let layer = &good.plans[0];
        let in_window =
            layer.append.iter().find(|(place, _)| place.arena == PageId::WINDOW).expect("rows pass through");
        let window = in_window.1.start as usize;
        let (sealed, first_sealed) = first_of(&layer.decode, "rot3");
        vec![
            ("a page that is not sealed", Box::new(|p| p.plans[0].seal[0].1.start += 1)),
            ("a page sealed twice", Box::new(|p| p.seal[1] = p.seal[0])),
            ("a page sealed as another", Box::new(|p| p.seal[0].sealed_entry += 1)),
            ("a page sealed for another layer", Box::new(|p| p.seal[0].sealed_stride += 1)),
            ("a page sealed by another head's bases", Box::new(|p| p.seal[0].list ^= 1)),
            ("a page sealed for another position", Box::new(|p| p.seal[0].first_position += 64)),
            ("sealing in another codec", Box::new(|p| p.plans[0].seal[0].0.codec = HiddenCodec::F16)),
            ("keys turned back by another page's positions", Box::new(|p| p.turned_pages.swap(0, 1))),
            (
                "a slot of the window used twice",
                Box::new(move |p| p.append[window + 1].page_entry = p.append[window].page_entry),
            ),
            ("rows in another slot", Box::new(|p| p.append[0].slot_in_page ^= 1)),
            ("codes read as f16", Box::new(move |p| p.plans[0].decode[sealed].0.codec = HiddenCodec::F16)),
            ("a page read twice", Box::new(move |p| p.decode[first_sealed].n_tokens += 64)),
            ("another sequence's page", Box::new(move |p| p.decode[first_sealed].page_lo += 1)),
            ("another head's bases", Box::new(move |p| p.decode[first_sealed].list ^= 1)),
            ("a token left out", Box::new(|p| p.prefill[0].n_tokens -= 1)),
            ("a mask that moved", Box::new(|p| p.prefill[0].first_token += 1)),
            ("a state written twice", Box::new(|p| p.prefill[1].slot = p.prefill[0].slot)),
            ("a row that is not merged", Box::new(|p| p.plans[0].merge.start += 1)),
        ]
    });
}

#[test]
fn a_wrong_plan_over_what_stayed_is_noticed() {
    noticed(&evicted(), |good| {
        let layer = &good.plans[0];
        let (_, kept) = first_of(&layer.decode, "rot3");
        let (_, of_question) = first_of(&layer.prefill, "kivi4");
        let score = layer.score[0].1.start as usize;
        vec![
            ("a kept token left out", Box::new(move |p| p.decode[kept].n_tokens -= 1)),
            ("a token behind those that were kept", Box::new(move |p| p.prefill[of_question].n_tokens += 1)),
            ("kept tokens behind the mask", Box::new(move |p| p.prefill[of_question].first_token += 1000)),
            ("another list's tokens", Box::new(move |p| p.decode[kept].page_lo += 30)),
            (
                "a layer that reads its own bases",
                Box::new(|p| {
                    let range = p.plans[1].decode[0].1.clone();
                    p.decode[range.start as usize].list += KV_HEADS;
                }),
            ),
            ("a layer that appends to another's cache", Box::new(|p| p.plans[1].append = p.plans[0].append.clone())),
            ("a closed list that takes rows", Box::new(|p| p.append[0].kv_head ^= 1)),
            ("a layer under another's plan", Box::new(|p| p.of_layer[3] = p.of_layer[0])),
            ("tokens scored twice", Box::new(move |p| p.score[score + 1] = p.score[score])),
            ("tokens not scored", Box::new(|p| p.plans[0].score[0].1.start += 1)),
            ("a row less that scores", Box::new(move |p| p.score[score].n_rows -= 1)),
            ("rows of another sequence", Box::new(move |p| p.score[score].row_lo += 1)),
            ("scores of another list", Box::new(move |p| p.score[score].out += CAPACITY)),
            ("scores of another token", Box::new(move |p| p.score[score].out += 1)),
            ("another page's scores", Box::new(move |p| p.score[score].page_lo += 1)),
            ("a row scored as another", Box::new(move |p| p.score[score].first_index += 1)),
            ("sums as the largest", Box::new(|p| p.plans[0].score[0].0.largest ^= true)),
            ("scores one after another", Box::new(|p| p.plans[0].score[0].0.pass.0 += 1)),
        ]
    });
}

#[test]
fn items_that_no_dispatch_has_are_noticed() {
    let of = |ranges: &[(u32, u32)], items| {
        let dispatches: Vec<_> = ranges.iter().map(|(start, end)| ((), *start..*end)).collect();
        shared_out(dispatches.iter(), items)
    };
    assert!(of(&[(3, 5), (0, 3)], 5) && of(&[], 0), "all of them");
    assert!(!of(&[(0, 3), (4, 5)], 5) && !of(&[(1, 5)], 5) && !of(&[(0, 4)], 5), "a gap");
    assert!(!of(&[(0, 4), (3, 5)], 5), "an overlap");
}

#[test]
fn a_split_depends_on_the_sequence_alone() {
    let kivi4 = codec("kivi4");
    let other = Sequence::full(37, 1, true);
    // The runs of the first head of the sequence at `place`, in the order of its tokens.
    let lengths = |sequences: &[Sequence], place: u32| -> Vec<u32> {
        let setup = setup(sequences, 3, 64, 4096);
        let plan = AttentionPlan::new(&setup.shape, 1, &segments(&setup));
        let mut items: Vec<_> = plan.decode.iter().filter(|i| i.q_row == place * KV_HEADS).collect();
        items.sort_by_key(|item| item.slot);
        items.into_iter().map(|item| item.n_tokens).collect()
    };
    // Page 17 begins at 1088; what is before it is sealed. What stayed is split from its own start.
    let kept = |n: u32| Some(Evicted { kept: vec![Some((0..n).collect()); 8], n_tokens: 2000 });
    for (codec, evicted, expected) in [
        (HiddenCodec::F16, None, vec![512, 512, 77]),
        (kivi4, None, vec![512, 512, 64, 13]),
        (HiddenCodec::F16, kept(700), vec![512, 188, 512, 512, 77]),
        (kivi4, kept(512), vec![512, 512, 512, 64, 13]),
    ] {
        let long = Sequence { codec, evicted, ..Sequence::full(1100, 1, true) };
        assert_eq!(lengths(std::slice::from_ref(&long), 0), expected, "{codec}: runs of at most a chunk");
        for place in 0..4 {
            let mut company = vec![other.clone(), Sequence { codec: kivi4, ..other.clone() }, other.clone()];
            company.insert(place, long.clone());
            let place = u32::try_from(place).expect("small");
            assert_eq!(lengths(&company, place), expected, "{codec} in company, at place {place}");
        }
    }
}
