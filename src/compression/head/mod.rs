//! The head dimension: which KV heads keep everything, sink and recent tokens only, or nothing.
//!
//! | written | heads of highest score | the others | scores |
//! |---|---|---|---|
//! | `duo:0.5:sink64:recent256` | keep everything | keep first and last tokens | `DuoAttention`, arXiv:2410.10819 |
//! | `prune:0.9` | keep everything | keep nothing | any that say what a head is worth |
//!
//! Most heads look at the first tokens and the recent ones; few find things again over the whole context, and those need
//! it. The score of a (layer, KV head) says how much: trained gates, or any other measure. Scores are a property of the
//! model; [`HeadScores`] reads them from a file.

use std::fmt;
use std::str::FromStr;

use super::syntax;

mod scores;

pub use scores::HeadScores;

/// Sink of [`HeadPattern::Duo`] where none is given.
const SINK: u32 = 64;
/// Recent tokens of [`HeadPattern::Duo`] where none are given.
const RECENT: u32 = 256;

/// A way to write a head pattern.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The name that it is written with.
    pub name: &'static str,
    /// As it is written, parameters as letters.
    pub syntax: &'static str,
    /// What it does, in one line.
    pub summary: &'static str,
    /// Where it comes from.
    pub source: &'static str,
    /// What is taken where a parameter is left out, as it is written.
    pub defaults: &'static [&'static str],
    /// Written-out examples: what tests and listings cover.
    pub examples: &'static [&'static str],
}

/// Every head pattern.
pub const REGISTRY: &[Entry] = &[
    Entry {
        name: "duo",
        syntax: "duo:PART[:sinkN][:recentN]",
        summary: "the best PART of the KV heads keep everything, the others first and last tokens",
        source: "DuoAttention, arXiv:2410.10819",
        defaults: &["sink64", "recent256"],
        examples: &["duo:0.5", "duo:0.5:sink16:recent128"],
    },
    Entry {
        name: "prune",
        syntax: "prune:PART",
        summary: "the best PART of the KV heads keep everything, the others nothing",
        source: "",
        defaults: &[],
        examples: &["prune:0.9"],
    },
];

/// What each (layer, KV head) keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum HeadPattern {
    /// Every head keeps everything.
    #[default]
    Full,
    /// Few keep everything, the others a window.
    Duo {
        /// Lists that keep everything, of 1000.
        full_permille: u32,
        /// First tokens that the others keep.
        sink: u32,
        /// Last tokens that the others keep.
        recent: u32,
    },
    /// Few keep nothing.
    Prune {
        /// Lists that keep everything, of 1000.
        keep_permille: u32,
    },
}

/// What one list (layer, KV head) keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ListPattern {
    /// What the token dimension says.
    Full,
    /// First and last tokens.
    Window {
        /// First tokens.
        sink: u32,
        /// Last tokens.
        recent: u32,
    },
    /// No token.
    Nothing,
}

/// Whether a text begins with the name of a pattern.
pub(super) fn knows(text: &str) -> bool {
    REGISTRY.iter().any(|entry| text.split(':').next() == Some(entry.name))
}

/// All ways to write a pattern.
pub(super) fn known() -> String {
    let patterns: Vec<_> = REGISTRY.iter().map(|entry| entry.syntax).collect();
    format!("head knows full, {}", patterns.join(", "))
}

/// All examples of the registry.
pub fn examples() -> impl Iterator<Item = HeadPattern> {
    let written = REGISTRY.iter().flat_map(|entry| entry.examples);
    written.map(|text| text.parse().expect("the registry's examples should parse"))
}

impl FromStr for HeadPattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "full" {
            return Ok(Self::Full);
        }
        let mut parts = text.split(':');
        let name = parts.next().unwrap_or_default();
        if !knows(name) {
            return Err(format!("head={text} is not available: {}", known()));
        }
        let given = parts.next().unwrap_or_default();
        let permille = syntax::permille(given).filter(|permille| *permille > 0 || name == "duo").ok_or_else(|| {
            format!("head={text}: give the part of the KV heads that keep everything, at most 1, such as {name}:0.5")
        })?;
        if name == "prune" {
            return match parts.next() {
                None => Ok(Self::Prune { keep_permille: permille }),
                Some(option) => Err(format!("head={text}: prune has no option '{option}'")),
            };
        }
        let (mut sink, mut recent) = (None, None);
        for option in parts {
            let (number, place) = match (syntax::option(option, "sink"), syntax::option(option, "recent")) {
                (Some(number), _) => (number, &mut sink),
                (_, Some(number)) => (number, &mut recent),
                _ => return Err(format!("head={text}: duo has sinkN and recentN, not '{option}'")),
            };
            let number = syntax::count(number).ok_or_else(|| format!("head={text}: '{option}' has no whole number"))?;
            if place.replace(number).is_some() {
                return Err(format!("head={text} gives the same option twice"));
            }
        }
        let (sink, recent) = (sink.unwrap_or(SINK), recent.unwrap_or(RECENT));
        if recent == 0 {
            return Err(format!("head={text}: a row attends to its own token, so recent is at least 1"));
        }
        Ok(Self::Duo { full_permille: permille, sink, recent })
    }
}

impl fmt::Display for HeadPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Full => f.write_str("full"),
            Self::Prune { keep_permille } => write!(f, "prune:{}", syntax::part(keep_permille)),
            Self::Duo { full_permille, sink, recent } => {
                write!(f, "duo:{}", syntax::part(full_permille))?;
                if sink != SINK {
                    write!(f, ":sink{sink}")?;
                }
                if recent != RECENT {
                    write!(f, ":recent{recent}")?;
                }
                Ok(())
            }
        }
    }
}

