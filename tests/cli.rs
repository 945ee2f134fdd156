//! The command line as a user meets it: the program itself is run, with good and with bad input.
//!
//! Whatever is wrong ends in one sentence on the standard error, the right exit code, and no half-written file.
#![cfg(feature = "model")]

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use concertina::compression::head::HeadScores;
use concertina::model::reference_model_path;
use serde_json::Value;
use tempfile::TempDir;

/// The program, whose failures are to be of one line whatever the environment asks for.
fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_concertina"));
    // Mesa complains about a missing runtime folder, in the name of every program.
    command.env("RUST_BACKTRACE", "1").env("XDG_RUNTIME_DIR", std::env::temp_dir()).stdin(Stdio::null());
    command
}

fn concertina(args: &[impl AsRef<OsStr>]) -> Output {
    program().args(args).output().expect("the program should start")
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("messages are UTF-8")
}

/// Checks a refusal: the exit code, one sentence, and what it says. Returns the sentence.
fn refusal(output: &Output, code: i32, says: &[&str]) -> String {
    let message = stderr(output);
    assert_eq!(output.status.code(), Some(code), "exit code with: {message}");
    assert!(message.starts_with("error: "), "an error should say so: {message}");
    assert_eq!(message.lines().count(), 1, "an error should be one sentence: {message}");
    for part in says {
        assert!(message.contains(part), "'{part}' should be in: {message}");
    }
    assert!(!message.contains("panicked") && !message.contains("RUST_BACKTRACE"), "an error, not a panic: {message}");
    message
}

fn refused(args: &[impl AsRef<OsStr>], code: i32, says: &[&str]) -> String {
    refusal(&concertina(args), code, says)
}

/// Arguments, and more of them.
fn join(args: &[&str], more: &[&str]) -> Vec<String> {
    args.iter().chain(more).map(|&arg| arg.to_owned()).collect()
}

fn json(text: &[u8]) -> Value {
    serde_json::from_slice(text).expect("--json writes JSON")
}

/// Runs with `--json -` and returns what it wrote.
fn report(args: &[&str]) -> Value {
    let output = concertina(&[args, &["--json", "-"]].concat());
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    json(&output.stdout)
}

/// The reference model, which the repository's tests need anyway.
fn model() -> String {
    let path = reference_model_path();
    assert!(path.exists(), "{} is needed; get it with: cargo xtask model", path.display());
    path.to_str().expect("a UTF-8 path").to_owned()
}

/// A folder with files.
struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().expect("a UTF-8 path").to_owned()
    }

    fn file(&self, name: &str, contents: impl AsRef<[u8]>) -> String {
        let path = self.path(name);
        fs::write(&path, contents).expect("a file should be written");
        path
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.path()).expect("a readable folder");
        let mut names: Vec<_> =
            entries.map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

/// Two documents of some seventy tokens.
fn two_documents(files: &Files) -> [String; 2] {
    let text = |name: &str| format!("{name} is a small town by the sea. ").repeat(7);
    [files.file("a.txt", text("Avonlea")), files.file("b.txt", text("Brightsea"))]
}

/// A GGUF file with one metadata entry, and no tensors.
fn gguf(architecture: &str) -> Vec<u8> {
    let mut bytes = b"GGUF\x03\0\0\0".to_vec();
    bytes.extend([0_u64.to_le_bytes(), 1_u64.to_le_bytes()].concat());
    let key = b"general.architecture";
    bytes.extend((key.len() as u64).to_le_bytes());
    bytes.extend(key);
    bytes.extend(8_u32.to_le_bytes());
    bytes.extend((architecture.len() as u64).to_le_bytes());
    bytes.extend(architecture.as_bytes());
    bytes
}

