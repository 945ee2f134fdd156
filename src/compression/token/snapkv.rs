//! `snapkv:BUDGET`: the tokens that the end of the prompt attends to, and their neighbours (`SnapKV`, arXiv:2404.14469).
//!
//! ```text
//! score[t] = sum over the last `window` rows of the mean over query heads of softmax(q k / sqrt(d))[t]
//! pooled   = the mean of `kernel` scores around t, zeros beyond the ends
//! kept     = the window, and the best others by pooled score
//! ```
//!
//! It looks at what is asked: a cache chosen by one question can miss what the next one needs. With `everyN` the window
//! is the last rows that were decoded.
//!
//! Deviations: one choice per KV head, by the mean over its query heads, as kvpress does (the paper's code repeats keys
//! per query head first); pooling also covers the window itself, which the paper leaves out.

use super::{Action, Entry, Method, Number, Parameter, Reduce, Rows, Rule, Score, Values};

pub(super) const WINDOW: Parameter =
    Parameter { name: "window", number: Number::From(1), default: 32, summary: "last rows that score, and stay" };
pub(super) const KERNEL: Parameter =
    Parameter { name: "kernel", number: Number::Odd, default: 5, summary: "tokens that scores are averaged over" };

/// Its line of the registry.
pub const ENTRY: Entry = Entry {
    name: "snapkv",
    syntax: "snapkv:BUDGET[:windowN][:kernelN]",
    summary: "what the last rows attend to, and its neighbours",
    source: "SnapKV, arXiv:2404.14469",
    parameters: &[WINDOW, KERNEL],
    examples: &["snapkv:0.25", "snapkv:512:window16:kernel7", "snapkv:1024:every128"],
    action: Action::Evict(Method::SnapKv, rule),
};

pub(super) const fn rule([window, kernel, ..]: Values, _: u32) -> Rule {
    let score = Score::Attention { rows: Rows::Last(window), reduce: Reduce::Mean };
    Rule { kernel, recent: window, ..Rule::of_score(score) }
}
