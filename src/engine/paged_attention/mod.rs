//! Attention over a paged cache, without a model: append keys and values, decode, prefill and evict.

mod inspect;

use super::eviction::{self, Evictor};
use super::{EngineError, EvictionConfig};
use crate::compression::Compression;
use crate::compression::hidden::{HeadParameters, HiddenCodec};
use crate::device::staging::{ReadBack, Uploader, download};
use crate::device::{Device, DeviceError};
use crate::geometry::{Bytes, WORD_BYTES};
use crate::kernels::append::Positions;
use crate::kernels::attention::CacheShape;
use crate::kernels::eviction::{EvictionKernels, EvictionSizes};
use crate::kernels::executor::{AttentionKernels, AttentionSizes, ListOffsets, RowBuffers, Turning};
use crate::kernels::parameters::ParameterSource;
use crate::kernels::plan::{AttentionPlan, Segment};
use crate::kernels::{PipelineCache, Recorder};
use crate::pool::device::PoolBuffers;
use crate::pool::page_table::{PageTable, TableShape, Window};
use crate::pool::{PagePool, PoolLayout, PoolReport};
use crate::schedule::{Abilities, Caches, Observed, Selection, SessionId};

/// How large a [`PagedAttention`] is.
#[derive(Clone, Debug)]
pub struct PagedAttentionConfig {
    /// The cache.
    pub shape: CacheShape,
    /// Layers.
    pub num_layers: u32,
    /// Codecs besides f16 that sequences may have; each costs its kernels.
    pub codecs: Vec<HiddenCodec>,
    /// Sequences whose decode rows may choose the pages that they read (`quest`).
    pub choosing: u32,
    /// What evictions need; `None` where nothing is evicted.
    pub evictions: Option<EvictionConfig>,
    /// What codecs take from a model, per layer and KV head; none where no codec needs it.
    pub parameters: Vec<HeadParameters>,
    /// Longest sequence, in tokens; counts only where keys become latents or tokens are evicted.
    pub context_length: u32,
    /// Device bytes for pages, tables, scratch and staging.
    pub budget: Bytes,
    /// Query rows of one call at most.
    pub max_rows: u32,
    /// Attention states of one call at most: rows times query heads times runs.
    pub max_states: u32,
    /// Largest arena; the adapter's binding limit where `None`.
    pub max_arena: Option<Bytes>,
}

impl PagedAttentionConfig {
    /// One layer of f16 pages alone.
    pub fn new(shape: CacheShape, budget: Bytes, max_rows: u32, max_states: u32) -> Self {
        let (codecs, parameters) = (Vec::new(), Vec::new());
        let (num_layers, evictions, context_length, max_arena) = (1, None, 0, None);
        Self {
            shape,
            num_layers,
            codecs,
            choosing: 0,
            evictions,
            parameters,
            context_length,
            budget,
            max_rows,
            max_states,
            max_arena,
        }
    }

    fn eviction_sizes(&self) -> Option<EvictionSizes> {
        self.evictions.as_ref().map(|evictions| EvictionSizes {
            num_lists: self.num_layers * self.shape.heads.num_kv_heads,
            capacity: self.context_length,
            slots: evictions.slots,
            moments: evictions.moments,
        })
    }
}

pub use super::eviction::Kept;
pub use inspect::DevicePages;

/// A sequence in the cache.
pub type SequenceId = SessionId;

/// New tokens of one sequence, in all layers.
#[derive(Clone, Copy, Debug)]
pub struct NewRows<'a> {
    /// The sequence.
    pub sequence: SequenceId,
    /// Queries `[layers][rows][num_qo_heads][head_dim]`; empty to append without attending.
    pub q: &'a [f32],
    /// Keys `[layers][rows][num_kv_heads][head_dim]`.
    pub k: &'a [f32],
    /// Values `[layers][rows][num_kv_heads][head_dim]`.
    pub v: &'a [f32],
    /// Use the decode kernel (one row) rather than prefill.
    pub decode: bool,
}

