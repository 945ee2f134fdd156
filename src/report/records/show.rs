//! The comparison for people: tables, sentences, and a page.

use std::fmt;

use super::join::{Figure, Group, Metric, RecordsReport};
use crate::geometry::Bytes;
use crate::report::html::{self, Html};
use crate::report::plot::{Guide, Plot, Point, Scale};
use crate::report::run_tables::cache;
use crate::report::table::{Align, block, counted, number, table};

impl Metric {
    /// In words.
    pub const fn name(self) -> &'static str {
        match self {
            Self::CacheBytes => "bytes of the cache",
            Self::Sessions => "sessions that fit",
            Self::PrefillS => "prefill",
            Self::DecodeS => "decode, a token",
            Self::BatchS => "decode, a step",
            Self::SwitchS => "context switch",
        }
    }

    /// A value with its unit.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "counts of bytes and sessions, at least 0"
    )]
    pub fn write(self, value: f64) -> String {
        match self {
            Self::CacheBytes => Bytes(value.round() as u64).to_string(),
            Self::Sessions => (value.round() as u64).to_string(),
            _ if value >= 1.0 => format!("{} s", number(Some(value))),
            _ => format!("{} ms", number(Some(value * 1e3))),
        }
    }
}

impl Figure {
    /// The metric, with the sessions of a step.
    pub fn name(&self) -> String {
        match self.metric {
            Metric::BatchS => format!("{} of {}", self.metric.name(), counted(u64::from(self.sessions), "session")),
            metric => metric.name().to_owned(),
        }
    }

    fn row(&self) -> Vec<String> {
        vec![
            self.context_tokens.to_string(),
            self.name(),
            self.metric.write(self.measured),
            self.predicted.map_or_else(|| "-".to_owned(), |value| self.metric.write(value)),
            number(self.ratio),
            self.bound.unwrap_or("-").to_owned(),
        ]
    }
}

impl Group {
    /// The compression as tables show it.
    pub fn short(&self) -> String {
        cache(&self.compression)
    }

    /// What it costs in quality, in words.
    fn quality(&self) -> [String; 3] {
        let unknown = || "unknown".to_owned();
        let quality = &self.quality;
        [
            quality.mean_kl.map_or_else(unknown, |kl| format!("{kl:.2e}")),
            quality.needles.map_or_else(unknown, |(right, asked)| format!("{right} of {asked}")),
            quality.nll.map_or_else(unknown, |nll| format!("{nll:.4}")),
        ]
    }
}

const FIGURES: [(&str, Align); 8] = [
    ("cache", Align::Left),
    ("context", Align::Right),
    ("metric", Align::Left),
    ("measured", Align::Right),
    ("predicted", Align::Right),
    ("ratio", Align::Right),
    ("bound by", Align::Left),
    ("record", Align::Left),
];
const QUALITY: [(&str, Align); 4] =
    [("cache", Align::Left), ("mean KL, nats", Align::Right), ("needles", Align::Right), ("nll, nats", Align::Right)];

/// Groups of one model on one device.
fn scenes(groups: &[Group]) -> impl Iterator<Item = &[Group]> {
    groups.chunk_by(|a, b| (&a.model, &a.device) == (&b.model, &b.device))
}

fn figure_rows(groups: &[Group]) -> impl Iterator<Item = Vec<String>> {
    groups.iter().flat_map(|group| {
        group.figures.iter().enumerate().map(|(i, figure)| {
            // A name stands once.
            let name = if i == 0 { group.short() } else { String::new() };
            let end = vec![figure.file.clone()];
            [vec![name], figure.row(), end].concat()
        })
    })
}

fn quality_rows(groups: &[Group]) -> impl Iterator<Item = Vec<String>> {
    groups.iter().map(|group| [vec![group.short()], group.quality().to_vec()].concat())
}

impl RecordsReport {
    fn predicted_from(&self, device: &str) -> String {
        let found = self.devices.iter().find(|basis| basis.device == device);
        let words = found.and_then(|basis| basis.predicted_from.clone());
        words.unwrap_or_else(|| {
            "nothing: no record of bench device, and no preset of this name; run concertina bench device".to_owned()
        })
    }

    /// Why figures have no prediction, besides the lack of a basis.
    fn reasons(groups: &[Group]) -> Vec<String> {
        let reason = |group: &Group| group.not_predicted.as_ref().map(|why| format!("{}: {why}", group.short()));
        groups.iter().filter_map(reason).collect()
    }

    fn scaled(&self, model: &str) -> Vec<String> {
        let of_model = self.records.iter().filter(|record| record.model.as_deref() == Some(model));
        of_model.filter_map(|record| record.scaled.as_ref().map(|words| format!("{}: {words}", record.file))).collect()
    }
}

