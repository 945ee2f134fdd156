//! What decode and prefill have in common as they are measured: the last rows of every sequence against its whole cache, the merge
//! of their states, and dense attention in f64 over what the cache's pages hold.

use std::collections::BTreeMap;
use std::sync::Arc;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::cache::{BenchCache, CacheSpec};
use super::outputs::{Expected, Outputs, filled, poison};
use super::{BenchSettings, Checked};
use crate::device::Device;
use crate::engine::EngineError;
use crate::geometry::{Bytes, HeadGeometry, WORD_BYTES};
use crate::kernels::abi::{AttentionParams, MergeParams};
use crate::kernels::executor::ListOffsets;
use crate::kernels::pipeline::{Pipeline, PipelineCache};
use crate::kernels::plan::{AttentionPlan, Dispatch, Segment};
use crate::kernels::tuning::Operands;
use crate::kernels::{KernelSpec, Recorder, Slot, flat_grid, merge_states};
use crate::pool::page_table::PageTable;
use crate::reference::attention::{Context, attend};
use crate::reference::compare::Tolerance;

/// Root mean square of the products of queries and keys, each of which has a mean square of 4/3.
const PRODUCT_RMS: f64 = 4.0 / 3.0;

/// Rows of sequences that attend.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Rows {
    /// The cache, these rows included.
    pub(super) cache: CacheSpec,
    /// Rows of each sequence: its last ones. Where pages are sealed they lie in the last page, which they read open.
    pub(super) rows: u32,
    /// Whether they go through decode, one row a sequence, or prefill.
    pub(super) decode: bool,
}

impl Rows {
    pub(super) fn n_rows(&self) -> usize {
        self.cache.contexts.len() * self.rows as usize
    }

    /// Position of a sequence's first row.
    pub(super) fn first(&self, sequence: usize) -> u32 {
        self.cache.contexts[sequence] - self.rows
    }

    /// The plan, whose lists are appended to `words`.
    fn plan(&self, tables: &[PageTable], words: &mut Vec<u32>) -> (AttentionPlan, ListOffsets) {
        let segments: Vec<_> = tables
            .iter()
            .enumerate()
            .zip((0..).step_by(self.rows as usize))
            .map(|((sequence, table), row_lo)| Segment {
                table,
                row_lo,
                n_rows: self.rows,
                first_index: self.first(sequence),
                decode: self.decode,
                attend_below: u32::MAX,
                scores: Vec::new(),
            })
            .collect();
        let plan = AttentionPlan::new(&self.cache.shape, 1, &segments);
        // No page becomes latents, so no key is turned.
        let lists = ListOffsets::write(&plan, &self.cache.shape, 0.0, words);
        (plan, lists)
    }
}

/// A compiled attention kernel, with one bind group per arena.
#[derive(Debug)]
pub(super) struct Kernel {
    pipeline: Arc<Pipeline>,
    groups: Vec<wgpu::BindGroup>,
}

/// A row that is compared: its sequence, its place among the sequence's rows, and a KV head.
type Sample = (usize, u32, u32);

/// Everything that runs need besides the attention kernels.
#[derive(Debug)]
pub(super) struct Attention {
    pub(super) rows: Rows,
    pub(super) cache: BenchCache,
    /// Of each copy.
    pub(super) plans: Vec<(AttentionPlan, ListOffsets)>,
    step: wgpu::Buffer,
    /// `[rows][num_qo_heads][head_dim]`.
    q: Vec<f32>,
    q_there: wgpu::Buffer,
    /// `[state][head_dim]`, and `[state]` (m, l).
    states: [wgpu::Buffer; 2],
    parameters: wgpu::Buffer,
    merge: Arc<Pipeline>,
    merge_group: wgpu::BindGroup,
    outputs: Outputs,
    n_samples: usize,
    /// Of copies that were checked before.
    expected: BTreeMap<usize, Vec<Expected>>,
}

