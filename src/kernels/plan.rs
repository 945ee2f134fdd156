//! The attention plan of one step: pure host code from page tables to work lists.
//!
//! Every query row belongs to a sequence whose tokens lie in pages: sealed ones in the sequence's codec, then open
//! ones in f16. Its list of pages falls into runs of one codec in one arena. The plan cuts the work so that an item reads
//! one run of one KV head, gives each item the attention states that it writes, and tells `merge_states` which states belong
//! together. Items are grouped by codec and arena, one dispatch each, so sequences with different codecs share a step.
//!
//! Layers that follow each other and whose lists are alike share one set of work lists: items name the page of the
//! first such layer and the distance between layers. With a single arena and nothing evicted that is every layer.
//!
//! Decode splits what was kept, and the tail, at multiples of [`DecodeSpec::KV_CHUNK`] from their starts, whatever else is in
//! the batch. A tile of prompt rows of a sequence that is sealed stays within a page, because its rows read that page open.

use std::ops::Range;

use super::abi::{
    AppendItem, DecodeItem, MergeItem, MomentItem, PageBoundsItem, PrefillItem, QuestItem, ScoreItem, SealItem,
};
use super::attention::CacheShape;
pub(crate) use super::by_place::ByPlace;
use super::by_place::len_u32;
use super::decode::DecodeSpec;
use super::prefill::PrefillSpec;
use super::score;
use crate::compression::hidden::{HiddenCodec, Transform};
use crate::pool::page_table::{PageTable, Run};

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
#[derive(Clone, Debug, Default)]
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
}

