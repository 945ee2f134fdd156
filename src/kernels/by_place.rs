//! Work items grouped by what they can share a dispatch over.

use std::ops::Range;

/// Collects items per place and lays them out one place after another. It keeps its memory.
#[derive(Clone, Debug)]
pub(crate) struct ByPlace<T, P>(Vec<(P, Vec<T>)>);

impl<T, P> Default for ByPlace<T, P> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Copy, P: Copy + Ord> ByPlace<T, P> {
    pub(crate) fn push(&mut self, place: P, item: T) {
        self.of(place).push(item);
    }

    /// The items of a place, to add to. The place moves to the front, since what comes next is mostly of one of the last places.
    #[inline]
    pub(crate) fn of(&mut self, place: P) -> &mut Vec<T> {
        if self.0.first().is_none_or(|(first, _)| *first != place) {
            self.bring_forward(place);
        }
        &mut self.0[0].1
    }

    fn bring_forward(&mut self, place: P) {
        let at = self.0.iter().position(|(p, _)| *p == place).unwrap_or_else(|| {
            self.0.push((place, Vec::new()));
            self.0.len() - 1
        });
        self.0.swap(0, at);
    }

    /// Moves all items to the end of `list`; for every place that has some, where.
    pub(crate) fn lay_out(&mut self, list: &mut Vec<T>, dispatches: &mut Vec<(P, Range<u32>)>) {
        self.0.sort_unstable_by_key(|(place, _)| *place);
        for (place, items) in self.0.iter_mut().filter(|(_, items)| !items.is_empty()) {
            let start = len_u32(list);
            list.append(items);
            dispatches.push((*place, start..len_u32(list)));
        }
    }

    /// The same, for items that are collected once.
    pub(crate) fn laid_out(mut self, list: &mut Vec<T>) -> Vec<(P, Range<u32>)> {
        let mut dispatches = Vec::with_capacity(self.0.len());
        self.lay_out(list, &mut dispatches);
        dispatches
    }
}

pub(super) fn len_u32<T>(items: &[T]) -> u32 {
    u32::try_from(items.len()).expect("work items of a step are counted in 32 bits")
}
