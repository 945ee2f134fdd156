//! Append, seal, decode, prefill and merge over ragged batches of awkward lengths: pages bit by bit against the codecs'
//! definition, attention against dense f64 attention over the *decoded* cache.

use half::f16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::{Check, Extent};
use crate::compression::hidden::{HeadParameters, HiddenCodec, PageContext, lowrank};
use crate::device::Device;
use crate::engine::EngineError;
use crate::engine::bench::tolerance;
use crate::engine::paged_attention::{DevicePages, NewRows, PagedAttention, PagedAttentionConfig, SequenceId};
use crate::geometry::Bytes;
use crate::kernels::PipelineCache;
use crate::kernels::attention::CacheShape;
use crate::kernels::prefill::PrefillSpec;
use crate::kernels::registry::{self, DEFAULT_PAGE_SIZE, cache_shapes};
use crate::kernels::tuning::Operands;
use crate::reference::attention::{Context, Row, attend};
use crate::reference::compare::nmse;

/// Rows of the prefill check.
const PREFILL_ROWS: u32 = 33;

/// A ragged batch: one codec per sequence, and the context that it has before the checked rows.
#[derive(Clone, Debug)]
pub struct Batch {
    /// The cache.
    pub shape: CacheShape,
    /// Codec and context of each sequence.
    pub sequences: Vec<(HiddenCodec, u32)>,
    /// Largest arena, to force several.
    pub max_arena: Option<Bytes>,
    /// A defect put in on purpose, which the checks must find.
    pub flip: Option<Flip>,
}

/// One bit of a sealed page of a sequence's first KV head, turned over on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flip {
    /// Sequence, by its place in the batch.
    pub sequence: usize,
    /// Sealed page.
    pub page: usize,
    /// Word of the page.
    pub word: u32,
    /// Bit of the word.
    pub bit: u32,
}

impl Batch {
    /// Sequences of the given contexts, all with one codec.
    pub fn uniform(shape: CacheShape, codec: HiddenCodec, lengths: &[u32]) -> Self {
        Self { shape, sequences: lengths.iter().map(|n| (codec, *n)).collect(), max_arena: None, flip: None }
    }

    fn codecs(&self) -> Vec<HiddenCodec> {
        let mut codecs: Vec<_> = self.sequences.iter().map(|(codec, _)| *codec).collect();
        codecs.sort_unstable();
        codecs.dedup();
        codecs
    }
}

/// Page sizes at which every codec of the registry is covered: groups of 128 tokens need pages of 128.
const PAGE_SIZES: [u32; 2] = [DEFAULT_PAGE_SIZE, 128];

/// Every batch of an extent: per shape one of full caches, and one in which all codecs meet. Each codec is judged by
/// itself.
pub(super) fn batches(extent: Extent) -> Vec<Batch> {
    let mut batches = Vec::new();
    for shape in cache_shapes(&PAGE_SIZES) {
        let (width, group) = (shape.heads.head_dim, shape.heads.group_size());
        let quick = (width, group) == (64, 3) || (width, group) == (128, 4);
        if extent == Extent::Quick && !quick {
            continue;
        }
        let page = shape.page_size;
        let small = page == DEFAULT_PAGE_SIZE;
        if small {
            let long = if extent == Extent::Full { 4097 } else { 700 };
            batches.push(Batch::uniform(shape, HiddenCodec::F16, &[1, page - 1, page, page + 1, long, 97]));
        }
        let needs_large = |codec: &HiddenCodec| codec.check(CacheShape { page_size: 64, ..shape }.page()).is_err();
        let codecs = registry::codecs(shape.page()).into_iter().filter(|codec| codec.seals());
        let codecs: Vec<_> = codecs.filter(|codec| small || needs_large(codec)).collect();
        // Page edges in turn, and contexts from one page to ten, the longest of which are split.
        let edges = [page, page - 1, page + 1, 1, 97];
        let short = codecs.iter().zip(edges.iter().cycle()).map(|(codec, n)| (*codec, *n));
        let steps = (0..).map(|i| page + 1 + i * 9 * page / 20);
        let long = codecs.iter().zip(steps).map(|(codec, n)| (*codec, n));
        batches.push(Batch { shape, sequences: short.chain(long).collect(), max_arena: None, flip: None });
    }
    batches
}

