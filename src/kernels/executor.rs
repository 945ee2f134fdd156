//! Running the attention kernels of a step: pipelines and bind groups over one pool, and the states between them.
//!
//! [`AttentionKernels`] is what the engine records per layer, and what tests, `verify` and the examples use without any
//! model around it.

use std::sync::Arc;

use super::abi::{
    AppendParams, AttentionParams, MergeParams, PageBoundsParams, QuestParams, SealItem, SealParams, VEC4_WORDS,
};
use super::append::Positions;
use super::attention::{CacheShape, Format};
use super::decode::DecodeSpec;
use super::parameters::{self, ParameterSource};
use super::pipeline::{KernelError, Pipeline, PipelineCache, Slot};
use super::plan::{AttentionPlan, Dispatch, LayerPlan, Place};
use super::prefill::PrefillSpec;
use super::seal::SealSpec;
use super::{Recorder, append, flat_grid, merge_states, quest};
use crate::compression::hidden::{HiddenCodec, lowrank};
use crate::device::staging::Uploader;
use crate::device::{Device, DeviceError};
use crate::geometry::{Bytes, WORD_BYTES};
use crate::pool::PageId;
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
    /// Whether queries and keys carry their positions, or are turned when they are appended.
    pub positions: Positions,
    /// Output rows `[rows][num_qo_heads * head_dim]` f32.
    pub output: &'a wgpu::Buffer,
}

/// Rows whose queries are turned, where queries carry no positions yet.
#[derive(Clone, Copy, Debug, Default)]
pub struct Turning {
    /// First vec4 of the `[row][head_dim / 2]` table of (cos, sin) in the `step` buffer, of all rows of the step.
    pub angles: u32,
    /// Rows.
    pub n_rows: u32,
}

/// First vec4 of each work list in the `step` buffer.
#[derive(Clone, Copy, Debug, Default)]
pub struct ListOffsets {
    /// Append items.
    pub append: u32,
    /// Seal items.
    pub seal: u32,
    /// Decode items.
    pub decode: u32,
    /// Prefill items.
    pub prefill: u32,
    /// Merge items.
    pub merge: u32,
    /// Score items.
    pub score: u32,
    /// Moment items.
    pub moments: u32,
    /// Page bounds items.
    pub bounds: u32,
    /// Quest items.
    pub quest: u32,
}

impl ListOffsets {
    /// Appends the plan's lists to the step's words; the offsets are where they begin. `rope_theta` turns back the keys of
    /// pages that become latents.
    pub fn write(plan: &AttentionPlan, shape: &CacheShape, rope_theta: f32, step: &mut Vec<u32>) -> Self {
        fn place(step: &mut Vec<u32>) -> u32 {
            step.resize(step.len().next_multiple_of(VEC4_WORDS), 0);
            u32::try_from(step.len() / VEC4_WORDS).expect("a step is far below 2^32 words")
        }
        fn put<T: bytemuck::Pod>(items: &[T], step: &mut Vec<u32>) -> u32 {
            let at = place(step);
            step.extend_from_slice(bytemuck::cast_slice(items));
            at
        }
        let page = shape.page();
        let angles = place(step);
        for first in &plan.turned_pages {
            for position in *first..first + page.page_size {
                let pairs = lowrank::angles(position, page.head_dim, rope_theta);
                step.extend(pairs.into_iter().flat_map(|(cos, sin)| [cos.to_bits(), sin.to_bits()]));
            }
        }
        let per_page = page.page_size * page.head_dim / 4;
        let append = put(&plan.append, step);
        let seal = place(step);
        for item in &plan.seal {
            let item = SealItem { angles: angles + item.angles * per_page, ..*item };
            step.extend_from_slice(bytemuck::cast_slice(std::slice::from_ref(&item)));
        }
        Self {
            append,
            seal,
            decode: put(&plan.decode, step),
            prefill: put(&plan.prefill, step),
            merge: put(&plan.merge, step),
            score: put(&plan.score, step),
            moments: put(&plan.moments, step),
            bounds: put(&plan.bounds, step),
            quest: put(&plan.quest, step),
        }
    }
}

/// The kernels of one codec.
#[derive(Debug)]
struct FormatKernels {
    codec: HiddenCodec,
    decode: Arc<Pipeline>,
    prefill: Arc<Pipeline>,
    /// Workgroups of a prefill item.
    prefill_tiles: u32,
    /// None for pages that are never sealed.
    seal: Option<Arc<Pipeline>>,
    /// Workgroups of a page.
    seal_strips: u32,
    /// One bind group per arena, the window last.
    decode_groups: Vec<wgpu::BindGroup>,
    prefill_groups: Vec<wgpu::BindGroup>,
    /// `[open arena, the window last][sealed arena]`.
    seal_groups: Vec<Vec<wgpu::BindGroup>>,
    parameters: wgpu::Buffer,
    angles: u32,
}

