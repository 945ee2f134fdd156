//! What compression costs in quality: next-token distributions over a compressed cache against those over the full one.
//!
//! ```text
//! KL(position)    = sum_token p(token) (ln p(token) - ln q(token))     p over the full cache, q over the compressed one
//! nll             = mean over the tail of -ln q(next token of the text)
//! top-1 agreement = part of the tail's positions at which both have the same most probable token
//! ```
//!
//! A window of text is a prefix and a tail. Each cache is filled with the prefix, then the tail is fed token by token, the same
//! tokens whatever the model would have said; all caches advance together, one row each in a step, so that the sessions
//! of one batch have different codecs. This is policy error: the kernels' own error is `verify`'s business.

use serde::{Deserialize, Serialize};

use super::prompt::{Driver, Probe};
use crate::compression::Compression;
use crate::compression::token::{Score, TokenPolicy};
use crate::engine::{Engine, EngineError};
use crate::geometry::Bytes;
use crate::reference::compare::{agree_top1, kl_divergence, log_sum_exp, widen};
use crate::schedule::{Caches, REPEAT_ROOM};

/// When the prefix is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PrefixSealing {
    /// The prefix is read over a full cache, which is then compressed: what the cache alone costs. All caches are made from
    /// one prefix.
    AfterPrefix,
    /// Where nothing is evicted, every page is sealed in the step that fills it, and the rest of the prefix reads it sealed:
    /// what a session does.
    WhenFull,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct KlSettings {
    /// Tokens of the prefix.
    pub prefix_tokens: usize,
    /// Tokens of the tail.
    pub tail_tokens: usize,
    /// When the prefix is compressed.
    pub sealing: PrefixSealing,
}

impl KlSettings {
    /// Tokens of a window: the last one is only a target.
    pub const fn window(&self) -> usize {
        self.prefix_tokens + self.tail_tokens + 1
    }

    /// Windows of a text, one after another from its start, at most `max_windows`.
    ///
    /// # Errors
    /// A sentence with the numbers when there is none.
    pub fn windows<'t>(&self, tokens: &'t [u32], max_windows: usize) -> Result<Vec<&'t [u32]>, String> {
        let (prefix, tail) = (self.prefix_tokens, self.tail_tokens);
        if prefix == 0 || tail == 0 || max_windows == 0 {
            return Err(format!(
                "{max_windows} windows with a prefix of {prefix} and a tail of {tail} tokens are nothing"
            ));
        }
        let windows: Vec<_> = tokens.chunks_exact(self.window()).take(max_windows).collect();
        if windows.is_empty() {
            let (n, window) = (tokens.len(), self.window());
            return Err(format!(
                "the text has {n} tokens; a prefix of {prefix}, a tail of {tail} and one token to predict take {window}"
            ));
        }
        Ok(windows)
    }
}

/// The divergence of one compression from the full cache.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct KlResult {
    /// What was done to the cache, in the form that `--compress` reads.
    pub compression: String,
    /// KL of every position of the tail, window after window, in nats.
    pub kl: Vec<f64>,
    /// Their mean.
    pub mean_kl: f64,
    /// Their median.
    pub median_kl: f64,
    /// The largest.
    pub max_kl: f64,
    /// Mean negative log-likelihood of the text, in nats.
    pub nll: f64,
    /// Part of the positions at which the most probable token is that of the full cache.
    pub top1_agreement: f64,
    /// Bytes of pages held once the prefix is compressed, from the pool's counters.
    pub held_bytes: Bytes,
    /// Tokens held then, over all lists.
    pub held_tokens: u64,
}

/// What one cache did in one window, or in several.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct KlSums {
    /// KL of every position.
    kl: Vec<f64>,
    /// Sum of negative log-likelihoods.
    nll: f64,
    /// Positions with the same most probable token.
    agreed: usize,
    /// Bytes held in the last window.
    held: Bytes,
    /// Tokens held then.
    tokens: u64,
}

impl KlSums {
    /// Another window of the same cache.
    fn join(mut self, next: &Self) -> Self {
        self.kl.extend_from_slice(&next.kl);
        let (nll, agreed) = (self.nll + next.nll, self.agreed + next.agreed);
        Self { kl: self.kl, nll, agreed, held: next.held, tokens: next.tokens }
    }

    fn add(&mut self, full: &[f64], logits: &[f64], target: u32) {
        self.kl.push(kl_divergence(full, logits));
        self.nll += log_sum_exp(logits) - logits[target as usize];
        self.agreed += usize::from(agree_top1(full, logits));
    }

