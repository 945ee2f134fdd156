//! The move of what an eviction keeps into fresh pages: gathers and seals, in as many submissions as the step's buffer and the
//! window ask for.

use std::ops::Range;

use super::EngineError;
use super::eviction::{Evictor, Kept, Words, count, owners, within};
use crate::compression::hidden::{HiddenCodec, Transform, lowrank};
use crate::kernels::Recorder;
use crate::kernels::abi::{GatherItem, SealItem};
use crate::kernels::plan::{ByPlace, Place};
use crate::pool::PageId;
use crate::pool::page_table::{PageTable, Window};
use crate::schedule::Selection;

/// A page of the target.
#[derive(Clone, Copy)]
struct Unit {
    layer: u32,
    kv_head: u32,
    list: usize,
    page: u32,
}

impl Evictor<'_> {
    /// Moves kept tokens into the target's pages.
    pub(super) fn gather(
        &mut self,
        window: &Window,
        num_layers: u32,
        (source, target): (&PageTable, &PageTable),
        kept: &Kept,
        selection: &Selection,
    ) -> Result<(), EngineError> {
        let size = target.shape().page.page_size;
        let kv_heads = target.shape().num_kv_heads;
        let mut units = Vec::new();
        for (index, layer) in owners(target, num_layers).into_iter().enumerate() {
            for kv_head in 0..kv_heads {
                let list = index * kv_heads as usize + kv_head as usize;
                let pages = count(kept[list].len()).div_ceil(size);
                units.extend((0..pages).map(|page| Unit { layer, kv_head, list, page }));
            }
        }
        let seals = target.shape().codec.seals();
        let batch = if seals { (window.entries().max(1)) as usize } else { units.len().max(1) };
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
                    submission.add(source, target, kept, *unit, self.rope_theta);
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

/// Gathers and seals that use the window once: of each dispatch its place, first vec4 and items.
struct Batch {
    gathers: Vec<(Place, u32, u32)>,
    seals: Vec<(Place, u32, u32)>,
}

/// Gathers and seals of one submission.
struct Moves {
    words: Words,
    capacity: u32,
    codec: HiddenCodec,
    /// First vec4 of turning angles, where keys are turned.
    turn: Option<[u32; 4]>,
    gathers: ByPlace<GatherItem>,
    seals: ByPlace<SealItem>,
    in_batch: u32,
    queued: usize,
    batches: Vec<Batch>,
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
        self.words.0.len() + self.queued + runs * 12 + 8 + turned as usize + 16
    }

    fn turns_back(&self) -> bool {
        matches!(self.codec.k.transform, Transform::LowRank { .. })
    }

    fn add(&mut self, source: &PageTable, target: &PageTable, kept: &Kept, unit: Unit, rope_theta: f32) {
        let Unit { layer, kv_head, list, page } = unit;
        let shape = target.shape();
        let size = shape.page.page_size;
        let indices = &kept[list];
        let n_kept = (count(indices.len()) - page * size).min(size);
        let run = target
            .kept_runs(layer, kv_head)
            .find(|run| run.offset / size <= page && page < (run.offset + run.n_tokens).div_ceil(size));
        let run = run.expect("a kept page should have a place");
        let to = run.entry + page - run.offset / size;
        let seals = self.codec.seals();
        let (target_entry, target_arena) = if seals { (self.in_batch, PageId::WINDOW) } else { (to, run.arena) };
        let of_model = layer * shape.num_kv_heads + kv_head;
        for from in source.held_runs(layer, kv_head) {
            let item = GatherItem {
                source: from.entry,
                index: from.index,
                n_tokens: from.n_tokens,
                list: of_model,
                target: target_entry,
                kept: count(list) * self.capacity + page * size,
                n_kept,
                pad: 0,
                turn: self.turn.unwrap_or_default(),
            };
            self.gathers.push(Place { codec: from.codec, arena: from.arena, sealed_arena: target_arena }, item);
            self.queued += 12;
        }
        if seals {
            let first = (page * size) as usize;
            let own = &indices[first..first + n_kept as usize];
            let padded =
                || (0..size as usize).map(|i| own[i.min(own.len() - 1)]).map(|i| source.position_of(layer, kv_head, i));
            let (mut angles, mut positions) = (0, 0);
            if self.turns_back() {
                let words: Vec<u32> = padded().collect();
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
                list: of_model,
                first_position: source.position_of(layer, kv_head, own[0]),
                sealed_entry: to,
                sealed_stride: 0,
                angles,
                positions,
            };
            let place = Place { codec: self.codec, arena: PageId::WINDOW, sealed_arena: run.arena };
            self.seals.push(place, item);
            self.queued += 8;
        }
        self.in_batch += 1;
    }

    fn end_batch(&mut self) {
        let (mut gathers, mut seals) = (Vec::new(), Vec::new());
        let of_gathers = std::mem::take(&mut self.gathers).lay_out(&mut gathers);
        let of_seals = std::mem::take(&mut self.seals).lay_out(&mut seals);
        let (gathers_at, seals_at) = (self.words.put(&gathers), self.words.put(&seals));
        let place = |(place, range): (Place, Range<u32>), at, vec4s| {
            let (items, n) = within(&range, at, vec4s);
            (place, items, n)
        };
        let gathers = of_gathers.into_iter().map(|d| place(d, gathers_at, 3)).collect();
        let seals = of_seals.into_iter().map(|d| place(d, seals_at, 2)).collect();
        self.batches.push(Batch { gathers, seals });
        self.in_batch = 0;
        self.queued = 0;
    }

    fn submit(self, evictor: &mut Evictor<'_>) -> Result<(), EngineError> {
        let (kernels, attention) = (evictor.kernels, evictor.attention);
        let record = |recorder: &mut Recorder<'_>| {
            for Batch { gathers, seals } in &self.batches {
                for (place, items, n) in gathers {
                    kernels.record_gather(recorder, *place, *items, *n);
                }
                for (place, items, n) in seals {
                    attention.record_seal(recorder, *place, (*items, *n), 0);
                }
            }
        };
        evictor.submit(&self.words, record, |_| ())
    }
}
