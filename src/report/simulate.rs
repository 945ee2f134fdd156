//! The report of `simulate`: one workload on a virtual GPU, once for each compression.

use std::fmt::Write as _;

use serde::Serialize;

use super::plot::{Plot, Point, Scale};
use super::run_tables::cache;
use super::{FourMetrics, Meter, ModelReport, Percentiles, Program};
use crate::compression::Compression;
use crate::eval::simulate::{Predicted, Refused, Simulation};
use crate::geometry::Bytes;
use crate::pool::PoolReport;
use crate::schedule::Store;
use crate::schedule::workload::Workload;
use crate::theory::presets::Gpu;
use crate::theory::step::{Achieved, StepTime};

/// Everything that `simulate` found.
#[derive(Clone, Debug, Serialize)]
pub struct SimulateReport {
    /// The program.
    pub program: Program,
    /// The model.
    pub model: ModelReport,
    /// The GPU at its peak.
    pub gpu: Gpu,
    /// What was asked for.
    pub settings: SimulateSettings,
    /// One for each compression, in the order given.
    pub results: Vec<SimulateRow>,
    /// Time that all of it took, on the clock of the host that ran it: the one number that a seed does not repeat.
    pub elapsed_s: f64,
}

/// What was asked for: the same again gives the same.
#[derive(Clone, Debug, Serialize)]
pub struct SimulateSettings {
    /// The model, as given.
    pub model: String,
    /// Files that models and GPUs were added from.
    pub presets: Vec<String>,
    /// GPUs that share each layer.
    pub gpus: u32,
    /// Who comes, when, and with what.
    pub workload: Workload,
    /// Parts of the GPU's peaks that are achieved.
    pub achieved: Achieved,
    /// Memory of all GPUs.
    pub memory_bytes: Bytes,
    /// Weights in it.
    pub weights_bytes: Bytes,
    /// Host memory for caches.
    pub host_budget_bytes: Bytes,
    /// What a step moves each way.
    pub swap_chunk_bytes: Bytes,
    /// How the schedule is set.
    #[serde(flatten)]
    pub schedule: ScheduleSettings,
    /// Harder compressions for caches that do not fit, in the form that `--ladder` reads.
    pub ladder: Vec<String>,
}

/// How a simulated schedule is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ScheduleSettings {
    /// Sessions that may compute at once.
    pub max_sessions: u32,
    /// Sessions that are scored at once.
    pub observed: u32,
    /// Rows of one step.
    pub chunk_tokens: u32,
    /// Tokens of a page.
    pub page_tokens: u32,
    /// Longest context.
    pub context_tokens: u32,
}

impl ScheduleSettings {
    /// As options of a command line.
    pub(super) fn options(&self) -> String {
        let Self { max_sessions, observed, chunk_tokens, page_tokens, context_tokens } = self;
        format!(
            "--max-sessions {max_sessions} --observed {observed} --chunk {chunk_tokens} --page-size {page_tokens} \
             --context-length {context_tokens}"
        )
    }
}

/// A workload as options of a command line.
pub(super) fn workload_options(workload: &Workload) -> String {
    let Workload { sessions, arrival, context, rounds, question, answer, think, seed } = workload;
    format!(
        "--sessions {sessions} --arrival {arrival} --context {context} --rounds {rounds} --question {question} \
         --answer {answer} --think {think} --seed {seed}"
    )
}

/// Parts of peaks as options of a command line.
pub(super) fn achieved_options(achieved: &Achieved) -> String {
    let Achieved { flops, bandwidth, link } = achieved;
    format!("--achieved-flops {flops} --achieved-bandwidth {bandwidth} --achieved-link {link}")
}

impl SimulateSettings {
    /// The command line that repeats it.
    pub fn command(&self, gpu: &Gpu, compressions: &[&str]) -> String {
        let of_one = self.memory_bytes.0 / u64::from(self.gpus.max(1));
        let mut text = format!(
            "concertina simulate --model {} --gpu {}:{} --memory {of_one} --weights {} {} {} --host-budget {} --swap-chunk {} {} \
             --compress {}",
            quoted(&self.model),
            gpu.name,
            self.gpus,
            self.weights_bytes.0,
            workload_options(&self.workload),
            achieved_options(&self.achieved),
            self.host_budget_bytes.0,
            self.swap_chunk_bytes.0,
            self.schedule.options(),
            compressions.join(" ")
        );
        for file in &self.presets {
            let _ = write!(text, " --presets {}", quoted(file));
        }
        if !self.ladder.is_empty() {
            let _ = write!(text, " --ladder {}", self.ladder.join(" "));
        }
        text
    }
}

