//! Who comes, when, and with what: plain data, drawn from a seed.
//!
//! Each quantity has a stream of random numbers of its own, so that another answer length leaves arrivals and contexts as they
//! are, and runs with different compressions see the same sessions. Logarithms and cosines come from the platform's
//! library: a seed gives the same workload wherever that gives the same bits.

use std::f64::consts::TAU;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::{Request, Round};
use crate::compression::Compression;

/// Spread of a lognormal distribution where none is given.
pub const DEFAULT_SIGMA: f64 = 0.5;
/// Largest number that a distribution may name: tokens of a session are counted in 32 bits.
const NUMBER_MAX: f64 = 1e9;

/// A workload that could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ParseWorkloadError(String);

/// How a quantity differs from session to session.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Distribution {
    /// Always the same.
    Fixed(f64),
    /// Between two numbers, each as likely.
    Uniform {
        /// The smallest.
        from: f64,
        /// The largest.
        to: f64,
    },
    /// Its logarithm is normal.
    LogNormal {
        /// Half are below.
        median: f64,
        /// Standard deviation of the natural logarithm.
        sigma: f64,
    },
    /// As times between independent events.
    Exponential {
        /// The mean.
        mean: f64,
    },
}

impl Distribution {
    /// A number of it.
    pub fn draw(&self, rng: &mut ChaCha8Rng) -> f64 {
        match *self {
            Self::Fixed(value) => value,
            Self::Uniform { from, to } => from + (to - from) * rng.random::<f64>(),
            Self::LogNormal { median, sigma } => median * (sigma * normal(rng)).exp(),
            Self::Exponential { mean } => mean * exponential(rng),
        }
    }

    /// The number that half are below.
    pub fn median(&self) -> f64 {
        match *self {
            Self::Fixed(value) => value,
            Self::Uniform { from, to } => f64::midpoint(from, to),
            Self::LogNormal { median, .. } => median,
            Self::Exponential { mean } => mean * std::f64::consts::LN_2,
        }
    }

    /// A number of tokens: rounded, at least 1.
    fn tokens(&self, rng: &mut ChaCha8Rng) -> u32 {
        let tokens = self.draw(rng).round().clamp(1.0, NUMBER_MAX);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped above")]
        let tokens = tokens as u32;
        tokens
    }
}

/// A standard normal number (Box and Muller).
fn normal(rng: &mut ChaCha8Rng) -> f64 {
    (2.0 * exponential(rng)).sqrt() * (TAU * rng.random::<f64>()).cos()
}

/// A standard exponential number.
fn exponential(rng: &mut ChaCha8Rng) -> f64 {
    // Above 0, so that there is a logarithm.
    -(1.0 - rng.random::<f64>()).ln()
}

impl fmt::Display for Distribution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Fixed(value) => write!(f, "fixed:{value}"),
            Self::Uniform { from, to } => write!(f, "uniform:{from}..{to}"),
            Self::LogNormal { median, sigma } => write!(f, "lognormal:{median}:{sigma}"),
            Self::Exponential { mean } => write!(f, "exp:{mean}"),
        }
    }
}

/// A number of at least 0, where `k` stands for thousands and `M` for millions.
fn number(text: &str) -> Option<f64> {
    let text = text.trim();
    let (digits, scale) = match text.char_indices().next_back()? {
        (at, 'k' | 'K') => (&text[..at], 1e3),
        (at, 'M') => (&text[..at], 1e6),
        _ => (text, 1.0),
    };
    let value = digits.parse::<f64>().ok()? * scale;
    (0.0..=NUMBER_MAX).contains(&value).then_some(value)
}

