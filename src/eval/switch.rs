//! What a context switch costs: a cache leaves for the host and comes back, alone and beside the decode rows of others.
//!
//! ```text
//! link ratio = plain copy of as many bytes / switch alone          plain copy: the same buffers, in one piece per chunk
//! hidden     = 1 - (switch beside decode - decode alone) / switch alone
//! ```
//!
//! A figure counts only when the cache that came back holds the bytes that left; nothing is said to be hidden where decode steps
//! alone differ by more than a quarter of the switch.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::prompt::Driver;
use crate::compression::Compression;
use crate::engine::{Engine, EngineError};
use crate::geometry::Bytes;
use crate::kernels::sample::Sampling;
use crate::schedule::{Backend as _, Caches, Direction, PlannedRows, SessionId, StepPlan};

/// One direction of a switch.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct OneWay {
    /// Time of a plain copy of as many bytes, in seconds.
    pub plain_s: f64,
    /// Time with nothing beside it.
    pub alone_s: f64,
    /// Time of as many decode steps with nothing beside them.
    pub decode_s: f64,
    /// How far the middle half of these times is spread.
    pub decode_spread_s: f64,
    /// Time of both in the same steps.
    pub beside_s: f64,
}

impl OneWay {
    /// The part of a plain copy's speed that the switch reaches.
    pub fn link_ratio(&self) -> f64 {
        self.plain_s / self.alone_s
    }

    /// The part of the switch that took no time beside decode rows, where decode is steady enough to say so.
    pub fn hidden(&self) -> Option<f64> {
        let steady = self.decode_spread_s < self.alone_s / 4.0;
        steady.then(|| 1.0 - (self.beside_s - self.decode_s) / self.alone_s)
    }
}

/// A context switch, measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Switch {
    /// What was done to the cache, in the form that `--compress` reads.
    pub compression: String,
    /// Bytes that moved.
    pub bytes: Bytes,
    /// Steps that it took each way.
    pub steps: usize,
    /// To the host.
    pub out: OneWay,
    /// Back.
    pub back: OneWay,
}

/// Time that a device is kept busy before anything counts: a card that idled runs at a part of its clock.
const WARM_UP: Duration = Duration::from_millis(500);

/// Measures the switch of a cache of `tokens` beside `decoding` sessions that decode: medians of `repeats` times. `chunk` are rows
/// of a prompt step.
///
/// # Errors
/// [`EngineError`]; [`EngineError::Input`] for an engine that does not swap, and where the cache that came back is not the
/// one that left.
pub fn measure(
    engine: &mut Engine<'_>,
    caches: &mut Caches,
    compression: &Compression,
    (tokens, chunk): (&[u32], usize),
    decoding: u32,
    repeats: usize,
) -> Result<Switch, EngineError> {
    let mut driver = Driver::new(engine, caches);
    let probe = driver.admit(compression, tokens.len(), tokens.len())?;
    driver.prefill(probe, tokens, 0..0, chunk, &mut |_, _| ())?;
    driver.evict_due(probe)?;
    let moving = probe.session();
    let mut bench = Bench { engine, caches, moving, decoding: (0..decoding).map(SessionId).collect() };
    let result = bench.run(repeats);
    let sessions: Vec<SessionId> = bench.caches.tables.keys().copied().collect();
    sessions.into_iter().try_for_each(|id| bench.caches.release(id))?;
    let Measured { bytes, steps, plain, decode, spread, alone, beside } = result?;
    let one_way = |way: usize| OneWay {
        plain_s: plain[way],
        alone_s: alone[way],
        decode_s: decode,
        decode_spread_s: spread,
        beside_s: beside[way],
    };
    Ok(Switch { compression: compression.to_string(), bytes, steps, out: one_way(0), back: one_way(1) })
}

struct Bench<'e, 'd> {
    engine: &'e mut Engine<'d>,
    caches: &'e mut Caches,
    moving: SessionId,
    decoding: Vec<SessionId>,
}

/// Medians in seconds, both ways.
struct Measured {
    bytes: Bytes,
    steps: usize,
    plain: [f64; 2],
    decode: f64,
    spread: f64,
    alone: [f64; 2],
    beside: [f64; 2],
}

/// What a step holds besides decode rows.
#[derive(Clone, Copy)]
enum Moves {
    Nothing(usize),
    Pages(Direction),
}

