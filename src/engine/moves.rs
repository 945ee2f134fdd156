//! What stayed of a cache moves into a fresh table: gathered, merged where layers have it in common, and sealed.

use std::ops::Range;

use super::EngineError;
use super::eviction::{Evictor, Kept, Words, count, owners, within};
use crate::compression::hidden::{HiddenCodec, Transform, lowrank};
use crate::kernels::Recorder;
use crate::kernels::abi::{GatherItem, MergeLayersItem, SealItem};
use crate::kernels::plan::{ByPlace, Place};
use crate::pool::PageId;
use crate::pool::page_table::{PageTable, Run, Window};
use crate::schedule::Selection;

/// A page of the target.
#[derive(Clone, Copy)]
struct Unit {
    layer: u32,
    kv_head: u32,
    list: usize,
    page: u32,
    /// The other layer of merged tokens.
    upper: Option<u32>,
}

impl Evictor<'_> {
    /// Moves kept tokens into the target's pages.
    pub(super) fn gather(
        &mut self,
        window: &Window,
        num_layers: u32,
        (source, target): (&PageTable, &PageTable),
        (kept, merged): (&Kept, &Kept),
        selection: &Selection,
    ) -> Result<(), EngineError> {
        let size = target.shape().page.page_size;
        let kv_heads = target.shape().num_kv_heads;
        let mut units = Vec::new();
        for (index, layer) in owners(target, num_layers).into_iter().enumerate() {
            for kv_head in 0..kv_heads {
                let list = index * kv_heads as usize + kv_head as usize;
                let pages = |tokens: usize| 0..count(tokens).div_ceil(size);
                units.extend(pages(kept[list].len()).map(|page| Unit { layer, kv_head, list, page, upper: None }));
                let upper = selection.merge.iter().flat_map(|m| &m.pairs).find(|(lower, _)| *lower == layer);
                let upper = upper.map(|(_, upper)| *upper);
                units.extend(pages(merged[list].len()).map(|page| Unit { layer, kv_head, list, page, upper }));
            }
        }
        // Pages that are sealed pass through the window, two for each merged one.
        let through = target.shape().codec.seals() || selection.merge.is_some();
        let slots = if selection.merge.is_some() { window.entries() / 2 } else { window.entries() };
        let batch = if through { slots.max(1) as usize } else { units.len().max(1) };
        let mut rest = &units[..];
        while !rest.is_empty() {
            let mut submission = Moves::begin(self, source, target, selection);
            let mut n = 0;
            // One batch at least: the step's buffer is made for that.
            while n < rest.len() {
                let end = (n + batch).min(rest.len());
                let mut fitting = n;
                for unit in &rest[n..end] {
                    if fitting > 0 && !self.fits(submission.words_with(source, *unit)) {
                        break;
                    }
                    submission.add(source, target, (kept, merged), *unit, self.rope_theta);
                    fitting += 1;
                }
                submission.end_batch();
                let full = fitting < end;
                n = fitting;
                if full {
                    break;
                }
            }
            rest = &rest[n..];
            submission.submit(self)?;
        }
        Ok(())
    }
}

/// Gathers and seals of one submission.
struct Moves {
    words: Words,
    capacity: u32,
    codec: HiddenCodec,
    /// First vec4 of turning angles, where keys are turned.
    turn: Option<[u32; 4]>,
    gathers: ByPlace<GatherItem, Place>,
    merges: ByPlace<MergeLayersItem, Place>,
    seals: ByPlace<SealItem, Place>,
    in_batch: u32,
    queued: usize,
    /// Gathers, merges and seals of each batch: place, first vec4, items.
    batches: Vec<[Vec<(Place, u32, u32)>; 3]>,
}

impl Moves {
    fn begin(evictor: &Evictor<'_>, source: &PageTable, target: &PageTable, selection: &Selection) -> Self {
        let mut words = Words(vec![0; 4]);
        let turn = selection.rerotates.then(|| {
            let domain = &selection.domains[0];
            let width = target.shape().page.head_dim;
            let held = source.n_held(0, 0);
            let first_recent = held - domain.total.min(held).saturating_sub(domain.sink);
            let back = f64::from(first_recent) - f64::from(domain.sink.min(held));
            let pairs = (0..width / 2).map(|pair| {
                let frequency = f64::from(evictor.rope_theta).powf(-2.0 * f64::from(pair) / f64::from(width));
                (-back * frequency).sin_cos()
            });
            let mut angles: Vec<f32> = (0..width / 2).flat_map(|_| [1.0, 0.0]).collect();
            #[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is what is wanted")]
            angles.extend(pairs.flat_map(|(sin, cos)| [cos as f32, sin as f32]));
            [words.put(&angles), 0, 1, first_recent]
        });
        Self {
            words,
            capacity: evictor.kernels.sizes().capacity,
            codec: target.shape().codec,
            turn,
            gathers: ByPlace::default(),
            merges: ByPlace::default(),
            seals: ByPlace::default(),
            in_batch: 0,
            queued: 0,
            batches: Vec::new(),
        }
    }

    /// Words of the submission with one more page.
    fn words_with(&self, source: &PageTable, unit: Unit) -> usize {
        let page = source.shape().page;
        let runs = source.held_runs(unit.layer, unit.kv_head).count();
        let turned = if self.turns_back() { page.page_size * (page.head_dim + 1) } else { 0 };
        self.words.0.len() + self.queued + runs * 24 + 16 + turned as usize + 16
    }

