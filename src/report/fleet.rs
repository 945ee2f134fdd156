//! The report of `fleet`: one workload on many designs, each so many GPUs that share the work in some way.

use serde::Serialize;

use super::plot::{Plot, Point, Scale};
use super::run_tables::cache;
use super::simulate::{achieved_options, quoted, workload_options};
use super::table::number;
use super::{ModelReport, Percentiles, Program, ScheduleSettings};
use crate::eval::fleet::{Design, LeftOut, Served};
use crate::eval::simulate::Refused;
use crate::geometry::Bytes;
use crate::schedule::workload::{Arrivals, Workload};
use crate::theory::presets::Gpu;
use crate::theory::step::Achieved;

/// Everything that `fleet` found.
#[derive(Clone, Debug, Serialize)]
pub struct FleetReport {
    /// The program.
    pub program: Program,
    /// The model.
    pub model: ModelReport,
    /// One GPU at its peak.
    pub gpu: Gpu,
    /// What was asked for.
    pub settings: FleetSettings,
    /// The designs, by GPUs, then by how many share a layer, memory and compression.
    pub designs: Vec<DesignRow>,
    /// GPUs that can not be shared out as was asked for.
    pub left_out: Vec<LeftOut>,
    /// Place in `designs` of the cheapest that serves the load ([`FleetReport::find_cheapest`]).
    pub cheapest: Option<usize>,
    /// Time that all of it took, on the clock of the host that ran it: the one number that a seed does not repeat.
    pub elapsed_s: f64,
}

/// What was asked for: the same again gives the same.
#[derive(Clone, Debug, Serialize)]
pub struct FleetSettings {
    /// The model, as given.
    pub model: String,
    /// Files that models and GPUs were added from.
    pub presets: Vec<String>,
    /// Who comes, when, and with what.
    pub workload: Workload,
    /// Parts of the GPU's peaks that are achieved.
    pub achieved: Achieved,
    /// Bytes of the weights.
    pub weights_bytes: Bytes,
    /// GPUs in all.
    pub gpus: Vec<u32>,
    /// GPUs that share each layer.
    pub share: Vec<u32>,
    /// Memory of one GPU.
    pub memory_bytes: Vec<Bytes>,
    /// Price of one GPU for an hour, for each memory; empty where nobody knows.
    pub price_per_hour: Vec<f64>,
    /// What is done to caches, in the form that `--compress` reads.
    pub compressions: Vec<String>,
    /// Host memory for caches beside each GPU.
    pub host_budget_bytes: Bytes,
    /// What a step moves each way, where it was given.
    pub swap_chunk_bytes: Option<Bytes>,
    /// How the schedule is set.
    #[serde(flatten)]
    pub schedule: ScheduleSettings,
    /// Seconds within which 95 of a hundred answers are to begin.
    pub first_token_within_s: Option<f64>,
}

impl FleetSettings {
    /// The command line that repeats it.
    pub fn command(&self, gpu: &Gpu) -> String {
        let mut words = vec![
            format!("concertina fleet --model {} --gpu {}", quoted(&self.model), gpu.name),
            format!("--gpus {} --share {} --memory {}", joined(&self.gpus), joined(&self.share), {
                let bytes: Vec<u64> = self.memory_bytes.iter().map(|memory| memory.0).collect();
                joined(&bytes)
            }),
            format!("--weights {}", self.weights_bytes.0),
            workload_options(&self.workload),
            achieved_options(&self.achieved),
            format!("--host-budget {}", self.host_budget_bytes.0),
            self.schedule.options(),
            format!("--compress {}", self.compressions.join(" ")),
        ];
        words.extend(self.swap_chunk_bytes.map(|chunk| format!("--swap-chunk {}", chunk.0)));
        words.extend(self.first_token_within_s.map(|seconds| format!("--first-token-within {seconds}")));
        if !self.price_per_hour.is_empty() {
            words.push(format!("--price {}", joined(&self.price_per_hour)));
        }
        words.extend(self.presets.iter().map(|file| format!("--presets {}", quoted(file))));
        words.join(" ")
    }
}