impl FromStr for Distribution {
    type Err = ParseWorkloadError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = |why: &str| {
            Err(ParseWorkloadError(format!(
                "'{text}' is no distribution: {why}; write fixed:N, uniform:FROM..TO, lognormal:MEDIAN[:SIGMA] or exp:MEAN, \
                 with numbers such as 250, 50k or 1.5M, up to 1000M"
            )))
        };
        let Some((kind, rest)) = text.split_once(':') else { return error("it has no ':'") };
        let of = |rest: &str| number(rest);
        let read = match kind.trim() {
            "fixed" => of(rest).map(Self::Fixed),
            "exp" => of(rest).map(|mean| Self::Exponential { mean }),
            "uniform" => match rest.split_once("..").map(|(from, to)| (number(from), number(to))) {
                Some((Some(from), Some(to))) if from > to => return error("it ends before it begins"),
                Some((Some(from), Some(to))) => Some(Self::Uniform { from, to }),
                _ => None,
            },
            "lognormal" => {
                let (median, sigma) = rest.split_once(':').unwrap_or((rest, ""));
                let sigma = if sigma.is_empty() { Some(DEFAULT_SIGMA) } else { sigma.trim().parse().ok() };
                match (number(median), sigma) {
                    (Some(_), Some(sigma)) if !(0.0..=5.0).contains(&sigma) => {
                        return error("sigma is from 0 to 5");
                    }
                    (Some(median), Some(sigma)) => Some(Self::LogNormal { median, sigma }),
                    _ => None,
                }
            }
            _ => return error("its kind is unknown"),
        };
        read.map_or_else(|| error("its numbers can not be read"), Ok)
    }
}

impl Serialize for Distribution {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// When sessions come.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arrivals {
    /// All at once.
    All,
    /// Independently of each other, so many per second in the mean.
    Poisson {
        /// Sessions per second.
        per_second: f64,
    },
}

impl fmt::Display for Arrivals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::All => f.write_str("all"),
            Self::Poisson { per_second } => write!(f, "poisson:{per_second}/s"),
        }
    }
}

impl FromStr for Arrivals {
    type Err = ParseWorkloadError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || {
            ParseWorkloadError(format!(
                "'{text}' says not when sessions come: write all, or poisson:RATE with a rate above 0 such as 2/s, 30/min \
                 or 500/h, at most a million per second"
            ))
        };
        if text.trim() == "all" {
            return Ok(Self::All);
        }
        let rate = text.trim().strip_prefix("poisson:").ok_or_else(error)?;
        let (count, unit) = rate.split_once('/').ok_or_else(error)?;
        let seconds = match unit.trim() {
            "s" => 1.0,
            "min" => 60.0,
            "h" => 3600.0,
            _ => return Err(error()),
        };
        let per_second = count.trim().parse::<f64>().map_err(|_| error())? / seconds;
        if !(per_second > 0.0 && per_second <= 1e6) {
            return Err(error());
        }
        Ok(Self::Poisson { per_second })
    }
}

impl Serialize for Arrivals {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Sessions that come: each reads a document and asks about it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Workload {
    /// Sessions.
    pub sessions: u32,
    /// When they come.
    pub arrival: Arrivals,
    /// Tokens of their documents.
    pub context: Distribution,
    /// Questions of each.
    pub rounds: u32,
    /// Tokens of a question.
    pub question: Distribution,
    /// Tokens of an answer.
    pub answer: Distribution,
    /// Seconds between an answer and the next question.
    pub think: Distribution,
    /// What everything is drawn from.
    pub seed: u64,
}

/// A session that comes.
#[derive(Clone, Debug, PartialEq)]
pub struct Visit {
    /// Its number, in order of coming.
    pub index: u32,
    /// When it comes, on the clock of the schedule.
    pub at: Duration,
    /// Tokens of its document.
    pub document: u32,
    /// Its questions.
    pub turns: Vec<Turn>,
}

/// A question and its answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Turn {
    /// Tokens of the question.
    pub question: u32,
    /// Tokens of the answer.
    pub answer: u32,
    /// Time since the answer before, of no account for the first.
    pub think: Duration,
}

impl Workload {
    /// Sessions in the order in which they come. Times are at most a year apart.
    pub fn visits(&self) -> impl Iterator<Item = Visit> + use<> {
        const YEAR: f64 = 366.0 * 86_400.0;
        let stream = |stream: u64| {
            let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
            rng.set_stream(stream);
            rng
        };
        let (mut between, mut documents, mut questions) = (stream(0), stream(1), stream(2));
        let (mut answers, mut thoughts) = (stream(3), stream(4));
        let Self { sessions, arrival, context, rounds, question, answer, think, .. } = *self;
        let mut at = Duration::ZERO;
        (0..sessions).map(move |index| {
            if let Arrivals::Poisson { per_second } = arrival {
                at += Duration::from_secs_f64((exponential(&mut between) / per_second).min(YEAR));
            }
            let document = context.tokens(&mut documents);
            let mut turn = || Turn {
                question: question.tokens(&mut questions),
                answer: answer.tokens(&mut answers),
                think: Duration::from_secs_f64(think.draw(&mut thoughts).min(YEAR)),
            };
            Visit { index, at, document, turns: (0..rounds.max(1)).map(|_| turn()).collect() }
        })
    }

