//! `h2o:BUDGET`: the tokens that received most attention so far, and the recent ones (H2O, arXiv:2306.14048).
//!
//! ```text
//! score[t] = sum over all rows of the mean over query heads of softmax(q k / sqrt(d))[t]
//! kept     = the last half of the budget, and the best others
//! ```
//!
//! Early tokens are seen by more rows, so the sum favours them; that is the paper's. With `everyN` the sum goes on over
//! the rows that were decoded, in the paper after every token, here after N.
//!
//! Deviation: one choice per KV head. The paper predates grouped queries and chooses per query head.

use super::{Action, Entry, Method, Reduce, Rows, Rule, Score, Values};

/// Its line of the registry.
pub const ENTRY: Entry = Entry {
    name: "h2o",
    syntax: "h2o:BUDGET",
    summary: "the most attended so far, and as many of the last",
    source: "H2O, arXiv:2306.14048",
    parameters: &[],
    examples: &["h2o:0.2", "h2o:512:every128"],
    action: Action::Evict(Method::H2o, rule),
};

const fn rule(_: Values, kept: u32) -> Rule {
    let score = Score::Attention { rows: Rows::All, reduce: Reduce::Mean };
    Rule { recent: kept / 2, ..Rule::of_score(score) }
}
