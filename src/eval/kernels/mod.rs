//! Kernels measured one by one: time, bytes and arithmetic against the device's ceilings, and the error of what was computed.
//!
//! A figure counts with its result. Outputs are poisoned, one run is compared with the reference before anything is timed, and
//! what the last timed run left is compared again; where either is wrong there is no figure but the reason ([`Outcome`]).

pub mod cases;
pub mod protocol;

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use super::ceilings;
use super::spread::{Spread, WARM_UP};
use super::verify::NMSE_LIMIT;
use crate::compression::hidden::HiddenCodec;
use crate::device::Device;
use crate::engine::EngineError;
use crate::engine::bench::{BenchSettings, Checked, KernelRun, TimedRuns};
use crate::engine::ceilings::{Ceiling, CeilingSizes, Ceilings};
use crate::geometry::Bytes;
use crate::kernels::PipelineCache;
use crate::kernels::tuning::Tuning;
use crate::schedule::{BackendError as _, Fault};
pub use cases::{Case, Sizes, cases};
pub use protocol::Protocol;

/// What the device reaches at best, measured in the same process.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Roof {
    /// Bytes of device memory read per second.
    pub read_bytes_per_s: f64,
    /// Bytes of device memory copied per second, read and written both counted.
    pub copy_bytes_per_s: f64,
    /// FLOP per second of matrix products.
    pub flop_per_s: f64,
}

/// One kernel, case and candidate.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct KernelRow {
    /// Name of the case.
    pub case: String,
    /// The kernel.
    pub kernel: &'static str,
    /// Batch and shape.
    pub shape: String,
    /// Codec of what it reads.
    pub codec: Option<String>,
    /// The variant of the kernel.
    pub candidate: String,
    /// Whether it is the variant that the program uses.
    pub chosen: bool,
    /// What came of it.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// A figure, or why there is none.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Right, and measured.
    Measured(Figures),
    /// The result is wrong.
    Wrong(String),
    /// It does not run here.
    Failed(String),
}

/// Figures of a kernel whose result is right.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Figures {
    /// Time of one run.
    pub seconds: Spread,
    /// Whether times had settled when the warm-up ended.
    pub settled: bool,
    /// Useful bytes of a run, read and written.
    pub bytes: f64,
    /// FLOP of a run.
    pub flop: f64,
    /// Useful bytes per second, at the median.
    pub bytes_per_s: f64,
    /// The same as a part of the read ceiling.
    pub of_read: f64,
    /// The same as a part of the copy ceiling, for kernels that write a good part of their bytes.
    pub of_copy: Option<f64>,
    /// FLOP per second, at the median.
    pub flop_per_s: f64,
    /// The same as a part of the ceiling of matrix products.
    pub of_flop: f64,
    /// (token, KV head) pairs per second, at the median.
    pub pairs_per_s: Option<f64>,
    /// The same as a multiple of what f16 reaches in the same shape.
    pub to_f16: Option<f64>,
    /// Largest observed error as a part of its bound.
    pub error_over_bound: f64,
    /// Normalised mean squared error of the outputs that were compared.
    pub nmse: f64,
}

impl Figures {
    fn new(run: &dyn KernelRun, (seconds, settled): (Spread, bool), roof: &Roof, checked: &Checked) -> Self {
        let work = run.work();
        let (bytes_per_s, flop_per_s) = (work.bytes / seconds.median, work.flop / seconds.median);
        Self {
            seconds,
            settled,
            bytes: work.bytes,
            flop: work.flop,
            bytes_per_s,
            of_read: bytes_per_s / roof.read_bytes_per_s,
            of_copy: run.copies().then(|| bytes_per_s / roof.copy_bytes_per_s),
            flop_per_s,
            of_flop: flop_per_s / roof.flop_per_s,
            pairs_per_s: work.pairs.map(|pairs| pairs / seconds.median),
            to_f16: None,
            error_over_bound: checked.error_over_bound,
            nmse: checked.nmse,
        }
    }

    /// The ceiling of memory, `read` or `copy`, and the part of it that is reached.
    pub fn memory(&self) -> (&'static str, f64) {
        self.of_copy.map_or(("read", self.of_read), |part| ("copy", part))
    }

    /// The ceiling that the kernel comes nearer to, `read`, `copy` or `flop`, and the part of it that is reached.
    pub fn bound(&self) -> (&'static str, f64) {
        let memory = self.memory();
        if memory.1 >= self.of_flop { memory } else { ("flop", self.of_flop) }
    }

    /// FLOP per byte.
    pub fn intensity(&self) -> f64 {
        self.flop / self.bytes
    }
}

/// Which candidates are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Candidates {
    /// The one that the program uses.
    Chosen,
    /// All.
    All,
}

