//! The head dimension: which KV heads keep everything, sink and recent tokens only, or nothing.

/// What each (layer, KV head) keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum HeadPattern {
    /// Every head keeps everything.
    #[default]
    Full,
}

impl HeadPattern {
    /// The registry.
    pub const ALL: [Self; 1] = [Self::Full];

    /// The name that the parser reads.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Full => "full",
        }
    }
}
