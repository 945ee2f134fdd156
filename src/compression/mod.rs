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
//! Each dimension knows its registry of methods. Anything else is refused when it is parsed, with a sentence that says
//! what there is, and so are methods that can not work together. A method alone is looked for in all dimensions: `kivi4`
//! is `hidden=kivi4`, `snapkv:0.25` is `token=snapkv:0.25`.
//!
//! ```
//! use concertina::compression::Compression;
//! let full: Compression = "hidden=f16".parse().unwrap();
//! assert_eq!(full, Compression::default());
//! assert_eq!("full".parse::<Compression>().unwrap(), full);
//! let mixed: Compression = "layer=share:0,0,2,2,token=snapkv:0.25,hidden=k:kivi2,v:rot4".parse().unwrap();
//! assert_eq!(mixed.hidden, "k:kivi2,v:rot4".parse().unwrap());
//! assert_eq!(mixed.layer.owners(4).unwrap(), [0, 0, 2, 2]);
//! assert_eq!("token=snapkv:0.25".parse::<Compression>().unwrap().short(), "token=snapkv:0.25");
//! let refused = "hidden=kivi3".parse::<Compression>().unwrap_err();
//! assert!(refused.to_string().contains("kivi4"));
//! ```

pub mod head;
pub mod hidden;
pub mod keep;
pub mod layer;
mod syntax;
pub mod token;

use std::fmt;
use std::str::FromStr;

use head::HeadPattern;
use hidden::{HiddenCodec, Transform};
use layer::{LayerPolicy, Sharing};
use token::{Score, TokenPolicy};

/// What is done to a KV cache in each of the four dimensions.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
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
    /// The method does not exist, or its parameters do not fit.
    #[error("{0}")]
    Method(String),
    /// The methods exist, but not together.
    #[error("{0}")]
    Together(String),
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { layer, head, token, hidden } = self;
        write!(f, "layer={layer},head={head},token={token},hidden={hidden}")
    }
}

const DIMENSIONS: [&str; 4] = ["layer", "head", "token", "hidden"];

/// The dimension that knows a method; the hidden one where none does, which then says so.
fn dimension_of(method: &str) -> &'static str {
    match method {
        _ if layer::knows(method) => "layer",
        _ if head::knows(method) => "head",
        _ if token::knows(method) => "token",
        _ => "hidden",
    }
}

/// Cuts a text into dimensions and their methods. A part without a dimension continues the method before it, as in
/// `hidden=k:kivi2,v:rot4`; a text without any is a method, a codec where no other dimension knows it.
fn pairs(text: &str) -> Result<Vec<(&str, String)>, ParseCompressionError> {
    let syntax = || ParseCompressionError::Syntax(text.to_owned());
    let alone = text.trim();
    let no_method = alone.is_empty() || DIMENSIONS.contains(&alone);
    if !text.contains('=') && !no_method {
        return Ok(vec![(dimension_of(alone), alone.to_owned())]);
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
        for (name, method) in pairs(text)? {
            let read = match name {
                "layer" => method.parse().map(|layer| compression.layer = layer),
                "head" => method.parse().map(|head| compression.head = head),
                "token" => method.parse().map(|token| compression.token = token),
                "hidden" => method.parse().map(|hidden| compression.hidden = hidden).map_err(|error: String| {
                    // A method alone may have been meant for any dimension.
                    if text.contains('=') || !error.starts_with("hidden=") {
                        return error;
                    }
                    format!("{error}; {}; {}; {}", layer::known(), head::known(), token::known())
                }),
                other => return Err(ParseCompressionError::UnknownDimension(other.to_owned())),
            };
            read.map_err(ParseCompressionError::Method)?;
            let dimension = DIMENSIONS.into_iter().find(|known| *known == name).expect("a name read above");
            if seen.contains(&dimension) {
                return Err(ParseCompressionError::Repeated(dimension));
            }
            seen.push(dimension);
        }
        compression.check_together().map_err(ParseCompressionError::Together)?;
        Ok(compression)
    }
}

impl Compression {
    /// The dimensions that are not full, as they are parsed; `full` where all are.
    pub fn short(&self) -> String {
        let Self { layer, head, token, hidden } = self;
        let mut parts = Vec::new();
        let mut part = |full: bool, name: &str, method: &dyn fmt::Display| {
            if !full {
                parts.push(format!("{name}={method}"));
            }
        };
        part(*layer == LayerPolicy::default(), "layer", layer);
        part(*head == HeadPattern::Full, "head", head);
        part(*token == TokenPolicy::Full, "token", token);
        part(*hidden == HiddenCodec::F16, "hidden", hidden);
        if parts.is_empty() { "full".to_owned() } else { parts.join(",") }
    }

