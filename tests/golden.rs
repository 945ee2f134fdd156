//! Results of independent implementations (`PyTorch`, llama.cpp); `golden/README.md` says how they were made.

mod common;

use std::path::Path;

use concertina::compression::Compression;
use concertina::compression::hidden::{HeadParameters, HiddenCodec, PageContext, Side, lowrank, plane, rot};
use concertina::engine::paged_attention::{NewRows, PagedAttention, PagedAttentionConfig};
use concertina::engine::{Engine, EngineConfig, EvictionConfig};
use concertina::eval::{kl, perplexity, prompt};
use concertina::geometry::{Bytes, HeadGeometry, PageGeometry};
use concertina::kernels::PipelineCache;
use concertina::kernels::attention::CacheShape;
use concertina::reference::attention::{Context, attend};
use concertina::reference::compare::{Tolerance, agree_top1, argmax, kl_divergence, log_sum_exp, nmse, widen};
use concertina::reference::transformer::ReferenceModel;
use safetensors::{Dtype, SafeTensors};

/// f32 rounding of the stored outputs, relative.
const STORED: f64 = 1e-6;

fn read(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn numbers(file: &SafeTensors<'_>, name: &str) -> (Vec<usize>, Vec<f64>) {
    let tensor = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
    let data = tensor.data();
    let values = match tensor.dtype() {
        Dtype::F16 => bytemuck::pod_collect_to_vec::<u8, half::f16>(data).iter().map(|v| v.to_f64()).collect(),
        Dtype::F32 => widen(&bytemuck::pod_collect_to_vec::<u8, f32>(data)),
        Dtype::F64 => bytemuck::pod_collect_to_vec::<u8, f64>(data),
        Dtype::I8 => data.iter().map(|v| f64::from(v.cast_signed())).collect(),
        Dtype::U8 => data.iter().map(|v| f64::from(*v)).collect(),
        Dtype::U16 => bytemuck::pod_collect_to_vec::<u8, u16>(data).iter().map(|v| f64::from(*v)).collect(),
        Dtype::U32 => bytemuck::pod_collect_to_vec::<u8, u32>(data).iter().map(|v| f64::from(*v)).collect(),
        other => panic!("{name} has dtype {other:?}"),
    };
    (tensor.shape().to_vec(), values)
}

#[expect(clippy::cast_possible_truncation, reason = "the golden stores f32 and f16")]
fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|v| *v as f32).collect()
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the golden stores token ids and codes")]
fn ids(values: &[f64]) -> Vec<u32> {
    values.iter().map(|v| *v as u32).collect()
}

struct Case {
    heads: HeadGeometry,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    o: Vec<f64>,
    lse: Vec<f64>,
    n_q: usize,
    kv_len: usize,
}

fn attention_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, range) in [("attention.safetensors", 0..2), ("attention_wide.safetensors", 2..6)] {
        let bytes = read(name);
        let file = SafeTensors::deserialize(&bytes).expect("a golden is a safetensors file");
        for i in range {
            let part = |part: &str| numbers(&file, &format!("case{i}_{part}"));
            let ((q_shape, q), (kv_shape, k)) = (part("q"), part("k"));
            let count = |n: usize| u32::try_from(n).expect("golden shapes are small");
            let heads = HeadGeometry {
                num_qo_heads: count(q_shape[1]),
                num_kv_heads: count(kv_shape[1]),
                head_dim: count(q_shape[2]),
            };
            let (v, o, lse) = (part("v").1, part("o").1, part("lse").1);
            let (q, k, v) = (narrow(&q), narrow(&k), narrow(&v));
            cases.push(Case { heads, q, k, v, o, lse, n_q: q_shape[0], kv_len: kv_shape[0] });
        }
    }
    assert_eq!(cases.len(), 6, "all golden cases should be read");
    cases
}

