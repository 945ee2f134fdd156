//! The transformer's forward pass as pipelines and bind groups, made once and recorded per step.

use std::sync::Arc;

use super::scratch::Scratch;
use super::weights::{DeviceMatrix, DeviceWeights};
use crate::device::Device;
use crate::geometry::ModelGeometry;
use crate::kernels::abi::{EmbedParams, MatmulParams, SampleParams};
use crate::kernels::matmul::{self, Input, NO_LIST, Output, Product};
use crate::kernels::product_tuning::{CooperativeRows, FewRows, ProductTuning};
use crate::kernels::{KernelError, Pipeline, PipelineCache, Recorder, Slot, embed, flat_grid, sample};

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

/// A product of few rows, as many to a workgroup as it says.
#[derive(Debug)]
struct Few {
    rows: u32,
    bound: Bound,
}

/// A matrix product in its forms.
#[derive(Debug)]
struct Linear {
    /// By rows, ascending.
    few: Vec<Few>,
    many: Bound,
    few_layout: FewRows,
    /// Rows and columns of its workgroups.
    many_tile: [u32; 2],
    cols: u32,
    cells: u32,
    eps: f32,
}

/// Rows of a product.
#[derive(Clone, Copy, Debug)]
struct Span {
    first: u32,
    n_rows: u32,
    /// First word of a list of rows in the step, or [`NO_LIST`].
    list: u32,
}

impl Span {
    const fn rows(first: u32, n_rows: u32) -> Self {
        Self { first, n_rows, list: NO_LIST }
    }
}

impl Linear {
    const fn params(&self, span: Span, first_col: u32) -> MatmulParams {
        let Span { first, n_rows, list } = span;
        let (cols, cells, eps) = (self.cols, self.cells, self.eps);
        MatmulParams { x_row: first, y_row: first, n_rows, cols, cells, first_col, list, eps }
    }

    /// Few rows: one workgroup has them all where that is possible, so that weights are read once.
    fn few(&self, recorder: &mut Recorder<'_>, span: Span) {
        let params = self.params(span, 0);
        let fitting = self.few.iter().find(|few| few.rows >= span.n_rows).or_else(|| self.few.last());
        let few = fitting.expect("a product is compiled for one row at least");
        few.bound.dispatch(recorder, &params, matmul::grid(&params, few.rows, self.few_layout.width(few.rows)));
    }

    /// Outputs from `first_col` on.
    fn many(&self, recorder: &mut Recorder<'_>, span: Span, first_col: u32) {
        let params = self.params(span, first_col);
        let [rows, cols] = self.many_tile;
        self.many.dispatch(recorder, &params, matmul::grid(&params, rows, cols));
    }

    /// Decode rows through `matvec`, prompt rows through `matmul`, whatever else is in the step.
    fn rows(&self, recorder: &mut Recorder<'_>, rows: RowCounts) {
        self.few(recorder, Span::rows(0, rows.decode));
        self.many(recorder, Span::rows(rows.decode, rows.active - rows.decode), 0);
    }
}

#[derive(Debug)]
struct Layer {
    qkv: Linear,
    attention_output: Linear,
    gate_up: Linear,
    down: Linear,
}

/// The forward pass around attention.
#[derive(Debug)]
pub(super) struct Layers {
    geometry: ModelGeometry,
    embed: Bound,
    layers: Vec<Layer>,
    output: Linear,
    sample: Bound,
}

struct Builder<'a> {
    device: &'a Device,
    cache: &'a mut PipelineCache,
    tuning: ProductTuning,
    /// Where many rows are multiplied on cooperative matrices.
    cooperative: Option<CooperativeRows>,
    /// Decode rows of a step at most.
    most: u32,
    eps: f32,
    step: &'a wgpu::Buffer,
}

impl Builder<'_> {
    /// The product of rows of `x`, normed where there is a gain.
    fn linear(
        &mut self,
        (x, gain): (&wgpu::Buffer, Option<&wgpu::Buffer>),
        w: &DeviceMatrix,
        y: &wgpu::Buffer,
        output: Output,
    ) -> Result<Linear, KernelError> {
        let (tuning, most) = (self.tuning, self.most);
        let product = Product { input: if gain.is_some() { Input::Normed } else { Input::Plain }, output };
        let mut bound = |spec| -> Result<Bound, KernelError> {
            let pipeline = self.cache.get(self.device, &spec)?;
            Ok(match gain {
                Some(gain) => Bound::new(self.device, &pipeline, &[self.step, x, gain, &w.buffer, y]),
                None => Bound::new(self.device, &pipeline, &[x, &w.buffer, y]),
            })
        };
        let few_layout = tuning.few.for_cols(w.rows);
        let mut few = Vec::new();
        for rows in few_layout.rows(most) {
            few.push(Few { rows, bound: bound(product.matvec(rows, few_layout))? });
        }
        let (spec, many_tile) = match self.cooperative {
            Some(tile) => (product.matmul_coop(tile), [tile.rows, tile.cols]),
            None => (product.matmul(tuning.many), tuning.many.size()),
        };
        let many = bound(spec)?;
        Ok(Linear { few, many, few_layout, many_tile, cols: w.rows, cells: w.cols / 8, eps: self.eps })
    }
}

