//! The four metrics of long context (arXiv:2405.08944, section 2), measured for one session of a length and a compression.
//!
//! ```text
//! concurrency   sessions that the pool admits, one after another, until one does not fit
//! prefill       a prompt of so many tokens, chunk by chunk, to the logits of its last; and the compression of the document behind it
//! decode        a step of one row over that cache, sampled on the device; of several sessions' rows in one step where asked for
//! switch        the cache leaves for the host and comes back, with nothing beside it (see [`switch`])
//! ```
//!
//! A figure counts only where logits are numbers and the cache that came back holds the bytes that left. Times are the host's: from
//! having tokens to having the next.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::prompt::{Driver, Probe};
use super::spread::{Spread, measure};
use super::switch;
use crate::compression::Compression;
use crate::engine::{Engine, EngineError};
use crate::geometry::Bytes;
use crate::pool::PoolError;
use crate::schedule::{Caches, SessionId};

/// Decode steps for each repetition of a prompt: they are short.
const STEPS_PER_REPEAT: usize = 4;
/// Decode steps that do not count. The device is warm from the prompt.
const STEPS_BEFORE: usize = 2;

/// What is measured, and how often.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Rows of a prompt step.
    pub chunk: usize,
    /// Sessions that decode together besides the one alone; 1 for none.
    pub batch: u32,
    /// Time that the device is kept busy before a prompt counts.
    pub warm_up: Duration,
    /// Prompts that are measured.
    pub repeats: usize,
}

impl Settings {
    /// Tokens that a session comes to hold after its context.
    pub const fn room(&self) -> usize {
        // The last step of each kind reads logits back, to be checked.
        2 * (STEPS_BEFORE + STEPS_PER_REPEAT * self.repeats + 1)
    }
}

/// Sessions that decode together.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct BatchDecode {
    /// How many.
    pub sessions: u32,
    /// Time of a step, in which each gets a token.
    pub step_s: Spread,
}

/// One session, measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SessionMetrics {
    /// What is done to its cache, in the form that `--compress` reads.
    pub compression: String,
    /// Tokens of its context.
    pub context_tokens: u32,
    /// Bytes of pages that its cache holds, compressed.
    pub cache_bytes: Bytes,
    /// Bytes of pages that it held at most on the way there: a document is read in f16 before it is evicted from.
    pub peak_bytes: Bytes,
    /// Bytes of the pool for pages.
    pub capacity_bytes: Bytes,
    /// Such sessions that the pool holds. Those under a cap count with all tables that they are admitted with.
    pub concurrency: u64,
    /// From the prompt to its compressed cache and its first token.
    pub prefill_s: Spread,
    /// Of this, compression at the document's end.
    pub compress_s: Spread,
    /// A token of a session alone.
    pub decode_token_s: Spread,
    /// The same in company; `null` where none was asked for, or so many do not fit.
    pub batch: Option<BatchDecode>,
    /// Bytes that move each way in a context switch.
    pub switch_bytes: Bytes,
    /// Median time to the host.
    pub switch_out_s: f64,
    /// Median time back.
    pub switch_back_s: f64,
    /// Time of plain copies of as many bytes, out and back together.
    pub plain_copies_s: f64,
}

impl SessionMetrics {
    /// Time of a context switch: one cache leaves, and one as large comes.
    pub fn switch_s(&self) -> f64 {
        self.switch_out_s + self.switch_back_s
    }

    /// What `layers` layers come to, of which `measured` were measured: bytes and times in proportion, sessions the fewer.
    #[must_use]
    pub fn of_layers(self, layers: u32, measured: u32) -> Self {
        let factor = f64::from(layers) / f64::from(measured);
        let bytes = |bytes: Bytes| Bytes(bytes.0 * u64::from(layers) / u64::from(measured));
        Self {
            cache_bytes: bytes(self.cache_bytes),
            peak_bytes: bytes(self.peak_bytes),
            concurrency: self.concurrency * u64::from(measured) / u64::from(layers),
            prefill_s: self.prefill_s.scaled(factor),
            compress_s: self.compress_s.scaled(factor),
            decode_token_s: self.decode_token_s.scaled(factor),
            batch: self.batch.map(|batch| BatchDecode { step_s: batch.step_s.scaled(factor), ..batch }),
            switch_bytes: bytes(self.switch_bytes),
            switch_out_s: self.switch_out_s * factor,
            switch_back_s: self.switch_back_s * factor,
            plain_copies_s: self.plain_copies_s * factor,
            ..self
        }
    }
}

