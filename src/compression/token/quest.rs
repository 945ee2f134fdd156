//! `quest:BUDGET`: nothing leaves, but each row reads only the pages that it may attend to most (Quest,
//! arXiv:2406.10774).
//!
//! ```text
//! low, high  = smallest and largest of each key channel over a page
//! bound[p]   = sum over channels c of max(q[c] low[p, c], q[c] high[p, c])      no token of p scores higher
//! read       = the pages of largest bound until they hold the budget; all of them in the first `dense` layers
//! ```
//!
//! It saves bandwidth, not memory. Prompts read everything.

use super::{Action, Entry, Number, Parameter};

/// Its line of the registry.
pub const ENTRY: Entry = Entry {
    name: "quest",
    syntax: "quest:BUDGET[:denseN]",
    summary: "all tokens stay; a row reads the pages that it may attend to most",
    source: "Quest, arXiv:2406.10774",
    parameters: &[Parameter {
        name: "dense",
        number: Number::From(0),
        default: 2,
        summary: "first layers that read everything",
    }],
    examples: &["quest:1024", "quest:512:dense0"],
    action: Action::Read,
};
