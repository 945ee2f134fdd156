//! The report of `run`: sessions over documents under one byte budget.

use serde::Serialize;

use super::{DeviceReport, FourMetrics, ModelReport, Program};
use crate::geometry::Bytes;
use crate::kernels::sample::Sampling;
use crate::pool::PoolReport;
use crate::schedule::{Finish, Phase, Session};

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
    /// Time of all steps on the clock of the schedule: host time from planning a step to having its tokens.
    pub elapsed_s: f64,
    /// Whether the run was interrupted; the sessions that had not ended are cancelled.
    pub interrupted: bool,
}

/// The arguments of `run` that decide what happens.
#[derive(Clone, Debug, Serialize)]
pub struct RunSettings {
    /// Device bytes for caches, tables, scratch and staging.
    pub kv_budget_bytes: Bytes,
    /// Tokens to produce per session at most.
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

/// One session over one document.
#[derive(Clone, Debug, Serialize)]
pub struct SessionReport {
    /// Path of the document, as given.
    pub document: String,
    /// What was asked about it.
    pub question: String,
    /// What was done to its cache, in the form that `--compress` reads.
    pub compression: String,
    /// What the model said.
    pub answer: String,
    /// Tokens of the whole document.
    pub document_tokens: usize,
    /// Of these, tokens that were used.
    pub used_tokens: usize,
    /// Tokens of the prompt: the used part of the document, the question and the chat template.
    pub prompt_tokens: usize,
    /// Tokens produced, the one that ended the session included.
    pub new_tokens: usize,
    /// From submission until it got its pages.
    pub waited_s: Option<f64>,
    /// From submission until its first token.
    pub first_token_s: Option<f64>,
    /// Time per token after the first.
    pub per_token_ms: Option<f64>,
    /// Bytes of pages that it held at its end.
    pub kv_bytes: Bytes,
    /// `stop` (it produced a stop token), `length` (it produced as many tokens as it may), `cancelled`, or `running`.
    pub ended_by: &'static str,
}

/// A session's end as reports name it.
pub const fn finish_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Finished(Finish::Stop) => "stop",
        Phase::Finished(Finish::Length) => "length",
        Phase::Finished(Finish::Cancelled) => "cancelled",
        Phase::Waiting | Phase::Prefill(_) | Phase::Decode => "running",
    }
}

impl SessionReport {
    /// A finished session; its answer and the tokens of its document come from the caller. `cached` are the bytes
    /// of pages that it held when it ended.
    pub fn new(document: String, question: String, session: &Session, cached: Bytes) -> Self {
        let times = session.times;
        let seconds = |t: std::time::Duration| t.as_secs_f64();
        let after_first = session.produced.len().saturating_sub(1);
        let per_token_ms = match (times.first_token, times.finished) {
            (Some(first), Some(end)) if after_first > 0 => {
                Some(end.saturating_sub(first).as_secs_f64() * 1e3 / after_first as f64)
            }
            _ => None,
        };
        Self {
            document,
            question,
            compression: session.request.compression.to_string(),
            answer: String::new(),
            document_tokens: 0,
            used_tokens: 0,
            prompt_tokens: session.request.prompt.len(),
            new_tokens: session.produced.len(),
            waited_s: times.admitted.map(seconds),
            first_token_s: times.first_token.map(seconds),
            per_token_ms,
            kv_bytes: cached,
            ended_by: finish_name(session.phase),
        }
    }
}
