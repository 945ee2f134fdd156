//! Records: the JSON that commands write, read again. Of each the fields that a comparison needs; its kind is told by its fields.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::eval::metrics::SessionMetrics;
use crate::eval::spread::Spread;
use crate::geometry::{Bytes, ModelGeometry};

/// A record.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Where it was read from, for people.
    pub file: String,
    /// The device that ran, by its adapter's name and its API.
    pub device: String,
    /// What it says.
    pub body: Body,
}

/// What a record says.
#[derive(Clone, Debug, PartialEq)]
pub enum Body {
    /// `bench device`.
    Ceilings(Ceilings),
    /// `bench metrics`.
    Metrics(Model, Metrics),
    /// `bench switch`.
    Switch(Model, Switches),
    /// `run`.
    Run(Model, Run),
    /// `eval kl`.
    Kl(Model, Vec<KlRow>),
    /// `eval needle`.
    Needle(Model, Vec<NeedleRow>),
    /// `eval perplexity`.
    Perplexity(Model, Vec<NllRow>),
}

impl Body {
    /// The command that writes such a record.
    pub const fn command(&self) -> &'static str {
        match self {
            Self::Ceilings(_) => "bench device",
            Self::Metrics(..) => "bench metrics",
            Self::Switch(..) => "bench switch",
            Self::Run(..) => "run",
            Self::Kl(..) => "eval kl",
            Self::Needle(..) => "eval needle",
            Self::Perplexity(..) => "eval perplexity",
        }
    }

    /// The model that ran, where one did.
    pub const fn model(&self) -> Option<&Model> {
        match self {
            Self::Ceilings(_) => None,
            Self::Metrics(model, _)
            | Self::Switch(model, _)
            | Self::Run(model, _)
            | Self::Kl(model, _)
            | Self::Needle(model, _)
            | Self::Perplexity(model, _) => Some(model),
        }
    }
}

/// The model of a record.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Model {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub geometry: ModelGeometry,
    /// Bytes of its weights on the device.
    pub weights_bytes: Option<Bytes>,
}

/// The fields of `bench device`.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
pub struct Ceilings {
    /// Whether it was measured for tests.
    pub quick: bool,
    /// Bytes of device memory read per second.
    pub read_bytes_per_s: Spread,
    /// Bytes per second to the host.
    pub out_bytes_per_s: Spread,
    /// Bytes per second from the host.
    pub back_bytes_per_s: Spread,
    /// FLOP per second of products.
    pub flop_per_s: Spread,
}

/// The fields of `bench metrics`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Metrics {
    /// Of what was measured in part.
    pub scaled: Option<ScaledWords>,
    /// Tokens of a page.
    pub page_tokens: u32,
    /// Rows of a prompt step.
    pub chunk_tokens: u32,
    /// The sessions.
    pub results: Vec<SessionMetrics>,
}

/// How it was scaled.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct ScaledWords {
    /// In words.
    pub words: String,
}

/// The fields of `bench switch`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Switches {
    /// Tokens of the cache.
    pub tokens: u32,
    /// One per compression.
    pub results: Vec<SwitchRow>,
}

/// One compression of `bench switch`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct SwitchRow {
    /// What was done to the cache.
    pub compression: String,
    /// To the host.
    pub out: OneWay,
    /// Back.
    pub back: OneWay,
}

/// One direction.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
pub struct OneWay {
    /// Seconds with nothing beside it.
    pub alone_s: f64,
}

/// The fields of `run`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Run {
    /// How it ran.
    pub settings: RunSettings,
    /// The sessions.
    pub sessions: Vec<RunSession>,
    /// The four metrics.
    pub metrics: RunMetrics,
}

/// Settings of `run`.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
pub struct RunSettings {
    /// Tokens of a page.
    pub page_tokens: u32,
    /// Rows of a step.
    pub chunk_tokens: u32,
}

/// A session of `run`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct RunSession {
    /// What was done to its cache.
    pub compression: String,
    /// Tokens of its first prompt.
    pub prompt_tokens: u64,
}

/// Metrics of `run`.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
pub struct RunMetrics {
    /// Sessions at once.
    pub concurrency: RunConcurrency,
    /// Steps with prompt rows.
    pub prefill: RunPrefill,
    /// Steps without.
    pub decode: RunDecode,
    /// Sessions that changed places.
    pub context_switch: RunSwitch,
    /// What users saw.
    pub service: RunService,
}

/// Sessions at once.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
pub struct RunConcurrency {
    /// Most that held pages at once.
    pub resident_max: u64,
    /// Bytes for pages.
    pub capacity_bytes: Bytes,
}

