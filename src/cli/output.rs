//! Where results go: text to the standard output, JSON to where `--json` says, plots to files of their own.
//!
//! A file is probed before the work begins and written whole at the end: into a new file beside it, which then
//! takes its name. So neither a full disk nor an interrupt leaves half a file, or harms the one that was there.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow};
use serde::Serialize;

/// The streams of one command.
#[derive(Debug)]
pub(super) struct Output {
    json: Option<Target>,
}

#[derive(Debug)]
enum Target {
    /// The standard output, which then carries no text.
    Stdout,
    File(OutputFile),
}

/// A file that can be written, before there is anything to write.
#[derive(Debug)]
pub(super) struct OutputFile {
    /// What it will hold, for messages.
    what: &'static str,
    path: PathBuf,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    /// A device or a pipe, open.
    Special(File),
    /// A file, to be replaced.
    Regular,
}

impl Output {
    /// Checks that the target of `--json` can be written.
    pub(super) fn open(json: Option<&str>) -> Result<Self> {
        let json = match json {
            None => None,
            Some("-") => Some(Target::Stdout),
            Some(path) => Some(Target::File(OutputFile::open("the JSON report", Path::new(path))?)),
        };
        Ok(Self { json })
    }

    /// Whether the standard output carries text.
    pub(super) const fn shows_text(&self) -> bool {
        !matches!(self.json, Some(Target::Stdout))
    }

    /// Writes text, unless JSON takes its place.
    pub(super) fn text(&self, text: &impl std::fmt::Display) -> Result<()> {
        if !self.shows_text() {
            return Ok(());
        }
        let text = text.to_string();
        let mut stdout = io::stdout();
        let text = if stdout.is_terminal() { visible(&text) } else { text };
        Ok(stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(stdout_error)?)
    }

    /// Writes the report as JSON, where asked for.
    pub(super) fn json(self, report: &impl Serialize) -> Result<()> {
        let Some(target) = self.json else { return Ok(()) };
        let mut text = serde_json::to_vec_pretty(report).context("the report can not be written as JSON")?;
        text.push(b'\n');
        match target {
            Target::Stdout => {
                let mut stdout = io::stdout();
                Ok(stdout.write_all(&text).and_then(|()| stdout.flush()).map_err(stdout_error)?)
            }
            Target::File(file) => file.write(&text),
        }
    }
}

impl OutputFile {
    /// Checks that a file for `what` can be written.
    pub(super) fn open(what: &'static str, path: &Path) -> Result<Self> {
        let (kind, path) = Kind::open(path).map_err(|e| refused(what, path, &e))?;
        Ok(Self { what, path, kind })
    }

    /// Writes all of it.
    pub(super) fn write(self, contents: &[u8]) -> Result<()> {
        let Self { what, path, kind } = self;
        let result = match kind {
            Kind::Special(mut file) => file.write_all(contents).and_then(|()| file.flush()),
            Kind::Regular => replace(&path, contents),
        };
        result.map_err(|e| refused(what, &path, &e))
    }
}

impl Kind {
    /// What kind of file a path names, and the path to write to.
    fn open(path: &Path) -> io::Result<(Self, PathBuf)> {
        match fs::metadata(path) {
            Ok(found) if found.is_dir() => Err(io::Error::from(io::ErrorKind::IsADirectory)),
            Ok(found) if !found.is_file() => {
                Ok((Self::Special(OpenOptions::new().write(true).open(path)?), path.to_owned()))
            }
            Ok(_) => {
                OpenOptions::new().write(true).open(path)?;
                // A link stays; what it points to is replaced.
                let path = fs::canonicalize(path)?;
                beside(&path)?;
                Ok((Self::Regular, path))
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                beside(path)?;
                Ok((Self::Regular, path.to_owned()))
            }
            Err(e) => Err(e),
        }
    }
}

/// A new file in the same folder, gone when dropped.
fn beside(path: &Path) -> io::Result<tempfile::NamedTempFile> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    builder.prefix(".concertina-");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        // As any file: readable by whom the user's mask allows.
        builder.permissions(fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(folder)
}

fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    let mut file = beside(path)?;
    file.write_all(text)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|e| e.error)?;
    Ok(())
}

fn refused(what: &str, path: &Path, error: &io::Error) -> anyhow::Error {
    // The path of the file beside, which nobody asked for, is around the cause.
    let cause = error.get_ref().and_then(|e| e.source()).map_or_else(|| error.to_string(), ToString::to_string);
    anyhow!("can not write {what} to '{}': {cause}", path.display())
}

/// A closed pipe is told from other errors by its kind.
fn stdout_error(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::BrokenPipe => error,
        kind => io::Error::new(kind, format!("can not write to the standard output: {error}")),
    }
}

/// The text with control characters replaced, so that no document can move the cursor through a model's words.
pub(super) fn visible(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' && c != '\t' { '\u{FFFD}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_nothing_stays_beside_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("report.json");
        fs::write(&path, "old").expect("an old report");
        let output = Output::open(path.to_str()).expect("writable");
        assert_eq!(fs::read_to_string(&path).expect("readable"), "old", "untouched until the end");
        output.json(&[1, 2]).expect("written");
        assert_eq!(fs::read_to_string(&path).expect("readable"), "[\n  1,\n  2\n]\n", "the new report");
        assert_eq!(fs::read_dir(folder.path()).expect("readable").count(), 1, "one file");
    }

    #[test]
    fn what_can_not_be_written_is_refused_at_once() {
        let folder = tempfile::tempdir().expect("a folder");
        let missing = folder.path().join("no/such/report.json");
        for path in [folder.path(), missing.as_path()] {
            let error = Output::open(path.to_str()).expect_err("not writable").to_string();
            assert!(error.starts_with("can not write the JSON report to '"), "{error}");
        }
    }

    #[test]
    fn control_characters_become_visible() {
        assert_eq!(visible("a\u{1b}[2J\n\tb\r"), "a\u{FFFD}[2J\n\tb\u{FFFD}", "escapes");
    }
}
