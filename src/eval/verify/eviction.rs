//! Evictions over small caches of several layers: scores against the f64 oracle, the choice against its definition, pages
//! bit by bit, bytes against the pool, and attention over what stayed.

use std::sync::Arc;

use half::f16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::attention::{Words, parameters};
use super::{Check, Extent};
use crate::compression::Compression;
use crate::compression::head::HeadScores;
use crate::compression::hidden::{HeadParameters, HiddenCodec, PageContext};
use crate::compression::keep::select;
use crate::compression::layer::minicache;
use crate::compression::token::{Rows, Rule, Score, Share};
use crate::compression::{head, hidden, layer, token};
use crate::device::Device;
use crate::engine::paged_attention::{NewRows, PagedAttention, PagedAttentionConfig, SequenceId};
use crate::engine::{EngineError, EvictionConfig};
use crate::geometry::{Bytes, HeadGeometry};
use crate::kernels::PipelineCache;
use crate::kernels::attention::CacheShape;
use crate::pool::page_table::PageTable;
use crate::reference::attention::{Context, attend};
use crate::reference::compare::{Tolerance, nmse};
use crate::reference::scoring::{self, List, Queries, QueryStatistics, Scores};
use crate::schedule::Caches;

/// The model that caches are of: layers, heads, tokens of a page.
const NUM_LAYERS: u32 = 4;
const PAGE_SIZE: u32 = 32;
/// Tokens that are compressed, and rows that come after them.
pub const DOCUMENT: u32 = 120;
const AFTER: [u32; 2] = [1, 40];
const ROPE_THETA: f32 = 10_000.0;
/// Sequences whose rows share a step.
const TOGETHER: usize = 6;

/// The cache of these checks.
pub const SHAPE: CacheShape =
    CacheShape { heads: HeadGeometry { num_qo_heads: 6, num_kv_heads: 2, head_dim: 64 }, page_size: PAGE_SIZE };

/// Scores of the lists, for head patterns.
fn head_scores() -> HeadScores {
    let n = NUM_LAYERS * SHAPE.heads.num_kv_heads;
    let scores = (0..n).map(|list| (list * 7 % n) as f32).collect();
    HeadScores { num_layers: NUM_LAYERS, num_kv_heads: SHAPE.heads.num_kv_heads, scores, model: None, kind: None }
}

/// Whether a compression evicts, and the small cache of these checks has room for it.
pub fn fits(compression: &Compression) -> bool {
    let budget = compression.token.eviction().is_none_or(|e| e.check_kept(e.kept(DOCUMENT)).is_ok());
    let layers = compression.layer.owners(NUM_LAYERS).is_ok()
        && compression.layer.merged_pairs(NUM_LAYERS).is_ok()
        && compression.layer.skip_from(NUM_LAYERS).is_ok_and(|from| from.is_none());
    let page = compression.hidden.check(SHAPE.page()).is_ok();
    budget && layers && page && compression.check_together().is_ok() && Caches::evicts(compression)
}

/// Every policy of the token, head and layer dimensions, alone, and every codec under one.
pub fn singles() -> Vec<Compression> {
    let full = Compression::default;
    let tokens = token::examples().map(|token| Compression { token, ..full() });
    let heads = head::examples().map(|head| Compression { head, ..full() });
    let layers = layer::examples().map(|layer| Compression { layer, ..full() });
    let some: Compression = "tova:0.25".parse().expect("a policy");
    let codecs = hidden::examples().map(move |hidden| Compression { hidden, ..some.clone() });
    let merged: Compression = "minicache:0..".parse().expect("a policy");
    let of_merged = hidden::examples().map(move |hidden| Compression { hidden, ..merged.clone() });
    tokens.chain(heads).chain(layers).chain(codecs).chain(of_merged).filter(fits).collect()
}

