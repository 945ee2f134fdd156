//! Arenas that take each other's place from one layer to the next.
//!
//! A layer prefers one arena, so layers after each other are often spread alike over different ones. What a plan says of the
//! first then holds for the second under other arenas.

use super::page_table::PageRun;

/// Which arena takes the place of which: one of one, both ways.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ArenaMap(Vec<(u16, u16)>);

impl ArenaMap {
    /// Nothing yet, in the same memory.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// Whether every arena takes its own place.
    pub fn is_identity(&self) -> bool {
        self.0.iter().all(|(from, to)| from == to)
    }

    /// The arena in the place of one; itself where that is not known, as for the window, which all layers share.
    pub fn of(&self, arena: u16) -> u16 {
        self.0.iter().find(|(from, _)| *from == arena).map_or(arena, |(_, to)| *to)
    }

    /// Whether pages are spread alike, each run of `b` in the arena that takes the place of that of `a`.
    pub(super) fn takes(&mut self, a: &[PageRun], b: &[PageRun]) -> bool {
        a.len() == b.len()
            && a.iter().zip(b).all(|(a, b)| (a.first, a.pages) == (b.first, b.pages) && self.pair(a.arena, b.arena))
    }

    /// Lets an arena take the place of another, where neither stands elsewhere.
    fn pair(&mut self, from: u16, to: u16) -> bool {
        if let Some(known) = self.0.iter().find(|(a, b)| *a == from || *b == to) {
            return *known == (from, to);
        }
        self.0.push((from, to));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(arenas: &[u16]) -> Vec<PageRun> {
        arenas.iter().zip(0..).map(|(arena, first)| PageRun { arena: *arena, first, pages: 1 }).collect()
    }

    #[test]
    fn an_arena_takes_the_place_of_one_other() {
        let mut arenas = ArenaMap::default();
        assert!(arenas.is_identity() && arenas.of(3) == 3, "nothing is known");
        assert!(arenas.takes(&runs(&[3, 5, 3]), &runs(&[5, 3, 5])), "two that change places");
        assert_eq!([3, 5, 7].map(|arena| arenas.of(arena)), [5, 3, 7], "and a third that is not known");
        assert!(!arenas.is_identity(), "they differ");
        assert!(!arenas.takes(&runs(&[3]), &runs(&[4])), "3 has another");
        assert!(!arenas.takes(&runs(&[4]), &runs(&[5])), "5 is taken");
        arenas.clear();
        assert!(arenas.takes(&runs(&[4]), &runs(&[4])) && arenas.is_identity(), "itself");
        assert!(!arenas.takes(&runs(&[4, 4]), &runs(&[4])), "a run less");
        let longer = [PageRun { arena: 4, first: 0, pages: 2 }];
        assert!(!arenas.takes(&runs(&[4]), &longer), "a page more");
    }
}
