//! Pages of one file: no script, nothing that is loaded from elsewhere, light or dark as the reader's system is.
//!
//! Text becomes [`Html`] only through the functions here, which escape it; so no name of a model or a file can add a tag. A table or
//! a picture that is wider than the screen scrolls in a box of its own.

use std::fmt::Write as _;

use super::table::Align;
use super::{Curves, Plot};

/// Markup: text in it is escaped, and what it opens it closes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Html(String);

impl Html {
    /// The markup as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromIterator<Self> for Html {
    fn from_iter<I: IntoIterator<Item = Self>>(parts: I) -> Self {
        Self(parts.into_iter().map(|part| part.0).collect())
    }
}

/// Colours and widths. The names of colours are those that [`Plot::inline_svg`] uses.
const STYLE: &str = "\
:root{color-scheme:light dark;--ink:#1d2733;--paper:#fff;--faint:#5c6b7a;--grid:#dde3e9;--point:#1f5fa8;--front:#9dbfe6;\
--guide:#8a95a1;--other:#c4701a}
@media(prefers-color-scheme:dark){:root{--ink:#e4e9ee;--paper:#12171d;--faint:#9aa8b5;--grid:#2c3640;--point:#7db2ee;\
--front:#3c6596;--guide:#6b7884;--other:#e6a257}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:76rem;background:var(--paper);color:var(--ink);\
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;line-height:1.25}
h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid var(--grid)}
h1,h2,p,li,summary{overflow-wrap:anywhere}
.note{color:var(--faint)}
.scroll{overflow-x:auto;margin:.8rem 0}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem;border-bottom:1px solid var(--grid);text-align:left;white-space:nowrap;vertical-align:top}
th{color:var(--faint);font-weight:600;white-space:normal;vertical-align:bottom}
td:first-child{white-space:normal;min-width:min(17rem,38vw)}
.heads td{font-weight:600;padding-top:.9rem}
.right{text-align:right}
figure{margin:1rem 0}
figcaption{color:var(--faint);font-size:.9rem}
.plot{display:block;width:100%;min-width:40rem;max-width:60rem;height:auto}
.bar{display:grid;grid-template-columns:minmax(0,1fr);gap:.1rem;margin:.7rem 0}
.bar svg{display:block;width:100%;height:1.3rem}
.bar .measured{fill:var(--point)}
.bar .predicted{fill:var(--other)}
";

/// A page of sections under a title; `about` says in a sentence what it is.
pub fn page(title: &str, about: &str, sections: impl IntoIterator<Item = Html>) -> String {
    let body: Html = sections.into_iter().collect();
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" \
         content=\"width=device-width, initial-scale=1\">\n<title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n\
         <body>\n<h1>{title}</h1>\n<p class=\"note\">{about}</p>\n{}</body>\n</html>\n",
        body.0,
        title = escaped(title),
        about = escaped(about),
    )
}

/// What stands under a heading.
pub fn section(title: &str, parts: impl IntoIterator<Item = Html>) -> Html {
    let parts: Html = parts.into_iter().collect();
    Html(format!("<section>\n<h2>{}</h2>\n{}</section>\n", escaped(title), parts.0))
}

/// Words.
pub fn paragraph(text: &str) -> Html {
    Html(format!("<p>{}</p>\n", escaped(text)))
}

/// Words beside the matter.
pub fn note(text: &str) -> Html {
    Html(format!("<p class=\"note\">{}</p>\n", escaped(text)))
}

/// Sentences below one another.
pub fn list<T: AsRef<str>>(items: impl IntoIterator<Item = T>) -> Html {
    let mut html = "<ul>\n".to_owned();
    for item in items {
        let _ = writeln!(html, "<li>{}</li>", escaped(item.as_ref()));
    }
    html.push_str("</ul>\n");
    Html(html)
}

