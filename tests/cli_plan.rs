//! `concertina plan` as a user meets it: what it prints, what it draws, and what it refuses.
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

const EXAMPLE: [&str; 7] = ["plan", "--model", "yi-34b", "--gpu", "a100-80g:2", "--context", "50k"];

fn printed(more: &[&str]) -> String {
    let output = concertina(&[&EXAMPLE[..], more].concat());
    assert!(output.status.success(), "{more:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

fn report(args: &[&str]) -> Value {
    let output = concertina(&[args, &["--json", "-"]].concat());
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("--json writes JSON")
}

fn refused(args: &[&str], says: &[&str]) {
    let output = concertina(args);
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{args:?} is wrong usage: {message}");
    for part in says {
        assert!(message.contains(part), "{args:?}: '{part}' should be in: {message}");
    }
}

#[test]
fn the_running_example_fits_one_screen() {
    let text = printed(&[]);
    assert!(text.lines().count() <= 48, "{} lines:\n{text}", text.lines().count());
    let table = || text.lines().take_while(|line| !line.starts_with("Memory:"));
    assert!(table().skip(5).all(|line| line.chars().count() <= 120), "as wide as a screen:\n{text}");
    for part in ["11.44 GiB", "3.58 GiB", "915.53 MiB", "sessions that fit", "bandwidth (caches)", "FLOP/s (products)"]
    {
        assert!(text.contains(part), "'{part}' should be in:\n{text}");
    }
    for word in ["Memory: ", "Prefill: ", "Decode: ", "Switch: ", "Sessions per hour: "] {
        assert!(text.lines().any(|line| line.starts_with(word)), "'{word}' should begin a line:\n{text}");
    }
}

#[test]
fn figures_of_the_report_are_those_of_the_theory() {
    let report = report(&[&EXAMPLE[..], &["--peak", "--compress", "full", "kivi4", "--price", "2"]].concat());
    let (full, kivi) = (&report["results"][0], &report["results"][1]);
    assert_eq!(full["challenges"]["cache"]["held_bytes"], 12_288_000_000_u64, "50,000 tokens of 240 KiB");
    assert_eq!(full["challenges"]["concurrency"], 7, "in 160 GB less 68.8 GB");
    assert_eq!(kivi["times_smaller"], 3.2, "5 bits of 16");
    assert_eq!(
        kivi["challenges"]["prefill"]["seconds"], full["challenges"]["prefill"]["seconds"],
        "prompts are as long"
    );
    let rate = full["throughput"]["resident_rate"]["sessions_per_hour"].as_f64().expect("a rate");
    let price = full["price_per_session"].as_f64().expect("a price");
    assert!((price * rate - 4.0).abs() < 1e-9, "two GPUs for an hour: {price} for {rate}");
    let four = self::report(&["plan", "--model", "yi-34b", "--gpu", "a100-80g:4", "--peak", "--compress", "full"]);
    let prefill = |report: &Value| report["results"][0]["challenges"]["prefill"]["seconds"].as_f64().expect("seconds");
    let faster = prefill(&report) / prefill(&four);
    assert!((1.8..2.0).contains(&faster), "twice as many GPUs, less their sums: {faster}");
}

#[test]
fn a_model_file_is_a_model() {
    let path = reference_model_path();
    let path = path.to_str().expect("UTF-8");
    let with = |model: &str| report(&["plan", "--model", model, "--gpu", "l4", "--context", "4k"])["results"].clone();
    assert_eq!(with(path), with("smollm2-135m"), "the preset is the model");
}

#[test]
fn sweeps_draw_and_the_page_needs_nothing_else() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).to_str().expect("UTF-8").to_owned();
    let (html, svg) = (path("plan.html"), path("plan.svg"));
    let sweeps = ["--sweep", "context=4k..10M", "--sweep", "compress=measured", "--find", "cost(1M) <= cost(4k)"];
    printed(&[&sweeps[..], &["--html", &html, "--svg", &svg]].concat());
    let page = fs::read_to_string(&html).expect("the page");
    for part in ["sessions that fit", "<polyline", "<circle", "Find: cost(1M) &lt;= cost(4k)", "prefers-color-scheme"] {
        assert!(page.contains(part), "'{part}' should be in the page");
    }
    for part in ["<script", "src=", "href=", "@import", "url("] {
        assert!(!page.contains(part), "'{part}' would load something");
    }
    let svg = fs::read_to_string(&svg).expect("the plot");
    // Four panels of three compressions; prefill does not depend on them, and is drawn for each.
    assert_eq!(svg.matches("<polyline").count(), 12, "lines");
    let report = report(&[&EXAMPLE[..], &["--sweep", "context=4k..10M", "--compress", "full"]].concat());
    let contexts: Vec<u64> =
        report["contexts"].as_array().expect("rows").iter().filter_map(|row| row["context_tokens"].as_u64()).collect();
    assert_eq!((contexts.first(), contexts.last(), contexts.len()), (Some(&4_000), Some(&10_000_000), 25), "ends");
    assert!(contexts.windows(2).all(|w| w[0] < w[1]), "rising: {contexts:?}");
}