impl Attention {
    /// Makes and fills the cache, plans, and compiles the merge; of the rows, `n_samples` will be compared.
    pub(super) fn new(
        device: &Device,
        pipelines: &mut PipelineCache,
        rows: Rows,
        (seed, n_samples): (u64, usize),
        settings: &BenchSettings,
    ) -> Result<Self, EngineError> {
        let spec = &rows.cache;
        let heads = spec.shape.heads;
        let cache = BenchCache::new(device, spec, settings)?;
        let mut words = Vec::new();
        let plans: Vec<_> = cache.copies.iter().map(|tables| rows.plan(tables, &mut words)).collect();
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let n = rows.n_rows() * heads.q_width() as usize;
        let q: Vec<f32> = (0..n).map(|_| rng.random_range(-2.0_f32..2.0)).collect();
        let n_states = plans.iter().map(|(plan, _)| u64::from(plan.n_states)).max().unwrap_or(0);
        let step = filled(device, "step", &words)?;
        let o = device.storage("attention states", Bytes(n_states * u64::from(heads.head_dim) * WORD_BYTES))?;
        let ml = device.storage("attention state maxima", Bytes(n_states * 2 * WORD_BYTES))?;
        let outputs = Outputs::new(device, heads, rows.n_rows())?;
        let merge = pipelines.get(device, &merge_states::kernel(&spec.shape))?;
        let merge_group = merge.bind(device, &[&step, &o, &ml, &outputs.o, &outputs.lse].map(Slot::Whole));
        Ok(Self {
            q_there: filled(device, "q", &q)?,
            parameters: device.storage("codec parameters", Bytes(16))?,
            states: [o, ml],
            expected: BTreeMap::new(),
            rows,
            cache,
            plans,
            step,
            q,
            merge,
            merge_group,
            outputs,
            n_samples,
        })
    }

    /// Compiles and binds a kernel.
    pub(super) fn kernel(
        &self,
        device: &Device,
        pipelines: &mut PipelineCache,
        spec: &KernelSpec,
    ) -> Result<Kernel, EngineError> {
        let pipeline = pipelines.get(device, spec)?;
        let [o, ml] = &self.states;
        let bind = |arena| {
            let slots = [&self.step, &self.cache.buffers.tables, arena, &self.q_there, o, ml, &self.parameters];
            pipeline.bind(device, &slots.map(Slot::Whole))
        };
        let groups = self.cache.buffers.arenas.iter().map(bind).collect();
        Ok(Kernel { pipeline, groups })
    }

    /// Bytes of states, written and read, of queries, and of outputs with their log-sum-exp.
    pub(super) fn row_bytes(&self) -> f64 {
        let heads = self.rows.cache.shape.heads;
        let states = self.plans.iter().map(|(plan, _)| plan.n_states).max().unwrap_or(0);
        let states = 2.0 * f64::from(states) * f64::from(heads.head_dim + 2);
        let rows = self.rows.n_rows() as f64 * f64::from(2 * heads.q_width() + heads.num_qo_heads);
        (states + rows) * WORD_BYTES as f64
    }

    /// One dispatch: items of `vec4s` vec4 each in the list that begins at `list`, `tiles` workgroups an item.
    pub(super) fn dispatch(
        &self,
        recorder: &mut Recorder<'_>,
        kernel: &Kernel,
        (list, vec4s, tiles): (u32, u32, u32),
        (at, range): &Dispatch,
    ) {
        let heads = self.rows.cache.shape.heads;
        let params = AttentionParams {
            items: list + range.start * vec4s,
            n_items: range.end - range.start,
            layer: 0,
            q_stride: heads.q_width(),
            scale_log2: heads.sm_scale() * std::f32::consts::LOG2_E,
            angles: 0,
        };
        let group = &kernel.groups[usize::from(at.arena)];
        recorder.dispatch(&kernel.pipeline, group, &params, flat_grid(params.n_items * tiles));
    }