    fn result(self, compression: &Compression) -> KlResult {
        let n = self.kl.len() as f64;
        let mut sorted = self.kl.clone();
        sorted.sort_by(f64::total_cmp);
        KlResult {
            compression: compression.to_string(),
            mean_kl: self.kl.iter().sum::<f64>() / n,
            median_kl: median(&sorted),
            max_kl: sorted.last().copied().unwrap_or(f64::NAN),
            nll: self.nll / n,
            top1_agreement: self.agreed as f64 / n,
            held_bytes: self.held,
            held_tokens: self.tokens,
            kl: self.kl,
        }
    }
}

/// The middle of sorted values.
fn median(sorted: &[f64]) -> f64 {
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

/// How far a measurement is: prefixes read and tail steps taken, of so many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Prompt tokens computed, and tail steps.
    pub done: usize,
    /// Of so many.
    pub total: usize,
}

/// Prefixes that a window reads: one for the full cache and those made of it, one for each other.
pub fn prefixes(compressions: &[Compression], settings: &KlSettings) -> usize {
    1 + compressions.iter().filter(|compression| !forks(compression, settings)).count()
}

/// Measures `compressions` against the full cache over one window: sums of the full cache itself, then of each compression.
/// `chunk` are rows of a prompt step; `each` hears of steps of [`Progress`].
///
/// # Errors
/// [`EngineError`], among them a pool too small for all caches at once.
pub fn window(
    engine: &mut Engine<'_>,
    caches: &mut Caches,
    compressions: &[Compression],
    window: &[u32],
    settings: &KlSettings,
    chunk: usize,
    each: &mut dyn FnMut(usize),
) -> Result<Vec<KlSums>, EngineError> {
    let all: Vec<Compression> = std::iter::once(Compression::default()).chain(compressions.iter().cloned()).collect();
    let mut driver = Driver::new(engine, caches);
    let result = measure(&mut driver, &all, window, settings, chunk, each);
    driver.end()?;
    result
}

/// Results over all windows, each with the sums of the full cache and of every compression.
pub fn results(compressions: &[Compression], windows: &[Vec<KlSums>]) -> Vec<KlResult> {
    let full = Compression::default();
    let all = std::iter::once(&full).chain(compressions).enumerate();
    let of_cache = |at: usize| windows.iter().fold(KlSums::default(), |sums, window| sums.join(&window[at]));
    all.map(|(at, compression)| of_cache(at).result(compression)).collect()
}

/// Slots of what policies observe of the prefix, and of each compression the slot that its eviction reads. Policies that
/// rank by keys or by chance share one that observes nothing; what ranks nothing needs none.
pub fn slots(compressions: &[Compression]) -> (Vec<(Score, u32)>, Vec<u32>) {
    let mut observed: Vec<(Score, u32)> = Vec::new();
    let mut of_each = Vec::with_capacity(compressions.len());
    for compression in compressions {
        let score = compression.token.eviction().map_or(Score::None, |eviction| eviction.rule(u32::MAX).score);
        if score == Score::None {
            of_each.push(0);
            continue;
        }
        let score = if needs_slot(&score) { score } else { Score::None };
        let slot = observed.iter().position(|(other, _)| *other == score).unwrap_or_else(|| {
            observed.push((score, u32::try_from(observed.len()).expect("policies are few")));
            observed.len() - 1
        });
        of_each.push(observed[slot].1);
    }
    (observed, of_each)
}

const fn needs_slot(score: &Score) -> bool {
    matches!(score, Score::Attention { .. } | Score::Expected { .. } | Score::Reconstruction)
}

/// Whether a cache reads its prefix itself, since the full cache has not what it needs of it.
pub(super) const fn reads_itself(compression: &Compression) -> bool {
    compression.layer.skip_prefill.is_some() || matches!(compression.token, TokenPolicy::Quest { .. })
}

/// Whether a cache can be made of the full one's prefix.
fn forks(compression: &Compression, settings: &KlSettings) -> bool {
    let own =
        reads_itself(compression) || (settings.sealing == PrefixSealing::WhenFull && !Caches::evicts(compression));
    !own
}

