//! What ran: the program, the device, the model.

use std::fmt;

use serde::Serialize;

use super::table::{Align, table};
use crate::compression::Compression;
use crate::device::timing::Clock;
use crate::device::{AdapterSummary, Device};
use crate::geometry::{Bytes, ModelGeometry};
use crate::theory::predict::kv_bytes;

/// The program that wrote a report.
#[derive(Clone, Debug, Serialize)]
pub struct Program {
    /// Its name.
    pub name: &'static str,
    /// Its version.
    pub version: &'static str,
}

impl Program {
    /// This program.
    pub const THIS: Self = Self { name: env!("CARGO_PKG_NAME"), version: env!("CARGO_PKG_VERSION") };
}

/// The adapters of this machine.
#[derive(Clone, Debug, Serialize)]
pub struct DevicesReport {
    /// The program.
    pub program: Program,
    /// Every adapter of the backends that were asked.
    pub adapters: Vec<AdapterSummary>,
    /// The name of the one that `--device auto` takes.
    pub default_adapter: String,
    /// The file of tunings that commands read; `null` where the environment names none.
    pub tuning_file: Option<String>,
    /// Of each adapter the tiers that it has a tuning for.
    pub tuned_tiers: Vec<Vec<String>>,
}

impl fmt::Display for DevicesReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = [
            ("\nindex", Align::Right),
            ("adapter\ndriver", Align::Left),
            ("kind\nbackend", Align::Left),
            ("tier\nsubgroup", Align::Left),
            ("max binding\nworkgroup", Align::Right),
            ("\ntimestamps", Align::Left),
            ("\ntuning", Align::Left),
        ];
        let rows = self.adapters.iter().zip(&self.tuned_tiers).map(|(a, tuned)| {
            let (smallest, largest) = a.subgroup_sizes;
            let subgroup = if smallest == largest {
                format!("{smallest} lanes")
            } else {
                format!("{smallest} to {largest} lanes")
            };
            vec![
                a.index.to_string(),
                format!("{}\n{}", a.name, a.driver),
                format!("{}\n{}", a.kind, a.backend),
                format!("{}\n{subgroup}", a.tier),
                format!("{}\n{}", a.max_binding, a.workgroup_memory),
                if a.timestamps { "yes" } else { "no" }.to_owned(),
                if tuned.is_empty() { DEFAULT_TUNING.to_owned() } else { tuned.join("\n") },
            ]
        });
        f.write_str(&table(&columns, rows))?;
        writeln!(f, "\ndefault adapter: {}", self.default_adapter)?;
        match &self.tuning_file {
            Some(file) if self.tuned_tiers.iter().any(|tiers| !tiers.is_empty()) => writeln!(f, "tuning file: {file}"),
            _ => Ok(()),
        }
    }
}

/// The device that ran.
#[derive(Clone, Debug, Serialize)]
pub struct DeviceReport {
    /// The adapter.
    pub adapter: AdapterSummary,
    /// The tier that the kernels were built for.
    pub tier: String,
    /// Where device times come from.
    pub clock: Option<String>,
    /// What says how kernels are launched: [`DEFAULT_TUNING`], or a file of `concertina tune`.
    pub tuning: String,
}

/// What is said of kernels that are launched as the program does without a search.
pub const DEFAULT_TUNING: &str = "default";

impl DeviceReport {
    /// The open device and, where steps are timed, the clock of their device times.
    pub fn new(device: &Device, clock: Option<Clock>) -> Self {
        Self {
            adapter: device.summary().clone(),
            tier: device.tier().to_string(),
            clock: clock.map(|clock| clock.to_string()),
            tuning: DEFAULT_TUNING.to_owned(),
        }
    }

    /// The same device with kernels that something else launches.
    #[must_use]
    pub fn tuned_by(self, source: &str) -> Self {
        Self { tuning: source.to_owned(), ..self }
    }
}

impl fmt::Display for DeviceReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let AdapterSummary { name, backend, kind, .. } = &self.adapter;
        write!(f, "{name}, {kind} on {backend}, tier {}", self.tier)?;
        if let Some(clock) = &self.clock {
            write!(f, ", timed by {clock}")?;
        }
        write!(f, ", tuning: {}", self.tuning)
    }
}

/// The model that ran.
#[derive(Clone, Debug, Serialize)]
pub struct ModelReport {
    /// Name of its file.
    pub name: String,
    /// Its shape.
    pub geometry: ModelGeometry,
    /// Bytes of weights on the device, beside the budget; `null` where none were loaded.
    pub weights_bytes: Option<Bytes>,
    /// Bytes that one token of context takes in an uncompressed cache.
    pub kv_per_token_bytes: Bytes,
}

impl ModelReport {
    /// A model file by its name and shape.
    pub fn new(name: String, geometry: &ModelGeometry, weights: Option<Bytes>) -> Self {
        Self {
            name,
            kv_per_token_bytes: kv_bytes(geometry, &Compression::default(), 1),
            geometry: geometry.clone(),
            weights_bytes: weights,
        }
    }
}

impl fmt::Display for ModelReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        if let Some(bytes) = self.weights_bytes {
            write!(f, ", weights {bytes}")?;
        }
        write!(f, ", KV cache {} per token", self.kv_per_token_bytes)
    }
}
