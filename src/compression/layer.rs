//! The layer dimension: which layers own a cache, share another layer's, or skip prefill.

/// What each layer's cache is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum LayerPolicy {
    /// Every layer owns its cache.
    #[default]
    Full,
}

impl LayerPolicy {
    /// The registry.
    pub const ALL: [Self; 1] = [Self::Full];

    /// The name that the parser reads.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Full => "full",
        }
    }
}