/// What a quick run covers: every way to score, to share a budget and to end in pages.
const QUICK: [&str; 12] = [
    "token=streaming:0.25:rerotate",
    "token=h2o:0.25",
    "token=tova:0.5",
    "token=pyramidkv:0.5",
    "token=adakv:0.5",
    "token=expected:0.5",
    "token=keydiff:0.5",
    "token=random:0.5,hidden=kivi4",
    "head=duo:0.5:sink4:recent32,token=knorm:0.5,hidden=mean+rot3",
    "layer=share:2,head=prune:0.5",
    "layer=minicache:0..,hidden=int8",
    "token=snapkv:0.5,hidden=lowrank:32",
];

fn cases(extent: Extent) -> Vec<Compression> {
    match extent {
        Extent::Full => singles(),
        Extent::Quick => QUICK.iter().map(|text| text.parse().expect("a compression should parse")).collect(),
    }
}

/// Sequences of one batch.
const BATCH: usize = 24;

/// Checks of one case.
pub(super) const CHECKS: usize = 5;

pub(super) fn count(extent: Extent) -> usize {
    cases(extent).len() * CHECKS
}

pub(super) fn run(
    device: &Device,
    cache: &mut PipelineCache,
    extent: Extent,
    each: &mut dyn FnMut(Check),
) -> Result<(), EngineError> {
    for batch in cases(extent).chunks(BATCH) {
        check(device, cache, batch, None)?.into_iter().for_each(&mut *each);
    }
    Ok(())
}

/// One sequence: what it was fed, `[layer][tokens][kv heads or query heads][head_dim]`.
struct Sequence {
    id: SequenceId,
    compression: Compression,
    /// What codecs take from a model, per `[layer][KV head]`.
    parameters: Arc<Vec<HeadParameters>>,
    k: Vec<Vec<f32>>,
    v: Vec<Vec<f32>>,
    q: Vec<Vec<f32>>,
    /// What the device holds of each list behind its eviction, decoded: keys and values of kept tokens, merged ones first.
    held: Vec<(Vec<f32>, Vec<f32>)>,
    outcome: Outcome,
}

/// What was seen of one sequence.
#[derive(Default)]
struct Outcome {
    scores: f64,
    scored: usize,
    chosen: Words,
    pages: Words,
    bytes: Words,
    worst: f64,
    got: Vec<f32>,
    expected: Vec<f64>,
}

fn random(rng: &mut ChaCha8Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| f16::from_f32(rng.random_range(-2.0_f32..2.0)).to_f32()).collect()
}

/// Evicts from sequences with these compressions, then decodes and prefills all of them in common steps; five checks of
/// each. Small arenas scatter pages.
///
/// # Errors
/// [`EngineError`] when the device refuses.
pub fn check(
    device: &Device,
    cache: &mut PipelineCache,
    compressions: &[Compression],
    max_arena: Option<Bytes>,
) -> Result<Vec<Check>, EngineError> {
    let mut rng = ChaCha8Rng::seed_from_u64(77);
    let heads = SHAPE.heads;
    let of_lists: Vec<HeadParameters> = (0..NUM_LAYERS).flat_map(|_| parameters(&mut rng, &SHAPE)).collect();
    let of_lists = Arc::new(of_lists);
    let mut codecs: Vec<HiddenCodec> = compressions.iter().flat_map(Caches::codecs_of).collect();
    codecs.sort_unstable();
    codecs.dedup();
    let slots = u32::try_from(compressions.len()).expect("a few sequences");
    let mut evictions = EvictionConfig::of(compressions, slots).unwrap_or_default();
    evictions.slots = slots;
    evictions.head_scores = Some(Arc::new(head_scores()));
    let rows = 48 * u32::try_from(TOGETHER).expect("a few sequences");
    let rows = rows.max(slots);
    let n_tokens = DOCUMENT + AFTER.iter().sum::<u32>();
    let page =
        codecs.iter().map(|c| c.page_bytes(SHAPE.page()).0).fold(HiddenCodec::F16.page_bytes(SHAPE.page()).0, u64::max);
    let pages =
        u64::from(slots) * u64::from(NUM_LAYERS * heads.num_kv_heads) * 3 * u64::from(n_tokens.div_ceil(PAGE_SIZE) + 2);
    let config = PagedAttentionConfig {
        num_layers: NUM_LAYERS,
        codecs: codecs.clone(),
        evictions: Some(evictions),
        parameters: of_lists.to_vec(),
        context_length: n_tokens,
        max_arena,
        ..PagedAttentionConfig::new(
            SHAPE,
            Bytes(pages * page + (codecs.len() as u64 + 2) * 64 * page) + Bytes::mib(24),
            rows,
            rows * heads.num_qo_heads * 6,
        )
    };
    let mut attention = PagedAttention::new(device, cache, config)?;
    attention.poison()?;
    let mut sequences = Vec::new();
    for compression in compressions {
        let id = attention.admit_compressed(compression, DOCUMENT, n_tokens)?;
        let lists = vec![Vec::new(); NUM_LAYERS as usize];
        sequences.push(Sequence {
            id,
            compression: compression.clone(),
            parameters: Arc::clone(&of_lists),
            k: lists.clone(),
            v: lists.clone(),
            q: lists,
            held: Vec::new(),
            outcome: Outcome::default(),
        });
    }
    let mut left = DOCUMENT;
    while left > 0 {
        let n = left.min(48);
        for group in sequences.chunks_mut(TOGETHER) {
            let mut group: Vec<&mut Sequence> = group.iter_mut().collect();
            feed(&mut attention, &mut rng, &mut group, n)?;
        }
        left -= n;
    }
    for sequence in &mut sequences {
        evict(&mut attention, sequence)?;
    }
    for n in AFTER {
        // Decode rows of all sequences share a step.
        let together = if n == 1 { sequences.len() } else { TOGETHER };
        for group in sequences.chunks_mut(together) {
            let mut group: Vec<&mut Sequence> = group.iter_mut().collect();
            feed(&mut attention, &mut rng, &mut group, n)?;
        }
    }
    Ok(sequences.into_iter().flat_map(|s| s.outcome.checks(&s.compression)).collect())
}

