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
//! Each dimension knows its registry of methods; today every one of them holds the uncompressed choice. Anything
//! else is refused when it is parsed, with a sentence that says what there is.
//!
//! ```
//! use concertina::compression::Compression;
//! let full: Compression = "hidden=f16".parse().unwrap();
//! assert_eq!(full, Compression::default());
//! assert_eq!("full".parse::<Compression>().unwrap(), full);
//! let refused = "hidden=kivi4".parse::<Compression>().unwrap_err();
//! assert!(refused.to_string().contains("f16"));
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
        write!(f, "layer={},head={},token={},hidden={}", layer.name(), head.name(), token.name(), hidden.name())
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

impl FromStr for Compression {
    type Err = ParseCompressionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut compression = Self::default();
        if text.trim() == "full" {
            return Ok(compression);
        }
        let mut seen: Vec<&'static str> = Vec::new();
        for part in text.split(',') {
            let (dimension, method) =
                part.trim().split_once('=').ok_or_else(|| ParseCompressionError::Syntax(text.to_owned()))?;
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
                    compression.hidden = lookup("hidden", method, &HiddenCodec::ALL, HiddenCodec::name)?;
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
    }

    #[test]
    fn what_does_not_exist_is_refused_with_a_sentence() {
        let refusal = |text: &str| text.parse::<Compression>().expect_err("should be refused").to_string();
        assert_eq!(refusal("hidden=kivi4"), "hidden=kivi4 is not available: hidden knows f16");
        assert_eq!(refusal("token=snapkv:0.25"), "token=snapkv:0.25 is not available: token knows full");
        assert!(refusal("colour=red").contains("layer, head, token and hidden"), "unknown dimension");
        assert!(refusal("hidden=f16,hidden=f16").contains("twice"), "repeated dimension");
        assert!(refusal("").contains("dimension=method"), "empty");
        assert!(refusal("hidden").contains("dimension=method"), "no method");
    }
}