/// The result of a call, layer by layer, rows in the order given.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionOutput {
    /// `[layers][rows][num_qo_heads][head_dim]`.
    pub o: Vec<f32>,
    /// Base-2 log-sum-exp `[layers][rows][num_qo_heads]`.
    pub lse: Vec<f32>,
}

/// A paged cache and the kernels over it.
#[derive(Debug)]
pub struct PagedAttention<'d> {
    device: &'d Device,
    config: PagedAttentionConfig,
    caches: Caches,
    next_id: u32,
    buffers: PoolBuffers,
    kernels: AttentionKernels,
    evictions: Option<(EvictionKernels, ReadBack)>,
    step: wgpu::Buffer,
    qkv: wgpu::Buffer,
    output: wgpu::Buffer,
    uploader: Uploader,
}

impl<'d> PagedAttention<'d> {
    /// Bytes of one upload half.
    const STAGING: Bytes = Bytes::mib(1);
    /// Bytes of the work lists of a call.
    const STEP: Bytes = Bytes::mib(1);

    /// Allocates the cache and compiles the kernels, or takes them from `cache`.
    ///
    /// # Errors
    /// [`EngineError`] when the budget is too small or the device refuses.
    pub fn new(
        device: &'d Device,
        cache: &mut PipelineCache,
        config: PagedAttentionConfig,
    ) -> Result<Self, EngineError> {
        let CacheShape { heads, .. } = config.shape;
        heads.check().map_err(EngineError::Input)?;
        for codec in &config.codecs {
            codec.check(config.shape.page()).map_err(EngineError::Input)?;
        }
        let parameters = if config.parameters.is_empty() {
            vec![HeadParameters::default(); (config.num_layers * heads.num_kv_heads) as usize]
        } else {
            config.parameters.clone()
        };
        let stride = heads.q_width() + 2 * heads.kv_width();
        let rows = u64::from(config.max_rows);
        let qkv_bytes = Bytes(rows * u64::from(stride) * WORD_BYTES).align_up(16);
        let output_bytes = Bytes(rows * u64::from(heads.q_width()) * WORD_BYTES).align_up(16);
        let sizes = AttentionSizes {
            max_states: config.max_states,
            max_rows: config.max_rows,
            codecs: &config.codecs,
            num_lists: config.num_layers * heads.num_kv_heads,
            context_length: config.context_length,
            choosing: config.choosing,
        };
        let pages = page_sizes(&config.shape, &config.codecs);
        let seals = config.codecs.iter().any(HiddenCodec::seals);
        let window = Window::new(config.shape.page(), heads.num_kv_heads, config.max_rows, seals);
        let max_binding = device.max_binding();
        let eviction_sizes = config.eviction_sizes();
        let scratch = qkv_bytes
            + output_bytes
            + sizes.scratch_bytes(&config.shape)
            + Self::STEP
            + eviction_sizes.map_or(Bytes::ZERO, |sizes| sizes.scratch_bytes(&config.shape));
        let eviction_back = eviction_sizes.map_or(Bytes::ZERO, |sizes| eviction::back_bytes(&sizes, &config.shape));
        let layout = PoolLayout {
            budget: config.budget,
            staging: Bytes(Self::STAGING.0 * 2) + eviction_back,
            scratch: scratch + PoolBuffers::window_bytes(&window),
            max_binding: config.max_arena.map_or(max_binding, |a| a.min(max_binding)),
            slab: pages.slab,
            smallest_page: pages.smallest,
            fixed_entries: window.entries(),
        };
        let pool = PagePool::new(&layout)?;
        let buffers = PoolBuffers::new(device, &pool, &window)?;
        let step = device.storage("step", Self::STEP)?;
        let qkv = device.storage("qkv rows", qkv_bytes)?;
        let output = device.storage("attention output", output_bytes)?;
        let row_buffers = RowBuffers {
            qkv: &qkv,
            stride,
            k_offset: heads.q_width(),
            v_offset: heads.q_width() + heads.kv_width(),
            positions: Positions::Applied,
            output: &output,
        };
        let kernels = AttentionKernels::new(device, cache, config.shape, &buffers, &step, &row_buffers, &sizes)?;
        let evictions = match eviction_sizes {
            Some(sizes) => Some((
                EvictionKernels::new(device, cache, &kernels, &buffers, &step, &row_buffers, sizes)?,
                ReadBack::new(device, "eviction read-back", eviction_back)?,
            )),
            None => None,
        };
        let mut uploader = Uploader::new(device, "staging", Self::STAGING)?;
        let source = ParameterSource { heads: &parameters, context_length: config.context_length };
        kernels.set_parameters(device, &mut uploader, &source)?;
        let full = TableShape {
            num_layers: config.num_layers,
            num_kv_heads: heads.num_kv_heads,
            page: config.shape.page(),
            codec: HiddenCodec::F16,
            quest: None,
        };
        let abilities = Abilities {
            codecs: config.codecs.clone(),
            slots: config.evictions.as_ref().map(|evictions| evictions.slots),
            head_scores: config.evictions.as_ref().and_then(|evictions| evictions.head_scores.clone()),
            chooses: config.choosing > 0,
            ..Abilities::default()
        };
        buffers.write_window(device, &mut uploader, &window)?;
        let caches = Caches::new(pool, full, window, abilities);
        Ok(Self { device, config, caches, next_id: 0, buffers, kernels, evictions, step, qkv, output, uploader })
    }

