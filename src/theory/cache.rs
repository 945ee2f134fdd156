//! What a cache holds, and what a decode row reads of it, under every dimension of a [`Compression`].
//!
//! ```text
//! list    one of each (layer that owns a cache, KV head), after a document of n tokens and m more
//! kept    what head pattern and token policy leave of n; nothing where nothing is evicted: then all is tail
//! tail    m, or what came since the last eviction; nothing in a list that keeps nothing
//! local   in a layer that sees a window, list = min(kept + tail, window)
//! merged  of two layers' tokens, 1 - retained as directions in common: once, with two lengths
//! held    bytes of all lists in the codec, metadata included
//! read    bytes that a decode row reads: each layer its owner's lists; quest the chosen pages and the bounds of all
//! peak    bytes while a document is compressed: n in f16 beside what stays of it; held where nothing is evicted
//! ```
//!
//! Without pages, bytes are those of the paper's equation 1: every token sealed, nothing rounded. With pages they are those of
//! the pool: lists end in pages partly used, and where pages are sealed each list keeps an f16 page for what comes next.
//!
//! What depends on the text is taken at its average: heads that compete hold their common budget in equal parts, and tokens
//! that two merged layers both keep are all those of the shorter list.

use serde::Serialize;

use super::model::Decoder;
use super::predict::{GROUP_TOKENS, concurrency};
use super::step::Machine;
use crate::compression::Compression;
use crate::compression::head::{HeadPattern, ListPattern};
use crate::compression::hidden::HiddenCodec;
use crate::compression::keep::{KeepShape, domains};
use crate::compression::layer::Sharing;
use crate::compression::token::TokenPolicy;
use crate::geometry::{Bytes, HeadGeometry, PageGeometry};

/// Tokens of a page whose bounds `quest` keeps, where pages are not given.
const QUEST_PAGE: u32 = 64;

/// Tokens that a session has seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Seen {
    /// Of its document, which is compressed at its end.
    pub document: u32,
    /// Behind it.
    pub after: u32,
}

/// What a cache comes to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CacheSize {
    /// Bytes of all lists.
    pub held_bytes: Bytes,
    /// Bytes that a decode row reads, over all layers.
    pub read_bytes: Bytes,
    /// Bytes while the document is compressed.
    pub peak_bytes: Bytes,
    /// Tokens held, over all lists; what two layers have in common in both.
    pub held_tokens: u64,
    /// Tokens that a decode row attends to, over all layers and KV heads.
    pub read_tokens: u64,
}

/// Tokens of one list.
#[derive(Clone, Copy, Debug, Default)]
struct List {
    kept: u32,
    tail: u32,
    /// In common with the other layer of a pair; held by the lower one.
    merged: u32,
    /// Whether the other layer holds what is merged.
    upper: bool,
}

/// How tokens become bytes: bytes times [`Self::per`], so that none are rounded before they are added up.
struct Price {
    codec: HiddenCodec,
    page: PageGeometry,
    /// Whether lists end in pages.
    paged: bool,
}

impl Price {
    fn new(codec: HiddenCodec, head_dim: u32, page_size: Option<u32>) -> Self {
        let page = PageGeometry { page_size: page_size.unwrap_or(GROUP_TOKENS), head_dim };
        Self { codec, page, paged: page_size.is_some() }
    }

    const fn per(&self) -> u64 {
        self.page.page_size as u64
    }

    fn tokens(&self, n: u32, codec: &HiddenCodec) -> u64 {
        let n = if self.paged { n.next_multiple_of(self.page.page_size) } else { n };
        u64::from(n) * codec.page_bytes(self.page).0
    }

