//! The transformer's forward pass as pipelines and bind groups, made once and recorded per step.

use std::sync::Arc;

use super::scratch::Scratch;
use super::weights::{DeviceMatrix, DeviceWeights};
use crate::device::Device;
use crate::geometry::ModelGeometry;
use crate::kernels::abi::{EmbedParams, GatedActivationParams, MatmulParams, RmsNormParams, RopeParams, SampleParams};
use crate::kernels::matmul::{self, Output};
use crate::kernels::{KernelError, Pipeline, PipelineCache, Recorder, Slot, elementwise, flat_grid, sample};

/// A kernel with its buffers.
#[derive(Debug)]
struct Bound {
    pipeline: Arc<Pipeline>,
    group: wgpu::BindGroup,
}

impl Bound {
    fn new(device: &Device, pipeline: &Arc<Pipeline>, slots: &[&wgpu::Buffer]) -> Self {
        let slots: Vec<_> = slots.iter().map(|b| Slot::Whole(b)).collect();
        Self { pipeline: Arc::clone(pipeline), group: pipeline.bind(device, &slots) }
    }

    fn dispatch<I: bytemuck::Pod>(&self, recorder: &mut Recorder<'_>, params: &I, grid: [u32; 3]) {
        recorder.dispatch(&self.pipeline, &self.group, params, grid);
    }
}

/// Rows of a step: decode rows first, then prompt rows, those that stop below a layer last.
#[derive(Clone, Copy, Debug)]
pub(super) struct RowCounts {
    pub(super) decode: u32,
    /// Rows that are computed whole in the layer at hand.
    pub(super) active: u32,
    pub(super) all: u32,
}

/// A matrix product in its three forms.
#[derive(Debug)]
struct Linear {
    one: Bound,
    four: Bound,
    many: Bound,
    cols: u32,
    cells: u32,
}

impl Linear {
    const fn params(&self, first: u32, n_rows: u32, first_col: u32) -> MatmulParams {
        MatmulParams { x_row: first, y_row: first, n_rows, cols: self.cols, cells: self.cells, first_col }
    }

    /// Few rows: one workgroup row each, or four to a workgroup.
    fn few(&self, recorder: &mut Recorder<'_>, first: u32, n_rows: u32) {
        let params = self.params(first, n_rows, 0);
        if n_rows == 1 {
            self.one.dispatch(recorder, &params, matmul::grid(&params, 1));
        } else {
            self.four.dispatch(recorder, &params, matmul::grid(&params, 4));
        }
    }

    fn many(&self, recorder: &mut Recorder<'_>, first: u32, n_rows: u32) {
        self.many_from(recorder, first, n_rows, 0);
    }

    /// Outputs from `first_col` on.
    fn many_from(&self, recorder: &mut Recorder<'_>, first: u32, n_rows: u32, first_col: u32) {
        let params = self.params(first, n_rows, first_col);
        self.many.dispatch(recorder, &params, matmul::grid(&params, matmul::TILE_ROWS));
    }

    /// Decode rows through `matvec`, prompt rows through `matmul`, whatever else is in the step.
    fn rows(&self, recorder: &mut Recorder<'_>, rows: RowCounts) {
        self.few(recorder, 0, rows.decode);
        self.many(recorder, rows.decode, rows.active - rows.decode);
    }
}

#[derive(Debug)]
struct Layer {
    attention_norm: Bound,
    qkv: Linear,
    attention_output: Linear,
    ffn_norm: Bound,
    gate_up: Linear,
    down: Linear,
}

/// The forward pass around attention.
#[derive(Debug)]
pub(super) struct Layers {
    geometry: ModelGeometry,
    embed: Bound,
    rope: Bound,
    activate: Bound,
    layers: Vec<Layer>,
    output_norm: Bound,
    output: Linear,
    sample: Bound,
}

struct Builder<'a> {
    device: &'a Device,
    cache: &'a mut PipelineCache,
}

impl Builder<'_> {
    fn linear(
        &mut self,
        x: &wgpu::Buffer,
        w: &DeviceMatrix,
        y: &wgpu::Buffer,
        output: Output,
    ) -> Result<Linear, KernelError> {
        let mut bound = |spec| -> Result<Bound, KernelError> {
            Ok(Bound::new(self.device, &self.cache.get(self.device, &spec)?, &[x, &w.buffer, y]))
        };
        Ok(Linear {
            one: bound(matmul::matvec(output, 1))?,
            four: bound(matmul::matvec(output, 4))?,
            many: bound(matmul::matmul(output))?,
            cols: w.rows,
            cells: w.cols / 8,
        })
    }
}

