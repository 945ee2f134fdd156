//! Model files that lie: opening one never panics, never takes much memory, and ends in one line.

#![expect(unsafe_code, reason = "a counting allocator has to implement GlobalAlloc")]
#![cfg(feature = "model")]

#[path = "common/counting.rs"]
mod counting;

use std::io::Cursor;
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use concertina::model::{ChatTemplate, GgufFile, Message, ModelError, Role, Tokenizer};
use counting::peak_of;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// What one attempt to load a file of a few kilobytes may hold at a time.
const PEAK_BYTES_MAX: usize = 64 << 20;

const HIDDEN: usize = 16;
const INNER: usize = 32;
const VOCAB: usize = 12;
const HEADS: usize = 2;
const KV_HEADS: usize = 1;
const LAYERS: usize = 2;

fn texts(items: &[&str]) -> Value {
    Value::Array(items.iter().map(|&s| Value::String(s.to_owned())).collect())
}

fn metadata() -> Vec<(String, Value)> {
    let tokens = ["<|end|>", "a", "b", "c", "d", "ab", "cd", "abcd", "Ġ", "Ċ", "Ġa", "<|im_start|>"];
    let types = [3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 3];
    assert_eq!(tokens.len(), VOCAB, "one token per row");
    let number = |n: usize| Value::U32(u32::try_from(n).expect("small"));
    let mut list = vec![
        ("general.architecture", Value::String("llama".into())),
        ("llama.block_count", number(LAYERS)),
        ("llama.context_length", number(64)),
        ("llama.embedding_length", number(HIDDEN)),
        ("llama.feed_forward_length", number(INNER)),
        ("llama.attention.head_count", number(HEADS)),
        ("llama.attention.head_count_kv", number(KV_HEADS)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("llama.rope.freq_base", Value::F32(10_000.0)),
        ("llama.rope.dimension_count", number(HIDDEN / HEADS)),
        ("tokenizer.ggml.model", Value::String("gpt2".into())),
        ("tokenizer.ggml.pre", Value::String("smollm".into())),
        ("tokenizer.ggml.tokens", texts(&tokens)),
        ("tokenizer.ggml.token_type", Value::Array(types.map(Value::I32).to_vec())),
        ("tokenizer.ggml.merges", texts(&["a b", "c d", "ab cd", "Ġ a"])),
        ("tokenizer.ggml.bos_token_id", number(11)),
        ("tokenizer.ggml.eos_token_id", number(0)),
    ];
    let template = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}";
    list.push(("tokenizer.chat_template", Value::String(template.into())));
    list.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

fn shapes() -> Vec<(String, Vec<usize>)> {
    let kv_width = HIDDEN / HEADS * KV_HEADS;
    let mut list = vec![("token_embd.weight".into(), vec![VOCAB, HIDDEN]), ("output_norm.weight".into(), vec![HIDDEN])];
    for layer in 0..LAYERS {
        for (part, shape) in [
            ("attn_norm", vec![HIDDEN]),
            ("attn_q", vec![HIDDEN, HIDDEN]),
            ("attn_k", vec![kv_width, HIDDEN]),
            ("attn_v", vec![kv_width, HIDDEN]),
            ("attn_output", vec![HIDDEN, HIDDEN]),
            ("ffn_norm", vec![HIDDEN]),
            ("ffn_gate", vec![INNER, HIDDEN]),
            ("ffn_up", vec![INNER, HIDDEN]),
            ("ffn_down", vec![HIDDEN, INNER]),
        ] {
            list.push((format!("blk.{layer}.{part}.weight"), shape));
        }
    }
    list
}

/// A file with these parts; `value` is the value of all weights.
fn build(metadata: &[(String, Value)], shapes: &[(String, Vec<usize>)], value: f32) -> Vec<u8> {
    let tensors: Vec<(&str, QTensor)> = shapes
        .iter()
        .map(|(name, shape)| {
            let tensor = Tensor::full(value, shape.as_slice(), &Device::Cpu).expect("a small tensor");
            let kind = if name.ends_with("ffn_down.weight") { GgmlDType::Q4_0 } else { GgmlDType::F32 };
            (name.as_str(), QTensor::quantize(&tensor, kind).expect("a small tensor"))
        })
        .collect();
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
    let mut bytes = Cursor::new(Vec::new());
    gguf_file::write(&mut bytes, &metadata, &tensors).expect("a small file");
    bytes.into_inner()
}

fn valid() -> Vec<u8> {
    build(&metadata(), &shapes(), 0.25)
}

/// The valid file with one metadata value replaced or added.
fn with(key: &str, value: Value) -> Vec<u8> {
    let mut list = metadata();
    list.retain(|(name, _)| name != key);
    list.push((key.to_owned(), value));
    build(&list, &shapes(), 0.25)
}

/// Everything that a user of a file does with it.
fn load(path: &Path) -> Result<(), ModelError> {
    let gguf = GgufFile::open(path)?;
    let tokenizer = Tokenizer::from_gguf(&gguf)?;
    let ids = tokenizer.encode("ab cd<|end|>x\n 1", true)?;
    assert!(ids.iter().all(|&id| id < tokenizer.vocab_size()), "ids {ids:?}");
    tokenizer.decode(&ids);
    if let Some(template) = ChatTemplate::from_gguf(&gguf)? {
        // A template may refuse its messages; that is no fault of the file.
        let _ = template.prompt_tokens(&tokenizer, &[Message::new(Role::User, "abcd")]);
    }
    gguf.weights(&mut |done, total| assert!(done <= total, "{done} of {total} bytes")).map(drop)
}

/// Loads `bytes` as a file and checks memory and message.
fn attempt(folder: &Path, bytes: &[u8], what: &str) -> Result<(), String> {
    let path = folder.join("model.gguf");
    std::fs::write(&path, bytes).expect("a writable folder");
    let (result, peak) = peak_of(|| load(&path));
    assert!(peak < PEAK_BYTES_MAX, "{what}: {peak} bytes at a time for a file of {}", bytes.len());
    result.map_err(|error| {
        let message = error.to_string();
        assert!(!message.contains('\n') && message.len() < 2000, "{what}: message of several lines: {message}");
        message
    })
}

/// Where the tensor data starts: after the last tensor's offset, rounded up to 32.
fn header_bytes(bytes: &[u8]) -> usize {
    gguf_file::Content::read(&mut Cursor::new(bytes)).expect("valid").tensor_data_offset.try_into().expect("small")
}

#[test]
fn a_valid_file_opens() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    assert_eq!(attempt(folder.path(), &valid(), "valid"), Ok(()), "the file that all others are made from");
    let gguf = GgufFile::open(folder.path().join("model.gguf")).expect("valid");
    let weights = gguf.weights(&mut |_, _| ()).expect("valid");
    assert_eq!(weights.layers.len(), LAYERS, "layers");
    assert!(weights.output.is_none(), "no output matrix: tied");
    let qkv = &weights.layers[1].qkv;
    assert_eq!((qkv.rows, qkv.cols), (32, 16), "q, k and v stacked");
    assert!(qkv.data.iter().all(|v| v.to_f32() == 0.25), "values");
}

