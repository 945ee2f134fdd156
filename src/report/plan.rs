//! The report of `plan`: the four challenges of a session on a machine, for several compressions, before anything runs.

use serde::Serialize;

use super::curves::{Curves, Panel};
use super::plot::{Plot, Point, Scale};
use super::table::number;
use super::{ModelReport, Program};
use crate::compression::Compression;
use crate::geometry::Bytes;
use crate::theory::challenges::{Bound, Challenges, Scene, challenges};
use crate::theory::model::Decoder;
use crate::theory::presets::Gpu;
use crate::theory::quality::{Quality, QualityTable};
use crate::theory::search::Search;
use crate::theory::step::{Achieved, Machine};
use crate::theory::throughput::{Rounds, Scarce, Throughput, throughput};

/// Everything that `plan` found.
#[derive(Clone, Debug, Serialize)]
pub struct PlanReport {
    /// The program.
    pub program: Program,
    /// The model.
    pub model: ModelReport,
    /// One GPU at its peak.
    pub gpu: Gpu,
    /// What was asked for.
    pub settings: PlanSettings,
    /// What all GPUs together achieve.
    pub machine: MachineReport,
    /// One for each compression, in the order given.
    pub results: Vec<PlanRow>,
    /// What binds, and what to change.
    pub advice: Vec<String>,
    /// The same over many contexts.
    pub contexts: Vec<ContextRow>,
    /// The same over many compressions.
    pub compressions: Vec<PlanRow>,
    /// Stacks that reach a goal.
    pub search: Option<Search>,
}

/// What was asked for.
#[derive(Clone, Debug, Serialize)]
pub struct PlanSettings {
    /// The model, as given.
    pub model: String,
    /// GPUs that share each layer.
    pub gpus: u32,
    /// Parts of the peaks that are achieved.
    pub achieved: Achieved,
    /// Where they are from.
    pub achieved_from: String,
    /// Memory of all GPUs.
    pub memory_bytes: Bytes,
    /// Weights in it.
    pub weights_bytes: Bytes,
    /// Host memory for caches.
    pub host_budget_bytes: Bytes,
    /// The document, and what is left for caches.
    pub scene: Scene,
    /// What comes behind it.
    pub rounds: Rounds,
    /// Price of a GPU for an hour.
    pub price_per_hour: Option<f64>,
}

/// What all GPUs together achieve.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct MachineReport {
    /// FLOP per second.
    pub flops_per_s: f64,
    /// Bytes of device memory per second.
    pub memory_bytes_per_s: f64,
    /// Bytes per second over the links to the host, each way; none where memory is one.
    pub link_bytes_per_s: Option<f64>,
    /// FLOP per byte above which products are bound by FLOP/s: rows of a step with f16 weights.
    pub critical_intensity: f64,
}

/// One compression.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PlanRow {
    /// As `--compress` reads it.
    pub compression: String,
    /// The four challenges.
    pub challenges: Challenges,
    /// How many times fewer bytes than the full cache it holds.
    pub times_smaller: f64,
    /// Sessions per hour.
    pub throughput: Throughput,
    /// Price of a session: all GPUs for an hour over the sessions of an hour.
    pub price_per_session: Option<f64>,
    /// What it costs in quality, where it was measured.
    pub quality: Option<Quality>,
}

/// One context, for each compression.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ContextRow {
    /// Tokens of the document.
    pub context_tokens: u32,
    /// In the order of the compressions; none where a compression has no room in so few tokens.
    pub results: Vec<Option<Challenges>>,
}

/// What a plan is made from.
#[derive(Clone, Debug)]
pub struct Planner {
    /// The model.
    pub decoder: Decoder,
    /// All GPUs together.
    pub machine: Machine,
    /// What was asked for.
    pub settings: PlanSettings,
    /// What was measured of quality.
    pub quality: QualityTable,
}

impl Planner {
    /// One compression.
    ///
    /// # Errors
    /// A sentence when it does not fit the model or the document.
    pub fn row(&self, compression: &Compression) -> Result<PlanRow, String> {
        let Self { decoder, machine, settings, quality } = self;
        let of = |compression| challenges(decoder, machine, compression, &settings.scene);
        let figures = of(compression)?;
        let full = of(&Compression::default())?;
        let host = settings.host_budget_bytes;
        let throughput = throughput(decoder, machine, compression, &settings.scene, &settings.rounds, host)?;
        let best = throughput.best();
        let price = settings.price_per_hour.filter(|_| best.sessions_per_hour > 0.0);
        Ok(PlanRow {
            compression: compression.short(),
            challenges: figures,
            times_smaller: full.cache.held_bytes.0 as f64 / figures.cache.held_bytes.0.max(1) as f64,
            price_per_session: price.map(|price| price * f64::from(settings.gpus) / best.sessions_per_hour),
            throughput,
            quality: quality.of(compression).cloned(),
        })
    }