impl Layers {
    /// For steps of at most `most` decode rows.
    pub(super) fn new(
        device: &Device,
        cache: &mut PipelineCache,
        geometry: &ModelGeometry,
        weights: &DeviceWeights,
        s: &Scratch,
        most: u32,
    ) -> Result<Self, KernelError> {
        let embed = cache.get(device, &embed::kernel())?;
        let sample = cache.get(device, &sample::kernel(device.tier()))?;
        let (tuning, eps) = (cache.tuning().product(&device.summary().kind), geometry.rms_norm_eps);
        let cooperative = cache.tuning().cooperative_product(device.tier());
        let mut build = Builder { device, cache, tuning, cooperative, most, eps, step: &s.step };
        let mut layers = Vec::with_capacity(weights.layers.len());
        for w in &weights.layers {
            layers.push(Layer {
                qkv: build.linear((&s.x, Some(&w.attention_norm)), &w.qkv, &s.qkv, Output::Replace)?,
                attention_output: build.linear((&s.attention, None), &w.attention_output, &s.x, Output::Accumulate)?,
                gate_up: build.linear((&s.x, Some(&w.ffn_norm)), &w.gate_up, &s.activated, Output::Activate)?,
                down: build.linear((&s.activated, None), &w.down, &s.x, Output::Accumulate)?,
            });
        }
        let output = (&s.x, Some(&weights.output_norm));
        Ok(Self {
            geometry: geometry.clone(),
            embed: Bound::new(device, &embed, &[&s.step, &weights.embedding.buffer, &s.x]),
            layers,
            output: build.linear(output, weights.output_matrix(), &s.logits, Output::Replace)?,
            sample: Bound::new(device, &sample, &[&s.step, &s.logits, &s.tokens]),
        })
    }

    /// `x = embedding[tokens]`; `tokens` is the first word of the token list.
    pub(super) fn embed(&self, recorder: &mut Recorder<'_>, tokens: u32, n_rows: u32) {
        let (cells, vocab) = (self.geometry.hidden_size / 8, self.geometry.vocab_size);
        self.embed.dispatch(recorder, &EmbedParams { tokens, n_rows, cells, vocab }, flat_grid(n_rows));
    }

    /// Projections of a layer; of rows that have stopped below it keys and values alone, from what reached them last.
    pub(super) fn project(&self, recorder: &mut Recorder<'_>, layer: usize, rows: RowCounts) {
        let qkv = &self.layers[layer].qkv;
        qkv.rows(recorder, rows);
        qkv.many(recorder, Span::rows(rows.active, rows.all - rows.active), self.geometry.heads.q_width());
    }

    /// Everything after attention in a layer: output projection and feed-forward, each added to the residual stream.
    pub(super) fn after_attention(&self, recorder: &mut Recorder<'_>, layer: usize, rows: RowCounts) {
        let l = &self.layers[layer];
        l.attention_output.rows(recorder, rows);
        l.gate_up.rows(recorder, rows);
        l.down.rows(recorder, rows);
    }

    /// Logits of the rows in the list that begins at word `list`. Few rows go through `matvec`, so that a session's
    /// logits do not depend on its company; `many` is for evaluation, where whole prompts are wanted.
    pub(super) fn logits(&self, recorder: &mut Recorder<'_>, list: u32, n_rows: u32, many: bool) {
        let span = Span { first: 0, n_rows, list };
        if many {
            self.output.many(recorder, span, 0);
        } else {
            self.output.few(recorder, span);
        }
    }

    /// One token per item; `items` is the first vec4 of the list.
    pub(super) fn sample(&self, recorder: &mut Recorder<'_>, items: u32, n_items: u32) {
        let vocab = self.geometry.vocab_size;
        self.sample.dispatch(recorder, &SampleParams { items, n_items, vocab }, flat_grid(n_items));
    }
}
