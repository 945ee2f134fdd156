//! Decode with the merge of its states, over a cache of any size.

use std::collections::BTreeMap;
use std::sync::Arc;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::cache::{BenchCache, CacheSpec};
use super::outputs::{Expected, Outputs, filled, poison};
use super::{BenchSettings, Checked, KernelRun, Work};
use crate::compression::hidden::{HiddenCodec, Transform};
use crate::device::Device;
use crate::engine::EngineError;
use crate::geometry::{Bytes, HeadGeometry, WORD_BYTES};
use crate::kernels::abi::{AttentionParams, MergeParams};
use crate::kernels::attention::Format;
use crate::kernels::decode::{DecodeSpec, DecodeTuning};
use crate::kernels::executor::ListOffsets;
use crate::kernels::pipeline::{Pipeline, PipelineCache};
use crate::kernels::plan::{AttentionPlan, Segment};
use crate::kernels::tuning::Tuning;
use crate::kernels::{KernelSpec, Recorder, Slot, flat_grid, merge_states};
use crate::pool::page_table::PageTable;
use crate::reference::attention::{Context, attend};
use crate::reference::compare::Tolerance;

/// (row, KV head) pairs that are compared, spread over the batch.
const SAMPLES: usize = 4;
/// Root mean square of the products of queries and keys, each of which has a mean square of 4/3.
const PRODUCT_RMS: f64 = 4.0 / 3.0;

/// Decode kernels of a format that give the same result, the one that the program uses first.
fn candidates(device: &Device, format: Format, tuning: &Tuning) -> Vec<(String, KernelSpec)> {
    let (tier, chosen) = (device.tier(), tuning.decode(&device.summary().kind, &format));
    let others = DecodeTuning::candidates(&format).into_iter().filter(|other| *other != chosen);
    let named = |tuning: DecodeTuning| (tuning.to_string(), DecodeSpec { format, tier, tuning }.kernel());
    let plain = format.codec.k.transform == Transform::None && format.codec.v.transform == Transform::None;
    let plain = plain.then(|| ("straightforward".to_owned(), DecodeSpec { format, tier, tuning: chosen }.plain()));
    std::iter::once(chosen).chain(others).map(named).chain(plain).collect()
}

#[derive(Debug)]
struct Kernel {
    pipeline: Arc<Pipeline>,
    /// One bind group per arena.
    groups: Vec<wgpu::BindGroup>,
}

/// Decode of one row per sequence, ready to run.
#[derive(Debug)]
pub struct DecodeRun {
    spec: CacheSpec,
    cache: BenchCache,
    /// Of each copy.
    plans: Vec<(AttentionPlan, ListOffsets)>,
    candidates: Vec<(String, KernelSpec)>,
    /// For sealed pages; for all where none is sealed.
    kernel: Kernel,
    /// For open pages beside sealed ones.
    open: Kernel,
    merge: Arc<Pipeline>,
    merge_group: wgpu::BindGroup,
    /// `[rows][num_qo_heads][head_dim]`.
    q: Vec<f32>,
    bound: Bound,
    outputs: Outputs,
    /// Of copies that were checked before.
    expected: BTreeMap<usize, Vec<Expected>>,
}

/// What a decode kernel is bound to besides tables and an arena.
#[derive(Debug)]
struct Bound {
    step: wgpu::Buffer,
    q: wgpu::Buffer,
    /// `[state][head_dim]`, and `[state]` (m, l).
    states: [wgpu::Buffer; 2],
    parameters: wgpu::Buffer,
}

impl Bound {
    fn kernel(
        &self,
        device: &Device,
        pipelines: &mut PipelineCache,
        cache: &BenchCache,
        spec: &KernelSpec,
    ) -> Result<Kernel, EngineError> {
        let pipeline = pipelines.get(device, spec)?;
        let Self { step, q, states: [o, ml], parameters } = self;
        let bind = |arena| {
            let slots = [step, &cache.buffers.tables, arena, q, o, ml, parameters];
            pipeline.bind(device, &slots.map(Slot::Whole))
        };
        let groups = cache.buffers.arenas.iter().map(bind).collect();
        Ok(Kernel { pipeline, groups })
    }
}

