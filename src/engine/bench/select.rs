//! Select: which tokens of a list stay, by their scores.

use std::sync::Arc;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::inputs::{copies, n_copies, targets};
use super::outputs::{filled, poison};
use super::{BenchSettings, Checked, KernelRun, Work};
use crate::compression::keep::{self, Domain};
use crate::device::Device;
use crate::device::staging::{Uploader, download};
use crate::engine::EngineError;
use crate::geometry::{Bytes, WORD_BYTES};
use crate::kernels::abi::{SelectItem, SelectList, SelectParams};
use crate::kernels::pipeline::{Pipeline, PipelineCache};
use crate::kernels::{Recorder, Slot, flat_grid, select};

/// Lists that are compared.
const SAMPLES: usize = 8;
/// First and last tokens that always stay.
const SINK: u32 = 4;
const RECENT: u32 = 32;

/// What is selected among: lists that decide each by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SelectSpec {
    /// Lists.
    pub lists: u32,
    /// Tokens of each.
    pub tokens: u32,
    /// Of these stay.
    pub kept: u32,
}

/// Selecting, ready to run.
#[derive(Debug)]
pub struct SelectRun {
    spec: SelectSpec,
    pipeline: Arc<Pipeline>,
    /// Of each copy.
    groups: Vec<wgpu::BindGroup>,
    scores: Vec<wgpu::Buffer>,
    kept: Vec<wgpu::Buffer>,
    counts: wgpu::Buffer,
    /// `[list][token]`.
    values: Vec<f32>,
}

impl SelectRun {
    /// Makes scores and compiles.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn new(
        device: &Device,
        pipelines: &mut PipelineCache,
        spec: &SelectSpec,
        settings: &BenchSettings,
    ) -> Result<Self, EngineError> {
        let SelectSpec { lists, tokens, kept: total } = *spec;
        let mut rng = ChaCha8Rng::seed_from_u64(43);
        // Most tokens receive little; rounding leaves some that receive the same.
        let score = |x: f32| (x.powi(8) * 4096.0).round() / 4096.0;
        let values: Vec<f32> = (0..lists * tokens).map(|_| score(rng.random_range(0.0_f32..1.0))).collect();
        let mut words: Vec<u32> = Vec::new();
        for list in 0..lists {
            let lists = lists * 2 + list;
            let item = SelectItem { lists, n_lists: 1, total, floor: 0, sink: SINK, recent: RECENT, pad: [0; 2] };
            words.extend_from_slice(bytemuck::cast_slice(&[item]));
        }
        for list in 0..lists {
            let list = SelectList { list, n_tokens: tokens, at: list * tokens, pad: 0 };
            words.extend_from_slice(bytemuck::cast_slice(&[list]));
        }
        let step = filled(device, "step", &words)?;
        let bytes = Bytes(values.len() as u64 * WORD_BYTES).align_up(16);
        let n = n_copies(2 * bytes.0, settings);
        let scores = copies(device, "decided scores", &values, n)?;
        let kept = targets(device, "kept indices", bytes, n)?;
        let counts = device.storage("kept counts", Bytes(u64::from(lists) * WORD_BYTES).align_up(16))?;
        let pipeline = pipelines.get(device, &select::select())?;
        let bind = |(scores, kept)| pipeline.bind(device, &[&step, scores, kept, &counts].map(Slot::Whole));
        let groups = scores.iter().zip(&kept).map(bind).collect();
        Ok(Self { spec: *spec, pipeline, groups, scores, kept, counts, values })
    }

    /// Indices of a list that stay, by definition.
    fn expected(&self, list: u32) -> Vec<u32> {
        let SelectSpec { tokens, kept: total, .. } = self.spec;
        let scores = &self.values[(list * tokens) as usize..][..tokens as usize];
        let domain = Domain { lists: vec![list], total, floor: 0, sink: SINK, recent: RECENT };
        keep::select(&domain, &[scores]).concat()
    }
}

impl KernelRun for SelectRun {
    fn work(&self) -> Work {
        let SelectSpec { lists, tokens, kept } = self.spec;
        Work { bytes: f64::from(lists) * f64::from(tokens + kept) * WORD_BYTES as f64, flop: 0.0, pairs: None }
    }

    fn record(&self, recorder: &mut Recorder<'_>, copy: usize) {
        let params = SelectParams { items: 0, n_items: self.spec.lists };
        recorder.dispatch(&self.pipeline, &self.groups[copy % self.groups.len()], &params, flat_grid(params.n_items));
    }

    fn poison(&mut self, device: &Device) -> Result<(), EngineError> {
        let all: Vec<_> = self.kept.iter().chain([&self.counts]).collect();
        Ok(poison(device, &all)?)
    }

    fn check(&mut self, device: &Device, copy: usize) -> Result<Checked, EngineError> {
        let SelectSpec { lists, tokens, kept } = self.spec;
        let words = |buffer, at: u64, n: u32| -> Result<Vec<u32>, EngineError> {
            Ok(bytemuck::pod_collect_to_vec(&download(device, buffer, at, n as usize * size_of::<u32>())?))
        };
        let counts = words(&self.counts, 0, lists)?;
        let missing = counts.iter().filter(|count| **count != kept).count();
        let (mut compared, mut wrong) = (0, 0);
        for list in (0..lists).step_by((lists as usize / SAMPLES).max(1)) {
            let at = u64::from(list) * u64::from(tokens) * WORD_BYTES;
            let indices = words(&self.kept[copy % self.kept.len()], at, kept)?;
            compared += indices.len();
            wrong += usize::from(indices != self.expected(list));
        }
        // The choice is exact, ties included.
        let error_over_bound = if wrong == 0 { 0.0 } else { f64::INFINITY };
        Ok(Checked { compared, missing, error_over_bound, nmse: 0.0 })
    }

    fn spoil(&mut self, device: &Device, copy: usize) -> Result<(), EngineError> {
        let largest = [f32::MAX; 64];
        let scores = &self.scores[copy % self.scores.len()];
        let at = u64::from(SINK) * WORD_BYTES;
        let mut uploader = Uploader::new(device, "spoiled scores", Bytes(256))?;
        Ok(uploader.upload(device, bytemuck::cast_slice(&largest), scores, at)?)
    }
}
