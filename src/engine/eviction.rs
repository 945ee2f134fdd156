//! An eviction on the device: score, select, and move what stays into a fresh table.
//!
//! ```text
//! 1. scores from keys, where the policy ranks by them; attention was summed up by the steps before
//! 2. decide, select; counts and indices come back, since the host owns the page tables
//! 3. target.keep(counts): pages in the session's codec
//! 4. gather + seal, in as many submissions as the step's buffer and the window ask for
//! ```
//!
//! The source keeps its pages until it is released, so that several caches can be made of one.

use std::ops::Range;

use super::{Engine, EngineError, Evictions};
use crate::compression::hidden::{HiddenCodec, Transform, lowrank};
use crate::compression::layer::minicache;
use crate::compression::token::{Score, Share};
use crate::device::staging::{ReadBack, Uploader};
use crate::device::{Device, DeviceError};
use crate::geometry::{Bytes, WORD_BYTES};
use crate::kernels::Recorder;
use crate::kernels::abi::{CarryItem, DecideItem, DecideParams, GatherItem, KeyScoreItem, MergeLayersItem, SealItem, SelectItem, SelectList};
use crate::kernels::attention::CacheShape;
use crate::kernels::eviction::{EvictionKernels, EvictionSizes};
use crate::kernels::executor::AttentionKernels;
use crate::kernels::key_scores::KeyScoreMode;
use crate::kernels::plan::{ByPlace, ObservedRows, Place, ScoredRows};
use crate::pool::device::PoolBuffers;
use crate::pool::page_table::{KeptTokens, PageTable, Run, Window};
use crate::pool::{PageId, PagePool};
use crate::schedule::{Caches, Merging, Observation, Observed, PlannedRows, Selection, SessionId, StepPlan};

/// What an eviction needs of its engine.
pub(super) struct Evictor<'a> {
    pub(super) device: &'a Device,
    pub(super) uploader: &'a mut Uploader,
    pub(super) step: &'a wgpu::Buffer,
    pub(super) pool_buffers: &'a PoolBuffers,
    pub(super) attention: &'a AttentionKernels,
    pub(super) kernels: &'a EvictionKernels,
    pub(super) back: &'a ReadBack,
    pub(super) rope_theta: f32,
}

/// Tokens that are repeated behind one prompt at most, and tokens before them that lead in.
const REPEAT_CHUNK: usize = 2048;
const REPEAT_OVERLAP: usize = 8;

/// Tokens that stayed: indices of each list, ascending.
pub type Kept = Vec<Vec<u32>>;

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

/// Words of a submission.
#[derive(Default)]
struct Words(Vec<u32>);

impl Words {
    /// Appends items; the first vec4.
    fn put<T: bytemuck::Pod>(&mut self, items: &[T]) -> u32 {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        let at = u32::try_from(self.0.len() / 4).expect("a submission is far below 2^32 words");
        self.0.extend_from_slice(bytemuck::cast_slice(items));
        at
    }
}

/// Bytes that come back from an eviction: counts and indices of kept tokens, or moments.
pub(super) fn back_bytes(sizes: &EvictionSizes, shape: &CacheShape) -> Bytes {
    let lists = sizes.num_lists + sizes.slot_values();
    let moments = if sizes.moments { sizes.slot_moments(shape) } else { 0 };
    Bytes(u64::from(lists.max(moments)) * WORD_BYTES).align_up(16)
}

/// What is scored, and which queries are summed up, of observed rows of a segment.
pub(super) fn observations(
    sizes: Option<&EvictionSizes>,
    shape: &CacheShape,
    observed: &[Observed],
    row_lo: u32,
    n_rows: u32,
) -> (Vec<ScoredRows>, Vec<ObservedRows>) {
    let (mut scores, mut queries) = (Vec::new(), Vec::new());
    for (Observed { slot, first, what }, sizes) in observed.iter().filter_map(|o| Some((o, sizes?))) {
        if *what == Observation::Queries {
            let moments = slot * sizes.slot_moments(shape);
            queries.push(ObservedRows { row_lo: row_lo + first, n_rows: n_rows - first, moments });
        } else {
            let (at, capacity) = (slot * sizes.slot_values(), sizes.capacity);
            scores.push(ScoredRows { first: *first, at, capacity, largest: *what == Observation::Largest });
        }
    }
    (scores, queries)
}

