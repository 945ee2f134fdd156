//! Whether a model still finds a sentence in a compressed document: needles in haystacks.
//!
//! ```text
//! document   prose with "The pass key is 48213. Remember it." at depth x length
//! question   "What is the pass key?", the end of the user's turn, and a begun answer: "The pass key is "
//! answer     the key's tokens, produced greedily; right when all of them are the key
//! ```
//!
//! The document is read once over a full cache; each compressed cache is made of it before the question is known, as for a
//! document that many questions will be asked about, or, query-aware, with all but the last token of the prompt in it. Then
//! question and answer run over each cache, all answers together in one step per token.

use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::kl::{reads_itself, slots};
use super::prompt::{Driver, Probe};
use crate::compression::Compression;
use crate::compression::token::Score;
use crate::engine::{Engine, EngineError};
use crate::geometry::Bytes;
use crate::schedule::{Caches, REPEAT_ROOM};

/// What is hidden.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum NeedleStyle {
    /// A key of five digits.
    Passkey,
    /// A word.
    Word,
    /// Four keys of different places, one of which is asked for.
    Multi,
}

/// Needles and the question about one of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Needle {
    /// Sentences and their depths, the one that is asked for first.
    pub planted: Vec<(f64, String)>,
    /// The question.
    pub question: String,
    /// How the answer begins.
    pub begun: &'static str,
    /// How it goes on.
    pub answer: String,
}

impl NeedleStyle {
    /// Needles of a seed, the one that is asked for at `depth`.
    pub fn needle(self, seed: u64, depth: f64) -> Needle {
        const WORDS: [&str; 8] = ["window", "silver", "garden", "button", "thunder", "castle", "orange", "winter"];
        const PLACES: [&str; 4] = ["tower", "cellar", "stable", "harbour"];
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut key = || rng.random_range(10_000..100_000_u32).to_string();
        match self {
            Self::Passkey => {
                let answer = key();
                let planted = vec![(depth, format!("The pass key is {answer}. Remember it."))];
                Needle { planted, question: "What is the pass key?".to_owned(), begun: "The pass key is ", answer }
            }
            Self::Word => {
                let word = WORDS[rng.random_range(0..WORDS.len())];
                let planted = vec![(depth, format!("The secret word is {word}. Remember it."))];
                let (question, answer) = ("What is the secret word?".to_owned(), format!(" {word}"));
                Needle { planted, question, begun: "The secret word is", answer }
            }
            Self::Multi => {
                let keys: Vec<String> = PLACES.iter().map(|_| key()).collect();
                let sentence = |(i, (place, key)): (usize, (&&str, &String))| {
                    let depth = (depth + i as f64 / PLACES.len() as f64).fract();
                    (depth, format!("The key of the {place} is {key}. Remember it."))
                };
                let planted = PLACES.iter().zip(&keys).enumerate().map(sentence).collect();
                let question = format!("What is the key of the {}?", PLACES[0]);
                Needle { planted, question, begun: "The key is ", answer: keys[0].clone() }
            }
        }
    }
}

impl Needle {
    /// The prose with all sentences in it, each where a sentence of the prose ends nearest to its depth.
    pub fn in_prose(&self, prose: &str) -> String {
        let mut ends = sentence_ends(prose);
        if ends.is_empty() {
            ends = prose.match_indices(' ').map(|(at, _)| at + 1).collect();
        }
        ends.push(prose.len());
        let place = |depth: f64| {
            let distance = |at: &usize| (*at as f64 - depth * prose.len() as f64).abs();
            let nearest = ends.iter().copied().min_by(|a, b| distance(a).total_cmp(&distance(b)));
            nearest.unwrap_or(prose.len())
        };
        let mut places: Vec<(usize, &str)> =
            self.planted.iter().map(|(depth, sentence)| (place(*depth), sentence.as_str())).collect();
        places.sort_by_key(|(at, _)| *at);
        let (mut text, mut done) = (String::new(), 0);
        for (at, sentence) in places {
            text.push_str(&prose[done..at]);
            if !text.is_empty() && !text.ends_with(char::is_whitespace) {
                text.push(' ');
            }
            text.push_str(sentence);
            text.push(' ');
            done = at;
        }
        text.push_str(&prose[done..]);
        text
    }
}

