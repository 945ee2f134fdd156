//! Sequences that an evaluation drives itself, step by step, over the same engine and pool as sessions.

use std::collections::BTreeMap;

use crate::compression::Compression;
use crate::compression::token::Score;
use crate::engine::{Engine, EngineError, StepStats};
use crate::kernels::sample::Sampling;
use crate::schedule::{Backend as _, Caches, Observed, PlannedRows, SessionId, StepPlan};

/// Hears of a position and its logits `[vocab_size]`.
pub type EachLogits<'a> = &'a mut dyn FnMut(usize, Vec<f32>);

/// An engine and its caches, driven without a schedule.
#[derive(Debug)]
pub struct Driver<'e, 'd> {
    engine: &'e mut Engine<'d>,
    caches: &'e mut Caches,
    /// Sequences whose prompts skip layers, and the first of them.
    skips: Vec<(Probe, u32)>,
    /// What each sequence was fed.
    fed: BTreeMap<SessionId, Vec<u32>>,
}

/// A sequence of a [`Driver`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe(SessionId);

impl Probe {
    /// Its number in the caches.
    pub const fn session(self) -> SessionId {
        self.0
    }
}

fn count(n: usize) -> u32 {
    u32::try_from(n).expect("tokens are counted in 32 bits")
}

impl<'e, 'd> Driver<'e, 'd> {
    /// Drives `engine` over `caches`, in which no session may be admitted.
    pub const fn new(engine: &'e mut Engine<'d>, caches: &'e mut Caches) -> Self {
        Self { engine, caches, skips: Vec::new(), fed: BTreeMap::new() }
    }

    fn next_id(&self) -> SessionId {
        // Counted from the end, where no scheduler's numbers are.
        self.caches.tables.keys().next().map_or(SessionId(u32::MAX), |lowest| SessionId(lowest.0 - 1))
    }

    /// Admits a sequence of at most `max_tokens` tokens, the first `document` of which are compressed before more come where its
    /// compression evicts.
    ///
    /// # Errors
    /// [`EngineError::Pool`] when it does not fit, [`EngineError::Input`] for what the engine was not made for.
    pub fn admit(
        &mut self,
        compression: &Compression,
        document: usize,
        max_tokens: usize,
    ) -> Result<Probe, EngineError> {
        self.caches.serves(compression).map_err(EngineError::Input)?;
        self.caches.domains(compression, count(document)).map_err(EngineError::Input)?;
        let id = self.next_id();
        self.caches.admit(id, compression, count(document), count(max_tokens))?;
        self.skips.extend(self.caches.skip_from(compression).map(|layer| (Probe(id), layer)));
        Ok(Probe(id))
    }

    /// Makes a compressed cache of a sequence whose cache is full and in f16, which stays as it is, with room for `tail`
    /// more tokens. `slot` holds what was observed for its policy.
    ///
    /// # Errors
    /// As [`Self::admit`].
    pub fn fork(
        &mut self,
        from: Probe,
        compression: &Compression,
        slot: u32,
        tail: usize,
    ) -> Result<Probe, EngineError> {
        self.caches.serves(compression).map_err(EngineError::Input)?;
        let n_tokens = self.caches.tables[&from.0].n_tokens();
        let selection = self.caches.selection_of(compression, n_tokens, slot).map_err(EngineError::Input)?;
        let mut target = self.caches.admit_target(compression, n_tokens, count(tail))?;
        let mut source = self.caches.tables.remove(&from.0).expect("an admitted sequence has a table");
        let filled = self.engine.evict_into(self.caches, &mut source, &mut target, &selection);
        self.caches.tables.insert(from.0, source);
        let id = self.next_id();
        self.caches.tables.insert(id, target);
        filled?;
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
        self.prefill_observed(probe, tokens, wanted, chunk, &[], each)
    }