/// The kernels of decode rows that choose pages.
#[derive(Debug)]
struct QuestKernels {
    bounds: Arc<Pipeline>,
    /// `[open arena, the window last][arena of the bounds]`.
    bounds_groups: Vec<Vec<wgpu::BindGroup>>,
    choose: Arc<Pipeline>,
    /// One bind group per arena of bounds.
    choose_groups: Vec<wgpu::BindGroup>,
}

/// Compiled attention kernels, bound to a pool and to the rows of a step.
#[derive(Debug)]
pub struct AttentionKernels {
    shape: CacheShape,
    append: Arc<Pipeline>,
    merge: Arc<Pipeline>,
    formats: Vec<FormatKernels>,
    quest: Option<QuestKernels>,
    append_groups: Vec<wgpu::BindGroup>,
    merge_group: wgpu::BindGroup,
    stride: u32,
    k_offset: u32,
    v_offset: u32,
    max_states: u32,
    held: Bytes,
    arenas: usize,
    /// Log-sum-exp of the last layer, `[rows][num_qo_heads]` f32, base 2.
    pub(crate) lse: wgpu::Buffer,
}

/// How large the buffers of [`AttentionKernels`] are.
#[derive(Clone, Copy, Debug)]
pub struct AttentionSizes<'a> {
    /// Attention states of one layer and step at most.
    pub max_states: u32,
    /// Rows of a step at most.
    pub max_rows: u32,
    /// Codecs besides f16 that pages can have.
    pub codecs: &'a [HiddenCodec],
    /// (layer, KV head) lists of a session.
    pub num_lists: u32,
    /// Longest context, in tokens.
    pub context_length: u32,
    /// Sessions whose decode rows may choose pages; none where no policy does.
    pub choosing: u32,
}

impl AttentionSizes<'_> {
    /// f16, which open pages have, and the others.
    fn formats(&self, shape: &CacheShape) -> Vec<Format> {
        let mut formats = vec![shape.format(HiddenCodec::F16)];
        for codec in self.codecs {
            if formats.iter().all(|format| format.codec != *codec) {
                formats.push(shape.format(*codec));
            }
        }
        formats
    }

    /// Device bytes of states, sums and codec parameters, besides the rows and the window.
    pub fn scratch_bytes(&self, shape: &CacheShape) -> Bytes {
        let formats = self.formats(shape);
        let parameters = formats.iter().map(|f| parameters::bytes(f, self.num_lists, self.context_length)).sum();
        self.parts(shape).into_iter().sum::<Bytes>() + parameters + self.page_scores(shape)
    }

    /// Scores of the pages that a layer chooses among.
    fn page_scores(&self, shape: &CacheShape) -> Bytes {
        let pages = u64::from(self.context_length.div_ceil(shape.page_size));
        let scores = u64::from(self.choosing) * u64::from(shape.heads.num_kv_heads) * pages;
        if self.choosing == 0 { Bytes::ZERO } else { Bytes(scores * WORD_BYTES).align_up(16) }
    }

    fn parts(&self, shape: &CacheShape) -> [Bytes; 3] {
        let states = u64::from(self.max_states.max(1));
        let lse = u64::from(self.max_rows.max(1)) * u64::from(shape.heads.num_qo_heads);
        [
            Bytes(states * u64::from(shape.heads.head_dim) * WORD_BYTES).align_up(16),
            Bytes(states * 2 * WORD_BYTES).align_up(16),
            Bytes(lse * WORD_BYTES).align_up(16),
        ]
    }
}

