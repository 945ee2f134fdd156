//! Products of many rows, which prompts go through, and of few, which decode rows go through.

use std::sync::Arc;

use half::f16;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::inputs::{copies, n_copies, numbers};
use super::outputs::{filled, poison};
use super::{BenchSettings, Checked, KernelRun, Work};
use crate::device::Device;
use crate::device::staging::{Uploader, download};
use crate::engine::EngineError;
use crate::geometry::{Bytes, F16_BYTES, WORD_BYTES};
use crate::kernels::abi::MatmulParams;
use crate::kernels::matmul::{self, Input, NO_LIST, Output, Product, pack};
use crate::kernels::pipeline::{Pipeline, PipelineCache};
use crate::kernels::product_tuning::{CooperativeRows, ProductTuning};
use crate::kernels::tuning::Tuning;
use crate::kernels::{KernelSpec, Recorder, Slot};
use crate::reference::compare::{Tolerance, nmse};
use crate::weights::Matrix;

/// Outputs that are compared.
const SAMPLES: usize = 4096;

/// `y = x * W^T`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProductSpec {
    /// Rows of x.
    pub rows: u32,
    /// Columns of x.
    pub k: u32,
    /// Columns of y.
    pub cols: u32,
    /// Whether they are decode rows, which go through `matvec`; through `matmul` otherwise.
    pub decode: bool,
}

#[derive(Debug)]
struct Candidate {
    label: String,
    spec: KernelSpec,
    /// Rows and columns of a workgroup.
    tile: [u32; 2],
}

/// A product, ready to run.
#[derive(Debug)]
pub struct ProductRun {
    spec: ProductSpec,
    candidates: Vec<Candidate>,
    chosen: usize,
    pipeline: Arc<Pipeline>,
    /// Of each copy of the weights.
    groups: Vec<wgpu::BindGroup>,
    x: wgpu::Buffer,
    y: wgpu::Buffer,
    w: Vec<wgpu::Buffer>,
    /// `[rows][k]` and `[cols][k]`.
    x_values: Vec<f32>,
    w_values: Vec<f16>,
}

const PRODUCT: Product = Product { input: Input::Plain, output: Output::Replace };

/// Layouts of `matvec`, the one that the program uses first.
fn few(device: &Device, tuning: &Tuning, rows: u32, cols: u32) -> Vec<Candidate> {
    let chosen = tuning.product(&device.summary().kind);
    let mut candidates: Vec<Candidate> = Vec::new();
    for few in std::iter::once(chosen).chain(ProductTuning::candidates()).map(|tuning| tuning.few) {
        let (rows, layout) = (few.rows_for(rows), few.for_cols(cols));
        let spec = PRODUCT.matvec(rows, layout);
        if candidates.iter().all(|known| known.spec != spec) {
            candidates.push(Candidate { label: few.to_string(), spec, tile: [rows, layout.width(rows)] });
        }
    }
    candidates
}

/// Layouts of `matmul` that the device can run, the one that the program uses first.
fn many(device: &Device, tuning: &Tuning) -> Vec<Candidate> {
    let mut candidates = Vec::new();
    if let Some(first) = tuning.cooperative_product(device.tier()) {
        let others = CooperativeRows::ALL.into_iter().filter(|tile| *tile != first);
        candidates.extend(std::iter::once(first).chain(others).map(|tile| Candidate {
            label: tile.to_string(),
            spec: PRODUCT.matmul_coop(tile),
            tile: [tile.rows, tile.cols],
        }));
    }
    let chosen = tuning.product(&device.summary().kind);
    for many in std::iter::once(chosen).chain(ProductTuning::candidates()).map(|tuning| tuning.many) {
        let spec = PRODUCT.matmul(many);
        if candidates.iter().all(|known| known.spec != spec) {
            candidates.push(Candidate { label: many.to_string(), spec, tile: many.size() });
        }
    }
    candidates
}

