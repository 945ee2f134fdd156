//! Bits per value as the pool counts them, for every codec.

use concertina::compression::hidden::{self, HiddenCodec};
use concertina::geometry::{Bytes, PageGeometry};
use concertina::pool::page_table::{Capacity, Layers, PageTable, TableRanges, TableShape, Window};
use concertina::pool::{PagePool, PoolLayout};

const PAGES: u32 = 5;

/// Bits per value of sealed pages: what the pool's counter of bytes in use grew by, open pages aside.
fn measured(codec: HiddenCodec, page: PageGeometry) -> f64 {
    let shape = TableShape { num_layers: 3, num_kv_heads: 2, page, codec };
    let largest = shape.open_page().max(shape.sealed_page());
    let layout = PoolLayout {
        budget: Bytes::mib(64),
        staging: Bytes::ZERO,
        scratch: Bytes::ZERO,
        max_binding: Bytes::mib(64),
        slab: Bytes(largest.0 * 16),
        smallest_page: shape.open_page().min(shape.sealed_page()),
        fixed_entries: 0,
    };
    let mut pool = PagePool::new(&layout).expect("64 MiB hold slabs");
    let mut ranges = TableRanges::new(u32::try_from(pool.tables().0 / 4).expect("32 bits"));
    let mut window = Window::new(page, 2, page.page_size, true);
    let capacity = Capacity::tokens(PAGES * page.page_size);
    let mut table = PageTable::admit(&mut pool, &mut ranges, shape, &Layers::OWN, capacity).expect("an empty pool");
    for _ in 0..PAGES {
        window.clear();
        table.grow(&mut pool, &mut window, page.page_size).expect("committed");
        table.retire();
    }
    let open = if codec.seals() { u64::from(shape.num_lists()) * shape.open_page().0 } else { 0 };
    let sealed = pool.report().pages_in_use_bytes.0 - open;
    let values = u64::from(shape.num_lists()) * u64::from(PAGES) * 2 * page.elements();
    (sealed * 8) as f64 / values as f64
}

#[test]
fn every_codec_takes_the_bits_of_its_definition() {
    for head_dim in [64, 80, 128] {
        for page_size in [64, 128] {
            let page = PageGeometry { page_size, head_dim };
            for codec in hidden::examples().filter(|codec| codec.check(page).is_ok()) {
                let (bits, expected) = (measured(codec, page), codec.effective_bits(page));
                println!("{codec}, head_dim {head_dim}, page {page_size}: {bits} bits per value");
                assert!((bits - expected).abs() < 1e-12, "{codec}: {bits} measured, {expected} defined");
            }
        }
    }
}

#[test]
fn the_bits_of_the_papers_are_met() {
    for (text, page_size, head_dim, expected) in [
        ("f16", 64, 128, 16.0),
        ("int8", 64, 128, 8.25),
        ("kivi4", 64, 128, 5.0),
        ("kivi4:64", 64, 128, 4.5),
        ("kivi4:128", 128, 128, 4.25),
        ("kivi2", 64, 128, 3.0),
        ("kivi2:64", 64, 128, 2.5),
        ("kivi2:128", 128, 128, 2.25),
        ("rot4", 64, 128, 4.125),
        ("rot2", 64, 64, 2.25),
        ("fp8", 64, 64, 8.0),
        ("lowrank:32", 64, 64, 8.25),
    ] {
        let page = PageGeometry { page_size, head_dim };
        let bits = measured(text.parse().expect("a codec"), page);
        assert!((bits - expected).abs() < 1e-12, "{text} at head_dim {head_dim}: {bits} bits");
    }
    let page = PageGeometry { page_size: 64, head_dim: 128 };
    let bits = measured("kivi4".parse().expect("a codec"), page);
    assert!((bits - 4.5).abs() > 0.1, "another group's bits should not pass: {bits}");
}
