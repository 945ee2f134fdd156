//! Prefill with the merge of its states: the last rows of every sequence against its whole cache.

use std::collections::BTreeMap;
use std::sync::Arc;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::cache::{BenchCache, CacheSpec};
use super::outputs::{Expected, Outputs, filled, poison};
use super::{BenchSettings, Checked, KernelRun, Work};
use crate::compression::hidden::HiddenCodec;
use crate::device::{Device, Tier};
use crate::engine::EngineError;
use crate::geometry::{Bytes, HeadGeometry, WORD_BYTES};
use crate::kernels::abi::{AttentionParams, MergeParams};
use crate::kernels::attention::Format;
use crate::kernels::executor::ListOffsets;
use crate::kernels::pipeline::{Pipeline, PipelineCache};
use crate::kernels::plan::{AttentionPlan, Segment};
use crate::kernels::prefill::{PrefillSpec, PrefillTuning};
use crate::kernels::tuning::Tuning;
use crate::kernels::{Recorder, Slot, flat_grid, merge_states};
use crate::pool::page_table::PageTable;
use crate::reference::attention::{Context, attend};
use crate::reference::compare::Tolerance;

/// (row, KV head) pairs that are compared, spread over the rows.
const SAMPLES: usize = 6;
/// Root mean square of the products of queries and keys, each of which has a mean square of 4/3.
const PRODUCT_RMS: f64 = 4.0 / 3.0;

/// A chunk of every sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct PrefillCase {
    /// The cache, the chunk included.
    pub cache: CacheSpec,
    /// Rows of each sequence: its last ones. Where pages are sealed they lie in the last page, which they read open.
    pub rows: u32,
}

#[derive(Debug)]
struct Kernel {
    pipeline: Arc<Pipeline>,
    /// Workgroups of an item.
    tiles: u32,
    /// Whether it rounds what it multiplies to f16.
    in_f16: bool,
    /// One bind group per arena.
    groups: Vec<wgpu::BindGroup>,
}

/// What a prefill kernel is bound to besides tables and an arena.
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
        spec: &PrefillSpec,
    ) -> Result<Kernel, EngineError> {
        let pipeline = pipelines.get(device, &spec.kernel())?;
        let Self { step, q, states: [o, ml], parameters } = self;
        let bind = |arena| {
            let slots = [step, &cache.buffers.tables, arena, q, o, ml, parameters];
            pipeline.bind(device, &slots.map(Slot::Whole))
        };
        let groups = cache.buffers.arenas.iter().map(bind).collect();
        Ok(Kernel { pipeline, tiles: spec.tiles(), in_f16: spec.multiplies_f16(), groups })
    }
}

/// Prefill, ready to run.
#[derive(Debug)]
pub struct PrefillRun {
    case: PrefillCase,
    cache: BenchCache,
    /// Of each copy.
    plans: Vec<(AttentionPlan, ListOffsets)>,
    candidates: Vec<PrefillTuning>,
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

/// Launches of prefill that the device can run, the one that the program uses first.
fn candidates(format: &Format, tier: Tier, tuning: &Tuning) -> Vec<PrefillTuning> {
    let first = tuning.prefill(tier);
    let runs = |tuning: &PrefillTuning| tier == Tier::Cooperative || !matches!(tuning, PrefillTuning::Cooperative(_));
    let others = PrefillTuning::candidates(format).into_iter().filter(runs).filter(|tuning| *tuning != first);
    std::iter::once(first).chain(others).collect()
}

impl PrefillRun {
    /// Makes and fills the cache, plans, and compiles.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn new(
        device: &Device,
        pipelines: &mut PipelineCache,
        case: &PrefillCase,
        settings: &BenchSettings,
    ) -> Result<Self, EngineError> {
        let spec = &case.cache;
        let cache = BenchCache::new(device, spec, settings)?;
        let heads = spec.shape.heads;
        let mut words = Vec::new();
        let plans: Vec<_> = cache.copies.iter().map(|tables| plan(case, tables, &mut words)).collect();
        let mut rng = ChaCha8Rng::seed_from_u64(19);
        let rows = case.n_rows();
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
        let candidates = candidates(&spec.shape.format(spec.codec), device.tier(), pipelines.tuning());
        let [kernel, open] = kernels(device, pipelines, &bound, &cache, spec, candidates[0])?;
        let merge = pipelines.get(device, &merge_states::kernel(&spec.shape))?;
        let [o, ml] = &bound.states;
        let merge_group = merge.bind(device, &[&bound.step, o, ml, &outputs.o, &outputs.lse].map(Slot::Whole));
        let (case, expected) = (case.clone(), BTreeMap::new());
        Ok(Self { case, cache, plans, candidates, kernel, open, merge, merge_group, q, bound, outputs, expected })
    }

    /// The (sequence, row of it, KV head) triples that are compared: the first and the last row, and some between.
    fn samples(&self) -> Vec<(usize, u32, u32)> {
        let (n_rows, rows) = (self.case.n_rows(), self.case.rows as usize);
        let heads = self.case.cache.shape.heads.num_kv_heads;
        let sample = |i: usize| {
            let row = i * (n_rows - 1) / (SAMPLES - 1);
            let in_sequence = u32::try_from(row % rows).expect("less than a sequence's rows");
            (row / rows, in_sequence, u32::try_from(i).expect("a few") % heads)
        };
        (0..SAMPLES).map(sample).collect()
    }

