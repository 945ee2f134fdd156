//! The gate: all stages that have to pass, in order, each with its time; the first that fails ends it.
//!
//! The tests come last, so that the output ends with cargo's own result lines and one line of summary.

use std::env;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::process::{binary, cargo, line, root, run as run_command};
use crate::{driver, model};

/// Runs every stage.
pub(crate) fn run() -> Result<()> {
    let without_gpu = env::var("CONCERTINA_NO_GPU").is_ok_and(|value| value == "1");
    let start = Instant::now();
    let adapter = if without_gpu {
        println!("== driver: not looked for, because CONCERTINA_NO_GPU is 1");
        None
    } else {
        stage("build", || run_command(&mut cargo(["build", "--bin", "concertina"])))?;
        Some(stage("driver", || driver::ensure(&binary("debug")?))?)
    };
    stage("model", || model::ensure().map(|path| println!("{}", path.display())))?;
    stage("format", || run_command(&mut cargo(["fmt", "--all", "--check"])))?;
    stage("lints", || run_command(&mut cargo(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"])))?;
    stage("documentation", || {
        let mut doc = cargo(["doc", "--no-deps", "--document-private-items", "--workspace"]);
        run_command(doc.env("RUSTDOCFLAGS", "-D warnings"))
    })?;
    stage("examples", || examples(without_gpu))?;
    stage("benches", || benches(without_gpu))?;
    let left_out: &[&str] = if without_gpu { &["--features", "concertina/no-gpu-tests"] } else { &[] };
    let output = stage("tests", || streamed(cargo(["test", "--workspace"]).args(left_out)))?;
    let summary = summary(&output, adapter.as_deref())?;
    println!("gate: all stages passed in {:.0} s", start.elapsed().as_secs_f64());
    println!("{summary}");
    Ok(())
}

/// Runs one stage and says how long it took.
fn stage<T>(name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    println!("== {name}");
    let start = Instant::now();
    let result = work();
    let seconds = start.elapsed().as_secs_f64();
    let outcome = if result.is_ok() { "ok" } else { "FAILED" };
    println!("== {name}: {outcome} in {seconds:.1} s");
    result.with_context(|| format!("stage `{name}` failed"))
}

/// Runs every example; without an adapter they are only built.
fn examples(without_gpu: bool) -> Result<()> {
    if without_gpu {
        println!("examples are built and not run, because CONCERTINA_NO_GPU is 1");
        return run_command(&mut cargo(["build", "--examples"]));
    }
    for name in targets(&root().join("examples"))? {
        println!("-- example {name}");
        run_command(&mut cargo(["run", "--quiet", "--example", &name]))?;
    }
    Ok(())
}

/// The bench that needs an adapter.
const ON_ADAPTER: &str = "kernels";

/// Runs every bench in test mode. They are named one by one: `--benches` would run the unit tests once more.
fn benches(without_gpu: bool) -> Result<()> {
    let mut names = targets(&root().join("benches"))?;
    if without_gpu {
        println!("bench {ON_ADAPTER} is built and not run, because CONCERTINA_NO_GPU is 1");
        run_command(&mut cargo(["test", "--no-run", "--bench", ON_ADAPTER]))?;
        names.retain(|name| name != ON_ADAPTER);
    }
    if names.is_empty() {
        return Ok(());
    }
    let arguments = names.iter().flat_map(|name| ["--bench", name]);
    run_command(&mut cargo(std::iter::once("test").chain(arguments)))
}

/// Names of the cargo targets in a folder, sorted: `NAME.rs` and `NAME/main.rs`.
fn targets(folder: &Path) -> Result<Vec<String>> {
    let Ok(entries) = fs::read_dir(folder) else { return Ok(Vec::new()) };
    let mut names = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "rs") || path.join("main.rs").is_file() {
            names.extend(path.file_stem().map(|stem| stem.to_string_lossy().into_owned()));
        }
    }
    names.sort();
    Ok(names)
}

/// Runs to the end, shows the standard output line by line, and returns it.
fn streamed(command: &mut Command) -> Result<String> {
    let started = command.stdout(Stdio::piped()).spawn();
    let mut child = started.with_context(|| format!("`{}` could not be started", line(command)))?;
    let mut output = String::new();
    let mut reader = BufReader::new(child.stdout.take().context("the output should be piped")?);
    let mut bytes = Vec::new();
    while reader.read_until(b'\n', &mut bytes)? > 0 {
        let text = String::from_utf8_lossy(&bytes);
        print!("{text}");
        output.push_str(&text);
        bytes.clear();
    }
    let status = child.wait()?;
    ensure!(status.success(), "`{}` ended with {status}", line(command));
    Ok(output)
}

/// Tests whose names end in `_gpu` and whose line says `verdict`.
fn gpu_tests(output: &str, verdict: &str) -> usize {
    let tests = output.lines().filter_map(|line| line.strip_prefix("test ")?.split_once(" ... "));
    tests.filter(|(name, found)| name.ends_with("_gpu") && found.starts_with(verdict)).count()
}

/// The last line: how many tests ran on which adapter. None at all is an error, unless no adapter was wanted.
fn summary(output: &str, adapter: Option<&str>) -> Result<String> {
    let ran = gpu_tests(output, "ok");
    let Some(adapter) = adapter else {
        let ignored = gpu_tests(output, "ignored");
        return Ok(format!(
            "no GPU adapter was used, because CONCERTINA_NO_GPU is 1: {ignored} GPU tests were ignored"
        ));
    };
    if ran == 0 {
        bail!("no test ran on the GPU adapter {adapter}; set CONCERTINA_NO_GPU=1 to do without on purpose");
    }
    Ok(format!("{ran} tests ran on the GPU adapter {adapter}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "\
running 4 tests
test decode::one_page_gpu ... ok
test decode::one_page_cpu ... ok
test prefill_gpu ... ok
test merge_gpu ... ignored
test result: ok. 3 passed; 0 failed; 1 ignored
";

    #[test]
    fn tests_on_the_gpu_are_counted_by_name() {
        assert_eq!(gpu_tests(OUTPUT, "ok"), 2, "two passed");
        assert_eq!(gpu_tests(OUTPUT, "ignored"), 1, "one was ignored");
        let line = summary(OUTPUT, Some("llvmpipe")).expect("two ran");
        assert_eq!(line, "2 tests ran on the GPU adapter llvmpipe");
        let line = summary(OUTPUT, None).expect("none is wanted");
        assert!(line.contains("1 GPU tests were ignored"), "{line}");
    }

    #[test]
    fn a_gate_that_never_touched_the_gpu_fails() {
        let output = "test one_cpu ... ok\ntest gpu_in_front ... ok\ntest two_gpu ... ignored\n";
        assert!(summary(output, Some("llvmpipe")).is_err(), "no test ran on the adapter");
        assert!(summary(output, None).is_ok(), "on purpose it is no error");
    }

    #[test]
    fn the_output_of_a_command_is_kept_and_a_failure_is_one() {
        let output = streamed(&mut cargo(["--version"])).expect("cargo runs this test");
        assert!(output.starts_with("cargo "), "{output}");
        let error = streamed(&mut cargo(["no-such-command"])).expect_err("an unknown command should fail");
        assert!(error.to_string().contains("no-such-command"), "{error:#}");
    }

    #[test]
    fn a_failing_stage_is_named() {
        let error = stage("lints", || -> Result<()> { bail!("three warnings") }).expect_err("the stage fails");
        assert_eq!(format!("{error:#}"), "stage `lints` failed: three warnings");
        assert_eq!(stage("lints", || Ok(3)).expect("the stage passes"), 3, "its value comes back");
    }
}
