//! Which tokens sampling may return, by sorting: the oracle of the sampling kernel.

use crate::reference::compare::argmax;

/// Probabilities after temperature, top-k and top-p; zero for tokens that were cut. Tokens equal to the one at a
/// cut are kept.
pub fn distribution(logits: &[f32], temperature: f32, top_k: u32, top_p: f32) -> Vec<f64> {
    let logits: Vec<f64> = logits.iter().map(|x| f64::from(*x)).collect();
    let mut p = vec![0.0; logits.len()];
    if temperature == 0.0 {
        p[argmax(&logits)] = 1.0;
        return p;
    }
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
    let at_cut = |n: usize| logits[order[n.clamp(1, order.len()) - 1]];
    let mut cut = if top_k == 0 { f64::NEG_INFINITY } else { at_cut(top_k as usize) };
    let weight = |i: usize, cut: f64| {
        if logits[i] >= cut { ((logits[i] - logits[order[0]]) / f64::from(temperature)).exp() } else { 0.0 }
    };
    let total: f64 = order.iter().map(|i| weight(*i, cut)).sum();
    if top_p < 1.0 {
        let mut mass = 0.0;
        let kept = order.iter().take_while(|i| {
            let before = mass;
            mass += weight(**i, cut) / total;
            before < f64::from(top_p)
        });
        cut = cut.max(at_cut(kept.count()));
    }
    let total: f64 = order.iter().map(|i| weight(*i, cut)).sum();
    for (i, p) in p.iter_mut().enumerate() {
        *p = weight(i, cut) / total;
    }
    p
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_keep_what_they_should() {
        let logits = [0.0, 3.0, 2.0, 1.0];
        let kept = |k, p| distribution(&logits, 1.0, k, p).iter().map(|p| *p > 0.0).collect::<Vec<_>>();
        assert_eq!(kept(0, 1.0), [true; 4], "no cut");
        assert_eq!(kept(2, 1.0), [false, true, true, false], "two largest");
        // Masses are 0.644, 0.237, 0.087, 0.032.
        assert_eq!(kept(0, 0.6), [false, true, false, false], "one token reaches 0.6");
        assert_eq!(kept(0, 0.7), [false, true, true, false], "two reach 0.7");
        assert_eq!(distribution(&logits, 0.0, 0, 1.0), [0.0, 1.0, 0.0, 0.0], "greedy");
    }
}
