//! The four challenges of one session, in figures: what its cache takes, how many fit, and how long its prompt, its tokens
//! and a switch to it take (section 2 of arXiv:2405.08944), under a [`Compression`].
//!
//! ```text
//! concurrency   floor(memory / held)                     bound by device memory; with evictions 1 + floor((memory - peak) / held)
//! prefill       sum of steps of `chunk` rows             bound by FLOP/s where a chunk is above the critical intensity
//! decode        weights read once, each session's cache  bound by the bandwidth of device memory
//! switch        (held + held) / link                     bound by the link; nothing where memory is one
//! recompute     prefill of everything seen               what a switch is weighed against
//!
//! critical intensity F / B, in FLOP per byte: rows in a step that make products as long as reading f16 weights
//! intensity of attention   2 * query heads * width / bytes of a token, whatever the batch: caches are not shared
//! ```
//!
//! Rows of a prompt that stop below a layer (`skip-prefill`) cost the layers above the key and value columns alone. What a policy
//! takes to score and to move tokens is left out, as in [`super::step`].

use serde::Serialize;

use super::cache::{CacheSize, Seen};
use super::model::{Decoder, causal_pairs, window_pairs};
use super::step::{Machine, StepTime};
use crate::compression::Compression;
use crate::geometry::Bytes;

/// What a session is, and the memory that there is for caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Scene {
    /// Tokens of its document, compressed at its end.
    pub context_tokens: u32,
    /// Bytes for pages: what weights, tables and scratch leave.
    pub memory_bytes: Bytes,
    /// Tokens of a page; none where bytes are not rounded.
    pub page_tokens: Option<u32>,
    /// Rows of a prompt step; none where the prompt is one step.
    pub chunk_rows: Option<u32>,
    /// Sessions that decode together.
    pub batch: u32,
}

/// What is the longer part of a time, or the scarcer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// Bytes of device memory.
    Memory,
    /// FLOP/s, in products with weights.
    FlopsOfProducts,
    /// FLOP/s, in attention.
    FlopsOfAttention,
    /// Bandwidth of device memory, for weights.
    BandwidthOfWeights,
    /// Bandwidth of device memory, for caches.
    BandwidthOfCaches,
    /// The link to the host.
    Link,
    /// Links between GPUs.
    Interconnect,
}

impl Bound {
    /// In words.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Memory => "device memory",
            Self::FlopsOfProducts => "FLOP/s (products)",
            Self::FlopsOfAttention => "FLOP/s (attention)",
            Self::BandwidthOfWeights => "bandwidth (weights)",
            Self::BandwidthOfCaches => "bandwidth (caches)",
            Self::Link => "host link",
            Self::Interconnect => "links between GPUs",
        }
    }
}

/// A time and what it is made of.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Latency {
    /// Seconds.
    pub seconds: f64,
    /// Of these, in attention.
    pub attention_s: f64,
    /// The longest part.
    pub bound: Bound,
}

/// The figures of one session.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Challenges {
    /// Its cache behind the document.
    pub cache: CacheSize,
    /// Sessions that fit, each behind its document.
    pub concurrency: u64,
    /// From the prompt to the first token, alone.
    pub prefill: Latency,
    /// One token, alone.
    pub decode: Latency,
    /// One token of each of [`Scene::batch`] sessions.
    pub batched: Latency,
    /// The cache leaves and another as large comes, in seconds; none without a link.
    pub switch_s: Option<f64>,
    /// Prefill over coming back alone: how many times longer it takes to compute a cache again.
    pub recompute_ratio: Option<f64>,
    /// FLOP per byte of a decode row's attention.
    pub attention_intensity: f64,
}

/// The figures of a session.
///
/// # Errors
/// A sentence when the compression does not fit the model or the document.
pub fn challenges(
    model: &Decoder,
    machine: &Machine,
    compression: &Compression,
    scene: &Scene,
) -> Result<Challenges, String> {
    let seen = Seen { document: scene.context_tokens, after: 0 };
    let cache = CacheSize::new(model, compression, seen, scene.page_tokens)?.over_all(model, machine);
    let prefill = prefill(model, machine, compression, scene)?;
    let decode = |sessions| decode(model, machine, &cache, sessions);
    let one_way = machine.link_s(cache.held_bytes);
    Ok(Challenges {
        cache,
        concurrency: cache.concurrency(scene.memory_bytes),
        prefill,
        decode: decode(1),
        batched: decode(scene.batch),
        switch_s: one_way.map(|s| 2.0 * s),
        recompute_ratio: one_way.map(|s| prefill.seconds / s),
        attention_intensity: decode_flop(model, &cache) as f64 / cache.read_bytes.0.max(1) as f64,
    })
}

