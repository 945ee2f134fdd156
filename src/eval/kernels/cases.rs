//! What is measured: each case with its name, and how it is made ready.
//!
//! Names read `kernel/batch/shape/codec`: `decode/16x32k/g4-d128/kivi4` is decode of 16 sequences of 32K tokens, 4 query heads
//! of 128 channels per KV head. Within a shape f16 comes first, since the others are compared with it.

use crate::compression::hidden::HiddenCodec;
use crate::device::Device;
use crate::engine::EngineError;
use crate::engine::bench::append::{AppendRun, AppendSpec};
use crate::engine::bench::cache::CacheSpec;
use crate::engine::bench::decode::DecodeRun;
use crate::engine::bench::gather::GatherRun;
use crate::engine::bench::merge::{MergeRun, MergeSpec};
use crate::engine::bench::prefill::{PrefillCase, PrefillRun};
use crate::engine::bench::product::{ProductRun, ProductSpec};
use crate::engine::bench::score::{ScoreRun, ScoreSpec};
use crate::engine::bench::seal::{SealRun, SealSpec};
use crate::engine::bench::select::{SelectRun, SelectSpec};
use crate::engine::bench::{BenchSettings, KernelRun};
use crate::geometry::HeadGeometry;
use crate::kernels::PipelineCache;
use crate::kernels::attention::CacheShape;
use crate::kernels::registry::DEFAULT_PAGE_SIZE;

/// Makes a case ready.
pub type Prepare =
    dyn Fn(&Device, &mut PipelineCache, &BenchSettings) -> Result<Box<dyn KernelRun>, EngineError> + Send + Sync;

/// A kernel over inputs of one size.
pub struct Case {
    /// The kernel.
    pub kernel: &'static str,
    /// Batch and shape.
    pub shape: String,
    /// Codec of what it reads, where it reads pages.
    pub codec: Option<HiddenCodec>,
    /// Makes it ready.
    pub prepare: Box<Prepare>,
}

impl std::fmt::Debug for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name())
    }
}

impl Case {
    /// Its name.
    pub fn name(&self) -> String {
        let codec = self.codec.map_or_else(String::new, |codec| format!("/{codec}"));
        format!("{}/{}{codec}", self.kernel, self.shape)
    }
}

/// How large cases are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Sizes {
    /// Contexts of 4K to 128K tokens, 64K to 512K in all: for GPUs.
    Full,
    /// A few thousand tokens: for processors that pretend to be one.
    Small,
}

const CODECS: [&str; 4] = ["f16", "int8", "kivi4", "kivi2"];
const COARSE: &[&str] = &["kivi4:128"];
const TWO: &[&str] = &["f16", "kivi4"];
const SEALED: [&str; 3] = ["int8", "kivi4", "rot4"];

/// Every case of a size.
pub fn cases(sizes: Sizes) -> Vec<Case> {
    match sizes {
        Sizes::Full => full(),
        Sizes::Small => small(),
    }
}

fn full() -> Vec<Case> {
    let mut cases = Vec::new();
    let long = || ("16x32k", vec![32 << 10; 16]);
    for (group, width) in [(4, 128), (1, 128), (8, 128), (4, 64)] {
        let shape = shape(8, group, width, DEFAULT_PAGE_SIZE);
        cases.extend(decode(long(), shape, &CODECS));
        cases.extend(decode(long(), CacheShape { page_size: 128, ..shape }, COARSE));
    }
    let shape = shape(8, 4, 128, DEFAULT_PAGE_SIZE);
    cases.extend(decode(("zipf64", zipf(64, 16 * (32 << 10))), shape, TWO));
    cases.extend(decode(("1x128k", vec![128 << 10]), shape, TWO));
    cases.extend(decode(("16x4k", vec![4 << 10; 16]), shape, TWO));
    cases.push(merge("16x32k", shape, 16, 64));
    cases.push(merge("1x128k", shape, 1, 256));
    for (batch, n) in [("1k", 1 << 10), ("4k", 4 << 10), ("16k", 16 << 10)] {
        cases.extend(prefill((batch, vec![n]), n, shape, &["f16"]));
    }
    // 64 rows behind 16K tokens, eight times.
    let page = shape.page_size;
    cases.extend(prefill(("8x64after16k", vec![(16 << 10) + page; 8]), page, shape, &["f16", "int8", "kivi4"]));
    cases.push(product(ProductSpec { rows: 1024, k: 4096, cols: 4096, decode: false }));
    for (k, cols) in [(4096, 4096), (4096, 14_336), (576, 1536)] {
        cases.extend([1, 4, 16].map(|rows| product(ProductSpec { rows, k, cols, decode: true })));
    }
    cases.push(append(AppendSpec { shape, pages: 32 }));
    cases.extend(SEALED.map(|codec| seal(shape, codec, 512)));
    cases.extend(TWO.iter().map(|codec| score("128after32k", shape, codec, 32 << 10, 128)));
    cases.push(select("256x32k", SelectSpec { lists: 256, tokens: 32 << 10, kept: 8 << 10 }));
    cases.extend(TWO.iter().map(|codec| gather("16x8k", shape, codec, vec![8 << 10; 16])));
    cases
}

