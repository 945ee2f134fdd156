//! What each (layer, KV head) is worth: how much its queries find again far back.
//!
//! ```text
//! random tokens, twice     induction = p(token after the earlier occurrence), echo = p(the earlier occurrence itself)
//! needles in prose         copy      = p(the needle's token) of the row that produces its copy
//! prose                    reach     = attention that lies beyond first and recent tokens
//! ```
//!
//! Attention probabilities `p` are the largest over the query heads of a KV head, which must stay if any of them looks back,
//! and means over rows; reach is a mean over both. Induction and echo are the scores of `RazorAttention` (arXiv:2407.15891),
//! copy is that of retrieval heads (arXiv:2404.15574), with the answer given rather than sampled.

use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::prompt::{Driver, Probe};
use crate::compression::Compression;
use crate::compression::token::{Reduce, Rows, Score};
use crate::engine::{Engine, EngineError};
use crate::schedule::Caches;

/// The slot that everything is observed into.
const SLOT: u32 = 0;
/// The largest probability of one row over the heads.
const ROW: Score = Score::Attention { rows: Rows::Last(1), reduce: Reduce::Max };
/// The attention of all rows, the mean over the heads.
const MASS: Score = Score::Attention { rows: Rows::All, reduce: Reduce::Mean };

/// How heads are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct HeadSettings {
    /// Seed of tokens and keys.
    pub seed: u64,
    /// Random tokens that come twice.
    pub random_tokens: usize,
    /// Rows of the second time that are looked at.
    pub rows: usize,
    /// First tokens that reach does not count.
    pub sink: usize,
    /// Recent tokens that it does not count.
    pub recent: usize,
}

/// Tokens in which some are copies of earlier ones.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CopyTask {
    /// All tokens.
    pub tokens: Vec<u32>,
    /// Tokens before the first question.
    pub document: usize,
    /// Rows that produce a copy, ascending, and the tokens that they copy.
    pub copies: Vec<(usize, usize)>,
}

/// Scores per list, `[layer][KV head]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct HeadMeasures {
    /// Looks at what followed the same token before.
    pub induction: Vec<f64>,
    /// Looks at the same token before.
    pub echo: Vec<f64>,
    /// Looks at what it copies.
    pub copy: Vec<f64>,
    /// Looks beyond first and recent tokens of prose.
    pub reach: Vec<f64>,
}

/// What scores a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum HeadScore {
    /// The larger of induction and copy: heads that find again what was said.
    Retrieval,
    /// Attention beyond first and recent tokens: what a window would lose.
    Reach,
    /// The sum of both.
    Both,
}

impl HeadScore {
    /// Its name in files and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Retrieval => "retrieval",
            Self::Reach => "reach",
            Self::Both => "retrieval + reach",
        }
    }
}

impl HeadMeasures {
    /// A score per list.
    pub fn scores(&self, by: HeadScore) -> Vec<f64> {
        let of_list = |list: usize| {
            let retrieval = self.induction[list].max(self.copy[list]);
            match by {
                HeadScore::Retrieval => retrieval,
                HeadScore::Reach => self.reach[list],
                HeadScore::Both => retrieval + self.reach[list],
            }
        };
        (0..self.reach.len()).map(of_list).collect()
    }
}

/// Sums per list, and how many there are.
#[derive(Debug)]
struct Mean {
    sums: Vec<f64>,
    n: usize,
}

impl Mean {
    fn new(lists: usize) -> Self {
        Self { sums: vec![0.0; lists], n: 0 }
    }

    fn add(&mut self, scores: &[Vec<f32>], value: impl Fn(&[f32]) -> f64, n: usize) {
        self.sums.iter_mut().zip(scores).for_each(|(sum, list)| *sum += value(list));
        self.n += n;
    }

    fn end(self) -> Vec<f64> {
        let n = self.n.max(1) as f64;
        self.sums.into_iter().map(|sum| sum / n).collect()
    }
}