/// How cases are measured.
#[derive(Clone, Debug, PartialEq)]
pub struct KernelPlan {
    /// How large cases are.
    pub sizes: Sizes,
    /// Which variants of each kernel.
    pub candidates: Candidates,
    /// When a time counts.
    pub protocol: Protocol,
    /// How inputs are made.
    pub settings: BenchSettings,
    /// How the program launches kernels.
    pub tuning: Arc<Tuning>,
}

/// Bytes that runs take turns over on a GPU: five times the 50 MB that are the largest cache of one.
pub(super) const COLD: Bytes = Bytes(250_000_000);
/// Times that each ceiling is measured.
const CEILING_REPEATS: usize = 20;

/// Whether a device is a processor that pretends to be a GPU.
pub(super) fn is_software(device: &Device) -> bool {
    device.summary().kind == "cpu"
}

/// How large the work is that a device's ceilings are measured with.
pub fn ceiling_sizes(device: &Device) -> CeilingSizes {
    if is_software(device) { CeilingSizes::SOFTWARE } else { CeilingSizes::FULL }
}

impl KernelPlan {
    /// Full sizes on a GPU. On processors small ones, which take no turns: what one reads there is beyond their caches or near
    /// enough, and figures say little anyway.
    pub fn of(device: &Device) -> Self {
        let software = is_software(device);
        let cold = if software { Bytes::ZERO } else { COLD };
        Self {
            sizes: if software { Sizes::Small } else { Sizes::Full },
            candidates: Candidates::Chosen,
            protocol: if software { Protocol::SOFTWARE } else { Protocol::FULL },
            settings: BenchSettings { cold, in_order: false, max_arena: None },
            tuning: Arc::default(),
        }
    }
}

impl Roof {
    /// Measures the ceilings that kernels are compared with.
    ///
    /// # Errors
    /// As [`ceilings::ceiling`].
    pub fn measure(device: &Device) -> Result<Self, EngineError> {
        let mut made = Ceilings::new(device, ceiling_sizes(device))?;
        let mut of = |ceiling| ceilings::ceiling(&mut made, ceiling, WARM_UP, CEILING_REPEATS);
        let (read, copy, flop) = (of(Ceiling::Read)?, of(Ceiling::Copy)?, of(Ceiling::Flop)?);
        Ok(Self {
            read_bytes_per_s: read.value.median,
            copy_bytes_per_s: copy.value.median,
            flop_per_s: flop.value.median,
        })
    }

    /// The ceiling of this name, per second.
    pub fn of(&self, bound: &str) -> f64 {
        match bound {
            "read" => self.read_bytes_per_s,
            "copy" => self.copy_bytes_per_s,
            _ => self.flop_per_s,
        }
    }
}

/// Measures case after case; `each` sees every row as soon as it is there.
///
/// # Errors
/// [`EngineError`] where the device is lost or has no timer; anything else is a row without a figure.
pub fn measure(
    device: &Device,
    plan: &KernelPlan,
    roof: Roof,
    cases: &[Case],
    each: &mut dyn FnMut(KernelRow),
) -> Result<(), EngineError> {
    let mut bench = KernelBench::new(TimedRuns::new(device)?, plan.settings, plan.protocol, roof);
    bench.tuning = Arc::clone(&plan.tuning);
    cases.iter().try_for_each(|case| bench.case(case, plan.candidates, each))
}

/// Measures case after case.
#[derive(Debug)]
pub struct KernelBench<'d> {
    runs: TimedRuns<'d>,
    tuning: Arc<Tuning>,
    pipelines: PipelineCache,
    settings: BenchSettings,
    protocol: Protocol,
    roof: Roof,
    /// Pairs per second of f16, by kernel and shape.
    f16: Vec<(&'static str, String, f64)>,
}

impl<'d> KernelBench<'d> {
    /// Nothing is measured yet.
    pub fn new(runs: TimedRuns<'d>, settings: BenchSettings, protocol: Protocol, roof: Roof) -> Self {
        let pipelines = PipelineCache::default();
        Self { runs, tuning: Arc::default(), pipelines, settings, protocol, roof, f16: Vec::new() }
    }

    /// Measures the candidates of a case, each row as soon as it is there.
    ///
    /// # Errors
    /// [`EngineError`] where the device is lost; anything else is a row without a figure.
    pub fn case(
        &mut self,
        case: &Case,
        candidates: Candidates,
        each: &mut dyn FnMut(KernelRow),
    ) -> Result<(), EngineError> {
        let mut row = |candidate: String, chosen: bool, outcome: Outcome| {
            let codec = case.codec.map(|codec| codec.to_string());
            let (kernel, shape) = (case.kernel, case.shape.clone());
            each(KernelRow { case: case.name(), kernel, shape, codec, candidate, chosen, outcome });
        };
        // Kernels are hardly shared between cases, so none is kept longer than its own.
        self.pipelines = PipelineCache::new(Arc::clone(&self.tuning));
        let mut run = match (case.prepare)(self.runs.device(), &mut self.pipelines, &self.settings) {
            Ok(run) => run,
            Err(error) => {
                row(String::new(), true, failed(error)?);
                return Ok(());
            }
        };
        let labels = run.candidates();
        let n = if candidates == Candidates::All { labels.len() } else { 1 };
        for (candidate, label) in labels.into_iter().take(n).enumerate() {
            let mut outcome = match self.candidate(run.as_mut(), candidate) {
                Ok(outcome) => outcome,
                Err(error) => failed(error)?,
            };
            if let Outcome::Measured(figures) = &mut outcome {
                figures.to_f16 = self.against_f16(case, candidate, figures.pairs_per_s);
            }
            row(label, candidate == 0, outcome);
        }
        Ok(())
    }

