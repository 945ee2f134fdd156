//! A paged cache of one layer, filled in no time: page tables and accounting are those of any cache, contents repeat.
//!
//! ```text
//! slab image = as many pages of one kind as a slab holds, page j with contents j % DISTINCT
//! arenas     = copies of these images, one for each slab that the tables use
//! ```
//!
//! So a page's contents follow from the cell where it begins, whoever names it, and the reference knows what was read although
//! nothing is read back.

use std::collections::BTreeSet;
use std::sync::Arc;

use half::f16;
use rand::seq::SliceRandom as _;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::outputs::filled;
use super::{BenchSettings, Work};
use crate::compression::hidden::{HeadParameters, HiddenCodec, PageContext};
use crate::device::Device;
use crate::device::staging::Uploader;
use crate::engine::EngineError;
use crate::geometry::{Bytes, CELL_BYTES, PageGeometry, WORD_BYTES};
use crate::kernels::KernelSpec;
use crate::kernels::attention::{CacheShape, Format};
use crate::kernels::pipeline::{Pipeline, PipelineCache};
use crate::pool::device::PoolBuffers;
use crate::pool::page_table::{Capacity, Layers, PageTable, Run, TableRanges, TableShape, Window};
use crate::pool::{PagePool, PoolLayout};

/// Pages of different contents, of each kind.
const DISTINCT: u32 = 64;
/// Slabs that are copied in one submission.
const COPIES: usize = 512;

/// What a cache holds.
#[derive(Clone, Debug, PartialEq)]
pub struct CacheSpec {
    /// Heads and pages.
    pub shape: CacheShape,
    /// How full pages are encoded; one that needs nothing of a model.
    pub codec: HiddenCodec,
    /// Tokens of each sequence, its decode row's own included.
    pub contexts: Vec<u32>,
}

impl CacheSpec {
    /// A kernel for pages of the cache's codec, and one for its open pages.
    pub(super) fn compiled(
        &self,
        device: &Device,
        pipelines: &mut PipelineCache,
        kernel: impl Fn(&Format) -> KernelSpec,
    ) -> Result<Vec<(HiddenCodec, Arc<Pipeline>)>, EngineError> {
        let open = (self.codec != HiddenCodec::F16).then_some(HiddenCodec::F16);
        let mut compile = |codec| Ok((codec, pipelines.get(device, &kernel(&self.shape.format(codec)))?));
        std::iter::once(self.codec).chain(open).map(&mut compile).collect()
    }
}

/// Pages of one codec.
#[derive(Debug)]
struct Kind {
    codec: HiddenCodec,
    page_cells: u32,
    /// Keys and values of each distinct page as attention reads them, `[page_size][head_dim]`.
    decoded: Vec<(Vec<f32>, Vec<f32>)>,
}

/// Sequences on a device, several times over.
#[derive(Debug)]
pub(super) struct BenchCache {
    spec: CacheSpec,
    pub(super) buffers: PoolBuffers,
    /// `[copy][sequence]`.
    pub(super) copies: Vec<Vec<PageTable>>,
    /// What the table buffer holds.
    pub(super) entries: Vec<u32>,
    kinds: Vec<Kind>,
    slab_cells: u32,
}

impl CacheSpec {
    /// Tokens of all sequences.
    pub fn tokens(&self) -> u64 {
        self.contexts.iter().map(|n| u64::from(*n)).sum()
    }

    fn table_shape(&self) -> TableShape {
        let num_kv_heads = self.shape.heads.num_kv_heads;
        TableShape { num_layers: 1, num_kv_heads, page: self.shape.page(), codec: self.codec, quest: None }
    }

    /// Bytes of pages of one copy.
    fn bytes(&self) -> Bytes {
        let shape = self.table_shape();
        self.contexts.iter().map(|n| shape.bytes_for(*n)).sum()
    }

