//! The token dimension: which tokens of a list (layer, KV head) stay. One file per method.
//!
//! A method is data: its file documents it and gives a [`Rule`], which says how tokens are scored and how a budget is
//! shared out. [`keep`](super::keep) defines what a rule keeps of given scores, and the reference room how a score is
//! computed; kernels follow both.
//!
//! | written | score | shared out | file |
//! |---|---|---|---|
//! | `streaming:512:sink4` | none: first and last tokens | per list | [`streaming`] |
//! | `h2o:0.2` | attention of all rows, half of the budget recent | per list | [`h2o`] |
//! | `tova:0.5` | attention of the last row | per list, one choice per layer | [`tova`] |
//! | `snapkv:0.25:window32:kernel5` | attention of the last rows, pooled | per list | [`snapkv`] |
//! | `pyramidkv:0.25:beta20` | the same | less per layer with depth | [`pyramidkv`] |
//! | `adakv:0.25:h2o:floor0.2` | any of the others | across the heads of a layer | [`adakv`] |
//! | `expected:0.25:future512` | attention expected of coming queries | per list | [`expected`] |
//! | `keydiff:0.5` | difference of a key from the mean key | per layer | [`keydiff`] |
//! | `knorm:0.5` | small keys first | per list | [`knorm`] |
//! | `kvzip:0.3` | attention while the prompt is repeated | across all lists | [`kvzip`] |
//! | `quest:1024:dense2` | nothing leaves; few pages are read | | [`quest`] |
//! | `random:0.5:seed7` | a hash, the baseline | per list | [`random`] |
//!
//! A budget is a part of the tokens (`0.25`, `1`) or a number of tokens per list (`512`). `every128` evicts while
//! decoding as well, each time that 128 tokens came: an eviction then leaves 128 tokens less than the budget, so that
//! lists never hold more than the budget on average. `rerotate` turns kept keys to the positions that they have in the
//! cache, as `StreamingLLM` does.

pub mod adakv;
pub mod expected;
pub mod h2o;
pub mod keydiff;
pub mod knorm;
pub mod kvzip;
mod parse;
pub mod pyramidkv;
pub mod quest;
pub mod random;
mod registry;
pub mod snapkv;
pub mod streaming;
#[cfg(test)]
mod tests;
pub mod tova;

use super::syntax;
pub(super) use parse::{known, knows};
pub use registry::{Action, Entry, Method, Number, PARAMETERS, Parameter, REGISTRY, Values, examples};

/// How many tokens stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Budget {
    /// A part of those that there are.
    Ratio {
        /// Tokens that stay, of 1000.
        permille: u32,
    },
    /// So many per list.
    Tokens(u32),
}

impl Budget {
    /// Tokens per list of `n_tokens`: a part is rounded, and at least 1. A number of tokens may be more than there are.
    pub fn tokens(&self, n_tokens: u32) -> u32 {
        match *self {
            Self::Ratio { permille } => syntax::of(n_tokens, permille).max(1),
            Self::Tokens(tokens) => tokens,
        }
    }
}

/// The query rows whose attention counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rows {
    /// The last ones.
    Last(u32),
    /// All since the last eviction.
    All,
}

/// How the query heads of a KV head become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reduce {
    /// Their mean.
    Mean,
    /// Their largest.
    Max,
}

/// What a token is worth; more stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Score {
    /// Nothing: positions alone decide.
    None,
    /// `-cos(key, mean of the list's normalised keys)`: see [`keydiff`].
    KeyDifference,
    /// `-|key|`: see [`knorm`].
    KeyNorm,
    /// Sum over rows of the token's attention probability.
    Attention {
        /// Whose attention.
        rows: Rows,
        /// Over the query heads.
        reduce: Reduce,
    },
    /// Attention expected of coming queries: see [`expected`].
    Expected {
        /// Positions that are averaged over.
        future: u32,
        /// First tokens that are left out of the statistics.
        n_skip: u32,
    },
    /// Largest attention probability while the prompt is repeated: see [`kvzip`].
    Reconstruction,
    /// A hash of (seed, list, position): see [`random`].
    Random {
        /// Another seed, another choice.
        seed: u32,
    },
}

/// Who chooses together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Share {
    /// Each KV head by its own scores.
    Head,
    /// The mean over a layer's KV heads is the score of each.
    Layer,
}

/// How a budget is shared out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Allocation {
    /// Every list keeps as many.
    Uniform,
    /// Fewer with depth, by [`pyramidkv::budgets`].
    Pyramid {
        /// Steepness.
        beta: u32,
    },
    /// The heads of a layer compete for their common budget.
    AcrossHeads {
        /// What each keeps for certain, of 1000 parts of the budget.
        floor_permille: u32,
    },
    /// All lists compete.
    AcrossAll,
}