    fn turns_back(&self) -> bool {
        matches!(self.codec.k.transform, Transform::LowRank { .. })
    }

    fn add(
        &mut self,
        source: &PageTable,
        target: &PageTable,
        (kept, merged): (&Kept, &Kept),
        unit: Unit,
        rope_theta: f32,
    ) {
        let Unit { layer, kv_head, list, page, upper } = unit;
        let shape = target.shape();
        let size = shape.page.page_size;
        let indices = if upper.is_some() { &merged[list] } else { &kept[list] };
        let n_kept = (count(indices.len()) - page * size).min(size);
        let holds = |run: &Run| run.offset / size <= page && page < (run.offset + run.n_tokens).div_ceil(size);
        let run = if upper.is_some() {
            target.merged_runs(layer, kv_head).find(holds)
        } else {
            target.kept_runs(layer, kv_head).find(holds)
        };
        let run = run.expect("a kept page should have a place");
        let to = run.entry + page - run.offset / size;
        let seals = run.codec.seals();
        let (target_entry, target_arena) = if seals { (self.in_batch, PageId::WINDOW) } else { (to, run.arena) };
        // Merged tokens are listed behind those that the lower layer keeps.
        let first = if upper.is_some() { count(kept[list].len()) } else { 0 };
        let kept_at = count(list) * self.capacity + first + page * size;
        let own = &indices[(page * size) as usize..][..n_kept as usize];
        for (layer, entry) in std::iter::once((layer, target_entry)).chain(upper.map(|upper| (upper, target_entry + 1)))
        {
            let gives = |run: &Run| own.iter().any(|index| (run.index..run.index + run.n_tokens).contains(index));
            for from in source.held_runs(layer, kv_head).filter(gives) {
                let item = GatherItem {
                    source: from.entry,
                    index: from.index,
                    n_tokens: from.n_tokens,
                    list: layer * shape.num_kv_heads + kv_head,
                    target: entry,
                    kept: kept_at,
                    n_kept,
                    pad: 0,
                    turn: self.turn.unwrap_or_default(),
                };
                self.gathers.push(Place { codec: from.codec, arena: from.arena, sealed_arena: target_arena }, item);
                self.queued += 12;
            }
        }
        if upper.is_some() {
            let item = MergeLayersItem {
                lower: self.in_batch,
                upper: self.in_batch + 1,
                target: to,
                out: 0,
                n_tokens: n_kept,
                pad: [0; 3],
            };
            self.merges.push(Place { codec: run.codec, arena: run.arena, sealed_arena: run.arena }, item);
            self.queued += 8;
        }
        if seals {
            let position = |index| source.position_of(layer, kv_head, index);
            let padded = (0..size as usize).map(|i| own[i.min(own.len() - 1)]).map(position);
            let (mut angles, mut positions) = (0, 0);
            if self.turns_back() {
                let words: Vec<u32> = padded.collect();
                positions = self.words.put(&words) * 4;
                let turned: Vec<u32> = words
                    .iter()
                    .flat_map(|position| lowrank::angles(*position, shape.page.head_dim, rope_theta))
                    .flat_map(|(cos, sin)| [cos.to_bits(), sin.to_bits()])
                    .collect();
                angles = self.words.put(&turned);
            }
            let item = SealItem {
                open_entry: self.in_batch,
                open_stride: 0,
                list: layer * shape.num_kv_heads + kv_head,
                first_position: position(own[0]),
                sealed_entry: to,
                sealed_stride: 0,
                angles,
                positions,
            };
            let place = Place { codec: run.codec, arena: PageId::WINDOW, sealed_arena: run.arena };
            self.seals.push(place, item);
            self.queued += 8;
        }
        self.in_batch += 1 + u32::from(upper.is_some());
    }

    fn end_batch(&mut self) {
        let place = |(place, range): (Place, Range<u32>), at, vec4s| {
            let (items, n) = within(&range, at, vec4s);
            (place, items, n)
        };
        let (mut gathers, mut merges, mut seals) = (Vec::new(), Vec::new(), Vec::new());
        let of_gathers = std::mem::take(&mut self.gathers).laid_out(&mut gathers);
        let of_merges = std::mem::take(&mut self.merges).laid_out(&mut merges);
        let of_seals = std::mem::take(&mut self.seals).laid_out(&mut seals);
        let at = [self.words.put(&gathers), self.words.put(&merges), self.words.put(&seals)];
        self.batches.push([
            of_gathers.into_iter().map(|d| place(d, at[0], 3)).collect(),
            of_merges.into_iter().map(|d| place(d, at[1], 2)).collect(),
            of_seals.into_iter().map(|d| place(d, at[2], 2)).collect(),
        ]);
        self.in_batch = 0;
        self.queued = 0;
    }

    fn submit(self, evictor: &mut Evictor<'_>) -> Result<(), EngineError> {
        let (kernels, attention) = (evictor.kernels, evictor.attention);
        let record = |recorder: &mut Recorder<'_>| {
            for [gathers, merges, seals] in &self.batches {
                for (place, items, n) in gathers {
                    kernels.record_gather(recorder, *place, *items, *n);
                }
                for (place, items, n) in merges {
                    kernels.record_merge(recorder, (place.codec, place.arena), (*items, *n), true);
                }
                for (place, items, n) in seals {
                    attention.record_seal(recorder, *place, (*items, *n), 0);
                }
            }
        };
        evictor.submit(&self.words, record, |_| ())
    }
}
