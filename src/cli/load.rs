//! Getting texts, models and engines ready.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, anyhow};
use concertina::compression::hidden::{Codec, Transform};
use concertina::engine::{Engine, EngineConfig};
use concertina::eval::calibration;
use concertina::geometry::{Bytes, ModelGeometry};
use concertina::model::{ChatTemplate, GgufFile, Message, ModelError, Role, Tokenizer, locate};
use concertina::report::ModelReport;
use concertina::schedule::{Caches, HostConfig, ScheduleConfig};
use concertina::weights::Weights;
use sha2::{Digest as _, Sha256};

use super::failure::usage;
use super::progress;
use super::tuning::Tuned;

/// Bytes at each end of a model file that its fingerprint is made of.
const FINGERPRINT_BYTES: u64 = 1 << 20;

/// A model file whose header has been read.
#[derive(Debug)]
pub(super) struct Model {
    path: PathBuf,
    gguf: GgufFile,
    pub(super) tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
}

impl Model {
    /// Finds the file and reads all but its weights.
    pub(super) fn open(spec: &str) -> Result<Self> {
        let path = locate(spec)?;
        let named = |error: ModelError| name_file(&path, error);
        let gguf = GgufFile::open(&path).map_err(named)?;
        let tokenizer = Tokenizer::from_gguf(&gguf).map_err(named)?;
        let template = ChatTemplate::from_gguf(&gguf).map_err(named)?;
        Ok(Self { gguf, tokenizer, template, path })
    }

    /// The model's shape.
    pub(super) const fn geometry(&self) -> &ModelGeometry {
        self.gguf.geometry()
    }

    /// What the file calls the model, or else the file's name.
    pub(super) fn name(&self) -> String {
        let named = self.gguf.text("general.name").ok().flatten().map(ToOwned::to_owned);
        named.unwrap_or_else(|| self.path.file_stem().unwrap_or_default().to_string_lossy().into_owned())
    }

    /// What tells it from other files: its name, and the bytes of the file, which differ by how it is quantised.
    pub(super) fn identity(&self) -> Result<String> {
        let about = std::fs::metadata(&self.path)
            .map_err(|e| anyhow!("can not read the model '{}': {e}", self.path.display()))?;
        Ok(format!("{}, {} bytes", self.name(), about.len()))
    }

    /// What tells the file from others, whatever it is called: its bytes, and a hash (SHA-256) of the first and the last of them,
    /// which are its header and weights.
    pub(super) fn fingerprint(&self) -> Result<String> {
        let named = |e: std::io::Error| anyhow!("can not read the model '{}': {e}", self.path.display());
        let mut file = File::open(&self.path).map_err(named)?;
        let length = file.seek(SeekFrom::End(0)).map_err(named)?;
        let mut hash = Sha256::new();
        for from in [0, length.saturating_sub(FINGERPRINT_BYTES)] {
            let mut part = Vec::new();
            file.seek(SeekFrom::Start(from)).map_err(named)?;
            (&file).take(FINGERPRINT_BYTES).read_to_end(&mut part).map_err(named)?;
            hash.update(&part);
        }
        let digits: String = hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        Ok(format!("{length} bytes, {digits}"))
    }

    /// For reports.
    pub(super) fn report(&self, weights: Option<Bytes>) -> ModelReport {
        let name = self.path.file_name().unwrap_or(self.path.as_os_str());
        ModelReport::new(name.to_string_lossy().into_owned(), self.geometry(), weights)
    }

    /// Reads the weights, with a progress bar.
    pub(super) fn weights(&self) -> Result<Weights> {
        let bar = progress::bytes("loading weights");
        let result = self.gguf.weights(&mut |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        });
        bar.finish_and_clear();
        result.map_err(|error| name_file(&self.path, error))
    }

    /// The prompt that asks for an answer to `text`, through the chat template where there is one.
    pub(super) fn chat(&self, text: &str) -> Result<Vec<u32>> {
        match &self.template {
            Some(template) => {
                let messages = [Message::new(Role::User, text)];
                Ok(template.prompt_tokens(&self.tokenizer, &messages).map_err(|e| name_file(&self.path, e))?)
            }
            None => self.raw(&format!("{text}\n")),
        }
    }

    /// What follows an answer where `text` is asked next, through the chat template where there is one.
    pub(super) fn next_turn(&self, text: &str) -> Result<Vec<u32>> {
        let tokens = match &self.template {
            Some(template) => template.next_turn_tokens(&self.tokenizer, text),
            None => self.tokenizer.encode(&format!("\n{text}\n"), false),
        };
        tokens.map_err(|e| name_file(&self.path, e))
    }

    /// The text itself as a prompt, after the token that begins a sequence where the model expects one.
    pub(super) fn raw(&self, text: &str) -> Result<Vec<u32>> {
        let bos = self.tokenizer.bos_id().filter(|_| self.tokenizer.add_bos());
        let tokens = self.tokenizer.encode(text, false).map_err(|e| name_file(&self.path, e))?;
        Ok(bos.into_iter().chain(tokens).collect())
    }
}

