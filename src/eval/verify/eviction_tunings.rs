//! Every way to launch the kernels of an eviction that have a tuning: over pages of every kind, and in whole evictions.
//!
//! Documents are evicted from before they are encoded, so that whole evictions read f16 alone. Codes are read where a cap evicts
//! again; the inputs of the bench stand for those, whose pages are large enough for all loads of a lane.

use super::eviction::{self, CHECKS};
use super::{Check, Extent};
use crate::compression::Compression;
use crate::device::Device;
use crate::engine::EngineError;
use crate::engine::bench::cache::CacheSpec;
use crate::engine::bench::gather::GatherRun;
use crate::engine::bench::score::{ScoreRun, ScoreSpec};
use crate::engine::bench::{BenchSettings, KernelRun, TimedRuns};
use crate::geometry::{Bytes, HeadGeometry};
use crate::kernels::PipelineCache;
use crate::kernels::attention::CacheShape;
use crate::kernels::gather::GatherTuning;
use crate::kernels::registry::DEFAULT_PAGE_SIZE;
use crate::kernels::score::ScoreTuning;
use crate::kernels::tuning::Tuning;

/// One codec for each way in which score's tiles read keys.
const SCORED: [&str; 6] = ["f16", "kivi2", "f32", "fp8", "int8", "kivi4"];
/// One for each way in which gather reads pages that need nothing of a model.
const GATHERED: [&str; 6] = ["f16", "kivi2", "f32", "rot3", "int8", "kivi4"];
/// Tokens of the scored sequence: more than an item's, and a page that is not full.
const CONTEXT: u32 = 331;
/// Its rows: more (row, head) pairs than any tile, and a tile that is not full.
const ROWS: u32 = 47;
/// What is moved: pages of one run of the source and of two, and a list of a single token.
const CONTEXTS: [u32; 4] = [259, 128, 65, 1];
const SETTINGS: BenchSettings = BenchSettings { cold: Bytes::ZERO, in_order: false, max_arena: None };
/// Whole evictions: four that score, one for each tuning of a quick run, and one whose keys are turned.
const EVICTIONS: [&str; 5] = [
    "token=h2o:0.25",
    "token=snapkv:0.5,hidden=kivi4",
    "token=pyramidkv:0.5",
    "token=tova:0.5,hidden=mean+rot3",
    "token=streaming:0.25:rerotate",
];

/// A kernel, its launches, and a codec of its pages.
struct Case {
    kernel: &'static str,
    shape: CacheShape,
    codec: &'static str,
    /// Places among the candidates.
    launches: Vec<usize>,
}

/// Of `n` launches those that meet a codec: in a quick run two codecs for each, in turn, so that all codecs are met.
fn launches(extent: Extent, n: usize, (at, codecs): (usize, usize)) -> Vec<usize> {
    let meets = |launch: &usize| extent == Extent::Full || (0..2).any(|i| (2 * launch + i) % codecs == at);
    (0..n).filter(meets).collect()
}

fn cases(extent: Extent) -> Vec<Case> {
    let shapes: &[(u32, u32)] = if extent == Extent::Full { &[(128, 4), (80, 7)] } else { &[(128, 4)] };
    let kernels =
        [("score", SCORED, ScoreTuning::candidates().len()), ("gather", GATHERED, GatherTuning::candidates().len())];
    let mut cases = Vec::new();
    for (head_dim, group) in shapes {
        let heads = HeadGeometry { num_qo_heads: 2 * group, num_kv_heads: 2, head_dim: *head_dim };
        let shape = CacheShape { heads, page_size: DEFAULT_PAGE_SIZE };
        for (kernel, codecs, n) in kernels {
            let of_codec = |(at, codec)| {
                let launches = launches(extent, n, (at, codecs.len()));
                Case { kernel, shape, codec, launches }
            };
            cases.extend(codecs.into_iter().enumerate().map(of_codec));
        }
    }
    cases
}

/// Both kernels launched anew in each whole eviction.
fn tunings() -> impl Iterator<Item = Tuning> {
    let (scores, gathers) = (ScoreTuning::candidates(), GatherTuning::candidates());
    let n = scores.len().max(gathers.len());
    let both = move |at: usize| Tuning {
        score: Some(scores[at % scores.len()]),
        gather: Some(gathers[at % gathers.len()]),
        ..Tuning::default()
    };
    (0..n).map(both)
}