impl DecodeRun {
    /// Makes and fills the cache, plans, and compiles.
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
        let heads = spec.shape.heads;
        let mut words = Vec::new();
        let plans: Vec<_> = cache.copies.iter().map(|tables| plan(spec, tables, &mut words)).collect();
        let mut rng = ChaCha8Rng::seed_from_u64(13);
        let rows = spec.contexts.len();
        let q: Vec<f32> = (0..rows * heads.q_width() as usize).map(|_| rng.random_range(-2.0_f32..2.0)).collect();
        let n_states = plans.iter().map(|(plan, _)| u64::from(plan.n_states)).max().unwrap_or(0);
        let bound = Bound {
            step: filled(device, "step", &words)?,
            q: filled(device, "q", &q)?,
            states: [
                device.storage("attention states", Bytes(n_states * u64::from(heads.head_dim) * WORD_BYTES))?,
                device.storage("attention state maxima", Bytes(n_states * 2 * WORD_BYTES))?,
            ],
            parameters: device.storage("codec parameters", Bytes(16))?,
        };
        let outputs = Outputs::new(device, heads, rows)?;
        let of_codec = |codec| candidates(device, spec.shape.format(codec), pipelines.tuning());
        let (candidates, of_open) = (of_codec(spec.codec), of_codec(HiddenCodec::F16));
        let kernel = bound.kernel(device, pipelines, &cache, &candidates[0].1)?;
        let open = bound.kernel(device, pipelines, &cache, &of_open[0].1)?;
        let merge = pipelines.get(device, &merge_states::kernel(&spec.shape))?;
        let [o, ml] = &bound.states;
        let merge_group = merge.bind(device, &[&bound.step, o, ml, &outputs.o, &outputs.lse].map(Slot::Whole));
        let (spec, expected) = (spec.clone(), BTreeMap::new());
        Ok(Self { spec, cache, plans, candidates, kernel, open, merge, merge_group, q, bound, outputs, expected })
    }

    /// Copies of the cache that runs take turns over.
    pub fn copies(&self) -> usize {
        self.plans.len()
    }

    /// Arenas that the cache lies in.
    pub fn arenas(&self) -> usize {
        self.cache.buffers.arenas.len()
    }

    /// The (sequence, KV head) pairs that are compared: the first and the last sequence, and some between.
    fn samples(&self) -> Vec<(usize, u32)> {
        let (sequences, heads) = (self.spec.contexts.len(), self.spec.shape.heads.num_kv_heads);
        let last = (SAMPLES - 1).max(1);
        let sample = |i: usize| {
            let sequence = i * (sequences - 1) / last;
            (sequence, u32::try_from(i).expect("a few") * (heads - 1) / u32::try_from(last).expect("a few"))
        };
        let mut samples: Vec<_> = (0..SAMPLES).map(sample).collect();
        samples.dedup();
        samples
    }

    fn expected(&self, copy: usize, (row, kv_head): (usize, u32)) -> Expected {
        let heads = self.spec.shape.heads;
        let (group, width) = (heads.group_size(), heads.head_dim as usize);
        let (k, v) = self.cache.tokens(copy, row, kv_head);
        let of_group = HeadGeometry { num_qo_heads: group, num_kv_heads: 1, head_dim: heads.head_dim };
        let first = row * heads.q_width() as usize + (kv_head * group) as usize * width;
        let q = &self.q[first..first + group as usize * width];
        let n = self.spec.contexts[row] as usize;
        let row_result = attend(&Context { heads: of_group, k: &k, v: &v }, q, n);
        Expected {
            row,
            kv_head: kv_head as usize,
            o: row_result.o,
            absolute: row_result.absolute,
            lse: row_result.lse,
            tolerance: Tolerance::attention(n, heads.head_dim, PRODUCT_RMS),
        }
    }
}

