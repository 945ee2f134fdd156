//! What stays, against a definition that takes one token at a time.

use proptest::prelude::*;

use super::*;
use crate::compression::token;

/// The domain's tokens taken one by one, each the best of what is left by comparing floats.
fn one_by_one(domain: &Domain, scores: &[&[f32]], n: usize) -> Vec<Vec<u32>> {
    let better = |a: f32, b: f32| a > b || (b.is_nan() && !a.is_nan());
    let mut kept: Vec<Vec<bool>> = vec![vec![false; n]; scores.len()];
    for list in &mut kept {
        for (i, stays) in list.iter_mut().enumerate() {
            *stays = i < domain.sink as usize || i + (domain.recent as usize) >= n;
        }
    }
    let best = |kept: &[Vec<bool>], lists: std::ops::Range<usize>| {
        let mut best: Option<(usize, usize)> = None;
        for list in lists {
            for i in (0..n).filter(|i| !kept[list][*i]) {
                if best.is_none_or(|(l, b)| better(scores[list][i], scores[l][b])) {
                    best = Some((list, i));
                }
            }
        }
        best
    };
    let count = |kept: &[bool]| kept.iter().filter(|k| **k).count();
    for list in 0..scores.len() {
        while count(&kept[list]) < domain.floor as usize {
            let Some((_, i)) = best(&kept, list..list + 1) else { break };
            kept[list][i] = true;
        }
    }
    while kept.iter().map(|list| count(list)).sum::<usize>() < domain.total as usize {
        let Some((list, i)) = best(&kept, 0..scores.len()) else { break };
        kept[list][i] = true;
    }
    kept.iter().map(|list| (0..).zip(list).filter(|(_, k)| **k).map(|(i, _)| i).collect()).collect()
}

fn score() -> impl Strategy<Value = f32> {
    // Few values, so that ties are common; all kinds of them.
    prop_oneof![
        8 => (-3_i8..4).prop_map(f32::from),
        1 => Just(-0.0),
        1 => Just(f32::NAN),
        1 => Just(-f32::NAN),
        1 => Just(f32::INFINITY),
        1 => Just(f32::NEG_INFINITY),
        1 => any::<f32>(),
    ]
}

fn policy() -> impl Strategy<Value = TokenPolicy> {
    let methods = token::examples().collect::<Vec<_>>();
    let all: Vec<_> = std::iter::once(TokenPolicy::Full).chain(methods).collect();
    proptest::sample::select(all)
}

fn pattern() -> impl Strategy<Value = ListPattern> {
    prop_oneof![
        3 => Just(ListPattern::Full),
        1 => (0_u32..9, 1_u32..40).prop_map(|(sink, recent)| ListPattern::Window { sink, recent }),
        1 => Just(ListPattern::Nothing),
    ]
}

proptest! {
    #[test]
    fn the_best_stay(
        lists in prop::collection::vec(prop::collection::vec(score(), 24), 1..5),
        (n, total, floor, sink, recent) in (0_usize..24, 0_u32..80, 0_u32..12, 0_u32..8, 0_u32..8),
    ) {
        let scores: Vec<&[f32]> = lists.iter().map(|list| &list[..n]).collect();
        let domain = Domain { lists: (0..u32::try_from(scores.len())?).collect(), total, floor, sink, recent };
        let kept = select(&domain, &scores);
        prop_assert_eq!(&kept, &one_by_one(&domain, &scores, n), "one by one");
        let always = n.min((sink + recent) as usize);
        let forced = scores.len() * always.max((floor as usize).min(n));
        let all = scores.len() * n;
        prop_assert_eq!(kept.iter().map(Vec::len).sum::<usize>(), all.min(forced.max(total as usize)), "count");
    }

    #[test]
    fn where_ties_stand_decides_only_among_them(
        mut list in prop::collection::vec(score(), 1..24), total in 0_u32..24, turn in 0_usize..24,
    ) {
        let domain = Domain { lists: vec![0], total, floor: 0, sink: 0, recent: 0 };
        let kept_scores = |list: &[f32]| {
            let mut kept: Vec<_> =
                select(&domain, &[list])[0].iter().map(|i| order_key(list[*i as usize])).collect();
            kept.sort_unstable();
            kept
        };
        let before = kept_scores(&list);
        let n = list.len();
        list.rotate_left(turn % n);
        prop_assert_eq!(before, kept_scores(&list), "the same scores");
    }

    #[test]
    fn domains_hold_every_list_once_and_the_budget(
        policy in policy(),
        (num_layers, num_kv_heads) in (1_u32..6, 1_u32..4),
        patterns in prop::collection::vec(pattern(), 18),
        n_tokens in 0_u32..3000,
    ) {
        let shape = KeepShape { num_layers, num_kv_heads };
        let heads = &patterns[..(num_layers * num_kv_heads) as usize];
        let domains = match domains(&policy, shape, heads, n_tokens) {
            Ok(domains) => domains,
            Err(refused) => {
                // Only a part of a short prompt is too small for what always stays.
                let eviction = policy.eviction().expect("only evictions refuse");
                prop_assert!(eviction.check_kept(eviction.kept(n_tokens)).is_err(), "{}", refused);
                return Ok(());
            }
        };
        let mut lists: Vec<u32> = domains.iter().flat_map(|domain| domain.lists.clone()).collect();
        prop_assert!(domains.iter().all(|domain| domain.lists.is_sorted()), "lists ascend");
        prop_assert!(domains.is_sorted_by_key(|domain| domain.lists[0]), "domains ascend");
        lists.sort_unstable();
        prop_assert_eq!(lists, (0..num_layers * num_kv_heads).collect::<Vec<_>>(), "every list once");
        for domain in &domains {
            let held = domain.lists.len() as u64;
            let each = u64::from((domain.sink + domain.recent).max(domain.floor).min(n_tokens));
            prop_assert!(u64::from(domain.total) >= held * each, "{:?} has room for what always stays", domain);
            prop_assert!(u64::from(domain.total) <= held * u64::from(n_tokens), "{:?} has so many", domain);
        }
        let all_full = heads.iter().all(|pattern| *pattern == ListPattern::Full);
        if all_full {
            let kept = policy.eviction().map_or(n_tokens, |eviction| eviction.kept(n_tokens).min(n_tokens));
            let total: u32 = domains.iter().map(|domain| domain.total).sum();
            prop_assert_eq!(total, kept * num_layers * num_kv_heads, "the budget, exactly");
        }
    }
}