/// A method as data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rule {
    /// What a token is worth.
    pub score: Score,
    /// Tokens that scores are averaged over, odd; 1 is none.
    pub kernel: u32,
    /// Who chooses together.
    pub share: Share,
    /// First tokens that always stay.
    pub sink: u32,
    /// Last tokens that always stay.
    pub recent: u32,
    /// How the budget is shared out.
    pub allocation: Allocation,
}

impl Rule {
    /// Scores alone decide, list by list.
    const fn of_score(score: Score) -> Self {
        Self { score, kernel: 1, share: Share::Head, sink: 0, recent: 0, allocation: Allocation::Uniform }
    }
}

/// Tokens leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Eviction {
    /// What scores tokens.
    pub method: Method,
    /// The method's parameters, in the order of its entry; 0 where it has no more.
    pub values: Values,
    /// Whether heads compete (`adakv`), and what each keeps for certain, of 1000 parts of the budget.
    pub across_heads: Option<u32>,
    /// How many stay.
    pub budget: Budget,
    /// Evicts whenever so many tokens have come; only the prompt where none.
    pub every: Option<u32>,
    /// Whether kept keys are turned to their positions in the cache.
    pub rerotate: bool,
}

impl Eviction {
    /// A method with its defaults, over the prompt.
    pub fn new(method: Method, budget: Budget) -> Self {
        let values = method.entry().defaults();
        Self { method, values, across_heads: None, budget, every: None, rerotate: false }
    }

    /// How tokens are chosen where lists keep `kept` tokens on average.
    ///
    /// # Panics
    /// Never for what the parser gives.
    pub fn rule(&self, kept: u32) -> Rule {
        let rule = self.method.rule(self.values, kept);
        match self.across_heads {
            Some(floor_permille) => Rule { allocation: Allocation::AcrossHeads { floor_permille }, ..rule },
            None => rule,
        }
    }

    /// Tokens per list, on average, that an eviction leaves of `n_tokens`; may be more than there are.
    pub fn kept(&self, n_tokens: u32) -> u32 {
        self.budget.tokens(n_tokens).saturating_sub(self.every.unwrap_or(0))
    }

    /// Whether `kept` tokens are room for those that always stay.
    ///
    /// # Errors
    /// A sentence with the numbers.
    pub fn check_kept(&self, kept: u32) -> Result<(), String> {
        let Rule { sink, recent, score, .. } = self.rule(kept);
        let always = u64::from(sink) + u64::from(recent);
        // While decoding, something should be left to choose.
        let needed = always + u64::from(self.every.is_some() && score != Score::None);
        if u64::from(kept) >= needed {
            return Ok(());
        }
        Err(format!(
            "token={self} leaves {kept} tokens of a list, while its first {sink} and last {recent} always stay; \
             give a budget that leaves at least {needed}"
        ))
    }

    /// Whether the numbers go together.
    ///
    /// # Errors
    /// A sentence with the numbers.
    pub fn check(&self) -> Result<(), String> {
        if let Some(every) = self.every {
            let Budget::Tokens(budget) = self.budget else {
                return Err(format!(
                    "token={self}: a part of a growing cache is no limit; with every{every} give the budget in tokens, \
                     such as 512"
                ));
            };
            if every == 0 || !every.is_multiple_of(16) {
                return Err(format!("token={self}: every{every} is no multiple of 16, and evictions free whole pages"));
            }
            if every >= budget {
                return Err(format!(
                    "token={self}: an eviction every {every} tokens would leave nothing of {budget}; evict more often"
                ));
            }
            if self.rule(budget).score == Score::Reconstruction {
                return Err(format!(
                    "token={self}: kvzip scores a prompt by repeating it, and there is nothing to repeat while decoding; \
                     leave every{every} out"
                ));
            }
        }
        match self.budget {
            Budget::Tokens(budget) => self.check_kept(self.kept(budget)),
            Budget::Ratio { .. } => Ok(()),
        }
    }
}

/// Which tokens of a list stay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TokenPolicy {
    /// All of them.
    #[default]
    Full,
    /// Those that a method chooses.
    Evict(Eviction),
    /// All of them, but attention reads a few pages of each list: see [`quest`].
    Quest {
        /// Tokens read of a list.
        budget: Budget,
        /// First layers that read everything.
        dense_layers: u32,
    },
}

impl TokenPolicy {
    /// How tokens leave, where they do.
    pub const fn eviction(&self) -> Option<&Eviction> {
        match self {
            Self::Evict(eviction) => Some(eviction),
            Self::Full | Self::Quest { .. } => None,
        }
    }
}
