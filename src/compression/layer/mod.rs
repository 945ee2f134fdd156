//! The layer dimension: which layers own a cache, read another layer's, or skip the prompt.
//!
//! | written | what happens | source |
//! |---|---|---|
//! | `share:2` | of 2 layers the first owns a cache, the other reads it | CLA, arXiv:2405.12981 |
//! | `share:0,0,2,2` | each layer reads the cache of the layer named | CLA; LCKV, arXiv:2405.10637, allows other maps |
//! | `minicache:16..:retain0.05` | from layer 16 on, two layers store one direction and two lengths per token | `MiniCache`, arXiv:2405.14366 |
//! | `skip-prefill:18..` | prompt tokens stop below layer 18; its input gives the keys and values of all layers above | `SwiftKV`, arXiv:2410.03960 |
//!
//! `skip-prefill` goes with either of the others: `share:2+skip-prefill:18..`.
//!
//! Sharing and skipping are what a model was trained for; over another model they are measured, not recommended.
//! `MiniCache` needs no training: keys and values of neighbouring layers point alike in the upper half of a model. The
//! tokens whose directions differ most, the part `retain` of them, stay as they are in both layers.

use std::sync::Arc;

pub mod minicache;
mod parse;

/// A way to write a layer policy.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The name that it is written with.
    pub name: &'static str,
    /// As it is written, parameters as letters.
    pub syntax: &'static str,
    /// What it does, in one line.
    pub summary: &'static str,
    /// Where it comes from.
    pub source: &'static str,
    /// What is taken where a parameter is left out, as it is written.
    pub defaults: &'static [&'static str],
    /// Written-out examples: what tests and listings cover.
    pub examples: &'static [&'static str],
}

/// Every layer policy.
pub const REGISTRY: &[Entry] = &[
    Entry {
        name: "share",
        syntax: "share:N, share:L,L,...",
        summary: "N layers read one cache; or each layer that of the layer L named for it",
        source: "CLA, arXiv:2405.12981",
        defaults: &[],
        examples: &["share:2", "share:0,0,2,2"],
    },
    Entry {
        name: "minicache",
        syntax: "minicache[:L..][:retainX]",
        summary: "from layer L (or the middle) on, two layers store one direction; the part X of the tokens stays apart",
        source: "MiniCache, arXiv:2405.14366",
        defaults: &["retain0.05"],
        examples: &["minicache", "minicache:16..:retain0.1"],
    },
    Entry {
        name: "skip-prefill",
        syntax: "skip-prefill:L..",
        summary: "prompt tokens stop below layer L, whose input gives all keys and values above",
        source: "SwiftKV, arXiv:2410.03960",
        defaults: &[],
        examples: &["skip-prefill:18..", "share:2+skip-prefill:18.."],
    },
];

/// Who owns the caches.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum Sharing {
    /// Every layer its own.
    #[default]
    None,
    /// The first of so many layers.
    Every(u32),
    /// Of each layer, the owner of the cache that it reads.
    Map(Arc<[u16]>),
    /// Two layers store one direction.
    Merge {
        /// The first layer that is merged; the middle where none is given.
        from: Option<u32>,
        /// Tokens that stay apart, of 1000.
        retain_permille: u32,
    },
}

/// What each layer's cache is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct LayerPolicy {
    /// Who owns the caches.
    pub share: Sharing,
    /// The first layer that prompt tokens do not reach.
    pub skip_prefill: Option<u32>,
}

/// Whether a text begins with the name of a policy.
pub(super) fn knows(text: &str) -> bool {
    let name = text.split([':', '+']).next();
    REGISTRY.iter().any(|entry| name == Some(entry.name))
}

/// All ways to write a policy.
pub(super) fn known() -> String {
    let policies: Vec<_> = REGISTRY.iter().map(|entry| entry.syntax).collect();
    format!("layer knows full, {}", policies.join(", "))
}

/// All examples of the registry.
pub fn examples() -> impl Iterator<Item = LayerPolicy> {
    let written = REGISTRY.iter().flat_map(|entry| entry.examples);
    written.map(|text| text.parse().expect("the registry's examples should parse"))
}

impl LayerPolicy {
    /// Of each layer, the one whose cache it reads: itself where it owns one, which merged layers do.
    ///
    /// # Errors
    /// A sentence when a map is for another number of layers.
    pub fn owners(&self, num_layers: u32) -> Result<Vec<u32>, String> {
        match &self.share {
            Sharing::None | Sharing::Merge { .. } => Ok((0..num_layers).collect()),
            Sharing::Every(every) => Ok((0..num_layers).map(|layer| layer - layer % every).collect()),
            Sharing::Map(owners) if owners.len() == num_layers as usize => {
                Ok(owners.iter().map(|owner| u32::from(*owner)).collect())
            }
            Sharing::Map(owners) => {
                Err(format!("layer={self} names {} layers, the model has {num_layers}", owners.len()))
            }
        }
    }

    /// The pairs of layers that are merged; a last layer without a partner is not.
    ///
    /// # Errors
    /// A sentence when there is no pair from the first layer on.
    pub fn merged_pairs(&self, num_layers: u32) -> Result<Vec<(u32, u32)>, String> {
        let Sharing::Merge { from, .. } = self.share else {
            return Ok(Vec::new());
        };
        let from = from.unwrap_or(num_layers / 2);
        let last = num_layers.saturating_sub(1);
        if from >= last {
            return Err(format!("layer={self}: no two of {num_layers} layers come from layer {from} on"));
        }
        Ok((from..last).step_by(2).map(|layer| (layer, layer + 1)).collect())
    }

    /// The first layer that prompt tokens do not reach.
    ///
    /// # Errors
    /// A sentence when the model has no such layer.
    pub fn skip_from(&self, num_layers: u32) -> Result<Option<u32>, String> {
        match self.skip_prefill {
            Some(from) if from >= num_layers => {
                Err(format!("layer={self}: the model's {num_layers} layers end before layer {from}"))
            }
            from => Ok(from),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> LayerPolicy {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn policies_are_resolved_for_a_model() {
        assert_eq!(read("full").owners(3), Ok(vec![0, 1, 2]), "each its own");
        assert_eq!(read("share:2").owners(5), Ok(vec![0, 0, 2, 2, 4]), "pairs, and one alone");
        assert_eq!(read("share:0,0,2,0").owners(4), Ok(vec![0, 0, 2, 0]), "a map");
        assert!(read("share:0,0,2,0").owners(5).is_err_and(|e| e.contains("4 layers, the model has 5")), "length");
        assert_eq!(read("minicache").merged_pairs(7), Ok(vec![(3, 4), (5, 6)]), "from the middle");
        assert_eq!(read("minicache:4..").merged_pairs(7), Ok(vec![(4, 5)]), "one is left");
        assert_eq!(read("minicache").owners(2), Ok(vec![0, 1]), "merged layers own their lengths");
        assert_eq!(read("share:2").merged_pairs(7), Ok(vec![]), "nothing merged");
        assert!(read("minicache:6..").merged_pairs(7).is_err_and(|e| e.contains("7 layers")), "no pair");
        assert_eq!(read("skip-prefill:6..").skip_from(7), Ok(Some(6)), "the last");
        assert_eq!(read("share:2").skip_from(7), Ok(None), "none");
        assert!(read("skip-prefill:7..").skip_from(7).is_err_and(|e| e.contains("7 layers end")), "beyond");
    }
}