impl CopyTask {
    /// Needles at equal distances in a text of `document` tokens, and a question about each behind it: `encode` makes tokens
    /// of a text.
    ///
    /// # Errors
    /// Those of `encode`.
    pub fn new<E>(
        encode: &dyn Fn(&str) -> Result<Vec<u32>, E>,
        prose: &[u32],
        document: usize,
        seed: u64,
    ) -> Result<Self, E> {
        const PLACES: [&str; 8] = ["garden", "cellar", "tower", "kitchen", "stable", "library", "harbour", "attic"];
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut task = Self::default();
        let mut needles = Vec::new();
        let mut prose = prose.iter().copied().cycle();
        let piece = document / (PLACES.len() + 1);
        for place in PLACES {
            task.tokens.extend(prose.by_ref().take(piece));
            let begin = encode(&format!("\nThe pass key of the {place} is "))?;
            let key = encode(&rng.random_range(10_000..100_000_u32).to_string())?;
            task.tokens.extend(begin);
            needles.push((place, task.tokens.len(), key.clone()));
            task.tokens.extend(key);
            task.tokens.extend(encode(". Remember it.\n")?);
        }
        task.tokens.extend(prose.take(piece));
        task.document = task.tokens.len();
        for (place, from, key) in needles {
            let ask = format!("\n\nWhat is the pass key of the {place}? The pass key of the {place} is ");
            task.tokens.extend(encode(&ask)?);
            let row = task.tokens.len() - 1;
            task.copies.extend((0..key.len()).map(|i| (row + i, from + i)));
            task.tokens.extend(key);
            task.tokens.extend(encode(".")?);
        }
        Ok(task)
    }
}

/// Measures all heads over full caches. `vocabulary` are the tokens to draw from; `each` hears of every token that was read,
/// of as many as [`work`] says.
///
/// # Errors
/// [`EngineError`], among them an engine made without evictions or for shorter contexts.
pub fn measure(
    engine: &mut Engine<'_>,
    caches: &mut Caches,
    vocabulary: &[u32],
    task: &CopyTask,
    settings: &HeadSettings,
    chunk: usize,
    each: &mut dyn FnMut(usize),
) -> Result<HeadMeasures, EngineError> {
    let lists = engine.geometry().num_lists() as usize;
    let mut driver = Driver::new(engine, caches);
    let result = (|| {
        let (induction, echo) = repeated(&mut driver, vocabulary, settings, (lists, chunk), each)?;
        let (copy, reach) = copied(&mut driver, task, settings, (lists, chunk), each)?;
        Ok(HeadMeasures { induction, echo, copy, reach })
    })();
    driver.end()?;
    result
}

/// Tokens that a measurement reads.
pub fn work(task: &CopyTask, settings: &HeadSettings) -> usize {
    2 * settings.random_tokens + task.tokens.len()
}

/// Reads `tokens` of a sequence in chunks, and observes the rows at `rows`, ascending, one by one: `at` hears of each and of
/// the probabilities of the tokens so far.
fn observe_rows(
    driver: &mut Driver<'_, '_>,
    probe: Probe,
    tokens: &[u32],
    first: usize,
    rows: impl Iterator<Item = usize>,
    chunk: usize,
    at: &mut dyn FnMut(usize, &[Vec<f32>]),
) -> Result<(), EngineError> {
    let mut done = first;
    for row in rows {
        let next = &tokens[done - first..=row - first];
        driver.prefill_observed(probe, next, 0..0, chunk, &[(ROW, SLOT)], &mut |_, _| ())?;
        done = row + 1;
        at(row, &driver.scores(SLOT, done)?);
    }
    driver.prefill(probe, &tokens[done - first..], 0..0, chunk, &mut |_, _| ())
}

fn repeated(
    driver: &mut Driver<'_, '_>,
    vocabulary: &[u32],
    settings: &HeadSettings,
    (lists, chunk): (usize, usize),
    each: &mut dyn FnMut(usize),
) -> Result<(Vec<f64>, Vec<f64>), EngineError> {
    let n = settings.random_tokens;
    let mut rng = ChaCha8Rng::seed_from_u64(settings.seed);
    let once: Vec<u32> = (0..n).map(|_| vocabulary[rng.random_range(0..vocabulary.len())]).collect();
    let tokens = [&once[..], &once].concat();
    let probe = driver.admit(&Compression::default(), tokens.len(), tokens.len())?;
    let (mut induction, mut echo) = (Mean::new(lists), Mean::new(lists));
    // Rows spread over the second time; the last one is left out, since what followed it is the second time itself.
    let step = (n / settings.rows.max(1)).max(1);
    let rows = (n..2 * n - 1).step_by(step);
    let mut read = 0;
    observe_rows(driver, probe, &tokens, 0, rows, chunk, &mut |row, scores| {
        induction.add(scores, |list| f64::from(list[row - n + 1]), 1);
        echo.add(scores, |list| f64::from(list[row - n]), 1);
        each(row + 1 - read);
        read = row + 1;
    })?;
    each(2 * n - read);
    driver.release(probe)?;
    Ok((induction.end(), echo.end()))
}

