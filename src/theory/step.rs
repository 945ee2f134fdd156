//! How long a step takes, from what it must compute and what it must move (section 2 of the paper).
//!
//! ```text
//! matmul      max(2 * rows * parameters / F, bytes of weights / B)      weights are read once, whoever's rows they are for
//! attention   max(4 * pairs * q_width / F, bytes of caches / B)         of prompt rows, and of decode rows
//! sums        between GPUs that share each layer, see [`super::parallel`]
//! link        max(bytes out, bytes back) / L                            both ways at once, beside the rows
//! step        max(matmul + attention of prompt rows + attention of decode rows + sums, link)
//!
//! pairs = layers * (n * before + n * (n + 1) / 2)    rows times the tokens that each sees, itself included
//! F = FLOP/s, B = bytes of device memory per second, L = bytes per second of the link to the host, each way
//! ```
//!
//! [`Decoder`] has these counts where some layers see a window, and for latents and experts.
//!
//! Kernels follow each other on a device, so each has a roof of its own; a product and its addition are two FLOP. Rates are
//! what is achieved: peaks times the parts in [`Achieved`]. FLOP and bytes are exact integers; only times are not.
//!
//! For a prompt of S tokens in one step this is the paper's `S * (2 * P + 2 * layers * hidden * S) / F`, where all query
//! heads together are as wide as the residual stream; for a decode row its `(weights + cache) / B`; and for a cache that
//! leaves before another comes its `(cache 1 + cache 2) / L` ([`Machine::switch`]).
//!
//! Left out: norms, rotary positions, sampling, what a kernel takes to start, and the cost of decoding a codec.

use serde::{Deserialize, Serialize};

use super::model::Decoder;
use super::parallel::TensorParallel;
use super::presets::Gpu;
use crate::geometry::Bytes;

/// Attention of rows of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttentionWork {
    /// Rows times the tokens that each sees, over all layers.
    pub pairs: u64,
    /// Bytes of caches that are read, each session's once.
    pub cache: Bytes,
}

impl AttentionWork {
    /// Adds `n` rows of a session behind `before` tokens, over a cache of so many bytes.
    pub fn add(&mut self, model: &Decoder, n: u32, before: u32, cache: Bytes) {
        self.pairs += model.pairs(n, before);
        self.cache += cache;
    }
}

/// What a step does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepWork {
    /// Rows.
    pub rows: u64,
    /// Of these, those that sample.
    pub sampling: u64,
    /// Attention of prompt rows.
    pub prefill: AttentionWork,
    /// Attention of decode rows.
    pub decode: AttentionWork,
    /// Bytes that leave for the host.
    pub out: Bytes,
    /// Bytes that come back.
    pub back: Bytes,
}

/// Parts of a peak that are achieved, each above 0 and at most 1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Achieved {
    /// Of FLOP/s.
    pub flops: f64,
    /// Of the bandwidth of device memory.
    pub bandwidth: f64,
    /// Of the link to the host.
    pub link: f64,
}

impl Achieved {
    /// All of it: the paper's theoretical peak.
    pub const PEAK: Self = Self { flops: 1.0, bandwidth: 1.0, link: 1.0 };
}

impl Default for Achieved {
    /// What well-made kernels are said to reach, in the middle: 0.6 of FLOP/s, 0.75 of bandwidth, 0.8 of the link. Measure
    /// your own before you rely on them.
    fn default() -> Self {
        Self { flops: 0.6, bandwidth: 0.75, link: 0.8 }
    }
}

/// What a GPU achieves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Machine {
    /// FLOP per second.
    pub flops: f64,
    /// Bytes of device memory per second.
    pub bandwidth: f64,
    /// Bytes per second over the link, each way; infinite where device memory is the host's and nothing crosses a link.
    pub link: f64,
    /// Whether it is several GPUs that share each layer: the rates are those of all of them.
    pub parallel: Option<TensorParallel>,
}

/// Seconds of a step, or of many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct StepTime {
    /// Products with weights.
    pub matmul_s: f64,
    /// Attention of prompt rows.
    pub prefill_attention_s: f64,
    /// Attention of decode rows.
    pub decode_attention_s: f64,
    /// Sums between GPUs that share each layer.
    pub all_reduce_s: f64,
    /// Pages on their way, beside all of these.
    pub link_s: f64,
}

impl StepTime {
    /// The time of a step, which ends when its rows are computed and its pages are there.
    pub const fn total_s(&self) -> f64 {
        (self.matmul_s + self.prefill_attention_s + self.decode_attention_s + self.all_reduce_s).max(self.link_s)
    }

    /// Adds another step's.
    pub fn add(&mut self, other: &Self) {
        self.matmul_s += other.matmul_s;
        self.prefill_attention_s += other.prefill_attention_s;
        self.decode_attention_s += other.decode_attention_s;
        self.all_reduce_s += other.all_reduce_s;
        self.link_s += other.link_s;
    }
}

