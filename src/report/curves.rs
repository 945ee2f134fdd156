//! Lines over a common horizontal axis as SVG: up to four panels, both axes logarithmic, one line for each name in each panel.

use std::fmt::Write as _;

use super::html::escaped;

/// Width and height of the picture.
const SIZE: (f64, f64) = (960.0, 700.0);
/// Width and height of what a panel's axes span.
const PANEL: (f64, f64) = (390.0, 236.0);
/// Left and top edges of columns and rows of panels.
const COLUMNS: [f64; 2] = [70.0, 550.0];
const ROWS: [f64; 2] = [96.0, 410.0];
/// Decades that an axis shows at most.
const DECADES_MAX: f64 = 9.0;
/// Colours that can be told apart on white and on black, and ways to dash, for those who can not.
const COLOURS: [&str; 8] = ["#2b7bd6", "#d9780f", "#2f9e5b", "#c24b8a", "#7c68d8", "#9a7b12", "#1f9aa8", "#c8503c"];
const DASHES: [&str; 4] = ["none", "7 3", "2 3", "9 3 2 3"];

/// One quantity.
#[derive(Clone, Debug, PartialEq)]
pub struct Panel {
    /// Above it, with its unit.
    pub title: String,
    /// A line for each name: horizontal and vertical, both above 0.
    pub lines: Vec<Vec<(f64, f64)>>,
}

/// What is drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Curves {
    /// Above everything.
    pub title: String,
    /// Below the axes.
    pub x_title: String,
    /// What the lines are called.
    pub names: Vec<String>,
    /// Four at most.
    pub panels: Vec<Panel>,
}

/// A logarithmic axis: decimal logarithms of both ends, and where they are drawn.
struct Axis {
    ends: (f64, f64),
    at: (f64, f64),
}

impl Axis {
    /// Over some values.
    fn new(values: impl Iterator<Item = f64>, at: (f64, f64)) -> Self {
        let logs = values.filter(|v| v.is_finite() && *v > 0.0).map(f64::log10);
        let (low, high) = logs.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        let (low, high) = if low <= high { (low, high) } else { (0.0, 1.0) };
        let low = low.max(high - DECADES_MAX);
        // Half a decade at least, so that a flat line does not fill its panel with noise.
        let spare = (0.5 - (high - low)).max(0.0) / 2.0 + 0.03 * (high - low);
        Self { ends: (low - spare, high + spare), at }
    }

    fn place(&self, value: f64) -> f64 {
        let part = (value.log10() - self.ends.0) / (self.ends.1 - self.ends.0);
        self.at.0 + part.clamp(0.0, 1.0) * (self.at.1 - self.at.0)
    }

    /// Powers of ten; over few decades 2 and 5 times those as well, over many only some.
    fn ticks(&self) -> Vec<f64> {
        let span = self.ends.1 - self.ends.0;
        let multiples: &[f64] = if span > 2.5 { &[1.0] } else { &[1.0, 2.0, 5.0] };
        #[expect(clippy::cast_possible_truncation, reason = "logarithms of f64 are small")]
        let decades = self.ends.0.floor() as i32..=self.ends.1.ceil() as i32;
        let all = decades.flat_map(|decade| multiples.iter().map(move |m| m * 10_f64.powi(decade)));
        all.filter(|tick| (self.ends.0..=self.ends.1).contains(&tick.log10())).collect()
    }
}

/// A number as ticks have it: 50k, 2M, 0.01.
fn short(value: f64) -> String {
    match value {
        v if v >= 0.9995e9 => format!("{}G", v / 1e9),
        v if v >= 0.9995e6 => format!("{}M", (v / 1e4).round() / 100.0),
        v if v >= 0.9995e3 => format!("{}k", (v / 10.0).round() / 100.0),
        v if v >= 0.001 => format!("{}", (v * 1e6).round() / 1e6),
        v => format!("{v:.0e}"),
    }
}

