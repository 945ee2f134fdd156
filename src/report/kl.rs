//! The report of `eval kl`: many compressions against the full cache.

use std::fmt;

use serde::Serialize;

use super::plot::{Guide, Plot, Point, Scale};
use super::run_tables::cache;
use super::table::{Align, block, counted, number, table};
use super::{DeviceReport, ModelReport, Program};
use crate::eval::kl::{KlResult, KlSettings, PrefixSealing};
use crate::geometry::Bytes;

/// What compressions cost in quality.
#[derive(Clone, Debug, Serialize)]
pub struct KlReport {
    /// The program.
    pub program: Program,
    /// The device.
    pub device: DeviceReport,
    /// The model.
    pub model: ModelReport,
    /// Path of the text, as given.
    pub text: String,
    /// Tokens of the text.
    pub text_tokens: usize,
    /// Prefix, tail, and when the prefix was sealed.
    pub settings: KlSettings,
    /// Windows of the text.
    pub windows: usize,
    /// Tokens of a page.
    pub page_tokens: u32,
    /// Rows of a prompt step.
    pub chunk_tokens: u32,
    /// Device bytes for caches, tables, scratch and staging.
    pub kv_budget_bytes: Bytes,
    /// The full cache, then every compression in the order given.
    pub results: Vec<KlRow>,
    /// Time of all windows, reading logits back included.
    pub elapsed_s: f64,
}

/// One compression.
#[derive(Clone, Debug, Serialize)]
pub struct KlRow {
    /// What was measured.
    #[serde(flatten)]
    pub measured: KlResult,
    /// Bits per element of a sealed page, all metadata included.
    pub effective_bits: f64,
    /// Bytes held over tokens of the prefix: what the session's cache costs per token of its document.
    pub per_token_bytes: f64,
    /// Mean negative log-likelihood less that of the full cache, in nats.
    pub nll_difference: f64,
    /// Bytes that the full cache held over those that this one did.
    pub times_smaller: f64,
}

impl KlRow {
    /// A result beside the full cache's, with the bits per element of its pages, for a prefix of so many tokens.
    pub fn new(measured: KlResult, full: &KlResult, effective_bits: f64, prefix_tokens: usize) -> Self {
        Self {
            nll_difference: measured.nll - full.nll,
            times_smaller: full.held_bytes.0 as f64 / measured.held_bytes.0 as f64,
            per_token_bytes: measured.held_bytes.0 as f64 / prefix_tokens as f64,
            measured,
            effective_bits,
        }
    }
}

impl KlReport {
    /// Divergence against bytes per token; the full cache is where it ends.
    pub fn plot(&self) -> Plot {
        let point = |row: &KlRow| Point {
            x: row.per_token_bytes,
            y: row.measured.mean_kl,
            label: cache(&row.measured.compression),
        };
        let Self { settings, windows, .. } = self;
        Plot {
            title: format!(
                "{}: {} after {} tokens of {}",
                self.model.name,
                counted((settings.tail_tokens * windows) as u64, "token"),
                settings.prefix_tokens,
                self.text
            ),
            x_title: "bytes of cache per token of the prefix (log scale)".to_owned(),
            y_title: "mean KL from the full cache, nats (log scale)".to_owned(),
            y_scale: Scale::Log,
            guide: self.results.first().map(|full| Guide { x: full.per_token_bytes, label: "full".to_owned() }),
            points: self.results.iter().skip(1).map(point).collect(),
        }
    }
}

impl fmt::Display for KlReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use Align::{Left, Right};
        let columns = [
            ("\ncache", Left),
            ("bits per\nelement", Right),
            ("bytes\nheld", Right),
            ("times\nsmaller", Right),
            ("mean KL\nnats", Right),
            ("median KL\nnats", Right),
            ("max KL\nnats", Right),
            ("nll\nnats", Right),
            ("nll less\nfull", Right),
            ("same\ntop 1", Right),
        ];
        let rows = self.results.iter().enumerate().map(|(i, row)| {
            let m = &row.measured;
            vec![
                if i == 0 { "full".to_owned() } else { cache(&m.compression) },
                format!("{:.3}", row.effective_bits),
                m.held_bytes.to_string(),
                number(Some(row.times_smaller)),
                format!("{:.2e}", m.mean_kl),
                format!("{:.2e}", m.median_kl),
                format!("{:.2e}", m.max_kl),
                format!("{:.4}", m.nll),
                format!("{:+.4}", row.nll_difference),
                format!("{:.1} %", 100.0 * m.top1_agreement),
            ]
        });
        writeln!(f, "{}", table(&columns, rows))?;
        let KlSettings { prefix_tokens, tail_tokens, sealing } = self.settings;
        let sealed = match sealing {
            PrefixSealing::AfterPrefix => "compressed after the prefix, which is read over a full cache",
            PrefixSealing::WhenFull => "sealed as pages fill, and the prefix reads what is sealed",
        };
        let windows = counted(self.windows as u64, "window");
        let text_tokens = counted(self.text_tokens as u64, "token");
        let lines = [
            ("text", format!("{}: {text_tokens}, {windows} of {}", self.text, self.settings.window())),
            ("window", format!("prefix of {prefix_tokens}, tail of {tail_tokens}, one more to predict")),
            ("pages", format!("{} tokens, {sealed}", self.page_tokens)),
            ("time", format!("{:.1} s", self.elapsed_s)),
        ];
        f.write_str(&block("KL from the full cache", &lines))
    }
}