    /// Of these, the sessions of one of several machines, to which they are dealt out in turn: every session comes to one of them,
    /// when it would have come to the only one.
    pub fn dealt_to(&self, machine: u32, machines: u32) -> impl Iterator<Item = Visit> + use<> {
        self.visits().filter(move |visit| visit.index % machines.max(1) == machine)
    }
}

impl Visit {
    /// Tokens of its document and its questions, and of its answers.
    pub fn lengths(&self) -> (u64, u64) {
        let sum = |of: fn(&Turn) -> u32| self.turns.iter().map(|turn| u64::from(of(turn))).sum::<u64>();
        (u64::from(self.document) + sum(|turn| turn.question), sum(|turn| turn.answer))
    }

    /// What it asks for, in tokens below `vocab` that no other session has in this order.
    ///
    /// # Panics
    /// When it has no turn, or more tokens in front of its first answer than are counted in 32 bits.
    pub fn request(&self, vocab: u32, compression: &Compression, ladder: &[Compression]) -> Request {
        let mut state = u64::from(self.index).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut tokens = |n: u32| -> Vec<u32> {
            let mut next = || {
                state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
                // The upper bits, as a part of the vocabulary.
                u32::try_from(((state >> 32) * u64::from(vocab)) >> 32).expect("below a vocabulary")
            };
            (0..n).map(|_| next()).collect()
        };
        let (first, later) = self.turns.split_first().expect("a session asks at least once");
        let prompt = self.document.checked_add(first.question).expect("a prompt is counted in 32 bits");
        let prompt = tokens(prompt);
        let round = |turn: &Turn| Round { tokens: tokens(turn.question), max_new: turn.answer, think: turn.think };
        Request {
            rounds: later.iter().map(round).collect(),
            compression: compression.clone(),
            ladder: ladder.to_vec(),
            document: Some(self.document),
            ..Request::new(prompt, first.answer)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload() -> Workload {
        Workload {
            sessions: 4_000,
            arrival: "poisson:2/s".parse().expect("arrivals"),
            context: "lognormal:50k".parse().expect("a distribution"),
            rounds: 3,
            question: "uniform:10..30".parse().expect("a distribution"),
            answer: "fixed:250".parse().expect("a distribution"),
            think: "exp:30".parse().expect("a distribution"),
            seed: 7,
        }
    }

    #[test]
    fn what_is_printed_parses_back() {
        for text in ["fixed:250", "uniform:4k..100k", "lognormal:50k", "lognormal:50k:0.25", "exp:30", "fixed:1.5M"] {
            let parsed: Distribution = text.parse().expect(text);
            assert_eq!(parsed.to_string().parse(), Ok(parsed), "{text}");
        }
        assert_eq!(
            "lognormal:50k".parse(),
            Ok(Distribution::LogNormal { median: 5e4, sigma: 0.5 }),
            "the stated sigma"
        );
        assert_eq!("uniform:4k..1M".parse(), Ok(Distribution::Uniform { from: 4e3, to: 1e6 }), "units");
        for text in ["all", "poisson:2/s", "poisson:0.25/s"] {
            assert_eq!(text.parse::<Arrivals>().expect(text).to_string(), text, "arrivals");
        }
        assert_eq!("poisson:90/min".parse(), Ok(Arrivals::Poisson { per_second: 1.5 }), "per minute");
        assert_eq!("poisson:7200/h".parse(), Ok(Arrivals::Poisson { per_second: 2.0 }), "per hour");
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_the_reason() {
        for (text, why) in [
            ("50k", "no ':'"),
            ("normal:50k", "kind is unknown"),
            ("fixed:", "can not be read"),
            ("fixed:-3", "can not be read"),
            ("fixed:NaN", "can not be read"),
            ("fixed:2000M", "can not be read"),
            ("fixed:é", "can not be read"),
            ("uniform:9..3", "ends before it begins"),
            ("uniform:9", "can not be read"),
            ("lognormal:50k:-1", "sigma is from 0"),
            ("lognormal:50k:x", "can not be read"),
        ] {
            let refused = text.parse::<Distribution>().expect_err(text).to_string();
            assert!(refused.contains(why) && refused.contains("lognormal:MEDIAN"), "{text}: {refused}");
        }
        for text in ["", "poisson", "poisson:2", "poisson:0/s", "poisson:-1/s", "poisson:2/y", "poisson:NaN/s", "now"] {
            let refused = text.parse::<Arrivals>().expect_err(text).to_string();
            assert!(refused.contains("poisson:RATE"), "{text}: {refused}");
        }
    }

    #[test]
    fn a_workload_has_the_means_that_were_asked_for() {
        let visits: Vec<Visit> = workload().visits().collect();
        let last = visits.last().expect("4,000").at.as_secs_f64();
        assert!((last / 2_000.0 - 1.0).abs() < 0.05, "4,000 at 2 per second take 2,000 s, these {last} s");
        assert!(visits.windows(2).all(|pair| pair[0].at <= pair[1].at), "in order");
        let mut documents: Vec<u32> = visits.iter().map(|visit| visit.document).collect();
        documents.sort_unstable();
        let (p16, p50, p84) = (documents[640], documents[2_000], documents[3_360]);
        assert!((f64::from(p50) / 5e4 - 1.0).abs() < 0.05, "the median is {p50}");
        // One sigma from the median on either side.
        let sigma = (f64::from(p84) / f64::from(p16)).ln() / 2.0;
        assert!((sigma - 0.5).abs() < 0.03, "sigma is {sigma}");
        let turns = || visits.iter().flat_map(|visit| &visit.turns);
        assert_eq!(turns().count(), 12_000, "three rounds each");
        assert!(turns().all(|t| t.answer == 250 && (10..=30).contains(&t.question)), "lengths");
        let think = turns().map(|t| t.think.as_secs_f64()).sum::<f64>() / 12_000.0;
        assert!((think / 30.0 - 1.0).abs() < 0.05, "the mean of think is {think} s");
    }

    #[test]
    fn a_seed_decides_everything_and_quantities_do_not_disturb_each_other() {
        let all = |workload: &Workload| workload.visits().collect::<Vec<_>>();
        assert_eq!(all(&workload()), all(&workload()), "equal seeds");
        let other = all(&Workload { seed: 8, ..workload() });
        assert!(all(&workload()).iter().zip(&other).all(|(a, b)| a.document != b.document || a.at != b.at), "another");
        let think = Distribution::Fixed(1.0);
        let longer =
            all(&Workload { question: Distribution::LogNormal { median: 90.0, sigma: 1.0 }, think, ..workload() });
        for (a, b) in all(&workload()).iter().zip(&longer) {
            assert_eq!((a.at, a.document, a.turns[2].answer), (b.at, b.document, b.turns[2].answer), "other questions");
        }
    }

    #[test]
    fn every_session_is_dealt_to_one_machine_as_it_is() {
        let workload = Workload { sessions: 50, ..workload() };
        let all: Vec<Visit> = workload.visits().collect();
        for machines in [1, 3, 8, 60] {
            let hands: Vec<Vec<Visit>> = (0..machines).map(|m| workload.dealt_to(m, machines).collect()).collect();
            let (most, least) = (hands.iter().map(Vec::len).max(), hands.iter().map(Vec::len).min());
            assert!(most <= least.map(|n| n + 1), "{machines}: as many to each, but for one: {most:?} and {least:?}");
            let mut dealt: Vec<Visit> = hands.into_iter().flatten().collect();
            dealt.sort_by_key(|visit| visit.index);
            assert_eq!(dealt, all, "{machines}: each once, unchanged");
        }
    }

    #[test]
    fn a_request_is_what_the_visit_says() {
        let visit = Workload { sessions: 2, ..workload() }.visits().nth(1).expect("two");
        let request = visit.request(100, &Compression::default(), &[]);
        assert_eq!(request.prompt.len(), (visit.document + visit.turns[0].question) as usize, "document and question");
        assert_eq!((request.document, request.rounds.len()), (Some(visit.document), 2), "two more questions");
        let (prompts, answers) = visit.lengths();
        assert_eq!((answers, prompts + answers), (750, request.all_tokens()), "all lengths");
        assert!(request.prompt.iter().all(|token| *token < 100), "tokens of the vocabulary");
        let other = Visit { index: 0, ..visit }.request(100, &Compression::default(), &[]);
        assert_ne!(request.prompt[..64], other.prompt[..64], "no two documents begin alike");
    }
}