    /// The same, observing the rows for evictions of this cache into others: scores of tokens in slots.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn prefill_observed(
        &mut self,
        probe: Probe,
        tokens: &[u32],
        wanted: std::ops::Range<usize>,
        chunk: usize,
        scores: &[(Score, u32)],
        each: EachLogits<'_>,
    ) -> Result<(), EngineError> {
        let end = self.caches.tables[&probe.0].n_tokens() + count(tokens.len());
        self.caches.begin_slots(scores.iter().map(|(_, slot)| *slot));
        let mut done = 0;
        while done < tokens.len() {
            self.evict_due(probe)?;
            let n = self.caches.cut(probe.0, count(chunk.max(1).min(tokens.len() - done)));
            let first_index = self.caches.tables[&probe.0].n_tokens();
            let mut observed: Vec<Observed> = self.caches.observed(probe.0, n).into_iter().collect();
            let more = |(score, slot): &(Score, u32)| Observed::of(score, *slot, first_index, end, n);
            observed.extend(scores.iter().filter_map(more));
            let rows = tokens[done..done + n as usize].to_vec();
            self.fed.entry(probe.0).or_default().extend_from_slice(&rows);
            let segment = PlannedRows {
                session: probe.0,
                first_index,
                tokens: rows,
                decode: false,
                depth: None,
                observed,
                sample: None,
            };
            let first = first_index as usize;
            let here = wanted.start.max(first)..wanted.end.min(first + n as usize);
            let list: Vec<u32> = here.clone().map(|position| count(position - first)).collect();
            let mut plan = StepPlan::default();
            let skip_from = self.skips.iter().find(|(skipping, _)| *skipping == probe).map(|(_, layer)| *layer);
            if skip_from.is_some() && list.iter().any(|row| *row + 1 < n || done + n as usize != tokens.len()) {
                let message = "rows that skip layers have no logits but the last of the prompt";
                return Err(EngineError::Input(message.to_owned()));
            }
            plan.push_prompt(segment, skip_from, done + n as usize == tokens.len());
            // The row that runs to the top comes first.
            let list = if skip_from.is_some() { vec![0; list.len()] } else { list };
            self.caches.grow(&plan)?;
            let rows = self.engine.logits_of_rows(&plan, self.caches, &list)?;
            self.caches.retire(&plan);
            here.zip(rows).for_each(|(position, row)| each(position, row));
            done += n as usize;
        }
        Ok(())
    }

    /// Of each list the scores that a slot has of the first `n_tokens`.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn scores(&self, slot: u32, n_tokens: usize) -> Result<Vec<Vec<f32>>, EngineError> {
        self.engine.raw_scores(slot, count(n_tokens))
    }

    /// Scores the tokens of a full cache, which are `tokens`, by repeating them (`kvzip`), into a slot.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn reconstruct(&mut self, probe: Probe, tokens: &[u32], slot: u32) -> Result<(), EngineError> {
        self.engine.reconstruct(self.caches, probe.0, tokens, slot)
    }

    /// Evicts from a sequence that is due: before its next rows, or earlier.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn evict_due(&mut self, probe: Probe) -> Result<(), EngineError> {
        if self.caches.is_due(probe.0) {
            let tokens = self.fed.get(&probe.0).map_or(&[][..], Vec::as_slice);
            self.engine.evict(probe.0, tokens, self.caches)?;
        }
        Ok(())
    }

    /// Feeds one token to each sequence, in one step; the logits of each.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn decode(&mut self, rows: &[(Probe, u32)]) -> Result<Vec<Vec<f32>>, EngineError> {
        let plan = self.decode_plan(rows)?;
        let logits = self.engine.logits(&plan, self.caches)?;
        self.caches.retire(&plan);
        Ok(logits)
    }

    /// Feeds one token to each sequence, in one step, as a session does: the next token of each, chosen on the device.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn sample(&mut self, rows: &[(Probe, u32)]) -> Result<Vec<u32>, EngineError> {
        let plan = self.decode_plan(rows)?;
        let result = self.engine.execute(&plan, self.caches)?;
        self.caches.retire(&plan);
        Ok(result.tokens)
    }

    /// A step of a row for each, with room for it.
    fn decode_plan(&mut self, rows: &[(Probe, u32)]) -> Result<StepPlan, EngineError> {
        for (probe, token) in rows {
            self.evict_due(*probe)?;
            self.fed.entry(probe.0).or_default().push(*token);
        }
        let segment = |(probe, token): &(Probe, u32)| PlannedRows {
            session: probe.0,
            first_index: self.caches.tables[&probe.0].n_tokens(),
            tokens: vec![*token],
            decode: true,
            depth: None,
            observed: self.caches.observed(probe.0, 1).into_iter().collect(),
            sample: Some(Sampling::GREEDY),
        };
        let plan = StepPlan { segments: rows.iter().map(segment).collect(), ..StepPlan::default() };
        self.caches.grow(&plan)?;
        Ok(plan)
    }

    /// Figures of the last step.
    pub const fn last_step(&self) -> StepStats {
        self.engine.last_step()
    }

    /// Waits until everything that was submitted is done.
    ///
    /// # Errors
    /// [`EngineError::Device`].
    pub fn wait(&self) -> Result<(), EngineError> {
        Ok(self.engine.device().wait()?)
    }

    /// Keys, after rotary positions, and values that a list of a sequence holds, decoded, each `[tokens][head_dim]`.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn rows(&self, probe: Probe, layer: u32, kv_head: u32) -> Result<(Vec<f32>, Vec<f32>), EngineError> {
        self.engine.held_rows(&self.caches.tables[&probe.0], layer, kv_head)
    }

    /// Ends one sequence.
    ///
    /// # Errors
    /// [`EngineError::Pool`] when the pool disagrees, which would be a defect.
    pub fn release(&mut self, probe: Probe) -> Result<(), EngineError> {
        self.fed.remove(&probe.0);
        Ok(self.caches.release(probe.0)?)
    }

    /// The position of a sequence's next token.
    pub fn position(&self, probe: Probe) -> u32 {
        self.caches.tables[&probe.0].n_tokens()
    }

    /// Tokens that a sequence holds, over all lists.
    pub fn held_tokens(&self, probe: Probe) -> u64 {
        self.caches.tables[&probe.0].held_tokens()
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
        while let Some(id) = self.caches.tables.keys().next_back().copied() {
            self.caches.release(id)?;
        }
        Ok(())
    }
}

/// Runs `tokens` from position 0 in chunks of at most `chunk` rows, as a session would, and hands the logits of every
/// position in `wanted` to `each`, in order. What a compression evicts leaves behind the first of them. All pages return
/// afterwards.
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
    let probe = driver.admit(compression, wanted.start + 1, tokens.len())?;
    let result = driver.prefill(probe, tokens, wanted, chunk, each);
    driver.end()?;
    result
}