    /// Whether the methods of the dimensions can work together.
    ///
    /// # Errors
    /// A sentence with the reason.
    pub fn check_together(&self) -> Result<(), String> {
        let Self { layer, head, token, hidden } = self;
        let merged = matches!(layer.share, Sharing::Merge { .. });
        if let TokenPolicy::Quest { .. } = token {
            if *head != HeadPattern::Full {
                return Err(format!(
                    "token={token} reads the pages of whole lists, while head={head} leaves tokens out of some; use one"
                ));
            }
            if merged {
                return Err(format!(
                    "token={token} bounds scores by the keys of a page, which layer={layer} stores as directions that \
                     two layers have in common; use one"
                ));
            }
        }
        if let Some(eviction) = token.eviction().filter(|eviction| eviction.every.is_some() && merged) {
            return Err(format!(
                "token={eviction} evicts again and again, while layer={layer} merges what two layers hold once; use one"
            ));
        }
        if let Some(eviction) = token.eviction().filter(|eviction| eviction.rerotate) {
            // Keys are turned by one angle behind the sink, which is right where only the first and the last tokens stay.
            if eviction.rule(u32::MAX).score != Score::None || *head != HeadPattern::Full {
                return Err(format!(
                    "{} leaves tokens of many distances to their places in the cache, and keys are turned by one; \
                     leave rerotate out",
                    self.short()
                ));
            }
            if layer.share != Sharing::None {
                return Err(format!(
                    "token={token} turns each layer's keys to new positions, while by layer={layer} layers have keys in \
                     common; leave rerotate out"
                ));
            }
            if let Transform::LowRank { .. } = hidden.k.transform {
                return Err(format!(
                    "token={token} turns keys to new positions, while hidden={hidden} stores them before positions are \
                     applied and reads positions off the page; leave rerotate out"
                ));
            }
        }
        Ok(())
    }
}

/// Every example of every dimension, the others full.
pub fn examples() -> Vec<Compression> {
    let full = Compression::default;
    let layers = layer::examples().map(|layer| Compression { layer, ..full() });
    let heads = head::examples().map(|head| Compression { head, ..full() });
    let tokens = token::examples().map(|token| Compression { token, ..full() });
    let hidden = hidden::examples().map(|hidden| Compression { hidden, ..full() });
    layers.chain(heads).chain(tokens).chain(hidden).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_parses_back() {
        let full = Compression::default();
        assert_eq!(full.to_string(), "layer=full,head=full,token=full,hidden=f16", "all four");
        assert_eq!(full.to_string().parse(), Ok(full.clone()), "round trip");
        assert_eq!("full".parse(), Ok(full.clone()), "short form");
        assert_eq!("token=full,layer=full".parse(), Ok(full.clone()), "any order, any subset");
        for compression in examples() {
            assert_eq!(compression.to_string().parse(), Ok(compression.clone()), "{compression}");
            let short = compression.short();
            assert_eq!(short.parse(), Ok(compression.clone()), "{short}");
            if compression != full {
                let (_, method) = short.split_once('=').expect("one dimension");
                assert_eq!(method.parse(), Ok(compression), "{method} alone");
            }
        }
        assert_eq!(full.short(), "full", "nothing to name");
        let text = "layer=share:0,0,2,2,head=duo:0.5,token=snapkv:0.25,hidden=k:int8,v:kivi2";
        assert_eq!(text.parse::<Compression>().map(|c| c.short()), Ok(text.to_owned()), "commas inside methods");
    }

    #[test]
    fn what_does_not_exist_is_refused_with_a_sentence() {
        let refusal = |text: &str| text.parse::<Compression>().expect_err("should be refused").to_string();
        assert!(
            refusal("hidden=kivi3").starts_with("hidden=kivi3 is not available: hidden knows f16"),
            "no such codec"
        );
        assert!(refusal("kivi5").starts_with("hidden=kivi5 is not available"), "a codec alone");
        let anywhere = ["layer knows full", "head knows full", "token knows full"];
        assert!(anywhere.iter().all(|known| refusal("snapvk:0.25").contains(known)), "a method of any dimension");
        assert!(refusal("think:1.5").contains("at most 1"), "its own reason");
        assert!(refusal("hidden=k:think:0.5,v:think:0.5").contains("values keep theirs"), "a reason");
        assert!(refusal("token=kivi4").starts_with("token=kivi4 is not available: token knows full"), "another's");
        assert!(refusal("colour=red").contains("layer, head, token and hidden"), "unknown dimension");
        assert!(refusal("hidden=f16,hidden=f16").contains("twice"), "repeated dimension");
        assert!(refusal("").contains("dimension=method"), "empty");
        assert!(refusal("hidden").contains("dimension=method"), "no method");
        assert!(refusal("snapkv:0.25,hidden=kivi4").contains("dimension=method"), "no dimension at first");
    }

    #[test]
    fn what_can_not_work_together_is_refused_with_the_reason() {
        for (text, reason) in [
            ("token=quest:512,head=duo:0.5", "use one"),
            ("token=quest:512,head=prune:0.5", "use one"),
            ("token=quest:512,layer=minicache", "directions"),
            ("token=streaming:512:rerotate,layer=share:2", "leave rerotate out"),
            ("token=streaming:512:rerotate,layer=minicache", "leave rerotate out"),
            ("token=streaming:512:rerotate,hidden=lowrank:32", "leave rerotate out"),
        ] {
            let refused = text.parse::<Compression>().expect_err(text);
            assert!(matches!(&refused, ParseCompressionError::Together(why) if why.contains(reason)), "{refused}");
            assert!(!refused.to_string().contains("  "), "a sentence, not a column: {refused}");
        }
        for text in [
            "token=quest:512,layer=share:2",
            "token=streaming:512:rerotate,hidden=v:lowrank:32",
            "token=streaming:512:rerotate,layer=skip-prefill:3..",
            "token=kvzip:0.3,layer=skip-prefill:3..",
            "token=snapkv:0.25,head=duo:0.5,layer=minicache,hidden=kivi4",
        ] {
            assert!(text.parse::<Compression>().is_ok(), "{text}");
        }
    }
}