/// Sessions of `n_tokens` that the pool admits at once: each must find room for all that its admission commits, and holds what its
/// compression leaves when the next one comes. All are released afterwards.
///
/// # Errors
/// [`EngineError::Input`] for what the engine was not made for; [`EngineError::Pool`] where the pool fails otherwise.
pub fn concurrency(caches: &mut Caches, compression: &Compression, n_tokens: u32) -> Result<u64, EngineError> {
    caches.serves(compression).map_err(EngineError::Input)?;
    caches.domains(compression, n_tokens).map_err(EngineError::Input)?;
    let once =
        Caches::evicts(compression) && compression.token.eviction().is_none_or(|eviction| eviction.every.is_none());
    let mut admitted = Vec::new();
    let counted = loop {
        // Counted from the end, where no scheduler's numbers are.
        let id = SessionId(u32::MAX - u32::try_from(admitted.len()).expect("sessions are counted in 32 bits"));
        match caches.admit(id, compression, n_tokens, n_tokens) {
            Ok(()) => admitted.push(id),
            Err(PoolError::DoesNotFit { .. }) => break Ok(admitted.len() as u64),
            Err(error) => break Err(error.into()),
        }
        if once {
            let target = caches.take_target(id);
            caches.swap(id, target)?;
        }
    };
    admitted.into_iter().try_for_each(|id| caches.release(id))?;
    counted
}

/// Measures one session over `tokens`, which no other may hold pages beside.
///
/// # Errors
/// [`EngineError`]; [`EngineError::Input`] where a result is wrong, so that its figure says nothing.
pub fn session(
    engine: &mut Engine<'_>,
    caches: &mut Caches,
    compression: &Compression,
    tokens: &[u32],
    settings: &Settings,
) -> Result<SessionMetrics, EngineError> {
    let context_tokens = u32::try_from(tokens.len()).expect("tokens are counted in 32 bits");
    let concurrency = concurrency(caches, compression, context_tokens)?;
    let capacity_bytes = caches.pool.capacity();
    let mut run = Run { driver: Driver::new(engine, caches), compression, tokens, settings };
    let measured = run.all();
    run.driver.end()?;
    let Measured { cache_bytes, peak_bytes, prefill_s, compress_s, decode_token_s, batch } = measured?;
    let prompt = (tokens, settings.chunk);
    let moved = switch::measure(engine, caches, compression, prompt, 1, settings.repeats)?;
    Ok(SessionMetrics {
        compression: compression.to_string(),
        context_tokens,
        cache_bytes,
        peak_bytes,
        capacity_bytes,
        concurrency,
        prefill_s,
        compress_s,
        decode_token_s,
        batch,
        switch_bytes: moved.bytes,
        switch_out_s: moved.out.alone_s,
        switch_back_s: moved.back.alone_s,
        plain_copies_s: moved.out.plain_s + moved.back.plain_s,
    })
}

struct Run<'a, 'e, 'd> {
    driver: Driver<'e, 'd>,
    compression: &'a Compression,
    tokens: &'a [u32],
    settings: &'a Settings,
}

struct Measured {
    cache_bytes: Bytes,
    peak_bytes: Bytes,
    prefill_s: Spread,
    compress_s: Spread,
    decode_token_s: Spread,
    batch: Option<BatchDecode>,
}

/// One prompt, read.
struct Prompt {
    probe: Probe,
    whole: f64,
    compress: f64,
    /// Before it was compressed.
    read_bytes: Bytes,
}

