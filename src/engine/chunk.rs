//! A chunk: the pages that a step moves in one direction, and where each lies in staging.
//!
//! ```text
//! arena     A A A . D . B B . E        pages of one or several caches, wherever they lie
//! staging   A A A B B | D E            long runs, a copy each | short ones, packed by one dispatch per arena
//! host      D A B E A B A              in the order of the page table
//! ```
//!
//! A prompt's step takes pages of every list in turn, and a cache that comes back takes all of its pages so; sorted by address,
//! the pages of a chunk therefore mostly lie in a few runs. A long run is copied between arena and staging by itself, so that
//! its bytes pass through the device's memory once; short ones pass through [`move_pages`](crate::kernels::move_pages). The
//! host puts pages in order while it copies them, which it does anyway.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::geometry::{Bytes, CELL_BYTES};
use crate::kernels::abi::MovePagesItem;
use crate::pool::PageId;
use crate::schedule::SessionId;

/// Bytes from which a run is copied by itself on an adapter of a kind, as `concertina devices` names them.
///
/// A copy of its own costs some 2 microseconds, because wgpu lets each copy into a buffer wait for the one before; packing reads
/// and writes the run once more, at the speed of the device's memory. They are equal at `2 us * speed / 2`: for 1 TB/s 1 MiB, for
/// the 60 GB/s that an integrated GPU shares with its host 64 KiB. On a CPU the packing shader runs at a tenth of the speed of
/// a copy, so that no page is too short.
pub(super) fn shortest_run(adapter_kind: &str) -> Bytes {
    match adapter_kind {
        "cpu" => Bytes::ZERO,
        "integrated" => Bytes(64 << 10),
        _ => Bytes::mib(1),
    }
}

/// Pages that lie together in an arena, and together in staging. All in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) arena: u16,
    /// Where it begins in the arena.
    pub(super) at: u64,
    /// Where it begins in staging.
    pub(super) staged: u64,
    pub(super) bytes: u64,
}

/// Where the bytes of a session's pages lie in staging, in the order of its table.
pub(super) type Pieces = Vec<Range<usize>>;

/// Pages of one direction.
#[derive(Debug, Default)]
pub(super) struct Chunk {
    /// Runs that are copied by themselves.
    pub(super) runs: Vec<Run>,
    /// Of each arena, pages that pass through the packed buffer, where they lie as in staging.
    pub(super) packed: BTreeMap<u16, Vec<MovePagesItem>>,
    /// Their place in staging, in bytes: behind all runs.
    pub(super) packed_at: Range<u64>,
    /// Whose pages they are.
    pub(super) sessions: Vec<(SessionId, Pieces)>,
}

impl Chunk {
    /// Of pages in the order of each session's table; runs of at least `shortest` bytes are copied by themselves.
    pub(super) fn new(moving: &[(SessionId, Vec<(PageId, Bytes)>)], shortest: Bytes) -> Self {
        let pages = moving.iter().flat_map(|(_, pages)| pages);
        let pages: Vec<(PageId, u32)> = pages.map(|(page, bytes)| (*page, cells(*bytes))).collect();
        let mut by_address: Vec<usize> = (0..pages.len()).collect();
        by_address.sort_unstable_by_key(|page| pages[*page].0);
        let follows = |a: &usize, b: &usize| {
            let ((a, n_cells), (b, _)) = (pages[*a], pages[*b]);
            a.arena == b.arena && a.cell + n_cells == b.cell
        };
        let cells_of = |run: &[usize]| run.iter().map(|page| pages[*page].1).sum::<u32>();
        let long = |run: &&[usize]| bytes(cells_of(run)) >= shortest.0;
        let (long, short): (Vec<_>, Vec<_>) = by_address.chunk_by(follows).partition(long);
        let mut chunk = Self::default();
        // Of each page, its first cell in staging.
        let mut staged = vec![0; pages.len()];
        let mut end = 0;
        for run in long {
            let (PageId { arena, cell }, n_cells) = (pages[run[0]].0, cells_of(run));
            chunk.runs.push(Run { arena, at: bytes(cell), staged: bytes(end), bytes: bytes(n_cells) });
            for page in run {
                staged[*page] = end;
                end += pages[*page].1;
            }
        }
        let packed = end;
        for page in short.into_iter().flatten() {
            let (PageId { arena, cell }, n_cells) = pages[*page];
            chunk.packed.entry(arena).or_default().push(MovePagesItem { page: cell, packed: end, n_cells, pad: 0 });
            staged[*page] = end;
            end += n_cells;
        }
        chunk.packed_at = bytes(packed)..bytes(end);
        let mut places = staged.into_iter().zip(&pages).map(|(at, (_, n_cells))| index(at)..index(at + n_cells));
        let of = |(id, pages): &(SessionId, Vec<_>)| (*id, joined(places.by_ref().take(pages.len())));
        chunk.sessions = moving.iter().map(of).collect();
        chunk
    }

