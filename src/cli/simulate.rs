//! `concertina simulate`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, anyhow};
use clap::Args;
use concertina::compression::Compression;
use concertina::eval::simulate::{Listener, SimulatedMachine};
use concertina::geometry::Bytes;
use concertina::report::{Meter, ModelReport, Program, SimulateReport, SimulateRow, SimulateSettings};
use concertina::schedule::workload::Workload;
use concertina::schedule::{Scheduler, SessionId, StepReport};
use concertina::theory::presets::Gpu;
use indicatif::ProgressBar;

use super::args::{self, Global};
use super::machine_args::{Chosen, MachineArgs};
use super::output::{Output, OutputFile};
use super::progress;
use super::simulation_args::{ScheduleArgs, WorkloadArgs, check_host_budget, refused};
use super::theory_args::{NamedModel, TheoryModelArgs, model};

/// Ask what a GPU that is not here would do: thousands of sessions over a virtual clock
///
/// The schedule is the one that `run` uses, down to pages and bytes; steps take the time that the theory says, from the FLOP
/// and the bytes of each against the GPU's peaks and the parts of them that are achieved. Sessions come, read a document, ask,
/// read the answer, ask again. Several compressions see the same sessions. The same seed gives the same trace hash. Needs no
/// GPU; runs on one core.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  concertina simulate --model yi-34b --gpu h100 --memory 80GB --sessions 10000 --arrival poisson:2/s --context lognormal:50k --compress kivi4
  concertina simulate --model yi-34b --gpu h100:2 --sessions 1000 --arrival poisson:0.3/s --compress full kivi4
  concertina simulate --model llama-3-8b --gpu l4 --context-length 64k --context uniform:4k..50k --compress full int8 kivi4 kivi2
  concertina simulate --model yi-6b --gpu a100 --host-budget 200GB --arrival poisson:500/h --compress full token=keydiff:0.5
  concertina simulate --model yi-34b --gpu h200 --weights 20GB --arrival all --rounds 1 --json - | jq '.results[].trace_hash'")]
pub(super) struct SimulateArgs {
    #[command(flatten)]
    model: TheoryModelArgs,

    #[command(flatten)]
    machine: MachineArgs,

    #[command(flatten)]
    workload: WorkloadArgs,

    /// Host memory for caches that do not fit; without it, such a cache is dropped and computed again
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = args::budget)]
    host_budget: Bytes,

    #[command(flatten)]
    schedule: ScheduleArgs,

    /// Compressions of the caches, each as for `run`: a simulation each, of the same sessions
    #[arg(long, value_name = "METHODS", num_args = 1.., default_value = "full")]
    compress: Vec<Compression>,

    /// Harder compressions for caches that do not fit, the mildest first, as for `run`
    #[arg(long, value_name = "METHODS", num_args = 1..)]
    ladder: Vec<Compression>,

    /// Draw the time to the first token against the time that a session takes of the machine into this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// What is simulated.
struct Job {
    machine: SimulatedMachine,
    workload: Workload,
    settings: SimulateSettings,
    model: ModelReport,
    gpu: Gpu,
}

/// Simulates.
pub(super) fn run(args: &SimulateArgs, global: &Global) -> Result<ExitCode> {
    let output = Output::open(global.json.as_deref())?;
    let svg = args.svg.as_deref().map(|path| OutputFile::open("the plot", path)).transpose()?;
    let job = prepare(args)?;
    // What can not be simulated is known before the first one begins.
    for compression in &args.compress {
        job.machine.begin(0, compression, &args.ladder).map_err(refused)?;
    }
    output.text(&format!(
        "gpu     {}, {}\nmodel   {}\n\n",
        job.gpu.several(job.settings.gpus),
        job.settings.memory_bytes,
        job.model
    ))?;
    let started = Instant::now();
    let length = u64::from(job.workload.sessions) * args.compress.len() as u64;
    let bar = progress::work("simulating", length);
    let mut results = Vec::new();
    for compression in &args.compress {
        bar.set_message(compression.short());
        let result = simulate(args, &job, compression, &bar);
        if result.is_err() {
            bar.finish_and_clear();
        }
        results.push(result?);
    }
    bar.finish_and_clear();
    let Job { settings, model, gpu, .. } = job;
    let elapsed_s = started.elapsed().as_secs_f64();
    let report = SimulateReport { program: Program::THIS, model, gpu, settings, results, elapsed_s };
    output.text(&report)?;
    if let Some(svg) = svg {
        svg.write(report.plot().svg().as_bytes())?;
    }
    output.json(&report)?;
    Ok(ExitCode::SUCCESS)
}

fn prepare(args: &SimulateArgs) -> Result<Job> {
    let presets = args.model.presets.load()?;
    let Chosen { gpu, gpus, machine, achieved, memory, .. } = args.machine.choose(&presets)?;
    let NamedModel { name, decoder } = model(&args.model.model, &presets)?;
    check_host_budget(&gpu, args.host_budget)?;
    let decoder = args.machine.decoder(decoder);
    let schedule = args.schedule.settings(&decoder)?;
    let model = ModelReport::new(name, &decoder.geometry, Some(decoder.weights));
    let machine = args.schedule.on(&schedule, &decoder, (machine, memory), args.host_budget);
    let workload = args.workload.workload();
    let settings = SimulateSettings {
        model: args.model.model.clone(),
        presets: args.model.presets.files(),
        gpus,
        workload: workload.clone(),
        achieved,
        memory_bytes: memory,
        weights_bytes: machine.model.weights,
        host_budget_bytes: args.host_budget,
        swap_chunk_bytes: machine.swap_chunk,
        schedule,
        ladder: args.ladder.iter().map(Compression::short).collect(),
    };
    Ok(Job { machine, workload, settings, model, gpu })
}

/// Measures a simulation, and shows how far it is.
struct Watch<'a> {
    meter: Meter,
    bar: &'a ProgressBar,
    finished: u64,
}

/// Sessions that end before the bar moves: drawing takes longer than a step.
const BAR_EVERY: u64 = 16;

impl Listener for Watch<'_> {
    fn submitted(&mut self, scheduler: &Scheduler, session: SessionId) {
        if let Some(session) = scheduler.session(session) {
            self.meter.session(scheduler, &session.request);
        }
    }

    fn stepped(&mut self, scheduler: &Scheduler, step: &StepReport) {
        self.meter.step(scheduler, step, step.elapsed);
        self.finished += step.finished.len() as u64;
        if self.finished >= BAR_EVERY {
            self.bar.inc(std::mem::take(&mut self.finished));
        }
    }
}

/// One compression.
fn simulate(args: &SimulateArgs, job: &Job, compression: &Compression, bar: &ProgressBar) -> Result<SimulateRow> {
    let median = job.workload.context.median().round().clamp(1.0, f64::from(job.machine.context_length));
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped above")]
    let predicted = job.machine.predict(compression, median as u32).map_err(refused)?;
    let mut simulation = job.machine.begin(job.workload.seed, compression, &args.ladder).map_err(refused)?;
    let mut watch = Watch { meter: Meter::default(), bar, finished: 0 };
    simulation.run(job.workload.visits(), &mut watch).map_err(refused)?;
    bar.inc(watch.finished + simulation.refused.values().map(|refused| u64::from(refused.sessions)).sum::<u64>());
    let pool = simulation.scheduler.report();
    if pool.pages_in_use_bytes + pool.committed_bytes > Bytes::ZERO {
        return Err(anyhow!("pages are in use or promised after the last session: a defect"));
    }
    Ok(SimulateRow::new(compression, predicted, &simulation, &watch.meter))
}