    /// A list's own tokens.
    fn own(&self, list: &List) -> u64 {
        let tail = if self.paged && self.codec.seals() {
            let full = list.tail / self.page.page_size * self.page.page_size;
            // A page of f16 stays for the tokens that come next.
            let open = if list.tail > 0 { self.page.page_size } else { 0 };
            self.tokens(full, &self.codec) + self.tokens(open, &HiddenCodec::F16)
        } else {
            self.tokens(list.tail, &self.codec)
        };
        self.tokens(list.kept, &self.codec) + tail
    }

    /// What a list has in common with another.
    fn merged(&self, list: &List) -> u64 {
        self.tokens(list.merged, &self.codec.for_pairs())
    }

    /// Bytes of what was added up.
    fn bytes(&self, sum: u64) -> Bytes {
        Bytes(sum.div_ceil(self.per()))
    }
}

impl CacheSize {
    /// KV heads of a layer's cache and their width; a latent is one head for all, whose numbers are shared out between keys and
    /// values.
    pub fn cached_heads(model: &Decoder) -> HeadGeometry {
        match &model.latent {
            None => model.geometry.heads,
            Some(latent) => {
                let numbers = u32::try_from(latent.cached()).expect("a latent's numbers are counted in 32 bits");
                HeadGeometry { num_kv_heads: 1, head_dim: numbers / 2, ..model.geometry.heads }
            }
        }
    }

    /// Sessions that fit in `memory` bytes, of which the last is still being compressed: none where not one can be.
    pub const fn concurrency(&self, memory: Bytes) -> u64 {
        match memory.0.checked_sub(self.peak_bytes.0) {
            None => 0,
            Some(left) => 1 + concurrency(Bytes(left), self.held_bytes),
        }
    }

    /// Over all GPUs of a machine, copies included.
    #[must_use]
    pub fn over_all(self, model: &Decoder, machine: &Machine) -> Self {
        let Some(parallel) = machine.parallel else { return self };
        let all = |bytes| parallel.over_all(model, bytes);
        let Self { held_bytes, read_bytes, peak_bytes, .. } = self;
        Self { held_bytes: all(held_bytes), read_bytes: all(read_bytes), peak_bytes: all(peak_bytes), ..self }
    }

    /// Of a session that has seen so many tokens, rounded to pages of `page_size` tokens where given.
    ///
    /// # Errors
    /// A sentence when the compression is not for this model, or has no room for what always stays.
    pub fn new(model: &Decoder, compression: &Compression, seen: Seen, page_size: Option<u32>) -> Result<Self, String> {
        let heads = Self::cached_heads(model);
        let num_layers = model.geometry.num_layers;
        let price = Price::new(compression.hidden, heads.head_dim, page_size);
        compression.hidden.check(price.page)?;
        let owners = compression.layer.owners(num_layers)?;
        let own: Vec<u32> = (0..num_layers).filter(|layer| owners[*layer as usize] == *layer).collect();
        let lists = lists(model, compression, &own, heads.num_kv_heads, seen)?;
        let per_layer = heads.num_kv_heads as usize;
        let of_layer = |layer: u32| {
            let at = own.binary_search(&owners[layer as usize]).expect("an owner owns its cache");
            &lists[at * per_layer..(at + 1) * per_layer]
        };
        let tokens = |list: &List| u64::from(list.kept) + u64::from(list.tail) + u64::from(list.merged);
        let quest = Quest::new(compression, seen, &price);
        let mut read = (0, 0);
        for layer in 0..num_layers {
            for list in of_layer(layer) {
                let (bytes, n) = match &quest {
                    Some(quest) if layer >= quest.dense_layers => quest.read(&price, list),
                    _ => (price.own(list) + price.merged(list), tokens(list)),
                };
                read = (read.0 + bytes, read.1 + n);
            }
        }
        let bounds: u64 = quest.iter().flat_map(|quest| lists.iter().map(|list| quest.bounds(&price, list))).sum();
        let own_bytes = |list: &List| price.own(list) + if list.upper { 0 } else { price.merged(list) };
        let held: u64 = lists.iter().map(own_bytes).sum::<u64>() + bounds;
        let held_bytes = price.bytes(held);
        // A document is read in f16, and what stays of it moves to pages of its own.
        let document = price.tokens(seen.document, &HiddenCodec::F16) * lists.len() as u64;
        let peak_bytes = if evicts(compression) { price.bytes(held + document) } else { held_bytes };
        Ok(Self {
            held_bytes,
            read_bytes: price.bytes(read.0),
            peak_bytes,
            held_tokens: lists.iter().map(tokens).sum(),
            read_tokens: read.1,
        })
    }
}