#[test]
fn the_attention_oracle_agrees_with_pytorch() {
    for case in attention_cases() {
        let context = Context { heads: case.heads, k: &case.k, v: &case.v };
        let (width, n_heads) = (case.heads.q_width() as usize, case.heads.num_qo_heads as usize);
        for r in 0..case.n_q {
            let row = attend(&context, &case.q[r * width..(r + 1) * width], case.kv_len - case.n_q + r + 1);
            for (got, want) in row.o.iter().zip(&case.o[r * width..(r + 1) * width]) {
                assert!((got - want).abs() <= STORED * want.abs().max(0.1), "{:?}: {got} against {want}", case.heads);
            }
            for (got, want) in row.lse.iter().zip(&case.lse[r * n_heads..(r + 1) * n_heads]) {
                assert!((got - want).abs() <= STORED * want.abs().max(1.0), "{:?}: lse {got} {want}", case.heads);
            }
        }
    }
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn the_attention_kernels_agree_with_pytorch_gpu() {
    let mut cache = PipelineCache::default();
    for case in attention_cases() {
        let shape = CacheShape { heads: case.heads, page_size: 16 };
        let config = PagedAttentionConfig::new(shape, Bytes::mib(16), 64, 4096);
        let mut attention = PagedAttention::new(common::device(), &mut cache, config).expect("a small cache fits");
        attention.poison().expect("the device should be writable");
        let sequence = attention.admit(HiddenCodec::F16, 64).expect("64 tokens fit");
        let kv = case.heads.kv_width() as usize;
        let cached = (case.kv_len - case.n_q) * kv;
        let earlier = NewRows { sequence, q: &[], k: &case.k[..cached], v: &case.v[..cached], decode: false };
        let later = NewRows { sequence, q: &case.q, k: &case.k[cached..], v: &case.v[cached..], decode: false };
        let out = attention.step(&[earlier, later]).expect("the step should run");
        let skip = out.o.len() - case.o.len();
        let error = nmse(&out.o[skip..], &case.o);
        assert!(error <= 1e-10, "{:?}: NMSE {error:e}", case.heads);
        assert!(nmse(&out.o[skip..], &vec![1.0; case.o.len()]) > 1e-3, "another answer should not pass");
        let skip = out.lse.len() - case.lse.len();
        let tolerance = Tolerance::attention(case.kv_len, case.heads.head_dim, 4.0);
        let worst = tolerance.worst(&out.lse[skip..], &case.lse, &vec![8.0; case.lse.len()]);
        assert!(worst <= 1.0, "{:?}: lse error / bound {worst}", case.heads);
    }
}

struct Prompt {
    tokens: Vec<u32>,
    top_ids: Vec<u32>,
    top_logits: Vec<f64>,
    lse: f64,
}

fn prompts() -> Vec<Prompt> {
    let bytes = read("logits.safetensors");
    let file = SafeTensors::deserialize(&bytes).expect("a golden is a safetensors file");
    let n = file.names().iter().filter(|n| n.starts_with("tokens_")).count();
    let prompt = |i| Prompt {
        tokens: ids(&numbers(&file, &format!("tokens_{i}")).1),
        top_ids: ids(&numbers(&file, &format!("top_ids_{i}")).1),
        top_logits: numbers(&file, &format!("top_logits_{i}")).1,
        lse: numbers(&file, &format!("lse_{i}")).1[0],
    };
    let prompts: Vec<_> = (0..n).map(prompt).collect();
    assert!(prompts.len() >= 6, "at least six prompts");
    assert!(prompts.iter().any(|p| p.tokens.len() == 16) && prompts.iter().any(|p| p.tokens.len() == 512), "16 to 512");
    prompts
}

impl Prompt {
    /// The golden distribution and `logits` over the stored tokens and one cell for all others.
    fn divergence(&self, logits: &[f64]) -> f64 {
        let cells = |top: Vec<f64>, total: f64| -> Vec<f64> {
            let mass: f64 = top.iter().map(|l| (l - total).exp()).sum();
            let rest = (1.0 - mass).max(1e-12).ln();
            top.iter().map(|l| l - total).chain([rest]).collect()
        };
        let got = self.top_ids.iter().map(|id| logits[*id as usize]).collect();
        kl_divergence(&cells(self.top_logits.clone(), self.lse), &cells(got, log_sum_exp(logits)))
    }
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn logits_agree_with_pytorch_and_with_the_reference_gpu() {
    let model = common::model();
    let reference = ReferenceModel::new(&model.weights);
    let (mut engine, mut caches) =
        Engine::new(common::device(), &model.weights, &common::config(128)).expect("128 MiB suffice");
    let full = Compression::default();
    let mut previous: Option<Vec<f64>> = None;
    for prompt in prompts() {
        let last = prompt.tokens.len() - 1;
        let mut on_device = Vec::new();
        let mut keep = |_, row: Vec<f32>| on_device = widen(&row);
        let wanted = last..last + 1;
        prompt::logits(&mut engine, &mut caches, &full, &prompt.tokens, wanted, 64, &mut keep).expect("fits");
        let expected = &reference.logits(&prompt.tokens, &[last])[0];
        let (golden, own) = (prompt.divergence(expected), kl_divergence(expected, &on_device));
        let n = prompt.tokens.len();
        println!("{n} tokens: reference to PyTorch {golden:.1e}, device to reference {own:.1e} nats");
        assert!(golden <= 1e-6, "{n} tokens: the reference is {golden:e} nats from PyTorch");
        assert_eq!(argmax(expected), prompt.top_ids[0] as usize, "{n} tokens: PyTorch's top-1");
        assert!(prompt.divergence(&on_device) <= 1e-4, "{n} tokens: the device is too far from PyTorch");
        assert!(own <= 1e-4, "{n} tokens: the device is {own:e} nats from the reference");
        assert!(agree_top1(expected, &on_device), "{n} tokens: same top-1");
        if let Some(other) = previous.replace(on_device) {
            assert!(prompt.divergence(&other) > 1e-2, "another prompt's logits should not pass");
        }
    }
    assert_eq!(caches.pool.report().pages_in_use_bytes, Bytes::ZERO, "every page should be back");
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn perplexity_agrees_with_pytorch_gpu() {
    let model = common::model();
    let golden: serde_json::Value = serde_json::from_slice(&read("perplexity.json")).expect("the golden is JSON");
    let text = String::from_utf8(read("essay.txt")).expect("the essay is UTF-8");
    let tokens = model.tokenizer.encode(&text, false).expect("the essay has tokens");
    assert_eq!(golden["tokens"].as_u64(), Some(tokens.len() as u64), "tokens of the essay");
    let windows = perplexity::windows(&tokens, 256, 4).expect("four windows");
    let (mut engine, mut caches) =
        Engine::new(common::device(), &model.weights, &common::config(128)).expect("128 MiB suffice");
    let full = Compression::default();
    let got = perplexity::on_engine(&mut engine, &mut caches, &full, &windows, 64);
    let got = got.expect("it should run");
    let want = golden["perplexity"].as_f64().expect("a number");
    println!("perplexity {:.4}, PyTorch {want:.4}", got.perplexity);
    assert!((got.perplexity / want - 1.0).abs() < 0.005, "{} against {want}", got.perplexity);
    let each = golden["per_window_nll"].as_array().expect("a list");
    for (got, want) in got.window_nll.iter().zip(each) {
        assert!((got - want.as_f64().expect("a number")).abs() < 1e-3, "{got} against {want}");
    }
}

/// A second implementation of every policy, in numpy: what each costs on the same text. Caches of f16 and another order of
/// additions move a few choices; a policy that is another one moves more than that.
#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn policies_cost_what_an_independent_implementation_says_gpu() {
    let model = common::model();
    let golden: serde_json::Value = serde_json::from_slice(&read("policies.json")).expect("the golden is JSON");
    let number = |value: &serde_json::Value| value.as_f64().expect("a number");
    let count = |name: &str| usize::try_from(golden[name].as_u64().expect("a count")).expect("small");
    let text = String::from_utf8(read("alice.txt")).expect("the novel is ASCII");
    let tokens = model.tokenizer.encode(&text, false).expect("the novel has tokens");
    let (prefix_tokens, tail_tokens) = (count("prefix"), count("tail"));
    let settings = kl::KlSettings { prefix_tokens, tail_tokens, sealing: kl::PrefixSealing::AfterPrefix };
    let all = golden["results"].as_array().expect("a list");
    let (others, measured): (Vec<_>, Vec<_>) = all.iter().partition(|row| row["policy"] == "keydiff-per-head");
    let compressions: Vec<Compression> = measured
        .iter()
        .map(|row| {
            let text = format!("token={}:{}", row["policy"].as_str().expect("a name"), row["keep"]);
            text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))
        })
        .collect();
    let (observed, _) = kl::slots(&compressions);
    let slots = u32::try_from(observed.len()).expect("few");
    let rows = u32::try_from(compressions.len() + 1).expect("few");
    let config = EngineConfig {
        evictions: EvictionConfig::of(&compressions, slots),
        max_sessions: rows,
        context_length: 512,
        ..common::config(256)
    };
    let (mut engine, mut caches) = Engine::new(common::device(), &model.weights, &config).expect("256 MiB suffice");
    let window = &tokens[..settings.window()];
    let sums = kl::window(&mut engine, &mut caches, &compressions, window, &settings, 64, &mut |_| ());
    let results = kl::results(&compressions, &[sums.expect("it should run")]);
    let far = |got: f64, want: f64| (got / want - 1.0).abs();
    for (got, want) in results[1..].iter().zip(&measured) {
        let (mean, median) = (number(&want["mean_kl"]), number(&want["median_kl"]));
        println!(
            "{:28} mean {:.5} (numpy {mean:.5}), median {:.5} ({median:.5})",
            got.compression, got.mean_kl, got.median_kl
        );
        assert!(
            far(got.mean_kl, mean) < 0.1 && far(got.median_kl, median) < 0.2,
            "{}: another policy",
            got.compression
        );
    }
    for other in others {
        let same = |(_, row): &(usize, &&serde_json::Value)| row["policy"] == "keydiff" && row["keep"] == other["keep"];
        let (at, _) = measured.iter().enumerate().find(same).expect("both are there");
        let (got, want) = (results[at + 1].mean_kl, number(&other["mean_kl"]));
        assert!(far(got, want) > 0.15, "one choice per head would be noticed: {got} against {want}");
    }
}

