//! What an eviction keeps of given scores: the definition that devices follow exactly.
//!
//! [`domains`] cuts all lists (layer, KV head) into groups that choose together; [`select`] chooses in one.
//!
//! ```text
//! 1. each list keeps its first `sink` and last `recent` tokens
//! 2. each list keeps its best others until it has `floor` tokens
//! 3. the best others of all lists together stay until there are `total`
//! better = larger order_key(score); among equals the lower list, then the lower index
//! ```
//!
//! Steps 1 and 2 do not look at `total`, which [`domains`] never makes smaller than they need; what a list does not have
//! it can not keep.

use std::cmp::Reverse;

use super::head::ListPattern;
use super::token::{Allocation, Eviction, TokenPolicy, pyramidkv};

/// Lists that choose together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Domain {
    /// `layer * num_kv_heads + kv_head`, ascending.
    pub lists: Vec<u32>,
    /// Tokens that stay, over all of them.
    pub total: u32,
    /// Tokens that stay in each, where it has so many.
    pub floor: u32,
    /// First tokens that stay in each.
    pub sink: u32,
    /// Last tokens that stay in each.
    pub recent: u32,
}

/// The lists that there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeepShape {
    /// Layers; where layers share caches, those that own one.
    pub num_layers: u32,
    /// KV heads of a layer.
    pub num_kv_heads: u32,
}

/// One or more domains in the order of their first lists; together every list exactly once.
///
/// Lists that the head pattern leaves [`ListPattern::Full`] follow the token policy, the others keep their window or
/// nothing.
///
/// # Errors
/// A sentence when the budget of so many tokens has no room for what always stays.
///
/// # Panics
/// When `heads` is not one pattern per list.
pub fn domains(
    token: &TokenPolicy,
    shape: KeepShape,
    heads: &[ListPattern],
    n_tokens: u32,
) -> Result<Vec<Domain>, String> {
    let KeepShape { num_layers, num_kv_heads } = shape;
    assert_eq!(heads.len() as u64, u64::from(num_layers) * u64::from(num_kv_heads), "one pattern per list");
    let mut full = Vec::new();
    let mut domains = Vec::new();
    for (list, pattern) in (0..).zip(heads) {
        let alone = |total, sink, recent| Domain { lists: vec![list], total, floor: 0, sink, recent };
        match *pattern {
            ListPattern::Full => full.push(list),
            ListPattern::Window { sink, recent } => {
                domains.push(alone(sink.saturating_add(recent).min(n_tokens), sink, recent));
            }
            ListPattern::Nothing => domains.push(alone(0, 0, 0)),
        }
    }
    match token {
        TokenPolicy::Evict(eviction) if eviction.kept(n_tokens) < n_tokens => {
            domains.extend(evicted(eviction, shape, &full, n_tokens)?);
        }
        // All of them stay, whatever they are worth.
        _ => domains.extend(full.iter().map(|list| Domain {
            lists: vec![*list],
            total: n_tokens,
            floor: 0,
            sink: 0,
            recent: 0,
        })),
    }
    domains.sort_by_key(|domain| domain.lists[0]);
    Ok(domains)
}

/// The domains of the `full` lists when they keep fewer than `n_tokens` tokens.
fn evicted(eviction: &Eviction, shape: KeepShape, full: &[u32], n_tokens: u32) -> Result<Vec<Domain>, String> {
    let kept = eviction.kept(n_tokens);
    eviction.check_kept(kept)?;
    let rule = eviction.rule(kept);
    let (sink, recent) = (rule.sink, rule.recent);
    let layer = |list: &u32| list / shape.num_kv_heads;
    let alone = |(list, total): (&u32, u32)| Domain { lists: vec![*list], total, floor: 0, sink, recent };
    let together = |lists: &[u32], floor| {
        let total = u64::from(kept) * lists.len() as u64;
        let total = u32::try_from(total).map_err(|_| format!("{total} tokens are more than can be chosen together"))?;
        Ok(Domain { lists: lists.to_vec(), total, floor, sink, recent })
    };
    match rule.allocation {
        Allocation::Uniform => Ok(full.iter().map(|list| alone((list, kept))).collect()),
        Allocation::Pyramid { beta } => {
            let budgets = pyramidkv::budgets(kept, sink + recent, beta, shape.num_layers, n_tokens);
            Ok(full.iter().map(|list| alone((list, budgets[layer(list) as usize]))).collect())
        }
        Allocation::AcrossHeads { floor_permille } => {
            let part = u64::from(kept) * u64::from(floor_permille) / 1000;
            let part = u32::try_from(part).expect("a part should be no larger than its whole");
            let floor = part.max(sink + recent);
            full.chunk_by(|a, b| layer(a) == layer(b)).map(|lists| together(lists, floor)).collect()
        }
        Allocation::AcrossAll if full.is_empty() => Ok(Vec::new()),
        Allocation::AcrossAll => Ok(vec![together(full, sink + recent)?]),
    }
}

/// A number that grows with the score: NaN is below everything, and -0 equals 0.
pub const fn order_key(score: f32) -> u32 {
    if score.is_nan() {
        return 0;
    }
    let bits = if score == 0.0 { 0 } else { score.to_bits() };
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

/// The tokens that stay of each list, ascending. `scores` are those of the domain's lists, one for each token of a list.
///
/// # Panics
/// When a list has no scores.
pub fn select(domain: &Domain, scores: &[&[f32]]) -> Vec<Vec<u32>> {
    assert_eq!(scores.len(), domain.lists.len(), "scores of every list");
    let Domain { total, floor, sink, recent, .. } = *domain;
    let mut kept: Vec<Vec<u32>> = Vec::new();
    let mut others = Vec::new();
    for (list, scores) in scores.iter().enumerate() {
        let n_tokens = u32::try_from(scores.len()).expect("tokens are counted in 32 bits");
        let always = |index: u32| index < sink || index >= n_tokens.saturating_sub(recent);
        let (mut stays, mut rest): (Vec<u32>, Vec<u32>) = (0..n_tokens).partition(|index| always(*index));
        rest.sort_by_key(|index| Reverse(order_key(scores[*index as usize])));
        let fill = (floor as usize).saturating_sub(stays.len()).min(rest.len());
        stays.extend(&rest[..fill]);
        others.extend(rest[fill..].iter().map(|index| (Reverse(order_key(scores[*index as usize])), list, *index)));
        kept.push(stays);
    }
    let open = (total as usize).saturating_sub(kept.iter().map(Vec::len).sum());
    others.sort_unstable();
    others.into_iter().take(open).for_each(|(_, list, index)| kept[list].push(index));
    kept.iter_mut().for_each(|list| list.sort_unstable());
    kept
}

#[cfg(test)]
mod tests;
