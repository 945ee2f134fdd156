//! Models and GPUs by name: those in `presets/`, and those of a user's files in the same format, each with the source of its
//! numbers.

use serde::{Deserialize, Serialize};

use super::model::{Decoder, Unsound};
use super::presets_file;
use crate::geometry::Bytes;

/// Bytes of memory at most: far beyond any device, and far from where sums of bytes overflow.
const MEMORY_MAX: u64 = 1 << 50;

/// A GPU at its peak.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gpu {
    /// What it is asked for by.
    pub name: String,
    /// Other names for it.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// What it is called.
    pub gpu: String,
    /// Bytes of its memory.
    pub memory_bytes: Bytes,
    /// FLOP per second of dense f16 or bf16 matrix products.
    pub flops_per_s: f64,
    /// Bytes per second of its memory.
    pub memory_bytes_per_s: f64,
    /// Bytes per second of the link to the host, each way; none where the memory is the host's.
    pub link_bytes_per_s: Option<f64>,
    /// Whether its memory is the host's, so that caches never cross a link.
    #[serde(default)]
    pub unified: bool,
    /// Bytes per second to other GPUs, each way, where it can have neighbours.
    pub interconnect_bytes_per_s: Option<f64>,
    /// What an hour costs, in any currency.
    pub price_per_hour: Option<f64>,
    /// Where the numbers come from.
    pub source: String,
}

impl Gpu {
    /// So many of them in words.
    pub fn several(&self, n: u32) -> String {
        match n {
            1 => self.gpu.clone(),
            n => format!("{n} x {}", self.gpu),
        }
    }

    /// The critical intensity: FLOP per byte of its memory at which computing takes as long as reading.
    pub fn critical_intensity(&self) -> f64 {
        self.flops_per_s / self.memory_bytes_per_s
    }

    /// Checks that a GPU can have these numbers.
    ///
    /// # Errors
    /// The field and a sentence with the numbers.
    pub fn check(&self) -> Result<(), Unsound> {
        if self.memory_bytes.0 == 0 || self.memory_bytes.0 > MEMORY_MAX {
            let why = format!("memory_bytes is {}; expected 1 to {MEMORY_MAX}", self.memory_bytes.0);
            return Err(Unsound::new("memory_bytes", why));
        }
        for (field, rate) in [
            ("flops_per_s", Some(self.flops_per_s)),
            ("memory_bytes_per_s", Some(self.memory_bytes_per_s)),
            ("link_bytes_per_s", self.link_bytes_per_s),
            ("interconnect_bytes_per_s", self.interconnect_bytes_per_s),
            ("price_per_hour", self.price_per_hour),
        ] {
            if let Some(rate) = rate.filter(|rate| !(rate.is_finite() && *rate > 0.0)) {
                return Err(Unsound::new(field, format!("{field} is {rate}; expected a number above 0")));
            }
        }
        match (self.link_bytes_per_s, self.unified) {
            (Some(link), true) => {
                let why = format!("unified memory has no link to the host, but link_bytes_per_s is {link}");
                Err(Unsound::new("unified", why))
            }
            (None, false) => Err(Unsound::new(
                "name",
                "link_bytes_per_s is missing; or say unified = true, where memory is the host's",
            )),
            _ => Ok(()),
        }
    }
}

/// A model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelPreset {
    /// What it is asked for by.
    pub name: String,
    /// Other names for it.
    pub aliases: Vec<String>,
    /// What it is called.
    pub model: String,
    /// The decoder, with two bytes of weights for each parameter.
    pub decoder: Decoder,
    /// Where the numbers come from.
    pub source: String,
}

/// What has a name.
trait Named {
    /// What such things are called in messages.
    const KIND: &'static str;
    /// What it is asked for by.
    fn name(&self) -> &str;
    /// Other names for it.
    fn aliases(&self) -> &[String];
    /// The same, to take one away.
    fn aliases_mut(&mut self) -> &mut Vec<String>;
}

impl Named for Gpu {
    const KIND: &'static str = "GPU";
    fn name(&self) -> &str {
        &self.name
    }
    fn aliases(&self) -> &[String] {
        &self.aliases
    }
    fn aliases_mut(&mut self) -> &mut Vec<String> {
        &mut self.aliases
    }
}