fn joined<T: ToString>(values: &[T]) -> String {
    values.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

/// One design.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DesignRow {
    /// GPUs in all: replicas times those that share each layer.
    pub gpus: u32,
    /// Replicas of the model.
    pub replicas: u32,
    /// GPUs of a replica, which share each layer.
    pub share: u32,
    /// Memory of one GPU.
    pub memory_bytes: Bytes,
    /// What was done to caches, in the form that `--compress` reads.
    pub compression: String,
    /// Price of all GPUs for an hour.
    pub price_per_hour: Option<f64>,
    /// Why a replica holds no session, where that is so.
    pub does_not_fit: Option<String>,
    /// What became of the workload, where it could begin.
    pub served: Option<DesignFigures>,
}

/// What became of a workload on a design.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DesignFigures {
    /// Sessions that ended with an answer to every question.
    pub sessions_finished: u32,
    /// Of these per hour, from the first arrival to the last answer.
    pub sessions_per_hour: Option<f64>,
    /// From a question until the first token of its answer, in seconds.
    pub first_token_s: Option<Percentiles>,
    /// Time per token after the first, of each answer, in milliseconds.
    pub per_token_ms: Option<Percentiles>,
    /// The part of the replicas' time in which they computed or moved something.
    pub busy_part: f64,
    /// Most sessions that held pages at once on one replica.
    pub resident_max: usize,
    /// Sessions that were refused, by the reason.
    pub refused: Vec<Refused>,
    /// Of these, sessions that a replica can never hold; the others are too long for the model.
    pub never_fit: u32,
    /// Sessions that still waited for their first token when the last one came.
    pub behind: u32,
    /// Whether that is few, [`BEHIND_MAX`](crate::eval::fleet::BEHIND_MAX) of all; `null` where all came at once.
    pub keeps_up: Option<bool>,
    /// When the last session came.
    pub last_arrival_s: f64,
    /// When the last answer was there.
    pub last_answer_s: f64,
    /// GPU hours over sessions, all GPUs being held until the last answer.
    pub gpu_hours_per_session: Option<f64>,
    /// The same in money.
    pub price_per_session: Option<f64>,
    /// A hash of the replicas' traces, in hexadecimal: equal traces have equal hashes.
    pub trace_hash: String,
}

impl DesignRow {
    /// A design, of whose GPUs one costs `price` an hour; and what became of the workload, or why it could not begin.
    pub fn new(design: &Design, price: Option<f64>, outcome: Result<Served, String>) -> Self {
        let gpus = design.gpus();
        let (served, does_not_fit) = match outcome {
            Ok(served) => (Some(DesignFigures::new(design, price, served)), None),
            Err(why) => (None, Some(why)),
        };
        Self {
            gpus,
            replicas: design.replicas,
            share: design.share,
            memory_bytes: design.memory,
            compression: design.compression.to_string(),
            price_per_hour: price.map(|price| price * f64::from(gpus)),
            does_not_fit,
            served,
        }
    }

    /// Sessions that were refused.
    pub fn sessions_refused(&self) -> u32 {
        self.served.iter().flat_map(|served| &served.refused).map(|refused| refused.sessions).sum()
    }

    /// Whether it serves everybody that the model can serve, falls not behind, and begins 95 of a hundred answers in time.
    pub fn serves(&self, first_token_within_s: Option<f64>) -> bool {
        let within = |served: &DesignFigures| match (first_token_within_s, served.first_token_s) {
            (None, _) => true,
            (Some(limit), Some(first_token)) => first_token.p95 <= limit,
            (Some(_), None) => false,
        };
        self.served.as_ref().is_some_and(|served| {
            served.sessions_finished > 0 && served.never_fit == 0 && served.keeps_up != Some(false) && within(served)
        })
    }

    /// The design in a few words: replicas times GPUs that share a layer, and the cache.
    fn label(&self, with_memory: bool) -> String {
        let memory = if with_memory { format!(" {}", gigabytes(self.memory_bytes)) } else { String::new() };
        format!("{}x{}{memory} {}", self.replicas, self.share, cache(&self.compression))
    }
}

