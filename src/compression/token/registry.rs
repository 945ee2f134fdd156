//! The registry of the token dimension: a line per method.

use super::{
    Rule, TokenPolicy, adakv, expected, h2o, keydiff, knorm, kvzip, pyramidkv, quest, random, snapkv, streaming,
    syntax, tova,
};

/// Parameters that a method has at most.
pub const PARAMETERS: usize = 3;

/// The parameters of a method in the order of its entry.
pub type Values = [u32; PARAMETERS];

/// What decides which tokens leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Method {
    /// [`streaming`].
    Streaming,
    /// [`h2o`].
    H2o,
    /// [`tova`].
    Tova,
    /// [`snapkv`].
    SnapKv,
    /// [`pyramidkv`].
    PyramidKv,
    /// [`expected`].
    Expected,
    /// [`keydiff`].
    KeyDiff,
    /// [`knorm`].
    KeyNorm,
    /// [`kvzip`].
    KvZip,
    /// [`random`].
    Random,
}

/// What a method does.
#[derive(Clone, Copy, Debug)]
pub enum Action {
    /// Tokens leave by a rule, which depends on how many stay.
    Evict(Method, fn(Values, u32) -> Rule),
    /// Tokens leave by another method's rule, and heads compete.
    Compete,
    /// All tokens stay, few are read.
    Read,
}

/// What a parameter can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Number {
    /// A whole number, at least so much.
    From(u32),
    /// An odd number.
    Odd,
    /// A part from 0 to 1, in thousandths.
    Part,
}

/// A number that a method takes besides its budget, written as its name and the number: `window32`.
#[derive(Clone, Copy, Debug)]
pub struct Parameter {
    /// As it is written.
    pub name: &'static str,
    /// What it can be.
    pub number: Number,
    /// Where it is left out.
    pub default: u32,
    /// What it means, in one line.
    pub summary: &'static str,
}

impl Parameter {
    /// First tokens that always stay.
    pub(super) const fn sink(default: u32) -> Self {
        Self { name: "sink", number: Number::From(0), default, summary: "first tokens that always stay" }
    }

    /// The value as it is written, without the name.
    pub fn show(&self, value: u32) -> String {
        match self.number {
            Number::Part => syntax::part(value).to_string(),
            Number::From(_) | Number::Odd => value.to_string(),
        }
    }
}

/// A method of the token dimension.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The name that it is written with.
    pub name: &'static str,
    /// As it is written, parameters as letters.
    pub syntax: &'static str,
    /// What it does, in one line.
    pub summary: &'static str,
    /// Where it comes from.
    pub source: &'static str,
    /// Its parameters.
    pub parameters: &'static [Parameter],
    /// Written-out examples: what tests and listings cover.
    pub examples: &'static [&'static str],
    /// What it does, as data.
    pub action: Action,
}

impl Entry {
    /// The parameters where none is given.
    pub fn defaults(&self) -> Values {
        let mut values = Values::default();
        values.iter_mut().zip(self.parameters).for_each(|(value, parameter)| *value = parameter.default);
        values
    }
}

/// Every method.
pub const REGISTRY: &[Entry] = &[
    streaming::ENTRY,
    h2o::ENTRY,
    tova::ENTRY,
    snapkv::ENTRY,
    pyramidkv::ENTRY,
    adakv::ENTRY,
    expected::ENTRY,
    keydiff::ENTRY,
    knorm::ENTRY,
    kvzip::ENTRY,
    quest::ENTRY,
    random::ENTRY,
];

impl Method {
    /// Its line of the registry, and its rule.
    fn find(self) -> (&'static Entry, fn(Values, u32) -> Rule) {
        let of_self = |entry: &'static Entry| match entry.action {
            Action::Evict(method, rule) if method == self => Some((entry, rule)),
            _ => None,
        };
        REGISTRY.iter().find_map(of_self).expect("every method should be in the registry")
    }

    /// Its line of the registry.
    ///
    /// # Panics
    /// Never: each method has one.
    pub fn entry(self) -> &'static Entry {
        self.find().0
    }

    /// Its rule where lists keep `kept` tokens on average.
    pub(super) fn rule(self, values: Values, kept: u32) -> Rule {
        self.find().1(values, kept)
    }
}

/// All examples of the registry.
pub fn examples() -> impl Iterator<Item = TokenPolicy> {
    let written = REGISTRY.iter().flat_map(|entry| entry.examples);
    written.map(|text| text.parse().expect("the registry's examples should parse"))
}