/// A table that scrolls in a box of its own. Columns and rows are those of the tables on the command line; a line break in a
/// heading is a space here.
pub fn table(columns: &[(&str, Align)], rows: impl IntoIterator<Item = Vec<String>>) -> Html {
    let class = |column: usize| match columns.get(column) {
        Some((_, Align::Right)) => " class=\"right\"",
        _ => "",
    };
    let mut html = "<div class=\"scroll\"><table>\n<thead><tr>".to_owned();
    for (column, (name, _)) in columns.iter().enumerate() {
        let _ = write!(html, "<th{}>{}</th>", class(column), escaped(name.replace('\n', " ").trim()));
    }
    html.push_str("</tr></thead>\n<tbody>\n");
    for row in rows {
        // A row with nothing but a name heads those that follow.
        let heads = row.len() > 1 && row[1..].iter().all(String::is_empty);
        html.push_str(if heads { "<tr class=\"heads\">" } else { "<tr>" });
        for (column, cell) in row.iter().enumerate() {
            let _ = write!(html, "<td{}>{}</td>", class(column), escaped(cell.trim()));
        }
        html.push_str("</tr>\n");
    }
    html.push_str("</tbody>\n</table></div>\n");
    Html(html)
}

/// A plot in the page's colours.
pub fn plot(plot: &Plot, caption: &str) -> Html {
    Html(format!(
        "<figure><div class=\"scroll\">\n{}</div>\n<figcaption>{}</figcaption></figure>\n",
        plot.inline_svg(),
        escaped(caption)
    ))
}

/// Lines in panels, in the page's colours.
pub fn curves(curves: &Curves, caption: &str) -> Html {
    Html(format!(
        "<figure><div class=\"scroll\">\n{}</div>\n<figcaption>{}</figcaption></figure>\n",
        curves.inline_svg(),
        escaped(caption)
    ))
}

/// A number beside the one that was expected: two bars from 0 on one scale, the larger as wide as the page. `write` says a
/// value with its unit. Of values that are no positive numbers nothing is drawn.
pub fn bar(label: &str, measured: f64, predicted: f64, write: impl Fn(f64) -> String) -> Html {
    let drawn = |value: f64| if value.is_finite() { value.max(0.0) } else { 0.0 };
    let longest = drawn(measured).max(drawn(predicted)).max(f64::MIN_POSITIVE);
    let width = |value: f64| 100.0 * drawn(value) / longest;
    let words = format!("{label}: measured {}, predicted {}", write(measured), write(predicted));
    Html(format!(
        "<div class=\"bar\"><span>{words}</span>\n<svg role=\"img\" aria-label=\"{words}\">\
         <rect class=\"measured\" width=\"{:.2}%\" height=\"48%\"/>\
         <rect class=\"predicted\" y=\"52%\" width=\"{:.2}%\" height=\"48%\"/></svg></div>\n",
        width(measured),
        width(predicted),
        words = escaped(&words),
    ))
}

/// What the colours of [`bar`] mean.
pub fn bar_legend() -> Html {
    Html(
        "<p class=\"note bar\"><svg role=\"img\" aria-label=\"measured above, predicted below\">\
         <rect class=\"measured\" width=\"2rem\" height=\"48%\"/><rect class=\"predicted\" y=\"52%\" width=\"2rem\" \
         height=\"48%\"/></svg><span>measured above, predicted below</span></p>\n"
            .to_owned(),
    )
}