pub(super) fn count(extent: Extent) -> usize {
    batches(extent).iter().map(checks_of).sum()
}

/// For each codec append, decode and prefill, and sealing where its pages are sealed.
fn checks_of(batch: &Batch) -> usize {
    batch.codecs().iter().map(|codec| 3 + usize::from(codec.seals())).sum()
}

pub(super) fn run(device: &Device, extent: Extent, each: &mut dyn FnMut(Check)) -> Result<(), EngineError> {
    // Kernels are not shared between shapes, so none needs to be kept longer than its batch.
    for batch in batches(extent) {
        check_batch(device, &mut PipelineCache::default(), &batch)?.into_iter().for_each(&mut *each);
    }
    Ok(())
}

/// One sequence with its keys and values as the cache rounds them, and what attention reads of its sealed pages.
struct Sequence {
    id: SequenceId,
    codec: HiddenCodec,
    /// What decode multiplies where it reads sealed pages.
    decoded_by: Operands,
    /// `[tokens][num_kv_heads][head_dim]`, exact in f16.
    k: Vec<f32>,
    v: Vec<f32>,
    /// The same for full pages, through the codec.
    decoded_k: Vec<f32>,
    decoded_v: Vec<f32>,
    /// Words of every sealed page, `[page][kv_head]`.
    sealed: Vec<Vec<u32>>,
}

fn random(rng: &mut ChaCha8Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-2.0_f32..2.0)).collect()
}

/// Random parameters for codecs that take any from a model.
pub fn parameters(rng: &mut ChaCha8Rng, shape: &CacheShape) -> Vec<HeadParameters> {
    let n = shape.heads.head_dim as usize;
    let mut basis = || {
        let half: Vec<f64> = (0..n * n).map(|_| rng.random_range(-1.0..1.0)).collect();
        let gram = (0..n * n).map(|i| (0..n).map(|k| half[i / n * n + k] * half[i % n * n + k]).sum()).collect();
        lowrank::eigenvectors(gram, n)
    };
    let bases: Vec<_> = (0..shape.heads.num_kv_heads).map(|_| (basis(), basis())).collect();
    let one = |(key_basis, value_basis)| HeadParameters { key_basis, value_basis, rope_theta: 10_000.0 };
    bases.into_iter().map(one).collect()
}

/// A cache for a batch, and the sequences in it without any token.
struct Setup<'d> {
    attention: PagedAttention<'d>,
    parameters: Vec<HeadParameters>,
    sequences: Vec<Sequence>,
    shape: CacheShape,
    /// What prefill multiplies: open pages are f16 in every sequence.
    prefill: Operands,
}

