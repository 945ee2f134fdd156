//! Attention over a paged cache, without a model: append keys and values, decode and prefill, one layer.

use std::collections::BTreeMap;

use super::EngineError;
use crate::compression::hidden::{HeadParameters, HiddenCodec};
use crate::device::staging::{Uploader, download};
use crate::device::{Device, DeviceError};
use crate::geometry::{Bytes, CELL_BYTES, WORD_BYTES};
use crate::kernels::attention::CacheShape;
use crate::kernels::executor::{AttentionKernels, AttentionSizes, ListOffsets, RowBuffers};
use crate::kernels::parameters::ParameterSource;
use crate::kernels::plan::{AttentionPlan, Segment};
use crate::kernels::{PipelineCache, Recorder};
use crate::pool::device::PoolBuffers;
use crate::pool::page_table::{PageTable, Sealing, TableRanges, TableShape, Window};
use crate::pool::{PageId, PagePool, PoolLayout, PoolReport};
use crate::schedule::Caches;

/// How large a [`PagedAttention`] is.
#[derive(Clone, Debug)]
pub struct PagedAttentionConfig {
    /// The cache.
    pub shape: CacheShape,
    /// Codecs besides f16 that sequences may have; each costs its kernels.
    pub codecs: Vec<HiddenCodec>,
    /// What codecs take from a model, per KV head; none where no codec needs it.
    pub parameters: Vec<HeadParameters>,
    /// Longest sequence, in tokens; counts only where keys become latents.
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
    /// A cache of f16 pages alone.
    pub fn new(shape: CacheShape, budget: Bytes, max_rows: u32, max_states: u32) -> Self {
        let (codecs, parameters) = (Vec::new(), Vec::new());
        Self { shape, codecs, parameters, context_length: 0, budget, max_rows, max_states, max_arena: None }
    }
}

/// A sequence in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SequenceId(u32);

/// New tokens of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct NewRows<'a> {
    /// The sequence.
    pub sequence: SequenceId,
    /// Queries `[rows][num_qo_heads][head_dim]`; empty to append without attending.
    pub q: &'a [f32],
    /// Keys `[rows][num_kv_heads][head_dim]`.
    pub k: &'a [f32],
    /// Values `[rows][num_kv_heads][head_dim]`.
    pub v: &'a [f32],
    /// Use the decode kernel (one row) rather than prefill.
    pub decode: bool,
}

/// The result of a call, rows in the order given.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionOutput {
    /// `[rows][num_qo_heads][head_dim]`.
    pub o: Vec<f32>,
    /// Base-2 log-sum-exp `[rows][num_qo_heads]`.
    pub lse: Vec<f32>,
}

