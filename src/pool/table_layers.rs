//! Layers that read one cache.

use std::sync::Arc;

/// Which layer's lists each layer of a model reads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layers(Option<Arc<[u32]>>);

impl Layers {
    /// Every layer its own.
    pub const OWN: Self = Self(None);

    /// From the owner of each layer's cache; an owner owns its own.
    pub fn new(owners: &[u32]) -> Self {
        if owners.iter().zip(0..).all(|(owner, layer)| *owner == layer) {
            return Self::OWN;
        }
        let mut own = 0;
        let mut lists: Vec<u32> = Vec::with_capacity(owners.len());
        for (owner, layer) in owners.iter().zip(0..) {
            if *owner == layer {
                lists.push(own);
                own += 1;
            } else {
                lists.push(lists[*owner as usize]);
            }
        }
        Self(Some(lists.into()))
    }

    /// The layer of lists that a layer reads.
    #[inline]
    pub fn list(&self, layer: u32) -> u32 {
        self.0.as_ref().map_or(layer, |lists| lists[layer as usize])
    }

    /// Whether every layer reads the last cache before it. Rows in the
    /// [`Window`](super::table_shape::Window) are those of the last layer that kept any.
    pub(super) fn follow(&self) -> bool {
        let lists = self.0.as_deref().unwrap_or_default();
        let last = lists.iter().scan(0, |last, list| {
            *last = *list.max(last);
            Some(*last)
        });
        lists.iter().zip(last).all(|(list, last)| *list == last)
    }

    /// Whether a layer's own keys and values are kept.
    pub fn owns(&self, layer: u32) -> bool {
        self.owner(layer) == layer
    }

    /// The layer whose keys and values a layer reads.
    pub fn owner(&self, layer: u32) -> u32 {
        let Some(lists) = &self.0 else { return layer };
        let first = lists.iter().position(|list| *list == lists[layer as usize]);
        u32::try_from(first.expect("a layer is among its lists")).expect("layers are few")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_leads_from_a_layer_to_the_lists_of_its_owner_and_back() {
        assert_eq!(Layers::new(&[0, 1, 2, 3]), Layers::OWN, "each its own");
        assert_eq!(Layers::new(&[]), Layers::default(), "none");
        let shared = Layers::new(&[0, 0, 2, 0, 4]);
        let lists: Vec<u32> = (0..5).map(|layer| shared.list(layer)).collect();
        assert_eq!(lists, [0, 0, 1, 0, 2], "lists of owners follow each other");
        let owners: Vec<u32> = (0..5).map(|layer| shared.owner(layer)).collect();
        assert_eq!(owners, [0, 0, 2, 0, 4], "and lead back to them");
        assert!((0..5).all(|layer| shared.owns(layer) == [0, 2, 4].contains(&layer)), "an owner owns its own");
    }

    #[test]
    fn a_layer_that_reads_an_earlier_cache_than_the_last_is_noticed() {
        for owners in [&[0, 1, 2][..], &[0, 0, 2, 2], &[0, 0, 0, 3], &[]] {
            assert!(Layers::new(owners).follow(), "{owners:?} each read the last");
        }
        for owners in [&[0, 1, 0][..], &[0, 0, 2, 0], &[0, 1, 2, 1, 4]] {
            assert!(!Layers::new(owners).follow(), "{owners:?} reach back");
        }
    }
}
