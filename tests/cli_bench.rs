//! Measuring and comparing from the command line: ceilings, the four metrics, and the report that joins them.
#![cfg(feature = "model")]

use std::fs;
use std::process::{Command, Output};

use concertina::model::reference_model_path;
use serde_json::Value;

fn concertina(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_concertina"));
    command.env("XDG_RUNTIME_DIR", std::env::temp_dir()).args(args);
    command.output().expect("the program should start")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn done(args: &[&str]) -> Output {
    let output = concertina(args);
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    output
}

fn refused(args: &[&str], code: i32, says: &[&str]) {
    let output = concertina(args);
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {message}");
    for part in says {
        assert!(message.contains(part), "'{part}' should be in: {message}");
    }
}

fn json(path: &str) -> Value {
    serde_json::from_slice(&fs::read(path).expect("it was written")).expect("JSON")
}

/// Figures of a metric, by compression: measured and ratio.
fn figures(report: &Value, metric: &str) -> Vec<(String, f64, f64)> {
    let groups = report["groups"].as_array().expect("groups").iter();
    let of = |group: &Value| {
        let figures = group["figures"].as_array().expect("figures").clone();
        let name = group["compression"].as_str().expect("a compression").to_owned();
        let found = figures.into_iter().filter(|figure| figure["metric"] == metric);
        let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
        found
            .map(move |figure| (name.clone(), number(&figure["measured"]), number(&figure["ratio"])))
            .collect::<Vec<_>>()
    };
    groups.flat_map(of).collect()
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn what_is_measured_stands_beside_what_is_predicted_gpu() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (device, metrics, page) = (path("device.json"), path("metrics.json"), path("page.html"));
    let tables = text(&done(&["bench", "device", "--quick", "--repeats", "3", "--json", &device]).stdout);
    assert!(tables.contains("read device memory") && tables.contains("figures for tests alone"), "{tables}");
    // 100 tokens end in the middle of a page: a session then holds what it commits.
    let measure =
        ["bench", "metrics", "--model", "smollm2-135m", "--layers", "2", "--context", "100", "--repeats", "1"];
    let more = ["--compress", "full", "kivi4", "--batch", "2", "--kv-budget", "96MiB", "--json", &metrics];
    let tables = text(&done(&[&measure[..], &more].concat()).stdout);
    assert!(tables.contains("2 of 30 layers with random weights ran"), "it says what was measured: {tables}");

    fs::write(path("damaged.json"), "{\"program\": {\"na").expect("written");
    fs::write(path("foreign.json"), "{\"program\": {\"name\": \"other\"}}").expect("written");
    fs::write(path("notes.txt"), "no record").expect("written");
    let report = path("report.out");
    let folder_name = folder.path().display().to_string();
    let output = done(&["report", &folder_name, "--html", &page, "--json", &report]);
    let (tables, messages) = (text(&output.stdout), text(&output.stderr));
    for part in ["damaged.json' is left out: it is no whole JSON", "foreign.json' is left out: it was written by other"]
    {
        assert!(messages.contains(part), "'{part}' should be in: {messages}");
    }
    assert!(!messages.contains("notes.txt"), "not asked for: {messages}");
    assert!(tables.contains("predicted from the ceilings measured in") && tables.contains("unknown"), "{tables}");

    // The same record is what plan says is achieved.
    let planned = path("plan.out");
    let plan = ["plan", "--model", "smollm2-135m", "--context", "4k", "--measured"];
    done(&[&plan[..], &[&device, "--gpu", "l4", "--json", &planned]].concat());
    let (planned, ceilings) = (json(&planned), json(&device));
    let rate = planned["machine"]["flops_per_s"].as_f64().expect("a rate");
    let measured = ceilings["flop_per_s"]["median"].as_f64().expect("a rate");
    assert!((rate / measured - 1.0).abs() < 1e-9, "{rate} FLOP/s planned, {measured} measured");
    let from = planned["settings"]["achieved_from"].as_str().expect("words").to_owned();
    assert!(from.contains("device.json"), "{from}");
    let other = concertina(&[&plan[..], &[&metrics]].concat());
    let message = text(&other.stderr);
    assert!(!other.status.success() && message.contains("takes one of bench device"), "{message}");

    let report = json(&report);
    assert_eq!(report["refused"].as_array().map(Vec::len), Some(2), "both are named");
    for metric in ["cache_bytes", "sessions"] {
        let found = figures(&report, metric);
        assert_eq!(found.len(), 2, "{metric} of both compressions: {found:?}");
        for (compression, measured, ratio) in found {
            assert!((ratio - 1.0).abs() < 1e-12 && measured > 0.0, "{metric} over {compression}: {measured}, {ratio}");
        }
    }
    let sessions: Vec<f64> = figures(&report, "sessions").iter().map(|(_, measured, _)| *measured).collect();
    assert!(sessions[1] > sessions[0] && sessions[0] >= 2.0, "smaller caches, more sessions: {sessions:?}");
    for metric in ["prefill_s", "decode_s", "batch_s", "switch_s"] {
        let found = figures(&report, metric);
        assert!(found.len() == 2 && found.iter().all(|f| f.1 > 0.0 && f.2 > 0.0), "{metric}: {found:?}");
    }
    let page = fs::read_to_string(page).expect("the page was written");
    assert!(page.starts_with("<!DOCTYPE html>") && page.ends_with("</html>\n"), "whole");
    assert!(!page.contains("http") && !page.contains("<script") && !page.contains("src="), "loads nothing");
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn a_model_file_is_measured_as_it_is_gpu() {
    let model = reference_model_path().display().to_string();
    let args = ["bench", "metrics", "--model", &model, "--context", "64", "--repeats", "1", "--kv-budget", "96MiB"];
    let output = done(&[&args[..], &["--compress", "token=snapkv:0.5", "--json", "-"]].concat());
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert!(report["scaled"].is_null() && report["kind"] == "bench metrics", "all of it: {report}");
    let row = &report["results"][0];
    let number = |name: &str| row[name].as_f64().unwrap_or_else(|| panic!("{name} in {row}"));
    assert!(number("peak_bytes") >= number("cache_bytes") && number("cache_bytes") > 0.0, "evicted: {row}");
    assert_eq!(number("switch_bytes"), number("cache_bytes"), "what moves is the cache");
    let [whole, compress] = ["prefill_s", "compress_s"].map(|name| row[name]["median"].as_f64().expect("a time"));
    assert!(compress > 0.0 && whole > compress, "compression is a part of prefill: {row}");
    assert!(row["batch"].is_null(), "none was asked for");
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn steps_of_a_model_are_measured_against_their_floor_gpu() {
    let model = reference_model_path().display().to_string();
    let loads = ["bench", "step", "--model", &model, "--context", "64", "--batch", "1", "2", "--steps", "2"];
    let output = done(&[&loads[..], &["--kv-budget", "96MiB", "--compress", "kivi4", "--json", "-"]].concat());
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let rows = report["rows"].as_array().expect("rows");
    let cases: Vec<&str> = rows.iter().filter_map(|row| row["case"].as_str()).collect();
    assert_eq!(cases, ["step/1x64/kivi4", "step/2x64/kivi4"], "every load");
    let number = |row: &Value, name: &str| row["measured"][name].as_f64().unwrap_or_else(|| panic!("{name} in {row}"));
    let read = report["read_bytes_per_s"].as_f64().expect("a ceiling");
    for row in rows {
        let bytes = number(row, "weight_bytes") + number(row, "cache_bytes");
        assert!((number(row, "floor_s") * read / bytes - 1.0).abs() < 1e-9, "{row}");
        let median = |name: &str| row["measured"][name]["median"].as_f64().expect("a time");
        assert!(median("host_s") + median("device_s") <= median("seconds") * 1.5, "parts of a step: {row}");
        let tokens = row["batch"].as_f64().expect("sessions") / median("seconds");
        assert!((tokens / number(row, "tokens_per_s") - 1.0).abs() < 1e-9, "{row}");
        // Norm and projections, append, decode, merge, and what follows attention: whole kernels of each of 30 layers.
        assert!(number(row, "dispatches_per_layer") >= 7.0, "{row}");
        assert_eq!(number(row, "compared"), 49_152.0, "all logits of a session: {row}");
    }
    let caches: Vec<f64> = rows.iter().map(|row| number(row, "cache_bytes")).collect();
    // 30 layers of 3 KV heads with 64 channels, of 64 tokens and 5 more: in f16, and at a little above 4 bits.
    let f16 = f64::from(69 * 30 * 3 * 64 * 2 * 2);
    assert!(caches[1] == 2.0 * caches[0] && caches[0] > 0.25 * f16 && caches[0] < 0.4 * f16, "{caches:?} of {f16}");
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn a_load_that_does_not_fit_loses_no_other_gpu() {
    let model = reference_model_path().display().to_string();
    let loads = ["bench", "step", "--model", &model, "--context", "256", "--batch", "1", "16", "--steps", "1"];
    let output = concertina(&[&loads[..], &["--kv-budget", "96MiB"]].concat());
    assert_eq!(output.status.code(), Some(1), "one has no figures");
    let (tables, errors) = (text(&output.stdout), text(&output.stderr));
    assert!(errors.contains("1 of 2 loads have no figures"), "{errors}");
    assert!(tables.contains("tokens/s") && tables.contains("step/16x256/full: "), "both are named: {tables}");
}

#[test]
fn steps_beyond_a_model_are_refused() {
    let model = reference_model_path().display().to_string();
    let args = ["bench", "step", "--model", &model, "--context", "100000"];
    refused(&args, 2, &["more than the model's context", "give at most --context"]);
    refused(
        &["bench", "step", "--model", &model, "--text", "nowhere.txt"],
        1,
        &["can not read the text", "nowhere.txt"],
    );
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn kernels_are_recorded_drawn_and_compared_with_a_record_gpu() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let cases = ["bench", "kernels", "--sizes", "small", "--seconds", "0.1", "--only", "decode/1x2k", "merge_states"];
    let (records, svg, report) = (path("records"), path("roofline.svg"), path("kernels.json"));
    let more = ["--record", &records, "--commit", "abc", "--svg", &svg, "--json", &report];
    let tables = text(&done(&[&cases[..], &more].concat()).stdout);
    for words in ["decode/1x2k/g4-d128/kivi4", "merge_states/4x1k", "Gtok/s", "read ceiling", "written: "] {
        assert!(tables.contains(words), "'{words}' in {tables}");
    }
    let rows = json(&report)["rows"].as_array().expect("rows").clone();
    assert_eq!(rows.len(), 3, "f16, kivi4 and merge: {rows:?}");
    for row in &rows {
        let figures = &row["measured"];
        let number = |name: &str| figures[name].as_f64().unwrap_or_else(|| panic!("{name} in {row}"));
        assert!(number("of_read") > 0.0 && number("error_over_bound") <= 1.0 && number("nmse") < 1e-6, "{row}");
        let median = figures["seconds"]["median"].as_f64().expect("a time");
        assert!((number("bytes") / median / number("bytes_per_s") - 1.0).abs() < 1e-9, "{row}");
    }
    assert_eq!(rows[0]["measured"]["to_f16"], 1.0, "f16 against itself");
    assert_eq!(fs::read_to_string(svg).expect("drawn").matches("<circle").count(), 3, "a point per figure");
    let of_device = fs::read_dir(&records).expect("a folder").next().expect("of the device").expect("readable").path();
    let file = fs::read_dir(of_device).expect("a folder").next().expect("a record").expect("readable").path();
    assert!(file.to_str().is_some_and(|name| name.ends_with("-abc.csv")), "{file:?}");
    let record = fs::read_to_string(&file).expect("readable");
    assert_eq!(record.lines().count(), 4, "a header and three figures: {record}");
    // Fractions that any run exceeds, and that none reaches.
    let with = |fraction: &str| {
        let line = |line: &str| {
            let fields: Vec<&str> = line.split(',').collect();
            let head = [&fields[..9], &[fraction]].concat();
            [head, fields[10..].to_vec()].concat().join(",")
        };
        let (header, figures) = record.split_once('\n').expect("lines");
        let figures: Vec<String> = figures.lines().map(line).collect();
        format!("{header}\n{}\n", figures.join("\n"))
    };
    let file = path("then.csv");
    let compared = [&cases[..], &["--compare", &file, "--commit", "def"]].concat();
    fs::write(&file, with("0.000001")).expect("written");
    let shown = text(&done(&compared).stdout);
    assert!(shown.contains("0 of 3 are worse than 10 % below the record"), "{shown}");
    fs::write(&file, with("1000")).expect("written");
    refused(&compared, 1, &["3 figures are worse"]);
}

#[test]
fn what_can_not_be_measured_or_compared_is_refused() {
    let listed = text(&done(&["bench", "kernels", "--list", "--only", "int8"]).stdout);
    assert!(listed.lines().count() >= 4 && listed.lines().all(|line| line.ends_with("/int8")), "{listed}");
    refused(&["bench", "kernels", "--list", "--only", "int9"], 2, &["no case is named 'int9'", "--list"]);
    refused(&["bench", "kernels", "--seconds", "0"], 2, &["--seconds", "not between 0"]);
    refused(&["bench", "kernels", "--compare", "no such file"], 1, &["can not read the record 'no such file'"]);
    refused(&["bench", "kernels", "--compare", "Cargo.toml"], 1, &["not a record", "does not begin with"]);
    refused(&["bench", "kernels", "--tolerance", "0.1"], 2, &["--compare"]);
    refused(&["bench", "all", "--record", "x", "--commit", "a/b"], 2, &["a/b", "file's name"]);
    let preset = ["bench", "metrics", "--model", "yi-6b"];
    let with = |more: &[&'static str]| [&preset[..], more].concat();
    refused(&with(&["--layers", "33"]), 2, &["--layers 33", "32"]);
    refused(&["bench", "metrics", "--model", "deepseek-v2"], 2, &["deepseek-v2", "latents"]);
    refused(&with(&["--compress", "head=duo:0.5"]), 2, &["random weights", "head="]);
    refused(&with(&["--compress", "token=h2o:64:every10"]), 2, &["every"]);
    let folder = tempfile::tempdir().expect("a folder");
    let empty = folder.path().display().to_string();
    refused(&["report", &empty], 2, &["holds no file that ends in .json"]);
    refused(&["report", "no such file"], 1, &["is left out: it can not be read", "none of 1 files is a record"]);
    refused(&["report"], 2, &["error"]);
}
