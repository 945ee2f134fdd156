//! The engine: executes on a device what the schedule planned.
//!
//! * [`paged_attention::PagedAttention`] is attention over a paged cache without a model: the library's smallest useful
//!   part, and what `verify` and the kernel tests drive.
//! * [`Engine`] adds weights, activations and sampling, and implements the schedule's [`Backend`]: one step of a whole batch
//!   is one submission, in which the step's words are copied, one pass computes all layers, and the sampled tokens
//!   are copied back. No buffer, pipeline or bind group is made after construction.

pub mod bench;
pub mod ceilings;
mod chunk;
mod config;
mod eviction;
mod expected;
pub mod host_cache;
mod layers;
mod merged;
mod moves;
pub mod paged_attention;
mod parameters;
mod plain_copies;
pub mod saved;
mod scores;
mod scratch;
mod step;
pub mod swap;
mod tables;
mod weights;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::compression::hidden::{HeadParameters, HiddenCodec, PageContext};
use crate::device::staging::{ReadBack, Uploader, download};
use crate::device::timing::{Clock, StepTimer};
use crate::device::{Device, DeviceError};
use crate::geometry::{Bytes, CELL_BYTES, ModelGeometry, WORD_BYTES};
use crate::kernels::append::Positions;
use crate::kernels::attention::CacheShape;
use crate::kernels::eviction::EvictionKernels;
use crate::kernels::executor::{AttentionKernels, ListOffsets, RowBuffers, Turning};
use crate::kernels::parameters::ParameterSource;
use crate::kernels::plan::{AttentionPlan, Planner, Segment};
use crate::kernels::tuning::Tuning;
use crate::kernels::{KernelError, PipelineCache, Recorder};
use crate::pool::device::PoolBuffers;
use crate::pool::page_table::{PageTable, TableShape, Window};
use crate::pool::{PagePool, PoolError, PoolLayout};
use crate::schedule::{Abilities, Backend, BackendError, Caches, Fault, SessionId, StepPlan, StepResult};
use crate::weights::Weights;
pub use config::{EngineConfig, EvictionConfig};
use layers::{Layers, RowCounts};
use paged_attention::page_sizes;
use scratch::{Scratch, ScratchSizes};
use step::{StepOffsets, StepRows, inverse_frequencies};
use swap::Swap;
use tables::DirtyTables;
use weights::DeviceWeights;

/// What can go wrong while executing.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A kernel does not run here.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The pool can not give what is asked.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// A cache can not be read from its file.
    #[error("a cache can not be read from its file: {0}")]
    File(#[from] std::io::Error),
    /// The caller's numbers do not fit together.
    #[error("{0}")]
    Input(String),
}

impl BackendError for EngineError {
    fn fault(&self) -> Fault {
        match self {
            Self::Device(error) | Self::Kernel(KernelError::Device(error)) => match error {
                DeviceError::OutOfMemory { .. } | DeviceError::NoMemory(_) => Fault::OutOfMemory,
                DeviceError::Lost(_) => Fault::DeviceLost,
                _ => Fault::Other,
            },
            _ => Fault::Other,
        }
    }
}

/// Figures of the last step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepStats {
    /// Dispatches recorded.
    pub dispatches: u32,
    /// Of these, those of layers.
    pub in_layers: u32,
    /// Time on the device, on [`Engine::clock`].
    pub device: Duration,
    /// Host time to plan and record, before submission.
    pub host: Duration,
}

/// Kernels of evictions, and the buffer that their results come back through.
#[derive(Debug)]
struct Evictions {
    kernels: EvictionKernels,
    back: ReadBack,
    config: EvictionConfig,
}

/// A model on a device.
#[derive(Debug)]
pub struct Engine<'d> {
    device: &'d Device,
    geometry: ModelGeometry,
    context_length: u32,
    max_rows: u32,
    weights: DeviceWeights,
    buffers: PoolBuffers,
    scratch: Scratch,
    layers: Layers,
    attention: AttentionKernels,
    evictions: Option<Evictions>,
    swap: Option<Swap>,
    uploader: Uploader,
    back: ReadBack,
    timer: StepTimer,
    frequencies: Vec<f64>,
    rows: StepRows,
    tables: DirtyTables,
    planner: Planner,
    /// Empty between steps: memory for segments.
    segments: Vec<Segment<'static>>,
    words: Vec<u32>,
    stats: StepStats,
}

