//! The attention plan of one step: pure host code from page tables to work lists.
//!
//! Every query row belongs to a sequence whose tokens lie in pages; each list of pages falls into runs that lie in one
//! arena. The plan cuts the work so that an item reads one run of one KV head, gives each item the attention states
//! that it writes, and tells `merge_states` which states belong together. Items are grouped by arena, one dispatch each.
//!
//! Layers whose pages are spread over arenas in the same way share one set of work lists: items name the page of
//! layer 0 and the distance between layers. With a single arena that is every layer.
//!
//! Decode splits a sequence at multiples of [`DecodeSpec::KV_CHUNK`] from its start, whatever else is in the batch.

use std::ops::Range;

use super::abi::{AppendItem, DecodeItem, MergeItem, PrefillItem};
use super::decode::DecodeSpec;
use super::prefill::PrefillSpec;
use crate::pool::page_table::PageTable;

/// Consecutive rows of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'t> {
    /// The sequence's pages; they already hold room for these rows.
    pub table: &'t PageTable,
    /// First row in the step.
    pub row_lo: u32,
    /// Rows.
    pub n_rows: u32,
    /// Cache index of the first row.
    pub first_index: u32,
    /// Whether the rows go through decode (one row) or prefill.
    pub decode: bool,
    /// Whether the rows attend at all, or are only appended.
    pub attend: bool,
}

/// Items of one arena, as a range of the list that they lie in.
pub type Dispatch = (u16, Range<u32>);

/// The dispatches of one layer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LayerPlan {
    /// Ranges of [`AttentionPlan::append`].
    pub append: Vec<Dispatch>,
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
    /// Decode items.
    pub decode: Vec<DecodeItem>,
    /// Prefill items.
    pub prefill: Vec<PrefillItem>,
    /// Merge items.
    pub merge: Vec<MergeItem>,
    /// Attention states that one layer writes.
    pub n_states: u32,
}

/// One run of tokens of a list: arena, first page, first token, end token.
struct Run {
    arena: u16,
    first_page: u32,
    tokens: Range<u32>,
}

fn runs(table: &PageTable, layer: u32, kv_head: u32, end: u32) -> impl Iterator<Item = Run> + '_ {
    let page_size = table.page_size();
    table.runs(layer, kv_head).iter().filter_map(move |run| {
        let tokens = run.first * page_size..((run.first + run.pages) * page_size).min(end);
        (!tokens.is_empty()).then_some(Run { arena: run.arena, first_page: run.first, tokens })
    })
}

/// Collects items per arena and lays them out one arena after another.
struct ByArena<T>(Vec<(u16, Vec<T>)>);

impl<T: Copy> ByArena<T> {
    fn push(&mut self, arena: u16, item: T) {
        match self.0.iter_mut().find(|(a, _)| *a == arena) {
            Some((_, items)) => items.push(item),
            None => self.0.push((arena, vec![item])),
        }
    }

    fn lay_out(mut self, list: &mut Vec<T>) -> Vec<Dispatch> {
        self.0.sort_by_key(|(arena, _)| *arena);
        let mut dispatches = Vec::with_capacity(self.0.len());
        for (arena, items) in self.0 {
            let start = len_u32(list);
            list.extend(items);
            dispatches.push((arena, start..len_u32(list)));
        }
        dispatches
    }
}

fn len_u32<T>(items: &[T]) -> u32 {
    u32::try_from(items.len()).expect("work items of a step are counted in 32 bits")
}

