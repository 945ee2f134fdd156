//! Sealed pages bit by bit against the definition, on numbers that were chosen to be hard to round.

mod common;

use concertina::compression::hidden::{HeadParameters, HiddenCodec, PageContext, Quantizer, Side, affine};
use concertina::geometry::HeadGeometry;
use concertina::kernels::abi::{SealItem, SealParams};
use concertina::kernels::attention::CacheShape;
use concertina::kernels::run_once::run_once;
use concertina::kernels::seal::SealSpec;
use concertina::kernels::{PipelineCache, flat_grid};
use half::f16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Keys and values of a page, each `[token][channel]`.
type Contents = [Vec<f16>; 2];

fn shape(head_dim: u32, page_size: u32) -> CacheShape {
    CacheShape { heads: HeadGeometry { num_qo_heads: 1, num_kv_heads: 1, head_dim }, page_size }
}

fn codec(text: &str) -> HiddenCodec {
    text.parse().expect("a codec")
}

fn floats(values: &[f16]) -> Vec<f32> {
    values.iter().map(|x| x.to_f32()).collect()
}

/// What the device makes of pages, and what the definition makes of them.
fn seal(shape: CacheShape, codec: HiddenCodec, pages: &[Contents]) -> (Vec<Vec<u32>>, Vec<Vec<u32>>) {
    let page = shape.page();
    codec.check(page).expect("pages of this size can be encoded");
    let parameters = HeadParameters::default();
    let context = PageContext::at(&parameters, page.page_size);
    let words = |of: HiddenCodec| -> Vec<Vec<u32>> {
        pages.iter().map(|[k, v]| of.encode(page, context, &floats(k), &floats(v))).collect()
    };
    let (open, expected) = (words(HiddenCodec::F16), words(codec));
    let (open_words, sealed_words) = (open[0].len(), expected[0].len());
    let n = u32::try_from(pages.len()).expect("a few pages");
    let cells = |words: usize| u32::try_from(words / 4).expect("a small page");
    let item =
        |i| SealItem { open_entry: i, sealed_entry: n + i, first_position: page.page_size, ..SealItem::default() };
    let items: Vec<SealItem> = (0..n).map(item).collect();
    let places = (0..n).map(|i| i * cells(open_words)).chain((0..n).map(|i| i * cells(sealed_words)));
    let tables: Vec<u32> = places.collect();
    let poison = vec![0xa5_u8; sealed_words * 4 * pages.len()];
    let open = open.concat();
    let operands: [&[u8]; 5] =
        [bytemuck::cast_slice(&items), bytemuck::cast_slice(&tables), &[0; 16], bytemuck::cast_slice(&open), &poison];
    let spec = SealSpec::new(shape.format(codec));
    let params = SealParams { items: 0, n_items: n, layer: 0 };
    let grid = flat_grid(n * spec.strips());
    let results = run_once(common::device(), &mut PipelineCache::default(), &spec.kernel(), &operands, &params, grid)
        .unwrap_or_else(|e| panic!("{codec}: {e}"));
    let sealed: Vec<u32> = bytemuck::pod_collect_to_vec(&results[4]);
    (sealed.chunks_exact(sealed_words).map(<[u32]>::to_vec).collect(), expected)
}

