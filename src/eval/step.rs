//! Decode steps of a model, end to end, against the bytes that they can not do without.
//!
//! ```text
//! step    from having tokens to having the next: planning, recording, the device, and the tokens on their way back
//! device  from the start of the first kernel to the end of the last, by timestamps where there are any
//! host    planning and recording, before the submission
//! floor   (weights, read once, and what rows read of their caches, every token compressed) / bytes read per second
//! ```
//!
//! Sessions read different texts and go on with the tokens that the model chooses. A figure counts only where logits are numbers
//! and those of one session are, bit by bit, what it has without company; those of another session have to differ.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::prompt::{Driver, Probe};
use super::spread::Spread;
use crate::compression::Compression;
use crate::engine::{Engine, EngineError};
use crate::geometry::Bytes;
use crate::schedule::{BackendError as _, Caches, Fault};
use crate::theory::cache::{CacheSize, Seen};
use crate::theory::model::Decoder;

/// How steps are measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Rows of a prompt step.
    pub chunk: usize,
    /// Steps that count.
    pub steps: usize,
    /// Time that the device is kept busy before the first of them.
    pub warm_up: Duration,
    /// Bytes that the device reads per second at best.
    pub read_bytes_per_s: f64,
}

/// Steps that do not count.
const STEPS_BEFORE: usize = 4;

impl Settings {
    /// Tokens that a session comes to hold behind its context.
    pub const fn room(&self) -> usize {
        // The last step reads logits back, to be compared.
        STEPS_BEFORE + self.steps + 1
    }
}

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub struct Load<'a> {
    /// Sessions in every step.
    pub batch: usize,
    /// Tokens of each session's context.
    pub context: usize,
    /// What is done to their caches.
    pub compression: &'a Compression,
    /// A text; each session begins somewhere else in it, and at its end again with its beginning.
    pub text: &'a [u32],
}

/// A load, measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepRow {
    /// `step/<sessions>x<context>/<compression>`, as `benches/peers` names it.
    pub case: String,
    /// Sessions in every step.
    pub batch: usize,
    /// Tokens of each context.
    pub context_tokens: usize,
    /// What is done to the caches, in the form that `--compress` reads.
    pub compression: String,
    /// What came of it.
    #[serde(flatten)]
    pub outcome: StepOutcome,
}

/// Figures, or why there are none.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepOutcome {
    /// Right, and measured.
    Measured(StepFigures),
    /// Wrong, or it did not run: why.
    Failed(String),
}

/// Figures of steps whose results are right.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepFigures {
    /// Time of a step, end to end.
    pub seconds: Spread,
    /// Of this, on the device.
    pub device_s: Spread,
    /// Of this, planning and recording on the host.
    pub host_s: Spread,
    /// The host's median as a part of the step's.
    pub host_part: f64,
    /// Tokens of all sessions per second, at the median.
    pub tokens_per_s: f64,
    /// Kernels of a step.
    pub dispatches: u32,
    /// Kernels of a layer.
    pub dispatches_per_layer: f64,
    /// Weights that a step reads.
    pub weight_bytes: Bytes,
    /// What its rows read of their caches.
    pub cache_bytes: Bytes,
    /// Time of reading these bytes at the read ceiling.
    pub floor_s: f64,
    /// The part of the floor's speed that steps reach.
    pub of_floor: f64,
    /// The same of their time on the device.
    pub device_of_floor: f64,
    /// Logits compared bit by bit with those of a session alone.
    pub compared: usize,
}

/// Measures a load over an engine whose caches are empty, and leaves them empty.
///
/// # Errors
/// [`EngineError`] where the device is lost; anything else is a row without figures.
pub fn measure(
    engine: &mut Engine<'_>,
    caches: &mut Caches,
    load: &Load<'_>,
    settings: &Settings,
) -> Result<StepRow, EngineError> {
    let outcome = match figures(engine, caches, load, settings) {
        Ok(figures) => StepOutcome::Measured(figures),
        Err(error) if error.fault() == Fault::DeviceLost => return Err(error),
        Err(error) => StepOutcome::Failed(error.to_string()),
    };
    let Load { batch, context, compression, .. } = *load;
    let cache = compression.short();
    let tokens = if context.is_multiple_of(1024) { format!("{}k", context / 1024) } else { context.to_string() };
    Ok(StepRow {
        case: format!("step/{batch}x{tokens}/{}", cache.trim_start_matches("hidden=")),
        batch,
        context_tokens: context,
        compression: compression.to_string(),
        outcome,
    })
}

