//! Activations, logits and the step buffer: everything between the weights and the pages, allocated once.

use super::EngineConfig;
use crate::compression::hidden::Transform;
use crate::device::{Device, DeviceError};
use crate::geometry::{Bytes, ModelGeometry, WORD_BYTES};
use crate::kernels::attention::CacheShape;
use crate::kernels::decode::DecodeSpec;
use crate::kernels::prefill::PrefillSpec;
use crate::kernels::{key_scores, score};

/// Changes of arena along one list that scratch is made for. Layers keep to one arena while it has room, so a list changes
/// where an arena filled up; one that is more scattered fails its step with the numbers.
const MAX_ARENA_CHANGES: u32 = 8;

/// Byte sizes of every scratch buffer.
#[derive(Clone, Copy, Debug)]
pub(super) struct ScratchSizes {
    pub(super) hidden: Bytes,
    pub(super) qkv: Bytes,
    pub(super) attention: Bytes,
    pub(super) activated: Bytes,
    pub(super) logits: Bytes,
    pub(super) tokens: Bytes,
    pub(super) step: Bytes,
    pub(super) attention_kernels: Bytes,
    pub(super) max_states: u32,
}

impl ScratchSizes {
    pub(super) fn new(geometry: &ModelGeometry, shape: &CacheShape, config: &EngineConfig, arenas: u32) -> Self {
        let rows = u64::from(config.max_rows);
        let heads = geometry.heads;
        let f32s = |width: u32| Bytes(rows * u64::from(width) * WORD_BYTES).align_up(16);
        let splits = config.context_length.div_ceil(DecodeSpec::KV_CHUNK);
        // A list that spills changes arena a few times; each change adds a state per row.
        let pages = config.context_length.div_ceil(config.page_size);
        // What was kept, and the tail, are runs of their own.
        let changes = (2 * (arenas - 1)).min(pages).min(MAX_ARENA_CHANGES) + 2 * u32::from(config.evictions.is_some());
        // What is sealed, and what is open; the open part may lie in the window, an arena of its own.
        let (sessions, wide) = (u64::from(config.max_sessions), u64::from(changes) + u64::from(config.seals()));
        let rows_with_states = sessions * (u64::from(splits) + wide) + rows * (1 + wide);
        // More than 32 bits count is also more than any budget holds, and is refused as such.
        let max_states = u32::try_from(u64::from(heads.num_qo_heads) * rows_with_states).unwrap_or(u32::MAX);
        let logit_rows = u64::from(config.max_logit_rows);
        Self {
            hidden: f32s(geometry.hidden_size),
            qkv: f32s(heads.q_width() + 2 * heads.kv_width()),
            attention: f32s(heads.q_width()),
            activated: f32s(geometry.intermediate_size),
            logits: Bytes(logit_rows * u64::from(geometry.vocab_size) * WORD_BYTES).align_up(16),
            tokens: Bytes(logit_rows * WORD_BYTES).align_up(16),
            step: step_bytes(geometry, shape, config, (splits, changes + u32::from(config.seals())), arenas),
            attention_kernels: config.attention_sizes(geometry, max_states).scratch_bytes(shape),
            max_states,
        }
    }

    /// Bytes of all of them.
    pub(super) fn total(&self) -> Bytes {
        [
            self.hidden,
            self.qkv,
            self.attention,
            self.activated,
            self.logits,
            self.tokens,
            self.step,
            self.attention_kernels,
        ]
        .into_iter()
        .sum()
    }
}

/// An upper bound on the words of one step: see `step.rs` for what is in it.
fn step_bytes(
    geometry: &ModelGeometry,
    shape: &CacheShape,
    config: &EngineConfig,
    (splits, changes): (u32, u32),
    arenas: u32,
) -> Bytes {
    let heads = geometry.heads;
    let (rows, sessions) = (u64::from(config.max_rows), u64::from(config.max_sessions));
    let (runs, changes) = (u64::from(splits + changes), u64::from(changes));
    let pages = rows / u64::from(shape.page_size) + 2 * sessions;
    // Tiles of sealed sequences end at pages.
    let tiles = rows / u64::from(PrefillSpec::item_positions(shape)) + sessions + pages;
    let append_and_seal = pages * (8 + 8);
    let lists = append_and_seal + sessions * runs * 8 + tiles * (1 + changes) * 12 + rows * 4;
    // Lists of different lengths are planned layer by layer.
    let ragged = arenas > 1 || config.evictions.is_some() || config.chooses;
    let plans = if ragged { u64::from(geometry.num_layers) } else { 1 };
    let observed = config.evictions.as_ref().map_or(0, |evictions| u64::from(evictions.slots));
    let scores = observed
        * (u64::from(config.context_length.div_ceil(score::TOKENS)) + changes + 2)
        * 12
        * u64::from(config.max_rows.div_ceil(score::rows_max(shape)));
    let lists = lists + scores;
    // An eviction has the buffer to itself: a few items for each list and run, and the angles of a page.
    let chosen = if config.chooses { (pages + sessions * (runs + changes)) * 20 } else { 0 };
    let lists = lists + chosen;
    let page_angles = u64::from(shape.page_size) * u64::from(heads.head_dim + 1);
    let eviction = if observed == 0 && config.evictions.is_none() {
        0
    } else {
        let key_items = u64::from(config.context_length.div_ceil(key_scores::TOKENS)) + changes + 4;
        u64::from(geometry.num_lists()) * (32 + 8 * key_items) + page_angles + 1024
    };
    let per_row = 1 + u64::from(heads.head_dim);
    let turned = config.codecs.iter().any(|c| matches!(c.k.transform, Transform::LowRank { .. }));
    let angles = if turned { pages * u64::from(shape.page_size) * u64::from(heads.head_dim) } else { 0 };
    let words =
        rows * per_row + u64::from(config.max_logit_rows) * 9 + angles + lists * u64::from(heads.num_kv_heads) * plans;
    Bytes((words.max(eviction) + 64) * WORD_BYTES).align_up(256)
}

/// The buffers.
#[derive(Debug)]
pub(super) struct Scratch {
    /// Residual stream.
    pub(super) x: wgpu::Buffer,
    pub(super) qkv: wgpu::Buffer,
    pub(super) attention: wgpu::Buffer,
    pub(super) activated: wgpu::Buffer,
    pub(super) logits: wgpu::Buffer,
    pub(super) tokens: wgpu::Buffer,
    pub(super) step: wgpu::Buffer,
}

impl Scratch {
    pub(super) fn new(device: &Device, sizes: &ScratchSizes) -> Result<Self, DeviceError> {
        Ok(Self {
            x: device.storage("residual stream", sizes.hidden)?,
            qkv: device.storage("qkv rows", sizes.qkv)?,
            attention: device.storage("attention output", sizes.attention)?,
            activated: device.storage("activated rows", sizes.activated)?,
            logits: device.storage("logits", sizes.logits)?,
            tokens: device.storage("sampled tokens", sizes.tokens)?,
            step: device.storage("step", sizes.step)?,
        })
    }

    /// Bytes of all of them.
    pub(super) fn bytes(&self) -> Bytes {
        let buffers = [&self.x, &self.qkv, &self.attention, &self.activated, &self.logits, &self.tokens, &self.step];
        Bytes(buffers.iter().map(|b| b.size()).sum())
    }
}
