//! Records joined by model, device and compression: what was measured beside what the theory predicts.

use std::collections::BTreeMap;

use serde::Serialize;

use super::predict::{Basis, predict};
use super::read::{Body, Metrics, Model, Record, Run, Switches};
use crate::compression::Compression;
use crate::eval::metrics::SessionMetrics;
use crate::geometry::Bytes;
use crate::report::Program;
use crate::theory::challenges::{Bound, Challenges, Scene};

/// Everything that records say together.
#[derive(Clone, Debug, Serialize)]
pub struct RecordsReport {
    /// The program.
    pub program: Program,
    /// Records that were read.
    pub records: Vec<Source>,
    /// Files that were refused.
    pub refused: Vec<Refused>,
    /// What predictions for each device are made of.
    pub devices: Vec<DeviceBasis>,
    /// One per model, device and compression.
    pub groups: Vec<Group>,
    /// The largest gaps between what was measured and what was predicted, one per metric, the widest first.
    pub gaps: Vec<String>,
}

/// A record.
#[derive(Clone, Debug, Serialize)]
pub struct Source {
    /// Its file.
    pub file: String,
    /// The command that wrote it.
    pub command: &'static str,
    /// The device that ran.
    pub device: String,
    /// The model that ran, and what of it.
    pub model: Option<String>,
    /// What was measured in part, in words.
    pub scaled: Option<String>,
}

/// A file that is no record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Refused {
    /// Its name.
    pub file: String,
    /// Why.
    pub reason: String,
}

/// A device and where its predictions come from.
#[derive(Clone, Debug, Serialize)]
pub struct DeviceBasis {
    /// The device.
    pub device: String,
    /// In words; `null` where nothing is predicted.
    pub predicted_from: Option<String>,
}

/// A model on a device under a compression.
#[derive(Clone, Debug, Serialize)]
pub struct Group {
    /// The model.
    pub model: String,
    /// The device.
    pub device: String,
    /// What is done to caches, in the form that `--compress` reads.
    pub compression: String,
    /// What was measured.
    pub figures: Vec<Figure>,
    /// Why something is not predicted.
    pub not_predicted: Option<String>,
    /// What the compression costs in quality.
    pub quality: Quality,
}

/// What a compression costs, each the last record's; `null` is unknown.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Quality {
    /// Mean KL from the full cache, in nats.
    pub mean_kl: Option<f64>,
    /// Right answers about needles, and of how many.
    pub needles: Option<(u64, u64)>,
    /// Negative log-likelihood per token, in nats.
    pub nll: Option<f64>,
}

/// A metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Bytes of a session's cache.
    CacheBytes,
    /// Sessions that fit.
    Sessions,
    /// Seconds of a prompt.
    PrefillS,
    /// Seconds of a token alone.
    DecodeS,
    /// Seconds of a step of several sessions.
    BatchS,
    /// Seconds of a cache out and back.
    SwitchS,
}

/// One metric at one context.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figure {
    /// Which.
    pub metric: Metric,
    /// Tokens of the context; the mean over sessions of a run.
    pub context_tokens: u32,
    /// Sessions in a step.
    pub sessions: u32,
    /// What was measured: bytes, sessions or seconds.
    pub measured: f64,
    /// What the theory predicts.
    pub predicted: Option<f64>,
    /// Measured over predicted.
    pub ratio: Option<f64>,
    /// What binds it, where predicted.
    pub bound: Option<&'static str>,
    /// The record.
    pub file: String,
}

impl Figure {
    /// Measured over predicted, where both are numbers above 0.
    fn ratio(measured: f64, predicted: Option<f64>) -> Option<f64> {
        predicted.map(|predicted| measured / predicted).filter(|ratio| ratio.is_finite() && *ratio > 0.0)
    }
}

/// Joins records; `refused` are files that are none.
pub fn join(records: &[Record], refused: Vec<Refused>) -> RecordsReport {
    let mut names: Vec<&str> = records.iter().map(|record| record.device.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    let bases: BTreeMap<&str, Option<Basis>> =
        names.iter().map(|device| (*device, Basis::of_device(device, records))).collect();
    let mut groups = Groups::default();
    for record in records {
        let basis = bases[record.device.as_str()].as_ref();
        groups.add(record, basis);
    }
    let groups = groups.finish();
    let gaps = gaps(&groups);
    let source = |record: &Record| Source {
        file: record.file.clone(),
        command: record.body.command(),
        device: record.device.clone(),
        model: record.body.model().map(|model| model.name.clone()),
        scaled: match &record.body {
            Body::Metrics(_, metrics) => metrics.scaled.as_ref().map(|scaled| scaled.words.clone()),
            _ => None,
        },
    };
    let devices = bases.iter().map(|(device, basis)| DeviceBasis {
        device: (*device).to_owned(),
        predicted_from: basis.as_ref().map(|basis| basis.words.clone()),
    });
    RecordsReport {
        program: Program::THIS,
        records: records.iter().map(source).collect(),
        refused,
        devices: devices.collect(),
        groups,
        gaps,
    }
}

/// Model, device and compression.
type Key = (String, String, String);

#[derive(Default)]
struct Groups(BTreeMap<Key, Group>);

/// What figures of one session are compared with.
struct Side<'a> {
    model: &'a Model,
    basis: Option<&'a Basis>,
    compression: &'a str,
    scene: Scene,
}

