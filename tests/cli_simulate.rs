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
fn gpus_that_share_each_layer_are_one_machine() {
    let (one, two) = (report(&with(&[])), report(&with(&["--gpu", "h100:2"])));
    let (settings, row) = (&two["settings"], |report: &Value| report["results"][0].clone());
    assert_eq!(
        (settings["gpus"].as_u64(), settings["memory_bytes"].as_u64()),
        (Some(2), Some(160_000_000_000)),
        "both"
    );
    let prefill = |report: &Value| row(report)["predicted"]["prefill_s"].as_f64().expect("a time");
    let part = prefill(&two) / prefill(&one);
    // Sums between them are not free.
    assert!(part > 0.5 && part < 0.7, "two read the same in {part} of the time");
    assert!(row(&two)["predicted"]["fit"].as_u64() > row(&one)["predicted"]["fit"].as_u64(), "and hold more");
    let args = with(&["--gpu", "h100:2", "--memory", "75GB", "--peak"]);
    let output = concertina(&args.iter().map(String::as_str).collect::<Vec<_>>());
    let shown = text(&output.stdout);
    assert!(shown.contains("2 x NVIDIA H100 SXM, 139.70 GiB"), "{shown}");
    let again = shown.lines().find_map(|line| line.trim().strip_prefix("again")).expect("a command line");
    assert!(again.contains("--gpu h100:2 --memory 75000000000") && again.contains("--achieved-flops 1 "), "{again}");
    let again: Vec<String> = again.split_whitespace().skip(1).map(ToOwned::to_owned).collect();
    let hash = report(&again)["results"][0]["trace_hash"].as_str().expect("a hash").to_owned();
    assert!(shown.contains(&hash), "{hash} in:\n{shown}");
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
    refused(&["--gpu", "h10"], &["no GPU 'h10'; did you mean h100?", "a100-80g, a100, h100, h200"]);
    refused(&["--model", "gpt-5"], &["no model 'gpt-5'", "yi-34b", "GGUF"]);
    refused(&["--model", "deepseek-v2"], &["latent of 576 numbers for 128 heads"]);
    refused(&["--model", "gemma-3-27b"], &["52 layers", "keep 1024 tokens", "10 keep all"]);
    refused(&["--gpu", "m4-max", "--host-budget", "10GB"], &["memory of m4-max is the host's", "--host-budget"]);
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

/// A card as fast as the one of the presets, with a name of its own.
const CARD: &str = "[[gpu]]\nname = \"card\"\ngpu = \"A card\"\nmemory_bytes = 80_000_000_000\nflops_per_s = 989e12\n\
                    memory_bytes_per_s = 3.35e12\nlink_bytes_per_s = 63e9\nsource = \"made up\"\n";

#[test]
fn a_users_presets_are_simulated_as_the_others_and_named_when_they_replace_one() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs::write(&path, text).expect("written");
        path.to_str().expect("UTF-8").to_owned()
    };
    let card = file("card.toml", CARD);
    let (own, usual) = (report(&with(&["--gpu", "card", "--presets", &card])), report(&with(&[])));
    assert_eq!(own["gpu"]["source"], "made up", "the user's GPU");
    assert_eq!(own["results"][0]["trace_hash"], usual["results"][0]["trace_hash"], "the same numbers, the same trace");
    let slower = file("slow.toml", &CARD.replace("\"card\"", "\"h100\"").replace("989e12", "500e12"));
    let args = with(&["--presets", &card, "--presets", &slower]);
    let output = concertina(&args.iter().map(String::as_str).collect::<Vec<_>>());
    let (shown, told) = (text(&output.stdout), text(&output.stderr));
    assert!(told.contains("slow.toml: its GPU 'h100' takes the place of another"), "{told}");
    let again = shown.lines().find_map(|line| line.trim().strip_prefix("again")).expect("a command line");
    assert!(again.contains("card.toml --presets"), "both files: {again}");
    let hash = usual["results"][0]["trace_hash"].as_str().expect("a hash");
    assert!(!shown.contains(hash), "a slower GPU, another trace");
    let wrong = file("wrong.toml", &CARD.replace("3.35e12", "-3.35e12"));
    refused(&["--presets", &wrong], &["wrong.toml, line 6, memory_bytes_per_s", "-3350000000000", "above 0"]);
}

#[test]
fn experts_are_simulated_and_unified_memory_needs_no_link() {
    let args = with(&["--model", "mixtral-8x7b", "--gpu", "m2-ultra", "--context", "fixed:2k", "--sessions", "3"]);
    let report = report(&args);
    let row = &report["results"][0];
    assert_eq!(row["predicted"]["switch_s"], 0.0, "nothing crosses a link");
    assert!(report["gpu"]["link_bytes_per_s"].is_null(), "{}", report["gpu"]);
    // 93.4 GB of weights, of which a token reads 25.5 GB at 600 GB/s and most of its step is that.
    let token_ms = row["predicted"]["token_ms"].as_f64().expect("a time");
    assert!(token_ms > 40.0 && token_ms < 45.0, "{token_ms} ms of a token that reads two of eight experts");
}

#[test]
fn presets_are_listed_with_their_sources() {
    let output = concertina(&["presets"]);
    let shown = text(&output.stdout);
    assert!(output.status.success(), "{}", text(&output.stderr));
    for part in ["deepseek-v2", "latents of 576 numbers", "a100-80g (a100)", "sources", "datasheet"] {
        assert!(shown.contains(part), "'{part}' in:\n{shown}");
    }
    let report = report(&["presets".to_owned()]);
    let first = &report["models"][0];
    assert_eq!(
        (first["name"].as_str(), first["kv_per_token_bytes"].as_u64()),
        (Some("yi-34b"), Some(245_760)),
        "{first}"
    );
    let gpus = report["gpus"].as_array().expect("GPUs");
    assert!(gpus.iter().all(|gpu| gpu["critical_intensity"].as_f64().is_some_and(|it| it > 1.0)), "each has one");
}
