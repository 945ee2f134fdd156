//! An allocator that counts what a thread takes and holds: for tests of what readers take for files that lie, and of steps that
//! should take nothing.

#![expect(dead_code, reason = "each test binary uses a part")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Counting;

thread_local! {
    static LIVE: Cell<usize> = const { Cell::new(0) };
    static PEAK: Cell<usize> = const { Cell::new(0) };
    static TAKEN: Cell<usize> = const { Cell::new(0) };
}

fn count(freed: usize, taken: usize) {
    // Counted per thread, because tests run side by side; a thread that ends has no counter any more.
    let _ = LIVE.try_with(|live| {
        live.set(live.get().saturating_sub(freed) + taken);
        if taken > 0 {
            let _ = TAKEN.try_with(|n| n.set(n.get() + 1));
        }
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(live.get())));
    });
}

// SAFETY: every call goes to the system allocator unchanged; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(0, layout.size());
        // SAFETY: the caller's promises are those that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(layout.size(), 0);
        // SAFETY: the pointer came from `System` with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(0, layout.size());
        // SAFETY: as in `alloc`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(layout.size(), size);
        // SAFETY: as in `dealloc`.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What a call returns, and the bytes that it holds at most beyond those that were held before.
pub(crate) fn peak_of<T>(call: impl FnOnce() -> T) -> (T, usize) {
    let before = LIVE.get();
    PEAK.set(before);
    let result = call();
    (result, PEAK.get().saturating_sub(before))
}

/// What a call returns, and how often it took memory.
pub(crate) fn allocations_of<T>(call: impl FnOnce() -> T) -> (T, usize) {
    let before = TAKEN.get();
    let result = call();
    (result, TAKEN.get() - before)
}
