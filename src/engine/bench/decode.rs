//! Decode with the merge of its states, over a cache of any size.

use super::attention::{Attention, Kernel, Rows};
use super::cache::CacheSpec;
use super::{BenchSettings, Checked, KernelRun, Work};
use crate::compression::hidden::{HiddenCodec, Transform};
use crate::device::Device;
use crate::engine::EngineError;
use crate::kernels::attention::Format;
use crate::kernels::decode::{DecodeSpec, DecodeTuning};
use crate::kernels::pipeline::PipelineCache;
use crate::kernels::tuning::{Operands, Tuning};
use crate::kernels::{KernelSpec, Recorder};

/// (row, KV head) pairs that are compared, spread over the batch.
const SAMPLES: usize = 4;
const SEED: u64 = 13;

/// One way to launch decode.
#[derive(Debug)]
struct Candidate {
    label: String,
    spec: KernelSpec,
    operands: Operands,
}

/// Decode kernels of a format that give the same result, the one that the program uses first.
fn candidates(device: &Device, format: Format, tuning: &Tuning) -> Vec<Candidate> {
    let (tier, chosen) = (device.tier(), tuning.decode(&device.summary().kind, &format));
    let others = DecodeTuning::candidates(&format).into_iter().filter(|other| *other != chosen);
    let named = |tuning: DecodeTuning| {
        let spec = DecodeSpec { format, tier, tuning }.kernel();
        Candidate { label: tuning.to_string(), spec, operands: tuning.operands(&format) }
    };
    let plain = format.codec.k.transform == Transform::None && format.codec.v.transform == Transform::None;
    let plain = plain.then(|| {
        let spec = DecodeSpec { format, tier, tuning: chosen }.plain();
        Candidate { label: "straightforward".to_owned(), spec, operands: Operands::Full }
    });
    std::iter::once(chosen).chain(others).map(named).chain(plain).collect()
}

/// Decode of one row per sequence, ready to run.
#[derive(Debug)]
pub struct DecodeRun {
    attention: Attention,
    candidates: Vec<Candidate>,
    /// What the kernel for sealed pages multiplies.
    operands: Operands,
    /// For sealed pages; for all where none is sealed.
    kernel: Kernel,
    /// For open pages beside sealed ones.
    open: Kernel,
}

impl DecodeRun {
    /// Makes and fills the cache, plans, and compiles.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn new(
        device: &Device,
        pipelines: &mut PipelineCache,
        spec: &CacheSpec,
        settings: &BenchSettings,
    ) -> Result<Self, EngineError> {
        let rows = Rows { cache: spec.clone(), rows: 1, decode: true };
        let attention = Attention::new(device, pipelines, rows, (SEED, SAMPLES), settings)?;
        let of_codec = |codec| candidates(device, spec.shape.format(codec), pipelines.tuning());
        let (candidates, of_open) = (of_codec(spec.codec), of_codec(HiddenCodec::F16));
        let kernel = attention.kernel(device, pipelines, &candidates[0].spec)?;
        let open = attention.kernel(device, pipelines, &of_open[0].spec)?;
        let operands = candidates[0].operands;
        Ok(Self { attention, candidates, operands, kernel, open })
    }

    /// Copies of the cache that runs take turns over.
    pub fn copies(&self) -> usize {
        self.attention.plans.len()
    }

    /// Arenas that the cache lies in.
    pub fn arenas(&self) -> usize {
        self.attention.cache.buffers.arenas.len()
    }
}

impl KernelRun for DecodeRun {
    fn candidates(&self) -> Vec<String> {
        self.candidates.iter().map(|candidate| candidate.label.clone()).collect()
    }

    fn choose(&mut self, device: &Device, pipelines: &mut PipelineCache, candidate: usize) -> Result<(), EngineError> {
        let Candidate { spec, operands, .. } = &self.candidates[candidate];
        self.kernel = self.attention.kernel(device, pipelines, spec)?;
        if *operands != self.operands {
            self.operands = *operands;
            self.attention.forget();
        }
        Ok(())
    }

    fn work(&self) -> Work {
        let work = self.attention.cache.work();
        Work { bytes: work.bytes + self.attention.row_bytes(), ..work }
    }

    fn record(&self, recorder: &mut Recorder<'_>, copy: usize) {
        let attention = &self.attention;
        let plan = &attention.plans[copy % attention.plans.len()];
        for dispatch in &plan.0.plans[0].decode {
            let sealed = dispatch.0.codec == attention.rows.cache.codec;
            let kernel = if sealed { &self.kernel } else { &self.open };
            attention.dispatch(recorder, kernel, (plan.1.decode, 2, 1), dispatch);
        }
        attention.merge(recorder, plan);
    }

    fn poison(&mut self, device: &Device) -> Result<(), EngineError> {
        self.attention.poison(device)
    }

    fn check(&mut self, device: &Device, copy: usize) -> Result<Checked, EngineError> {
        self.attention.check(device, copy, self.operands)
    }

    fn spoil(&mut self, device: &Device, copy: usize) -> Result<(), EngineError> {
        self.attention.spoil(device, copy)
    }
}
