//! The report of `presets`: models and GPUs that have names.

use std::fmt;

use serde::Serialize;

use super::Program;
use super::table::{Align, count, number, table};
use crate::geometry::Bytes;
use crate::theory::model::{Experts, Latent, LocalLayers};
use crate::theory::presets::{Gpu, ModelPreset, Presets};

/// Every preset.
#[derive(Clone, Debug, Serialize)]
pub struct PresetsReport {
    /// The program.
    pub program: Program,
    /// Models, in the order of the files.
    pub models: Vec<ModelPresetReport>,
    /// GPUs, in the order of the files.
    pub gpus: Vec<GpuPresetReport>,
}

/// One model.
#[derive(Clone, Debug, Serialize)]
pub struct ModelPresetReport {
    /// What it is asked for by.
    pub name: String,
    /// Other names for it.
    pub aliases: Vec<String>,
    /// What it is called.
    pub model: String,
    /// Layers.
    pub num_layers: u32,
    /// KV heads; `null` where a token leaves a latent.
    pub num_kv_heads: Option<u32>,
    /// What a token leaves in the full cache, in f16, while it is within every window.
    pub kv_per_token_bytes: Bytes,
    /// Longest context.
    pub context_tokens: u32,
    /// Parameters.
    pub parameters: u64,
    /// Of these, those that a token activates.
    pub active_parameters: u64,
    /// What a token leaves in place of keys and values; `null` where it leaves those.
    pub latent: Option<Latent>,
    /// Layers that see a window; `null` where none do.
    pub local: Option<LocalLayers>,
    /// Experts; `null` where it has none.
    pub experts: Option<Experts>,
    /// Where the numbers come from.
    pub source: String,
}

impl ModelPresetReport {
    fn new(preset: &ModelPreset) -> Self {
        let decoder = &preset.decoder;
        Self {
            name: preset.name.clone(),
            aliases: preset.aliases.clone(),
            model: preset.model.clone(),
            num_layers: decoder.geometry.num_layers,
            num_kv_heads: decoder.latent.is_none().then_some(decoder.geometry.heads.num_kv_heads),
            kv_per_token_bytes: decoder.token_bytes(),
            context_tokens: decoder.geometry.context_length,
            parameters: decoder.parameters.total(),
            active_parameters: decoder.active_parameters(),
            latent: decoder.latent,
            local: decoder.local,
            experts: decoder.experts,
            source: preset.source.clone(),
        }
    }

    /// What sets it apart.
    fn special(&self) -> String {
        let latent = self.latent.map(|latent| format!("latents of {} numbers", latent.cached()));
        let local = self.local.map(|local| match local.global_every {
            0 => format!("all layers see {} tokens", count(local.window.into())),
            n => format!("{} of {n} layers see {} tokens", n - 1, count(local.window.into())),
        });
        let experts = self.experts.map(|experts| match experts.shared {
            0 => format!("{} of {} experts", experts.active, experts.count),
            shared => format!("{} of {} experts and {shared} shared", experts.active, experts.count),
        });
        [latent, local, experts].into_iter().flatten().collect::<Vec<_>>().join(", ")
    }

    fn row(&self) -> Vec<String> {
        let billions = |n: u64| number(Some(n as f64 / 1e9));
        vec![
            named(&self.name, &self.aliases),
            self.num_layers.to_string(),
            self.num_kv_heads.map_or_else(|| "-".to_owned(), |heads| heads.to_string()),
            format!("{:.1}", self.kv_per_token_bytes.0 as f64 / 1024.0),
            billions(self.parameters),
            billions(self.active_parameters),
            count(self.context_tokens.into()),
            self.special(),
        ]
    }
}

/// One GPU.
#[derive(Clone, Debug, Serialize)]
pub struct GpuPresetReport {
    /// The GPU.
    #[serde(flatten)]
    pub gpu: Gpu,
    /// FLOP per byte of its memory at which computing takes as long as reading.
    pub critical_intensity: f64,
}

