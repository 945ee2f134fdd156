//! The token dimension: which tokens of a head stay. One file per method.

/// Which tokens of a head stay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TokenPolicy {
    /// All of them.
    #[default]
    Full,
}

impl TokenPolicy {
    /// The registry.
    pub const ALL: [Self; 1] = [Self::Full];

    /// The name that the parser reads.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Full => "full",
        }
    }
}
