//! A search for the fastest launch of each kernel on a device.
//!
//! Case after case, every variant runs over the bench's own inputs. One whose outputs are wrong, or that does not run, is named and
//! can not win. The fastest is measured once more, in turn with the default, and takes its place only if nine in ten of its times
//! are below what one in ten of the default's are: a gain that noise could have made changes nothing.
//!
//! Time is shared out: a case gets what is left over the number of cases that are left. Variants that it does not suffice for are
//! counted, and cases that are not reached keep what they had.

mod cases;
mod file;

use std::time::Instant;

use serde::Serialize;

use super::kernels::{COLD, Protocol, Sizes, is_software, timed};
use super::spread::Spread;
use crate::device::Device;
use crate::engine::EngineError;
use crate::engine::bench::{BenchSettings, KernelRun, TimedRuns};
use crate::geometry::Bytes;
use crate::kernels::PipelineCache;
use crate::kernels::tuning::Tuning;
use crate::schedule::{BackendError as _, Fault};
pub use cases::{Choice, TuneCase, tune_cases};
pub use file::{EntryKey, Found, TuningFile, TuningFileError, choices_of, file_of_user};

/// How long is searched, and over what.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TunePlan {
    /// How large cases are.
    pub sizes: Sizes,
    /// Host seconds of all cases together, about: a case that has begun is brought to its end.
    pub seconds: f64,
    /// How inputs are made.
    pub settings: BenchSettings,
}

impl TunePlan {
    /// About a minute.
    pub const SECONDS: f64 = 60.0;

    /// A minute, of full sizes on a GPU.
    pub fn of(device: &Device) -> Self {
        let software = is_software(device);
        let cold = if software { Bytes::ZERO } else { COLD };
        Self {
            sizes: if software { Sizes::Small } else { Sizes::Full },
            seconds: Self::SECONDS,
            settings: BenchSettings { cold, in_order: false, max_arena: None },
        }
    }
}

/// A variant that can not win.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Refused {
    /// The variant.
    pub candidate: String,
    /// What is wrong with it.
    pub reason: String,
}

/// What a case has settled.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TuneRow {
    /// Name of the case.
    pub case: String,
    /// What is used without a search.
    pub default: String,
    /// What is used from now on; `null` where no variant was right.
    pub winner: Option<String>,
    /// How much less time the winner takes than the default, as a part of the default's; 0 where that stays, `null` where there is no
    /// winner or the default can not run.
    pub gain: Option<f64>,
    /// Times of the default, in seconds.
    pub default_s: Option<Spread>,
    /// Times of the winner, in seconds.
    pub winner_s: Option<Spread>,
    /// Variants that were measured.
    pub measured: usize,
    /// Variants that time did not suffice for.
    pub untried: usize,
    /// Variants that can not win.
    pub refused: Vec<Refused>,
}

/// Searches case after case and returns `base` with what was found; `each` sees every row as soon as it is there, and says
/// whether to go on. Where time is over before the last case, the others have no row.
///
/// # Errors
/// [`EngineError`] where the device is lost or has no timer; anything else refuses a variant.
pub fn search(
    device: &Device,
    cases: &[TuneCase],
    plan: &TunePlan,
    base: &Tuning,
    each: &mut dyn FnMut(TuneRow) -> bool,
) -> Result<Tuning, EngineError> {
    let mut tuning = base.clone();
    let started = Instant::now();
    let mut runs = TimedRuns::new(device)?;
    for (at, case) in cases.iter().enumerate() {
        let left = plan.seconds - started.elapsed().as_secs_f64();
        if left <= 0.0 {
            break;
        }
        let row = Trials::new(&mut runs, case, left / (cases.len() - at) as f64).settle(plan)?;
        if let Some(winner) = &row.winner {
            case.choice.settle(winner, device, &mut tuning);
        }
        if !each(row) {
            break;
        }
    }
    Ok(tuning)
}

/// Variants of a case.
struct Trials<'r, 'd> {
    runs: &'r mut TimedRuns<'d>,
    case: &'r TuneCase,
    started: Instant,
    seconds: f64,
    refused: Vec<Refused>,
}

/// Part of a case's time for the round in which every variant is measured.
const FIRST_ROUND: f64 = 0.7;

impl<'r, 'd> Trials<'r, 'd> {
    fn new(runs: &'r mut TimedRuns<'d>, case: &'r TuneCase, seconds: f64) -> Self {
        Self { runs, case, started: Instant::now(), seconds, refused: Vec::new() }
    }