/// Text as it may stand between tags and in quoted attributes; control characters have no form there.
pub(super) fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c if c.is_control() && c != '\n' && c != '\t' => out.push('\u{FFFD}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::report::{Point, Scale};

    /// What is wrong with a page: tags that do not close in order, or something that would be loaded or run.
    pub(crate) fn faults(page: &str) -> Option<String> {
        const VOID: [&str; 1] = ["meta"];
        let mut open: Vec<String> = Vec::new();
        let mut rest = page.split_once("<!DOCTYPE html>").map_or(page, |(_, rest)| rest);
        while let Some((before, tag)) = rest.split_once('<') {
            if before.contains('>') {
                return Some(format!("a stray > in {before:?}"));
            }
            let Some((tag, after)) = tag.split_once('>') else { return Some("a tag without an end".to_owned()) };
            if tag.matches('"').count() % 2 == 1 {
                return Some(format!("an open quote in <{tag}>"));
            }
            let name = tag.trim_start_matches('/').split([' ', '/']).next().unwrap_or_default();
            if tag.starts_with('/') {
                if open.pop().as_deref() != Some(name) {
                    return Some(format!("</{name}> closes nothing"));
                }
            } else if !tag.ends_with('/') && !VOID.contains(&name) {
                open.push(name.to_owned());
            }
            if ["script", "link", "img", "iframe", "object"].contains(&name) {
                return Some(format!("<{name}> loads or runs something"));
            }
            // Names of attributes: every other piece between quotes is a value.
            let names: String = tag.split('"').step_by(2).collect();
            if [" src=", " href=", " on"].iter().any(|word| names.contains(word)) {
                return Some(format!("<{tag}> loads or runs something"));
            }
            rest = after;
        }
        if page.contains("@import") || page.contains("url(") {
            return Some("a style that loads something".to_owned());
        }
        (!open.is_empty()).then(|| format!("{open:?} are never closed"))
    }

    fn example(words: &str) -> String {
        let point = Point { x: 3.0, y: 0.5, label: words.to_owned() };
        let drawing = Plot {
            title: words.to_owned(),
            x_title: "bytes".to_owned(),
            y_title: words.to_owned(),
            y_scale: Scale::Log,
            guide: None,
            points: vec![point],
        };
        let columns = [("a\nname", Align::Left), (words, Align::Right)];
        let parts = [
            paragraph(words),
            note(words),
            list([words, "second"]),
            table(&columns, [vec![words.to_owned(), "1".to_owned()]]),
            plot(&drawing, words),
            bar_legend(),
            bar(words, 2.0, 4.0, |value| format!("{value} {words}")),
        ];
        page(words, words, [section(words, parts)])
    }

    #[test]
    fn text_stays_text_and_tags_close() {
        let hostile = "<script src=\"http://x/\">a & 'b'</script>\u{1b}";
        let page = example(hostile);
        assert_eq!(faults(&page), None, "{page}");
        assert!(!page.contains("<script") && page.contains("&lt;script"), "escaped: {page}");
        assert!(page.contains("<th>a name</th>") && page.contains("class=\"right\">1</td>"), "a table: {page}");
        assert!(page.contains("prefers-color-scheme:dark") && page.contains("width=device-width"), "for every screen");
    }

    #[test]
    fn what_is_wrong_with_a_page_is_noticed() {
        let good = example("words");
        assert_eq!(faults(&good), None, "{good}");
        for (from, to) in [
            ("</table>", ""),
            ("</section>", "<script src=\"a.js\"></script></section>"),
            ("</section>", "<p onclick=\"f()\"></p></section>"),
            ("<h1>", "<img src=\"https://example.org/a.png\"/><h1>"),
            ("<p>words", "<p>a > b"),
            ("<style>", "<style>@import 'a.css';"),
            ("<section>", "<section class=\"x>"),
        ] {
            let bad = good.replacen(from, to, 1);
            assert_ne!(bad, good, "'{from}' should be in the page");
            assert!(faults(&bad).is_some(), "{from} as {to} should be noticed");
        }
    }

    #[test]
    fn bars_are_as_long_as_their_values() {
        let html = bar("decode", 2.0, 4.0, |value| format!("{value} s"));
        let found: Vec<&str> = html.0.split(" width=\"").skip(1).filter_map(|s| s.split('"').next()).collect();
        assert_eq!(found, ["50.00%", "100.00%"], "measured is half of what was predicted");
        assert!(html.0.contains("decode: measured 2 s, predicted 4 s"), "{}", html.0);
        let html = bar("x", f64::NAN, f64::INFINITY, |value| value.to_string());
        assert!(!html.0.contains("width=\"NaN") && !html.0.contains("width=\"inf"), "{}", html.0);
    }
}
