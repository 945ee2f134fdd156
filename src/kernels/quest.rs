//! Quest: a decode row reads a few pages of a list, those whose keys could matter most (arXiv:2406.10774, section 3).
//!
//! ```text
//! bounds   low[c] = min_t k[t, c], high[c] = max_t k[t, c]          over a full page, before it is sealed
//! bound    b[page] = max_h sum_c max(q[h, c] low[c], q[h, c] high[c])   h: query heads of the KV head
//! chosen   the `n_chosen` pages of a run with the largest bounds, in order; ties go to the lower page
//! ```
//!
//! Nothing leaves the cache. Bounds of `page_size` pages are a page of their own, of f16: a page's minimum is stored as the key
//! of a token and its maximum as the value. The chosen pages' table entries are copied to entries that the row owns, and
//! decode reads those like any others. A list whose pages lie in several arenas chooses in each, in proportion.
//!
//! **Work.** `page_bounds`: one workgroup of 64 lanes per full page, lane = cell of channels. `quest`: one workgroup of 256
//! lanes per (row, KV head, run); lane = page; then a radix select as in [`select`](super::select).
//!
//! **Bytes.** `4 * head_dim` per page instead of `4 * head_dim * page_size`, and the chosen pages.

use super::abi::{Immediates as _, PageBoundsParams, QuestParams};
use super::attention::CacheShape;
use super::{Access, Binding, Constant, KernelSpec, modules};

/// Bounds of full pages.
pub fn page_bounds(shape: &CacheShape) -> KernelSpec {
    const BINDINGS: &[Binding] = &[
        ("step", Access::Read),
        ("tables", Access::Read),
        ("arena", Access::ReadWrite),
        ("bounds", Access::ReadWrite),
    ];
    let mut constants = shape.constants();
    constants.push(("WORKGROUP_SIZE".into(), Constant::U32(64)));
    let parts = vec![(&modules::F16).into(), (&modules::F16_VALUES).into(), (&modules::PAGE_BOUNDS).into()];
    KernelSpec { name: "page_bounds", constants, parts, bindings: BINDINGS, immediate_bytes: PageBoundsParams::BYTES }
}

/// The choice of pages.
pub fn quest(shape: &CacheShape) -> KernelSpec {
    const BINDINGS: &[Binding] = &[
        ("step", Access::Read),
        ("tables", Access::ReadWrite),
        ("bounds", Access::Read),
        ("q", Access::Read),
        ("page_scores", Access::ReadWrite),
    ];
    let mut constants = shape.constants();
    constants.push(("WORKGROUP_SIZE".into(), Constant::U32(256)));
    KernelSpec {
        name: "quest",
        constants,
        parts: vec![(&modules::QUEST).into()],
        bindings: BINDINGS,
        immediate_bytes: QuestParams::BYTES,
    }
}
