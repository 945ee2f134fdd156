//! `random:BUDGET`: tokens by chance, the baseline that every method should beat.
//!
//! ```text
//! score[list, position] = hash(seed, list, position)     [0, 1) in steps of 2^-24
//! kept                  = the best
//! ```
//!
//! The hash is integer arithmetic, so every device has the same scores, and a token's score stays the same.

use super::{Action, Entry, Method, Number, Parameter, Rule, Score, Values};

/// Its line of the registry.
pub const ENTRY: Entry = Entry {
    name: "random",
    syntax: "random:BUDGET[:seedN]",
    summary: "by chance, the baseline",
    source: "",
    parameters: &[Parameter {
        name: "seed",
        number: Number::From(0),
        default: 0,
        summary: "another seed, another choice",
    }],
    examples: &["random:0.5", "random:0.5:seed7"],
    action: Action::Evict(Method::Random, rule),
};

const fn rule([seed, ..]: Values, _: u32) -> Rule {
    Rule::of_score(Score::Random { seed })
}

/// PCG-RXS-M-XS over a chain of words, as in `shaders/model/sample.wgsl`.
const fn scramble(state: u32, word: u32) -> u32 {
    let mixed = (state ^ word).wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
    let turned = ((mixed >> ((mixed >> 28) + 4)) ^ mixed).wrapping_mul(277_803_737);
    (turned >> 22) ^ turned
}

/// The score of a token: exact in f32.
pub const fn score(seed: u32, list: u32, position: u32) -> f32 {
    let bits = scramble(scramble(scramble(seed, 0x9e37_79b9), list), position);
    (bits >> 8) as f32 / (1 << 24) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_are_spread_and_depend_on_everything() {
        let scores: Vec<f32> = (0..4096).map(|position| score(7, 3, position)).collect();
        assert!(scores.iter().all(|s| (0.0..1.0).contains(s)), "range");
        let below = scores.iter().filter(|s| **s < 0.25).count();
        assert!((900..1150).contains(&below), "a quarter is below a quarter: {below}");
        let first = score(7, 3, 0);
        assert!(first != score(8, 3, 0) && first != score(7, 4, 0) && first != score(7, 3, 1), "seed, list, position");
        // Computed apart, in unbounded integers.
        assert_eq!(
            [score(0, 0, 0), score(7, 3, 41)],
            [16_446_337.0, 6_591_315.0].map(|x: f32| x / 16_777_216.0),
            "bits"
        );
    }
}
