//! `adakv:BUDGET[:METHOD]`: the heads of a layer compete for their common budget (Ada-KV, arXiv:2407.11550,
//! algorithm 1).
//!
//! ```text
//! score = that of METHOD: snapkv where none is named
//! kept  = of each head what METHOD always keeps, then its best until it has floor * budget tokens;
//!         then the best of all heads of the layer together, until it has heads * budget
//! ```
//!
//! Heads whose attention is spread get more, those that look at a few tokens less; the paper bounds the error of a layer's
//! output by the attention that is lost over all of its heads, which this minimises. METHOD is any that scores heads
//! one by one: `tova` has one score for all of them, and `pyramidkv` shares out budgets itself.
//!
//! Deviation: the paper pools by the maximum of 7 scores, here as METHOD does.

use super::{Action, Entry, Number, Parameter};

pub(super) const FLOOR: Parameter = Parameter {
    name: "floor",
    number: Number::Part,
    default: 200,
    summary: "part of the budget that each head keeps for certain",
};

/// Its line of the registry.
pub const ENTRY: Entry = Entry {
    name: "adakv",
    syntax: "adakv:BUDGET[:METHOD][:floorX]",
    summary: "by METHOD (snapkv, h2o, expected, ...); the heads of a layer compete",
    source: "Ada-KV, arXiv:2407.11550",
    parameters: &[FLOOR],
    examples: &["adakv:0.25", "adakv:0.25:h2o:floor0.1", "adakv:512:snapkv:window16", "adakv:0.5:expected"],
    action: Action::Compete,
};
