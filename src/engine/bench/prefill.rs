//! Prefill with the merge of its states: the last rows of every sequence against its whole cache.

use super::attention::{Attention, Kernel, Rows};
use super::cache::CacheSpec;
use super::{BenchSettings, Checked, KernelRun, Work};
use crate::compression::hidden::HiddenCodec;
use crate::device::{Device, Tier};
use crate::engine::EngineError;
use crate::kernels::Recorder;
use crate::kernels::attention::Format;
use crate::kernels::pipeline::PipelineCache;
use crate::kernels::prefill::{PrefillSpec, PrefillTuning};
use crate::kernels::tuning::{Operands, Tuning};

/// (row, KV head) pairs that are compared, spread over the rows.
const SAMPLES: usize = 6;
const SEED: u64 = 19;

/// A chunk of every sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct PrefillCase {
    /// The cache, the chunk included.
    pub cache: CacheSpec,
    /// Rows of each sequence: its last ones. Where pages are sealed they lie in the last page, which they read open.
    pub rows: u32,
}

/// A launch of one format's pages.
#[derive(Debug)]
struct Launch {
    spec: PrefillSpec,
    kernel: Kernel,
}

/// Prefill, ready to run.
#[derive(Debug)]
pub struct PrefillRun {
    attention: Attention,
    candidates: Vec<PrefillTuning>,
    /// For sealed pages, or for all where none is sealed; and for open pages beside sealed ones.
    launches: [Launch; 2],
}

/// Launches of prefill that the device can run, the one that the program uses first.
fn candidates(format: &Format, tier: Tier, tuning: &Tuning) -> Vec<PrefillTuning> {
    let first = tuning.prefill(tier);
    let runs = |tuning: &PrefillTuning| tier == Tier::Cooperative || !matches!(tuning, PrefillTuning::Cooperative(_));
    let others = PrefillTuning::candidates(format).into_iter().filter(runs).filter(|tuning| *tuning != first);
    std::iter::once(first).chain(others).collect()
}

fn launches(
    device: &Device,
    pipelines: &mut PipelineCache,
    attention: &Attention,
    tuning: PrefillTuning,
) -> Result<[Launch; 2], EngineError> {
    let CacheSpec { shape, codec, .. } = &attention.rows.cache;
    let mut of = |codec| -> Result<Launch, EngineError> {
        let spec = PrefillSpec::new(shape.format(codec), tuning);
        Ok(Launch { kernel: attention.kernel(device, pipelines, &spec.kernel())?, spec })
    };
    Ok([of(*codec)?, of(HiddenCodec::F16)?])
}

impl PrefillRun {
    /// Makes and fills the cache, plans, and compiles.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn new(
        device: &Device,
        pipelines: &mut PipelineCache,
        case: &PrefillCase,
        settings: &BenchSettings,
    ) -> Result<Self, EngineError> {
        let PrefillCase { cache, rows } = case;
        let format = cache.shape.format(cache.codec);
        let rows = Rows { cache: cache.clone(), rows: *rows, decode: false };
        let attention = Attention::new(device, pipelines, rows, (SEED, SAMPLES), settings)?;
        let candidates = candidates(&format, device.tier(), pipelines.tuning());
        let launches = launches(device, pipelines, &attention, candidates[0])?;
        Ok(Self { attention, candidates, launches })
    }
}

impl KernelRun for PrefillRun {
    fn candidates(&self) -> Vec<String> {
        self.candidates.iter().map(ToString::to_string).collect()
    }

    fn choose(&mut self, device: &Device, pipelines: &mut PipelineCache, candidate: usize) -> Result<(), EngineError> {
        self.launches = launches(device, pipelines, &self.attention, self.candidates[candidate])?;
        self.attention.forget();
        Ok(())
    }

    fn work(&self) -> Work {
        let rows = &self.attention.rows;
        let heads = rows.cache.shape.heads;
        // A row sees what is before it and itself.
        let seen = |row: f64, first: f64| row * first + row * (row + 1.0) / 2.0;
        let sequences = 0..rows.cache.contexts.len();
        let seen: f64 = sequences.map(|s| seen(f64::from(rows.rows), f64::from(rows.first(s)))).sum();
        let bytes = self.attention.cache.work().bytes + self.attention.row_bytes();
        // Pairs count once per row, so that codecs compare by what rows read.
        Work { bytes, flop: 4.0 * seen * f64::from(heads.q_width()), pairs: Some(seen * f64::from(heads.num_kv_heads)) }
    }

    fn record(&self, recorder: &mut Recorder<'_>, copy: usize) {
        let attention = &self.attention;
        let plan = &attention.plans[copy % attention.plans.len()];
        for dispatch in &plan.0.plans[0].prefill {
            let sealed = dispatch.0.codec == attention.rows.cache.codec;
            let Launch { spec, kernel } = &self.launches[usize::from(!sealed)];
            attention.dispatch(recorder, kernel, (plan.1.prefill, 3, spec.tiles()), dispatch);
        }
        attention.merge(recorder, plan);
    }

    fn poison(&mut self, device: &Device) -> Result<(), EngineError> {
        self.attention.poison(device)
    }

    fn check(&mut self, device: &Device, copy: usize) -> Result<Checked, EngineError> {
        // One that rounds what it multiplies decides what the joined result may be off by.
        let mut all = self.launches.iter().map(|launch| launch.spec.operands());
        let operands = all.find(|operands| *operands != Operands::Full).unwrap_or(Operands::Full);
        self.attention.check(device, copy, operands)
    }

    fn spoil(&mut self, device: &Device, copy: usize) -> Result<(), EngineError> {
        self.attention.spoil(device, copy)
    }
}
