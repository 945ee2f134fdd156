//! The file that tunings are kept in: one entry per adapter, backend, driver, version of the program, and tier.
//!
//! ```text
//! { "format": 1, "entries": [ { "adapter": ..., "backend": ..., "driver": ..., "program": ..., "tier": ..., "choices": {
//!     "decode": { "kivi4/g4-d128": "tiled:64:2:4:8:ahead" }, "prefill": ..., "product": ..., "cooperative_product": ...,
//!     "score": ..., "gather": ... } } ] }
//! ```
//!
//! Choices are read only of the entry that serves a device, and checked value by value, since a kernel is compiled from them; those
//! of other versions are kept as they are.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::device::{AdapterSummary, Device, Tier};
use crate::kernels::decode::DecodeTuning;
use crate::kernels::decode_choices::DecodeClass;
use crate::kernels::prefill::PrefillTuning;
use crate::kernels::tuning::Tuning;

/// The format that this version writes and reads.
const FORMAT: u32 = 1;
/// Largest file that is read: hundreds of entries.
const BYTES_MAX: u64 = 1 << 20;

/// Why a file of tunings can not be used.
#[derive(Debug, thiserror::Error)]
pub enum TuningFileError {
    /// It can not be read or written.
    #[error("can not {verb} the tuning file '{}': {cause}", path.display())]
    Io {
        /// `read` or `write`.
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's words.
        cause: io::Error,
    },
    /// What it holds makes no sense.
    #[error("the tuning file '{}' is damaged: {reason}; delete it or run `concertina tune`, which writes it anew", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// What an entry is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntryKey {
    /// The driver's name for the adapter.
    pub adapter: String,
    /// Graphics API.
    pub backend: String,
    /// Driver and its version.
    pub driver: String,
    /// Version of this program.
    pub program: String,
    /// Tier of kernels.
    pub tier: String,
}

impl EntryKey {
    /// Of an open device.
    pub fn of(device: &Device) -> Self {
        Self::of_adapter(device.summary(), device.tier())
    }

    /// Of an adapter in a tier.
    pub fn of_adapter(adapter: &AdapterSummary, tier: Tier) -> Self {
        Self {
            adapter: adapter.name.clone(),
            backend: adapter.backend.clone(),
            driver: adapter.driver.clone(),
            program: env!("CARGO_PKG_VERSION").to_owned(),
            tier: tier.to_string(),
        }
    }

    /// Whether another key differs in the driver or the program alone.
    fn is_other_version(&self, other: &Self) -> bool {
        self != other && (&self.adapter, &self.backend, &self.tier) == (&other.adapter, &other.backend, &other.tier)
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    adapter: String,
    backend: String,
    driver: String,
    program: String,
    tier: String,
    choices: Value,
}

impl Entry {
    fn new(key: EntryKey, choices: Value) -> Self {
        let EntryKey { adapter, backend, driver, program, tier } = key;
        Self { adapter, backend, driver, program, tier, choices }
    }

    fn key(&self) -> EntryKey {
        let Self { adapter, backend, driver, program, tier, .. } = self.clone();
        EntryKey { adapter, backend, driver, program, tier }
    }
}

/// A tuning in the words of the file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Choices {
    decode: BTreeMap<String, String>,
    prefill: Option<String>,
    product: Option<String>,
    cooperative_product: Option<String>,
    score: Option<String>,
    gather: Option<String>,
}

/// A tuning in the words of the file.
pub fn choices_of(tuning: &Tuning) -> impl Serialize + use<> {
    Choices {
        decode: tuning.decode.iter().map(|(class, tile)| (class.to_string(), tile.to_string())).collect(),
        prefill: tuning.prefill.map(|prefill| prefill.to_string()),
        product: tuning.product.map(|product| product.to_string()),
        cooperative_product: tuning.cooperative_product.map(|tile| tile.to_string()),
        score: tuning.score.map(|tile| tile.to_string()),
        gather: tuning.gather.map(|launch| launch.to_string()),
    }
}

impl Choices {
    /// What they mean in a tier; a sentence where a kernel could not be made from them.
    fn tuning(&self, tier: &str) -> Result<Tuning, String> {
        let mut tuning = Tuning::default();
        for (class, tile) in &self.decode {
            let (class, tile): (DecodeClass, DecodeTuning) = (class.parse()?, tile.parse()?);
            if tile.fitted(&class.format()?) != tile {
                return Err(format!("decode of {class} can not run as {tile}"));
            }
            tuning.decode.insert(class, tile);
        }
        tuning.prefill = self.prefill.as_deref().map(str::parse).transpose()?;
        tuning.product = self.product.as_deref().map(str::parse).transpose()?;
        tuning.cooperative_product = self.cooperative_product.as_deref().map(str::parse).transpose()?;
        tuning.score = self.score.as_deref().map(str::parse).transpose()?;
        tuning.gather = self.gather.as_deref().map(str::parse).transpose()?;
        let cooperative = matches!(tuning.prefill, Some(PrefillTuning::Cooperative(_)));
        if (cooperative || tuning.cooperative_product.is_some()) && tier != Tier::Cooperative.to_string() {
            return Err(format!("cooperative matrices are not part of the {tier} tier"));
        }
        Ok(tuning)
    }
}