    /// Makes every byte that no one has written yet a NaN, so that reading one shows.
    ///
    /// # Errors
    /// [`EngineError::Device`].
    pub fn poison(&mut self) -> Result<(), EngineError> {
        let evictions = self.evictions.iter().flat_map(|(kernels, _)| kernels.buffers().all());
        for buffer in self.buffers.with_window().chain([&self.qkv, &self.output, &self.kernels.lse]).chain(evictions) {
            let poison = vec![0xff_u8; usize::try_from(buffer.size()).expect("a buffer fits in the address space")];
            self.uploader.upload(self.device, &poison, buffer, 0)?;
        }
        Ok(())
    }

    /// Admits a sequence of at most `max_tokens` tokens, whose full pages become `codec`.
    ///
    /// # Errors
    /// [`PoolError::DoesNotFit`](crate::pool::PoolError::DoesNotFit) with the numbers; [`EngineError::Input`] for a codec that
    /// the cache was not made for.
    pub fn admit(&mut self, codec: HiddenCodec, max_tokens: u32) -> Result<SequenceId, EngineError> {
        let compression = Compression { hidden: codec, ..Compression::default() };
        self.admit_compressed(&compression, max_tokens, max_tokens)
    }

    /// Admits a sequence of at most `max_tokens` tokens, the first `document` of which are compressed before more come.
    ///
    /// # Errors
    /// As [`Self::admit`]; [`EngineError::Input`] for a compression that the cache was not made for.
    pub fn admit_compressed(
        &mut self,
        compression: &Compression,
        document: u32,
        max_tokens: u32,
    ) -> Result<SequenceId, EngineError> {
        self.caches.serves(compression).map_err(EngineError::Input)?;
        self.caches.domains(compression, document).map_err(EngineError::Input)?;
        let id = SessionId(self.next_id);
        self.caches.admit(id, compression, document, max_tokens)?;
        self.next_id += 1;
        Ok(id)
    }

    /// Ends a sequence; every byte of it returns to the pool.
    ///
    /// # Errors
    /// [`EngineError::Input`] for an unknown sequence.
    pub fn release(&mut self, sequence: SequenceId) -> Result<(), EngineError> {
        self.table(sequence)?;
        Ok(self.caches.release(sequence)?)
    }

    /// A sequence's page table.
    ///
    /// # Errors
    /// [`EngineError::Input`] for an unknown sequence.
    pub fn table(&self, sequence: SequenceId) -> Result<&PageTable, EngineError> {
        self.caches.tables.get(&sequence).ok_or_else(|| unknown(sequence))
    }

