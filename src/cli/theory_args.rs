//! Models and GPUs that commands of the theory are asked about.

use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};
use clap::Args;
use concertina::model::{GgufFile, locate};
use concertina::theory::model::Decoder;
use concertina::theory::presets::Presets;

use super::failure::usage;
use super::load::read_text;

/// Models and GPUs with names.
#[derive(Args, Clone, Debug)]
pub(super) struct PresetsArg {
    /// Add the models and GPUs of this TOML file to those that have names; may be given again
    ///
    /// The format is that of `presets/models.toml` and `presets/gpus.toml` of the sources, in one file or two. What has the name
    /// of another takes its place.
    #[arg(long = "presets", value_name = "FILE")]
    files: Vec<PathBuf>,
}

impl PresetsArg {
    /// Those of the program and of the files, in their order. What takes the place of another is told.
    ///
    /// A file with nonsense in it is wrong usage.
    pub(super) fn load(&self) -> Result<Presets> {
        let mut presets = Presets::built_in();
        for path in &self.files {
            let text = read_text("the presets", path)?;
            for note in presets.add(&path.display().to_string(), &text).map_err(usage)? {
                eprintln!("{note}");
            }
        }
        Ok(presets)
    }

    /// The files, as a report repeats them.
    pub(super) fn files(&self) -> Vec<String> {
        self.files.iter().map(|path| path.display().to_string()).collect()
    }
}

/// A model that need not be here.
#[derive(Args, Clone, Debug)]
pub(super) struct TheoryModelArgs {
    /// A model by its name, of those that `concertina presets` lists, or a GGUF file, or a Hugging Face repository: owner/name; of a
    /// file only its shape is used
    #[arg(long, value_name = "NAME|PATH|owner/name")]
    pub(super) model: String,

    #[command(flatten)]
    pub(super) presets: PresetsArg,
}

/// A model and what it is called.
pub(super) struct NamedModel {
    /// What it is called: that of the preset, or the file's name.
    pub(super) name: String,
    /// The decoder.
    pub(super) decoder: Decoder,
}

/// A preset, or else the header of a GGUF file.
///
/// A name that is neither is wrong usage.
pub(super) fn model(spec: &str, presets: &Presets) -> Result<NamedModel> {
    let unknown = match presets.model(spec) {
        Ok(preset) => return Ok(NamedModel { name: preset.model.clone(), decoder: preset.decoder.clone() }),
        Err(unknown) => unknown,
    };
    if !spec.contains('/') && !Path::new(spec).exists() && !spec.to_ascii_lowercase().ends_with(".gguf") {
        return Err(usage(format!("{unknown}; a GGUF file or owner/name will do, too")));
    }
    let path = locate(spec)?;
    let gguf = GgufFile::open(&path).map_err(|error| anyhow!("'{}': {error}", path.display()))?;
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    let decoder = Decoder::dense(gguf.geometry().clone(), gguf.tied());
    let decoder = decoder.map_err(|error| anyhow!("'{}': {error}", path.display()))?;
    Ok(NamedModel { name, decoder })
}