fn measure(
    driver: &mut Driver<'_, '_>,
    all: &[Compression],
    window: &[u32],
    settings: &KlSettings,
    chunk: usize,
    step: &mut dyn FnMut(usize),
) -> Result<Vec<KlSums>, EngineError> {
    let (prefix, rest) = window.split_at(settings.prefix_tokens);
    let compressed = &all[1..];
    let (observed, slots) = slots(compressed);
    let room = if observed.iter().any(|(score, _)| *score == Score::Reconstruction) { REPEAT_ROOM as usize } else { 0 };
    let full = driver.admit(&all[0], prefix.len(), window.len() - 1 + room)?;
    driver.prefill_observed(full, prefix, 0..0, chunk, &observed, &mut |_, _| ())?;
    step(prefix.len());
    // A repetition takes pages of it for good.
    let of_full = KlSums { held: driver.held_bytes(full), tokens: driver.held_tokens(full), ..KlSums::default() };
    if let Some((_, slot)) = observed.iter().find(|(score, _)| *score == Score::Reconstruction) {
        driver.reconstruct(full, prefix, *slot)?;
    }
    let mut probes = vec![full];
    for (compression, slot) in compressed.iter().zip(slots) {
        if forks(compression, settings) {
            probes.push(driver.fork(full, compression, slot, window.len() - 1 - prefix.len())?);
            continue;
        }
        let probe = driver.admit(compression, prefix.len(), window.len() - 1)?;
        driver.prefill(probe, prefix, 0..0, chunk, &mut |_, _| ())?;
        step(prefix.len());
        probes.push(probe);
    }
    let begin = |probe: &Probe| KlSums {
        held: driver.held_bytes(*probe),
        tokens: driver.held_tokens(*probe),
        ..KlSums::default()
    };
    let mut sums: Vec<KlSums> = std::iter::once(of_full).chain(probes[1..].iter().map(begin)).collect();
    for pair in rest.windows(2) {
        let rows: Vec<(Probe, u32)> = probes.iter().map(|probe| (*probe, pair[0])).collect();
        let logits: Vec<Vec<f64>> = driver.decode(&rows)?.iter().map(|row| widen(row)).collect();
        sums.iter_mut().zip(&logits).for_each(|(sums, row)| sums.add(&logits[0], row, pair[1]));
        step(1);
    }
    Ok(sums)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_hold_a_prefix_a_tail_and_a_target() {
        let settings = KlSettings { prefix_tokens: 5, tail_tokens: 2, sealing: PrefixSealing::AfterPrefix };
        let tokens: Vec<u32> = (0..20).collect();
        assert_eq!(settings.windows(&tokens, 9).expect("two windows"), [&tokens[..8], &tokens[8..16]], "whole windows");
        assert!(settings.windows(&tokens[..7], 9).expect_err("too short").contains("7 tokens"), "the numbers");
        assert!(settings.windows(&tokens, 0).is_err(), "no window");
    }

    #[test]
    fn policies_that_observe_the_same_share_a_slot() {
        let compressions = |texts: &[&str]| -> Vec<Compression> {
            texts.iter().map(|text| text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))).collect()
        };
        let (observed, of_each) = slots(&compressions(&["int8", "streaming:0.5", "duo:0.5", "share:2"]));
        assert!(observed.is_empty(), "an engine without slots has none to clear: {observed:?}");
        assert_eq!(of_each, [0; 4], "nothing is ranked");
        let all = ["snapkv:0.5", "h2o:0.5", "int8", "snapkv:0.1,hidden=int8", "keydiff:0.5", "random:0.5", "kvzip:0.5"];
        let (observed, of_each) = slots(&compressions(&["token=snapkv:0.5", "token=h2o:0.5"]));
        assert_eq!((observed.len(), of_each), (2, vec![0, 1]), "the last rows, and all");
        let all = all.map(|text| if text.contains("hidden") { format!("token={text}") } else { text.to_owned() });
        let (observed, of_each) = slots(&compressions(&all.iter().map(String::as_str).collect::<Vec<_>>()));
        assert_eq!(of_each, [0, 1, 0, 0, 2, 2, 3], "keys and chance are written over what nobody observes");
        let scores: Vec<bool> = observed.iter().map(|(score, _)| needs_slot(score)).collect();
        assert_eq!(scores, [true, true, false, true], "all but the third are observed");
    }

    #[test]
    fn results_are_means_medians_and_counts() {
        let mut sums = KlSums::default();
        let full = [0.0, 3.0_f64.ln()];
        sums.add(&full, &full, 1);
        sums.add(&full, &[3.0_f64.ln(), 0.0], 0);
        let mut second = KlSums { tokens: 7, ..KlSums::default() };
        second.add(&full, &full, 0);
        let windows = [vec![sums], vec![second]];
        let [result] = &results(&[], &windows)[..] else { panic!("the full cache alone") };
        assert_eq!(result.held_tokens, 7, "of the last window");
        // KL of (1/4, 3/4) against (3/4, 1/4).
        let kl = 0.5 * 3.0_f64.ln();
        assert!((result.max_kl - kl).abs() < 1e-12 && result.median_kl == 0.0, "by hand");
        assert!((result.mean_kl - kl / 3.0).abs() < 1e-12, "mean");
        assert!((result.top1_agreement - 2.0 / 3.0).abs() < 1e-12, "two of three agree");
        let nll = ((4.0_f64 / 3.0).ln() + (4.0_f64 / 3.0).ln() + 4.0_f64.ln()) / 3.0;
        assert!((result.nll - nll).abs() < 1e-12, "likelihood");
        assert_eq!(median(&[1.0, 2.0]), 1.5, "between two");
    }
}