/// Measured figures: metric, sessions, value.
type Values = Vec<(Metric, u32, f64)>;

impl Groups {
    fn group(&mut self, record: &Record, model: &Model, compression: &str) -> &mut Group {
        // Records of one compression may name it in other words.
        let parsed = compression.parse::<Compression>();
        let compression = parsed.map_or_else(|_| compression.to_owned(), |compression| compression.to_string());
        let key = (model.name.clone(), record.device.clone(), compression);
        let (model, device, compression) = key.clone();
        self.0.entry(key).or_insert_with(|| Group {
            model,
            device,
            compression,
            figures: Vec::new(),
            not_predicted: None,
            quality: Quality::default(),
        })
    }

    fn add(&mut self, record: &Record, basis: Option<&Basis>) {
        match &record.body {
            Body::Ceilings(_) => {}
            Body::Metrics(model, metrics) => self.add_metrics(record, model, basis, metrics),
            Body::Switch(model, switches) => self.add_switches(record, model, basis, switches),
            Body::Run(model, run) => self.add_run(record, model, basis, run),
            Body::Kl(model, rows) => {
                for row in rows {
                    let quality = &mut self.group(record, model, &row.compression).quality;
                    (quality.mean_kl, quality.nll) = (Some(row.mean_kl), quality.nll.or(Some(row.nll)));
                }
            }
            Body::Needle(model, rows) => {
                for row in rows {
                    self.group(record, model, &row.compression).quality.needles = Some((row.right, row.asked));
                }
            }
            Body::Perplexity(model, rows) => {
                for row in rows {
                    self.group(record, model, &row.compression).quality.nll = Some(row.mean_nll);
                }
            }
        }
    }

    fn add_metrics(&mut self, record: &Record, model: &Model, basis: Option<&Basis>, metrics: &Metrics) {
        for row in &metrics.results {
            let scene = Scene {
                context_tokens: row.context_tokens,
                memory_bytes: row.capacity_bytes,
                page_tokens: Some(metrics.page_tokens),
                chunk_rows: Some(metrics.chunk_tokens),
                batch: row.batch.map_or(1, |batch| batch.sessions),
            };
            self.compare(record, &Side { model, basis, compression: &row.compression, scene }, of_session(row));
        }
    }

    fn add_switches(&mut self, record: &Record, model: &Model, basis: Option<&Basis>, switches: &Switches) {
        for row in &switches.results {
            let scene = Scene {
                context_tokens: switches.tokens,
                memory_bytes: Bytes::ZERO,
                page_tokens: None,
                chunk_rows: None,
                batch: 1,
            };
            let values = vec![(Metric::SwitchS, 1, row.out.alone_s + row.back.alone_s)];
            self.compare(record, &Side { model, basis, compression: &row.compression, scene }, values);
        }
    }

    /// The sums of a run say something of a compression where all sessions have the same.
    fn add_run(&mut self, record: &Record, model: &Model, basis: Option<&Basis>, run: &Run) {
        let Some(first) = run.sessions.first() else { return };
        if run.sessions.iter().any(|session| session.compression != first.compression) {
            return;
        }
        let tokens: u64 = run.sessions.iter().map(|session| session.prompt_tokens).sum();
        let context = u32::try_from(tokens / run.sessions.len() as u64).unwrap_or(u32::MAX);
        let metrics = run.metrics;
        let decode = metrics.decode;
        let batch = u32::try_from((decode.decode_tokens + decode.steps / 2) / decode.steps.max(1)).unwrap_or(u32::MAX);
        let scene = Scene {
            context_tokens: context,
            memory_bytes: metrics.concurrency.capacity_bytes,
            page_tokens: Some(run.settings.page_tokens),
            chunk_rows: Some(run.settings.chunk_tokens),
            batch: batch.max(1),
        };
        let mut values = Values::new();
        // Where nobody waited, more might have fitted.
        let full = metrics.context_switch.sessions_waited > 0;
        values.extend(full.then_some((Metric::Sessions, 1, metrics.concurrency.resident_max as f64)));
        values.extend(metrics.prefill.tokens_per_s.map(|rate| (Metric::PrefillS, 1, f64::from(context) / rate)));
        values.extend(decode.step_ms.map(|ms| (Metric::BatchS, batch.max(1), ms / 1e3)));
        values.extend(metrics.service.switch_s.map(|switch| (Metric::SwitchS, 1, 2.0 * switch.p50)));
        self.compare(record, &Side { model, basis, compression: &first.compression, scene }, values);
    }

