//! Running the attention kernels of a step: pipelines and bind groups over one pool, and the states between them.
//!
//! [`AttentionKernels`] is what the engine records per layer, and what tests, `verify` and the examples use without any
//! model around it.

use std::sync::Arc;

use super::abi::{AppendParams, AttentionParams, MergeParams};
use super::attention::CacheShape;
use super::decode::DecodeSpec;
use super::pipeline::{KernelError, Pipeline, PipelineCache, Slot};
use super::plan::AttentionPlan;
use super::prefill::PrefillSpec;
use super::{Recorder, append, flat_grid, merge_states};
use crate::device::{Device, DeviceError};
use crate::geometry::{Bytes, WORD_BYTES};
use crate::pool::device::PoolBuffers;

/// Where the rows of a step lie.
#[derive(Clone, Copy, Debug)]
pub struct RowBuffers<'a> {
    /// Rows of query, key and value heads side by side: `[rows][stride]` f32, queries first.
    pub qkv: &'a wgpu::Buffer,
    /// f32 values between rows of `qkv`.
    pub stride: u32,
    /// f32 values before the keys in a row.
    pub k_offset: u32,
    /// f32 values before the values in a row.
    pub v_offset: u32,
    /// Output rows `[rows][num_qo_heads * head_dim]` f32.
    pub output: &'a wgpu::Buffer,
}

/// First vec4 of each work list in the `step` buffer.
#[derive(Clone, Copy, Debug, Default)]
pub struct ListOffsets {
    /// Append items.
    pub append: u32,
    /// Decode items.
    pub decode: u32,
    /// Prefill items.
    pub prefill: u32,
    /// Merge items.
    pub merge: u32,
}

impl ListOffsets {
    /// Appends the plan's lists to the step's words; the offsets are where they begin.
    pub fn write(plan: &AttentionPlan, step: &mut Vec<u32>) -> Self {
        fn put<T: bytemuck::Pod>(items: &[T], step: &mut Vec<u32>) -> u32 {
            step.resize(step.len().next_multiple_of(4), 0);
            let at = u32::try_from(step.len() / 4).expect("a step is far below 2^32 words");
            step.extend_from_slice(bytemuck::cast_slice(items));
            at
        }
        Self {
            append: put(&plan.append, step),
            decode: put(&plan.decode, step),
            prefill: put(&plan.prefill, step),
            merge: put(&plan.merge, step),
        }
    }
}

/// Compiled attention kernels, bound to a pool and to the rows of a step.
#[derive(Debug)]
pub struct AttentionKernels {
    shape: CacheShape,
    prefill_spec: PrefillSpec,
    append: Arc<Pipeline>,
    decode: Arc<Pipeline>,
    prefill: Arc<Pipeline>,
    merge: Arc<Pipeline>,
    append_groups: Vec<wgpu::BindGroup>,
    decode_groups: Vec<wgpu::BindGroup>,
    prefill_groups: Vec<wgpu::BindGroup>,
    merge_group: wgpu::BindGroup,
    stride: u32,
    k_offset: u32,
    v_offset: u32,
    max_states: u32,
    held: Bytes,
    /// Log-sum-exp of the last layer, `[rows][num_qo_heads]` f32, base 2.
    pub(crate) lse: wgpu::Buffer,
}

impl AttentionKernels {
    /// Device bytes that `max_states` attention states and `max_rows` rows need besides the rows themselves.
    pub fn scratch_bytes(shape: &CacheShape, max_states: u32, max_rows: u32) -> Bytes {
        let [o, ml, lse] = Self::parts(shape, max_states, max_rows);
        o + ml + lse
    }

    fn parts(shape: &CacheShape, max_states: u32, max_rows: u32) -> [Bytes; 3] {
        let states = u64::from(max_states.max(1));
        let lse = u64::from(max_rows.max(1)) * u64::from(shape.heads.num_qo_heads);
        [
            Bytes(states * u64::from(shape.heads.head_dim) * WORD_BYTES).align_up(16),
            Bytes(states * 2 * WORD_BYTES).align_up(16),
            Bytes(lse * WORD_BYTES).align_up(16),
        ]
    }

