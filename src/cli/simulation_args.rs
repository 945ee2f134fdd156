//! What a simulation is about: who comes, and how the schedule is set. For `simulate` and `fleet`.

use anyhow::Result;
use clap::Args;
use concertina::eval::simulate::{SimulateError, SimulatedMachine};
use concertina::geometry::Bytes;
use concertina::kernels::registry::DEFAULT_PAGE_SIZE;
use concertina::report::ScheduleSettings;
use concertina::schedule::workload::{Arrivals, Distribution, Workload};
use concertina::theory::model::Decoder;
use concertina::theory::presets::Gpu;
use concertina::theory::step::Machine;

use super::args::{self, swap_chunk};
use super::failure::usage;

/// Who comes, when, and with what.
#[derive(Args, Clone, Debug)]
pub(super) struct WorkloadArgs {
    /// Sessions that come
    #[arg(long, value_name = "N", default_value = "1000", value_parser = session_count)]
    sessions: u32,

    /// When they come: all, or poisson:RATE with a rate such as 2/s, 30/min or 500/h
    #[arg(long, value_name = "WHEN", default_value = "poisson:2/s")]
    arrival: Arrivals,

    /// Tokens of their documents: fixed:N, uniform:FROM..TO, lognormal:MEDIAN[:SIGMA] with a sigma of 0.5 where not given, or
    /// exp:MEAN
    #[arg(long, value_name = "TOKENS", default_value = "lognormal:50k")]
    context: Distribution,

    /// Questions that each asks
    #[arg(long, value_name = "N", default_value = "3", value_parser = round_count)]
    rounds: u32,

    /// Tokens of a question
    #[arg(long, value_name = "TOKENS", default_value = "fixed:50")]
    question: Distribution,

    /// Tokens of an answer: 250 are about a screen
    #[arg(long, value_name = "TOKENS", default_value = "fixed:250")]
    answer: Distribution,

    /// Seconds between an answer and the next question
    #[arg(long, value_name = "SECONDS", default_value = "exp:30")]
    think: Distribution,

    /// Seed of the sessions: the same seed gives the same trace
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

impl WorkloadArgs {
    /// The sessions.
    pub(super) fn workload(&self) -> Workload {
        let Self { sessions, arrival, context, rounds, question, answer, think, seed } = *self;
        Workload { sessions, arrival, context, rounds, question, answer, think, seed }
    }
}

/// How the schedule is set.
#[derive(Args, Clone, Debug)]
pub(super) struct ScheduleArgs {
    /// Bytes that a step moves each way; as for `run` where not given, but at least a page of every list
    #[arg(long, value_name = "SIZE", value_parser = args::budget)]
    pub(super) swap_chunk: Option<Bytes>,

    /// Sessions that may compute at once
    #[arg(long, value_name = "N", default_value = "64", value_parser = args::small_count)]
    max_sessions: u32,

    /// Sessions whose prompts are scored at once for what evictions keep; scores take device memory
    #[arg(long, value_name = "N", default_value = "1", value_parser = args::small_count)]
    observed: u32,

    /// Rows of one step: decode rows of all sessions and prompt tokens beside them
    #[arg(long, value_name = "ROWS", default_value = "1024", value_parser = args::small_count)]
    chunk: u32,

    /// Tokens of one page of the cache: 16, 32, 64 or 128
    #[arg(long, value_name = "TOKENS", default_value_t = DEFAULT_PAGE_SIZE, value_parser = args::page_size)]
    page_size: u32,

    /// Longest context, documents, questions and answers together; the model's where not given. It may exceed that: only bytes
    /// and times are simulated
    #[arg(long, value_name = "TOKENS", value_parser = token_count)]
    context_length: Option<u32>,
}

impl ScheduleArgs {
    /// The settings for a model.
    ///
    /// Fewer rows than sessions are wrong usage.
    pub(super) fn settings(&self, model: &Decoder) -> Result<ScheduleSettings> {
        if self.chunk < self.max_sessions {
            let (chunk, max) = (self.chunk, self.max_sessions);
            return Err(usage(format!("--chunk {chunk} has no row for each of {max} sessions at once")));
        }
        Ok(ScheduleSettings {
            max_sessions: self.max_sessions,
            observed: self.observed,
            chunk_tokens: self.chunk,
            page_tokens: self.page_size,
            context_tokens: self.context_length.unwrap_or(model.geometry.context_length),
        })
    }

    /// A model on a machine with `memory` bytes, and `host_budget` bytes of host memory for caches.
    pub(super) fn on(
        &self,
        settings: &ScheduleSettings,
        model: &Decoder,
        (machine, memory): (Machine, Bytes),
        host_budget: Bytes,
    ) -> SimulatedMachine {
        let page_bytes = Bytes(model.token_bytes().0 * u64::from(settings.page_tokens));
        let chunk = match host_budget {
            Bytes::ZERO => Bytes::ZERO,
            _ => swap_chunk(memory.saturating_sub(model.weights)).max(Bytes(2 * page_bytes.0)),
        };
        SimulatedMachine {
            machine,
            memory,
            host_budget,
            swap_chunk: self.swap_chunk.unwrap_or(chunk),
            max_rows: settings.chunk_tokens,
            max_sessions: settings.max_sessions,
            observed: settings.observed,
            context_length: settings.context_tokens,
            page_size: settings.page_tokens,
            model: model.clone(),
        }
    }
}

/// Host memory that is the device's is wrong usage.
pub(super) fn check_host_budget(gpu: &Gpu, host_budget: Bytes) -> Result<()> {
    if gpu.unified && host_budget > Bytes::ZERO {
        return Err(usage(format!(
            "the memory of {} is the host's, so that there is no other for --host-budget {host_budget}; give --memory more",
            gpu.name
        )));
    }
    Ok(())
}

/// A simulation that can not begin as it was asked for is wrong usage; a defect is not.
pub(super) fn refused(error: SimulateError) -> anyhow::Error {
    match error {
        SimulateError::Stuck { .. } => error.into(),
        SimulateError::Pool(error) => usage(format!("beside the weights, {error}")),
        error => usage(error.to_string()),
    }
}

/// Reads a number of sessions: each keeps its times until the end, about a kilobyte; its tokens only until it is over.
fn session_count(text: &str) -> Result<u32, String> {
    const MAX: u32 = 1_000_000;
    text.parse().ok().filter(|n| (1..=MAX).contains(n)).ok_or_else(|| format!("expected a number from 1 to {MAX}"))
}

/// Reads a number of questions.
fn round_count(text: &str) -> Result<u32, String> {
    const MAX: u32 = 1_000;
    text.parse().ok().filter(|n| (1..=MAX).contains(n)).ok_or_else(|| format!("expected a number from 1 to {MAX}"))
}

/// Reads a number of tokens, where `k` stands for thousands.
fn token_count(text: &str) -> Result<u32, String> {
    match text.strip_suffix(['k', 'K']) {
        Some(thousands) => args::token_count(&format!("{thousands}000")),
        None => args::token_count(text),
    }
}
