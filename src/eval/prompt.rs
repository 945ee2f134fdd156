//! Logits of a prompt through the engine: chunked prefill over a paged cache, as a session would run it.

use crate::engine::{Engine, EngineError};
use crate::pool::page_table::PageTable;
use crate::schedule::{Caches, PlannedRows, SessionId, StepPlan};

/// A session number that no scheduler gives out in practice.
const PROBE: SessionId = SessionId(u32::MAX);

/// Runs `tokens` from position 0 in chunks of `chunk` rows and hands the logits `[vocab_size]` of every position in
/// `wanted` (a range) to `each`, in order. All pages return afterwards.
///
/// # Errors
/// [`EngineError`], among them a pool too small for the prompt.
pub fn logits(
    engine: &mut Engine<'_>,
    caches: &mut Caches,
    tokens: &[u32],
    wanted: std::ops::Range<usize>,
    chunk: usize,
    each: &mut dyn FnMut(usize, Vec<f32>),
) -> Result<(), EngineError> {
    let n = u32::try_from(tokens.len()).map_err(|_| EngineError::Input("a prompt of 2^32 tokens".to_owned()))?;
    let table = PageTable::admit(&mut caches.pool, &mut caches.ranges, caches.shape, n)?;
    caches.tables.insert(PROBE, table);
    let count = |n: usize| u32::try_from(n).expect("a prompt is counted in 32 bits");
    let mut run = || -> Result<(), EngineError> {
        for (index, rows) in tokens.chunks(chunk.max(1)).enumerate() {
            let first = index * chunk.max(1);
            let (first_index, tokens) = (count(first), rows.to_vec());
            let planned = PlannedRows { session: PROBE, first_index, tokens, decode: false, sample: None };
            let table = caches.tables.get_mut(&PROBE).expect("the probe was admitted");
            table.grow(&mut caches.pool, count(rows.len()))?;
            let here = wanted.start.max(first)..wanted.end.min(first + rows.len());
            let list: Vec<u32> = here.clone().map(|p| count(p - first)).collect();
            let rows = engine.logits_of_rows(&StepPlan { segments: vec![planned] }, caches, &list)?;
            here.zip(rows).for_each(|(position, row)| each(position, row));
        }
        Ok(())
    };
    let result = run();
    if let Some(table) = caches.tables.remove(&PROBE) {
        table.release(&mut caches.pool, &mut caches.ranges)?;
    }
    result
}
