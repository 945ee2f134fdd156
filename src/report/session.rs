//! Reports of `session`: what files hold, what was saved, and what was answered.

use std::fmt;

use serde::Serialize;

use super::table::{Align, block, count, counted, number, table};
use super::{DeviceReport, ModelReport, Program};
use crate::disk::SessionFile;
use crate::disk::session_file::{Origin, Turn};
use crate::geometry::Bytes;
use crate::schedule::Session;

/// What a session file holds.
#[derive(Clone, Debug, Serialize)]
pub struct SessionDetails {
    /// The file.
    pub file: String,
    /// What it is called.
    pub name: String,
    /// What it belongs to.
    pub origin: Origin,
    /// What was done to its cache, in the form that `--compress` reads.
    pub compression: String,
    /// Tokens of its sequence, an answer under way included.
    pub tokens: usize,
    /// Of these, tokens that its cache has seen.
    pub cached_tokens: u32,
    /// Tokens of the document.
    pub document_tokens: u32,
    /// Positions that an eviction left, over all lists; 0 where nothing was evicted.
    pub kept_tokens: u64,
    /// Tokens since then, in every list.
    pub tail_tokens: u32,
    /// Lists, one per layer and KV head that keeps any.
    pub lists: usize,
    /// Bytes of its pages; 0 where its sequence has to be read again.
    pub cache_bytes: Bytes,
    /// What it waits for: `question`, `prompt` (to be read), or `answer` (to be finished).
    pub waits_for: &'static str,
    /// Questions and answers so far.
    pub turns: Vec<Turn>,
    /// SHA-256 of its contents.
    pub checksum: String,
}

impl SessionDetails {
    /// Of an open file.
    pub fn new(path: String, file: &SessionFile) -> Self {
        let record = file.record();
        let table = record.cache.as_ref().map(|cache| &cache.table);
        let lists = table.map(|table| &table.lists[..]).unwrap_or_default();
        let waits_for = match (record.answered, record.produced.is_empty()) {
            (true, _) => "question",
            (false, true) => "prompt",
            (false, false) => "answer",
        };
        Self {
            file: path,
            name: file.name().to_owned(),
            origin: file.origin().clone(),
            compression: record.compression.to_string(),
            tokens: record.prompt.len() + record.produced.len(),
            cached_tokens: record.cached,
            document_tokens: record.document,
            kept_tokens: lists.iter().map(|list| (list.kept.len() + list.merged.len()) as u64).sum(),
            tail_tokens: table.map_or(0, |table| table.tail),
            lists: lists.len(),
            cache_bytes: file.page_bytes(),
            waits_for,
            turns: file.turns().to_vec(),
            checksum: file.checksum().to_owned(),
        }
    }
}

impl fmt::Display for SessionDetails {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let origin = &self.origin;
        let heads =
            format!("{} query and {} KV heads of {}", origin.num_qo_heads, origin.num_kv_heads, origin.head_dim);
        let kept = match self.kept_tokens {
            0 => format!("{} in every list", counted(self.tail_tokens.into(), "token")),
            kept => {
                format!("{} tokens kept over all lists, {} more in each", count(kept), count(self.tail_tokens.into()))
            }
        };
        let cache = match self.cache_bytes {
            Bytes::ZERO => "none: its sequence is read again".to_owned(),
            bytes => format!("{bytes} in {} lists, {kept}", self.lists),
        };
        let lines = [
            ("file", self.file.clone()),
            ("model", format!("{}, {}", origin.model, origin.fingerprint)),
            ("shape", format!("{} layers, {heads}, pages of {} tokens", origin.num_layers, origin.page_tokens)),
            ("compression", self.compression.clone()),
            (
                "sequence",
                format!("{}, {} cached", counted(self.tokens as u64, "token"), count(self.cached_tokens.into())),
            ),
            ("cache", cache),
            ("waits for", self.waits_for.to_owned()),
            ("checksum", self.checksum.clone()),
        ];
        write!(f, "{}", block(&self.name, &lines))?;
        turns(f, &self.turns)
    }
}

fn turns(f: &mut fmt::Formatter<'_>, turns: &[Turn]) -> fmt::Result {
    for Turn { question, answer } in turns {
        let answer = if answer.trim().is_empty() { "(nothing)" } else { answer.trim() };
        // Later lines begin below the first one.
        write!(f, "\nquestion  {question}\nanswer    {}\n", answer.replace('\n', "\n          "))?;
    }
    Ok(())
}