/// The page of `codecs.safetensors`.
const PAGE: PageGeometry = PageGeometry { page_size: 64, head_dim: 64 };

fn codec_golden(name: &str) -> Vec<f64> {
    let bytes = read("codecs.safetensors");
    numbers(&SafeTensors::deserialize(&bytes).expect("a golden is a safetensors file"), name).1
}

/// Both sides of the page.
fn codec_page() -> [(Side, &'static str, Vec<f32>); 2] {
    [(Side::Key, "k", narrow(&codec_golden("k"))), (Side::Value, "v", narrow(&codec_golden("v")))]
}

/// A page whose tokens stand in another order.
fn permuted(values: &[f32], width: usize) -> Vec<f32> {
    let (first, rest) = values.split_at(width);
    [rest, first].concat()
}

fn codec(text: &str) -> HiddenCodec {
    text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))
}

/// The words of one side of a page, by [`HiddenCodec::encode`].
fn encode(text: &str, side: Side, page: PageGeometry, values: &[f32]) -> Vec<u32> {
    let parameters = HeadParameters::default();
    let mut words = codec(text).encode(page, PageContext::at(&parameters, 0), values, values);
    let values = words.split_off(codec(text).k.words(Side::Key, page) as usize);
    if side == Side::Key { words } else { values }
}

