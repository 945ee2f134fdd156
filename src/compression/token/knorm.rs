//! `knorm:BUDGET`: the tokens with the smallest keys (arXiv:2406.11430).
//!
//! ```text
//! score[t] = -|k[t]|
//! kept     = the best
//! ```
//!
//! Observed rather than derived: in decoders, small keys tend to receive much attention. (The paper leaves its first two
//! layers whole; here all layers are treated alike.)

use super::{Action, Entry, Method, Rule, Score, Values};

/// Its line of the registry.
pub const ENTRY: Entry = Entry {
    name: "knorm",
    syntax: "knorm:BUDGET",
    summary: "the smallest keys",
    source: "L2 norm, arXiv:2406.11430",
    parameters: &[],
    examples: &["knorm:0.5", "knorm:512:every64"],
    action: Action::Evict(Method::KeyNorm, rule),
};

const fn rule(_: Values, _: u32) -> Rule {
    Rule::of_score(Score::KeyNorm)
}
