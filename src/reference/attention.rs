//! Causal grouped-query attention, dense and in f64: the oracle of decode, prefill and merge.
//!
//! ```
//! use concertina::geometry::HeadGeometry;
//! use concertina::reference::attention::{Context, attend};
//! // One head of 8 channels, two tokens with equal keys: the output is the mean of the values.
//! let heads = HeadGeometry { num_qo_heads: 1, num_kv_heads: 1, head_dim: 8 };
//! let v: Vec<f32> = (0..16).map(|i| i as f32).collect();
//! let context = Context { heads, k: &[1.0; 16], v: &v };
//! let row = attend(&context, &[0.5; 8], 2);
//! assert_eq!(row.o, [4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0]);
//! ```

use crate::geometry::HeadGeometry;

/// The decoded cache of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// Attention heads.
    pub heads: HeadGeometry,
    /// Keys, `[tokens][num_kv_heads][head_dim]`.
    pub k: &'a [f32],
    /// Values, `[tokens][num_kv_heads][head_dim]`.
    pub v: &'a [f32],
}

/// What one query row gives.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// `[num_qo_heads][head_dim]`.
    pub o: Vec<f64>,
    /// Log-sum-exp of the scaled scores per query head, base 2; negative infinity when no token is seen.
    pub lse: Vec<f64>,
    /// Sum over tokens of probability times |value| per output, for error bounds: `[num_qo_heads][head_dim]`.
    pub absolute: Vec<f64>,
}

/// `o[h] = sum_t softmax_t(sm_scale * <q[h], k[t, h / group_size]>) v[t, h / group_size]` over the first `n_seen` tokens.
///
/// `q` is `[num_qo_heads][head_dim]`.
///
/// # Panics
/// When a shape does not fit.
pub fn attend(context: &Context<'_>, q: &[f32], n_seen: usize) -> Row {
    let heads = context.heads;
    let width = heads.head_dim as usize;
    let kv_width = heads.kv_width() as usize;
    assert_eq!(q.len(), heads.q_width() as usize, "q should be one row");
    assert!(context.k.len() >= n_seen * kv_width && context.v.len() >= n_seen * kv_width, "the cache is too short");
    let mut row = Row { o: vec![0.0; q.len()], lse: Vec::new(), absolute: vec![0.0; q.len()] };
    for head in 0..heads.num_qo_heads as usize {
        let kv_head = head / heads.group_size() as usize;
        let query = &q[head * width..(head + 1) * width];
        let at = |token: usize| token * kv_width + kv_head * width..token * kv_width + (kv_head + 1) * width;
        let scores: Vec<f64> = (0..n_seen)
            .map(|token| {
                let products = query.iter().zip(&context.k[at(token)]).map(|(a, b)| f64::from(*a) * f64::from(*b));
                products.sum::<f64>() / f64::from(heads.head_dim).sqrt()
            })
            .collect();
        let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = scores.iter().map(|s| (s - top).exp()).sum();
        row.lse.push(if n_seen == 0 { f64::NEG_INFINITY } else { (top + total.ln()) * std::f64::consts::LOG2_E });
        for (token, score) in scores.iter().enumerate() {
            let p = (score - top).exp() / total;
            for (channel, v) in context.v[at(token)].iter().enumerate() {
                row.o[head * width + channel] += p * f64::from(*v);
                row.absolute[head * width + channel] += p * f64::from(*v).abs();
            }
        }
    }
    row
}
