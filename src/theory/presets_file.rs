//! Files of presets: TOML, read with the line and the field of what is wrong.

use std::ops::Range;

use serde::Deserialize;
use toml::Spanned;

use super::model::{Decoder, Experts, Latent, LocalLayers, Unsound};
use super::presets::{Gpu, ModelPreset};
use crate::geometry::{HeadGeometry, ModelGeometry};

/// A file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    model: Vec<Spanned<ModelEntry>>,
    #[serde(default)]
    gpu: Vec<Spanned<Gpu>>,
}

/// A model as a file has it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ModelEntry {
    name: String,
    #[serde(default)]
    aliases: Vec<String>,
    model: String,
    num_layers: u32,
    hidden_size: u32,
    intermediate_size: u32,
    heads: HeadGeometry,
    vocab_size: u32,
    context_length: u32,
    rope_theta: f32,
    rms_norm_eps: f32,
    tied: bool,
    latent: Option<Latent>,
    local: Option<LocalLayers>,
    experts: Option<Experts>,
    source: String,
}

impl ModelEntry {
    fn preset(self) -> Result<ModelPreset, Unsound> {
        check_names(&self.name, &self.aliases, &self.source)?;
        let geometry = ModelGeometry {
            num_layers: self.num_layers,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            heads: self.heads,
            vocab_size: self.vocab_size,
            context_length: self.context_length,
            rope_theta: self.rope_theta,
            rms_norm_eps: self.rms_norm_eps,
        };
        let decoder = Decoder::new(geometry, self.tied, self.latent, self.local, self.experts)?;
        Ok(ModelPreset { name: self.name, aliases: self.aliases, model: self.model, decoder, source: self.source })
    }
}

/// Checks what every preset has.
fn check_names(name: &str, aliases: &[String], source: &str) -> Result<(), Unsound> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.+".contains(c);
    for (field, name) in std::iter::once(("name", name)).chain(aliases.iter().map(|alias| ("aliases", alias.as_str())))
    {
        if name.is_empty() || !name.chars().all(plain) {
            return Err(Unsound::new(field, format!("'{name}' is no name: letters, digits and -_.+ make one")));
        }
    }
    if source.trim().is_empty() {
        return Err(Unsound::new("source", "the source is empty; say where the numbers come from"));
    }
    Ok(())
}

/// Reads a file's models and GPUs.
///
/// # Errors
/// A sentence with the file, the line, the field and the numbers.
pub(super) fn parse(file: &str, text: &str) -> Result<(Vec<ModelPreset>, Vec<Gpu>), String> {
    let place = Place { file, text };
    let parsed: File = toml::from_str(text).map_err(|error| place.unreadable(&error))?;
    let mut models: Vec<ModelPreset> = Vec::new();
    for entry in parsed.model {
        let at = entry.span();
        let model = entry.into_inner().preset().map_err(|unsound| place.refused(at.clone(), &unsound))?;
        place.first(at, &model.name, models.iter().map(|model| model.name.as_str()))?;
        models.push(model);
    }
    let mut gpus: Vec<Gpu> = Vec::new();
    for entry in parsed.gpu {
        let at = entry.span();
        let gpu = entry.into_inner();
        let checked = check_names(&gpu.name, &gpu.aliases, &gpu.source).and_then(|()| gpu.check());
        checked.map_err(|unsound| place.refused(at.clone(), &unsound))?;
        place.first(at, &gpu.name, gpus.iter().map(|gpu| gpu.name.as_str()))?;
        gpus.push(gpu);
    }
    Ok((models, gpus))
}

/// Where in a file something is.
struct Place<'t> {
    file: &'t str,
    text: &'t str,
}

