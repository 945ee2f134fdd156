//! Where a record of figures goes.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use concertina::report::{KernelsReport, Origin, RecordFigure, device_slug};

use super::super::output::OutputFile;

/// A record that is being written.
#[derive(Debug)]
pub(super) struct Record {
    /// The files' path without what they end in.
    stem: PathBuf,
    origin: Origin,
}

impl Record {
    /// Makes the folder `DIR/<device>` for the files `<date>-<commit>`.
    pub(super) fn open(dir: &Path, adapter: &str, origin: Origin) -> Result<Self> {
        let folder = dir.join(device_slug(adapter));
        fs::create_dir_all(&folder).with_context(|| format!("can not make the folder '{}'", folder.display()))?;
        let stem = folder.join(format!("{}-{}", origin.date, origin.commit));
        let record = Self { stem, origin };
        OutputFile::open("the record", &record.path("csv"))?;
        Ok(record)
    }

    /// The file that ends in this.
    fn path(&self, end: &str) -> PathBuf {
        let mut path = self.stem.clone().into_os_string();
        path.push(format!(".{end}"));
        path.into()
    }

    /// Writes the figures, in place of those that were written before; the file.
    pub(super) fn figures(&self, report: &KernelsReport) -> Result<PathBuf> {
        let path = self.path("csv");
        let text = RecordFigure::write(&report.record(&self.origin));
        OutputFile::open("the record", &path)?.write(text.as_bytes())?;
        Ok(path)
    }

    /// Writes a file beside them.
    pub(super) fn beside(&self, end: &str, contents: &[u8]) -> Result<PathBuf> {
        let path = self.path(end);
        OutputFile::open("a file of the record", &path)?.write(contents)?;
        Ok(path)
    }
}
