//! Searching for a tuning: what is wrong can not win, what wins is kept and used, and results stay what they were.
#![cfg(feature = "model")]

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use concertina::compression::Compression;
use concertina::compression::hidden::HiddenCodec;
use concertina::device::Device;
use concertina::engine::bench::cache::CacheSpec;
use concertina::engine::bench::decode::DecodeRun;
use concertina::engine::bench::{BenchSettings, Checked, KernelRun, Work};
use concertina::engine::paged_attention::{PagedAttention, PagedAttentionConfig};
use concertina::engine::{Engine, EngineConfig, EngineError, EvictionConfig};
use concertina::eval::kernels::{Case, Sizes};
use concertina::eval::prompt::Driver;
use concertina::eval::tune::{Choice, TuneCase, TunePlan, TuneRow, search};
use concertina::geometry::{Bytes, HeadGeometry};
use concertina::kernels::attention::CacheShape;
use concertina::kernels::decode_choices::DecodeClass;
use concertina::kernels::tuning::Tuning;
use concertina::kernels::{KernelSpec, PipelineCache, Recorder, gather, score};
use concertina::reference::compare::{kl_divergence, widen};
use concertina::reference::transformer::ReferenceModel;
use serde_json::Value;

const HOT: BenchSettings = BenchSettings { cold: Bytes::ZERO, in_order: false, max_arena: None };

/// Two launches of one kernel, of which the default does its work so many times and the other once; whose inputs may be spoiled.
struct Rigged {
    runs: [DecodeRun; 2],
    labels: Vec<String>,
    chosen: usize,
}

/// How often the default does its work.
const SLOWER: usize = 24;

impl KernelRun for Rigged {
    fn candidates(&self) -> Vec<String> {
        self.labels.clone()
    }

    fn choose(&mut self, device: &Device, pipelines: &mut PipelineCache, candidate: usize) -> Result<(), EngineError> {
        self.chosen = candidate;
        self.runs[candidate].choose(device, pipelines, 0)
    }

    fn work(&self) -> Work {
        self.runs[self.chosen].work()
    }

    fn record(&self, recorder: &mut Recorder<'_>, copy: usize) {
        for _ in 0..if self.chosen == 0 { SLOWER } else { 1 } {
            self.runs[self.chosen].record(recorder, copy);
        }
    }

    fn poison(&mut self, device: &Device) -> Result<(), EngineError> {
        self.runs[self.chosen].poison(device)
    }

    fn check(&mut self, device: &Device, copy: usize) -> Result<Checked, EngineError> {
        self.runs[self.chosen].check(device, copy)
    }

    fn spoil(&mut self, device: &Device, copy: usize) -> Result<(), EngineError> {
        self.runs[self.chosen].spoil(device, copy)
    }
}

