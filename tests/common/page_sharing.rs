//! Page tables that name pages of each other: a step of the walk, and cases by hand.

use concertina::geometry::Bytes;
use concertina::pool::page_table::{Capacity, PageTable, Quest, TableShape, Window};
use concertina::pool::{PageId, PagePool};
use rand::RngExt;

use super::{ModelSession, SHAPE, SessionWalk, admit, no_window, of_tail, roomy};

/// How a session is to begin.
struct Beginning {
    shape: TableShape,
    capacity: Capacity,
    kept: Vec<Option<u32>>,
    /// Pages of each list's tail that it takes over: open ones, and sealed ones.
    shared: (u32, u32),
    /// Pages that it may take later, and commitments behind those that it takes over.
    promised: (u64, u64),
    backing: (u64, u64),
    /// Every page that it takes over.
    named: Vec<PageId>,
}

impl Beginning {
    fn tail(&self) -> u32 {
        (self.shared.0 + self.shared.1) * self.shape.page.page_size
    }

    /// What is committed.
    fn wish(&self) -> (u64, u64) {
        (self.promised.0 + self.backing.0, self.promised.1 + self.backing.1)
    }
}

impl SessionWalk {
    /// How a session could begin as the one at `at` does.
    fn beginning(&mut self, at: usize) -> Beginning {
        let capacity = Capacity { tail_tokens: self.rng.random_range(1..900), ..self.sessions[at].capacity };
        let donor = &self.sessions[at];
        let (shape, kept) = (donor.shape, donor.kept.clone());
        let pages = self.rng.random_range(0..=donor.tail.min(capacity.tail_tokens) / donor.size());
        let (tails, all) = (donor.tails(), of_tail(&shape, capacity));
        let shared = if shape.codec.seals() { (0, pages) } else { (pages, 0) };
        let of_tails = (tails * u64::from(shared.0), tails * u64::from(shared.1));
        let of_kept: u64 = kept.iter().flatten().map(|pages| u64::from(*pages)).sum();
        // Where evictions take turns, a later one may keep more, and what is shared is committed behind its pages.
        let rest = if capacity.turns { u64::from(capacity.kept_pages) - of_kept } else { 0 };
        let promised = (tails * all.0 - of_tails.0, tails * all.1 - of_tails.1 + rest);
        let backing = if capacity.turns { (of_tails.0, of_tails.1 + of_kept) } else { (0, 0) };
        let lists = (0..shape.num_layers).flat_map(|l| (0..shape.num_kv_heads).map(move |h| (l, h)));
        let mut named = Vec::new();
        for ((layer, head), kept) in lists.zip(&kept) {
            let Some(kept) = kept else { continue };
            let (in_codec, open) = donor.table.list(layer, head);
            named.extend(&in_codec[..(kept + shared.1) as usize]);
            named.extend(&open[..shared.0 as usize]);
        }
        Beginning { shape, capacity, kept, shared, promised, backing, named }
    }

    /// Notes a session that began as another did.
    fn joins(&mut self, begun: Beginning, table: PageTable, entries: (usize, usize)) {
        let lists = (0..begun.shape.num_layers).flat_map(|l| (0..begun.shape.num_kv_heads).map(move |h| (l, h)));
        let pages = |(layer, head)| {
            let (in_codec, open) = table.list(layer, head);
            in_codec.into_iter().chain(open.iter().copied()).collect::<Vec<_>>()
        };
        assert_eq!(lists.flat_map(pages).collect::<Vec<_>>(), begun.named, "the same pages, in order");
        self.seen.shared_pages += u32::try_from(begun.named.len()).expect("few pages");
        let tail = begun.tail();
        let Beginning { shape, capacity, kept, shared: (open, sealed), promised, named: pages, .. } = begun;
        let filled = true;
        let session =
            ModelSession { shape, capacity, tail, open, sealed, kept, filled, promised, entries, table, pages };
        self.sessions.push(session);
        self.note(self.sessions.len() - 1);
    }

    /// A session that begins as another does.
    pub(crate) fn adopt(&mut self) {
        let Some(at) = self.pick() else { return };
        let begun = self.beginning(at);
        let expected = self.expected(&begun.shape, begun.capacity, begun.wish());
        let before = self.ledger();
        let (donor, own) = (&self.sessions[at].table, (begun.shape, begun.capacity));
        let result = PageTable::adopt(&mut self.pool, &mut self.ranges, donor, own, begun.tail());
        let Some((table, entries)) = self.settle(result, expected, &before) else {
            self.seen.refused_adoption += 1;
            return;
        };
        begun.named.iter().for_each(|page| self.model.share(*page));
        assert_eq!(table.shared_bytes(&self.pool), table.held_bytes(), "nothing is its own yet");
        self.joins(begun, table, entries);
        self.seen.adopted += 1;
    }

    /// A session that begins as another does that leaves: what the other had to itself makes room for it.
    pub(crate) fn succeed(&mut self) {
        let Some(at) = self.pick().filter(|at| !self.sessions[*at].capacity.turns) else { return };
        let begun = self.beginning(at);
        let own = (begun.shape, begun.capacity);
        let successor = PageTable::succeed(&mut self.pool, &self.sessions[at].table, own, begun.tail());
        let successor = successor.expect("the donor's pages are in use");
        begun.named.iter().for_each(|page| self.model.share(*page));
        self.check();
        self.release_at(at);
        let expected = self.expected(&begun.shape, begun.capacity, begun.wish());
        match (successor.admit(&mut self.pool, &mut self.ranges), expected.model, expected.place) {
            (Ok(table), Ok(model), Some((start, n))) => {
                self.model = model;
                self.entries[start..start + n].fill(true);
                self.joins(begun, table, (start, n));
                self.seen.succeeded += 1;
            }
            (Err(_), Err(_), _) | (Err(_), Ok(_), None) => {
                for page in &begun.named {
                    self.model.release(*page);
                }
                self.check();
                self.seen.refused_succession += 1;
            }
            (result, _, place) => panic!("{result:?}; the model expects entries at {place:?}"),
        }
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
