//! The attention plan of one step: pure host code from page tables to work lists.
//!
//! Every query row belongs to a sequence whose tokens lie in pages: sealed ones in the sequence's codec, then open
//! ones in f16. Its list of pages falls into runs of one codec in one arena. The plan cuts the work so that an item reads
//! one run of one KV head, gives each item the attention states that it writes, and tells `merge_states` which states belong
//! together. Items are grouped by codec and arena, one dispatch each, so sequences with different codecs share a step.
//!
//! Layers that follow each other and whose lists are alike share one set of work lists: items name the page of the
//! first such layer and the distance between layers, and only dispatches name arenas. So it does not matter that each layer's
//! pages lie in an arena of their own, as long as they are spread alike. With nothing evicted that is mostly every layer.
//!
//! Decode splits what was kept, and the tail, at multiples of [`DecodeSpec::KV_CHUNK`](super::decode::DecodeSpec::KV_CHUNK) from their starts, whatever else is in
//! the batch. A tile of prompt rows of a sequence that is sealed stays within a page, because its rows read that page open.

use std::ops::Range;

use super::abi::{
    AppendItem, DecodeItem, MergeItem, MomentItem, PageBoundsItem, PrefillItem, QuestItem, ScoreItem, SealItem,
};
use super::attention::CacheShape;
pub(crate) use super::by_place::ByPlace;
use super::by_place::len_u32;
use super::plan_lists::{LayerParts, List};
use super::prefill::PrefillSpec;
use super::score;
use crate::compression::hidden::{HiddenCodec, Transform};
use crate::pool::arena_map::ArenaMap;
use crate::pool::page_table::PageTable;

/// Consecutive rows of one sequence.
#[derive(Clone, Debug)]
pub struct Segment<'t> {
    /// The sequence's pages; they already hold room for these rows.
    pub table: &'t PageTable,
    /// First row in the step.
    pub row_lo: u32,
    /// Rows; none where only pages are sealed.
    pub n_rows: u32,
    /// Position of the first row.
    pub first_index: u32,
    /// Whether the rows go through decode (one row) or prefill.
    pub decode: bool,
    /// The first layer in which the rows are only appended and do not attend.
    pub attend_below: u32,
    /// Which of the rows are scored.
    pub scores: Vec<ScoredRows>,
}

impl Segment<'_> {
    /// Whether the rows do in a layer what they did in the one before.
    fn may_share(&self, layer: u32) -> bool {
        let quest = self.table.shape().quest.is_some_and(|quest| quest.dense_layers == layer);
        self.attend_below != layer && !quest
    }
}

/// Rows whose attention is summed up per token, from one of a segment on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScoredRows {
    /// First of them in the segment.
    pub first: u32,
    /// First raw score of the session.
    pub at: u32,
    /// Scores of a list.
    pub capacity: u32,
    /// The largest probability instead of the sum.
    pub largest: bool,
}

/// Queries whose moments are summed up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ObservedRows {
    /// First row in the step.
    pub row_lo: u32,
    /// Rows.
    pub n_rows: u32,
    /// First number of the session's moments.
    pub moments: u32,
}

/// Where the pages of a dispatch's items lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// How they are encoded; for sealing, how they will be.
    pub codec: HiddenCodec,
    /// Arena that is read; for append and sealing, that of the open pages.
    pub arena: u16,
    /// For sealing, arena of the sealed pages.
    pub sealed_arena: u16,
}

/// Items of one place, as a range of the list that they lie in.
pub type Dispatch = (Place, Range<u32>);

/// What score items of one dispatch have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ScorePlace {
    /// Segments of one session, and pieces of a segment, add to the same scores, one after another.
    pub pass: (usize, u32),
    /// See [`ScoredRows`].
    pub largest: bool,
    /// Where the pages lie.
    pub place: Place,
}

/// The dispatches of one layer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LayerPlan {
    /// The layer whose pages its items name.
    pub first_layer: u32,
    /// Ranges of [`AttentionPlan::append`].
    pub append: Vec<Dispatch>,
    /// Ranges of [`AttentionPlan::seal`].
    pub seal: Vec<Dispatch>,
    /// Ranges of [`AttentionPlan::decode`].
    pub decode: Vec<Dispatch>,
    /// Ranges of [`AttentionPlan::prefill`].
    pub prefill: Vec<Dispatch>,
    /// Range of [`AttentionPlan::merge`].
    pub merge: Range<u32>,
    /// Ranges of [`AttentionPlan::bounds`].
    pub bounds: Vec<Dispatch>,
    /// Ranges of [`AttentionPlan::quest`], by the arena of the bounds.
    pub quest: Vec<(u16, Range<u32>)>,
    /// Ranges of [`AttentionPlan::score`].
    pub score: Vec<(ScorePlace, Range<u32>)>,
}