/// The whole evictions of the tuning at a place.
fn evictions(extent: Extent, at: usize) -> Vec<Compression> {
    let parsed = |text: &&str| text.parse().unwrap_or_else(|e| panic!("verify's own eviction should parse: {e}"));
    match extent {
        Extent::Full => EVICTIONS.iter().map(parsed).collect(),
        Extent::Quick => vec![parsed(&EVICTIONS[at % EVICTIONS.len()])],
    }
}

/// How many checks [`run`] makes.
pub(super) fn count(extent: Extent) -> usize {
    let of_kernels = cases(extent).iter().map(|case| case.launches.len()).sum::<usize>();
    let whole = (0..tunings().count()).map(|at| evictions(extent, at).len() * CHECKS).sum::<usize>();
    of_kernels + whole
}

pub(super) fn run(
    device: &Device,
    cache: &mut PipelineCache,
    extent: Extent,
    each: &mut dyn FnMut(Check),
) -> Result<(), EngineError> {
    for (at, tuning) in tunings().enumerate() {
        let name = format!("{}, {}", tuning.score(), tuning.gather());
        cache.tune(tuning);
        for check in eviction::check(device, cache, &evictions(extent, at), None)? {
            each(Check { case: format!("{name}: {}", check.case), ..check });
        }
    }
    cache.tune(Tuning::default());
    let mut runs = TimedRuns::new(device)?;
    for Case { kernel, shape, codec: name, launches } in cases(extent) {
        let codec = name.parse().unwrap_or_else(|e| panic!("a codec of verify's own should parse: {e}"));
        let spec = |contexts: &[u32]| CacheSpec { shape, codec, contexts: contexts.to_vec() };
        let mut run: Box<dyn KernelRun> = match kernel {
            "score" => {
                let spec = ScoreSpec { cache: spec(&[CONTEXT]), rows: ROWS };
                Box::new(ScoreRun::new(device, cache, &spec, &SETTINGS)?)
            }
            _ => Box::new(GatherRun::new(device, cache, &spec(&CONTEXTS), &SETTINGS)?),
        };
        for launch in launches {
            let check = check_launch(&mut runs, cache, run.as_mut(), launch)?;
            let case = format!("{}: d{} g{} {name}", check.case, shape.heads.head_dim, shape.heads.group_size());
            each(Check { kernel, case, ..check });
        }
    }
    Ok(())
}

/// Runs one candidate over the inputs of a bench, and compares what it left.
///
/// # Errors
/// [`EngineError`] when the device refuses.
pub fn check_launch(
    runs: &mut TimedRuns<'_>,
    cache: &mut PipelineCache,
    run: &mut dyn KernelRun,
    candidate: usize,
) -> Result<Check, EngineError> {
    let device = runs.device();
    run.choose(device, cache, candidate)?;
    run.poison(device)?;
    runs.run(run, 0, 1)?;
    let checked = run.check(device, 0)?;
    let error_over_bound = if checked.missing == 0 { checked.error_over_bound } else { f64::INFINITY };
    let case = run.candidates().swap_remove(candidate);
    Ok(Check { kernel: "launch", case, compared: checked.compared, error_over_bound, nmse: Some(checked.nmse) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_launch_meets_codecs_and_every_codec_a_launch() {
        for extent in [Extent::Quick, Extent::Full] {
            let cases = cases(extent);
            for (kernel, n) in
                [("score", ScoreTuning::candidates().len()), ("gather", GatherTuning::candidates().len())]
            {
                for launch in 0..n {
                    let met = cases.iter().filter(|case| case.kernel == kernel && case.launches.contains(&launch));
                    let met = met.map(|case| case.codec).collect::<std::collections::BTreeSet<_>>().len();
                    assert_eq!(met, if extent == Extent::Full { 6 } else { 2 }, "{kernel} {launch}, {extent:?}");
                }
            }
            assert!(cases.iter().all(|case| !case.launches.is_empty()), "{extent:?}: every codec is met");
            let evicted: Vec<_> = (0..tunings().count()).flat_map(|at| evictions(extent, at)).collect();
            assert!(evicted.iter().all(eviction::fits), "{extent:?}: a whole eviction fits the small cache");
        }
        for tuning in ScoreTuning::candidates() {
            assert!(tunings().any(|t| t.score == Some(tuning)), "{tuning}");
        }
        for tuning in GatherTuning::candidates() {
            assert!(tunings().any(|t| t.gather == Some(tuning)), "{tuning}");
        }
    }
}
