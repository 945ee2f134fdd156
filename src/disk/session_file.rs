//! One session in a file, for another day: safetensors with a checksum.
//!
//! ```text
//! 8 bytes   length of the header
//! header    JSON: "__metadata__" with format, version and checksum, then name, type, shape and place of each tensor
//! session   u8   [n]         JSON: name, model, geometry, compression, what the cache is, what was asked and answered
//! tokens    u32  [tokens]    the sequence: prompt, then the answer under way
//! kept_counts, kept          u32 [lists], [sum]   positions of what an eviction left of each list, `[layer][KV head]`
//! merged_counts, merged      u32 [lists], [sum]   positions of what lists of two layers have in common
//! closed    u8   [lists]     1 where a list takes no more tokens
//! slot      u8   [n]         what rows were scored into, for the next eviction
//! pages     u8   [n]         pages of the cache, list after list, as they are on the device
//! ```
//!
//! The checksum is SHA-256 of all names, types, shapes and places in the order of names, and of all bytes behind the header. A
//! file is written beside its place and takes its name when it is whole.
//!
//! Nothing in a file is believed: lengths are compared with the file's before anything is allocated, the checksum before
//! anything is read, and what it says of the cache is checked again by
//! [`Caches::restore`](crate::schedule::Caches::restore), which makes the cache from which tokens there are, and takes nothing
//! else from the file. Readers of safetensors in other languages can open it.

use std::fs::File;
use std::io::{self, BufWriter, Read, Seek as _, SeekFrom, Write};
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::PagesFile;
use crate::compression::Compression;
use crate::geometry::{Bytes, HeadGeometry};
use crate::pool::suspended::{ListRecord, TableRecord};
use crate::schedule::{CacheRecord, SessionRecord};

/// What `__metadata__` says that the file is.
const FORMAT: &str = "concertina session";
/// The version that is written, and the only one that is read.
pub const VERSION: u32 = 1;
/// Bytes of a header at most.
const LONGEST_HEADER: u64 = 1 << 20;
/// Bytes that are hashed at a time.
const BLOCK: usize = 1 << 20;

/// Why a file is no session that can go on here.
#[derive(Debug, thiserror::Error)]
pub enum SessionFileError {
    /// The file can not be read or written.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// It ends too early, or goes on too long.
    #[error("the file has {found}, its header speaks of {expected}: it is not whole")]
    Length {
        /// Bytes of the file.
        found: Bytes,
        /// Bytes that it should have.
        expected: Bytes,
    },
    /// Something else.
    #[error("this is no session file: {0}")]
    Foreign(String),
    /// Of another version.
    #[error("the file is of version {0}, and this program reads version {VERSION}")]
    Version(String),
    /// Its bytes are not those that were written.
    #[error("the file is damaged: its checksum is {found}, and {expected} was written")]
    Checksum {
        /// Of what is there.
        found: String,
        /// Of what was.
        expected: String,
    },
    /// It contradicts itself.
    #[error("the file contradicts itself: {0}")]
    Inconsistent(String),
    /// Of another model, or with other settings.
    #[error("the session is of {what} {found}, and this run has {expected}")]
    Other {
        /// What differs.
        what: &'static str,
        /// The file's.
        found: String,
        /// The run's.
        expected: String,
    },
}

/// What a session belongs to: it goes on only where all of this is the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// What the model is called.
    pub model: String,
    /// What tells its file from others.
    pub fingerprint: String,
    /// Layers of the model.
    pub num_layers: u32,
    /// Query heads.
    pub num_qo_heads: u32,
    /// KV heads.
    pub num_kv_heads: u32,
    /// Channels of a head.
    pub head_dim: u32,
    /// Tokens of a page.
    pub page_tokens: u32,
    /// What tells the text apart that codecs were calibrated with.
    pub calibration: Option<String>,
}

impl Origin {
    /// Of a model's shape.
    pub const fn new(
        model: String,
        fingerprint: String,
        num_layers: u32,
        heads: HeadGeometry,
        page_tokens: u32,
    ) -> Self {
        let HeadGeometry { num_qo_heads, num_kv_heads, head_dim } = heads;
        let calibration = None;
        Self { model, fingerprint, num_layers, num_qo_heads, num_kv_heads, head_dim, page_tokens, calibration }
    }