    /// How often it is there, so that runs which take turns read no fewer than `cold` bytes.
    fn copies(&self, cold: Bytes) -> u64 {
        cold.0.div_ceil(self.bytes().0.max(1)).max(1)
    }

    /// Bytes of a slab: of either kind of page at least as many as there are contents.
    fn slab(&self) -> Bytes {
        let page = self.shape.page();
        let largest = HiddenCodec::F16.page_bytes(page).max(self.codec.page_bytes(page));
        Bytes(largest.0 * u64::from(DISTINCT))
    }

    /// A pool of exactly the slabs that `copies` copies need.
    fn layout(&self, device: &Device, copies: u64, max_arena: Option<Bytes>) -> PoolLayout {
        let (shape, slab) = (self.table_shape(), self.slab());
        let lists = u64::from(shape.num_lists()) * copies;
        let pages = self.contexts.iter().map(|n| shape.pages_of_list(*n));
        let (open, sealed) = pages.fold((0, 0), |(a, b), (o, s)| (a + u64::from(o) * lists, b + u64::from(s) * lists));
        let slabs = |pages: u64, page: Bytes| pages.div_ceil(slab.0 / page.0);
        let n_slabs = slabs(open, shape.open_page()) + slabs(sealed, shape.sealed_page());
        let smallest_page = shape.open_page().min(shape.sealed_page());
        let tables = slab.0.div_ceil(smallest_page.0) * PoolLayout::ENTRIES_PER_PAGE * WORD_BYTES;
        let limit = device.max_binding();
        PoolLayout {
            // What rounds up at the end of the tables is less than a KiB.
            budget: Bytes(n_slabs * (slab.0 + tables) + (1 << 10)),
            staging: Bytes::ZERO,
            scratch: Bytes::ZERO,
            max_binding: max_arena.map_or(limit, |arena| arena.min(limit)),
            slab,
            smallest_page,
            fixed_entries: 0,
        }
    }
}

impl BenchCache {
    pub(super) fn new(device: &Device, spec: &CacheSpec, settings: &BenchSettings) -> Result<Self, EngineError> {
        spec.shape.heads.check().map_err(EngineError::Input)?;
        spec.codec.check(spec.shape.page()).map_err(EngineError::Input)?;
        let n_copies = spec.copies(settings.cold);
        let layout = spec.layout(device, n_copies, settings.max_arena);
        let mut pool = PagePool::new(&layout)?;
        // Pages fill one by one, so none passes through the window.
        let mut window = Window::new(spec.shape.page(), spec.shape.heads.num_kv_heads, 1, false);
        let buffers = PoolBuffers::new(device, &pool, &window)?;
        let n_entries = u32::try_from(pool.tables().0 / WORD_BYTES).expect("table entries are counted in 32 bits");
        let mut ranges = TableRanges::new(n_entries);
        let mut entries = vec![0; n_entries as usize];
        let mut copies = Vec::new();
        for _ in 0..n_copies {
            let tables = spec.contexts.iter().map(|n| {
                let mut table =
                    PageTable::admit(&mut pool, &mut ranges, spec.table_shape(), &Layers::OWN, Capacity::tokens(*n))?;
                grow(&mut table, &mut pool, &mut window, *n)?;
                let mut region = Vec::new();
                let at = table.write_region(&mut region) as usize;
                entries[at..at + region.len()].copy_from_slice(&region);
                Ok(table)
            });
            copies.push(tables.collect::<Result<Vec<_>, EngineError>>()?);
        }
        let mut rng = ChaCha8Rng::seed_from_u64(11);
        let slab_cells = u32::try_from(layout.slab.0 / CELL_BYTES).expect("a slab has fewer than 2^32 cells");
        let (spec, kinds) = (spec.clone(), Vec::new());
        let mut cache = Self { spec, buffers, copies, entries, kinds, slab_cells };
        if !settings.in_order {
            cache.shuffle(&mut rng);
        }
        Uploader::new(device, "page tables", Bytes::mib(4))?.upload(
            device,
            bytemuck::cast_slice(&cache.entries),
            &cache.buffers.tables,
            0,
        )?;
        cache.fill(device, &mut rng)?;
        Ok(cache)
    }

