//! Gather: the tokens that an eviction keeps move to fresh f16 pages.

use std::sync::Arc;

use half::f16;
use rand::seq::index::sample;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::cache::{BenchCache, CacheSpec};
use super::inputs::{page_cells, places};
use super::outputs::{filled, poison};
use super::{BenchSettings, Checked, KernelRun, Work};
use crate::compression::hidden::{HeadParameters, HiddenCodec, PageContext, Transform};
use crate::device::Device;
use crate::device::staging::download;
use crate::engine::EngineError;
use crate::geometry::{Bytes, CELL_BYTES, WORD_BYTES};
use crate::kernels::abi::{GatherItem, GatherParams};
use crate::kernels::gather::GatherTuning;
use crate::kernels::pipeline::{Pipeline, PipelineCache};
use crate::kernels::tuning::Tuning;
use crate::kernels::{Recorder, Slot, flat_grid, gather};
use crate::reference::compare::Tolerance;

/// Lists that are compared.
const SAMPLES: usize = 4;

/// Half of every list of a cache, chosen by chance.
#[derive(Debug)]
pub struct GatherRun {
    spec: CacheSpec,
    cache: BenchCache,
    /// Of each copy: the dispatches.
    dispatches: Vec<Vec<Dispatch>>,
    candidates: Vec<GatherTuning>,
    kernels: Vec<(HiddenCodec, Arc<Pipeline>)>,
    target: wgpu::Buffer,
    /// `[list]`: indices of tokens that stay, ascending.
    kept: Vec<Vec<u32>>,
    /// `[list][page]`: first cell in the target.
    places: Vec<Vec<u32>>,
}

/// Items of one codec whose pages lie in one arena.
#[derive(Debug)]
struct Dispatch {
    codec: HiddenCodec,
    group: wgpu::BindGroup,
    params: GatherParams,
}

/// Items of one codec and arena.
type Items = Vec<((HiddenCodec, u16), Vec<GatherItem>)>;

/// Launches, the one that the program uses first.
fn candidates(tuning: &Tuning) -> Vec<GatherTuning> {
    let first = tuning.gather();
    std::iter::once(first).chain(GatherTuning::candidates().into_iter().filter(|other| *other != first)).collect()
}

