//! Typed metadata of GGUF files, and the geometry that it describes.

use candle_core::quantized::gguf_file::{Content, Value};

use super::{ModelError, one_line};
use crate::geometry::{HeadGeometry, ModelGeometry};

/// Typed access to metadata. Candle's own conversions print whole values into their messages.
pub(super) struct Metadata<'a>(pub(super) &'a Content);

impl<'a> Metadata<'a> {
    fn get<T>(&self, key: &str, kind: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>, ModelError> {
        let Some(value) = self.0.metadata.get(key) else { return Ok(None) };
        let wrong = || ModelError::Malformed(format!("{key} is of type {:?}, expected {kind}", value.value_type()));
        read(value).map(Some).ok_or_else(wrong)
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        self.get(key, "a text", |value| if let Value::String(text) = value { Some(text.as_str()) } else { None })
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<u32>, ModelError> {
        self.get(key, "a number of 0 to 2^32 - 1", |value| match *value {
            Value::U8(n) => Some(n.into()),
            Value::U16(n) => Some(n.into()),
            Value::U32(n) => Some(n),
            Value::U64(n) => n.try_into().ok(),
            Value::I32(n) => n.try_into().ok(),
            Value::I64(n) => n.try_into().ok(),
            _ => None,
        })
    }

    fn float(&self, key: &str) -> Result<Option<f32>, ModelError> {
        self.get(key, "a number", |value| if let Value::F32(number) = value { Some(*number) } else { None })
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, ModelError> {
        self.get(key, "true or false", |value| if let Value::Bool(flag) = value { Some(*flag) } else { None })
    }

    pub(super) fn list<T>(
        &self,
        key: &str,
        kind: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>, ModelError> {
        let elements = self.get(key, "a list", |v| if let Value::Array(list) = v { Some(list) } else { None })?;
        let Some(elements) = elements else { return Ok(None) };
        let wrong = |i: usize| ModelError::Malformed(format!("element {i} of {key} is not {kind}"));
        elements
            .iter()
            .enumerate()
            .map(|(i, value)| read(value).ok_or_else(|| wrong(i)))
            .collect::<Result<_, _>>()
            .map(Some)
    }
}

/// The geometry from the metadata, or why this crate does not compute such a model.
pub(super) fn read_geometry(metadata: &Metadata<'_>) -> Result<ModelGeometry, ModelError> {
    match metadata.text("general.architecture")? {
        Some("llama") => {}
        found => {
            let found: String = found.unwrap_or("(none)").chars().filter(|c| !c.is_control()).take(60).collect();
            return Err(ModelError::Unsupported(format!("its architecture is '{found}'; supported is 'llama'")));
        }
    }
    refuse_other_arithmetic(metadata)?;
    let number = |key: &str| metadata.number(&format!("llama.{key}"));
    let required =
        |key: &str| number(key)?.ok_or_else(|| ModelError::Malformed(format!("the metadata lacks llama.{key}")));

    let hidden_size = required("embedding_length")?;
    let num_qo_heads = required("attention.head_count")?;
    let num_kv_heads = number("attention.head_count_kv")?.unwrap_or(num_qo_heads);
    let head_dim = match number("attention.key_length")? {
        Some(length) => length,
        None if num_qo_heads > 0 && hidden_size % num_qo_heads == 0 => hidden_size / num_qo_heads,
        None => {
            let message = format!("embedding_length {hidden_size} does not divide into {num_qo_heads} heads");
            return Err(ModelError::Malformed(message));
        }
    };
    for key in ["attention.value_length", "rope.dimension_count"] {
        if let Some(width) = number(key)?.filter(|&width| width != head_dim) {
            return Err(ModelError::Unsupported(format!(
                "llama.{key} is {width}, but its heads have {head_dim} channels"
            )));
        }
    }
    let vocab_size = match metadata.0.tensor_infos.get("token_embd.weight").map(|info| info.shape.dims()) {
        Some(&[rows, _]) => u32::try_from(rows).unwrap_or(u32::MAX),
        _ => return Err(ModelError::Malformed("it has no matrix token_embd.weight".to_owned())),
    };
    if let Some(declared) = number("vocab_size")?.filter(|&declared| declared != vocab_size) {
        let message = format!("llama.vocab_size is {declared}, but token_embd.weight has {vocab_size} rows");
        return Err(ModelError::Malformed(message));
    }
    let geometry = ModelGeometry {
        num_layers: required("block_count")?,
        hidden_size,
        intermediate_size: required("feed_forward_length")?,
        heads: HeadGeometry { num_qo_heads, num_kv_heads, head_dim },
        vocab_size,
        context_length: required("context_length")?,
        rope_theta: metadata.float("llama.rope.freq_base")?.unwrap_or(10_000.0),
        rms_norm_eps: metadata.float("llama.attention.layer_norm_rms_epsilon")?.ok_or_else(|| {
            ModelError::Malformed("the metadata lacks llama.attention.layer_norm_rms_epsilon".to_owned())
        })?,
    };
    // Widths are products of these; the check bounds every factor but the number of heads.
    if num_qo_heads > 1 << 12 {
        return Err(ModelError::Unsupported(format!("{num_qo_heads} query heads; at most 4096 are supported")));
    }
    geometry.check().map_err(ModelError::Unsupported)?;
    Ok(geometry)
}

/// Refuses metadata of the llama architecture that changes what a forward pass computes.
fn refuse_other_arithmetic(metadata: &Metadata<'_>) -> Result<(), ModelError> {
    let refuse = |message: String| Err(ModelError::Unsupported(message));
    match metadata.text("llama.rope.scaling.type")? {
        Some("none") => {}
        Some(kind) => return refuse(format!("rope scaling of type '{}'; only 'none' is supported", one_line(&kind))),
        None => {
            // A factor without a type means linear scaling.
            for key in ["llama.rope.scaling.factor", "llama.rope.scale_linear"] {
                if let Some(factor) = metadata.float(key)?.filter(|&factor| factor != 1.0 && factor != 0.0) {
                    return refuse(format!("{key} is {factor}; rope scaling is not supported"));
                }
            }
        }
    }
    for key in ["expert_count", "attention.sliding_window"] {
        if let Some(value) = metadata.number(&format!("llama.{key}"))?.filter(|&value| value > 0) {
            return refuse(format!("llama.{key} is {value}; dense models with full attention are supported"));
        }
    }
    for key in ["attention.scale", "logit_scale", "residual_scale", "embedding_scale"] {
        if let Some(value) = metadata.float(&format!("llama.{key}"))?.filter(|&value| value != 1.0 && value != 0.0) {
            return refuse(format!("llama.{key} is {value}; other scales than the usual ones are not supported"));
        }
    }
    if metadata.flag("llama.attention.causal")? == Some(false) {
        return refuse("llama.attention.causal is false; decoders are supported".to_owned());
    }
    Ok(())
}