const fn reading(run: &Run) -> Place {
    Place { codec: run.codec, arena: run.arena, sealed_arena: run.arena }
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
            let alike = layer > 0 && segments.iter().all(|s| s.may_share(layer) && s.table.alike(layer - 1, layer));
            if !alike {
                self.add_layer(shape, layer, segments);
            }
            self.plan.of_layer.push(self.plan.plans.len() - 1);
        }
        &mut self.plan
    }

    /// What was planned last.
    pub const fn last(&self) -> &AttentionPlan {
        &self.plan
    }

    fn add_layer(&mut self, shape: &CacheShape, layer: u32, segments: &[Segment<'_>]) {
        let Self { plan, parts, spare, turned } = self;
        (parts.n_states, parts.n_page_scores) = (0, 0);
        let merge_start = len_u32(&plan.merge);
        let heads = shape.heads;
        for (pass, (segment, turned)) in segments.iter().zip(turned).enumerate() {
            // Only segments of one session may not share a dispatch.
            let pass = segments[..pass].iter().filter(|other| std::ptr::eq(other.table, segment.table)).count();
            for kv_head in 0..heads.num_kv_heads {
                let list =
                    List { segment, layer, kv_head, num_kv_heads: heads.num_kv_heads, group: heads.group_size() };
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

#[derive(Clone, Debug, Default)]
struct LayerParts {
    append: ByPlace<AppendItem, Place>,
    seal: ByPlace<SealItem, Place>,
    decode: ByPlace<DecodeItem, Place>,
    prefill: ByPlace<PrefillItem, Place>,
    score: ByPlace<ScoreItem, ScorePlace>,
    bounds: ByPlace<PageBoundsItem, Place>,
    quest: ByPlace<QuestItem, u16>,
    n_page_scores: u32,
    n_states: u32,
    /// What the row at hand reads.
    runs: Vec<Run>,
}

/// One list of pages and the rows that attend to it.
struct List<'a, 't> {
    segment: &'a Segment<'t>,
    layer: u32,
    kv_head: u32,
    num_kv_heads: u32,
    group: u32,
}

impl List<'_, '_> {
    fn table(&self) -> &PageTable {
        self.segment.table
    }

    fn page_size(&self) -> u32 {
        self.table().shape().page.page_size
    }

    /// The owner of the cache that is read, as a list: whose bases lift latents.
    fn owner(&self) -> u32 {
        self.table().layers().owner(self.layer) * self.num_kv_heads + self.kv_head
    }

    /// Place in the tail of the row at a position.
    fn place(&self, position: u32) -> u32 {
        position - self.table().page_position(0)
    }

    /// What the row at a position reads, all tokens up to its own.
    fn runs(&self, position: u32) -> impl Iterator<Item = Run> + '_ {
        self.table().seen_runs(self.layer, self.kv_head, self.place(position))
    }

    fn append(&self, parts: &mut LayerParts) {
        let s = self.segment;
        if s.n_rows == 0 {
            return;
        }
        let size = self.page_size();
        let first = self.place(s.first_index);
        let end = first + s.n_rows;
        for run in self.table().open_runs(self.layer, self.kv_head, first / size..end.div_ceil(size)) {
            for (page, entry) in (run.offset / size..(run.offset + run.n_tokens).div_ceil(size)).zip(run.entry..) {
                let (place, until) = (first.max(page * size), end.min((page + 1) * size));
                let item = AppendItem {
                    row_lo: s.row_lo + place - first,
                    n_rows: until - place,
                    kv_head: self.kv_head,
                    page_entry: entry,
                    layer_stride: run.layer_stride,
                    slot_in_page: place % size,
                    pad: [0; 2],
                };
                parts.append.push(reading(&run), item);
            }
        }
    }

    fn seal(&self, turned: u32, parts: &mut LayerParts) {
        let pages = self.table().sealing_pages();
        for page in pages.clone() {
            let (layer, head) = (self.layer, self.kv_head);
            let open = self.table().open_runs(layer, head, page..page + 1).next();
            let open = open.expect("a page that is sealed in this step should still be open");
            let sealed = self.table().sealed_runs(layer, head, page..page + 1).next();
            let sealed = sealed.expect("a page that is sealed in this step should have a place");
            let item = SealItem {
                open_entry: open.entry,
                open_stride: open.layer_stride,
                list: self.owner(),
                first_position: self.table().page_position(page),
                sealed_entry: sealed.entry,
                sealed_stride: sealed.layer_stride,
                angles: turned + page - pages.start,
                positions: 0,
            };
            parts.seal.push(Place { codec: sealed.codec, arena: open.arena, sealed_arena: sealed.arena }, item);
        }
    }

    /// Bounds of the pages that this step fills.
    fn bounds(&self, parts: &mut LayerParts) {
        let (table, layer, head) = (self.table(), self.layer, self.kv_head);
        if table.shape().quest.is_none() {
            return;
        }
        for page in table.filled_pages() {
            let open = table.open_runs(layer, head, page..page + 1).next();
            let open = open.expect("a page that this step fills should be open");
            let (arena, entry, stride, slot) = table.bounds_of(layer, head, page);
            let item = PageBoundsItem {
                page: open.entry,
                page_stride: open.layer_stride,
                bounds: entry,
                bounds_stride: stride,
                slot,
                pad: [0; 3],
            };
            parts.bounds.push(Place { codec: HiddenCodec::F16, arena: open.arena, sealed_arena: arena }, item);
        }
    }

    /// What a decode row reads: everything, or the pages that it chooses, and its own.
    fn read_by_decode(&self, parts: &mut LayerParts, runs: &mut Vec<Run>) {
        let (table, layer, head) = (self.table(), self.layer, self.kv_head);
        let place = self.place(self.segment.first_index);
        let size = self.page_size();
        let n_full = place / size;
        let quest = table.shape().quest.filter(|quest| layer >= quest.dense_layers && n_full > quest.pages);
        let Some(quest) = quest else {
            runs.extend(self.runs(self.segment.first_index));
            return;
        };
        let (mut out, n_entries) = table.chosen(head);
        let until = out + n_entries;
        // Runs of pages in one arena, cut where their bounds change pages of another.
        for run in table.full_runs(layer, head, place) {
            let mut first = run.offset / size;
            let end = first + run.n_tokens / size;
            while first < end {
                let (arena, _, stride, slot) = table.bounds_of(layer, head, first);
                let mut next = first + 1;
                while next < end && table.bounds_of(layer, head, next).0 == arena {
                    next += 1;
                }
                let n_pages = next - first;
                // In proportion, rounded up.
                let share = (u64::from(quest.pages) * u64::from(n_pages)).div_ceil(u64::from(n_full));
                let n_chosen =
                    u32::try_from(share).expect("a part is no larger than its whole").min(n_pages).min(until - out);
                let (_, bounds, ..) = table.bounds_of(layer, head, first - slot);
                let item = QuestItem {
                    q_row: self.segment.row_lo * self.num_kv_heads + head,
                    pages: run.entry + first - run.offset / size,
                    layer_stride: run.layer_stride,
                    n_pages,
                    bounds: bounds - (first - slot) / size,
                    bounds_stride: stride,
                    first_page: first,
                    n_chosen,
                    out,
                    scores: parts.n_page_scores,
                    pad: [0; 2],
                };
                parts.quest.push(arena, item);
                parts.n_page_scores += n_pages;
                let chosen = Run { entry: out, layer_stride: 0, offset: 0, n_tokens: n_chosen * size, ..run };
                runs.push(chosen);
                out += n_chosen;
                first = next;
            }
        }
        runs.extend(table.own_run(layer, head, place));
    }

    fn decode(&self, parts: &mut LayerParts, merge: &mut Vec<MergeItem>) {
        let (size, chunk) = (self.page_size(), DecodeSpec::KV_CHUNK);
        let q_row = self.segment.row_lo * self.num_kv_heads + self.kv_head;
        let state_lo = parts.n_states;
        let mut n_states = 0;
        let mut runs = std::mem::take(&mut parts.runs);
        self.read_by_decode(parts, &mut runs);
        for run in runs.drain(..) {
            let (mut start, end) = (run.offset, run.offset + run.n_tokens);
            while start < end {
                let until = ((start / chunk + 1) * chunk).min(end);
                let item = DecodeItem {
                    q_row,
                    n_tokens: until - start,
                    page_lo: run.entry + (start - run.offset) / size,
                    slot: parts.n_states,
                    layer_stride: run.layer_stride,
                    list: self.owner(),
                    member: run.member,
                    pad: 0,
                };
                parts.decode.push(reading(&run), item);
                parts.n_states += self.group;
                n_states += 1;
                start = until;
            }
        }
        parts.runs = runs;
        merge.push(MergeItem { q_row, state_lo, n_states, stride: self.group });
    }

    fn prefill(&self, tile_positions: u32, parts: &mut LayerParts, merge: &mut Vec<MergeItem>) {
        let s = self.segment;
        let size = self.page_size();
        let mut done = 0;
        while done < s.n_rows {
            let first_index = s.first_index + done;
            let mut n_rows = tile_positions.min(s.n_rows - done);
            if self.table().shape().codec.seals() {
                n_rows = n_rows.min(size - self.place(first_index) % size);
            }
            let stride = n_rows * self.group;
            let state_lo = parts.n_states;
            let mut n_states = 0;
            for run in self.runs(first_index + n_rows - 1) {
                let item = PrefillItem {
                    row_lo: s.row_lo + done,
                    n_rows,
                    kv_head: self.kv_head,
                    page_lo: run.entry,
                    n_tokens: run.n_tokens,
                    first_token: run.position,
                    first_index,
                    slot: parts.n_states,
                    layer_stride: run.layer_stride,
                    list: self.owner(),
                    member: run.member,
                    pad: 0,
                };
                parts.prefill.push(reading(&run), item);
                parts.n_states += stride;
                n_states += 1;
            }
            merge.extend((0..n_rows).map(|r| MergeItem {
                q_row: (s.row_lo + done + r) * self.num_kv_heads + self.kv_head,
                state_lo: state_lo + r * self.group,
                n_states,
                stride,
            }));
            done += n_rows;
        }
    }

    /// What the scored rows give each token that they see.
    fn score(&self, pass: usize, rows_max: u32, parts: &mut LayerParts) {
        let s = self.segment;
        let list = self.table().layers().list(self.layer) * self.num_kv_heads + self.kv_head;
        for scored in s.scores.iter().filter(|scored| scored.first < s.n_rows) {
            let rows = scored.first..s.n_rows;
            for (piece, first) in (0..).zip(rows.clone().step_by(rows_max as usize)) {
                let n_rows = rows_max.min(rows.end - first);
                for run in self.runs(s.first_index + s.n_rows - 1) {
                    let place = ScorePlace { pass: (pass, piece), largest: scored.largest, place: reading(&run) };
                    for start in (0..run.n_tokens).step_by(score::TOKENS as usize) {
                        let item = ScoreItem {
                            row_lo: s.row_lo + first,
                            n_rows,
                            kv_head: self.kv_head,
                            page_lo: run.entry + start / self.page_size(),
                            n_tokens: score::TOKENS.min(run.n_tokens - start),
                            first_token: run.position + start,
                            first_index: s.first_index + first,
                            out: scored.at + list * scored.capacity + run.index + start,
                            layer_stride: run.layer_stride,
                            list: self.owner(),
                            pad: [0; 2],
                        };
                        parts.score.push(place, item);
                    }
                }
            }
        }
    }
}
