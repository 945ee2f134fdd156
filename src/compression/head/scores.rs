//! What each (layer, KV head) is worth, as a file.
//!
//! ```text
//! # model: SmolLM2-135M
//! # kind: duo gates
//! 0.91<tab>0.02<tab>0.4
//! 1.00<tab>0.13<tab>0.07
//! ```
//!
//! A line per layer with a number per KV head, larger for heads that need everything. Lines that begin with `#` are
//! optional; without them it is the form in which `DuoAttention` publishes its gates.

use std::fmt;

/// A score per (layer, KV head).
#[derive(Clone, Debug, PartialEq)]
pub struct HeadScores {
    /// Layers.
    pub num_layers: u32,
    /// KV heads of a layer.
    pub num_kv_heads: u32,
    /// `[num_layers][num_kv_heads]`.
    pub scores: Vec<f32>,
    /// The model that they were made for, where the file says so.
    pub model: Option<String>,
    /// What they measure, where the file says so.
    pub kind: Option<String>,
}

impl HeadScores {
    /// Reads a file's text.
    ///
    /// # Errors
    /// A sentence with the line.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (mut model, mut kind, mut scores, mut num_layers, mut num_kv_heads) = (None, None, Vec::new(), 0, 0);
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.trim();
            if let Some(note) = line.strip_prefix('#') {
                match note.split_once(':').map(|(name, value)| (name.trim(), value.trim().to_owned())) {
                    Some(("model", name)) => model = Some(name),
                    Some(("kind", name)) => kind = Some(name),
                    _ => {}
                }
                continue;
            }
            if line.is_empty() {
                continue;
            }
            let before = scores.len();
            for value in line.split_whitespace() {
                let score: Option<f32> = value.parse().ok().filter(|score: &f32| score.is_finite());
                scores.push(score.ok_or_else(|| format!("line {number} of the head scores: '{value}' is no number"))?);
            }
            let heads =
                u32::try_from(scores.len() - before).map_err(|_| "a line of too many head scores".to_owned())?;
            if num_layers > 0 && heads != num_kv_heads {
                return Err(format!(
                    "line {number} of the head scores has {heads} numbers, the lines before it {num_kv_heads}: write one \
                     number per KV head"
                ));
            }
            num_kv_heads = heads;
            num_layers += 1;
        }
        if num_layers == 0 {
            return Err("the head scores are empty: write a line per layer with a number per KV head".to_owned());
        }
        Ok(Self { num_layers, num_kv_heads, scores, model, kind })
    }

    /// Whether there is a score for each list.
    pub(super) fn check_shape(&self, num_layers: u32, num_kv_heads: u32) -> Result<(), String> {
        if (self.num_layers, self.num_kv_heads) == (num_layers, num_kv_heads) {
            return Ok(());
        }
        Err(format!(
            "the head scores are for {} layers of {} KV heads, the model has {num_layers} of {num_kv_heads}",
            self.num_layers, self.num_kv_heads
        ))
    }

    /// Whether they are for a model.
    ///
    /// # Errors
    /// A sentence with both names, or both shapes.
    pub fn check(&self, model_name: &str, num_layers: u32, num_kv_heads: u32) -> Result<(), String> {
        match &self.model {
            Some(model) if model != model_name => {
                Err(format!("the head scores are for the model '{model}', not for '{model_name}'"))
            }
            _ => self.check_shape(num_layers, num_kv_heads),
        }
    }
}

impl fmt::Display for HeadScores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let notes = [("model", &self.model), ("kind", &self.kind)];
        for (name, value) in notes.into_iter().filter_map(|(name, value)| Some((name, value.as_ref()?))) {
            writeln!(f, "# {name}: {value}")?;
        }
        for layer in self.scores.chunks_exact(self.num_kv_heads as usize) {
            let line: Vec<_> = layer.iter().map(ToString::to_string).collect();
            writeln!(f, "{}", line.join("\t"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_read_and_written() {
        let text = "# model: tiny\n# kind: duo gates\n# anything\n1\t0.25\n\n0.5\t-0.125\n";
        let scores = HeadScores::parse(text).expect("two layers");
        assert_eq!((scores.num_layers, scores.num_kv_heads), (2, 2), "shape");
        assert_eq!(scores.scores, [1.0, 0.25, 0.5, -0.125], "numbers");
        assert_eq!((scores.model.as_deref(), scores.kind.as_deref()), (Some("tiny"), Some("duo gates")), "notes");
        assert_eq!(HeadScores::parse(&scores.to_string()), Ok(scores.clone()), "round trip");
        let published = HeadScores::parse("9.9e-01\t0\n3.1e-02\t1\n").expect("no notes");
        assert_eq!(HeadScores::parse(&published.to_string()), Ok(published.clone()), "round trip");
        assert!(published.check("anything", 2, 2).is_ok(), "no name is any name");
        assert!(scores.check("tiny", 2, 2).is_ok(), "its model");
        assert!(scores.check("large", 2, 2).is_err_and(|e| e.contains("'tiny', not for 'large'")), "another model");
        assert!(scores.check("tiny", 2, 3).is_err_and(|e| e.contains("2 layers of 2 KV heads")), "another shape");
    }

    #[test]
    fn bad_files_are_refused_with_the_line() {
        for (text, reason) in [
            ("", "empty"),
            ("# model: tiny\n", "empty"),
            ("1\t2\n1\n", "line 2"),
            ("1\tx\n", "'x' is no number"),
            ("# a\n1\tNaN\n", "line 2"),
            ("inf\n", "no number"),
        ] {
            let refused = HeadScores::parse(text).expect_err(text);
            assert!(refused.contains(reason), "{text:?}: {refused}");
        }
    }
}