    /// Bytes of all pages.
    pub(super) const fn bytes(&self) -> u64 {
        self.packed_at.end
    }
}

/// Ranges in their order; one that begins where the one before ends becomes part of it.
fn joined(ranges: impl Iterator<Item = Range<usize>>) -> Pieces {
    let mut pieces = Pieces::new();
    for range in ranges {
        match pieces.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => pieces.push(range),
        }
    }
    pieces
}

fn cells(bytes: Bytes) -> u32 {
    u32::try_from(bytes.0 / CELL_BYTES).expect("a page is counted in 32 bits")
}

fn bytes(cells: u32) -> u64 {
    u64::from(cells) * CELL_BYTES
}

fn index(cells: u32) -> usize {
    usize::try_from(bytes(cells)).expect("a chunk fits in memory")
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::seq::SliceRandom as _;
    use rand::{RngExt as _, SeedableRng as _};
    use rand_chacha::ChaCha8Rng;

    const PAGES: [u32; 3] = [1, 3, 8];

    fn page(arena: u16, cell: u32, n_cells: u32) -> (PageId, Bytes) {
        (PageId { arena, cell }, Bytes(bytes(n_cells)))
    }

    /// What copies and the shader do, on cells that hold their own address.
    fn staging(chunk: &Chunk) -> Vec<(u16, u32)> {
        let cell = |bytes: u64| u32::try_from(bytes / CELL_BYTES).expect("small");
        let mut staging = vec![(u16::MAX, 0); cell(chunk.bytes()) as usize];
        let mut write = |at: u32, arena: u16, from: u32| {
            let place = &mut staging[at as usize];
            assert_eq!(*place, (u16::MAX, 0), "nothing else lies there");
            *place = (arena, from);
        };
        for Run { arena, at, staged, bytes } in &chunk.runs {
            (0..cell(*bytes)).for_each(|i| write(cell(*staged) + i, *arena, cell(*at) + i));
        }
        for (arena, items) in &chunk.packed {
            for item in items {
                assert!(chunk.packed_at.contains(&bytes(item.packed)), "it is copied with the packed ones");
                (0..item.n_cells).for_each(|i| write(item.packed + i, *arena, item.page + i));
            }
        }
        staging
    }

    fn check(moving: &[(SessionId, Vec<(PageId, Bytes)>)], shortest: Bytes) -> Chunk {
        let chunk = Chunk::new(moving, shortest);
        let staging = staging(&chunk);
        assert!(chunk.runs.iter().all(|run| run.bytes >= shortest.0), "runs are long");
        assert_eq!(chunk.sessions.len(), moving.len(), "each session");
        for ((id, pages), (found, pieces)) in moving.iter().zip(&chunk.sessions) {
            assert_eq!(id, found, "in order");
            let of = |(page, size): &(PageId, Bytes)| (0..cells(*size)).map(|i| (page.arena, page.cell + i)).collect();
            let expected: Vec<(u16, u32)> = pages.iter().flat_map(of as fn(&_) -> Vec<_>).collect();
            let cell = index(1);
            let got: Vec<_> = pieces.iter().flat_map(|piece| &staging[piece.start / cell..piece.end / cell]).collect();
            assert_eq!(got, expected.iter().collect::<Vec<_>>(), "pages in the order of the table");
        }
        chunk
    }

    #[test]
    fn pages_in_a_row_are_one_copy_and_strangers_are_packed() {
        let id = SessionId(1);
        let in_a_row: Vec<_> = (0..6).map(|i| page(0, 8 * i, 8)).collect();
        let chunk = check(&[(id, in_a_row.clone())], Bytes(600));
        assert_eq!(chunk.runs, [Run { arena: 0, at: 0, staged: 0, bytes: 768 }], "one run");
        let pieces = &chunk.sessions[0].1;
        assert_eq!((pieces.len(), &pieces[0], chunk.packed.len()), (1, &(0..768), 0), "as it lies");
        let backwards: Vec<_> = in_a_row.iter().rev().copied().collect();
        let chunk = check(&[(id, backwards)], Bytes(600));
        assert_eq!((chunk.runs.len(), chunk.sessions[0].1.len()), (1, 6), "still one copy, which the host turns round");
        let chunk = check(&[(id, in_a_row.clone())], Bytes(769));
        assert_eq!((chunk.runs.len(), chunk.packed[&0].len()), (0, 6), "too short");
        // The end of an arena is no neighbour of the next one's start, and a page between belongs to someone else.
        let chunk = check(&[(id, vec![page(0, 0, 8), page(1, 8, 8), page(1, 17, 8)])], Bytes::ZERO);
        assert_eq!(chunk.runs.len(), 3, "apart");
        let chunk = check(&[(id, [&in_a_row[..], &[page(0, 100, 3), page(2, 0, 8)]].concat())], Bytes(600));
        assert_eq!((chunk.runs.len(), chunk.packed.len(), chunk.packed_at), (1, 2, 768..944), "some of each");
    }

    #[test]
    fn neighbours_of_several_sessions_and_sizes_share_a_copy() {
        let (a, b) = (vec![page(0, 0, 8), page(0, 11, 8)], vec![page(0, 8, 3), page(0, 19, 1)]);
        let chunk = check(&[(SessionId(1), a), (SessionId(2), b), (SessionId(3), vec![])], Bytes(320));
        assert_eq!(chunk.runs.len(), 1, "one copy for both");
        assert_eq!(chunk.sessions[1].1, [128..176, 304..320], "each its own pages");
        // Two that name the same page each get it.
        let shared = vec![page(0, 0, 8), page(0, 8, 8)];
        let chunk = check(&[(SessionId(1), shared.clone()), (SessionId(2), shared)], Bytes::ZERO);
        assert_eq!(chunk.bytes(), 512, "twice");
        assert_eq!(Chunk::new(&[], Bytes::ZERO).bytes(), 0, "nothing moves");
    }

    #[test]
    fn any_pages_anywhere_reach_the_host_in_order() {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let mut mixed = 0;
        for _ in 0..500 {
            let mut pages = Vec::new();
            for arena in 0..rng.random_range(1..4) {
                let mut cell = 0;
                for _ in 0..rng.random_range(0..40) {
                    let n_cells = PAGES[rng.random_range(0..PAGES.len())];
                    cell += if rng.random_bool(0.3) { rng.random_range(1..9) } else { 0 };
                    pages.push(page(arena, cell, n_cells));
                    cell += n_cells;
                }
            }
            if rng.random_bool(0.7) {
                pages.shuffle(&mut rng);
            }
            let second = pages.split_off(rng.random_range(0..=pages.len()));
            let shortest = Bytes(rng.random_range(0..1_000));
            let chunk = check(&[(SessionId(1), pages), (SessionId(2), second)], shortest);
            mixed += u32::from(!chunk.runs.is_empty() && !chunk.packed.is_empty());
        }
        assert!(mixed > 100, "{mixed} chunks had runs of both kinds");
    }
}
