//! `concertina fleet`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use concertina::compression::Compression;
use concertina::eval::fleet::{Choices, Design, LeftOut, serve, too_small};
use concertina::eval::simulate::SimulatedMachine;
use concertina::geometry::Bytes;
use concertina::report::{DesignRow, FleetReport, FleetSettings, ModelReport, Program};
use concertina::theory::model::Decoder;
use concertina::theory::presets::Gpu;
use indicatif::ProgressBar;

use super::args::{self, Global};
use super::failure::usage;
use super::machine_args::{AchievedArgs, price, shared};
use super::output::{Output, OutputFile};
use super::progress;
use super::simulation_args::{ScheduleArgs, WorkloadArgs, check_host_budget, refused};
use super::theory_args::{NamedModel, TheoryModelArgs, model};

/// Size a deployment: one load on many designs, each so many GPUs that share the work in some way
///
/// A design is replicas of the model, each on one or more GPUs that share each layer, with so much memory, and a compression of
/// the caches. Every design sees the same sessions, dealt out to its replicas in turn; all replicas are simulated, as by
/// `simulate`. It keeps up with the load where at most 5 % of the sessions still wait for their first token when the last one
/// comes. The cheapest design that keeps up, refuses nobody for want of memory and begins its answers in time is named. The same
/// seed gives the same trace hashes. Needs no GPU; runs on one core.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  concertina fleet --model yi-34b --gpu h100 --gpus 2 4 8 --share 1 2 4 --arrival poisson:0.3/s --price 2.5 --compress full kivi4
  concertina fleet --model yi-34b --gpu h100 --memory 80GB 141GB --price 2.5 3.5 --share 2 --first-token-within 30s
  concertina fleet --model llama-3-8b --gpu l4 --context-length 64k --context uniform:4k..50k --gpus 4 8 16 --html fleet.html
  concertina fleet --model yi-6b --gpu a100 --arrival all --rounds 1 --json - | jq '.designs[].served.sessions_per_hour'")]
pub(super) struct FleetArgs {
    #[command(flatten)]
    model: TheoryModelArgs,

    /// A GPU by its name, of those that `concertina presets` lists
    #[arg(long, value_name = "NAME", default_value = "h100")]
    gpu: String,

    /// GPUs in all, of each design
    #[arg(long, value_name = "N", num_args = 1.., default_values = ["1", "2", "4", "8"], value_parser = gpu_count)]
    gpus: Vec<u32>,

    /// GPUs that share each layer; what does not divide the GPUs in all is left out
    #[arg(long, value_name = "N", num_args = 1.., default_values = ["1", "2"], value_parser = gpu_count)]
    share: Vec<u32>,

    /// Device memory of one GPU for weights and caches; what it has where not given
    #[arg(long, value_name = "SIZE", num_args = 1.., value_parser = args::budget)]
    memory: Vec<Bytes>,

    /// Price of one GPU for an hour, in any currency: one for all, or one for each --memory; the preset's where not given
    #[arg(long, value_name = "PRICE", num_args = 1.., allow_negative_numbers = true, value_parser = price)]
    price: Vec<f64>,

    /// Bytes of the weights, where they are quantised; two per parameter where not given
    #[arg(long, value_name = "SIZE", value_parser = args::budget)]
    weights: Option<Bytes>,

    #[command(flatten)]
    achieved: AchievedArgs,

    #[command(flatten)]
    workload: WorkloadArgs,

    /// Host memory beside each GPU for caches that do not fit; without it, such a cache is dropped and computed again
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = args::budget)]
    host_budget: Bytes,

    #[command(flatten)]
    schedule: ScheduleArgs,

    /// Compressions of the caches, each as for `run`
    #[arg(long, value_name = "METHODS", num_args = 1.., default_values = ["full", "kivi4"])]
    compress: Vec<Compression>,

    /// Seconds within which 95 of a hundred answers are to begin, such as 30s
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true, value_parser = limit)]
    first_token_within: Option<f64>,

    /// Draw the time to the first token against what a session costs into this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,

    /// Write everything as one page that needs nothing else
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

/// Reads a number of GPUs.
fn gpu_count(text: &str) -> Result<u32, String> {
    const MAX: u32 = 1_024;
    text.parse().ok().filter(|n| (1..=MAX).contains(n)).ok_or_else(|| format!("expected a number from 1 to {MAX}"))
}

/// Reads a time above 0.
fn limit(text: &str) -> Result<f64, String> {
    let seconds = text.strip_suffix('s').unwrap_or(text).parse().ok().filter(|s: &f64| s.is_finite() && *s > 0.0);
    seconds.ok_or_else(|| format!("'{text}' is no time above 0; write seconds, such as 30s"))
}

/// What is named twice counts once.
fn each_once<T: Clone + PartialEq>(values: &[T]) -> Vec<T> {
    let mut once: Vec<T> = Vec::new();
    for value in values {
        if !once.contains(value) {
            once.push(value.clone());
        }
    }
    once
}

/// What is simulated.
struct Job {
    model: ModelReport,
    gpu: Gpu,
    settings: FleetSettings,
    /// Each with its replica.
    designs: Vec<(Design, SimulatedMachine)>,
    left_out: Vec<LeftOut>,
}