    /// Whether a session of `self` can go on in a run of `run`.
    ///
    /// # Errors
    /// [`SessionFileError::Other`] with the first difference.
    pub fn serves(&self, run: &Self) -> Result<(), SessionFileError> {
        let shape = |o: &Self| {
            format!(
                "{} layers, {} query and {} KV heads of {}",
                o.num_layers, o.num_qo_heads, o.num_kv_heads, o.head_dim
            )
        };
        // Under another name it is the same file.
        let named = self.fingerprint != run.fingerprint;
        let model = |o: &Self| if named { format!("{} ({})", o.model, o.fingerprint) } else { String::new() };
        let calibration = |o: &Self| o.calibration.clone().unwrap_or_else(|| "no text".to_owned());
        let all = [
            ("the model", model(self), model(run)),
            ("a model with", shape(self), shape(run)),
            ("pages of so many tokens:", self.page_tokens.to_string(), run.page_tokens.to_string()),
            ("codecs calibrated with", calibration(self), calibration(run)),
        ];
        let differs = all.into_iter().find(|(_, found, expected)| found != expected);
        differs.map_or(Ok(()), |(what, found, expected)| Err(SessionFileError::Other { what, found, expected }))
    }
}

/// A question and its answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turn {
    /// What was asked.
    pub question: String,
    /// What was answered.
    pub answer: String,
}

/// A session that can be written.
#[derive(Debug)]
pub struct SavedSession {
    /// What the user calls it.
    pub name: String,
    /// What it belongs to.
    pub origin: Origin,
    /// What was asked and answered so far.
    pub turns: Vec<Turn>,
    /// Its sequence and what its cache holds.
    pub record: SessionRecord,
    /// Pages of the cache.
    pub pages: Vec<u8>,
    /// What its slot holds.
    pub slot: Vec<u8>,
}

/// The tensor `session`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    name: String,
    origin: Origin,
    turns: Vec<Turn>,
    compression: String,
    prompt_tokens: u64,
    answered: bool,
    max_new_tokens: u32,
    document_tokens: u32,
    cached_tokens: u32,
    cache: Option<CacheDescription>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CacheDescription {
    tail_start_tokens: u32,
    tail_tokens: u32,
    pairs: Vec<(u32, u32)>,
    chosen_pages: Option<u32>,
    due_tokens: Option<u32>,
    slot_bytes: Option<u64>,
}

