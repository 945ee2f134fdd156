//! Reading and printing codecs, and the registry behind both.

use std::fmt;
use std::str::FromStr;

use super::{Codec, HiddenCodec, Quantizer, Transform, kivi};

/// A way to write a codec.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// As it is written, parameters as letters.
    pub syntax: &'static str,
    /// What it does, in one line.
    pub summary: &'static str,
    /// Where it comes from.
    pub source: &'static str,
    /// Written-out examples: what tests, `verify` and `codecs` cover.
    pub examples: &'static [&'static str],
}

/// Every codec.
pub const REGISTRY: &[Entry] = &[
    Entry { syntax: "f16", summary: "half precision: the full cache", source: "IEEE 754", examples: &["f16"] },
    Entry { syntax: "f32", summary: "single precision, for tests", source: "IEEE 754", examples: &["f32"] },
    Entry {
        syntax: "fp8",
        summary: "e4m3 without a scale, as servers ship it",
        source: "OCP 8-bit floating point",
        examples: &["fp8"],
    },
    Entry {
        syntax: "int8",
        summary: "8 bits, scale and minimum per token",
        source: "after QServe, arXiv:2405.04532",
        examples: &["int8"],
    },
    Entry {
        syntax: "kivi4[:G]",
        summary: "4 bits, keys per channel, values per token, groups of G = 32, 64 or 128",
        source: "KIVI, arXiv:2402.02750",
        examples: &["kivi4", "kivi4:64", "kivi4:128"],
    },
    Entry {
        syntax: "kivi2[:G]",
        summary: "2 bits, keys per channel, values per token, groups of G = 32, 64 or 128",
        source: "KIVI, arXiv:2402.02750",
        examples: &["kivi2", "kivi2:64", "kivi2:128"],
    },
    Entry {
        syntax: "rot4",
        summary: "Hadamard rotation, 4 bits, one scale per token",
        source: "after QuaRot, arXiv:2404.00456, and TurboQuant, arXiv:2504.19874",
        examples: &["rot4"],
    },
    Entry {
        syntax: "rot3",
        summary: "Hadamard rotation, 3 bits, one scale per token",
        source: "after QuaRot, arXiv:2404.00456, and TurboQuant, arXiv:2504.19874",
        examples: &["rot3"],
    },
    Entry {
        syntax: "rot2",
        summary: "Hadamard rotation, 2 bits, one scale per token",
        source: "after QuaRot, arXiv:2404.00456, and TurboQuant, arXiv:2504.19874",
        examples: &["rot2"],
    },
    Entry {
        syntax: "mean+rot4, mean+rot3, mean+rot2",
        summary: "the same; the mean of each page is taken out of its keys",
        source: "",
        examples: &["mean+rot4", "mean+rot3", "mean+rot2"],
    },
    Entry {
        syntax: "think:KEEP[+CODEC]",
        summary: "keys keep the part KEEP of their channels, then CODEC for keys and values",
        source: "ThinK, arXiv:2407.21018",
        examples: &["think:0.6", "think:0.6+int8", "think:0.8+kivi4"],
    },
    Entry {
        syntax: "lowrank:R[+CODEC]",
        summary: "R latents per head (bases from --calibrate), then CODEC (f16, f32, fp8 or int8)",
        source: "after Palu, arXiv:2407.21118",
        examples: &["lowrank:48", "lowrank:32+int8"],
    },
    Entry {
        syntax: "k:CODEC,v:CODEC",
        summary: "keys and values each their own",
        source: "",
        examples: &["k:kivi2,v:rot4", "k:int8,v:kivi2"],
    },
];

/// All examples of the registry.
pub fn examples() -> impl Iterator<Item = HiddenCodec> {
    let written = REGISTRY.iter().flat_map(|entry| entry.examples);
    written.map(|text| text.parse().expect("the registry's examples should parse"))
}

impl fmt::Display for Quantizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::F32 => f.write_str("f32"),
            Self::F16 => f.write_str("f16"),
            Self::Fp8 => f.write_str("fp8"),
            Self::Int8 => f.write_str("int8"),
            Self::Kivi { bits, group: 32 } => write!(f, "kivi{bits}"),
            Self::Kivi { bits, group } => write!(f, "kivi{bits}:{group}"),
            Self::Gaussian { bits } => write!(f, "rot{bits}"),
        }
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let transform = match self.transform {
            Transform::None | Transform::Rotation => return self.quantizer.fmt(f),
            Transform::CentredRotation => return write!(f, "mean+{}", self.quantizer),
            Transform::Pruning { keep_permille } => format!("think:{}", f64::from(keep_permille) / 1000.0),
            Transform::LowRank { rank } => format!("lowrank:{rank}"),
        };
        match self.quantizer {
            Quantizer::F16 => f.write_str(&transform),
            quantizer => write!(f, "{transform}+{quantizer}"),
        }
    }
}

