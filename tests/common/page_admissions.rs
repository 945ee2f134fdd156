//! Admissions of page tables by hand: what does not fit, or was not promised, is refused and changes nothing.

use concertina::pool::PoolError;
use concertina::pool::page_table::{TableRanges, TableShape, Window};

use super::{SHAPE, admit, no_window, roomy};

#[test]
fn an_admission_that_fails_leaves_everything_as_it_was() {
    let (mut pool, _) = roomy();
    let mut few = TableRanges::new(20);
    pool.commit(SHAPE.open_page(), 0).expect("no pages always fit");
    let before = (pool.report(), format!("{few:?}"));
    let error = admit(&mut pool, &mut few, SHAPE, 16 * 4).expect_err("24 entries of 20");
    assert_eq!(error, PoolError::TablesFull { wanted: 24, total: 20 }, "the refusal should carry the numbers");
    assert_eq!((pool.report(), format!("{few:?}")), before, "too few table entries");
    let error = admit(&mut pool, &mut few, SHAPE, 16 * 5_000).expect_err("58 MiB of 5");
    assert!(matches!(error, PoolError::DoesNotFit { pages: 30_000, .. }), "{error}");
    assert_eq!((pool.report(), format!("{few:?}")), before, "too few pages");
    let table = admit(&mut pool, &mut few, SHAPE, 16 * 3).expect("18 entries of 20");
    assert_ne!(format!("{few:?}"), before.1, "an admission that succeeds shows in this comparison");
    table.release(&mut pool, &mut few).expect("the pool should agree");
}

#[test]
fn growth_beyond_the_admission_is_refused_and_takes_nothing_from_others() {
    let (mut pool, mut ranges) = roomy();
    let mut small = admit(&mut pool, &mut ranges, SHAPE, 16).expect("the pool is roomy");
    let mut other = admit(&mut pool, &mut ranges, SHAPE, 160).expect("the pool is roomy");
    small.grow(&mut pool, &mut no_window(), 16).expect("growth within the admission");
    let before = pool.report();
    let error = small.grow(&mut pool, &mut no_window(), 1).expect_err("a second page per list was never admitted");
    assert_eq!(error, PoolError::NotCommitted(SHAPE.open_page()), "the refusal should name the page size");
    assert_eq!(pool.report(), before, "another session's commitments should be untouched");
    other.grow(&mut pool, &mut no_window(), 160).expect("what was admitted can be taken");
}

#[test]
fn an_admission_whose_sealed_pages_do_not_fit_leaves_everything_as_it_was() {
    let (mut pool, mut ranges) = roomy();
    let shape = TableShape { codec: "f32".parse().expect("a codec"), ..SHAPE };
    for page in [shape.open_page(), shape.sealed_page()] {
        pool.commit(page, 0).expect("no pages always fit");
    }
    let before = (pool.report(), format!("{ranges:?}"));
    let error = admit(&mut pool, &mut ranges, shape, 16 * 1_000).expect_err("24 MiB of 5");
    assert!(
        matches!(error, PoolError::DoesNotFit { pages: 6_000, page, .. } if page == shape.sealed_page()),
        "{error}"
    );
    assert_eq!((pool.report(), format!("{ranges:?}")), before, "the open pages are not committed either");
}

#[test]
#[should_panic(expected = "rows that leave a page should end on an edge")]
fn rows_beyond_the_cut_are_noticed() {
    let (mut pool, mut ranges) = roomy();
    let shape = TableShape { codec: "rot2".parse().expect("a codec"), ..SHAPE };
    let mut table = admit(&mut pool, &mut ranges, shape, 40).expect("the pool is roomy");
    let _ = table.grow(&mut pool, &mut Window::new(shape.page, shape.num_kv_heads, 64, true), 20);
}

#[test]
fn an_admission_of_more_pages_than_32_bits_count_is_refused() {
    let (mut pool, mut ranges) = roomy();
    let shape = TableShape { num_layers: 64, num_kv_heads: 64, ..SHAPE };
    // 64 * 64 * 2^20 pages: exactly 2^32, which wraps to none.
    let error = admit(&mut pool, &mut ranges, shape, 1 << 24).expect_err("32 TiB of 5 MiB");
    assert!(matches!(error, PoolError::DoesNotFit { .. }), "{error}");
}