impl ProductRun {
    /// Makes inputs and compiles.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn new(
        device: &Device,
        pipelines: &mut PipelineCache,
        spec: &ProductSpec,
        settings: &BenchSettings,
    ) -> Result<Self, EngineError> {
        let ProductSpec { rows, k, cols, decode } = *spec;
        let mut rng = ChaCha8Rng::seed_from_u64(23);
        let x_values = numbers(&mut rng, rows as usize * k as usize);
        let w_values: Vec<f16> = numbers(&mut rng, cols as usize * k as usize).into_iter().map(f16::from_f32).collect();
        let mut packed = Vec::new();
        pack(&Matrix::new(cols, k, w_values.clone()), &mut packed);
        let x = filled(device, "x", &x_values)?;
        let y = device.storage("y", Bytes(u64::from(rows) * u64::from(cols) * WORD_BYTES))?;
        let w = copies(device, "weights", &packed, n_copies(packed.len() as u64 * F16_BYTES, settings))?;
        let tuning = pipelines.tuning();
        let candidates = if decode { few(device, tuning, rows, cols) } else { many(device, tuning) };
        let pipeline = pipelines.get(device, &candidates[0].spec)?;
        let mut run =
            Self { spec: *spec, candidates, chosen: 0, pipeline, groups: Vec::new(), x, y, w, x_values, w_values };
        run.bind(device);
        Ok(run)
    }

    fn bind(&mut self, device: &Device) {
        let bind = |w| self.pipeline.bind(device, &[&self.x, w, &self.y].map(Slot::Whole));
        self.groups = self.w.iter().map(bind).collect();
    }
}

impl KernelRun for ProductRun {
    fn candidates(&self) -> Vec<String> {
        self.candidates.iter().map(|candidate| candidate.label.clone()).collect()
    }

    fn choose(&mut self, device: &Device, pipelines: &mut PipelineCache, candidate: usize) -> Result<(), EngineError> {
        self.pipeline = pipelines.get(device, &self.candidates[candidate].spec)?;
        self.chosen = candidate;
        self.bind(device);
        Ok(())
    }

    fn work(&self) -> Work {
        let [rows, k, cols] = [self.spec.rows, self.spec.k, self.spec.cols].map(f64::from);
        Work { bytes: 4.0 * rows * (k + cols) + 2.0 * k * cols, flop: 2.0 * rows * k * cols, pairs: None }
    }

    fn record(&self, recorder: &mut Recorder<'_>, copy: usize) {
        let ProductSpec { rows, k, cols, .. } = self.spec;
        let (cells, list) = (k / 8, NO_LIST);
        let params = MatmulParams { x_row: 0, y_row: 0, n_rows: rows, cols, cells, first_col: 0, list, eps: 0.0 };
        let [tile_rows, tile_cols] = self.candidates[self.chosen].tile;
        let group = &self.groups[copy % self.groups.len()];
        recorder.dispatch(&self.pipeline, group, &params, matmul::grid(&params, tile_rows, tile_cols));
    }

    fn poison(&mut self, device: &Device) -> Result<(), EngineError> {
        Ok(poison(device, &[&self.y])?)
    }

    fn check(&mut self, device: &Device, _copy: usize) -> Result<Checked, EngineError> {
        let (k, cols) = (self.spec.k as usize, self.spec.cols as usize);
        let n = self.spec.rows as usize * cols;
        let y: Vec<f32> = bytemuck::pod_collect_to_vec(&download(device, &self.y, 0, n * size_of::<f32>())?);
        let missing = y.iter().filter(|value| !value.is_finite()).count();
        let (mut got, mut want, mut scale) = (Vec::new(), Vec::new(), Vec::new());
        // A step that shares no factor with powers of two visits all rows and columns.
        for at in (0..n).step_by((n / SAMPLES).max(1) | 1) {
            let (row, col) = (at / cols, at % cols);
            let factors = self.x_values[row * k..(row + 1) * k].iter().zip(&self.w_values[col * k..(col + 1) * k]);
            let products = factors.map(|(x, w)| f64::from(*x) * w.to_f64());
            let (sum, squares) = products.fold((0.0, 0.0), |(s, q), p| (s + p, q + p * p));
            got.push(y[at]);
            want.push(sum);
            scale.push(squares.sqrt());
        }
        let in_f16 = self.candidates[self.chosen].spec.is_cooperative();
        let tolerance = if in_f16 { Tolerance::dot_f16(k) } else { Tolerance::dot(k) };
        let error_over_bound = tolerance.worst(&got, &want, &scale);
        Ok(Checked { compared: got.len(), missing, error_over_bound, nmse: nmse(&got, &want) })
    }

    fn spoil(&mut self, device: &Device, copy: usize) -> Result<(), EngineError> {
        // The first weights of the first columns become 12.6.
        let garbage = vec![0x4A_u8; 1 << 12];
        let w = &self.w[copy % self.w.len()];
        Ok(Uploader::new(device, "spoiled weights", Bytes(1 << 12))?.upload(device, &garbage, w, 0)?)
    }
}
