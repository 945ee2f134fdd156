//! Which tokens stay, on a device, against the definition of the choice: every index, over lists of many lengths and scores of every
//! kind. Lists of thousands of tokens take paths that the small caches of other tests do not.

mod common;

use concertina::compression::keep::{Domain, select as chosen};
use concertina::kernels::abi::{SelectItem, SelectList, SelectParams};
use concertina::kernels::run_once::run_once;
use concertina::kernels::{PipelineCache, flat_grid, select};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A domain over lists of these lengths.
struct Case {
    name: &'static str,
    domain: Domain,
    scores: Vec<Vec<f32>>,
}

fn lists(lengths: &[u32], mut score: impl FnMut() -> f32) -> Vec<Vec<f32>> {
    lengths.iter().map(|n| (0..*n).map(|_| score()).collect()).collect()
}

fn case(name: &'static str, (total, floor, sink, recent): (u32, u32, u32, u32), scores: Vec<Vec<f32>>) -> Case {
    let lists = (0..u32::try_from(scores.len()).expect("few lists")).collect();
    Case { name, domain: Domain { lists, total, floor, sink, recent }, scores }
}

fn cases() -> Vec<Case> {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let mut between = |low: f32, high: f32| rng.random_range(low..high);
    let mut all = vec![
        case("probabilities", (2000, 0, 4, 32), lists(&[8192], || between(0.0, 1.0).powi(8))),
        case("more than a round", (3001, 0, 4, 32), lists(&[9001], || between(0.0, 1.0).powi(8))),
        // All share their first bits, so that lanes meet more keys than they keep.
        case("norms", (3000, 0, 0, 0), lists(&[9001], || -between(8.0, 8.4))),
        case("few values", (2500, 0, 2, 2), lists(&[6000], || between(0.0, 5.0).floor())),
        case("one value", (1234, 0, 3, 5), lists(&[5000], || 0.25)),
        case("both zeros", (40, 0, 0, 0), lists(&[100], || between(-1.0, 1.0).round() * 0.0)),
        case("competing", (4000, 0, 4, 8), lists(&[5000, 3, 4096, 0, 1027], || between(-1.0, 1.0))),
        case("a floor", (5000, 700, 4, 8), lists(&[5000, 3, 4096, 0, 1027], || between(-1.0, 1.0))),
        case("a floor and few values", (3000, 400, 4, 8), lists(&[5000, 300, 4096], || between(0.0, 3.0).floor())),
        case("all", (9000, 0, 4, 8), lists(&[5000, 13], || between(-1.0, 1.0))),
        case("none", (0, 0, 0, 0), lists(&[5000], || between(-1.0, 1.0))),
        case("what is protected", (12, 0, 4, 8), lists(&[5000], || between(-1.0, 1.0))),
        case("fewer than are protected", (5, 0, 4, 8), lists(&[5], || between(-1.0, 1.0))),
        case("one", (1, 0, 0, 0), lists(&[4097], || between(-1.0, 1.0))),
        case("all but one", (4096, 0, 0, 0), lists(&[4097], || between(-1.0, 1.0))),
    ];
    let kinds = [f32::NAN, f32::NEG_INFINITY, f32::INFINITY, 0.0, -0.0, 1e-40, -1e-40, f32::MAX, f32::MIN, 1.0];
    let mut kind = 0;
    let scores = lists(&[3000, 2000], || {
        kind += 7;
        kinds[kind % kinds.len()]
    });
    all.extend([700, 2400, 4600].map(|total| case("numbers of every kind", (total, 0, 1, 1), scores.clone())));
    all
}

/// All cases at once, one list behind another, a few scores apart so that lists begin at any place.
#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn the_device_keeps_what_the_definition_says_gpu() {
    let cases = cases();
    let (mut items, mut spans, mut scores) = (Vec::new(), Vec::new(), Vec::<f32>::new());
    let n_items = u32::try_from(cases.len()).expect("few cases");
    for Case { domain, scores: of_lists, .. } in &cases {
        items.push(SelectItem {
            lists: 2 * n_items + u32::try_from(spans.len()).expect("few lists"),
            n_lists: u32::try_from(of_lists.len()).expect("few lists"),
            total: domain.total,
            floor: domain.floor,
            sink: domain.sink,
            recent: domain.recent,
            pad: [0; 2],
        });
        for list in of_lists {
            spans.push(SelectList {
                list: u32::try_from(spans.len()).expect("few lists"),
                n_tokens: u32::try_from(list.len()).expect("a short list"),
                at: u32::try_from(scores.len()).expect("few scores"),
                pad: 0,
            });
            scores.extend(list);
            // What lies between lists would win.
            scores.extend(vec![f32::INFINITY; spans.len() % 3 + 1]);
        }
    }
    scores.resize(scores.len().next_multiple_of(4), f32::INFINITY);
    let step = [bytemuck::cast_slice(&items), bytemuck::cast_slice::<_, u32>(&spans)].concat();
    let poison = vec![u32::MAX; scores.len()];
    let counts = vec![u32::MAX; spans.len().next_multiple_of(4)];
    let operands: [&[u8]; 4] = [
        bytemuck::cast_slice(&step),
        bytemuck::cast_slice(&scores),
        bytemuck::cast_slice(&poison),
        bytemuck::cast_slice(&counts),
    ];
    let params = SelectParams { items: 0, n_items };
    let mut cache = PipelineCache::default();
    let out = run_once(common::device(), &mut cache, &select::select(), &operands, &params, flat_grid(n_items))
        .expect("it runs");
    let kept: Vec<u32> = bytemuck::pod_collect_to_vec(&out[2]);
    let counts: Vec<u32> = bytemuck::pod_collect_to_vec(&out[3]);
    let mut rest = spans.iter();
    for Case { name, domain, scores } in &cases {
        let mut got = Vec::new();
        for span in rest.by_ref().take(scores.len()) {
            let n = counts[span.list as usize] as usize;
            assert!(n <= span.n_tokens as usize, "{name}: {n} of {} tokens stay", span.n_tokens);
            got.push(kept[span.at as usize..][..n].to_vec());
            // Nothing is written beside a list.
            let end = (span.at + span.n_tokens) as usize;
            assert_eq!(kept[end], u32::MAX, "{name}: the place behind a list");
        }
        let of_lists: Vec<&[f32]> = scores.iter().map(Vec::as_slice).collect();
        let expected = chosen(domain, &of_lists);
        assert!(got == expected, "{name}, {} of {}", domain.total, of_lists.concat().len());
        // One token more would be another choice, where there is one and it is not protected.
        let more = chosen(&Domain { total: domain.total + 1, ..domain.clone() }, &of_lists);
        let n = |kept: &[Vec<u32>]| kept.iter().map(Vec::len).sum::<usize>();
        assert!(n(&more) == n(&expected) || got != more, "{name}: the comparison sees one token");
    }
}
