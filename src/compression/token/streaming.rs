//! `streaming:BUDGET`: the first tokens and the last ones (`StreamingLLM`, arXiv:2309.17453).
//!
//! ```text
//! kept = the first `sink` tokens, and as many of the last as the budget has room for
//! ```
//!
//! The first tokens collect the attention that has to go somewhere; a window without them falls apart. The paper turns
//! keys by their place in the cache, not in the text: that is `streaming:512:rerotate`. Without it, positions stay as they
//! were, which is right as long as the text is no longer than the model's context.

use super::{Action, Entry, Method, Parameter, Rule, Score, Values};

/// Its line of the registry.
pub const ENTRY: Entry = Entry {
    name: "streaming",
    syntax: "streaming:BUDGET[:sinkN]",
    summary: "the first N tokens and the last ones",
    source: "StreamingLLM, arXiv:2309.17453",
    parameters: &[Parameter::sink(4)],
    examples: &["streaming:0.25", "streaming:512:rerotate", "streaming:256:sink8:every64"],
    action: Action::Evict(Method::Streaming, rule),
};

fn rule([sink, ..]: Values, kept: u32) -> Rule {
    // The newest token stays: a budget without room for it is refused.
    Rule { sink, recent: kept.saturating_sub(sink).max(1), ..Rule::of_score(Score::None) }
}
