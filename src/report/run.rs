//! The report of `run`: sessions over documents under one byte budget.

use serde::Serialize;

use super::{DeviceReport, FourMetrics, ModelReport, Program};
use crate::compression::hidden::HiddenCodec;
use crate::geometry::Bytes;
use crate::kernels::sample::Sampling;
use crate::pool::PoolReport;
use crate::schedule::{Answer, Finish, Phase, Session};

/// Everything that `run` found.
#[derive(Clone, Debug, Serialize)]
pub struct RunReport {
    /// The program.
    pub program: Program,
    /// The device.
    pub device: DeviceReport,
    /// The model.
    pub model: ModelReport,
    /// What was asked for.
    pub settings: RunSettings,
    /// One per document, in the order given.
    pub sessions: Vec<SessionReport>,
    /// One metric per challenge of long context.
    pub metrics: FourMetrics,
    /// The pool after the last session.
    pub pool: PoolReport,
    /// Most bytes of caches that host memory held at once.
    pub host_peak_bytes: Bytes,
    /// Most bytes of caches that files held at once.
    pub disk_peak_bytes: Bytes,
    /// Time of all steps on the clock of the schedule: host time from planning a step to having its tokens.
    pub elapsed_s: f64,
    /// What went wrong on the way, and how the run went on.
    pub faults: FaultsReport,
    /// Whether the run was interrupted; the sessions that had not ended are cancelled.
    pub interrupted: bool,
}

/// Faults of the device that a run went on after.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct FaultsReport {
    /// Times that the device was lost, and another one opened.
    pub device_losses: usize,
    /// Caches that came back from host memory then.
    pub caches_restored: usize,
    /// Caches that were computed again then.
    pub caches_recomputed: usize,
    /// Steps that found no memory on the device, and were taken back and made smaller.
    pub steps_shrunk: usize,
}

/// The arguments of `run` that decide what happens.
#[derive(Clone, Debug, Serialize)]
pub struct RunSettings {
    /// Device bytes for caches, tables, scratch and staging.
    pub kv_budget_bytes: Bytes,
    /// Bytes of host memory for caches that do not fit on the device.
    pub host_budget_bytes: Bytes,
    /// What caches were encoded in before they left, where that made them smaller.
    #[serde(serialize_with = "codec_name")]
    pub swap_codec: Option<HiddenCodec>,
    /// Bytes of files for caches that fit neither on the device nor in host memory.
    pub disk_budget_bytes: Bytes,
    /// Time between an answer and the next question, on the clock of the schedule.
    pub think_s: f64,
    /// Tokens to produce per answer at most.
    pub max_new_tokens: u32,
    /// Longest context.
    pub context_tokens: u32,
    /// Tokens of each document that were used at most; `null` for whole documents.
    pub document_tokens: Option<usize>,
    /// Sessions that may hold pages at once.
    pub max_sessions: u32,
    /// Rows of one step at most.
    pub chunk_tokens: u32,
    /// Tokens of one page.
    pub page_tokens: u32,
    /// How tokens were chosen.
    pub sampling: Sampling,
}

fn codec_name<S: serde::Serializer>(codec: &Option<HiddenCodec>, serializer: S) -> Result<S::Ok, S::Error> {
    codec.map(|codec| codec.to_string()).serialize(serializer)
}

