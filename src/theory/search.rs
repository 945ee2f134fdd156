//! The search for compressions that reach a target, such as `cost(1M) <= cost(4k)`: the paper's closing question.
//!
//! ```text
//! METRIC(CONTEXT) <= METRIC(CONTEXT) | NUMBER       left under a compression, right without one
//! cost      bytes of the cache                      NUMBER in bytes: 2GiB
//! prefill   seconds to the first token              NUMBER in seconds: 30s
//! decode    seconds per token, alone                NUMBER in seconds: 20ms
//! switch    seconds out and back                    NUMBER in seconds
//! users     sessions that fit                       >= instead of <=, NUMBER without a unit
//! ```
//!
//! Candidates are one method of each dimension: those of layers and heads, parts of the tokens, and codecs. Token methods that
//! keep the same part hold the same bytes, so for each part the one stands that cost least where it was measured.

use std::str::FromStr;

use serde::Serialize;

use super::challenges::{Scene, challenges};
use super::model::Decoder;
use super::quality::{Quality, QualityTable, factors};
use super::step::Machine;
use crate::compression::Compression;
use crate::compression::token::{Budget, Eviction, TokenPolicy};
use crate::geometry::Bytes;

/// What a goal compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Bytes of the cache.
    Cost,
    /// Seconds to the first token.
    Prefill,
    /// Seconds per token.
    Decode,
    /// Seconds out and back.
    Switch,
    /// Sessions that fit.
    Users,
}

const METRICS: [(&str, Metric); 5] = [
    ("cost", Metric::Cost),
    ("prefill", Metric::Prefill),
    ("decode", Metric::Decode),
    ("switch", Metric::Switch),
    ("users", Metric::Users),
];

/// The right side of a goal.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    /// A metric at a context, over a full cache.
    Full(Metric, u32),
    /// A number: bytes, seconds or sessions.
    Number(f64),
}

/// What is looked for.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Goal {
    /// As it was written.
    pub text: String,
    /// What is compared.
    pub metric: Metric,
    /// At which context, in tokens.
    pub context_tokens: u32,
    /// With what.
    pub limit: Limit,
}

/// A number of tokens, where `k` and `M` stand for thousands and millions.
///
/// # Errors
/// A sentence.
pub fn tokens(text: &str) -> Result<u32, String> {
    let text = text.trim();
    let (number, times) = match text.strip_suffix(['k', 'K']) {
        Some(number) => (number, 1e3),
        None => text.strip_suffix(['M', 'm']).map_or((text, 1.0), |number| (number, 1e6)),
    };
    let value = number.trim().parse::<f64>().ok().map(|n| (n * times).round());
    let fits = value.filter(|n| (1.0..=1e9).contains(n));
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "range checked above")]
    fits.map(|n| n as u32).ok_or_else(|| format!("'{text}' is no number of tokens from 1 to 1000M, such as 50k or 1M"))
}

fn term(text: &str) -> Result<(Metric, u32), String> {
    let wrong = || {
        let names: Vec<_> = METRICS.iter().map(|(name, _)| format!("{name}(TOKENS)")).collect();
        format!("'{}' is none of {}", text.trim(), names.join(", "))
    };
    let (name, rest) = text.trim().split_once('(').ok_or_else(wrong)?;
    let context = rest.strip_suffix(')').ok_or_else(wrong)?;
    let (_, metric) = METRICS.iter().find(|(known, _)| *known == name.trim()).ok_or_else(wrong)?;
    Ok((*metric, tokens(context)?))
}

fn limit(text: &str, metric: Metric) -> Result<Limit, String> {
    let text = text.trim();
    if text.contains('(') {
        let (right, context) = term(text)?;
        if right != metric {
            return Err(format!("'{text}' is another quantity than the left side; compare a metric with itself"));
        }
        return Ok(Limit::Full(right, context));
    }
    let number = |text: &str| text.trim().parse::<f64>().ok().filter(|n| n.is_finite() && *n > 0.0);
    let seconds = || match text.strip_suffix("ms") {
        Some(ms) => number(ms).map(|n| n / 1e3),
        None => number(text.strip_suffix('s').unwrap_or(text)),
    };
    let value = match metric {
        Metric::Cost => text.parse::<Bytes>().ok().filter(|b| b.0 > 0).map(|b| b.0 as f64),
        Metric::Users => number(text),
        Metric::Prefill | Metric::Decode | Metric::Switch => seconds(),
    };
    let example = match metric {
        Metric::Cost => "bytes, such as 2GiB",
        Metric::Users => "a number of sessions, such as 20",
        Metric::Prefill | Metric::Decode | Metric::Switch => "seconds, such as 1.5s or 20ms",
    };
    value
        .map(Limit::Number)
        .ok_or_else(|| format!("'{text}' is no limit; write {example}, or the same metric at another context"))
}