impl<'d> Engine<'d> {
    /// Uploads the weights, allocates everything that the budget holds, and compiles the kernels. The caches go to the
    /// scheduler.
    ///
    /// # Errors
    /// [`EngineError::Pool`] when the budget is too small, [`EngineError::Device`] when the device is.
    pub fn new(device: &'d Device, weights: &Weights, config: &EngineConfig) -> Result<(Self, Caches), EngineError> {
        Self::tuned(device, weights, config, Arc::default())
    }

    /// The same with kernels that are launched as `tuning` says.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn tuned(
        device: &'d Device,
        weights: &Weights,
        config: &EngineConfig,
        tuning: Arc<Tuning>,
    ) -> Result<(Self, Caches), EngineError> {
        let geometry = weights.geometry.clone();
        geometry.check().map_err(EngineError::Input)?;
        let shape = CacheShape { heads: geometry.heads, page_size: config.page_size };
        for codec in &config.codecs {
            codec.check(shape.page()).map_err(EngineError::Input)?;
        }
        let timer = StepTimer::new(device)?;
        let plan = |config: &EngineConfig| Self::layout(device, &geometry, &shape, config, timer.bytes());
        let (layout, sizes, upload) = plan(config);
        let pool = PagePool::new(&layout).map_err(|e| config.advise(&|c| plan(c).0, e))?;
        let window = Self::window(&shape, config);
        let buffers = PoolBuffers::new(device, &pool, &window)?;
        let scratch = Scratch::new(device, &sizes)?;
        let heads_of_codecs = parameters::of_weights(weights, &config.codecs);
        let weights = DeviceWeights::upload(device, weights)?;
        let mut cache = PipelineCache::new(tuning);
        let layers = Layers::new(device, &mut cache, &geometry, &weights, &scratch, config.max_sessions)?;
        let heads = geometry.heads;
        let rows = RowBuffers {
            qkv: &scratch.qkv,
            stride: heads.q_width() + 2 * heads.kv_width(),
            k_offset: heads.q_width(),
            v_offset: heads.q_width() + heads.kv_width(),
            positions: Positions::Rotary,
            output: &scratch.attention,
        };
        let attention_sizes = config.attention_sizes(&geometry, sizes.max_states);
        let attention =
            AttentionKernels::new(device, &mut cache, shape, &buffers, &scratch.step, &rows, &attention_sizes)?;
        let evictions = match (config.eviction_sizes(&geometry), &config.evictions) {
            (Some(sizes), Some(config)) => Some(Evictions {
                kernels: EvictionKernels::new(device, &mut cache, &attention, &buffers, &scratch.step, &rows, sizes)?,
                back: ReadBack::new(device, "eviction read-back", eviction::back_bytes(&sizes, &shape))?,
                config: config.clone(),
            }),
            _ => None,
        };
        let pages = page_sizes(&shape, &config.codecs);
        let swap = match config.swap_sizes(pages.smallest) {
            Some(_) if config.swap_chunk < pages.largest => {
                let (chunk, page) = (config.swap_chunk, pages.largest);
                return Err(EngineError::Input(format!("chunks of {chunk} hold no page of {page}")));
            }
            Some(sizes) => Some(Swap::new(device, &mut cache, &buffers, sizes)?),
            None => None,
        };
        let full = TableShape {
            num_layers: geometry.num_layers,
            num_kv_heads: heads.num_kv_heads,
            page: shape.page(),
            codec: HiddenCodec::F16,
            quest: None,
        };
        let mut uploader = Uploader::new(device, "step staging", upload)?;
        buffers.write_window(device, &mut uploader, &window)?;
        let source = ParameterSource { heads: &heads_of_codecs, context_length: config.context_length };
        attention.set_parameters(device, &mut uploader, &source)?;
        let engine = Self {
            device,
            frequencies: inverse_frequencies(&geometry),
            geometry,
            context_length: config.context_length,
            max_rows: config.max_rows,
            weights,
            buffers,
            layers,
            attention,
            evictions,
            swap,
            uploader,
            back: ReadBack::new(device, "token read-back", Self::back_bytes(config, &sizes))?,
            timer,
            scratch,
            rows: StepRows::default(),
            tables: DirtyTables::default(),
            planner: Planner::default(),
            segments: Vec::new(),
            words: Vec::new(),
            stats: StepStats::default(),
        };
        let slot_bytes = |e: &Evictions| e.kernels.slot_parts(0).map(|(_, _, bytes)| bytes).sum();
        let abilities = Abilities {
            slot_bytes: engine.evictions.as_ref().map_or(Bytes::ZERO, slot_bytes),
            swap_bytes: if engine.swap.is_some() { config.swap_chunk } else { Bytes::ZERO },
            codecs: config.codecs.clone(),
            slots: config.evictions.as_ref().map(|evictions| evictions.slots),
            head_scores: config.evictions.as_ref().and_then(|evictions| evictions.head_scores.clone()),
            chooses: config.chooses,
        };
        Ok((engine, Caches::new(pool, full, window, abilities)))
    }

    fn window(shape: &CacheShape, config: &EngineConfig) -> Window {
        Window::new(shape.page(), shape.heads.num_kv_heads, config.max_rows, config.seals())
    }

    /// Splits the budget: the pool's layout, the scratch, and the bytes of one upload half. Several arenas need more
    /// scratch, and more scratch can mean fewer arenas; the larger number of arenas is assumed.
    fn layout(
        device: &Device,
        geometry: &ModelGeometry,
        shape: &CacheShape,
        config: &EngineConfig,
        timer: Bytes,
    ) -> (PoolLayout, ScratchSizes, Bytes) {
        let pages = page_sizes(shape, &config.codecs);
        let window = Self::window(shape, config);
        let max_binding = config.max_arena.map_or(device.max_binding(), |a| a.min(device.max_binding()));
        let arenas = config.budget.0.div_ceil(max_binding.0.max(1)).max(1);
        let sizes = ScratchSizes::new(geometry, shape, config, u32::try_from(arenas).unwrap_or(u32::MAX));
        // Tables are uploaded from the same staging as the step; two entries per page bound their size.
        let tables = Bytes(config.budget.0 / pages.smallest.0 * 2 * WORD_BYTES);
        let upload = (sizes.step + tables).align_up(256);
        let evictions = config.eviction_sizes(geometry);
        let eviction_back = evictions.map_or(Bytes::ZERO, |sizes| eviction::back_bytes(&sizes, shape));
        let swap = config.swap_sizes(pages.smallest);
        let swap_staging = swap.map_or(Bytes::ZERO, |swap| swap.staging());
        let staging = Bytes(upload.0 * 2) + Self::back_bytes(config, &sizes) + timer + eviction_back + swap_staging;
        let layout = PoolLayout {
            budget: config.budget,
            staging,
            scratch: sizes.total()
                + PoolBuffers::window_bytes(&window)
                + swap.map_or(Bytes::ZERO, |swap| swap.scratch())
                + evictions.map_or(Bytes::ZERO, |sizes| sizes.scratch_bytes(shape)),
            max_binding,
            slab: pages.slab,
            smallest_page: pages.smallest,
            fixed_entries: window.entries(),
        };
        (layout, sizes, upload)
    }

    fn back_bytes(config: &EngineConfig, sizes: &ScratchSizes) -> Bytes {
        // Evaluation reads logits back; generation only tokens.
        if config.max_logit_rows > config.max_sessions { sizes.logits } else { sizes.tokens }
    }

    /// The device that it is on.
    pub const fn device(&self) -> &'d Device {
        self.device
    }

    /// The model's shape.
    pub const fn geometry(&self) -> &ModelGeometry {
        &self.geometry
    }

    /// Bytes of weights on the device, outside the budget.
    pub const fn weight_bytes(&self) -> Bytes {
        self.weights.bytes
    }

    /// Bytes of weights that a step reads: all but an embedding that is not the output matrix too, of which it reads few rows.
    pub fn step_weight_bytes(&self) -> Bytes {
        self.weights.step_bytes()
    }

    /// Bytes of every buffer on the device but the weights: what the pool's report calls allocated.
    pub fn held_bytes(&self) -> Bytes {
        let staging = self.uploader.total() + self.back.capacity() + self.timer.bytes();
        let evictions = self.evictions.as_ref().map_or(Bytes::ZERO, |e| e.kernels.held_bytes() + e.back.capacity());
        let swap = self.swap.as_ref().map_or(Bytes::ZERO, Swap::held_bytes);
        self.buffers.bytes() + self.scratch.bytes() + self.attention.held_bytes() + staging + evictions + swap
    }

    /// The clock of [`StepStats::device`].
    pub const fn clock(&self) -> Clock {
        self.timer.clock()
    }

    /// Figures of the last step.
    pub const fn last_step(&self) -> StepStats {
        self.stats
    }

    /// Gathers the rows of the plan; sampling segments get a row of logits each.
    fn gather(&mut self, plan: &StepPlan) -> Result<(), EngineError> {
        let vocab = self.geometry.vocab_size;
        if let Some(token) = plan.segments.iter().flat_map(|s| &s.tokens).find(|t| **t >= vocab) {
            return Err(EngineError::Input(format!("token {token} is not below the vocabulary's size, {vocab}")));
        }
        let StepRows { tokens, positions, logit_rows, samples } = &mut self.rows;
        tokens.clear();
        positions.clear();
        logit_rows.clear();
        samples.clear();
        for rows in &plan.segments {
            tokens.extend_from_slice(&rows.tokens);
            positions.extend(rows.first_index..rows.first_index + rows.n_rows());
            if let Some(sampling) = rows.sample {
                let row = u32::try_from(logit_rows.len()).expect("rows of a step are counted in 32 bits");
                samples.push(sampling.item(row, rows.first_index + rows.n_rows()));
                logit_rows.push(u32::try_from(tokens.len() - 1).expect("rows of a step are counted in 32 bits"));
            }
        }
        Ok(())
    }

    /// Works out what [`Backend::execute`] uploads for a plan, without uploading it: for tests and measurements of the host's
    /// part of a step. Page tables count as uploaded afterwards.
    ///
    /// # Errors
    /// [`EngineError`], as for executing it.
    #[doc(hidden)]
    pub fn prepare(&mut self, plan: &StepPlan, caches: &mut Caches) -> Result<(), EngineError> {
        self.gather(plan)?;
        self.plan_step(plan, caches)?;
        Ok(())
    }

    /// Page tables, work lists and words of the gathered rows.
    fn plan_step(&mut self, plan: &StepPlan, caches: &mut Caches) -> Result<StepOffsets, EngineError> {
        self.tables.collect(plan, caches);
        self.plan_attention(plan, caches)?;
        let (shape, theta) = (self.attention.shape(), self.geometry.rope_theta);
        let lists = |plan: &AttentionPlan, words: &mut Vec<u32>| ListOffsets::write(plan, shape, theta, words);
        Ok(self.rows.write(&self.frequencies, self.planner.last(), lists, &mut self.words))
    }

    /// Computes the gathered rows in one submission and returns what `want` names.
    fn submit(&mut self, plan: &StepPlan, caches: &mut Caches, want: Want) -> Result<Vec<u8>, EngineError> {
        let started = Instant::now();
        let offsets = self.plan_step(plan, caches)?;
        let step_bytes = self.words.len() as u64 * WORD_BYTES;
        if step_bytes > self.scratch.step.size() {
            let (bytes, limit) = (Bytes(step_bytes), Bytes(self.scratch.step.size()));
            return Err(DeviceError::TooLarge { label: "the work lists of a step".to_owned(), bytes, limit }.into());
        }
        let pieces: [&[u8]; 2] = [bytemuck::cast_slice(&self.words), bytemuck::cast_slice(&self.tables.words)];
        self.uploader.write(self.device, &pieces)?;
        let mut encoder = self.device.raw.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let fresh = caches.take_fresh();
        if let Some(Evictions { kernels, .. }) = &self.evictions {
            fresh.iter().for_each(|slot| kernels.clear(&mut encoder, *slot));
        }
        encoder.copy_buffer_to_buffer(self.uploader.source(), 0, &self.scratch.step, 0, step_bytes);
        self.tables.record(&mut encoder, self.uploader.source(), step_bytes, &self.buffers.tables);
        let recorder = Recorder::new(self.timer.begin(&mut encoder));
        let (dispatches, in_layers) = self.record(recorder, plan, &offsets, want);
        self.timer.resolve(&mut encoder);
        let n_logits = self.rows.logit_rows.len() as u64;
        let (source, row_words) = match want {
            Want::Tokens => (&self.scratch.tokens, 1),
            Want::Logits | Want::LogitsOfMany => (&self.scratch.logits, u64::from(self.geometry.vocab_size)),
        };
        let read_bytes = n_logits * row_words * WORD_BYTES;
        if read_bytes > 0 {
            encoder.copy_buffer_to_buffer(source, 0, self.back.target(), 0, read_bytes);
        }
        let moves = self.record_moves(&mut encoder, plan, caches)?;
        let host = started.elapsed();
        self.device.submit(encoder)?;
        self.uploader.recycle(self.device);
        self.moves_submitted(moves)?;
        let length = usize::try_from(read_bytes).expect("a read-back fits in the address space");
        let mut bytes = Vec::with_capacity(length);
        self.back.read(self.device, length, &mut bytes)?;
        self.stats = StepStats { dispatches, in_layers, device: self.timer.elapsed(self.device)?, host };
        Ok(bytes)
    }

    fn plan_attention(&mut self, plan: &StepPlan, caches: &Caches) -> Result<(), EngineError> {
        let sizes = self.evictions.as_ref().map(|evictions| evictions.kernels.sizes());
        let shape = self.attention.shape();
        let mut row_lo = 0;
        let mut segments = emptied(std::mem::take(&mut self.segments));
        let mut observed = Vec::new();
        for rows in &plan.segments {
            let (table, n_rows) = (&caches.tables[&rows.session], rows.n_rows());
            let (first_index, decode) = (rows.first_index, rows.decode);
            let (scores, queries) = eviction::observations(sizes, shape, &rows.observed, row_lo, n_rows);
            observed.extend(queries);
            let attend_below = rows.depth.unwrap_or(u32::MAX);
            segments.push(Segment { table, row_lo, n_rows, first_index, decode, attend_below, scores });
            row_lo += n_rows;
        }
        let planned = self.planner.plan(self.attention.shape(), self.geometry.num_layers, &segments);
        planned.observe(&observed);
        self.segments = emptied(segments);
        Ok(self.attention.check(self.planner.last())?)
    }

    /// Records the whole forward pass; the number of dispatches, and how many of them are those of layers.
    fn record(&self, mut recorder: Recorder<'_>, plan: &StepPlan, offsets: &StepOffsets, want: Want) -> (u32, u32) {
        let attention = self.planner.last();
        let (decode, all) = (plan.decode_rows(), plan.n_rows());
        self.layers.embed(&mut recorder, offsets.tokens, all);
        let before = recorder.dispatches();
        for layer in 0..self.geometry.num_layers {
            let rows = RowCounts { decode, active: plan.active_rows(layer), all };
            self.layers.project(&mut recorder, layer as usize, rows);
            if let Some(evictions) = &self.evictions {
                let n_items = u32::try_from(attention.moments.len()).expect("rows of a step are counted in 32 bits");
                evictions.kernels.record_moments(&mut recorder, offsets.lists.moments, n_items, layer);
            }
            let turning = Turning { angles: offsets.angles, n_rows: rows.active };
            self.attention.record(&mut recorder, attention, &offsets.lists, layer, turning);
            if let Some(evictions) = &self.evictions {
                evictions.kernels.record_scores(&mut recorder, attention, &offsets.lists, layer);
            }
            self.layers.after_attention(&mut recorder, layer as usize, rows);
        }
        let in_layers = recorder.dispatches() - before;
        let n_logits = u32::try_from(self.rows.logit_rows.len()).expect("rows of a step are counted in 32 bits");
        self.layers.logits(&mut recorder, offsets.logit_rows, n_logits, want == Want::LogitsOfMany);
        if want == Want::Tokens {
            self.layers.sample(&mut recorder, offsets.samples, n_logits);
        }
        (recorder.dispatches(), in_layers)
    }

    /// Computes the plan and returns the logits `[vocab_size]` of each sampling segment instead of a token.
    ///
    /// # Errors
    /// [`EngineError`]; [`EngineError::Input`] when the engine was not made to read logits back.
    pub fn logits(&mut self, plan: &StepPlan, caches: &mut Caches) -> Result<Vec<Vec<f32>>, EngineError> {
        self.gather(plan)?;
        self.read_logits(plan, caches, Want::Logits)
    }

    /// Computes the plan, in which nothing samples, and returns the logits of the given rows.
    ///
    /// # Errors
    /// As [`Self::logits`].
    pub fn logits_of_rows(
        &mut self,
        plan: &StepPlan,
        caches: &mut Caches,
        rows: &[u32],
    ) -> Result<Vec<Vec<f32>>, EngineError> {
        self.gather(plan)?;
        self.rows.samples.clear();
        self.rows.logit_rows.clear();
        self.rows.logit_rows.extend_from_slice(rows);
        self.read_logits(plan, caches, Want::LogitsOfMany)
    }

    /// Keys, after rotary positions, and values that one list holds, decoded, each `[tokens][head_dim]`: for calibration and
    /// tests, since it reads page by page. Latents are not lifted.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn held_rows(&self, table: &PageTable, layer: u32, kv_head: u32) -> Result<(Vec<f32>, Vec<f32>), EngineError> {
        let shape = table.shape();
        let nobody = HeadParameters::default();
        let width = shape.page.head_dim as usize;
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for (page, codec, n_tokens) in table.held_pages(layer, kv_head) {
            let arena = &self.buffers.arenas[usize::from(page.arena)];
            let bytes = usize::try_from(codec.page_bytes(shape.page).0).expect("a page fits in the address space");
            let words = download(self.device, arena, u64::from(page.cell) * CELL_BYTES, bytes)?;
            let context = PageContext::at(&nobody, 0);
            let (k, v) = codec.decode(shape.page, context, &bytemuck::pod_collect_to_vec(&words));
            keys.extend(&k[..n_tokens as usize * width]);
            values.extend(&v[..n_tokens as usize * width]);
        }
        Ok((keys, values))
    }

    /// Gives the codecs other parameters than those of the weights, per `[layer][KV head]`. Pages that were sealed before keep
    /// their codes and become meaningless, so that no session may hold any.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn set_codec_parameters(&mut self, heads: &[HeadParameters]) -> Result<(), EngineError> {
        let source = ParameterSource { heads, context_length: self.context_length };
        Ok(self.attention.set_parameters(self.device, &mut self.uploader, &source)?)
    }

    fn read_logits(&mut self, plan: &StepPlan, caches: &mut Caches, want: Want) -> Result<Vec<Vec<f32>>, EngineError> {
        let vocab = self.geometry.vocab_size as usize;
        let bytes = Bytes((self.rows.logit_rows.len() * vocab) as u64 * WORD_BYTES);
        if bytes > self.back.capacity() {
            let capacity = self.back.capacity();
            return Err(EngineError::Input(format!("{bytes} of logits are wanted; this engine reads back {capacity}")));
        }
        let values: Vec<f32> = bytemuck::pod_collect_to_vec(&self.submit(plan, caches, want)?);
        Ok(values.chunks_exact(vocab).map(<[f32]>::to_vec).collect())
    }
}