impl Named for ModelPreset {
    const KIND: &'static str = "model";
    fn name(&self) -> &str {
        &self.name
    }
    fn aliases(&self) -> &[String] {
        &self.aliases
    }
    fn aliases_mut(&mut self) -> &mut Vec<String> {
        &mut self.aliases
    }
}

/// Models and GPUs that can be asked for by name.
#[derive(Clone, Debug, PartialEq)]
pub struct Presets {
    /// Models, in the order of the files.
    pub models: Vec<ModelPreset>,
    /// GPUs, in the order of the files.
    pub gpus: Vec<Gpu>,
}

impl Presets {
    /// Those of `presets/`.
    ///
    /// # Panics
    /// Never: the files are part of the program, and a test reads them.
    pub fn built_in() -> Self {
        let mut all = Self { models: Vec::new(), gpus: Vec::new() };
        for (file, text) in [
            ("presets/models.toml", include_str!("../../presets/models.toml")),
            ("presets/gpus.toml", include_str!("../../presets/gpus.toml")),
        ] {
            all.add(file, text).expect("the program's own presets should parse");
        }
        all
    }

    /// Adds the models and GPUs of a file. One that has the name of another takes its place. Returns a sentence for each that
    /// did.
    ///
    /// # Errors
    /// A sentence with the file, the line, the field and the numbers; nothing is added then.
    pub fn add(&mut self, file: &str, text: &str) -> Result<Vec<String>, String> {
        let (models, gpus) = presets_file::parse(file, text)?;
        let (mut all, mut notes) = (self.clone(), Vec::new());
        for model in models {
            notes.extend(put(&mut all.models, model, file)?);
        }
        for gpu in gpus {
            notes.extend(put(&mut all.gpus, gpu, file)?);
        }
        *self = all;
        Ok(notes)
    }

    /// A GPU by its name, in any case.
    ///
    /// # Errors
    /// A sentence with the nearest name and those that are known.
    pub fn gpu(&self, name: &str) -> Result<&Gpu, String> {
        find(&self.gpus, name)
    }

    /// A model by its name, in any case.
    ///
    /// # Errors
    /// A sentence with the nearest name and those that are known.
    pub fn model(&self, name: &str) -> Result<&ModelPreset, String> {
        find(&self.models, name)
    }
}

/// Adds one, in the place of another that has its name.
fn put<T: Named>(all: &mut Vec<T>, new: T, file: &str) -> Result<Option<String>, String> {
    let (kind, name) = (T::KIND, new.name().to_owned());
    let is = |other: &str| other.eq_ignore_ascii_case(&name);
    let others = || all.iter().filter(|other| !is(other.name()));
    for alias in new.aliases() {
        let clash = |other: &str| other.eq_ignore_ascii_case(alias);
        if let Some(other) = others().find(|other| clash(other.name()) || other.aliases().iter().any(|a| clash(a))) {
            let other = other.name();
            return Err(format!(
                "{file}: the alias '{alias}' of the {kind} '{name}' names the {kind} '{other}' already"
            ));
        }
    }
    let mut note = None;
    for other in all.iter_mut().filter(|other| !is(other.name())) {
        let before = other.aliases().len();
        other.aliases_mut().retain(|alias| !is(alias));
        if other.aliases().len() < before {
            note = Some(format!("{file}: '{name}' names its {kind} now, no longer '{}'", other.name()));
        }
    }
    match all.iter_mut().find(|other| is(other.name())) {
        Some(other) => {
            note = Some(format!("{file}: its {kind} '{name}' takes the place of another of this name"));
            *other = new;
        }
        None => all.push(new),
    }
    Ok(note)
}

/// Of some presets the one with a name.
fn find<'p, T: Named>(all: &'p [T], name: &str) -> Result<&'p T, String> {
    let name = name.trim();
    let is = |known: &str| known.eq_ignore_ascii_case(name);
    let by_name = || all.iter().find(|preset| is(preset.name()));
    let by_alias = || all.iter().find(|preset| preset.aliases().iter().any(|alias| is(alias)));
    by_name().or_else(by_alias).ok_or_else(|| {
        let known: Vec<&str> = all
            .iter()
            .flat_map(|preset| std::iter::once(preset.name()).chain(preset.aliases().iter().map(String::as_str)))
            .collect();
        let list = known.join(", ");
        match nearest(&known, name) {
            Some(near) => format!("there is no {} '{name}'; did you mean {near}? Known are {list}", T::KIND),
            None => format!("there is no {} '{name}'; known are {list}", T::KIND),
        }
    })
}

