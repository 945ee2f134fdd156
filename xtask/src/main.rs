//! Set-up, demo and test gate of concertina; `cargo xtask --help` lists the tasks.
//!
//! Each task prepares what it needs by itself (a graphics driver, the reference model), so that a fresh checkout and
//! a Rust toolchain are enough.

mod bench;
mod demo;
mod driver;
mod gate;
mod model;
mod process;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Set-up, demo and test gate of concertina.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo xtask", after_help = EXAMPLES, arg_required_else_help = true)]
struct Options {
    #[command(subcommand)]
    task: Task,
}

const EXAMPLES: &str = "\
Examples:
  cargo xtask demo                        answer questions about four files of this repository
  cargo xtask demo -- --max-new 32        the same with further arguments for `concertina run`
  cargo xtask test                        everything that has to pass before a change is merged
  CONCERTINA_NO_GPU=1 cargo xtask test    the same without any adapter
  CONCERTINA_MODEL=my.gguf cargo xtask demo
  cargo xtask bench-gpu                   measure this machine's GPU and write a record of it
  cargo xtask bench-gpu --binary-only     build the program that does so elsewhere

Environment:
  CONCERTINA_MODEL    a GGUF file to use in place of the reference model, which is then not downloaded
  CONCERTINA_NO_GPU   1: no driver is installed, and tests that need an adapter do not run";

#[derive(Debug, Subcommand)]
enum Task {
    /// Download and check the reference model, once.
    Model,
    /// Run the program on documents made of this repository's own files.
    Demo {
        /// Further arguments of `concertina run`.
        #[arg(last = true)]
        extra: Vec<OsString>,
    },
    /// Measure ceilings and kernels on this machine's GPU, and write a record.
    BenchGpu {
        /// Build the program and say how to run it on another machine.
        #[arg(long)]
        binary_only: bool,
        /// Folder of records; `benches/record` where not given.
        #[arg(long, value_name = "DIR")]
        record: Option<PathBuf>,
    },
    /// Run the whole gate: formatting, lints, documentation, examples, benches and tests.
    Test,
}

fn main() -> ExitCode {
    let result = match Options::parse().task {
        Task::Model => model::ensure().map(|path| {
            println!("model: {}", path.display());
            ExitCode::SUCCESS
        }),
        Task::Demo { extra } => demo::run(&extra),
        Task::BenchGpu { binary_only, record } => bench::run(binary_only, record),
        Task::Test => gate::run().map(|()| ExitCode::SUCCESS),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
