//! Predictions for records: the theory's, with the ceilings that were measured on the same device.

use super::read::{Body, Ceilings, Model, Record};
use crate::compression::Compression;
use crate::theory::challenges::{Challenges, Scene, challenges};
use crate::theory::model::Decoder;
use crate::theory::presets::{Gpu, Presets};
use crate::theory::step::{Achieved, Machine};

/// What predictions for a device are made of.
#[derive(Clone, Debug, PartialEq)]
pub struct Basis {
    /// Its rates.
    pub machine: Machine,
    /// Where they come from.
    pub words: String,
}

impl Basis {
    /// The ceilings of a `bench device` record of this device, one that is no quick one where there is any; the peaks of a GPU
    /// that the adapter is named after; or nothing.
    pub fn of_device(device: &str, records: &[Record]) -> Option<Self> {
        let of_device = records.iter().filter(|record| record.device == device);
        let measured = of_device.filter_map(|record| match &record.body {
            Body::Ceilings(ceilings) => Some((ceilings, record.file.as_str())),
            _ => None,
        });
        if let Some((ceilings, file)) = measured.min_by_key(|(ceilings, _)| ceilings.quick) {
            let quick = if ceilings.quick { ", measured with --quick: no figures to rely on" } else { "" };
            return Some(Self {
                machine: ceilings.machine(),
                words: format!("the ceilings measured in {file}{quick}"),
            });
        }
        let gpu = named_after(device, &Presets::built_in().gpus)?;
        let words = format!("the peaks of {}, which no device reaches; measure yours with bench device", gpu.gpu);
        Some(Self { machine: Machine::new(&gpu, &Achieved::PEAK), words })
    }
}

impl Ceilings {
    /// A device of these ceilings. Out and back take as long at the link's rate as they were measured to take one after the
    /// other.
    pub fn machine(&self) -> Machine {
        let (out, back) = (self.out_bytes_per_s.median, self.back_bytes_per_s.median);
        Machine {
            flops: self.flop_per_s.median,
            bandwidth: self.read_bytes_per_s.median,
            link: 2.0 / (out.recip() + back.recip()),
            parallel: None,
        }
    }
}

/// The GPU whose name, or alias, has all of its words in the adapter's name, where two words may be written as one. Of adapters that
/// name their gigabytes those must be the GPU's.
fn named_after(device: &str, gpus: &[Gpu]) -> Option<Gpu> {
    let lower = device.to_lowercase();
    let words: Vec<&str> = lower.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty()).collect();
    let pairs: Vec<String> = words.windows(2).map(<[&str]>::concat).collect();
    let has = |word: &str| words.contains(&word) || pairs.iter().any(|pair| pair == word);
    // `40g` of a name is `40gb` of an adapter.
    let is = |name: &str| name.to_lowercase().split('-').all(|word| has(word) || has(&format!("{word}b")));
    let gigabytes = words.iter().find_map(|word| word.strip_suffix("gb")?.parse::<f64>().ok());
    let as_large = |gpu: &Gpu| gigabytes.is_none_or(|gb| (gpu.memory_bytes.0 as f64 / (gb * 1e9) - 1.0).abs() < 0.1);
    let names = |gpu: &Gpu| is(&gpu.name) || gpu.aliases.iter().any(|alias| is(alias));
    gpus.iter().find(|gpu| names(gpu) && as_large(gpu)).cloned()
}

/// The decoder of a record. Whether its embedding is its output matrix as well is told by the bytes of its weights.
///
/// # Errors
/// A sentence with the numbers, where no decoder can have them.
fn decoder(model: &Model) -> Result<Decoder, String> {
    let of = |tied| Decoder::dense(model.geometry.clone(), tied).map_err(|unsound| unsound.to_string());
    let (tied, own) = (of(true)?, of(false)?);
    let Some(held) = model.weights_bytes else { return Ok(own) };
    let off = |decoder: &Decoder| decoder.weights.0.abs_diff(held.0);
    let nearest = if off(&tied) < off(&own) { tied } else { own };
    Ok(nearest.with_weights(Some(held)))
}

/// The theory's figures.
///
/// # Errors
/// A sentence where there is no basis, or the compression does not fit the model.
pub(super) fn predict(
    model: &Model,
    basis: Option<&Basis>,
    compression: &str,
    scene: &Scene,
) -> Result<Challenges, String> {
    let compression: Compression = compression.parse().map_err(|e| format!("{e}"))?;
    let basis = basis.ok_or("neither a bench device record nor a preset of this device")?;
    challenges(&decoder(model)?, &basis.machine, &compression, scene)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::{Bytes, ModelGeometry};

    #[test]
    fn an_adapter_is_named_after_a_gpu_by_whole_words() {
        let named = |device: &str| named_after(device, &Presets::built_in().gpus).map(|gpu| gpu.name);
        for (device, gpu) in [
            ("NVIDIA H100 80GB HBM3, vulkan", Some("h100")),
            ("NVIDIA A100-SXM4-80GB, vulkan", Some("a100-80g")),
            ("NVIDIA A100-SXM4-40GB, vulkan", Some("a100-40g")),
            ("NVIDIA H100 94GB, vulkan", None),
            ("Apple M2 Max, metal", Some("m2-max")),
            ("NVIDIA GeForce RTX 4090, vulkan", Some("rtx4090")),
            ("NVIDIA L40S, vulkan", Some("l40s")),
            ("NVIDIA L40, vulkan", None),
            ("llvmpipe (LLVM 15.0.7, 256 bits), vulkan", None),
        ] {
            assert_eq!(named(device).as_deref(), gpu, "{device}");
        }
    }

    #[test]
    fn a_tied_matrix_is_told_by_the_bytes_of_the_weights() {
        let presets = Presets::built_in();
        let geometry = &presets.model("smollm2-135m").expect("a preset").decoder.geometry;
        for tied in [true, false] {
            let plain = Decoder::dense(geometry.clone(), tied).expect("sound").weights;
            // Norms are f32 on the device.
            let bytes = Bytes(plain.0 + 70_000);
            let model = Model { name: String::new(), geometry: geometry.clone(), weights_bytes: Some(bytes) };
            let found = decoder(&model).expect("sound");
            assert_eq!((found.tied, found.weights), (tied, bytes), "{tied}");
        }
        let unsound = ModelGeometry { num_layers: 0, ..geometry.clone() };
        let model = Model { name: String::new(), geometry: unsound, weights_bytes: None };
        assert!(decoder(&model).is_err(), "no layers");
    }
}
