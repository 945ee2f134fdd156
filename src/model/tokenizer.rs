//! Byte-level BPE with the vocabulary of a GGUF file; llama.cpp is the reference for its behaviour.
//!
//! ```text
//! text -- control markers (only where asked for) --> fragments -- pre-tokenizer --> words -- merges --> ids
//! ```
//!
//! Two differences to llama.cpp are deliberate. Control and user-defined tokens are not in the vocabulary that the
//! merges work on, so ordinary text can not become one, whatever the file's merges say. And a user-defined token is
//! found in a text only where markers are asked for; llama.cpp finds it always.

use std::collections::BTreeSet;

use super::bpe::{TYPE_CONTROL, TYPE_USER_DEFINED, build_bpe, byte_of_char, name, piece};
use super::{GgufFile, ModelError, one_line};

/// Markers that end a turn besides the file's own end-of-sequence token.
const END_MARKERS: [&str; 4] = ["<|im_end|>", "<|eot_id|>", "<|end|>", "<|endoftext|>"];

/// Text to token ids and back.
#[derive(Debug)]
pub struct Tokenizer {
    bpe: tokenizers::Tokenizer,
    /// Bytes that a token stands for; `None` for tokens that [`Self::decode`] skips.
    pieces: Vec<Option<Box<[u8]>>>,
    /// Markers with their ids, longest first.
    markers: Vec<(String, u32)>,
    eos_ids: Vec<u32>,
    bos_id: Option<u32>,
    eos_id: Option<u32>,
    add_bos: bool,
}

/// A part of a text: a marker's id, or ordinary text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Fragment {
    /// A control or user-defined token.
    Marker(u32),
    /// Text without special meaning.
    Text(String),
}

impl Tokenizer {
    /// The tokenizer that a model file describes.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when the file's tokenizer is of another kind (the message names it and what is
    /// supported) or contradicts itself, [`ModelError::Malformed`] when a metadata value has the wrong type.
    pub fn from_gguf(gguf: &GgufFile) -> Result<Self, ModelError> {
        let error = |message: String| Err(ModelError::Tokenizer(message));
        match gguf.text("tokenizer.ggml.model")? {
            Some("gpt2") => {}
            found => return error(format!("its kind is '{}'; supported is 'gpt2' (byte-level BPE)", name(found))),
        }
        let tokens = gguf.texts("tokenizer.ggml.tokens")?.unwrap_or_default();
        let merges = gguf.texts("tokenizer.ggml.merges")?.unwrap_or_default();
        let types = gguf.integers("tokenizer.ggml.token_type")?.unwrap_or_else(|| vec![1; tokens.len()]);
        let vocab_size = gguf.geometry().vocab_size as usize;
        if tokens.len() != vocab_size || types.len() != vocab_size {
            return error(format!(
                "it has {} tokens and {} token types for an embedding of {vocab_size} rows",
                tokens.len(),
                types.len()
            ));
        }
        let pre = gguf.text("tokenizer.ggml.pre")?;
        let bpe = build_bpe(&tokens, &types, &merges, pre)?;

        let is_marker = |token_type: i32| matches!(token_type, TYPE_CONTROL | TYPE_USER_DEFINED);
        let mut markers: Vec<(String, u32)> = (0u32..)
            .zip(tokens.iter().zip(&types))
            .filter(|&(_, (text, &token_type))| is_marker(token_type) && !text.is_empty())
            .map(|(id, (&text, _))| (text.to_owned(), id))
            .collect();
        markers.sort_by_key(|(text, id)| (std::cmp::Reverse(text.len()), *id));

        let special_id = |key: &str| -> Result<Option<u32>, ModelError> {
            let id = gguf.number(&format!("tokenizer.ggml.{key}"))?;
            match id.filter(|&id| id as usize >= vocab_size) {
                Some(id) => {
                    let message = format!("{key} is {id}, but the vocabulary has {vocab_size} tokens");
                    Err(ModelError::Tokenizer(message))
                }
                None => Ok(id),
            }
        };
        let (bos_id, eos_id) = (special_id("bos_token_id")?, special_id("eos_token_id")?);
        let mut eos_ids: BTreeSet<u32> = eos_id.into_iter().chain(special_id("eot_token_id")?).collect();
        eos_ids.extend(markers.iter().filter(|(text, _)| END_MARKERS.contains(&text.as_str())).map(|&(_, id)| id));

        let bytes = byte_of_char();
        let pieces = tokens.iter().zip(&types).map(|(text, &token_type)| piece(text, token_type, &bytes)).collect();
        Ok(Self {
            bpe,
            pieces,
            markers,
            eos_ids: eos_ids.into_iter().collect(),
            bos_id,
            eos_id,
            // Llama 3 files rely on llama.cpp's default for their pre-tokenizer.
            add_bos: gguf.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(pre == Some("llama-bpe")),
        })
    }

