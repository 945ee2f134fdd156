//! The bench of kernels: what it measures is right, and a figure whose result is wrong is refused.

mod common;

use concertina::compression::hidden::HiddenCodec;
use concertina::device::Device;
use concertina::engine::bench::append::{AppendRun, AppendSpec};
use concertina::engine::bench::cache::CacheSpec;
use concertina::engine::bench::decode::DecodeRun;
use concertina::engine::bench::gather::GatherRun;
use concertina::engine::bench::merge::{MergeRun, MergeSpec};
use concertina::engine::bench::prefill::{PrefillCase, PrefillRun};
use concertina::engine::bench::product::{ProductRun, ProductSpec};
use concertina::engine::bench::score::{ScoreRun, ScoreSpec};
use concertina::engine::bench::seal::{SealRun, SealSpec};
use concertina::engine::bench::select::{SelectRun, SelectSpec};
use concertina::engine::bench::{BenchSettings, KernelRun, TimedRuns};
use concertina::eval::kernels::{Candidates, Case, Figures, KernelBench, KernelRow, Outcome, Protocol, Roof};
use concertina::geometry::{Bytes, HeadGeometry};
use concertina::kernels::PipelineCache;
use concertina::kernels::attention::CacheShape;

const HOT: BenchSettings = BenchSettings { cold: Bytes::ZERO, in_order: false, max_arena: None };
const HARDLY: Protocol = Protocol { warm_up: 0.0, most_warm_up: 0.0, samples: 3, least: 3, seconds: 0.0 };
const ROOF: Roof = Roof { read_bytes_per_s: 1e9, copy_bytes_per_s: 1e9, flop_per_s: 1e9 };

fn shape(page_size: u32) -> CacheShape {
    CacheShape { heads: HeadGeometry { num_qo_heads: 6, num_kv_heads: 2, head_dim: 64 }, page_size }
}

fn codec(text: &str) -> HiddenCodec {
    text.parse().expect("a codec")
}

/// Contexts that end within a page, on its edge, and after its first token.
fn ragged(text: &str, page_size: u32) -> CacheSpec {
    CacheSpec { shape: shape(page_size), codec: codec(text), contexts: vec![700, 4 * page_size, 2 * page_size + 1, 1] }
}

fn decode(device: &Device, spec: &CacheSpec, settings: &BenchSettings) -> DecodeRun {
    DecodeRun::new(device, &mut PipelineCache::default(), spec, settings).expect("a small cache fits")
}

fn once(device: &'static Device, run: &dyn KernelRun, copy: usize) {
    let mut runs = TimedRuns::new(device).expect("a timer");
    let times = runs.run(run, copy, 1).expect("it runs");
    assert_eq!(times.len(), 1, "one run, one time");
}