/// A paged cache of one layer and the kernels over it.
#[derive(Debug)]
pub struct PagedAttention<'d> {
    device: &'d Device,
    config: PagedAttentionConfig,
    pool: PagePool,
    ranges: TableRanges,
    window: Window,
    full: TableShape,
    sequences: BTreeMap<SequenceId, PageTable>,
    next_id: u32,
    buffers: PoolBuffers,
    kernels: AttentionKernels,
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
            vec![HeadParameters::default(); heads.num_kv_heads as usize]
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
            num_lists: heads.num_kv_heads,
            context_length: config.context_length,
        };
        let pages = page_sizes(&config.shape, &config.codecs);
        let seals = config.codecs.iter().any(HiddenCodec::seals);
        let window = Window::new(config.shape.page(), heads.num_kv_heads, config.max_rows, seals);
        let max_binding = device.max_binding();
        let scratch = qkv_bytes + output_bytes + sizes.scratch_bytes(&config.shape) + Self::STEP;
        let layout = PoolLayout {
            budget: config.budget,
            staging: Bytes(Self::STAGING.0 * 2),
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
            output: &output,
        };
        let kernels = AttentionKernels::new(device, cache, config.shape, &buffers, &step, &row_buffers, &sizes)?;
        let mut uploader = Uploader::new(device, "staging", Self::STAGING)?;
        let source = ParameterSource { heads: &parameters, context_length: config.context_length };
        kernels.set_parameters(device, &mut uploader, &source)?;
        let full = TableShape {
            num_layers: 1,
            num_kv_heads: heads.num_kv_heads,
            page: config.shape.page(),
            codec: HiddenCodec::F16,
            sealing: Sealing::WhenFull,
        };
        let Caches { pool, ranges, window, .. } = Caches::new(pool, full, window, config.codecs.clone());
        buffers.write_window(device, &mut uploader, &window)?;
        let sequences = BTreeMap::new();
        Ok(Self {
            device,
            config,
            pool,
            ranges,
            window,
            full,
            sequences,
            next_id: 0,
            buffers,
            kernels,
            step,
            qkv,
            output,
            uploader,
        })
    }

    /// Makes every byte that no one has written yet a NaN, so that reading one shows.
    ///
    /// # Errors
    /// [`EngineError::Device`].
    pub fn poison(&mut self) -> Result<(), EngineError> {
        for buffer in self.buffers.with_window().chain([&self.qkv, &self.output, &self.kernels.lse]) {
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
        if codec.seals() && !self.config.codecs.contains(&codec) {
            let known = self.config.codecs.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            return Err(EngineError::Input(format!("this cache was made for f16 and [{known}], not for {codec}")));
        }
        let shape = TableShape { codec, ..self.full };
        let table = PageTable::admit(&mut self.pool, &mut self.ranges, shape, max_tokens)?;
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        self.sequences.insert(id, table);
        Ok(id)
    }

    /// Ends a sequence; every byte of it returns to the pool.
    ///
    /// # Errors
    /// [`EngineError::Input`] for an unknown sequence.
    pub fn release(&mut self, sequence: SequenceId) -> Result<(), EngineError> {
        let table = self.sequences.remove(&sequence).ok_or_else(|| unknown(sequence))?;
        Ok(table.release(&mut self.pool, &mut self.ranges)?)
    }

    /// What the pool holds.
    pub fn report(&self) -> PoolReport {
        self.pool.report()
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
            pieces.push(Piece { new: *new, row: n_rows, done: 0, left: n });
            n_rows += n;
        }
        if n_rows > self.config.max_rows {
            let max = self.config.max_rows;
            return Err(EngineError::Input(format!("{n_rows} rows in one call; this cache was made for {max}")));
        }
        let (q_width, n_heads) = (heads.q_width() as usize, heads.num_qo_heads as usize);
        let n = n_rows as usize;
        let mut out = AttentionOutput { o: vec![0.0; n * q_width], lse: vec![0.0; n * n_heads] };
        while pieces.iter().any(|piece| piece.left > 0) {
            self.submit(&mut pieces, &mut out)?;
        }
        Ok(out)
    }

    /// Rows of a segment, whose slices fit together.
    fn count_rows(&self, new: &NewRows<'_>) -> Result<u32, EngineError> {
        let heads = self.config.shape.heads;
        let (q_width, kv_width) = (heads.q_width() as usize, heads.kv_width() as usize);
        if !self.sequences.contains_key(&new.sequence) {
            return Err(unknown(new.sequence));
        }
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

    /// One submission: of every piece as many rows as its sequence allows.
    fn submit(&mut self, pieces: &mut [Piece<'_>], out: &mut AttentionOutput) -> Result<(), EngineError> {
        let heads = self.config.shape.heads;
        let (q_width, kv_width) = (heads.q_width() as usize, heads.kv_width() as usize);
        let device = self.device;
        let mut qkv: Vec<f32> = Vec::new();
        let mut placed = Vec::new();
        let mut n_rows = 0;
        self.window.clear();
        for piece in pieces.iter_mut().filter(|piece| piece.left > 0) {
            let table = self.sequences.get_mut(&piece.new.sequence).ok_or_else(|| unknown(piece.new.sequence))?;
            let first_index = table.n_tokens();
            let n = table.shape().cut(first_index, piece.left);
            table.grow(&mut self.pool, &mut self.window, n)?;
            let Piece { new, row, done, .. } = *piece;
            for r in (done..done + n).map(|r| r as usize) {
                match new.q.get(r * q_width..(r + 1) * q_width) {
                    Some(q) => qkv.extend_from_slice(q),
                    None => qkv.resize(qkv.len() + q_width, 0.0),
                }
                qkv.extend_from_slice(&new.k[r * kv_width..(r + 1) * kv_width]);
                qkv.extend_from_slice(&new.v[r * kv_width..(r + 1) * kv_width]);
            }
            placed.push(Placed { new, row_lo: n_rows, n_rows: n, first_index, to: row + done });
            n_rows += n;
            piece.done += n;
            piece.left -= n;
        }
        for table in self.sequences.values_mut().filter(|t| t.is_dirty()) {
            let mut entries = Vec::new();
            let region = table.write_region(&mut entries);
            let bytes = bytemuck::cast_slice(&entries);
            self.uploader.upload(device, bytes, &self.buffers.tables, u64::from(region) * WORD_BYTES)?;
        }
        let segment = |p: &Placed<'_>| Segment {
            table: &self.sequences[&p.new.sequence],
            row_lo: p.row_lo,
            n_rows: p.n_rows,
            first_index: p.first_index,
            decode: p.new.decode,
            attend: !p.new.q.is_empty(),
        };
        let segments: Vec<_> = placed.iter().map(segment).collect();
        let plan = AttentionPlan::new(&self.config.shape, 1, &segments);
        self.kernels.check(&plan)?;
        let mut words = Vec::new();
        let theta = self.config.parameters.first().map_or(0.0, |head| head.rope_theta);
        let lists = ListOffsets::write(&plan, &self.config.shape, theta, &mut words);
        self.uploader.upload(device, bytemuck::cast_slice(&words), &self.step, 0)?;
        self.uploader.upload(device, bytemuck::cast_slice(&qkv), &self.qkv, 0)?;
        let mut encoder = device.raw.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        let mut recorder = Recorder::new(pass);
        self.kernels.record(&mut recorder, &plan, &lists, 0);
        drop(recorder);
        device.queue.submit([encoder.finish()]);
        let read = |buffer: &wgpu::Buffer, values: usize| -> Result<Vec<f32>, DeviceError> {
            Ok(bytemuck::pod_collect_to_vec(&download(device, buffer, 0, values * 4)?))
        };
        let (n, n_heads) = (n_rows as usize, heads.num_qo_heads as usize);
        let (o, lse) = (read(&self.output, n * q_width)?, read(&self.kernels.lse, n * n_heads)?);
        for p in &placed {
            let copy = |from: &[f32], to: &mut [f32], width: usize| {
                let (at, lo, n) = (p.to as usize * width, p.row_lo as usize * width, p.n_rows as usize * width);
                to[at..at + n].copy_from_slice(&from[lo..lo + n]);
            };
            copy(&o, &mut out.o, q_width);
            copy(&lse, &mut out.lse, n_heads);
        }
        for table in self.sequences.values_mut() {
            table.retire(&mut self.pool)?;
        }
        Ok(())
    }

    /// The pages of one KV head of a sequence as the device holds them, in order: sealed ones, then open ones; for tests.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn pages(&self, sequence: SequenceId, kv_head: u32) -> Result<DevicePages, EngineError> {
        let table = self.sequences.get(&sequence).ok_or_else(|| unknown(sequence))?;
        let read = |pages: &[PageId], page: Bytes| -> Result<Vec<Vec<u32>>, DeviceError> {
            let bytes = usize::try_from(page.0).expect("a page fits in the address space");
            let one = |id: &PageId| {
                let arena = &self.buffers.arenas[usize::from(id.arena)];
                download(self.device, arena, u64::from(id.cell) * CELL_BYTES, bytes)
            };
            pages.iter().map(|id| Ok(bytemuck::pod_collect_to_vec(&one(id)?))).collect()
        };
        let (sealed, open) = table.list(0, kv_head);
        let (sealed_page, open_page) = (table.shape().sealed_page(), table.shape().open_page());
        Ok(DevicePages { sealed: read(sealed, sealed_page)?, open: read(open, open_page)? })
    }
}

