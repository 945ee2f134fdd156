//! Session throughput: sessions finished per hour, the paper's measure of a deployment (section 2 of arXiv:2405.08944), as the
//! bounds of a closed queueing network (Denning and Buzen, 1978, operational analysis).
//!
//! ```text
//! a session   reads its document, then per round: reads a question, writes an answer, thinks (not after the last)
//! R           its time alone
//! D(b)        its time of the device, where b sessions share the weights of a decode step
//! N           sessions that are there at once: those that fit on the device, and with swapping those in host memory too
//! L           its time of the link: each round a cache comes and leaves, where more are there than fit
//! X = min(N / R, 1 / D(b), 1 / L)        b = N - X * (thinking + prefill): those that neither think nor read, by Little's law;
//!                                        at least 1, at most those that fit
//! ```
//!
//! With chunked prefill, decode steps go on beside prompts, so that everybody who does neither of these decodes. A bound: queues
//! make it less. `concertina simulate` runs the schedule itself.

use serde::Serialize;

use super::cache::{CacheSize, Seen};
use super::challenges::{Challenges, Scene, challenges, decode, read_prompt};
use super::model::Decoder;
use super::predict::concurrency;
use super::step::Machine;
use crate::compression::Compression;
use crate::geometry::Bytes;

/// What a session does behind its document.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Rounds {
    /// Questions.
    pub rounds: u32,
    /// Tokens of a question.
    pub question_tokens: u32,
    /// Tokens of an answer.
    pub answer_tokens: u32,
    /// Seconds between an answer and the next question.
    pub think_s: f64,
}

impl Rounds {
    /// Tokens of all of them.
    pub const fn tokens(&self) -> u32 {
        self.rounds.saturating_mul(self.question_tokens.saturating_add(self.answer_tokens))
    }
}

/// What there is least of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Scarce {
    /// Not one session fits.
    Nothing,
    /// Sessions that are there at once.
    Memory,
    /// Time of the device, most of it in prefill.
    Prefill,
    /// Time of the device, most of it in decode.
    Decode,
    /// Time of the link.
    Link,
}

impl Scarce {
    /// In words.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nothing => "no session fits",
            Self::Memory => "device memory",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Link => "host link",
        }
    }
}

/// Sessions per hour, and why no more.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Rate {
    /// Sessions finished per hour.
    pub sessions_per_hour: f64,
    /// Sessions that decode in one step.
    pub decoding: f64,
    /// What bounds it.
    pub bound: Scarce,
}

/// Throughput of one kind of session.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Throughput {
    /// A session's time alone, in seconds.
    pub session_s: f64,
    /// Of these, the device's.
    pub device_s: f64,
    /// Sessions that fit at the end of their last answer.
    pub resident: u64,
    /// Where caches stay on the device until their session ends.
    pub resident_rate: Rate,
    /// Where they go to host memory between questions; none without host memory or a link.
    pub swapping_rate: Option<Rate>,
}

impl Throughput {
    /// The better of staying and swapping.
    pub fn best(&self) -> Rate {
        match self.swapping_rate {
            Some(rate) if rate.sessions_per_hour > self.resident_rate.sessions_per_hour => rate,
            _ => self.resident_rate,
        }
    }
}

/// A session's times.
struct Times {
    prefill_s: f64,
    questions_s: f64,
    think_s: f64,
    /// Decode steps.
    steps: f64,
    /// Of the link.
    link_s: Option<f64>,
}

impl Times {
    fn alone(&self, token_s: f64) -> f64 {
        self.prefill_s + self.questions_s + self.steps * token_s + self.think_s
    }
}

