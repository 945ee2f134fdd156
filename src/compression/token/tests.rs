//! Texts and rules of the token dimension.

use super::*;

fn read(text: &str) -> TokenPolicy {
    text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn rule(text: &str, kept: u32) -> Rule {
    read(text).eviction().unwrap_or_else(|| panic!("{text} should evict")).rule(kept)
}

#[test]
fn what_is_printed_parses_back() {
    for policy in examples() {
        assert_eq!(policy.to_string().parse(), Ok(policy), "{policy}");
    }
    for entry in REGISTRY {
        for example in entry.examples {
            let first = example.split(':').next();
            assert_eq!(first, Some(entry.name), "{example} should be an example of {}", entry.name);
        }
        assert!(entry.syntax.starts_with(entry.name) && !entry.examples.is_empty(), "{}", entry.name);
        assert!(entry.parameters.len() <= PARAMETERS, "{}", entry.name);
    }
    for (text, canonical) in [
        ("snapkv:0.250:kernel5:window16", "snapkv:0.25:window16"),
        ("snapkv:1", "snapkv:1"),
        ("snapkv:1.0", "snapkv:1"),
        ("adakv:0.25:snapkv:floor0.2", "adakv:0.25"),
        ("adakv:0.25:floor0:kernel3:h2o", "refused"),
        ("adakv:0.25:floor0:h2o", "adakv:0.25:h2o:floor0"),
        ("streaming:512:rerotate:every128:sink4", "streaming:512:every128:rerotate"),
        ("quest:0.1:dense2", "quest:0.1"),
        ("full", "full"),
    ] {
        let printed = text.parse::<TokenPolicy>().map_or_else(|_| "refused".to_owned(), |policy| policy.to_string());
        assert_eq!(printed, canonical, "{text}");
    }
}

#[test]
fn rules_are_those_of_the_papers() {
    let attention = |rows| Score::Attention { rows, reduce: Reduce::Mean };
    let plain = Rule::of_score(Score::None);
    let window = Rule { score: attention(Rows::Last(32)), kernel: 5, recent: 32, ..plain };
    for (text, kept, expected) in [
        ("streaming:512", 512, Rule { sink: 4, recent: 508, ..plain }),
        ("h2o:0.2", 101, Rule { score: attention(Rows::All), recent: 50, ..plain }),
        ("tova:0.5", 100, Rule { score: attention(Rows::Last(1)), share: Share::Layer, ..plain }),
        ("snapkv:0.25", 100, window),
        ("pyramidkv:0.25:beta9", 100, Rule { allocation: Allocation::Pyramid { beta: 9 }, ..window }),
        ("adakv:0.25", 100, Rule { allocation: Allocation::AcrossHeads { floor_permille: 200 }, ..window }),
        ("expected:0.25", 100, Rule { score: Score::Expected { future: 512, n_skip: 4 }, sink: 4, ..plain }),
        ("keydiff:0.5", 100, Rule { share: Share::Layer, ..Rule::of_score(Score::KeyDifference) }),
        ("knorm:0.5", 100, Rule::of_score(Score::KeyNorm)),
        ("kvzip:0.3", 100, Rule { allocation: Allocation::AcrossAll, ..Rule::of_score(Score::Reconstruction) }),
        ("random:0.5:seed7", 100, Rule::of_score(Score::Random { seed: 7 })),
    ] {
        assert_eq!(rule(text, kept), expected, "{text}");
    }
    let heavy = rule("adakv:0.25:h2o:floor0.3", 64);
    assert_eq!(heavy.score, attention(Rows::All), "the scorer's score");
    assert_eq!((heavy.recent, heavy.allocation), (32, Allocation::AcrossHeads { floor_permille: 300 }), "of budget");
    assert_eq!(read("quest:1024"), TokenPolicy::Quest { budget: Budget::Tokens(1024), dense_layers: 2 }, "quest");
}

#[test]
fn budgets_are_parts_or_numbers() {
    let kept = |text: &str, n| read(text).eviction().map(|eviction| eviction.kept(n));
    assert_eq!(kept("knorm:0.25", 10), Some(3), "rounded");
    assert_eq!(kept("knorm:0.001", 10), Some(1), "at least one");
    assert_eq!(kept("knorm:1", 10), Some(10), "a part of 1");
    assert_eq!(kept("knorm:512", 10), Some(512), "a number");
    assert_eq!(kept("knorm:512:every128", 10), Some(384), "room for the next 128");
}

#[test]
fn what_does_not_work_is_refused_with_the_reason() {
    for (text, reason) in [
        ("", "token knows full, streaming:BUDGET"),
        ("lru:0.5", "token knows full"),
        ("snapkv", "lacks a budget"),
        ("snapkv:0", "0.001 to 1"),
        ("snapkv:1.5", "0.001 to 1"),
        ("snapkv:-3", "0.001 to 1"),
        ("snapkv:x", "no budget"),
        ("snapkv:0.25:kernel4", "odd number"),
        ("snapkv:0.25:window0", "from 1 on"),
        ("snapkv:0.25:beta20", "window, kernel, every, rerotate"),
        ("snapkv:0.25:window", "lacks its number"),
        ("snapkv:0.25:window8:window9", "twice"),
        ("snapkv:0.25:h2o", "does not know 'h2o'"),
        ("snapkv:16", "at least 32"),
        ("expected:3", "at least 4"),
        ("streaming:4", "at least 5"),
        ("adakv:0.25:floor1.5", "part from 0 to 1"),
        ("adakv:0.25:streaming", "has none"),
        ("adakv:0.25:quest", "has none"),
        ("adakv:0.25:adakv", "has none"),
        ("adakv:0.25:tova", "one for all heads"),
        ("adakv:0.25:pyramidkv", "name snapkv"),
        ("h2o:0.5:every128", "in tokens"),
        ("h2o:512:every100", "multiple of 16"),
        ("h2o:512:every0", "multiple of 16"),
        ("h2o:512:every512", "evict more often"),
        ("snapkv:64:every32", "at least 33"),
        ("kvzip:512:every128", "nothing to repeat"),
        ("quest:512:every128", "does not know 'every128'"),
        ("quest:512:dense", "lacks its number"),
    ] {
        let refused = text.parse::<TokenPolicy>().expect_err(text);
        assert!(refused.contains(reason), "{text}: {refused}");
    }
    let short = read("snapkv:0.25");
    let eviction = short.eviction().expect("snapkv should evict");
    assert!(eviction.check_kept(32).is_ok(), "just the window");
    let refused = eviction.check_kept(25).expect_err("no room for the window");
    assert!(refused.contains("25 tokens") && refused.contains("last 32"), "{refused}");
}