/// The row and the tuning of a search in which one launch is much faster than the default.
fn rigged(spoiled: [bool; 2]) -> (TuneRow, Tuning) {
    let heads = HeadGeometry { num_qo_heads: 4, num_kv_heads: 1, head_dim: 64 };
    let spec =
        CacheSpec { shape: CacheShape { heads, page_size: 64 }, codec: HiddenCodec::F16, contexts: vec![700, 256] };
    let class = DecodeClass::of(&spec.shape.format(spec.codec));
    let case = Case {
        kernel: "decode",
        shape: "rigged".to_owned(),
        codec: Some(spec.codec),
        prepare: Box::new(move |device, pipelines, settings| {
            let mut make = || DecodeRun::new(device, pipelines, &spec, settings);
            let mut runs = [make()?, make()?];
            for (run, spoil) in runs.iter_mut().zip(spoiled) {
                if spoil {
                    run.spoil(device, 0)?;
                }
            }
            let labels = runs[0].candidates().into_iter().take(2).collect();
            Ok(Box::new(Rigged { runs, labels, chosen: 0 }))
        }),
    };
    let cases = [TuneCase { case, choice: Choice::Decode(class) }];
    let plan = TunePlan { sizes: Sizes::Small, seconds: 2.0, settings: HOT };
    let mut rows = Vec::new();
    let mut keep = |row| {
        rows.push(row);
        true
    };
    let tuning = search(common::device(), &cases, &plan, &Tuning::default(), &mut keep).expect("the device works");
    assert_eq!(rows.len(), 1, "one case");
    (rows.remove(0), tuning)
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn a_wrong_candidate_can_not_win_however_fast_it_is_gpu() {
    let (row, tuning) = rigged([false, false]);
    let winner = row.winner.clone().expect("both are right");
    assert!(winner != row.default && row.refused.is_empty(), "the faster one wins: {row:?}");
    assert!(row.gain.is_some_and(|gain| gain > 0.5), "{row:?}");
    assert_eq!(tuning.decode.iter().map(|(_, tile)| tile.to_string()).collect::<Vec<_>>(), [winner.as_str()], "chosen");

    let (row, tuning) = rigged([false, true]);
    assert_eq!((row.winner.as_ref(), row.gain), (Some(&row.default), Some(0.0)), "the default stays: {row:?}");
    assert_eq!(row.refused.len(), 1, "{row:?}");
    assert!(row.refused[0].candidate == winner && row.refused[0].reason.contains("bound"), "by name: {row:?}");
    assert_eq!(tuning.decode.iter().map(|(_, tile)| tile.to_string()).collect::<Vec<_>>(), [row.default], "kept");

    let (row, tuning) = rigged([true, true]);
    assert_eq!((row.winner, row.refused.len()), (None, 2), "nothing is right");
    assert_eq!(tuning, Tuning::default(), "nothing is chosen");
}

fn concertina(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_concertina"));
    command.env("XDG_RUNTIME_DIR", std::env::temp_dir()).args(args);
    command.output().expect("the program should start")
}

fn json(args: &[&str]) -> Value {
    let args: Vec<&str> = args.iter().copied().chain(["--json", "-"]).collect();
    let output = concertina(&args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn refused(args: &[&str], code: i32, says: &[&str]) {
    let output = concertina(args);
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {message}");
    assert!(says.iter().all(|part| message.contains(part)), "{says:?} should be in: {message}");
}

fn shown(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn a_search_finds_a_winner_that_later_commands_use_gpu() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("tuning.json");
    let file = shown(&path);
    refused(&["tune", "--only", "no such case", "--file", file], 2, &["no such case", "decode/2x512/g4-d128/f16"]);
    refused(&["tune", "--show", "--file", file], 1, &["has no tuning", "concertina tune"]);
    let report = json(&["tune", "--only", "matvec", "--seconds", "2", "--file", file]);
    let row = &report["rows"][0];
    let winner = row["winner"].as_str().expect("a winner");
    assert_eq!((report["rows"].as_array().map(Vec::len), row["refused"].as_array().map(Vec::len)), (Some(1), Some(0)));
    assert!(row["measured"].as_u64() >= Some(2), "{row}");
    let choices = json(&["tune", "--show", "--file", file])["choices"].clone();
    let product = choices["product"].as_str().expect("a layout of products");
    assert!(product.starts_with(&format!("few{winner},")), "what won is kept: {product}");
    // What another case finds comes beside it.
    json(&["tune", "--only", "decode/2x512/g4-d64/f16", "--seconds", "0.1", "--file", file]);
    let choices = json(&["tune", "--show", "--file", file])["choices"].clone();
    assert_eq!(choices["product"], product, "it stays");
    assert!(choices["decode"]["f16/g4-d64"].is_string(), "{choices}");

    let source = |args: &[&str]| {
        let bench = ["bench", "kernels", "--only", "merge_states", "--seconds", "0.1"];
        let report = json(&bench.iter().chain(args).copied().collect::<Vec<_>>());
        report["device"]["tuning"].as_str().map(str::to_owned)
    };
    assert_eq!(source(&["--tuning", file]).as_deref(), Some(file), "used");
    assert_eq!(source(&["--tuning", "default"]).as_deref(), Some("default"), "not used");
    refused(&["tune", "--tuning", file], 2, &["--tuning", "--file"]);

    // Another driver's entry is not used, and a file that is damaged is not passed over.
    let text = std::fs::read_to_string(&path).expect("it was written");
    let driver = report["device"]["adapter"]["driver"].as_str().expect("a driver");
    std::fs::write(&path, text.replace(driver, "another driver 1.0")).expect("it is written");
    let bench = ["bench", "kernels", "--only", "merge_states", "--tuning", file];
    refused(&bench, 2, &["another driver 1.0", driver]);
    std::fs::write(&path, &text[..text.len() / 2]).expect("it is written");
    refused(&bench, 1, &["is damaged", file, "concertina tune"]);
    json(&["tune", "--only", "matvec", "--seconds", "0.1", "--file", file]);
    assert_eq!(source(&["--tuning", file]).as_deref(), Some(file), "written anew");
}

/// Logits of a prompt's last token and of one decode row behind it.
fn logits(tuning: &Tuning, tokens: &[u32], next: u32) -> [Vec<f32>; 2] {
    let config = EngineConfig { page_size: 64, ..common::config(128) };
    let tuning = Arc::new(tuning.clone());
    let weights = &common::model().weights;
    let (mut engine, mut caches) = Engine::tuned(common::device(), weights, &config, tuning).expect("128 MiB suffice");
    let mut driver = Driver::new(&mut engine, &mut caches);
    let probe = driver.admit(&Compression::default(), tokens.len(), tokens.len() + 1).expect("it fits");
    let last = tokens.len() - 1;
    let mut of_prompt = Vec::new();
    driver.prefill(probe, tokens, last..last + 1, 64, &mut |_, row| of_prompt = row).expect("it runs");
    let of_decode = driver.decode(&[(probe, next)]).expect("it runs").remove(0);
    [of_prompt, of_decode]
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn another_tuning_gives_other_bits_of_the_same_answer_gpu() {
    let mut tuned = Tuning::default();
    tuned.decode.insert("f16/g3-d64".parse().expect("a class"), "tiled:64:1:8:8:ahead".parse().expect("a tile"));
    tuned.product = Some("few8x8x8x16:8:16:128,many64x64x16:1".parse().expect("a layout"));
    let tokens = common::tokens(3, 70, 40_000);
    let next = 1234;
    let (by_default, by_file, again) =
        (logits(&Tuning::default(), &tokens, next), logits(&tuned, &tokens, next), logits(&tuned, &tokens, next));
    let whole: Vec<u32> = tokens.iter().copied().chain([next]).collect();
    let reference = ReferenceModel::new(&common::model().weights).logits(&whole, &[tokens.len() - 1, tokens.len()]);
    let bits = |rows: &[Vec<f32>; 2]| rows.concat().iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert!(bits(&by_file) == bits(&again), "the same tuning, the same bits");
    assert!(bits(&by_file) != bits(&by_default), "sums in another order: the tuning should be in use");
    let mut worst = BTreeMap::new();
    for (name, rows) in [("default", &by_default), ("tuned", &by_file)] {
        for at in 0..2 {
            let nats = kl_divergence(&reference[at], &widen(&rows[at]));
            assert!(nats <= 1e-4, "{name}, row {at}: {nats:e} nats from the reference");
            worst.insert((name, at), nats);
        }
    }
    println!("nats from the reference: {worst:?}");
    assert!(kl_divergence(&reference[0], &widen(&by_file[1])) > 1e-2, "another row's logits should not pass");
}

/// Launches of scores and moves change no bit that a test could look for, so this one asks who holds their kernels.
#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn evictions_hold_the_kernels_that_the_tuning_names_gpu() {
    let heads = HeadGeometry { num_qo_heads: 6, num_kv_heads: 2, head_dim: 64 };
    let shape = CacheShape { heads, page_size: 32 };
    let format = shape.format(HiddenCodec::F16);
    let by_default = Tuning::default();
    let chosen = Tuning {
        score: Some("tiled:64:64:4".parse().expect("a tile")),
        gather: Some("lanes:256:4".parse().expect("a launch")),
        ..Tuning::default()
    };
    let specs = |tuning: &Tuning| [score::kernel(&format, tuning.score()), gather::kernel(&format, tuning.gather())];
    for (used, other) in [(&by_default, &chosen), (&chosen, &by_default)] {
        let mut pipelines = PipelineCache::new(used.clone());
        let config = PagedAttentionConfig {
            evictions: EvictionConfig::of(&["token=h2o:0.5".parse().expect("a compression")], 1),
            context_length: 256,
            ..PagedAttentionConfig::new(shape, Bytes::mib(16), 32, 32 * 6 * 2)
        };
        let attention = PagedAttention::new(common::device(), &mut pipelines, config).expect("16 MiB suffice");
        // The cache has one, and the caller.
        let mut is_held =
            |spec: &KernelSpec| Arc::strong_count(&pipelines.get(common::device(), spec).expect("it compiles")) > 2;
        assert_eq!(specs(used).each_ref().map(&mut is_held), [true; 2], "used: {used:?}");
        assert_eq!(specs(other).each_ref().map(&mut is_held), [false; 2], "not used: {other:?}");
        drop(attention);
    }
}
