//! The report of `report`: records of this program joined by model, device and compression, measured beside predicted.
//!
//! A record is the JSON that a command writes with `--json`. [`parse`] reads one, [`join()`] puts them together; predictions are
//! the theory's ([`challenges`](crate::theory::challenges)), with the ceilings that `bench device` measured on the same device.

mod join;
mod predict;
mod read;
mod show;
#[cfg(test)]
mod tests;

pub use join::{DeviceBasis, Figure, Group, Metric, Quality, RecordsReport, Refused, Source, join};
pub use predict::Basis;
pub use read::{Body, KlRow, NeedleRow, Record, parse};