/// The memory of segments, for segments that borrow from something else.
fn emptied<'t>(mut segments: Vec<Segment<'_>>) -> Vec<Segment<'t>> {
    segments.clear();
    // Collecting what a vector gives up into one of the same type keeps its memory; a test counts.
    segments.into_iter().map(|_| unreachable!("there are none")).collect()
}

/// What a submission reads back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Want {
    Tokens,
    Logits,
    LogitsOfMany,
}

impl Backend for Engine<'_> {
    type Error = EngineError;

    fn execute(&mut self, plan: &StepPlan, caches: &mut Caches) -> Result<StepResult, EngineError> {
        let started = Instant::now();
        if let Some(swap) = &mut self.swap {
            swap.forget(&plan.forgotten);
        }
        let done = if plan.segments.is_empty() {
            self.move_alone(plan, caches).map(|()| Vec::new())
        } else {
            self.gather(plan).and_then(|()| self.submit(plan, caches, Want::Tokens))
        };
        if let Some(swap) = &mut self.swap {
            swap.settle(plan, done.is_ok());
        }
        let tokens = bytemuck::pod_collect_to_vec(&done?);
        Ok(StepResult { tokens, elapsed: started.elapsed(), lost: self.take_lost() })
    }

    fn evict(&mut self, session: SessionId, tokens: &[u32], caches: &mut Caches) -> Result<Duration, EngineError> {
        let started = Instant::now();
        self.evict_session(session, tokens, caches)?;
        Ok(started.elapsed())
    }
}