/// Name, type and bytes.
type SmallTensor = (&'static str, Dtype, Vec<u8>);

impl SavedSession {
    /// Writes the file, whole or not at all; its bytes.
    ///
    /// # Errors
    /// [`SessionFileError::Io`]; what was there before stays.
    pub fn write(&self, path: &Path) -> Result<Bytes, SessionFileError> {
        let small = self.small_tensors()?;
        let mut tensors: Vec<(&str, Dtype, usize, &[u8])> = small
            .iter()
            .map(|(name, dtype, bytes)| (*name, *dtype, bytes.len() * 8 / dtype.bitsize(), &**bytes))
            .collect();
        tensors.push(("slot", Dtype::U8, self.slot.len(), &self.slot));
        tensors.push(("pages", Dtype::U8, self.pages.len(), &self.pages));
        let mut at = 0;
        let mut infos = Vec::new();
        for (name, dtype, length, bytes) in &tensors {
            let (dtype, shape, data_offsets) = (*dtype, vec![*length], (at, at + bytes.len()));
            let info = TensorInfo { dtype, shape, data_offsets };
            infos.push(((*name).to_owned(), info));
            at += bytes.len();
        }
        let mut hash = signed(infos.iter().map(|(name, info)| (name.as_str(), info)));
        tensors.iter().for_each(|(.., bytes)| hash.update(bytes));
        let about = [("format", FORMAT.to_owned()), ("version", VERSION.to_string()), ("checksum", digest(hash))];
        let about = about.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        let metadata = Metadata::new(Some(about), infos).map_err(|e| SessionFileError::Inconsistent(e.to_string()))?;
        let mut header = serde_json::to_vec(&metadata).map_err(io::Error::from)?;
        // Tensors begin at multiples of 8 bytes.
        header.resize(header.len().next_multiple_of(8), b' ');

        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut file = tempfile::Builder::new().prefix(".concertina-").tempfile_in(folder)?;
        let mut writer = BufWriter::new(file.as_file_mut());
        writer.write_all(&(header.len() as u64).to_le_bytes())?;
        writer.write_all(&header)?;
        tensors.iter().try_for_each(|(.., bytes)| writer.write_all(bytes))?;
        writer.flush()?;
        drop(writer);
        file.as_file().sync_all()?;
        file.persist(path).map_err(|e| e.error)?;
        Ok(Bytes(8 + header.len() as u64 + at as u64))
    }

    /// Everything but the pages.
    fn small_tensors(&self) -> Result<[SmallTensor; 7], SessionFileError> {
        let SessionRecord { prompt, produced, answered, max_new, compression, document, cached, cache } = &self.record;
        let (name, origin, turns) = (self.name.clone(), self.origin.clone(), self.turns.clone());
        let empty = TableRecord::default();
        let table = cache.as_ref().map_or(&empty, |cache| &cache.table);
        let cache = cache.as_ref().map(|cache| CacheDescription {
            tail_start_tokens: table.tail_start,
            tail_tokens: table.tail,
            pairs: table.pairs.clone(),
            chosen_pages: cache.chosen_pages,
            due_tokens: cache.due,
            slot_bytes: cache.slot.map(|bytes| bytes.0),
        });
        let description = Description {
            name,
            origin,
            turns,
            compression: compression.to_string(),
            prompt_tokens: prompt.len() as u64,
            answered: *answered,
            max_new_tokens: *max_new,
            document_tokens: *document,
            cached_tokens: *cached,
            cache,
        };
        let words = |words: &mut dyn Iterator<Item = u32>| words.flat_map(u32::to_le_bytes).collect::<Vec<u8>>();
        let counts = |of: &dyn Fn(&ListRecord) -> usize| {
            words(
                &mut table.lists.iter().map(|list| u32::try_from(of(list)).expect("positions are counted in 32 bits")),
            )
        };
        // Numbers of four bytes come first, so that each begins at a multiple of four.
        Ok([
            ("tokens", Dtype::U32, words(&mut prompt.iter().chain(produced).copied())),
            ("kept_counts", Dtype::U32, counts(&|list| list.kept.len())),
            ("kept", Dtype::U32, words(&mut table.lists.iter().flat_map(|list| list.kept.iter().copied()))),
            ("merged_counts", Dtype::U32, counts(&|list| list.merged.len())),
            ("merged", Dtype::U32, words(&mut table.lists.iter().flat_map(|list| list.merged.iter().copied()))),
            ("session", Dtype::U8, serde_json::to_vec(&description).map_err(io::Error::from)?),
            ("closed", Dtype::U8, table.lists.iter().map(|list| u8::from(list.closed)).collect()),
        ])
    }
}

/// The hash of what a header says of its tensors.
fn signed<'t>(tensors: impl Iterator<Item = (&'t str, &'t TensorInfo)>) -> Sha256 {
    // Tensors without bytes have no order of places.
    let mut tensors: Vec<_> = tensors.collect();
    tensors.sort_by_key(|(name, _)| *name);
    let mut hash = Sha256::new();
    for (name, TensorInfo { dtype, shape, data_offsets }) in tensors {
        hash.update(format!("{name} {dtype:?} {shape:?} {data_offsets:?}\n"));
    }
    hash
}

