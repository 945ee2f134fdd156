//! Products of few rows: weights are read once, and nearly nothing else.

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
use crate::kernels::product_tuning::{FewRows, ProductTuning};
use crate::kernels::{Recorder, Slot};
use crate::reference::compare::{Tolerance, nmse};
use crate::weights::Matrix;

/// Outputs that are compared.
const SAMPLES: usize = 4096;

/// `y = x * W^T`, few rows at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MatvecSpec {
    /// Rows of x.
    pub rows: u32,
    /// Columns of x.
    pub k: u32,
    /// Columns of y.
    pub cols: u32,
}

/// A product of few rows, ready to run.
#[derive(Debug)]
pub struct MatvecRun {
    spec: MatvecSpec,
    candidates: Vec<FewRows>,
    tuning: FewRows,
    pipeline: Arc<Pipeline>,
    /// Of each copy of the weights.
    groups: Vec<wgpu::BindGroup>,
    x: wgpu::Buffer,
    y: wgpu::Buffer,
    w: Vec<wgpu::Buffer>,
    /// `[rows][k]` and `[cols][k]`.
    x_values: Vec<f32>,
    matrix: Matrix,
}

const PRODUCT: Product = Product { input: Input::Plain, output: Output::Replace };

/// Layouts, the one that the program uses first.
fn candidates(chosen: FewRows) -> Vec<FewRows> {
    let mut all = vec![chosen];
    for other in ProductTuning::candidates().into_iter().map(|tuning| tuning.few) {
        if !all.contains(&other) {
            all.push(other);
        }
    }
    all
}

impl MatvecRun {
    /// Makes inputs and compiles.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn new(
        device: &Device,
        pipelines: &mut PipelineCache,
        spec: &MatvecSpec,
        settings: &BenchSettings,
    ) -> Result<Self, EngineError> {
        let MatvecSpec { rows, k, cols } = *spec;
        let mut rng = ChaCha8Rng::seed_from_u64(23);
        let x_values = numbers(&mut rng, rows as usize * k as usize);
        let weights = numbers(&mut rng, cols as usize * k as usize).into_iter().map(f16::from_f32).collect();
        let matrix = Matrix::new(cols, k, weights);
        let mut packed = Vec::new();
        pack(&matrix, &mut packed);
        let n = n_copies(packed.len() as u64 * F16_BYTES, settings);
        let w = copies(device, "weights", &packed, n)?;
        let x = filled(device, "x", &x_values)?;
        let y = device.storage("y", Bytes(u64::from(rows) * u64::from(cols) * WORD_BYTES).align_up(16))?;
        let candidates = candidates(pipelines.tuning().product(&device.summary().kind).few);
        let tuning = candidates[0];
        let pipeline = pipelines.get(device, &PRODUCT.matvec(tuning.rows_for(rows), tuning))?;
        let (spec, groups) = (*spec, Vec::new());
        let mut run = Self { spec, candidates, tuning, pipeline, groups, x, y, w, x_values, matrix };
        run.bind(device);
        Ok(run)
    }

    fn bind(&mut self, device: &Device) {
        let bind = |w| self.pipeline.bind(device, &[&self.x, w, &self.y].map(Slot::Whole));
        self.groups = self.w.iter().map(bind).collect();
    }
}

impl KernelRun for MatvecRun {
    fn candidates(&self) -> Vec<String> {
        let label =
            |few: &FewRows| format!("{}x{}x{}:{}:{}", few.cols, few.column_lanes, few.slices, few.loads, few.max_rows);
        self.candidates.iter().map(label).collect()
    }

    fn choose(&mut self, device: &Device, pipelines: &mut PipelineCache, candidate: usize) -> Result<(), EngineError> {
        self.tuning = self.candidates[candidate];
        let rows = self.tuning.rows_for(self.spec.rows);
        self.pipeline = pipelines.get(device, &PRODUCT.matvec(rows, self.tuning))?;
        self.bind(device);
        Ok(())
    }

    fn work(&self) -> Work {
        let [rows, k, cols] = [self.spec.rows, self.spec.k, self.spec.cols].map(f64::from);
        Work { bytes: 4.0 * rows * (k + cols) + 2.0 * k * cols, flop: 2.0 * rows * k * cols, pairs: None }
    }

    fn record(&self, recorder: &mut Recorder<'_>, copy: usize) {
        let MatvecSpec { rows, k, cols } = self.spec;
        let (cells, list) = (k / 8, NO_LIST);
        let params = MatmulParams { x_row: 0, y_row: 0, n_rows: rows, cols, cells, first_col: 0, list, eps: 0.0 };
        let grid = matmul::grid(&params, self.tuning.rows_for(rows), self.tuning.width());
        recorder.dispatch(&self.pipeline, &self.groups[copy % self.groups.len()], &params, grid);
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
        // An odd step visits all rows and columns of sizes that are powers of two.
        for at in (0..n).step_by((n / SAMPLES).max(1) | 1) {
            let (row, col) = (at / cols, at % cols);
            let weights = &self.matrix.data[col * k..(col + 1) * k];
            let products = self.x_values[row * k..(row + 1) * k].iter().zip(weights);
            let products = products.map(|(x, w)| f64::from(*x) * w.to_f64());
            let (sum, squares) = products.fold((0.0, 0.0), |(s, q), p| (s + p, q + p * p));
            got.push(y[at]);
            want.push(sum);
            scale.push(squares.sqrt());
        }
        let error_over_bound = Tolerance::dot(k).worst(&got, &want, &scale);
        Ok(Checked { compared: got.len(), missing, error_over_bound, nmse: nmse(&got, &want) })
    }

    fn spoil(&mut self, device: &Device, copy: usize) -> Result<(), EngineError> {
        // The first weights of the first columns become 12.6.
        let garbage = vec![0x4A_u8; 1 << 10];
        let w = &self.w[copy % self.w.len()];
        Ok(Uploader::new(device, "spoiled weights", Bytes(1 << 10))?.upload(device, &garbage, w, 0)?)
    }
}
