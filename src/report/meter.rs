//! The four challenges of long context (arXiv:2405.08944), measured over the steps of a run: concurrency, prefill,
//! decode, context switch.
//!
//! A step that holds prompt rows counts as prefill, whatever decode rows share it, since it takes about as long as
//! the prompt rows alone; every other step counts as decode. So decode is measured undisturbed, and no time counts
//! twice.

use std::time::Duration;

use serde::Serialize;

use crate::geometry::Bytes;
use crate::schedule::{Answer, Finish, Phase, Request, Scheduler, StepReport};
use crate::theory::predict::concurrency;

/// Sums over steps of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Totals {
    steps: u64,
    prompt_rows: u64,
    decode_rows: u64,
    elapsed: Duration,
    device: Duration,
}

/// Adds up steps.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Meter {
    prefill: Totals,
    decode: Totals,
    resident_max: usize,
    largest: Bytes,
    swapped_out: u64,
    swapped_in: u64,
    recomputed: u64,
    compressed: u64,
    preempted: u64,
    out_bytes: Bytes,
    in_bytes: Bytes,
    moving: Totals,
    steps_shrunk: usize,
    /// Seconds of each move between device and host.
    moves: Vec<f64>,
}

impl Meter {
    /// Hears of a session before it runs.
    pub fn session(&mut self, scheduler: &Scheduler, request: &Request) {
        self.largest = self.largest.max(scheduler.caches().needed(request).unwrap_or_default());
    }

    /// Hears of a step after it ran; `device` is its time on the device.
    pub fn step(&mut self, scheduler: &Scheduler, step: &StepReport, device: Duration) {
        self.steps_shrunk += usize::from(step.shortage.is_some());
        self.swapped_out += step.swapped_out.len() as u64;
        self.swapped_in += step.swapped_in.len() as u64;
        self.recomputed += step.dropped.len() as u64;
        self.compressed += step.compressed.len() as u64;
        self.preempted += step.preempted.len() as u64;
        self.moves.extend(step.moves.iter().map(Duration::as_secs_f64));
        self.out_bytes += step.out_bytes;
        self.in_bytes += step.in_bytes;
        if step.prefill_rows + step.decode_rows == 0 {
            self.moving.steps += 1;
            self.moving.elapsed += step.elapsed;
            return;
        }
        let totals = if step.prefill_rows > 0 { &mut self.prefill } else { &mut self.decode };
        totals.steps += 1;
        totals.prompt_rows += u64::from(step.prefill_rows);
        totals.decode_rows += u64::from(step.decode_rows);
        totals.elapsed += step.elapsed;
        totals.device += device;
        // Sessions that ended in this step held their pages during it.
        self.resident_max = self.resident_max.max(scheduler.n_admitted() + step.finished.len());
    }

    /// Steps that found no memory on the device.
    pub const fn steps_shrunk(&self) -> usize {
        self.steps_shrunk
    }

    /// Sums as rates.
    pub fn metrics(&self, scheduler: &Scheduler) -> FourMetrics {
        let pool = scheduler.report();
        let (prefill, decode) = (&self.prefill, &self.decode);
        // A session that was cancelled before it began has waited until then.
        let waited: Vec<Duration> =
            scheduler.sessions().filter_map(|(_, s)| s.times.admitted.or(s.times.finished)).collect();
        FourMetrics {
            concurrency: ConcurrencyMetric {
                sessions: scheduler.sessions().count(),
                resident_max: self.resident_max,
                fit: if self.largest == Bytes::ZERO { 0 } else { concurrency(pool.arenas_bytes, self.largest) },
                largest_session_bytes: self.largest,
                capacity_bytes: pool.arenas_bytes,
            },
            prefill: PrefillMetric {
                prompt_tokens: prefill.prompt_rows,
                shared_tokens: scheduler.sessions().map(|(_, session)| session.shared_tokens).sum(),
                decode_tokens: prefill.decode_rows,
                steps: prefill.steps,
                elapsed_s: prefill.elapsed.as_secs_f64(),
                device_s: prefill.device.as_secs_f64(),
                tokens_per_s: ratio(prefill.prompt_rows, prefill.elapsed),
            },
            decode: DecodeMetric {
                decode_tokens: decode.decode_rows,
                steps: decode.steps,
                elapsed_s: decode.elapsed.as_secs_f64(),
                device_s: decode.device.as_secs_f64(),
                step_ms: (decode.steps > 0).then(|| decode.elapsed.as_secs_f64() * 1e3 / decode.steps as f64),
                tokens_per_s: ratio(decode.decode_rows, decode.elapsed),
            },
            context_switch: ContextSwitchMetric {
                switches: self.swapped_out + self.swapped_in + self.recomputed + self.compressed,
                swapped_out: self.swapped_out,
                swapped_in: self.swapped_in,
                recomputed: self.recomputed,
                compressed: self.compressed,
                preempted: self.preempted,
                out_bytes: self.out_bytes,
                in_bytes: self.in_bytes,
                alone_s: self.moving.elapsed.as_secs_f64(),
                sessions_waited: waited.iter().filter(|t| !t.is_zero()).count(),
                waited_s: waited.iter().sum::<Duration>().as_secs_f64(),
            },
            service: ServiceMetric::new(scheduler, &self.moves),
        }
    }
}

