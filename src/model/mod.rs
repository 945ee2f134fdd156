//! Model files: GGUF weights, the tokenizer and the chat template that lie inside, and where to get a file.
//!
//! ```text
//! locate ──> path ──> GgufFile ──> geometry, Weights      (gguf_header checks the bytes before candle reads them)
//!                        ├───────> Tokenizer              text <-> token ids
//!                        └───────> ChatTemplate           messages -> token ids
//! ```
//!
//! A model file comes from somewhere on the internet, so this room treats it as hostile: sizes are compared with the
//! file before anything is allocated, shapes with the geometry before data is read, and whatever is wrong ends in a
//! [`ModelError`] of one line. Text of a user is hostile too: it can not produce a control token, see
//! [`Tokenizer::encode`].
//!
//! Limits: the architecture `llama` (rotary pairs, RMS norm, `SiLU` gate, no biases, no rope scaling, no experts) and
//! byte-level BPE vocabularies. Weights are held as f16, whatever the file stores; that costs memory on the host and
//! the device, and spares a kernel per quantised format.

mod bpe;
mod chat;
mod gguf;
mod gguf_header;
mod gguf_metadata;
mod locate;
mod tokenizer;

use std::path::{Path, PathBuf};

pub use chat::{ChatTemplate, Message, Role};
pub use gguf::GgufFile;
pub use locate::locate;
pub use tokenizer::{DecodeStream, Tokenizer};

/// SHA-256 of the reference model, `SmolLM2-135M-Instruct.Q4_1.gguf`.
pub const REFERENCE_MODEL_SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

/// Where `cargo xtask model` puts the reference model, relative to the repository.
const REFERENCE_MODEL: &str = ".model/SmolLM2-135M-Instruct.Q4_1.gguf";

/// What can go wrong between a model's name and its tokens.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The operating system refused.
    #[error("can not read {}: {source}; check that the file exists and may be read", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// The file ends before its contents do.
    #[error(
        "the file is truncated: {what} needs {needed} bytes at offset {offset}, the file has {file_bytes} bytes; \
         fetch it again"
    )]
    Truncated {
        /// The part that is cut off.
        what: String,
        /// Bytes of that part.
        needed: u64,
        /// Where it starts.
        offset: u64,
        /// Bytes of the file.
        file_bytes: u64,
    },
    /// The bytes contradict the GGUF format or each other.
    #[error("the file is not a valid GGUF model: {0}")]
    Malformed(String),
    /// A valid file of a kind that this crate does not compute.
    #[error("the model is not supported: {0}")]
    Unsupported(String),
    /// The vocabulary in the file can not be used, or a text not be tokenised.
    #[error("the tokenizer can not be used: {0}")]
    Tokenizer(String),
    /// The chat template in the file can not be used.
    #[error("the chat template can not be used: {0}; give a raw prompt instead of messages")]
    ChatTemplate(String),
    /// A model name that leads to no file.
    #[error("no model '{spec}': {reason}")]
    NotFound {
        /// What was asked for.
        spec: String,
        /// What was tried, and what to give instead.
        reason: String,
    },
}

/// The first line of a foreign error, at most 300 characters, so that messages stay one line.
fn one_line(error: &dyn std::fmt::Display) -> String {
    let text = error.to_string();
    let line = text.lines().next().unwrap_or_default();
    line.chars().filter(|c| !c.is_control()).take(300).collect()
}

/// The path of the reference model: the environment variable `CONCERTINA_MODEL`, or the place in the repository where
/// `cargo xtask model` puts it. The file need not exist.
pub fn reference_model_path() -> PathBuf {
    if let Some(path) = std::env::var_os("CONCERTINA_MODEL") {
        return path.into();
    }
    // Tests run in the package's folder, a user elsewhere: prefer the folder that this crate was built from.
    let in_repository = Path::new(env!("CARGO_MANIFEST_DIR")).join(REFERENCE_MODEL);
    if in_repository.exists() { in_repository } else { REFERENCE_MODEL.into() }
}