impl HiddenCodec {
    /// The codec that the text for both sides means for values: theirs keep all channels.
    const fn values_of(k: Codec) -> Codec {
        match k.transform {
            Transform::Pruning { .. } => Codec { transform: Transform::None, quantizer: k.quantizer },
            Transform::CentredRotation => Codec { transform: Transform::Rotation, quantizer: k.quantizer },
            _ => k,
        }
    }
}

impl fmt::Display for HiddenCodec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text =
            if Self::values_of(self.k) == self.v { self.k.to_string() } else { format!("k:{},v:{}", self.k, self.v) };
        f.pad(&text)
    }
}

fn quantizer(text: &str) -> Result<Quantizer, String> {
    let (name, group) = match text.split_once(':') {
        Some((name, group)) => (name, Some(group)),
        None => (text, None),
    };
    let quantizer = match name {
        "f32" => Quantizer::F32,
        "f16" => Quantizer::F16,
        "fp8" => Quantizer::Fp8,
        "int8" => Quantizer::Int8,
        "kivi4" | "kivi2" => {
            let bits = if name == "kivi4" { 4 } else { 2 };
            let group = match group {
                None => kivi::GROUPS[0],
                Some(text) => text.parse().ok().filter(|g| kivi::GROUPS.contains(g)).ok_or_else(|| {
                    format!("{name} has groups of {}, not {text}", kivi::GROUPS.map(|g| g.to_string()).join(", "))
                })?,
            };
            return Ok(Quantizer::Kivi { bits, group });
        }
        _ => return Err(unknown(text)),
    };
    if group.is_some() { Err(format!("{name} takes no parameter")) } else { Ok(quantizer) }
}

fn unknown(text: &str) -> String {
    let known: Vec<_> = REGISTRY.iter().map(|entry| entry.syntax).collect();
    format!("hidden={text} is not available: hidden knows {}", known.join(", "))
}

impl FromStr for Codec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (centred, plain) = text.strip_prefix("mean+").map_or((false, text), |plain| (true, plain));
        if let Some(bits) = plain.strip_prefix("rot") {
            let bits = bits.parse().ok().filter(|bits| (2..=4).contains(bits)).ok_or_else(|| unknown(text))?;
            let transform = if centred { Transform::CentredRotation } else { Transform::Rotation };
            return Ok(Self { transform, quantizer: Quantizer::Gaussian { bits } });
        }
        let (first, rest) = match text.split_once('+') {
            Some((first, rest)) => (first, Some(rest)),
            None => (text, None),
        };
        let transform = match first.split_once(':') {
            Some(("think", keep)) => Transform::Pruning { keep_permille: permille(keep)? },
            Some(("lowrank", rank)) => {
                let rank = rank.parse().ok().filter(|r: &u32| *r > 0 && *r <= 256 && r.is_multiple_of(8));
                let rank = rank.ok_or_else(|| format!("'{first}': a rank is a multiple of 8 from 8 to 256"))?;
                Transform::LowRank { rank }
            }
            _ if rest.is_some() => return Err(unknown(text)),
            _ => Transform::None,
        };
        if transform == Transform::None {
            return Ok(Self { transform, quantizer: quantizer(text)? });
        }
        let quantizer = rest.map_or(Ok(Quantizer::F16), |rest| {
            if rest.starts_with("rot") || rest.starts_with("think") || rest.starts_with("lowrank") {
                return Err(format!(
                    "'{text}': {rest} transforms channels as well, and only one transform is possible"
                ));
            }
            quantizer(rest)
        })?;
        if matches!((transform, quantizer), (Transform::LowRank { .. }, Quantizer::Kivi { .. })) {
            return Err(format!(
                "'{text}': latents are projected token by token, while {quantizer} scales groups of tokens; \
                 use int8 or fp8"
            ));
        }
        Ok(Self { transform, quantizer })
    }
}