fn small() -> Vec<Case> {
    let mut cases = Vec::new();
    let few = || ("4x1k", vec![1 << 10; 4]);
    let page = DEFAULT_PAGE_SIZE;
    cases.extend(decode(few(), shape(2, 4, 128, page), &CODECS));
    cases.extend(decode(few(), shape(2, 4, 128, 128), COARSE));
    for (group, width) in [(1, 128), (8, 128), (4, 64)] {
        cases.extend(decode(few(), shape(2, group, width, page), TWO));
    }
    cases.extend(decode(("zipf4", zipf(4, 4 << 10)), shape(2, 4, 128, page), TWO));
    cases.extend(decode(("1x2k", vec![2 << 10]), shape(2, 4, 128, page), TWO));
    cases.push(merge("4x1k", shape(2, 4, 128, page), 4, 16));
    cases.extend(prefill(("512", vec![512]), 512, shape(2, 4, 128, page), &["f16"]));
    let contexts = vec![512 + page; 2];
    cases.extend(prefill(("2x64after512", contexts), page, shape(2, 4, 128, page), &["f16", "int8", "kivi4"]));
    cases.push(product(ProductSpec { rows: 128, k: 512, cols: 512, decode: false }));
    cases.extend([1, 4, 16].map(|rows| product(ProductSpec { rows, k: 576, cols: 1536, decode: true })));
    let shape = shape(2, 4, 128, page);
    cases.push(append(AppendSpec { shape, pages: 4 }));
    cases.extend(SEALED.map(|codec| seal(shape, codec, 32)));
    cases.extend(TWO.iter().map(|codec| score("32after1k", shape, codec, 1 << 10, 32)));
    cases.push(select("8x4k", SelectSpec { lists: 8, tokens: 4 << 10, kept: 1 << 10 }));
    cases.extend(TWO.iter().map(|codec| gather("4x1k", shape, codec, vec![1 << 10; 4])));
    cases
}

pub(in crate::eval) const fn shape(num_kv_heads: u32, group: u32, head_dim: u32, page_size: u32) -> CacheShape {
    CacheShape { heads: HeadGeometry { num_qo_heads: num_kv_heads * group, num_kv_heads, head_dim }, page_size }
}

/// Contexts in proportion to 1, 1/2, 1/3, ..., so many tokens in all: few are long, most are short.
fn zipf(n: u32, tokens: u32) -> Vec<u32> {
    let harmonic: f64 = (1..=n).map(|rank| 1.0 / f64::from(rank)).sum();
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a part of a u32")]
    let share = |rank: u32| ((f64::from(tokens) / harmonic / f64::from(rank)) as u32).max(1);
    let mut lengths: Vec<u32> = (1..=n).map(share).collect();
    let rest = tokens - lengths.iter().sum::<u32>();
    lengths[0] += rest;
    lengths
}

/// Batch and shape in a name.
fn named(batch: &str, shape: &CacheShape) -> String {
    format!("{batch}/g{}-d{}", shape.heads.group_size(), shape.heads.head_dim)
}

pub(in crate::eval) fn decode((batch, contexts): (&str, Vec<u32>), shape: CacheShape, codecs: &[&str]) -> Vec<Case> {
    let case = |codec: &&str| {
        let codec = parsed(codec);
        let spec = CacheSpec { shape, codec, contexts: contexts.clone() };
        let prepare: Box<Prepare> = Box::new(move |device, pipelines, settings| {
            Ok(Box::new(DecodeRun::new(device, pipelines, &spec, settings)?))
        });
        Case { kernel: "decode", shape: named(batch, &shape), codec: Some(codec), prepare }
    };
    codecs.iter().map(case).collect()
}

/// The last `rows` rows of every sequence.
pub(in crate::eval) fn prefill(
    (batch, contexts): (&str, Vec<u32>),
    rows: u32,
    shape: CacheShape,
    codecs: &[&str],
) -> Vec<Case> {
    let case = |codec: &&str| {
        let codec: HiddenCodec = codec.parse().unwrap_or_else(|e| panic!("the harness's own codec should parse: {e}"));
        let spec = PrefillCase { cache: CacheSpec { shape, codec, contexts: contexts.clone() }, rows };
        let prepare: Box<Prepare> = Box::new(move |device, pipelines, settings| {
            Ok(Box::new(PrefillRun::new(device, pipelines, &spec, settings)?))
        });
        Case { kernel: "prefill", shape: named(batch, &shape), codec: Some(codec), prepare }
    };
    codecs.iter().map(case).collect()
}