    /// What the eviction of a sequence that is due will keep; `None` where nothing is due.
    pub fn selection(&self, sequence: SequenceId) -> Option<Selection> {
        self.caches.is_due(sequence).then(|| self.caches.selection(sequence))
    }

    /// Evicts from a sequence that is due, as a step does before it adds rows; what stayed of each list. `None` where nothing
    /// is due.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn evict(&mut self, sequence: SequenceId) -> Result<Option<Kept>, EngineError> {
        self.table(sequence)?;
        let Some((kernels, back)) = self.evictions.as_ref().filter(|_| self.caches.is_due(sequence)) else {
            return Ok(None);
        };
        let selection = self.caches.selection(sequence);
        let mut target = self.caches.take_target(sequence);
        let mut source = self.caches.tables.remove(&sequence).ok_or_else(|| unknown(sequence))?;
        let mut evictor = Evictor {
            device: self.device,
            uploader: &mut self.uploader,
            step: &self.step,
            pool_buffers: &self.buffers,
            attention: &self.kernels,
            kernels,
            back,
            rope_theta: self.config.parameters.first().map_or(10_000.0, |head| head.rope_theta),
        };
        let (num_layers, Caches { pool, window, .. }) = (self.config.num_layers, &mut self.caches);
        let kept = evictor.evict(pool, window, num_layers, (&mut source, &mut target), &selection);
        self.caches.tables.insert(sequence, source);
        self.caches.swap(sequence, target)?;
        Ok(Some(kept?))
    }

    /// What the pool holds.
    pub fn report(&self) -> PoolReport {
        self.caches.pool.report()
    }

    /// Appends the rows' keys and values and returns the attention of those that have queries. Rows of a sequence that is
    /// sealed are cut where pages end, each piece a submission of its own.
    ///
    /// # Errors
    /// [`EngineError::Input`] when shapes do not fit, [`EngineError::Pool`] beyond what was admitted.
    pub fn step(&mut self, rows: &[NewRows<'_>]) -> Result<AttentionOutput, EngineError> {
        let heads = self.config.shape.heads;
        let mut pieces = Vec::new();
        let mut n_rows = 0;
        for new in rows {
            let n = self.count_rows(new)?;
            pieces.push(Piece { new: *new, row: n_rows, done: 0, left: n, rows: n });
            n_rows += n;
        }
        if n_rows > self.config.max_rows {
            let max = self.config.max_rows;
            return Err(EngineError::Input(format!("{n_rows} rows in one call; this cache was made for {max}")));
        }
        let (q_width, n_heads) = (heads.q_width() as usize, heads.num_qo_heads as usize);
        let n = n_rows as usize * self.config.num_layers as usize;
        let mut out = AttentionOutput { o: vec![0.0; n * q_width], lse: vec![0.0; n * n_heads] };
        while pieces.iter().any(|piece| piece.left > 0) {
            for piece in pieces.iter().filter(|piece| piece.left > 0) {
                self.evict(piece.new.sequence)?;
            }
            self.submit(&mut pieces, n_rows as usize, &mut out)?;
        }
        Ok(out)
    }

    /// Rows of a segment, whose slices fit together.
    fn count_rows(&self, new: &NewRows<'_>) -> Result<u32, EngineError> {
        let heads = self.config.shape.heads;
        let (q_width, kv_width) = (heads.q_width() as usize, heads.kv_width() as usize);
        self.table(new.sequence)?;
        let layers = self.config.num_layers as usize;
        let (q_width, kv_width) = (q_width * layers, kv_width * layers);
        let n = new.k.len() / kv_width;
        let shapes = new.k.len() == n * kv_width
            && new.v.len() == new.k.len()
            && (new.q.is_empty() || new.q.len() == n * q_width)
            && n > 0;
        if !shapes || (new.decode && n != 1) {
            let (q, k, v) = (new.q.len(), new.k.len(), new.v.len());
            return Err(EngineError::Input(format!("rows of {q} query, {k} key and {v} value numbers do not fit")));
        }
        u32::try_from(n).map_err(|_| EngineError::Input("too many rows".to_owned()))
    }

    /// Of every piece as many rows as its sequence allows, one submission per layer. `n_rows` are those of the call.
    fn submit(
        &mut self,
        pieces: &mut [Piece<'_>],
        n_rows: usize,
        out: &mut AttentionOutput,
    ) -> Result<(), EngineError> {
        let device = self.device;
        let mut placed: Vec<Placed<'_>> = Vec::new();
        let mut row_lo = 0;
        self.caches.window.clear();
        for piece in pieces.iter_mut().filter(|piece| piece.left > 0) {
            let sequence = piece.new.sequence;
            let n = self.caches.cut(sequence, piece.left);
            let observed = self.caches.observed(sequence, n);
            let Caches { pool, window, tables, .. } = &mut self.caches;
            let table = tables.get_mut(&sequence).ok_or_else(|| unknown(sequence))?;
            let first_index = table.n_tokens();
            table.grow(pool, window, n)?;
            let Piece { new, row, done, rows, .. } = *piece;
            placed.push(Placed { new, row_lo, n_rows: n, first_index, to: row + done, done, rows, observed });
            row_lo += n;
            piece.done += n;
            piece.left -= n;
        }
        for table in self.caches.tables.values_mut().filter(|t| t.is_dirty()) {
            let mut entries = Vec::new();
            let region = table.write_region(&mut entries);
            let bytes = bytemuck::cast_slice(&entries);
            self.uploader.upload(device, bytes, &self.buffers.tables, u64::from(region) * WORD_BYTES)?;
        }
        let sizes = self.evictions.as_ref().map(|(kernels, _)| *kernels.sizes());
        let (mut segments, mut observed) = (Vec::new(), Vec::new());
        for p in &placed {
            let attends = !p.new.q.is_empty();
            let own = if attends { p.observed.as_slice() } else { &[] };
            let (scores, queries) = eviction::observations(sizes.as_ref(), &self.config.shape, own, p.row_lo, p.n_rows);
            observed.extend(queries);
            segments.push(Segment {
                table: &self.caches.tables[&p.new.sequence],
                row_lo: p.row_lo,
                n_rows: p.n_rows,
                first_index: p.first_index,
                decode: p.new.decode,
                attend_below: if attends { u32::MAX } else { 0 },
                scores,
            });
        }
        let mut plan = AttentionPlan::new(&self.config.shape, self.config.num_layers, &segments);
        plan.observe(&observed);
        self.kernels.check(&plan)?;
        let mut words = Vec::new();
        let theta = self.config.parameters.first().map_or(0.0, |head| head.rope_theta);
        let lists = ListOffsets::write(&plan, &self.config.shape, theta, &mut words);
        self.uploader.upload(device, bytemuck::cast_slice(&words), &self.step, 0)?;
        let fresh = self.caches.take_fresh();
        for layer in 0..self.config.num_layers {
            self.run_layer(layer, &plan, &lists, &placed, if layer == 0 { &fresh } else { &[] })?;
            self.read_layer(layer, &placed, n_rows, out)?;
        }
        for table in self.caches.tables.values_mut() {
            table.retire();
        }
        Ok(())
    }

    /// Uploads the rows of one layer and runs its kernels.
    fn run_layer(
        &mut self,
        layer: u32,
        plan: &AttentionPlan,
        lists: &ListOffsets,
        placed: &[Placed<'_>],
        fresh: &[u32],
    ) -> Result<(), EngineError> {
        let heads = self.config.shape.heads;
        let (q_width, kv_width) = (heads.q_width() as usize, heads.kv_width() as usize);
        let mut qkv: Vec<f32> = Vec::new();
        for p in placed {
            for r in (layer * p.rows + p.done..).take(p.n_rows as usize).map(|r| r as usize) {
                match p.new.q.get(r * q_width..(r + 1) * q_width) {
                    Some(q) => qkv.extend_from_slice(q),
                    None => qkv.resize(qkv.len() + q_width, 0.0),
                }
                qkv.extend_from_slice(&p.new.k[r * kv_width..(r + 1) * kv_width]);
                qkv.extend_from_slice(&p.new.v[r * kv_width..(r + 1) * kv_width]);
            }
        }
        self.uploader.upload(self.device, bytemuck::cast_slice(&qkv), &self.qkv, 0)?;
        let mut encoder = self.device.raw.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        if let Some((kernels, _)) = &self.evictions {
            fresh.iter().for_each(|slot| kernels.clear(&mut encoder, *slot));
        }
        let pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        let mut recorder = Recorder::new(pass);
        if let Some((kernels, _)) = &self.evictions {
            let n_items = u32::try_from(plan.moments.len()).expect("a few segments");
            kernels.record_moments(&mut recorder, lists.moments, n_items, layer);
        }
        self.kernels.record(&mut recorder, plan, lists, layer, Turning::default());
        if let Some((kernels, _)) = &self.evictions {
            kernels.record_scores(&mut recorder, plan, lists, layer);
        }
        drop(recorder);
        self.device.submit(encoder)?;
        Ok(())
    }

    /// Copies one layer's outputs to their rows.
    fn read_layer(
        &self,
        layer: u32,
        placed: &[Placed<'_>],
        n_rows: usize,
        out: &mut AttentionOutput,
    ) -> Result<(), EngineError> {
        let heads = self.config.shape.heads;
        let (q_width, n_heads) = (heads.q_width() as usize, heads.num_qo_heads as usize);
        let read = |buffer: &wgpu::Buffer, values: usize| -> Result<Vec<f32>, DeviceError> {
            Ok(bytemuck::pod_collect_to_vec(&download(self.device, buffer, 0, values * 4)?))
        };
        let n = placed.iter().map(|p| p.n_rows as usize).sum::<usize>();
        let (o, lse) = (read(&self.output, n * q_width)?, read(&self.kernels.lse, n * n_heads)?);
        let first = layer as usize * n_rows;
        for p in placed {
            let copy = |from: &[f32], to: &mut [f32], width: usize| {
                let (at, lo, n) =
                    ((first + p.to as usize) * width, p.row_lo as usize * width, p.n_rows as usize * width);
                to[at..at + n].copy_from_slice(&from[lo..lo + n]);
            };
            copy(&o, &mut out.o, q_width);
            copy(&lse, &mut out.lse, n_heads);
        }
        Ok(())
    }
}

/// Rows of a call that are still to be computed.
#[derive(Clone, Copy)]
struct Piece<'a> {
    new: NewRows<'a>,
    /// First row in the output.
    row: u32,
    done: u32,
    left: u32,
    /// Rows in all.
    rows: u32,
}

/// Rows of one submission.
struct Placed<'a> {
    new: NewRows<'a>,
    row_lo: u32,
    n_rows: u32,
    first_index: u32,
    /// First row in the output.
    to: u32,
    /// First row of its segment, and the segment's rows.
    done: u32,
    rows: u32,
    observed: Option<Observed>,
}

fn unknown(sequence: SequenceId) -> EngineError {
    EngineError::Input(format!("sequence {} does not exist", sequence.0))
}

/// Sizes that follow from the pages in use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PageSizes {
    /// Bytes of a slab: 16 of the largest pages, so that a slab's bookkeeping is small beside it, yet even a small budget
    /// has many.
    pub(crate) slab: Bytes,
    pub(crate) smallest: Bytes,
    pub(crate) largest: Bytes,
}

pub(crate) fn page_sizes(shape: &CacheShape, codecs: &[HiddenCodec]) -> PageSizes {
    let open = HiddenCodec::F16.page_bytes(shape.page());
    let pages = codecs.iter().map(|codec| codec.page_bytes(shape.page()));
    let (smallest, largest) = pages.fold((open, open), |(low, high), page| (low.min(page), high.max(page)));
    PageSizes { slab: Bytes(largest.0 * 16), smallest, largest }
}
