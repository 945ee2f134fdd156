//! `expected:BUDGET`: the tokens that coming queries are expected to attend to (Expected Attention, arXiv:2510.00636).
//!
//! ```text
//! mu, S     = mean and covariance of the query rows before rotary positions, without the first `sink` rows
//! R         = mean of the rotations of the `future` positions after the last token
//! mu' = R mu,  S' = R S R^T
//! logit[t]  = mu' k[t] / sqrt(d) + k[t]^T S' k[t] / (2 d)
//! score[t]  = mean over query heads of softmax(logit)[t], times |v[t]|      softmax without the first `sink` tokens
//! kept      = the first `sink` tokens, and the best others
//! ```
//!
//! The logit is the logarithm of the mean of exp(q k / sqrt(d)) over a Gaussian of queries, so no query needs to be there
//! yet: it does not matter what is asked. With `everyN` the statistics go on over the rows that were decoded.

use super::{Action, Entry, Method, Number, Parameter, Rule, Score, Values};

const FUTURE: Parameter =
    Parameter { name: "future", number: Number::From(1), default: 512, summary: "coming positions that are averaged" };

/// Its line of the registry.
pub const ENTRY: Entry = Entry {
    name: "expected",
    syntax: "expected:BUDGET[:futureN][:sinkN]",
    summary: "what coming queries are expected to attend to",
    source: "Expected Attention, arXiv:2510.00636",
    parameters: &[FUTURE, Parameter::sink(4)],
    examples: &["expected:0.25", "expected:512:future128:every64"],
    action: Action::Evict(Method::Expected, rule),
};

const fn rule([future, sink, ..]: Values, _: u32) -> Rule {
    Rule { sink, ..Rule::of_score(Score::Expected { future, n_skip: sink }) }
}
