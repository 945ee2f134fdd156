//! The report of `codecs`: every way to write a page, and what it costs.

use std::fmt;

use serde::Serialize;

use super::table::{Align, count, number, table};
use super::{ModelReport, Program};
use crate::compression::Compression;
use crate::compression::hidden::{Entry, HiddenCodec, REGISTRY};
use crate::geometry::{Bytes, ModelGeometry, PageGeometry};
use crate::kernels::registry::PAGE_SIZES;
use crate::theory::predict::kv_bytes;

/// Tokens over which bytes per token are compared: whole pages of every size.
const COMPARED_TOKENS: u64 = 1 << 10;

/// Every codec of the registry.
#[derive(Clone, Debug, Serialize)]
pub struct CodecsReport {
    /// The program.
    pub program: Program,
    /// The model that the bytes are for; `null` where none was named.
    pub model: Option<ModelReport>,
    /// Channels of a head.
    pub head_dim: u32,
    /// Tokens of the page that was asked for.
    pub page_tokens: u32,
    /// Every example of the registry, in its order.
    pub codecs: Vec<CodecReport>,
}

/// One codec, written out.
#[derive(Clone, Debug, Serialize)]
pub struct CodecReport {
    /// As `--compress` reads it.
    pub codec: &'static str,
    /// How codecs of its kind are written, parameters as letters.
    pub syntax: &'static str,
    /// What it does.
    pub summary: &'static str,
    /// Where it comes from; empty where it is made of others.
    pub source: &'static str,
    /// Tokens of a page: as asked for, or the fewest that hold its groups; `null` where heads of this width have
    /// no such codec.
    pub page_tokens: Option<u32>,
    /// Bits per element of a sealed page of so many tokens, all metadata included.
    pub effective_bits: Option<f64>,
    /// Bytes of a token over all layers and KV heads of the model, sealed.
    pub per_token_bytes: Option<Bytes>,
    /// How many times smaller than the full cache.
    pub times_smaller: Option<f64>,
    /// Why pages as asked for can not have it, where they can not.
    pub refusal: Option<String>,
}

impl CodecReport {
    fn new(entry: &Entry, codec: &'static str, page: PageGeometry, model: Option<&ModelGeometry>) -> Self {
        let hidden: HiddenCodec = codec.parse().expect("the registry's examples should parse");
        let refusal = hidden.check(page).err();
        let fitting = std::iter::once(page.page_size).chain(PAGE_SIZES);
        let page = fitting.map(|page_size| PageGeometry { page_size, ..page }).find(|page| hidden.check(*page).is_ok());
        let bits = page.map(|page| hidden.effective_bits(page));
        // A codec that heads of this width can not have has no size.
        let model = model.filter(|_| page.is_some());
        let bytes = |hidden, tokens| {
            model.map(|model| kv_bytes(model, &Compression { hidden, ..Compression::default() }, tokens))
        };
        let times_smaller = match (bytes(HiddenCodec::F16, COMPARED_TOKENS), bytes(hidden, COMPARED_TOKENS)) {
            (Some(full), Some(own)) => Some(full.0 as f64 / own.0 as f64),
            _ => bits.map(|bits| 16.0 / bits),
        };
        Self {
            codec,
            syntax: entry.syntax,
            summary: entry.summary,
            source: entry.source,
            page_tokens: page.map(|page| page.page_size),
            effective_bits: bits,
            per_token_bytes: bytes(hidden, 1),
            times_smaller,
            refusal,
        }
    }
}

impl CodecsReport {
    /// The registry for pages of a shape, with the bytes of a model where there is one.
    pub fn new(page: PageGeometry, model: Option<(&ModelGeometry, ModelReport)>) -> Self {
        let geometry = model.as_ref().map(|(geometry, _)| *geometry);
        let examples = |entry: &'static Entry| {
            entry.examples.iter().map(move |codec| CodecReport::new(entry, codec, page, geometry))
        };
        Self {
            program: Program::THIS,
            codecs: REGISTRY.iter().flat_map(examples).collect(),
            head_dim: page.head_dim,
            page_tokens: page.page_size,
            model: model.map(|(_, report)| report),
        }
    }

    /// Columns of one codec, after its name.
    fn columns(&self, codec: &CodecReport) -> Vec<String> {
        let dash = || "-".to_owned();
        let mut row = vec![codec.effective_bits.map_or_else(dash, |bits| format!("{bits:.3}"))];
        if self.model.is_some() {
            row.push(codec.per_token_bytes.map_or_else(dash, |bytes| count(bytes.0)));
        }
        row.push(codec.times_smaller.map_or_else(dash, |times| number(Some(times))));
        row.push(codec.page_tokens.map_or_else(dash, |tokens| tokens.to_string()));
        row
    }
}