fn digest(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A session file that is whole.
#[derive(Debug)]
pub struct SessionFile {
    file: File,
    data_start: u64,
    metadata: Metadata,
    description: Description,
    record: SessionRecord,
    checksum: String,
}

impl SessionFile {
    /// Opens a file and checks all of it.
    ///
    /// # Errors
    /// [`SessionFileError`].
    pub fn open(path: &Path) -> Result<Self, SessionFileError> {
        Self::read(File::open(path)?)
    }

    /// As [`Self::open`].
    ///
    /// # Errors
    /// [`SessionFileError`].
    pub fn read(mut file: File) -> Result<Self, SessionFileError> {
        let (metadata, data_start) = header(&mut file)?;
        let checksum = checksum(&mut file, &metadata)?;
        let mut opened = Tensors { file: &mut file, data_start, metadata: &metadata };
        let description = opened.bytes("session")?;
        let description: Description = serde_json::from_slice(&description)
            .map_err(|e| SessionFileError::Inconsistent(format!("the tensor 'session' can not be read: {e}")))?;
        let record = opened.record(&description)?;
        Ok(Self { file, data_start, metadata, description, record, checksum })
    }

    /// What the user calls it.
    pub fn name(&self) -> &str {
        &self.description.name
    }

    /// What it belongs to.
    pub const fn origin(&self) -> &Origin {
        &self.description.origin
    }

    /// What was asked and answered so far.
    pub fn turns(&self) -> &[Turn] {
        &self.description.turns
    }

    /// Its sequence, and what its cache holds.
    pub const fn record(&self) -> &SessionRecord {
        &self.record
    }

    /// SHA-256 of its contents, in hexadecimal digits.
    pub fn checksum(&self) -> &str {
        &self.checksum
    }

    /// Bytes of the pages of its cache.
    pub fn page_bytes(&self) -> Bytes {
        self.metadata
            .info("pages")
            .map_or(Bytes::ZERO, |info| Bytes((info.data_offsets.1 - info.data_offsets.0) as u64))
    }

    /// What its slot holds, and the pages, which stay in the file.
    ///
    /// # Errors
    /// [`SessionFileError::Io`].
    pub fn into_pages(mut self) -> Result<(Vec<u8>, PagesFile), SessionFileError> {
        let mut tensors = Tensors { file: &mut self.file, data_start: self.data_start, metadata: &self.metadata };
        let slot = tensors.bytes("slot")?;
        let (from, length) = tensors.place("pages")?;
        Ok((slot, PagesFile::part(self.file, from, length)))
    }
}

/// Reads the header; where the tensors begin.
fn header(file: &mut File) -> Result<(Metadata, u64), SessionFileError> {
    let found = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(0))?;
    let mut length = [0; 8];
    if found < 8 {
        return Err(SessionFileError::Foreign(format!("it has {found} bytes")));
    }
    file.read_exact(&mut length)?;
    let length = u64::from_le_bytes(length);
    if length > LONGEST_HEADER || length > found - 8 {
        return Err(SessionFileError::Foreign(format!("it begins with a length of {length}, and has {found} bytes")));
    }
    let mut text = vec![0; usize::try_from(length).expect("a short header")];
    file.read_exact(&mut text)?;
    let metadata: Metadata = serde_json::from_slice(&text)
        .map_err(|e| SessionFileError::Foreign(format!("its header can not be read: {e}")))?;
    let about = metadata.metadata().as_ref();
    let value = |key: &str| about.and_then(|about| about.get(key)).cloned().unwrap_or_default();
    if value("format") != FORMAT {
        return Err(SessionFileError::Foreign(format!("its header does not say '{FORMAT}'")));
    }
    if value("version") != VERSION.to_string() {
        return Err(SessionFileError::Version(value("version")));
    }
    let data_start = 8 + length;
    let expected = data_start.saturating_add(metadata.data_len() as u64);
    if expected != found {
        return Err(SessionFileError::Length { found: Bytes(found), expected: Bytes(expected) });
    }
    Ok((metadata, data_start))
}

/// Reads everything behind the header once; its checksum, when that is the one that was written.
fn checksum(file: &mut File, metadata: &Metadata) -> Result<String, SessionFileError> {
    let tensors = metadata.tensors();
    let mut hash = signed(tensors.iter().map(|(name, info)| (name.as_str(), *info)));
    let mut block = vec![0; BLOCK];
    loop {
        match file.read(&mut block)? {
            0 => break,
            n => hash.update(&block[..n]),
        }
    }
    let found = digest(hash);
    let expected = metadata.metadata().as_ref().and_then(|about| about.get("checksum")).cloned().unwrap_or_default();
    if found == expected { Ok(found) } else { Err(SessionFileError::Checksum { found, expected }) }
}

/// The tensors of a file whose length and checksum are right.
struct Tensors<'f> {
    file: &'f mut File,
    data_start: u64,
    metadata: &'f Metadata,
}