    /// One context.
    pub fn context(&self, context_tokens: u32, compressions: &[Compression]) -> ContextRow {
        let scene = Scene { context_tokens, ..self.settings.scene };
        let of = |compression| challenges(&self.decoder, &self.machine, compression, &scene).ok();
        ContextRow { context_tokens, results: compressions.iter().map(of).collect() }
    }

    /// What all GPUs together achieve.
    pub fn machine(&self) -> MachineReport {
        let Machine { flops, bandwidth, link, .. } = self.machine;
        MachineReport {
            flops_per_s: flops,
            memory_bytes_per_s: bandwidth,
            link_bytes_per_s: link.is_finite().then_some(link),
            critical_intensity: flops / bandwidth,
        }
    }

    /// What binds the first row, in plain words, and what would change it.
    pub fn advice(&self, rows: &[PlanRow]) -> Vec<String> {
        let Some(first) = rows.first() else { return Vec::new() };
        let mut all = vec![self.on_memory(first, rows)];
        all.push(on_prefill(first));
        all.push(on_decode(first, self.settings.scene.batch));
        all.extend(on_switch(first));
        all.extend(self.on_throughput(first, rows));
        all.extend(self.on_reading(rows));
        all
    }

    fn on_memory(&self, first: &PlanRow, rows: &[PlanRow]) -> String {
        let Scene { context_tokens, memory_bytes, .. } = self.settings.scene;
        let held = first.challenges.cache.held_bytes;
        let fits = first.challenges.concurrency;
        let most = rows.iter().max_by_key(|row| row.challenges.concurrency).unwrap_or(first);
        let best = match most.challenges.concurrency {
            n if n > fits => format!("; with {} {n} fit", most.compression),
            _ => String::new(),
        };
        if fits == 0 {
            let peak = first.challenges.cache.peak_bytes;
            let why = if held < peak { format!("{peak} while it is compressed") } else { held.to_string() };
            return format!(
                "Memory: the {} cache of {context_tokens} tokens takes {why}, and {memory_bytes} are left beside the \
                 weights; {} are missing. More GPUs, quantised weights (--weights), or another cache{best}.",
                first.compression,
                peak.saturating_sub(memory_bytes)
            );
        }
        format!(
            "Memory: {fits} sessions of {held} fit into the {memory_bytes} that weights leave ({}){best}.",
            first.compression
        )
    }

    /// Caches that would fit, if only they could be read.
    fn on_reading(&self, rows: &[PlanRow]) -> Option<String> {
        let memory = self.settings.scene.memory_bytes;
        let stuck = |row: &&PlanRow| {
            let cache = row.challenges.cache;
            cache.peak_bytes > memory && cache.held_bytes <= memory
        };
        let names: Vec<&str> = rows.iter().filter(stuck).map(|row| row.compression.as_str()).collect();
        let what = "a document is read in full before it is evicted from, and that does not fit beside the weights";
        (!names.is_empty()).then(|| format!("Reading: {} would fit, but {what}.", names.join(" and ")))
    }

    fn on_throughput(&self, first: &PlanRow, rows: &[PlanRow]) -> Option<String> {
        let rate = first.throughput.best();
        let best = rows
            .iter()
            .max_by(|a, b| a.throughput.best().sessions_per_hour.total_cmp(&b.throughput.best().sessions_per_hour))?;
        let more = best.throughput.best().sessions_per_hour / rate.sessions_per_hour;
        let gain =
            if more > 1.01 { format!("; {} gives {more:.2} times as many", best.compression) } else { String::new() };
        let what = match rate.bound {
            Scarce::Nothing => return None,
            Scarce::Memory if self.settings.host_budget_bytes == Bytes::ZERO => {
                "limited by how many are there at once: smaller caches, or host memory for those that think (--host-budget)"
            }
            Scarce::Memory => "limited by how many are there at once: smaller caches, or more host memory",
            Scarce::Prefill => {
                "limited by reading documents: FLOP/s, shared documents or skipped layers help; smaller caches do not"
            }
            Scarce::Decode => "limited by writing answers: bandwidth, smaller caches or more sessions per step help",
            Scarce::Link => "limited by the link: smaller caches, or more of them left on the device",
        };
        Some(format!("Sessions per hour: {} at best, {what}{gain}.", number(Some(rate.sessions_per_hour))))
    }
}