impl Bench<'_, '_> {
    fn run(&mut self, repeats: usize) -> Result<Measured, EngineError> {
        let bytes = self.caches.tables[&self.moving].held_bytes();
        let steps = self.steps();
        let room = count(2 + steps);
        for id in self.decoding.clone() {
            self.caches.admit(id, &Compression::default(), 1, room)?;
        }
        let before = self.leave(false)?.1;
        self.come(false)?;
        let started = Instant::now();
        let ways = || [Vec::new(), Vec::new()];
        let (mut decode, mut plain, mut alone, mut beside) = (Vec::new(), ways(), ways(), ways());
        while decode.len() < repeats {
            let decoded = self.steps_of(Moves::Nothing(steps), true)?;
            let copied = self.plain_copies(bytes)?;
            let mut both = [[0.0; 2]; 2];
            for (at, rows) in [false, true].into_iter().enumerate() {
                let (time, after) = self.leave(rows)?;
                if after != before {
                    let message = "the cache that came back is not the one that left";
                    return Err(EngineError::Input(message.to_owned()));
                }
                both[at] = [time, self.come(rows)?];
            }
            if started.elapsed() < WARM_UP {
                continue;
            }
            decode.push(decoded);
            for way in 0..2 {
                plain[way].push(copied[way]);
                alone[way].push(both[0][way]);
                beside[way].push(both[1][way]);
            }
        }
        let [plain, alone, beside] = [plain, alone, beside].map(|ways| ways.map(median));
        decode.sort_by(f64::total_cmp);
        let spread = decode[3 * decode.len() / 4] - decode[decode.len() / 4];
        Ok(Measured { bytes, steps, plain, decode: median(decode), spread, alone, beside })
    }

    /// Plain copies of as many bytes, each way, in seconds.
    fn plain_copies(&mut self, bytes: Bytes) -> Result<[f64; 2], EngineError> {
        let Some((copied, times)) = self.engine.plain_copies(bytes)? else {
            return Err(EngineError::Input("this engine does not swap".to_owned()));
        };
        assert_eq!(copied, bytes, "arenas that hold a cache have as many bytes");
        Ok(times.map(|time| time.as_secs_f64()))
    }

    /// Steps that a switch takes in one direction.
    fn steps(&self) -> usize {
        let (mut from, mut steps) = (0, 0);
        loop {
            let transfer = self.caches.transfer(self.moving, Direction::Out, from, self.caches.abilities.swap_bytes);
            (from, steps) = (transfer.pages.end, steps + 1);
            if transfer.last {
                return steps;
            }
        }
    }

    /// Moves the cache to the host; the time, and what the host has then.
    fn leave(&mut self, rows: bool) -> Result<(f64, Vec<u8>), EngineError> {
        let time = self.steps_of(Moves::Pages(Direction::Out), rows)?;
        let kept = self.engine.host_cache(self.moving)?.map(|cache| cache.pages.all()).transpose()?;
        let suspended = self.caches.suspend(self.moving)?;
        self.caches.resume(self.moving, &suspended)?;
        Ok((time, kept.unwrap_or_default()))
    }

    fn come(&mut self, rows: bool) -> Result<f64, EngineError> {
        self.steps_of(Moves::Pages(Direction::In), rows)
    }

    /// Takes steps until everything has moved; their time in seconds.
    fn steps_of(&mut self, moves: Moves, rows: bool) -> Result<f64, EngineError> {
        let (mut from, mut steps) = (0, 0);
        let started = Instant::now();
        loop {
            let mut plan = StepPlan::default();
            if rows {
                plan.segments = self.decoding.iter().map(|id| self.row(*id)).collect();
            }
            let last = match moves {
                Moves::Nothing(n) => steps + 1 == n,
                Moves::Pages(direction) => {
                    let most = self.caches.abilities.swap_bytes;
                    let transfer = self.caches.transfer(self.moving, direction, from, most);
                    from = transfer.pages.end;
                    let last = transfer.last;
                    plan.transfers.push(transfer);
                    last
                }
            };
            self.caches.grow(&plan)?;
            self.engine.execute(&plan, self.caches)?;
            self.caches.retire(&plan);
            steps += 1;
            if last {
                break;
            }
        }
        // What moves last does so behind the step.
        self.engine.settle()?;
        let time = started.elapsed().as_secs_f64();
        if rows {
            for id in &self.decoding {
                self.caches.tables.get_mut(id).expect("it was admitted").rewind(count(steps));
            }
        }
        Ok(time)
    }

    fn row(&self, session: SessionId) -> PlannedRows {
        PlannedRows {
            session,
            first_index: self.caches.tables[&session].n_tokens(),
            tokens: vec![1],
            decode: true,
            depth: None,
            observed: Vec::new(),
            sample: Some(Sampling::GREEDY),
        }
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn count(n: usize) -> u32 {
    u32::try_from(n).expect("steps and tokens are counted in 32 bits")
}
