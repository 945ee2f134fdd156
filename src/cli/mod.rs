//! The command line: arguments, commands, progress.
//!
//! Results go to the standard output, progress and messages to the standard error. A command checks what it was given
//! in order of cost: the arguments, the files, the header of the model, the device, and only then loads weights.
//!
//! | exit code | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | something failed: no adapter, an unreadable file, a failed check |
//! | 2 | the command line can not be carried out as it is written |
//! | 130 | interrupted; `run` and `generate` print what there is. 0 where sessions were saved |
//! | 141 | the reader of the standard output has closed it |

mod args;
mod bench;
mod calibrate;
mod codecs;
mod devices;
mod documents;
mod eval;
mod failure;
mod fleet;
mod generate;
mod interrupt;
mod kl;
mod kl_job;
mod load;
mod losses;
mod machine_args;
mod needle;
mod output;
mod perplexity;
mod plan;
mod policies;
mod presets;
mod progress;
mod report;
mod resume;
mod run;
mod run_progress;
mod session;
mod session_dir;
mod simulate;
mod simulation_args;
mod theory_args;
mod tokenize;
mod tune;
mod tuning;
mod verify;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use args::Global;

/// Attention over many long documents at once, within one byte budget of GPU memory
///
/// Concertina runs language models whose KV caches live in pages of a fixed budget of device memory, and schedules
/// sessions over long documents in it: those that fit compute together, the others wait. It runs on Vulkan, Metal
/// and Direct3D 12.
#[derive(Debug, Parser)]
#[command(name = "concertina", version, arg_required_else_help = true, after_help = EXAMPLES)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  concertina devices
  concertina run --model model.gguf --document a.txt b.txt --ask 'What is this about?' --kv-budget 64MiB
  concertina generate --model model.gguf --prompt 'Write a haiku about rivers.'
  concertina codecs --model model.gguf
  concertina eval kl --model model.gguf --text essay.txt --compress int8 kivi4 kivi2
  concertina plan --model yi-34b --gpu a100 --context 50k --compress full kivi4
  concertina simulate --model yi-34b --gpu h100 --sessions 1000 --compress kivi4 kivi2
  concertina fleet --model yi-34b --gpu h100 --gpus 2 4 8 --share 1 2 4 --arrival poisson:0.3/s --price 2.5
  concertina tune
  concertina verify --quick

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.";

#[derive(Debug, Subcommand)]
enum Command {
    Devices(devices::DevicesArgs),
    Run(run::RunArgs),
    Session(session::SessionArgs),
    Generate(generate::GenerateArgs),
    Tokenize(tokenize::TokenizeArgs),
    Codecs(codecs::CodecsArgs),
    Policies(policies::PoliciesArgs),
    Presets(presets::PresetsArgs),
    Calibrate(calibrate::CalibrateArgs),
    Eval(eval::EvalArgs),
    Bench(bench::BenchArgs),
    Tune(tune::TuneArgs),
    Report(report::ReportArgs),
    Plan(plan::PlanArgs),
    Simulate(simulate::SimulateArgs),
    Fleet(fleet::FleetArgs),
    Verify(verify::VerifyArgs),
}

/// Parses the command line and runs the command.
pub(crate) fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return failure::report_clap(&error),
    };
    let global = &cli.global;
    let result = match &cli.command {
        Command::Devices(_) => devices::run(global),
        Command::Run(args) => run::run(args, global),
        Command::Session(args) => session::run(args, global),
        Command::Generate(args) => generate::run(args, global),
        Command::Tokenize(args) => tokenize::run(args, global),
        Command::Codecs(args) => codecs::run(args, global),
        Command::Policies(_) => policies::run(global),
        Command::Presets(args) => presets::run(args, global),
        Command::Calibrate(args) => calibrate::run(args, global),
        Command::Eval(args) => eval::run(args, global),
        Command::Bench(args) => bench::run(args, global),
        Command::Tune(args) => tune::run(args, global),
        Command::Report(args) => report::run(args, global),
        Command::Plan(args) => plan::run(args, global),
        Command::Simulate(args) => simulate::run(args, global),
        Command::Fleet(args) => fleet::run(args, global),
        Command::Verify(args) => verify::run(args, global),
    };
    result.unwrap_or_else(|error| failure::report(&error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_long_help_and_examples() {
        for command in Cli::command().get_subcommands().filter(|c| c.get_name() != "help") {
            let name = command.get_name();
            assert!(command.get_long_about().is_some(), "{name} should explain itself");
            let after = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(after.contains(&format!("concertina {name}")), "{name} should have an example");
        }
    }
}
