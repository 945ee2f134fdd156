//! Running the kernels of an eviction: scores, selection, and the move of what stays into fresh pages.
//!
//! ```text
//! raw     [slot][list][capacity]   what a session's tokens have received so far; a session holds a slot while it is scored
//! decided [list][capacity]         what the eviction at hand ranks by
//! kept    [list][capacity]         indices of tokens that stay
//! ```

use std::sync::Arc;

use super::abi::{
    CarryParams, DecideParams, GatherParams, KeyScoreParams, MergeLayersParams, MomentParams, ScoreParams, SelectParams,
};
use super::attention::CacheShape;
use super::executor::{AttentionKernels, ListOffsets, RowBuffers};
use super::key_scores::{KeyScoreMode, moment_values, summary_values};
use super::pipeline::{KernelError, Pipeline, PipelineCache, Slot};
use super::plan::{AttentionPlan, Place};
use super::{Recorder, flat_grid, gather, key_scores, merge_layers, moments, score, select};
use crate::compression::hidden::HiddenCodec;
use crate::device::Device;
use crate::geometry::{Bytes, WORD_BYTES};
use crate::pool::PageId;
use crate::pool::device::PoolBuffers;

/// How large the buffers of evictions are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EvictionSizes {
    /// Lists of the model: layers times KV heads.
    pub num_lists: u32,
    /// Tokens of a list at most.
    pub capacity: u32,
    /// Sessions that are scored at once; their scores are kept from step to step.
    pub slots: u32,
    /// Whether moments of queries are kept for them.
    pub moments: bool,
}

impl EvictionSizes {
    fn parts(&self, shape: &CacheShape) -> [Bytes; 7] {
        let words = |n: u64| Bytes(n.max(4) * WORD_BYTES).align_up(16);
        let lists = u64::from(self.num_lists);
        let scores = lists * u64::from(self.capacity);
        let slots = u64::from(self.slots);
        let heads = lists * u64::from(shape.heads.group_size());
        let of_heads = if self.moments { heads * u64::from(moment_values(shape.heads.head_dim)) } else { 0 };
        [
            words(slots * scores),
            words(scores),
            words(scores),
            words(lists),
            words(lists * u64::from(summary_values(shape))),
            words(slots * of_heads),
            words(of_heads),
        ]
    }

    /// Device bytes of all of them.
    pub fn scratch_bytes(&self, shape: &CacheShape) -> Bytes {
        self.parts(shape).into_iter().sum()
    }

    /// Scores of one slot.
    pub const fn slot_values(&self) -> u32 {
        self.num_lists * self.capacity
    }

    /// Numbers of the moments of one slot.
    pub fn slot_moments(&self, shape: &CacheShape) -> u32 {
        self.num_lists * shape.heads.group_size() * moment_values(shape.heads.head_dim)
    }
}

/// The kernels that read one codec.
#[derive(Debug)]
struct FormatKernels {
    codec: HiddenCodec,
    score: Arc<Pipeline>,
    key_scores: Arc<Pipeline>,
    gather: Arc<Pipeline>,
    /// One bind group per arena, the window last.
    score_groups: Vec<wgpu::BindGroup>,
    key_score_groups: Vec<wgpu::BindGroup>,
    /// `[source arena][target arena, the window last]`.
    gather_groups: Vec<Vec<wgpu::BindGroup>>,
    angles: u32,
}

/// The buffers of evictions.
#[derive(Debug)]
pub struct EvictionBuffers {
    /// Raw scores.
    pub raw: wgpu::Buffer,
    /// Decided scores.
    pub decided: wgpu::Buffer,
    /// Indices of kept tokens.
    pub kept: wgpu::Buffer,
    /// Kept tokens of each list.
    pub counts: wgpu::Buffer,
    summary: wgpu::Buffer,
    /// Sums of queries and their products.
    pub moments: wgpu::Buffer,
    /// Means and covariances that the eviction at hand expects.
    pub expected: wgpu::Buffer,
}

impl EvictionBuffers {
    /// All of them.
    pub fn all(&self) -> [&wgpu::Buffer; 7] {
        let Self { raw, decided, kept, counts, summary, moments, expected } = self;
        [raw, decided, kept, counts, summary, moments, expected]
    }
}

/// Compiled kernels of evictions, bound to a pool.
#[derive(Debug)]
pub struct EvictionKernels {
    shape: CacheShape,
    sizes: EvictionSizes,
    formats: Vec<FormatKernels>,
    decide: (Arc<Pipeline>, wgpu::BindGroup),
    select: (Arc<Pipeline>, wgpu::BindGroup),
    carry: (Arc<Pipeline>, wgpu::BindGroup),
    moments: (Arc<Pipeline>, wgpu::BindGroup),
    /// One bind group per arena of merged pages.
    merge_layers: (Arc<Pipeline>, Vec<wgpu::BindGroup>),
    buffers: EvictionBuffers,
    stride: u32,
    arenas: usize,
}