/// Places behind the ends of sentences, and the space after them; the beginning is one too.
fn sentence_ends(prose: &str) -> Vec<usize> {
    let ends = |pair: &[(usize, char)]| match pair {
        [(_, '.' | '!' | '?'), (at, space)] if space.is_whitespace() => Some(at + space.len_utf8()),
        _ => None,
    };
    let chars: Vec<(usize, char)> = prose.char_indices().collect();
    let found: Vec<usize> = chars.windows(2).filter_map(ends).collect();
    if found.is_empty() { found } else { std::iter::once(0).chain(found).collect() }
}

/// A prompt in tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NeedleTask {
    /// Document, question and begun answer.
    pub tokens: Vec<u32>,
    /// Tokens of the document.
    pub document: usize,
    /// What should follow.
    pub answer: Vec<u32>,
}

/// How one cache did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NeedleOutcome {
    /// What was done to the cache, in the form that `--compress` reads.
    pub compression: String,
    /// Tokens that it gave for the answer.
    pub answer: Vec<u32>,
    /// Whether they are the answer.
    pub right: bool,
    /// Bytes of pages held once the document is compressed.
    pub held_bytes: Bytes,
    /// Tokens held then, over all lists.
    pub held_tokens: u64,
}

impl NeedleTask {
    /// Tokens that are read before a cache is compressed.
    pub fn prefix(&self, query_aware: bool) -> usize {
        if query_aware { self.tokens.len() - 1 } else { self.document }
    }

    /// Rows that are computed for it.
    pub fn rows(&self, compressions: &[Compression], query_aware: bool) -> usize {
        let prefixes = 1 + compressions.iter().filter(|compression| reads_itself(compression)).count();
        let rest = self.tokens.len() - self.prefix(query_aware) + self.answer.len() - 1;
        prefixes * self.prefix(query_aware) + (1 + compressions.len()) * rest
    }
}

/// Asks over the full cache and over each compressed one; the first outcome is the full one's. `each` hears of rows that are
/// done.
///
/// # Errors
/// [`EngineError`], among them a pool too small for all caches at once.
pub fn on_engine(
    engine: &mut Engine<'_>,
    caches: &mut Caches,
    compressions: &[Compression],
    task: &NeedleTask,
    query_aware: bool,
    chunk: usize,
    each: &mut dyn FnMut(usize),
) -> Result<Vec<NeedleOutcome>, EngineError> {
    let mut driver = Driver::new(engine, caches);
    let result = ask(&mut driver, compressions, task, query_aware, chunk, each);
    driver.end()?;
    result
}

fn ask(
    driver: &mut Driver<'_, '_>,
    compressions: &[Compression],
    task: &NeedleTask,
    query_aware: bool,
    chunk: usize,
    each: &mut dyn FnMut(usize),
) -> Result<Vec<NeedleOutcome>, EngineError> {
    let (prefix, question) = task.tokens.split_at(task.prefix(query_aware));
    let tail = question.len() + task.answer.len();
    let (observed, slots) = slots(compressions);
    let repeated = observed.iter().find(|(score, _)| *score == Score::Reconstruction);
    let room = repeated.map_or(tail, |_| tail.max(REPEAT_ROOM as usize));
    let full = driver.admit(&Compression::default(), prefix.len(), prefix.len() + room)?;
    driver.prefill_observed(full, prefix, 0..0, chunk, &observed, &mut |_, _| ())?;
    each(prefix.len());
    // A repetition takes pages of it for good.
    let held_by_full = driver.held_bytes(full);
    if let Some((_, slot)) = repeated {
        driver.reconstruct(full, prefix, *slot)?;
    }
    let mut probes = vec![full];
    for (compression, slot) in compressions.iter().zip(slots) {
        if !reads_itself(compression) {
            probes.push(driver.fork(full, compression, slot, tail)?);
            continue;
        }
        let probe = driver.admit(compression, prefix.len(), prefix.len() + tail)?;
        driver.prefill(probe, prefix, 0..0, chunk, &mut |_, _| ())?;
        driver.evict_due(probe)?;
        each(prefix.len());
        probes.push(probe);
    }
    let all = std::iter::once(Compression::default()).chain(compressions.iter().cloned());
    let begin = |(compression, probe): (Compression, &Probe)| NeedleOutcome {
        compression: compression.to_string(),
        answer: Vec::new(),
        right: false,
        held_bytes: driver.held_bytes(*probe),
        held_tokens: driver.held_tokens(*probe),
    };
    let mut outcomes: Vec<NeedleOutcome> = all.zip(&probes).map(begin).collect();
    outcomes[0].held_bytes = held_by_full;
    let last = task.tokens.len() - 1;
    for (probe, outcome) in probes.iter().zip(&mut outcomes) {
        driver.prefill(*probe, question, last..last + 1, chunk, &mut |_, row| outcome.answer.push(likeliest(&row)))?;
        each(question.len());
    }
    for at in 1..task.answer.len() {
        let rows: Vec<(Probe, u32)> = probes.iter().zip(&outcomes).map(|(p, o)| (*p, o.answer[at - 1])).collect();
        let logits = driver.decode(&rows)?;
        outcomes.iter_mut().zip(&logits).for_each(|(outcome, row)| outcome.answer.push(likeliest(row)));
        each(probes.len());
    }
    outcomes.iter_mut().for_each(|outcome| outcome.right = outcome.answer == task.answer);
    Ok(outcomes)
}