fn copied(
    driver: &mut Driver<'_, '_>,
    task: &CopyTask,
    settings: &HeadSettings,
    (lists, chunk): (usize, usize),
    each: &mut dyn FnMut(usize),
) -> Result<(Vec<f64>, Vec<f64>), EngineError> {
    let n = task.tokens.len();
    let probe = driver.admit(&Compression::default(), n, n)?;
    let (mut copy, mut reach) = (Mean::new(lists), Mean::new(lists));
    let mut first = 0_usize;
    for rows in task.tokens[..task.document].chunks(chunk) {
        let beyond = settings.sink..(first + 1).saturating_sub(settings.recent);
        let observed: &[_] = if beyond.is_empty() { &[] } else { &[(MASS, SLOT)] };
        driver.prefill_observed(probe, rows, 0..0, chunk, observed, &mut |_, _| ())?;
        if !beyond.is_empty() {
            let scores = driver.scores(SLOT, first + rows.len())?;
            reach.add(&scores, |list| list[beyond.clone()].iter().map(|p| f64::from(*p)).sum(), rows.len());
        }
        first += rows.len();
        each(rows.len());
    }
    let sources = &task.copies;
    let mut read = first;
    let rows = sources.iter().map(|(row, _)| *row);
    let mut next = sources.iter();
    observe_rows(driver, probe, &task.tokens[first..], first, rows, chunk, &mut |row, scores| {
        let (_, source) = next.next().expect("a row for each copy");
        copy.add(scores, |list| f64::from(list[*source]), 1);
        each(row + 1 - read);
        read = row + 1;
    })?;
    each(n - read);
    driver.release(probe)?;
    Ok((copy.end(), reach.end()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_of_the_needles() {
        let encode = |text: &str| Ok::<_, ()>(text.bytes().map(u32::from).collect());
        let prose: Vec<u32> = "Once upon a time. ".bytes().map(u32::from).collect();
        let task = CopyTask::new(&encode, &prose, 900, 7).expect("no error");
        assert_eq!(task.copies.len(), 8 * 5, "eight keys of five digits");
        assert!(task.copies.is_sorted(), "rows ascend: {:?}", task.copies);
        for (row, source) in &task.copies {
            assert!(*source < task.document && *row >= task.document, "row {row} copies {source}");
            let (copy, digit) = (task.tokens[row + 1], task.tokens[*source]);
            assert!(copy == digit && (48..58).contains(&digit), "row {row} gives {copy}, token {source} is {digit}");
        }
        assert_eq!(CopyTask::new(&encode, &prose, 900, 7), Ok(task.clone()), "the seed decides");
        assert_ne!(CopyTask::new(&encode, &prose, 900, 8), Ok(task), "another seed, other keys");
    }

    #[test]
    fn scores_are_means_and_combinations() {
        let mut mean = Mean::new(2);
        mean.add(&[vec![0.5, 0.25], vec![1.0, 0.0]], |list| f64::from(list[0]), 1);
        mean.add(&[vec![0.0], vec![0.5]], |list| f64::from(list[0]), 1);
        let induction = mean.end();
        assert_eq!(induction, [0.25, 0.75], "means over rows");
        let measures = HeadMeasures { induction, echo: vec![0.0; 2], copy: vec![0.5, 0.0], reach: vec![0.125, 0.25] };
        assert_eq!(measures.scores(HeadScore::Retrieval), [0.5, 0.75], "the larger");
        assert_eq!(measures.scores(HeadScore::Reach), [0.125, 0.25], "reach alone");
        assert_eq!(measures.scores(HeadScore::Both), [0.625, 1.0], "the sum");
    }
}
