//! `concertina fleet` as a user meets it: what it prints, that it repeats itself, and what it refuses.
#![cfg(feature = "model")]

use std::fs;
use std::process::{Command, Output};

use serde_json::Value;

fn concertina(args: &[String]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_concertina")).args(args).output().expect("the program should start")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

/// A load that two GPUs serve, and one can not hold.
const LOAD: &str = "fleet --model yi-34b --gpu h100 --sessions 40 --arrival poisson:0.1/s --context uniform:4k..40k \
                    --answer fixed:60 --memory 80GB";

/// Those arguments, and more of them; what is named again is replaced.
fn with(more: &str) -> Vec<String> {
    let mut args = options(LOAD);
    for option in options(more) {
        args.retain(|(name, _)| *name != option.0);
        args.push(option);
    }
    args.into_iter().flat_map(|(name, values)| std::iter::once(name).chain(values)).collect()
}

/// Words as options with their values; what stands before the first is an option, too.
fn options(words: &str) -> Vec<(String, Vec<String>)> {
    let mut all: Vec<(String, Vec<String>)> = Vec::new();
    for word in words.split_whitespace() {
        match all.last_mut() {
            Some((_, values)) if !word.starts_with("--") => values.push(word.to_owned()),
            _ => all.push((word.to_owned(), Vec::new())),
        }
    }
    all
}

fn report(args: &[String]) -> Value {
    let args: Vec<String> = args.iter().cloned().chain(["--json".to_owned(), "-".to_owned()]).collect();
    let output = concertina(&args);
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("--json writes JSON")
}

fn designs(report: &Value) -> &Vec<Value> {
    report["designs"].as_array().expect("designs")
}

#[test]
fn designs_stand_below_one_another_with_what_they_cost() {
    let report = report(&with("--gpus 2 4 --share 1 2 --price 2.5 --compress kivi4"));
    let all = designs(&report);
    assert_eq!(all.len(), 4, "two ways to share out each");
    for row in all {
        let served = &row["served"];
        let number = |name: &str| served[name].as_f64().unwrap_or_else(|| panic!("{name} in {row}"));
        let gpus = row["gpus"].as_f64().expect("a count");
        assert_eq!(gpus, row["replicas"].as_f64().expect("a count") * row["share"].as_f64().expect("a count"), "{row}");
        assert_eq!(row["price_per_hour"].as_f64(), Some(2.5 * gpus), "all GPUs for an hour");
        assert_eq!(number("sessions_finished"), 40.0, "{row}");
        let hours = number("last_answer_s") / 3600.0;
        let near = |a: f64, b: f64| (a / b - 1.0).abs() < 1e-9;
        assert!(near(number("price_per_session"), gpus * 2.5 * hours / 40.0), "{row}");
        assert!(near(number("sessions_per_hour"), 40.0 / hours), "{row}");
        assert!(number("busy_part") > 0.0 && number("busy_part") < 1.0, "{row}");
        let first = &served["first_token_s"];
        assert!(first["p50"].as_f64() > Some(0.0) && first["p50"].as_f64() <= first["p95"].as_f64(), "{row}");
    }
    let p95 = |row: &Value| row["served"]["first_token_s"]["p95"].as_f64().expect("a time");
    assert!(p95(&all[1]) < p95(&all[0]), "two GPUs that share a layer read a document in half the time");
    let cheapest = &all[usize::try_from(report["cheapest"].as_u64().expect("one")).expect("a place")];
    assert_eq!(
        (cheapest["gpus"].as_u64(), cheapest["served"]["keeps_up"].as_bool()),
        (Some(2), Some(true)),
        "{cheapest}"
    );
}

#[test]
fn the_command_line_that_it_prints_repeats_it() {
    let args =
        with("--gpus 2 --share 2 --price 2 3 --memory 80GB 141GB --compress kivi4 --seed 5 --first-token-within 30s");
    let output = concertina(&args);
    let shown = text(&output.stdout);
    assert!(output.status.success(), "{}", text(&output.stderr));
    for part in ["The cheapest", "1x2 80.0 GB kivi4", "141 GB", "keeps up", "2.00 or 3.00", "within 30 s"] {
        assert!(shown.contains(part), "'{part}' in:\n{shown}");
    }
    let again = shown.lines().find_map(|line| line.trim().strip_prefix("again")).expect("a command line");
    let again: Vec<String> = again.split_whitespace().skip(1).map(ToOwned::to_owned).collect();
    let of = |args: &[String]| {
        let mut report = report(args);
        report.as_object_mut().expect("an object").remove("elapsed_s");
        report
    };
    let (first, second) = (of(&args), of(&again));
    assert_eq!(first["designs"], second["designs"], "the same figures and trace hashes");
    assert_eq!(first["settings"]["first_token_within_s"], second["settings"]["first_token_within_s"], "the target");
    let longer: Vec<String> = again.iter().map(|arg| arg.replace("exp:30", "exp:31")).collect();
    let other = of(&longer);
    let hash = |report: &Value| designs(report)[0]["served"]["trace_hash"].clone();
    assert_ne!(hash(&first), hash(&other), "another time to think, another trace");
}

#[test]
fn a_target_makes_the_cheapest_dearer_or_says_that_none_reaches_it() {
    let cheapest = |target: &str| {
        let report = report(&with(&format!("--gpus 2 4 8 --share 1 2 4 --compress kivi4 --price 2 {target}")));
        let place = report["cheapest"].as_u64().and_then(|place| usize::try_from(place).ok());
        place.map(|place| designs(&report)[place].clone())
    };
    let p95 = |row: &Value| row["served"]["first_token_s"]["p95"].as_f64().expect("a time");
    let any = cheapest("").expect("some design keeps up");
    let limit = 0.9 * p95(&any);
    let faster = cheapest(&format!("--first-token-within {limit}s")).expect("more GPUs begin earlier");
    assert!(p95(&faster) <= limit && faster["gpus"].as_u64() > any["gpus"].as_u64(), "{faster} for {any}");
    assert_eq!(cheapest("--first-token-within 0.001"), None, "a document is not read in a millisecond");
    let output = concertina(&with("--gpus 2 --share 2 --compress kivi4 --first-token-within 0.001"));
    let shown = text(&output.stdout);
    assert!(output.status.success() && shown.contains("No design serves this load"), "{shown}");
    assert!(shown.contains("the fastest that keeps up is 1x2 kivi4") && shown.contains("GPU seconds"), "{shown}");
}

#[test]
fn what_does_not_fit_or_divide_is_shown_and_no_error() {
    let args = with("--gpus 1 2 --share 1 2 --memory 60GB --compress full");
    let report = report(&args);
    let all = designs(&report);
    let fits: Vec<bool> = all.iter().map(|row| row["does_not_fit"].is_null()).collect();
    assert_eq!(fits, [false, false, true], "69 GB of weights on one of 60 GB, and on two");
    assert!(all[0]["served"].is_null() && all[2]["served"].is_object(), "what became of it");
    assert_eq!(report["left_out"], serde_json::json!([{ "gpus": 1, "share": 2 }]), "two of one");
    let shown = text(&concertina(&args).stdout);
    for part in
        ["does not fit", "the weights take 64.05 GiB of 55.88 GiB", "do not divide GPUs in all: 2 over 1", "1x2 f16"]
    {
        assert!(shown.contains(part), "'{part}' in:\n{shown}");
    }
}

#[test]
fn sessions_that_never_fit_are_counted_and_their_design_is_not_advised() {
    let report = report(&with("--gpus 1 --share 1 --compress full --context fixed:60k"));
    let served = &designs(&report)[0]["served"];
    assert_eq!((served["never_fit"].as_u64(), served["sessions_finished"].as_u64()), (Some(40), Some(0)), "{served}");
    let shown = text(&concertina(&with("--gpus 2 --share 1 --compress full --context uniform:4k..60k")).stdout);
    for part in ["refused (never fits)", "the rest (", "No design serves", "leaves beside the weights"] {
        assert!(shown.contains(part), "'{part}' in:\n{shown}");
    }
    assert!(served["price_per_session"].is_null() && report["cheapest"].is_null(), "nobody is served for money");
}

#[test]
fn a_page_and_a_plot_hold_every_design_and_load_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).to_str().expect("UTF-8").to_owned();
    let (svg, html) = (path("plot.svg"), path("page.html"));
    let more = format!("--gpus 2 4 --share 2 --price 2.5 --compress full kivi4 --svg {svg} --html {html}");
    let output = concertina(&with(&more));
    assert!(output.status.success(), "{}", text(&output.stderr));
    let (svg, html) = (fs::read_to_string(svg).expect("a plot"), fs::read_to_string(html).expect("a page"));
    for label in ["1x2 f16", "1x2 kivi4", "2x2 f16", "2x2 kivi4"] {
        assert!(svg.contains(label) && html.contains(label), "{label} in both");
    }
    assert!(
        svg.contains("price of a session") && html.contains("trace hash") && html.contains("concertina fleet"),
        "all"
    );
    assert!(
        !["http", "src=", "<script", "<link", "url("].iter().any(|word| html.contains(word)),
        "nothing from elsewhere"
    );
}