/// What a file has for a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// A tuning.
    Entry(Box<Tuning>),
    /// Only some of another driver or version of the program, which may mean other kernels.
    OtherVersion(EntryKey),
    /// Nothing.
    Nothing,
}

/// Entries of tunings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TuningFile {
    format: u32,
    entries: Vec<Entry>,
}

impl Default for TuningFile {
    fn default() -> Self {
        Self { format: FORMAT, entries: Vec::new() }
    }
}

impl TuningFile {
    /// Reads a file; `None` where there is none.
    ///
    /// # Errors
    /// [`TuningFileError`].
    pub fn read(path: &Path) -> Result<Option<Self>, TuningFileError> {
        let failed = |cause| TuningFileError::Io { verb: "read", path: path.to_owned(), cause };
        let damaged = |reason: String| TuningFileError::Damaged { path: path.to_owned(), reason };
        let file = match fs::File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let mut bytes = Vec::new();
        file.take(BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
        if bytes.len() as u64 > BYTES_MAX {
            return Err(damaged(format!("it is larger than {BYTES_MAX} bytes")));
        }
        let read: Self = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        if read.format != FORMAT {
            return Err(damaged(format!("its format is {}, and this program reads {FORMAT}", read.format)));
        }
        Ok(Some(read))
    }

    /// What it has for a key. `path` is where it came from, for the message.
    ///
    /// # Errors
    /// [`TuningFileError::Damaged`] where its values make no kernels.
    pub fn find(&self, key: &EntryKey, path: &Path) -> Result<Found, TuningFileError> {
        let Some(entry) = self.entries.iter().find(|entry| entry.key() == *key) else {
            let other = self.entries.iter().map(Entry::key).find(|other| other.is_other_version(key));
            return Ok(other.map_or(Found::Nothing, Found::OtherVersion));
        };
        let choices = serde_json::from_value::<Choices>(entry.choices.clone()).map_err(|error| error.to_string());
        let tuning = choices.and_then(|choices| choices.tuning(&key.tier)).map_err(|reason| {
            let reason = format!("in its entry for {}, {} tier: {reason}", key.adapter, key.tier);
            TuningFileError::Damaged { path: path.to_owned(), reason }
        })?;
        Ok(Found::Entry(Box::new(tuning)))
    }

    /// Puts in a tuning, in place of the one that the key had.
    ///
    /// # Panics
    /// Never: choices are texts.
    pub fn put(&mut self, key: EntryKey, tuning: &Tuning) {
        let choices = serde_json::to_value(choices_of(tuning)).expect("texts are JSON");
        self.entries.retain(|entry| entry.key() != key);
        self.entries.push(Entry::new(key, choices));
    }

    /// Writes a new file beside `path`, which then takes its name; folders are made.
    ///
    /// # Errors
    /// [`TuningFileError::Io`].
    ///
    /// # Panics
    /// Never: entries are JSON.
    pub fn write(&self, path: &Path) -> Result<(), TuningFileError> {
        let mut text = serde_json::to_vec_pretty(self).expect("entries are JSON");
        text.push(b'\n');
        let write = || -> io::Result<()> {
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
            fs::create_dir_all(folder)?;
            let mut file = tempfile::NamedTempFile::new_in(folder)?;
            file.write_all(&text)?;
            file.as_file().sync_all()?;
            file.persist(path).map(|_| ()).map_err(|error| error.error)
        };
        write().map_err(|cause| TuningFileError::Io { verb: "write", path: path.to_owned(), cause })
    }
}

/// Where the file lies unless the command line says otherwise: `$CONCERTINA_TUNING`, or `concertina/tuning.json` in the user's folder of
/// caches; `None` where the environment names none.
pub fn file_of_user() -> Option<PathBuf> {
    located(&|name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from))
}

fn located(variable: &dyn Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    if let Some(file) = variable("CONCERTINA_TUNING") {
        return Some(file);
    }
    // Folders that are not absolute are to be ignored, says the XDG specification.
    let folder = |name: &str| variable(name).filter(|folder| folder.is_absolute());
    let caches = if cfg!(windows) {
        folder("LOCALAPPDATA")
    } else if cfg!(target_os = "macos") {
        folder("HOME").map(|home| home.join("Library").join("Caches"))
    } else {
        folder("XDG_CACHE_HOME").or_else(|| folder("HOME").map(|home| home.join(".cache")))
    };
    caches.map(|caches| caches.join("concertina").join("tuning.json"))
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