impl Machine {
    /// A GPU of which parts are achieved.
    pub fn new(gpu: &Gpu, achieved: &Achieved) -> Self {
        Self {
            flops: gpu.flops_per_s * achieved.flops,
            bandwidth: gpu.memory_bytes_per_s * achieved.bandwidth,
            link: gpu.link_bytes_per_s.map_or(f64::INFINITY, |link| link * achieved.link),
            parallel: None,
        }
    }

    /// Several such GPUs, which share each layer.
    #[must_use]
    pub fn shared_by(self, parallel: TensorParallel) -> Self {
        let n = f64::from(parallel.degree);
        let Self { flops, bandwidth, link, .. } = self;
        Self { flops: n * flops, bandwidth: n * bandwidth, link: n * link, parallel: Some(parallel) }
    }

    /// Time of the sums of a step of so many rows between GPUs, in seconds.
    pub fn all_reduce_s(&self, model: &Decoder, rows: u64) -> f64 {
        self.parallel.map_or(0.0, |parallel| parallel.all_reduce_s(model, rows))
    }

    /// Time of so many bytes over the link one way, in seconds; none where there is none.
    pub fn link_s(&self, bytes: Bytes) -> Option<f64> {
        self.link.is_finite().then(|| bytes.0 as f64 / self.link)
    }

    /// The later of computing and reading, in seconds.
    pub(super) fn roof(&self, flop: u128, bytes: Bytes) -> f64 {
        (flop as f64 / self.flops).max(bytes.0 as f64 / self.bandwidth)
    }

    /// The time of a step.
    pub fn step(&self, model: &Decoder, work: &StepWork) -> StepTime {
        let weights = model.read_bytes(work.rows, work.sampling > 0);
        StepTime {
            matmul_s: self.roof(model.matmul_flop(work.rows, work.sampling), weights),
            prefill_attention_s: self.roof(model.prefill_attention_flop(work.prefill.pairs), work.prefill.cache),
            decode_attention_s: self.roof(model.decode_attention_flop(work.decode.pairs), work.decode.cache),
            all_reduce_s: self.all_reduce_s(model, work.rows),
            link_s: work.out.0.max(work.back.0) as f64 / self.link,
        }
    }

    /// Prefill latency in seconds: a prompt of `n_tokens` tokens alone, in one step, whose cache takes `cache` bytes.
    pub fn prefill(&self, model: &Decoder, n_tokens: u32, cache: Bytes) -> f64 {
        let mut work = StepWork { rows: u64::from(n_tokens), sampling: 1, ..StepWork::default() };
        work.prefill.add(model, n_tokens, 0, cache);
        self.step(model, &work).total_s()
    }

    /// Decode latency in seconds: one token of a session alone, which sees `n_tokens` tokens in a cache of `cache` bytes.
    pub fn decode(&self, model: &Decoder, n_tokens: u32, cache: Bytes) -> f64 {
        let mut work = StepWork { rows: 1, sampling: 1, ..StepWork::default() };
        work.decode.add(model, 1, n_tokens.saturating_sub(1), cache);
        self.step(model, &work).total_s()
    }

    /// Context switch in seconds: a cache leaves, and then another comes.
    pub fn switch(&self, out: Bytes, back: Bytes) -> f64 {
        (out.0 as f64 + back.0 as f64) / self.link
    }

