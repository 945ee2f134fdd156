//! How kernels are launched: what changes their speed and nothing else.
//!
//! A kernel's text follows from what it computes (its spec) and from its tuning: lanes, register tiles, loads in flight. Which
//! is fastest is an adapter's affair; every candidate is checked like any other kernel.

use super::attention::Format;
use super::decode::DecodeTuning;
use super::product_tuning::ProductTuning;

/// The tuning of every kernel that has one; what is not chosen is as [`Self::decode`] and [`Self::product`] say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Tuning {
    /// Of decode, for all formats.
    pub decode: Option<DecodeTuning>,
    /// Of products.
    pub product: Option<ProductTuning>,
}

impl Tuning {
    /// How decode reads pages of a format.
    pub fn decode(&self, format: &Format) -> DecodeTuning {
        self.decode.unwrap_or_default().fitted(format)
    }

    /// How an adapter of a kind, as `concertina devices` names them, multiplies.
    pub fn product(&self, adapter_kind: &str) -> ProductTuning {
        self.product.unwrap_or_else(|| ProductTuning::of_kind(adapter_kind))
    }
}
