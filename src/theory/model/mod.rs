//! A decoder as the theory sees it: its parameters, what a token leaves in its cache, and what attention computes.
//!
//! ```text
//! dense layer     hidden * (q + 2 * kv) + q * hidden + 3 * inner * hidden           q, kv: widths of queries, and of keys
//! latent layer    queries + hidden * (r + p) + r * heads * (n + v) + heads * v * hidden
//!                 queries = hidden * q_rank + q_rank * heads * (n + p), or hidden * heads * (n + p) without a rank
//! experts         hidden * count + 3 * intermediate * hidden * (count + shared)     in place of 3 * inner * hidden
//! touched         count * (1 - (1 - active / count)^rows)                           expected experts of a step, a layer
//!
//! cached          2 * kv numbers per token and layer; latents r + p, which all heads share
//! attention       4 * q FLOP per pair and layer; latents 2 * heads * (n + p + v) in prefill,
//!                 2 * heads * (2 * r + p) in decode
//!
//! r = kv_rank, p = rope_dim, n = nope_dim, v = v_dim; a pair is a row and a token that it sees
//! ```
//!
//! Latents (multi-head latent attention) are those of DeepSeek-V2, arXiv:2405.04434, section 2.1; experts with shared ones are
//! of its section 2.2; layers that see a window are those of Mistral 7B, arXiv:2310.06825, every other layer in Gemma 2,
//! arXiv:2408.00118, five of six in Gemma 3, arXiv:2503.19786.
//!
//! Parameters are exact integers for a decoder without biases that has two norms per layer, those of latents, and one at its end.
//! What presets have beside these, or less, is below 0.01 % of each.

mod parts;

use serde::Serialize;

pub use parts::{Experts, Latent, LocalLayers, Unsound};

use crate::geometry::{Bytes, F16_BYTES, ModelGeometry, WORD_BYTES};
use parts::NUMBER_MAX;

/// Parameters of a decoder, by what a step does with them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Parameters {
    /// Matrices of all layers that every row is multiplied with: attention, feed-forward parts, routers, shared experts.
    pub layers: u64,
    /// Experts of all layers that rows are routed to: a row is multiplied with a part of them.
    pub experts: u64,
    /// The matrix that makes logits: only rows that sample are.
    pub output: u64,
    /// Held and not multiplied with: norms, and the embedding where it is not the output matrix as well.
    pub rest: u64,
}

impl Parameters {
    /// All of them.
    pub const fn total(&self) -> u64 {
        self.layers + self.experts + self.output + self.rest
    }
}

/// A decoder.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Decoder {
    /// Its shape. Where it has latents, `head_dim` is that of the published configuration and nothing is computed from it.
    pub geometry: ModelGeometry,
    /// Whether its embedding is its output matrix as well.
    pub tied: bool,
    /// What a token leaves in place of keys and values, where it does.
    pub latent: Option<Latent>,
    /// Layers that see a window, where there are any.
    pub local: Option<LocalLayers>,
    /// Experts, where it has any.
    pub experts: Option<Experts>,
    /// Its parameters.
    pub parameters: Parameters,
    /// Bytes of all of them on the device.
    pub weights: Bytes,
}

/// Bytes of a parameter where nothing else is said: f16.
const PARAMETER_BYTES: u64 = F16_BYTES;

impl Decoder {
    /// A decoder whose layers are all alike, whose rows see everything. Two bytes of weights for each parameter.
    ///
    /// # Errors
    /// The field and a sentence with the numbers, where no decoder can have them.
    pub fn dense(geometry: ModelGeometry, tied: bool) -> Result<Self, Unsound> {
        Self::new(geometry, tied, None, None, None)
    }

    /// A decoder of these parts. Two bytes of weights for each parameter.
    ///
    /// # Errors
    /// The field and a sentence with the numbers, where no decoder can have them.
    pub fn new(
        geometry: ModelGeometry,
        tied: bool,
        latent: Option<Latent>,
        local: Option<LocalLayers>,
        experts: Option<Experts>,
    ) -> Result<Self, Unsound> {
        check_geometry(&geometry)?;
        latent.map_or(Ok(()), |latent| latent.check())?;
        local.map_or(Ok(()), |local| local.check())?;
        experts.map_or(Ok(()), |experts| experts.check(geometry.num_layers))?;
        let parameters = count(&geometry, tied, latent.as_ref(), experts.as_ref())?;
        let weights = Bytes(parameters.total() * PARAMETER_BYTES);
        Ok(Self { geometry, tied, latent, local, experts, parameters, weights })
    }