/// One session over one document.
#[derive(Clone, Debug, Serialize)]
pub struct SessionReport {
    /// Path of the document, as given.
    pub document: String,
    /// Questions and answers, in order.
    pub rounds: Vec<RoundReport>,
    /// What was done to its cache, in the form that `--compress` reads.
    pub compression: String,
    /// Tokens of the whole document.
    pub document_tokens: usize,
    /// Of these, tokens that were used.
    pub used_tokens: usize,
    /// Tokens of the first prompt: the used part of the document, the question and the chat template.
    pub prompt_tokens: usize,
    /// Tokens that it did not read, because pages of other sessions held them; counted again where its cache was dropped.
    pub shared_tokens: u64,
    /// Tokens produced in all rounds, those that ended answers included.
    pub new_tokens: usize,
    /// From submission until it got its pages.
    pub waited_s: Option<f64>,
    /// From submission until its first token.
    pub first_token_s: Option<f64>,
    /// Time per token after the first of each answer.
    pub per_token_ms: Option<f64>,
    /// Times that its cache was copied to the host.
    pub swapped_out: u32,
    /// Times that its cache was copied back.
    pub swapped_in: u32,
    /// Times that its cache was dropped, to be computed again.
    pub recomputed: u32,
    /// Times that its cache was compressed harder; `compression` is what it came to.
    pub compressed: u32,
    /// Times that it lost its place in the middle of a round.
    pub preempted: u32,
    /// Bytes of pages that it held at its end.
    pub kv_bytes: Bytes,
    /// Most bytes of its pages that other sessions held too, at once.
    pub kv_shared_bytes: Bytes,
    /// `stop` (it produced a stop token), `length` (it produced as many tokens as it may), `cancelled`, or `running`.
    pub ended_by: &'static str,
    /// What it is called in the folder of sessions; `null` where it was not saved.
    pub saved_as: Option<String>,
    /// Bytes of its file.
    pub saved_bytes: Option<Bytes>,
}

/// A question and its answer.
#[derive(Clone, Debug, Serialize)]
pub struct RoundReport {
    /// What was asked.
    pub question: String,
    /// What the model said.
    pub answer: String,
    /// Tokens produced, the one that ended the answer included.
    pub new_tokens: usize,
    /// From the question until the first token.
    pub first_token_s: Option<f64>,
    /// From the question until the last.
    pub finished_s: Option<f64>,
}

impl RoundReport {
    /// A round; the text of its answer comes from the caller.
    pub fn new(question: String, answer: String, round: &Answer) -> Self {
        Self {
            question,
            answer,
            new_tokens: round.produced.len(),
            first_token_s: round.first_token.map(|t| t.as_secs_f64()),
            finished_s: round.finished.map(|t| t.as_secs_f64()),
        }
    }
}

/// A session's end as reports name it.
pub const fn finish_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Finished(Finish::Stop) => "stop",
        Phase::Finished(Finish::Length) => "length",
        Phase::Finished(Finish::Cancelled) => "cancelled",
        _ => "running",
    }
}

impl SessionReport {
    /// A finished session; its rounds, the tokens of its document and what it shared come from the caller. `cached` are the bytes
    /// of pages that it held when it ended.
    pub fn new(document: String, session: &Session, cached: Bytes) -> Self {
        let times = session.times;
        let seconds = |t: std::time::Duration| t.as_secs_f64();
        let decoded = |round: &Answer| {
            let (first, end) = (round.first_token?, round.finished?);
            Some((end.saturating_sub(first), round.produced.len().saturating_sub(1)))
        };
        let decoded: Vec<_> = session.answers.iter().filter_map(decoded).collect();
        let after_first: usize = decoded.iter().map(|(_, n)| n).sum();
        let decoding: f64 = decoded.iter().map(|(time, _)| time.as_secs_f64()).sum();
        Self {
            document,
            rounds: Vec::new(),
            compression: session.request.compression.to_string(),
            document_tokens: 0,
            used_tokens: 0,
            prompt_tokens: session.request.prompt.len(),
            shared_tokens: session.shared_tokens,
            new_tokens: session.produced.len(),
            waited_s: times.admitted.map(seconds),
            first_token_s: times.first_token.map(seconds),
            per_token_ms: (after_first > 0).then(|| decoding * 1e3 / after_first as f64),
            swapped_out: session.moves.swapped_out,
            swapped_in: session.moves.swapped_in,
            recomputed: session.moves.dropped,
            compressed: session.moves.compressed,
            preempted: session.moves.preempted,
            kv_bytes: cached,
            kv_shared_bytes: Bytes::ZERO,
            ended_by: finish_name(session.phase),
            saved_as: None,
            saved_bytes: None,
        }
    }
}