impl<'d> Setup<'d> {
    fn new(
        device: &'d Device,
        cache: &mut PipelineCache,
        batch: &Batch,
        rng: &mut ChaCha8Rng,
    ) -> Result<Self, EngineError> {
        let shape = batch.shape;
        let heads = shape.heads;
        // Each sequence grows by one decode row and by the prefill rows.
        let extra = 1 + PREFILL_ROWS;
        let page = |codec: HiddenCodec| codec.page_bytes(shape.page()).0 * u64::from(heads.num_kv_heads);
        let pages: u64 = batch
            .sequences
            .iter()
            .map(|(codec, n)| u64::from((n + extra).div_ceil(shape.page_size)) * page(*codec) + page(HiddenCodec::F16))
            .sum();
        let largest = batch.codecs().into_iter().chain([HiddenCodec::F16]).map(page).max().unwrap_or(0);
        let max_rows = 256.max(PREFILL_ROWS * u32::try_from(batch.sequences.len()).expect("a few sequences"));
        let max_states = max_rows * heads.num_qo_heads * 3 + 64 * heads.num_qo_heads;
        let scratch = u64::from(max_states + max_rows * 2) * u64::from(heads.head_dim + 2) * 8;
        // A slab per codec may be partly used.
        let slack = 32 * largest * (1 + batch.codecs().len() as u64);
        let with_parameters =
            batch.codecs().iter().any(|c| c.k.transform != Default::default() || c.v.transform != Default::default());
        let parameters = if with_parameters { parameters(rng, &shape) } else { Vec::new() };
        let config = PagedAttentionConfig {
            codecs: batch.codecs(),
            parameters: parameters.clone(),
            context_length: batch.sequences.iter().map(|(_, n)| n + extra).max().unwrap_or(0),
            max_arena: batch.max_arena,
            ..PagedAttentionConfig::new(
                shape,
                Bytes(pages * 2 + scratch * 2 + slack) + Bytes::mib(24),
                max_rows,
                max_states,
            )
        };
        let mut attention = PagedAttention::new(device, cache, config)?;
        attention.poison()?;
        let mut sequences = Vec::new();
        for (codec, n) in &batch.sequences {
            let id = attention.admit(*codec, n + extra)?;
            let (k, v, decoded_k, decoded_v) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
            let format = shape.format(*codec);
            let decoded_by = cache.tuning().decode(&device.summary().kind, &format).operands(&format);
            let sealed = Vec::new();
            sequences.push(Sequence { id, codec: *codec, decoded_by, k, v, decoded_k, decoded_v, sealed });
        }
        let parameters =
            if parameters.is_empty() { vec![no_parameters(); heads.num_kv_heads as usize] } else { parameters };
        let open = shape.format(HiddenCodec::F16);
        let prefill = PrefillSpec::new(open, cache.tuning().prefill(device.tier())).operands();
        Ok(Self { attention, parameters, sequences, shape, prefill })
    }

    /// Encodes on the CPU every page of a sequence that has become full.
    fn seal(&mut self, index: usize) {
        let (heads, page) = (self.shape.heads, self.shape.page());
        let sequence = &mut self.sequences[index];
        if !sequence.codec.seals() {
            return;
        }
        let (width, kv_width) = (heads.head_dim as usize, heads.kv_width() as usize);
        let page_values = page.page_size as usize * kv_width;
        while sequence.decoded_k.len() + page_values <= sequence.k.len() {
            let start = sequence.decoded_k.len();
            let number = u32::try_from(start / page_values).expect("pages are few");
            sequence.decoded_k.resize(start + page_values, 0.0);
            sequence.decoded_v.resize(start + page_values, 0.0);
            let encoded: Vec<_> = (0..heads.num_kv_heads as usize)
                .into_par_iter()
                .map(|head| {
                    let rows = |all: &[f32]| -> Vec<f32> {
                        let tokens = all[start..start + page_values].chunks_exact(kv_width);
                        tokens.flat_map(|row| row[head * width..(head + 1) * width].to_vec()).collect()
                    };
                    let context = PageContext::at(&self.parameters[head], number * page.page_size);
                    let words = sequence.codec.encode(page, context, &rows(&sequence.k), &rows(&sequence.v));
                    let (k, v) = sequence.codec.decode(page, context, &words);
                    (words, k, v)
                })
                .collect();
            for (head, (words, k, v)) in encoded.into_iter().enumerate() {
                for (decoded, all) in [(&k, &mut sequence.decoded_k), (&v, &mut sequence.decoded_v)] {
                    for (token, row) in decoded.chunks_exact(width).enumerate() {
                        let at = start + token * kv_width + head * width;
                        all[at..at + width].copy_from_slice(row);
                    }
                }
                sequence.sealed.push(words);
            }
        }
    }
}