/// A word as a shell reads it.
pub(super) fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:,=+".contains(c);
    if word.chars().all(plain) { word.to_owned() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

/// One compression.
#[derive(Clone, Debug, Serialize)]
pub struct SimulateRow {
    /// What was done to the caches, in the form that `--compress` reads.
    pub compression: String,
    /// What the theory says of a session of the median context.
    pub predicted: Predicted,
    /// One metric per challenge, and what users see.
    pub metrics: FourMetrics,
    /// How long a cache was on its way, one way, in seconds.
    pub move_s: Option<Percentiles>,
    /// How much of the machine was used.
    pub usage: UsageReport,
    /// Sessions that were refused, by the reason.
    pub refused: Vec<Refused>,
    /// The pool after the last session.
    pub pool: PoolReport,
    /// Most bytes of caches that host memory held at once.
    pub host_peak_bytes: Bytes,
    /// Steps.
    pub steps: u64,
    /// Time from the first arrival to the last answer, on the virtual clock.
    pub simulated_s: f64,
    /// A hash of every plan and every step's time, in hexadecimal: equal traces have equal hashes.
    pub trace_hash: String,
}

/// How much of the machine was used, in the mean over time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct UsageReport {
    /// Bytes of pages in use.
    pub pages_bytes: Bytes,
    /// Of the bytes for pages, the part in use.
    pub pages_part: f64,
    /// Bytes of caches in host memory.
    pub host_bytes: Bytes,
    /// The part of the time in which somebody computed or moved.
    pub busy_part: f64,
    /// What steps took, part by part.
    pub spent: StepTime,
    /// What evictions took.
    pub evicting_s: f64,
}

impl SimulateRow {
    /// What became of a workload.
    pub fn new(compression: &Compression, predicted: Predicted, simulation: &Simulation, meter: &Meter) -> Self {
        let Simulation { scheduler, device, lists, .. } = simulation;
        let pool = lists.whole_report(scheduler.report());
        Self {
            compression: compression.to_string(),
            predicted,
            metrics: whole_metrics(meter.metrics(scheduler), &|bytes| lists.whole(bytes)),
            move_s: Percentiles::of(device.moves().iter().map(|time| time.as_secs_f64()).collect()),
            usage: usage(simulation, pool.arenas_bytes),
            refused: simulation.refused.values().cloned().collect(),
            host_peak_bytes: lists.whole(scheduler.away_bytes(Store::Host).1),
            steps: device.steps(),
            simulated_s: scheduler.now().as_secs_f64(),
            trace_hash: format!("{:016x}", device.trace_hash()),
            pool,
        }
    }

    /// Sessions that were refused.
    pub fn sessions_refused(&self) -> u32 {
        self.refused.iter().map(|refused| refused.sessions).sum()
    }
}

/// Metrics with the bytes of all lists.
fn whole_metrics(metrics: FourMetrics, whole: &dyn Fn(Bytes) -> Bytes) -> FourMetrics {
    let FourMetrics { mut concurrency, prefill, decode, mut context_switch, service } = metrics;
    concurrency.largest_session_bytes = whole(concurrency.largest_session_bytes);
    concurrency.capacity_bytes = whole(concurrency.capacity_bytes);
    context_switch.out_bytes = whole(context_switch.out_bytes);
    context_switch.in_bytes = whole(context_switch.in_bytes);
    FourMetrics { concurrency, prefill, decode, context_switch, service }
}

fn usage(simulation: &Simulation, capacity: Bytes) -> UsageReport {
    let Simulation { scheduler, device, lists, usage, .. } = simulation;
    let seconds = scheduler.now().as_secs_f64();
    let mean = |byte_s: f64| {
        let bytes = if seconds > 0.0 { byte_s / seconds } else { 0.0 };
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a mean of bytes is below 2^64")]
        let bytes = bytes as u64;
        lists.whole(Bytes(bytes))
    };
    let pages_bytes = mean(usage.pages_byte_s);
    UsageReport {
        pages_bytes,
        pages_part: if capacity > Bytes::ZERO { pages_bytes.0 as f64 / capacity.0 as f64 } else { 0.0 },
        host_bytes: mean(usage.host_byte_s),
        busy_part: if seconds > 0.0 { 1.0 - usage.idle.as_secs_f64() / seconds } else { 0.0 },
        spent: device.spent(),
        evicting_s: device.evicting().as_secs_f64(),
    }
}

impl SimulateReport {
    /// The time to the first token, at 95 of a hundred, against sessions per hour. Lower is better below as beside: the axis
    /// below shows the hours that a session takes of the machine.
    pub fn plot(&self) -> Plot {
        let point = |row: &SimulateRow| {
            let service = &row.metrics.service;
            let per_session = 3600.0 / service.sessions_per_hour.filter(|rate| *rate > 0.0)?;
            let y = service.first_token_s?.p95;
            Some(Point { x: per_session, y, label: cache(&row.compression) })
        };
        Plot {
            title: format!(
                "{}: {} sessions on {} with {}",
                self.model.name,
                self.settings.workload.sessions,
                self.gpu.several(self.settings.gpus),
                self.settings.memory_bytes
            ),
            x_title: "seconds of the machine per session (log scale)".to_owned(),
            y_title: "time to the first token at 95 %, s (log scale)".to_owned(),
            y_scale: Scale::Log,
            guide: None,
            points: self.results.iter().filter_map(point).collect(),
        }
    }
}
