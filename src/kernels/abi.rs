//! Parameter structs and work items exactly as the shaders read them.
//!
//! Immediate data are structs of 32-bit scalars; `tests/kernel_abi.rs` reflects every shader and compares name and
//! offset of every field with the table that [`Immediates::FIELDS`] gives. Work items are rows of the `step` buffer,
//! read as `vec4<u32>`.

use bytemuck::{Pod, Zeroable};

pub use super::abi_evictions::{
    CarryItem, DecideItem, GatherItem, KeyScoreItem, MergeLayersItem, MomentItem, MovePagesItem, PageBoundsItem,
    QuestItem, ScoreItem, SelectItem, SelectList,
};

/// A struct of immediate data with its fields as the shader must declare them.
pub trait Immediates: Pod {
    /// WGSL name of the struct.
    const NAME: &'static str;
    /// Field names and byte offsets.
    const FIELDS: &'static [(&'static str, usize)];
    /// Bytes.
    const BYTES: u32;
}

macro_rules! immediates {
    ($($(#[$doc:meta])* struct $name:ident { $($(#[$field_doc:meta])* $field:ident: $ty:ty,)* })*) => {$(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
        pub struct $name { $($(#[$field_doc])* pub $field: $ty,)* }

        impl Immediates for $name {
            const NAME: &'static str = stringify!($name);
            const FIELDS: &'static [(&'static str, usize)] =
                &[$((stringify!($field), std::mem::offset_of!($name, $field)),)*];
            #[expect(clippy::cast_possible_truncation, reason = "a handful of words")]
            const BYTES: u32 = size_of::<Self>() as u32;
        }
    )*};
}

immediates! {
    /// Immediate data of decode and prefill.
    struct AttentionParams {
        /// First vec4 of the work list in `step`.
        items: u32,
        /// Items in it.
        n_items: u32,
        /// Layers after the one whose pages the items name.
        layer: u32,
        /// f32 values between query rows.
        q_stride: u32,
        /// `sm_scale * log2(e)`.
        scale_log2: f32,
        /// First vec4 of the rotary tables in `parameters`.
        angles: u32,
    }
    /// Immediate data of seal.
    struct SealParams {
        /// First vec4 of the work list in `step`.
        items: u32,
        /// Items in it.
        n_items: u32,
        /// Layers after the one whose pages the items name.
        layer: u32,
    }
    /// Immediate data of `merge_states`.
    struct MergeParams {
        /// First vec4 of the work list in `step`.
        items: u32,
        /// Items in it.
        n_items: u32,
        /// f32 values between output rows.
        o_stride: u32,
    }
    /// Immediate data of append.
    struct AppendParams {
        /// First vec4 of the work list in `step`.
        items: u32,
        /// Items in it.
        n_items: u32,
        /// Layers after the one whose pages the items name.
        layer: u32,
        /// f32 values between rows.
        stride: u32,
        /// f32 values before the keys in a row.
        k_offset: u32,
        /// f32 values before the values in a row.
        v_offset: u32,
        /// First vec4 of the `[row][head_dim / 2]` table of (cos, sin) in `step`.
        angles: u32,
        /// Rows whose queries are turned.
        n_rows: u32,
    }
    /// Immediate data of score.
    struct ScoreParams {
        /// First vec4 of the work list in `step`.
        items: u32,
        /// Items in it.
        n_items: u32,
        /// Layers after the one whose pages the items name.
        layer: u32,
        /// f32 values between query rows.
        q_stride: u32,
        /// `sm_scale * log2(e)`.
        scale_log2: f32,
        /// First vec4 of the rotary tables in `parameters`.
        angles: u32,
        /// Scores between one layer's list and the next.
        list_stride: u32,
        /// 1: the largest probability over rows and heads; 0: the sum over rows of the mean over heads.
        largest: u32,
    }
    /// Immediate data of `key_scores`.
    struct KeyScoreParams {
        /// First vec4 of the work list in `step`.
        items: u32,
        /// Items in it.
        n_items: u32,
        /// Always 0: items name pages of their own layer.
        layer: u32,
        /// First vec4 of the rotary tables in `parameters`.
        angles: u32,
        /// What is computed; see [`KeyScoreMode`](super::key_scores::KeyScoreMode).
        mode: u32,
        /// First tokens of a list that `expected` leaves out.
        skip: u32,
    }
    /// Immediate data of decide.
    struct DecideParams {
        /// First vec4 of the work list in `step`.
        items: u32,
        /// Items in it.
        n_items: u32,
        /// Tokens that are averaged over, odd.
        kernel: u32,
        /// Lists that decide together.
        n_share: u32,
        /// Raw scores between them.
        share_stride: u32,
        /// 1: scores are a hash of (seed, list, token).
        random: u32,
        /// Seed of the hash.
        seed: u32,
    }
    /// Immediate data of select.
    struct SelectParams {
        /// First vec4 of the work list in `step`.
        items: u32,
        /// Items in it.
        n_items: u32,
    }
    /// Immediate data of `move_pages`.
    struct MovePagesParams {
        /// First vec4 of the work list in `step`.
        items: u32,
        /// Items in it.
        n_items: u32,
        /// 1: from the arena into the contiguous buffer; 0: back.
        leaves: u32,
    }
    /// Immediate data of carry.
    struct CarryParams {
        /// First vec4 of the work list in `step`.
        items: u32,
        /// Items in it.
        n_items: u32,
        /// Scores of a list.
        capacity: u32,
    }
    /// Immediate data of gather.
    struct GatherParams {
        /// First vec4 of the work list in `step`.
        items: u32,
        /// Items in it.
        n_items: u32,
        /// Always 0: items name pages of their own layer.
        layer: u32,
        /// First vec4 of the rotary tables in `parameters`.
        angles: u32,
    }
    /// Immediate data of `merge_layers`.
    struct MergeLayersParams {
        /// First vec4 of the work list in `step`.
        items: u32,
        /// Items in it.
        n_items: u32,
        /// 1: pages are merged; 0: distances are measured.
        merges: u32,
        /// First word of the lengths in a merged page.
        lengths: u32,
    }
    /// Immediate data of `page_bounds`.
    struct PageBoundsParams {
        /// First vec4 of the work list in `step`.
        items: u32,
        /// Items in it.
        n_items: u32,
        /// Layers after the one whose pages the items name.
        layer: u32,
    }
    /// Immediate data of quest.
    struct QuestParams {
        /// First vec4 of the work list in `step`.
        items: u32,
        /// Items in it.
        n_items: u32,
        /// Layers after the one whose pages the items name.
        layer: u32,
        /// f32 values between query rows.
        q_stride: u32,
    }
    /// Immediate data of moments.
    struct MomentParams {
        /// First vec4 of the work list in `step`.
        items: u32,
        /// Items in it.
        n_items: u32,
        /// Layer.
        layer: u32,
        /// f32 values between query rows.
        q_stride: u32,
    }
    /// Immediate data of embed.
    struct EmbedParams {
        /// First u32 of the token list in `step`.
        tokens: u32,
        /// Rows.
        n_rows: u32,
        /// `hidden_size / 8`.
        cells: u32,
        /// Rows of the embedding.
        vocab: u32,
    }
    /// Immediate data of matmul and matvec.
    struct MatmulParams {
        /// First row of x, or of the list of rows.
        x_row: u32,
        /// First row of y.
        y_row: u32,
        /// Rows.
        n_rows: u32,
        /// Output features.
        cols: u32,
        /// Input features / 8.
        cells: u32,
        /// Output features before it are left as they are.
        first_col: u32,
        /// First u32 of a list of rows of x in `step`, or [`NO_LIST`](super::matmul::NO_LIST).
        list: u32,
        /// Added to the mean square, where rows are normed.
        eps: f32,
    }
    /// Immediate data of sample.
    struct SampleParams {
        /// First vec4 of the work list in `step`.
        items: u32,
        /// Items in it.
        n_items: u32,
        /// Logits of a row.
        vocab: u32,
    }
    /// Immediate data of stream.
    struct StreamParams {
        /// Cells of 16 bytes.
        n_cells: u32,
    }
}

/// Words of one row of the `step` buffer.
pub const VEC4_WORDS: usize = 4;

/// Decode: one (row, KV head) against one run of tokens.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct DecodeItem {
    /// `row * num_kv_heads + kv_head`.
    pub q_row: u32,
    /// Tokens of the run.
    pub n_tokens: u32,
    /// Table entry of the run's first page in the first layer of the work list.
    pub page_lo: u32,
    /// First attention state that the item writes, one per query head of the group.
    pub slot: u32,
    /// Table entries between one layer's list and the next.
    pub layer_stride: u32,
    /// The list that is read, `layer * num_kv_heads + kv_head` of its owner: whose bases lift latents.
    pub list: u32,
    /// Which of two merged layers reads: 0 or 1.
    pub member: u32,
    /// Unused.
    pub pad: u32,
}

/// Prefill: a tile of query rows of one KV head against one run of tokens.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct PrefillItem {
    /// First query row.
    pub row_lo: u32,
    /// Query positions in the tile.
    pub n_rows: u32,
    /// KV head.
    pub kv_head: u32,
    /// Table entry of the run's first page in the first layer of the work list.
    pub page_lo: u32,
    /// Tokens of the run.
    pub n_tokens: u32,
    /// Position of the run's first token, or one that it does not exceed.
    pub first_token: u32,
    /// Position of the first query row.
    pub first_index: u32,
    /// First attention state that the item writes, one per (position, query head of the group).
    pub slot: u32,
    /// Table entries between one layer's list and the next.
    pub layer_stride: u32,
    /// The list that is read, `layer * num_kv_heads + kv_head` of its owner: whose bases lift latents.
    pub list: u32,
    /// Which of two merged layers reads: 0 or 1.
    pub member: u32,
    /// Unused.
    pub pad: u32,
}