impl AttentionPlan {
    /// Plans `segments` for all layers of a model with `num_layers` layers.
    ///
    /// # Panics
    /// When a decode segment has more than one row.
    pub fn new(prefill: &PrefillSpec, num_layers: u32, segments: &[Segment<'_>]) -> Self {
        let mut plan = Self::default();
        let heads = prefill.shape.heads;
        // Whether every list changes arena where it did in the layer before.
        let spread_alike = |layer: u32| {
            let alike = |s: &Segment<'_>, h| s.table.runs(layer, h) == s.table.runs(layer - 1, h);
            segments.iter().all(|s| (0..heads.num_kv_heads).all(|h| alike(s, h)))
        };
        for layer in 0..num_layers {
            if layer == 0 || !spread_alike(layer) {
                plan.add_layer(prefill, layer, segments);
            }
            plan.of_layer.push(plan.plans.len() - 1);
        }
        plan
    }

    fn add_layer(&mut self, prefill: &PrefillSpec, layer: u32, segments: &[Segment<'_>]) {
        let mut parts = LayerParts {
            append: ByArena(Vec::new()),
            decode: ByArena(Vec::new()),
            prefill: ByArena(Vec::new()),
            n_states: 0,
        };
        let merge_start = len_u32(&self.merge);
        let heads = prefill.shape.heads;
        for segment in segments {
            for kv_head in 0..heads.num_kv_heads {
                let list =
                    List { segment, layer, kv_head, num_kv_heads: heads.num_kv_heads, group: heads.group_size() };
                list.append(&mut parts);
                if !segment.attend {
                    continue;
                }
                if segment.decode {
                    assert_eq!(segment.n_rows, 1, "a decode segment should be one row");
                    list.decode(&mut parts, &mut self.merge);
                } else {
                    list.prefill(prefill.tile_positions(), &mut parts, &mut self.merge);
                }
            }
        }
        self.n_states = self.n_states.max(parts.n_states);
        self.plans.push(LayerPlan {
            append: parts.append.lay_out(&mut self.append),
            decode: parts.decode.lay_out(&mut self.decode),
            prefill: parts.prefill.lay_out(&mut self.prefill),
            merge: merge_start..len_u32(&self.merge),
        });
    }
}

struct LayerParts {
    append: ByArena<AppendItem>,
    decode: ByArena<DecodeItem>,
    prefill: ByArena<PrefillItem>,
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

impl List<'_, '_> {
    fn table(&self) -> &PageTable {
        self.segment.table
    }

    /// Table entry of page `page` of this head in layer 0; shaders add the layer's distance.
    fn entry(&self, page: u32) -> u32 {
        self.table().list_entry(0, self.kv_head) + page
    }

    fn runs(&self, end: u32) -> impl Iterator<Item = Run> + '_ {
        runs(self.table(), self.layer, self.kv_head, end)
    }

    fn append(&self, parts: &mut LayerParts) {
        let s = self.segment;
        let page_size = self.table().page_size();
        let pages = self.table().list(self.layer, self.kv_head);
        let mut index = s.first_index;
        let end = s.first_index + s.n_rows;
        while index < end {
            let page = index / page_size;
            let until = ((page + 1) * page_size).min(end);
            let item = AppendItem {
                row_lo: s.row_lo + index - s.first_index,
                n_rows: until - index,
                kv_head: self.kv_head,
                page_entry: self.entry(page),
                layer_stride: self.table().layer_stride(),
                slot_in_page: index % page_size,
                pad: [0; 2],
            };
            parts.append.push(pages[page as usize].arena, item);
            index = until;
        }
    }

    fn decode(&self, parts: &mut LayerParts, merge: &mut Vec<MergeItem>) {
        let page_size = self.table().page_size();
        let chunk = DecodeSpec::KV_CHUNK;
        let q_row = self.segment.row_lo * self.num_kv_heads + self.kv_head;
        let state_lo = parts.n_states;
        let mut n_states = 0;
        for run in self.runs(self.segment.first_index + 1) {
            let mut start = run.tokens.start;
            while start < run.tokens.end {
                let until = ((start / chunk + 1) * chunk).min(run.tokens.end);
                let page = run.first_page + (start - run.tokens.start) / page_size;
                let item = DecodeItem {
                    q_row,
                    n_tokens: until - start,
                    page_lo: self.entry(page),
                    slot: parts.n_states,
                    layer_stride: self.table().layer_stride(),
                    pad: [0; 3],
                };
                parts.decode.push(run.arena, item);
                parts.n_states += self.group;
                n_states += 1;
                start = until;
            }
        }
        merge.push(MergeItem { q_row, state_lo, n_states, stride: self.group });
    }

    fn prefill(&self, tile_positions: u32, parts: &mut LayerParts, merge: &mut Vec<MergeItem>) {
        let s = self.segment;
        let mut done = 0;
        while done < s.n_rows {
            let n_rows = tile_positions.min(s.n_rows - done);
            let first_index = s.first_index + done;
            let stride = n_rows * self.group;
            let state_lo = parts.n_states;
            let mut n_states = 0;
            for run in self.runs(first_index + n_rows) {
                let item = PrefillItem {
                    row_lo: s.row_lo + done,
                    n_rows,
                    kv_head: self.kv_head,
                    page_lo: self.entry(run.first_page),
                    n_tokens: run.tokens.end - run.tokens.start,
                    first_token: run.tokens.start,
                    first_index,
                    slot: parts.n_states,
                    layer_stride: self.table().layer_stride(),
                    pad: [0; 3],
                };
                parts.prefill.push(run.arena, item);
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
