//! `tova:BUDGET`: the tokens that the last row attends to, one choice for all heads of a layer (TOVA, arXiv:2401.06104).
//!
//! ```text
//! score[t] = mean over the layer's query heads of softmax(q_last k / sqrt(d))[t]
//! kept     = the best; no token is safe, the recent ones neither
//! ```
//!
//! In the paper the least attended token leaves after every token; with `everyN`, N leave after N.

use super::{Action, Entry, Method, Reduce, Rows, Rule, Score, Share, Values};

/// Its line of the registry.
pub const ENTRY: Entry = Entry {
    name: "tova",
    syntax: "tova:BUDGET",
    summary: "what the last row attends to, one choice per layer",
    source: "TOVA, arXiv:2401.06104",
    parameters: &[],
    examples: &["tova:0.5", "tova:512:every64"],
    action: Action::Evict(Method::Tova, rule),
};

const fn rule(_: Values, _: u32) -> Rule {
    let score = Score::Attention { rows: Rows::Last(1), reduce: Reduce::Mean };
    Rule { share: Share::Layer, ..Rule::of_score(score) }
}