/// FLOP and bytes of something that a step does.
#[derive(Clone, Copy, Debug, Default)]
struct Work {
    flop: u128,
    bytes: Bytes,
}

impl Work {
    fn time(&self, machine: &Machine) -> f64 {
        machine.roof(self.flop, self.bytes)
    }

    fn add(&mut self, other: &Self) {
        self.flop += other.flop;
        self.bytes += other.bytes;
    }
}

/// The longest part of a time, and all of it.
fn latency(machine: &Machine, time: &StepTime, products: &Work, attention: &Work) -> Latency {
    let attention_s = time.prefill_attention_s + time.decode_attention_s;
    let by_flops = |work: &Work| work.flop as f64 / machine.flops > work.bytes.0 as f64 / machine.bandwidth;
    let bound = match attention_s > time.matmul_s {
        _ if time.all_reduce_s > attention_s.max(time.matmul_s) => Bound::Interconnect,
        true if by_flops(attention) => Bound::FlopsOfAttention,
        true => Bound::BandwidthOfCaches,
        false if by_flops(products) => Bound::FlopsOfProducts,
        false => Bound::BandwidthOfWeights,
    };
    Latency { seconds: time.total_s(), attention_s, bound }
}

/// FLOP of a decode row's attention over such a cache.
fn decode_flop(model: &Decoder, cache: &CacheSize) -> u128 {
    // Pairs of the theory count a row and a token once for all heads of a layer.
    model.decode_attention_flop(cache.read_tokens) / u128::from(CacheSize::cached_heads(model).num_kv_heads)
}

/// One token of each of so many sessions, each over such a cache.
pub fn decode(model: &Decoder, machine: &Machine, cache: &CacheSize, sessions: u32) -> Latency {
    let n = u64::from(sessions);
    let attention =
        Work { flop: u128::from(n) * decode_flop(model, cache), bytes: Bytes(n.saturating_mul(cache.read_bytes.0)) };
    let products = Work { flop: model.matmul_flop(n, n), bytes: model.read_bytes(n, true) };
    let time = StepTime {
        matmul_s: products.time(machine),
        decode_attention_s: attention.time(machine),
        all_reduce_s: machine.all_reduce_s(model, n),
        ..StepTime::default()
    };
    latency(machine, &time, &products, &attention)
}

/// Products of prompt rows of which all but the last stop below a layer.
fn prompt_products(model: &Decoder, rows: u64, last: bool, reached: u32) -> Work {
    let sampling = u64::from(last);
    let whole = Work { flop: model.matmul_flop(rows, sampling), bytes: model.read_bytes(rows, last) };
    let num_layers = model.geometry.num_layers;
    if reached == num_layers {
        return whole;
    }
    // Layers are about alike. Those above are computed for the last row; for the others, their keys and values.
    let above = num_layers - reached;
    let stopped = rows - sampling;
    let of_layer = model.matmul_flop(1, 0) / u128::from(num_layers);
    let cached = u128::from(model.geometry.hidden_size) * u128::from(model.cached_per_layer());
    let spared = u128::from(above) * (of_layer - (2 * cached).min(of_layer)) * u128::from(stopped);
    let unread = if last { 0 } else { model.read_bytes(rows, false).0 * u64::from(above) / u64::from(num_layers) };
    Work { flop: whole.flop - spared, bytes: whole.bytes.saturating_sub(Bytes(unread)) }
}

/// A prompt alone, in chunks.
fn prefill(model: &Decoder, machine: &Machine, compression: &Compression, scene: &Scene) -> Result<Latency, String> {
    let num_layers = model.geometry.num_layers;
    let reached = compression.layer.skip_from(num_layers)?.unwrap_or(num_layers);
    Ok(read_prompt(model, machine, scene, (0, scene.context_tokens), reached))
}