impl GatherRun {
    /// Makes and fills the cache, chooses, and compiles.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn new(
        device: &Device,
        pipelines: &mut PipelineCache,
        spec: &CacheSpec,
        settings: &BenchSettings,
    ) -> Result<Self, EngineError> {
        let cache = BenchCache::new(device, spec, settings)?;
        let (page, size) = (spec.shape.page(), spec.shape.page_size);
        let heads = spec.shape.heads.num_kv_heads as usize;
        let mut rng = ChaCha8Rng::seed_from_u64(37);
        let mut half = |n_tokens: &u32| {
            let n = *n_tokens as usize;
            let mut indices: Vec<u32> = sample(&mut rng, n, n.div_ceil(2)).into_iter().map(index).collect();
            indices.sort_unstable();
            indices
        };
        let kept: Vec<Vec<u32>> = spec.contexts.iter().flat_map(|n| vec![n; heads]).map(&mut half).collect();
        let n_pages = kept.iter().map(|list| list.len().div_ceil(size as usize)).sum();
        let mut order = ChaCha8Rng::seed_from_u64(rng.random());
        let all = places(&mut order, index(n_pages), page_cells(HiddenCodec::F16, page), settings);
        let mut rest = all.iter().copied();
        let places: Vec<Vec<u32>> =
            kept.iter().map(|list| rest.by_ref().take(list.len().div_ceil(size as usize)).collect()).collect();
        let first_target = index(cache.entries.len());
        let tables = filled(device, "tables", &[&cache.entries[..], &all].concat())?;
        let indices = filled(device, "kept indices", &kept.concat())?;
        let bytes = n_pages as u64 * HiddenCodec::F16.page_bytes(page).0;
        let target = device.storage("kept pages", Bytes(bytes))?;
        let unused = device.storage("codec parameters", Bytes(16))?;
        let candidates = candidates(pipelines.tuning());
        let kernels = spec.compiled(device, pipelines, |format| gather::kernel(format, candidates[0]))?;
        let (spec, dispatches) = (spec.clone(), Vec::new());
        let mut run = Self { spec, cache, dispatches, candidates, kernels, target, kept, places };
        for copy in 0..run.cache.copies.len() {
            let mut words: Vec<u32> = Vec::new();
            let mut ranges = Vec::new();
            for ((codec, arena), items) in run.items(copy, first_target) {
                ranges.push((codec, arena, index(words.len() / 4), index(items.len())));
                words.extend_from_slice(bytemuck::cast_slice(&items));
            }
            let step = filled(device, "step", &words)?;
            let dispatch = |(codec, arena, items, n_items)| {
                let params = GatherParams { items, n_items, layer: 0, angles: 0 };
                let arena = &run.cache.buffers.arenas[usize::from(arena)];
                let slots = [&step, &tables, &unused, &indices, arena, &run.target].map(Slot::Whole);
                Dispatch { codec, group: run.kernel(codec).bind(device, &slots), params }
            };
            let dispatches = ranges.into_iter().map(dispatch).collect();
            run.dispatches.push(dispatches);
        }
        Ok(run)
    }

    fn kernel(&self, codec: HiddenCodec) -> &Pipeline {
        &self.kernels.iter().find(|(of, _)| *of == codec).expect("pages are open or sealed").1
    }

    /// (sequence, KV head) of every list.
    fn lists(&self) -> impl Iterator<Item = (usize, u32)> + use<> {
        let heads = self.spec.shape.heads.num_kv_heads;
        (0..self.spec.contexts.len()).flat_map(move |sequence| (0..heads).map(move |head| (sequence, head)))
    }

    /// Every page of the target against every run of its source that it takes tokens from.
    fn items(&self, copy: usize, mut target: u32) -> Items {
        let size = self.spec.shape.page_size as usize;
        let (mut items, mut first): (Items, u32) = (Vec::new(), 0);
        for ((sequence, head), kept) in self.lists().zip(&self.kept) {
            for run in self.cache.runs(copy, sequence, head) {
                let of_run = run.index..run.index + run.n_tokens;
                for (page, tokens) in (0..).zip(kept.chunks(size)) {
                    if tokens[tokens.len() - 1] < of_run.start || tokens[0] >= of_run.end {
                        continue;
                    }
                    let item = GatherItem {
                        source: run.entry,
                        index: run.index,
                        n_tokens: run.n_tokens,
                        target: target + page,
                        kept: first + page * self.spec.shape.page_size,
                        n_kept: index(tokens.len()),
                        ..GatherItem::default()
                    };
                    let place = (run.codec, run.arena);
                    match items.iter_mut().find(|(at, _)| *at == place) {
                        Some((_, alike)) => alike.push(item),
                        None => items.push((place, vec![item])),
                    }
                }
            }
            target += index(kept.len().div_ceil(size));
            first += index(kept.len());
        }
        items
    }

    /// How far a page is from these tokens of its source, over what it may be.
    fn error_over_bound(&self, words: &[u32], tokens: &[u32], keys: &[f32], values: &[f32]) -> f64 {
        let page = self.spec.shape.page();
        let width = page.head_dim as usize;
        let none = HeadParameters::default();
        // Slots behind the last kept token repeat it.
        let slot = |i: usize| tokens[i.min(tokens.len() - 1)] as usize * width;
        let of = |source: &[f32]| -> Vec<f32> {
            (0..page.page_size as usize).flat_map(|i| source[slot(i)..][..width].iter().copied()).collect()
        };
        let (k, v) = HiddenCodec::F16.decode(page, PageContext::at(&none, 0), words);
        let codec = self.spec.codec;
        let side = |transform, got: &[f32], source: &[f32]| match transform {
            Transform::None => exactly(got, &of(source)),
            _ => turned_back(got, &of(source), width),
        };
        side(codec.k.transform, &k, keys).max(side(codec.v.transform, &v, values))
    }
}