impl Layers {
    pub(super) fn new(
        device: &Device,
        cache: &mut PipelineCache,
        geometry: &ModelGeometry,
        weights: &DeviceWeights,
        s: &Scratch,
    ) -> Result<Self, KernelError> {
        let embed = cache.get(device, &elementwise::embed())?;
        let norm = cache.get(device, &elementwise::rms_norm(device.tier()))?;
        let rope = cache.get(device, &elementwise::rope())?;
        let activate = cache.get(device, &elementwise::gated_activation())?;
        let sample = cache.get(device, &sample::kernel(device.tier()))?;
        let mut build = Builder { device, cache };
        let mut layers = Vec::with_capacity(weights.layers.len());
        for w in &weights.layers {
            layers.push(Layer {
                attention_norm: Bound::new(device, &norm, &[&s.step, &s.x, &w.attention_norm, &s.h]),
                qkv: build.linear(&s.h, &w.qkv, &s.qkv, Output::Replace)?,
                attention_output: build.linear(&s.attention, &w.attention_output, &s.x, Output::Accumulate)?,
                ffn_norm: Bound::new(device, &norm, &[&s.step, &s.x, &w.ffn_norm, &s.h]),
                gate_up: build.linear(&s.h, &w.gate_up, &s.gate_up, Output::Replace)?,
                down: build.linear(&s.activated, &w.down, &s.x, Output::Accumulate)?,
            });
        }
        Ok(Self {
            geometry: geometry.clone(),
            embed: Bound::new(device, &embed, &[&s.step, &weights.embedding.buffer, &s.x]),
            rope: Bound::new(device, &rope, &[&s.step, &s.qkv]),
            activate: Bound::new(device, &activate, &[&s.gate_up, &s.activated]),
            layers,
            output_norm: Bound::new(device, &norm, &[&s.step, &s.x, &weights.output_norm, &s.h]),
            output: build.linear(&s.h, weights.output_matrix(), &s.logits, Output::Replace)?,
            sample: Bound::new(device, &sample, &[&s.step, &s.logits, &s.tokens]),
        })
    }

    /// `x = embedding[tokens]`; `tokens` is the first word of the token list.
    pub(super) fn embed(&self, recorder: &mut Recorder<'_>, tokens: u32, n_rows: u32) {
        let (cells, vocab) = (self.geometry.hidden_size / 8, self.geometry.vocab_size);
        self.embed.dispatch(recorder, &EmbedParams { tokens, n_rows, cells, vocab }, flat_grid(n_rows));
    }

    fn norm(&self, recorder: &mut Recorder<'_>, bound: &Bound, list: Option<u32>, n_rows: u32) {
        let params = RmsNormParams {
            rows: list.unwrap_or(0),
            identity: u32::from(list.is_none()),
            n_rows,
            width: self.geometry.hidden_size,
            eps: self.geometry.rms_norm_eps,
        };
        bound.dispatch(recorder, &params, flat_grid(n_rows));
    }

    /// Norm and projections of a layer; of rows that have stopped below it keys and values alone, from what reached them last.
    pub(super) fn project(&self, recorder: &mut Recorder<'_>, layer: usize, rows: RowCounts) {
        let l = &self.layers[layer];
        self.norm(recorder, &l.attention_norm, None, rows.all);
        l.qkv.rows(recorder, rows);
        l.qkv.many_from(recorder, rows.active, rows.all - rows.active, self.geometry.heads.q_width());
    }

    /// Rotary positions of queries and keys.
    pub(super) fn rotate(&self, recorder: &mut Recorder<'_>, angles: u32, rows: RowCounts) {
        let heads = self.geometry.heads;
        let params = RopeParams {
            angles,
            n_rows: rows.all,
            stride: heads.q_width() + 2 * heads.kv_width(),
            n_heads: heads.num_qo_heads + heads.num_kv_heads,
            half_dim: heads.head_dim / 2,
        };
        self.rope.dispatch(recorder, &params, flat_grid(rows.all));
    }

    /// Everything after attention in a layer: output projection and feed-forward, each added to the residual stream.
    pub(super) fn after_attention(&self, recorder: &mut Recorder<'_>, layer: usize, rows: RowCounts) {
        let l = &self.layers[layer];
        l.attention_output.rows(recorder, rows);
        self.norm(recorder, &l.ffn_norm, None, rows.active);
        l.gate_up.rows(recorder, rows);
        let params = GatedActivationParams { n_rows: rows.active, width: self.geometry.intermediate_size };
        self.activate.dispatch(recorder, &params, flat_grid(rows.active));
        l.down.rows(recorder, rows);
    }

    /// Logits of the rows in the list that begins at word `list`. Few rows go through `matvec`, so that a session's
    /// logits do not depend on its company; `many` is for evaluation, where whole prompts are wanted.
    pub(super) fn logits(&self, recorder: &mut Recorder<'_>, list: u32, n_rows: u32, many: bool) {
        self.norm(recorder, &self.output_norm, Some(list), n_rows);
        if many {
            self.output.many(recorder, 0, n_rows);
        } else {
            self.output.few(recorder, 0, n_rows);
        }
    }

    /// One token per item; `items` is the first vec4 of the list.
    pub(super) fn sample(&self, recorder: &mut Recorder<'_>, items: u32, n_items: u32) {
        let vocab = self.geometry.vocab_size;
        self.sample.dispatch(recorder, &SampleParams { items, n_items, vocab }, flat_grid(n_items));
    }
}
