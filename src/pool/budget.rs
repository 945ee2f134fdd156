//! One byte budget: what is held, by kind, and the most that ever was.

use crate::geometry::Bytes;

/// What bytes are held for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Pages of sessions.
    Pages,
    /// Page tables.
    Tables,
    /// Activations, attention states, logits.
    Scratch,
    /// Upload and read-back buffers.
    Staging,
}

/// Held bytes under a limit.
#[derive(Clone, Debug)]
pub struct Budget {
    limit: Bytes,
    held: [Bytes; 4],
    peak: Bytes,
    pages_peak: Bytes,
}

impl Budget {
    /// Nothing held yet.
    pub const fn new(limit: Bytes) -> Self {
        Self { limit, held: [Bytes::ZERO; 4], peak: Bytes::ZERO, pages_peak: Bytes::ZERO }
    }

    /// The limit.
    pub const fn limit(&self) -> Bytes {
        self.limit
    }

    /// Bytes held for `kind`.
    pub const fn held(&self, kind: Kind) -> Bytes {
        self.held[kind as usize]
    }

    /// Bytes held for all kinds.
    pub fn in_use(&self) -> Bytes {
        self.held.iter().copied().sum()
    }

    /// The most that was ever held.
    pub const fn peak(&self) -> Bytes {
        self.peak
    }

    /// The most that pages ever held.
    pub const fn pages_peak(&self) -> Bytes {
        self.pages_peak
    }

    /// Holds `bytes` more for `kind`.
    ///
    /// # Panics
    /// When that exceeds the limit: whoever holds more has asked before.
    pub fn hold(&mut self, kind: Kind, bytes: Bytes) {
        self.held[kind as usize] += bytes;
        let in_use = self.in_use();
        assert!(in_use <= self.limit, "{in_use} in use should stay within the budget of {}", self.limit);
        self.peak = self.peak.max(in_use);
    }

    pub(super) fn take_pages(&mut self, bytes: Bytes) {
        self.hold(Kind::Pages, bytes);
        self.pages_peak = self.pages_peak.max(self.held(Kind::Pages));
    }

    pub(super) fn release_pages(&mut self, bytes: Bytes) {
        let held = self.held(Kind::Pages);
        assert!(bytes <= held, "{bytes} of pages should not be released when {held} are held");
        self.held[Kind::Pages as usize] = held - bytes;
    }
}
