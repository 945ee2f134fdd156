//! Work items of evictions and of chosen pages exactly as the shaders read them; see [`abi`](super::abi).

use bytemuck::{Pod, Zeroable};

/// Score: what a run of tokens of one KV head receives from rows of one sequence.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct ScoreItem {
    /// First query row.
    pub row_lo: u32,
    /// Query rows.
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
    /// First score that is written.
    pub out: u32,
    /// Table entries between one layer's list and the next.
    pub layer_stride: u32,
    /// The list that is read, `layer * num_kv_heads + kv_head` of its owner: whose bases lift latents.
    pub list: u32,
    /// Unused.
    pub pad: [u32; 2],
}

/// `key_scores`: a run of tokens of one list.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct KeyScoreItem {
    /// Table entry of the run's first page.
    pub page_lo: u32,
    /// Tokens of the run.
    pub n_tokens: u32,
    /// The list, `layer * num_kv_heads + kv_head`.
    pub list: u32,
    /// First score that is written.
    pub out: u32,
    /// 1: a summary begins with this run.
    pub begins: u32,
    /// Tokens before the run in its list.
    pub index: u32,
    /// Slot of the first token in its page.
    pub slot: u32,
    /// Unused.
    pub pad: u32,
}

/// Decide: a run of tokens of one list.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct DecideItem {
    /// First raw score of the first list that decides.
    pub raw: u32,
    /// Tokens of the list.
    pub n_tokens: u32,
    /// First score that is written.
    pub out: u32,
    /// The list.
    pub list: u32,
    /// First token.
    pub first: u32,
    /// Tokens.
    pub count: u32,
    /// Unused.
    pub pad: [u32; 2],
}

/// Select: one domain.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct SelectItem {
    /// First vec4 of its [`SelectList`]s in `step`.
    pub lists: u32,
    /// Lists.
    pub n_lists: u32,
    /// Tokens that stay.
    pub total: u32,
    /// Tokens that stay in each list at least.
    pub floor: u32,
    /// First tokens that stay in each.
    pub sink: u32,
    /// Last tokens that stay in each.
    pub recent: u32,
    /// Unused.
    pub pad: [u32; 2],
}

/// One list of a domain.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct SelectList {
    /// The list.
    pub list: u32,
    /// Tokens that it holds.
    pub n_tokens: u32,
    /// First of its scores and indices.
    pub at: u32,
    /// Unused.
    pub pad: u32,
}

/// Carry: the scores of one list.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct CarryItem {
    /// First score.
    pub raw: u32,
    /// First kept index.
    pub kept: u32,
    /// Tokens kept.
    pub n_kept: u32,
    /// Unused.
    pub pad: u32,
}

/// Gather: a page of kept tokens against one run of their source.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct GatherItem {
    /// Table entry of the run's first page.
    pub source: u32,
    /// Tokens before the run in its list.
    pub index: u32,
    /// Tokens of the run.
    pub n_tokens: u32,
    /// The list, `layer * num_kv_heads + kv_head`: whose bases lift latents.
    pub list: u32,
    /// Table entry of the page that is written.
    pub target: u32,
    /// First kept index of the page.
    pub kept: u32,
    /// Kept tokens of the page.
    pub n_kept: u32,
    /// Unused.
    pub pad: u32,
    /// First vec4 in `step` of angles by which keys are turned, or 0; the row of angles of tokens before some index,
    /// and from it on; that index.
    pub turn: [u32; 4],
}

/// Move pages: one page.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct MovePagesItem {
    /// First cell of the page in its arena.
    pub page: u32,
    /// First cell in the contiguous buffer.
    pub packed: u32,
    /// Cells of 16 bytes.
    pub n_cells: u32,
    /// Unused.
    pub pad: u32,
}

/// Merge layers: a page of two layers' tokens, gathered into two pages of the window.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct MergeLayersItem {
    /// Table entry of the lower layer's page in the window; it becomes that of directions.
    pub lower: u32,
    /// Table entry of the upper layer's page in the window.
    pub upper: u32,
    /// Table entry of the merged page.
    pub target: u32,
    /// First distance that is written.
    pub out: u32,
    /// Tokens of the page.
    pub n_tokens: u32,
    /// Unused.
    pub pad: [u32; 3],
}

/// Page bounds: one full page.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct PageBoundsItem {
    /// Table entry of the open page in the first layer of the work list.
    pub page: u32,
    /// Table entries between one layer's page and the next.
    pub page_stride: u32,
    /// Table entry of the page of bounds in that layer.
    pub bounds: u32,
    /// Table entries between one layer's and the next.
    pub bounds_stride: u32,
    /// The token that its bounds are.
    pub slot: u32,
    /// Unused.
    pub pad: [u32; 3],
}

/// Quest: one (row, KV head) and a run of pages.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct QuestItem {
    /// `row * num_kv_heads + kv_head`.
    pub q_row: u32,
    /// Table entry of the run's first page in the first layer of the work list.
    pub pages: u32,
    /// Table entries between one layer's list and the next.
    pub layer_stride: u32,
    /// Pages of the run.
    pub n_pages: u32,
    /// Table entry of the list's first page of bounds in that layer.
    pub bounds: u32,
    /// Table entries between one layer's and the next.
    pub bounds_stride: u32,
    /// Pages of the list before the run.
    pub first_page: u32,
    /// Pages to choose.
    pub n_chosen: u32,
    /// First table entry that is written.
    pub out: u32,
    /// First score that is written.
    pub scores: u32,
    /// Unused.
    pub pad: [u32; 2],
}

/// Moments: the queries of some rows.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct MomentItem {
    /// First row.
    pub row_lo: u32,
    /// Rows.
    pub n_rows: u32,
    /// First number of the sums.
    pub moments: u32,
    /// Unused.
    pub pad: u32,
}