    fn expected(&self, copy: usize, (sequence, r, kv_head): (usize, u32, u32)) -> Expected {
        let heads = self.case.cache.shape.heads;
        let (group, width) = (heads.group_size(), heads.head_dim as usize);
        let (k, v) = self.cache.tokens(copy, sequence, kv_head);
        let of_group = HeadGeometry { num_qo_heads: group, num_kv_heads: 1, head_dim: heads.head_dim };
        let row = sequence * self.case.rows as usize + r as usize;
        let first = row * heads.q_width() as usize + (kv_head * group) as usize * width;
        let q = &self.q[first..first + group as usize * width];
        let n = (self.case.first(sequence) + r + 1) as usize;
        let result = attend(&Context { heads: of_group, k: &k, v: &v }, q, n);
        let bound =
            if self.kernel.in_f16 || self.open.in_f16 { Tolerance::attention_f16 } else { Tolerance::attention };
        Expected {
            row,
            kv_head: kv_head as usize,
            o: result.o,
            absolute: result.absolute,
            lse: result.lse,
            tolerance: bound(n, heads.head_dim, PRODUCT_RMS),
        }
    }
}

/// Of sealed and of open pages.
fn kernels(
    device: &Device,
    pipelines: &mut PipelineCache,
    bound: &Bound,
    cache: &BenchCache,
    spec: &CacheSpec,
    tuning: PrefillTuning,
) -> Result<[Kernel; 2], EngineError> {
    let mut of = |codec| {
        let spec = PrefillSpec::new(spec.shape.format(codec), tuning);
        bound.kernel(device, pipelines, cache, &spec)
    };
    Ok([of(spec.codec)?, of(HiddenCodec::F16)?])
}

impl PrefillCase {
    fn n_rows(&self) -> usize {
        self.cache.contexts.len() * self.rows as usize
    }

    /// Position of a sequence's first row.
    fn first(&self, sequence: usize) -> u32 {
        self.cache.contexts[sequence] - self.rows
    }
}

/// The plan of the last rows of every sequence, whose lists are appended to `words`.
fn plan(case: &PrefillCase, tables: &[PageTable], words: &mut Vec<u32>) -> (AttentionPlan, ListOffsets) {
    let segments: Vec<_> = tables
        .iter()
        .enumerate()
        .zip((0..).step_by(case.rows as usize))
        .map(|((sequence, table), row_lo)| Segment {
            table,
            row_lo,
            n_rows: case.rows,
            first_index: case.first(sequence),
            decode: false,
            attend_below: u32::MAX,
            scores: Vec::new(),
        })
        .collect();
    let plan = AttentionPlan::new(&case.cache.shape, 1, &segments);
    // No page becomes latents, so no key is turned.
    let lists = ListOffsets::write(&plan, &case.cache.shape, 0.0, words);
    (plan, lists)
}

impl KernelRun for PrefillRun {
    fn candidates(&self) -> Vec<String> {
        self.candidates.iter().map(ToString::to_string).collect()
    }

    fn choose(&mut self, device: &Device, pipelines: &mut PipelineCache, candidate: usize) -> Result<(), EngineError> {
        let tuning = self.candidates[candidate];
        let made = kernels(device, pipelines, &self.bound, &self.cache, &self.case.cache, tuning)?;
        [self.kernel, self.open] = made;
        // The bound follows from the kernel.
        self.expected.clear();
        Ok(())
    }

    fn work(&self) -> Work {
        let heads = self.case.cache.shape.heads;
        let sequences = 0..self.case.cache.contexts.len();
        // A row sees what is before it and itself.
        let seen = |row: f64, first: f64| row * first + row * (row + 1.0) / 2.0;
        let seen: f64 = sequences.map(|s| seen(f64::from(self.case.rows), f64::from(self.case.first(s)))).sum();
        let states = self.plans.iter().map(|(plan, _)| plan.n_states).max().unwrap_or(0);
        // States are written and read; queries are read, outputs and their log-sum-exp written.
        let states = 2.0 * f64::from(states) * f64::from(heads.head_dim + 2);
        let rows = self.case.n_rows() as f64 * f64::from(2 * heads.q_width() + heads.num_qo_heads);
        let read = self.cache.work();
        let bytes = read.bytes + (states + rows) * WORD_BYTES as f64;
        // Pairs count once per row, so that codecs compare by what rows read.
        Work { bytes, flop: 4.0 * seen * f64::from(heads.q_width()), pairs: Some(seen * f64::from(heads.num_kv_heads)) }
    }

    fn record(&self, recorder: &mut Recorder<'_>, copy: usize) {
        let (plan, lists) = &self.plans[copy % self.plans.len()];
        let heads = self.case.cache.shape.heads;
        let layer = &plan.plans[0];
        for (at, range) in &layer.prefill {
            let kernel = if at.codec == self.case.cache.codec { &self.kernel } else { &self.open };
            let params = AttentionParams {
                items: lists.prefill + range.start * 3,
                n_items: range.end - range.start,
                layer: 0,
                q_stride: heads.q_width(),
                scale_log2: heads.sm_scale() * std::f32::consts::LOG2_E,
                angles: 0,
            };
            let group = &kernel.groups[usize::from(at.arena)];
            recorder.dispatch(&kernel.pipeline, group, &params, flat_grid(params.n_items * kernel.tiles));
        }
        let (items, n_items) = (lists.merge + layer.merge.start, layer.merge.end - layer.merge.start);
        let params = MergeParams { items, n_items, o_stride: heads.q_width() };
        recorder.dispatch(&self.merge, &self.merge_group, &params, merge_states::grid(&self.case.cache.shape, n_items));
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
        let (sequence, _, kv_head) = self.samples()[0];
        self.cache.spoil(device, (copy % self.plans.len(), sequence, kv_head))
    }
}