/// Work lists of a step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AttentionPlan {
    /// Distinct layer plans.
    pub plans: Vec<LayerPlan>,
    /// For each layer, its entry in `plans`.
    pub of_layer: Vec<usize>,
    /// Append items.
    pub append: Vec<AppendItem>,
    /// Seal items. Their `angles` count pages of [`Self::turned_pages`].
    pub seal: Vec<SealItem>,
    /// Decode items.
    pub decode: Vec<DecodeItem>,
    /// Prefill items.
    pub prefill: Vec<PrefillItem>,
    /// Merge items.
    pub merge: Vec<MergeItem>,
    /// Page bounds items.
    pub bounds: Vec<PageBoundsItem>,
    /// Quest items.
    pub quest: Vec<QuestItem>,
    /// Page scores that one layer writes.
    pub n_page_scores: u32,
    /// Score items.
    pub score: Vec<ScoreItem>,
    /// Moment items.
    pub moments: Vec<MomentItem>,
    /// First positions of pages whose keys are turned back while they are sealed.
    pub turned_pages: Vec<u32>,
    /// Attention states that one layer writes.
    pub n_states: u32,
}

impl LayerPlan {
    /// Nothing of a layer yet, in the same memory.
    fn clear(&mut self, first_layer: u32) {
        let Self { append, seal, decode, prefill, bounds, quest, score, .. } = self;
        [append, seal, decode, prefill, bounds].into_iter().for_each(Vec::clear);
        quest.clear();
        score.clear();
        self.first_layer = first_layer;
    }

    /// The work of the layer before, whose arenas are others here.
    fn follow(&mut self, before: &Self, arenas: &ArenaMap) {
        let moved = |at: &Place| {
            let (arena, sealed_arena) = (arenas.of(at.arena), arenas.of(at.sealed_arena));
            Place { arena, sealed_arena, ..*at }
        };
        let dispatch = |(at, range): &Dispatch| (moved(at), range.clone());
        self.clear(before.first_layer);
        self.append.extend(before.append.iter().map(dispatch));
        self.seal.extend(before.seal.iter().map(dispatch));
        self.decode.extend(before.decode.iter().map(dispatch));
        self.prefill.extend(before.prefill.iter().map(dispatch));
        self.merge = before.merge.clone();
        self.bounds.extend(before.bounds.iter().map(dispatch));
        self.quest.extend(before.quest.iter().map(|(arena, range)| (arenas.of(*arena), range.clone())));
        let scored =
            |(at, range): &(ScorePlace, Range<u32>)| (ScorePlace { place: moved(&at.place), ..*at }, range.clone());
        self.score.extend(before.score.iter().map(scored));
    }
}