#[test]
fn what_can_not_be_simulated_is_wrong_usage_with_the_reason() {
    for (more, says) in [
        ("--gpu h10", &["no GPU 'h10'; did you mean h100?"][..]),
        ("--model gpt-5", &["no model 'gpt-5'"]),
        ("--gpus 0", &["from 1 to 1024"]),
        ("--gpus 4 2 --share 3 8", &["no design is left", "3, 8", "4, 2"]),
        ("--price 1 2 3 --memory 80GB 141GB", &["3 prices and 2 --memory"]),
        ("--price -1", &["above 0"]),
        ("--first-token-within soon", &["'soon' is no time", "30s"]),
        ("--compress head=duo:0.5 --memory 10GB", &["one list for all"]),
        ("--model deepseek-v2", &["latent of 576 numbers"]),
        ("--gpu m4-max --share 1 2 --gpus 2", &["no link to another one", "2 can not share a layer"]),
        ("--gpu m4-max --share 1 --host-budget 10GB", &["memory of m4-max is the host's"]),
        ("--chunk 32", &["no row for each of 64"]),
        ("--sessions 0", &["from 1 to 1000000"]),
    ] {
        let output = concertina(&with(more));
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{more} is wrong usage: {message}");
        assert!(message.starts_with("error: ") && message.lines().count() == 1, "one sentence: {message}");
        assert!(says.iter().all(|part| message.contains(part)), "{says:?} should be in: {message}");
    }
}