/// Whether a cache is evicted from, or merged, behind its document.
fn evicts(compression: &Compression) -> bool {
    compression.token.eviction().is_some()
        || compression.head != HeadPattern::Full
        || matches!(compression.layer.share, Sharing::Merge { .. })
}

/// What each list of the layers that own a cache holds.
fn lists(
    model: &Decoder,
    compression: &Compression,
    own: &[u32],
    num_kv_heads: u32,
    seen: Seen,
) -> Result<Vec<List>, String> {
    let num_layers = u32::try_from(own.len()).expect("layers are counted in 32 bits");
    let shape = KeepShape { num_layers, num_kv_heads };
    let patterns = compression.head.spread(num_layers * num_kv_heads)?;
    // An eviction again and again is that of everything so far; what came since is at most what it waits for.
    let every = compression.token.eviction().and_then(|eviction| eviction.every);
    let all = seen.document.saturating_add(seen.after);
    let (evicted, tail) = match (every, compression.token.eviction()) {
        _ if !evicts(compression) => (0, all),
        (Some(every), Some(eviction)) if eviction.budget.tokens(all) < all => (all, every),
        (Some(_), _) => (0, all),
        _ => (seen.document, seen.after),
    };
    let mut lists = vec![List::default(); patterns.len()];
    for domain in domains(&compression.token, shape, &patterns, evicted)? {
        let n = u32::try_from(domain.lists.len()).expect("lists are counted in 32 bits");
        let (share, rest) = (domain.total / n, domain.total % n);
        for (at, list) in (0..).zip(&domain.lists) {
            lists[*list as usize].kept = (share + u32::from(at < rest)).min(evicted);
        }
    }
    for (list, pattern) in lists.iter_mut().zip(&patterns) {
        list.tail = if *pattern == ListPattern::Nothing { 0 } else { tail };
    }
    for (layer, lists) in own.iter().zip(lists.chunks_mut(num_kv_heads as usize)) {
        let Some(window) = model.window_of(*layer) else { continue };
        for list in lists {
            list.tail = list.tail.min(window);
            list.kept = list.kept.min(window - list.tail);
        }
    }
    if let Sharing::Merge { retain_permille, .. } = compression.layer.share {
        for (lower, upper) in compression.layer.merged_pairs(model.geometry.num_layers)? {
            for head in 0..num_kv_heads {
                let [lower, upper] = [lower, upper].map(|layer| (layer * num_kv_heads + head) as usize);
                let both = lists[lower].kept.min(lists[upper].kept);
                let retained = (u64::from(both) * u64::from(retain_permille)).div_ceil(1000);
                let merged = both - u32::try_from(retained).expect("a part is no larger than its whole");
                for (at, is_upper) in [(lower, false), (upper, true)] {
                    lists[at].kept -= merged;
                    (lists[at].merged, lists[at].upper) = (merged, is_upper);
                }
            }
        }
    }
    Ok(lists)
}

/// Rows that choose pages.
struct Quest {
    budget: u32,
    dense_layers: u32,
    page: u32,
}

impl Quest {
    fn new(compression: &Compression, seen: Seen, price: &Price) -> Option<Self> {
        let TokenPolicy::Quest { budget, dense_layers } = compression.token else { return None };
        let page = if price.paged { price.page.page_size } else { QUEST_PAGE };
        let budget = budget.tokens(seen.document.saturating_add(seen.after)).div_ceil(page) * page;
        Some(Self { budget, dense_layers, page })
    }

