//! The kernels: each is one WGSL file under `shaders/` and one Rust file here whose module doc is its specification.
//!
//! A [`KernelSpec`] is plain data: the WGSL modules to join, the constants that the model and the cache format fix,
//! the bindings, and the size of the immediate data. [`mod@link`] turns it into one WGSL text, [`pipeline`] compiles that
//! for a device and caches it, [`recording`] puts dispatches into a pass. [`registry`] enumerates every supported spec, so
//! that a test without any GPU can link, validate and reflect all of them.
//!
//! A codec's file is written for one side of a page. Kernels that read both sides join it twice, as [`Part`]s under the names
//! of keys and of values.
//!
//! Text is specialised by constants in a prelude rather than by WGSL `override`s, because register tiles (function
//! arrays) and loop bounds that depend on `head_dim` and `group_size` must be constant expressions.

pub mod abi;
mod abi_evictions;
pub mod append;
pub mod attention;
mod by_place;
pub mod decode;
pub mod decode_choices;
pub mod embed;
pub mod eviction;
pub mod executor;
pub mod gather;
pub mod key_scores;
pub mod latent_decode;
pub mod link;
pub mod matmul;
pub mod merge_layers;
pub mod merge_states;
pub mod moments;
pub mod move_pages;
pub mod parameters;
pub mod pipeline;
pub mod plan;
mod plan_lists;
pub mod prefill;
pub mod prefill_coop;
pub mod product_tuning;
pub mod quest;
pub mod recording;
pub mod registry;
pub mod run_once;
pub mod sample;
pub mod score;
pub mod seal;
pub mod select;
pub mod self_test;
pub mod stream;
pub mod tuning;
mod unroll;
mod words;

use std::borrow::Cow;

use crate::compression::hidden::Side;
pub use link::{LinkedShader, link};
pub use pipeline::{KernelError, Pipeline, PipelineCache, Slot};
pub use recording::Recorder;

/// One WGSL file.
#[derive(Debug)]
pub struct Module {
    /// Path below `shaders/`.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
}

impl PartialEq for Module {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for Module {}

impl std::hash::Hash for Module {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.name.hash(state);
    }
}