    /// What a decode row reads of one KV head, in order.
    pub(super) fn runs(&self, copy: usize, sequence: usize, kv_head: u32) -> impl Iterator<Item = Run> + '_ {
        let table = &self.copies[copy][sequence];
        table.seen_runs(0, kv_head, self.spec.contexts[sequence] - 1).into_iter()
    }

    fn all_runs(&self) -> impl Iterator<Item = Run> + '_ {
        let sequences = (0..self.copies.len()).flat_map(|c| (0..self.spec.contexts.len()).map(move |s| (c, s)));
        let heads = self.spec.shape.heads.num_kv_heads;
        sequences.flat_map(move |(c, s)| (0..heads).flat_map(move |h| self.runs(c, s, h)))
    }

    /// Table entries of a run.
    fn pages(&self, run: &Run) -> std::ops::Range<usize> {
        let first = run.entry as usize;
        first..first + run.n_tokens.div_ceil(self.spec.shape.page_size) as usize
    }

    /// Exchanges pages of one kind in one arena, so that those that follow each other in a list lie anywhere.
    fn shuffle(&mut self, rng: &mut ChaCha8Rng) {
        let mut places: Vec<((HiddenCodec, u16), usize)> = Vec::new();
        for run in self.all_runs() {
            places.extend(self.pages(&run).map(|entry| ((run.codec, run.arena), entry)));
        }
        places.sort_unstable();
        for alike in places.chunk_by(|a, b| a.0 == b.0) {
            let mut cells: Vec<u32> = alike.iter().map(|(_, entry)| self.entries[*entry]).collect();
            cells.shuffle(rng);
            alike.iter().zip(cells).for_each(|((_, entry), cell)| self.entries[*entry] = cell);
        }
    }

    /// Writes every slab that the tables use.
    fn fill(&mut self, device: &Device, rng: &mut ChaCha8Rng) -> Result<(), EngineError> {
        let mut slabs: BTreeSet<(HiddenCodec, u16, u32)> = BTreeSet::new();
        for run in self.all_runs() {
            slabs.extend(self.pages(&run).map(|e| (run.codec, run.arena, self.entries[e] / self.slab_cells)));
        }
        let slabs: Vec<_> = slabs.into_iter().collect();
        for alike in slabs.chunk_by(|a, b| a.0 == b.0) {
            let (kind, image) = Kind::new(rng, self.spec.shape.page(), alike[0].0, self.slab_cells);
            let image = filled(device, "slab image", &image)?;
            for slabs in alike.chunks(COPIES) {
                let mut encoder = device.raw.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
                for (_, arena, slab) in slabs {
                    let at = u64::from(*slab) * u64::from(self.slab_cells) * CELL_BYTES;
                    let arena = &self.buffers.arenas[usize::from(*arena)];
                    encoder.copy_buffer_to_buffer(&image, 0, arena, at, image.size());
                }
                device.submit(encoder)?;
            }
            self.kinds.push(kind);
        }
        Ok(device.wait()?)
    }

    /// Keys and values that a decode row reads of one KV head, each `[tokens][head_dim]`.
    pub(super) fn tokens(&self, copy: usize, sequence: usize, kv_head: u32) -> (Vec<f32>, Vec<f32>) {
        let (size, width) = (self.spec.shape.page_size, self.spec.shape.heads.head_dim as usize);
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for run in self.runs(copy, sequence, kv_head) {
            let kind =
                self.kinds.iter().find(|kind| kind.codec == run.codec).expect("every kind that is read was filled");
            for (page, entry) in (0..).zip(self.pages(&run)) {
                let contents = self.entries[entry] % self.slab_cells / kind.page_cells % DISTINCT;
                let (k, v) = &kind.decoded[contents as usize];
                let n = size.min(run.n_tokens - page * size) as usize * width;
                keys.extend_from_slice(&k[..n]);
                values.extend_from_slice(&v[..n]);
            }
        }
        (keys, values)
    }

    /// What reading all tokens of a copy once is: bytes of full pages, and of others the part that their tokens take.
    pub(super) fn work(&self) -> Work {
        let heads = self.spec.shape.heads;
        let page = self.spec.shape.page();
        let sequences = 0..self.spec.contexts.len();
        let runs = sequences.flat_map(|s| (0..heads.num_kv_heads).flat_map(move |h| self.runs(0, s, h)));
        let per_token = |codec: HiddenCodec| codec.page_bytes(page).0 as f64 / f64::from(page.page_size);
        let bytes = runs.map(|run| f64::from(run.n_tokens) * per_token(run.codec)).sum();
        let tokens = self.spec.tokens() as f64;
        let flop = 4.0 * tokens * f64::from(heads.q_width());
        Work { bytes, flop, pairs: Some(tokens * f64::from(heads.num_kv_heads)) }
    }

    /// Overwrites the first page of a list.
    pub(super) fn spoil(&self, device: &Device, place: (usize, usize, u32)) -> Result<(), EngineError> {
        let (copy, sequence, kv_head) = place;
        let run = self.runs(copy, sequence, kv_head).next().expect("a row reads at least its own token");
        let cell = self.entries[self.pages(&run).next().expect("a run has a page")];
        let bytes = usize::try_from(run.codec.page_bytes(self.spec.shape.page()).0).expect("a page fits in memory");
        // As f16 12.6, far from any number that the pages hold.
        let garbage = vec![0x4A_u8; bytes];
        let arena = &self.buffers.arenas[usize::from(run.arena)];
        let mut uploader = Uploader::new(device, "spoiled page", Bytes(bytes as u64))?;
        Ok(uploader.upload(device, &garbage, arena, u64::from(cell) * CELL_BYTES)?)
    }
}

