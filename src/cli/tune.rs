//! `concertina tune`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, anyhow};
use clap::Args;
use concertina::device::Device;
use concertina::engine::bench::TimedRuns;
use concertina::eval::tune::{
    EntryKey, Found, TuneCase, TunePlan, TuningFile, TuningFileError, choices_of, file_of_user, search, tune_cases,
};
use concertina::kernels::tuning::Tuning;
use concertina::report::{DeviceReport, Program, TuneReport, tune_line};

use super::args::Global;
use super::bench::seconds;
use super::failure::{INTERRUPTED, usage};
use super::output::Output;
use super::{interrupt, progress};

/// Find the fastest launch of each kernel on this device, and keep it
///
/// Measures the variants of decode, prefill, products, and of the scores and moves of evictions for about a minute. Every variant is
/// compared with the reference before and after; one whose result is wrong, or that does not compile, is named and can not win. A
/// variant takes the place of the default only where the gain exceeds the spread of times. What was found is kept in a file that
/// later commands read: `$CONCERTINA_TUNING`, or concertina/tuning.json in the user's folder of caches, by adapter, driver, version
/// and tier.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  concertina tune
  concertina tune --seconds 180 --json tune.json
  concertina tune --only decode/ kivi4 --file tuning.json
  concertina tune --show")]
pub(super) struct TuneArgs {
    /// Time of the search, about
    #[arg(long, value_name = "SECONDS", default_value_t = TunePlan::SECONDS, value_parser = seconds)]
    seconds: f64,

    /// Search only in cases whose names contain all of these texts; what was found before stays for the others
    #[arg(long, value_name = "TEXT", num_args = 1..)]
    only: Vec<String>,

    /// The file that the result is kept in; by default the one that commands read
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,

    /// Show what the file has for this device, and measure nothing
    #[arg(long, conflicts_with_all = ["seconds", "only"])]
    show: bool,
}

/// Searches.
pub(super) fn run(args: &TuneArgs, global: &Global) -> Result<ExitCode> {
    let output = Output::open(global.json.as_deref())?;
    if global.tuning.is_some() {
        return Err(usage("`tune` compares with the defaults, so --tuning says nothing to it; give --file FILE"));
    }
    let path = args.file.clone().or_else(file_of_user).ok_or_else(|| {
        usage("the environment names no folder for caches (HOME or XDG_CACHE_HOME); give --file FILE")
    })?;
    let device = Device::open(&global.adapter()?)?;
    let known = known(&path, &EntryKey::of(&device));
    if args.show {
        return show(output, &device, &path, known?.1.as_ref());
    }
    let (file, before) = match known {
        Err(error @ TuningFileError::Damaged { .. }) => {
            eprintln!("{error}; it is written anew now");
            Default::default()
        }
        known => known?,
    };
    let mut plan = TunePlan::of(&device);
    plan.seconds = args.seconds;
    let cases = args.cases(tune_cases(plan.sizes))?;
    // What can be refused is refused before anything is measured.
    file.write(&path)?;
    let (report, tuning) = measure(&device, &cases, &plan, &before.unwrap_or_default(), &output, &path)?;
    if report.settled() > 0 {
        // Another search may have written meanwhile.
        let mut file = TuningFile::read(&path)?.unwrap_or_default();
        file.put(EntryKey::of(&device), &tuning);
        file.write(&path)?;
    }
    output.text(&format!("\n{report}"))?;
    if interrupt::requested() {
        output.json(&report)?;
        return Ok(INTERRUPTED.into());
    }
    let without = report.rows.iter().filter(|row| row.winner.is_none()).count();
    let all = report.rows.len();
    output.json(&report)?;
    if without > 0 || all == 0 {
        return Err(anyhow!("{without} of {all} cases have no variant whose result is right; see `concertina verify`"));
    }
    Ok(ExitCode::SUCCESS)
}

/// What a file holds, and has for a device.
fn known(path: &Path, key: &EntryKey) -> Result<(TuningFile, Option<Tuning>), TuningFileError> {
    let Some(file) = TuningFile::read(path)? else { return Ok(Default::default()) };
    let tuning = match file.find(key, path)? {
        Found::Entry(tuning) => Some(*tuning),
        Found::OtherVersion(_) | Found::Nothing => None,
    };
    Ok((file, tuning))
}

/// Shows what is known.
fn show(output: Output, device: &Device, path: &Path, tuning: Option<&Tuning>) -> Result<ExitCode> {
    let Some(tuning) = tuning else {
        let (name, tier) = (&device.summary().name, device.tier());
        return Err(anyhow!(
            "'{}' has no tuning for {name} in the {tier} tier, with this driver and version; run `concertina tune`",
            path.display()
        ));
    };
    let choices = serde_json::to_value(choices_of(tuning))?;
    output.text(&format!("file  {}\n{choices:#}\n", path.display()))?;
    output.json(
        &serde_json::json!({ "file": path.display().to_string(), "key": EntryKey::of(device), "choices": choices }),
    )?;
    Ok(ExitCode::SUCCESS)
}

/// Searches, showing each row as soon as it is there.
fn measure(
    device: &Device,
    cases: &[TuneCase],
    plan: &TunePlan,
    before: &Tuning,
    output: &Output,
    path: &Path,
) -> Result<(TuneReport, Tuning)> {
    interrupt::install()?;
    let started = Instant::now();
    let mut report = TuneReport {
        kind: "tune",
        program: Program::THIS,
        device: DeviceReport::new(device, Some(TimedRuns::new(device)?.clock())),
        file: path.display().to_string(),
        sizes: plan.sizes,
        cases: cases.len(),
        rows: Vec::new(),
        elapsed_s: 0.0,
    };
    output.text(&format!("device  {}\nfile    {}\n\n", report.device, report.file))?;
    let bar = progress::counter("cases", cases.len() as u64);
    let mut shown = Ok(());
    let tuning = search(device, cases, plan, before, &mut |row| {
        bar.set_message(row.case.clone());
        bar.inc(1);
        if shown.is_ok() {
            shown = bar.suspend(|| output.text(&tune_line(&row)));
        }
        report.rows.push(row);
        shown.is_ok() && !interrupt::requested()
    });
    bar.finish_and_clear();
    shown?;
    let tuning = tuning?;
    report.elapsed_s = started.elapsed().as_secs_f64();
    Ok((report, tuning))
}

impl TuneArgs {
    /// The cases that are asked for.
    fn cases(&self, all: Vec<TuneCase>) -> Result<Vec<TuneCase>> {
        let names: Vec<String> = all.iter().map(|case| case.case.name()).collect();
        let asked = |case: &TuneCase| self.only.iter().all(|part| case.case.name().contains(part.as_str()));
        let cases: Vec<_> = all.into_iter().filter(asked).collect();
        if cases.is_empty() {
            return Err(usage(format!(
                "no case is named '{}'; there are {}",
                self.only.join("' and '"),
                names.join(", ")
            )));
        }
        Ok(cases)
    }
}