const fn no_parameters() -> HeadParameters {
    HeadParameters { key_basis: Vec::new(), value_basis: Vec::new(), rope_theta: 0.0 }
}

/// Checks append, seal, decode and prefill over one ragged batch.
///
/// # Errors
/// [`EngineError`] when the device refuses.
pub fn check_batch(device: &Device, cache: &mut PipelineCache, batch: &Batch) -> Result<Vec<Check>, EngineError> {
    let heads = batch.shape.heads;
    let mut rng = ChaCha8Rng::seed_from_u64(u64::from(heads.head_dim * 64 + heads.num_qo_heads));
    let mut setup = Setup::new(device, cache, batch, &mut rng)?;
    let kv_width = heads.kv_width() as usize;
    for (index, (_, n)) in batch.sequences.iter().enumerate() {
        // Leaves the last token of the context to the decode row.
        let mut left = (n - 1) as usize;
        while left > 0 {
            let rows = left.min(256);
            let sequence = &mut setup.sequences[index];
            grow(&mut rng, sequence, rows, kv_width);
            let from = sequence.k.len() - rows * kv_width;
            let (k, v) = (&sequence.k[from..], &sequence.v[from..]);
            setup.attention.step(&[NewRows { sequence: sequence.id, q: &[], k, v, decode: false }])?;
            left -= rows;
        }
    }
    if let Some(Flip { sequence, page, word, bit }) = batch.flip {
        setup.attention.flip(setup.sequences[sequence].id, page, word, bit)?;
    }
    let decode = check_rows(&mut setup, &mut rng, batch, 1)?;
    let prefill = check_rows(&mut setup, &mut rng, batch, PREFILL_ROWS as usize)?;
    let mut checks = check_pages(&setup, batch)?;
    checks.extend(decode.into_iter().chain(prefill));
    Ok(checks)
}

fn grow(rng: &mut ChaCha8Rng, sequence: &mut Sequence, rows: usize, kv_width: usize) {
    let round = |x: Vec<f32>| x.into_iter().map(|x| f16::from_f32(x).to_f32());
    sequence.k.extend(round(random(rng, rows * kv_width)));
    sequence.v.extend(round(random(rng, rows * kv_width)));
}

/// Adds `rows` rows to every sequence in one step and compares their attention, codec by codec.
fn check_rows(
    setup: &mut Setup<'_>,
    rng: &mut ChaCha8Rng,
    batch: &Batch,
    rows: usize,
) -> Result<Vec<Check>, EngineError> {
    let heads = setup.shape.heads;
    let (q_width, kv_width) = (heads.q_width() as usize, heads.kv_width() as usize);
    let queries: Vec<_> = setup.sequences.iter().map(|_| random(rng, rows * q_width)).collect();
    for index in 0..setup.sequences.len() {
        grow(rng, &mut setup.sequences[index], rows, kv_width);
        setup.seal(index);
    }
    let new: Vec<_> = setup
        .sequences
        .iter()
        .zip(&queries)
        .map(|(s, q)| {
            let from = s.k.len() - rows * kv_width;
            NewRows { sequence: s.id, q, k: &s.k[from..], v: &s.v[from..], decode: rows == 1 }
        })
        .collect();
    let out = setup.attention.step(&new)?;
    let mut errors: Vec<Errors> = Vec::new();
    for (i, (sequence, q)) in setup.sequences.iter().zip(&queries).enumerate() {
        let before = sequence.k.len() / kv_width - rows;
        let expected: Vec<Row> = (0..rows)
            .into_par_iter()
            .map(|r| expected(&setup.shape, sequence, &q[r * q_width..(r + 1) * q_width], before + r))
            .collect();
        let operands = if rows == 1 { sequence.decoded_by } else { setup.prefill };
        let errors = of_codec(&mut errors, sequence.codec);
        for (r, expected) in expected.iter().enumerate() {
            let row = i * rows + r;
            let got = &out.o[row * q_width..(row + 1) * q_width];
            let tolerance = tolerance(operands)(before + r + 1, heads.head_dim, PRODUCT_RMS);
            let n = heads.num_qo_heads as usize;
            let ones: Vec<f64> = expected.lse.iter().map(|x| x.abs().max(1.0)).collect();
            let worst = tolerance.worst(got, &expected.o, &expected.absolute);
            let worst = worst.max(tolerance.worst(&out.lse[row * n..(row + 1) * n], &expected.lse, &ones));
            errors.worst = errors.worst.max(worst);
            errors.got.extend_from_slice(got);
            errors.expected.extend_from_slice(&expected.o);
        }
    }
    let kernel = if rows == 1 { "decode" } else { "prefill" };
    Ok(errors.iter().map(|errors| errors.check(kernel, batch)).collect())
}