fn assert_same(what: &str, got: &[Vec<u32>], expected: &[Vec<u32>]) {
    for (page, (got, expected)) in got.iter().zip(expected).enumerate() {
        let wrong = got.iter().zip(expected).filter(|(a, b)| a != b).count();
        let first = got.iter().zip(expected).position(|(a, b)| a != b);
        let shown = first.map(|i| format!("word {i} is {:08x}, not {:08x}", got[i], expected[i]));
        assert_eq!(wrong, 0, "{what}, page {page}: {shown:?}");
    }
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn every_f16_has_its_code_of_fp8_and_stays_itself_as_f16_gpu() {
    let shape = shape(128, 128);
    // A NaN that is not quiet is none that a page holds.
    let numbers: Vec<f16> = (0..=u16::MAX).map(|bits| f16::from_f32(f16::from_bits(bits).to_f32())).collect();
    let pages: Vec<Contents> = numbers.chunks_exact(128 * 128).map(|page| [page.to_vec(), page.to_vec()]).collect();
    assert_eq!(pages.len(), 4, "all bits in four pages");
    for text in ["fp8", "k:f16,v:fp8", "k:fp8,v:f16"] {
        let (got, expected) = seal(shape, codec(text), &pages);
        assert_same(text, &got, &expected);
    }
    let mut other = pages.clone();
    other[3][1][77] = f16::from_bits(other[3][1][77].to_bits() ^ 0x0400);
    let (got, _) = seal(shape, codec("fp8"), &other);
    let (_, expected) = seal(shape, codec("fp8"), &pages);
    assert!(got[..3] == expected[..3] && got[3] != expected[3], "another number has another code");
}

/// Finite f16 of any magnitude: each exponent is as likely as any other.
fn any_number(rng: &mut ChaCha8Rng) -> f16 {
    loop {
        let x = f16::from_bits(rng.random());
        if x.is_finite() {
            return x;
        }
    }
}

/// The group of a number whose scale it shares.
fn group_of(codec: HiddenCodec, side: Side, token: usize, channel: usize) -> (usize, usize) {
    match (codec.side(side).quantizer, side) {
        (Quantizer::Kivi { group, .. }, Side::Key) => (token / group as usize, channel),
        (Quantizer::Kivi { group, .. }, Side::Value) => (token, channel / group as usize),
        _ => (token, 0),
    }
}

/// A side whose groups are their ends, then numbers on and beside the edges between codes.
fn edges(rng: &mut ChaCha8Rng, shape: CacheShape, codec: HiddenCodec, side: Side) -> Vec<f16> {
    let levels = match codec.side(side).quantizer {
        Quantizer::Kivi { bits, .. } => (1_i32 << bits) - 1,
        _ => 255,
    };
    let (tokens, channels) = (shape.page_size as usize, shape.heads.head_dim as usize);
    let mut ends = std::collections::HashMap::new();
    let mut out = Vec::with_capacity(tokens * channels);
    for token in 0..tokens {
        for channel in 0..channels {
            let key = group_of(codec, side, token, channel);
            let Some((low, high)) = ends.get(&key).copied() else {
                // Near one another, or not at all.
                let low = any_number(rng);
                let beside = f16::from_bits(low.to_bits() ^ rng.random_range(1_u16..0x400));
                let high = if rng.random() { beside } else { any_number(rng) };
                ends.insert(key, (low.to_f32().min(high.to_f32()), low.to_f32().max(high.to_f32())));
                out.push(if rng.random() { low } else { high });
                continue;
            };
            let edge = rng.random_range(0..=2 * levels) as f32 / (2 * levels) as f32;
            let near = f16::from_f32(low + (high - low) * edge).to_bits().wrapping_add_signed(rng.random_range(-1..=1));
            let near = f16::from_bits(near).to_f32();
            let x = if near.is_finite() { near.clamp(low, high) } else { high };
            // Both ends come often enough for every group to have them.
            let x = [x, x, x, x, low, high][rng.random_range(0..6)];
            out.push(f16::from_f32(x));
        }
    }
    out
}

/// How many values lie exactly on an edge between two codes, in groups of 32 channels.
fn ties(values: &[f16], levels: u32) -> usize {
    let of_group = |group: &[f16]| {
        let numbers = floats(group);
        let affine = affine::measure(numbers.iter().copied(), levels);
        let steps = |x: &f32| 2.0 * (x - affine.min.to_f32()) / affine.scale.to_f32();
        numbers.iter().filter(|x| steps(x) % 2.0 == 1.0).count()
    };
    values.chunks_exact(32).map(of_group).sum()
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn numbers_on_the_edges_between_codes_go_where_the_definition_puts_them_gpu() {
    let mut rng = ChaCha8Rng::seed_from_u64(17);
    for (text, head_dim, page_size, n) in [
        ("int8", 128, 64, 24),
        ("kivi4", 128, 64, 24),
        ("kivi2", 128, 64, 24),
        ("kivi4:64", 64, 64, 8),
        ("kivi2:128", 72, 128, 8),
        ("kivi4:128", 200, 128, 4),
        ("k:kivi2,v:int8", 80, 32, 8),
        ("k:int8,v:kivi2:64", 104, 64, 8),
        ("kivi4", 8, 32, 8),
        ("int8", 256, 16, 8),
    ] {
        let (shape, codec) = (shape(head_dim, page_size), codec(text));
        let pages: Vec<Contents> =
            (0..n).map(|_| [Side::Key, Side::Value].map(|side| edges(&mut rng, shape, codec, side))).collect();
        if text == "kivi4" && head_dim == 128 {
            let on_edges: usize = pages.iter().map(|[_, values]| ties(values, 15)).sum();
            assert!(on_edges > 1000, "{on_edges} values lie on an edge");
        }
        let (got, expected) = seal(shape, codec, &pages);
        assert_same(&format!("{text}, head_dim {head_dim}"), &got, &expected);
    }
}

/// Pages of ordinary numbers, of small and large ones, and with what is no number here and there.
fn mixed(rng: &mut ChaCha8Rng, shape: CacheShape, kind: usize) -> Vec<f16> {
    let number = |rng: &mut ChaCha8Rng| match kind {
        0 => f16::from_f32(rng.random_range(-2.0_f32..2.0)),
        1 => any_number(rng),
        2 => f16::from_bits(rng.random_range(0..0x400_u16) | rng.random_range(0..2_u16) << 15),
        3 if rng.random_range(0..800) == 0 => f16::from_bits(0x7c00 | rng.random_range(0..2_u16) << 15),
        3 if rng.random_range(0..800) == 0 => f16::NAN,
        _ => f16::from_f32([0.0, -0.0, 1.5, -1.5][rng.random_range(0..4)]),
    };
    (0..shape.page_size * shape.heads.head_dim).map(|_| number(rng)).collect()
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn widths_and_page_sizes_of_every_kind_are_encoded_alike_gpu() {
    let mut rng = ChaCha8Rng::seed_from_u64(19);
    let codecs = ["int8", "fp8", "kivi4", "kivi2", "rot4", "rot3", "rot2", "mean+rot4", "mean+rot3", "think:0.6+int8"];
    for (i, text) in codecs.into_iter().enumerate() {
        for (head_dim, page_size) in [(128, 64), ([8, 24, 72, 80, 96, 200, 256][i % 7], 32)] {
            let (shape, codec) = (shape(head_dim, page_size), codec(text));
            let pages: Vec<Contents> = (0..5).map(|kind| [(); 2].map(|()| mixed(&mut rng, shape, kind))).collect();
            let (got, expected) = seal(shape, codec, &pages);
            assert_same(&format!("{text}, head_dim {head_dim} and pages of {page_size}"), &got, &expected);
        }
    }
}
