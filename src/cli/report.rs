//! `concertina report`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, anyhow};
use clap::Args;
use concertina::report::records::{self, Record, Refused};

use super::args::Global;
use super::failure::usage;
use super::output::{Output, OutputFile};

/// Put what was measured beside what the theory predicts
///
/// Reads records, which are what commands write with --json: `bench device`, `bench metrics`, `bench switch`, `run`, `eval kl`,
/// `eval needle` and `eval perplexity`. They are joined by model, device and compression; predictions are made with the ceilings
/// that `bench device` measured on the same device. Files that are no such records are named and left out.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  concertina bench device --json records/device.json
  concertina bench metrics --model model.gguf --compress full kivi4 --json records/metrics.json
  concertina report records --html report.html
  concertina report records/device.json records/metrics.json --json -")]
pub(super) struct ReportArgs {
    /// Records, or folders whose files ending in .json are records
    #[arg(value_name = "FILE|FOLDER", required = true)]
    records: Vec<PathBuf>,

    /// Write the same as a page of one file
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

/// Larger files are no records.
const BYTES_MAX: u64 = 256 << 20;

/// Compares.
pub(super) fn run(args: &ReportArgs, global: &Global) -> Result<ExitCode> {
    let output = Output::open(global.json.as_deref())?;
    let page = args.html.as_deref().map(|path| OutputFile::open("the page", path)).transpose()?;
    let mut refused = Vec::new();
    let mut read = Vec::new();
    for path in files(&args.records)? {
        match record(&path) {
            Ok(record) => read.push(record),
            Err(reason) => {
                let file = path.display().to_string();
                eprintln!("'{file}' is left out: {reason}");
                refused.push(Refused { file, reason });
            }
        }
    }
    if read.is_empty() {
        let n = refused.len();
        return Err(anyhow!("none of {n} files is a record; commands write one with --json FILE"));
    }
    let report = records::join(&read, refused);
    output.text(&report)?;
    if let Some(page) = page {
        page.write(report.page().as_bytes())?;
    }
    output.json(&report)?;
    Ok(ExitCode::SUCCESS)
}

/// Reads one record.
pub(super) fn record(path: &Path) -> Result<Record, String> {
    let unreadable = |e: std::io::Error| format!("it can not be read: {e}");
    let length = fs::metadata(path).map_err(unreadable)?.len();
    if length > BYTES_MAX {
        return Err(format!("it has {length} bytes; a record has at most {BYTES_MAX}"));
    }
    records::parse(&path.display().to_string(), &fs::read(path).map_err(unreadable)?)
}

/// The files that are named, and those of folders, by their names.
fn files(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in paths {
        if !path.is_dir() {
            files.push(path.clone());
            continue;
        }
        let unreadable = |e: std::io::Error| anyhow!("can not read the folder '{}': {e}", path.display());
        let entries = fs::read_dir(path).map_err(unreadable)?.collect::<Result<Vec<_>, _>>().map_err(unreadable)?;
        let mut found: Vec<PathBuf> = entries.iter().map(fs::DirEntry::path).collect();
        found.retain(|file| file.is_file() && file.extension().is_some_and(|e| e == "json"));
        if found.is_empty() {
            return Err(usage(format!("the folder '{}' holds no file that ends in .json", path.display())));
        }
        found.sort();
        files.extend(found);
    }
    Ok(files)
}
