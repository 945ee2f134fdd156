//! A model on GPUs that need not be here: what `plan`, `simulate` and `fleet` are about.

use anyhow::Result;
use clap::Args;
use concertina::geometry::Bytes;
use concertina::theory::model::Decoder;
use concertina::theory::parallel::TensorParallel;
use concertina::theory::presets::{Gpu, Presets};
use concertina::theory::step::{Achieved, Machine};

use super::args;
use super::failure::usage;

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

    /// The part of the GPU's FLOP/s that is achieved
    #[arg(long, value_name = "PART", default_value_t = Achieved::default().flops, value_parser = part)]
    achieved_flops: f64,

    /// The part of the bandwidth of its memory that is achieved
    #[arg(long, value_name = "PART", default_value_t = Achieved::default().bandwidth, value_parser = part)]
    achieved_bandwidth: f64,

    /// The part of the link to the host that is achieved
    #[arg(long, value_name = "PART", default_value_t = Achieved::default().link, value_parser = part)]
    achieved_link: f64,

    /// All of the peaks, as the paper has it
    #[arg(long, conflicts_with_all = ["achieved_flops", "achieved_bandwidth", "achieved_link"])]
    peak: bool,
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

    fn achieved(&self) -> Achieved {
        if self.peak {
            return Achieved::PEAK;
        }
        Achieved { flops: self.achieved_flops, bandwidth: self.achieved_bandwidth, link: self.achieved_link }
    }

    /// The GPUs.
    pub(super) fn choose(&self, presets: &Presets) -> Result<Chosen> {
        let GpuSpec { name, count } = &self.gpu;
        let gpu = presets.gpu(name).map_err(usage)?.clone();
        let achieved = self.achieved();
        let one = Machine::new(&gpu, &achieved);
        let machine = match count {
            1 => one,
            degree => {
                let between = gpu.interconnect_bytes_per_s.or(gpu.link_bytes_per_s);
                let bytes_per_s = between.ok_or_else(|| {
                    usage(format!("{} has no link to another one; give one of them, or --gpu {name}", gpu.gpu))
                })?;
                one.shared_by(TensorParallel { degree: *degree, bytes_per_s })
            }
        };
        let memory = self.memory.unwrap_or(gpu.memory_bytes);
        let memory = memory.0.checked_mul(u64::from(*count)).map(Bytes);
        let memory = memory.ok_or_else(|| usage(format!("{count} times that memory is more than can be counted")))?;
        let achieved_from = match (self.peak, achieved == Achieved::default()) {
            (true, _) => "the data sheet's peak",
            (_, true) => "what well-made kernels are said to reach",
            _ => "the command line",
        };
        Ok(Chosen { gpu, gpus: *count, machine, achieved, achieved_from: achieved_from.to_owned(), memory })
    }
}
