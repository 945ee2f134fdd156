//! What a search measures, and which choice each case settles.

use super::super::kernels::cases::{decode, gather, prefill, product, score, shape};
use super::super::kernels::{Case, Sizes};
use crate::compression::hidden::HiddenCodec;
use crate::device::{Device, Tier};
use crate::engine::bench::product::ProductSpec;
use crate::kernels::decode::DecodeTuning;
use crate::kernels::decode_choices::DecodeClass;
use crate::kernels::gather::GatherTuning;
use crate::kernels::prefill::PrefillTuning;
use crate::kernels::product_tuning::{CooperativeRows, FewRows, ManyRows, ProductTuning};
use crate::kernels::registry::DEFAULT_PAGE_SIZE;
use crate::kernels::score::ScoreTuning;
use crate::kernels::tuning::Tuning;

/// The choice that a case settles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// Decode of a class of formats.
    Decode(DecodeClass),
    /// Prefill of all formats.
    Prefill,
    /// Products of decode rows.
    FewRows,
    /// Products of prompt rows: on cooperative matrices in that tier, and otherwise not.
    ManyRows,
    /// Scores of cached tokens, of all formats.
    Score,
    /// Moves of tokens that stay, of all formats.
    Gather,
}

/// A case, and what it settles.
#[derive(Debug)]
pub struct TuneCase {
    /// What is measured.
    pub case: Case,
    /// What is chosen by it.
    pub choice: Choice,
}

/// Variants that a choice can be.
enum Variant {
    Decode(DecodeClass, DecodeTuning),
    Prefill(PrefillTuning),
    Few(FewRows),
    Many(ManyRows),
    Cooperative(CooperativeRows),
    Score(ScoreTuning),
    Gather(GatherTuning),
}

impl Choice {
    /// The variant that a kernel's run names so; `None` of those that the program can not be told to use.
    fn variant(self, label: &str, device: &Device) -> Option<Variant> {
        let mut products =
            std::iter::once(ProductTuning::of_kind(&device.summary().kind)).chain(ProductTuning::candidates());
        match self {
            Self::Decode(class) => label.parse().ok().map(|tuning| Variant::Decode(class, tuning)),
            Self::Prefill => label.parse().ok().map(Variant::Prefill),
            Self::Score => label.parse().ok().map(Variant::Score),
            Self::Gather => label.parse().ok().map(Variant::Gather),
            Self::FewRows => products.map(|p| p.few).find(|few| few.to_string() == label).map(Variant::Few),
            Self::ManyRows if device.tier() == Tier::Cooperative => label.parse().ok().map(Variant::Cooperative),
            Self::ManyRows => products.find(|p| p.many.to_string() == label).map(|p| Variant::Many(p.many)),
        }
    }

    /// Whether a variant can be chosen.
    pub(super) fn admits(self, label: &str, device: &Device) -> bool {
        self.variant(label, device).is_some()
    }

    /// Chooses a variant.
    pub(super) fn settle(self, label: &str, device: &Device, tuning: &mut Tuning) {
        let product = tuning.product(&device.summary().kind);
        match self.variant(label, device) {
            Some(Variant::Decode(class, tile)) => tuning.decode.insert(class, tile),
            Some(Variant::Prefill(chosen)) => tuning.prefill = Some(chosen),
            Some(Variant::Few(few)) => tuning.product = Some(ProductTuning { few, ..product }),
            Some(Variant::Many(many)) => tuning.product = Some(ProductTuning { many, ..product }),
            Some(Variant::Cooperative(tile)) => tuning.cooperative_product = Some(tile),
            Some(Variant::Score(tile)) => tuning.score = Some(tile),
            Some(Variant::Gather(launch)) => tuning.gather = Some(launch),
            None => {}
        }
    }
}

const CODECS: [&str; 4] = ["f16", "int8", "kivi4", "kivi2"];

/// Everything that can be chosen, what matters most first, since a search may end before the last. Caches are large enough to
/// fill a device and no larger: on a GPU 128K tokens of 8 KV heads.
pub fn tune_cases(sizes: Sizes) -> Vec<TuneCase> {
    let small = sizes == Sizes::Small;
    let (batch, contexts, kv_heads) = if small { ("2x512", vec![512; 2], 2) } else { ("16x8k", vec![8 << 10; 16], 8) };
    let of_class = |group: u32, width: u32| {
        let shape = shape(kv_heads, group, width, DEFAULT_PAGE_SIZE);
        let class = move |codec: Option<HiddenCodec>| DecodeClass {
            keys: codec.unwrap_or(HiddenCodec::F16).k.quantizer,
            group_size: group,
            head_dim: width,
        };
        let with_class = move |case: Case| TuneCase { choice: Choice::Decode(class(case.codec)), case };
        decode((batch, contexts.clone()), shape, &CODECS).into_iter().map(with_class)
    };
    let mut cases: Vec<_> = of_class(4, 128).collect();
    let rows = if small { 256 } else { 2048 };
    let (name, prompt) = if small { ("256", vec![256]) } else { ("2k", vec![2048]) };
    let of_prompt = prefill((name, prompt), rows, shape(kv_heads, 4, 128, DEFAULT_PAGE_SIZE), &["f16"]);
    cases.extend(of_prompt.into_iter().map(|case| TuneCase { case, choice: Choice::Prefill }));
    let (width, many) = if small { (512, 128) } else { (4096, 1024) };
    let spec = ProductSpec { rows: 16, k: width, cols: width, decode: true };
    cases.push(TuneCase { case: product(spec), choice: Choice::FewRows });
    let spec = ProductSpec { rows: many, decode: false, ..spec };
    cases.push(TuneCase { case: product(spec), choice: Choice::ManyRows });
    cases.extend(of_evictions(small, kv_heads));
    for (group, width) in [(8, 128), (1, 128), (4, 64), (8, 64), (1, 64)] {
        cases.extend(of_class(group, width));
    }
    cases
}

/// A document's end scored over its cache, and what stays of several moved, from f16: a document is evicted from before it is encoded.
fn of_evictions(small: bool, kv_heads: u32) -> [TuneCase; 2] {
    let shape = shape(kv_heads, 4, 128, DEFAULT_PAGE_SIZE);
    let (name, tokens, rows) = if small { ("32after1k", 1 << 10, 32) } else { ("128after32k", 32 << 10, 128) };
    let scored = TuneCase { case: score(name, shape, "f16", tokens, rows), choice: Choice::Score };
    let (name, contexts) = if small { ("4x1k", vec![1 << 10; 4]) } else { ("16x8k", vec![8 << 10; 16]) };
    [scored, TuneCase { case: gather(name, shape, "f16", contexts), choice: Choice::Gather }]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_choice_has_one_case_and_every_class_a_format() {
        for sizes in [Sizes::Full, Sizes::Small] {
            let cases = tune_cases(sizes);
            let names: BTreeSet<String> = cases.iter().map(|case| case.case.name()).collect();
            let choices: BTreeSet<String> = cases.iter().map(|case| format!("{:?}", case.choice)).collect();
            assert_eq!((names.len(), choices.len(), cases.len()), (29, 29, 29), "{sizes:?}: 4 codecs, 6 shapes, and 5");
            for case in cases {
                if let Choice::Decode(class) = case.choice {
                    assert!(class.format().is_ok_and(|f| Some(f.codec) == case.case.codec), "{class}");
                }
            }
        }
    }
}