/// What attention reads after [`encode`].
fn decode(text: &str, side: Side, page: PageGeometry, words: &[u32]) -> Vec<f32> {
    let parameters = HeadParameters::default();
    codec(text).side(side).decode(side, page, PageContext::at(&parameters, 0), words)
}

/// The codes of one side of a page, `[page_size][head_dim]`.
fn unpack(text: &str, side: Side, bits: u32, values: &[f32]) -> Vec<u32> {
    let (words, shape) = (encode(text, side, PAGE, values), codec(text).side(side).shape(side, PAGE));
    let token = |t| (0..PAGE.head_dim).map(move |c| (t, c));
    (0..PAGE.page_size).flat_map(token).map(|(t, c)| plane::unpack(shape, bits, &words, t, c)).collect()
}

/// The part of the codes that are equal, and the largest difference.
fn agreement(ours: &[u32], golden: &[u32]) -> (f64, u32) {
    assert_eq!(ours.len(), golden.len(), "as many codes");
    let equal = ours.iter().zip(golden).filter(|(a, b)| a == b).count();
    let worst = ours.iter().zip(golden).map(|(a, b)| a.abs_diff(*b)).max();
    (equal as f64 / ours.len() as f64, worst.expect("codes"))
}

/// Sum of the squared differences.
fn squared_error(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len(), "as many values");
    got.iter().zip(want).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum()
}

