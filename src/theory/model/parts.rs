//! What sets a decoder apart: latents, layers that see a window, experts; and what none of them can be.

use serde::{Deserialize, Serialize};

/// Multi-head latent attention: a token leaves one latent per layer, from which each head makes its keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Latent {
    /// Numbers of the latent that keys and values are made of, `d_c` of the paper.
    pub kv_rank: u32,
    /// Channels of the rotary key that all heads share, `d_h^R`; each head's query has as many.
    pub rope_dim: u32,
    /// Numbers of the latent that queries are made of, `d_c'`; queries come from the residual stream where not given.
    pub q_rank: Option<u32>,
    /// Channels of a head's key and query without position, `d_h`.
    pub nope_dim: u32,
    /// Channels of a head's value.
    pub v_dim: u32,
}

impl Latent {
    /// Numbers that a token leaves in a layer: `kv_rank + rope_dim`.
    pub const fn cached(&self) -> u64 {
        self.kv_rank as u64 + self.rope_dim as u64
    }

    /// Matrices of attention in one layer of `heads` heads.
    pub(super) fn parameters(&self, hidden: u128, heads: u128) -> u128 {
        let [r, p, n, v] = [self.kv_rank, self.rope_dim, self.nope_dim, self.v_dim].map(u128::from);
        let queries = match self.q_rank.map(u128::from) {
            Some(rank) => hidden * rank + rank * heads * (n + p),
            None => hidden * heads * (n + p),
        };
        queries + hidden * (r + p) + r * heads * (n + v) + heads * v * hidden
    }

    /// Norms of the latents of one layer.
    pub(super) fn norms(&self) -> u128 {
        u128::from(self.kv_rank) + u128::from(self.q_rank.unwrap_or(0))
    }

    pub(super) fn check(&self) -> Result<(), Unsound> {
        positive("latent", "kv_rank", self.kv_rank)?;
        positive("latent", "q_rank", self.q_rank.unwrap_or(1))?;
        positive("latent", "nope_dim", self.nope_dim)?;
        positive("latent", "v_dim", self.v_dim)?;
        at_most("latent", "rope_dim", self.rope_dim)
    }
}

/// Layers that see the last tokens only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LocalLayers {
    /// Tokens that such a layer's row sees, itself included.
    pub window: u32,
    /// Of each so many layers the last sees everything; 0 where none does.
    pub global_every: u32,
}

impl LocalLayers {
    pub(super) fn check(&self) -> Result<(), Unsound> {
        positive("local", "window", self.window)?;
        if self.global_every == 1 {
            return Err(Unsound::new(
                "global_every",
                "global_every 1 lets every layer see everything; leave local out",
            ));
        }
        at_most("local", "global_every", self.global_every)
    }
}

/// Layers whose feed-forward part is many, of which a row takes a few.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experts {
    /// Experts of a layer that rows are routed to.
    pub count: u32,
    /// Of these, as many as a row takes.
    pub active: u32,
    /// Experts beside them that every row takes.
    #[serde(default)]
    pub shared: u32,
    /// Width of one expert.
    pub intermediate: u32,
    /// The first so many layers have a feed-forward part of the model's `intermediate_size` in place of experts.
    #[serde(default)]
    pub dense_layers: u32,
}

impl Experts {
    /// The part of a layer's experts that some of `rows` rows take, expected where each row takes any `active` of `count`
    /// with the same probability, whatever the others take: `1 - (1 - active / count)^rows`. Real routing is less even, and
    /// rows of one text are alike, so that a step reads less.
    pub fn touched(&self, rows: u64) -> f64 {
        let missed = 1.0 - f64::from(self.active) / f64::from(self.count);
        1.0 - power(missed, rows)
    }

    pub(super) fn check(&self, num_layers: u32) -> Result<(), Unsound> {
        let Self { count, active, shared, intermediate, dense_layers } = *self;
        positive("experts", "count", count)?;
        positive("experts", "active", active)?;
        positive("experts", "intermediate", intermediate)?;
        at_most("experts", "shared", shared)?;
        if active > count {
            return Err(Unsound::new("active", format!("a row takes {active} experts, and there are {count}")));
        }
        if dense_layers >= num_layers {
            let why = format!("dense_layers {dense_layers} of {num_layers} layers leave none with experts");
            return Err(Unsound::new("dense_layers", why));
        }
        Ok(())
    }
}

/// `base^exponent` by squaring: products alone, which every machine rounds alike.
fn power(mut base: f64, mut exponent: u64) -> f64 {
    let mut product = 1.0;
    while exponent > 0 {
        if exponent & 1 == 1 {
            product *= base;
        }
        base *= base;
        exponent >>= 1;
    }
    product
}

/// A number that no model can have, and the field that it stands in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct Unsound {
    /// The field.
    pub field: &'static str,
    /// A sentence with the numbers.
    pub why: String,
}

impl Unsound {
    pub(crate) fn new(field: &'static str, why: impl Into<String>) -> Self {
        Self { field, why: why.into() }
    }
}

/// The largest of the numbers of a shape, as in [`ModelGeometry::check`](crate::geometry::ModelGeometry::check).
pub(super) const NUMBER_MAX: u32 = 1 << 24;

fn at_most(part: &str, field: &'static str, value: u32) -> Result<(), Unsound> {
    match value {
        0..=NUMBER_MAX => Ok(()),
        _ => Err(Unsound::new(field, format!("{part}.{field} is {value}; expected at most {NUMBER_MAX}"))),
    }
}

fn positive(part: &str, field: &'static str, value: u32) -> Result<(), Unsound> {
    match value {
        1..=NUMBER_MAX => Ok(()),
        _ => Err(Unsound::new(field, format!("{part}.{field} is {value}; expected 1 to {NUMBER_MAX}"))),
    }
}