/// The sessions of a folder.
#[derive(Clone, Debug, Serialize)]
pub struct SessionList {
    /// The program.
    pub program: Program,
    /// Files that are whole.
    pub sessions: Vec<SessionDetails>,
    /// Files that are not.
    pub refused: Vec<RefusedFile>,
}

/// A file that is no session that can go on.
#[derive(Clone, Debug, Serialize)]
pub struct RefusedFile {
    /// Its name.
    pub file: String,
    /// Why.
    pub reason: String,
}

impl fmt::Display for SessionList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use Align::{Left, Right};
        let columns = [
            ("session", Left),
            ("model", Left),
            ("cache", Left),
            ("tokens", Right),
            ("bytes", Right),
            ("answers", Right),
            ("waits for", Left),
        ];
        let row = |s: &SessionDetails| {
            vec![
                s.name.clone(),
                s.origin.model.clone(),
                s.compression.clone(),
                count(s.tokens as u64),
                s.cache_bytes.to_string(),
                s.turns.len().to_string(),
                s.waits_for.to_owned(),
            ]
        };
        if self.sessions.is_empty() {
            writeln!(f, "no sessions")?;
        } else {
            write!(f, "{}", table(&columns, self.sessions.iter().map(row)))?;
        }
        for RefusedFile { file, reason } in &self.refused {
            writeln!(f, "\n{file}: {reason}")?;
        }
        Ok(())
    }
}

/// What `session save` wrote.
#[derive(Clone, Debug, Serialize)]
pub struct SaveReport {
    /// The program.
    pub program: Program,
    /// One per document.
    pub sessions: Vec<SavedDocument>,
}

/// A document whose cache is in a file.
#[derive(Clone, Debug, Serialize)]
pub struct SavedDocument {
    /// Path of the document, as given.
    pub document: String,
    /// What the session is called.
    pub name: String,
    /// What was done to its cache.
    pub compression: String,
    /// Tokens that were read.
    pub tokens: usize,
    /// Bytes of its pages.
    pub cache_bytes: Bytes,
    /// Bytes of the file.
    pub file_bytes: Bytes,
}

impl fmt::Display for SaveReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use Align::{Left, Right};
        let columns = [
            ("session", Left),
            ("document", Left),
            ("cache", Left),
            ("tokens", Right),
            ("pages", Right),
            ("file", Right),
        ];
        let row = |s: &SavedDocument| {
            let bytes = [s.cache_bytes, s.file_bytes].map(|bytes| bytes.to_string());
            let [pages, file] = bytes;
            vec![s.name.clone(), s.document.clone(), s.compression.clone(), count(s.tokens as u64), pages, file]
        };
        write!(f, "{}", table(&columns, self.sessions.iter().map(row)))
    }
}

/// What `session load` found.
#[derive(Clone, Debug, Serialize)]
pub struct LoadReport {
    /// The program.
    pub program: Program,
    /// The device.
    pub device: DeviceReport,
    /// The model.
    pub model: ModelReport,
    /// One per session, in the order given.
    pub sessions: Vec<LoadedSession>,
    /// Whether it was interrupted.
    pub interrupted: bool,
}

/// A session that went on.
#[derive(Clone, Debug, Serialize)]
pub struct LoadedSession {
    /// What it is called.
    pub name: String,
    /// What was asked and answered now.
    pub turns: Vec<Turn>,
    /// Bytes of pages that came from its file.
    pub restored_bytes: Bytes,
    /// Tokens produced now.
    pub new_tokens: usize,
    /// From the start until its first token.
    pub first_token_s: Option<f64>,
    /// Bytes of its file, written again; `null` where it was left as it was.
    pub file_bytes: Option<Bytes>,
}

impl LoadedSession {
    /// A session with what it was asked, not yet saved.
    pub fn new(name: String, session: &Session, turns: Vec<Turn>, restored_bytes: Bytes) -> Self {
        let first_token_s = session.times.first_token.map(|t| t.as_secs_f64());
        Self { name, turns, restored_bytes, new_tokens: session.produced.len(), first_token_s, file_bytes: None }
    }
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for session in &self.sessions {
            let first = number(session.first_token_s);
            writeln!(
                f,
                "── {} ── {} from its file, first token after {first} s",
                session.name, session.restored_bytes
            )?;
            turns(f, &session.turns)?;
            writeln!(f)?;
        }
        Ok(())
    }
}