impl Tensors<'_> {
    fn info(&self, name: &str) -> Result<&TensorInfo, SessionFileError> {
        let missing = || SessionFileError::Inconsistent(format!("there is no tensor '{name}'"));
        self.metadata.info(name).ok_or_else(missing)
    }

    /// Where a tensor of bytes begins in the file, and its length.
    fn place(&self, name: &str) -> Result<(u64, u64), SessionFileError> {
        let (from, end) = self.info(name)?.data_offsets;
        Ok((self.data_start + from as u64, (end - from) as u64))
    }

    fn bytes(&mut self, name: &str) -> Result<Vec<u8>, SessionFileError> {
        let (from, length) = self.place(name)?;
        self.file.seek(SeekFrom::Start(from))?;
        // No longer than the file, which was compared with its header.
        let mut bytes = vec![0; usize::try_from(length).map_err(|e| SessionFileError::Inconsistent(e.to_string()))?];
        self.file.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn words(&mut self, name: &str) -> Result<Vec<u32>, SessionFileError> {
        if self.info(name)?.dtype != Dtype::U32 {
            return Err(SessionFileError::Inconsistent(format!("tensor '{name}' is not of u32")));
        }
        let bytes = self.bytes(name)?;
        Ok(bytes.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().expect("four bytes"))).collect())
    }

    /// Positions of each list.
    fn lists(&mut self, counts: &str, all: &str) -> Result<Vec<Vec<u32>>, SessionFileError> {
        let (lengths, all_of_them) = (self.words(counts)?, self.words(all)?);
        let mut rest = &all_of_them[..];
        let mut lists = Vec::with_capacity(lengths.len());
        for n in lengths {
            let (list, after) = rest.split_at_checked(n as usize).ok_or_else(|| {
                SessionFileError::Inconsistent(format!(
                    "'{counts}' count more than the {} of '{all}'",
                    all_of_them.len()
                ))
            })?;
            lists.push(list.to_vec());
            rest = after;
        }
        if rest.is_empty() {
            return Ok(lists);
        }
        Err(SessionFileError::Inconsistent(format!("'{counts}' count {} less than '{all}' has", rest.len())))
    }

    fn record(&mut self, description: &Description) -> Result<SessionRecord, SessionFileError> {
        let mut prompt = self.words("tokens")?;
        let inconsistent = |what: String| Err(SessionFileError::Inconsistent(what));
        let Some(at) = usize::try_from(description.prompt_tokens).ok().filter(|at| *at <= prompt.len()) else {
            return inconsistent(format!("a prompt of {} tokens in {}", description.prompt_tokens, prompt.len()));
        };
        let produced = prompt.split_off(at);
        let compression: Compression = match description.compression.parse() {
            Ok(compression) => compression,
            Err(error) => return inconsistent(format!("its compression can not be read: {error}")),
        };
        let (kept, merged) = (self.lists("kept_counts", "kept")?, self.lists("merged_counts", "merged")?);
        let closed = self.bytes("closed")?;
        if kept.len() != closed.len() || merged.len() != closed.len() {
            return inconsistent(format!("{}, {} and {} lists", kept.len(), merged.len(), closed.len()));
        }
        let lists = kept.into_iter().zip(merged).zip(closed);
        let lists = lists.map(|((kept, merged), closed)| ListRecord { kept, merged, closed: closed != 0 }).collect();
        let (slot, pages) = (self.place("slot")?.1, self.place("pages")?.1);
        let cache = description.cache.as_ref();
        if cache.and_then(|cache| cache.slot_bytes).unwrap_or(0) != slot || (cache.is_none() && pages > 0) {
            return inconsistent(format!("{slot} bytes of a slot and {pages} of pages are not those of its cache"));
        }
        let cache = cache.map(|cache| CacheRecord {
            table: TableRecord {
                tail_start: cache.tail_start_tokens,
                tail: cache.tail_tokens,
                lists,
                pairs: cache.pairs.clone(),
            },
            chosen_pages: cache.chosen_pages,
            due: cache.due_tokens,
            slot: cache.slot_bytes.map(Bytes),
        });
        Ok(SessionRecord {
            prompt,
            produced,
            answered: description.answered,
            max_new: description.max_new_tokens,
            compression,
            document: description.document_tokens,
            cached: description.cached_tokens,
            cache,
        })
    }
}