    /// One candidate: checked, timed, and checked again.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn candidate(&mut self, run: &mut dyn KernelRun, candidate: usize) -> Result<Outcome, EngineError> {
        let Self { runs, pipelines, protocol, roof, .. } = self;
        let device = runs.device();
        run.choose(device, pipelines, candidate)?;
        Ok(match timed(runs, run, protocol)? {
            Ok((times, checked)) => Outcome::Measured(Figures::new(run, times, roof, &checked)),
            Err(why) => Outcome::Wrong(why),
        })
    }

    /// What pairs per second are as a multiple of f16's, whose chosen candidate is remembered.
    fn against_f16(&mut self, case: &Case, candidate: usize, pairs: Option<f64>) -> Option<f64> {
        let pairs = pairs?;
        let is_base = case.codec == Some(HiddenCodec::F16) && candidate == 0;
        if is_base {
            self.f16.push((case.kernel, case.shape.clone(), pairs));
        }
        let alike = |(kernel, shape, _): &&(&str, String, f64)| *kernel == case.kernel && *shape == case.shape;
        self.f16.iter().find(alike).map(|(.., base)| pairs / base)
    }
}

/// Times of a run, whether they had settled, and how its outputs compare; or what is wrong with these.
type Timed = Result<((Spread, bool), Checked), String>;

/// The variant that was chosen: checked, timed, and checked again.
pub(super) fn timed(
    runs: &mut TimedRuns<'_>,
    run: &mut dyn KernelRun,
    protocol: &Protocol,
) -> Result<Timed, EngineError> {
    let device = runs.device();
    run.poison(device)?;
    runs.run(run, 0, 1)?;
    let before = run.check(device, 0)?;
    if let Some(why) = wrong(&before) {
        return Ok(Err(why));
    }
    let mut last = 0;
    let times = protocol.times(TimedRuns::MOST as usize, |copy, n| -> Result<Vec<Duration>, EngineError> {
        last = copy + n - 1;
        runs.run(run, copy, n)
    })?;
    let after = run.check(device, last)?;
    if let Some(why) = wrong(&after) {
        return Ok(Err(why));
    }
    let (error_over_bound, nmse) = (before.error_over_bound.max(after.error_over_bound), before.nmse.max(after.nmse));
    Ok(Ok((times, Checked { error_over_bound, nmse, ..after })))
}

/// A row for an error, unless nothing can run any more.
fn failed(error: EngineError) -> Result<Outcome, EngineError> {
    if error.fault() == Fault::DeviceLost { Err(error) } else { Ok(Outcome::Failed(error.to_string())) }
}

/// What is wrong with a result.
fn wrong(checked: &Checked) -> Option<String> {
    let Checked { compared, missing, error_over_bound, nmse } = *checked;
    if missing > 0 {
        return Some(format!("{missing} outputs were not written or are not finite"));
    }
    if compared == 0 {
        return Some("nothing was compared".to_owned());
    }
    if error_over_bound > 1.0 || error_over_bound.is_nan() {
        return Some(format!("of {compared} outputs one is off by {error_over_bound:.3e} times its bound"));
    }
    (nmse > NMSE_LIMIT).then(|| format!("the NMSE is {nmse:.1e}; at most {NMSE_LIMIT:.0e} is allowed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_wrong_result_has_its_reason() {
        let right = Checked { compared: 8, missing: 0, error_over_bound: 0.5, nmse: 1e-12 };
        assert_eq!(wrong(&right), None, "right");
        let reason = |checked: Checked| wrong(&checked).expect("it is wrong");
        assert!(reason(Checked { missing: 3, ..right }).contains("3 outputs"), "poison");
        assert!(reason(Checked { compared: 0, ..right }).contains("nothing"), "emptiness");
        assert!(reason(Checked { error_over_bound: 1.5, ..right }).contains("1.5"), "error");
        assert!(reason(Checked { nmse: 1e-5, ..right }).contains("NMSE"), "NMSE");
        assert!(reason(Checked { error_over_bound: f64::NAN, ..right }).contains("NaN"), "what can not be compared");
    }
}