/// What the harness says of a run as it is.
fn outcome(device: &'static Device, run: &mut dyn KernelRun) -> Outcome {
    let runs = TimedRuns::new(device).expect("a timer");
    KernelBench::new(runs, HOT, HARDLY, ROOF).candidate(run, 0).expect("the device works")
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn decode_over_every_kind_of_page_is_right_and_spoiled_pages_are_found_gpu() {
    let device = common::device();
    for (text, page_size) in [("f16", 64), ("int8", 64), ("kivi4", 64), ("kivi4:128", 128)] {
        let spec = ragged(text, page_size);
        let mut run = decode(device, &spec, &HOT);
        let Outcome::Measured(Figures { seconds, bytes, pairs_per_s, .. }) = outcome(device, &mut run) else {
            panic!("{text} should be right");
        };
        assert_eq!(seconds.n, 3, "{text}: samples");
        let tokens: u32 = spec.contexts.iter().sum();
        // Two KV heads; keys and values of 64 channels.
        let cache = f64::from(tokens * 2 * 128) * 2.0;
        assert_eq!(bytes > cache, text == "f16", "{text}: {bytes} bytes, {cache} in f16");
        assert!(pairs_per_s.is_some_and(|pairs| pairs.is_finite() && pairs > 0.0), "{text}: pairs");
        run.spoil(device, 0).expect("a page is overwritten");
        let Outcome::Wrong(why) = outcome(device, &mut run) else { panic!("{text}: a spoiled page should be found") };
        assert!(why.contains("times its bound") || why.contains("not finite"), "{text}: {why}");
    }
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn outputs_that_no_run_wrote_are_found_gpu() {
    let device = common::device();
    let mut run = decode(device, &ragged("f16", 64), &HOT);
    run.poison(device).expect("it is written");
    let checked = run.check(device, 0).expect("it is read");
    // Four rows of 6 heads with 64 channels and a log-sum-exp.
    assert_eq!(checked.missing, 4 * 6 * 65, "every number is missing");
    once(device, &run, 0);
    let checked = run.check(device, 0).expect("it is read");
    assert_eq!((checked.missing, checked.compared), (0, 4 * 3 * 64), "now none is");
    assert!(checked.error_over_bound <= 1.0, "{checked:?}");
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn runs_take_turns_over_copies_and_pages_spill_over_arenas_gpu() {
    let device = common::device();
    let spec = ragged("kivi4", 64);
    // Open pages of 16 KiB make slabs of 1 MiB.
    let settings = BenchSettings { cold: Bytes::mib(3), max_arena: Some(Bytes::mib(1)), in_order: false };
    let mut run = decode(device, &spec, &settings);
    assert!(run.copies() > 2 && run.arenas() > 2, "{} copies, {} arenas", run.copies(), run.arenas());
    run.poison(device).expect("it is written");
    for copy in [0, run.copies() - 1] {
        once(device, &run, copy);
        assert!(run.check(device, copy).expect("it is read").error_over_bound <= 1.0, "copy {copy}");
    }
    // Copies differ in what they hold, so the reference of another one does not fit.
    assert!(run.check(device, 0).expect("it is read").error_over_bound > 1.0, "each copy has pages of its own");
    let mut ordered = decode(device, &spec, &BenchSettings { in_order: true, ..HOT });
    once(device, &ordered, 0);
    assert!(ordered.check(device, 0).expect("it is read").error_over_bound <= 1.0, "pages in order");
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn every_launch_of_prefill_is_right_and_spoiled_pages_are_found_gpu() {
    let device = common::device();
    // A whole prompt in f16, and the open page of sequences whose other pages are sealed.
    let cases =
        [("f16", vec![150], 150), ("f16", vec![300, 90], 70), ("kivi4", vec![256, 128], 64), ("int8", vec![200], 8)];
    for (text, contexts, rows) in cases {
        let case = PrefillCase { cache: CacheSpec { shape: shape(64), codec: codec(text), contexts }, rows };
        let mut pipelines = PipelineCache::default();
        let mut run = PrefillRun::new(device, &mut pipelines, &case, &HOT).expect("a small cache fits");
        assert!(run.candidates().len() > 4, "{text}: {:?}", run.candidates());
        for candidate in 0..run.candidates().len() {
            run.choose(device, &mut pipelines, candidate).expect("it compiles");
            run.poison(device).expect("it is written");
            once(device, &run, 0);
            let checked = run.check(device, 0).expect("it is read");
            let right = checked.missing == 0 && checked.compared > 0 && checked.error_over_bound <= 1.0;
            assert!(right, "{text}, {rows} rows, {}: {checked:?}", run.candidates()[candidate]);
        }
        run.spoil(device, 0).expect("a page is overwritten");
        assert!(matches!(outcome(device, &mut run), Outcome::Wrong(_)), "{text}: a spoiled page should be found");
    }
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn every_layout_of_a_product_is_right_and_spoiled_weights_are_found_gpu() {
    let device = common::device();
    let mut pipelines = PipelineCache::default();
    let spec = ProductSpec { rows: 136, k: 72, cols: 200, decode: false };
    let mut run = ProductRun::new(device, &mut pipelines, &spec, &HOT).expect("a small product fits");
    for candidate in 0..run.candidates().len() {
        run.choose(device, &mut pipelines, candidate).expect("it compiles");
        run.poison(device).expect("it is written");
        once(device, &run, 0);
        let checked = run.check(device, 0).expect("it is read");
        let right = checked.missing == 0 && checked.compared > 3000 && checked.error_over_bound <= 1.0;
        assert!(right, "{}: {checked:?}", run.candidates()[candidate]);
    }
    run.spoil(device, 0).expect("weights are overwritten");
    assert!(matches!(outcome(device, &mut run), Outcome::Wrong(_)), "spoiled weights should be found");
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn merging_alone_is_right_and_a_spoiled_state_is_found_gpu() {
    let device = common::device();
    let spec = MergeSpec { shape: shape(64), rows: 5, states: 9 };
    let mut run = MergeRun::new(device, &mut PipelineCache::default(), &spec, &HOT).expect("a few states fit");
    let right = outcome(device, &mut run);
    assert!(matches!(right, Outcome::Measured(_)), "{right:?}");
    run.spoil(device, 0).expect("a state is overwritten");
    assert!(matches!(outcome(device, &mut run), Outcome::Wrong(_)), "a spoiled state is found");
}

/// A run that is right in the harness, over two copies in turn, and refused once an input is another one.
#[track_caller]
fn right_until_spoiled(device: &'static Device, run: &mut dyn KernelRun, what: &str) -> Figures {
    let Outcome::Measured(figures) = outcome(device, run) else { panic!("{what} should be right") };
    assert!(figures.bytes > 0.0 && figures.of_copy.is_some() == run.copies(), "{what}: {figures:?}");
    run.poison(device).expect("outputs are overwritten");
    for copy in [0, 1] {
        once(device, run, copy);
        let checked = run.check(device, copy).expect("it is read");
        assert!(checked.missing == 0 && checked.error_over_bound <= 1.0, "{what}, copy {copy}: {checked:?}");
    }
    run.poison(device).expect("outputs are overwritten");
    let unwritten = run.check(device, 0).expect("it is read");
    assert!(unwritten.missing > 0 || unwritten.error_over_bound > 1.0, "{what}, not run: {unwritten:?}");
    run.spoil(device, 0).expect("an input is overwritten");
    let spoiled = outcome(device, run);
    assert!(matches!(spoiled, Outcome::Wrong(_)), "{what}, spoiled: {spoiled:?}");
    figures
}

/// Inputs twice.
const TWICE: BenchSettings = BenchSettings { cold: Bytes(1), in_order: false, max_arena: None };

fn twice(bytes_of_one: u64) -> BenchSettings {
    BenchSettings { cold: Bytes(bytes_of_one + 1), ..TWICE }
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn products_of_few_rows_are_right_and_spoiled_weights_are_found_gpu() {
    let device = common::device();
    let mut pipelines = PipelineCache::default();
    for rows in [1, 3, 21] {
        let spec = ProductSpec { rows, k: 264, cols: 200, decode: true };
        let mut run = ProductRun::new(device, &mut pipelines, &spec, &twice(264 * 200 * 2)).expect("it fits");
        let figures = right_until_spoiled(device, &mut run, &format!("{rows} rows"));
        assert_eq!(figures.flop, f64::from(2 * rows * 264 * 200), "two of every weight");
    }
    let spec = ProductSpec { rows: 16, k: 264, cols: 200, decode: true };
    let mut run = ProductRun::new(device, &mut pipelines, &spec, &HOT).expect("it fits");
    assert!(run.candidates().len() > 4, "{:?}", run.candidates());
    right_however_launched(device, &mut pipelines, &mut run);
}

/// Every layout of the tuning gives the same result.
fn right_however_launched(device: &'static Device, pipelines: &mut PipelineCache, run: &mut dyn KernelRun) {
    let labels = run.candidates();
    assert!(labels.len() > 1, "{labels:?}");
    for (candidate, label) in labels.iter().enumerate() {
        run.choose(device, pipelines, candidate).expect("it compiles");
        run.poison(device).expect("outputs are overwritten");
        once(device, run, 0);
        let checked = run.check(device, 0).expect("it is read");
        assert!(checked.missing == 0 && checked.error_over_bound <= 1.0, "{label}: {checked:?}");
    }
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn what_moves_pages_is_right_and_spoiled_pages_are_found_gpu() {
    let device = common::device();
    let mut pipelines = PipelineCache::default();
    let spec = AppendSpec { shape: shape(64), pages: 2 };
    let bytes = 128 * (6 + 4) * 64 * 4 + 128 * 2 * 128 * 2;
    let mut run = AppendRun::new(device, &mut pipelines, &spec, &twice(bytes)).expect("it fits");
    right_until_spoiled(device, &mut run, "append");
    for text in ["int8", "kivi4", "rot4"] {
        let spec = SealSpec { shape: shape(64), codec: codec(text), pages: 20 };
        let mut run = SealRun::new(device, &mut pipelines, &spec, &twice(20 * 64 * 128 * 4)).expect("it fits");
        right_until_spoiled(device, &mut run, &format!("seal, {text}"));
    }
    for text in ["f16", "kivi4", "f32", "k:int8,v:f16", "kivi2"] {
        let spec = ragged(text, 64);
        let arena = Bytes::mib(if text == "f32" { 2 } else { 1 });
        let settings = BenchSettings { cold: Bytes::mib(2), max_arena: Some(arena), in_order: false };
        let mut run = GatherRun::new(device, &mut pipelines, &spec, &settings).expect("it fits");
        right_however_launched(device, &mut pipelines, &mut run);
        right_until_spoiled(device, &mut run, &format!("gather, {text}"));
    }
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn what_ranks_tokens_is_right_and_spoiled_inputs_are_found_gpu() {
    let device = common::device();
    let mut pipelines = PipelineCache::default();
    // Rotated keys have a text of their own; 57 pairs are less than a tile, 150 more than one.
    for (text, rows) in [("f16", 19), ("kivi4", 50), ("rot4", 19)] {
        let cache = CacheSpec { shape: shape(64), codec: codec(text), contexts: vec![700] };
        let spec = ScoreSpec { cache, rows };
        let settings = BenchSettings { cold: Bytes::mib(2), max_arena: Some(Bytes::mib(1)), in_order: false };
        let mut run = ScoreRun::new(device, &mut pipelines, &spec, &settings).expect("it fits");
        right_however_launched(device, &mut pipelines, &mut run);
        right_until_spoiled(device, &mut run, &format!("score, {text}"));
        let too_many = ScoreSpec { rows: 701, ..spec };
        let error = ScoreRun::new(device, &mut pipelines, &too_many, &HOT).expect_err("more rows than tokens");
        assert!(error.to_string().contains("at most"), "{error}");
    }
    let spec = SelectSpec { lists: 5, tokens: 1000, kept: 300 };
    let mut run = SelectRun::new(device, &mut pipelines, &spec, &twice(2 * 4 * 5000)).expect("it fits");
    right_until_spoiled(device, &mut run, "select");
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn rows_say_what_was_measured_or_why_not_gpu() {
    let device = common::device();
    let case = |text: &str, page_size: u32| {
        let spec = ragged(text, page_size);
        Case {
            kernel: "decode",
            shape: "ragged".to_owned(),
            codec: Some(spec.codec),
            prepare: Box::new(move |device, pipelines, settings| {
                Ok(Box::new(DecodeRun::new(device, pipelines, &spec, settings)?))
            }),
        }
    };
    let mut bench = KernelBench::new(TimedRuns::new(device).expect("a timer"), HOT, HARDLY, ROOF);
    let mut rows: Vec<KernelRow> = Vec::new();
    // Groups of 128 tokens do not fit pages of 64.
    for case in [case("f16", 64), case("kivi4", 64), case("kivi4:128", 64)] {
        bench.case(&case, Candidates::Chosen, &mut |row| rows.push(row)).expect("the device works");
    }
    let ratio = |row: &KernelRow| match &row.outcome {
        Outcome::Measured(figures) => figures.to_f16,
        _ => None,
    };
    assert_eq!(ratio(&rows[0]), Some(1.0), "f16 against itself: {rows:?}");
    assert!(ratio(&rows[1]).is_some_and(|ratio| ratio > 0.0), "kivi4 against f16: {rows:?}");
    let Outcome::Failed(why) = &rows[2].outcome else { panic!("{:?} should not run", rows[2]) };
    assert!(why.contains("do not hold whole groups of 128"), "{why}");
}