impl fmt::Display for CodecsReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use Align::{Left, Right};
        let mut columns = vec![("\ncodec", Left), ("bits per\nelement", Right)];
        if self.model.is_some() {
            columns.push(("bytes per\ntoken", Right));
        }
        columns.extend([("times\nsmaller", Right), ("page\ntokens", Right), ("\nwhat it does", Left)]);
        let mut rows: Vec<Vec<String>> = Vec::new();
        let mut before = "";
        for codec in &self.codecs {
            // A kind whose only example is itself needs no line of its own.
            let alone = codec.codec == codec.syntax;
            if codec.syntax != before && !alone {
                let mut row = vec![String::new(); columns.len()];
                row[0] = codec.syntax.to_owned();
                row[columns.len() - 1] = codec.summary.to_owned();
                rows.push(row);
            }
            before = codec.syntax;
            let mut row = vec![if alone { codec.codec.to_owned() } else { format!("  {}", codec.codec) }];
            row.extend(self.columns(codec));
            row.push(if alone { codec.summary.to_owned() } else { String::new() });
            rows.push(row);
        }
        writeln!(f, "{}", table(&columns, rows))?;
        let whose = self.model.as_ref().map_or_else(String::new, |model| format!(" of {}", model.name));
        let larger = self.codecs.iter().any(|c| c.page_tokens.is_some_and(|tokens| tokens != self.page_tokens));
        let pages = if larger { "; codecs whose groups need larger pages are shown with those" } else { "" };
        writeln!(f, "heads of {} channels{whose}, sealed pages of {} tokens{pages}", self.head_dim, self.page_tokens)?;
        for codec in self.codecs.iter().filter(|codec| codec.page_tokens.is_none()) {
            writeln!(f, "{}", codec.refusal.as_deref().unwrap_or_default())?;
        }
        writeln!(f, "\nsources")?;
        self.sources().iter().try_for_each(|(source, kinds)| writeln!(f, "  {source}: {}", kinds.join(", ")))
    }
}

impl CodecsReport {
    /// Where codecs come from: a source, and the kinds that follow it.
    fn sources(&self) -> Vec<(&'static str, Vec<&'static str>)> {
        let mut lines: Vec<(&str, Vec<&str>)> = Vec::new();
        for codec in self.codecs.iter().filter(|codec| !codec.source.is_empty()) {
            match lines.iter_mut().find(|(source, _)| *source == codec.source) {
                Some((_, kinds)) if kinds.contains(&codec.syntax) => {}
                Some((_, kinds)) => kinds.push(codec.syntax),
                None => lines.push((codec.source, vec![codec.syntax])),
            }
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::yi_34b;

    fn report(page_size: u32, model: bool) -> CodecsReport {
        let yi = yi_34b();
        let of_model = model.then(|| (&yi, ModelReport::new("yi.gguf".to_owned(), &yi, None)));
        CodecsReport::new(PageGeometry { page_size, head_dim: 128 }, of_model)
    }

    fn find<'r>(report: &'r CodecsReport, codec: &str) -> &'r CodecReport {
        report.codecs.iter().find(|c| c.codec == codec).unwrap_or_else(|| panic!("{codec} should be listed"))
    }

    #[test]
    fn costs_are_those_of_the_definitions() {
        let report = report(64, true);
        let kivi2 = find(&report, "kivi2");
        assert_eq!((kivi2.effective_bits, kivi2.page_tokens), (Some(3.0), Some(64)), "2 bits, scale and minimum of 32");
        assert_eq!(kivi2.per_token_bytes, Some(Bytes((240 << 10) * 3 / 16)), "3 of 16 bits");
        let wide = find(&report, "kivi4:128");
        assert_eq!((wide.effective_bits, wide.page_tokens), (Some(4.25), Some(128)), "the smallest page that works");
        assert!(wide.refusal.as_ref().is_some_and(|why| why.contains("groups of 128")), "and why");
        assert_eq!(find(&report, "f16").times_smaller, Some(1.0), "the full cache");
    }

    #[test]
    fn every_codec_is_printed_with_its_source_and_without_a_model_there_are_no_bytes() {
        let text = report(16, false).to_string();
        for entry in REGISTRY {
            assert!(entry.examples.iter().all(|codec| text.contains(codec)), "{} in: {text}", entry.syntax);
            assert!(text.contains(entry.source) && text.contains(entry.summary), "{} in: {text}", entry.syntax);
        }
        assert!(text.contains("rot4, rot3, rot2"), "kinds of one source in one line: {text}");
        assert!(!text.contains("bytes per"), "{text}");
        assert!(report(16, true).to_string().contains("bytes per"), "with a model");
    }

    #[test]
    fn what_heads_can_not_have_is_listed_with_the_reason() {
        let report = CodecsReport::new(PageGeometry { page_size: 64, head_dim: 32 }, None);
        let codec = find(&report, "lowrank:48");
        assert_eq!((codec.page_tokens, codec.effective_bits), (None, None), "no page of any size");
        assert!(report.to_string().contains("no rank of 48"), "{report}");
    }
}
