//! A folder of session files.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, anyhow};
use concertina::disk::session_file::{Origin, SavedSession, Turn};
use concertina::disk::{PagesFile, SessionFile, SessionFileError};
use concertina::engine::Engine;
use concertina::geometry::Bytes;
use concertina::schedule::{Scheduler, Session, SessionId};

use super::args::{CacheArgs, CalibrateArg};
use super::load::Model;

/// How session files end.
const EXTENSION: &str = "session";

/// A folder that files can be written to.
#[derive(Clone, Debug)]
pub(super) struct SessionDir {
    path: PathBuf,
}

impl SessionDir {
    /// Makes the folder where it is missing, and checks that files can be written.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let refused = |e: io::Error| anyhow!("can not keep sessions in '{}': {e}", path.display());
        fs::create_dir_all(path).map_err(refused)?;
        tempfile::tempfile_in(path).map_err(refused)?;
        Ok(Self { path: path.to_owned() })
    }

    /// A folder to read from.
    pub(super) fn existing(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// The folder.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes per second into a file of the folder, and out of it.
    pub(super) fn rates(&self) -> Result<[f64; 2]> {
        const PROBE: usize = 4 << 20;
        let refused = |e: io::Error| anyhow!("can not keep sessions in '{}': {e}", self.path.display());
        let started = Instant::now();
        let mut file = PagesFile::create(&self.path).map_err(refused)?;
        file.append(&vec![0x5A; PROBE]).map_err(refused)?;
        let written = started.elapsed();
        file.read(0, PROBE).map_err(refused)?;
        let read = started.elapsed() - written;
        Ok([written, read].map(|time| PROBE as f64 / time.as_secs_f64().max(1e-9)))
    }

    /// The file of a name.
    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.{EXTENSION}"))
    }

    /// A name like the document's that no file has: a session never takes the place of another.
    fn free_name(&self, document: &str) -> String {
        let stem = Path::new(document).file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let numbered = (2..).map(|n: u32| format!("{stem}-{n}"));
        let mut names = std::iter::once(stem.clone()).chain(numbered);
        names.find(|name| !self.file(name).exists()).expect("there are more numbers than files")
    }

    /// Writes a session to a file of its own; its name and bytes.
    pub(super) fn save_new(&self, document: &str, saved: SavedSession) -> Result<(String, Bytes)> {
        let name = self.free_name(document);
        let bytes = self.replace(SavedSession { name: name.clone(), ..saved })?;
        Ok((name, bytes))
    }

    /// Writes a session to the file of its name, whole or not at all.
    pub(super) fn replace(&self, saved: SavedSession) -> Result<Bytes> {
        let path = self.file(&saved.name);
        saved.write(&path).map_err(|error| {
            let bytes = Bytes((saved.pages.len() + saved.slot.len()) as u64);
            anyhow!("can not save '{}', {bytes} of pages, in '{}': {error}", saved.name, self.path.display())
        })
    }

    /// Opens the session of a name.
    pub(super) fn open_session(&self, name: &str) -> Result<SessionFile> {
        let path = self.file(name.strip_suffix(&format!(".{EXTENSION}")).unwrap_or(name));
        SessionFile::open(&path).map_err(|error| anyhow!("'{}': {error}", path.display()))
    }

    /// Every session file, by name, whole or with the reason why not.
    pub(super) fn all(&self) -> Result<Vec<(PathBuf, Result<SessionFile, SessionFileError>)>> {
        let refused = |e: io::Error| anyhow!("can not read the folder '{}': {e}", self.path.display());
        let entries = fs::read_dir(&self.path).map_err(refused)?;
        let mut paths = entries.map(|entry| Ok(entry.map_err(refused)?.path())).collect::<Result<Vec<_>>>()?;
        paths.retain(|path| path.extension().is_some_and(|extension| extension == EXTENSION));
        paths.sort();
        Ok(paths.into_iter().map(|path| (path.clone(), SessionFile::open(&path))).collect())
    }
}

/// What sessions of a run belong to.
pub(super) fn origin(model: &Model, cache: &CacheArgs, calibration: &CalibrateArg) -> Result<Origin> {
    let geometry = model.geometry();
    let (name, print) = (model.name(), model.fingerprint()?);
    let origin = Origin::new(name, print, geometry.num_layers, geometry.heads, cache.page_size);
    Ok(Origin { calibration: calibration.fingerprint()?, ..origin })
}

/// What was asked and answered, the answer under way included.
pub(super) fn turns<'q>(model: &Model, session: &Session, questions: impl Iterator<Item = &'q String>) -> Vec<Turn> {
    let answer =
        |round: &concertina::schedule::Answer| model.tokenizer.decode(&session.produced[round.produced.clone()]);
    let answered = questions.zip(&session.answers);
    answered.map(|(question, round)| Turn { question: question.clone(), answer: answer(round) }).collect()
}

/// A session as it is now, without a name yet.
pub(super) fn saved(
    engine: &mut Engine<'_>,
    scheduler: &Scheduler,
    id: SessionId,
    origin: &Origin,
    turns: Vec<Turn>,
) -> Result<SavedSession> {
    Ok(engine.save(scheduler, id, String::new(), origin.clone(), turns)?)
}