impl fmt::Display for RecordsReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for groups in scenes(&self.groups) {
            let first = &groups[0];
            writeln!(f, "{} on {}", first.model, first.device)?;
            writeln!(f, "predicted from {}", self.predicted_from(&first.device))?;
            self.scaled(&first.model).iter().try_for_each(|words| writeln!(f, "scaled: {words}"))?;
            Self::reasons(groups).iter().try_for_each(|words| writeln!(f, "not predicted: {words}"))?;
            writeln!(f, "\n{}", table(&FIGURES, figure_rows(groups)))?;
            writeln!(f, "{}", table(&QUALITY, quality_rows(groups)))?;
        }
        if !self.gaps.is_empty() {
            writeln!(f, "largest gaps")?;
            self.gaps.iter().try_for_each(|gap| writeln!(f, "  {gap}"))?;
            writeln!(f)?;
        }
        let read = counted(self.records.len() as u64, "record");
        let lines = [("read", read), ("refused", counted(self.refused.len() as u64, "file"))];
        f.write_str(&block("records", &lines))
    }
}

impl RecordsReport {
    /// The same as a page of one file.
    pub fn page(&self) -> String {
        let about = "What was measured beside what the theory of long contexts (arXiv:2405.08944) predicts: the four \
                     challenges of a session, by its compression. A ratio above 1 is slower, larger or more than predicted.";
        let gaps = (!self.gaps.is_empty()).then(|| html::section("Largest gaps", [html::list(&self.gaps)]));
        let scenes = scenes(&self.groups).map(|groups| self.scene(groups));
        html::page("Measured and predicted", about, gaps.into_iter().chain(scenes).chain([self.sources()]))
    }

    fn scene(&self, groups: &[Group]) -> Html {
        let first = &groups[0];
        let mut parts = vec![html::note(&format!("Predicted from {}.", self.predicted_from(&first.device)))];
        parts.extend(self.scaled(&first.model).iter().map(|words| html::note(&format!("Scaled: {words}."))));
        parts.extend(Self::reasons(groups).iter().map(|words| html::note(&format!("Not predicted: {words}."))));
        parts.push(bars(groups));
        parts.push(html::table(&FIGURES, figure_rows(groups)));
        parts.push(html::table(&QUALITY, quality_rows(groups)));
        parts.extend(quality_plot(groups).map(|plot| {
            html::plot(&plot, "Lower left is better: fewer bytes, and predictions that stay as they were.")
        }));
        html::section(&format!("{} on {}", first.model, first.device), parts)
    }

    fn sources(&self) -> Html {
        let columns =
            [("record", Align::Left), ("command", Align::Left), ("model", Align::Left), ("device", Align::Left)];
        let rows = self.records.iter().map(|record| {
            let model = record.model.clone().unwrap_or_else(|| "-".to_owned());
            vec![record.file.clone(), record.command.to_owned(), model, record.device.clone()]
        });
        let refused = self.refused.iter().map(|refused| format!("{}: {}", refused.file, refused.reason));
        let refused =
            (!self.refused.is_empty()).then(|| Html::from_iter([html::note("Refused:"), html::list(refused)]));
        html::section("Records", [html::table(&columns, rows)].into_iter().chain(refused))
    }
}

/// Times of the longest context of each compression, those that are predicted.
fn bars(groups: &[Group]) -> Html {
    let longest = groups.iter().flat_map(|group| &group.figures).map(|figure| figure.context_tokens).max();
    let bar = |(group, figure): (&Group, &Figure)| {
        let label = format!("{}, {} tokens, {}", group.short(), figure.context_tokens, figure.name());
        let predicted = figure.predicted?;
        Some(html::bar(&label, figure.measured, predicted, |value| figure.metric.write(value)))
    };
    let all = groups.iter().flat_map(|group| group.figures.iter().map(move |figure| (group, figure)));
    let of_longest = all.filter(|(_, figure)| Some(figure.context_tokens) == longest);
    let drawn: Vec<Html> = of_longest.filter_map(bar).collect();
    if drawn.is_empty() { Html::default() } else { std::iter::once(html::bar_legend()).chain(drawn).collect() }
}

/// Mean KL against bytes of the cache at the longest context that several compressions have.
fn quality_plot(groups: &[Group]) -> Option<Plot> {
    let bytes = |group: &Group| {
        let of_cache = group.figures.iter().filter(|figure| figure.metric == Metric::CacheBytes);
        of_cache.max_by_key(|figure| figure.context_tokens).map(|figure| (figure.context_tokens, figure.measured))
    };
    let (context, _) = groups.iter().filter_map(bytes).max_by_key(|(context, _)| *context)?;
    let at = |group: &Group| bytes(group).filter(|(of, _)| *of == context).map(|(_, bytes)| bytes);
    let full = groups.iter().find(|group| group.short() == cache("full"));
    let point = |group: &Group| {
        let kl = group.quality.mean_kl.filter(|kl| *kl > 0.0)?;
        Some(Point { x: at(group)?, y: kl, label: group.short() })
    };
    let points: Vec<Point> = groups.iter().filter_map(point).collect();
    (points.len() > 1).then(|| Plot {
        title: format!("what {context} tokens cost"),
        x_title: "bytes of the cache (log scale)".to_owned(),
        y_title: "mean KL from the full cache, nats (log scale)".to_owned(),
        y_scale: Scale::Log,
        guide: full.and_then(at).map(|x| Guide { x, label: "full".to_owned() }),
        points,
    })
}