fn count(n: usize) -> u32 {
    u32::try_from(n).expect("items of a submission are counted in 32 bits")
}

fn within(range: &Range<u32>, at: u32, vec4s: u32) -> (u32, u32) {
    (at + range.start * vec4s, range.end - range.start)
}

/// Layers of the model that own lists, in the order of these.
fn owners(table: &PageTable, num_layers: u32) -> Vec<u32> {
    (0..num_layers).filter(|layer| table.layers().owns(*layer)).collect()
}

impl Evictor<'_> {
    /// Selects in `source` and fills `target`, which is empty. Both tables are of the same model of `num_layers` layers, and
    /// the layers that own lists in the target own some in the source.
    pub(super) fn evict(
        &mut self,
        pool: &mut PagePool,
        window: &Window,
        num_layers: u32,
        (source, target): (&mut PageTable, &mut PageTable),
        selection: &Selection,
    ) -> Result<Kept, EngineError> {
        self.upload_table(source)?;
        let mut kept = self.select(num_layers, source, target, selection)?;
        let merged = match &selection.merge {
            Some(merging) => self.merge(window, source, &mut kept, merging)?,
            None => vec![Vec::new(); kept.len()],
        };
        let closed = |list: u32| selection.domains.iter().any(|d| d.total == 0 && d.lists.contains(&list));
        let owners = owners(target, num_layers);
        let kv_heads = target.shape().num_kv_heads;
        let n_tokens = if selection.rerotates {
            count(kept.iter().map(Vec::len).max().unwrap_or(0))
        } else {
            source.n_tokens()
        };
        let positions = |(list, (own, merged)): (u32, (&Vec<u32>, &Vec<u32>))| {
            let (layer, head) = (owners[(list / kv_heads) as usize], list % kv_heads);
            let position = |(place, index): (u32, &u32)| {
                if selection.rerotates { place } else { source.position_of(layer, head, *index) }
            };
            KeptTokens {
                own: (!(own.is_empty() && closed(list))).then(|| (0..).zip(own).map(position).collect()),
                merged: (0..).zip(merged).map(position).collect(),
            }
        };
        let pairs = selection.merge.as_ref().map_or(&[][..], |merging| &merging.pairs);
        target.keep(pool, (0..).zip(kept.iter().zip(&merged)).map(positions).collect(), pairs, n_tokens)?;
        self.upload_table(target)?;
        self.gather(window, num_layers, (source, target), (&kept, &merged), selection)?;
        if selection.carries {
            self.carry(&kept, selection.slot)?;
        }
        Ok(kept)
    }

    fn upload_table(&mut self, table: &mut PageTable) -> Result<(), EngineError> {
        if table.is_dirty() {
            let mut entries = Vec::new();
            let region = table.write_region(&mut entries);
            let at = u64::from(region) * WORD_BYTES;
            self.uploader.upload(self.device, bytemuck::cast_slice(&entries), &self.pool_buffers.tables, at)?;
        }
        Ok(())
    }

    /// Whether a submission of so many words fits the step's buffer.
    fn fits(&self, words: usize) -> bool {
        words as u64 * WORD_BYTES <= self.step.size()
    }

    /// Uploads the words and submits what `record` records, and what `copy` copies after it.
    fn submit(
        &mut self,
        words: &Words,
        record: impl FnOnce(&mut Recorder<'_>),
        copy: impl FnOnce(&mut wgpu::CommandEncoder),
    ) -> Result<(), EngineError> {
        if !self.fits(words.0.len()) {
            let (bytes, limit) = (Bytes(words.0.len() as u64 * WORD_BYTES), Bytes(self.step.size()));
            return Err(DeviceError::TooLarge { label: "the work lists of an eviction".to_owned(), bytes, limit }.into());
        }
        self.uploader.upload(self.device, bytemuck::cast_slice(&words.0), self.step, 0)?;
        let mut encoder = self.device.raw.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let mut recorder = Recorder::new(encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default()));
        record(&mut recorder);
        drop(recorder);
        copy(&mut encoder);
        self.device.queue.submit([encoder.finish()]);
        Ok(())
    }

    /// Scores where that is left to do, and selects; the kept indices of every list of the target.
    fn select(
        &mut self,
        num_layers: u32,
        source: &PageTable,
        target: &PageTable,
        selection: &Selection,
    ) -> Result<Kept, EngineError> {
        let capacity = self.kernels.sizes().capacity;
        let kv_heads = source.shape().num_kv_heads;
        let layers = owners(target, num_layers);
        let raw_base = selection.slot * self.kernels.sizes().slot_values();
        let mut words = Words(vec![0; 4]);
        let lists: Vec<(u32, u32, u32)> = layers
            .iter()
            .flat_map(|layer| (0..kv_heads).map(move |head| (*layer, head)))
            .map(|(layer, head)| {
                let in_source = source.layers().list(layer) * kv_heads + head;
                (layer, in_source, source.n_held(layer, head))
            })
            .collect();
        if let Some((_, _, n)) = lists.iter().find(|(_, _, n)| *n > capacity) {
            return Err(EngineError::Input(format!("a list of {n} tokens; evictions were made for {capacity}")));
        }
        let scored = selection.rule.filter(|_| {
            selection.domains.iter().any(|d| d.lists.iter().map(|l| lists[*l as usize].2).sum::<u32>() > d.total)
        });
        // Key scores: the k-th runs of all lists at once, so that a summary grows in order.
        let mut key_runs: ByPlace<KeyScoreItem, (usize, Place)> = ByPlace::default();
        let modes = scored.map_or(&[][..], |rule| key_modes(&rule.score));
        let mut skip = 0;
        if let Some(Score::Expected { future, n_skip }) = scored.map(|rule| rule.score) {
            self.expect_queries(selection.slot, source.n_tokens(), (future, n_skip))?;
            skip = n_skip;
        }
        if !modes.is_empty() {
            for (list, (layer, in_source, _)) in (0_u32..).zip(&lists) {
                let head = list % kv_heads;
                for (k, run) in source.held_runs(*layer, head).enumerate() {
                    let item = KeyScoreItem {
                        page_lo: run.entry,
                        n_tokens: run.n_tokens,
                        list: layer * kv_heads + head,
                        out: raw_base + in_source * capacity + run.index,
                        begins: u32::from(k == 0),
                        index: run.index,
                        pad: [0; 2],
                    };
                    key_runs.push((k, Place { codec: run.codec, arena: run.arena, sealed_arena: run.arena }), item);
                }
            }
        }
        let mut items = Vec::new();
        let key_runs = key_runs.lay_out(&mut items);
        let keys_at = words.put(&items);
        let decide = scored.map(|rule| {
            let together = rule.share == Share::Layer;
            let items: Vec<DecideItem> = (0_u32..)
                .zip(&lists)
                .map(|(list, (_, in_source, n_tokens))| DecideItem {
                    raw: raw_base + if together { in_source / kv_heads * kv_heads } else { *in_source } * capacity,
                    n_tokens: *n_tokens,
                    out: list * capacity,
                    list: *in_source,
                    first: 0,
                    count: *n_tokens,
                    pad: [0; 2],
                })
                .collect();
            let seed = if let Score::Random { seed } = rule.score { Some(seed) } else { None };
            DecideParams {
                items: words.put(&items),
                n_items: count(items.len()),
                kernel: rule.kernel,
                n_share: if together { kv_heads } else { 1 },
                share_stride: capacity,
                random: u32::from(seed.is_some()),
                seed: seed.unwrap_or(0),
            }
        });
        let mut spans = Vec::new();
        let mut domains: Vec<SelectItem> = Vec::new();
        for domain in &selection.domains {
            domains.push(SelectItem {
                lists: count(spans.len()),
                n_lists: count(domain.lists.len()),
                total: domain.total,
                floor: domain.floor,
                sink: if domain.total == 0 { 0 } else { domain.sink },
                recent: if domain.total == 0 { 0 } else { domain.recent },
                pad: [0; 2],
            });
            spans.extend(domain.lists.iter().map(|list| SelectList {
                list: *list,
                n_tokens: lists[*list as usize].2,
                at: list * capacity,
                pad: 0,
            }));
        }
        let spans_at = words.put(&spans);
        domains.iter_mut().for_each(|domain| domain.lists += spans_at);
        let domains_at = words.put(&domains);
        // Of a list no more comes back than its domain keeps.
        let most = |list: u32| {
            let domain = selection.domains.iter().find(|d| d.lists.contains(&list));
            domain.map_or(0, |domain| domain.total.min(lists[list as usize].2))
        };
        let most: Vec<u32> = (0..count(lists.len())).map(most).collect();
        let kernels = self.kernels;
        let (buffers, back) = (kernels.buffers(), self.back);
        let n_lists = lists.len() as u64;
        let record = |recorder: &mut Recorder<'_>| {
            for mode in modes {
                for ((_, place), range) in &key_runs {
                    kernels.record_key_scores(recorder, *place, within(range, keys_at, 2), (*mode, skip));
                }
            }
            if let Some(params) = &decide {
                kernels.record_decide(recorder, params);
            }
            kernels.record_select(recorder, domains_at, count(domains.len()));
        };
        let copy = |encoder: &mut wgpu::CommandEncoder| {
            encoder.copy_buffer_to_buffer(&buffers.counts, 0, back.target(), 0, n_lists * WORD_BYTES);
            let mut at = n_lists;
            for (list, n) in (0_u64..).zip(&most) {
                if *n > 0 {
                    let (from, to) = (list * u64::from(capacity) * WORD_BYTES, at * WORD_BYTES);
                    encoder.copy_buffer_to_buffer(&buffers.kept, from, back.target(), to, u64::from(*n) * WORD_BYTES);
                    at += u64::from(*n);
                }
            }
        };
        self.submit(&words, record, copy)?;
        let n_words = lists.len() + most.iter().sum::<u32>() as usize;
        let mut bytes = Vec::new();
        self.back.read(self.device, n_words * 4, &mut bytes)?;
        let read: Vec<u32> = bytemuck::pod_collect_to_vec(&bytes);
        let (counts, mut indices) = read.split_at(lists.len());
        let mut kept = Vec::with_capacity(lists.len());
        for (n, most) in counts.iter().zip(&most) {
            let (of_list, rest) = indices.split_at(*most as usize);
            kept.push(of_list[..(*n).min(*most) as usize].to_vec());
            indices = rest;
        }
        Ok(kept)
    }

    /// Moves kept tokens into the target's pages.
    fn gather(
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

    /// Takes from the lists of merged layers the tokens that both kept and that point alike; what the lower ones then have in
    /// common with the upper ones. Lists that changed are uploaded, merged tokens behind those of the lower layer.
    fn merge(
        &mut self,
        window: &Window,
        source: &PageTable,
        kept: &mut Kept,
        merging: &Merging,
    ) -> Result<Kept, EngineError> {
        let (capacity, kv_heads) = (self.kernels.sizes().capacity, source.shape().num_kv_heads);
        let size = source.shape().page.page_size;
        let lists = |(lower, upper): (u32, u32), head: u32| [lower, upper].map(|layer| (layer * kv_heads + head) as usize);
        let mut merged = vec![Vec::new(); kept.len()];
        for pair in merging.pairs.iter().copied() {
            for head in 0..kv_heads {
                let [lower, upper] = lists(pair, head);
                let common = kept[lower].iter().filter(|index| kept[upper].binary_search(index).is_ok());
                merged[lower] = common.copied().collect();
                self.upload_kept(lower, &merged[lower])?;
            }
        }
        // Distances of all tokens that both layers kept, a window of pages at a time.
        let mut units = Vec::new();
        for pair in merging.pairs.iter().copied() {
            for head in 0..kv_heads {
                let n_tokens = count(merged[lists(pair, head)[0]].len());
                units.extend((0..n_tokens.div_ceil(size)).map(|page| (pair, head, page, n_tokens)));
            }
        }
        for batch in units.chunks((window.entries() / 2).max(1) as usize) {
            let mut gathers: ByPlace<GatherItem> = ByPlace::default();
            let mut distances = Vec::new();
            for (slot, (pair, head, page, n_tokens)) in (0_u32..).zip(batch) {
                let (lower, n_kept) = (count(lists(*pair, *head)[0]), (n_tokens - page * size).min(size));
                let at = lower * capacity + page * size;
                for (layer, target) in [(pair.0, 2 * slot), (pair.1, 2 * slot + 1)] {
                    for from in source.held_runs(layer, *head) {
                        let item = GatherItem {
                            source: from.entry,
                            index: from.index,
                            n_tokens: from.n_tokens,
                            list: layer * kv_heads + head,
                            target,
                            kept: at,
                            n_kept,
                            ..GatherItem::default()
                        };
                        let place = Place { codec: from.codec, arena: from.arena, sealed_arena: PageId::WINDOW };
                        gathers.push(place, item);
                    }
                }
                let (lower, upper) = (2 * slot, 2 * slot + 1);
                distances.push(MergeLayersItem { lower, upper, target: 0, out: at, n_tokens: n_kept, pad: [0; 3] });
            }
            let (mut words, mut items) = (Words(vec![0; 4]), Vec::new());
            let dispatches = gathers.lay_out(&mut items);
            let (gathers_at, distances_at) = (words.put(&items), words.put(&distances));
            let (kernels, codec) = (self.kernels, HiddenCodec::F16);
            let record = |recorder: &mut Recorder<'_>| {
                for (place, range) in &dispatches {
                    let (items, n) = within(range, gathers_at, 3);
                    kernels.record_gather(recorder, *place, items, n);
                }
                kernels.record_merge(recorder, (codec, 0), (distances_at, count(distances.len())), false);
            };
            self.submit(&words, record, |_| ())?;
        }
        for pair in merging.pairs.iter().copied() {
            for head in 0..kv_heads {
                let [lower, upper] = lists(pair, head);
                let common = std::mem::take(&mut merged[lower]);
                let distances = self.read_decided(lower, common.len())?;
                let retained = minicache::retained(&distances, merging.retain_permille);
                let of = |stays: bool| (0..).zip(&common).filter(move |(i, _)| retained.contains(i) == stays);
                merged[lower] = of(false).map(|(_, index)| *index).collect();
                for list in [lower, upper] {
                    kept[list].retain(|index| merged[lower].binary_search(index).is_err());
                    let listed = if list == lower { [&kept[list][..], &merged[lower]].concat() } else { kept[list].clone() };
                    self.upload_kept(list, &listed)?;
                }
            }
        }
        Ok(merged)
    }

    /// Uploads indices as those that a list keeps.
    fn upload_kept(&mut self, list: usize, indices: &[u32]) -> Result<(), EngineError> {
        let at = (list as u64 * u64::from(self.kernels.sizes().capacity)) * WORD_BYTES;
        let buffer = &self.kernels.buffers().kept;
        Ok(self.uploader.upload(self.device, bytemuck::cast_slice(indices), buffer, at)?)
    }

    /// The first decided scores of a list.
    fn read_decided(&self, list: usize, n: usize) -> Result<Vec<f32>, EngineError> {
        let at = (list as u64 * u64::from(self.kernels.sizes().capacity)) * WORD_BYTES;
        let bytes = n as u64 * WORD_BYTES;
        if n == 0 {
            return Ok(Vec::new());
        }
        let mut encoder = self.device.raw.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        encoder.copy_buffer_to_buffer(&self.kernels.buffers().decided, at, self.back.target(), 0, bytes);
        self.device.queue.submit([encoder.finish()]);
        let mut read = Vec::new();
        self.back.read(self.device, n * 4, &mut read)?;
        Ok(bytemuck::pod_collect_to_vec(&read))
    }

    /// Moves raw scores to the places of the tokens that stayed.
    fn carry(&mut self, kept: &Kept, slot: u32) -> Result<(), EngineError> {
        let sizes = *self.kernels.sizes();
        let items: Vec<CarryItem> = (0_u32..)
            .zip(kept)
            .map(|(list, indices)| CarryItem {
                raw: slot * sizes.slot_values() + list * sizes.capacity,
                kept: list * sizes.capacity,
                n_kept: count(indices.len()),
                pad: 0,
            })
            .collect();
        let mut words = Words(vec![0; 4]);
        let at = words.put(&items);
        let kernels = self.kernels;
        self.submit(&words, |recorder| kernels.record_carry(recorder, at, count(items.len())), |_| ())
    }
}

