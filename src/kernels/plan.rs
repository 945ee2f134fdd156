//! The attention plan of one step: pure host code from page tables to work lists.
//!
//! Every query row belongs to a sequence whose tokens lie in pages: sealed ones in the sequence's codec, then open
//! ones in f16. Its list of pages falls into runs of one codec in one arena. The plan cuts the work so that an item reads
//! one run of one KV head, gives each item the attention states that it writes, and tells `merge_states` which states belong
//! together. Items are grouped by codec and arena, one dispatch each, so sequences with different codecs share a step.
//!
//! Layers whose pages are spread over arenas in the same way share one set of work lists: items name the page of
//! layer 0 and the distance between layers. With a single arena that is every layer.
//!
//! Decode splits a sequence at multiples of [`DecodeSpec::KV_CHUNK`] from its start, whatever else is in the batch. A tile of
//! prompt rows of a sequence that is sealed stays within a page, because its rows read that page open.

use std::ops::Range;

use super::abi::{AppendItem, DecodeItem, MergeItem, PrefillItem, SealItem};
use super::attention::CacheShape;
use super::decode::DecodeSpec;
use super::prefill::PrefillSpec;
use crate::compression::hidden::{HiddenCodec, Transform};
use crate::pool::page_table::{Extent, PageTable};

/// Consecutive rows of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'t> {
    /// The sequence's pages; they already hold room for these rows.
    pub table: &'t PageTable,
    /// First row in the step.
    pub row_lo: u32,
    /// Rows; none where only pages are sealed.
    pub n_rows: u32,
    /// Cache index of the first row.
    pub first_index: u32,
    /// Whether the rows go through decode (one row) or prefill.
    pub decode: bool,
    /// Whether the rows attend at all, or are only appended.
    pub attend: bool,
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

/// The dispatches of one layer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LayerPlan {
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
    /// First positions of pages whose keys are turned back while they are sealed.
    pub turned_pages: Vec<u32>,
    /// Attention states that one layer writes.
    pub n_states: u32,
}

/// Collects items per place and lays them out one place after another.
struct ByPlace<T>(Vec<(Place, Vec<T>)>);

impl<T: Copy> ByPlace<T> {
    fn push(&mut self, place: Place, item: T) {
        match self.0.iter_mut().find(|(p, _)| *p == place) {
            Some((_, items)) => items.push(item),
            None => self.0.push((place, vec![item])),
        }
    }

    fn lay_out(mut self, list: &mut Vec<T>) -> Vec<Dispatch> {
        self.0.sort_by_key(|(place, _)| *place);
        let mut dispatches = Vec::with_capacity(self.0.len());
        for (place, items) in self.0 {
            let start = len_u32(list);
            list.extend(items);
            dispatches.push((place, start..len_u32(list)));
        }
        dispatches
    }
}

fn len_u32<T>(items: &[T]) -> u32 {
    u32::try_from(items.len()).expect("work items of a step are counted in 32 bits")
}

const fn reading(extent: &Extent) -> Place {
    Place { codec: extent.codec, arena: extent.arena, sealed_arena: extent.arena }
}

