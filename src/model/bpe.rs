//! The vocabulary, the merges and the word rules of byte-level BPE, checked and handed to the `tokenizers` crate.

use std::collections::{HashMap, HashSet};

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;

use super::{ModelError, one_line};

/// Token types of GGUF files.
pub(super) const TYPE_CONTROL: i32 = 3;
pub(super) const TYPE_USER_DEFINED: i32 = 4;
const TYPE_UNUSED: i32 = 5;

/// Names of pre-tokenizers (`tokenizer.ggml.pre`) that are supported.
const PRE_TOKENIZERS: &str = "smollm, gpt-2, default, llama-bpe, qwen2";

/// Splits words as Llama 3 does.
const LLAMA_BPE: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// Splits words as Qwen 2 does: digits one by one.
const QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// A name from a file, fit for a message.
pub(super) fn name(found: Option<&str>) -> String {
    one_line(&found.unwrap_or("(none)"))
}

/// The character that byte-level BPE writes for each byte: printable ones stand for themselves, the others follow
/// from U+0100 on in order.
fn char_of_byte() -> [char; 256] {
    let mut chars = ['\0'; 256];
    let mut others = '\u{100}'..;
    for (c, byte) in chars.iter_mut().zip(0..=255u8) {
        *c = match byte {
            0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
            _ => others.next().unwrap_or_default(),
        };
    }
    chars
}

/// The inverse of [`char_of_byte`].
pub(super) fn byte_of_char() -> HashMap<char, u8> {
    char_of_byte().into_iter().zip(0..=255u8).collect()
}

/// The bytes that a token stands for.
pub(super) fn piece(text: &str, token_type: i32, bytes: &HashMap<char, u8>) -> Option<Box<[u8]>> {
    match token_type {
        TYPE_CONTROL | TYPE_UNUSED => None,
        // Added tokens are written as they are, not in the byte alphabet.
        TYPE_USER_DEFINED => Some(text.as_bytes().into()),
        // A character outside of the alphabet is no token of byte-level BPE; it can only stand for itself.
        _ => Some(
            text.chars()
                .flat_map(|c| match bytes.get(&c) {
                    Some(&byte) => vec![byte],
                    None => c.to_string().into_bytes(),
                })
                .collect(),
        ),
    }
}

/// The part of the tokenizer that turns ordinary text into ids.
pub(super) fn build_bpe(
    tokens: &[&str],
    types: &[i32],
    merges: &[&str],
    pre: Option<&str>,
) -> Result<tokenizers::Tokenizer, ModelError> {
    let error = |message: String| ModelError::Tokenizer(message);
    let pre_tokenizer = pre_tokenizer(pre)?;
    let mut seen: HashMap<&str, u32> = HashMap::with_capacity(tokens.len());
    for (id, &token) in (0u32..).zip(tokens) {
        if let Some(first) = seen.insert(token, id) {
            return Err(error(format!("tokens {first} and {id} are the same: '{}'", name(Some(token)))));
        }
    }
    let ordinary = |id: u32| !matches!(types[id as usize], TYPE_CONTROL | TYPE_USER_DEFINED | TYPE_UNUSED);
    let mut pairs = Vec::with_capacity(merges.len());
    let mut known: HashSet<(&str, &str)> = HashSet::with_capacity(merges.len());
    for (rank, merge) in merges.iter().enumerate() {
        // A token does not start with a space, so that the first character is never the separator.
        let cut = merge.char_indices().skip(1).find(|&(_, c)| c == ' ').map(|(i, _)| i);
        let (left, right) = match cut {
            Some(cut) => (&merge[..cut], &merge[cut + 1..]),
            None => return Err(error(format!("merge {rank}, '{}', is not two tokens", name(Some(merge))))),
        };
        // The crate copies both parts into a buffer as long as the longest token; this check also keeps it from
        // writing past the end.
        let joined = format!("{left}{right}");
        let mut all_ordinary = true;
        for part in [left, right, &joined] {
            match seen.get(part) {
                Some(&id) => all_ordinary &= ordinary(id),
                None => {
                    let (merge, part) = (name(Some(merge)), name(Some(part)));
                    return Err(error(format!("merge {rank}, '{merge}', needs '{part}', which is not a token")));
                }
            }
        }
        // As in llama.cpp the first of equal merges counts.
        if all_ordinary && known.insert((left, right)) {
            pairs.push((left.to_owned(), right.to_owned()));
        }
    }
    let mut vocab: Vocab =
        (0u32..).zip(tokens).filter(|&(id, _)| ordinary(id)).map(|(id, &token)| (token.to_owned(), id)).collect();
    // A byte without a token makes no id, but must stand between its neighbours while they merge. Ids above the
    // vocabulary hold its place; `encode_fragments` takes them out.
    let above = seen.len()..;
    for (id, byte) in above.zip(char_of_byte()) {
        vocab.entry(byte.to_string()).or_insert(u32::try_from(id).unwrap_or(u32::MAX));
    }
    let bpe = BPE::builder()
        .vocab_and_merges(vocab, pairs)
        .ignore_merges(pre == Some("llama-bpe"))
        .build()
        .map_err(|e| error(one_line(&e)))?;
    let mut tokenizer = tokenizers::Tokenizer::new(bpe);
    tokenizer.with_pre_tokenizer(Some(pre_tokenizer));
    Ok(tokenizer)
}

