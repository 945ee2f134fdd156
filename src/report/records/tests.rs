//! Records as commands write them, read again and joined.

use serde::Serialize;
use serde_json::json;

use super::{Body, Metric, Record, RecordsReport, Refused, join, parse};
use crate::compression::Compression;
use crate::device::{AdapterSummary, Tier};
use crate::engine::ceilings::CeilingSizes;
use crate::eval::kl::{KlResult, KlSettings, PrefixSealing};
use crate::eval::metrics::{BatchDecode, SessionMetrics};
use crate::eval::needle::NeedleStyle;
use crate::eval::perplexity::Perplexity;
use crate::eval::spread::Spread;
use crate::eval::switch::{OneWay, Switch};
use crate::geometry::Bytes;
use crate::report::html::tests::faults;
use crate::report::{
    CeilingFigures, CeilingsReport, DEFAULT_TUNING, DeviceReport, KlReport, KlRow, MetricsReport, ModelReport,
    NeedleReport, NeedleRow, PerplexityReport, PerplexityRow, Program, SwitchReport, SwitchRow,
};
use crate::theory::presets::Presets;

fn device(name: &str) -> DeviceReport {
    let adapter = AdapterSummary {
        index: 0,
        name: name.to_owned(),
        backend: "vulkan".to_owned(),
        kind: "discrete".to_owned(),
        driver: String::new(),
        tier: Tier::Subgroup,
        cooperative: false,
        subgroup_sizes: (32, 32),
        max_binding: Bytes::mib(128),
        max_buffer: Bytes::mib(128),
        workgroup_memory: Bytes(32 << 10),
        timestamps: true,
    };
    DeviceReport { adapter, tier: "subgroup".to_owned(), clock: None, tuning: DEFAULT_TUNING.to_owned() }
}

fn model() -> ModelReport {
    let presets = Presets::built_in();
    let preset = presets.model("smollm2-135m").expect("a preset");
    ModelReport::new("model.gguf".to_owned(), &preset.decoder.geometry, Some(Bytes(2 * 134_515_008)))
}

fn of(value: f64) -> Spread {
    Spread { median: value, p10: value, p90: value, n: 3 }
}

fn read(file: &str, report: &impl Serialize) -> Record {
    let text = serde_json::to_vec(report).expect("reports are JSON");
    parse(file, &text).unwrap_or_else(|e| panic!("{file}: {e}"))
}

/// 1 TFLOP/s, 1 GB/s of memory; 1 GB/s out and 2 GB/s back.
fn ceilings(name: &str) -> CeilingsReport {
    let figures = CeilingFigures {
        read_bytes_per_s: of(1e9),
        copy_bytes_per_s: of(1e9),
        out_bytes_per_s: of(1e9),
        back_bytes_per_s: of(2e9),
        flop_per_s: of(1e12),
        dispatch_s: of(1e-6),
        submission_s: of(1e-5),
    };
    CeilingsReport {
        kind: "bench device",
        program: Program::THIS,
        device: device(name),
        quick: false,
        sizes: CeilingSizes::QUICK,
        ceilings: figures,
        elapsed_s: 1.0,
    }
}

/// Bytes of 1024 tokens of the model in f16.
const CACHE: u64 = 1024 * 23_040;

fn session(compression: &str) -> SessionMetrics {
    SessionMetrics {
        compression: compression.parse::<Compression>().expect("a compression").to_string(),
        context_tokens: 1024,
        cache_bytes: Bytes(CACHE),
        peak_bytes: Bytes(CACHE),
        capacity_bytes: Bytes(10 * CACHE + CACHE / 2),
        concurrency: 10,
        prefill_s: of(500.0),
        compress_s: of(0.0),
        decode_token_s: of(1.0),
        batch: Some(BatchDecode { sessions: 4, step_s: of(2.0) }),
        switch_bytes: Bytes(CACHE),
        switch_out_s: CACHE as f64 / 1e9,
        switch_back_s: 3.0 * CACHE as f64 / 2e9,
        plain_copies_s: 1.0,
    }
}

fn metrics(name: &str, results: Vec<SessionMetrics>) -> MetricsReport {
    MetricsReport {
        kind: "bench metrics",
        program: Program::THIS,
        device: device(name),
        model: model(),
        scaled: None,
        kv_budget_bytes: Bytes::mib(512),
        page_tokens: 64,
        chunk_tokens: 128,
        repeats: 3,
        results,
        elapsed_s: 1.0,
    }
}

