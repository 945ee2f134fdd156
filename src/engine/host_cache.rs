//! Caches away from the device: in host memory, or in files.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;

use crate::disk::PagesFile;
use crate::geometry::Bytes;
use crate::schedule::SessionId;

/// A session's cache away from the device.
#[derive(Debug)]
pub struct HostCache {
    /// Its pages, as they are, in the order of its table.
    pub pages: HostPages,
    /// What was observed of it for a coming eviction.
    pub slot: Vec<u8>,
    /// Bytes of pages that are back on the device.
    pub(super) returned: u64,
    /// Bytes of pages that it has when it is whole.
    pub(super) all: Bytes,
}

/// Whole caches away from the device, which outlive their engine.
#[derive(Debug, Default)]
pub struct HostCopies(pub(super) BTreeMap<SessionId, HostCache>);

impl HostCopies {
    /// Whose caches they are.
    pub fn sessions(&self) -> BTreeSet<SessionId> {
        self.0.keys().copied().collect()
    }
}

/// Pages away from the device.
#[derive(Debug)]
pub enum HostPages {
    /// In host memory.
    Memory(Vec<u8>),
    /// In a file.
    File(PagesFile),
}

impl HostCache {
    /// A whole one: its pages, and what its slot held.
    pub const fn new(pages: HostPages, slot: Vec<u8>) -> Self {
        let all = pages.bytes();
        Self { pages, slot, returned: 0, all }
    }
}

impl HostPages {
    /// Their bytes.
    pub const fn bytes(&self) -> Bytes {
        match self {
            Self::Memory(pages) => Bytes(pages.len() as u64),
            Self::File(file) => Bytes(file.len()),
        }
    }

    /// `n` bytes from `at` on.
    ///
    /// # Errors
    /// [`io::Error`] of the file, or where they are not there.
    pub fn read(&self, at: u64, n: usize) -> io::Result<Cow<'_, [u8]>> {
        match self {
            Self::Memory(pages) => {
                let at = usize::try_from(at).ok();
                let found = at.and_then(|at| pages.get(at..at.checked_add(n)?));
                found.map(Cow::Borrowed).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
            }
            Self::File(file) => file.read(at, n).map(Cow::Owned),
        }
    }

    /// All of them.
    ///
    /// # Errors
    /// [`io::Error`] of the file.
    pub fn all(&self) -> io::Result<Vec<u8>> {
        let length = usize::try_from(self.bytes().0).map_err(io::Error::other)?;
        Ok(self.read(0, length)?.into_owned())
    }

    /// Adds pieces of `staged` at the end.
    pub(super) fn append(&mut self, staged: &[u8], pieces: &[Range<usize>]) -> io::Result<()> {
        match (self, pieces) {
            (Self::Memory(pages), _) => pieces.iter().for_each(|piece| pages.extend_from_slice(&staged[piece.clone()])),
            (Self::File(file), [piece]) => file.append(&staged[piece.clone()])?,
            // Writes are dear: one for all, in memory first.
            (Self::File(file), _) => {
                let pieces: Vec<&[u8]> = pieces.iter().map(|piece| &staged[piece.clone()]).collect();
                file.append(&pieces.concat())?;
            }
        }
        Ok(())
    }
}