fn figures(
    engine: &mut Engine<'_>,
    caches: &mut Caches,
    load: &Load<'_>,
    settings: &Settings,
) -> Result<StepFigures, EngineError> {
    if load.batch == 0 || settings.steps == 0 || load.text.is_empty() {
        return Err(EngineError::Input("a step has a session at least, and sessions have a text".to_owned()));
    }
    let cache_bytes = cache_bytes(engine, load, settings)?;
    let (weight_bytes, num_layers) = (engine.step_weight_bytes(), engine.geometry().num_layers);
    let mut run = Run { driver: Driver::new(engine, caches), load, settings };
    let measured = run.all();
    run.driver.end()?;
    let Measured { seconds, device, host, dispatches, in_layers, compared } = measured?;
    let spread = |values| Spread::of(values).expect("at least one step was measured");
    let (seconds, device_s, host_s) = (spread(seconds), spread(device), spread(host));
    let floor_s = (weight_bytes + cache_bytes).0 as f64 / settings.read_bytes_per_s;
    Ok(StepFigures {
        seconds,
        device_s,
        host_s,
        host_part: host_s.median / seconds.median,
        tokens_per_s: load.batch as f64 / seconds.median,
        dispatches,
        dispatches_per_layer: f64::from(in_layers) / f64::from(num_layers),
        weight_bytes,
        cache_bytes,
        floor_s,
        of_floor: floor_s / seconds.median,
        device_of_floor: floor_s / device_s.median,
        compared,
    })
}

/// What the rows of a step read of their caches, halfway through the steps that count: without what pages round up.
fn cache_bytes(engine: &Engine<'_>, load: &Load<'_>, settings: &Settings) -> Result<Bytes, EngineError> {
    let decoder = Decoder::dense(engine.geometry().clone(), true).map_err(|e| EngineError::Input(e.to_string()))?;
    let seen = Seen { document: count(load.context), after: count(STEPS_BEFORE + settings.steps / 2) };
    let of_session = CacheSize::new(&decoder, load.compression, seen, None).map_err(EngineError::Input)?;
    Ok(Bytes(of_session.read_bytes.0 * load.batch as u64))
}

fn count(n: usize) -> u32 {
    u32::try_from(n).expect("tokens are counted in 32 bits")
}

struct Run<'a, 'e, 'd> {
    driver: Driver<'e, 'd>,
    load: &'a Load<'a>,
    settings: &'a Settings,
}

#[derive(Default)]
struct Measured {
    seconds: Vec<f64>,
    device: Vec<f64>,
    host: Vec<f64>,
    dispatches: u32,
    in_layers: u32,
    compared: usize,
}