impl AttentionPlan {
    /// Plans `segments` for all layers of a model with `num_layers` layers.
    ///
    /// # Panics
    /// When a decode segment has more than one row.
    pub fn new(shape: &CacheShape, num_layers: u32, segments: &[Segment<'_>]) -> Self {
        let mut planner = Planner::default();
        planner.plan(shape, num_layers, segments);
        planner.plan
    }

    /// Adds rows whose queries are observed.
    pub fn observe(&mut self, rows: &[ObservedRows]) {
        let item = |rows: &ObservedRows| {
            let ObservedRows { row_lo, n_rows, moments } = *rows;
            MomentItem { row_lo, n_rows, moments, pad: 0 }
        };
        self.moments.extend(rows.iter().map(item));
    }

    /// Nothing yet, in the same memory.
    fn clear(&mut self) {
        self.of_layer.clear();
        self.append.clear();
        self.seal.clear();
        self.decode.clear();
        self.prefill.clear();
        self.merge.clear();
        self.bounds.clear();
        self.quest.clear();
        self.score.clear();
        self.moments.clear();
        self.turned_pages.clear();
        self.n_page_scores = 0;
        self.n_states = 0;
    }
}

/// Plans step after step in the same memory: a step of decode whose lists are no longer than those before allocates nothing.
#[derive(Clone, Debug, Default)]
pub struct Planner {
    plan: AttentionPlan,
    parts: LayerParts,
    /// Layer plans that no layer has.
    spare: Vec<LayerPlan>,
    /// Of each segment, its first page among those whose keys are turned back.
    turned: Vec<u32>,
    /// From the arenas of a layer to those of the next.
    arenas: ArenaMap,
}

impl Planner {
    /// The plan of `segments` for all layers of a model with `num_layers` layers.
    ///
    /// # Panics
    /// When a decode segment has more than one row.
    pub fn plan(&mut self, shape: &CacheShape, num_layers: u32, segments: &[Segment<'_>]) -> &mut AttentionPlan {
        self.spare.append(&mut self.plan.plans);
        self.plan.clear();
        self.turned.clear();
        for segment in segments {
            self.turned.push(len_u32(&self.plan.turned_pages));
            let table = segment.table;
            if matches!(table.shape().codec.k.transform, Transform::LowRank { .. }) {
                self.plan.turned_pages.extend(table.sealing_pages().map(|page| table.page_position(page)));
            }
        }
        for layer in 0..num_layers {
            self.arenas.clear();
            let arenas = &mut self.arenas;
            let alike = |s: &Segment<'_>| s.may_share(layer) && s.table.alike(layer - 1, layer, arenas);
            if layer == 0 || !segments.iter().all(alike) {
                self.add_layer(shape, layer, segments);
            } else if !self.arenas.is_identity() {
                self.add_moved();
            }
            self.plan.of_layer.push(self.plan.plans.len() - 1);
        }
        &mut self.plan
    }

    /// What was planned last.
    pub const fn last(&self) -> &AttentionPlan {
        &self.plan
    }

    /// The plan of the layer before, in the arenas of this one.
    fn add_moved(&mut self) {
        let mut of_layer = self.spare.pop().unwrap_or_default();
        of_layer.follow(self.plan.plans.last().expect("a layer before it has a plan"), &self.arenas);
        self.plan.plans.push(of_layer);
    }

    fn add_layer(&mut self, shape: &CacheShape, layer: u32, segments: &[Segment<'_>]) {
        let Self { plan, parts, spare, turned, .. } = self;
        (parts.n_states, parts.n_page_scores) = (0, 0);
        let merge_start = len_u32(&plan.merge);
        let heads = shape.heads;
        for (pass, (segment, turned)) in segments.iter().zip(turned).enumerate() {
            // Only segments of one session may not share a dispatch.
            let pass = segments[..pass].iter().filter(|other| std::ptr::eq(other.table, segment.table)).count();
            let mut list = List::new(segment, layer, &heads);
            for kv_head in 0..heads.num_kv_heads {
                list.kv_head = kv_head;
                if segment.table.layers().owns(layer) && !segment.table.is_closed(layer, kv_head) {
                    list.append(parts);
                    // Pages belong to the session, not to one of its segments.
                    if pass == 0 {
                        list.seal(*turned, parts);
                        list.bounds(parts);
                    }
                }
                if layer >= segment.attend_below {
                    continue;
                }
                if segment.decode {
                    assert_eq!(segment.n_rows, 1, "a decode segment should be one row");
                    list.decode(parts, &mut plan.merge);
                } else {
                    list.prefill(PrefillSpec::item_positions(shape), parts, &mut plan.merge);
                }
                list.score(pass, score::rows_max(shape), parts);
            }
        }
        plan.n_states = plan.n_states.max(parts.n_states);
        plan.n_page_scores = plan.n_page_scores.max(parts.n_page_scores);
        let mut of_layer = spare.pop().unwrap_or_default();
        of_layer.clear(layer);
        parts.append.lay_out(&mut plan.append, &mut of_layer.append);
        parts.seal.lay_out(&mut plan.seal, &mut of_layer.seal);
        parts.decode.lay_out(&mut plan.decode, &mut of_layer.decode);
        parts.prefill.lay_out(&mut plan.prefill, &mut of_layer.prefill);
        of_layer.merge = merge_start..len_u32(&plan.merge);
        parts.bounds.lay_out(&mut plan.bounds, &mut of_layer.bounds);
        parts.quest.lay_out(&mut plan.quest, &mut of_layer.quest);
        parts.score.lay_out(&mut plan.score, &mut of_layer.score);
        plan.plans.push(of_layer);
    }
}