impl EvictionKernels {
    /// Allocates, compiles and binds.
    ///
    /// # Errors
    /// [`KernelError`].
    pub fn new(
        device: &Device,
        cache: &mut PipelineCache,
        attention: &AttentionKernels,
        pool: &PoolBuffers,
        step: &wgpu::Buffer,
        rows: &RowBuffers<'_>,
        sizes: EvictionSizes,
    ) -> Result<Self, KernelError> {
        let shape = *attention.shape();
        let [raw, decided, kept, counts, summary, sums, expected] = sizes.parts(&shape);
        let buffers = EvictionBuffers {
            raw: device.storage("raw scores", raw)?,
            decided: device.storage("decided scores", decided)?,
            kept: device.storage("kept indices", kept)?,
            counts: device.storage("kept counts", counts)?,
            summary: device.storage("summaries of keys", summary)?,
            moments: device.storage("moments of queries", sums)?,
            expected: device.storage("expected queries", expected)?,
        };
        let b = &buffers;
        let (score_tuning, gather_tuning) = (cache.tuning().score(), cache.tuning().gather());
        let mut formats = Vec::new();
        // Merged pages are the end of an eviction: none begins there.
        for (codec, parameters, angles) in attention.parameters().filter(|(codec, ..)| !codec.paired) {
            let format = shape.format(codec);
            let score = cache.get(device, &score::kernel(&format, score_tuning))?;
            let key_scores = cache.get(device, &key_scores::kernel(&format))?;
            let gather = cache.get(device, &gather::kernel(&format, gather_tuning))?;
            let bind = |pipeline: &Pipeline, buffers: &[&wgpu::Buffer]| {
                let slots: Vec<_> = buffers.iter().map(|buffer| Slot::Whole(buffer)).collect();
                pipeline.bind(device, &slots)
            };
            let tables = &pool.tables;
            let score_groups = pool
                .with_window()
                .map(|arena| bind(&score, &[step, tables, arena, rows.qkv, &attention.lse, parameters, &b.raw]))
                .collect();
            let key_score_groups = pool
                .with_window()
                .map(|arena| bind(&key_scores, &[step, tables, arena, parameters, &b.expected, &b.summary, &b.raw]))
                .collect();
            let gather_groups = pool
                .with_window()
                .map(|source| {
                    let bind = |target| bind(&gather, &[step, tables, parameters, &b.kept, source, target]);
                    pool.with_window().map(bind).collect()
                })
                .collect();
            formats.push(FormatKernels {
                codec,
                score,
                key_scores,
                gather,
                score_groups,
                key_score_groups,
                gather_groups,
                angles,
            });
        }
        let merge_layers = cache.get(device, &merge_layers::kernel(&shape))?;
        let merge_groups = pool
            .arenas
            .iter()
            .map(|arena| {
                let slots = [step, &pool.tables, &pool.window, arena, &b.decided].map(Slot::Whole);
                merge_layers.bind(device, &slots)
            })
            .collect();
        let mut bound = |spec, buffers: &[&wgpu::Buffer]| -> Result<_, KernelError> {
            let pipeline = cache.get(device, &spec)?;
            let slots: Vec<_> = buffers.iter().map(|buffer| Slot::Whole(buffer)).collect();
            let group = pipeline.bind(device, &slots);
            Ok((pipeline, group))
        };
        Ok(Self {
            decide: bound(select::decide(), &[step, &b.raw, &b.decided])?,
            select: bound(select::select(), &[step, &b.decided, &b.kept, &b.counts])?,
            carry: bound(select::carry(), &[step, &b.kept, &b.raw])?,
            moments: bound(moments::kernel(&shape), &[step, rows.qkv, &b.moments])?,
            merge_layers: (merge_layers, merge_groups),
            shape,
            sizes,
            formats,
            stride: rows.stride,
            arenas: pool.arenas.len(),
            buffers,
        })
    }

    /// How large it is.
    pub const fn sizes(&self) -> &EvictionSizes {
        &self.sizes
    }

    /// Its buffers.
    pub const fn buffers(&self) -> &EvictionBuffers {
        &self.buffers
    }

    /// Bytes of its buffers.
    pub fn held_bytes(&self) -> Bytes {
        Bytes(self.buffers.all().iter().map(|buffer| buffer.size()).sum())
    }

    fn format(&self, codec: HiddenCodec) -> &FormatKernels {
        let found = self.formats.iter().find(|format| format.codec == codec);
        found.expect("a planned page should have one of the codecs that the kernels were made for")
    }

    fn arena(&self, arena: u16) -> usize {
        if arena == PageId::WINDOW { self.arenas } else { usize::from(arena) }
    }