impl Run<'_, '_, '_> {
    fn all(&mut self) -> Result<Measured, EngineError> {
        let n = self.load.batch;
        // All have their room before any reads its context: what does not fit is known at once.
        let probes = (0..n).map(|_| self.admit()).collect::<Result<Vec<_>, _>>()?;
        (0..n).zip(&probes).try_for_each(|(session, probe)| self.read(session, *probe))?;
        self.warm_up()?;
        // What the last session is fed, to be repeated without company.
        let mut fed = Vec::new();
        let mut tokens: Vec<u32> = (0..n).map(|session| self.token(session, self.load.context)).collect();
        let mut measured = Measured::default();
        for step in 0..STEPS_BEFORE + self.settings.steps {
            fed.push(tokens[n - 1]);
            let rows: Vec<(Probe, u32)> = probes.iter().copied().zip(tokens).collect();
            let started = Instant::now();
            tokens = self.driver.sample(&rows)?;
            let whole = started.elapsed();
            if step >= STEPS_BEFORE {
                measured.took(whole, self.driver.last_step());
            }
        }
        fed.push(tokens[n - 1]);
        let rows: Vec<(Probe, u32)> = probes.iter().copied().zip(tokens).collect();
        let together = self.driver.decode(&rows)?;
        let alone = self.alone(&probes, &fed)?;
        measured.compared = compare(&together, &alone)?;
        Ok(measured)
    }

    /// The token of a session at a place of its context.
    fn token(&self, session: usize, at: usize) -> u32 {
        // A prime apart, so that no two begin alike.
        self.load.text[(session * 97 + at) % self.load.text.len()]
    }

    fn admit(&mut self) -> Result<Probe, EngineError> {
        let n = self.load.context;
        self.driver.admit(self.load.compression, n, n + self.settings.room())
    }

    /// A session's context, and its compression.
    fn read(&mut self, session: usize, probe: Probe) -> Result<(), EngineError> {
        let tokens: Vec<u32> = (0..self.load.context).map(|at| self.token(session, at)).collect();
        self.driver.prefill(probe, &tokens, 0..0, self.settings.chunk, &mut |_, _| ())?;
        self.driver.evict_due(probe)
    }

    /// Keeps the device busy with short prompts.
    fn warm_up(&mut self) -> Result<(), EngineError> {
        let started = Instant::now();
        let n = self.settings.chunk.min(self.load.context);
        let tokens: Vec<u32> = (0..n).map(|at| self.token(0, at)).collect();
        while started.elapsed() < self.settings.warm_up {
            let probe = self.driver.admit(&Compression::default(), n, n)?;
            self.driver.prefill(probe, &tokens, 0..0, self.settings.chunk, &mut |_, _| ())?;
            self.driver.release(probe)?;
        }
        Ok(())
    }

    /// Logits of the last session once more, from its context on, with nobody beside it. The others make room.
    fn alone(&mut self, probes: &[Probe], fed: &[u32]) -> Result<Vec<f32>, EngineError> {
        probes.iter().try_for_each(|probe| self.driver.release(*probe))?;
        let probe = self.admit()?;
        self.read(self.load.batch - 1, probe)?;
        let (last, before) = fed.split_last().expect("at least one token was fed");
        for token in before {
            self.driver.sample(&[(probe, *token)])?;
        }
        let logits = self.driver.decode(&[(probe, *last)])?;
        self.driver.release(probe)?;
        Ok(logits.concat())
    }
}

impl Measured {
    fn took(&mut self, whole: Duration, stats: crate::engine::StepStats) {
        self.seconds.push(whole.as_secs_f64());
        self.device.push(stats.device.as_secs_f64().max(1e-9));
        self.host.push(stats.host.as_secs_f64());
        (self.dispatches, self.in_layers) = (stats.dispatches, stats.in_layers);
    }
}

/// Numbers that are the same, or why the figures do not count.
fn compare(together: &[Vec<f32>], alone: &[f32]) -> Result<usize, EngineError> {
    let wrong = |why: &str| Err(EngineError::Input(format!("no figure counts: {why}")));
    if !together.iter().flatten().all(|logit| logit.is_finite()) {
        return wrong("logits are not finite");
    }
    let (last, others) = together.split_last().expect("a step has a session at least");
    let same = |a: &[f32], b: &[f32]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
    if !same(last, alone) {
        let differ = last.iter().zip(alone).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
        return wrong(&format!("{differ} of {} logits of a session are others without company", last.len()));
    }
    if others.first().is_some_and(|other| same(other, alone)) {
        return wrong("sessions with other texts have the same logits, so that comparing them says nothing");
    }
    Ok(alone.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_the_same_alone_does_not_count() {
        let (a, b) = (vec![1.0, 2.0], vec![1.0, 3.0]);
        let why = |together: &[Vec<f32>], alone: &[f32]| compare(together, alone).expect_err("it is wrong").to_string();
        assert_eq!(compare(&[a.clone(), b.clone()], &b).ok(), Some(2), "the last one, with another beside it");
        assert_eq!(compare(std::slice::from_ref(&b), &b).ok(), Some(2), "one alone");
        assert!(why(&[a.clone(), b.clone()], &a).contains("1 of 2 logits"), "another session's");
        assert!(why(&[b.clone(), b.clone()], &b).contains("says nothing"), "all alike");
        assert!(why(&[vec![f32::NAN, 0.0], b.clone()], &b).contains("not finite"), "no number");
        assert!(compare(&[vec![0.0]], &[-0.0]).is_err(), "bits, not values");
    }
}