impl FromStr for Goal {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (left, right, more) = match (text.split_once("<="), text.split_once(">=")) {
            (Some((left, right)), None) => (left, right, false),
            (None, Some((left, right))) => (left, right, true),
            _ => {
                return Err(format!(
                    "'{text}' is no goal; write one such as 'cost(1M) <= cost(4k)' or 'users(50k) >= 20'"
                ));
            }
        };
        let (metric, context_tokens) = term(left)?;
        if more != (metric == Metric::Users) {
            return Err(format!("'{text}' asks for the worse; users are to be >=, everything else <="));
        }
        Ok(Self { text: text.trim().to_owned(), metric, context_tokens, limit: limit(right, metric)? })
    }
}

/// A dimension of a stack.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Factor {
    /// As it is parsed.
    pub compression: String,
    /// How many times fewer bytes than the full cache it alone holds.
    pub times_smaller: f64,
    /// What it costs alone, where it was measured.
    pub quality: Option<Quality>,
}

/// A compression that reaches a goal.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Found {
    /// As it is parsed.
    pub compression: String,
    /// The left side of the goal under it.
    pub value: f64,
    /// How many times fewer bytes than the full cache it holds.
    pub times_smaller: f64,
    /// Its dimensions.
    pub factors: Vec<Factor>,
    /// What it costs as a whole, where it was measured.
    pub quality: Option<Quality>,
}

impl Found {
    /// Dimensions that nobody measured.
    pub fn unknown(&self) -> usize {
        self.factors.iter().filter(|factor| factor.kl().is_none()).count()
    }

    /// The sum of what the measured dimensions cost alone, mean KL in nats: a hint, since errors do not simply add up.
    pub fn known_kl(&self) -> f64 {
        self.factors.iter().filter_map(Factor::kl).sum()
    }
}

impl Factor {
    fn kl(&self) -> Option<f64> {
        self.quality.as_ref().and_then(|quality| quality.mean_kl)
    }
}

/// What a search came to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Search {
    /// What was looked for.
    pub goal: Goal,
    /// The left side over a full cache.
    pub full: f64,
    /// The right side.
    pub limit: f64,
    /// Stacks that were tried.
    pub tried: usize,
    /// Those that reach the goal.
    pub reached: usize,
    /// Of these, the ones that no other beats in what it costs and in what it holds, the best known first: whole stacks that were measured, then by dimensions that were not, then by
    /// the cost of those that were.
    pub found: Vec<Found>,
    /// Of all stacks that were measured as a whole and keep the mean KL below [`KEEPS_QUALITY`], the smallest.
    pub smallest_known: Option<Found>,
}

/// Mean KL up to which a stack is said to keep quality, in nats: about that of `kivi4` over every page of a small model, which
/// changes one most probable token in twenty.
pub const KEEPS_QUALITY: f64 = 0.05;

/// Layers, heads and parts of tokens that are tried.
const LAYERS: [&str; 5] = ["full", "share:2", "share:4", "share:8", "minicache"];
const HEADS: [&str; 6] = ["full", "duo:0.5", "duo:0.25", "duo:0.1", "duo:0.4:sink16:recent128", "prune:0.9"];
const PARTS: [u32; 12] = [500, 450, 250, 200, 100, 50, 30, 20, 10, 5, 2, 1];
const HIDDEN: [&str; 10] =
    ["f16", "int8", "kivi4", "kivi4:64", "mean+rot4", "mean+rot3", "rot3", "kivi2", "mean+rot2", "rot2"];

/// The token policy that cost least where this part, or the next larger one that was measured, stayed; with this part.
fn best_policy(quality: &QualityTable, part: u32) -> Option<TokenPolicy> {
    let mut known: Vec<(u32, f64, TokenPolicy)> = quality
        .rows()
        .filter(|(compression, _)| factors(compression).len() == 1)
        .filter_map(|(compression, row)| {
            let TokenPolicy::Evict(eviction) = compression.token else { return None };
            let Budget::Ratio { permille } = eviction.budget else { return None };
            let policy = TokenPolicy::Evict(Eviction { budget: Budget::Ratio { permille: part }, ..eviction });
            (permille >= part).then_some((permille, row.mean_kl?, policy))
        })
        .collect();
    known.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
    known.first().map(|(_, _, policy)| *policy)
}