/// Rows of a prompt behind `before` tokens of a full cache, in chunks, of which all but the last row stop below a layer.
pub(super) fn read_prompt(
    model: &Decoder,
    machine: &Machine,
    scene: &Scene,
    (mut before, n): (u32, u32),
    reached: u32,
) -> Latency {
    let windows: Vec<Option<u32>> = (0..reached).map(|layer| model.window_of(layer)).collect();
    let of_layer = Bytes(model.token_bytes().0 / u64::from(model.geometry.num_layers));
    let end = before + n;
    let chunk = scene.chunk_rows.unwrap_or(n).max(1);
    let (mut time, mut products, mut attention) = (StepTime::default(), Work::default(), Work::default());
    while before < end {
        let rows = chunk.min(end - before);
        let sees = |window: &Option<u32>| match window {
            None => (causal_pairs(rows, before), u64::from(before + rows)),
            Some(window) => {
                (window_pairs(rows, before, *window), u64::from((before + rows).min(window.saturating_add(rows))))
            }
        };
        let (pairs, tokens) = windows.iter().map(sees).fold((0, 0), |sum, of| (sum.0 + of.0, sum.1 + of.1));
        let product = prompt_products(model, u64::from(rows), before + rows == end, reached);
        let attend = Work { flop: model.prefill_attention_flop(pairs), bytes: Bytes(tokens * of_layer.0) };
        time.add(&StepTime {
            matmul_s: product.time(machine),
            prefill_attention_s: attend.time(machine),
            all_reduce_s: machine.all_reduce_s(model, u64::from(rows)),
            ..StepTime::default()
        });
        products.add(&product);
        attention.add(&attend);
        before += rows;
    }
    latency(machine, &time, &products, &attention)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::yi_34b;
    use crate::theory::parallel::TensorParallel;

    const MACHINE: Machine = Machine { flops: 312e12, bandwidth: 2e12, link: 20e9, parallel: None };

    fn scene(context_tokens: u32) -> Scene {
        let memory_bytes = Bytes(90_000_000_000);
        Scene { context_tokens, memory_bytes, page_tokens: None, chunk_rows: None, batch: 8 }
    }

    fn of(machine: &Machine, text: &str, scene: &Scene) -> Challenges {
        let model = Decoder::dense(yi_34b(), false).expect("a model");
        challenges(&model, machine, &text.parse().expect(text), scene).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn each_challenge_is_bound_by_what_the_paper_says() {
        let full = of(&MACHINE, "full", &scene(50_000));
        assert_eq!(full.concurrency, 7, "90 GB over 12.288 GB");
        assert_eq!(
            (full.prefill.bound, full.decode.bound),
            (Bound::FlopsOfProducts, Bound::BandwidthOfWeights),
            "alone"
        );
        assert_eq!(full.batched.bound, Bound::BandwidthOfCaches, "eight caches are more than the weights");
        assert_eq!(
            of(&MACHINE, "full", &scene(200_000)).prefill.bound,
            Bound::FlopsOfAttention,
            "72 % of a long prompt"
        );
        assert!(
            (full.attention_intensity - 7.0).abs() < 1e-9,
            "as query heads share a KV head: {}",
            full.attention_intensity
        );
        let slow = TensorParallel { degree: 8, bytes_per_s: 1e9 };
        assert_eq!(
            of(&MACHINE.shared_by(slow), "full", &scene(1_000)).prefill.bound,
            Bound::Interconnect,
            "slow links"
        );
        let one_memory = of(&Machine { link: f64::INFINITY, ..MACHINE }, "full", &scene(50_000));
        assert_eq!((one_memory.switch_s, one_memory.recompute_ratio), (None, None), "nothing crosses a link");
    }

    #[test]
    fn compressions_change_what_they_change() {
        let at = scene(50_000);
        let full = of(&MACHINE, "full", &at);
        let quarter = of(&MACHINE, "token=snapkv:0.25", &at);
        assert_eq!(quarter.prefill.seconds, full.prefill.seconds, "a smaller cache does not help a prompt");
        let of_caches = |c: &Challenges| c.batched.attention_s;
        assert!((of_caches(&quarter) / of_caches(&full) - 0.25).abs() < 1e-3, "a quarter is read");
        assert!((quarter.switch_s.expect("a link") / full.switch_s.expect("a link") - 0.25).abs() < 1e-3, "and moved");
        assert_eq!(quarter.concurrency, 25, "and held, one of them still beside its document");
        // Half of the layers see neither products nor attention of the rows that stop below them, but keys and values.
        let skip = of(&MACHINE, "layer=skip-prefill:30..", &at);
        let part = skip.prefill.seconds / full.prefill.seconds;
        assert!((0.5..0.53).contains(&part), "{part} of the prompt's time");
        assert_eq!(skip.cache, full.cache, "and the same bytes");
        let quest = of(&MACHINE, "token=quest:0.25", &at);
        assert!(quest.decode.attention_s < full.decode.attention_s / 2.0, "reads less");
        assert!(quest.concurrency <= full.concurrency && quest.cache.held_bytes > full.cache.held_bytes, "holds more");
    }

    #[test]
    fn chunks_read_weights_again() {
        let whole = of(&MACHINE, "full", &scene(50_000)).prefill;
        let chunked = |rows| of(&MACHINE, "full", &Scene { chunk_rows: Some(rows), ..scene(50_000) }).prefill;
        assert!(
            (chunked(1_000).seconds / whole.seconds - 1.0).abs() < 1e-3,
            "above the critical intensity it is no matter"
        );
        assert!(chunked(50).seconds > 1.5 * whole.seconds, "below it, weights are the time");
        assert_eq!(chunked(50).bound, Bound::BandwidthOfWeights, "and the bound");
    }
}