    /// The same with weights of so many bytes, where they are quantised.
    #[must_use]
    pub fn with_weights(self, weights: Option<Bytes>) -> Self {
        let weights = weights.unwrap_or(self.weights);
        Self { weights, ..self }
    }

    /// Tokens that a layer's rows see, themselves included; `None` where they see all.
    pub const fn window_of(&self, layer: u32) -> Option<u32> {
        match &self.local {
            Some(LocalLayers { window, global_every: 0 }) => Some(*window),
            Some(LocalLayers { window, global_every }) if !(layer + 1).is_multiple_of(*global_every) => Some(*window),
            _ => None,
        }
    }

    /// Layers that see everything, and layers that see a window.
    pub const fn layers_by_sight(&self) -> (u32, u32) {
        let all = self.geometry.num_layers;
        let global = match &self.local {
            None => all,
            Some(LocalLayers { global_every: 0, .. }) => 0,
            Some(LocalLayers { global_every, .. }) => all / *global_every,
        };
        (global, all - global)
    }

    /// Numbers that a token leaves in the cache of a layer: keys and values of all KV heads, or the latent.
    pub fn cached_per_layer(&self) -> u64 {
        match &self.latent {
            Some(latent) => latent.cached(),
            None => 2 * u64::from(self.geometry.heads.kv_width()),
        }
    }

    /// Bytes that a token leaves in the caches of all layers in f16, while it is within every window.
    pub fn token_bytes(&self) -> Bytes {
        Bytes(u64::from(self.geometry.num_layers) * self.cached_per_layer() * F16_BYTES)
    }

    /// Parameters that a row is multiplied with, the output matrix and norms aside.
    pub fn row_parameters(&self) -> u64 {
        let Parameters { layers, experts, .. } = self.parameters;
        // Experts are equally large, so that the part is a whole number.
        layers + self.experts.map_or(0, |e| experts / u64::from(e.count) * u64::from(e.active))
    }

    /// Parameters that a token activates: all but the experts that it does not take.
    pub fn active_parameters(&self) -> u64 {
        self.row_parameters() + self.parameters.output + self.parameters.rest
    }

    /// Bytes of `parameters` of all of them.
    fn bytes_of(&self, parameters: u64) -> u64 {
        let bytes = u128::from(self.weights.0) * u128::from(parameters) / u128::from(self.parameters.total().max(1));
        u64::try_from(bytes).expect("a part of the weights is no more than all")
    }

    /// Bytes of weights that a step of `rows` rows reads: the layers' once, the output matrix where a row samples, and of
    /// experts those that are expected to be touched ([`Experts::touched`]). None without rows.
    pub fn read_bytes(&self, rows: u64, samples: bool) -> Bytes {
        if rows == 0 {
            return Bytes::ZERO;
        }
        let output = if samples { self.parameters.output } else { 0 };
        let touched = self.experts.map_or(0.0, |experts| experts.touched(rows));
        let experts = self.bytes_of(self.parameters.experts) as f64 * touched;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a part of the experts' bytes")]
        Bytes(self.bytes_of(self.parameters.layers + output) + experts.round() as u64)
    }

    /// FLOP of products with weights: of all rows with those of the layers, of rows that sample with the output matrix.
    ///
    /// With latents the same in both forms: a row's key and value are made by the matrices that otherwise take its query to
    /// the latents and its output back.
    pub fn matmul_flop(&self, rows: u64, sampling: u64) -> u128 {
        let of = |rows: u64, parameters: u64| u128::from(rows) * u128::from(parameters);
        2 * (of(rows, self.row_parameters()) + of(sampling, self.parameters.output))
    }

    /// Pairs of a row and a token that it sees, over all layers: `n` rows behind `before` tokens.
    pub fn pairs(&self, n: u32, before: u32) -> u64 {
        let (global, local) = self.layers_by_sight();
        let window = self.local.map_or(u32::MAX, |local| local.window);
        u64::from(global) * causal_pairs(n, before) + u64::from(local) * window_pairs(n, before, window)
    }