/// Puts the file's name before a message that lacks it.
fn name_file(path: &Path, error: ModelError) -> anyhow::Error {
    match error {
        ModelError::Io { .. } | ModelError::NotFound { .. } => error.into(),
        error => anyhow!("'{}': {error}", path.display()),
    }
}

/// Reads a text; `what` names it in messages.
pub(super) fn read_text(what: &str, path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|e| anyhow!("can not read {what} '{}': {e}", path.display()))?;
    let n_bytes = bytes.len();
    let text = String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        anyhow!("{what} '{}' is not UTF-8 text: byte {at} of {n_bytes} does not belong there", path.display())
    })?;
    if text.trim().is_empty() {
        return Err(anyhow!("{what} '{}' is empty: {n_bytes} bytes without a letter", path.display()));
    }
    Ok(text)
}

/// Tokens of a calibration text that are used at most.
const CALIBRATION_TOKENS: u32 = 1024;

/// A context that holds `wanted` tokens, and a calibration text where there is one: it is read in the same engine.
pub(super) fn context_for(wanted: u32, calibrate: Option<&Path>, longest: u32) -> u32 {
    wanted.max(calibrate.map_or(0, |_| CALIBRATION_TOKENS.min(longest)))
}

/// Fits codecs that take bases from a text. Without a text they keep those of the weights, and the user is told.
pub(super) fn calibrate(
    engine: &mut Engine<'_>,
    caches: &mut Caches,
    model: &Model,
    config: &EngineConfig,
    text: Option<&Path>,
) -> Result<()> {
    let projects = |codec: Codec| matches!(codec.transform, Transform::LowRank { .. });
    let wanted = config.codecs.iter().any(|codec| projects(codec.k) || projects(codec.v));
    let Some(path) = text else {
        if wanted {
            eprintln!(
                "the bases of lowrank codecs come from the weights alone, which loses much of what a text needs; \
                 give --calibrate FILE"
            );
        }
        return Ok(());
    };
    if !wanted {
        return Err(usage("--calibrate fits lowrank codecs, and there is none"));
    }
    let tokens = model.tokenizer.encode(&read_text("the calibration text", path)?, false)?;
    let full = caches.full;
    let list = u64::from(full.num_lists()) * full.open_page().0;
    let fits = caches.pool.capacity().0 / list * u64::from(full.page.page_size);
    let most = u64::from(config.context_length.min(CALIBRATION_TOKENS)).min(fits);
    let n = tokens.len().min(usize::try_from(most).unwrap_or(usize::MAX));
    let bar = progress::counter("calibrating heads", u64::from(full.num_lists()));
    let result = calibration::calibrate(engine, caches, &tokens[..n], config.max_rows as usize, &mut || bar.inc(1));
    bar.finish_and_clear();
    result.map_err(|error| anyhow!("'{}': {error}", path.display()))?;
    Ok(())
}

/// The schedule that goes with an engine.
pub(super) fn schedule_config(config: &EngineConfig) -> ScheduleConfig {
    let &EngineConfig { max_rows, max_sessions, context_length, .. } = config;
    ScheduleConfig { max_rows, max_sessions, context_length, host: HostConfig::default() }
}

/// Uploads the weights and compiles the kernels, with a sign of life.
pub(super) fn engine<'d>(
    device: &'d concertina::device::Device,
    weights: &Weights,
    config: &EngineConfig,
    tuned: &Tuned,
) -> Result<(Engine<'d>, Caches)> {
    let spinner = progress::spinner("preparing the device");
    let result = Engine::tuned(device, weights, config, Arc::clone(&tuned.tuning));
    spinner.finish_and_clear();
    Ok(result?)
}