impl DesignFigures {
    fn new(design: &Design, price: Option<f64>, served: Served) -> Self {
        let hours = served.gpu_hours_per_session(design.gpus());
        Self {
            sessions_finished: served.finished,
            sessions_per_hour: served.sessions_per_hour(),
            busy_part: served.busy_part(design.replicas),
            resident_max: served.resident_max,
            never_fit: served.never_fit(),
            behind: served.behind,
            keeps_up: served.keeps_up(design.replicas),
            last_arrival_s: served.last_arrival.as_secs_f64(),
            last_answer_s: served.last_answer.as_secs_f64(),
            gpu_hours_per_session: hours,
            price_per_session: price.and_then(|price| Some(price * hours?)),
            trace_hash: format!("{:016x}", served.trace_hash),
            refused: served.refused.into_values().collect(),
            first_token_s: Percentiles::of(served.first_token_s),
            per_token_ms: Percentiles::of(served.per_token_ms),
        }
    }
}

/// Bytes as vendors write them.
pub(super) fn gigabytes(bytes: Bytes) -> String {
    format!("{} GB", number(Some(bytes.0 as f64 / 1e9)))
}

impl FleetReport {
    /// The place of the cheapest design that serves the load ([`DesignRow::serves`]).
    ///
    /// Of sessions that come over time it is the one whose GPUs cost least in an hour, since all that keep up serve the same
    /// sessions; where they all come at once, the one that costs least per session. Among equals, the one whose answers begin
    /// first. GPUs stand for prices where there are none.
    pub fn find_cheapest(settings: &FleetSettings, designs: &[DesignRow]) -> Option<usize> {
        let cost = |row: &DesignRow| {
            let served = row.served.as_ref()?;
            let cost = match settings.workload.arrival {
                Arrivals::All => served.price_per_session.or(served.gpu_hours_per_session)?,
                Arrivals::Poisson { .. } => row.price_per_hour.unwrap_or(f64::from(row.gpus)),
            };
            Some((cost, served.first_token_s?.p95))
        };
        let served = designs.iter().enumerate().filter(|(_, row)| row.serves(settings.first_token_within_s));
        let costs = served.filter_map(|(place, row)| Some((place, cost(row)?)));
        costs.min_by(|(_, a), (_, b)| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1))).map(|(place, _)| place)
    }

    /// Whether prices are known.
    pub(super) fn has_prices(&self) -> bool {
        !self.settings.price_per_hour.is_empty()
    }

    /// What a session costs: money where prices are known, or else seconds of a GPU.
    pub(super) fn cost(&self, served: &DesignFigures) -> Option<f64> {
        if self.has_prices() { served.price_per_session } else { served.gpu_hours_per_session.map(|h| 3600.0 * h) }
    }

    /// The name of a design.
    pub(super) fn label(&self, row: &DesignRow) -> String {
        row.label(self.settings.memory_bytes.len() > 1)
    }

    /// The time to the first token, at 95 of a hundred, against what a session costs. Designs that refuse sessions because they
    /// never fit are left out: they serve another load.
    pub fn plot(&self) -> Plot {
        let point = |row: &DesignRow| {
            let served = row.served.as_ref().filter(|served| served.never_fit == 0)?;
            let x = self.cost(served).filter(|cost| *cost > 0.0)?;
            Some(Point { x, y: served.first_token_s?.p95, label: self.label(row) })
        };
        let what = if self.has_prices() { "price of a session" } else { "GPU seconds of a session" };
        Plot {
            title: format!("{}: {} sessions on {}", self.model.name, self.settings.workload.sessions, self.gpu.gpu),
            x_title: format!("{what} (log scale); replicas x GPUs that share each layer"),
            y_title: "time to the first token at 95 %, s (log scale)".to_owned(),
            y_scale: Scale::Log,
            guide: None,
            points: self.designs.iter().filter_map(point).collect(),
        }
    }
}