/// Throughput of sessions of a [`Scene`] that go through `rounds`; `host` are bytes of host memory for caches.
///
/// # Errors
/// As [`challenges`].
pub fn throughput(
    model: &Decoder,
    machine: &Machine,
    compression: &Compression,
    scene: &Scene,
    rounds: &Rounds,
    host: Bytes,
) -> Result<Throughput, String> {
    let first = challenges(model, machine, compression, scene)?;
    let of = |after| {
        let seen = Seen { document: scene.context_tokens, after };
        CacheSize::new(model, compression, seen, scene.page_tokens).map(|cache| cache.over_all(model, machine))
    };
    // A session takes most at its end; on average about what it takes half way.
    let (last, middle) = (of(rounds.tokens())?, of(rounds.tokens() / 2)?);
    let times = times(model, machine, &first, &middle, scene, rounds);
    let token_s = |sessions: f64| {
        // Between two numbers of sessions as far as between them.
        let (low, part) = (sessions.floor().max(1.0), sessions.fract());
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "at most the sessions that fit")]
        let at = |n: f64| decode(model, machine, &middle, n.min(f64::from(u32::MAX)) as u32).seconds;
        at(low) * (1.0 - part) + at(low + 1.0) * part
    };
    let resident = last.concurrency(scene.memory_bytes);
    let rate = |there: u64, swaps: bool| rate(&times, &token_s, resident, there, swaps);
    let away = concurrency(host, last.held_bytes);
    let swaps = times.link_s.is_some() && away > 0 && resident > 0;
    Ok(Throughput {
        session_s: times.alone(token_s(1.0)),
        device_s: times.alone(token_s(1.0)) - times.think_s,
        resident,
        resident_rate: rate(resident, false),
        swapping_rate: swaps.then(|| rate(resident.saturating_add(away), true)),
    })
}

fn times(
    model: &Decoder,
    machine: &Machine,
    first: &Challenges,
    middle: &CacheSize,
    scene: &Scene,
    rounds: &Rounds,
) -> Times {
    let n = f64::from(rounds.rounds);
    // A question is read over about what its session holds half way.
    let before = scene.context_tokens.saturating_add(rounds.tokens() / 2);
    let question = read_prompt(model, machine, scene, (before, rounds.question_tokens), model.geometry.num_layers);
    let saved = first.cache.held_bytes.0 as f64 / (model.token_bytes().0 as f64 * f64::from(scene.context_tokens));
    let question_s = question.seconds - question.attention_s * (1.0 - saved.min(1.0));
    Times {
        prefill_s: first.prefill.seconds,
        questions_s: n * question_s,
        think_s: f64::from(rounds.rounds.saturating_sub(1)) * rounds.think_s,
        steps: n * f64::from(rounds.answer_tokens),
        link_s: machine.link_s(middle.held_bytes).map(|one_way| 2.0 * n * one_way),
    }
}

/// Steps towards a number of sessions that decode together which is its own consequence.
const ITERATIONS: usize = 64;