macro_rules! modules {
    ($($(#[$doc:meta])* $name:ident = $path:literal;)*) => {
        $($(#[$doc])* pub static $name: $crate::kernels::Module = $crate::kernels::Module {
            name: $path,
            text: include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/shaders/", $path)),
        };)*
    };
}

/// The WGSL files, one constant each.
pub mod modules {
    modules! {
        /// f32 to f16 bits, rounding to nearest even on every device.
        F16 = "common/f16.wgsl";
        /// Reductions over a workgroup through workgroup memory.
        LANES_PORTABLE = "common/lanes_portable.wgsl";
        /// The same reductions with subgroup operations.
        LANES_SUBGROUP = "common/lanes_subgroup.wgsl";
        /// f16 bits to f32 in integers.
        F16_VALUES = "common/f16_values.wgsl";
        /// Cells of f16 as f32, and in an order.
        F16_CELLS = "common/f16_cells.wgsl";
        /// Planes of codes.
        PLANES = "common/planes.wgsl";
        /// Rounding of a group between its minimum and maximum.
        CODEC_AFFINE = "codec/affine.wgsl";
        /// The f16 codec.
        CODEC_FLOAT16 = "codec/float16.wgsl";
        /// The f32 codec.
        CODEC_FLOAT32 = "codec/float32.wgsl";
        /// The fp8 codec.
        CODEC_FP8 = "codec/fp8.wgsl";
        /// The int8 codec.
        CODEC_INT8 = "codec/int8.wgsl";
        /// The KIVI codecs.
        CODEC_KIVI = "codec/kivi.wgsl";
        /// The codecs of rotated channels.
        CODEC_ROT = "codec/rot.wgsl";
        /// What every reader of pages shares.
        ATTENTION_SHARED = "attention/shared.wgsl";
        /// Parameters and bindings of decode and prefill.
        ATTENTION_BINDINGS = "attention/bindings.wgsl";
        /// What matmul and matvec share.
        PRODUCT = "model/product.wgsl";
        /// Split-KV decode.
        DECODE = "attention/decode.wgsl";
        /// The same in register tiles.
        DECODE_TILED = "attention/decode_tiled.wgsl";
        /// Its scores by f32 products.
        DECODE_PRODUCTS = "attention/decode_products.wgsl";
        /// Its scores by integer products of codes.
        DECODE_DIGITS = "attention/decode_digits.wgsl";
        /// Random rotations of rows of channels.
        ROTATE_ROWS = "attention/rotate_rows.wgsl";
        /// The rows of a prefill workgroup.
        PREFILL_TILE = "attention/prefill_tile.wgsl";
        /// Rows whose channels are turned in the output slots.
        PREFILL_ROWS = "attention/prefill_rows.wgsl";
        /// Keys into workgroup memory.
        STAGE_KEYS = "attention/stage_keys.wgsl";
        /// Values into workgroup memory.
        PREFILL_STAGE = "attention/prefill_stage.wgsl";
        /// Chunked causal prefill.
        PREFILL = "attention/prefill.wgsl";
        /// The same on cooperative matrices.
        PREFILL_COOP = "attention/prefill_coop.wgsl";
        /// The same for keys and values that are no plain channels.
        PREFILL_GENERAL = "attention/prefill_general.wgsl";
        /// Merging attention states.
        MERGE_STATES = "attention/merge_states.wgsl";
        /// New tokens into pages.
        APPEND = "cache/append.wgsl";
        /// Full pages into codes.
        SEAL = "cache/seal.wgsl";
        /// A side whose scales belong to tokens.
        SEAL_BLOCKS = "cache/seal_blocks.wgsl";
        /// Keys whose scales belong to channels.
        SEAL_CHANNELS = "cache/seal_channels.wgsl";
        /// A side of rotated channels.
        SEAL_ROTATED = "cache/seal_rotated.wgsl";
        /// A side of any other kind.
        SEAL_GENERAL = "cache/seal_general.wgsl";
        /// Pages to and from one contiguous buffer.
        MOVE_PAGES = "cache/move_pages.wgsl";
        /// Smallest and largest keys of full pages.
        PAGE_BOUNDS = "attention/page_bounds.wgsl";
        /// Pages that a decode row reads.
        QUEST = "attention/quest.wgsl";
        /// One token's key or value as plain channels.
        EVICT_ROWS = "evict/rows.wgsl";
        /// Attention that tokens receive.
        SCORE = "evict/score.wgsl";
        /// What both texts of score share.
        SCORE_BINDINGS = "evict/score_bindings.wgsl";
        /// The same for keys that are no plain channels.
        SCORE_GENERAL = "evict/score_general.wgsl";
        /// Scores from keys.
        KEY_SCORES = "evict/key_scores.wgsl";
        /// What tokens are ranked by.
        DECIDE = "evict/decide.wgsl";
        /// Which tokens stay.
        SELECT = "evict/select.wgsl";
        /// Scores of tokens that stayed.
        CARRY = "evict/carry.wgsl";
        /// Kept tokens into fresh pages.
        GATHER = "evict/gather.wgsl";
        /// Tokens of two layers as directions in common.
        MERGE_LAYERS = "evict/merge_layers.wgsl";
        /// Sums of queries and of their products.
        MOMENTS = "evict/moments.wgsl";
        /// Token embedding.
        EMBED = "model/embed.wgsl";
        /// Rows of a product as they are.
        ROWS_PLAIN = "model/rows_plain.wgsl";
        /// Rows of a product under RMS norm.
        ROWS_NORMED = "model/rows_normed.wgsl";
        /// Matrix product for many rows.
        MATMUL = "model/matmul.wgsl";
        /// The same without staging.
        MATMUL_DIRECT = "model/matmul_direct.wgsl";
        /// Matrix product for many rows on cooperative matrices.
        MATMUL_COOP = "model/matmul_coop.wgsl";
        /// Matrix product for few rows.
        MATVEC = "model/matvec.wgsl";
        /// Sampling.
        SAMPLE = "model/sample.wgsl";
        /// Decode as one would write it first.
        DECODE_PLAIN = "bench/decode_plain.wgsl";
        /// A buffer from end to end.
        STREAM = "bench/stream.wgsl";
    }
}

/// How a shader may use a binding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// `var<storage, read>`.
    Read,
    /// `var<storage, read_write>`.
    ReadWrite,
}

/// One storage binding: its WGSL name and access; its position is its binding number.
pub type Binding = (&'static str, Access);

/// A WGSL constant of the prelude.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Constant {
    /// `const NAME = 1u;`
    U32(u32),
    /// `const NAME = true;`
    Bool(bool),
    /// `const NAME = 0.5f;`, by its bits, so that specs can be compared.
    F32(u32),
}

/// A WGSL file, as it is or under the names of a side: then every `codec_x`, `CODEC_X`, `CodecX`, `side_x` and `SIDE_X` in it reads
/// `key_codec_x`, `KEY_CODEC_X`, `KeyCodecX`, `key_x` and `KEY_X` (or those of values).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Part {
    /// The file.
    pub module: &'static Module,
    /// The side that it is joined for.
    pub side: Option<Side>,
}

impl From<&'static Module> for Part {
    fn from(module: &'static Module) -> Self {
        Self { module, side: None }
    }
}

/// Everything that decides a kernel's text and layout.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct KernelSpec {
    /// For labels, errors and reports.
    pub name: &'static str,
    /// Constants of the prelude, in order.
    pub constants: Vec<(Cow<'static, str>, Constant)>,
    /// WGSL files, joined in order.
    pub parts: Vec<Part>,
    /// Storage bindings of group 0.
    pub bindings: &'static [Binding],
    /// Bytes of `var<immediate>`.
    pub immediate_bytes: u32,
}

impl KernelSpec {
    /// Whether it computes on cooperative matrices: compiled only where the [`self_test`] passes.
    pub fn is_cooperative(&self) -> bool {
        self.parts.iter().any(|part| part.module.text.contains("enable wgpu_cooperative_matrix;"))
    }
}

/// Workgroups of one dispatch are laid out in rows of this many, because WebGPU allows no more in one dimension.
pub const GRID_WIDTH: u32 = 65_535;

/// A dispatch of `n` workgroups as a grid; the shader computes `y * GRID_WIDTH + x` and stops at `n`.
pub const fn flat_grid(n: u32) -> [u32; 3] {
    if n <= GRID_WIDTH { [n, 1, 1] } else { [GRID_WIDTH, n.div_ceil(GRID_WIDTH), 1] }
}