/// The most probable token; among equals the first.
fn likeliest(logits: &[f32]) -> u32 {
    let best = (0_u32..).zip(logits).fold(
        (0, f32::NEG_INFINITY),
        |best, (token, logit)| {
            if *logit > best.1 { (token, *logit) } else { best }
        },
    );
    best.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn needles_stand_between_sentences_near_their_depth() {
        let needle = |depths: &[f64]| Needle {
            planted: depths.iter().map(|depth| (*depth, "Key.".to_owned())).collect(),
            ..NeedleStyle::Passkey.needle(0, 0.0)
        };
        let prose = "One two. Three four! Five six? Seven";
        for (depths, expected) in [
            (&[0.0][..], "Key. One two. Three four! Five six? Seven"),
            (&[0.3], "One two. Key. Three four! Five six? Seven"),
            (&[0.6], "One two. Three four! Key. Five six? Seven"),
            (&[1.0], "One two. Three four! Five six? Seven Key. "),
            (&[0.9, 0.3], "One two. Key. Three four! Five six? Key. Seven"),
        ] {
            assert_eq!(needle(depths).in_prose(prose), expected, "{depths:?}");
        }
        assert_eq!(needle(&[0.5]).in_prose("no end of it"), "no end Key. of it", "between words");
        assert_eq!(needle(&[0.5]).in_prose(""), "Key. ", "nothing around it");
    }

    #[test]
    fn styles_ask_for_what_they_plant() {
        for style in [NeedleStyle::Passkey, NeedleStyle::Word, NeedleStyle::Multi] {
            let needle = style.needle(3, 0.25);
            let (depth, sentence) = &needle.planted[0];
            assert!(*depth == 0.25 && sentence.contains(needle.answer.trim()), "{needle:?}");
            assert!(!needle.question.contains(needle.answer.trim()), "{needle:?}");
            assert_eq!(needle, style.needle(3, 0.25), "the seed decides");
        }
        let depths: Vec<f64> = NeedleStyle::Multi.needle(3, 0.5).planted.iter().map(|(depth, _)| *depth).collect();
        assert_eq!(depths, [0.5, 0.75, 0.0, 0.25], "spread over the document");
        assert_ne!(NeedleStyle::Passkey.needle(1, 0.1), NeedleStyle::Passkey.needle(2, 0.1), "another seed");
    }

    #[test]
    fn rows_count_prefixes_questions_and_answers() {
        let task = NeedleTask { tokens: vec![0; 120], document: 100, answer: vec![0; 5] };
        let two: Vec<Compression> =
            ["kivi4", "skip-prefill:3.."].map(|text| text.parse().expect("a compression")).into();
        assert_eq!(task.rows(&two, false), 2 * 100 + 3 * 24, "one forks, one reads its own");
        assert_eq!(task.rows(&[], true), 119 + 5, "the full cache alone");
        assert_eq!(likeliest(&[0.5, 2.0, 2.0, f32::NAN]), 1, "the first of equals");
    }
}
