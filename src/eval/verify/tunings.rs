//! Every way to launch decode and prefill that the device can run, over codecs of every kind: a tuning changes speed and nothing else.

use super::attention::{Batch, check_batch};
use super::{Check, Extent};
use crate::compression::hidden::HiddenCodec;
use crate::device::{Device, Tier};
use crate::engine::EngineError;
use crate::geometry::HeadGeometry;
use crate::kernels::PipelineCache;
use crate::kernels::attention::CacheShape;
use crate::kernels::decode::DecodeTuning;
use crate::kernels::decode_choices::{DecodeChoices, DecodeClass};
use crate::kernels::prefill::PrefillTuning;
use crate::kernels::registry::DEFAULT_PAGE_SIZE;
use crate::kernels::tuning::Tuning;

/// One codec for each way in which the kernels read pages, and a context that ends inside a page.
const DECODED: [(&str, u32); 7] =
    [("f16", 131), ("f32", 97), ("fp8", 130), ("int8", 129), ("kivi4", 131), ("kivi2", 97), ("rot4", 130)];
/// Groups that are wider than a head, in pages that hold them.
const WIDE: [(&str, u32); 1] = [("kivi4:128", 259)];
/// The same for prefill, which decodes a page once for many rows.
const PREFILLED: [(&str, u32); 4] = [("f16", 1), ("f32", 97), ("kivi2", 130), ("rot3", 63)];

fn shape(head_dim: u32, group: u32) -> CacheShape {
    let heads = HeadGeometry { num_qo_heads: 2 * group, num_kv_heads: 2, head_dim };
    CacheShape { heads, page_size: DEFAULT_PAGE_SIZE }
}

fn sequences(codecs: &[(&str, u32)]) -> Vec<(HiddenCodec, u32)> {
    codecs.iter().map(|(text, n)| (parsed(text), *n)).collect()
}

fn parsed(text: &str) -> HiddenCodec {
    text.parse().unwrap_or_else(|e| panic!("a codec of verify's own should parse: {e}"))
}

/// Two of the codecs for the launch at a place, in turn: over all launches every codec, and several of each.
fn few<'a>(codecs: &[(&'a str, u32)], at: usize) -> Vec<(&'a str, u32)> {
    (0..2.min(codecs.len())).map(|i| codecs[(2 * at + i) % codecs.len()]).collect()
}

/// One launch of decode for all codecs of a batch, open pages included.
fn chosen(shape: CacheShape, sequences: &[(HiddenCodec, u32)], tuning: DecodeTuning) -> DecodeChoices {
    let mut choices = DecodeChoices::default();
    for codec in sequences.iter().map(|(codec, _)| *codec).chain([HiddenCodec::F16]) {
        choices.insert(DecodeClass::of(&shape.format(codec)), tuning);
    }
    choices
}

/// A launch, over one batch.
struct Case {
    kernel: &'static str,
    tuning: Tuning,
    name: String,
    batch: Batch,
}

fn cases(extent: Extent, tier: Tier) -> Vec<Case> {
    let mut cases = Vec::new();
    // Half of the width compiles in half of the time.
    let decoded: &[(u32, u32)] =
        if extent == Extent::Full { &[(64, 3), (128, 1), (128, 4), (128, 8)] } else { &[(64, 3)] };
    for (head_dim, group) in decoded {
        let shape = shape(*head_dim, *group);
        let wide = CacheShape { page_size: 128, ..shape };
        for (shape, codecs) in [(shape, &DECODED[..]), (wide, &WIDE[..])] {
            for (i, tuning) in DecodeTuning::all().enumerate() {
                let name = format!("{tuning}: ");
                let suits = |(text, _): &&(&str, u32)| tuning.suits(&shape.format(parsed(text)));
                let codecs: Vec<_> = codecs.iter().filter(suits).copied().collect();
                let codecs = if extent == Extent::Full { codecs } else { few(&codecs, i) };
                let batch = Batch { shape, sequences: sequences(&codecs), max_arena: None, flip: None };
                let tuning = Tuning { decode: chosen(shape, &batch.sequences, tuning), ..Tuning::default() };
                cases.push(Case { kernel: "decode", tuning, name, batch });
            }
        }
    }
    for (head_dim, group) in [(128, 3), (80, 8)] {
        let shape = shape(head_dim, group);
        let batch = Batch { shape, sequences: sequences(&PREFILLED), max_arena: None, flip: None };
        for tuning in PrefillTuning::candidates(&shape.format(HiddenCodec::F16)) {
            if matches!(tuning, PrefillTuning::Cooperative(_)) && tier < Tier::Cooperative {
                continue;
            }
            let name = format!("{tuning}: ");
            let tuning = Tuning { prefill: Some(tuning), ..Tuning::default() };
            cases.push(Case { kernel: "prefill", tuning, name, batch: batch.clone() });
        }
    }
    cases
}

/// How many checks [`run`] makes: one for each codec of a case.
pub(super) fn count(tier: Tier, extent: Extent) -> usize {
    cases(extent, tier).iter().map(|case| case.batch.sequences.len()).sum()
}

pub(super) fn run(device: &Device, extent: Extent, each: &mut dyn FnMut(Check)) -> Result<(), EngineError> {
    for Case { kernel, tuning, name, batch } in cases(extent, device.tier()) {
        let checks = check_batch(device, &mut PipelineCache::new(tuning), &batch)?;
        for check in checks.into_iter().filter(|check| check.kernel == kernel) {
            each(Check { case: format!("{name}{}", check.case), ..check });
        }
    }
    Ok(())
}
