//! Which launch of decode each class of formats gets.
//!
//! Which tile is fastest depends on the quantiser of keys, on the group size and on the width of a head, and on little else. So
//! a search measures some of these classes, and a format takes what its nearest one has.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use super::attention::{CacheShape, Format};
use super::decode::DecodeTuning;
use super::registry::DEFAULT_PAGE_SIZE;
use crate::compression::hidden::{Codec, HiddenCodec, Quantizer, Transform};
use crate::geometry::HeadGeometry;

/// Formats that decode reads alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DecodeClass {
    /// Quantiser of keys.
    pub keys: Quantizer,
    /// Query heads per KV head.
    pub group_size: u32,
    /// Channels of a head.
    pub head_dim: u32,
}

/// What is common to quantisers whose pages are read alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    Floats,
    Bytes,
    Codes,
}

/// The family of a quantiser, and the bits of its codes.
const fn family(quantizer: Quantizer) -> (Family, u32) {
    match quantizer {
        Quantizer::F32 => (Family::Floats, 32),
        Quantizer::F16 => (Family::Floats, 16),
        Quantizer::Fp8 | Quantizer::Int8 => (Family::Bytes, 8),
        Quantizer::Kivi { bits, .. } | Quantizer::Gaussian { bits } => (Family::Codes, bits),
    }
}

impl DecodeClass {
    /// The class of a format.
    pub const fn of(format: &Format) -> Self {
        let heads = format.shape.heads;
        Self { keys: format.codec.k.quantizer, group_size: heads.group_size(), head_dim: heads.head_dim }
    }

    /// A format of this class: one KV head, values as keys, pages as large as the quantiser needs.
    ///
    /// # Errors
    /// A sentence, for shapes that no kernel is written for.
    pub fn format(&self) -> Result<Format, String> {
        let Self { keys, group_size, head_dim } = *self;
        let heads = HeadGeometry { num_qo_heads: group_size, num_kv_heads: 1, head_dim };
        heads.check()?;
        let (transform, page_size) = match keys {
            Quantizer::Gaussian { .. } => (Transform::Rotation, DEFAULT_PAGE_SIZE),
            Quantizer::Kivi { group, .. } => (Transform::None, DEFAULT_PAGE_SIZE.max(group)),
            _ => (Transform::None, DEFAULT_PAGE_SIZE),
        };
        let shape = CacheShape { heads, page_size };
        let side = Codec { transform, quantizer: keys };
        let codec = HiddenCodec { k: side, v: side, paired: false };
        codec.check(shape.page())?;
        Ok(shape.format(codec))
    }

    /// How far another class of the same family is from this one; `None` of another family. The quantiser counts more than the
    /// group, and the group more than the width.
    fn distance(&self, other: &Self) -> Option<(u32, bool, u32, u32)> {
        let ((family_here, bits), (family_there, other_bits)) = (family(self.keys), family(other.keys));
        let ratio = |a: u32, b: u32| a.max(b) * 16 / a.min(b).max(1);
        (family_here == family_there).then(|| {
            let (group, width) = (ratio(self.group_size, other.group_size), ratio(self.head_dim, other.head_dim));
            (ratio(bits, other_bits), self.keys != other.keys, group, width)
        })
    }
}

impl fmt::Display for DecodeClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/g{}-d{}", self.keys, self.group_size, self.head_dim)
    }
}

impl FromStr for DecodeClass {
    type Err = String;

    /// As it is written, `kivi4/g4-d128`; only classes that have a format.
    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once("/g").and_then(|(keys, shape)| {
            let (group, width) = shape.split_once("-d")?;
            Some((keys.parse::<HiddenCodec>().ok()?, group.parse().ok()?, width.parse().ok()?))
        });
        let (codec, group_size, head_dim) =
            parts.ok_or_else(|| format!("'{text}' is no class of formats, such as kivi4/g4-d128"))?;
        let class = Self { keys: codec.k.quantizer, group_size, head_dim };
        if class.to_string() != text {
            return Err(format!("'{text}' is no class of formats; its keys are those of '{class}'"));
        }
        class.format().map_err(|why| format!("'{text}' is no class of formats: {why}"))?;
        Ok(class)
    }
}

/// Launches of decode by class.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DecodeChoices {
    by_class: BTreeMap<DecodeClass, DecodeTuning>,
}

impl DecodeChoices {
    /// Chooses for a class, in place of what was chosen before.
    pub fn insert(&mut self, class: DecodeClass, tuning: DecodeTuning) {
        self.by_class.insert(class, tuning);
    }

    /// What was chosen, in the order of classes.
    pub fn iter(&self) -> impl Iterator<Item = (&DecodeClass, &DecodeTuning)> {
        self.by_class.iter()
    }

    /// What a format gets: the choice of the nearest class, within what the format allows; `None` where nothing of its family was
    /// chosen.
    pub fn nearest(&self, format: &Format) -> Option<DecodeTuning> {
        let class = DecodeClass::of(format);
        let near = self.iter().filter_map(|(other, tuning)| Some((class.distance(other)?, other, tuning)));
        near.min_by_key(|(distance, other, _)| (*distance, **other)).map(|(.., tuning)| tuning.fitted(format))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class(text: &str) -> DecodeClass {
        text.parse().unwrap_or_else(|e| panic!("{e}"))
    }

    fn tuning(text: &str) -> DecodeTuning {
        text.parse().unwrap_or_else(|e| panic!("{e}"))
    }

    #[test]
    fn classes_read_back_and_others_are_refused() {
        for text in ["f16/g1-d64", "int8/g4-d128", "kivi4/g8-d128", "kivi2:128/g4-d128", "rot4/g3-d64"] {
            assert_eq!(class(text).to_string(), text, "round trip");
            let format = class(text).format().expect("a class has a format");
            assert_eq!(DecodeClass::of(&format), class(text), "its format is of the class");
        }
        for bad in
            ["", "f16", "f16/g0-d64", "f16/g64-d128", "f16/g4-d0", "f16/g4-d12", "nf4/g4-d128", "mean+rot4/g4-d128"]
        {
            assert!(bad.parse::<DecodeClass>().is_err(), "'{bad}'");
        }
    }

    #[test]
    fn a_format_takes_the_choice_of_its_nearest_class_and_of_no_other_family() {
        let (a, b, c) = (tuning("tiled:64:1:2:4:ahead"), tuning("tiled:128:1:4:4:ahead"), tuning("general"));
        let mut choices = DecodeChoices::default();
        choices.insert(class("kivi4/g4-d128"), a);
        choices.insert(class("kivi4/g1-d128"), b);
        choices.insert(class("kivi2/g4-d64"), c);
        let of = |text: &str| choices.nearest(&class(text).format().expect("a format"));
        assert_eq!(of("kivi4/g4-d128"), Some(a), "itself");
        assert_eq!(of("kivi4/g8-d128"), Some(a), "8 heads are nearer to 4 than to 1");
        assert_eq!(of("kivi4/g1-d64"), Some(b.fitted(&class("kivi4/g1-d64").format().expect("a format"))), "one head");
        assert_eq!(of("rot4/g4-d128"), Some(a.fitted(&class("rot4/g4-d128").format().expect("a format"))), "4 bits");
        assert_eq!(of("kivi2/g1-d128"), Some(c), "the quantiser counts most");
        assert_eq!(of("f16/g4-d128"), None, "floats are no codes");
        assert_eq!(of("int8/g4-d128"), None, "neither are bytes");
    }
}
