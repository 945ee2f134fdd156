//! Numbers in the texts of all dimensions.

/// Digits alone as a number.
pub(super) fn count(text: &str) -> Option<u32> {
    if text.bytes().all(|b| b.is_ascii_digit()) { text.parse().ok() } else { None }
}

/// A part of a whole from 0 to 1, rounded to thousandths.
pub(super) fn permille(text: &str) -> Option<u32> {
    if !text.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
        return None;
    }
    let part: f64 = text.parse().ok().filter(|part| (0.0..=1.0).contains(part))?;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a number from 0 to 1000")]
    let permille = (part * 1000.0).round() as u32;
    Some(permille)
}

/// Thousandths as they are written: 0.25.
pub(super) fn part(permille: u32) -> f64 {
    f64::from(permille) / 1000.0
}

/// `part` of `whole`, rounded to the nearest.
pub(super) fn of(whole: u32, permille: u32) -> u32 {
    let nearest = (u64::from(whole) * u64::from(permille) + 500) / 1000;
    u32::try_from(nearest).expect("a part should be no larger than its whole")
}

/// The number in an option that is its name and a number, such as `sink4`.
pub(super) fn option<'t>(text: &'t str, name: &str) -> Option<&'t str> {
    text.strip_prefix(name).filter(|number| number.starts_with(|c: char| c.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_plain() {
        assert_eq!(["7", "+7", "-7", "7.0", ""].map(count), [Some(7), None, None, None, None], "counts");
        let parts = ["0.25", "1", "0", "1.5", "-0.1", "nan", "1e-1", ".", "0.0004"].map(permille);
        let expected = [Some(250), Some(1000), Some(0), None, None, None, None, None, Some(0)];
        assert_eq!(parts, expected, "parts");
        assert_eq!((of(10, 250), of(90, 500), of(u32::MAX, 1000)), (3, 45, u32::MAX), "halves round up");
        assert_eq!((option("sink4", "sink"), option("sink", "sink")), (Some("4"), None), "options");
    }
}
