//! `pyramidkv:BUDGET`: as [`snapkv`], but early layers keep more than late ones (`PyramidKV`,
//! arXiv:2406.02069, section 4.2).
//!
//! ```text
//! w       = the window, which every layer keeps;  b = the budget of a list on average;  n = tokens
//! min     = (b - w) / beta, rounded down;  max = 2 (b - w) - min
//! if max > n - w: max = n - w, min = 2 (b - w) - max
//! b_layer = w + max - layer (max - min) / (layers - 1)
//! ```
//!
//! Attention spreads widely in early layers and settles on few tokens later on. The total over layers is that of a uniform
//! budget, exactly: steps are rounded down in the first half of the layers, and each layer of the second half takes
//! what its mirror image left.

use super::{Action, Allocation, Entry, Method, Number, Parameter, Rule, Values, snapkv};

const BETA: Parameter =
    Parameter { name: "beta", number: Number::From(1), default: 20, summary: "how steep the pyramid is" };

/// Its line of the registry.
pub const ENTRY: Entry = Entry {
    name: "pyramidkv",
    syntax: "pyramidkv:BUDGET[:windowN][:kernelN][:betaN]",
    summary: "as snapkv; early layers keep more than late ones",
    source: "PyramidKV, arXiv:2406.02069",
    parameters: &[snapkv::WINDOW, snapkv::KERNEL, BETA],
    examples: &["pyramidkv:0.25", "pyramidkv:512:window16:beta10"],
    action: Action::Evict(Method::PyramidKv, rule),
};

const fn rule(values: Values, kept: u32) -> Rule {
    let [_, _, beta] = values;
    Rule { allocation: Allocation::Pyramid { beta }, ..snapkv::rule(values, kept) }
}

/// Tokens that a list of each layer keeps where it is `kept` on average, of which `always` stay in each.
///
/// # Panics
/// When `always` is above `kept`, or `beta` is 0.
pub fn budgets(kept: u32, always: u32, beta: u32, num_layers: u32, n_tokens: u32) -> Vec<u32> {
    if kept >= n_tokens {
        return vec![n_tokens; num_layers as usize];
    }
    assert!(always <= kept, "a budget of {kept} should have room for the {always} that always stay");
    let chosen = u64::from(kept - always);
    let room = u64::from(n_tokens - always);
    let max = (2 * chosen - chosen / u64::from(beta)).min(room);
    let min = 2 * chosen - max;
    // An even number, so that the middle of an odd number of layers is exact.
    let steps = max - min;
    let last = u64::from(num_layers.saturating_sub(1)).max(1);
    let layer_budget = |layer: u64| {
        if num_layers == 1 {
            return chosen;
        }
        if 2 * layer <= last { max - steps * layer / last } else { min + steps * (last - layer) / last }
    };
    let total =
        |layer| u32::try_from(u64::from(always) + layer_budget(layer)).expect("no layer has more than n_tokens");
    (0..u64::from(num_layers)).map(total).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_total_is_that_of_a_uniform_budget() {
        // min = 60 / 20 = 3, max = 120 - 3 = 117, four layers: steps of 38.
        assert_eq!(budgets(64, 4, 20, 4, 1000), [121, 83, 45, 7], "by hand");
        // max would be 117, but only 96 others exist: 96 to 24.
        assert_eq!(budgets(64, 4, 20, 4, 100), [100, 76, 52, 28], "clipped");
        assert_eq!(budgets(64, 4, 20, 1, 100), [64], "one layer");
        assert_eq!(budgets(64, 4, 1, 3, 1000), [64; 3], "no slope");
        assert_eq!(budgets(64, 32, 20, 3, 50), [50; 3], "all there is");
        for (kept, always, beta, layers, n) in [
            (77, 5, 7, 30, 1000),
            (100, 32, 20, 31, 110),
            (33, 32, 20, 2, 64),
            (500, 32, 3, 60, 501),
            (9, 0, 20, 7, 99),
        ] {
            let all = budgets(kept, always, beta, layers, n);
            let case = format!("{kept} of {n} in {layers} layers: {all:?}");
            assert_eq!(all.iter().sum::<u32>(), kept * layers, "total, {case}");
            assert!(all.iter().all(|b| (always..=n).contains(b)), "range, {case}");
            assert!(all.is_sorted_by(|a, b| a >= b), "less with depth, {case}");
        }
    }
}