impl HeadPattern {
    /// The part of the lists that keeps everything, of 1000, and what the others keep; none where all keep everything.
    const fn parts(&self) -> Option<(u32, ListPattern)> {
        match *self {
            Self::Full => None,
            Self::Duo { full_permille, sink, recent } => Some((full_permille, ListPattern::Window { sink, recent })),
            Self::Prune { keep_permille } => Some((keep_permille, ListPattern::Nothing)),
        }
    }

    /// What each of so many lists keeps where nobody has scored them: as many keep everything, evenly apart. What that takes
    /// is what scores would come to; which lists they are is not.
    ///
    /// # Errors
    /// A sentence when no list would keep anything.
    pub fn spread(&self, num_lists: u32) -> Result<Vec<ListPattern>, String> {
        let Some((permille, other)) = self.parts() else { return Ok(vec![ListPattern::Full; num_lists as usize]) };
        let full = u64::from(syntax::of(num_lists, permille));
        if full == 0 && other == ListPattern::Nothing {
            return Err(format!("head={self} would keep none of {num_lists} lists"));
        }
        let before = |list: u64| list * full / u64::from(num_lists);
        let of = |list: u64| if before(list + 1) > before(list) { ListPattern::Full } else { other };
        Ok((0..u64::from(num_lists)).map(of).collect())
    }

    /// What each list keeps, at `layer * num_kv_heads + kv_head`: those of highest score everything, as many as the part
    /// of all lists rounds to; among equals the first.
    ///
    /// # Errors
    /// A sentence: without scores, with scores of another shape, or when no list would keep anything.
    pub fn lists(
        &self,
        scores: Option<&HeadScores>,
        num_layers: u32,
        num_kv_heads: u32,
    ) -> Result<Vec<ListPattern>, String> {
        let num_lists = num_layers * num_kv_heads;
        let Some((permille, other)) = self.parts() else { return Ok(vec![ListPattern::Full; num_lists as usize]) };
        let scores = scores.ok_or_else(|| {
            format!(
                "head={self} needs a score per layer and KV head: run `concertina calibrate heads`, or give \
                 --head-scores FILE"
            )
        })?;
        scores.check_shape(num_layers, num_kv_heads)?;
        let full = syntax::of(num_lists, permille) as usize;
        if full == 0 && other == ListPattern::Nothing {
            return Err(format!("head={self} would keep none of {num_lists} lists"));
        }
        let mut best: Vec<usize> = (0..num_lists as usize).collect();
        best.sort_by(|a, b| scores.scores[*b].total_cmp(&scores.scores[*a]));
        let mut lists = vec![other; num_lists as usize];
        best[..full].iter().for_each(|list| lists[*list] = ListPattern::Full);
        Ok(lists)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_parses_back() {
        for pattern in examples() {
            assert_eq!(pattern.to_string().parse(), Ok(pattern), "{pattern}");
        }
        let printed = |text: &str| text.parse::<HeadPattern>().map(|pattern| pattern.to_string());
        assert_eq!(printed("duo:0.50:recent256:sink64"), Ok("duo:0.5".into()), "defaults are left out");
        for (text, reason) in [
            ("", "head knows full, duo:PART"),
            ("gqa:0.5", "head knows full"),
            ("duo", "such as duo:0.5"),
            ("duo:1.5", "at most 1"),
            ("prune:0", "at most 1"),
            ("prune:0.5:sink4", "no option"),
            ("duo:0.5:sink", "sinkN and recentN"),
            ("duo:0.5:sink4:sink5", "twice"),
            ("duo:0.5:recent0", "at least 1"),
        ] {
            let refused = text.parse::<HeadPattern>().expect_err(text);
            assert!(refused.contains(reason), "{text}: {refused}");
        }
    }

    #[test]
    fn the_best_lists_keep_everything() {
        let scores = HeadScores::parse("0.5\t0.9\n0.5\t0.1\n0.7\t0.5\n").expect("three layers of two heads");
        let window = ListPattern::Window { sink: 64, recent: 256 };
        let lists = |text: &str| text.parse::<HeadPattern>()?.lists(Some(&scores), 3, 2);
        let (full, nothing) = (ListPattern::Full, ListPattern::Nothing);
        assert_eq!(lists("duo:0.5"), Ok(vec![full, full, window, window, full, window]), "a tie goes to the first");
        assert_eq!(lists("prune:0.9"), Ok(vec![full, full, full, nothing, full, full]), "5.4 lists are 5");
        assert_eq!(lists("duo:0"), Ok(vec![window; 6]), "none");
        assert_eq!(lists("full"), Ok(vec![full; 6]), "all");
        assert!(lists("prune:0.05").is_err_and(|e| e.contains("none of 6")), "nothing at all");
        let spread = |text: &str| text.parse::<HeadPattern>()?.spread(6);
        assert_eq!(spread("duo:0.5"), Ok(vec![window, full, window, full, window, full]), "evenly apart");
        assert_eq!(
            spread("prune:0.9").map(|all| all.iter().filter(|l| **l == full).count()),
            Ok(5),
            "as many as scored"
        );
        assert_eq!(spread("full"), Ok(vec![full; 6]), "all");
        assert!(spread("prune:0.05").is_err_and(|e| e.contains("none of 6")), "nothing at all");
        let duo: HeadPattern = "duo:0.5".parse().expect("a pattern");
        assert!(duo.lists(None, 3, 2).is_err_and(|e| e.contains("concertina calibrate heads")), "no scores");
        assert!(duo.lists(Some(&scores), 2, 3).is_err_and(|e| e.contains("3 layers of 2")), "another shape");
    }
}
