//! `concertina plan`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, anyhow};
use clap::Args;
use concertina::compression::Compression;
use concertina::geometry::Bytes;
use concertina::report::records::{Body, KlRow, NeedleRow};
use concertina::report::{ModelReport, PlanReport, PlanRow, PlanSettings, Planner, Program};
use concertina::theory::challenges::Scene;
use concertina::theory::presets::Gpu;
use concertina::theory::quality::{Quality, QualityTable};
use concertina::theory::search::{self, Goal, search};
use concertina::theory::throughput::Rounds;

use super::args::{self, Global};
use super::failure::usage;
use super::machine_args::{Chosen, MachineArgs, price};
use super::output::{Output, OutputFile};
use super::report::record;
use super::theory_args::{NamedModel, TheoryModelArgs, model};

/// Predict what long contexts cost: what fits, how long it takes, and which compression gets there
///
/// The four challenges of arXiv:2405.08944 for a model on one or more GPUs: sessions that fit, time to the first token, time per
/// token, time of a context switch, each with what bounds it, for several compressions side by side; and sessions per hour. Nothing
/// runs, and no GPU is needed.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  concertina plan --model yi-34b --gpu a100-80g:2 --context 50k --compress full kivi4 token=snapkv:0.25,hidden=kivi4
  concertina plan --model llama-3-8b --gpu l4 --context 32k --rounds 5 --think 120 --host-budget 64GB --price 0.8
  concertina plan --model yi-34b --gpu h100 --peak --sweep context=4k..10M --compress full kivi4 kivi2 --html plan.html
  concertina plan --model yi-34b --gpu h100 --sweep compress=hidden --svg quality.svg
  concertina plan --model yi-34b --gpu h100 --find 'cost(1M) <= cost(4k)'
  concertina plan --model model.gguf --gpu rtx4090 --find 'users(32k) >= 20' --json plan.json")]
pub(super) struct PlanArgs {
    #[command(flatten)]
    model: TheoryModelArgs,

    #[command(flatten)]
    machine: MachineArgs,

    /// Tokens of a document, such as 50k or 1M
    #[arg(long, value_name = "TOKENS", default_value = "50k", value_parser = search::tokens)]
    context: u32,

    /// Questions that each session asks
    #[arg(long, value_name = "N", default_value = "3", value_parser = args::small_count)]
    rounds: u32,

    /// Tokens of a question
    #[arg(long, value_name = "TOKENS", default_value = "50", value_parser = search::tokens)]
    question: u32,

    /// Tokens of an answer: 250 are about a screen
    #[arg(long, value_name = "TOKENS", default_value = "250", value_parser = search::tokens)]
    answer: u32,

    /// Seconds between an answer and the next question
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true, default_value = "60", value_parser = seconds)]
    think: f64,

    /// Sessions that decode together, for the time of their token
    #[arg(long, value_name = "N", default_value = "8", value_parser = args::small_count)]
    batch: u32,

    /// Host memory for caches of sessions that think
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = args::budget)]
    host_budget: Bytes,

    /// Round caches to pages of so many tokens, as the pool does: 16, 32, 64 or 128; the paper does not
    #[arg(long, value_name = "TOKENS", value_parser = args::page_size)]
    page_size: Option<u32>,

    /// Read prompts in steps of so many rows; all at once where not given, as the paper does
    #[arg(long, value_name = "ROWS", value_parser = args::small_count)]
    chunk: Option<u32>,

    /// Price of one GPU for an hour, in any currency
    #[arg(long, value_name = "PRICE", allow_negative_numbers = true, value_parser = price)]
    price: Option<f64>,

    /// Compressions of the caches, each as for `run`; sweeps over contexts draw a line for each
    #[arg(long, value_name = "METHODS", num_args = 1.., default_values = ["full", "kivi4", "token=snapkv:0.25,hidden=kivi4"])]
    compress: Vec<Compression>,

    /// Go over contexts (context=4k..10M) or compressions (compress=layer|head|token|hidden|measured)
    ///
    /// Contexts are 25 numbers, evenly apart on a logarithmic scale. Of a dimension all examples are taken, `measured` are those
    /// whose quality is known.
    #[arg(long, value_name = "WHAT")]
    sweep: Vec<Sweep>,

    /// Look for the stacks of compressions that reach a target, such as 'cost(1M) <= cost(4k)'
    ///
    /// cost (bytes of the cache), prefill, decode, switch (seconds) of a context, at most those of a full cache at another one or
    /// a number; users (sessions that fit) at least.
    #[arg(long, value_name = "GOAL")]
    find: Option<Goal>,

    /// Records of `eval kl` and `eval needle`, made with --json: what they measured takes the place of what comes with the program
    #[arg(long, value_name = "FILE", num_args = 1..)]
    quality: Vec<PathBuf>,

    /// Draw the sweep into this file: contexts as curves, compressions by bytes and measured quality
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,

    /// Write everything as one page that needs nothing else
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

