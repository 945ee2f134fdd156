//! The paper's equations in exact integers where they are about bytes.

use crate::compression::Compression;
use crate::geometry::{Bytes, ModelGeometry, PageGeometry};

/// Tokens over which a codec's bytes are counted: every group of tokens that a codec has divides it.
pub(super) const GROUP_TOKENS: u32 = 128;

/// Bytes of the cache of one session of `n_tokens` tokens, all of them sealed, without the rounding to pages:
/// `n_tokens * layers * num_kv_heads * bytes` (equation 1, with the codec's bytes per token and KV head, metadata
/// included).
pub fn kv_bytes(model: &ModelGeometry, compression: &Compression, n_tokens: u64) -> Bytes {
    let page = PageGeometry { page_size: GROUP_TOKENS, head_dim: model.heads.head_dim };
    let per_page = u64::from(model.num_lists()) * compression.hidden.page_bytes(page).0;
    Bytes((n_tokens * per_page).div_ceil(u64::from(GROUP_TOKENS)))
}

/// Concurrency: sessions that fit in `memory`, `floor(memory / kv)` (section 2.2 of the paper; `memory` is what the
/// weights leave). The largest `u64` when a session needs nothing.
pub const fn concurrency(memory: Bytes, per_session: Bytes) -> u64 {
    match memory.0.checked_div(per_session.0) {
        Some(n) => n,
        None => u64::MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::yi_34b;

    #[test]
    fn the_running_example_of_the_paper() {
        let full = Compression::default();
        let at = |tokens| kv_bytes(&yi_34b(), &full, tokens);
        assert_eq!(at(100_000), Bytes(24_576_000_000), "printed as 22.8 GB, which is GiB truncated");
        assert_eq!(at(4_000), Bytes(983_040_000), "printed as 0.91 GB");
        assert_eq!(at(1), Bytes(240 << 10), "240 KiB per token");
        let kivi: Compression = "hidden=kivi4:128".parse().expect("a codec");
        assert_eq!(kv_bytes(&yi_34b(), &kivi, 128), Bytes(128 * (240 << 10) * 17 / 64), "4.25 of 16 bits");
        // 80 GB less 68 GB of weights: one 50K session does not quite fit, twelve of 4K do.
        let left = Bytes(12_000_000_000);
        assert_eq!((concurrency(left, at(50_000)), concurrency(left, at(4_000))), (0, 12), "users on one A100");
        assert_eq!(concurrency(left, Bytes::ZERO), u64::MAX, "nothing fits any number of times");
    }
}
