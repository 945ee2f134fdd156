//! A pool in which one list of pages stands for all of a model's.
//!
//! A cache has a list per (layer, KV head): 480 of hundreds of pages each for a large model and one session. Where a compression
//! does the same to every list, they are equally long at any time, so the schedule over one of them, in a pool of as many bytes
//! as one list's share, makes the same decisions as over all: pages, commitments, slabs and chunks are each the same number
//! of times smaller. [`OneList`] says how many times, and bytes times [`OneList::lists`] are those of the whole.
//!
//! Exact up to three things. The share is rounded down to whole bytes. A swapped chunk takes pages of all lists at once, so that
//! where pages differ in size it may carry a few pages less than one that takes list after list. And a slab holds pages of all
//! lists at once, where single pages scatter over slabs as they return; that matters where caches of several page sizes
//! compete for the last slabs.

use crate::compression::Compression;
use crate::compression::head::HeadPattern;
use crate::compression::hidden::HiddenCodec;
use crate::compression::layer::{LayerPolicy, Sharing};
use crate::compression::token::{Allocation, TokenPolicy};
use crate::geometry::{Bytes, ModelGeometry, PageGeometry};
use crate::pool::page_table::{TableShape, Window};
use crate::pool::{PagePool, PoolError, PoolLayout, PoolReport};

use super::{Abilities, Caches, SubmitError};

/// Pages of the largest size that a slab holds, as in the engine.
const PAGES_OF_SLAB: u64 = 16;
/// Bytes of one arena at most: they are counted in 32 bits of cells.
const ARENA_MAX: Bytes = Bytes(32 << 30);

/// How many lists the one stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OneList {
    /// Lists that hold pages: layers that own a cache, times KV heads.
    pub lists: u32,
    /// Lists that a row reads: those of every layer, whoever owns them.
    pub read: u32,
}

impl OneList {
    /// Of a model under a compression.
    ///
    /// # Errors
    /// A sentence with the reason when the compression does not do the same to every list.
    pub fn new(model: &ModelGeometry, compression: &Compression) -> Result<Self, String> {
        let refuse =
            |why: &str| Err(format!("{} can not be simulated with one list for all: {why}", compression.short()));
        if compression.head != HeadPattern::Full {
            return refuse("some heads keep less than others");
        }
        match compression.layer.share {
            Sharing::None | Sharing::Every(_) => {}
            Sharing::Map(_) => {
                return refuse("layers reach back as far as the map says; share:N does the same for all");
            }
            Sharing::Merge { .. } => return refuse("how many tokens merged layers have in common depends on the text"),
        }
        if compression.layer.skip_prefill.is_some() {
            return refuse("prompt rows stop below a layer");
        }
        match compression.token {
            TokenPolicy::Quest { .. } => return refuse("rows read fewer pages of some layers than of others"),
            TokenPolicy::Evict(eviction) if eviction.rule(u32::MAX).allocation != Allocation::Uniform => {
                return refuse("lists share a budget, so how long each becomes depends on the text");
            }
            _ => {}
        }
        let owners = compression.layer.owners(model.num_layers)?;
        let own = owners.iter().zip(0..).filter(|(owner, layer)| **owner == *layer).count();
        let own = u32::try_from(own).expect("layers are counted in 32 bits");
        Ok(Self { lists: own * model.heads.num_kv_heads, read: model.num_lists() })
    }

    /// What happens to the one list.
    pub fn compression(compression: &Compression) -> Compression {
        Compression { layer: LayerPolicy::default(), ..compression.clone() }
    }

    /// Bytes of all lists.
    pub fn whole(&self, share: Bytes) -> Bytes {
        Bytes(share.0.saturating_mul(u64::from(self.lists)))
    }

    /// One list's share of bytes, rounded down.
    pub fn share(&self, whole: Bytes) -> Bytes {
        Bytes(whole.0 / u64::from(self.lists))
    }