/// Modes of `key_scores` that give a score, in order.
const fn key_modes(score: &Score) -> &'static [KeyScoreMode] {
    match score {
        Score::KeyNorm => &[KeyScoreMode::Norm],
        Score::KeyDifference => &[KeyScoreMode::Anchor, KeyScoreMode::Difference],
        Score::Expected { .. } => &[KeyScoreMode::ExpectedSum, KeyScoreMode::Expected],
        _ => &[],
    }
}

/// Gathers and seals of one submission.
struct Moves {
    words: Words,
    capacity: u32,
    codec: HiddenCodec,
    /// First vec4 of turning angles, where keys are turned.
    turn: Option<[u32; 4]>,
    gathers: ByPlace<GatherItem>,
    merges: ByPlace<MergeLayersItem>,
    seals: ByPlace<SealItem>,
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
        for (layer, entry) in std::iter::once((layer, target_entry)).chain(upper.map(|upper| (upper, target_entry + 1))) {
            for from in source.held_runs(layer, kv_head) {
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
            let first = (page * size) as usize;
            let own = &indices[first..first + n_kept as usize];
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
        let of_gathers = std::mem::take(&mut self.gathers).lay_out(&mut gathers);
        let of_merges = std::mem::take(&mut self.merges).lay_out(&mut merges);
        let of_seals = std::mem::take(&mut self.seals).lay_out(&mut seals);
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

impl Engine<'_> {
    /// Evicts from the cache of a session that is due, and swaps its table.
    pub(super) fn evict_session(
        &mut self,
        session: SessionId,
        tokens: &[u32],
        caches: &mut Caches,
    ) -> Result<(), EngineError> {
        let selection = caches.selection(session);
        if selection.rule.is_some_and(|rule| rule.score == Score::Reconstruction) {
            self.reconstruct(caches, session, tokens, selection.slot)?;
        }
        let mut target = caches.take_target(session);
        let mut source = caches.tables.remove(&session).expect("an admitted session has a table");
        let filled = self.evict_into(caches, &mut source, &mut target, &selection);
        caches.tables.insert(session, source);
        caches.swap(session, target)?;
        filled?;
        Ok(())
    }

    /// Scores the tokens of a full cache, which are `tokens`, by what they receive while the model repeats them: chunk by
    /// chunk behind a prompt that asks for it (arXiv:2505.23416, section 3). The repetition leaves no tokens behind.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn reconstruct(
        &mut self,
        caches: &mut Caches,
        session: SessionId,
        tokens: &[u32],
        slot: u32,
    ) -> Result<(), EngineError> {
        let prompt = self.evictions.as_ref().map(|e| e.config.repeat_prompt.clone()).unwrap_or_default();
        caches.begin_slots(std::iter::once(slot));
        let observed = vec![Observed { slot, first: 0, what: Observation::Largest }];
        let room = caches.tables[&session].admitted().tail_tokens - caches.tables[&session].tail();
        let overlap = REPEAT_OVERLAP.min(room as usize / 4);
        let chunk = (room as usize).saturating_sub(prompt.len() + overlap).min(REPEAT_CHUNK);
        if chunk == 0 {
            return Err(EngineError::Input(format!("a cache with room for {room} more tokens can not be repeated")));
        }
        let mut done = 0;
        while done < tokens.len() {
            let next = &tokens[done..(done + chunk).min(tokens.len())];
            let before = &tokens[done.saturating_sub(overlap)..done];
            let rows = [&prompt[..], before, next].concat();
            let mut fed = 0;
            while fed < rows.len() {
                let n = (self.max_rows as usize).min(rows.len() - fed);
                let segment = PlannedRows {
                    session,
                    first_index: caches.tables[&session].n_tokens(),
                    tokens: rows[fed..fed + n].to_vec(),
                    decode: false,
                    depth: None,
                    observed: observed.clone(),
                    sample: None,
                };
                let plan = StepPlan { segments: vec![segment] };
                caches.grow(&plan)?;
                self.logits_of_rows(&plan, caches, &[])?;
                caches.retire(&plan);
                fed += n;
            }
            let table = caches.tables.get_mut(&session).expect("an admitted session has a table");
            table.rewind(count(rows.len()));
            done += next.len();
        }
        Ok(())
    }

    /// Fills an empty table with what a selection keeps of another.
    ///
    /// # Errors
    /// [`EngineError`]; [`EngineError::Input`] when the engine was made without evictions.
    pub fn evict_into(
        &mut self,
        caches: &mut Caches,
        source: &mut PageTable,
        target: &mut PageTable,
        selection: &Selection,
    ) -> Result<Kept, EngineError> {
        let Some(Evictions { kernels, back, .. }) = &self.evictions else {
            return Err(EngineError::Input("this engine was made without evictions".to_owned()));
        };
        let mut evictor = Evictor {
            device: self.device,
            uploader: &mut self.uploader,
            step: &self.scratch.step,
            pool_buffers: &self.buffers,
            attention: &self.attention,
            kernels,
            back,
            rope_theta: self.geometry.rope_theta,
        };
        let num_layers = self.geometry.num_layers;
        evictor.evict(&mut caches.pool, &caches.window, num_layers, (source, target), selection)
    }
}
