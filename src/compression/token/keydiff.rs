//! `keydiff:BUDGET`: the tokens whose keys differ most from the others (`KeyDiff`, arXiv:2504.15364).
//!
//! ```text
//! anchor   = mean over the list's tokens of k[t] / |k[t]|
//! score[t] = -cos(k[t], anchor)
//! kept     = the best
//! ```
//!
//! Keys that point where most keys point are attended to alike; those that stand out are what queries look for. It needs
//! no query, and keys are those of the cache, rotary positions included. A key of zeros adds nothing to the anchor, and has
//! a cosine of 0, as everything has with an anchor of zeros.

use super::{Action, Entry, Method, Rule, Score, Values};

/// Its line of the registry.
pub const ENTRY: Entry = Entry {
    name: "keydiff",
    syntax: "keydiff:BUDGET",
    summary: "keys that differ most from the mean key",
    source: "KeyDiff, arXiv:2504.15364",
    parameters: &[],
    examples: &["keydiff:0.5", "keydiff:512:every64"],
    action: Action::Evict(Method::KeyDiff, rule),
};

const fn rule(_: Values, _: u32) -> Rule {
    Rule::of_score(Score::KeyDifference)
}
