//! Who holds which entries of the table buffer.

/// First-fit ranges of table entries.
#[derive(Clone, Debug)]
pub struct TableRanges {
    /// Free ranges (start, length), ascending, never adjacent.
    free: Vec<(u32, u32)>,
    total: u32,
}

impl TableRanges {
    /// `total` free entries.
    pub fn new(total: u32) -> Self {
        Self { free: vec![(0, total)], total }
    }

    /// Entries in all.
    pub const fn total(&self) -> u32 {
        self.total
    }

    /// Reserves `length` adjacent entries.
    pub fn reserve(&mut self, length: u32) -> Option<u32> {
        let at = self.free.iter().position(|(_, free)| *free >= length)?;
        let (start, free) = self.free[at];
        if free == length {
            self.free.remove(at);
        } else {
            self.free[at] = (start + length, free - length);
        }
        Some(start)
    }

    /// Returns entries that [`Self::reserve`] gave.
    ///
    /// # Panics
    /// When any of them is already free.
    pub fn release(&mut self, start: u32, length: u32) {
        let at = self.free.partition_point(|(s, _)| *s < start);
        let before_end = if at > 0 { self.free[at - 1].0 + self.free[at - 1].1 } else { 0 };
        assert!(before_end <= start, "table entries from {start} should not be released twice");
        if let Some((next, _)) = self.free.get(at) {
            assert!(start + length <= *next, "table entries up to {} should not be released twice", start + length);
        }
        self.free.insert(at, (start, length));
        if at + 1 < self.free.len() && start + length == self.free[at + 1].0 {
            self.free[at].1 += self.free[at + 1].1;
            self.free.remove(at + 1);
        }
        if at > 0 && before_end == start {
            self.free[at - 1].1 += self.free[at].1;
            self.free.remove(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_join_again_whatever_the_order_of_release() {
        let mut ranges = TableRanges::new(100);
        let a = ranges.reserve(30).expect("30 of 100");
        let b = ranges.reserve(30).expect("60 of 100");
        let c = ranges.reserve(40).expect("all");
        assert_eq!(ranges.reserve(1), None, "full");
        ranges.release(a, 30);
        ranges.release(c, 40);
        assert_eq!(ranges.reserve(70), None, "in two pieces");
        ranges.release(b, 30);
        assert_eq!(ranges.reserve(100), Some(0), "in one piece again");
    }

    #[test]
    #[should_panic(expected = "should not be released twice")]
    fn entries_can_not_be_released_twice() {
        let mut ranges = TableRanges::new(10);
        let a = ranges.reserve(4).expect("4 of 10");
        ranges.release(a, 4);
        ranges.release(a, 4);
    }
}
