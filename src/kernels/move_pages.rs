//! Move pages: pages of a session, wherever they lie in an arena, to or from one contiguous buffer.
//!
//! ```text
//! leaves:  packed[item.packed ..] = arena[item.page ..]       n_cells cells of 16 bytes, as they are: f16 or codes
//! comes:   arena[item.page ..] = packed[item.packed ..]
//! ```
//!
//! A link to the host is fast for few large copies and slow for many small ones; a page is 1 to 32 KiB. Pages that lie together
//! in a long run are copied without this kernel.
//!
//! **Work.** One workgroup of 256 lanes per page, 16 bytes a lane. **Bytes.** Each page is read once and written once on the
//! device, which its memory does tens of times faster than the link.

use super::abi::{Immediates as _, MovePagesParams};
use super::{Access, Binding, Constant, KernelSpec, modules};

const BINDINGS: &[Binding] =
    &[("step", Access::Read), ("arena", Access::ReadWrite), ("packed_pages", Access::ReadWrite)];

/// The kernel; pages of all codecs are bytes to it.
pub fn kernel() -> KernelSpec {
    KernelSpec {
        name: "move_pages",
        constants: vec![("WORKGROUP_SIZE".into(), Constant::U32(256))],
        parts: vec![(&modules::MOVE_PAGES).into()],
        bindings: BINDINGS,
        immediate_bytes: MovePagesParams::BYTES,
    }
}
