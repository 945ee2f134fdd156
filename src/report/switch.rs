//! The report of `bench switch`.

use std::fmt;

use serde::Serialize;

use super::run_tables::cache;
use super::table::{Align, block, counted, table};
use super::{DeviceReport, ModelReport, Program};
use crate::eval::switch::{OneWay, Switch};
use crate::geometry::Bytes;

/// What context switches cost.
#[derive(Clone, Debug, Serialize)]
pub struct SwitchReport {
    /// The program.
    pub program: Program,
    /// The device.
    pub device: DeviceReport,
    /// The model.
    pub model: ModelReport,
    /// Tokens of the cache that moved.
    pub tokens: usize,
    /// Sessions that decoded beside it.
    pub decoding: u32,
    /// Bytes of a chunk.
    pub chunk_bytes: Bytes,
    /// Times that each was measured, after a warm-up; medians count.
    pub repeats: usize,
    /// One per compression.
    pub results: Vec<SwitchRow>,
}

/// One compression.
#[derive(Clone, Debug, Serialize)]
pub struct SwitchRow {
    /// What was measured.
    #[serde(flatten)]
    pub measured: Switch,
    /// GB/s (10^9 bytes) to the host, with nothing beside it.
    pub out_gb_per_s: f64,
    /// GB/s back.
    pub back_gb_per_s: f64,
    /// Of a plain copy's speed, out.
    pub out_ratio: f64,
    /// Of a plain copy's speed, back.
    pub back_ratio: f64,
    /// Part of the way out that took no time beside decode; `null` where decode alone is too unsteady to say.
    pub out_hidden: Option<f64>,
    /// Part of the way back that took no time beside decode.
    pub back_hidden: Option<f64>,
}

impl SwitchRow {
    /// With its ratios.
    pub fn new(measured: Switch) -> Self {
        let gb = |way: OneWay| measured.bytes.0 as f64 / way.alone_s / 1e9;
        let (out, back) = (measured.out, measured.back);
        Self {
            out_gb_per_s: gb(out),
            back_gb_per_s: gb(back),
            out_ratio: out.link_ratio(),
            back_ratio: back.link_ratio(),
            out_hidden: out.hidden(),
            back_hidden: back.hidden(),
            measured,
        }
    }
}

impl fmt::Display for SwitchReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use Align::{Left, Right};
        let columns = [
            ("\ncache", Left),
            ("\nbytes", Right),
            ("steps\none way", Right),
            ("out\nGB/s", Right),
            ("of a plain\ncopy", Right),
            ("back\nGB/s", Right),
            ("of a plain\ncopy", Right),
            ("out hidden\nby decode", Right),
            ("back hidden\nby decode", Right),
        ];
        let percent = |part: Option<f64>| part.map_or("too noisy".to_owned(), |part| format!("{:.0} %", 100.0 * part));
        let rows = self.results.iter().map(|row| {
            vec![
                cache(&row.measured.compression),
                row.measured.bytes.to_string(),
                row.measured.steps.to_string(),
                format!("{:.2}", row.out_gb_per_s),
                format!("{:.2}", row.out_ratio),
                format!("{:.2}", row.back_gb_per_s),
                format!("{:.2}", row.back_ratio),
                percent(row.out_hidden),
                percent(row.back_hidden),
            ]
        });
        writeln!(f, "{}", table(&columns, rows))?;
        let lines = [
            ("cache", format!("of {}", counted(self.tokens as u64, "token"))),
            ("beside", format!("{} that decode", counted(u64::from(self.decoding), "session"))),
            ("chunks", format!("{} in a step", self.chunk_bytes)),
            ("checked", "what came back held the bytes that left, every time".to_owned()),
        ];
        f.write_str(&block("context switch", &lines))
    }
}
