//! The rows of one step.

use super::{Caches, Observed, Phase, ScheduleConfig, Session, SessionId};
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
}

impl StepPlan {
    /// Rows of all segments.
    pub fn n_rows(&self) -> u32 {
        self.segments.iter().map(PlannedRows::n_rows).sum()
    }

    /// Decode rows.
    pub fn decode_rows(&self) -> u32 {
        self.segments.iter().filter(|s| s.decode).map(PlannedRows::n_rows).sum()
    }
}

/// One decode row for every session in decode, then prompt chunks in order, up to `max_rows` rows. Chunks end where
/// [`Caches::cut`] says.
pub(super) fn plan<'s>(
    config: &ScheduleConfig,
    caches: &Caches,
    admitted: impl Iterator<Item = (SessionId, &'s Session)> + Clone,
) -> StepPlan {
    let mut plan = StepPlan::default();
    for (session, s) in admitted.clone() {
        if s.phase != Phase::Decode {
            continue;
        }
        let last = *s.produced.last().expect("a session in decode has produced a token");
        plan.segments.push(PlannedRows {
            session,
            first_index: caches.tables[&session].n_tokens(),
            observed: caches.observed(session, 1).into_iter().collect(),
            tokens: vec![last],
            decode: true,
            sample: Some(s.request.sampling),
        });
    }
    let mut left = config.max_rows.saturating_sub(plan.n_rows()) as usize;
    for (session, s) in admitted {
        let Phase::Prefill(done) = s.phase else { continue };
        let prompt = &s.request.prompt;
        let n = u32::try_from((prompt.len() - done as usize).min(left)).expect("rows are counted in 32 bits");
        let n = caches.cut(session, n) as usize;
        if n == 0 {
            continue;
        }
        left -= n;
        let observed = caches.observed(session, u32::try_from(n).expect("rows are counted in 32 bits"));
        let end = done as usize + n;
        plan.segments.push(PlannedRows {
            session,
            first_index: caches.tables[&session].n_tokens(),
            observed: observed.into_iter().collect(),
            tokens: prompt[done as usize..end].to_vec(),
            decode: false,
            sample: (end == prompt.len()).then_some(s.request.sampling),
        });
    }
    plan
}
