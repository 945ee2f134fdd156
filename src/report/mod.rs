//! Reports: what a command did and found.
//!
//! One structure per command. `--json` writes the structure itself, so the documentation of its fields is the
//! documentation of the file; [`std::fmt::Display`] writes the tables that people see. Names of numbers end in their
//! unit: `_bytes`, `_tokens`, `_s`, `_ms`. A number that does not exist (a time of a session that never ran) is `null`.
//!
//! | command | structure |
//! |---|---|
//! | `devices` | [`DevicesReport`] |
//! | `run` | [`RunReport`], collected from the steps by a [`Meter`]; a [`Trace`] where asked for |
//! | `session` | [`SaveReport`], [`LoadReport`], [`SessionList`], [`SessionDetails`] |
//! | `generate` | [`GenerateReport`] |
//! | `tokenize` | [`TokenizeReport`] |
//! | `codecs` | [`CodecsReport`] |
//! | `policies` | [`PoliciesReport`] |
//! | `presets` | [`PresetsReport`] |
//! | `calibrate heads` | [`HeadsReport`] |
//! | `eval perplexity` | [`PerplexityReport`] |
//! | `eval kl` | [`KlReport`], which also draws a [`Plot`] |
//! | `eval needle` | [`NeedleReport`], which draws one too |
//! | `bench device` | [`CeilingsReport`] |
//! | `bench kernels` | [`KernelsReport`] |
//! | `bench metrics` | [`MetricsReport`] |
//! | `bench switch` | [`SwitchReport`] |
//! | `tune` | [`TuneReport`] |
//! | `report` | [`records::RecordsReport`], which is also a page |
//! | `plan` | [`PlanReport`], which draws [`Curves`] and a page |
//! | `simulate` | [`SimulateReport`], which draws one as well |
//! | `fleet` | [`FleetReport`], which draws one and a page |
//! | `verify` | [`VerifyReport`] |

mod ceilings;
mod checks;
mod codecs;
mod curves;
mod device;
mod fleet;
mod fleet_tables;
mod heads;
pub mod html;
mod kernel_record;
mod kernels;
mod kl;
mod meter;
mod metrics;
mod needle;
mod origin;
mod perplexity;
mod plan;
mod plan_tables;
mod plot;
mod policies;
mod presets;
pub mod records;
mod roofline;
mod run;
mod run_tables;
mod session;
mod simulate;
mod simulate_tables;
mod step;
mod switch;
mod table;
mod text;
mod trace;
mod tune;

pub use ceilings::{CeilingFigures, CeilingsReport};
pub use checks::VerifyReport;
pub use codecs::{CodecReport, CodecsReport};
pub use curves::{Curves, Panel};
pub use device::{DEFAULT_TUNING, DeviceReport, DevicesReport, ModelReport, Program};
pub use fleet::{DesignFigures, DesignRow, FleetReport, FleetSettings};
pub use heads::HeadsReport;
pub use kernel_record::{Comparison, RecordFigure, device_slug};
pub use kernels::{KernelsReport, kernel_line};
pub use kl::{KlReport, KlRow};
pub use meter::{
    ConcurrencyMetric, ContextSwitchMetric, DecodeMetric, FourMetrics, Meter, Percentiles, PrefillMetric, ServiceMetric,
};
pub use metrics::{MetricsReport, Scaled};
pub use needle::{CaseOutcome, LengthReport, NeedleCase, NeedleReport, NeedleRow};
pub use origin::Origin;
pub use perplexity::{PerplexityReport, PerplexityRow};
pub use plan::{ContextRow, MachineReport, PlanReport, PlanRow, PlanSettings, Planner};
pub use plot::{Guide, Plot, Point, Scale};
pub use policies::{PoliciesReport, PolicyReport};
pub use presets::{GpuPresetReport, ModelPresetReport, PresetsReport};
pub use run::{FaultsReport, RoundReport, RunReport, RunSettings, SessionReport, finish_name};
pub use session::{LoadReport, LoadedSession, RefusedFile, SaveReport, SavedDocument, SessionDetails, SessionList};
pub use simulate::{ScheduleSettings, SimulateReport, SimulateRow, SimulateSettings, UsageReport};
pub use step::StepReport;
pub use switch::{SwitchReport, SwitchRow};
pub use table::Align;
pub use text::{GenerateReport, TokenReport, TokenizeReport};
pub use trace::Trace;
pub use tune::{TuneReport, tune_line};
