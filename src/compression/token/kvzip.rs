//! `kvzip:BUDGET`: the tokens that the model needs to repeat the prompt (`KVzip`, arXiv:2505.23416).
//!
//! ```text
//! rows     = those of the prompt once more, after an instruction to repeat it, over the full cache
//! score[t] = largest over rows and query heads of softmax(q k / sqrt(d))[t]
//! kept     = the best of all lists of all layers together
//! ```
//!
//! What suffices to repeat a text suffices to answer questions about it, whichever they are; the price is a second pass
//! over the prompt, once. Nothing is repeated while decoding, so `everyN` is refused.

use super::{Action, Allocation, Entry, Method, Rule, Score, Values};

/// Its line of the registry.
pub const ENTRY: Entry = Entry {
    name: "kvzip",
    syntax: "kvzip:BUDGET",
    summary: "what repeating the prompt attends to, all lists together",
    source: "KVzip, arXiv:2505.23416",
    parameters: &[],
    examples: &["kvzip:0.3", "kvzip:512"],
    action: Action::Evict(Method::KvZip, rule),
};

const fn rule(_: Values, _: u32) -> Rule {
    Rule { allocation: Allocation::AcrossAll, ..Rule::of_score(Score::Reconstruction) }
}