    /// FLOP of attention of prompt rows over so many [`pairs`](Self::pairs): scores and values.
    ///
    /// Latents are expanded to each head's keys and values, as in training; those of tokens of earlier chunks would be
    /// expanded again, which is left out.
    pub fn prefill_attention_flop(&self, pairs: u64) -> u128 {
        let heads = &self.geometry.heads;
        let per_pair = match &self.latent {
            Some(l) => {
                let width = u64::from(l.nope_dim) + u64::from(l.rope_dim) + u64::from(l.v_dim);
                2 * u64::from(heads.num_qo_heads) * width
            }
            None => 4 * u64::from(heads.q_width()),
        };
        u128::from(pairs) * u128::from(per_pair)
    }

    /// FLOP of attention of decode rows over so many [`pairs`](Self::pairs): scores and values.
    ///
    /// Of latents in the absorbed form: a query is taken to the latents once, and reads them as they are, keys of
    /// `kv_rank + rope_dim` and values of `kv_rank` channels.
    pub fn decode_attention_flop(&self, pairs: u64) -> u128 {
        match &self.latent {
            Some(l) => {
                let width = 2 * u64::from(l.kv_rank) + u64::from(l.rope_dim);
                u128::from(pairs) * u128::from(2 * u64::from(self.geometry.heads.num_qo_heads) * width)
            }
            None => self.prefill_attention_flop(pairs),
        }
    }

    /// Bytes of activations in f32 of steps of so many rows, and of logits of so many sessions: the residual stream twice,
    /// queries, keys and values, attention's output, gate and up, their product. Of experts, those that a row takes; of
    /// latents, queries and outputs as wide as latents.
    pub fn activation_bytes(&self, max_rows: u32, max_sessions: u32) -> Bytes {
        let ModelGeometry { hidden_size, intermediate_size, heads, vocab_size, .. } = &self.geometry;
        let [hidden, inner, vocab] = [hidden_size, intermediate_size, vocab_size].map(|n| u64::from(*n));
        let attention = match &self.latent {
            Some(l) => {
                u64::from(heads.num_qo_heads) * (2 * u64::from(l.kv_rank) + u64::from(l.rope_dim))
                    + l.cached()
                    + u64::from(l.q_rank.unwrap_or(0))
            }
            None => 2 * u64::from(heads.q_width()) + 2 * u64::from(heads.kv_width()),
        };
        let taken = self.experts.map_or(0, |e| (u64::from(e.active) + u64::from(e.shared)) * u64::from(e.intermediate));
        let per_row = 2 * hidden + attention + 3 * inner.max(taken);
        Bytes((u64::from(max_rows) * per_row + u64::from(max_sessions) * vocab) * WORD_BYTES)
    }
}

/// Counts parameters, in numbers so wide that no field can overflow them.
fn count(
    geometry: &ModelGeometry,
    tied: bool,
    latent: Option<&Latent>,
    experts: Option<&Experts>,
) -> Result<Parameters, Unsound> {
    let ModelGeometry { num_layers, hidden_size, intermediate_size, heads, vocab_size, .. } = geometry;
    let [layers, hidden, inner, vocab] =
        [num_layers, hidden_size, intermediate_size, vocab_size].map(|n| u128::from(*n));
    let (q, kv) = (u128::from(heads.q_width()), u128::from(heads.kv_width()));
    let attention = match latent {
        Some(latent) => latent.parameters(hidden, u128::from(heads.num_qo_heads)),
        None => hidden * (q + 2 * kv) + q * hidden,
    };
    let gated = |inner: u128| 3 * inner * hidden;
    let (mut every_row, mut routed) = (layers * (attention + gated(inner)), 0);
    if let Some(experts) = experts {
        let expert = gated(u128::from(experts.intermediate));
        let [count, shared, dense] = [experts.count, experts.shared, experts.dense_layers].map(u128::from);
        let sparse = layers - dense;
        every_row = layers * attention + dense * gated(inner) + sparse * (hidden * count + shared * expert);
        routed = sparse * count * expert;
    }
    let output = vocab * hidden;
    let norms = (2 * layers + 1) * hidden + latent.map_or(0, |latent| layers * latent.norms());
    let rest = norms + if tied { 0 } else { output };
    let total = every_row + routed + output + rest;
    if total > u128::from(PARAMETERS_MAX) {
        let why = format!("these numbers make {total} parameters; expected at most {PARAMETERS_MAX}");
        return Err(Unsound::new("name", why));
    }
    let [layers, experts, output, rest] =
        [every_row, routed, output, rest].map(|n| u64::try_from(n).expect("a part is no more than all, which fit"));
    Ok(Parameters { layers, experts, output, rest })
}