/// The name that somebody may have meant: one that has what was written within it, or else the first of those that differ in the
/// fewest letters, a third of them at most.
fn nearest<'k>(known: &[&'k str], name: &str) -> Option<&'k str> {
    /// What is shorter is within too many names.
    const WORD: usize = 3;
    let name = name.to_ascii_lowercase();
    if name.len() >= WORD
        && let Some(longer) = known.iter().find(|known| known.contains(&name))
    {
        return Some(longer);
    }
    let far = |known: &str| strsim::osa_distance(known, &name);
    let near = known.iter().copied().min_by_key(|known| far(known))?;
    (far(near) * 3 <= name.chars().count()).then_some(near)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::yi_34b;

    #[test]
    fn models_have_the_parameters_and_the_caches_that_were_published() {
        // Billions of parameters, each within a thousandth of what its model card or its files count; KiB of KV cache per token.
        let published = [
            ("yi-34b", 34.39, 240.0),
            ("yi-6b", 6.06, 64.0),
            ("llama-2-7b", 6.738, 512.0),
            ("llama-3-8b", 8.03, 128.0),
            ("llama-3-70b", 70.55, 320.0),
            ("mistral-7b", 7.24, 128.0),
            ("mixtral-8x7b", 46.70, 128.0),
            ("command-r", 34.98, 1280.0),
            ("command-r-plus", 103.81, 256.0),
            ("qwen1.5-14b", 14.17, 800.0),
            ("qwen2.5-7b", 7.616, 56.0),
            ("deepseek-v2", 235.74, 67.5),
            ("gemma-2-9b", 9.24, 336.0),
            ("gemma-3-27b", 27.01, 496.0),
            ("smollm2-135m", 0.1345, 22.5),
        ];
        let presets = Presets::built_in();
        assert_eq!(published.len(), presets.models.len(), "each is checked");
        for (name, billions, kib) in published {
            let preset = presets.model(name).expect(name);
            let parameters = preset.decoder.parameters.total() as f64 / 1e9;
            assert!((parameters / billions - 1.0).abs() < 1e-3, "{name}: {parameters} billion, not {billions}");
            let per_token = preset.decoder.token_bytes().0 as f64 / 1024.0;
            assert!((per_token - kib).abs() < 1e-9, "{name}: {per_token} KiB per token, not {kib}");
            assert!(preset.source.len() > 20, "{name} has a source");
        }
        // Of those that a token activates, as many digits as were published.
        for (name, billions, digit) in [("mixtral-8x7b", 12.9, 0.1), ("deepseek-v2", 21.0, 1.0), ("yi-34b", 34.4, 0.1)]
        {
            let active = presets.model(name).expect(name).decoder.active_parameters() as f64 / 1e9;
            assert!((active - billions).abs() <= digit / 2.0, "{name}: {active} billion active, not {billions}");
        }
        assert_eq!(presets.model("Yi-34B").expect("in any case").decoder.geometry, yi_34b(), "the running example");
        let deepseek = presets.model("deepseek-v2").expect("a model");
        let numbers = 60 * deepseek.decoder.cached_per_layer();
        assert_eq!(numbers, 34_560, "one latent of 512 and a key of 64 in each of 60 layers");
        let gemma = presets.model("gemma-3-27b").expect("a model");
        assert_eq!(gemma.decoder.layers_by_sight(), (10, 52), "every sixth of 62");
    }

    #[test]
    fn gpus_have_the_critical_intensities_that_were_recomputed() {
        let presets = Presets::built_in();
        let intensities = [
            ("rtx4090", 163.9),
            ("rtx3090", 75.9),
            ("a100-40g", 200.6),
            ("a100-80g", 153.0),
            ("h100", 295.2),
            ("h200", 206.0),
            ("b200", 281.3),
            ("mi300x", 246.7),
            ("l4", 403.3),
            ("l40s", 419.0),
            ("m2-max", 34.0),
            ("m2-ultra", 34.0),
            ("m3-max", 35.75),
            ("m4-max", 31.5),
            ("arc-a770", 245.7),
            ("arc-b580", 239.9),
            ("radeon-780m", 138.3),
        ];
        assert_eq!(intensities.len(), presets.gpus.len(), "each is checked");
        for (name, intensity) in intensities {
            let gpu = presets.gpu(name).expect(name);
            let found = gpu.critical_intensity();
            assert!((found - intensity).abs() < 0.06, "{name}: {found} FLOP per byte, not {intensity}");
            assert!(gpu.source.len() > 20, "{name} has a source");
            assert_eq!(gpu.link_bytes_per_s.is_none(), gpu.unified, "{name} has a link or needs none");
            assert_eq!(gpu.price_per_hour, None, "{name}: prices have no source");
        }
        assert_eq!(presets.gpu("A100").expect("an alias").name, "a100-80g", "the larger one");
    }

    #[test]
    fn an_unknown_name_is_refused_with_the_nearest_and_those_that_are_known() {
        let presets = Presets::built_in();
        let gpu = |name| presets.gpu(name).expect_err("no such GPU");
        let list = "rtx4090, rtx3090, a100-40g, a100-80g, a100, h100, h200, b200";
        assert!(
            gpu("h10").starts_with(&format!("there is no GPU 'h10'; did you mean h100? Known are {list}")),
            "{}",
            gpu("h10")
        );
        assert!(gpu("4090").contains("did you mean rtx4090?"), "{}", gpu("4090"));
        assert!(gpu("MI30X").contains("did you mean mi300x?"), "{}", gpu("MI30X"));
        let far = gpu("tpu-v5");
        assert!(far.starts_with(&format!("there is no GPU 'tpu-v5'; known are {list}")), "nothing is near: {far}");
        let model = |name| presets.model(name).expect_err("no such model");
        assert!(model("llama3-8b").contains("did you mean llama-3-8b?"), "{}", model("llama3-8b"));
        assert!(model("mixtral").contains("did you mean mixtral-8x7b?"), "{}", model("mixtral"));
        assert!(!model("gpt-5").contains("did you mean"), "{}", model("gpt-5"));
    }

    /// A GPU of a user.
    const MINE: &str = "[[gpu]]\nname = \"mine\"\ngpu = \"My GPU\"\nmemory_bytes = 8_000_000_000\nflops_per_s = 1e13\n\
                        memory_bytes_per_s = 200e9\nunified = true\nsource = \"measured\"\n";

    #[test]
    fn a_users_presets_stand_beside_the_others_and_may_take_their_place() {
        let mut presets = Presets::built_in();
        let before = presets.gpus.len();
        assert_eq!(presets.add("my.toml", MINE), Ok(Vec::new()), "a new name");
        assert_eq!(presets.gpu("mine").map(|gpu| gpu.memory_bytes), Ok(Bytes(8_000_000_000)), "is known");
        let better = MINE.replace("\"mine\"", "\"H100\"").replace("1e13", "2e13");
        let notes = presets.add("better.toml", &better).expect("sound");
        assert_eq!(notes, ["better.toml: its GPU 'H100' takes the place of another of this name"], "and says so");
        assert_eq!(presets.gpu("h100").map(|gpu| gpu.flops_per_s), Ok(2e13), "in any case");
        assert_eq!(presets.gpus.len(), before + 1, "one more in all");
        let renamed = MINE.replace("\"mine\"", "\"a100\"");
        let notes = presets.add("a.toml", &renamed).expect("sound");
        assert_eq!(
            notes,
            ["a.toml: 'a100' names its GPU now, no longer 'a100-80g'"],
            "an alias goes to who is named so"
        );
        assert_eq!(presets.gpu("a100").map(|gpu| gpu.gpu.as_str()), Ok("My GPU"), "the new one");
        assert!(presets.gpu("a100-80g").is_ok(), "the old one by its name");
        let clash = MINE.replace("gpu = \"My", "aliases = [\"l4\"]\ngpu = \"My");
        let whole = presets.clone();
        let refused = presets.add("c.toml", &clash).expect_err("l4 is another");
        assert_eq!(refused, "c.toml: the alias 'l4' of the GPU 'mine' names the GPU 'l4' already", "which");
        assert_eq!(presets, whole, "nothing is added");
    }
}