/// What was seen of one codec.
struct Errors {
    codec: HiddenCodec,
    worst: f64,
    got: Vec<f32>,
    expected: Vec<f64>,
}

impl Errors {
    fn check(&self, kernel: &'static str, batch: &Batch) -> Check {
        Check {
            kernel,
            case: describe(batch, self.codec),
            compared: self.got.len(),
            error_over_bound: self.worst,
            nmse: Some(nmse(&self.got, &self.expected)),
        }
    }
}

fn of_codec(errors: &mut Vec<Errors>, codec: HiddenCodec) -> &mut Errors {
    let at = errors.iter().position(|errors| errors.codec == codec).unwrap_or_else(|| {
        errors.push(Errors { codec, worst: 0.0, got: Vec::new(), expected: Vec::new() });
        errors.len() - 1
    });
    &mut errors[at]
}

/// The oracle for the row at cache index `index`: pages before its own through the codec, its own in f16.
fn expected(shape: &CacheShape, sequence: &Sequence, q: &[f32], index: usize) -> Row {
    let kv_width = shape.heads.kv_width() as usize;
    let own_page = index / shape.page_size as usize * shape.page_size as usize * kv_width;
    let sealed = own_page.min(sequence.decoded_k.len());
    let mix = |decoded: &[f32], all: &[f32]| -> Vec<f32> {
        decoded[..sealed].iter().chain(&all[sealed..(index + 1) * kv_width]).copied().collect()
    };
    let (k, v) = (mix(&sequence.decoded_k, &sequence.k), mix(&sequence.decoded_v, &sequence.v));
    attend(&Context { heads: shape.heads, k: &k, v: &v }, q, index + 1)
}

/// Root mean square of the product of two numbers uniform in [-2, 2].
const PRODUCT_RMS: f64 = 4.0 / 3.0;

fn describe(batch: &Batch, codec: HiddenCodec) -> String {
    let own = batch.sequences.iter().filter(|(other, _)| *other == codec);
    let lengths: Vec<_> = own.map(|(_, n)| n.to_string()).collect();
    let (d, g, page) = (batch.shape.heads.head_dim, batch.shape.heads.group_size(), batch.shape.page_size);
    let company = match batch.codecs().len() {
        1 => String::new(),
        n => format!(" among {n} codecs"),
    };
    format!("{codec}, head_dim {d}, group {g}, page {page}, contexts {}{company}", lengths.join("/"))
}