/// Parameters of a decoder at most: far beyond any, and far from where sums of bytes overflow.
const PARAMETERS_MAX: u64 = 1 << 50;
/// Layers at most: so many times the pairs of a prompt fit 64 bits.
const LAYERS_MAX: u32 = 1 << 12;

fn check_geometry(geometry: &ModelGeometry) -> Result<(), Unsound> {
    let fields = [
        "num_layers",
        "hidden_size",
        "intermediate_size",
        "vocab_size",
        "context_length",
        "rope_theta",
        "rms_norm_eps",
    ];
    geometry.check().map_err(|why| {
        let field = fields.into_iter().find(|field| why.starts_with(field)).unwrap_or("heads");
        Unsound::new(field, why)
    })?;
    let layers = geometry.num_layers;
    if layers > LAYERS_MAX {
        return Err(Unsound::new("num_layers", format!("num_layers is {layers}; expected 1 to {LAYERS_MAX}")));
    }
    let heads = &geometry.heads;
    let width = u64::from(heads.num_qo_heads) * u64::from(heads.head_dim);
    if width > u64::from(NUMBER_MAX) {
        let (n, dim) = (heads.num_qo_heads, heads.head_dim);
        return Err(Unsound::new(
            "heads",
            format!("{n} query heads of {dim} channels are {width} wide, over {NUMBER_MAX}"),
        ));
    }
    Ok(())
}

/// Pairs of a row and a token that it sees, in a layer that sees everything: `n` rows behind `before` tokens.
pub fn causal_pairs(n: u32, before: u32) -> u64 {
    let (n, before) = (u64::from(n), u64::from(before));
    n * before + n * (n + 1) / 2
}