/// Simulates.
pub(super) fn run(args: &FleetArgs, global: &Global) -> Result<ExitCode> {
    let output = Output::open(global.json.as_deref())?;
    let svg = args.svg.as_deref().map(|path| OutputFile::open("the plot", path)).transpose()?;
    let html = args.html.as_deref().map(|path| OutputFile::open("the page", path)).transpose()?;
    let Job { model, gpu, settings, designs, left_out } = prepare(args)?;
    // What can not be simulated is known before the first one begins.
    let fits =
        |(design, machine): &(Design, SimulatedMachine)| too_small(machine, &design.compression).map_err(refused);
    let too_small = designs.iter().map(fits).collect::<Result<Vec<_>>>()?;
    let started = Instant::now();
    let simulated = too_small.iter().filter(|why| why.is_none()).count() as u64;
    let bar = progress::work("simulating", simulated * u64::from(settings.workload.sessions));
    let rows = designs.iter().zip(too_small).map(|(design, too_small)| row(design, too_small, &settings, &bar));
    let rows = rows.collect::<Result<Vec<_>>>();
    bar.finish_and_clear();
    let designs = rows?;
    let report = FleetReport {
        program: Program::THIS,
        model,
        gpu,
        cheapest: FleetReport::find_cheapest(&settings, &designs),
        settings,
        designs,
        left_out,
        elapsed_s: started.elapsed().as_secs_f64(),
    };
    output.text(&report)?;
    if let Some(svg) = svg {
        svg.write(report.plot().svg().as_bytes())?;
    }
    if let Some(html) = html {
        html.write(report.page().as_bytes())?;
    }
    output.json(&report)?;
    Ok(ExitCode::SUCCESS)
}

/// One design.
fn row(
    (design, machine): &(Design, SimulatedMachine),
    too_small: Option<String>,
    settings: &FleetSettings,
    bar: &ProgressBar,
) -> Result<DesignRow> {
    let price = settings.price_per_hour.get(design.memory_choice).copied();
    if let Some(why) = too_small {
        return Ok(DesignRow::new(design, price, Err(why)));
    }
    let Design { replicas, share, compression, .. } = design;
    bar.set_message(format!("{replicas} x {share}, {}", compression.short()));
    let served = serve(machine, *replicas, &settings.workload, compression, &mut |over| bar.inc(over));
    Ok(DesignRow::new(design, price, Ok(served.map_err(refused)?)))
}

/// The price of each memory; none where nobody knows.
fn prices(args: &FleetArgs, gpu: &Gpu, memories: usize) -> Result<Vec<f64>> {
    match args.price.as_slice() {
        [] => Ok(gpu.price_per_hour.map_or_else(Vec::new, |price| vec![price; memories])),
        [price] => Ok(vec![*price; memories]),
        all if all.len() == memories => Ok(all.to_vec()),
        all => Err(usage(format!(
            "there are {} prices and {memories} --memory; give one price for all, or one for each",
            all.len()
        ))),
    }
}

fn prepare(args: &FleetArgs) -> Result<Job> {
    let presets = args.model.presets.load()?;
    let gpu = presets.gpu(&args.gpu).map_err(usage)?.clone();
    let NamedModel { name, decoder } = model(&args.model.model, &presets)?;
    check_host_budget(&gpu, args.host_budget)?;
    let decoder = decoder.with_weights(args.weights);
    let memory = if args.memory.is_empty() { vec![gpu.memory_bytes] } else { args.memory.clone() };
    let price_per_hour = prices(args, &gpu, memory.len())?;
    let choices = Choices {
        gpus: each_once(&args.gpus),
        share: each_once(&args.share),
        memory,
        compressions: each_once(&args.compress),
    };
    let (designs, left_out) = choices.designs();
    if designs.is_empty() {
        let [gpus, share] = [&choices.gpus, &choices.share]
            .map(|all| all.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "));
        return Err(usage(format!(
            "no design is left: none of --share {share} divides any of --gpus {gpus}; give a --share that does, such as 1"
        )));
    }
    let settings = FleetSettings {
        model: args.model.model.clone(),
        presets: args.model.presets.files(),
        workload: args.workload.workload(),
        achieved: args.achieved.of(&gpu)?.0,
        weights_bytes: decoder.weights,
        price_per_hour,
        compressions: choices.compressions.iter().map(Compression::short).collect(),
        gpus: choices.gpus,
        share: choices.share,
        memory_bytes: choices.memory,
        host_budget_bytes: args.host_budget,
        swap_chunk_bytes: args.schedule.swap_chunk,
        schedule: args.schedule.settings(&decoder)?,
        first_token_within_s: args.first_token_within,
    };
    let replica = |design: Design| Ok((design.clone(), replica(args, &settings, &gpu, &decoder, &design)?));
    let designs = designs.into_iter().map(replica).collect::<Result<Vec<_>>>()?;
    Ok(Job {
        model: ModelReport::new(name, &decoder.geometry, Some(decoder.weights)),
        gpu,
        settings,
        designs,
        left_out,
    })
}

/// One replica of a design.
fn replica(
    args: &FleetArgs,
    settings: &FleetSettings,
    gpu: &Gpu,
    decoder: &Decoder,
    design: &Design,
) -> Result<SimulatedMachine> {
    let machine = shared(gpu, &settings.achieved, design.share, design.memory)?;
    let host_budget = Bytes(args.host_budget.0 * u64::from(design.share));
    Ok(args.schedule.on(&settings.schedule, decoder, machine, host_budget))
}