#[test]
fn wrong_usage_is_refused_with_exit_code_2() {
    let files = Files::new();
    let document = &files.file("d.txt", "text");
    let run = |more: &[&str]| join(&["run", "--model", "m.gguf", "--document", document, "--ask", "q"], more);
    for (args, says) in [
        (join(&["frobnicate"], &[]), ["frobnicate", "unrecognized"]),
        (join(&["run"], &[]), ["--model", "--document"]),
        (join(&["devices"], &["--backend", "glide"]), ["glide", "vulkan, metal, dx12"]),
        (join(&["devices"], &["--jason", "x"]), ["--jason", "'--json'"]),
        (run(&["--ask", "q", "--ask", "q"]), ["3 questions", "1 document"]),
        (run(&["--kv-budget", "48parsecs"]), ["48parsecs", "48MiB"]),
        (run(&["--kv-budget", "2000GiB"]), ["2000GiB", "1024.00 GiB"]),
        (run(&["--compress", "hidden=kivi3"]), ["hidden=kivi3 is not available", "kivi4[:G]"]),
        (run(&["--compress", "int8", "kivi4"]), ["2 compressions", "1 document"]),
        (run(&["--compress", "hidden=think:1.5"]), ["think:1.5", "at most 1"]),
        (run(&["--compress", "token=snapkv"]), ["token=snapkv lacks a budget", "full is all"]),
        (run(&["--page-size", "24"]), ["24", "16, 32, 64, 128"]),
        (run(&["--max-new", "0"]), ["'0'", "1 to"]),
        (run(&["--chunk", "100000"]), ["100000", "16384"]),
        (run(&["--max-sessions", "many"]), ["many", "16384"]),
        (run(&["--temperature", "-1"]), ["-1", "at least 0"]),
        (run(&["--temperature", "NaN"]), ["NaN", "at least 0"]),
        (run(&["--top-p", "1.5"]), ["1.5", "at most 1"]),
        (run(&["--device", " "]), ["--device", "auto"]),
    ] {
        refused(&args, 2, &says);
    }
    assert_eq!(files.names(), ["d.txt"], "nothing was written");
}

#[test]
fn help_explains_every_command() {
    let evals = ["eval perplexity", "eval kl", "eval needle", "calibrate heads"];
    let others = [
        "", "devices", "run", "generate", "tokenize", "codecs", "policies", "presets", "plan", "simulate", "fleet",
        "tune", "verify",
    ];
    for command in others.into_iter().chain(evals) {
        let args: Vec<&str> = command.split_whitespace().chain(["--help"]).collect();
        let output = concertina(&args);
        assert_eq!(output.status.code(), Some(0), "{command} --help");
        let text = String::from_utf8(output.stdout).expect("help is UTF-8");
        assert!(text.contains("Examples:") && text.contains("--json <FILE>"), "{command}: {text}");
    }
    let bare = concertina(&join(&[], &[]));
    assert_eq!(bare.status.code(), Some(2), "no command is no usage");
    assert!(stderr(&bare).contains("Usage:"), "it is shown the help");
}

#[test]
fn without_an_adapter_there_is_advice() {
    let files = Files::new();
    let report = files.path("report.json");
    let document = files.file("d.txt", "A text.");
    let model = model();
    for args in [
        vec!["devices"],
        vec!["verify", "--quick"],
        vec!["run", "--model", &model, "--document", &document, "--ask", "q"],
        vec!["generate", "--model", &model, "--prompt", "q"],
    ] {
        let mut command = program();
        command.args(&args).args(["--backend", "vulkan", "--json", &report]);
        command.env("VK_DRIVER_FILES", "/nonexistent").env("VK_ICD_FILENAMES", "/nonexistent");
        let output = command.output().expect("the program should start");
        refusal(&output, 1, &["no GPU adapter", "vulkan", "install"]);
        assert!(output.stdout.is_empty(), "{args:?}: nothing to show");
    }
    assert_eq!(files.names(), ["d.txt"], "no report");
}

#[test]
fn documents_that_can_not_be_read_are_named() {
    let files = Files::new();
    let good = files.file("good.txt", "A text.");
    let run = |path: &str, says: &[&str]| {
        let report = files.path("report.json");
        let args = ["run", "--model", "./no.gguf", "--document", &good, path, "--ask", "q", "--json", &report];
        refused(&args, 1, &[says, &[path]].concat());
    };
    run(&files.path("missing.txt"), &["can not read", "No such file"]);
    run(&files.file("empty.txt", ""), &["is empty", "0 bytes"]);
    run(&files.file("blank.txt", " \n\t "), &["is empty", "4 bytes"]);
    run(&files.file("latin1.txt", b"caf\xe9 au lait"), &["not UTF-8", "byte 3 of 12"]);
    assert_eq!(files.names(), ["blank.txt", "empty.txt", "good.txt", "latin1.txt"], "no report");
}