pub(in crate::eval) fn product(spec: ProductSpec) -> Case {
    let ProductSpec { rows, k, cols, decode } = spec;
    let prepare: Box<Prepare> =
        Box::new(move |device, pipelines, settings| Ok(Box::new(ProductRun::new(device, pipelines, &spec, settings)?)));
    let kernel = if decode { "matvec" } else { "matmul" };
    Case { kernel, shape: format!("{rows}x{k}x{cols}"), codec: None, prepare }
}

fn merge(batch: &str, shape: CacheShape, rows: u32, states: u32) -> Case {
    let spec = MergeSpec { shape, rows, states };
    let prepare: Box<Prepare> =
        Box::new(move |device, pipelines, settings| Ok(Box::new(MergeRun::new(device, pipelines, &spec, settings)?)));
    Case { kernel: "merge_states", shape: named(batch, &shape), codec: None, prepare }
}

fn parsed(codec: &str) -> HiddenCodec {
    codec.parse().unwrap_or_else(|e| panic!("the harness's own codec should parse: {e}"))
}

/// Rows of a prompt to whole pages.
fn append(spec: AppendSpec) -> Case {
    let rows = format!("{}rows", spec.pages * spec.shape.page_size);
    let prepare: Box<Prepare> =
        Box::new(move |device, pipelines, settings| Ok(Box::new(AppendRun::new(device, pipelines, &spec, settings)?)));
    Case { kernel: "append", shape: named(&rows, &spec.shape), codec: None, prepare }
}

fn seal(shape: CacheShape, codec: &str, pages: u32) -> Case {
    let spec = SealSpec { shape, codec: parsed(codec), pages };
    let prepare: Box<Prepare> =
        Box::new(move |device, pipelines, settings| Ok(Box::new(SealRun::new(device, pipelines, &spec, settings)?)));
    Case { kernel: "seal", shape: named(&format!("{pages}pages"), &shape), codec: Some(spec.codec), prepare }
}

/// The last rows of a prompt over its cache.
pub(in crate::eval) fn score(name: &str, shape: CacheShape, codec: &str, tokens: u32, rows: u32) -> Case {
    let codec = parsed(codec);
    let spec = ScoreSpec { cache: CacheSpec { shape, codec, contexts: vec![tokens] }, rows };
    let prepare: Box<Prepare> =
        Box::new(move |device, pipelines, settings| Ok(Box::new(ScoreRun::new(device, pipelines, &spec, settings)?)));
    Case { kernel: "score", shape: named(name, &shape), codec: Some(codec), prepare }
}

fn select(name: &str, spec: SelectSpec) -> Case {
    let prepare: Box<Prepare> =
        Box::new(move |device, pipelines, settings| Ok(Box::new(SelectRun::new(device, pipelines, &spec, settings)?)));
    Case { kernel: "select", shape: name.to_owned(), codec: None, prepare }
}

/// Half of every sequence stays.
pub(in crate::eval) fn gather(name: &str, shape: CacheShape, codec: &str, contexts: Vec<u32>) -> Case {
    let codec = parsed(codec);
    let spec = CacheSpec { shape, codec, contexts };
    let prepare: Box<Prepare> =
        Box::new(move |device, pipelines, settings| Ok(Box::new(GatherRun::new(device, pipelines, &spec, settings)?)));
    Case { kernel: "gather", shape: named(name, &shape), codec: Some(codec), prepare }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_unique_and_f16_comes_first() {
        for sizes in [Sizes::Full, Sizes::Small] {
            let cases = cases(sizes);
            let names: BTreeSet<String> = cases.iter().map(Case::name).collect();
            assert_eq!(names.len(), cases.len(), "{sizes:?}: {cases:?}");
            let mut seen = BTreeSet::new();
            // Nothing is sealed as f16.
            for case in cases.iter().filter(|case| case.codec.is_some() && case.kernel != "seal") {
                let first = seen.insert((case.kernel, case.shape.clone()));
                assert_eq!(first, case.codec == Some(HiddenCodec::F16), "{case:?}");
            }
        }
    }

    #[test]
    fn a_zipf_batch_has_all_tokens_and_falls() {
        let lengths = zipf(64, 16 * (32 << 10));
        assert_eq!(lengths.iter().sum::<u32>(), 524_288, "as many as 16 x 32K");
        assert!(lengths.windows(2).all(|w| w[0] >= w[1]) && lengths[0] > 50 * lengths[63], "{lengths:?}");
    }
}
