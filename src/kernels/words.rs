//! Names in WGSL text.

use std::borrow::Cow;

/// The text with every name for which `other` has another replaced. Digits begin numbers, and what follows a point is a member.
pub(super) fn replace<'a>(text: &str, other: impl Fn(&str) -> Option<Cow<'a, str>>) -> String {
    let mut out = String::with_capacity(text.len() + text.len() / 8);
    let mut rest = text;
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    while let Some(start) = rest.find(is_word) {
        let (before, from) = rest.split_at(start);
        let (word, after) = from.split_at(from.find(|c| !is_word(c)).unwrap_or(from.len()));
        let is_name = !word.starts_with(|c: char| c.is_ascii_digit()) && !before.ends_with('.');
        out.push_str(before);
        match is_name.then(|| other(word)).flatten() {
            Some(name) => out.push_str(&name),
            None => out.push_str(word),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_whole_words() {
        let other = |word: &str| (word == "u").then_some(Cow::Borrowed("7u"));
        assert_eq!(replace("u + 0u + au + a.u + u1 + f(u)", other), "7u + 0u + au + a.u + u1 + f(7u)");
    }
}
