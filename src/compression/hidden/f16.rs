//! The f16 codec: a page holds its tokens as IEEE half precision.
//!
//! ```text
//! K  [head_dim / 8][page_size][8] f16      V  [page_size][head_dim / 8][8] f16      16-byte cells of 8 channels
//! ```
//!
//! In K, neighbouring tokens lie beside each other, for lanes that own tokens; in V, neighbouring channels do, for lanes that
//! own channels. Bytes: `4 * page_size * head_dim`. Encoding rounds to nearest even; decoding is exact.

use half::f16;

use crate::geometry::{Bytes, CELL_CHANNELS, F16_BYTES, PageGeometry};

/// Bytes of one page.
pub const fn page_bytes(page: PageGeometry) -> Bytes {
    Bytes(2 * page.elements() * F16_BYTES)
}

/// Index of channel `channel` of K of slot `token`, in f16 values from the page's start.
pub const fn k_index(page: PageGeometry, token: u32, channel: u32) -> usize {
    ((channel / CELL_CHANNELS * page.page_size + token) * CELL_CHANNELS + channel % CELL_CHANNELS) as usize
}

/// Index of channel `channel` of V of slot `token`, in f16 values from the page's start.
pub const fn v_index(page: PageGeometry, token: u32, channel: u32) -> usize {
    (page.page_size * page.head_dim + token * page.head_dim + channel) as usize
}

/// Writes K and V, each `[tokens][head_dim]`, into the page's first slots.
///
/// # Panics
/// When there are more tokens than slots, or `page_values` is not one page.
pub fn encode(page: PageGeometry, k: &[f32], v: &[f32], page_values: &mut [f16]) {
    let width = page.head_dim as usize;
    assert!(k.len() == v.len() && k.len() <= page.page_size as usize * width, "K and V should fit in one page");
    assert_eq!(page_values.len() as u64, 2 * page.elements(), "the target should be one page");
    for (token, (k_row, v_row)) in (0..).zip(k.chunks_exact(width).zip(v.chunks_exact(width))) {
        for (channel, (k, v)) in (0..).zip(k_row.iter().zip(v_row)) {
            page_values[k_index(page, token, channel)] = f16::from_f32(*k);
            page_values[v_index(page, token, channel)] = f16::from_f32(*v);
        }
    }
}

/// Reads K and V of slot `token`, each `[head_dim]`.
pub fn decode(page: PageGeometry, page_values: &[f16], token: u32) -> (Vec<f32>, Vec<f32>) {
    let k = (0..page.head_dim).map(|c| page_values[k_index(page, token, c)].to_f32()).collect();
    let v = (0..page.head_dim).map(|c| page_values[v_index(page, token, c)].to_f32()).collect();
    (k, v)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decode_returns_what_encode_wrote() {
        let page = PageGeometry { page_size: 16, head_dim: 24 };
        let value = |i: usize| i as f32 * 0.25 - 31.0;
        let k: Vec<f32> = (0..5 * 24).map(value).collect();
        let v: Vec<f32> = (0..5 * 24).map(|i| -value(i)).collect();
        let mut values = vec![f16::NAN; 2 * 16 * 24];
        encode(page, &k, &v, &mut values);
        for token in 0..5 {
            let (dk, dv) = decode(page, &values, token);
            let row = token as usize * 24..(token as usize + 1) * 24;
            assert_eq!((&dk[..], &dv[..]), (&k[row.clone()], &v[row]), "token {token}");
        }
        assert!(decode(page, &values, 5).0.iter().all(|x| x.is_nan()), "slots that were not written stay as they were");
        assert_eq!(page_bytes(page), Bytes(values.len() as u64 * 2), "bytes are exact");
    }
}
