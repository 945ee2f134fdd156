//! `concertina simulate` as a user meets it: what it prints, that it repeats itself, and what it refuses.
#![cfg(feature = "model")]

use std::fs;
use std::process::{Command, Output};

use concertina::model::reference_model_path;
use serde_json::Value;

fn concertina(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_concertina")).args(args).output().expect("the program should start")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

/// A few sessions that come faster than they are served.
const FEW: [&str; 11] = [
    "simulate",
    "--model",
    "yi-34b",
    "--gpu",
    "h100",
    "--sessions",
    "12",
    "--context",
    "uniform:4k..40k",
    "--answer",
    "fixed:60",
];

/// Those arguments, and more of them; what is named again is replaced.
fn with(more: &[&str]) -> Vec<String> {
    let (name, usual) = FEW.split_first().expect("the command");
    let kept = usual.chunks(2).filter(|pair| !more.contains(&pair[0])).flatten();
    std::iter::once(name).chain(kept).chain(more).map(|arg| (*arg).to_owned()).collect()
}

fn report(args: &[String]) -> Value {
    let args: Vec<&str> = args.iter().map(String::as_str).chain(["--json", "-"]).collect();
    let output = concertina(&args);
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("--json writes JSON")
}

fn refused(more: &[&str], says: &[&str]) {
    let args = with(more);
    let output = concertina(&args.iter().map(String::as_str).collect::<Vec<_>>());
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{more:?} is wrong usage: {message}");
    assert!(message.starts_with("error: ") && message.lines().count() == 1, "one sentence: {message}");
    for part in says {
        assert!(message.contains(part), "'{part}' should be in: {message}");
    }
}

#[test]
fn compressions_stand_side_by_side_over_the_same_sessions() {
    let report = report(&with(&["--compress", "full", "kivi4", "token=keydiff:0.5", "--host-budget", "100GB"]));
    let results = report["results"].as_array().expect("one for each compression");
    assert_eq!(results.len(), 3, "in the order given");
    assert_eq!(report["gpu"]["name"], "h100", "the GPU, with the source of its numbers");
    assert!(report["gpu"]["source"].as_str().is_some_and(|source| source.contains("datasheet")), "{}", report["gpu"]);
    let mut hashes = Vec::new();
    for row in results {
        let metrics = &row["metrics"];
        let finished = metrics["service"]["sessions_finished"].as_u64().expect("a count");
        let refused: u64 =
            row["refused"].as_array().expect("a list").iter().filter_map(|r| r["sessions"].as_u64()).sum();
        assert_eq!(finished + refused, 12, "{row}");
        for value in [
            &metrics["service"]["first_token_s"]["p99"],
            &metrics["service"]["per_token_ms"]["p50"],
            &metrics["service"]["sessions_per_hour"],
            &row["usage"]["spent"]["matmul_s"],
            &row["predicted"]["prefill_s"],
        ] {
            assert!(value.as_f64().is_some_and(|value| value > 0.0), "{value} in {row}");
        }
        let part = row["usage"]["pages_part"].as_f64().expect("a part");
        assert!(part > 0.0 && part < 1.0, "{part} of the pages are in use");
        let (weights, pool) = (&report["settings"]["weights_bytes"], &row["pool"]["budget_bytes"]);
        let (weights, pool) = (weights.as_u64().expect("bytes"), pool.as_u64().expect("bytes"));
        // The share of 480 lists is rounded down; the window's entries are beside it.
        assert!((weights + pool).abs_diff(80_000_000_000) < 480 * 200, "{weights} and {pool} are the memory");
        assert_eq!(row["pool"]["pages_in_use_bytes"], 0, "every page is back");
        hashes.push(row["trace_hash"].as_str().expect("a hash").to_owned());
    }
    assert!(results[1]["predicted"]["fit"].as_u64() > results[0]["predicted"]["fit"].as_u64(), "kivi4 holds more");
    let moved = |row: &Value| row["metrics"]["context_switch"]["swapped_in"].as_u64().expect("a count");
    assert!(results.iter().map(moved).sum::<u64>() > 0, "some were swapped");
    hashes.dedup();
    assert_eq!(hashes.len(), 3, "three traces");
}

#[test]
fn the_command_line_that_it_prints_repeats_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let svg = folder.path().join("plot.svg");
    let more = ["--compress", "kivi4", "--ladder", "kivi2", "--seed", "5", "--svg", svg.to_str().expect("UTF-8")];
    let args = with(&more);
    let output = concertina(&args.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let shown = text(&output.stdout);
    for part in ["concurrency", "prefill", "decode", "context switch", "sessions per hour", "trace hash", "Yi-34B-200K"]
    {
        assert!(shown.contains(part), "'{part}' in:\n{shown}");
    }
    assert!(fs::read_to_string(&svg).expect("a plot").contains("kivi4"), "the plot names the compression");
    let again = shown.lines().find_map(|line| line.trim().strip_prefix("again")).expect("a command line");
    let again: Vec<String> = again.split_whitespace().skip(1).map(ToOwned::to_owned).collect();
    let repeated = report(&again);
    let hash = repeated["results"][0]["trace_hash"].as_str().expect("a hash");
    assert!(shown.contains(hash), "{hash} in:\n{shown}");
    let longer: Vec<String> = again.iter().map(|arg| arg.replace("exp:30", "exp:31")).collect();
    assert_ne!(longer, again, "it names the time to think");
    let another = report(&longer);
    assert_ne!(another["results"][0]["trace_hash"], hash, "another time to think, another trace");
}

#[test]
fn sessions_that_can_never_run_are_counted_with_the_reason() {
    let report = report(&with(&["--context", "uniform:30k..1000M", "--sessions", "200"]));
    let refused = report["results"][0]["refused"].as_array().expect("a list").clone();
    let kinds: Vec<&str> = refused.iter().filter_map(|refused| refused["kind"].as_str()).collect();
    assert!(kinds.contains(&"too long"), "hundreds of millions of tokens are beyond the context: {refused:?}");
    let all: u64 = refused.iter().filter_map(|refused| refused["sessions"].as_u64()).sum();
    let finished = report["results"][0]["metrics"]["service"]["sessions_finished"].as_u64().expect("a count");
    assert_eq!(all + finished, 200, "each is accounted for");
    let told = refused[0]["first"].as_str().expect("a sentence");
    assert!(told.contains("the context is 200000 tokens"), "{told}");
    let fixed = with(&["--context", "fixed:60k"]);
    let output = concertina(&fixed.iter().map(String::as_str).collect::<Vec<_>>());
    let shown = text(&output.stdout);
    assert!(output.status.success() && shown.contains("12 sessions refused (never fits)"), "{shown}");
    assert!(shown.contains("beside weights of 64.05 GiB"), "{shown}");
}

#[test]
fn a_file_is_a_model_too() {
    let path = reference_model_path();
    let path = path.to_str().expect("UTF-8");
    let few = ["simulate", "--sessions", "4", "--context", "fixed:2k", "--rounds", "1", "--gpu", "l4"];
    let args = |model: &str| few.iter().chain(&["--model", model]).map(|arg| (*arg).to_owned()).collect::<Vec<_>>();
    let (file, preset) = (report(&args(path)), report(&args("smollm2-135m")));
    assert_eq!(file["settings"]["weights_bytes"], preset["settings"]["weights_bytes"], "the same shape");
    assert_eq!(file["results"][0]["trace_hash"], preset["results"][0]["trace_hash"], "the same model");
}

#[test]
fn what_can_not_be_simulated_is_wrong_usage_with_the_reason() {
    refused(&["--gpu", "h300"], &["no GPU 'h300'", "a100, h100, h200, l4, rtx4090"]);
    refused(&["--model", "gpt-5"], &["no model 'gpt-5'", "yi-34b", "GGUF"]);
    refused(&["--context", "normal:5"], &["'normal:5' is no distribution", "lognormal:MEDIAN"]);
    refused(&["--arrival", "poisson:2"], &["poisson:RATE"]);
    refused(&["--achieved-flops", "1.5"], &["above 0 and at most 1"]);
    refused(&["--compress", "head=duo:0.5"], &["some heads keep less", "one list for all"]);
    refused(&["--compress", "full", "pyramidkv:512"], &["share a budget"]);
    refused(&["--memory", "40GB"], &["weights take", "37.25 GiB"]);
    refused(&["--memory", "68.9GB"], &["too small"]);
    refused(&["--sessions", "2000000"], &["from 1 to 1000000"]);
    refused(&["--rounds", "0"], &["from 1 to 1000"]);
    refused(&["--chunk", "32"], &["no row for each of 64"]);
    refused(&["--host-budget", "10GB", "--swap-chunk", "1MiB"], &["page of each of 480 lists", "--swap-chunk"]);
    refused(&["--ladder", "snapkv:0.5"], &["not known any more"]);
}