/// Codes between a minimum and a scale decode to the same bits everywhere.
fn exactly(got: &[f32], want: &[f32]) -> f64 {
    let bits = |x: &f32| f16::from_f32(*x).to_bits();
    if got.iter().map(bits).eq(want.iter().map(bits)) { 0.0 } else { f64::INFINITY }
}

/// Where a rotation is undone, a channel is a sum of `width` numbers over the root of `width`, in proportion to the row's norm; then
/// it is rounded to f16.
fn turned_back(got: &[f32], want: &[f32], width: usize) -> f64 {
    let rows = got.chunks_exact(width).zip(want.chunks_exact(width));
    let of_row = |(got, want): (&[f32], &[f32])| {
        let norm = want.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let sum = Tolerance::dot(width).bound(norm);
        got.iter().zip(want).fold(0.0, |worst: f64, (got, want)| {
            let (got, want) = (f64::from(*got), f64::from(*want));
            let error = (got - want).abs() / (sum + want.abs() / 2048.0);
            if error.is_finite() { worst.max(error) } else { f64::INFINITY }
        })
    };
    rows.map(of_row).fold(0.0, f64::max)
}

fn index(n: usize) -> u32 {
    u32::try_from(n).expect("items are counted in 32 bits")
}

impl KernelRun for GatherRun {
    fn candidates(&self) -> Vec<String> {
        self.candidates.iter().map(ToString::to_string).collect()
    }

    fn choose(&mut self, device: &Device, pipelines: &mut PipelineCache, candidate: usize) -> Result<(), EngineError> {
        let tuning = self.candidates[candidate];
        self.kernels = self.spec.compiled(device, pipelines, |format| gather::kernel(format, tuning))?;
        Ok(())
    }

    fn copies(&self) -> bool {
        true
    }

    fn work(&self) -> Work {
        let width = f64::from(2 * self.spec.shape.heads.head_dim);
        let kept = self.kept.iter().map(|list| list.len() as f64).sum::<f64>();
        let read = width * self.spec.codec.effective_bits(self.spec.shape.page()) / 8.0;
        Work { bytes: kept * (read + 2.0 * width + WORD_BYTES as f64), flop: 0.0, pairs: Some(kept) }
    }

    fn record(&self, recorder: &mut Recorder<'_>, copy: usize) {
        for Dispatch { codec, group, params } in &self.dispatches[copy % self.dispatches.len()] {
            recorder.dispatch(self.kernel(*codec), group, params, flat_grid(params.n_items));
        }
    }

    fn poison(&mut self, device: &Device) -> Result<(), EngineError> {
        Ok(poison(device, &[&self.target])?)
    }

    fn check(&mut self, device: &Device, copy: usize) -> Result<Checked, EngineError> {
        let copy = copy % self.dispatches.len();
        let page = self.spec.shape.page();
        let bytes = usize::try_from(HiddenCodec::F16.page_bytes(page).0).expect("a page fits in memory");
        let (mut compared, mut error_over_bound) = (0, 0.0_f64);
        let step = (self.kept.len() / SAMPLES).max(1);
        for (list, (sequence, head)) in self.lists().enumerate().step_by(step) {
            let (keys, values) = self.cache.tokens(copy, sequence, head);
            for (tokens, cell) in self.kept[list].chunks(page.page_size as usize).zip(&self.places[list]) {
                let words = download(device, &self.target, u64::from(*cell) * CELL_BYTES, bytes)?;
                let words: Vec<u32> = bytemuck::pod_collect_to_vec(&words);
                compared += words.len();
                error_over_bound = error_over_bound.max(self.error_over_bound(&words, tokens, &keys, &values));
            }
        }
        Ok(Checked { compared, missing: 0, error_over_bound, nmse: 0.0 })
    }

    fn spoil(&mut self, device: &Device, copy: usize) -> Result<(), EngineError> {
        self.cache.spoil(device, (copy % self.dispatches.len(), 0, 0))
    }
}