/// What is gone over.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Sweep {
    Contexts(u32, u32),
    Compressions(String),
}

const SETS: [&str; 5] = ["layer", "head", "token", "hidden", "measured"];

impl std::str::FromStr for Sweep {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("'{text}' is no sweep; write context=4k..10M, or compress= and one of {}", SETS.join(", "));
        match text.split_once('=').ok_or_else(wrong)? {
            ("context", range) => {
                let (from, to) = range.split_once("..").ok_or_else(wrong)?;
                let (from, to) = (search::tokens(from)?, search::tokens(to)?);
                if from >= to {
                    return Err(format!("context={range} ends at {to}, before it begins at {from}"));
                }
                Ok(Self::Contexts(from, to))
            }
            ("compress", set) if SETS.contains(&set) => Ok(Self::Compressions(set.to_owned())),
            _ => Err(wrong()),
        }
    }
}

/// Contexts of a sweep.
const CONTEXTS: u32 = 25;

fn contexts(from: u32, to: u32) -> Vec<u32> {
    let step = (f64::from(to) / f64::from(from)).ln() / f64::from(CONTEXTS - 1);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between two numbers of tokens")]
    let mut all: Vec<u32> =
        (0..CONTEXTS).map(|i| (f64::from(from) * (step * f64::from(i)).exp()).round() as u32).collect();
    (all[0], all[CONTEXTS as usize - 1]) = (from, to);
    all.dedup();
    all
}