/// Takes pages as rows that come one page at a time would; the last row reads its own page open.
fn grow(table: &mut PageTable, pool: &mut PagePool, window: &mut Window, n_tokens: u32) -> Result<(), EngineError> {
    let size = table.shape().page.page_size;
    while table.n_tokens() < n_tokens {
        table.retire();
        window.clear();
        table.grow(pool, window, size.min(n_tokens - table.n_tokens()))?;
    }
    Ok(())
}

impl Kind {
    /// Encodes the distinct pages; with them the words of a slab.
    fn new(rng: &mut ChaCha8Rng, page: PageGeometry, codec: HiddenCodec, slab_cells: u32) -> (Self, Vec<u32>) {
        let n = usize::try_from(page.elements()).expect("a page fits in memory");
        // Four numbers of [-1, 1] added up: nearly normal, and their root mean square is that of one from [-2, 2].
        let mut number = || f16::from_f32((0..4).map(|_| rng.random_range(-1.0_f32..1.0)).sum()).to_f32();
        let mut side = || (0..n).map(|_| number()).collect::<Vec<f32>>();
        let values: Vec<_> = (0..DISTINCT).map(|_| (side(), side())).collect();
        let parameters = HeadParameters::default();
        let context = PageContext::at(&parameters, page.page_size);
        let encode = |(k, v): &(Vec<f32>, Vec<f32>)| {
            let words = codec.encode(page, context, k, v);
            let decoded = codec.decode(page, context, &words);
            (words, decoded)
        };
        let (words, decoded): (Vec<_>, Vec<_>) = values.par_iter().map(encode).unzip();
        let page_cells = u32::try_from(codec.page_bytes(page).0 / CELL_BYTES).expect("a page is smaller than a slab");
        let pages = words.iter().cycle().take((slab_cells / page_cells) as usize);
        let image = pages.flatten().copied().collect();
        (Self { codec, page_cells, decoded }, image)
    }
}
