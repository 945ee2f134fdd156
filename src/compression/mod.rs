//! How a KV cache is made smaller: four independent choices, one value.
//!
//! [`Compression`] describes a cache everywhere: in the library, on the command line, in reports. It reads and prints
//! as `layer=full,head=full,token=full,hidden=f16`; dimensions left out are full.
//!
//! | dimension | module | decides |
//! |---|---|---|
//! | layer | [`layer`] | which layers own a cache, share another layer's, or skip prefill |
//! | head | [`head`] | which KV heads keep everything, sink and recent tokens only, or nothing |
//! | token | [`token`] | which tokens of a head stay |
//! | hidden | [`hidden`] | how one page of K and V becomes bytes |
//!
//! Each dimension knows its registry of methods; layer, head and token hold only the uncompressed choice today. Anything
//! else is refused when it is parsed, with a sentence that says what there is. A codec alone means the hidden
//! dimension: `kivi4` is `hidden=kivi4`.
//!
//! ```
//! use concertina::compression::Compression;
//! let full: Compression = "hidden=f16".parse().unwrap();
//! assert_eq!(full, Compression::default());
//! assert_eq!("full".parse::<Compression>().unwrap(), full);
//! let mixed: Compression = "hidden=k:kivi2,v:rot4".parse().unwrap();
//! assert_eq!(mixed.hidden, "k:kivi2,v:rot4".parse().unwrap());
//! let refused = "hidden=kivi3".parse::<Compression>().unwrap_err();
//! assert!(refused.to_string().contains("kivi4"));
//! ```

pub mod head;
pub mod hidden;
pub mod layer;
pub mod token;

use std::fmt;
use std::str::FromStr;

use head::HeadPattern;
use hidden::HiddenCodec;
use layer::LayerPolicy;
use token::TokenPolicy;

/// What is done to a KV cache in each of the four dimensions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Compression {
    /// Which layers own a cache.
    pub layer: LayerPolicy,
    /// Which KV heads keep everything.
    pub head: HeadPattern,
    /// Which tokens stay.
    pub token: TokenPolicy,
    /// How a page becomes bytes.
    pub hidden: HiddenCodec,
}

/// A compression that could not be read or does not exist.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseCompressionError {
    /// A part is not `dimension=method`.
    #[error(
        "'{0}' is not a compression: write dimension=method pairs, such as layer=full,head=full,token=full,hidden=f16"
    )]
    Syntax(String),
    /// The dimension does not exist.
    #[error("there is no dimension '{0}': the four are layer, head, token and hidden")]
    UnknownDimension(String),
    /// A dimension is given twice.
    #[error("the dimension {0} is given twice")]
    Repeated(&'static str),
    /// The codec does not exist, or its parameters do not fit.
    #[error("{0}")]
    Codec(String),
    /// The method is not in the dimension's registry.
    #[error("{dimension}={method} is not available: {dimension} knows {}", known.join(", "))]
    UnknownMethod {
        /// The dimension.
        dimension: &'static str,
        /// What was asked for.
        method: String,
        /// What there is.
        known: Vec<&'static str>,
    },
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { layer, head, token, hidden } = self;
        write!(f, "layer={},head={},token={},hidden={}", layer.name(), head.name(), token.name(), hidden)
    }
}

/// Finds `method` in a dimension's registry.
fn lookup<T: Copy>(
    dimension: &'static str,
    method: &str,
    all: &[T],
    name: fn(&T) -> &'static str,
) -> Result<T, ParseCompressionError> {
    all.iter().find(|m| name(m) == method).copied().ok_or_else(|| ParseCompressionError::UnknownMethod {
        dimension,
        method: method.to_owned(),
        known: all.iter().map(name).collect(),
    })
}

/// Cuts a text into dimensions and their methods. A part without a dimension continues the method before it, as in
/// `hidden=k:kivi2,v:rot4`; a text without any is a codec.
fn pairs(text: &str) -> Result<Vec<(&str, String)>, ParseCompressionError> {
    let syntax = || ParseCompressionError::Syntax(text.to_owned());
    let no_codec = ["", "layer", "head", "token", "hidden"].contains(&text.trim());
    if !text.contains('=') && !no_codec {
        return Ok(vec![("hidden", text.trim().to_owned())]);
    }
    let mut pairs: Vec<(&str, String)> = Vec::new();
    for part in text.split(',').map(str::trim) {
        match part.split_once('=') {
            Some((dimension, method)) => pairs.push((dimension, method.to_owned())),
            None => {
                let (_, method) = pairs.last_mut().ok_or_else(syntax)?;
                method.push(',');
                method.push_str(part);
            }
        }
    }
    Ok(pairs)
}

impl FromStr for Compression {
    type Err = ParseCompressionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut compression = Self::default();
        if text.trim() == "full" {
            return Ok(compression);
        }
        let mut seen: Vec<&'static str> = Vec::new();
        for (dimension, method) in pairs(text)? {
            let method = method.as_str();
            let dimension = match dimension {
                "layer" => {
                    compression.layer = lookup("layer", method, &LayerPolicy::ALL, LayerPolicy::name)?;
                    "layer"
                }
                "head" => {
                    compression.head = lookup("head", method, &HeadPattern::ALL, HeadPattern::name)?;
                    "head"
                }
                "token" => {
                    compression.token = lookup("token", method, &TokenPolicy::ALL, TokenPolicy::name)?;
                    "token"
                }
                "hidden" => {
                    compression.hidden = method.parse().map_err(ParseCompressionError::Codec)?;
                    "hidden"
                }
                other => return Err(ParseCompressionError::UnknownDimension(other.to_owned())),
            };
            if seen.contains(&dimension) {
                return Err(ParseCompressionError::Repeated(dimension));
            }
            seen.push(dimension);
        }
        Ok(compression)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_parses_back() {
        let full = Compression::default();
        assert_eq!(full.to_string().parse(), Ok(full), "round trip");
        assert_eq!("full".parse(), Ok(full), "short form");
        assert_eq!("token=full,layer=full".parse(), Ok(full), "any order, any subset");
        for codec in hidden::examples() {
            let compression = Compression { hidden: codec, ..full };
            assert_eq!(compression.to_string().parse(), Ok(compression), "{codec}");
            assert_eq!(codec.to_string().parse(), Ok(compression), "{codec} alone");
        }
        assert_eq!(
            "hidden=k:int8,v:kivi2,token=full".parse::<Compression>().map(|c| c.hidden),
            "k:int8,v:kivi2".parse().map_err(ParseCompressionError::Codec),
            "a comma inside a method"
        );
    }

    #[test]
    fn what_does_not_exist_is_refused_with_a_sentence() {
        let refusal = |text: &str| text.parse::<Compression>().expect_err("should be refused").to_string();
        assert!(
            refusal("hidden=kivi3").starts_with("hidden=kivi3 is not available: hidden knows f16"),
            "no such codec"
        );
        assert!(refusal("kivi5").starts_with("hidden=kivi5 is not available"), "a codec alone");
        assert!(refusal("think:1.5").contains("at most 1"), "its own reason");
        assert!(refusal("hidden=k:think:0.5,v:think:0.5").contains("values keep theirs"), "a reason");
        assert_eq!(refusal("token=snapkv:0.25"), "token=snapkv:0.25 is not available: token knows full");
        assert!(refusal("colour=red").contains("layer, head, token and hidden"), "unknown dimension");
        assert!(refusal("hidden=f16,hidden=f16").contains("twice"), "repeated dimension");
        assert!(refusal("").contains("dimension=method"), "empty");
        assert!(refusal("hidden").contains("dimension=method"), "no method");
    }
}