fn kl(name: &str, rows: &[(&str, f64)]) -> KlReport {
    let row = |(compression, mean_kl): &(&str, f64)| KlRow {
        measured: KlResult {
            compression: compression.parse::<Compression>().expect("a compression").to_string(),
            kl: vec![*mean_kl],
            mean_kl: *mean_kl,
            median_kl: *mean_kl,
            max_kl: *mean_kl,
            nll: 2.5,
            top1_agreement: 1.0,
            held_bytes: Bytes(1),
            held_tokens: 1,
        },
        effective_bits: 16.0,
        per_token_bytes: 1.0,
        nll_difference: 0.0,
        times_smaller: 1.0,
    };
    KlReport {
        program: Program::THIS,
        device: device(name),
        model: model(),
        text: "essay.txt".to_owned(),
        text_tokens: 2000,
        settings: KlSettings { prefix_tokens: 1024, tail_tokens: 256, sealing: PrefixSealing::AfterPrefix },
        windows: 1,
        page_tokens: 64,
        chunk_tokens: 128,
        kv_budget_bytes: Bytes::mib(512),
        results: rows.iter().map(row).collect(),
        elapsed_s: 1.0,
    }
}

fn needle(name: &str) -> NeedleReport {
    let row = NeedleRow {
        compression: Compression::default().to_string(),
        right: 7,
        asked: 9,
        accuracy: 7.0 / 9.0,
        per_token_bytes: 1.0,
        times_smaller: 1.0,
        lengths: Vec::new(),
    };
    NeedleReport {
        program: Program::THIS,
        device: device(name),
        model: model(),
        text: None,
        style: NeedleStyle::Word,
        query_aware: false,
        seed: 0,
        depths: vec![0.5],
        page_tokens: 64,
        kv_budget_bytes: Bytes::mib(512),
        results: vec![row],
        cases: Vec::new(),
        elapsed_s: 1.0,
    }
}

fn perplexity(name: &str) -> PerplexityReport {
    let measured = Perplexity::new(256, vec![2.25]);
    PerplexityReport {
        program: Program::THIS,
        device: device(name),
        model: model(),
        text: "essay.txt".to_owned(),
        text_tokens: 256,
        results: vec![PerplexityRow { compression: Compression::default().to_string(), measured }],
        reference: None,
        elapsed_s: 1.0,
    }
}

fn switch(name: &str) -> SwitchReport {
    let way = OneWay { plain_s: 0.1, alone_s: 0.25, decode_s: 0.1, decode_spread_s: 0.0, beside_s: 0.3 };
    let compression = Compression::default().to_string();
    let measured = Switch { compression, bytes: Bytes(CACHE), steps: 1, out: way, back: way };
    SwitchReport {
        program: Program::THIS,
        device: device(name),
        model: model(),
        tokens: 1024,
        decoding: 1,
        chunk_bytes: Bytes::mib(4),
        repeats: 3,
        results: vec![SwitchRow::new(measured)],
    }
}

fn joined(records: &[Record]) -> RecordsReport {
    join(records, Vec::new())
}

/// Measured, predicted and ratio of a metric of the only group.
fn figure(report: &RecordsReport, metric: Metric) -> (f64, Option<f64>, Option<f64>) {
    let [group] = &report.groups[..] else { panic!("one group: {:?}", report.groups) };
    let found = group.figures.iter().find(|figure| figure.metric == metric);
    let found = found.unwrap_or_else(|| panic!("{metric:?} should be there"));
    (found.measured, found.predicted, found.ratio)
}

#[test]
fn every_kind_of_record_is_told_by_its_fields() {
    let name = "GPU";
    let found = [
        read("a", &ceilings(name)).body.command(),
        read("b", &metrics(name, vec![session("full")])).body.command(),
        read("c", &kl(name, &[("full", 0.0)])).body.command(),
        read("d", &needle(name)).body.command(),
        read("e", &perplexity(name)).body.command(),
        read("f", &switch(name)).body.command(),
    ];
    let commands = ["bench device", "bench metrics", "eval kl", "eval needle", "eval perplexity", "bench switch"];
    assert_eq!(found, commands, "kinds");
}