/// Merge: the states of one (row, KV head).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct MergeItem {
    /// `row * num_kv_heads + kv_head`.
    pub q_row: u32,
    /// First state of the first run.
    pub state_lo: u32,
    /// Runs.
    pub n_states: u32,
    /// States between one run and the next.
    pub stride: u32,
}

/// Append: consecutive rows into one page of one KV head.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct AppendItem {
    /// First row.
    pub row_lo: u32,
    /// Rows.
    pub n_rows: u32,
    /// KV head.
    pub kv_head: u32,
    /// Table entry of the page in the first layer of the work list.
    pub page_entry: u32,
    /// Table entries between one layer's list and the next.
    pub layer_stride: u32,
    /// Slot of the first row in the page.
    pub slot_in_page: u32,
    /// Unused.
    pub pad: [u32; 2],
}

/// Seal: one full page of one KV head.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct SealItem {
    /// Table entry of the open page in the first layer of the work list.
    pub open_entry: u32,
    /// Table entries between one layer's open page and the next.
    pub open_stride: u32,
    /// The list, `layer * num_kv_heads + kv_head`.
    pub list: u32,
    /// Position of the page's first token.
    pub first_position: u32,
    /// Table entry of the sealed page in the first layer of the work list.
    pub sealed_entry: u32,
    /// Table entries between one layer's sealed page and the next.
    pub sealed_stride: u32,
    /// First vec4 of (cos, sin) of the page's tokens in `step`, where the codec needs them.
    pub angles: u32,
    /// First word of the positions of the page's tokens in `step`; 0 where they are consecutive.
    pub positions: u32,
}

/// Sample: one row of logits.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub struct SampleItem {
    /// Row of logits.
    pub row: u32,
    /// Keep this many of the largest logits; 0 keeps all.
    pub top_k: u32,
    /// Seed.
    pub seed: [u32; 2],
    /// `1 / temperature`; 0 takes the largest logit.
    pub inverse_temperature: f32,
    /// Keep the most probable tokens until their mass reaches this.
    pub top_p: f32,
    /// Position of the sampled token in its sequence, so that each draw is its own.
    pub position: u32,
    /// Unused.
    pub pad: u32,
}