/// A part of a whole, such as 0.6.
fn permille(text: &str) -> Result<u32, String> {
    let error = || format!("think:{text}: give the part of the channels to keep, above 0 and at most 1, such as 0.6");
    let part: f64 = text.parse().map_err(|_| error())?;
    if !(part > 0.0 && part <= 1.0) {
        return Err(error());
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a number from 0 to 1000")]
    let permille = (part * 1000.0).round() as u32;
    Ok(permille.max(1))
}

impl FromStr for HiddenCodec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if !text.starts_with("k:") && !text.starts_with("v:") {
            let k: Codec = text.parse()?;
            return Ok(Self { k, v: Self::values_of(k), paired: false });
        }
        let (mut k, mut v) = (None, None);
        for part in text.split(',') {
            let (name, codec) = part.split_once(':').ok_or_else(|| unknown(text))?;
            let side = match name {
                "k" => &mut k,
                "v" => &mut v,
                _ => return Err(format!("'{part}': sides are k and v, such as k:kivi2,v:rot4")),
            };
            if side.replace(codec.parse::<Codec>()?).is_some() {
                return Err(format!("'{text}' gives {name} twice"));
            }
        }
        let v = v.unwrap_or_default();
        match v.transform {
            Transform::Pruning { .. } => {
                return Err(format!("'{text}': think leaves out channels of keys; values keep theirs"));
            }
            Transform::CentredRotation => return Err(format!("'{text}': only keys have a mean to take out")),
            _ => {}
        }
        Ok(Self { k: k.unwrap_or_default(), v, paired: false })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::PageGeometry;

    #[test]
    fn what_is_printed_parses_back() {
        for codec in examples() {
            assert_eq!(codec.to_string().parse(), Ok(codec), "{codec}");
        }
        assert_eq!("k:kivi2,v:kivi2".parse::<HiddenCodec>().map(|c| c.to_string()), Ok("kivi2".into()), "short form");
        assert_eq!("k:kivi2".parse::<HiddenCodec>().map(|c| c.to_string()), Ok("k:kivi2,v:f16".into()), "f16 left");
        assert_eq!("think:0.6+int8".parse::<HiddenCodec>(), "k:think:0.6+int8,v:int8".parse(), "values keep channels");
    }

    #[test]
    fn what_does_not_work_is_refused_with_the_reason() {
        for (text, reason) in [
            ("kivi3", "kivi4[:G]"),
            ("rot5", "rot4"),
            ("kivi4:48", "32, 64, 128"),
            ("int8:32", "no parameter"),
            ("think:0", "above 0"),
            ("think:1.5", "at most 1"),
            ("v:think:0.5", "values keep theirs"),
            ("v:mean+rot4", "only keys"),
            ("mean+int8", "not available"),
            ("lowrank:12", "multiple of 8"),
            ("lowrank:16+kivi4", "groups of tokens"),
            ("lowrank:16+rot4", "one transform"),
            ("k:int8,k:int8", "twice"),
            ("int8+kivi4", "not available"),
            ("", "not available"),
        ] {
            let refused = text.parse::<HiddenCodec>().expect_err(text);
            assert!(refused.contains(reason), "{text}: {refused}");
        }
        let small = PageGeometry { page_size: 16, head_dim: 64 };
        assert!("kivi4".parse::<HiddenCodec>().expect("a codec").check(small).is_err(), "a group of 32 in 16 tokens");
        let refused = "lowrank:128".parse::<HiddenCodec>().expect("a codec").check(small);
        assert!(refused.is_err(), "rank above the head's channels");
    }

    #[test]
    fn effective_bits_are_those_of_the_definitions() {
        let bits = |text: &str, page_size, head_dim| {
            let codec: HiddenCodec = text.parse().expect("a codec");
            codec.effective_bits(PageGeometry { page_size, head_dim })
        };
        for (text, page_size, head_dim, expected) in [
            ("f32", 64, 64, 32.0),
            ("f16", 64, 64, 16.0),
            ("fp8", 64, 64, 8.0),
            ("int8", 64, 128, 8.25),
            ("kivi2", 64, 128, 3.0),
            ("kivi2:64", 64, 128, 2.5),
            ("kivi4", 64, 128, 5.0),
            ("kivi4:128", 128, 128, 4.25),
            ("kivi2:128", 128, 128, 2.25),
            ("rot4", 64, 128, 4.125),
            ("rot3", 64, 128, 3.125),
            ("rot2", 64, 64, 2.25),
            ("k:kivi2,v:rot4", 64, 64, (3.0 + 4.25) / 2.0),
            ("mean+rot4", 64, 64, 4.25 + 0.125),
            // Half of the channels, and a position per token.
            ("lowrank:32", 64, 64, 8.0 + 32.0 / 128.0),
            // 40 of 64 channels of 8 bits, a scale and minimum per token, 48 bytes of mask; 64 channels of values.
            ("think:0.6+int8", 64, 64, (40.0 * 8.0 + 32.0 + 6.0 + 64.0 * 8.0 + 32.0) / 128.0),
        ] {
            assert!(
                (bits(text, page_size, head_dim) - expected).abs() < 1e-9,
                "{text}: {}",
                bits(text, page_size, head_dim)
            );
        }
    }
}
