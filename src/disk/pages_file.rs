//! The pages of one cache in a file.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;

/// Bytes of pages in a file: one of its own without a name, or a part of another.
#[derive(Debug)]
pub struct PagesFile {
    file: File,
    /// Where they begin.
    from: u64,
    length: u64,
}

impl PagesFile {
    /// A new file in a folder, which is gone when this is dropped.
    ///
    /// # Errors
    /// [`io::Error`] when there can be none.
    pub fn create(folder: &Path) -> io::Result<Self> {
        Ok(Self { file: tempfile::tempfile_in(folder)?, from: 0, length: 0 })
    }

    /// A part of a file.
    pub(super) const fn part(file: File, from: u64, length: u64) -> Self {
        Self { file, from, length }
    }

    /// Bytes of pages.
    pub const fn len(&self) -> u64 {
        self.length
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Adds bytes at the end.
    ///
    /// # Errors
    /// [`io::Error`], of a full disk for one; what was there stays.
    pub fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.seek(SeekFrom::Start(self.from + self.length))?;
        self.file.write_all(bytes)?;
        self.length += bytes.len() as u64;
        Ok(())
    }

    /// Reads `n` bytes from `at` on.
    ///
    /// # Errors
    /// [`io::Error`] when they are not there.
    pub fn read(&self, at: u64, n: usize) -> io::Result<Vec<u8>> {
        if at.checked_add(n as u64).is_none_or(|end| end > self.length) {
            let message = format!("{n} bytes from {at} on are wanted of {}", self.length);
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, message));
        }
        let mut file = &self.file;
        file.seek(SeekFrom::Start(self.from + at))?;
        let mut bytes = vec![0; n];
        file.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_come_back_as_they_were() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut pages = PagesFile::create(folder.path()).expect("a file");
        pages.append(&[1, 2, 3]).expect("room");
        assert_eq!(pages.read(1, 2).expect("there"), [2, 3], "a part");
        pages.append(&[4, 5]).expect("room");
        assert_eq!((pages.len(), pages.read(2, 3).expect("there")), (5, vec![3, 4, 5]), "behind it");
        assert!(pages.read(3, 3).is_err() && pages.read(u64::MAX, 2).is_err(), "beyond the end");
        assert_eq!(std::fs::read_dir(folder.path()).expect("a folder").count(), 0, "it has no name");
        assert!(PagesFile::create(&folder.path().join("none")).is_err(), "no such folder");
    }
}
