//! Models and GPUs by name, from the files in `presets/`: each with the source of its numbers.

use serde::{Deserialize, Serialize};

use crate::geometry::{Bytes, ModelGeometry};

/// A GPU at its peak.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gpu {
    /// What it is asked for by.
    pub name: String,
    /// What it is called.
    pub gpu: String,
    /// Bytes of its memory.
    pub memory_bytes: Bytes,
    /// FLOP per second of dense f16 or bf16 matrix products.
    pub flops_per_s: f64,
    /// Bytes per second of its memory.
    pub memory_bytes_per_s: f64,
    /// Bytes per second of the link to the host, each way.
    pub link_bytes_per_s: f64,
    /// Where the numbers come from.
    pub source: String,
}

/// A model's shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelPreset {
    /// What it is asked for by.
    pub name: String,
    /// What it is called.
    pub model: String,
    /// Its shape.
    pub geometry: ModelGeometry,
    /// Whether its embedding is its output matrix as well.
    pub tied: bool,
    /// Where the numbers come from.
    pub source: String,
}

/// Every GPU.
///
/// # Panics
/// Never: the file is part of the program, and a test reads it.
pub fn gpus() -> Vec<Gpu> {
    serde_json::from_str(include_str!("../../presets/gpus.json")).expect("the program's own presets should parse")
}

/// Every model.
///
/// # Panics
/// Never: the file is part of the program, and a test reads it.
pub fn models() -> Vec<ModelPreset> {
    serde_json::from_str(include_str!("../../presets/models.json")).expect("the program's own presets should parse")
}

/// Of some presets the one with a name, in any case.
fn named<T>(all: Vec<T>, name: &str, of: impl Fn(&T) -> &str, what: &str) -> Result<T, String> {
    let known = all.iter().map(&of).collect::<Vec<_>>().join(", ");
    let found = all.into_iter().find(|preset| of(preset).eq_ignore_ascii_case(name.trim()));
    found.ok_or_else(|| format!("there is no {what} '{name}'; known are {known}"))
}

/// A GPU by its name.
///
/// # Errors
/// A sentence with the names that are known.
pub fn gpu(name: &str) -> Result<Gpu, String> {
    named(gpus(), name, |gpu| &gpu.name, "GPU")
}

/// A model by its name.
///
/// # Errors
/// A sentence with the names that are known.
pub fn model(name: &str) -> Result<ModelPreset, String> {
    named(models(), name, |model| &model.name, "model")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compression::Compression;
    use crate::geometry::yi_34b;
    use crate::theory::model::Decoder;
    use crate::theory::predict::kv_bytes;

    #[test]
    fn models_have_the_parameters_and_the_caches_that_were_published() {
        // Billions of parameters of the model cards, KiB of KV cache per token.
        let published = [
            ("yi-34b", 34.39, 240.0),
            ("yi-6b", 6.06, 64.0),
            ("llama-3-8b", 8.03, 128.0),
            ("llama-3-70b", 70.55, 320.0),
            ("mistral-7b", 7.24, 128.0),
            ("smollm2-135m", 0.1345, 22.5),
        ];
        assert_eq!(published.len(), models().len(), "each is checked");
        for (name, billions, kib) in published {
            let preset = model(name).expect(name);
            assert_eq!(preset.geometry.check(), Ok(()), "{name}");
            let parameters = Decoder::dense(preset.geometry.clone(), preset.tied).parameters.total() as f64 / 1e9;
            assert!((parameters / billions - 1.0).abs() < 1e-3, "{name}: {parameters} billion, not {billions}");
            let per_token = kv_bytes(&preset.geometry, &Compression::default(), 1).0 as f64 / 1024.0;
            assert!((per_token - kib).abs() < 1e-9, "{name}: {per_token} KiB per token, not {kib}");
            assert!(preset.source.len() > 20, "{name} has a source");
        }
        assert_eq!(model("Yi-34B").expect("in any case").geometry, yi_34b(), "the running example");
    }

    #[test]
    fn gpus_have_the_critical_intensities_that_were_recomputed() {
        for (name, intensity) in [("a100", 153.0), ("h100", 295.0), ("h200", 206.0), ("l4", 403.0), ("rtx4090", 164.0)]
        {
            let gpu = gpu(name).expect(name);
            let found = gpu.flops_per_s / gpu.memory_bytes_per_s;
            assert!((found - intensity).abs() < 0.6, "{name}: {found} FLOP per byte, not {intensity}");
            assert!(gpu.source.len() > 20, "{name} has a source");
        }
        assert_eq!(gpus().len(), 5, "each is checked");
    }

    #[test]
    fn an_unknown_name_is_refused_with_those_that_are_known() {
        let refused = gpu("h300").expect_err("no such GPU");
        assert_eq!(refused, "there is no GPU 'h300'; known are a100, h100, h200, l4, rtx4090", "names");
        let refused = model("gpt-5").expect_err("no such model");
        assert!(refused.contains("yi-34b, yi-6b, llama-3-8b"), "{refused}");
    }
}