    /// What a slot holds: buffers, first byte and bytes of its scores, and of its moments where these are kept.
    pub fn slot_parts(&self, slot: u32) -> impl Iterator<Item = (&wgpu::Buffer, u64, Bytes)> {
        let moments = if self.sizes.moments { self.sizes.slot_moments(&self.shape) } else { 0 };
        let parts = [(&self.buffers.raw, self.sizes.slot_values()), (&self.buffers.moments, moments)];
        parts.into_iter().filter(|(_, words)| *words > 0).map(move |(buffer, words)| {
            let bytes = u64::from(words) * WORD_BYTES;
            (buffer, u64::from(slot) * bytes, Bytes(bytes))
        })
    }

    /// Makes the scores and moments of a slot zero.
    pub fn clear(&self, encoder: &mut wgpu::CommandEncoder, slot: u32) {
        self.slot_parts(slot).for_each(|(buffer, at, bytes)| encoder.clear_buffer(buffer, at, Some(bytes.0)));
    }

    /// Records what the cache of one layer receives from scored rows; their log-sum-exp is there.
    pub fn record_scores(&self, recorder: &mut Recorder<'_>, plan: &AttentionPlan, lists: &ListOffsets, layer: u32) {
        let layer_plan = &plan.plans[plan.of_layer[layer as usize]];
        for (at, range) in &layer_plan.score {
            let format = self.format(at.place.codec);
            let params = ScoreParams {
                items: lists.score + range.start * 3,
                n_items: range.end - range.start,
                layer: layer - layer_plan.first_layer,
                q_stride: self.stride,
                scale_log2: self.shape.heads.sm_scale() * std::f32::consts::LOG2_E,
                angles: format.angles,
                list_stride: self.shape.heads.num_kv_heads * self.sizes.capacity,
                largest: u32::from(at.largest),
            };
            let group = &format.score_groups[self.arena(at.place.arena)];
            recorder.dispatch(&format.score, group, &params, flat_grid(params.n_items));
        }
    }

    /// Records the moments of scored rows of one layer, before rotary positions. `items` is the first vec4 of the list.
    pub fn record_moments(&self, recorder: &mut Recorder<'_>, items: u32, n_items: u32, layer: u32) {
        let params = MomentParams { items, n_items, layer, q_stride: self.stride };
        recorder.dispatch(
            &self.moments.0,
            &self.moments.1,
            &params,
            flat_grid(n_items * self.shape.heads.num_qo_heads),
        );
    }

    /// Records scores from keys: `n_items` items from vec4 `items` on, all in one place.
    pub fn record_key_scores(
        &self,
        recorder: &mut Recorder<'_>,
        place: Place,
        (items, n_items): (u32, u32),
        (mode, skip): (KeyScoreMode, u32),
    ) {
        let format = self.format(place.codec);
        let params = KeyScoreParams { items, n_items, layer: 0, angles: format.angles, mode: mode as u32, skip };
        let group = &format.key_score_groups[self.arena(place.arena)];
        recorder.dispatch(&format.key_scores, group, &params, flat_grid(n_items));
    }

    /// Records the ranking.
    pub fn record_decide(&self, recorder: &mut Recorder<'_>, params: &DecideParams) {
        recorder.dispatch(&self.decide.0, &self.decide.1, params, flat_grid(params.n_items));
    }

    /// Records the selection of `n_items` domains.
    pub fn record_select(&self, recorder: &mut Recorder<'_>, items: u32, n_items: u32) {
        recorder.dispatch(&self.select.0, &self.select.1, &SelectParams { items, n_items }, flat_grid(n_items));
    }

    /// Records that the scores of `n_items` lists move to their new places.
    pub fn record_carry(&self, recorder: &mut Recorder<'_>, items: u32, n_items: u32) {
        let params = CarryParams { items, n_items, capacity: self.sizes.capacity };
        recorder.dispatch(&self.carry.0, &self.carry.1, &params, flat_grid(n_items));
    }

    /// Records a gather: `n_items` items from vec4 `items` on. The place is that of the source; its `sealed_arena` that of
    /// the target.
    pub fn record_gather(&self, recorder: &mut Recorder<'_>, place: Place, items: u32, n_items: u32) {
        let format = self.format(place.codec);
        let params = GatherParams { items, n_items, layer: 0, angles: format.angles };
        let group = &format.gather_groups[self.arena(place.arena)][self.arena(place.sealed_arena)];
        recorder.dispatch(&format.gather, group, &params, flat_grid(n_items));
    }

    /// Records the merging of `n_items` pages, whose target lies in `arena`; or, where `merges` says no, the distances of
    /// their tokens. `codec` is that of the target.
    pub fn record_merge(
        &self,
        recorder: &mut Recorder<'_>,
        (codec, arena): (HiddenCodec, u16),
        (items, n_items): (u32, u32),
        merges: bool,
    ) {
        let lengths = codec.side_words(self.shape.page());
        let params = MergeLayersParams { items, n_items, merges: u32::from(merges), lengths };
        let group = &self.merge_layers.1[usize::from(arena)];
        recorder.dispatch(&self.merge_layers.0, group, &params, flat_grid(n_items));
    }
}
