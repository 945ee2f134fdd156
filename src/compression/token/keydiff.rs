//! `keydiff:BUDGET`: the tokens whose keys differ most from the others, one choice for all heads of a layer (`KeyDiff`,
//! arXiv:2504.15364).
//!
//! ```text
//! anchor   = mean over the list's tokens of k[t] / |k[t]|
//! score[t] = mean over the layer's KV heads of -cos(k[t], anchor)
//! kept     = the best
//! ```
//!
//! Keys that point where most keys point are attended to alike; those that stand out are what queries look for. It needs
//! no query, and keys are those of the cache, rotary positions included. A key of zeros adds nothing to the anchor, and has
//! a cosine of 0, as everything has with an anchor of zeros.
//!
//! Deviation: the paper chooses per KV head. A token that stands out in one head is then missing in another, and a sentence
//! falls apart: of ten pass keys in a novel (2,048 tokens of SmolLM2-135M) one choice per layer keeps 10 and 5 at half and a
//! quarter, one per head 7 and 3, and divergence from the full cache is about the same (docs/policies.md).

use super::{Action, Entry, Method, Rule, Score, Share, Values};

/// Its line of the registry.
pub const ENTRY: Entry = Entry {
    name: "keydiff",
    syntax: "keydiff:BUDGET",
    summary: "keys that differ most from the mean key, one choice per layer",
    source: "KeyDiff, arXiv:2504.15364",
    parameters: &[],
    examples: &["keydiff:0.5", "keydiff:512:every64"],
    action: Action::Evict(Method::KeyDiff, rule),
};

const fn rule(_: Values, _: u32) -> Rule {
    Rule { share: Share::Layer, ..Rule::of_score(Score::KeyDifference) }
}
