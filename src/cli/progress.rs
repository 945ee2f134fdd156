//! Progress bars. They are drawn on the standard error, and only when it is a terminal.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// How often a bar is drawn without news.
const TICK: Duration = Duration::from_millis(120);

/// A style from a template of this program.
pub(super) fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the program's own template should parse").progress_chars("━╸─")
}

/// A bar that counts bytes.
pub(super) fn bytes(what: &'static str) -> ProgressBar {
    let template = "{msg} {bar:30.cyan/dim} {binary_bytes} of {binary_total_bytes}";
    ProgressBar::new(0).with_style(style(template)).with_message(what)
}

/// A bar that counts `length` things.
pub(super) fn counter(what: &'static str, length: u64) -> ProgressBar {
    let bar = ProgressBar::new(length).with_prefix(what);
    bar.set_style(style("{prefix} {bar:30.cyan/dim} {pos} of {len}  {elapsed}  {wide_msg}"));
    bar.enable_steady_tick(TICK);
    bar
}

/// A bar over `length` units of work of about equal length, with the time left.
pub(super) fn work(what: &'static str, length: u64) -> ProgressBar {
    let bar = ProgressBar::new(length).with_prefix(what);
    bar.set_style(style("{prefix} {bar:30.cyan/dim} {percent:>3}%  {elapsed}, about {eta} left  {wide_msg}"));
    bar.enable_steady_tick(TICK);
    bar
}

/// A sign of life without a length.
pub(super) fn spinner(what: &'static str) -> ProgressBar {
    let bar = ProgressBar::new_spinner().with_style(style("{spinner:.cyan} {msg}")).with_message(what);
    bar.enable_steady_tick(TICK);
    bar
}
