//! What codecs take from a model besides pages: bases of latents and rotary tables, as one buffer per format.
//!
//! ```text
//! [layer][KV head] of   [head_dim][rank] f32 of each side that is projected
//! then                  (cos, sin) [page_size][head_dim / 2] of places in a page, and
//!                       (cos, sin) [pages][head_dim / 2] of the first positions of pages, where keys are projected
//! ```

use super::attention::Format;
use crate::compression::hidden::{HeadParameters, lowrank};
use crate::geometry::{Bytes, WORD_BYTES};

/// What the codecs of a cache need to know of a model.
#[derive(Clone, Copy, Debug)]
pub struct ParameterSource<'a> {
    /// Per `[layer][KV head]`.
    pub heads: &'a [HeadParameters],
    /// Longest context, in tokens.
    pub context_length: u32,
}

/// Bytes of a format's buffer for `num_lists` heads.
pub(super) fn bytes(format: &Format, num_lists: u32, context_length: u32) -> Bytes {
    let heads = u64::from(num_lists) * u64::from(format.parameter_vecs().all) * 16;
    let pages = context_length.div_ceil(format.shape.page_size);
    let rows = if format.needs_angles() { u64::from(format.shape.page_size + pages) } else { 0 };
    // A binding can not be empty.
    Bytes(heads + rows * u64::from(format.shape.heads.head_dim) * WORD_BYTES).align_up(16).max(Bytes(16))
}

/// First vec4 of the rotary tables.
pub(super) fn angles_at(format: &Format, num_lists: u32) -> u32 {
    num_lists * format.parameter_vecs().all
}

/// The buffer's contents.
pub(super) fn write(format: &Format, source: &ParameterSource<'_>) -> Vec<f32> {
    let (head_dim, page_size) = (format.shape.heads.head_dim, format.shape.page_size);
    let vecs = format.parameter_vecs();
    let mut out = Vec::new();
    for head in source.heads {
        let (codec, n) = (format.codec, head_dim as usize);
        for (basis, codec, vecs) in
            [(&head.key_basis, codec.k, vecs.value_basis), (&head.value_basis, codec.v, vecs.all - vecs.value_basis)]
        {
            if vecs > 0 {
                let columns = codec.width(head_dim) as usize;
                out.extend(basis.chunks_exact(n).flat_map(|row| row[..columns].iter().map(|b| b.to_f32())));
            }
        }
    }
    if format.needs_angles() {
        let theta = source.heads.first().map_or(0.0, |head| head.rope_theta);
        let pages = (0..source.context_length.div_ceil(page_size)).map(|page| page * page_size);
        for position in (0..page_size).chain(pages) {
            out.extend(lowrank::angles(position, head_dim, theta).into_iter().flat_map(|(cos, sin)| [cos, sin]));
        }
    }
    out.resize(out.len().next_multiple_of(4), 0.0);
    out
}