#[test]
fn fp8_is_the_cast_of_pytorch() {
    let edges = PageGeometry { page_size: 16, head_dim: 32 };
    for (input, output, page) in [("k", "fp8_k", PAGE), ("fp8_edges", "fp8_edges_decoded", edges)] {
        let (x, want) = (narrow(&codec_golden(input)), narrow(&codec_golden(output)));
        for side in [Side::Key, Side::Value] {
            let differ = |x: &[f32]| {
                let got = decode("fp8", side, page, &encode("fp8", side, page, x));
                got.iter().zip(&want).filter(|(got, want)| got.to_bits() != want.to_bits()).count()
            };
            assert_eq!(differ(&x), 0, "{input}, {side:?}: values unlike PyTorch's");
            let moved = permuted(&x, page.head_dim as usize);
            assert!(differ(&moved) > x.len() / 2, "{input}, {side:?}: another order of tokens should not pass");
        }
    }
    let edges = codec_golden("fp8_edges");
    assert!(edges.iter().any(|x| x.abs() > 480.0), "some edges lie beyond the range");
}

#[test]
fn codes_are_those_of_the_papers_formulas() {
    // Scales in f16 are up to 2^-10 larger than those of the formulas: `code` moves by up to `code / 1024`, and rounds
    // otherwise that often. So 255 levels cannot agree as often as 15 or 3 do.
    let cases = [("int8", 8, 0, "int8", 0.93), ("kivi4", 4, 0, "kivi", 0.99), ("kivi2", 2, 4, "kivi", 0.99)];
    for (text, bits, shift, golden, least) in cases {
        for (side, name, x) in codec_page() {
            let stored = ids(&codec_golden(&format!("{golden}_{name}")));
            let want: Vec<u32> = stored.iter().map(|c| c >> shift & ((1 << bits) - 1)).collect();
            let ours = unpack(text, side, bits, &x);
            let (part, worst) = agreement(&ours, &want);
            println!("{text} {name}: {part:.5} of the codes are equal, the largest difference is {worst}");
            assert!(part >= least && worst <= 1, "{text} {name}: {part} equal, largest difference {worst}");
            let moved = unpack(text, side, bits, &permuted(&x, PAGE.head_dim as usize));
            assert!(agreement(&moved, &want).0 < 0.9, "{text} {name}: another order of tokens should not pass");
            // The other side of KIVI groups the other way.
            if golden == "kivi" {
                let other = if side == Side::Key { Side::Value } else { Side::Key };
                let (part, _) = agreement(&unpack(text, other, bits, &x), &want);
                assert!(part < 0.9, "{text} {name}: groups in the other direction should not pass");
            }
        }
    }
}

