//! Attention over a paged cache, without a model: append keys and values, decode and prefill, one layer.

use std::collections::BTreeMap;

use super::EngineError;
use crate::device::staging::{Uploader, download};
use crate::device::{Device, DeviceError};
use crate::geometry::{Bytes, WORD_BYTES};
use crate::kernels::attention::CacheShape;
use crate::kernels::executor::{AttentionKernels, ListOffsets, RowBuffers};
use crate::kernels::plan::{AttentionPlan, Segment};
use crate::kernels::{PipelineCache, Recorder};
use crate::pool::device::PoolBuffers;
use crate::pool::page_table::{PageTable, TableRanges, TableShape};
use crate::pool::{PagePool, PoolLayout, PoolReport};

/// How large a [`PagedAttention`] is.
#[derive(Clone, Debug)]
pub struct PagedAttentionConfig {
    /// The cache.
    pub shape: CacheShape,
    /// Device bytes for pages, tables, scratch and staging.
    pub budget: Bytes,
    /// Query rows of one call at most.
    pub max_rows: u32,
    /// Attention states of one call at most: rows times query heads times runs.
    pub max_states: u32,
    /// Largest arena; the adapter's binding limit where `None`.
    pub max_arena: Option<Bytes>,
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
        let CacheShape { heads, page_size, codec } = config.shape;
        heads.check().map_err(EngineError::Input)?;
        let stride = heads.q_width() + 2 * heads.kv_width();
        let rows = u64::from(config.max_rows);
        let qkv_bytes = Bytes(rows * u64::from(stride) * WORD_BYTES);
        let output_bytes = Bytes(rows * u64::from(heads.q_width()) * WORD_BYTES);
        let states = AttentionKernels::scratch_bytes(&config.shape, config.max_states, config.max_rows);
        let page = codec.page_bytes(config.shape.page());
        debug_assert_eq!(page_size, config.shape.page().page_size, "one page size");
        let max_binding = device.max_binding();
        let layout = PoolLayout {
            budget: config.budget,
            staging: Bytes(Self::STAGING.0 * 2),
            scratch: qkv_bytes + output_bytes + states + Self::STEP,
            max_binding: config.max_arena.map_or(max_binding, |a| a.min(max_binding)),
            slab: slab_bytes(page),
            smallest_page: page,
        };
        let pool = PagePool::new(&layout)?;
        let buffers = PoolBuffers::new(device, &pool)?;
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
        let limits = (config.max_states, config.max_rows);
        let kernels = AttentionKernels::new(device, cache, config.shape, &buffers, &step, &row_buffers, limits)?;
        let ranges = TableRanges::new(table_entries(&pool));
        let uploader = Uploader::new(device, "staging", Self::STAGING)?;
        let sequences = BTreeMap::new();
        Ok(Self { device, config, pool, ranges, sequences, next_id: 0, buffers, kernels, step, qkv, output, uploader })
    }

    /// Makes every byte that no one has written yet a NaN, so that reading one shows.
    ///
    /// # Errors
    /// [`EngineError::Device`].
    pub fn poison(&mut self) -> Result<(), EngineError> {
        for buffer in self.buffers.arenas.iter().chain([&self.qkv, &self.output, &self.kernels.lse]) {
            let poison = vec![0xff_u8; usize::try_from(buffer.size()).expect("a buffer fits in the address space")];
            self.uploader.upload(self.device, &poison, buffer, 0)?;
        }
        Ok(())
    }

    /// Admits a sequence of at most `max_tokens` tokens.
    ///
    /// # Errors
    /// [`PoolError::DoesNotFit`](crate::pool::PoolError::DoesNotFit) with the numbers.
    pub fn admit(&mut self, max_tokens: u32) -> Result<SequenceId, EngineError> {
        let shape = self.config.shape;
        let table_shape = TableShape {
            num_layers: 1,
            num_kv_heads: shape.heads.num_kv_heads,
            page_size: shape.page_size,
            page: shape.codec.page_bytes(shape.page()),
        };
        let table = PageTable::admit(&mut self.pool, &mut self.ranges, table_shape, max_tokens)?;
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

    /// Appends the rows' keys and values and returns the attention of those that have queries.
    ///
    /// # Errors
    /// [`EngineError::Input`] when shapes do not fit, [`EngineError::Pool`] beyond what was admitted.
    pub fn step(&mut self, rows: &[NewRows<'_>]) -> Result<AttentionOutput, EngineError> {
        let heads = self.config.shape.heads;
        let (q_width, kv_width) = (heads.q_width() as usize, heads.kv_width() as usize);
        let mut qkv: Vec<f32> = Vec::new();
        let mut placed = Vec::new();
        let mut n_rows = 0_u32;
        for new in rows {
            let n = new.k.len() / kv_width;
            let shapes = new.k.len() == n * kv_width
                && new.v.len() == new.k.len()
                && (new.q.is_empty() || new.q.len() == n * q_width)
                && n > 0;
            if !shapes || (new.decode && n != 1) {
                let (q, k, v) = (new.q.len(), new.k.len(), new.v.len());
                return Err(EngineError::Input(format!("rows of {q} query, {k} key and {v} value numbers do not fit")));
            }
            for r in 0..n {
                match new.q.get(r * q_width..(r + 1) * q_width) {
                    Some(q) => qkv.extend_from_slice(q),
                    None => qkv.resize(qkv.len() + q_width, 0.0),
                }
                qkv.extend_from_slice(&new.k[r * kv_width..(r + 1) * kv_width]);
                qkv.extend_from_slice(&new.v[r * kv_width..(r + 1) * kv_width]);
            }
            let n = u32::try_from(n).map_err(|_| EngineError::Input("too many rows".to_owned()))?;
            let table = self.sequences.get_mut(&new.sequence).ok_or_else(|| unknown(new.sequence))?;
            let first_index = table.n_tokens();
            table.grow(&mut self.pool, n)?;
            placed.push((new, n_rows, n, first_index));
            n_rows += n;
        }
        if n_rows > self.config.max_rows {
            let max = self.config.max_rows;
            return Err(EngineError::Input(format!("{n_rows} rows in one call; this cache was made for {max}")));
        }
        let device = self.device;
        for table in self.sequences.values_mut().filter(|t| t.is_dirty()) {
            let mut entries = Vec::new();
            let region = table.write_region(&mut entries);
            let bytes = bytemuck::cast_slice(&entries);
            self.uploader.upload(device, bytes, &self.buffers.tables, u64::from(region) * WORD_BYTES)?;
        }
        let segments: Vec<_> = placed
            .iter()
            .map(|&(new, row_lo, n_rows, first_index)| Segment {
                table: &self.sequences[&new.sequence],
                row_lo,
                n_rows,
                first_index,
                decode: new.decode,
                attend: !new.q.is_empty(),
            })
            .collect();
        let plan = AttentionPlan::new(self.kernels.prefill_spec(), 1, &segments);
        self.kernels.check(&plan)?;
        let mut words = Vec::new();
        let lists = ListOffsets::write(&plan, &mut words);
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
        let n = n_rows as usize;
        let o = read(&self.output, n * q_width)?;
        Ok(AttentionOutput { o, lse: read(&self.kernels.lse, n * heads.num_qo_heads as usize)? })
    }

    /// The pages of one KV head of a sequence as the device holds them, in order; for tests.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn pages(&self, sequence: SequenceId, kv_head: u32) -> Result<Vec<Vec<u8>>, EngineError> {
        let table = self.sequences.get(&sequence).ok_or_else(|| unknown(sequence))?;
        let shape = self.config.shape;
        let bytes = usize::try_from(shape.codec.page_bytes(shape.page()).0).expect("a page fits in the address space");
        let read = |page: &crate::pool::PageId| {
            let arena = &self.buffers.arenas[usize::from(page.arena)];
            download(self.device, arena, u64::from(page.cell) * 16, bytes)
        };
        Ok(table.list(0, kv_head).iter().map(read).collect::<Result<_, _>>()?)
    }
}

fn unknown(sequence: SequenceId) -> EngineError {
    EngineError::Input(format!("sequence {} does not exist", sequence.0))
}

/// Bytes of a slab: 16 pages, so that a slab's bookkeeping is small beside it, yet even a small budget has many.
pub(crate) const fn slab_bytes(page: Bytes) -> Bytes {
    Bytes(page.0 * 16)
}

/// Entries of the table buffer.
pub(crate) fn table_entries(pool: &PagePool) -> u32 {
    u32::try_from(pool.tables().0 / WORD_BYTES).expect("table entries are counted in 32 bits")
}