    /// Bounds of full pages: a least and a largest key each, as wide as a token in f16.
    fn bounds(&self, price: &Price, list: &List) -> u64 {
        price.tokens(list.tail / self.page, &HiddenCodec::F16)
    }

    /// The bounds, the chosen pages and the one that is open: what is read, and tokens attended to.
    fn read(&self, price: &Price, list: &List) -> (u64, u64) {
        let open = list.tail % self.page;
        let chosen = List { tail: (list.tail - open).min(self.budget) + open, ..*list };
        let bounds = if chosen.tail < list.tail { self.bounds(price, list) } else { 0 };
        (price.own(&chosen) + bounds, u64::from(chosen.tail) + u64::from(chosen.kept))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::{ModelGeometry, yi_34b};
    use crate::theory::model::{Latent, LocalLayers};
    use crate::theory::predict::kv_bytes;

    fn read(text: &str) -> Compression {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    fn yi() -> Decoder {
        Decoder::dense(yi_34b(), false).expect("a model")
    }

    fn of(model: &Decoder, text: &str, document: u32, after: u32) -> CacheSize {
        CacheSize::new(model, &read(text), Seen { document, after }, None)
            .unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn without_evictions_it_is_equation_one() {
        for text in ["full", "kivi4", "rot3", "k:int8,v:kivi2", "think:0.8+int8"] {
            let size = of(&yi(), text, 50_000, 1_000);
            let expected = kv_bytes(&yi_34b(), &read(text), 51_000);
            assert_eq!((size.held_bytes, size.read_bytes, size.peak_bytes), (expected, expected, expected), "{text}");
            assert_eq!((size.held_tokens, size.read_tokens), (480 * 51_000, 480 * 51_000), "{text}");
        }
    }

    #[test]
    fn every_dimension_enters_as_it_does_in_a_pool() {
        let full = of(&yi(), "full", 40_000, 0).held_bytes.0;
        let token = full / 40_000 / 480;
        // Half of the layers hold a cache, all of them read one.
        let shared = of(&yi(), "layer=share:2", 40_000, 0);
        assert_eq!((shared.held_bytes.0, shared.read_bytes.0), (full / 2, full), "layers");
        // 120 of 480 lists keep everything, the others 64 + 256 tokens; what comes later goes to all.
        let duo = of(&yi(), "head=duo:0.25", 40_000, 100);
        assert_eq!(duo.held_bytes.0, token * (120 * 40_000 + 360 * 320 + 480 * 100), "heads");
        assert_eq!(duo.peak_bytes.0, duo.held_bytes.0 + full, "beside the document in f16");
        let pruned = of(&yi(), "head=prune:0.75", 40_000, 100);
        assert_eq!(pruned.held_bytes.0, token * 360 * 40_100, "heads that keep nothing take nothing");
        let evicted = of(&yi(), "token=snapkv:0.25", 40_000, 100);
        assert_eq!(evicted.held_bytes.0, token * 480 * 10_100, "tokens");
        // The budget is for what stays and the tail; both are as long in every context.
        let capped = |after| of(&yi(), "token=h2o:512:every128", 40_000, after).held_bytes.0;
        assert_eq!((capped(0), capped(9_000)), (token * 480 * 512, token * 480 * 512), "a cap");
        assert_eq!(of(&yi(), "token=h2o:512:every128", 300, 0).held_bytes.0, token * 480 * 300, "not yet");
        let all = of(&yi(), "layer=share:2,head=duo:0.25,token=snapkv:0.25,hidden=kivi4:128", 40_000, 0);
        assert_eq!(all.held_bytes.0, token * (60 * 10_000 + 180 * 320) * 17 / 64, "all four");
        // In the upper half of the layers pairs hold a twentieth twice, and the rest once, with two lengths of 2 bytes a side.
        let merged = of(&yi(), "layer=minicache", 40_000, 0);
        let pairs = 15 * 8;
        let expected = token * (240 * 40_000 + 2 * pairs * 2_000 + pairs * 38_000) + pairs * 38_000 * 8;
        assert_eq!(merged.held_bytes.0, expected, "merged layers");
        assert!(merged.read_bytes.0 > full, "both read what they have in common, and its lengths");
    }

    #[test]
    fn quest_reads_fewer_bytes_and_holds_more() {
        let (full, quest) = (of(&yi(), "full", 64_000, 0), of(&yi(), "token=quest:0.25", 64_000, 0));
        let token = full.held_bytes.0 / 64_000;
        assert_eq!(quest.held_bytes.0, full.held_bytes.0 + token * 1_000, "bounds of a thousand pages");
        let dense = 2;
        let expected = token / 60 * (dense * 64_000 + (60 - dense) * (16_000 + 1_000));
        assert_eq!(quest.read_bytes.0, expected, "two layers read everything, the others a quarter and the bounds");
    }

    #[test]
    fn windows_and_latents_are_those_of_the_model() {
        let local = Some(LocalLayers { window: 1_000, global_every: 6 });
        let model = Decoder::new(yi_34b(), false, None, local, None).expect("a model");
        let token = of(&yi(), "full", 1, 0).held_bytes.0 / 60;
        assert_eq!(
            of(&model, "full", 40_000, 0).held_bytes.0,
            token * (10 * 40_000 + 50 * 1_000),
            "ten layers see all"
        );
        assert_eq!(of(&model, "full", 400, 0).held_bytes.0, token * 60 * 400, "shorter than the window");
        assert_eq!(
            of(&model, "token=snapkv:0.01", 40_000, 0).held_bytes.0,
            token * 60 * 400,
            "a hundredth is less than a window"
        );
        let latent = Latent { kv_rank: 512, rope_dim: 64, q_rank: None, nope_dim: 128, v_dim: 128 };
        let model = Decoder::new(ModelGeometry { num_layers: 60, ..yi_34b() }, false, Some(latent), None, None)
            .expect("a model");
        assert_eq!(
            of(&model, "full", 1_000, 0).held_bytes,
            Bytes(1_000 * 60 * 576 * 2),
            "one latent of 576 for all heads"
        );
        assert_eq!(
            of(&model, "int8", 1_024, 0).held_bytes.0,
            1_024 * 60 * (576 + 2 * 4),
            "a scale for each half of a token"
        );
    }

    #[test]
    fn pages_round_lists_up() {
        let paged = |text: &str, document, after| {
            let size = CacheSize::new(&yi(), &read(text), Seen { document, after }, Some(64)).expect(text);
            size.held_bytes.0 / 480
        };
        let token = 512;
        assert_eq!(paged("full", 100, 0), token * 128, "two pages");
        let sealed = HiddenCodec::page_bytes(&read("kivi4").hidden, PageGeometry { page_size: 64, head_dim: 128 }).0;
        assert_eq!(paged("kivi4", 100, 0), sealed + token * 64, "one of codes, one that is open");
        assert_eq!(paged("kivi4", 128, 0), 2 * sealed + token * 64, "one is open for what comes next");
        assert_eq!(paged("token=snapkv:0.5,hidden=kivi4", 200, 10), 2 * sealed + token * 64, "what stayed, and a tail");
        let refused = CacheSize::new(&yi(), &read("kivi4:128"), Seen { document: 9, after: 0 }, Some(64));
        assert!(refused.is_err_and(|e| e.contains("--page-size 128")), "groups of 128 tokens");
        let refused = CacheSize::new(&yi(), &read("token=snapkv:0.25"), Seen { document: 40, after: 0 }, None);
        assert!(refused.is_err_and(|e| e.contains("always stay")), "no room");
    }
}