/// The plan of one decode row per sequence, whose lists are appended to `words`.
fn plan(spec: &CacheSpec, tables: &[PageTable], words: &mut Vec<u32>) -> (AttentionPlan, ListOffsets) {
    let segments: Vec<_> = (0..)
        .zip(tables.iter().zip(&spec.contexts))
        .map(|(row_lo, (table, n))| Segment {
            table,
            row_lo,
            n_rows: 1,
            first_index: n - 1,
            decode: true,
            attend_below: u32::MAX,
            scores: Vec::new(),
        })
        .collect();
    let plan = AttentionPlan::new(&spec.shape, 1, &segments);
    // No page becomes latents, so no key is turned.
    let lists = ListOffsets::write(&plan, &spec.shape, 0.0, words);
    (plan, lists)
}

impl KernelRun for DecodeRun {
    fn candidates(&self) -> Vec<String> {
        self.candidates.iter().map(|(label, _)| label.clone()).collect()
    }

    fn choose(&mut self, device: &Device, pipelines: &mut PipelineCache, candidate: usize) -> Result<(), EngineError> {
        self.kernel = self.bound.kernel(device, pipelines, &self.cache, &self.candidates[candidate].1)?;
        Ok(())
    }

    fn work(&self) -> Work {
        let heads = self.spec.shape.heads;
        let work = self.cache.work();
        let states = self.plans.iter().map(|(plan, _)| plan.n_states).max().unwrap_or(0);
        let rows = self.spec.contexts.len() as f64;
        // States are written and read; queries are read, outputs and their log-sum-exp written.
        let states = 2.0 * f64::from(states) * f64::from(heads.head_dim + 2);
        let rows = rows * f64::from(2 * heads.q_width() + heads.num_qo_heads);
        Work { bytes: work.bytes + (states + rows) * WORD_BYTES as f64, ..work }
    }

    fn record(&self, recorder: &mut Recorder<'_>, copy: usize) {
        let (plan, lists) = &self.plans[copy % self.plans.len()];
        let heads = self.spec.shape.heads;
        let layer = &plan.plans[0];
        for (at, range) in &layer.decode {
            let kernel = if at.codec == self.spec.codec { &self.kernel } else { &self.open };
            let params = AttentionParams {
                items: lists.decode + range.start * 2,
                n_items: range.end - range.start,
                layer: 0,
                q_stride: heads.q_width(),
                scale_log2: heads.sm_scale() * std::f32::consts::LOG2_E,
                angles: 0,
            };
            let group = &kernel.groups[usize::from(at.arena)];
            recorder.dispatch(&kernel.pipeline, group, &params, flat_grid(params.n_items));
        }
        let (items, n_items) = (lists.merge + layer.merge.start, layer.merge.end - layer.merge.start);
        let params = MergeParams { items, n_items, o_stride: heads.q_width() };
        recorder.dispatch(&self.merge, &self.merge_group, &params, merge_states::grid(&self.spec.shape, n_items));
    }

    fn poison(&mut self, device: &Device) -> Result<(), EngineError> {
        let [o, ml] = &self.bound.states;
        poison(device, &[o, ml])?;
        Ok(self.outputs.poison(device)?)
    }

    fn check(&mut self, device: &Device, copy: usize) -> Result<Checked, EngineError> {
        let copy = copy % self.plans.len();
        if !self.expected.contains_key(&copy) {
            let expected = self.samples().into_par_iter().map(|sample| self.expected(copy, sample)).collect();
            self.expected.insert(copy, expected);
        }
        Ok(self.outputs.check(device, &self.expected[&copy])?)
    }

    fn spoil(&mut self, device: &Device, copy: usize) -> Result<(), EngineError> {
        let (sequence, kv_head) = self.samples()[0];
        self.cache.spoil(device, (copy % self.plans.len(), sequence, kv_head))
    }
}