#[test]
fn measured_over_predicted_is_their_ratio() {
    let records = [read("device.json", &ceilings("GPU")), read("m.json", &metrics("GPU", vec![session("full")]))];
    let report = joined(&records);
    assert_eq!(figure(&report, Metric::CacheBytes), (CACHE as f64, Some(CACHE as f64), Some(1.0)), "bytes");
    assert_eq!(figure(&report, Metric::Sessions), (10.0, Some(10.0), Some(1.0)), "ten and a half fit");
    // Weights but the norms, and the cache, at 1 GB/s.
    let (measured, predicted, ratio) = figure(&report, Metric::DecodeS);
    let expected = (2.0 * 134_515_008.0 + CACHE as f64) / 1e9;
    let predicted = predicted.expect("there is a device record");
    assert!((predicted / expected - 1.0).abs() < 1e-3, "{predicted} s, not {expected} s");
    assert_eq!((measured, ratio), (1.0, Some(1.0 / predicted)), "decode");
    // At 1 GB/s out and 2 GB/s back 1.5 units of CACHE are predicted; 2.5 were measured.
    let (_, predicted, ratio) = figure(&report, Metric::SwitchS);
    assert!((predicted.expect("a link") / (1.5 * CACHE as f64 / 1e9) - 1.0).abs() < 1e-9, "{predicted:?}");
    assert!((ratio.expect("both") - 2.5 / 1.5).abs() < 1e-9, "{ratio:?}");
    let batch = figure(&report, Metric::BatchS).1.expect("predicted");
    assert!(batch > figure(&report, Metric::DecodeS).1.expect("predicted"), "four caches are read");
}

#[test]
fn a_record_of_another_device_predicts_nothing() {
    let session = || vec![session("full")];
    let records = [read("other.json", &ceilings("Other GPU")), read("m.json", &metrics("GPU", session()))];
    let report = joined(&records);
    assert_eq!(figure(&report, Metric::DecodeS), (1.0, None, None), "not the other one's");
    assert!(report.gaps.is_empty(), "nothing to compare with: {:?}", report.gaps);
    assert!(report.groups[0].not_predicted.as_ref().is_some_and(|why| why.contains("bench device")), "it says so");
    assert!(report.to_string().contains("predicted from nothing"), "{report}");
    // A GPU that has a preset is predicted at its peak, and that is said.
    let report = joined(&[read("m.json", &metrics("NVIDIA H100 80GB HBM3", session()))]);
    assert!(figure(&report, Metric::DecodeS).2.is_some_and(|ratio| ratio > 1000.0), "an H100 takes no second");
    assert!(report.to_string().contains("the peaks of NVIDIA H100 SXM"), "{report}");
    // Two devices are two groups.
    let records = [read("a", &metrics("GPU", session())), read("b", &metrics("GPU 2", session()))];
    assert_eq!(joined(&records).groups.len(), 2, "one for each device");
}

#[test]
fn a_quick_record_serves_only_where_there_is_no_other() {
    let quick = CeilingsReport { quick: true, ..ceilings("GPU") };
    let measured = metrics("GPU", vec![session("full")]);
    let both = joined(&[read("quick.json", &quick), read("device.json", &ceilings("GPU")), read("m", &measured)]);
    let from = |report: &RecordsReport| report.devices[0].predicted_from.clone().unwrap_or_default();
    assert_eq!(from(&both), "the ceilings measured in device.json", "the careful one");
    let only = joined(&[read("quick.json", &quick), read("m", &measured)]);
    assert!(from(&only).contains("quick.json") && from(&only).contains("no figures to rely on"), "{}", from(&only));
}

#[test]
fn quality_is_joined_and_unknown_where_nobody_measured_it() {
    let name = "GPU";
    let records = [
        read("m", &metrics(name, vec![session("full"), session("kivi4")])),
        read("kl", &kl(name, &[("full", 0.0), ("kivi4", 0.02)])),
        read("needle", &needle(name)),
        read("nll", &perplexity(name)),
        read("elsewhere", &kl("Other GPU", &[("kivi4", 9.0)])),
    ];
    let report = joined(&records);
    let of = |compression: &str| {
        let found = report.groups.iter().find(|g| g.device.starts_with("GPU") && g.short() == compression);
        found.unwrap_or_else(|| panic!("{compression} in {:?}", report.groups)).quality.clone()
    };
    let (full, kivi4) = (of("f16"), of("kivi4"));
    assert_eq!((full.mean_kl, full.needles, full.nll), (Some(0.0), Some((7, 9)), Some(2.25)), "the full cache");
    assert_eq!((kivi4.mean_kl, kivi4.needles, kivi4.nll), (Some(0.02), None, Some(2.5)), "kivi4");
    assert!(report.to_string().contains("unknown"), "what nobody measured is said: {report}");
}

#[test]
fn the_widest_gap_of_each_metric_is_a_sentence() {
    let far = SessionMetrics { decode_token_s: of(3.0), ..session("kivi4") };
    let records = [read("d", &ceilings("GPU")), read("m.json", &metrics("GPU", vec![session("full"), far]))];
    let gaps = joined(&records).gaps;
    let decode: Vec<_> = gaps.iter().filter(|gap| gap.starts_with("decode, a token")).collect();
    let [decode] = &decode[..] else { panic!("one sentence for a metric: {gaps:?}") };
    for part in ["over kivi4 on GPU, vulkan", "measured 3.00 s", "bandwidth (weights)", "(m.json)"] {
        assert!(decode.contains(part), "'{part}' in {decode}");
    }
    // What agrees is no gap: bytes of the full cache do, those of kivi4 were set to the same and do not.
    assert!(gaps.iter().any(|gap| gap.starts_with("bytes of the cache") && gap.contains("kivi4")), "{gaps:?}");
    let agree = joined(&[read("d", &ceilings("GPU")), read("m", &metrics("GPU", vec![session("full")]))]);
    assert!(agree.gaps.iter().all(|gap| !gap.starts_with("bytes") && !gap.starts_with("sessions")), "{:?}", agree.gaps);
}