    /// Caches of steps of up to `max_rows` rows in `budget` bytes, of which `scratch` are not for pages. Bytes in `abilities`
    /// are of all lists, as they are in both of these.
    ///
    /// # Errors
    /// [`PoolError::BudgetTooSmall`], with bytes of all lists.
    pub fn caches(
        &self,
        page: PageGeometry,
        max_rows: u32,
        (budget, scratch): (Bytes, Bytes),
        abilities: Abilities,
    ) -> Result<Caches, PoolError> {
        let seals = abilities.codecs.iter().any(HiddenCodec::seals);
        let pages = abilities.codecs.iter().map(|codec| codec.page_bytes(page));
        let pages = pages.chain([HiddenCodec::F16.page_bytes(page)]);
        let (smallest, largest) =
            pages.fold((Bytes(u64::MAX), Bytes::ZERO), |(low, high), bytes| (low.min(bytes), high.max(bytes)));
        let window = Window::new(page, 1, max_rows, seals);
        let layout = PoolLayout {
            // The window's entries are not a list's.
            budget: self.share(budget) + Bytes(u64::from(window.entries()) * 4),
            staging: Bytes::ZERO,
            scratch: Bytes(scratch.0.div_ceil(u64::from(self.lists))),
            max_binding: ARENA_MAX,
            slab: Bytes(largest.0 * PAGES_OF_SLAB),
            smallest_page: smallest,
            fixed_entries: window.entries(),
        };
        let pool = PagePool::new(&layout).map_err(|error| match error {
            PoolError::BudgetTooSmall { budget, fixed, slab } => PoolError::BudgetTooSmall {
                budget: self.whole(budget),
                fixed: self.whole(fixed),
                slab: self.whole(slab),
            },
            other => other,
        })?;
        let full = TableShape { num_layers: 1, num_kv_heads: 1, page, codec: HiddenCodec::F16, quest: None };
        let abilities = Abilities {
            slot_bytes: self.share(abilities.slot_bytes),
            swap_bytes: self.share(abilities.swap_bytes),
            ..abilities
        };
        Ok(Caches::new(pool, full, window, abilities))
    }

    /// A refusal with the bytes of all lists.
    pub fn whole_refusal(&self, error: SubmitError) -> SubmitError {
        match error {
            SubmitError::NeverFits { tokens, needed, capacity, enough } => SubmitError::NeverFits {
                tokens,
                needed: self.whole(needed),
                capacity: self.whole(capacity),
                enough: self.whole(enough),
            },
            other => other,
        }
    }

    /// A report with the bytes and the pages of all lists.
    pub fn whole_report(&self, report: PoolReport) -> PoolReport {
        let whole = |bytes| self.whole(bytes);
        PoolReport {
            budget_bytes: whole(report.budget_bytes),
            allocated_bytes: whole(report.allocated_bytes),
            staging_bytes: whole(report.staging_bytes),
            scratch_bytes: whole(report.scratch_bytes),
            tables_bytes: whole(report.tables_bytes),
            arenas_bytes: whole(report.arenas_bytes),
            arenas: report.arenas,
            pages_in_use_bytes: whole(report.pages_in_use_bytes),
            pages_peak_bytes: whole(report.pages_peak_bytes),
            in_use_bytes: whole(report.in_use_bytes),
            peak_bytes: whole(report.peak_bytes),
            slack_bytes: whole(report.slack_bytes),
            committed_bytes: whole(report.committed_bytes),
            released_pages: report.released_pages * u64::from(self.lists),
            shared_bytes: whole(report.shared_bytes),
            spared_bytes: whole(report.spared_bytes),
            spared_peak_bytes: whole(report.spared_peak_bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::yi_34b;

    #[test]
    fn a_compression_that_treats_lists_differently_is_refused_with_the_reason() {
        let refusal = |text: &str| OneList::new(&yi_34b(), &text.parse().expect(text)).expect_err(text);
        for (text, why) in [
            ("head=duo:0.5", "heads keep less"),
            ("token=adakv:0.25:snapkv", "depends on the text"),
            ("token=pyramidkv:512", "share a budget"),
            ("token=kvzip:0.3", "share a budget"),
            ("token=quest:512", "fewer pages"),
            ("layer=minicache", "in common"),
            ("layer=skip-prefill:30..", "stop below"),
            ("layer=share:0,0,2,2", "the map"),
        ] {
            let refused = refusal(text);
            assert!(refused.contains(why) && refused.contains("one list for all"), "{text}: {refused}");
        }
    }

    #[test]
    fn the_one_list_stands_for_those_that_hold_pages() {
        let lists = |text: &str| OneList::new(&yi_34b(), &text.parse().expect(text)).expect(text);
        for text in ["full", "kivi4", "token=h2o:0.25", "token=streaming:512:every128,hidden=rot3"] {
            assert_eq!(lists(text), OneList { lists: 480, read: 480 }, "{text}: 60 layers of 8 KV heads");
        }
        assert_eq!(lists("layer=share:2"), OneList { lists: 240, read: 480 }, "half are owned, all are read");
        let one = lists("full");
        assert_eq!(one.whole(one.share(Bytes(1_000))), Bytes(960), "rounded down");
    }
}