    /// Tokens in the vocabulary; every id is below it.
    pub fn vocab_size(&self) -> u32 {
        u32::try_from(self.pieces.len()).expect("one piece was made per row of the embedding, which are counted in u32")
    }

    /// Ids after which generation stops, ascending: end of sequence, end of turn.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// The token that begins a sequence, if the model has one.
    pub const fn bos_id(&self) -> Option<u32> {
        self.bos_id
    }

    /// The file's end-of-sequence token.
    pub const fn eos_id(&self) -> Option<u32> {
        self.eos_id
    }

    /// Whether the model expects [`Self::bos_id`] before a raw prompt; [`Self::encode`] does not add it.
    pub const fn add_bos(&self) -> bool {
        self.add_bos
    }

    /// The text of a marker token, such as `<|im_end|>`; `None` for ordinary tokens.
    pub fn marker_text(&self, id: u32) -> Option<&str> {
        self.markers.iter().find(|(_, marker)| *marker == id).map(|(text, _)| text.as_str())
    }

    /// The ids of `text`.
    ///
    /// With `parse_special`, markers of control and user-defined tokens in the text become those tokens. Without it
    /// they are text like any other, so that a document can not pretend to be a turn of a conversation. As in
    /// llama.cpp, bytes that the vocabulary has no token for are left out.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when the pre-tokenizer gives up.
    pub fn encode(&self, text: &str, parse_special: bool) -> Result<Vec<u32>, ModelError> {
        let fragments = if parse_special { self.fragments(text) } else { vec![Fragment::Text(text.to_owned())] };
        self.encode_fragments(&fragments)
    }

    /// Splits `text` at its markers. As in llama.cpp, longer markers are cut out before shorter ones.
    pub(super) fn fragments(&self, text: &str) -> Vec<Fragment> {
        let mut fragments = vec![Fragment::Text(text.to_owned())];
        for (marker, id) in &self.markers {
            if !text.contains(marker.as_str()) {
                continue;
            }
            let mut split = Vec::with_capacity(fragments.len() + 2);
            for fragment in fragments {
                let Fragment::Text(text) = fragment else {
                    split.push(fragment);
                    continue;
                };
                for (i, part) in text.split(marker.as_str()).enumerate() {
                    if i > 0 {
                        split.push(Fragment::Marker(*id));
                    }
                    if !part.is_empty() {
                        split.push(Fragment::Text(part.to_owned()));
                    }
                }
            }
            fragments = split;
        }
        fragments
    }

    /// The ids of fragments; the text of each is ordinary text.
    pub(super) fn encode_fragments(&self, fragments: &[Fragment]) -> Result<Vec<u32>, ModelError> {
        let mut ids = Vec::new();
        for fragment in fragments {
            match fragment {
                Fragment::Marker(id) => ids.push(*id),
                Fragment::Text(text) => {
                    let encoding = self
                        .bpe
                        .encode_fast(text.as_str(), false)
                        .map_err(|e| ModelError::Tokenizer(format!("a text was not tokenised: {}", one_line(&e))))?;
                    ids.extend(encoding.get_ids().iter().filter(|&&id| id < self.vocab_size()));
                }
            }
        }
        Ok(ids)
    }

    /// The text of `ids`. Control tokens and ids outside of the vocabulary have none; bytes that are not UTF-8 become
    /// U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut stream = self.decode_stream();
        let mut text: String = ids.iter().map(|&id| stream.push(id)).collect();
        text.push_str(&stream.finish());
        text
    }

    /// A decoder that takes one id at a time.
    pub const fn decode_stream(&self) -> DecodeStream<'_> {
        DecodeStream { tokenizer: self, pending: Vec::new() }
    }
}

/// Decodes a growing sequence; it gives out whole characters only.
#[derive(Clone, Debug)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    /// The first bytes of a character whose rest has not come yet: at most three.
    pending: Vec<u8>,
}

impl DecodeStream<'_> {
    /// The text that is complete with this token; often empty in the middle of a character.
    pub fn push(&mut self, id: u32) -> String {
        if let Some(Some(piece)) = self.tokenizer.pieces.get(id as usize) {
            self.pending.extend_from_slice(piece);
        }
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.pending) {
                Ok(valid) => {
                    text.push_str(valid);
                    self.pending.clear();
                    return text;
                }
                Err(error) => {
                    let valid = error.valid_up_to();
                    text.push_str(&String::from_utf8_lossy(&self.pending[..valid]));
                    match error.error_len() {
                        Some(wrong) => {
                            text.push(char::REPLACEMENT_CHARACTER);
                            self.pending.drain(..valid + wrong);
                        }
                        None => {
                            self.pending.drain(..valid);
                            return text;
                        }
                    }
                }
            }
        }
    }

    /// What is left when no more tokens come: nothing, or U+FFFD for the start of a character.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }
}