#[test]
fn what_is_no_record_is_refused_with_the_reason() {
    let whole = serde_json::to_vec(&metrics("GPU", vec![session("full")])).expect("JSON");
    assert!(parse("whole", &whole).is_ok(), "a good one");
    let refused = |text: &[u8]| parse("file", text).expect_err("no record");
    assert!(refused(&whole[..whole.len() / 2]).contains("no whole JSON"), "cut off");
    assert!(refused(b"\xff\xfe").contains("no whole JSON"), "no text");
    assert!(refused(b"[1, 2]").contains("no record of concertina"), "somebody else's");
    let other = json!({"program": {"name": "vllm"}});
    assert_eq!(refused(other.to_string().as_bytes()), "it was written by vllm, not by concertina", "another program");
    let codecs = json!({"program": {"name": "concertina"}, "codecs": []});
    assert!(refused(codecs.to_string().as_bytes()).contains("fields codecs, program"), "nothing to compare");
    let mut lacks = serde_json::to_value(metrics("GPU", vec![session("full")])).expect("JSON");
    let row = lacks.pointer_mut("/results/0").and_then(serde_json::Value::as_object_mut).expect("a row");
    row.remove("decode_token_s");
    assert!(refused(lacks.to_string().as_bytes()).contains("decode_token_s"), "the field is named");
}

#[test]
fn runs_count_where_all_sessions_have_one_compression() {
    let run = |second: &str| {
        let session = |compression: &str| {
            let compression = compression.parse::<Compression>().expect("a compression").to_string();
            json!({"compression": compression, "prompt_tokens": 1000})
        };
        json!({
            "program": {"name": "concertina"},
            "device": {"adapter": {"name": "GPU", "backend": "vulkan"}},
            "model": model(),
            "settings": {"page_tokens": 64, "chunk_tokens": 128},
            "sessions": [session("full"), session(second)],
            "metrics": {
                "concurrency": {"resident_max": 2, "capacity_bytes": 2 * CACHE + 100},
                "prefill": {"tokens_per_s": 100.0},
                "decode": {"decode_tokens": 39, "steps": 20, "step_ms": 500.0},
                "context_switch": {"sessions_waited": 1},
                "service": {"switch_s": {"p50": 0.5, "p95": 0.5, "p99": 0.5}}
            }
        })
    };
    let report = joined(&[read("d", &ceilings("GPU")), read("run.json", &run("full"))]);
    assert_eq!(figure(&report, Metric::PrefillS).0, 10.0, "1000 tokens at 100 a second");
    assert_eq!(figure(&report, Metric::BatchS).0, 0.5, "a step");
    assert_eq!(
        report.groups[0].figures.iter().find(|f| f.metric == Metric::BatchS).map(|f| f.sessions),
        Some(2),
        "rows"
    );
    assert_eq!(figure(&report, Metric::SwitchS).0, 1.0, "out and back");
    assert_eq!(figure(&report, Metric::Sessions), (2.0, Some(2.0), Some(1.0)), "somebody waited: it was full");
    let mixed = read("run.json", &run("kivi4"));
    assert!(matches!(mixed.body, Body::Run(..)), "a run");
    assert!(joined(&[mixed]).groups.is_empty(), "sums of two compressions say nothing of one");
}

#[test]
fn the_page_holds_everything_and_loads_nothing() {
    let name = "GPU <script src=\"http://x/y.js\"> & Co";
    let records = [
        read("d", &ceilings(name)),
        read("m", &metrics(name, vec![session("full"), session("kivi4"), session("int8")])),
        read("kl", &kl(name, &[("full", 0.0), ("kivi4", 0.02), ("int8", 0.001)])),
    ];
    let refused = vec![Refused { file: "bad<.json".to_owned(), reason: "no & JSON".to_owned() }];
    let page = join(&records, refused).page();
    assert_eq!(faults(&page), None, "{page}");
    for part in
        ["<svg class=\"plot\"", "class=\"measured\"", "kivi4", "Largest gaps", "bad&lt;.json: no &amp; JSON", "2.00e-2"]
    {
        assert!(page.contains(part), "'{part}' should be in the page");
    }
}