#[test]
fn models_that_can_not_be_read_are_named() {
    let files = Files::new();
    let head = {
        use std::io::Read as _;
        let mut head = Vec::new();
        let file = fs::File::open(model()).expect("readable");
        file.take(8 << 20).read_to_end(&mut head).expect("readable");
        head
    };
    let report = files.path("report.json");
    let tokenize = |path: &str, says: &[&str]| {
        refused(&["tokenize", "--model", path, "text", "--json", &report], 1, &[says, &[path]].concat());
    };
    tokenize(&files.path("missing.gguf"), &["no such file"]);
    tokenize(&files.file("cut.gguf", &head), &["truncated", "8388608 bytes"]);
    tokenize(&files.file("short.gguf", &head[..1000]), &["truncated", "1000 bytes"]);
    tokenize(&files.file("empty.gguf", ""), &["truncated", "0 bytes"]);
    tokenize(&files.file("noise.gguf", [0x5a; 4096]), &["not a valid GGUF", "0x5a5a5a5a"]);
    let mut huge = head;
    huge[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
    tokenize(&files.file("huge.gguf", &huge), &["18446744073709551615", "at most"]);
    tokenize(&files.file("other.gguf", gguf("mamba")), &["not supported", "mamba"]);
    assert!(!Path::new(&report).exists(), "no report");
}

#[test]
fn a_prompt_longer_than_the_context_is_refused_with_the_numbers() {
    let files = Files::new();
    let document = files.file("long.txt", "one two three four five ".repeat(60));
    let model = model();
    let run = |more: &[&str]| join(&["run", "--model", &model, "--document", &document, "--ask", "How many?"], more);
    let message = refused(&run(&["--context", "200", "--max-new", "10"]), 1, &["context is 200 tokens", "long.txt"]);
    let fits = message.split("--document-tokens ").nth(1).and_then(|rest| rest.split(' ').next());
    let fits: u32 = fits.and_then(|n| n.parse().ok()).expect("the message advises a length");
    assert!((100..190).contains(&fits), "{message}");
    refused(&run(&["--context", "99999999"]), 2, &["99999999"]);
    refused(&run(&["--context", "9000"]), 2, &["9000", "8192"]);
    refused(&run(&["--max-new", "9000"]), 1, &["9000", "8192"]);
    refused(&["generate", "--model", &model, "--prompt", "q", "--max-new", "9000"], 1, &["9000", "8192"]);
    // The advice holds: what is refused next is the graphics API, which this system does not have.
    let foreign = if cfg!(target_os = "macos") { "dx12" } else { "metal" };
    let advised = ["--context", "200", "--max-new", "10", "--document-tokens", &fits.to_string()];
    refused(&[run(&advised), join(&["--backend", foreign], &[])].concat(), 1, &["no GPU adapter", foreign]);
}

#[test]
fn texts_too_short_to_evaluate_are_refused() {
    let files = Files::new();
    let (model, text) = (model(), files.file("t.txt", "Too short a text."));
    let eval = |more: &[&str]| join(&["eval", "perplexity", "--model", &model, "--text", &text], more);
    refused(&eval(&[]), 1, &["t.txt", "window of 256"]);
    refused(&eval(&["--window", "3"]), 2, &["3 tokens", "at least"]);
    refused(&eval(&["--window", "9000"]), 2, &["9000", "8192"]);
    refused(&eval(&["--compress", "full", "skip-prefill:9.."]), 2, &["skip-prefill:9..", "eval kl"]);
}

#[test]
fn codecs_that_pages_can_not_have_are_refused_with_the_page_size_that_they_need() {
    let files = Files::new();
    let (model, document) = (model(), files.file("d.txt", "A text."));
    let run = |more: &[&str]| join(&["run", "--model", &model, "--document", &document, "--ask", "Why?"], more);
    refused(&run(&["--compress", "kivi4:128"]), 2, &["kivi4:128", "64 tokens", "--page-size 128"]);
    refused(&run(&["--compress", "lowrank:128"]), 2, &["lowrank:128", "64 channels"]);
    refused(&run(&["--compress", "h2o:512:every32"]), 2, &["every32", "pages of 64 tokens"]);
    let scores = files.file("heads.tsv", "0.5\t0.25\n");
    refused(&run(&["--compress", "duo:0.5", "--head-scores", &scores]), 2, &["1 layers of 2", "30 of 3"]);
    let two = ["--document", &document, "--compress", "full", "kivi2", "int8"];
    refused(&run(&two), 2, &["3 compressions", "2 documents"]);
}

#[test]
fn codecs_are_listed_with_what_they_cost() {
    let find = |report: &Value, codec: &str| -> Value {
        let all = report["codecs"].as_array().expect("a list");
        all.iter().find(|c| c["codec"] == codec).unwrap_or_else(|| panic!("{codec} should be listed")).clone()
    };
    let plain = report(&["codecs"]);
    assert_eq!((&plain["model"], &plain["head_dim"]), (&Value::Null, &128.into()), "no model, so 128 channels");
    let kivi2 = find(&plain, "kivi2");
    assert_eq!((&kivi2["effective_bits"], &kivi2["page_tokens"]), (&3.0.into(), &64.into()), "2 bits and metadata");
    assert_eq!(kivi2["per_token_bytes"], Value::Null, "no model, no bytes");
    let wide = find(&plain, "kivi4:128");
    assert_eq!((&wide["effective_bits"], &wide["page_tokens"]), (&4.25.into(), &128.into()), "pages that hold a group");
    assert!(wide["refusal"].as_str().is_some_and(|why| why.contains("--page-size 128")), "{wide}");

    let model = model();
    let of_model = report(&["codecs", "--model", &model, "--page-size", "128"]);
    assert_eq!(of_model["head_dim"], 64, "the model's");
    assert_eq!(find(&of_model, "f16")["per_token_bytes"], of_model["model"]["kv_per_token_bytes"], "the full cache");
    let kivi2 = find(&of_model, "kivi2");
    assert_eq!((&kivi2["per_token_bytes"], &kivi2["times_smaller"]), (&4320.into(), &(16.0 / 3.0).into()), "3 of 16");
    assert_eq!(find(&of_model, "kivi4:128")["refusal"], Value::Null, "pages of 128 tokens hold its groups");

    let text = String::from_utf8(concertina(&["codecs", "--model", &model]).stdout).expect("UTF-8");
    for part in ["kivi4[:G]", "kivi4:128", "k:kivi2,v:rot4", "arXiv:2402.02750", "4,320", "bytes per"] {
        assert!(text.contains(part), "'{part}' in: {text}");
    }
    refused(&["codecs", "--page-size", "48"], 2, &["48", "16, 32, 64, 128"]);
    refused(&["codecs", "--model", &files_missing()], 1, &["no such file"]);
}

#[test]
fn methods_of_the_other_dimensions_are_listed() {
    let found = report(&["policies"]);
    let all = found["policies"].as_array().expect("a list");
    let snapkv = all.iter().find(|policy| policy["name"] == "snapkv").expect("snapkv should be listed");
    assert_eq!(snapkv["dimension"], "token", "{snapkv}");
    assert_eq!(snapkv["defaults"], serde_json::json!(["window32", "kernel5"]), "{snapkv}");
    let text = String::from_utf8(concertina(&["policies"]).stdout).expect("UTF-8");
    for part in ["share:N", "duo:PART", "snapkv:BUDGET[:windowN]", "arXiv:2404.14469", "everyN"] {
        assert!(text.contains(part), "'{part}' in: {text}");
    }
}

/// A path at which there is nothing.
fn files_missing() -> String {
    Files::new().path("missing.gguf")
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn bases_from_a_text_serve_latents_better_than_those_of_the_weights_gpu() {
    let model = model();
    let text = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/alice.txt");
    let calibration = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/essay.txt");
    let kl = ["eval", "kl", "--model", &model, "--text", text, "--prefix", "96", "--tail", "6", "--page-size", "32"];
    let mean = |more: &[&str]| report(&[&kl[..], more].concat())["results"][1]["mean_kl"].as_f64().expect("a mean");
    let weights = mean(&["--compress", "lowrank:48"]);
    let calibrated = mean(&["--compress", "lowrank:48", "--calibrate", calibration]);
    assert!(calibrated < weights / 4.0, "{calibrated} nats with a text, {weights} without");
    refused(&[&kl[..], &["--compress", "int8", "--calibrate", calibration]].concat(), 2, &["--calibrate", "none"]);
}

#[test]
fn comparisons_that_can_not_be_made_are_refused() {
    let files = Files::new();
    let (model, text) = (model(), files.file("t.txt", "Too short a text."));
    let kl = |more: &[&str]| join(&["eval", "kl", "--model", &model, "--text", &text], more);
    let report = files.path("report.json");
    refused(&kl(&["--json", &report]), 1, &["t.txt", "prefix of 1024", "tail of 256"]);
    refused(&kl(&["--prefix", "8000"]), 2, &["--prefix 8000", "8257", "8192"]);
    refused(&kl(&["--prefix", "0"]), 2, &["'0'", "1 to"]);
    refused(&kl(&["--windows", "0"]), 2, &["'0'", "1 to"]);
    refused(&kl(&["--seal", "never"]), 2, &["never", "after-prefix, when-full"]);
    refused(&kl(&["--compress", "int8", "kivi2", "hidden=int8"]), 2, &["int8 twice"]);
    refused(&kl(&["--compress", "full", "int8"]), 2, &["full", "compared with"]);
    refused(&kl(&["--compress", "hidden=kivi5"]), 2, &["kivi5", "kivi4[:G]"]);
    refused(&kl(&["--compress", "kivi2:64", "--page-size", "32"]), 2, &["kivi2:64", "32 tokens", "--page-size 64"]);
    refused(&kl(&["--svg", &files.path("no/such/plot.svg")]), 1, &["can not write the plot", "No such file"]);
    let needle = |more: &[&str]| join(&["eval", "needle", "--model", &model, "--compress", "tova:0.5"], more);
    refused(&needle(&["--lengths", "20"]), 2, &["--lengths 20", "no room for prose"]);
    refused(&needle(&["--lengths", "512,9000"]), 2, &["--lengths 9000", "context of 8192"]);
    refused(&needle(&["--depths", "0.5,1.5"]), 2, &["1.5", "from 0 to 1"]);
    refused(&needle(&["--lengths", "128", "--compress", "snapkv:0.1"]), 2, &["--lengths 128", "always stay"]);
    refused(&join(&["calibrate", "heads", "--model", &model], &["--prose", "8000"]), 2, &["context of 8192"]);
    assert_eq!(files.names(), ["t.txt"], "nothing was written");
}

#[test]
fn reports_are_written_whole_or_not_at_all() {
    let files = Files::new();
    let model = model();
    let tokenize = |report: &str| ["tokenize", "--model", &model, "Hello, world", "--json", report].map(str::to_owned);
    let report = files.file("report.json", "the old report");
    assert!(concertina(&tokenize(&report)).status.success(), "an old report is replaced");
    assert_eq!(json(&fs::read(&report).expect("readable"))["count_tokens"], 3, "the new report");
    assert_eq!(files.names(), ["report.json"], "and nothing beside it");

    refusal(&concertina(&tokenize(&files.path("no/such/folder.json"))), 1, &["can not write", "No such file"]);
    refusal(&concertina(&tokenize(&files.path(""))), 1, &["can not write", "directory"]);
    assert_eq!(files.names(), ["report.json"], "nothing was written");
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_and_a_closed_pipe_are_no_panics() {
    let files = Files::new();
    let model = model();
    refused(&["tokenize", "--model", &model, "text", "--json", "/dev/full"], 1, &["/dev/full", "No space left"]);
    let full = fs::OpenOptions::new().write(true).open("/dev/full").expect("Linux has /dev/full");
    let mut command = program();
    let output = command.args(["tokenize", "--model", &model, "text"]).stdout(full).output().expect("it starts");
    refusal(&output, 1, &["standard output", "No space left"]);

    let long = files.file("long.txt", "word ".repeat(50_000));
    let mut command = program();
    command.args(["tokenize", "--model", &model, "--file", &long]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program should start");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("it ends");
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(141), ""), "as if ended by the signal");
}

#[test]
fn tokenize_counts_tokens_and_bytes() {
    let model = model();
    let plain = report(&["tokenize", "--model", &model, "<|im_end|> one two"]);
    let special = report(&["tokenize", "--model", &model, "--special", "<|im_end|> one two"]);
    assert_eq!(special["tokens"][0]["marker"], true, "a marker where asked for");
    assert_eq!(special["count_tokens"], 3, "three tokens");
    assert!(plain["tokens"].as_array().expect("a list").iter().all(|t| t["marker"] == false), "text otherwise");
    let per_token = special["model"]["kv_per_token_bytes"].as_u64().expect("a number");
    assert_eq!(special["kv_bytes"], 3 * per_token, "bytes of three tokens");
    let text = String::from_utf8(concertina(&["tokenize", "--model", &model, "one two"]).stdout).expect("UTF-8");
    assert!(text.contains("\" two\"") && text.contains("KV cache"), "{text}");
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn devices_lists_adapters_gpu() {
    let report = report(&["devices"]);
    let adapters = report["adapters"].as_array().expect("a list");
    assert!(!adapters.is_empty(), "an adapter");
    let name = adapters[0]["name"].as_str().expect("a name");
    let text = String::from_utf8(concertina(&["devices"]).stdout).expect("UTF-8");
    assert!(text.contains(name) && text.contains("workgroup"), "{text}");
    refused(&["verify", "--quick", "--device", "99"], 2, &["'99'", name]);
    refused(&["verify", "--quick", "--device", "no such name"], 2, &["'no such name'", name]);
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn generate_streams_text_gpu() {
    let model = model();
    let args = ["generate", "--model", &model, "--raw", "--prompt", "The capital of France is", "--max-new", "4"];
    let output = concertina(&args);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("tokens/s"), "times on the standard error: {}", stderr(&output));
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let report = report(&args);
    assert_eq!(format!("{}\n", report["text"].as_str().expect("a text")), text, "the same text in both forms");
    assert!(text.contains("Paris"), "{text}");
    assert_eq!((&report["new_tokens"], &report["ended_by"]), (&4.into(), &"length".into()), "four tokens");
    assert_eq!(report["pool"]["pages_in_use_bytes"], 0, "all bytes are back");
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn compressions_are_compared_with_the_full_cache_gpu() {
    let files = Files::new();
    let (model, svg) = (model(), files.path("kl.svg"));
    let text = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/essay.txt");
    let kl = ["eval", "kl", "--model", &model, "--text", text, "--prefix", "96", "--tail", "8", "--page-size", "32"];
    let found = report(&[&kl[..], &["--compress", "int8", "kivi2", "--svg", &svg]].concat());
    let number = |v: &Value| v.as_f64().unwrap_or_else(|| panic!("{v} should be a number"));
    let [full, int8, kivi2] = [0, 1, 2].map(|i| &found["results"][i]);
    assert_eq!(found["results"].as_array().map(Vec::len), Some(3), "the full cache and two more");
    for (row, codec, bits) in [(full, "f16", 16.0), (int8, "int8", 8.5), (kivi2, "kivi2", 3.0)] {
        let name = row["compression"].as_str().expect("a name");
        assert!(name.ends_with(&format!("hidden={codec}")), "{name} should be {codec}");
        assert_eq!(number(&row["effective_bits"]), bits, "{codec}: bits per element");
        assert_eq!(row["kl"].as_array().map(Vec::len), Some(8), "{codec}: a KL per position of the tail");
    }
    assert_eq!((number(&full["mean_kl"]), number(&full["nll_difference"])), (0.0, 0.0), "from itself");
    let [fine, coarse] = [int8, kivi2].map(|row| number(&row["mean_kl"]));
    assert!(fine > 0.0 && fine < 0.01 && fine < coarse / 10.0, "int8 {fine} should be far better than kivi2 {coarse}");
    assert!(coarse < 1.0, "and kivi2 should not be noise: {coarse}");
    // Three pages in each of 90 lists, of which an eviction that leaves a third leaves one.
    let page = |bits: f64| 2.0 * 32.0 * 64.0 * bits / 8.0;
    assert_eq!(number(&int8["held_bytes"]), 90.0 * 3.0 * page(8.5), "bytes that it held");
    let picture = fs::read_to_string(&svg).expect("a plot");
    assert!(picture.starts_with("<svg") && picture.contains(">kivi2<"), "{picture}");

    let when_full = report(&[&kl[..], &["--compress", "kivi2", "--seal", "when-full", "--chunk", "40"]].concat());
    assert_eq!(when_full["settings"]["sealing"], "when-full", "as asked for");
    let sealed = number(&when_full["results"][1]["mean_kl"]);
    assert!(sealed > fine && sealed != coarse, "the prefix reads sealed pages: {sealed}");
    let within = |budget: &str| join(&kl, &["--compress", "int8", "--kv-budget", budget]);
    let message = refused(&within("1MiB"), 1, &["1.00 MiB is too small", "2 caches", "without --kv-budget"]);
    // What the pool advises is room for a slab; the caches need more.
    refused(&within(&advised(&message)), 1, &["do not fit", "2 caches", "without --kv-budget"]);
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn needles_are_found_and_what_is_finished_is_not_asked_again_gpu() {
    let files = Files::new();
    let (model, svg, kept) = (model(), files.path("needle.svg"), files.path("kept.jsonl"));
    let needle = ["eval", "needle", "--model", &model, "--lengths", "192", "--depths", "0.3", "--page-size", "32"];
    let needle = [&needle[..], &["--compress", "kivi4", "streaming:32", "--resume", &kept]].concat();
    let found = report(&[&needle[..], &["--svg", &svg]].concat());
    let [full, kivi4, window] = [0, 1, 2].map(|i| &found["results"][i]);
    assert_eq!((&full["right"], &kivi4["right"], &window["right"]), (&1.into(), &1.into(), &0.into()), "{found}");
    assert!(kivi4["times_smaller"].as_f64().is_some_and(|times| times > 2.0), "kivi4 is small: {kivi4}");
    assert!(found["cases"][0]["prompt_tokens"].as_u64().is_some_and(|n| (185..=192).contains(&n)), "{found}");
    assert!(fs::read_to_string(&svg).expect("a plot").contains("full: 1 of 1 right"), "a picture");
    // The last line is torn: its question is asked again, and the file is as it was.
    let whole = fs::read(&kept).expect("a file");
    assert_eq!(whole.iter().filter(|byte| **byte == b'\n').count(), 2, "settings and a question");
    fs::write(&kept, &whole[..whole.len() - 9]).expect("torn");
    assert_eq!(report(&needle)["cases"], found["cases"], "asked again");
    assert_eq!(fs::read(&kept).expect("a file"), whole, "kept again");
    let claims = String::from_utf8(whole).expect("UTF-8").replace("\"right\":true", "\"right\":false");
    fs::write(&kept, claims).expect("changed");
    assert_eq!(report(&needle)["results"][0]["right"], 0, "what the file says is not asked again");
    refused(&[&needle[..], &["--seed", "1"]].concat(), 2, &["kept.jsonl", "its seed is 0", "this command 1"]);
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn heads_that_look_back_are_found_gpu() {
    let files = Files::new();
    let (model, out) = (model(), files.path("heads.tsv"));
    let args = ["calibrate", "heads", "--model", &model, "--prose", "128", "--random", "24", "--by", "retrieval"];
    let found = report(&[&args[..], &["--out", &out]].concat());
    let scores = HeadScores::parse(&fs::read_to_string(&out).expect("a file")).expect("head scores");
    assert_eq!((scores.num_layers, scores.num_kv_heads), (30, 3), "a line per layer, a number per KV head");
    let mut best: Vec<usize> = (0..90).collect();
    best.sort_by(|a, b| scores.scores[*b].total_cmp(&scores.scores[*a]));
    // Two heads of this model copy far more than any other: layer 18, KV head 2, and layer 17, KV head 1.
    assert!(best[..2].contains(&56) && best[..2].contains(&52), "{best:?}");
    for name in ["induction", "echo", "copy", "reach"] {
        let all = found["measured"][name].as_array().expect("a list");
        assert!(all.len() == 90 && all.iter().all(|p| p.as_f64().is_some_and(|p| (0.0..1.001).contains(&p))), "{name}");
    }
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn each_document_has_its_own_compression_gpu() {
    let files = Files::new();
    let ([a, b], model) = (two_documents(&files), model());
    let run = ["run", "--model", &model, "--document", &a, &b, "--ask", "Where is the town?", "--max-new", "3"];
    let run = [&run[..], &["--page-size", "32"]].concat();
    let found = report(&[&run[..], &["--compress", "full", "kivi2"]].concat());
    let [full, kivi2] = [&found["sessions"][0], &found["sessions"][1]];
    assert_eq!(full["compression"], "layer=full,head=full,token=full,hidden=f16", "the first stays as it is");
    assert_eq!(kivi2["compression"], "layer=full,head=full,token=full,hidden=kivi2", "the second is compressed");
    let [more, less] = [full, kivi2].map(|s| s["kv_bytes"].as_u64().expect("bytes"));
    assert!(less < more / 2, "sealed pages are small: {less} of {more}");
    assert_eq!(found["pool"]["pages_in_use_bytes"], 0, "all bytes are back");
    let both = report(&[&run[..], &["--compress", "int8"]].concat());
    for session in both["sessions"].as_array().expect("a list") {
        assert!(session["compression"].as_str().is_some_and(|c| c.ends_with("hidden=int8")), "one for all: {session}");
    }
    let text = String::from_utf8(concertina(&[&run[..], &["--compress", "rot3"]].concat()).stdout).expect("UTF-8");
    assert!(text.contains("rot3"), "the table says how caches were kept: {text}");

    // A document is compressed before the question about it.
    let both = ["--compress", "streaming:0.25", "token=snapkv:0.5:window8,hidden=kivi2"];
    let found = report(&[&run[..], &both].concat());
    for (session, name) in [(0, "token=streaming:0.25"), (1, "token=snapkv:0.5:window8")] {
        let session = &found["sessions"][session];
        assert!(session["compression"].as_str().is_some_and(|c| c.contains(name)), "{name}: {session}");
        assert!(session["new_tokens"].as_u64() > Some(0) && session["ended_by"] != "cancelled", "{name}: {session}");
    }
    assert_eq!(
        (&found["pool"]["pages_in_use_bytes"], &found["pool"]["committed_bytes"]),
        (&0.into(), &0.into()),
        "back"
    );
    let few = [&run[..], &["--compress", "snapkv:0.05"]].concat();
    refused(&few, 1, &["a.txt", "token=snapkv:0.05 leaves", "last 32", "give a budget"]);
}

/// The size after "at least" in a message.
fn advised(message: &str) -> String {
    let rest = message.split("at least ").nth(1).unwrap_or_else(|| panic!("no advice in: {message}"));
    rest.split_whitespace().take(2).collect()
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn budgets_that_messages_advise_suffice_and_who_does_not_fit_waits_gpu() {
    let files = Files::new();
    let ([a, b], model, report) = (two_documents(&files), model(), files.path("report.json"));
    let run = |budget: &str| {
        let args = ["run", "--model", &model, "--document", &a, &b, "--ask", "Where is the town?", "--max-new", "3"];
        concertina(&[&args[..], &["--kv-budget", budget, "--json", &report]].concat())
    };
    let message = refusal(&run("100KiB"), 1, &["budget of 100.0 KiB is too small"]);
    let message = refusal(&run(&advised(&message)), 1, &["a.txt", "tokens needs", "for pages"]);
    assert!(!Path::new(&report).exists(), "no report of a refused run");
    let output = run(&advised(&message));
    assert!(output.status.success(), "the advised budget should suffice: {}", stderr(&output));

    let found = json(&fs::read(&report).expect("a report"));
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    assert!(text.contains("1 of 2 sessions at once") && text.contains("pages 0 B"), "{text}");
    assert_eq!(found["metrics"]["concurrency"]["resident_max"], 1, "one at a time");
    assert_eq!(found["metrics"]["context_switch"]["sessions_waited"], 1, "the other one waits");
    let [first, second] = [&found["sessions"][0], &found["sessions"][1]];
    let seconds = |v: &Value| v.as_f64().expect("a time");
    assert_eq!(seconds(&first["waited_s"]), 0.0, "the first begins at once");
    assert!(seconds(&second["waited_s"]) >= seconds(&first["first_token_s"]), "the second begins after it");
    for session in [first, second] {
        assert!(session["kv_bytes"].as_u64() > Some(0), "it held pages: {session}");
        assert_ne!(session["ended_by"], "cancelled", "it ended by itself");
    }
    let pool = &found["pool"];
    assert_eq!((&pool["pages_in_use_bytes"], &pool["committed_bytes"]), (&0.into(), &0.into()), "all bytes are back");
    assert_eq!(files.names(), ["a.txt", "b.txt", "report.json"], "one report");
}