impl PagedAttention<'_> {
    /// Turns over one bit of a sealed page of a sequence's first KV head, for tests of what finds it.
    ///
    /// # Errors
    /// [`EngineError`].
    ///
    /// # Panics
    /// When there is no such page or word.
    pub fn flip(&mut self, sequence: SequenceId, page: usize, word: u32, bit: u32) -> Result<(), EngineError> {
        let sealed = self.pages(sequence, 0)?.sealed;
        let turned = sealed[page][word as usize] ^ (1 << bit);
        let id = self.sequences[&sequence].list(0, 0).0[page];
        let arena = &self.buffers.arenas[usize::from(id.arena)];
        let at = u64::from(id.cell) * CELL_BYTES + u64::from(word) * WORD_BYTES;
        Ok(self.uploader.upload(self.device, &turned.to_le_bytes(), arena, at)?)
    }
}

/// Words of a list's pages as the device holds them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DevicePages {
    /// Sealed pages, in order.
    pub sealed: Vec<Vec<u32>>,
    /// Open pages, in order.
    pub open: Vec<Vec<u32>>,
}

/// Rows of a call that are still to be computed.
#[derive(Clone, Copy)]
struct Piece<'a> {
    new: NewRows<'a>,
    /// First row in the output.
    row: u32,
    done: u32,
    left: u32,
}

/// Rows of one submission.
struct Placed<'a> {
    new: NewRows<'a>,
    row_lo: u32,
    n_rows: u32,
    first_index: u32,
    /// First row in the output.
    to: u32,
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
}

pub(crate) fn page_sizes(shape: &CacheShape, codecs: &[HiddenCodec]) -> PageSizes {
    let open = HiddenCodec::F16.page_bytes(shape.page());
    let pages = codecs.iter().map(|codec| codec.page_bytes(shape.page()));
    let (smallest, largest) = pages.fold((open, open), |(low, high), page| (low.min(page), high.max(page)));
    PageSizes { slab: Bytes(largest.0 * 16), smallest }
}