    /// Time in seconds of reading and writing device memory.
    pub fn memory(&self, bytes: Bytes) -> f64 {
        bytes.0 as f64 / self.bandwidth
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compression::Compression;
    use crate::geometry::yi_34b;
    use crate::theory::model::Parameters;
    use crate::theory::predict::kv_bytes;
    use crate::theory::presets::Presets;

    /// The running example: 34e9 parameters of two bytes, all multiplied with every row; an A100 at its peak with a link of
    /// 20 GB/s.
    fn example() -> (Decoder, Machine) {
        let parameters = Parameters { layers: 34_000_000_000, ..Parameters::default() };
        let model =
            Decoder { parameters, weights: Bytes(68_000_000_000), ..Decoder::dense(yi_34b(), false).expect("a model") };
        (model, Machine { flops: 312e12, bandwidth: 2e12, link: 20e9, parallel: None })
    }

    fn kv(tokens: u32) -> Bytes {
        kv_bytes(&yi_34b(), &Compression::default(), u64::from(tokens))
    }

    fn assert_near(found: f64, expected: f64, what: &str) {
        assert!((found / expected - 1.0).abs() < 6e-4, "{what}: {found} s, not {expected} s");
    }

    #[test]
    fn the_four_metrics_of_the_running_example_are_those_that_were_recomputed() {
        let (model, machine) = example();
        let gib = |tokens| kv(tokens).0 as f64 / f64::from(1 << 30);
        assert_near(gib(4_000), 0.9155, "KV of 4K in GiB");
        assert_near(gib(50_000), 11.444, "KV of 50K in GiB");
        assert_near(gib(100_000), 22.888, "KV of 100K in GiB");
        for (tokens, prefill, decode, switch) in
            [(4_000, 0.916, 8.623, 0.0983), (50_000, 17.79, 10.036, 1.2288), (100_000, 49.36, 11.572, 2.4576)]
        {
            assert_near(machine.prefill(&model, tokens, kv(tokens)), prefill, "prefill");
            assert_near(250.0 * machine.decode(&model, tokens, kv(tokens)), decode, "decode of 250 tokens");
            assert_near(machine.switch(kv(tokens), kv(tokens)), switch, "context switch");
        }
        let h100 = Machine { flops: 989e12, bandwidth: 3.35e12, link: 50e9, parallel: None };
        assert_near(h100.prefill(&model, 50_000, kv(50_000)), 5.612, "prefill of 50K on an H100");
        assert_near(250.0 * h100.decode(&model, 50_000, kv(50_000)), 5.992, "decode of 50K on an H100");
        assert_near(h100.switch(kv(50_000), kv(50_000)), 0.4915, "switch of 50K on an H100");
    }

    #[test]
    fn attention_is_as_much_of_prefill_as_was_recomputed() {
        let (model, _) = example();
        for (tokens, percent) in [(4_000, 4.8), (50_000, 38.7), (100_000, 55.8), (200_000, 71.7), (1_000_000, 92.7)] {
            let attention = model.prefill_attention_flop(model.pairs(tokens, 0)) as f64;
            let matmul = model.matmul_flop(u64::from(tokens), 1) as f64;
            let part = 100.0 * attention / (attention + matmul);
            assert!((part - percent).abs() < 0.06, "{part} % at {tokens} tokens, not {percent} %");
        }
    }

    #[test]
    fn a_step_takes_the_longer_of_computing_and_moving_and_shares_its_weights() {
        let (model, machine) = example();
        let mut work = StepWork { rows: 8, sampling: 8, ..StepWork::default() };
        (0..8).for_each(|_| work.decode.add(&model, 1, 49_999, kv(50_000)));
        let eight = machine.step(&model, &work);
        // Weights once for eight rows, caches eight times.
        assert_near(eight.total_s(), (68e9 + 8.0 * 12.288e9) / 2e12, "eight decode rows");
        assert_near(eight.decode_attention_s, 8.0 * 12.288e9 / 2e12, "their caches");
        let small = StepWork { out: Bytes(20_000_000), ..work };
        assert_eq!(machine.step(&model, &small).total_s(), eight.total_s(), "20 MB are hidden");
        let large = StepWork { back: Bytes(20_000_000_000), ..work };
        assert_near(machine.step(&model, &large).total_s(), 1.0, "20 GB are not");
        let moves = StepWork { out: Bytes(10_000_000_000), ..StepWork::default() };
        assert_near(machine.step(&model, &moves).total_s(), 0.5, "without rows no weights are read");
        // 156 rows in flight make products as long as reading weights: the critical intensity.
        let rows = |n| machine.step(&model, &StepWork { rows: n, ..StepWork::default() }).matmul_s;
        assert_eq!(rows(1), rows(156), "bound by bandwidth");
        assert!(rows(157) > rows(156), "bound by FLOP/s");
    }

    #[test]
    fn a_latent_is_read_once_for_all_heads_and_a_window_stops_growing() {
        let presets = Presets::built_in();
        let preset = |name: &str| presets.model(name).expect(name).decoder.clone();
        let deepseek = preset("deepseek-v2");
        let cache = Bytes(deepseek.token_bytes().0 * 100_000);
        assert_eq!(cache, Bytes(6_912_000_000), "6.4 GiB at 100K");
        let mut work = StepWork { rows: 1, ..StepWork::default() };
        work.decode.add(&deepseek, 1, 99_999, cache);
        // 128 heads read 1,152 bytes of a token: 2 * 128 * 1,088 FLOP, 242 for each, between the intensities of an A100 and of an
        // H100.
        let attention = |name: &str| {
            let gpu = presets.gpu(name).expect(name);
            let time = Machine::new(gpu, &Achieved::PEAK).step(&deepseek, &work).decode_attention_s;
            (time, cache.0 as f64 / gpu.memory_bytes_per_s, work.decode.pairs as f64 * 278_528.0 / gpu.flops_per_s)
        };
        let (time, reading, computing) = attention("a100");
        assert!((time - computing).abs() < 1e-12 && time > 1.5 * reading, "{time} s: bound by FLOP/s on an A100");
        let (time, reading, computing) = attention("h100");
        assert!((time - reading).abs() < 1e-12 && time > computing, "{time} s: bound by bandwidth on an H100");
        let gemma = preset("gemma-3-27b");
        let mut long = AttentionWork::default();
        long.add(&gemma, 1, 99_999, Bytes::ZERO);
        assert_eq!(long.pairs, 10 * 100_000 + 52 * 1_024, "ten layers see everything, the others a window");
    }

    #[test]
    fn what_shares_memory_with_the_host_has_no_link() {
        let presets = Presets::built_in();
        let unified = Machine::new(presets.gpu("m4-max").expect("a GPU"), &Achieved::default());
        assert_eq!(unified.switch(kv(50_000), kv(50_000)), 0.0, "nothing moves");
        let linked = Machine::new(presets.gpu("l4").expect("a GPU"), &Achieved::PEAK);
        assert_near(linked.switch(kv(50_000), kv(50_000)), 2.0 * 12.288e9 / 31.5e9, "over a link");
    }
}
