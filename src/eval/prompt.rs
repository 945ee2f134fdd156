//! Sequences that an evaluation drives itself, step by step, over the same engine and pool as sessions.

use crate::compression::Compression;
use crate::engine::{Engine, EngineError};
use crate::kernels::sample::Sampling;
use crate::pool::page_table::{PageTable, Sealing, TableShape};
use crate::schedule::{Caches, PlannedRows, SessionId, StepPlan};

/// Hears of a position and its logits `[vocab_size]`.
pub type EachLogits<'a> = &'a mut dyn FnMut(usize, Vec<f32>);

/// An engine and its caches, driven without a schedule.
#[derive(Debug)]
pub struct Driver<'e, 'd> {
    engine: &'e mut Engine<'d>,
    caches: &'e mut Caches,
}

/// A sequence of a [`Driver`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe(SessionId);

fn count(n: usize) -> u32 {
    u32::try_from(n).expect("tokens are counted in 32 bits")
}

impl<'e, 'd> Driver<'e, 'd> {
    /// Drives `engine` over `caches`, in which no session may be admitted.
    pub const fn new(engine: &'e mut Engine<'d>, caches: &'e mut Caches) -> Self {
        Self { engine, caches }
    }

    /// Admits a sequence of at most `max_tokens` tokens.
    ///
    /// # Errors
    /// [`EngineError::Pool`] when it does not fit, [`EngineError::Input`] for a codec without kernels.
    pub fn admit(
        &mut self,
        compression: &Compression,
        sealing: Sealing,
        max_tokens: usize,
    ) -> Result<Probe, EngineError> {
        if !self.caches.serves(compression.hidden) {
            return Err(EngineError::Input(format!("no kernels were made for hidden={}", compression.hidden)));
        }
        // Counted from the end, where no scheduler's numbers are.
        let id = SessionId(u32::MAX - count(self.caches.tables.len()));
        let shape = TableShape { sealing, ..self.caches.shape(compression) };
        let Caches { pool, ranges, tables, .. } = &mut *self.caches;
        tables.insert(id, PageTable::admit(pool, ranges, shape, count(max_tokens))?);
        Ok(Probe(id))
    }

    /// Feeds prompt tokens in chunks of at most `chunk` rows and hands the logits of every position in `wanted` to `each`.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn prefill(
        &mut self,
        probe: Probe,
        tokens: &[u32],
        wanted: std::ops::Range<usize>,
        chunk: usize,
        each: EachLogits<'_>,
    ) -> Result<(), EngineError> {
        let mut done = 0;
        while done < tokens.len() {
            let table = &self.caches.tables[&probe.0];
            let first_index = table.n_tokens();
            let n = table.shape().cut(first_index, count(chunk.max(1).min(tokens.len() - done))) as usize;
            let rows = tokens[done..done + n].to_vec();
            let segment = PlannedRows { session: probe.0, first_index, tokens: rows, decode: false, sample: None };
            let first = first_index as usize;
            let here = wanted.start.max(first)..wanted.end.min(first + n);
            let list: Vec<u32> = here.clone().map(|position| count(position - first)).collect();
            let plan = StepPlan { segments: vec![segment] };
            self.caches.grow(&plan)?;
            let rows = self.engine.logits_of_rows(&plan, self.caches, &list)?;
            self.caches.retire(&plan)?;
            here.zip(rows).for_each(|(position, row)| each(position, row));
            done += n;
        }
        Ok(())
    }

    /// Feeds one token to each sequence, in one step; the logits of each.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn decode(&mut self, rows: &[(Probe, u32)]) -> Result<Vec<Vec<f32>>, EngineError> {
        let segment = |(probe, token): &(Probe, u32)| PlannedRows {
            session: probe.0,
            first_index: self.caches.tables[&probe.0].n_tokens(),
            tokens: vec![*token],
            decode: true,
            sample: Some(Sampling::GREEDY),
        };
        let plan = StepPlan { segments: rows.iter().map(segment).collect() };
        self.caches.grow(&plan)?;
        let logits = self.engine.logits(&plan, self.caches)?;
        self.caches.retire(&plan)?;
        Ok(logits)
    }

    /// Seals every full page of a sequence that was admitted to be sealed on request, a page per list at a time, which is what
    /// the work lists of any step have room for; its later pages are sealed as they fill.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn seal(&mut self, probe: Probe) -> Result<(), EngineError> {
        loop {
            let Caches { pool, tables, .. } = &mut *self.caches;
            let table = tables.get_mut(&probe.0).expect("an admitted sequence has a table");
            table.seal(pool, 1)?;
            if table.sealing_pages().is_empty() {
                return Ok(table.seal_when_full(pool)?);
            }
            self.engine.seal(self.caches, probe.0)?;
            let Caches { pool, tables, .. } = &mut *self.caches;
            tables.get_mut(&probe.0).expect("an admitted sequence has a table").retire(pool)?;
        }
    }

    /// Keys, after rotary positions, and values of a sequence whose pages are open, each `[tokens][head_dim]`.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn rows(&self, probe: Probe, layer: u32, kv_head: u32) -> Result<(Vec<f32>, Vec<f32>), EngineError> {
        self.engine.open_rows(&self.caches.tables[&probe.0], layer, kv_head)
    }

    /// Bytes of pages that a sequence holds.
    pub fn held_bytes(&self, probe: Probe) -> crate::geometry::Bytes {
        self.caches.tables[&probe.0].held_bytes()
    }

    /// Ends every sequence; all pages return.
    ///
    /// # Errors
    /// [`EngineError::Pool`] when the pool disagrees, which would be a defect.
    pub fn end(self) -> Result<(), EngineError> {
        while let Some((_, table)) = self.caches.tables.pop_last() {
            table.release(&mut self.caches.pool, &mut self.caches.ranges)?;
        }
        Ok(())
    }
}

/// Runs `tokens` from position 0 in chunks of at most `chunk` rows, as a session would, and hands the logits of every
/// position in `wanted` to `each`, in order. All pages return afterwards.
///
/// # Errors
/// [`EngineError`], among them a pool too small for the prompt.
pub fn logits(
    engine: &mut Engine<'_>,
    caches: &mut Caches,
    compression: &Compression,
    tokens: &[u32],
    wanted: std::ops::Range<usize>,
    chunk: usize,
    each: EachLogits<'_>,
) -> Result<(), EngineError> {
    let mut driver = Driver::new(engine, caches);
    let probe = driver.admit(compression, Sealing::WhenFull, tokens.len())?;
    let result = driver.prefill(probe, tokens, wanted, chunk, each);
    driver.end()?;
    result
}