impl Run<'_, '_, '_> {
    fn all(&mut self) -> Result<Measured, EngineError> {
        self.warm_up()?;
        let mut prompts: Vec<Prompt> = Vec::new();
        for _ in 0..self.settings.repeats.max(1) {
            if let Some(before) = prompts.last() {
                self.driver.release(before.probe)?;
            }
            prompts.push(self.prompt()?);
        }
        let last = prompts.last().expect("at least one prompt was read");
        let (probe, read_bytes) = (last.probe, last.read_bytes);
        let spread = |of: fn(&Prompt) -> f64| Spread::of(prompts.iter().map(of).collect());
        let cache_bytes = self.driver.held_bytes(probe);
        let one = self.decode(&[probe])?;
        Ok(Measured {
            cache_bytes,
            peak_bytes: read_bytes.max(cache_bytes),
            prefill_s: spread(|prompt| prompt.whole).expect("at least one prompt was read"),
            compress_s: spread(|prompt| prompt.compress).expect("at least one prompt was read"),
            decode_token_s: one,
            batch: self.batch(probe)?,
        })
    }

    /// Keeps the device busy with short prompts.
    fn warm_up(&mut self) -> Result<(), EngineError> {
        let started = Instant::now();
        let n = self.settings.chunk.min(self.tokens.len());
        loop {
            let probe = self.driver.admit(self.compression, self.tokens.len(), self.tokens.len())?;
            // No whole document: nothing is evicted.
            self.driver.prefill(probe, &self.tokens[..n], 0..0, self.settings.chunk, &mut |_, _| ())?;
            self.driver.release(probe)?;
            if started.elapsed() >= self.settings.warm_up {
                return Ok(());
            }
        }
    }

    fn prompt(&mut self) -> Result<Prompt, EngineError> {
        let n = self.tokens.len();
        let probe = self.driver.admit(self.compression, n, n + self.settings.room())?;
        let mut finite = false;
        let mut see = |_: usize, logits: Vec<f32>| finite = logits.iter().all(|logit| logit.is_finite());
        let started = Instant::now();
        self.driver.prefill(probe, self.tokens, n - 1..n, self.settings.chunk, &mut see)?;
        let read = started.elapsed().as_secs_f64();
        let read_bytes = self.driver.held_bytes(probe);
        self.driver.evict_due(probe)?;
        self.driver.wait()?;
        let whole = started.elapsed().as_secs_f64();
        checked(finite, self.compression)?;
        Ok(Prompt { probe, whole, compress: whole - read, read_bytes })
    }

    /// Steps of one row for each of some sessions.
    fn decode(&mut self, probes: &[Probe]) -> Result<Spread, EngineError> {
        let rows: Vec<(Probe, u32)> = probes.iter().map(|probe| (*probe, self.tokens[0])).collect();
        let mut step = || {
            let started = Instant::now();
            self.driver.sample(&rows)?;
            Ok::<_, EngineError>(started.elapsed().as_secs_f64())
        };
        for _ in 0..STEPS_BEFORE {
            step()?;
        }
        let spread = measure(Duration::ZERO, STEPS_PER_REPEAT * self.settings.repeats.max(1), step)?;
        let logits = self.driver.decode(&rows)?;
        checked(logits.iter().flatten().all(|logit| logit.is_finite()), self.compression)?;
        Ok(spread)
    }

    /// The same with company, where there is room for it.
    fn batch(&mut self, first: Probe) -> Result<Option<BatchDecode>, EngineError> {
        let sessions = self.settings.batch;
        if sessions < 2 {
            return Ok(None);
        }
        let mut probes = vec![first];
        while probes.len() < sessions as usize {
            match self.prompt() {
                Ok(prompt) => probes.push(prompt.probe),
                Err(EngineError::Pool(PoolError::DoesNotFit { .. })) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        Ok(Some(BatchDecode { sessions, step_s: self.decode(&probes)? }))
    }
}

fn checked(finite: bool, compression: &Compression) -> Result<(), EngineError> {
    let short = compression.short();
    let wrong = || EngineError::Input(format!("logits over {short} are no numbers, so that no figure of it counts"));
    finite.then_some(()).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_that_are_no_numbers_do_not_count() {
        let full = Compression::default();
        assert!(checked(true, &full).is_ok(), "numbers");
        let error = checked(false, &full).expect_err("none").to_string();
        assert!(error.contains("logits over full are no numbers"), "{error}");
    }

    #[test]
    fn a_part_of_the_layers_stands_for_all_in_proportion() {
        let of = |seconds: f64| Spread { median: seconds, p10: seconds, p90: seconds, n: 3 };
        let part = SessionMetrics {
            compression: Compression::default().to_string(),
            context_tokens: 64,
            cache_bytes: Bytes(100),
            peak_bytes: Bytes(200),
            capacity_bytes: Bytes(1000),
            concurrency: 10,
            prefill_s: of(1.0),
            compress_s: of(0.5),
            decode_token_s: of(0.25),
            batch: Some(BatchDecode { sessions: 4, step_s: of(0.5) }),
            switch_bytes: Bytes(100),
            switch_out_s: 0.1,
            switch_back_s: 0.2,
            plain_copies_s: 0.1,
        };
        let whole = part.clone().of_layers(32, 8);
        assert_eq!(
            (whole.cache_bytes, whole.peak_bytes, whole.switch_bytes),
            (Bytes(400), Bytes(800), Bytes(400)),
            "bytes"
        );
        assert_eq!((whole.concurrency, whole.capacity_bytes), (2, Bytes(1000)), "ten quarters are two wholes");
        assert_eq!((whole.prefill_s.median, whole.decode_token_s.p90), (4.0, 1.0), "times");
        assert_eq!(whole.batch.map(|b| (b.sessions, b.step_s.median)), Some((4, 2.0)), "a batch stays as large");
        assert_eq!(part.clone().of_layers(8, 8), part, "all of them");
    }
}