/// Adds `n` rows to sequences in one step; behind an eviction their outputs are compared.
fn feed(
    attention: &mut PagedAttention<'_>,
    rng: &mut ChaCha8Rng,
    sequences: &mut [&mut Sequence],
    n: u32,
) -> Result<(), EngineError> {
    let heads = SHAPE.heads;
    let (q_width, kv_width) = (heads.q_width() as usize, heads.kv_width() as usize);
    let rows = n as usize;
    let mut fresh = Vec::new();
    for sequence in sequences.iter_mut() {
        let (mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
        for layer in 0..NUM_LAYERS as usize {
            let (a, b, c) = (random(rng, rows * q_width), random(rng, rows * kv_width), random(rng, rows * kv_width));
            sequence.q[layer].extend(&a);
            sequence.k[layer].extend(&b);
            sequence.v[layer].extend(&c);
            q.extend(a);
            k.extend(b);
            v.extend(c);
        }
        fresh.push((q, k, v));
    }
    let new: Vec<NewRows<'_>> = sequences
        .iter()
        .zip(&fresh)
        .map(|(s, (q, k, v))| NewRows { sequence: s.id, q, k, v, decode: n == 1 })
        .collect();
    let out = attention.step(&new)?;
    let all_rows = rows * sequences.len();
    for (i, sequence) in sequences.iter_mut().enumerate().filter(|(_, s)| !s.held.is_empty()) {
        let table = attention.table(sequence.id)?;
        let jobs: Vec<(u32, usize)> = (0..NUM_LAYERS).flat_map(|l| (0..rows).map(move |r| (l, r))).collect();
        let expected: Vec<(Vec<f64>, f64)> = jobs
            .par_iter()
            .map(|(layer, r)| {
                let at = *layer as usize * all_rows + i * rows + r;
                expected_row(sequence, table, *layer, rows - r, &out.o[at * q_width..(at + 1) * q_width])
            })
            .collect();
        for ((layer, r), (row, worst)) in jobs.into_iter().zip(expected) {
            let at = layer as usize * all_rows + i * rows + r;
            sequence.outcome.got.extend_from_slice(&out.o[at * q_width..(at + 1) * q_width]);
            sequence.outcome.expected.extend(row);
            sequence.outcome.worst = sequence.outcome.worst.max(worst);
        }
    }
    Ok(())
}

/// Tokens of a list, `[tokens][head_dim]`, out of rows of all KV heads.
fn of_head(all: &[f32], kv_head: u32) -> Vec<f32> {
    let (width, at) = (SHAPE.heads.head_dim as usize, (kv_head * SHAPE.heads.head_dim) as usize);
    all.chunks_exact(SHAPE.heads.kv_width() as usize).flat_map(|row| row[at..at + width].to_vec()).collect()
}

/// The oracle of a row that is followed by `after - 1` others: what stayed of the document, then the tail up to itself,
/// full pages of it through the codec. And the largest error of `got`, as a fraction of its bound.
fn expected_row(sequence: &Sequence, table: &PageTable, layer: u32, after: usize, got: &[f32]) -> (Vec<f64>, f64) {
    let heads = SHAPE.heads;
    let (width, group) = (heads.head_dim as usize, heads.group_size() as usize);
    let owner = table.layers().owner(layer);
    let n_tokens = sequence.q[0].len() / heads.q_width() as usize;
    let row = n_tokens - after;
    let place = row - DOCUMENT as usize;
    let sealed = if sequence.compression.hidden.seals() { place / PAGE_SIZE as usize * PAGE_SIZE as usize } else { 0 };
    let (mut out, mut worst) = (Vec::new(), 0.0_f64);
    for kv_head in 0..heads.num_kv_heads {
        let list = (table.layers().list(layer) * heads.num_kv_heads + kv_head) as usize;
        let (mut k, mut v) = sequence.held[list].clone();
        if !table.is_closed(layer, kv_head) {
            let (mut tail_k, mut tail_v) =
                (of_head(&sequence.k[owner as usize], kv_head), of_head(&sequence.v[owner as usize], kv_head));
            let document = DOCUMENT as usize * width;
            (tail_k, tail_v) = (tail_k.split_off(document), tail_v.split_off(document));
            tail_k.truncate((place + 1) * width);
            tail_v.truncate((place + 1) * width);
            for page in 0..sealed / PAGE_SIZE as usize {
                let range = page * PAGE_SIZE as usize * width..(page + 1) * PAGE_SIZE as usize * width;
                let first = table.page_position(u32::try_from(page).expect("pages are few"));
                let of_list = (owner * heads.num_kv_heads + kv_head) as usize;
                let context = PageContext::at(&sequence.parameters[of_list], first);
                let codec = sequence.compression.hidden;
                let words = codec.encode(SHAPE.page(), context, &tail_k[range.clone()], &tail_v[range.clone()]);
                let (a, b) = codec.decode(SHAPE.page(), context, &words);
                tail_k[range.clone()].copy_from_slice(&a);
                tail_v[range].copy_from_slice(&b);
            }
            k.extend(tail_k);
            v.extend(tail_v);
        }
        let of_group = HeadGeometry { num_qo_heads: heads.group_size(), num_kv_heads: 1, head_dim: heads.head_dim };
        let at = row * heads.q_width() as usize + kv_head as usize * group * width;
        let q = &sequence.q[layer as usize][at..at + group * width];
        let n_seen = k.len() / width;
        let expected = attend(&Context { heads: of_group, k: &k, v: &v }, q, n_seen);
        if n_seen == 0 {
            out.extend(vec![0.0; group * width]);
            let zero = got[out.len() - group * width..out.len()].iter().all(|x| *x == 0.0);
            worst = if zero { worst } else { f64::INFINITY };
            continue;
        }
        let tolerance = Tolerance::attention(n_seen, heads.head_dim, 4.0 / 3.0);
        let start = out.len();
        out.extend(expected.o);
        worst = worst.max(tolerance.worst(&got[start..start + group * width], &out[start..], &expected.absolute));
    }
    (out, worst)
}

/// Evicts, and compares scores, choice, pages and bytes with their definitions.
fn evict(attention: &mut PagedAttention<'_>, sequence: &mut Sequence) -> Result<(), EngineError> {
    let heads = SHAPE.heads;
    let selection = attention.selection(sequence.id).expect("a whole document should be due");
    let kept = attention.evict(sequence.id)?.expect("a whole document should be due");
    let n_lists = kept.len();
    let table = attention.table(sequence.id)?;
    let owners: Vec<u32> = (0..NUM_LAYERS).filter(|layer| table.layers().owns(*layer)).collect();
    let of_list = |list: usize| {
        (owners[list / heads.num_kv_heads as usize], u32::try_from(list).expect("few lists") % heads.num_kv_heads)
    };
    let drops = selection.domains.iter().any(|d| u64::from(d.total) < d.lists.len() as u64 * u64::from(DOCUMENT));
    let mut outcome = std::mem::take(&mut sequence.outcome);
    // Merging ranks by distances in the same place.
    let scored =
        selection.rule.filter(|rule| drops && selection.merge.is_none() && rule.score != Score::Reconstruction);
    let decided = match scored {
        Some(rule) => {
            let decided = attention.decided_scores(&vec![DOCUMENT as usize; n_lists])?;
            let (expected, scale) = oracle(sequence, table, &rule);
            let rows = if let Score::Attention { .. } = rule.score { DOCUMENT as usize } else { 0 };
            let tolerance = Tolerance::dot(8 * (heads.head_dim * heads.head_dim) as usize + rows);
            for ((got, expected), scale) in decided.iter().zip(&expected).zip(&scale) {
                outcome.scores = outcome.scores.max(tolerance.worst(got, expected, scale));
                outcome.scored += got.len();
            }
            decided
        }
        None => vec![vec![0.0; DOCUMENT as usize]; n_lists],
    };
    let mut positions = Vec::new();
    for (list, own) in kept.iter().enumerate() {
        let (layer, head) = of_list(list);
        let merged = table.merged_positions(layer, head);
        let mut all = [own, merged].concat();
        all.sort_unstable();
        positions.push(all);
    }
    for domain in &selection.domains {
        let scores: Vec<&[f32]> = domain.lists.iter().map(|list| &decided[*list as usize][..]).collect();
        let chosen = select(domain, &scores);
        if selection.merge.is_none() || selection.rule.is_none() {
            for (list, chosen) in domain.lists.iter().zip(chosen) {
                outcome.chosen.compare_lists(&positions[*list as usize], &chosen);
            }
        } else {
            // Distances have taken the place of the scores: how many stayed is all that can be compared.
            let n = |lists: &mut dyn Iterator<Item = usize>| u32::try_from(lists.sum::<usize>()).expect("few tokens");
            let got = n(&mut domain.lists.iter().map(|list| positions[*list as usize].len()));
            outcome.chosen.compare(&[got], &[n(&mut chosen.iter().map(Vec::len))]);
        }
    }
    let page = SHAPE.page();
    let codec = sequence.compression.hidden;
    let (mut bytes, width) = (0, heads.head_dim as usize);
    for (list, own) in kept.iter().enumerate() {
        let (layer, head) = of_list(list);
        let rows = |all: &[Vec<f32>], layer: u32, index: u32| {
            let at = (index * heads.kv_width() + head * heads.head_dim) as usize;
            all[layer as usize][at..at + width].to_vec()
        };
        let pages = attention.pages_of_layer(sequence.id, layer, head)?;
        let member = u32::from(selection.merge.iter().flat_map(|m| &m.pairs).any(|(_, upper)| *upper == layer));
        let (mut k, mut v) = (Vec::new(), Vec::new());
        let parameters = &sequence.parameters[(layer * heads.num_kv_heads + head) as usize];
        let merged = table.merged_positions(layer, head);
        for (index, (words, tokens)) in pages.merged.iter().zip(merged.chunks(PAGE_SIZE as usize)).enumerate() {
            let pair = selection.merge.iter().flat_map(|m| &m.pairs).find(|(a, b)| *a == layer || *b == layer);
            let pair = *pair.expect("a merged page belongs to two layers");
            let (dir_k, dir_v) = codec.decode(page, PageContext::at(parameters, 0), words);
            let lengths = &words[codec.side_words(page) as usize..];
            for (i, token) in tokens.iter().enumerate() {
                let length = |side: usize| {
                    let pair = lengths[side * PAGE_SIZE as usize + i];
                    f16::from_bits(u16::try_from((pair >> (16 * member)) & 0xffff).expect("half a word")).to_f32()
                };
                let sides = [(&dir_k, &sequence.k, 0), (&dir_v, &sequence.v, 1)];
                for (directions, all, side) in sides {
                    let got = &directions[i * width..(i + 1) * width];
                    let (direction, exact) = minicache::merge(&rows(all, pair.0, *token), &rows(all, pair.1, *token));
                    let near = |a: f64, b: f64, by: f64| (a - b).abs() <= by;
                    let same = codec != HiddenCodec::F16
                        || got.iter().zip(&direction).all(|(a, b)| near(f64::from(*a), *b, 1.0 / 512.0));
                    let lengths_same =
                        near(f64::from(length(side)), exact[member as usize], exact[member as usize] / 1000.0);
                    outcome.pages.compare(&[u32::from(same), u32::from(lengths_same)], &[1, 1]);
                    let out = if side == 0 { &mut k } else { &mut v };
                    out.extend(got.iter().map(|x| x * length(side)));
                }
            }
            let _ = index;
        }
        if member == 0 {
            bytes += pages.merged.len() as u64 * codec.for_pairs().page_bytes(page).0;
        }
        for (words, tokens) in pages.sealed.iter().zip(own.chunks(PAGE_SIZE as usize)) {
            let padded: Vec<u32> = (0..PAGE_SIZE as usize).map(|i| tokens[i.min(tokens.len() - 1)]).collect();
            let side = |all: &[Vec<f32>]| padded.iter().flat_map(|token| rows(all, layer, *token)).collect::<Vec<_>>();
            let context = PageContext::kept(parameters, &padded);
            let (a, b) = codec.decode(page, context, words);
            if selection.rerotates {
                // Devices round what they turn, and codes of that may differ: f16 shows it best.
                let turned = side(&sequence.k);
                let pairs = a.chunks_exact(2).zip(turned.chunks_exact(2));
                let length = |x: &[f32]| f64::from(x[0]).hypot(f64::from(x[1]));
                let differs = |(a, b): &(&[f32], &[f32])| (length(a) - length(b)).abs() > 0.002 * length(b).max(0.1);
                let wrong = u32::try_from(pairs.filter(differs).count()).expect("a page is small");
                let f16 = codec == HiddenCodec::F16;
                outcome.pages.compare(&[u32::from(f16) * wrong, u32::from(!f16 || b == side(&sequence.v))], &[0, 1]);
            } else {
                outcome.pages.compare(words, &codec.encode(page, context, &side(&sequence.k), &side(&sequence.v)));
            }
            k.extend(&a[..tokens.len() * width]);
            v.extend(&b[..tokens.len() * width]);
        }
        bytes += own.len().div_ceil(PAGE_SIZE as usize) as u64 * codec.page_bytes(page).0;
        sequence.held.push((k, v));
    }
    let narrow = |bytes: u64| u32::try_from(bytes).expect("a small cache");
    let evicted = n_lists as u64 * u64::from(DOCUMENT) - positions.iter().map(|p| p.len() as u64).sum::<u64>();
    let tokens = table.held_tokens() + evicted;
    outcome.bytes.compare(
        &[narrow(table.held_bytes().0), narrow(tokens)],
        &[narrow(bytes), narrow(n_lists as u64 * u64::from(DOCUMENT))],
    );
    sequence.outcome = outcome;
    Ok(())
}

/// What the f64 oracle ranks by, and the scale of its errors, per list.
fn oracle(sequence: &Sequence, table: &PageTable, rule: &Rule) -> (Vec<Vec<f64>>, Vec<Vec<f64>>) {
    let heads = SHAPE.heads;
    let (width, group) = (heads.head_dim as usize, heads.group_size() as usize);
    let n_lists = table.shape().num_lists();
    let of_list = |list: u32| -> Scores {
        let kv_head = list % heads.num_kv_heads;
        let readers: Vec<u32> =
            (0..NUM_LAYERS).filter(|layer| table.layers().list(*layer) == list / heads.num_kv_heads).collect();
        let owner = readers[0] as usize;
        let (k, v) = (of_head(&sequence.k[owner], kv_head), of_head(&sequence.v[owner], kv_head));
        let held = List { head_dim: heads.head_dim, k: &k, v: &v };
        let queries = |layer: u32| -> Vec<f32> {
            let row = heads.q_width() as usize;
            let at = kv_head as usize * group * width;
            sequence.q[layer as usize].chunks_exact(row).flat_map(|q| q[at..at + group * width].to_vec()).collect()
        };
        match rule.score {
            Score::KeyNorm => scoring::key_norm(&held),
            Score::KeyDifference => scoring::key_difference(&held),
            Score::Random { seed } => {
                let scores: Vec<f64> = (0..DOCUMENT).map(|t| f64::from(token::random::score(seed, list, t))).collect();
                Scores { absolute: vec![0.0; scores.len()], scores }
            }
            Score::Expected { future, n_skip } => {
                let q = queries(readers[0]);
                let statistics = QueryStatistics::of(&q, heads.group_size(), heads.head_dim, n_skip as usize);
                let future = scoring::Future { rope_theta: ROPE_THETA, next: DOCUMENT, count: future };
                scoring::expected(&held, &statistics, future, n_skip as usize)
            }
            Score::Attention { rows, reduce } => {
                let first = match rows {
                    Rows::All => 0,
                    Rows::Last(last) => DOCUMENT.saturating_sub(last),
                };
                let visible: Vec<u32> = (first + 1..=DOCUMENT).collect();
                // Layers that share a cache add to the same scores.
                let mut sum: Option<Scores> = None;
                for layer in &readers {
                    let q = queries(*layer).split_off(first as usize * group * width);
                    let one = scoring::attention(
                        &held,
                        &Queries { group_size: heads.group_size(), q: &q, visible: &visible },
                        reduce,
                    );
                    sum = Some(match sum {
                        None => one,
                        Some(before) => Scores {
                            scores: before.scores.iter().zip(&one.scores).map(|(a, b)| a + b).collect(),
                            absolute: before.absolute.iter().zip(&one.absolute).map(|(a, b)| a + b).collect(),
                        },
                    });
                }
                sum.expect("a list has a reader")
            }
            Score::None | Score::Reconstruction => {
                Scores { scores: vec![0.0; DOCUMENT as usize], absolute: vec![0.0; DOCUMENT as usize] }
            }
        }
    };
    let mut all: Vec<Scores> = (0..n_lists).into_par_iter().map(of_list).collect();
    if !matches!(rule.score, Score::Random { .. }) {
        all = all.iter().map(|scores| scores.pooled(rule.kernel)).collect();
    }
    if rule.share == Share::Layer {
        let per_layer = heads.num_kv_heads as usize;
        all = all.chunks(per_layer).flat_map(|lists| vec![Scores::mean(lists); lists.len()]).collect();
    }
    // Keys that point away from everything have scores near zero: a unit of what is summed is their scale too.
    let scale = |s: &Scores| s.absolute.iter().zip(&s.scores).map(|(a, b)| a.abs() + b.abs() + 1e-6).collect();
    (all.iter().map(|s| s.scores.clone()).collect(), all.iter().map(scale).collect())
}

impl Outcome {
    fn checks(self, compression: &Compression) -> Vec<Check> {
        let case = || compression.short();
        // Where positions alone decide, there is no score to compare.
        let scored = self.scored.max(1);
        let nmse = Some(nmse(&self.got, &self.expected));
        let compared = self.got.len();
        vec![
            Check { kernel: "scores", case: case(), compared: scored, error_over_bound: self.scores, nmse: None },
            self.chosen.check("kept tokens", case()),
            self.pages.check("kept pages", case()),
            self.bytes.check("released bytes", case()),
            Check { kernel: "attention", case: case(), compared, error_over_bound: self.worst, nmse },
        ]
    }
}