impl Curves {
    /// The picture as a file of its own, on white.
    pub fn svg(&self) -> String {
        let (width, height) = SIZE;
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} \
             {height}\" font-family=\"sans-serif\" font-size=\"12\" fill=\"#222\" color=\"#222\">\n\
             <rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n{}</svg>\n",
            self.draw()
        )
    }

    /// The picture as a part of a page, in the page's colours.
    pub(super) fn inline_svg(&self) -> String {
        let (width, height) = SIZE;
        format!(
            "<svg class=\"plot\" role=\"img\" viewBox=\"0 0 {width} {height}\" font-size=\"12\" \
             fill=\"currentColor\">\n{}</svg>\n",
            self.draw()
        )
    }

    fn draw(&self) -> String {
        let mut svg = String::new();
        let _ = writeln!(svg, "<text x=\"{}\" y=\"22\" font-size=\"15\">{}</text>", COLUMNS[0], escaped(&self.title));
        self.draw_names(&mut svg);
        for (at, panel) in self.panels.iter().enumerate().take(4) {
            let corner = (COLUMNS[at % 2], ROWS[at / 2]);
            self.draw_panel(&mut svg, panel, corner);
        }
        svg
    }

    /// What the lines are called, with a piece of each.
    fn draw_names(&self, svg: &mut String) {
        let (mut x, mut y) = (COLUMNS[0], 42.0);
        for (at, name) in self.names.iter().enumerate() {
            let width = 40.0 + 7.0 * name.chars().count() as f64;
            if x + width > SIZE.0 - 10.0 && x > COLUMNS[0] {
                (x, y) = (COLUMNS[0], y + 16.0);
            }
            let _ = writeln!(
                svg,
                "<line x1=\"{x:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" {}/><text x=\"{:.1}\" y=\"{y:.1}\">{}</text>",
                y - 4.0,
                x + 24.0,
                y - 4.0,
                stroke(at),
                x + 30.0,
                escaped(name)
            );
            x += width;
        }
    }

    fn draw_panel(&self, svg: &mut String, panel: &Panel, (left, top): (f64, f64)) {
        let (right, bottom) = (left + PANEL.0, top + PANEL.1);
        let all = || self.panels.iter().flat_map(|panel| panel.lines.iter().flatten());
        let x = Axis::new(all().map(|point| point.0), (left, right));
        let y = Axis::new(panel.lines.iter().flatten().map(|point| point.1), (bottom, top));
        let _ = writeln!(
            svg,
            "<text x=\"{left}\" y=\"{:.1}\" font-weight=\"bold\">{}</text>",
            top - 8.0,
            escaped(&panel.title)
        );
        for tick in x.ticks() {
            let at = x.place(tick);
            grid(svg, (at, top), (at, bottom));
            let _ = writeln!(
                svg,
                "<text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                bottom + 16.0,
                short(tick)
            );
        }
        for tick in y.ticks() {
            let at = y.place(tick);
            grid(svg, (left, at), (right, at));
            let _ = writeln!(
                svg,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                left - 6.0,
                at + 4.0,
                short(tick)
            );
        }
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" opacity=\"0.7\">{}</text>",
            (left + right) / 2.0,
            bottom + 32.0,
            escaped(&self.x_title)
        );
        if panel.lines.iter().all(Vec::is_empty) {
            let _ = writeln!(
                svg,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" opacity=\"0.7\">none</text>",
                (left + right) / 2.0,
                (top + bottom) / 2.0
            );
        }
        for (at, line) in panel.lines.iter().enumerate() {
            let points: Vec<String> =
                line.iter().map(|point| format!("{:.1},{:.1}", x.place(point.0), y.place(point.1))).collect();
            if !points.is_empty() {
                let _ = writeln!(svg, "<polyline points=\"{}\" fill=\"none\" {}/>", points.join(" "), stroke(at));
            }
        }
    }
}

fn stroke(at: usize) -> String {
    let colour = COLOURS[at % COLOURS.len()];
    let dash = DASHES[at / COLOURS.len() % DASHES.len()];
    format!("stroke=\"{colour}\" stroke-width=\"2\" stroke-dasharray=\"{dash}\"")
}

fn grid(svg: &mut String, from: (f64, f64), to: (f64, f64)) {
    let _ = writeln!(
        svg,
        "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"currentColor\" opacity=\"0.15\"/>",
        from.0, from.1, to.0, to.1
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Curves {
        let line = |power: i32| [1e3, 1e4, 1e5].map(|x: f64| (x, x.powi(power))).to_vec();
        Curves {
            title: "a & b".to_owned(),
            x_title: "tokens".to_owned(),
            names: vec!["full".to_owned(), "<kivi4>".to_owned()],
            panels: vec![
                Panel { title: "up".to_owned(), lines: vec![line(1), line(2)] },
                Panel { title: "nothing".to_owned(), lines: vec![vec![], vec![]] },
            ],
        }
    }

    /// The points of every line that is drawn.
    fn drawn(svg: &str) -> Vec<Vec<(f64, f64)>> {
        let number = |text: &str| text.parse::<f64>().expect("a coordinate");
        let of = |part: &str| {
            let points = part.split('"').next().expect("a list").split(' ');
            points.map(|p| p.split_once(',').map(|(x, y)| (number(x), number(y))).expect("a point")).collect()
        };
        svg.split("points=\"").skip(1).map(of).collect()
    }

    #[test]
    fn lines_lie_where_their_values_do() {
        let svg = example().svg();
        let lines = drawn(&svg);
        assert_eq!(lines.len(), 2, "two lines, and none in the empty panel");
        for line in &lines {
            assert!(line.windows(2).all(|w| w[1].0 > w[0].0 && w[1].1 < w[0].1), "rising to the right: {line:?}");
            let inside = |p: &(f64, f64)| (70.0..=460.0).contains(&p.0) && (96.0..=332.0).contains(&p.1);
            assert!(line.iter().all(inside), "inside the panel: {line:?}");
        }
        // A decade is as wide as the next.
        let steps: Vec<f64> = lines[0].windows(2).map(|w| w[1].0 - w[0].0).collect();
        assert!((steps[0] - steps[1]).abs() < 0.3, "{steps:?}");
        let ratio = (lines[1][0].1 - lines[1][2].1) / (lines[0][0].1 - lines[0][2].1);
        assert!((ratio - 2.0).abs() < 0.02, "the square rises twice as far: {ratio}");
    }

    #[test]
    fn names_are_text_and_ticks_are_short() {
        let svg = example().svg();
        assert!(svg.contains("a &amp; b") && svg.contains("&lt;kivi4&gt;") && svg.contains(">none<"), "{svg}");
        assert!(svg.contains(">1k<") && svg.contains(">10k<") && svg.contains(">100k<"), "{svg}");
        assert_eq!([0.0005, 0.02, 7.0, 4e3, 2.5e6, 1e9].map(short), ["5e-4", "0.02", "7", "4k", "2.5M", "1G"], "ticks");
        assert!(example().inline_svg().contains("currentColor"), "in the page's colours");
    }
}
