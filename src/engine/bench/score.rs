//! Score: what cached tokens receive from rows of a prompt, as `h2o` sums it up.

use std::sync::Arc;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::cache::{BenchCache, CacheSpec};
use super::inputs::{Counts, numbers};
use super::outputs::filled;
use super::{BenchSettings, Checked, KernelRun, Work};
use crate::compression::hidden::HiddenCodec;
use crate::device::Device;
use crate::device::staging::download;
use crate::engine::EngineError;
use crate::geometry::{Bytes, WORD_BYTES};
use crate::kernels::abi::{ScoreItem, ScoreParams};
use crate::kernels::pipeline::{Pipeline, PipelineCache};
use crate::kernels::score::{self, ScoreTuning, TOKENS};
use crate::kernels::tuning::Tuning;
use crate::kernels::{Recorder, Slot, flat_grid};
use crate::reference::compare::{Tolerance, nmse};

/// Tokens of a KV head that are compared.
const SAMPLES: usize = 64;
/// Root mean square of the products of queries and keys, each of which has a mean square of 4/3.
const PRODUCT_RMS: f64 = 4.0 / 3.0;

/// The last rows of the only sequence of a cache.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoreSpec {
    /// The cache; one sequence.
    pub cache: CacheSpec,
    /// Rows that are looked at.
    pub rows: u32,
}

/// Scoring, ready to run.
#[derive(Debug)]
pub struct ScoreRun {
    spec: ScoreSpec,
    cache: BenchCache,
    /// Of each copy: codec, bind group and list of each dispatch.
    dispatches: Vec<Vec<(HiddenCodec, wgpu::BindGroup, ScoreParams)>>,
    candidates: Vec<ScoreTuning>,
    kernels: Vec<(HiddenCodec, Arc<Pipeline>)>,
    /// Of each copy: `[KV head][token]`.
    scores: Vec<wgpu::Buffer>,
    /// `[rows][num_qo_heads][head_dim]`, and `[rows][num_qo_heads]` base 2.
    q: Vec<f32>,
    lse: Vec<f32>,
    /// Each run adds once more.
    runs: Counts,
}

impl ScoreSpec {
    fn n_tokens(&self) -> u32 {
        self.cache.contexts[0]
    }

    /// Items of the runs of one codec and arena.
    fn items(&self, cache: &BenchCache, copy: usize) -> Vec<((HiddenCodec, u16), Vec<ScoreItem>)> {
        let (n, heads) = (self.n_tokens(), self.cache.shape.heads.num_kv_heads);
        let mut items: Vec<((HiddenCodec, u16), Vec<ScoreItem>)> = Vec::new();
        for (kv_head, run) in (0..heads).flat_map(|head| cache.runs(copy, 0, head).map(move |run| (head, run))) {
            let parts = (0..run.n_tokens).step_by(TOKENS as usize).map(|first| ScoreItem {
                row_lo: 0,
                n_rows: self.rows,
                kv_head,
                page_lo: run.entry + first / self.cache.shape.page_size,
                n_tokens: TOKENS.min(run.n_tokens - first),
                first_token: run.index + first,
                first_index: n - self.rows,
                out: kv_head * n + run.index + first,
                ..ScoreItem::default()
            });
            let place = (run.codec, run.arena);
            match items.iter_mut().find(|(at, _)| *at == place) {
                Some((_, alike)) => alike.extend(parts),
                None => items.push((place, parts.collect())),
            }
        }
        items
    }
}

/// Tiles, the one that the program uses first.
fn candidates(tuning: &Tuning) -> Vec<ScoreTuning> {
    let first = tuning.score();
    std::iter::once(first).chain(ScoreTuning::candidates().into_iter().filter(|other| *other != first)).collect()
}