/// Every stack that is tried; methods that can not go together are left out.
pub fn candidates(quality: &QualityTable) -> Vec<Compression> {
    let read = |dimension: &str, method: &str| -> Compression {
        format!("{dimension}={method}").parse().expect("a method that the registry has")
    };
    let tokens = PARTS.iter().filter_map(|part| best_policy(quality, *part));
    let tokens: Vec<TokenPolicy> = std::iter::once(TokenPolicy::Full).chain(tokens).collect();
    let mut all: Vec<Compression> = Vec::new();
    for layer in LAYERS.map(|method| read("layer", method).layer) {
        for head in HEADS.map(|method| read("head", method).head) {
            for token in &tokens {
                for hidden in HIDDEN.map(|method| read("hidden", method).hidden) {
                    let stack = Compression { layer: layer.clone(), head, token: *token, hidden };
                    all.extend(stack.check_together().is_ok().then_some(stack));
                }
            }
        }
    }
    // What was measured as a whole is worth knowing of, whatever its parts.
    all.extend(quality.rows().map(|(compression, _)| compression.clone()));
    let mut seen = std::collections::BTreeSet::new();
    all.retain(|stack| seen.insert(stack.short()));
    all
}

/// The left side of a goal.
fn value(goal: &Goal, figures: &super::challenges::Challenges) -> Option<f64> {
    match goal.metric {
        Metric::Cost => Some(figures.cache.held_bytes.0 as f64),
        Metric::Prefill => Some(figures.prefill.seconds),
        Metric::Decode => Some(figures.decode.seconds),
        Metric::Switch => figures.switch_s,
        Metric::Users => Some(figures.concurrency as f64),
    }
}