/// Words of every page against the CPU's, codec by codec: open pages with poison in every slot that was never written, and
/// sealed ones.
fn check_pages(setup: &Setup<'_>, batch: &Batch) -> Result<Vec<Check>, EngineError> {
    let (heads, page) = (setup.shape.heads, setup.shape.page());
    let (width, kv_width) = (heads.head_dim as usize, heads.kv_width() as usize);
    let n_heads = heads.num_kv_heads as usize;
    let mut checks = Vec::new();
    for codec in batch.codecs() {
        let (mut append, mut seal) = (Words::default(), Words::default());
        for sequence in setup.sequences.iter().filter(|sequence| sequence.codec == codec) {
            for kv_head in 0..heads.num_kv_heads {
                let DevicePages { sealed, open, .. } = setup.attention.pages(sequence.id, kv_head)?;
                let expected = sequence.sealed.iter().skip(kv_head as usize).step_by(n_heads);
                assert_eq!(sealed.len(), expected.len(), "every full page should be sealed");
                sealed.iter().zip(expected).for_each(|(got, expected)| seal.compare(got, expected));
                let first = sealed.len() * page.page_size as usize;
                for (index, got) in open.iter().enumerate() {
                    let start = first + index * page.page_size as usize;
                    let end = (start + page.page_size as usize).min(sequence.k.len() / kv_width);
                    let rows = |all: &[f32]| -> Vec<f32> {
                        let at = kv_head as usize * width;
                        let tokens = all.chunks_exact(kv_width).take(end).skip(start);
                        tokens.flat_map(|row| row[at..at + width].to_vec()).collect()
                    };
                    append.compare_open(got, page, &rows(&sequence.k), &rows(&sequence.v), sealed.is_empty());
                }
            }
        }
        checks.push(append.check("append", describe(batch, codec)));
        if codec.seals() {
            checks.push(seal.check("seal", describe(batch, codec)));
        }
    }
    Ok(checks)
}

/// Words compared, and how many of them differed.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Words {
    compared: usize,
    wrong: usize,
}

impl Words {
    pub(super) fn compare(&mut self, got: &[u32], expected: &[u32]) {
        assert_eq!(got.len(), expected.len(), "pages should be equally long");
        self.wrong += got.iter().zip(expected).filter(|(a, b)| a != b).count();
        self.compared += got.len();
    }

    /// Lists that may differ in length.
    pub(super) fn compare_lists(&mut self, got: &[u32], expected: &[u32]) {
        self.wrong += usize::from(got.len() != expected.len());
        self.wrong += got.iter().zip(expected).filter(|(a, b)| a != b).count();
        // An empty list is a comparison too.
        self.compared += 1 + expected.len();
    }

    /// An open page that holds the given rows. Where it has held no page before, its other slots are still poison.
    fn compare_open(&mut self, got: &[u32], page: crate::geometry::PageGeometry, k: &[f32], v: &[f32], fresh: bool) {
        use crate::compression::hidden::{Quantize as _, Side, SideShape, float16::Float16};
        let shape = |side| SideShape { side, page_size: page.page_size, width: page.head_dim };
        let encode = |fill: u32| {
            let mut words = vec![fill; got.len()];
            let (keys, values) = words.split_at_mut(got.len() / 2);
            Float16.encode(shape(Side::Key), k, keys);
            Float16.encode(shape(Side::Value), v, values);
            words
        };
        let poisoned = encode(u32::MAX);
        if fresh {
            return self.compare(got, &poisoned);
        }
        // Slots that this page has not written are those where the fill shows.
        let zeroed = encode(0);
        let halves: Vec<[u16; 3]> = bytemuck::cast_slice::<u32, u16>(got)
            .iter()
            .zip(bytemuck::cast_slice::<u32, u16>(&poisoned))
            .zip(bytemuck::cast_slice::<u32, u16>(&zeroed))
            .map(|((got, a), b)| [*got, *a, *b])
            .collect();
        let written: Vec<_> = halves.into_iter().filter(|[_, a, b]| a == b).collect();
        self.wrong += written.iter().filter(|[got, expected, _]| got != expected).count();
        self.compared += written.len();
    }

    pub(super) fn check(self, kernel: &'static str, case: String) -> Check {
        let error_over_bound = if self.wrong == 0 { 0.0 } else { f64::INFINITY };
        Check { kernel, case, compared: self.compared, error_over_bound, nmse: None }
    }
}