/// `count` per second, where there was any time.
fn ratio(count: u64, time: Duration) -> Option<f64> {
    (!time.is_zero()).then(|| count as f64 / time.as_secs_f64())
}

/// One metric per challenge.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FourMetrics {
    /// How many sessions fit; bounded by device memory.
    pub concurrency: ConcurrencyMetric,
    /// How long a prompt takes; bounded by arithmetic.
    pub prefill: PrefillMetric,
    /// How long a token takes; bounded by memory bandwidth.
    pub decode: DecodeMetric,
    /// What changing sessions costs; bounded by the link to the host.
    pub context_switch: ContextSwitchMetric,
    /// What users see of all four.
    pub service: ServiceMetric,
}

/// What users wait for, and how many are served.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ServiceMetric {
    /// Sessions that ended with an answer to every question.
    pub sessions_finished: usize,
    /// Of these per hour of the schedule's clock: the paper's session throughput.
    pub sessions_per_hour: Option<f64>,
    /// From a question until the first token of its answer, in seconds.
    pub first_token_s: Option<Percentiles>,
    /// Time per token after the first, of each answer, in milliseconds.
    pub per_token_ms: Option<Percentiles>,
    /// Time of a cache's move to the host or back, beside the rows of others, in seconds.
    pub switch_s: Option<Percentiles>,
}

/// Values that half, 95 and 99 of a hundred do not exceed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Percentiles {
    /// The median.
    pub p50: f64,
    /// 95 of a hundred.
    pub p95: f64,
    /// 99 of a hundred.
    pub p99: f64,
}

impl Percentiles {
    /// Of some values, by the nearest rank.
    pub(super) fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let at = |percent: usize| values.get((values.len() * percent).div_ceil(100).saturating_sub(1)).copied();
        Some(Self { p50: at(50)?, p95: at(95)?, p99: at(99)? })
    }
}

impl ServiceMetric {
    fn new(scheduler: &Scheduler, moves: &[f64]) -> Self {
        let finished = scheduler
            .sessions()
            .filter(|(_, session)| matches!(session.phase, Phase::Finished(Finish::Stop | Finish::Length)));
        let sessions_finished = finished.count();
        let hours = scheduler.now().as_secs_f64() / 3600.0;
        let answers = || scheduler.sessions().flat_map(|(_, session)| &session.answers);
        Self {
            sessions_finished,
            sessions_per_hour: (hours > 0.0).then(|| sessions_finished as f64 / hours),
            first_token_s: Percentiles::of(answers().filter_map(|a| Some(a.first_token?.as_secs_f64())).collect()),
            per_token_ms: Percentiles::of(answers().filter_map(Answer::per_token_ms).collect()),
            switch_s: Percentiles::of(moves.to_vec()),
        }
    }
}

/// Sessions that held pages at once.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ConcurrencyMetric {
    /// Sessions in all.
    pub sessions: usize,
    /// Most sessions that held pages at once.
    pub resident_max: usize,
    /// Sessions as large as the largest that the pool can hold: `capacity_bytes / largest_session_bytes`.
    pub fit: u64,
    /// Bytes of pages that the largest session can need.
    pub largest_session_bytes: Bytes,
    /// Bytes of the pool for pages.
    pub capacity_bytes: Bytes,
}

/// Steps with prompt rows.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PrefillMetric {
    /// Prompt tokens computed.
    pub prompt_tokens: u64,
    /// Tokens that were not read, because pages of other sessions held them.
    pub shared_tokens: u64,
    /// Tokens that other sessions decoded in the same steps.
    pub decode_tokens: u64,
    /// Steps.
    pub steps: u64,
    /// Their time on the clock of the schedule, which is host time.
    pub elapsed_s: f64,
    /// Of this, time on the device.
    pub device_s: f64,
    /// `prompt_tokens / elapsed_s`.
    pub tokens_per_s: Option<f64>,
}

/// Steps without prompt rows.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DecodeMetric {
    /// Tokens decoded, over all sessions.
    pub decode_tokens: u64,
    /// Steps.
    pub steps: u64,
    /// Their time on the clock of the schedule, which is host time.
    pub elapsed_s: f64,
    /// Of this, time on the device.
    pub device_s: f64,
    /// `elapsed_s / steps`: the time between two tokens of one session.
    pub step_ms: Option<f64>,
    /// `decode_tokens / elapsed_s`.
    pub tokens_per_s: Option<f64>,
}