    /// All variants, then the fastest against the default.
    fn settle(mut self, plan: &TunePlan) -> Result<TuneRow, EngineError> {
        let device = self.runs.device();
        // What is found is compared with what is used without a search, whatever was found before.
        let mut pipelines = PipelineCache::default();
        let mut run = match (self.case.case.prepare)(device, &mut pipelines, &plan.settings) {
            Ok(run) => run,
            Err(error) => {
                self.refuse("(the case)", error)?;
                return Ok(self.row(String::new(), None, 0, 0));
            }
        };
        let labels = run.candidates();
        let mut measured: Vec<(usize, Spread)> = Vec::new();
        let variants: Vec<usize> =
            (0..labels.len()).filter(|at| self.case.choice.admits(&labels[*at], device)).collect();
        let mut tried = 0;
        for &at in &variants {
            let left = self.seconds * FIRST_ROUND - self.started.elapsed().as_secs_f64();
            // The default and one other are always measured.
            if tried >= 2 && left <= 0.0 {
                break;
            }
            let protocol = first_round(left / (variants.len() - tried) as f64);
            tried += 1;
            if let Some(times) = self.trial(run.as_mut(), &mut pipelines, (at, &labels[at]), &protocol)? {
                measured.push((at, times));
            }
        }
        let untried = variants.len() - tried;
        let pair = self.decide(run.as_mut(), &mut pipelines, &labels, &measured)?;
        Ok(self.row(labels[0].clone(), pair, measured.len(), untried))
    }

    /// The winner with its times, and those of the default; both measured again where they are not the same.
    fn decide(
        &mut self,
        run: &mut dyn KernelRun,
        pipelines: &mut PipelineCache,
        labels: &[String],
        measured: &[(usize, Spread)],
    ) -> Result<Option<Decision>, EngineError> {
        let fastest = measured.iter().min_by(|a, b| a.1.median.total_cmp(&b.1.median));
        let Some(&(best, times)) = fastest else { return Ok(None) };
        let of_default = measured.iter().find(|(at, _)| *at == 0).map(|(_, times)| *times);
        let decision =
            |at: usize, winner, default| Some(Decision { winner: labels[at].clone(), times: winner, default });
        let Some(before) = of_default.filter(|_| best != 0) else {
            return Ok(decision(best, times, of_default));
        };
        let left = (self.seconds - self.started.elapsed().as_secs_f64()).max(0.0);
        let protocol = last_round(left / 2.0);
        let challenger = self.trial(run, pipelines, (best, &labels[best]), &protocol)?;
        let default = self.trial(run, pipelines, (0, &labels[0]), &protocol)?;
        Ok(match (challenger, default) {
            (Some(challenger), Some(default)) if exceeds_spread(challenger, default) => {
                decision(best, challenger, Some(default))
            }
            (_, Some(default)) => decision(0, default, Some(default)),
            // The default was right before, and a variant that is right at times is none that anything may rest on.
            (Some(challenger), None) => decision(best, challenger, Some(before)),
            (None, None) => None,
        })
    }

    /// Times of a variant; `None` where it is refused.
    fn trial(
        &mut self,
        run: &mut dyn KernelRun,
        pipelines: &mut PipelineCache,
        (at, label): (usize, &str),
        protocol: &Protocol,
    ) -> Result<Option<Spread>, EngineError> {
        let device = self.runs.device();
        let timed = run.choose(device, pipelines, at).and_then(|()| timed(self.runs, run, protocol));
        match timed {
            Ok(Ok(((times, _), _))) => return Ok(Some(times)),
            Ok(Err(reason)) => self.refused.push(Refused { candidate: label.to_owned(), reason }),
            Err(error) => self.refuse(label, error)?,
        }
        Ok(None)
    }

    /// Refuses what does not run, unless nothing can run any more.
    fn refuse(&mut self, label: &str, error: EngineError) -> Result<(), EngineError> {
        if error.fault() == Fault::DeviceLost {
            return Err(error);
        }
        self.refused.push(Refused { candidate: label.to_owned(), reason: error.to_string() });
        Ok(())
    }

    fn row(self, default: String, decision: Option<Decision>, measured: usize, untried: usize) -> TuneRow {
        let gain = |decision: &Decision| decision.default.map(|default| 1.0 - decision.times.median / default.median);
        TuneRow {
            case: self.case.case.name(),
            default,
            gain: decision.as_ref().and_then(gain),
            default_s: decision.as_ref().and_then(|decision| decision.default),
            winner_s: decision.as_ref().map(|decision| decision.times),
            winner: decision.map(|decision| decision.winner),
            measured,
            untried,
            refused: self.refused,
        }
    }
}

/// The winner of a case.
struct Decision {
    winner: String,
    times: Spread,
    default: Option<Spread>,
}

/// Whether nearly all times of one lie below nearly all of the other.
fn exceeds_spread(challenger: Spread, default: Spread) -> bool {
    challenger.p90 < default.p10
}

/// Few times of each variant: enough to tell which is worth a second look.
fn first_round(seconds: f64) -> Protocol {
    Protocol { warm_up: 0.01, most_warm_up: 0.05, samples: 10, least: 3, seconds: seconds.max(0.0) }
}

/// More times, after a longer warm-up.
fn last_round(seconds: f64) -> Protocol {
    Protocol { warm_up: 0.05, most_warm_up: 0.2, samples: 30, least: 10, seconds }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gain_that_noise_could_have_made_is_none() {
        let spread = |p10, median, p90| Spread { median, p10, p90, n: 20 };
        let default = spread(0.9, 1.0, 1.1);
        assert!(exceeds_spread(spread(0.7, 0.8, 0.89), default), "apart");
        assert!(!exceeds_spread(spread(0.7, 0.8, 0.95), default), "they overlap");
        assert!(!exceeds_spread(default, default), "the same");
    }
}