#[test]
fn the_closing_question_is_answered_honestly() {
    let h100 = ["plan", "--model", "yi-34b", "--gpu", "h100", "--find", "cost(1M) <= cost(4k)"];
    let report = report(&h100);
    let search = &report["search"];
    let ratio = search["full"].as_f64().expect("bytes") / search["limit"].as_f64().expect("bytes");
    assert!((ratio - 250.0).abs() < 1e-9, "{ratio} times");
    let found = search["found"].as_array().expect("stacks");
    assert!(
        found.len() > 5 && found.iter().all(|stack| stack["times_smaller"].as_f64() >= Some(250.0)),
        "all reach it"
    );
    assert!(found.iter().all(|stack| stack["quality"].is_null()), "none was measured as a whole");
    let text = text(&concertina(&h100).stdout);
    assert!(
        text.contains("none of them") && text.contains("unknown") && text.contains("The smallest that is known to"),
        "{text}"
    );
}

/// What `eval kl` writes, as far as it counts here.
const KL: &str = r#"{"program": {"name": "concertina"}, "device": {"adapter": {"name": "some", "backend": "vulkan"}},
 "model": {"name": "some", "geometry": {"num_layers": 2, "hidden_size": 16, "intermediate_size": 24, "heads": {"num_qo_heads": 2,
 "num_kv_heads": 1, "head_dim": 8}, "vocab_size": 10, "context_length": 100, "rope_theta": 1e4, "rms_norm_eps": 1e-5}},
 "settings": {"prefix_tokens": 64}, "results": [
 {"compression": "layer=full,head=full,token=full,hidden=f16", "mean_kl": 0.0, "nll": 2.0},
 {"compression": "layer=full,head=full,token=snapkv:0.25,hidden=kivi4", "mean_kl": 0.25, "nll": 2.5}]}"#;

#[test]
fn quality_of_records_is_known_from_then_on() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("kl.json");
    fs::write(&path, KL).expect("written");
    let path = path.to_str().expect("UTF-8");
    let of = |more: &[&str]| report(&[&EXAMPLE[..], more].concat())["results"][2]["quality"].clone();
    assert!(of(&[]).is_null(), "nobody measured the third of the usual ones");
    let known = of(&["--quality", path]);
    assert_eq!((known["mean_kl"].as_f64(), known["nll_difference"].as_f64()), (Some(0.25), Some(0.5)), "{known}");
    fs::write(folder.path().join("bad.json"), &KL[..100]).expect("written");
    let output =
        concertina(&[&EXAMPLE[..], &["--quality", folder.path().join("bad.json").to_str().expect("UTF-8")]].concat());
    let message = text(&output.stderr);
    assert!(!output.status.success() && message.contains("bad.json': it is no whole JSON"), "{message}");
}

#[test]
fn nonsense_is_refused_with_the_numbers() {
    let plan = |more: &[&'static str]| [&["plan", "--model", "yi-34b"], more].concat();
    refused(&plan(&["--gpu", "a10O"]), &["there is no GPU 'a10O'", "did you mean a100"]);
    refused(&["plan", "--model", "yi-35b"], &["there is no model 'yi-35b'", "yi-34b"]);
    refused(&plan(&["--context", "0"]), &["'0' is no number of tokens"]);
    refused(
        &plan(&["--gpu", "l4"]),
        &["the weights of Yi-34B-200K take 64.05 GiB of 22.35 GiB", "--gpu l4:3", "--weights"],
    );
    refused(&plan(&["--gpu", "h100:0"]), &["1 to 1024"]);
    refused(&plan(&["--achieved-bandwidth", "-1"]), &["above 0 and at most 1"]);
    refused(&plan(&["--sweep", "context=10k..4k"]), &["ends at 4000, before it begins at 10000"]);
    refused(&plan(&["--sweep", "gpus=1..4"]), &["context=4k..10M"]);
    refused(&plan(&["--find", "cost(1M) < 3"]), &["write one such as"]);
    refused(&plan(&["--svg", "plan.svg"]), &["give --sweep"]);
    refused(&plan(&["--context", "40", "--compress", "token=snapkv:0.25"]), &["always stay"]);
    refused(&plan(&["--compress", "layer=share:0,0"]), &["names 2 layers, the model has 60"]);
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("mine.toml");
    let gpu = "[[gpu]]\nname = \"mine\"\ngpu = \"Mine\"\nmemory_bytes = 80_000_000_000\nflops_per_s = 1e12\n\
               memory_bytes_per_s = -1e12\nlink_bytes_per_s = 1e9\nsource = \"a negative bandwidth\"\n";
    fs::write(&path, gpu).expect("written");
    let path = path.to_str().expect("UTF-8");
    refused(&["plan", "--model", "yi-34b", "--gpu", "mine", "--presets", path], &["mine.toml", "-1000000000000"]);
}