#[test]
fn keys_follow_floats() {
    let ascending = [f32::NAN, f32::NEG_INFINITY, f32::MIN, -1.0, -1e-45, 0.0, 1e-45, 1.0, f32::MAX, f32::INFINITY];
    assert!(ascending.map(order_key).is_sorted_by(|a, b| a < b), "order");
    assert_eq!(order_key(-0.0), order_key(0.0), "zeros are equal");
    assert_eq!(order_key(-f32::NAN), order_key(f32::NAN), "no NaN is better than another");
}

#[test]
fn heads_compete_above_their_floor() {
    let domain = Domain { lists: vec![4, 5], total: 6, floor: 2, sink: 1, recent: 0 };
    let (a, b) = ([0.0, 9.0, 8.0, 7.0, 6.0], [0.0, 1.0, 3.0, 2.0, 2.5]);
    assert_eq!(select(&domain, &[&a, &b]), [vec![0, 1, 2, 3], vec![0, 2]], "the first is worth more");
    let tie = Domain { total: 3, floor: 0, sink: 0, ..domain };
    assert_eq!(select(&tie, &[&[1.0; 3], &[1.0; 3]]), [vec![0, 1, 2], vec![]], "the lower list, the lower index");
}

#[test]
fn each_policy_has_its_domains() {
    let shape = KeepShape { num_layers: 3, num_kv_heads: 2 };
    let (full, window) = (ListPattern::Full, ListPattern::Window { sink: 2, recent: 8 });
    let heads = [full, full, full, window, ListPattern::Nothing, full];
    let of = |text: &str, n| domains(&text.parse::<TokenPolicy>()?, shape, &heads, n);
    let domain =
        |lists: &[u32], total, floor, (sink, recent)| Domain { lists: lists.into(), total, floor, sink, recent };
    let (others, nothing) = ([domain(&[3], 10, 0, (2, 8)), domain(&[4], 0, 0, (0, 0))], (0, 0));
    let with = |mut own: Vec<Domain>| {
        own.extend(others.clone());
        own.sort_by_key(|domain| domain.lists[0]);
        Ok(own)
    };
    let each = |totals: [u32; 4], always| {
        with([0, 1, 2, 5].into_iter().zip(totals).map(|(list, total)| domain(&[list], total, 0, always)).collect())
    };
    assert_eq!(of("full", 100), each([100; 4], nothing), "all");
    assert_eq!(of("quest:16", 100), each([100; 4], nothing), "all stay, few are read");
    assert_eq!(of("h2o:0.2", 100), each([20; 4], (0, 10)), "uniform");
    assert_eq!(of("h2o:512:every128", 1000), each([384; 4], (0, 192)), "room for the next 128");
    assert_eq!(of("h2o:512:every128", 300), each([300; 4], nothing), "nothing to evict yet");
    assert_eq!(of("pyramidkv:0.5:window8:beta10", 100), each([88, 88, 50, 12], (0, 8)), "less with depth");
    let ada = vec![domain(&[0, 1], 80, 20, (0, 16)), domain(&[2], 40, 20, (0, 16)), domain(&[5], 40, 20, (0, 16))];
    assert_eq!(of("adakv:0.4:window16:floor0.5", 100), with(ada), "heads of a layer, a floor");
    assert_eq!(of("kvzip:0.3", 100), with(vec![domain(&[0, 1, 2, 5], 120, 0, nothing)]), "all together");
    assert!(of("snapkv:0.25", 100).is_err_and(|e| e.contains("25 tokens") && e.contains("last 32")), "no room");
    assert!(of("snapkv:1", 10).is_ok(), "all stay");
    let short: Vec<_> = of("full", 5).map(|all| all.iter().map(|d| d.total).collect()).unwrap_or_default();
    assert_eq!(short, [5, 5, 5, 5, 0, 5], "a window of what there is");
}