impl ScoreRun {
    /// Makes and fills the cache, and compiles.
    ///
    /// # Errors
    /// [`EngineError`]; [`EngineError::Input`] for more rows than a dispatch takes.
    pub fn new(
        device: &Device,
        pipelines: &mut PipelineCache,
        spec: &ScoreSpec,
        settings: &BenchSettings,
    ) -> Result<Self, EngineError> {
        let shape = spec.cache.shape;
        let most = score::rows_max(&shape).min(spec.n_tokens());
        if spec.rows > most {
            return Err(EngineError::Input(format!("{} rows are scored at once; at most {most} can be", spec.rows)));
        }
        let cache = BenchCache::new(device, &spec.cache, settings)?;
        let mut rng = ChaCha8Rng::seed_from_u64(41);
        let n_heads = spec.rows as usize * shape.heads.num_qo_heads as usize;
        let q = numbers(&mut rng, n_heads * shape.heads.head_dim as usize);
        // About what so many tokens come to; the kernel takes it as it is.
        let sum = f64::from(spec.n_tokens()).log2();
        #[expect(clippy::cast_possible_truncation, reason = "a number near 20")]
        let lse: Vec<f32> = (0..n_heads).map(|_| sum as f32 + rng.random_range(1.0_f32..3.0)).collect();
        let (q_buffer, lse_buffer) = (filled(device, "q", &q)?, filled(device, "log-sum-exp", &lse)?);
        let unused = device.storage("codec parameters", Bytes(16))?;
        let candidates = candidates(pipelines.tuning());
        let kernels = spec.cache.compiled(device, pipelines, |format| score::kernel(format, candidates[0]))?;
        let of = |codec| &kernels.iter().find(|(of, _)| *of == codec).expect("pages are open or sealed").1;
        let (mut scores, mut dispatches) = (Vec::new(), Vec::new());
        for copy in 0..cache.copies.len() {
            let n_scores = u64::from(spec.n_tokens() * shape.heads.num_kv_heads);
            let out = device.storage("scores", Bytes(n_scores * WORD_BYTES).align_up(16))?;
            let (mut words, mut all) = (Vec::<u32>::new(), Vec::new());
            let items = spec.items(&cache, copy);
            let mut ranges = Vec::new();
            for (place, items) in &items {
                ranges.push((*place, words.len() / 4, items.len()));
                words.extend_from_slice(bytemuck::cast_slice(items));
            }
            let step = filled(device, "step", &words)?;
            for ((codec, arena), first, n) in ranges {
                let count = |n| u32::try_from(n).expect("items are counted in 32 bits");
                let params = ScoreParams {
                    items: count(first),
                    n_items: count(n),
                    layer: 0,
                    q_stride: shape.heads.q_width(),
                    scale_log2: shape.heads.sm_scale() * std::f32::consts::LOG2_E,
                    angles: 0,
                    list_stride: 0,
                    largest: 0,
                };
                let arena = &cache.buffers.arenas[usize::from(arena)];
                let tables = &cache.buffers.tables;
                let slots = [&step, tables, arena, &q_buffer, &lse_buffer, &unused, &out].map(Slot::Whole);
                all.push((codec, of(codec).bind(device, &slots), params));
            }
            scores.push(out);
            dispatches.push(all);
        }
        let runs = Counts::new(scores.len());
        let spec = spec.clone();
        let mut run = Self { spec, cache, dispatches, candidates, kernels, scores, q, lse, runs };
        run.poison(device)?;
        Ok(run)
    }

    /// What a token of a KV head receives from all rows in one run.
    fn expected(&self, keys: &[f32], kv_head: u32, token: u32) -> f64 {
        let heads = self.spec.cache.shape.heads;
        let (width, group) = (heads.head_dim as usize, heads.group_size() as usize);
        let key = &keys[token as usize * width..][..width];
        let first_index = self.spec.n_tokens() - self.spec.rows;
        let seen = (0..self.spec.rows).filter(|row| token <= first_index + row);
        let pairs = seen.flat_map(|row| {
            let first = row as usize * heads.num_qo_heads as usize + kv_head as usize * group;
            first..first + group
        });
        let received = pairs.map(|head| {
            let q = &self.q[head * width..][..width];
            let score: f64 = q.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
            let scale = f64::from(heads.sm_scale()) * std::f64::consts::LOG2_E;
            (score * scale - f64::from(self.lse[head])).exp2()
        });
        received.sum::<f64>() / group as f64
    }
}