fn on_prefill(row: &PlanRow) -> String {
    let prefill = row.challenges.prefill;
    let what = match prefill.bound {
        Bound::FlopsOfAttention => {
            "mostly attention of the prompt to itself, which no smaller cache changes: FLOP/s, shared documents, or layers that prompts skip"
        }
        Bound::FlopsOfProducts => {
            "mostly products with weights: FLOP/s, shared documents, or layers that prompts skip; smaller caches do not help"
        }
        Bound::Interconnect => "mostly sums between GPUs: a faster link between them, or fewer GPUs",
        _ => "mostly reading: larger chunks (--chunk)",
    };
    format!("Prefill: {:.3} s, {what}.", prefill.seconds)
}

fn on_decode(row: &PlanRow, batch: u32) -> String {
    let (alone, together) = (row.challenges.decode, row.challenges.batched);
    let of = |latency: &crate::theory::challenges::Latency| 100.0 * latency.attention_s / latency.seconds;
    let what = match together.bound {
        Bound::BandwidthOfCaches => "caches: fewer bits or tokens",
        Bound::FlopsOfAttention => "computing attention: fewer tokens",
        Bound::Interconnect => "sums between GPUs",
        Bound::FlopsOfProducts => "computing products",
        _ => "weights, which more sessions in a step share",
    };
    format!(
        "Decode: {:.1} ms per token alone, {:.0} % of it over the cache; {batch} together {:.1} ms, {:.0} %, most of it for {what}.",
        1e3 * alone.seconds,
        of(&alone),
        1e3 * together.seconds,
        of(&together)
    )
}

fn on_switch(row: &PlanRow) -> Option<String> {
    let (switch, ratio) = (row.challenges.switch_s?, row.challenges.recompute_ratio?);
    let what = if ratio > 1.0 {
        format!("computing a cache again takes {ratio:.0} times as long as bringing it back: swap")
    } else {
        format!("bringing a cache back takes {:.1} times as long as computing it again: recompute", 1.0 / ratio)
    };
    Some(format!("Switch: {switch:.3} s out and back; {what}."))
}

impl PlanReport {
    /// The four challenges over contexts, a line for each compression; none where no contexts were asked for.
    pub fn context_curves(&self) -> Option<Curves> {
        if self.contexts.is_empty() {
            return None;
        }
        let panel = |title: &str, of: fn(&Challenges) -> Option<f64>| {
            let line = |at: usize| {
                let point = |row: &ContextRow| Some((f64::from(row.context_tokens), of(row.results[at].as_ref()?)?));
                self.contexts.iter().filter_map(point).collect()
            };
            Panel { title: title.to_owned(), lines: (0..self.results.len()).map(line).collect() }
        };
        let Scene { batch, .. } = self.settings.scene;
        Some(Curves {
            title: format!("{} on {}", self.model.name, self.hardware()),
            x_title: "tokens of context".to_owned(),
            names: self.results.iter().map(|row| row.compression.clone()).collect(),
            panels: vec![
                panel("sessions that fit", |c| Some(c.concurrency as f64).filter(|n| *n > 0.0)),
                panel("prefill, s", |c| Some(c.prefill.seconds)),
                panel(&format!("decode of {batch} together, ms per token"), |c| Some(1e3 * c.batched.seconds)),
                panel("context switch, s", |c| c.switch_s),
            ],
        })
    }

    /// Divergence against bytes, of compressions that were measured; none where none was asked for.
    pub fn quality_plot(&self) -> Option<Plot> {
        let point = |row: &PlanRow| {
            let y = row.quality.as_ref()?.mean_kl?;
            Some(Point { x: row.challenges.cache.held_bytes.0 as f64, y, label: row.compression.clone() })
        };
        let points: Vec<Point> = self.compressions.iter().filter_map(point).collect();
        (!points.is_empty()).then(|| Plot {
            title: format!("{}: {} tokens", self.model.name, self.settings.scene.context_tokens),
            x_title: "bytes of one session's cache (log scale)".to_owned(),
            y_title: "mean KL measured on a small model, nats (log scale)".to_owned(),
            y_scale: Scale::Log,
            guide: None,
            points,
        })
    }

    /// The GPUs in words.
    pub fn hardware(&self) -> String {
        self.gpu.several(self.settings.gpus)
    }
}
