//! Kernels on this machine's adapter, at sizes that software Vulkan runs in a minute; every result is checked.
//!
//! ```text
//! cargo bench --bench kernels     times each case and writes a record below target/tmp
//! cargo test --bench kernels      runs and checks each case, without waiting for times to settle
//! ```
//!
//! `concertina bench kernels` is the same with a choice of cases and sizes.

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use concertina::device::{AdapterRequest, Device};
use concertina::engine::bench::TimedRuns;
use concertina::eval::kernels::{KernelPlan, Protocol, Roof, Sizes, cases, measure};
use concertina::report::{DeviceReport, KernelsReport, Origin, Program, RecordFigure, kernel_line};

/// Runs each case as often as a check needs.
const ONCE: Protocol = Protocol { warm_up: 0.0, most_warm_up: 0.0, samples: 1, least: 1, seconds: 1.0 };

fn main() -> ExitCode {
    // Cargo says so when it benches; it says nothing when it tests.
    let benches = std::env::args().any(|argument| argument == "--bench");
    match run(benches) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(without) => {
            eprintln!("error: {without} kernels have no figure, because their results are wrong or they do not run");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// How many kernels have no figure.
fn run(benches: bool) -> Result<usize, Box<dyn std::error::Error>> {
    let started = Instant::now();
    let device = Device::open(&AdapterRequest::default())?;
    let mut plan = KernelPlan { sizes: Sizes::Small, ..KernelPlan::of(&device) };
    if !benches {
        plan.protocol = ONCE;
    }
    let roof = Roof::measure(&device)?;
    let mut rows = Vec::new();
    measure(&device, &plan, roof, &cases(plan.sizes), &mut |row| {
        print!("{}", kernel_line(&row));
        rows.push(row);
    })?;
    let report = KernelsReport {
        kind: "bench kernels",
        program: Program::THIS,
        device: DeviceReport::new(&device, Some(TimedRuns::new(&device)?.clock())),
        sizes: plan.sizes,
        in_order: plan.settings.in_order,
        roof,
        rows,
        elapsed_s: started.elapsed().as_secs_f64(),
    };
    if benches {
        print!("\n{report}");
        let record = report.record(&Origin::now(None)?);
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels.csv");
        std::fs::write(&path, RecordFigure::write(&record))?;
        println!("written: {}", path.display());
    }
    Ok(report.without_figure())
}