impl AttentionKernels {
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
        sizes: &AttentionSizes<'_>,
    ) -> Result<Self, KernelError> {
        let append = cache.get(device, &append::kernel(&shape, rows.positions))?;
        let merge = cache.get(device, &merge_states::kernel(&shape))?;
        let [o, ml, lse] = sizes.parts(&shape);
        let state_o = device.storage("attention states", o)?;
        let state_ml = device.storage("attention state maxima", ml)?;
        let lse = device.storage("log-sum-exp", lse)?;
        let mut held = Bytes(state_o.size() + state_ml.size() + lse.size());
        let quest = if sizes.choosing > 0 {
            let scores = device.storage("page scores", sizes.page_scores(&shape))?;
            held += Bytes(scores.size());
            let bounds = cache.get(device, &quest::page_bounds(&shape))?;
            let choose = cache.get(device, &quest::quest(&shape))?;
            let whole = Slot::Whole;
            let bounds_groups = pool
                .with_window()
                .map(|source| {
                    let bind = |target| bounds.bind(device, &[step, &pool.tables, source, target].map(whole));
                    pool.arenas.iter().map(bind).collect()
                })
                .collect();
            let choose_groups = pool
                .arenas
                .iter()
                .map(|arena| choose.bind(device, &[step, &pool.tables, arena, rows.qkv, &scores].map(whole)))
                .collect();
            Some(QuestKernels { bounds, bounds_groups, choose, choose_groups })
        } else {
            None
        };
        let (step, tables) = (Slot::Whole(step), Slot::Whole(&pool.tables));
        let (qkv, o, ml) = (Slot::Whole(rows.qkv), Slot::Whole(&state_o), Slot::Whole(&state_ml));
        let mut formats = Vec::new();
        for format in sizes.formats(&shape) {
            let bytes = parameters::bytes(&format, sizes.num_lists, sizes.context_length);
            let buffer = device.storage("codec parameters", bytes)?;
            held += Bytes(buffer.size());
            let parameters = Slot::Whole(&buffer);
            let decode = cache.get(
                device,
                &DecodeSpec {
                    format,
                    tier: device.tier(),
                    tuning: cache.tuning().decode(&device.summary().kind, &format),
                }
                .kernel(),
            )?;
            let prefill_spec = PrefillSpec::new(format, cache.tuning().prefill(device.tier()));
            let prefill = cache.get(device, &prefill_spec.kernel())?;
            let seal_spec = SealSpec::new(format);
            let seal = if format.codec.seals() { Some(cache.get(device, &seal_spec.kernel())?) } else { None };
            let reading = |pipeline: &Pipeline| -> Vec<wgpu::BindGroup> {
                let bind = |arena| pipeline.bind(device, &[step, tables, Slot::Whole(arena), qkv, o, ml, parameters]);
                pool.with_window().map(bind).collect()
            };
            let (decode_groups, prefill_groups) = (reading(&decode), reading(&prefill));
            let seal_groups = seal.as_ref().map_or_else(Vec::new, |seal| {
                let bind = |open, sealed| {
                    seal.bind(device, &[step, tables, parameters, Slot::Whole(open), Slot::Whole(sealed)])
                };
                pool.with_window().map(|open| pool.arenas.iter().map(|sealed| bind(open, sealed)).collect()).collect()
            });
            formats.push(FormatKernels {
                codec: format.codec,
                decode,
                prefill,
                prefill_tiles: prefill_spec.tiles(),
                seal,
                seal_strips: seal_spec.strips(),
                decode_groups,
                prefill_groups,
                seal_groups,
                angles: parameters::angles_at(&format, sizes.num_lists),
                parameters: buffer,
            });
        }
        Ok(Self {
            append_groups: pool
                .with_window()
                .map(|arena| append.bind(device, &[step, tables, qkv, Slot::Whole(arena)]))
                .collect(),
            merge_group: merge.bind(device, &[step, o, ml, Slot::Whole(rows.output), Slot::Whole(&lse)]),
            shape,
            append,
            merge,
            formats,
            quest,
            stride: rows.stride,
            k_offset: rows.k_offset,
            v_offset: rows.v_offset,
            max_states: sizes.max_states,
            held,
            arenas: pool.arenas.len(),
            lse,
        })
    }

    /// Uploads what the codecs take from a model.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn set_parameters(
        &self,
        device: &Device,
        uploader: &mut Uploader,
        source: &ParameterSource<'_>,
    ) -> Result<(), DeviceError> {
        for format in &self.formats {
            let values = parameters::write(&self.shape.format(format.codec), source);
            uploader.upload(device, bytemuck::cast_slice(&values), &format.parameters, 0)?;
        }
        Ok(())
    }

    /// The cache.
    pub const fn shape(&self) -> &CacheShape {
        &self.shape
    }

    /// Bytes of the attention states, the log-sum-exp and the codec parameters.
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

    /// Place of an arena among bind groups.
    fn arena(&self, arena: u16) -> usize {
        if arena == PageId::WINDOW { self.arenas } else { usize::from(arena) }
    }

    /// Codecs, f16 first, with the buffer of what each takes from a model, and the first vec4 of rotary tables in it.
    pub(super) fn parameters(&self) -> impl Iterator<Item = (HiddenCodec, &wgpu::Buffer, u32)> + '_ {
        self.formats.iter().map(|format| (format.codec, &format.parameters, format.angles))
    }

    /// Records sealing: `n_items` items from vec4 `items` on, which name pages of layer `layer`'s lists.
    pub fn record_seal(&self, recorder: &mut Recorder<'_>, place: Place, (items, n_items): (u32, u32), layer: u32) {
        let format = self.format(place.codec);
        let params = SealParams { items, n_items, layer };
        let group = &format.seal_groups[self.arena(place.arena)][self.arena(place.sealed_arena)];
        let seal = format.seal.as_ref().expect("only formats of sealed pages are places of sealing");
        recorder.dispatch(seal, group, &params, flat_grid(n_items * format.seal_strips));
    }

    fn format(&self, codec: HiddenCodec) -> &FormatKernels {
        let found = self.formats.iter().find(|format| format.codec == codec);
        found.expect("a planned page should have one of the codecs that the kernels were made for")
    }

    /// Records append; its first dispatch turns the queries, one of its own where nothing is appended.
    fn record_append(
        &self,
        recorder: &mut Recorder<'_>,
        layer_plan: &LayerPlan,
        lists: &ListOffsets,
        layer: u32,
        turning: Turning,
    ) {
        let Turning { angles, mut n_rows } = turning;
        let (stride, k_offset, v_offset) = (self.stride, self.k_offset, self.v_offset);
        let mut append = |arena: usize, (items, n_items)| {
            let n_rows = std::mem::take(&mut n_rows);
            let params = AppendParams { items, n_items, layer, stride, k_offset, v_offset, angles, n_rows };
            recorder.dispatch(&self.append, &self.append_groups[arena], &params, flat_grid(n_rows + n_items));
        };
        for (at, range) in &layer_plan.append {
            append(self.arena(at.arena), place(lists.append, 2, range));
        }
        if layer_plan.append.is_empty() {
            append(0, (0, 0));
        }
    }

    /// Records append, sealing, attention and merge of one layer.
    pub fn record(
        &self,
        recorder: &mut Recorder<'_>,
        plan: &AttentionPlan,
        lists: &ListOffsets,
        layer: u32,
        turning: Turning,
    ) {
        let layer_plan = &plan.plans[plan.of_layer[layer as usize]];
        let layer = layer - layer_plan.first_layer;
        let heads = self.shape.heads;
        self.record_append(recorder, layer_plan, lists, layer, turning);
        for (at, range) in &layer_plan.seal {
            self.record_seal(recorder, *at, place(lists.seal, 2, range), layer);
        }
        if let Some(quest) = &self.quest {
            for (at, range) in &layer_plan.bounds {
                let (items, n_items) = place(lists.bounds, 2, range);
                let group = &quest.bounds_groups[self.arena(at.arena)][self.arena(at.sealed_arena)];
                let params = PageBoundsParams { items, n_items, layer };
                recorder.dispatch(&quest.bounds, group, &params, flat_grid(n_items));
            }
            for (arena, range) in &layer_plan.quest {
                let (items, n_items) = place(lists.quest, 3, range);
                let params = QuestParams { items, n_items, layer, q_stride: self.stride };
                let group = &quest.choose_groups[self.arena(*arena)];
                recorder.dispatch(&quest.choose, group, &params, flat_grid(n_items));
            }
        }
        let attend = |recorder: &mut Recorder<'_>, list, vec4s, (at, range): &Dispatch, prefill: bool| {
            let format = self.format(at.codec);
            let (items, n_items) = place(list, vec4s, range);
            let scale_log2 = heads.sm_scale() * std::f32::consts::LOG2_E;
            let (q_stride, angles) = (self.stride, format.angles);
            let params = AttentionParams { items, n_items, layer, q_stride, scale_log2, angles };
            let (pipeline, groups, tiles) = if prefill {
                (&format.prefill, &format.prefill_groups, format.prefill_tiles)
            } else {
                (&format.decode, &format.decode_groups, 1)
            };
            recorder.dispatch(pipeline, &groups[self.arena(at.arena)], &params, flat_grid(n_items * tiles));
        };
        layer_plan.decode.iter().for_each(|d| attend(recorder, lists.decode, 2, d, false));
        layer_plan.prefill.iter().for_each(|d| attend(recorder, lists.prefill, 3, d, true));
        let (items, n_items) = place(lists.merge, 1, &layer_plan.merge);
        let params = MergeParams { items, n_items, o_stride: heads.q_width() };
        recorder.dispatch(&self.merge, &self.merge_group, &params, merge_states::grid(&self.shape, n_items));
    }
}

/// First vec4 and count of a range of items of `vec4s` vec4 each, in a list that begins at `list`.
const fn place(list: u32, vec4s: u32, range: &std::ops::Range<u32>) -> (u32, u32) {
    (list + range.start * vec4s, range.end - range.start)
}
