//! A model on GPUs that need not be here: what `plan`, `simulate` and `fleet` are about.

use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};
use clap::Args;
use concertina::geometry::Bytes;
use concertina::report::records::Body;
use concertina::theory::model::Decoder;
use concertina::theory::parallel::TensorParallel;
use concertina::theory::presets::{Gpu, Presets};
use concertina::theory::step::{Achieved, Machine};

use super::args;
use super::failure::usage;
use super::report::record;

/// What of a GPU's peaks is achieved.
#[derive(Args, Clone, Debug)]
pub(super) struct AchievedArgs {
    /// The part of the GPU's FLOP/s that is achieved
    #[arg(long, value_name = "PART", allow_negative_numbers = true, default_value_t = Achieved::default().flops, value_parser = part)]
    achieved_flops: f64,

    /// The part of the bandwidth of its memory that is achieved
    #[arg(long, value_name = "PART", allow_negative_numbers = true, default_value_t = Achieved::default().bandwidth, value_parser = part)]
    achieved_bandwidth: f64,

    /// The part of the link to the host that is achieved
    #[arg(long, value_name = "PART", allow_negative_numbers = true, default_value_t = Achieved::default().link, value_parser = part)]
    achieved_link: f64,

    /// All of the peaks, as the paper has it
    #[arg(long, conflicts_with_all = ["achieved_flops", "achieved_bandwidth", "achieved_link"])]
    peak: bool,

    /// What this record of `bench device` measured, made with --json on such a GPU
    #[arg(long, value_name = "FILE", conflicts_with_all = ["achieved_flops", "achieved_bandwidth", "achieved_link", "peak"])]
    measured: Option<PathBuf>,
}

impl AchievedArgs {
    /// The parts of a GPU's peaks, and where they are from.
    pub(super) fn of(&self, gpu: &Gpu) -> Result<(Achieved, String)> {
        let given =
            Achieved { flops: self.achieved_flops, bandwidth: self.achieved_bandwidth, link: self.achieved_link };
        let (achieved, from) = match (&self.measured, self.peak, given == Achieved::default()) {
            (Some(path), ..) => return measured(path, gpu),
            (None, true, _) => (Achieved::PEAK, "the data sheet's peak"),
            (None, false, true) => (given, "what well-made kernels are said to reach"),
            (None, false, false) => (given, "the command line"),
        };
        Ok((achieved, from.to_owned()))
    }
}

/// What a record measured, over the peaks of a GPU.
fn measured(path: &Path, gpu: &Gpu) -> Result<(Achieved, String)> {
    let file = path.display();
    let record = record(path).map_err(|reason| anyhow!("'{file}': {reason}"))?;
    let Body::Ceilings(ceilings) = &record.body else {
        let command = record.body.command();
        return Err(usage(format!("'{file}' is a record of {command}; --measured takes one of bench device")));
    };
    let Machine { flops, bandwidth, link, .. } = ceilings.machine();
    let achieved = Achieved {
        flops: flops / gpu.flops_per_s,
        bandwidth: bandwidth / gpu.memory_bytes_per_s,
        link: gpu.link_bytes_per_s.map_or(1.0, |peak| link / peak),
    };
    for (what, part) in [("FLOP/s", achieved.flops), ("bandwidth", achieved.bandwidth), ("link", achieved.link)] {
        if !(part > 0.0 && part <= 1.0) {
            return Err(usage(format!(
                "'{file}' was measured on {}, whose {what} is {part:.2} times the peak of {}: it is another GPU",
                record.device, gpu.gpu
            )));
        }
    }
    Ok((achieved, format!("{} in {file}", record.device)))
}

/// GPUs, and what of their peaks is achieved.
#[derive(Args, Clone, Debug)]
pub(super) struct MachineArgs {
    /// A GPU by its name, such as h100 (`concertina presets` lists them); h100:4 are four that share each layer
    #[arg(long, value_name = "NAME[:N]", default_value = "h100")]
    pub(super) gpu: GpuSpec,

    /// Device memory of one GPU for weights and caches; what it has where not given
    #[arg(long, value_name = "SIZE", value_parser = args::budget)]
    memory: Option<Bytes>,

    /// Bytes of the weights, where they are quantised; two per parameter where not given
    #[arg(long, value_name = "SIZE", value_parser = args::budget)]
    weights: Option<Bytes>,

    #[command(flatten)]
    achieved: AchievedArgs,
}

/// GPUs by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct GpuSpec {
    pub(super) name: String,
    pub(super) count: u32,
}

impl std::str::FromStr for GpuSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, count) = text.split_once(':').unwrap_or((text, "1"));
        let count = count.parse().ok().filter(|n| (1..=1024).contains(n));
        let count = count.ok_or_else(|| format!("'{text}': write a GPU and how many, 1 to 1024, such as h100:4"))?;
        Ok(Self { name: name.to_owned(), count })
    }
}

/// Reads a part of a peak.
fn part(text: &str) -> Result<f64, String> {
    let part = text.parse().ok().filter(|part| *part > 0.0 && *part <= 1.0);
    part.ok_or_else(|| "expected a part of the peak, above 0 and at most 1".to_owned())
}

/// Reads a price.
pub(super) fn price(text: &str) -> Result<f64, String> {
    text.parse::<f64>()
        .ok()
        .filter(|p| p.is_finite() && *p > 0.0)
        .ok_or_else(|| format!("'{text}' is no price above 0"))
}

/// All GPUs together.
#[derive(Clone, Debug)]
pub(super) struct Chosen {
    pub(super) gpu: Gpu,
    pub(super) gpus: u32,
    pub(super) machine: Machine,
    pub(super) achieved: Achieved,
    /// Where those parts are from.
    pub(super) achieved_from: String,
    /// Of all GPUs.
    pub(super) memory: Bytes,
}

impl MachineArgs {
    /// The model with the weights that were asked for.
    pub(super) fn decoder(&self, model: Decoder) -> Decoder {
        model.with_weights(self.weights)
    }

    /// The GPUs.
    pub(super) fn choose(&self, presets: &Presets) -> Result<Chosen> {
        let GpuSpec { name, count } = &self.gpu;
        let gpu = presets.gpu(name).map_err(usage)?.clone();
        let (achieved, achieved_from) = self.achieved.of(&gpu)?;
        let (machine, memory) = shared(&gpu, &achieved, *count, self.memory.unwrap_or(gpu.memory_bytes))?;
        Ok(Chosen { gpu, gpus: *count, machine, achieved, achieved_from, memory })
    }
}

/// GPUs that share each layer, of so much memory each: what they achieve, and the memory of all.
pub(super) fn shared(gpu: &Gpu, achieved: &Achieved, degree: u32, memory: Bytes) -> Result<(Machine, Bytes)> {
    let one = Machine::new(gpu, achieved);
    let machine = match degree {
        1 => one,
        degree => {
            let between = gpu.interconnect_bytes_per_s.or(gpu.link_bytes_per_s);
            let bytes_per_s = between.ok_or_else(|| {
                usage(format!(
                    "{} has no link to another one, so that {degree} can not share a layer; give one of them",
                    gpu.gpu
                ))
            })?;
            one.shared_by(TensorParallel { degree, bytes_per_s })
        }
    };
    let all = memory.0.checked_mul(u64::from(degree)).map(Bytes);
    let all = all.ok_or_else(|| usage(format!("{degree} times {memory} is more than can be counted")))?;
    Ok((machine, all))
}