impl GpuPresetReport {
    fn row(&self) -> Vec<String> {
        let gpu = &self.gpu;
        let giga = |rate: Option<f64>| rate.map_or_else(|| "-".to_owned(), |rate| format!("{}", rate / 1e9));
        vec![
            named(&gpu.name, &gpu.aliases),
            format!("{}", gpu.memory_bytes.0 as f64 / 1e9),
            format!("{}", gpu.flops_per_s / 1e12),
            format!("{}", gpu.memory_bytes_per_s / 1e12),
            if gpu.unified { "unified".to_owned() } else { giga(gpu.link_bytes_per_s) },
            giga(gpu.interconnect_bytes_per_s),
            format!("{:.0}", self.critical_intensity),
        ]
    }
}

/// A name, and its aliases behind it.
fn named(name: &str, aliases: &[String]) -> String {
    if aliases.is_empty() { name.to_owned() } else { format!("{name} ({})", aliases.join(", ")) }
}

impl PresetsReport {
    /// Of these presets.
    pub fn new(presets: &Presets) -> Self {
        let gpu = |gpu: &Gpu| GpuPresetReport { critical_intensity: gpu.critical_intensity(), gpu: gpu.clone() };
        Self {
            program: Program::THIS,
            models: presets.models.iter().map(ModelPresetReport::new).collect(),
            gpus: presets.gpus.iter().map(gpu).collect(),
        }
    }
}

impl fmt::Display for PresetsReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use Align::{Left, Right};
        let columns = [
            ("\nmodel", Left),
            ("\nlayers", Right),
            ("KV\nheads", Right),
            ("KiB per\ntoken", Right),
            ("parameters,\n1e9", Right),
            ("active,\n1e9", Right),
            ("context,\ntokens", Right),
            ("", Left),
        ];
        writeln!(f, "{}", table(&columns, self.models.iter().map(ModelPresetReport::row)))?;
        let columns = [
            ("\nGPU", Left),
            ("memory,\nGB", Right),
            ("\nTFLOP/s", Right),
            ("memory,\nTB/s", Right),
            ("link,\nGB/s", Right),
            ("between\nGPUs, GB/s", Right),
            ("critical\nFLOP/B", Right),
        ];
        writeln!(f, "{}", table(&columns, self.gpus.iter().map(GpuPresetReport::row)))?;
        writeln!(
            f,
            "Caches in f16, keys and values of all layers. GPUs at their peak: dense f16 or bf16 products; links each way. What is\n\
             unified shares its memory with the host, and caches never cross a link.\n\nsources"
        )?;
        for model in &self.models {
            writeln!(f, "  {}: {}. {}", model.name, model.model, model.source)?;
        }
        self.gpus
            .iter()
            .try_for_each(|GpuPresetReport { gpu, .. }| writeln!(f, "  {}: {}. {}", gpu.name, gpu.gpu, gpu.source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_is_listed_with_its_numbers_and_its_source() {
        let report = PresetsReport::new(&Presets::built_in());
        let text = report.to_string();
        for (name, source) in report
            .models
            .iter()
            .map(|model| (&model.name, &model.source))
            .chain(report.gpus.iter().map(|gpu| (&gpu.gpu.name, &gpu.gpu.source)))
        {
            let line = text.lines().find(|line| line.trim_start().starts_with(&format!("{name}: ")));
            assert!(line.is_some_and(|line| line.ends_with(source.as_str())), "{name} has its source in: {text}");
        }
        let row = |name: &str| {
            let line = text.lines().find(|line| line.trim_start().starts_with(name)).expect(name);
            line.split_whitespace().map(ToOwned::to_owned).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(row("yi-34b"), "yi-34b 60 8 240.0 34.4 34.4 200,000", "a model");
        let deepseek = "deepseek-v2 60 - 67.5 236 21.4 163,840 latents of 576 numbers, 6 of 160 experts and 2 shared";
        assert_eq!(row("deepseek-v2"), deepseek, "latents and experts");
        assert!(row("gemma-3-27b").ends_with("131,072 5 of 6 layers see 1,024 tokens"), "{}", row("gemma-3-27b"));
        assert_eq!(row("a100-80g"), "a100-80g (a100) 80 312 2.039 31.5 300 153", "a GPU");
        assert_eq!(row("m4-max"), "m4-max 128 17.2 0.546 unified - 32", "without a link");
    }
}
