//! `merge_states` by itself: states of decode rows over long contexts, joined.

use std::sync::Arc;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::outputs::{Expected, Outputs, filled};
use super::{BenchSettings, Checked, KernelRun, Work};
use crate::device::Device;
use crate::device::staging::Uploader;
use crate::engine::EngineError;
use crate::geometry::{Bytes, WORD_BYTES};
use crate::kernels::abi::{MergeItem, MergeParams};
use crate::kernels::attention::CacheShape;
use crate::kernels::pipeline::{Pipeline, PipelineCache};
use crate::kernels::{Recorder, Slot, merge_states};
use crate::reference::compare::Tolerance;

/// Rows that are compared at most.
const SAMPLES: usize = 4;
/// Tokens that a state stands for: the largest possible sum of its probabilities.
const TOKENS: f32 = 512.0;

/// What is merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MergeSpec {
    /// Heads; pages do not matter.
    pub shape: CacheShape,
    /// Rows.
    pub rows: u32,
    /// States of each (row, query head).
    pub states: u32,
}

/// Merging, ready to run.
#[derive(Debug)]
pub struct MergeRun {
    spec: MergeSpec,
    pipeline: Arc<Pipeline>,
    /// Of each copy of the states.
    groups: Vec<wgpu::BindGroup>,
    copies: Vec<[wgpu::Buffer; 2]>,
    /// `[state][head_dim]` and `[state]` (m, l), where state = `[row][KV head][split][query head of the group]`.
    o: Vec<f32>,
    ml: Vec<[f32; 2]>,
    outputs: Outputs,
}

impl MergeSpec {
    fn n_items(&self) -> u32 {
        self.rows * self.shape.heads.num_kv_heads
    }

    fn n_states(&self) -> u32 {
        self.rows * self.shape.heads.num_qo_heads * self.states
    }
}

impl MergeRun {
    /// Makes the states and compiles.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn new(
        device: &Device,
        pipelines: &mut PipelineCache,
        spec: &MergeSpec,
        settings: &BenchSettings,
    ) -> Result<Self, EngineError> {
        let heads = spec.shape.heads;
        let (n, stride) = (spec.n_states(), heads.group_size());
        let mut rng = ChaCha8Rng::seed_from_u64(17);
        let ml: Vec<[f32; 2]> =
            (0..n).map(|_| [rng.random_range(4.0_f32..8.0), rng.random_range(1.0..TOKENS)]).collect();
        let o: Vec<f32> = (0..n * heads.head_dim).map(|_| rng.random_range(-40.0_f32..40.0)).collect();
        let item = |q_row| {
            let state_lo = q_row * spec.states * stride;
            MergeItem { q_row, state_lo, n_states: spec.states, stride }
        };
        let items: Vec<MergeItem> = (0..spec.n_items()).map(item).collect();
        let step = filled(device, "step", &items)?;
        let bytes = (o.len() + ml.len() * 2) as u64 * WORD_BYTES;
        let mut copies = Vec::new();
        for _ in 0..settings.cold.0.div_ceil(bytes).max(1) {
            copies.push([filled(device, "attention states", &o)?, filled(device, "attention state maxima", &ml)?]);
        }
        let outputs = Outputs::new(device, heads, spec.rows as usize)?;
        let pipeline = pipelines.get(device, &merge_states::kernel(&spec.shape))?;
        let bind = |[o, ml]: &[wgpu::Buffer; 2]| {
            pipeline.bind(device, &[&step, o, ml, &outputs.o, &outputs.lse].map(Slot::Whole))
        };
        let groups = copies.iter().map(bind).collect();
        Ok(Self { spec: *spec, pipeline, groups, copies, o, ml, outputs })
    }

    /// The query heads of one (row, KV head) in f64.
    fn expected(&self, row: u32, kv_head: u32) -> Expected {
        let heads = self.spec.shape.heads;
        let (group, width) = (heads.group_size(), heads.head_dim as usize);
        let first = (row * heads.num_kv_heads + kv_head) * self.spec.states * group;
        let (mut o, mut absolute, mut lse) = (Vec::new(), Vec::new(), Vec::new());
        for head in 0..group {
            let states = (0..self.spec.states).map(|i| (first + i * group + head) as usize);
            let of = |state: usize| self.ml[state].map(f64::from);
            let m = states.clone().map(|s| of(s)[0]).fold(f64::NEG_INFINITY, f64::max);
            let l: f64 = states.clone().map(|s| (of(s)[0] - m).exp2() * of(s)[1]).sum();
            lse.push(m + l.log2());
            let (mut sum, mut magnitude) = (vec![0.0; width], vec![0.0; width]);
            for s in states {
                let weight = (of(s)[0] - m).exp2() / l;
                for (channel, x) in self.o[s * width..(s + 1) * width].iter().enumerate() {
                    sum[channel] += weight * f64::from(*x);
                    magnitude[channel] += weight * f64::from(x.abs());
                }
            }
            o.extend(sum);
            absolute.extend(magnitude);
        }
        let (row, kv_head) = (row as usize, kv_head as usize);
        // No scores: what is left are `exp2`, the joining of states and a sum of so many.
        let tolerance = Tolerance::attention(self.spec.states as usize, heads.head_dim, 0.0);
        Expected { row, kv_head, o, absolute, lse, tolerance }
    }
}

impl KernelRun for MergeRun {
    fn work(&self) -> Work {
        let heads = self.spec.shape.heads;
        let (states, width) = (f64::from(self.spec.n_states()), f64::from(heads.head_dim));
        let rows = f64::from(self.spec.rows) * f64::from(heads.num_qo_heads) * (width + 1.0);
        Work { bytes: (states * (width + 2.0) + rows) * WORD_BYTES as f64, flop: 2.0 * states * width, pairs: None }
    }

    fn record(&self, recorder: &mut Recorder<'_>, copy: usize) {
        let n_items = self.spec.n_items();
        let params = MergeParams { items: 0, n_items, o_stride: self.spec.shape.heads.q_width() };
        let group = &self.groups[copy % self.groups.len()];
        recorder.dispatch(&self.pipeline, group, &params, merge_states::grid(&self.spec.shape, n_items));
    }

    fn poison(&mut self, device: &Device) -> Result<(), EngineError> {
        Ok(self.outputs.poison(device)?)
    }

    fn check(&mut self, device: &Device, _copy: usize) -> Result<Checked, EngineError> {
        let (rows, heads) = (self.spec.rows as usize, self.spec.shape.heads.num_kv_heads);
        let step = rows.div_ceil(SAMPLES).max(1);
        let sampled = (0..self.spec.rows).step_by(step);
        let expected: Vec<_> = sampled.zip((0..heads).cycle()).map(|(row, head)| self.expected(row, head)).collect();
        Ok(self.outputs.check(device, &expected)?)
    }

    fn spoil(&mut self, device: &Device, copy: usize) -> Result<(), EngineError> {
        let [_, ml] = &self.copies[copy % self.copies.len()];
        let mut uploader = Uploader::new(device, "spoiled state", Bytes(16))?;
        Ok(uploader.upload(device, bytemuck::cast_slice(&[12.0_f32, 1.0]), ml, 0)?)
    }
}