fn rate(times: &Times, token_s: &dyn Fn(f64) -> f64, resident: u64, there: u64, swaps: bool) -> Rate {
    if resident == 0 {
        return Rate { sessions_per_hour: 0.0, decoding: 0.0, bound: Scarce::Nothing };
    }
    // Beyond a million in one step nothing changes any more.
    let most = (resident as f64).min(1e6);
    let bounds = |b: f64| {
        let decode_s = times.steps * token_s(b) / b;
        let compute_s = times.prefill_s + times.questions_s;
        let busy = if compute_s > decode_s { Scarce::Prefill } else { Scarce::Decode };
        let link = times.link_s.filter(|s| swaps && *s > 0.0).map_or(f64::INFINITY, |s| 1.0 / s);
        let memory = there as f64 / times.alone(token_s(b));
        let all = [(memory, Scarce::Memory), (1.0 / (compute_s + decode_s), busy), (link, Scarce::Link)];
        all.into_iter().min_by(|a, b| a.0.total_cmp(&b.0)).expect("three bounds")
    };
    let elsewhere = times.think_s + times.prefill_s + times.questions_s;
    let mut b = 1.0;
    for _ in 0..ITERATIONS {
        let next = (there as f64 - bounds(b).0 * elsewhere).clamp(1.0, most);
        b = (b + next) / 2.0;
    }
    let (per_s, bound) = bounds(b);
    Rate { sessions_per_hour: per_s * 3600.0, decoding: b, bound }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::yi_34b;

    const MACHINE: Machine = Machine { flops: 312e12, bandwidth: 2e12, link: 20e9, parallel: None };
    const ROUNDS: Rounds = Rounds { rounds: 3, question_tokens: 50, answer_tokens: 250, think_s: 60.0 };

    fn of(text: &str, memory: u64, rounds: Rounds, host: u64) -> Throughput {
        let model = Decoder::dense(yi_34b(), false).expect("a model");
        let scene = Scene {
            context_tokens: 50_000,
            memory_bytes: Bytes(memory),
            page_tokens: None,
            chunk_rows: None,
            batch: 1,
        };
        throughput(&model, &MACHINE, &text.parse().expect(text), &scene, &rounds, Bytes(host)).expect(text)
    }

    #[test]
    fn one_session_at_a_time_takes_its_own_time() {
        // A little more than one cache of 50,900 tokens.
        let one = of("full", 13_000_000_000, ROUNDS, 0);
        assert_eq!(one.resident, 1, "one fits");
        let expected = 3600.0 / one.session_s;
        assert!((one.resident_rate.sessions_per_hour - expected).abs() < 1e-6, "one after the other");
        assert_eq!(one.resident_rate.bound, Scarce::Memory, "with 120 s of thinking each");
        assert!((one.session_s - one.device_s - 120.0).abs() < 1e-9, "thinks twice");
        assert_eq!(of("full", 1_000_000_000, ROUNDS, 0).resident_rate.bound, Scarce::Nothing, "none fits");
    }

    #[test]
    fn more_memory_helps_until_the_device_is_busy() {
        let rate = |memory: u64| of("full", memory * 1_000_000_000, ROUNDS, 0).resident_rate;
        let rates = [13, 26, 52, 104, 208, 1_000, 10_000].map(rate);
        assert!(rates.windows(2).all(|w| w[1].sessions_per_hour >= w[0].sessions_per_hour - 1e-9), "{rates:?}");
        assert_eq!(rates[1].bound, Scarce::Memory, "two sessions leave it idle while they think");
        let busy = rates[6];
        assert_eq!(busy.bound, Scarce::Prefill, "{busy:?}");
        // Nobody can read more documents than one after another.
        assert!(busy.sessions_per_hour < 3600.0 / 17.5 && busy.sessions_per_hour > 3600.0 / 30.0, "{busy:?}");
        let talk = Rounds { answer_tokens: 5_000, ..ROUNDS };
        assert_eq!(of("full", 208_000_000_000, talk, 0).resident_rate.bound, Scarce::Decode, "long answers");
    }

    #[test]
    fn host_memory_holds_those_that_think_until_the_link_is_busy() {
        let slow = Rounds { think_s: 3_000.0, ..ROUNDS };
        let some = of("full", 26_000_000_000, slow, 260_000_000_000);
        let swapping = some.swapping_rate.expect("there is host memory");
        assert!(swapping.sessions_per_hour > 5.0 * some.resident_rate.sessions_per_hour, "{swapping:?}");
        assert_eq!(some.best(), swapping, "the better");
        let chat = Rounds { rounds: 100, answer_tokens: 2, question_tokens: 1, think_s: 1.0 };
        let swapping = of("full", 26_000_000_000, chat, 10_000_000_000_000).swapping_rate.expect("host memory");
        assert_eq!(swapping.bound, Scarce::Link, "a hundred switches of a second each");
        assert_eq!(of("full", 26_000_000_000, slow, 0).swapping_rate, None, "no host memory");
        let compressed = of("kivi4", 26_000_000_000, slow, 0);
        assert!(compressed.resident_rate.sessions_per_hour > 3.0 * some.resident_rate.sessions_per_hour, "more fit");
    }
}
