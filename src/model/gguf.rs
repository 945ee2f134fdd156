//! Llama-type models from GGUF files: geometry, weights and the metadata that the tokenizer needs.
//!
//! A file is accepted only when everything in it is understood: each metadata value that changes the arithmetic has
//! the meaning that this crate computes, and the tensors are exactly those of the geometry. A tensor that is not
//! expected (a bias, an expert, a table of rope factors) would silently change the model, so it is an error.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufReader, Cursor};
use std::path::{Path, PathBuf};

use candle_core::Device;
use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{Content, TensorInfo, Value};
use half::f16;
use half::slice::HalfFloatSliceExt;

use super::gguf_metadata::{Metadata, read_geometry};
use super::{ModelError, gguf_header, one_line};
use crate::geometry::ModelGeometry;
use crate::weights::{LayerWeights, Matrix, Weights};

/// An open GGUF file whose header, geometry and tensor shapes have been checked; the data is still on disk.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    file: File,
    content: Content,
    geometry: ModelGeometry,
    tied: bool,
}

impl GgufFile {
    /// Opens a file and checks all but the values of its tensors.
    ///
    /// # Errors
    /// [`ModelError::Io`], [`ModelError::Truncated`] with byte numbers, [`ModelError::Malformed`] when the contents
    /// contradict each other, [`ModelError::Unsupported`] when the model is of another kind.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ModelError> {
        let path = path.as_ref().to_owned();
        let io = |source| ModelError::Io { path: path.clone(), source };
        let file = File::open(&path).map_err(io)?;
        let file_bytes = file.metadata().map_err(io)?.len();
        let header = gguf_header::scan(BufReader::new(&file), file_bytes, &path)?;
        let content =
            Content::read(&mut Cursor::new(&header.bytes)).map_err(|error| ModelError::Malformed(one_line(&error)))?;
        for (what, declared, distinct) in [
            ("tensors", header.n_tensors, content.tensor_infos.len()),
            ("metadata entries", header.n_metadata, content.metadata.len()),
        ] {
            if declared != distinct as u64 {
                return Err(ModelError::Malformed(format!(
                    "only {distinct} of {declared} {what} have different names"
                )));
            }
        }
        let metadata = Metadata(&content);
        let geometry = read_geometry(&metadata)?;
        let tied = !content.tensor_infos.contains_key("output.weight");
        check_tensors(&content, &geometry, tied, file_bytes)?;
        Ok(Self { path, file, content, geometry, tied })
    }

    /// The shapes of the model.
    pub const fn geometry(&self) -> &ModelGeometry {
        &self.geometry
    }

    /// Whether the embedding is the output matrix as well.
    pub const fn tied(&self) -> bool {
        self.tied
    }

    /// Reads all weights into host memory as f16 (norms as f32): two bytes per parameter, plus the largest tensor in
    /// f32 twice for a while. `progress` gets the bytes of tensor data read so far and in all.
    ///
    /// # Errors
    /// [`ModelError::Io`] when reading fails, [`ModelError::Malformed`] when a value is not finite in f16.
    pub fn weights(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<Weights, ModelError> {
        let total = self.content.tensor_infos.values().filter_map(tensor_bytes).sum();
        let mut reader = WeightReader { gguf: self, progress, done: 0, total };
        (reader.progress)(0, total);
        let g = &self.geometry;
        let (hidden, inner, q_width, kv_width) =
            (g.hidden_size, g.intermediate_size, g.heads.q_width(), g.heads.kv_width());
        let embedding = reader.matrix(&[("token_embd.weight", g.vocab_size)], hidden)?;
        let mut layers = Vec::with_capacity(g.num_layers as usize);
        for layer in 0..g.num_layers {
            let name = |part: &str| format!("blk.{layer}.{part}.weight");
            layers.push(LayerWeights {
                attention_norm: reader.vector(&name("attn_norm"))?,
                qkv: reader.matrix(
                    &[(&name("attn_q"), q_width), (&name("attn_k"), kv_width), (&name("attn_v"), kv_width)],
                    hidden,
                )?,
                attention_output: reader.matrix(&[(&name("attn_output"), hidden)], q_width)?,
                ffn_norm: reader.vector(&name("ffn_norm"))?,
                gate_up: reader.matrix(&[(&name("ffn_gate"), inner), (&name("ffn_up"), inner)], hidden)?,
                down: reader.matrix(&[(&name("ffn_down"), hidden)], inner)?,
            });
        }
        let output_norm = reader.vector("output_norm.weight")?;
        let output = if self.tied { None } else { Some(reader.matrix(&[("output.weight", g.vocab_size)], hidden)?) };
        Ok(Weights { geometry: g.clone(), embedding, layers, output_norm, output })
    }

    /// A text in the metadata; `None` when there is no such key.
    ///
    /// # Errors
    /// [`ModelError::Malformed`] when the value is not a text. The same holds for the other accessors.
    pub fn text(&self, key: &str) -> Result<Option<&str>, ModelError> {
        Metadata(&self.content).text(key)
    }

    /// A number of at most 32 bits and no sign in the metadata.
    ///
    /// # Errors
    /// [`ModelError::Malformed`] when the value is of another type or range.
    pub fn number(&self, key: &str) -> Result<Option<u32>, ModelError> {
        Metadata(&self.content).number(key)
    }

    /// A truth value in the metadata.
    ///
    /// # Errors
    /// [`ModelError::Malformed`] when the value is of another type.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, ModelError> {
        Metadata(&self.content).flag(key)
    }

    /// A list of texts in the metadata.
    ///
    /// # Errors
    /// [`ModelError::Malformed`] when the value or an element is of another type.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<&str>>, ModelError> {
        Metadata(&self.content).list(key, "a text", |value| match value {
            Value::String(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// A list of 32-bit integers in the metadata.
    ///
    /// # Errors
    /// [`ModelError::Malformed`] when the value or an element is of another type.
    pub fn integers(&self, key: &str) -> Result<Option<Vec<i32>>, ModelError> {
        Metadata(&self.content).list(key, "a 32-bit integer", |value| match value {
            Value::I32(number) => Some(*number),
            Value::U32(number) => i32::try_from(*number).ok(),
            _ => None,
        })
    }
}

/// The tensors of one layer: part of the name, and shape as `[rows, cols]` or `[width]`.
fn layer_tensors(g: &ModelGeometry) -> [(&'static str, Vec<u32>); 9] {
    let (hidden, inner, q_width, kv_width) =
        (g.hidden_size, g.intermediate_size, g.heads.q_width(), g.heads.kv_width());
    [
        ("attn_norm", vec![hidden]),
        ("attn_q", vec![q_width, hidden]),
        ("attn_k", vec![kv_width, hidden]),
        ("attn_v", vec![kv_width, hidden]),
        ("attn_output", vec![hidden, q_width]),
        ("ffn_norm", vec![hidden]),
        ("ffn_gate", vec![inner, hidden]),
        ("ffn_up", vec![inner, hidden]),
        ("ffn_down", vec![hidden, inner]),
    ]
}

/// Checks that the file has exactly the tensors of the geometry, each of the right shape and inside the file.
fn check_tensors(content: &Content, g: &ModelGeometry, tied: bool, file_bytes: u64) -> Result<(), ModelError> {
    let parts = layer_tensors(g);
    let n_present = content.tensor_infos.len();
    let n_expected = g.num_layers as usize * parts.len() + if tied { 2 } else { 3 };
    // Before a list of names is built from a number in the file.
    if n_present < n_expected {
        return Err(ModelError::Malformed(format!(
            "it has {n_present} tensors, a model of {} layers has {n_expected}",
            g.num_layers
        )));
    }
    let mut expected = vec![
        ("token_embd.weight".to_owned(), vec![g.vocab_size, g.hidden_size]),
        ("output_norm.weight".to_owned(), vec![g.hidden_size]),
    ];
    if !tied {
        expected.push(("output.weight".to_owned(), vec![g.vocab_size, g.hidden_size]));
    }
    for layer in 0..g.num_layers {
        expected.extend(parts.iter().map(|(part, shape)| (format!("blk.{layer}.{part}.weight"), shape.clone())));
    }
    let mut unknown: BTreeSet<&str> = content.tensor_infos.keys().map(String::as_str).collect();
    for (name, shape) in &expected {
        unknown.remove(name.as_str());
        let Some(info) = content.tensor_infos.get(name) else {
            return Err(ModelError::Malformed(format!("it lacks the tensor {name}")));
        };
        check_tensor(name, info, shape, content.tensor_data_offset, file_bytes)?;
    }
    match unknown.first() {
        None => Ok(()),
        Some(name) => Err(ModelError::Unsupported(format!(
            "it has {} tensors that the llama architecture does without (biases, experts or rope factors?), such as {}",
            unknown.len(),
            one_line(name)
        ))),
    }
}

fn check_tensor(
    name: &str,
    info: &TensorInfo,
    shape: &[u32],
    data_start: u64,
    file_bytes: u64,
) -> Result<(), ModelError> {
    let found = info.shape.dims();
    if !found.iter().map(|&dim| dim as u64).eq(shape.iter().map(|&dim| u64::from(dim))) {
        return Err(ModelError::Malformed(format!("{name} has shape {found:?}, the geometry asks for {shape:?}")));
    }
    if matches!(info.ggml_dtype, GgmlDType::Q8_1 | GgmlDType::Q8K) {
        return Err(ModelError::Unsupported(format!("{name} has type {:?}", info.ggml_dtype)));
    }
    let block = info.ggml_dtype.block_size();
    let width = found.last().copied().unwrap_or(0);
    let Some(needed) = tensor_bytes(info).filter(|_| width % block == 0) else {
        let message = format!("{name} has rows of {width} values, not a multiple of its blocks of {block}");
        return Err(ModelError::Malformed(message));
    };
    let offset = data_start.saturating_add(info.offset);
    if offset.saturating_add(needed) > file_bytes {
        return Err(ModelError::Truncated { what: name.to_owned(), needed, offset, file_bytes });
    }
    Ok(())
}

/// Bytes of a tensor's data; `None` where the product of its dimensions is too large.
fn tensor_bytes(info: &TensorInfo) -> Option<u64> {
    let values = info.shape.dims().iter().try_fold(1u64, |product, &dim| product.checked_mul(dim as u64))?;
    (values / info.ggml_dtype.block_size() as u64).checked_mul(info.ggml_dtype.type_size() as u64)
}

/// Reads tensors one by one and tells how far it is.
struct WeightReader<'a> {
    gguf: &'a GgufFile,
    progress: &'a mut dyn FnMut(u64, u64),
    done: u64,
    total: u64,
}

impl WeightReader<'_> {
    /// The values of a tensor in f32, in the file's row order.
    fn vector(&mut self, name: &str) -> Result<Vec<f32>, ModelError> {
        let gguf = self.gguf;
        let values = gguf
            .content
            .tensor(&mut BufReader::new(&gguf.file), name, &Device::Cpu)
            .and_then(|tensor| tensor.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>())
            .map_err(|error| ModelError::Io {
                path: gguf.path.clone(),
                source: std::io::Error::other(format!("tensor {name}: {}", one_line(&error))),
            })?;
        if let Some(i) = values.iter().position(|value| !value.is_finite()) {
            return Err(ModelError::Malformed(format!("value {i} of {name} is {}", values[i])));
        }
        self.done += gguf.content.tensor_infos.get(name).and_then(tensor_bytes).unwrap_or(0);
        (self.progress)(self.done, self.total);
        Ok(values)
    }

    /// Matrices of `cols` columns, given as name and rows, stacked and rounded to f16.
    fn matrix(&mut self, parts: &[(&str, u32)], cols: u32) -> Result<Matrix, ModelError> {
        let rows = parts.iter().map(|&(_, rows)| rows).sum();
        let mut data = vec![f16::ZERO; rows as usize * cols as usize];
        let mut rest = data.as_mut_slice();
        for &(name, part_rows) in parts {
            let values = self.vector(name)?;
            let (part, after) = rest.split_at_mut(part_rows as usize * cols as usize);
            part.convert_from_f32_slice(&values);
            if let Some(i) = part.iter().position(|value| !value.is_finite()) {
                return Err(ModelError::Malformed(format!("value {i} of {name}, {}, is too large for f16", values[i])));
            }
            rest = after;
        }
        Ok(Matrix::new(rows, cols, data))
    }
}