impl AttentionPlan {
    /// Plans `segments` for all layers of a model with `num_layers` layers.
    ///
    /// # Panics
    /// When a decode segment has more than one row.
    pub fn new(shape: &CacheShape, num_layers: u32, segments: &[Segment<'_>]) -> Self {
        let mut plan = Self::default();
        let turned: Vec<u32> = segments
            .iter()
            .map(|segment| {
                let first = len_u32(&plan.turned_pages);
                let shape = segment.table.shape();
                if matches!(shape.codec.k.transform, Transform::LowRank { .. }) {
                    plan.turned_pages.extend(segment.table.sealing_pages().map(|page| page * shape.page.page_size));
                }
                first
            })
            .collect();
        for layer in 0..num_layers {
            let alike = layer > 0 && segments.iter().all(|s| s.table.spread_alike(layer - 1, layer));
            if !alike {
                plan.add_layer(shape, layer, segments, &turned);
            }
            plan.of_layer.push(plan.plans.len() - 1);
        }
        plan
    }

    fn add_layer(&mut self, shape: &CacheShape, layer: u32, segments: &[Segment<'_>], turned: &[u32]) {
        let mut parts = LayerParts {
            append: ByPlace(Vec::new()),
            seal: ByPlace(Vec::new()),
            decode: ByPlace(Vec::new()),
            prefill: ByPlace(Vec::new()),
            n_states: 0,
        };
        let merge_start = len_u32(&self.merge);
        let heads = shape.heads;
        for (segment, turned) in segments.iter().zip(turned) {
            for kv_head in 0..heads.num_kv_heads {
                let list =
                    List { segment, layer, kv_head, num_kv_heads: heads.num_kv_heads, group: heads.group_size() };
                list.append(&mut parts);
                list.seal(*turned, &mut parts);
                if !segment.attend {
                    continue;
                }
                if segment.decode {
                    assert_eq!(segment.n_rows, 1, "a decode segment should be one row");
                    list.decode(&mut parts, &mut self.merge);
                } else {
                    list.prefill(PrefillSpec::tile_positions(shape), &mut parts, &mut self.merge);
                }
            }
        }
        self.n_states = self.n_states.max(parts.n_states);
        self.plans.push(LayerPlan {
            append: parts.append.lay_out(&mut self.append),
            seal: parts.seal.lay_out(&mut self.seal),
            decode: parts.decode.lay_out(&mut self.decode),
            prefill: parts.prefill.lay_out(&mut self.prefill),
            merge: merge_start..len_u32(&self.merge),
        });
    }
}

struct LayerParts {
    append: ByPlace<AppendItem>,
    seal: ByPlace<SealItem>,
    decode: ByPlace<DecodeItem>,
    prefill: ByPlace<PrefillItem>,
    n_states: u32,
}

/// One list of pages and the rows that attend to it.
struct List<'a, 't> {
    segment: &'a Segment<'t>,
    layer: u32,
    kv_head: u32,
    num_kv_heads: u32,
    group: u32,
}

/// A run of tokens that an item reads.
struct Run {
    extent: Extent,
    tokens: Range<u32>,
}

impl List<'_, '_> {
    fn table(&self) -> &PageTable {
        self.segment.table
    }

    fn page_size(&self) -> u32 {
        self.table().shape().page.page_size
    }

    /// What the row at cache index `index` reads, all tokens up to its own.
    fn runs(&self, index: u32) -> impl Iterator<Item = Run> + '_ {
        let size = self.page_size();
        self.table().seen_extents(self.layer, self.kv_head, index / size).map(move |extent| {
            let end = ((extent.first + extent.pages) * size).min(index + 1);
            Run { extent, tokens: extent.first * size..end }
        })
    }

    fn append(&self, parts: &mut LayerParts) {
        let s = self.segment;
        if s.n_rows == 0 {
            return;
        }
        let size = self.page_size();
        let end = s.first_index + s.n_rows;
        for extent in self.table().open_extents(self.layer, self.kv_head, s.first_index / size..end.div_ceil(size)) {
            for page in extent.first..extent.first + extent.pages {
                let (index, until) = (s.first_index.max(page * size), end.min((page + 1) * size));
                let item = AppendItem {
                    row_lo: s.row_lo + index - s.first_index,
                    n_rows: until - index,
                    kv_head: self.kv_head,
                    page_entry: extent.entry + page - extent.first,
                    layer_stride: extent.layer_stride,
                    slot_in_page: index % size,
                    pad: [0; 2],
                };
                parts.append.push(reading(&extent), item);
            }
        }
    }

    fn seal(&self, turned: u32, parts: &mut LayerParts) {
        let pages = self.table().sealing_pages();
        for page in pages.clone() {
            let (layer, head) = (self.layer, self.kv_head);
            let open = self.table().open_extents(layer, head, page..page + 1).next();
            let open = open.expect("a page that is sealed in this step should still be open");
            let sealed = self.table().sealed_extents(layer, head, page..page + 1).next();
            let sealed = sealed.expect("a page that is sealed in this step should have a place");
            let item = SealItem {
                open_entry: open.entry,
                open_stride: open.layer_stride,
                kv_head: self.kv_head,
                first_position: page * self.page_size(),
                sealed_entry: sealed.entry,
                sealed_stride: sealed.layer_stride,
                angles: turned + page - pages.start,
                pad: 0,
            };
            parts.seal.push(Place { codec: sealed.codec, arena: open.arena, sealed_arena: sealed.arena }, item);
        }
    }

    fn decode(&self, parts: &mut LayerParts, merge: &mut Vec<MergeItem>) {
        let (size, chunk) = (self.page_size(), DecodeSpec::KV_CHUNK);
        let q_row = self.segment.row_lo * self.num_kv_heads + self.kv_head;
        let state_lo = parts.n_states;
        let mut n_states = 0;
        for Run { extent, tokens } in self.runs(self.segment.first_index) {
            let mut start = tokens.start;
            while start < tokens.end {
                let until = ((start / chunk + 1) * chunk).min(tokens.end);
                let item = DecodeItem {
                    q_row,
                    n_tokens: until - start,
                    page_lo: extent.entry + start / size - extent.first,
                    slot: parts.n_states,
                    layer_stride: extent.layer_stride,
                    first_token: start,
                    pad: [0; 2],
                };
                parts.decode.push(reading(&extent), item);
                parts.n_states += self.group;
                n_states += 1;
                start = until;
            }
        }
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
                n_rows = n_rows.min(size - first_index % size);
            }
            let stride = n_rows * self.group;
            let state_lo = parts.n_states;
            let mut n_states = 0;
            for Run { extent, tokens } in self.runs(first_index + n_rows - 1) {
                let item = PrefillItem {
                    row_lo: s.row_lo + done,
                    n_rows,
                    kv_head: self.kv_head,
                    page_lo: extent.entry,
                    n_tokens: tokens.end - tokens.start,
                    first_token: tokens.start,
                    first_index,
                    slot: parts.n_states,
                    layer_stride: extent.layer_stride,
                    pad: [0; 3],
                };
                parts.prefill.push(reading(&extent), item);
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
}
