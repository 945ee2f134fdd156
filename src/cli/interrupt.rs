//! Ctrl-C: the first one ends the work in an orderly way, the second one at once.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result};

use super::failure::INTERRUPTED;

/// Set by the first interrupt.
static INTERRUPT: AtomicBool = AtomicBool::new(false);
/// Set when interrupts have been taken over.
static INSTALLED: AtomicBool = AtomicBool::new(false);

/// Takes over interrupts. Before this is called an interrupt ends the process, which is right while there is nothing to
/// show.
pub(super) fn install() -> Result<()> {
    if INSTALLED.swap(true, Ordering::Relaxed) {
        return Ok(());
    }
    ctrlc::set_handler(|| {
        if INTERRUPT.swap(true, Ordering::Relaxed) {
            std::process::exit(i32::from(INTERRUPTED));
        }
    })
    .context("interrupts can not be handled")
}

/// Whether there was an interrupt.
pub(super) fn requested() -> bool {
    INTERRUPT.load(Ordering::Relaxed)
}