    /// Compiles and binds.
    ///
    /// # Errors
    /// [`KernelError`].
    pub fn new(
        device: &Device,
        cache: &mut PipelineCache,
        shape: CacheShape,
        pool: &PoolBuffers,
        step: &wgpu::Buffer,
        rows: &RowBuffers<'_>,
        limits: (u32, u32),
    ) -> Result<Self, KernelError> {
        let (max_states, max_rows) = limits;
        let prefill_spec = PrefillSpec { shape };
        let append = cache.get(device, &append::kernel(&shape))?;
        let decode = cache.get(device, &DecodeSpec { shape, tier: device.tier() }.kernel())?;
        let prefill = cache.get(device, &prefill_spec.kernel())?;
        let merge = cache.get(device, &merge_states::kernel(&shape))?;
        let [o, ml, lse] = Self::parts(&shape, max_states, max_rows);
        let state_o = device.storage("attention states", o)?;
        let state_ml = device.storage("attention state maxima", ml)?;
        let lse = device.storage("log-sum-exp", lse)?;
        let (step, tables) = (Slot::Whole(step), Slot::Whole(&pool.tables));
        let (qkv, o, ml) = (Slot::Whole(rows.qkv), Slot::Whole(&state_o), Slot::Whole(&state_ml));
        let over_arenas = |bind: &dyn Fn(Slot<'_>) -> wgpu::BindGroup| -> Vec<wgpu::BindGroup> {
            pool.arenas.iter().map(|arena| bind(Slot::Whole(arena))).collect()
        };
        Ok(Self {
            append_groups: over_arenas(&|arena| append.bind(device, &[step, tables, qkv, arena])),
            decode_groups: over_arenas(&|arena| decode.bind(device, &[step, tables, arena, qkv, o, ml])),
            prefill_groups: over_arenas(&|arena| prefill.bind(device, &[step, tables, arena, qkv, o, ml])),
            merge_group: merge.bind(device, &[step, o, ml, Slot::Whole(rows.output), Slot::Whole(&lse)]),
            shape,
            prefill_spec,
            append,
            decode,
            prefill,
            merge,
            stride: rows.stride,
            k_offset: rows.k_offset,
            v_offset: rows.v_offset,
            max_states,
            held: Bytes(state_o.size() + state_ml.size() + lse.size()),
            lse,
        })
    }

    /// What plans need to know.
    pub const fn prefill_spec(&self) -> &PrefillSpec {
        &self.prefill_spec
    }

    /// Bytes of the attention states and the log-sum-exp.
    pub const fn held_bytes(&self) -> Bytes {
        self.held
    }

    /// Whether the plan's states fit.
    ///
    /// # Errors
    /// [`DeviceError::TooLarge`] with the numbers.
    pub fn check(&self, plan: &AttentionPlan) -> Result<(), DeviceError> {
        if plan.n_states <= self.max_states {
            return Ok(());
        }
        let bytes = |n: u32| Bytes(u64::from(n) * u64::from(self.shape.heads.head_dim + 2) * WORD_BYTES);
        let label = format!("{} attention states", plan.n_states);
        Err(DeviceError::TooLarge { label, bytes: bytes(plan.n_states), limit: bytes(self.max_states) })
    }

    /// Records append, attention and merge of one layer.
    pub fn record(&self, recorder: &mut Recorder<'_>, plan: &AttentionPlan, lists: &ListOffsets, layer: u32) {
        let layer_plan = &plan.plans[plan.of_layer[layer as usize]];
        let heads = self.shape.heads;
        let scale_log2 = heads.sm_scale() * std::f32::consts::LOG2_E;
        for (arena, range) in &layer_plan.append {
            let (items, n_items) = place(lists.append, 2, range);
            let (stride, k_offset, v_offset) = (self.stride, self.k_offset, self.v_offset);
            let params = AppendParams { items, n_items, layer, stride, k_offset, v_offset };
            recorder.dispatch(&self.append, &self.append_groups[usize::from(*arena)], &params, flat_grid(n_items));
        }
        for (arena, range) in &layer_plan.decode {
            let (items, n_items) = place(lists.decode, 2, range);
            let params = AttentionParams { items, n_items, layer, q_stride: self.stride, scale_log2 };
            recorder.dispatch(&self.decode, &self.decode_groups[usize::from(*arena)], &params, flat_grid(n_items));
        }
        for (arena, range) in &layer_plan.prefill {
            let (items, n_items) = place(lists.prefill, 3, range);
            let params = AttentionParams { items, n_items, layer, q_stride: self.stride, scale_log2 };
            recorder.dispatch(&self.prefill, &self.prefill_groups[usize::from(*arena)], &params, flat_grid(n_items));
        }
        let (items, n_items) = place(lists.merge, 1, &layer_plan.merge);
        let params = MergeParams { items, n_items, o_stride: heads.q_width() };
        recorder.dispatch(&self.merge, &self.merge_group, &params, flat_grid(n_items));
    }
}

/// First vec4 and count of a range of items of `vec4s` vec4 each, in a list that begins at `list`.
const fn place(list: u32, vec4s: u32, range: &std::ops::Range<u32>) -> (u32, u32) {
    (list + range.start * vec4s, range.end - range.start)
}
