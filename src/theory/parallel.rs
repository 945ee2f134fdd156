//! Tensor parallelism: several GPUs share each layer (section 2 of arXiv:2405.08944; Megatron-LM, arXiv:1909.08053).
//!
//! ```text
//! FLOP/s, bandwidth, host links   those of all GPUs together
//! sums                            two in each layer, of rows * hidden f16 numbers: a GPU sends 2 * (n - 1) / n of them
//! caches                          ceil(KV heads / n) heads on each GPU: copies where heads do not divide, or are fewer than GPUs
//! ```
//!
//! The paper calls communication negligible, which holds over `NVLink` and not over `PCIe`. So sums are counted, with nothing beside
//! them.

use serde::Serialize;

use super::cache::CacheSize;
use super::model::Decoder;
use crate::geometry::{Bytes, F16_BYTES};

/// GPUs that share each layer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct TensorParallel {
    /// How many.
    pub degree: u32,
    /// Bytes per second between them, each way.
    pub bytes_per_s: f64,
}

/// Sums over all GPUs in each layer: behind attention, and behind the feed-forward product.
const SUMS_OF_LAYER: u64 = 2;

impl TensorParallel {
    /// Time of the sums of a step of so many rows, in seconds.
    pub fn all_reduce_s(&self, model: &Decoder, rows: u64) -> f64 {
        let n = f64::from(self.degree.max(1));
        let layers = u64::from(model.geometry.num_layers) * SUMS_OF_LAYER;
        let bytes = rows as f64 * (layers * u64::from(model.geometry.hidden_size) * F16_BYTES) as f64;
        bytes * 2.0 * (n - 1.0) / n / self.bytes_per_s
    }

    /// Bytes of a cache over all GPUs, copies included.
    pub fn over_all(&self, model: &Decoder, bytes: Bytes) -> Bytes {
        let heads = u64::from(CacheSize::cached_heads(model).num_kv_heads);
        let n = u64::from(self.degree.max(1));
        let held = u128::from(heads.div_ceil(n) * n);
        let all = (u128::from(bytes.0) * held).div_ceil(u128::from(heads.max(1)));
        Bytes(u64::try_from(all).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::yi_34b;
    use crate::theory::model::Latent;
    use crate::theory::presets::Presets;
    use crate::theory::step::Machine;

    #[test]
    fn heads_are_shared_out_and_copied_where_they_do_not_divide() {
        let model = Decoder::dense(yi_34b(), false).expect("a model");
        let all = |degree| TensorParallel { degree, bytes_per_s: 1e9 }.over_all(&model, Bytes(800));
        assert_eq!([1, 2, 4, 8].map(all), [Bytes(800); 4], "8 heads on up to 8 GPUs");
        assert_eq!([3, 5, 16].map(all), [Bytes(900), Bytes(1_000), Bytes(1_600)], "9, 10 and 16 heads are held");
        let latent = Latent { kv_rank: 512, rope_dim: 64, q_rank: None, nope_dim: 128, v_dim: 128 };
        let model = Decoder::new(yi_34b(), false, Some(latent), None, None).expect("a model");
        let two = TensorParallel { degree: 2, bytes_per_s: 1e9 };
        assert_eq!(two.over_all(&model, Bytes(800)), Bytes(1_600), "every GPU needs the latents");
    }

    #[test]
    fn sums_take_the_time_of_their_bytes() {
        let model = Decoder::dense(yi_34b(), false).expect("a model");
        let two = TensorParallel { degree: 2, bytes_per_s: 300e9 };
        // 60 layers of two sums of 7168 f16 numbers, each sent once by each of two GPUs.
        assert_eq!(two.all_reduce_s(&model, 1), 60.0 * 2.0 * 7168.0 * 2.0 / 300e9, "a row");
        assert_eq!(TensorParallel { degree: 1, ..two }.all_reduce_s(&model, 9), 0.0, "nobody to ask");
        let presets = Presets::built_in();
        let gpu = presets.gpu("a100").expect("a preset");
        let one = Machine::new(gpu, &crate::theory::step::Achieved::PEAK);
        let shared = one.shared_by(two);
        assert_eq!(
            (shared.flops, shared.bandwidth, shared.link),
            (2.0 * one.flops, 2.0 * one.bandwidth, 2.0 * one.link),
            "twice"
        );
        let row = |machine: &Machine| machine.decode(&model, 1_000, Bytes(0));
        assert!(row(&shared) < row(&one) && row(&shared) > row(&one) / 2.0, "faster, but for the sums");
    }
}