#[test]
fn every_truncation_is_an_error() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let bytes = valid();
    let header = header_bytes(&bytes);
    // The writer pads the last tensor to 32 bytes, and the last one here is a whole number of those.
    let data_cuts = (header..bytes.len()).step_by(97).chain([bytes.len() - 1]);
    for cut in (0..header).chain(data_cuts) {
        let message = attempt(folder.path(), &bytes[..cut], "truncated").expect_err("a part is missing");
        assert!(message.contains("truncated") && message.contains(&format!(" {cut} bytes")), "cut at {cut}: {message}");
    }
}

#[test]
fn flipped_bits_do_not_panic() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut bytes = valid();
    let header = header_bytes(&bytes);
    assert!(header < 20_000, "a small header: {header}");
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let mut refused = 0;
    for at in 0..header {
        let bits = if at < 64 {
            0..8
        } else {
            let bit = rng.random_range(0..8);
            bit..bit + 1
        };
        for bit in bits {
            bytes[at] ^= 1 << bit;
            refused += usize::from(attempt(folder.path(), &bytes, &format!("bit {bit} of byte {at}")).is_err());
            bytes[at] ^= 1 << bit;
        }
    }
    assert!(refused > header / 4, "only {refused} flips of {header} bytes were noticed");
    for round in 0..2000 {
        let at: Vec<usize> = (0..rng.random_range(2..6)).map(|_| rng.random_range(0..header)).collect();
        let mut damaged = bytes.clone();
        at.iter().for_each(|&at| damaged[at] = rng.random());
        let _ = attempt(folder.path(), &damaged, &format!("round {round}, bytes {at:?}"));
    }
}

#[test]
fn garbage_is_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    for round in 0..300 {
        let mut bytes: Vec<u8> = (0..rng.random_range(0..4000)).map(|_| rng.random()).collect();
        if round % 2 == 0 {
            let head = [&b"GGUF\x03\0\0\0"[..], &[2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]].concat();
            bytes.splice(0..0, head);
        }
        attempt(folder.path(), &bytes, "garbage").expect_err("random bytes are no model");
    }
}