/// Steps with prompt rows.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
pub struct RunPrefill {
    /// Prompt tokens per second.
    pub tokens_per_s: Option<f64>,
}

/// Steps without prompt rows.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
pub struct RunDecode {
    /// Tokens.
    pub decode_tokens: u64,
    /// Steps.
    pub steps: u64,
    /// Time of a step in milliseconds.
    pub step_ms: Option<f64>,
}

/// Sessions that changed places.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
pub struct RunSwitch {
    /// Sessions that waited for room.
    pub sessions_waited: u64,
}

/// What users saw.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
pub struct RunService {
    /// Time of a cache's move one way, in seconds.
    pub switch_s: Option<Median>,
}

/// A median.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
pub struct Median {
    /// It.
    pub p50: f64,
}

/// A compression of `eval kl`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct KlRow {
    /// What was done to the cache.
    pub compression: String,
    /// Mean KL from the full cache, in nats.
    pub mean_kl: f64,
    /// Negative log-likelihood of the text, in nats.
    pub nll: f64,
}

/// A compression of `eval needle`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct NeedleRow {
    /// What was done to the cache.
    pub compression: String,
    /// Right answers.
    pub right: u64,
    /// Of so many.
    pub asked: u64,
}

/// A compression of `eval perplexity`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct NllRow {
    /// What was done to the cache.
    pub compression: String,
    /// Mean negative log-likelihood, in nats.
    pub mean_nll: f64,
}

#[derive(Deserialize)]
struct Rows<T> {
    results: Vec<T>,
}

/// The name of this program in a record.
const PROGRAM: &str = env!("CARGO_PKG_NAME");

/// Reads a record of any kind.
///
/// # Errors
/// A sentence with the reason for a file that is no JSON, of another program, of no kind that counts, or that lacks fields.
pub fn parse(file: &str, text: &[u8]) -> Result<Record, String> {
    let value: Value = serde_json::from_slice(text).map_err(|e| format!("it is no whole JSON text: {e}"))?;
    let program = value.pointer("/program/name").and_then(Value::as_str);
    match program {
        Some(PROGRAM) => {}
        Some(other) => return Err(format!("it was written by {}, not by {PROGRAM}", one_line(other))),
        None => return Err(format!("it is no record of {PROGRAM}: program.name is missing")),
    }
    let body = body(&value)?;
    let name = text_at(&value, "/device/adapter/name")?;
    let backend = text_at(&value, "/device/adapter/backend")?;
    Ok(Record { file: file.to_owned(), device: format!("{name}, {backend}"), body })
}

fn body(value: &Value) -> Result<Body, String> {
    let has = |pointer: &str| value.pointer(pointer).is_some();
    let kind = value.get("kind").and_then(Value::as_str);
    let model = || part::<Model>(&value["model"]).map_err(|e| format!("its model: {e}"));
    Ok(match kind {
        Some("bench device") => Body::Ceilings(part(value)?),
        Some("bench metrics") => Body::Metrics(model()?, part(value)?),
        Some(other) => return Err(format!("a record of '{}' holds nothing to compare", one_line(other))),
        None if has("/metrics/concurrency") => Body::Run(model()?, part(value)?),
        None if has("/chunk_bytes") && has("/decoding") => Body::Switch(model()?, part(value)?),
        None if has("/settings/prefix_tokens") => Body::Kl(model()?, part::<Rows<_>>(value)?.results),
        None if has("/cases") && has("/depths") => Body::Needle(model()?, part::<Rows<_>>(value)?.results),
        None if has("/text_tokens") && has("/results/0/mean_nll") => {
            Body::Perplexity(model()?, part::<Rows<_>>(value)?.results)
        }
        None => {
            let fields: Vec<_> = value.as_object().into_iter().flat_map(|object| object.keys().cloned()).collect();
            return Err(format!("a record with the fields {} holds nothing to compare", fields.join(", ")));
        }
    })
}

/// Fields of a record; what is missing or of another type is named.
fn part<T: DeserializeOwned>(value: &Value) -> Result<T, String> {
    T::deserialize(value).map_err(|e| e.to_string())
}

fn text_at<'a>(value: &'a Value, pointer: &str) -> Result<&'a str, String> {
    let found = value.pointer(pointer).and_then(Value::as_str);
    found.ok_or_else(|| format!("it does not say {}", pointer.trim_start_matches('/').replace('/', ".")))
}

/// Somebody else's words, short and in one line.
fn one_line(words: &str) -> String {
    words.chars().take(40).map(|c| if c.is_control() { '\u{FFFD}' } else { c }).collect()
}
