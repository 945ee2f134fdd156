//! An eviction on the device: score, select, and move what stays into a fresh table.
//!
//! ```text
//! 1. scores from keys, where the policy ranks by them; attention was summed up by the steps before
//! 2. decide, select; counts and indices come back, since the host owns the page tables
//! 3. target.keep(counts): pages in the session's codec
//! 4. gather + seal ([`moves`](super::moves))
//! ```
//!
//! The source keeps its pages until it is released, so that several caches can be made of one.

use std::ops::Range;

use super::{Engine, EngineError, Evictions};
use crate::compression::token::{Score, Share};
use crate::device::staging::{ReadBack, Uploader};
use crate::device::{Device, DeviceError};
use crate::geometry::{Bytes, WORD_BYTES};
use crate::kernels::Recorder;
use crate::kernels::abi::{CarryItem, DecideItem, DecideParams, KeyScoreItem, SelectItem, SelectList};
use crate::kernels::attention::CacheShape;
use crate::kernels::eviction::{EvictionKernels, EvictionSizes};
use crate::kernels::executor::AttentionKernels;
use crate::kernels::key_scores::{self, KeyScoreMode};
use crate::kernels::plan::{ByPlace, ObservedRows, Place, ScoredRows};
use crate::pool::PagePool;
use crate::pool::device::PoolBuffers;
use crate::pool::page_table::{KeptTokens, PageTable, Window};
use crate::schedule::{Caches, Observation, Observed, PlannedRows, Selection, SessionId, StepPlan};

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

/// Words of a submission.
pub(super) struct Words(pub(super) Vec<u32>);

impl Words {
    /// Appends items; the first vec4.
    pub(super) fn put<T: bytemuck::Pod>(&mut self, items: &[T]) -> u32 {
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

pub(super) fn count(n: usize) -> u32 {
    u32::try_from(n).expect("items of a submission are counted in 32 bits")
}

/// First vec4 and number of the items of a range, each of so many vec4s, in a list that begins at vec4 `at`.
pub(super) fn within(range: &Range<u32>, at: u32, vec4s: u32) -> (u32, u32) {
    (at + range.start * vec4s, range.end - range.start)
}

/// Layers of the model that own lists, in the order of these.
pub(super) fn owners(table: &PageTable, num_layers: u32) -> Vec<u32> {
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
        let n_tokens =
            if selection.rerotates { count(kept.iter().map(Vec::len).max().unwrap_or(0)) } else { source.n_tokens() };
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
    pub(super) fn fits(&self, words: usize) -> bool {
        words as u64 * WORD_BYTES <= self.step.size()
    }

    /// Uploads the words and submits what `record` records, and what `copy` copies after it.
    pub(super) fn submit(
        &mut self,
        words: &Words,
        record: impl FnOnce(&mut Recorder<'_>),
        copy: impl FnOnce(&mut wgpu::CommandEncoder),
    ) -> Result<(), EngineError> {
        if !self.fits(words.0.len()) {
            let (bytes, limit) = (Bytes(words.0.len() as u64 * WORD_BYTES), Bytes(self.step.size()));
            return Err(
                DeviceError::TooLarge { label: "the work lists of an eviction".to_owned(), bytes, limit }.into()
            );
        }
        self.uploader.upload(self.device, bytemuck::cast_slice(&words.0), self.step, 0)?;
        let mut encoder = self.device.raw.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let mut recorder = Recorder::new(encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default()));
        record(&mut recorder);
        drop(recorder);
        copy(&mut encoder);
        self.device.submit(encoder)?;
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
                let mut k = 0;
                for run in source.held_runs(*layer, head) {
                    for start in (0..run.n_tokens).step_by(key_scores::TOKENS as usize) {
                        let item = KeyScoreItem {
                            page_lo: run.entry + start / source.shape().page.page_size,
                            n_tokens: key_scores::TOKENS.min(run.n_tokens - start),
                            list: layer * kv_heads + head,
                            out: raw_base + in_source * capacity + run.index + start,
                            begins: u32::from(k == 0),
                            index: run.index + start,
                            slot: start % source.shape().page.page_size,
                            pad: 0,
                        };
                        let place = Place { codec: run.codec, arena: run.arena, sealed_arena: run.arena };
                        key_runs.push((k, place), item);
                        k += 1;
                    }
                }
            }
        }
        let mut items = Vec::new();
        let key_runs = key_runs.laid_out(&mut items);
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
        match filled {
            Ok(_) => Ok(caches.swap(session, target)?),
            Err(error) => {
                caches.return_target(session, target)?;
                Err(error)
            }
        }
    }

    /// Scores the tokens of a full cache, which are `tokens`, by what they receive while the model repeats them: chunk by
    /// chunk behind a prompt that asks for it (arXiv:2505.23416, section 3). The repetition leaves no tokens behind, not even
    /// where it fails.
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
                let plan = StepPlan { segments: vec![segment], ..StepPlan::default() };
                caches.grow(&plan)?;
                if let Err(error) = self.logits_of_rows(&plan, caches, &[]) {
                    caches.ungrow(&plan)?;
                    let table = caches.tables.get_mut(&session).expect("an admitted session has a table");
                    table.rewind(count(fed));
                    return Err(error);
                }
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