/// The same in a layer that sees the last `window` tokens.
pub fn window_pairs(n: u32, before: u32, window: u32) -> u64 {
    // The first rows still see everything, the others a window.
    let growing = window.saturating_sub(before).min(n);
    causal_pairs(growing, before) + u64::from(n - growing) * u64::from(window)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::{HeadGeometry, yi_34b};

    /// Two layers of 16 channels, two heads of 8 each and one KV head, an inner width of 24, 10 words.
    fn small() -> ModelGeometry {
        ModelGeometry {
            num_layers: 2,
            hidden_size: 16,
            intermediate_size: 24,
            heads: HeadGeometry { num_qo_heads: 2, num_kv_heads: 1, head_dim: 8 },
            vocab_size: 10,
            context_length: 100,
            rope_theta: 1e4,
            rms_norm_eps: 1e-5,
        }
    }

    fn dense(geometry: ModelGeometry, tied: bool) -> Decoder {
        Decoder::dense(geometry, tied).expect("a sound shape")
    }

    fn new(
        geometry: ModelGeometry,
        tied: bool,
        latent: Option<Latent>,
        local: Option<LocalLayers>,
        experts: Option<Experts>,
    ) -> Decoder {
        Decoder::new(geometry, tied, latent, local, experts).expect("sound parts")
    }

    const LATENT: Latent = Latent { kv_rank: 6, rope_dim: 2, q_rank: Some(5), nope_dim: 4, v_dim: 3 };
    const EXPERTS: Experts = Experts { count: 4, active: 2, shared: 1, intermediate: 8, dense_layers: 1 };

    #[test]
    fn parameters_by_shape_and_bytes_by_part() {
        let model = dense(yi_34b(), false);
        let yi = model.parameters;
        assert_eq!(yi.total(), 34_388_917_248, "34.4B, as published");
        assert_eq!(dense(yi_34b(), true).parameters.total(), yi.total() - yi.output, "a tied matrix is held once");
        assert_eq!(model.weights, Bytes(2 * yi.total()), "two bytes each");
        assert_eq!(model.read_bytes(1, true), Bytes(2 * (yi.layers + yi.output)), "no embedding is read");
        assert_eq!(model.read_bytes(9, false), Bytes(2 * yi.layers), "nor an output matrix that nobody wants");
        assert_eq!(model.read_bytes(0, false), Bytes::ZERO, "nor anything for nobody");
        let quantised = model.clone().with_weights(Some(Bytes(model.weights.0 / 4)));
        assert_eq!(quantised.read_bytes(1, false).0, model.read_bytes(1, false).0 / 4, "in proportion");
        // 2 rows of 2 * 7168 + 2 * 7168 + 2 * 1024 + 3 * 20480 numbers, one row of logits.
        assert_eq!(model.activation_bytes(2, 1), Bytes((2 * 92_160 + 64_000) * 4), "f32");
    }

    #[test]
    fn latents_by_hand() {
        let model = new(small(), false, Some(LATENT), None, None);
        // Queries 16 * 5 + 5 * 2 * (4 + 2), down 16 * (6 + 2), up 6 * 2 * (4 + 3), out 2 * 3 * 16; inner 3 * 24 * 16.
        let layer = (80 + 60) + 128 + 84 + 96 + 1_152;
        assert_eq!(model.parameters.layers, 2 * layer, "matrices");
        // Five norms of 16, two of 6 and two of 5, the embedding.
        assert_eq!(model.parameters.rest, 5 * 16 + 2 * (6 + 5) + 160, "norms and the embedding");
        assert_eq!((model.cached_per_layer(), model.token_bytes()), (8, Bytes(32)), "one latent for both heads");
        let direct = Latent { q_rank: None, ..LATENT };
        let direct = new(small(), false, Some(direct), None, None);
        assert_eq!(direct.parameters.layers, 2 * (layer - 140 + 16 * 2 * 6), "queries from the residual stream");
        // Expanded: keys of 4 + 2 and values of 3 channels; absorbed: 6 + 2 and 6; two heads; two FLOP.
        assert_eq!(model.prefill_attention_flop(10), 10 * 2 * 2 * (6 + 3), "prefill");
        assert_eq!(model.decode_attention_flop(10), 10 * 2 * 2 * (8 + 6), "decode");
        let dense = dense(small(), false);
        assert_eq!((dense.cached_per_layer(), dense.token_bytes()), (16, Bytes(64)), "keys and values of one head");
        assert_eq!((dense.prefill_attention_flop(10), dense.decode_attention_flop(10)), (640, 640), "4 * 16 each");
        // Per row the residual stream twice, queries and outputs of 2 * (8 + 6), latents of 8 and 5, three inner.
        assert_eq!(model.activation_bytes(1, 0), Bytes((32 + 28 + 13 + 72) * 4), "f32");
    }

    #[test]
    fn experts_by_hand() {
        let model = new(small(), true, None, None, Some(EXPERTS));
        let attention = 16 * (16 + 16) + 16 * 16;
        let expert = 3 * 8 * 16;
        // One layer of 24 inner channels, one with a router, a shared expert and four others.
        assert_eq!(model.parameters.layers, 2 * attention + 1_152 + 16 * 4 + expert, "what every row takes");
        assert_eq!(model.parameters.experts, 4 * expert, "of one layer");
        assert_eq!(model.row_parameters(), model.parameters.layers + 2 * expert, "two of four");
        assert_eq!(model.matmul_flop(3, 1), u128::from(2 * (3 * model.row_parameters() + 160)), "FLOP");
        assert_eq!(model.active_parameters(), model.parameters.total() - 2 * expert, "all but two");
        // A row takes half, two rows three quarters, three seven eighths, many all.
        let read = |rows| model.read_bytes(rows, false).0 - 2 * model.parameters.layers;
        assert_eq!([1, 2, 3, 1 << 40].map(read), [4 * expert, 6 * expert, 7 * expert, 8 * expert], "two bytes each");
        assert_eq!(EXPERTS.touched(0), 0.0, "nobody takes none");
        let wide = Experts { intermediate: 80, ..EXPERTS };
        let wide = new(small(), true, None, None, Some(wide));
        // Three experts of 80 are wider than the inner 24.
        assert_eq!(wide.activation_bytes(1, 0), Bytes((32 + 32 + 16 + 3 * 240) * 4), "f32");
    }

    #[test]
    fn rows_see_what_their_layers_see() {
        let whole = causal_pairs(1_000, 0);
        let parts = [(0, 300), (300, 300), (600, 400)];
        let chunks: u64 = parts.map(|(before, n)| causal_pairs(n, before)).iter().sum();
        assert_eq!((whole, chunks), (500_500, 500_500), "each pair once");
        assert_eq!(causal_pairs(1, 9), 10, "a decode row sees itself");
        let counted = |n: u32, before: u32, window: u32| (1..=n).map(|i| u64::from((before + i).min(window))).sum();
        for (n, before, window) in [(10, 0, 4), (10, 3, 4), (10, 4, 4), (10, 90, 4), (3, 0, 4), (1, 0, 1), (7, 2, 100)]
        {
            let expected: u64 = counted(n, before, window);
            assert_eq!(window_pairs(n, before, window), expected, "{n} rows behind {before}, window {window}");
        }
        let six = ModelGeometry { num_layers: 6, ..small() };
        let local = |global_every| Some(LocalLayers { window: 4, global_every });
        let third = new(six.clone(), true, None, local(3), None);
        let windows: Vec<_> = (0..6).map(|layer| third.window_of(layer)).collect();
        assert_eq!(windows, [Some(4), Some(4), None, Some(4), Some(4), None], "the last of three sees everything");
        assert_eq!((third.layers_by_sight(), third.pairs(10, 3)), ((2, 4), 2 * 85 + 4 * 40), "layer by layer");
        let none = new(six.clone(), true, None, local(0), None);
        assert_eq!((none.window_of(5), none.layers_by_sight()), (Some(4), (0, 6)), "no layer sees everything");
        let odd = new(six, true, None, local(4), None);
        let global = (0..6).filter(|layer| odd.window_of(*layer).is_none()).count();
        assert_eq!((global, odd.layers_by_sight()), (1, (1, 5)), "two layers beyond the last group see a window");
        assert_eq!(dense(small(), true).pairs(10, 3), 2 * 85, "all of it");
    }

    #[test]
    fn a_prompt_of_ten_million_tokens_has_more_flop_than_64_bits_hold() {
        let model = dense(yi_34b(), false);
        let flop = model.prefill_attention_flop(model.pairs(10_000_000, 0));
        assert_eq!(flop, 60 * 4 * 7_168 * (10_000_000 * 10_000_001 / 2), "exactly");
        assert!(flop > u128::from(u64::MAX), "{flop}");
    }

    #[test]
    fn parts_that_no_model_has_are_refused_with_the_numbers() {
        let refused = |latent, local, experts| {
            let model = Decoder::new(small(), true, latent, local, experts);
            let Unsound { field, why } = model.expect_err("nonsense");
            format!("{field}: {why}")
        };
        let experts = |experts| refused(None, None, Some(experts));
        assert!(
            experts(Experts { active: 5, ..EXPERTS }).starts_with("active: a row takes 5 experts, and there are 4")
        );
        assert!(experts(Experts { active: 0, ..EXPERTS }).contains("experts.active is 0"), "none");
        assert!(experts(Experts { count: 0, ..EXPERTS }).contains("experts.count is 0"), "none");
        assert!(experts(Experts { dense_layers: 2, ..EXPERTS }).contains("2 of 2 layers"), "none left");
        let local = |window, global_every| refused(None, Some(LocalLayers { window, global_every }), None);
        assert!(local(0, 2).contains("local.window is 0"), "sees nothing");
        assert!(local(4, 1).contains("every layer"), "no layer is local");
        assert!(refused(Some(Latent { kv_rank: 0, ..LATENT }), None, None).contains("latent.kv_rank is 0"), "nothing");
        assert!(refused(Some(Latent { q_rank: Some(0), ..LATENT }), None, None).contains("latent.q_rank is 0"), "no");
        let heads = Decoder::dense(ModelGeometry { hidden_size: 7, ..small() }, true).expect_err("7 channels");
        assert_eq!(heads.field, "hidden_size", "{heads}");
        let local = LocalLayers { window: 4, global_every: 2 };
        assert!(Decoder::new(small(), true, Some(LATENT), Some(local), Some(EXPERTS)).is_ok(), "all is well");
        let huge = |num_layers, hidden_size, num_kv_heads| {
            let heads = HeadGeometry { num_qo_heads: num_kv_heads, num_kv_heads, head_dim: 8 };
            let geometry = ModelGeometry { num_layers, hidden_size, heads, vocab_size: 1 << 24, ..small() };
            Decoder::dense(geometry, true).expect_err("beyond any model").why
        };
        assert!(huge(4_096, 1 << 24, 1 << 21).contains("parameters; expected at most"), "no overflow");
        assert!(huge(4_097, 16, 1).contains("num_layers is 4097"), "layers");
        assert!(huge(1, 16, 1 << 31).contains("wide, over 16777216"), "heads");
    }
}
