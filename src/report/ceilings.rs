//! The report of `bench device`: what a device gives at best.

use std::fmt;

use serde::Serialize;

use super::table::{Align, block, table};
use super::{DeviceReport, Program};
use crate::engine::ceilings::{Ceiling, CeilingSizes};
use crate::eval::ceilings::Measured;
use crate::eval::spread::Spread;

/// The ceilings of a device.
#[derive(Clone, Debug, Serialize)]
pub struct CeilingsReport {
    /// `bench device`.
    pub kind: &'static str,
    /// The program.
    pub program: Program,
    /// The device, and the clock of its kernels; the link and submissions are timed by the host.
    pub device: DeviceReport,
    /// Whether little work was done, hardly warmed up: for tests, no figures to rely on.
    pub quick: bool,
    /// How much was done at once.
    pub sizes: CeilingSizes,
    /// What the device reaches.
    #[serde(flatten)]
    pub ceilings: CeilingFigures,
    /// Time of all, the checks included.
    pub elapsed_s: f64,
}

/// Every ceiling, each measured several times after a warm-up. A second is a second of the kernel or the copy.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct CeilingFigures {
    /// Bytes of device memory read per second.
    pub read_bytes_per_s: Spread,
    /// Bytes of device memory read and written per second, added up.
    pub copy_bytes_per_s: Spread,
    /// Bytes per second to the host.
    pub out_bytes_per_s: Spread,
    /// Bytes per second from the host.
    pub back_bytes_per_s: Spread,
    /// FLOP per second of the kernel of matrix products, at many rows.
    pub flop_per_s: Spread,
    /// Seconds of an empty dispatch among others in a pass.
    pub dispatch_s: Spread,
    /// Seconds from submitting a pass of one empty dispatch until the host knows that it is done.
    pub submission_s: Spread,
}

impl CeilingFigures {
    /// From the measurements, one of each kind.
    ///
    /// # Panics
    /// When a kind is missing.
    pub fn new(measured: &[Measured]) -> Self {
        let of = |ceiling: Ceiling| {
            let found = measured.iter().find(|one| one.ceiling == ceiling);
            found.unwrap_or_else(|| panic!("{ceiling:?} should have been measured")).value
        };
        Self {
            read_bytes_per_s: of(Ceiling::Read),
            copy_bytes_per_s: of(Ceiling::Copy),
            out_bytes_per_s: of(Ceiling::Out),
            back_bytes_per_s: of(Ceiling::Back),
            flop_per_s: of(Ceiling::Flop),
            dispatch_s: of(Ceiling::Dispatch),
            submission_s: of(Ceiling::Submission),
        }
    }

    /// Each with its name, its unit in full and the factor from the unit of this report.
    fn lines(&self) -> [(&'static str, Spread, &'static str, f64); 7] {
        [
            ("read device memory", self.read_bytes_per_s, "GB/s", 1e-9),
            ("copy device memory, read + write", self.copy_bytes_per_s, "GB/s", 1e-9),
            ("to the host", self.out_bytes_per_s, "GB/s", 1e-9),
            ("from the host", self.back_bytes_per_s, "GB/s", 1e-9),
            ("matrix product", self.flop_per_s, "GFLOP/s", 1e-9),
            ("empty dispatch in a pass", self.dispatch_s, "µs", 1e6),
            ("submission, waited for", self.submission_s, "µs", 1e6),
        ]
    }
}

impl fmt::Display for CeilingsReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use Align::{Left, Right};
        let columns = [("ceiling", Left), ("median", Right), ("p10", Right), ("p90", Right), ("", Left)];
        let rows = self.ceilings.lines().into_iter().map(|(name, spread, unit, factor)| {
            let Spread { median, p10, p90, .. } = spread.scaled(factor);
            let shown = |value: f64| if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.2}") };
            vec![name.to_owned(), shown(median), shown(p10), shown(p90), unit.to_owned()]
        });
        writeln!(f, "{}", table(&columns, rows))?;
        let CeilingSizes { memory_bytes, link_bytes, product: [rows, k, cols] } = self.sizes;
        let clock = self.device.clock.clone().unwrap_or_default();
        let n = self.ceilings.read_bytes_per_s.n;
        let warm_up = if self.quick { "hardly any: figures for tests alone" } else { "0.5 s each" };
        let lines = [
            ("work", format!("{memory_bytes} of memory, {link_bytes} over the link, {rows} x {k} by {k} x {cols}")),
            ("timed by", format!("{clock}; link and submission by the host, {n} times")),
            ("warm-up", warm_up.to_owned()),
            ("checked", "sums of what was read and copied, bytes that came back, products in f64".to_owned()),
        ];
        f.write_str(&block("ceilings", &lines))
    }
}