/// Searches for stacks that reach a goal. `scene` says everything but the context.
///
/// # Errors
/// A sentence: the full cache does not fit the model, or there is no link and the goal asks for a switch.
pub fn search(
    goal: &Goal,
    model: &Decoder,
    machine: &Machine,
    scene: &Scene,
    quality: &QualityTable,
) -> Result<Search, String> {
    let at = |compression: &Compression, context_tokens: u32| {
        challenges(model, machine, compression, &Scene { context_tokens, ..*scene })
    };
    let no_link = || "memory is one here, and no cache crosses a link; ask for another metric".to_owned();
    let full = at(&Compression::default(), goal.context_tokens)?;
    let limit = match goal.limit {
        Limit::Number(number) => number,
        Limit::Full(_, context) => value(goal, &at(&Compression::default(), context)?).ok_or_else(no_link)?,
    };
    let times = |held: Bytes| full.cache.held_bytes.0 as f64 / held.0.max(1) as f64;
    let of_factor = |factor: &Compression| Factor {
        compression: factor.short(),
        times_smaller: at(factor, goal.context_tokens).map_or(f64::NAN, |figures| times(figures.cache.held_bytes)),
        quality: quality.of(factor).cloned(),
    };
    let all = candidates(quality);
    let mut found = Vec::new();
    let mut smallest_known: Option<Found> = None;
    for stack in &all {
        // A budget that has no room for what always stays is no candidate.
        let Ok(figures) = at(stack, goal.context_tokens) else { continue };
        let value = value(goal, &figures).ok_or_else(no_link)?;
        let reaches = if goal.metric == Metric::Users { value >= limit } else { value <= limit };
        let whole = quality.of(stack).cloned();
        let keeps = whole.as_ref().and_then(|quality| quality.mean_kl).is_some_and(|kl| kl <= KEEPS_QUALITY);
        if !reaches && !keeps {
            continue;
        }
        let stack = Found {
            compression: stack.short(),
            value,
            times_smaller: times(figures.cache.held_bytes),
            factors: factors(stack).iter().map(of_factor).collect(),
            quality: whole,
        };
        if keeps && smallest_known.as_ref().is_none_or(|known| known.times_smaller < stack.times_smaller) {
            smallest_known = Some(stack.clone());
        }
        found.extend(reaches.then_some(stack));
    }
    let whole = |stack: &Found| stack.quality.as_ref().and_then(|quality| quality.mean_kl);
    // What was measured as a whole is known, whatever its parts.
    let rank = |stack: &Found| if whole(stack).is_some() { (false, 0) } else { (true, stack.unknown()) };
    let kl = |stack: &Found| whole(stack).unwrap_or_else(|| stack.known_kl());
    found.sort_by(|a, b| rank(a).cmp(&rank(b)).then(kl(a).total_cmp(&kl(b))));
    let reached = found.len();
    // Of stacks about which as much is known, one that costs more and holds more is of no use.
    let mut best: Vec<Found> = Vec::new();
    for stack in found {
        let beaten = |known: &Found| rank(known) == rank(&stack) && known.times_smaller >= stack.times_smaller;
        if !best.iter().any(beaten) {
            best.push(stack);
        }
    }
    let full = value(goal, &full).ok_or_else(no_link)?;
    Ok(Search { goal: goal.clone(), full, limit, tried: all.len(), reached, found: best, smallest_known })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::yi_34b;

    const MACHINE: Machine = Machine { flops: 989e12, bandwidth: 3.35e12, link: 50e9, parallel: None };

    fn find(goal: &str) -> Search {
        let scene = Scene {
            context_tokens: 50_000,
            memory_bytes: Bytes(12_000_000_000),
            page_tokens: None,
            chunk_rows: None,
            batch: 1,
        };
        let model = Decoder::dense(yi_34b(), false).expect("a model");
        let goal = goal.parse().unwrap_or_else(|error| panic!("{goal}: {error}"));
        search(&goal, &model, &MACHINE, &scene, &QualityTable::built_in()).expect("a full cache fits")
    }

    #[test]
    fn the_closing_question_needs_250_times_fewer_bytes() {
        let found = find("cost(1M) <= cost(4k)");
        assert!((found.full / found.limit - 250.0).abs() < 1e-9, "{} over {}", found.full, found.limit);
        assert!(found.reached > 100 && found.reached < found.tried, "{} of {}", found.reached, found.tried);
        for stack in &found.found {
            assert!(stack.value <= found.limit && stack.times_smaller >= 250.0, "{stack:?}");
            let alone: f64 = stack.factors.iter().map(|factor| factor.times_smaller).product();
            assert!(alone >= 200.0, "no dimension alone explains {}: {alone}", stack.compression);
            assert_eq!(stack.quality, None, "nobody measured {}", stack.compression);
        }
        assert_eq!(found.found[0].unknown(), 0, "the first has known dimensions: {:?}", found.found[0]);
        let smallest = found.smallest_known.expect("stacks were measured");
        assert!((15.0..30.0).contains(&smallest.times_smaller), "{smallest:?}");
    }

    #[test]
    fn easy_goals_are_reached_by_what_was_measured() {
        let found = find("cost(50k) <= 6GB");
        let first = &found.found[0];
        let kl = first.quality.as_ref().and_then(|quality| quality.mean_kl).expect("measured as a whole");
        assert!(kl < 0.01 && first.value <= 6e9, "{first:?}");
        // Each listed one is the cheapest so far, and costs more than those before it of its kind.
        let known: Vec<_> =
            found.found.iter().filter(|s| s.quality.as_ref().is_some_and(|q| q.mean_kl.is_some())).collect();
        assert!(known.windows(2).all(|w| w[1].times_smaller > w[0].times_smaller), "none beats another");
        let users = find("users(50k) >= 10");
        assert!(users.found.iter().all(|stack| stack.value >= 10.0), "at least ten");
        let decode = find("decode(1M) <= 25ms");
        assert!(decode.full > 0.09 && decode.found.iter().all(|stack| stack.value <= 0.025), "{}", decode.full);
    }

    #[test]
    fn goals_that_make_no_sense_are_refused() {
        for (text, why) in [
            ("cost(1M)", "write one such as"),
            ("cost(1M) >= cost(4k)", "asks for the worse"),
            ("users(1M) <= 3", "asks for the worse"),
            ("price(1M) <= 3", "none of cost(TOKENS)"),
            ("cost(0) <= 3GB", "no number of tokens"),
            ("cost(1M) <= decode(4k)", "another quantity"),
            ("cost(1M) <= -3GB", "such as 2GiB"),
            ("decode(1M) <= fast", "such as 1.5s"),
            ("cost(1M) <= 1GB >= 2GB", "write one such as"),
        ] {
            let refused = text.parse::<Goal>().expect_err(text);
            assert!(refused.contains(why), "{text}: {refused}");
        }
        let goal: Goal = " decode( 1M ) <= 25ms ".parse().expect("a goal");
        assert_eq!(
            (goal.metric, goal.context_tokens, goal.limit),
            (Metric::Decode, 1_000_000, Limit::Number(0.025)),
            "read"
        );
    }
}
