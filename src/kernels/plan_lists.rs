//! The work of one list of pages in a step: the items that append to it, seal it, and attend to it.

use std::ops::Range;

use super::abi::{AppendItem, DecodeItem, MergeItem, PageBoundsItem, PrefillItem, QuestItem, ScoreItem, SealItem};
use super::by_place::ByPlace;
use super::decode::DecodeSpec;
use super::plan::{Place, ScorePlace, Segment};
use super::score;
use crate::compression::hidden::HiddenCodec;
use crate::geometry::HeadGeometry;
use crate::pool::page_table::{PageTable, Quest, Run};

/// Items of a layer, by where their pages lie.
#[derive(Clone, Debug, Default)]
pub(super) struct LayerParts {
    pub(super) append: ByPlace<AppendItem, Place>,
    pub(super) seal: ByPlace<SealItem, Place>,
    pub(super) decode: ByPlace<DecodeItem, Place>,
    pub(super) prefill: ByPlace<PrefillItem, Place>,
    pub(super) score: ByPlace<ScoreItem, ScorePlace>,
    pub(super) bounds: ByPlace<PageBoundsItem, Place>,
    pub(super) quest: ByPlace<QuestItem, u16>,
    pub(super) n_page_scores: u32,
    pub(super) n_states: u32,
}

const fn reading(run: &Run) -> Place {
    Place { codec: run.codec, arena: run.arena, sealed_arena: run.arena }
}

/// One list of pages and the rows that attend to it.
pub(super) struct List<'a, 't> {
    pub(super) segment: &'a Segment<'t>,
    pub(super) layer: u32,
    pub(super) kv_head: u32,
    pub(super) num_kv_heads: u32,
    pub(super) group: u32,
    /// Pages of the tail that the rows are in. Divisions are what a plan of many lists spends its time on.
    pub(super) pages: Range<u32>,
    pub(super) pages_of_chunk: u32,
}

impl<'a, 't> List<'a, 't> {
    /// The first KV head of a layer.
    pub(super) fn new(segment: &'a Segment<'t>, layer: u32, heads: &HeadGeometry) -> Self {
        let (num_kv_heads, group) = (heads.num_kv_heads, heads.group_size());
        let (size, first) =
            (segment.table.shape().page.page_size, segment.first_index - segment.table.page_position(0));
        let (pages, pages_of_chunk) =
            (first / size..(first + segment.n_rows).div_ceil(size), DecodeSpec::KV_CHUNK / size);
        Self { segment, layer, kv_head: 0, num_kv_heads, group, pages, pages_of_chunk }
    }
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

    /// The row and KV head of a decode row.
    fn q_row(&self) -> u32 {
        self.segment.row_lo * self.num_kv_heads + self.kv_head
    }

    /// Place in the tail of the row at a position.
    fn place(&self, position: u32) -> u32 {
        position - self.table().page_position(0)
    }

    /// Passes on what the row at a position reads, all tokens up to its own.
    fn each_run(&self, position: u32, f: impl FnMut(Run)) {
        self.table().each_seen(self.layer, self.kv_head, self.place(position), f);
    }

    pub(super) fn append(&self, parts: &mut LayerParts) {
        let s = self.segment;
        if s.n_rows == 0 {
            return;
        }
        let size = self.page_size();
        let first = self.place(s.first_index);
        let end = first + s.n_rows;
        let runs = self.table().open_runs(self.layer, self.kv_head, self.pages.clone());
        runs.for_each(|run| {
            let items = parts.append.of(reading(&run));
            for (page, page_entry) in (run.offset / size..(run.offset + run.n_tokens).div_ceil(size)).zip(run.entry..) {
                let (place, until) = (first.max(page * size), end.min((page + 1) * size));
                items.push(AppendItem {
                    row_lo: s.row_lo + place - first,
                    n_rows: until - place,
                    kv_head: self.kv_head,
                    page_entry,
                    layer_stride: run.layer_stride,
                    slot_in_page: place - page * size,
                    pad: [0; 2],
                });
            }
        });
    }

    pub(super) fn seal(&self, turned: u32, parts: &mut LayerParts) {
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
    pub(super) fn bounds(&self, parts: &mut LayerParts) {
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

    /// Attends to the pages that a decode row chooses among `n_full`, and to its own.
    fn decode_chosen(&self, quest: Quest, n_full: u32, parts: &mut LayerParts) {
        let (table, layer, head) = (self.table(), self.layer, self.kv_head);
        let (place, size) = (self.place(self.segment.first_index), self.page_size());
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
                    q_row: self.q_row(),
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
                self.decode_run(&chosen, parts);
                out += n_chosen;
                first = next;
            }
        }
        table.own_run(layer, head, place).for_each(|run| self.decode_run(&run, parts));
    }

    /// A decode row attends to a run, cut at the edges of chunks.
    fn decode_run(&self, run: &Run, parts: &mut LayerParts) {
        let (size, chunk) = (self.page_size(), DecodeSpec::KV_CHUNK);
        let (q_row, list) = (self.q_row(), self.owner());
        let items = parts.decode.of(reading(run));
        let (mut start, end) = (run.offset, run.offset + run.n_tokens);
        let mut page_lo = run.entry;
        while start < end {
            let until = ((start / chunk + 1) * chunk).min(end);
            items.push(DecodeItem {
                q_row,
                n_tokens: until - start,
                page_lo,
                slot: parts.n_states,
                layer_stride: run.layer_stride,
                list,
                member: run.member,
                pad: 0,
            });
            parts.n_states += self.group;
            // Only the first chunk of a run may have begun before it.
            page_lo += if until - start == chunk { self.pages_of_chunk } else { (until - start) / size };
            start = until;
        }
    }

    /// A decode row attends to everything, or to pages that it chooses.
    pub(super) fn decode(&self, parts: &mut LayerParts, merge: &mut Vec<MergeItem>) {
        let state_lo = parts.n_states;
        let n_full = self.pages.start;
        let quest = self.table().shape().quest;
        match quest.filter(|quest| self.layer >= quest.dense_layers && n_full > quest.pages) {
            Some(quest) => self.decode_chosen(quest, n_full, parts),
            None => self.each_run(self.segment.first_index, |run| self.decode_run(&run, parts)),
        }
        let n_states = (parts.n_states - state_lo) / self.group;
        merge.push(MergeItem { q_row: self.q_row(), state_lo, n_states, stride: self.group });
    }

    pub(super) fn prefill(&self, tile_positions: u32, parts: &mut LayerParts, merge: &mut Vec<MergeItem>) {
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
            self.each_run(first_index + n_rows - 1, |run| {
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
            });
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
    pub(super) fn score(&self, pass: usize, rows_max: u32, parts: &mut LayerParts) {
        let s = self.segment;
        let list = self.table().layers().list(self.layer) * self.num_kv_heads + self.kv_head;
        for scored in s.scores.iter().filter(|scored| scored.first < s.n_rows) {
            let rows = scored.first..s.n_rows;
            for (piece, first) in (0..).zip(rows.clone().step_by(rows_max as usize)) {
                let n_rows = rows_max.min(rows.end - first);
                self.each_run(s.first_index + s.n_rows - 1, |run| {
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
                });
            }
        }
    }
}