    fn compare(&mut self, record: &Record, side: &Side<'_>, values: Values) {
        let predicted = predict(side.model, side.basis, side.compression, &side.scene);
        let group = self.group(record, side.model, side.compression);
        let predicted = match predicted {
            Ok(challenges) => Some(challenges),
            Err(reason) => {
                group.not_predicted = Some(reason);
                None
            }
        };
        group.figures.extend(values.into_iter().map(|(metric, sessions, measured)| {
            let of_metric = predicted.as_ref().and_then(|challenges| expected(challenges, metric));
            let (predicted, bound) = of_metric.map_or((None, None), |(value, bound)| (Some(value), Some(bound.name())));
            Figure {
                metric,
                context_tokens: side.scene.context_tokens,
                sessions,
                measured,
                predicted,
                ratio: Figure::ratio(measured, predicted),
                bound,
                file: record.file.clone(),
            }
        }));
    }

    fn finish(self) -> Vec<Group> {
        let mut groups: Vec<Group> = self.0.into_values().collect();
        for group in &mut groups {
            group.figures.sort_by_key(|figure| (figure.context_tokens, figure.metric, figure.sessions));
        }
        groups
    }
}

fn of_session(row: &SessionMetrics) -> Values {
    let mut values = vec![
        (Metric::CacheBytes, 1, row.cache_bytes.0 as f64),
        (Metric::Sessions, 1, row.concurrency as f64),
        (Metric::PrefillS, 1, row.prefill_s.median),
        (Metric::DecodeS, 1, row.decode_token_s.median),
        (Metric::SwitchS, 1, row.switch_s()),
    ];
    values.extend(row.batch.map(|batch| (Metric::BatchS, batch.sessions, batch.step_s.median)));
    values
}

/// What the theory says of a metric, and what binds it.
fn expected(challenges: &Challenges, metric: Metric) -> Option<(f64, Bound)> {
    let Challenges { cache, concurrency, prefill, decode, batched, switch_s, .. } = challenges;
    Some(match metric {
        Metric::CacheBytes => (cache.held_bytes.0 as f64, Bound::Memory),
        Metric::Sessions => (*concurrency as f64, Bound::Memory),
        Metric::PrefillS => (prefill.seconds, prefill.bound),
        Metric::DecodeS => (decode.seconds, decode.bound),
        Metric::BatchS => (batched.seconds, batched.bound),
        Metric::SwitchS => ((*switch_s)?, Bound::Link),
    })
}

/// Ratios within this of 1 are no gap.
const NEAR: f64 = 1.02;

/// The widest gap of each metric in a sentence, the widest first.
fn gaps(groups: &[Group]) -> Vec<String> {
    let mut widest: BTreeMap<Metric, (f64, String)> = BTreeMap::new();
    for group in groups {
        for figure in &group.figures {
            let Some(ratio) = figure.ratio.filter(|ratio| ratio.max(ratio.recip()) > NEAR) else { continue };
            let width = ratio.ln().abs();
            if widest.get(&figure.metric).is_none_or(|(before, _)| width > *before) {
                widest.insert(figure.metric, (width, sentence(group, figure, ratio)));
            }
        }
    }
    let mut found: Vec<(f64, String)> = widest.into_values().collect();
    found.sort_by(|a, b| b.0.total_cmp(&a.0));
    found.into_iter().map(|(_, words)| words).collect()
}

fn sentence(group: &Group, figure: &Figure, ratio: f64) -> String {
    let times = match ratio {
        more if more > 1.0 => format!("{more:.2} times"),
        less => format!("1/{:.2} of", less.recip()),
    };
    format!(
        "{} of {} at {} tokens over {} on {}: measured {}, {times} the {} that were predicted, bound by {} ({})",
        figure.name(),
        group.model,
        figure.context_tokens,
        group.short(),
        group.device,
        figure.metric.write(figure.measured),
        figure.metric.write(figure.predicted.unwrap_or(f64::NAN)),
        figure.bound.unwrap_or("nothing known"),
        figure.file,
    )
}