#[test]
fn absurd_counts_are_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let head = |n_tensors: u64, n_metadata: u64| {
        [&b"GGUF\x03\0\0\0"[..], &n_tensors.to_le_bytes(), &n_metadata.to_le_bytes()].concat()
    };
    let key = |name: &str| [&(name.len() as u64).to_le_bytes()[..], name.as_bytes()].concat();
    let huge = u64::MAX.to_le_bytes();
    let mut nested = [head(0, 1), key("k"), 9u32.to_le_bytes().to_vec()].concat();
    for _ in 0..100_000 {
        nested.extend([9, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    }
    let tensor = |dims: &[u64]| {
        let mut bytes =
            [head(1, 0), key("t"), u32::try_from(dims.len()).expect("small").to_le_bytes().to_vec()].concat();
        dims.iter().for_each(|dim| bytes.extend(dim.to_le_bytes()));
        [bytes, vec![0; 64]].concat()
    };
    for (what, bytes) in [
        ("tensors", [head(u64::MAX, 0), vec![0; 100]].concat()),
        ("metadata", [head(0, u64::MAX), vec![0; 100]].concat()),
        ("a key", [head(0, 1), huge.to_vec(), vec![0; 100]].concat()),
        ("a string", [head(0, 1), key("k"), 8u32.to_le_bytes().to_vec(), huge.to_vec()].concat()),
        ("an array of bytes", [head(0, 1), key("k"), vec![9, 0, 0, 0, 0, 0, 0, 0], huge.to_vec()].concat()),
        ("an array of strings", [head(0, 1), key("k"), vec![9, 0, 0, 0, 8, 0, 0, 0], huge.to_vec()].concat()),
        ("nested arrays", nested),
        ("dimensions", tensor(&[1; 1000])),
        ("a shape that overflows", tensor(&[u64::MAX, u64::MAX])),
        ("a shape of zero", tensor(&[0, 4])),
    ] {
        attempt(folder.path(), &bytes, what).expect_err(what);
    }
    attempt(folder.path(), &with("general.alignment", Value::U32(0)), "alignment 0").expect_err("alignment 0");
    for (name, count) in [("block_count", u32::MAX), ("attention.head_count", 0), ("attention.head_count", u32::MAX)] {
        let bytes = with(&format!("llama.{name}"), Value::U32(count));
        attempt(folder.path(), &bytes, name).expect_err(name);
    }
}

#[test]
fn models_of_another_kind_are_named() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let text = |text: &str| Value::String(text.to_owned());
    for (key, value, expected) in [
        ("general.architecture", text("mamba"), "its architecture is 'mamba'; supported is 'llama'"),
        ("general.architecture", text("ma\nmba"), "'mamba'"),
        ("llama.rope.scaling.type", text("yarn"), "rope scaling of type 'yarn'"),
        ("llama.rope.scaling.factor", Value::F32(4.0), "llama.rope.scaling.factor is 4"),
        ("llama.expert_count", Value::U32(8), "llama.expert_count is 8"),
        ("llama.rope.dimension_count", Value::U32(4), "llama.rope.dimension_count is 4"),
        ("llama.block_count", Value::U32(3), "3 layers has 29"),
        ("llama.block_count", text("two"), "llama.block_count is of type String"),
        ("llama.feed_forward_length", Value::U32(64), "blk.0.ffn_gate.weight has shape [32, 16]"),
        ("llama.vocab_size", Value::U32(13), "llama.vocab_size is 13"),
        ("tokenizer.ggml.model", text("llama"), "its kind is 'llama'; supported is 'gpt2'"),
        ("tokenizer.ggml.pre", text("bert"), "its pre-tokenizer is 'bert'"),
        ("tokenizer.ggml.eos_token_id", Value::U32(12), "eos_token_id is 12, but the vocabulary has 12 tokens"),
        ("tokenizer.ggml.tokens", texts(&[]), "it has 0 tokens"),
        ("tokenizer.ggml.tokens", texts(&["a"; VOCAB]), "tokens 0 and 1 are the same: 'a'"),
        ("tokenizer.ggml.merges", texts(&["abcd abcd"]), "needs 'abcdabcd', which is not a token"),
        ("tokenizer.ggml.merges", texts(&["a zz"]), "needs 'zz', which is not a token"),
        ("tokenizer.chat_template", text("{% if %}"), "the chat template can not be used"),
    ] {
        let message = attempt(folder.path(), &with(key, value), key).expect_err(key);
        assert!(message.contains(expected), "expected '{expected}' in: {message}");
    }
}

#[test]
fn wrong_tensors_are_named() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut bias = shapes();
    bias.push(("blk.0.attn_q.bias".into(), vec![HIDDEN]));
    let mut missing = shapes();
    missing[3].0 = "blk.0.attn_quux.weight".into();
    let mut turned = shapes();
    turned[8].1.reverse();
    for (list, value, expected) in [
        (bias, 0.25, "such as blk.0.attn_q.bias"),
        (missing, 0.25, "it lacks the tensor blk.0.attn_q.weight"),
        (turned, 0.25, "blk.0.ffn_gate.weight has shape [16, 32], the geometry asks for [32, 16]"),
        (shapes(), f32::NAN, "of token_embd.weight is NaN"),
        (shapes(), 1e6, "value 0 of token_embd.weight, 1000000, is too large for f16"),
    ] {
        let message = attempt(folder.path(), &build(&metadata(), &list, value), expected).expect_err(expected);
        assert!(message.contains(expected), "expected '{expected}' in: {message}");
    }
}

#[test]
fn the_counter_sees_allocations() {
    let ((), peak) = peak_of(|| drop(std::hint::black_box(vec![1u8; 1 << 20])));
    assert!((1 << 20..2 << 20).contains(&peak), "one MiB was held, the counter says {peak} bytes");
}
