//! Bytes of caches as the theory has them, beside those that a pool held: measured ones, and those that page tables need.

use std::collections::BTreeMap;

use concertina::compression::Compression;
use concertina::compression::token::{Allocation, TokenPolicy};
use concertina::geometry::{Bytes, PageGeometry};
use concertina::pool::page_table::TableShape;
use concertina::theory::cache::{CacheSize, Seen};
use concertina::theory::model::Decoder;
use concertina::theory::presets::Presets;

/// What `eval kl` measured behind a prefix: `tests/golden/held_bytes.json`.
#[derive(serde::Deserialize)]
struct Measured {
    prefix_tokens: u32,
    page_tokens: u32,
    held_bytes_and_tokens: BTreeMap<String, (u64, u64)>,
}

fn smollm() -> Decoder {
    Presets::built_in().model("smollm2-135m").expect("the reference model").decoder.clone()
}

/// Whether how long each list becomes depends on the text.
fn depends_on_text(compression: &Compression) -> bool {
    matches!(compression.token, TokenPolicy::Evict(e) if matches!(
        e.rule(u32::MAX).allocation,
        Allocation::AcrossHeads { .. } | Allocation::AcrossAll
    ))
}

#[test]
fn caches_that_were_measured_held_what_the_theory_says() {
    let measured: Measured =
        serde_json::from_str(include_str!("golden/held_bytes.json")).expect("a record of measured caches");
    let seen = Seen { document: measured.prefix_tokens, after: 0 };
    let (mut exact, mut near) = (0, 0);
    for (text, (bytes, tokens)) in &measured.held_bytes_and_tokens {
        let compression: Compression = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
        let size = CacheSize::new(&smollm(), &compression, seen, Some(measured.page_tokens)).expect(text);
        assert_eq!(size.held_tokens, *tokens, "{text}: tokens over all lists");
        if depends_on_text(&compression) {
            // Lists of other lengths end in other pages.
            let ratio = size.held_bytes.0 as f64 / *bytes as f64;
            assert!((0.9..1.1).contains(&ratio), "{text}: {} predicted, {bytes} held", size.held_bytes.0);
            near += 1;
        } else {
            // What was measured is a prefix of whole pages without the page that a session keeps open.
            let evicts = size.peak_bytes > size.held_bytes;
            let open = if compression.hidden.seals() && !evicts { 90 * 64 * 64 * 4 } else { 0 };
            assert_eq!(size.held_bytes, Bytes(*bytes + open), "{text}: bytes of all pages");
            exact += 1;
        }
    }
    assert!(exact >= 60 && near >= 10, "{exact} exact and {near} near ones");
    let wrong = CacheSize::new(&smollm(), &Compression::default(), Seen { after: 64, ..seen }, Some(64)).expect("full");
    assert_ne!(wrong.held_bytes.0, measured.held_bytes_and_tokens["full"].0, "a page more would be noticed");
}

#[test]
fn caches_without_evictions_need_what_page_tables_need() {
    let model = smollm();
    let (layers, heads) = (model.geometry.num_layers, model.geometry.heads);
    for text in ["full", "int8", "fp8", "kivi4", "rot3", "mean+rot2", "k:kivi2,v:rot4", "lowrank:32+int8"] {
        let codec = text.parse::<Compression>().expect(text);
        let page = PageGeometry { page_size: 64, head_dim: heads.head_dim };
        let shape =
            TableShape { num_layers: layers, num_kv_heads: heads.num_kv_heads, page, codec: codec.hidden, quest: None };
        for n in [1, 63, 64, 65, 1_000, 4_096] {
            let seen = Seen { document: n, after: 0 };
            let size = CacheSize::new(&model, &codec, seen, Some(64)).expect(text);
            assert_eq!(size.held_bytes, shape.bytes_for(n), "{text}: {n} tokens");
        }
    }
}