impl KernelRun for ScoreRun {
    fn candidates(&self) -> Vec<String> {
        self.candidates.iter().map(ToString::to_string).collect()
    }

    fn choose(&mut self, device: &Device, pipelines: &mut PipelineCache, candidate: usize) -> Result<(), EngineError> {
        let tuning = self.candidates[candidate];
        self.kernels = self.spec.cache.compiled(device, pipelines, |format| score::kernel(format, tuning))?;
        Ok(())
    }

    fn work(&self) -> Work {
        let (heads, n) = (self.spec.cache.shape.heads, f64::from(self.spec.n_tokens()));
        let rows = f64::from(self.spec.rows);
        // Keys, of which a page holds as many bytes as of values, unless sides differ; scores are read and written.
        let keys = self.cache.work().bytes / 2.0;
        let scores = 2.0 * n * f64::from(heads.num_kv_heads);
        let queries = rows * f64::from(heads.q_width() + heads.num_qo_heads);
        let flop = 2.0 * rows * f64::from(heads.q_width()) * n;
        Work { bytes: keys + (scores + queries) * WORD_BYTES as f64, flop, pairs: None }
    }

    fn record(&self, recorder: &mut Recorder<'_>, copy: usize) {
        let copy = copy % self.dispatches.len();
        self.runs.add(copy);
        for (codec, group, params) in &self.dispatches[copy] {
            let kernel = self.kernels.iter().find(|(of, _)| of == codec).expect("pages are open or sealed");
            recorder.dispatch(&kernel.1, group, params, flat_grid(params.n_items));
        }
    }

    /// Scores are added to what is there, so that they begin at zero.
    fn poison(&mut self, device: &Device) -> Result<(), EngineError> {
        let mut encoder = device.raw.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        self.scores.iter().for_each(|scores| encoder.clear_buffer(scores, 0, None));
        device.submit(encoder)?;
        self.runs.clear();
        Ok(device.wait()?)
    }

    fn check(&mut self, device: &Device, copy: usize) -> Result<Checked, EngineError> {
        let copy = copy % self.scores.len();
        let (n, heads) = (self.spec.n_tokens(), self.spec.cache.shape.heads);
        let bytes = n as usize * heads.num_kv_heads as usize * size_of::<f32>();
        let scores: Vec<f32> = bytemuck::pod_collect_to_vec(&download(device, &self.scores[copy], 0, bytes)?);
        // Every token is seen by the last row, so that none may still be zero.
        let missing = scores.iter().filter(|score| !(score.is_finite() && **score > 0.0)).count();
        let runs = self.runs.of(copy);
        let (mut got, mut want) = (Vec::new(), Vec::new());
        for kv_head in [0, heads.num_kv_heads - 1] {
            let (keys, _) = self.cache.tokens(copy, 0, kv_head);
            let step = (n as usize / SAMPLES).max(1) | 1;
            for token in (0..n).step_by(step).chain([n - 1]) {
                got.push(scores[(kv_head * n + token) as usize]);
                want.push(self.expected(&keys, kv_head, token) * f64::from(runs));
            }
        }
        // Each addition to what runs before left rounds once more, always the same way.
        let terms = (self.spec.rows * heads.group_size()) as usize;
        let tolerance = Tolerance::attention(terms + (runs as usize).pow(2), heads.head_dim, PRODUCT_RMS);
        let error_over_bound = tolerance.worst(&got, &want, &want);
        Ok(Checked { compared: got.len(), missing, error_over_bound, nmse: nmse(&got, &want) })
    }

    fn spoil(&mut self, device: &Device, copy: usize) -> Result<(), EngineError> {
        self.cache.spoil(device, (copy % self.dispatches.len(), 0, 0))
    }
}