#[test]
fn the_rotation_is_the_hadamard_matrix_of_sylvester() {
    let (x, want) = (narrow(&codec_golden("k")), codec_golden("rotated_k"));
    let signs: Vec<f64> = (0..PAGE.head_dim).map(|c| if rot::turns(c) { -1.0 } else { 1.0 }).collect();
    assert_eq!(signs, codec_golden("signs"), "the signs");
    let width = PAGE.head_dim as usize;
    // The largest distance of a row, of its norm.
    let worst = |x: &[f32]| {
        let row = |(x, want): (&[f32], &[f64])| {
            let mut y = x.to_vec();
            rot::rotate(&mut y);
            (squared_error(&y, want) / want.iter().map(|x| x * x).sum::<f64>()).sqrt()
        };
        x.chunks_exact(width).zip(want.chunks_exact(width)).map(row).fold(0.0, f64::max)
    };
    println!("rotation: {:.1e} of a row's norm", worst(&x));
    assert!(worst(&x) <= 1e-5, "{:e} of a row's norm", worst(&x));
    assert!(worst(&permuted(&x, width)) > 1e-2, "another order of tokens should not pass");
    let unsigned: Vec<f32> = x.iter().zip(narrow(&signs).iter().cycle()).map(|(x, s)| x * s).collect();
    assert!(worst(&unsigned) > 1e-2, "a rotation without signs should not pass");
}

#[test]
fn rotated_codes_lose_what_the_lloyd_max_codebook_loses() {
    let texts = [(2, "rot2"), (3, "rot3"), (4, "rot4")];
    for (at, (side, name, x)) in codec_page().into_iter().enumerate() {
        let wide = widen(&x);
        let power: f64 = wide.iter().map(|x| x * x).sum();
        let loss = |text: &str, x: &[f32]| {
            squared_error(&decode(text, side, PAGE, &encode(text, side, PAGE, x)), &wide) / power
        };
        for (bits, text) in texts {
            let best = codec_golden(&format!("lloyd_max_mse_{bits}"))[at];
            let passes = |loss: f64| loss <= 1.08 * best;
            let own = loss(text, &x);
            println!("{text} {name}: {own:.5} of the power is lost, Lloyd-Max {best:.5}, ratio {:.4}", own / best);
            assert!(passes(own), "{text} {name}: {own} against {best}");
            assert!(own >= 0.9 * best, "{text} {name}: {own} is too little for {bits} bits");
            assert!(
                !passes(loss(text, &permuted(&x, PAGE.head_dim as usize))),
                "another order of tokens should not pass"
            );
            if let Some((_, coarser)) = texts.iter().find(|(other, _)| other + 1 == bits) {
                assert!(!passes(loss(coarser, &x)), "{coarser} should not pass as {text}");
            }
        }
    }
}

#[test]
fn latents_lose_what_the_singular_values_say() {
    let (v, best) = (narrow(&codec_golden("v")), codec_golden("low_rank_v")[0]);
    let (wide, width) = (widen(&v), PAGE.head_dim as usize);
    let mut gram = vec![0.0; width * width];
    for row in wide.chunks_exact(width) {
        (0..width * width).for_each(|i| gram[i] += row[i / width] * row[i % width]);
    }
    let basis = lowrank::eigenvectors(gram, width);
    let channels: Vec<_> =
        (0..width * width).map(|i| half::f16::from_f32(if i / width == i % width { 1.0 } else { 0.0 })).collect();
    let loss = |text: &str, basis: &[half::f16]| {
        let parameters = HeadParameters { value_basis: basis.to_vec(), ..HeadParameters::default() };
        let (codec, context) = (codec(text), PageContext::at(&parameters, 0));
        squared_error(&codec.decode(PAGE, context, &codec.encode(PAGE, context, &v, &v)).1, &wide)
    };
    let passes = |loss: f64| loss <= 1.01 * best;
    let own = loss("k:f16,v:lowrank:32", &basis);
    println!("lowrank:32: {own:.4} is lost, SVD {best:.4}, ratio {:.6}", own / best);
    assert!(passes(own), "{own} against {best}");
    assert!(own >= (1.0 - 1e-6) * best, "{own}: nothing of rank 32 is nearer than {best}");
    assert!(!passes(loss("k:f16,v:lowrank:32", &channels)), "the first channels should not pass as a basis");
    assert!(!passes(loss("k:f16,v:lowrank:24", &basis)), "a lower rank should not pass");
}