fn set(name: &str, quality: &QualityTable) -> Vec<Compression> {
    use concertina::compression::{head, hidden, layer, token};
    let full = Compression::default();
    match name {
        "layer" => layer::examples().map(|layer| Compression { layer, ..full.clone() }).collect(),
        "head" => head::examples().map(|head| Compression { head, ..full.clone() }).collect(),
        "token" => token::examples().map(|token| Compression { token, ..full.clone() }).collect(),
        "hidden" => hidden::examples().map(|hidden| Compression { hidden, ..full.clone() }).collect(),
        _ => quality.rows().map(|(compression, _)| compression.clone()).collect(),
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    let value = text.strip_suffix('s').unwrap_or(text).parse::<f64>().ok();
    value.filter(|s| (0.0..=1e7).contains(s)).ok_or_else(|| format!("'{text}' is no time; write seconds, such as 60"))
}

/// Plans.
pub(super) fn run(args: &PlanArgs, global: &Global) -> Result<ExitCode> {
    let output = Output::open(global.json.as_deref())?;
    let svg = args.svg.as_deref().map(|path| OutputFile::open("the plot", path)).transpose()?;
    let html = args.html.as_deref().map(|path| OutputFile::open("the page", path)).transpose()?;
    if svg.is_some() && args.sweep.is_empty() {
        return Err(usage("--svg draws a sweep: give --sweep context=4k..10M or --sweep compress=measured"));
    }
    let (planner, model, gpu) = prepare(args)?;
    let report = report(args, &planner, model, gpu)?;
    output.text(&report)?;
    if let Some(svg) = svg {
        let curves = report.context_curves().map(|curves| curves.svg());
        let drawn = curves.or_else(|| report.quality_plot().map(|plot| plot.svg()));
        let drawn = drawn
            .ok_or_else(|| anyhow!("no compression of this sweep was measured, so that there is nothing to draw"))?;
        svg.write(drawn.as_bytes())?;
    }
    if let Some(html) = html {
        html.write(report.page().as_bytes())?;
    }
    output.json(&report)?;
    Ok(ExitCode::SUCCESS)
}

fn prepare(args: &PlanArgs) -> Result<(Planner, ModelReport, Gpu)> {
    let presets = args.model.presets.load()?;
    let chosen = args.machine.choose(&presets)?;
    let NamedModel { name, decoder } = model(&args.model.model, &presets)?;
    let decoder = args.machine.decoder(decoder);
    let Chosen { gpu, gpus, machine, achieved, achieved_from, memory } = chosen;
    let weights = decoder.weights;
    if weights >= memory {
        return Err(usage(format!(
            "the weights of {name} take {weights} of {memory}, which leaves nothing for caches; give more GPUs \
             (--gpu {}:{}), or the bytes of quantised weights (--weights)",
            gpu.name,
            weights.0 / gpu.memory_bytes.0.max(1) + 1
        )));
    }
    let scene = Scene {
        context_tokens: args.context,
        memory_bytes: memory - weights,
        page_tokens: args.page_size,
        chunk_rows: args.chunk,
        batch: args.batch,
    };
    let rounds =
        Rounds { rounds: args.rounds, question_tokens: args.question, answer_tokens: args.answer, think_s: args.think };
    let report = ModelReport::new(name, &decoder.geometry, Some(weights));
    let report = ModelReport { kv_per_token_bytes: decoder.token_bytes(), ..report };
    let settings = PlanSettings {
        model: args.model.model.clone(),
        gpus,
        achieved,
        achieved_from,
        memory_bytes: memory,
        weights_bytes: weights,
        host_budget_bytes: args.host_budget,
        scene,
        rounds,
        price_per_hour: args.price,
    };
    let quality = quality(&args.quality)?;
    Ok((Planner { decoder, machine, settings, quality }, report, gpu))
}

/// What is known of quality, with what records add.
fn quality(paths: &[PathBuf]) -> Result<QualityTable> {
    let mut table = QualityTable::built_in();
    for path in paths {
        let file = path.display().to_string();
        let record = record(path).map_err(|reason| anyhow!("'{file}': {reason}"))?;
        let row = |compression: &str| Quality::unknown(compression, &file);
        let rows: Vec<Quality> = match &record.body {
            Body::Kl(_, rows) => {
                let full = rows.iter().find(|row| row.compression == Compression::default().to_string());
                let difference = |nll: f64| full.map(|full| nll - full.nll);
                let of = |kl: &KlRow| Quality {
                    mean_kl: Some(kl.mean_kl),
                    nll_difference: difference(kl.nll),
                    ..row(&kl.compression)
                };
                rows.iter().filter(|kl| kl.mean_kl > 0.0).map(of).collect()
            }
            Body::Needle(_, rows) => {
                let count = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
                let of = |needle: &NeedleRow| Quality {
                    needles: Some([count(needle.right), count(needle.asked)]),
                    ..row(&needle.compression)
                };
                rows.iter().map(of).collect()
            }
            other => {
                let command = other.command();
                return Err(usage(format!(
                    "'{file}' is a record of {command}; --quality takes eval kl and eval needle"
                )));
            }
        };
        for row in rows {
            table.add(row).map_err(|reason| anyhow!("'{file}': {reason}"))?;
        }
    }
    Ok(table)
}

fn report(args: &PlanArgs, planner: &Planner, model: ModelReport, gpu: Gpu) -> Result<PlanReport> {
    let results: Vec<PlanRow> =
        args.compress.iter().map(|compression| planner.row(compression)).collect::<Result<_, _>>().map_err(usage)?;
    let (mut over_contexts, mut over_compressions) = (Vec::new(), Vec::new());
    for sweep in &args.sweep {
        match sweep {
            Sweep::Contexts(from, to) => {
                over_contexts = contexts(*from, *to).iter().map(|n| planner.context(*n, &args.compress)).collect();
            }
            // What has no room in so few tokens, or is for another shape, is left out.
            Sweep::Compressions(name) => {
                over_compressions = set(name, &planner.quality).iter().filter_map(|c| planner.row(c).ok()).collect();
            }
        }
    }
    let found = match &args.find {
        None => None,
        Some(goal) => {
            let Planner { decoder, machine, settings, quality } = planner;
            Some(search(goal, decoder, machine, &settings.scene, quality).map_err(usage)?)
        }
    };
    Ok(PlanReport {
        program: Program::THIS,
        model,
        gpu,
        settings: planner.settings.clone(),
        machine: planner.machine(),
        advice: planner.advice(&results),
        results,
        contexts: over_contexts,
        compressions: over_compressions,
        search: found,
    })
}
