//! The demo: questions about this repository's own files, answered by the reference model.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;

use crate::process::{binary, cargo, command, line, run as run_command, status, target};
use crate::{driver, model};

/// Options that further arguments may replace. Each document is cut to 800 tokens, whose caches take 21.1 MiB with two questions
/// and answers, so that only two of them fit in the budget at once; the others are in host memory meanwhile.
const DEFAULTS: &[(&str, &str)] = &[
    ("--then", "Say that again in one short sentence."),
    ("--kv-budget", "56MiB"),
    ("--host-budget", "256MiB"),
    ("--max-new", "40"),
    ("--context", "2048"),
    ("--document-tokens", "800"),
];

/// Files of this repository, and a question about each.
const DOCUMENTS: &[(&str, &str)] = &[
    ("tests/golden/README.md", "Which model is used here, and where does it come from?"),
    ("tests/golden/essay.txt", "Which libraries and machines does this text mention?"),
    ("LICENSE-APACHE", "What does this license grant to you?"),
    ("src/reference/compare.rs", "What does this file measure?"),
];

/// The arguments of `concertina run`.
fn demo_arguments(model: &Path, report: &Path, extra: &[OsString]) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = vec!["run".into(), "--model".into(), model.into()];
    for (option, value) in DEFAULTS.iter().filter(|(option, _)| !names(extra, option)) {
        arguments.extend([option, value].map(OsString::from));
    }
    for (path, question) in DOCUMENTS {
        arguments.extend(["--document", path, "--ask", question].map(OsString::from));
    }
    arguments.extend(["--json".into(), report.into()]);
    arguments.extend_from_slice(extra);
    arguments
}

/// Whether `extra` sets an option, as `--option value` or `--option=value`.
fn names(extra: &[OsString], option: &str) -> bool {
    let rests = extra.iter().filter_map(|argument| argument.to_str()?.strip_prefix(option));
    rests.into_iter().any(|rest| rest.is_empty() || rest.starts_with('='))
}

/// Builds the program, prepares driver and model, and runs the demo; the program's own exit code.
pub(crate) fn run(extra: &[OsString]) -> Result<ExitCode> {
    println!("building the program");
    run_command(&mut cargo(["build", "--release", "--bin", "concertina"]))?;
    let binary = binary("release")?;
    driver::ensure(&binary)?;
    let model = model::ensure()?;
    let report = target()?.join("demo.json");
    let mut demo = command(&binary);
    demo.args(demo_arguments(&model, &report, extra));
    println!("{}", line(&demo));
    let start = Instant::now();
    let ended = status(&mut demo)?;
    println!("demo: {:.1} s in all, report in {}", start.elapsed().as_secs_f64(), report.display());
    // A program that a signal ended has no code of its own.
    let code = ended.code().map_or(1, |code| u8::try_from(code).unwrap_or(1));
    Ok(ExitCode::from(code))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::root;

    #[test]
    fn every_document_exists_and_is_asked_about() {
        assert!(DOCUMENTS.len() >= 4, "the demo runs several sessions at once");
        for (path, question) in DOCUMENTS {
            assert!(root().join(path).is_file(), "{path} should be a file of this repository");
            assert!(question.ends_with('?'), "{question} should be a question");
        }
    }

    #[test]
    fn further_arguments_replace_the_defaults() {
        let line = |extra: &[&str]| {
            let extra: Vec<_> = extra.iter().map(OsString::from).collect();
            let arguments = demo_arguments(Path::new("m"), Path::new("r"), &extra);
            arguments.iter().map(|a| a.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
        };
        let plain = line(&[]);
        assert!(plain.contains("--max-new 40") && plain.contains("--kv-budget 56MiB"), "{plain}");
        assert_eq!(plain.matches("--ask").count(), DOCUMENTS.len(), "one question per document: {plain}");
        for extra in [&["--max-new", "3"][..], &["--max-new=3"]] {
            let replaced = line(extra);
            assert_eq!(replaced.matches("--max-new").count(), 1, "{replaced}");
            assert!(replaced.ends_with(&extra.join(" ")) && replaced.contains("--kv-budget 56MiB"), "{replaced}");
        }
        assert!(line(&["--max-new-pages", "3"]).contains("--max-new 40"), "another option replaces nothing");
    }
}
