//! Page tables that name pages of each other: a step of the walk, and cases by hand.

use concertina::geometry::Bytes;
use concertina::pool::PagePool;
use concertina::pool::page_table::{Capacity, PageTable, Quest, TableShape, Window};
use rand::RngExt;

use super::{ModelSession, SHAPE, SessionWalk, admit, no_window, of_tail, roomy};

impl SessionWalk {
    /// A session that begins as another does.
    pub(crate) fn adopt(&mut self) {
        let Some(at) = self.pick() else { return };
        let capacity = Capacity { tail_tokens: self.rng.random_range(1..900), ..self.sessions[at].capacity };
        let donor = &self.sessions[at];
        let (shape, size, kept) = (donor.shape, donor.size(), donor.kept.clone());
        let pages = self.rng.random_range(0..=donor.tail.min(capacity.tail_tokens) / size);
        let (tails, all) = (donor.tails(), of_tail(&shape, capacity));
        let shared = if shape.codec.seals() { (0, u64::from(pages)) } else { (u64::from(pages), 0) };
        let of_kept: u64 = kept.iter().flatten().map(|pages| u64::from(*pages)).sum();
        // Where evictions take turns, a later one may keep more, and what is shared is committed behind its pages.
        let rest = if capacity.turns { u64::from(capacity.kept_pages) - of_kept } else { 0 };
        let promised = (tails * (all.0 - shared.0), tails * (all.1 - shared.1) + rest);
        let backing = if capacity.turns { (tails * shared.0, tails * shared.1 + of_kept) } else { (0, 0) };
        let expected = self.expected(&shape, capacity, (promised.0 + backing.0, promised.1 + backing.1));
        let before = self.ledger();
        let donor = &self.sessions[at].table;
        let result = PageTable::adopt(&mut self.pool, &mut self.ranges, donor, (shape, capacity), pages * size);
        let Some((table, entries)) = self.settle(result, expected, &before) else {
            self.seen.refused_adoption += 1;
            return;
        };
        let lists = (0..shape.num_layers).flat_map(|l| (0..shape.num_kv_heads).map(move |h| (l, h)));
        let mut named = Vec::new();
        for (layer, head) in lists {
            let (in_codec, open) = table.list(layer, head);
            let (of_donor, open_of_donor) = self.sessions[at].table.list(layer, head);
            assert_eq!(in_codec, of_donor[..in_codec.len()], "the same pages in the codec, in order");
            assert_eq!(open, &open_of_donor[..open.len()], "the same f16 pages, in order");
            assert_eq!(table.n_kept(layer, head), self.sessions[at].table.n_kept(layer, head), "tokens kept");
            named.extend(in_codec.iter().chain(open).copied());
        }
        let n = tails * (shared.0 + shared.1) + of_kept;
        assert_eq!(named.len() as u64, n, "kept pages, and whole ones of the tail");
        named.iter().for_each(|page| self.model.share(*page));
        assert_eq!(table.shared_bytes(&self.pool), table.held_bytes(), "nothing is its own yet");
        self.seen.shared_pages += u32::try_from(named.len()).expect("few pages");
        let (open, sealed) = (u32::try_from(shared.0).expect("few"), u32::try_from(shared.1).expect("few"));
        let (tail, pages) = (pages * size, named);
        let filled = true;
        self.sessions.push(ModelSession {
            shape,
            capacity,
            tail,
            open,
            sealed,
            kept,
            filled,
            promised,
            entries,
            table,
            pages,
        });
        self.seen.adopted += 1;
        self.note(self.sessions.len() - 1);
    }
}

/// Two tables over one prefix, the second of `n` tokens of the first's `all`.
fn two_over_one_prefix(codec: &str, all: u32, n: u32) -> (PagePool, PageTable, PageTable) {
    let (mut pool, mut ranges) = roomy();
    let shape = TableShape { codec: codec.parse().expect("a codec"), ..SHAPE };
    let mut first = admit(&mut pool, &mut ranges, shape, 320).expect("the pool is roomy");
    let mut window = Window::new(shape.page, shape.num_kv_heads, 160, true);
    first.grow(&mut pool, &mut window, all).expect("within the admission");
    first.retire();
    let own = (shape, Capacity::tokens(320));
    let second = PageTable::adopt(&mut pool, &mut ranges, &first, own, n).expect("the pool is roomy");
    (pool, first, second)
}

/// Rows are appended behind what is shared, whoever of the two goes on, and each then has a page of its own.
#[test]
fn both_go_on_behind_what_they_share() {
    for codec in ["f16", "rot3"] {
        let (mut pool, mut first, mut second) = two_over_one_prefix(codec, 96, 64);
        let shared = pool.report().shared_bytes;
        let (prefix, all) = (TableShape { codec: codec.parse().expect("a codec"), ..SHAPE }, pool.report());
        assert_eq!(all.pages_in_use_bytes, prefix.bytes_for(96), "{codec}: nothing is held twice");
        let mut window = Window::new(SHAPE.page, SHAPE.num_kv_heads, 64, true);
        for table in [&mut first, &mut second] {
            window.clear();
            table.grow(&mut pool, &mut window, 5).expect("within the admission");
            table.retire();
        }
        assert_eq!(pool.report().shared_bytes, shared, "{codec}: what is shared stays so");
        for head in 0..2 {
            let pages = [&first, &second].map(|table| table.held_pages(1, head));
            let own = |at: usize| pages[at].iter().filter(|page| !pages[1 - at].contains(page)).count();
            assert_eq!(
                (own(0), own(1)),
                (3, 1),
                "{codec}: two pages that came later and the open one, and the open one"
            );
        }
    }
}

#[test]
#[should_panic(expected = "pages that another table names too are not written")]
fn a_shared_page_that_would_be_written_again_is_noticed() {
    let (mut pool, mut first, _second) = two_over_one_prefix("f16", 96, 64);
    first.rewind(40);
    let _ = first.grow(&mut pool, &mut no_window(), 1);
}

#[test]
#[should_panic(expected = "should be whole pages")]
fn a_page_that_is_not_full_can_not_be_shared() {
    let _ = two_over_one_prefix("f16", 90, 90);
}

/// Bounds of as many pages as a page has tokens are whole; fewer are still written.
#[test]
fn tables_that_choose_pages_share_whole_pages_of_bounds() {
    let shape = TableShape { quest: Some(Quest { pages: 4, dense_layers: 0 }), ..SHAPE };
    assert_eq!([255, 256, 511, 512].map(|n| shape.whole(n)), [0, 256, 256, 512], "16 pages of 16 tokens");
    let (mut pool, mut ranges) = roomy();
    let mut first = admit(&mut pool, &mut ranges, shape, 400).expect("the pool is roomy");
    first.grow(&mut pool, &mut no_window(), 300).expect("within the admission");
    first.retire();
    let own = (shape, Capacity::tokens(400));
    let mut second = PageTable::adopt(&mut pool, &mut ranges, &first, own, 256).expect("the pool is roomy");
    for table in [&mut first, &mut second] {
        table.grow(&mut pool, &mut no_window(), 40).expect("bounds that are not whole are a table's own");
        table.retire();
    }
    // 16 pages of 16 tokens and their bounds, in each of 6 lists.
    assert_eq!(pool.report().shared_bytes, Bytes(6 * 17 * SHAPE.open_page().0), "pages and their bounds");
}
