//! The bench of a GPU: one program that measures everything, here or carried elsewhere.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};

use crate::process::{binary, cargo, command, line, root, run as run_command, status};

/// Where records live.
const RECORDS: &str = "benches/record";

/// Builds the program so that it knows its commit, and runs it, or says how to.
pub(crate) fn run(binary_only: bool, record: Option<PathBuf>) -> Result<ExitCode> {
    let commit = commit()?;
    println!("building the program from {commit}");
    run_command(cargo(["build", "--release", "--bin", "concertina"]).env("CONCERTINA_COMMIT", &commit))?;
    let program = binary("release")?;
    if binary_only {
        println!("program: {}", program.display());
        println!("elsewhere: ./{}", line(&bench(Path::new("./concertina"), Path::new("record"))));
        return Ok(ExitCode::SUCCESS);
    }
    let mut bench = bench(&program, &record.unwrap_or_else(|| PathBuf::from(RECORDS)));
    println!("{}", line(&bench));
    let ended = status(&mut bench)?;
    let code = ended.code().map_or(1, |code| u8::try_from(code).unwrap_or(1));
    Ok(ExitCode::from(code))
}

/// The command that measures everything; elsewhere it needs nothing but the program and a Vulkan driver.
fn bench(program: &Path, record: &Path) -> Command {
    let mut bench = command(program);
    bench.args(["bench", "all", "--record"]).arg(record);
    bench
}

/// What git says of this checkout.
fn commit() -> Result<String> {
    let mut git = Command::new("git");
    git.current_dir(root()).args(["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]);
    let output = git.output().context("a record names a commit, and git could not be started")?;
    ensure!(output.status.success(), "a record names a commit, and git knows none here");
    Ok(String::from_utf8(output.stdout).context("git's answer should be text")?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_elsewhere_is_the_one_that_runs_here() {
        let shown = line(&bench(Path::new("./concertina"), Path::new("record")));
        assert_eq!(shown, "concertina bench all --record record", "one command, one folder");
        let commit = commit().expect("this is a checkout");
        assert!(commit.len() >= 7 && commit.chars().all(|c| c.is_ascii_alphanumeric() || c == '-'), "{commit}");
    }
}
