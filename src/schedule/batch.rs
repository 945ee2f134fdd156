//! The rows of one step.

use std::ops::Range;

use super::{Caches, Observed, Phase, Session, SessionId};
use crate::geometry::Bytes;
use crate::kernels::sample::Sampling;

/// Consecutive rows of one session.
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedRows {
    /// The session.
    pub session: SessionId,
    /// Position of the first row.
    pub first_index: u32,
    /// One token per row.
    pub tokens: Vec<u32>,
    /// Whether this is a decode row.
    pub decode: bool,
    /// The layer below which the rows stop; the layers above get their keys and values alone. `None` where they run to the
    /// top.
    pub depth: Option<u32>,
    /// What coming evictions want of these rows.
    pub observed: Vec<Observed>,
    /// How to choose the next token from the last row, when it is wanted.
    pub sample: Option<Sampling>,
}

impl PlannedRows {
    /// Rows.
    pub fn n_rows(&self) -> u32 {
        u32::try_from(self.tokens.len()).expect("rows of a step are counted in 32 bits")
    }
}

/// The rows of a step: decode rows first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepPlan {
    /// Segments in row order.
    pub segments: Vec<PlannedRows>,
    /// Pages that move between device and host beside them.
    pub transfers: Vec<Transfer>,
    /// Sessions whose copies in host memory are no longer wanted.
    pub forgotten: Vec<SessionId>,
}

/// Which way pages move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the device to the host.
    Out,
    /// From the host to the device.
    In,
}

/// What keeps a cache that is away from the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Store {
    /// Host memory.
    #[default]
    Host,
    /// A file.
    Disk,
}

/// Pages of one session that move between device and host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// The session.
    pub session: SessionId,
    /// Which way.
    pub direction: Direction,
    /// Where to, or from.
    pub store: Store,
    /// Of its pages, in the order of [`PageTable::page_ids`](crate::pool::page_table::PageTable::page_ids).
    pub pages: Range<u32>,
    /// Their bytes.
    pub bytes: Bytes,
    /// Whether they are the last ones.
    pub last: bool,
}

impl StepPlan {
    /// Rows of all segments.
    pub fn n_rows(&self) -> u32 {
        self.segments.iter().map(PlannedRows::n_rows).sum()
    }

    /// Rows that are computed whole in a layer; they come first.
    pub fn active_rows(&self, layer: u32) -> u32 {
        let active = |s: &&PlannedRows| s.depth.is_none_or(|depth| layer < depth);
        self.segments.iter().filter(active).map(PlannedRows::n_rows).sum()
    }

    /// Adds prompt rows of a session. Where it skips layers, its rows stop below the first of them, but for the last of the
    /// prompt (`last`), which runs to the top.
    pub fn push_prompt(&mut self, rows: PlannedRows, skip_from: Option<u32>, last: bool) {
        let Some(depth) = skip_from else { return self.insert(rows) };
        let deep = rows.tokens.len() - usize::from(last);
        let (stopping, top) = rows.tokens.split_at(deep);
        let n = u32::try_from(deep).expect("rows are counted in 32 bits");
        if last {
            let observed = rows.observed.iter().map(|o| Observed { first: o.first.saturating_sub(n), ..*o }).collect();
            let first_index = rows.first_index + n;
            self.insert(PlannedRows { first_index, tokens: top.to_vec(), observed, depth: None, ..rows.clone() });
        }
        if n > 0 {
            let observed = rows.observed.iter().filter(|o| o.first < n).copied().collect();
            let tokens = stopping.to_vec();
            self.insert(PlannedRows { tokens, observed, depth: Some(depth), sample: None, ..rows });
        }
    }

    /// Rows that run further come first.
    fn insert(&mut self, rows: PlannedRows) {
        let further = |s: &PlannedRows| s.depth.unwrap_or(u32::MAX) >= rows.depth.unwrap_or(u32::MAX);
        let at = self.segments.iter().take_while(|s| further(s)).count();
        self.segments.insert(at, rows);
    }

    /// Sessions of the step, once each, with all of their rows.
    pub fn rows_of_sessions(&self) -> Vec<(SessionId, u32)> {
        let mut all: Vec<(SessionId, u32)> = Vec::new();
        for rows in &self.segments {
            match all.iter_mut().find(|(session, _)| *session == rows.session) {
                Some((_, n)) => *n += rows.n_rows(),
                None => all.push((rows.session, rows.n_rows())),
            }
        }
        all
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty() && self.transfers.is_empty() && self.forgotten.is_empty()
    }

    /// Decode rows.
    pub fn decode_rows(&self) -> u32 {
        self.segments.iter().filter(|s| s.decode).map(PlannedRows::n_rows).sum()
    }
}

/// One decode row for every session in decode, then prompt chunks in order, up to `max_rows` rows. Chunks end where
/// [`Caches::cut`] says.
pub(super) fn plan<'s>(
    max_rows: u32,
    caches: &Caches,
    running: impl Iterator<Item = (SessionId, &'s Session)> + Clone,
) -> StepPlan {
    let mut plan = StepPlan::default();
    for (session, s) in running.clone() {
        if s.phase != Phase::Decode {
            continue;
        }
        let last = *s.tokens.last().expect("a session in decode has produced a token");
        plan.segments.push(PlannedRows {
            session,
            first_index: caches.tables[&session].n_tokens(),
            observed: caches.observed(session, 1).into_iter().collect(),
            tokens: vec![last],
            decode: true,
            depth: None,
            sample: Some(s.request.sampling),
        });
    }
    let mut left = max_rows.saturating_sub(plan.n_rows()) as usize;
    for (session, s) in running {
        let Phase::Prefill(done) = s.phase else { continue };
        let prompt = &s.tokens[..s.prompt_end];
        let n = u32::try_from((prompt.len() - done as usize).min(left)).expect("rows are counted in 32 bits");
        let n = caches.cut(session, n) as usize;
        if n == 0 {
            continue;
        }
        left -= n;
        let observed = caches.observed(session, u32::try_from(n).expect("rows are counted in 32 bits"));
        let end = done as usize + n;
        let last = end == prompt.len();
        let rows = PlannedRows {
            session,
            first_index: caches.tables[&session].n_tokens(),
            observed: observed.into_iter().collect(),
            tokens: prompt[done as usize..end].to_vec(),
            decode: false,
            depth: None,
            sample: last.then_some(s.request.sampling),
        };
        plan.push_prompt(rows, caches.skip_from(&s.request.compression), last);
    }
    plan
}