impl Place<'_> {
    /// The line that a byte is in, from 1.
    fn line_of(&self, byte: usize) -> usize {
        self.text.bytes().take(byte).filter(|byte| *byte == b'\n').count() + 1
    }

    /// The line of a field of the entry that begins in `at`: it ends where the next begins. The entry's own where it has no
    /// such field.
    fn line_of_field(&self, at: Range<usize>, field: &str) -> usize {
        let first = self.line_of(at.start);
        let names = |line: &str| {
            let before = line.split(['"', '#']).next().unwrap_or(line);
            before.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).any(|word| word == field)
        };
        let entry = self.text.lines().enumerate().skip(first - 1);
        let mut inside = entry.take_while(|(n, line)| *n < first || !line.trim_start().starts_with("[["));
        inside.find(|(_, line)| names(line)).map_or(first, |(n, _)| n + 1)
    }

    fn refused(&self, at: Range<usize>, unsound: &Unsound) -> String {
        let line = self.line_of_field(at, unsound.field);
        format!("{}, line {line}, {}: {}", self.file, unsound.field, unsound.why)
    }

    /// Refuses a name that the file has had before.
    fn first<'n>(&self, at: Range<usize>, name: &str, mut before: impl Iterator<Item = &'n str>) -> Result<(), String> {
        if before.any(|other| other.eq_ignore_ascii_case(name)) {
            let twice = Unsound::new("name", format!("'{name}' is named twice in this file"));
            return Err(self.refused(at, &twice));
        }
        Ok(())
    }

    /// What TOML, or the type of a field, has to say, with the field where the line has one.
    fn unreadable(&self, error: &toml::de::Error) -> String {
        let Some(span) = error.span() else { return format!("{}: {}", self.file, error.message()) };
        let n = self.line_of(span.start);
        let line = self.text.lines().nth(n - 1).unwrap_or_default();
        let field = line.split_once('=').map(|(field, _)| field.trim()).filter(|field| !field.is_empty());
        let field = field.map_or_else(String::new, |field| format!(", {field}"));
        format!("{}, line {n}{field}: {}", self.file, error.message())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: &str = r#"# A model
[[model]]
name = "small"
model = "Small"
num_layers = 4
hidden_size = 64
intermediate_size = 128
heads = { num_qo_heads = 4, num_kv_heads = 2, head_dim = 16 }
vocab_size = 100
context_length = 1000
rope_theta = 1e4
rms_norm_eps = 1e-5
tied = true
local = { window = 16, global_every = 2 }
experts = { count = 4, active = 2, intermediate = 32 }
source = "made up"

[[gpu]]
name = "card"
gpu = "Card"
memory_bytes = 8_000_000_000
flops_per_s = 1e13
memory_bytes_per_s = 200e9
link_bytes_per_s = 16e9
source = "made up"
"#;

    #[test]
    fn a_file_has_models_and_gpus() {
        let (models, gpus) = parse("my.toml", MODEL).expect("sound");
        assert_eq!((models.len(), gpus.len()), (1, 1), "one of each");
        assert_eq!(models[0].decoder.experts.map(|e| (e.count, e.shared)), Some((4, 0)), "none are shared");
        assert_eq!(models[0].decoder.window_of(0), Some(16), "a window");
        assert_eq!(gpus[0].link_bytes_per_s, Some(16e9), "a link");
        assert_eq!(parse("empty.toml", "").map(|(models, gpus)| models.len() + gpus.len()), Ok(0), "nothing at all");
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line_and_field() {
        let wrong = |from: &str, to: &str| {
            let text = MODEL.replacen(from, to, 1);
            assert_ne!(text, MODEL, "{from} is in the file");
            parse("my.toml", &text).expect_err(to)
        };
        for (from, to, says) in [
            (
                "num_kv_heads = 2",
                "num_kv_heads = 3",
                "my.toml, line 8, heads: 4 query heads can not share 3 KV heads evenly",
            ),
            ("head_dim = 16", "head_dim = 20", "my.toml, line 8, heads: head_dim 20 is not a multiple of 8"),
            ("hidden_size = 64", "hidden_size = 0", "my.toml, line 6, hidden_size: hidden_size is 0"),
            ("num_layers = 4", "num_layers = 0", "my.toml, line 5, num_layers: num_layers is 0"),
            ("window = 16", "window = 0", "my.toml, line 14, window: local.window is 0; expected 1 to 16777216"),
            ("active = 2", "active = 5", "my.toml, line 15, active: a row takes 5 experts, and there are 4"),
            ("name = \"small\"", "name = \"a/b\"", "my.toml, line 3, name: 'a/b' is no name"),
            ("\"made up\"\n\n", "\" \"\n\n", "my.toml, line 16, source: the source is empty"),
            ("= 8_000_000_000", "= 0", "my.toml, line 21, memory_bytes: memory_bytes is 0; expected 1 to"),
            (
                "= 200e9",
                "= 0",
                "my.toml, line 23, memory_bytes_per_s: memory_bytes_per_s is 0; expected a number above 0",
            ),
            ("= 1e13", "= -1e13", "my.toml, line 22, flops_per_s: flops_per_s is -10000000000000; expected"),
            ("= 1e13", "= inf", "my.toml, line 22, flops_per_s: flops_per_s is inf; expected"),
            (
                "link_bytes_per_s = 16e9",
                "unified = false",
                "my.toml, line 19, name: link_bytes_per_s is missing; or say",
            ),
            ("link_bytes_per_s", "unified = true\nlink_bytes_per_s", "line 24, unified: unified memory has no link"),
        ] {
            let said = wrong(from, to);
            assert!(said.contains(says), "{says} in: {said}");
        }
    }

    #[test]
    fn what_can_not_be_read_is_told_with_its_line_and_field() {
        let wrong = |from: &str, to: &str| parse("my.toml", &MODEL.replacen(from, to, 1)).expect_err(to);
        let misspelt = wrong("hidden_size", "hiden_size");
        assert!(misspelt.starts_with("my.toml, line 6, hiden_size: unknown field `hiden_size`"), "{misspelt}");
        let text = wrong("num_layers = 4", "num_layers = \"four\"");
        assert!(text.starts_with("my.toml, line 5, num_layers: invalid type: string"), "{text}");
        let negative = wrong("vocab_size = 100", "vocab_size = -1");
        assert!(negative.starts_with("my.toml, line 9, vocab_size: invalid value"), "{negative}");
        let missing = wrong("tied = true\n", "");
        assert!(missing.contains("line 2") && missing.contains("missing field `tied`"), "{missing}");
        let broken = wrong("tied = true", "tied = ");
        assert!(broken.starts_with("my.toml, line 13, tied: "), "{broken}");
        let unknown = parse("my.toml", "[[card]]\n").expect_err("no such table");
        assert!(unknown.contains("line 1") && unknown.contains("unknown field `card`"), "{unknown}");
        let second = MODEL[MODEL.find("[[gpu]]").expect("a GPU")..].replace("card", "CARD");
        let twice = parse("my.toml", &format!("{MODEL}{second}")).expect_err("twice");
        assert!(twice.starts_with("my.toml, line 27, name: 'CARD' is named twice"), "{twice}");
    }
}