    /// The merge of a copy's states.
    pub(super) fn merge(&self, recorder: &mut Recorder<'_>, (plan, lists): &(AttentionPlan, ListOffsets)) {
        let (shape, range) = (&self.rows.cache.shape, &plan.plans[0].merge);
        let (items, n_items) = (lists.merge + range.start, range.end - range.start);
        let params = MergeParams { items, n_items, o_stride: shape.heads.q_width() };
        recorder.dispatch(&self.merge, &self.merge_group, &params, merge_states::grid(shape, n_items));
    }

    pub(super) fn poison(&mut self, device: &Device) -> Result<(), EngineError> {
        let [o, ml] = &self.states;
        poison(device, &[o, ml])?;
        Ok(self.outputs.poison(device)?)
    }

    /// Compares what the last run left; given what a kernel multiplied.
    pub(super) fn check(&mut self, device: &Device, copy: usize, operands: Operands) -> Result<Checked, EngineError> {
        let copy = copy % self.plans.len();
        if !self.expected.contains_key(&copy) {
            let samples = self.samples();
            let expected = samples.into_par_iter().map(|sample| self.expected(copy, sample, operands)).collect();
            self.expected.insert(copy, expected);
        }
        Ok(self.outputs.check(device, &self.expected[&copy])?)
    }

    /// The reference is computed again at the next check: its bound follows from the kernel.
    pub(super) fn forget(&mut self) {
        self.expected.clear();
    }

    pub(super) fn spoil(&mut self, device: &Device, copy: usize) -> Result<(), EngineError> {
        let (sequence, _, kv_head) = self.samples()[0];
        self.cache.spoil(device, (copy % self.plans.len(), sequence, kv_head))
    }

    /// The first and the last row, and some between, over the KV heads in strides that leave out neighbours.
    fn samples(&self) -> Vec<Sample> {
        let (n_rows, rows) = (self.rows.n_rows(), self.rows.rows as usize);
        let heads = self.rows.cache.shape.heads.num_kv_heads;
        let sample = |i: usize| {
            let row = i * (n_rows - 1) / (self.n_samples - 1);
            let in_sequence = u32::try_from(row % rows).expect("less than a sequence's rows");
            (row / rows, in_sequence, 5 * u32::try_from(i).expect("a few") % heads)
        };
        let mut samples: Vec<_> = (0..self.n_samples).map(sample).collect();
        samples.sort_unstable();
        samples.dedup();
        samples
    }

    fn expected(&self, copy: usize, (sequence, r, kv_head): Sample, operands: Operands) -> Expected {
        let heads = self.rows.cache.shape.heads;
        let (group, width) = (heads.group_size(), heads.head_dim as usize);
        let (k, v) = self.cache.tokens(copy, sequence, kv_head);
        let of_group = HeadGeometry { num_qo_heads: group, num_kv_heads: 1, head_dim: heads.head_dim };
        let row = sequence * self.rows.rows as usize + r as usize;
        let first = row * heads.q_width() as usize + (kv_head * group) as usize * width;
        let q = &self.q[first..first + group as usize * width];
        let n = (self.rows.first(sequence) + r + 1) as usize;
        let result = attend(&Context { heads: of_group, k: &k, v: &v }, q, n);
        Expected {
            row,
            kv_head: kv_head as usize,
            o: result.o,
            absolute: result.absolute,
            lse: result.lse,
            tolerance: tolerance(operands)(n, heads.head_dim, PRODUCT_RMS),
        }
    }
}

/// How far attention may be from f64, given what its kernel multiplies: by tokens, channels and root mean square of products.
pub fn tolerance(operands: Operands) -> fn(usize, u32, f64) -> Tolerance {
    match operands {
        Operands::Full => Tolerance::attention,
        Operands::Half => Tolerance::attention_f16,
        Operands::Digits => Tolerance::attention_digits,
    }
}