/// Sessions that changed places.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ContextSwitchMetric {
    /// Caches copied out, copied back, dropped to be computed again, or compressed harder.
    pub switches: u64,
    /// Caches copied to the host.
    pub swapped_out: u64,
    /// Caches copied back.
    pub swapped_in: u64,
    /// Caches dropped, to be computed again.
    pub recomputed: u64,
    /// Caches compressed harder.
    pub compressed: u64,
    /// Times that a session lost its place in the middle of a round.
    pub preempted: u64,
    /// Bytes of pages copied out.
    pub out_bytes: Bytes,
    /// Bytes of pages copied back.
    pub in_bytes: Bytes,
    /// Time of steps that only moved pages: what did not hide behind the rows of others.
    pub alone_s: f64,
    /// Sessions that had to wait for room before they began, those included that were cancelled while they did.
    pub sessions_waited: usize,
    /// How long they waited, added up.
    pub waited_s: f64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compression::hidden::HiddenCodec;
    use crate::geometry::PageGeometry;
    use crate::pool::page_table::{TableShape, Window};
    use crate::pool::{PagePool, PoolLayout};
    use crate::schedule::simulation::Simulation;
    use crate::schedule::{Abilities, Caches, HostConfig, ScheduleConfig};

    /// A pool of two pages and one list per session, so that two sessions of one page fit.
    fn scheduler() -> Scheduler {
        let page = PageGeometry { page_size: 16, head_dim: 8 };
        let bytes = HiddenCodec::F16.page_bytes(page);
        let layout = PoolLayout {
            budget: Bytes(256 + 2 * (bytes.0 + 4 * PoolLayout::ENTRIES_PER_PAGE)),
            staging: Bytes::ZERO,
            scratch: Bytes::ZERO,
            max_binding: Bytes(1 << 20),
            slab: bytes,
            smallest_page: bytes,
            fixed_entries: 0,
        };
        let pool = PagePool::new(&layout).expect("room for two slabs");
        let shape = TableShape { num_layers: 1, num_kv_heads: 1, page, codec: HiddenCodec::F16, quest: None };
        let window = Window::new(page, 1, 8, false);
        let config = ScheduleConfig { max_rows: 8, max_sessions: 4, context_length: 100, host: HostConfig::default() };
        Scheduler::new(config, Caches::new(pool, shape, window, Abilities::default()))
    }

    #[test]
    fn percentiles_are_values_of_the_nearest_rank() {
        let of = |n: u32| Percentiles::of((1..=n).rev().map(f64::from).collect());
        assert_eq!(of(200), Some(Percentiles { p50: 100.0, p95: 190.0, p99: 198.0 }), "of 200");
        assert_eq!(of(1), Some(Percentiles { p50: 1.0, p95: 1.0, p99: 1.0 }), "of one");
        assert_eq!(of(0), None, "of none");
    }

    #[test]
    fn steps_count_once_and_waiting_sessions_are_seen() {
        let mut scheduler = scheduler();
        let mut meter = Meter::default();
        for _ in 0..3 {
            let request = Request::new(vec![1; 8], 3);
            meter.session(&scheduler, &request);
            scheduler.submit(request).expect("a session of one page");
        }
        let mut simulation = Simulation::new(1, 10);
        while !scheduler.is_idle() {
            let step = scheduler.step(&mut simulation).expect("a simulated step");
            meter.step(&scheduler, &step, step.elapsed / 2);
        }
        let metrics = meter.metrics(&scheduler);
        let concurrency = &metrics.concurrency;
        assert_eq!((concurrency.sessions, concurrency.resident_max, concurrency.fit), (3, 2, 2), "two of three fit");
        assert_eq!(metrics.prefill.prompt_tokens, 24, "three prompts");
        let decoded = metrics.prefill.decode_tokens + metrics.decode.decode_tokens;
        assert_eq!(decoded, 6, "each first token comes from the prompt");
        let total = metrics.prefill.elapsed_s + metrics.decode.elapsed_s;
        assert!((total - scheduler.now().as_secs_f64()).abs() < 1e-9, "{total} s should be all the time there was");
        assert!((metrics.decode.device_s - metrics.decode.elapsed_s / 2.0).abs() < 1e-9, "device time");
        assert_eq!(metrics.context_switch.sessions_waited, 1, "one waited");
        assert!(metrics.context_switch.waited_s > 0.0, "and for some time");
    }

    #[test]
    fn nothing_measured_is_no_rate() {
        let metrics = Meter::default().metrics(&scheduler());
        assert_eq!((metrics.prefill.tokens_per_s, metrics.decode.step_ms), (None, None), "no time, no rate");
        assert_eq!(metrics.concurrency.fit, 0, "no session to compare with");
    }
}