/// The rules that cut text into words, by their name in GGUF files.
fn pre_tokenizer(pre: Option<&str>) -> Result<PreTokenizerWrapper, ModelError> {
    let split = |pattern: &str| -> Result<PreTokenizerWrapper, ModelError> {
        Split::new(SplitPattern::Regex(pattern.to_owned()), SplitDelimiterBehavior::Isolated, false)
            .map(Into::into)
            .map_err(|e| ModelError::Tokenizer(format!("a pattern of the pre-tokenizer is wrong: {}", one_line(&e))))
    };
    let gpt2: PreTokenizerWrapper = ByteLevel::new(false, true, true).into();
    let bytes_only: PreTokenizerWrapper = ByteLevel::new(false, true, false).into();
    let steps = match pre {
        Some("smollm") => vec![Digits::new(true).into(), gpt2],
        Some("gpt-2") => vec![gpt2],
        // What llama.cpp does for files that name nothing better: punctuation apart, digits in threes.
        Some("default") => vec![
            split(r"[\p{P}\$\+<=>\^\~\|]+")?,
            split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)")?,
            split(r"\p{N}+")?,
            split("[0-9][0-9][0-9]")?,
            bytes_only,
        ],
        Some("llama-bpe") => vec![split(LLAMA_BPE)?, bytes_only],
        Some("qwen2") => vec![split(QWEN2)?, bytes_only],
        found => {
            return Err(ModelError::Tokenizer(format!(
                "its pre-tokenizer is '{}'; supported are {PRE_TOKENIZERS}",
                name(found)
            )));
        }
    };
    Ok(Sequence::new(steps).into())
}

#[cfg(test)]
mod tests {
    use tokenizers::tokenizer::PreTokenizer;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString};

    use super::*;

    #[test]
    fn the_byte_alphabet_is_that_of_gpt2() {
        let chars = char_of_byte();
        assert_eq!(byte_of_char().len(), 256, "one character per byte");
        assert_eq!((chars[b' ' as usize], chars[b'\n' as usize], chars[b'A' as usize]), ('Ġ', 'Ċ', 'A'), "known ones");
        let alphabet = ByteLevel::alphabet();
        assert!(chars.iter().all(|c| alphabet.contains(c)), "the alphabet of the tokenizers crate");
    }

    #[test]
    fn hostile_vocabularies_are_refused() {
        let build = |tokens: &[&str], merges: &[&str]| build_bpe(tokens, &vec![1; tokens.len()], merges, Some("gpt-2"));
        assert!(build(&["a", "b", "ab"], &["a b"]).is_ok(), "a sound one");
        for (tokens, merges) in [
            (vec!["a", "b"], vec!["a b"]),
            (vec!["a", "b", "ab"], vec!["a c"]),
            (vec!["a", "b", "ab"], vec!["ab"]),
            (vec!["a", "b", "ab"], vec![""]),
            (vec!["a", "b", "ab"], vec![" "]),
            (vec!["a", "b", "ab"], vec!["a "]),
            (vec!["a", "a"], vec![]),
        ] {
            assert!(build(&tokens, &merges).is_err(), "{tokens:?} {merges:?}");
        }
    }

    #[test]
    fn merges_can_not_make_control_tokens() {
        let tokens = ["<", "|", "x", "<|", "<|x"];
        let bpe = build_bpe(&tokens, &[1, 1, 1, 1, TYPE_CONTROL], &["< |", "<| x"], Some("gpt-2")).expect("sound");
        let ids = bpe.encode("<|x", false).expect("text").get_ids().to_vec();
        assert_eq!(ids, [3, 2], "the last merge is left out");
    }

    #[test]
    fn words_are_cut_as_the_pre_tokenizer_says() {
        for (pre, expected) in [
            ("gpt-2", "I|'m|Ġ12345|,|Ġdon|'t|ĊĊĠ|Ġx"),
            ("smollm", "I|'m|Ġ|1|2|3|4|5|,|Ġdon|'t|ĊĊĠ|Ġx"),
            ("default", "I|'|m|Ġ|123|45|,|Ġdon|'|t|ĊĊĠ|Ġx"),
            ("llama-bpe", "I|'m|Ġ|123|45|,|Ġdon|'t|ĊĊ|Ġ|Ġx"),
            ("qwen2", "I|'m|Ġ|1|2|3|4|5|,|Ġdon|'t|ĊĊ|Ġ|Ġx"),
        ] {
            let mut words = PreTokenizedString::from("I'm 12345, don't\n\n  x");
            pre_tokenizer(Some(pre)).expect(pre).pre_tokenize(&mut words).expect(pre);
            let splits = words.get_splits(OffsetReferential::Normalized, OffsetType::Byte);
            let found: Vec<&str> = splits.iter().map(|(word, _, _)| *word).collect();
            assert_eq!(found.join("|"), expected, "{pre}");
        }
    }

    #[test]
    fn unknown_pre_tokenizers_are_named() {
        let message = pre_tokenizer(Some("bert")).expect_err("not supported").to_string();
        assert!(message.contains("'bert'") && message.contains(PRE_TOKENIZERS), "{message}");
    }
}
