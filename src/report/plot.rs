//! A plot of labelled points as SVG: a logarithmic axis below, and beside it one that is logarithmic or runs from 0 to 1.
//!
//! Lower is better in both directions, and points that no other one beats in both are joined by a line, up to the
//! guide. What a logarithmic axis has no place for, zero or far below everything else, is drawn hollow on the lower
//! edge.

use std::fmt::Write as _;

/// Width and height of the picture.
pub(super) const SIZE: (f64, f64) = (960.0, 640.0);
/// Left, top, right and bottom edge of the area that axes span.
pub(super) const AREA: (f64, f64, f64, f64) = (84.0, 52.0, 936.0, 578.0);
/// Decades of the vertical axis at most.
const DECADES_MAX: i32 = 7;
/// Width and height of a character of a label, about.
const LETTER: (f64, f64) = (7.1, 11.0);
/// Radius of a point.
const RADIUS: f64 = 4.0;

/// The colours of a picture.
#[derive(Clone, Copy, Debug)]
pub(super) struct Colours {
    ink: &'static str,
    paper: &'static str,
    grid: &'static str,
    point: &'static str,
    pub(super) front: &'static str,
    guide: &'static str,
}

/// Of a file of its own, which is shown on white.
pub(super) const OWN: Colours =
    Colours { ink: "#222", paper: "white", grid: "#e4e4e4", point: "#1f5fa8", front: "#9dbfe6", guide: "#888" };
/// Of the page around it.
const OF_PAGE: Colours = Colours {
    ink: "currentColor",
    paper: "var(--paper)",
    grid: "var(--grid)",
    point: "var(--point)",
    front: "var(--front)",
    guide: "var(--guide)",
};

impl Colours {
    /// What makes words readable over lines.
    fn halo(&self) -> String {
        format!("paint-order=\"stroke\" stroke=\"{}\" stroke-width=\"3\"", self.paper)
    }
}

/// A labelled point.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    /// Horizontal, above 0.
    pub x: f64,
    /// Vertical.
    pub y: f64,
    /// What stands beside it.
    pub label: String,
}

/// A labelled vertical line.
#[derive(Clone, Debug, PartialEq)]
pub struct Guide {
    /// Horizontal, above 0.
    pub x: f64,
    /// What stands beside it.
    pub label: String,
}

/// A vertical axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Logarithmic, over the points.
    Log,
    /// From 0 to 1, in percent.
    Part,
}

/// What is drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Plot {
    /// Above the axes.
    pub title: String,
    /// Below the horizontal axis.
    pub x_title: String,
    /// Beside the vertical axis.
    pub y_title: String,
    /// What the vertical axis shows.
    pub y_scale: Scale,
    /// Where a reference lies.
    pub guide: Option<Guide>,
    /// The points.
    pub points: Vec<Point>,
}

/// An axis.
#[derive(Clone, Copy, Debug)]
pub(super) struct Axis {
    pub(super) scale: Scale,
    /// Both ends: decimal logarithms, or values.
    pub(super) ends: (f64, f64),
    /// Where they are drawn.
    pub(super) at: (f64, f64),
}

impl Axis {
    fn measure(&self, value: f64) -> f64 {
        match self.scale {
            Scale::Log => value.log10(),
            Scale::Part => value,
        }
    }

    /// Whether it has a place for a value that is not below it.
    fn shows(&self, value: f64) -> bool {
        self.measure(value) >= self.ends.0
    }

    pub(super) fn place(&self, value: f64) -> f64 {
        let part = (self.measure(value) - self.ends.0) / (self.ends.1 - self.ends.0);
        // Negative values and NaN have no logarithm.
        let part = if part.is_nan() { 0.0 } else { part.clamp(0.0, 1.0) };
        self.at.0 + part * (self.at.1 - self.at.0)
    }

    /// The given multiples of powers of ten that lie on a logarithmic axis.
    fn ticks(&self, multiples: &[f64]) -> Vec<f64> {
        #[expect(clippy::cast_possible_truncation, reason = "logarithms of f64 are small")]
        let decades = self.ends.0.floor() as i32..=self.ends.1.ceil() as i32;
        let all = decades.flat_map(|decade| multiples.iter().map(move |m| m * 10_f64.powi(decade)));
        all.filter(|tick| (self.ends.0 - 1e-9..=self.ends.1 + 1e-9).contains(&tick.log10())).collect()
    }
}

/// A rectangle: left, top, right, bottom.
pub(super) type Area = (f64, f64, f64, f64);

fn overlap(a: &Area, b: &Area) -> bool {
    a.0 < b.2 && b.0 < a.2 && a.1 < b.3 && b.1 < a.3
}

impl Plot {
    /// The picture as a file of its own.
    pub fn svg(&self) -> String {
        let (width, height) = SIZE;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} \
             {height}\" font-family=\"sans-serif\" font-size=\"12\" fill=\"{}\">\n<rect width=\"{width}\" \
             height=\"{height}\" fill=\"{}\"/>\n",
            OWN.ink, OWN.paper
        );
        self.draw(&mut svg, &OWN);
        svg
    }

    /// The picture as a part of a page, in the page's colours and as wide as it wants.
    pub(super) fn inline_svg(&self) -> String {
        let (width, height) = SIZE;
        let ink = OF_PAGE.ink;
        let mut svg = format!(
            "<svg class=\"plot\" role=\"img\" viewBox=\"0 0 {width} {height}\" font-size=\"12\" fill=\"{ink}\">\n"
        );
        self.draw(&mut svg, &OF_PAGE);
        svg
    }

    fn draw(&self, svg: &mut String, colours: &Colours) {
        let (x, y) = (self.x_axis(), self.y_axis());
        self.draw_axes(svg, &x, &y, colours);
        let mut taken: Vec<Area> = Vec::new();
        if let Some(guide) = &self.guide {
            let at = x.place(guide.x);
            let dashed = format!("stroke=\"{}\" stroke-dasharray=\"5 4\"", colours.guide);
            line(svg, (at, AREA.1), (at, AREA.3), &dashed);
            let half = text_width(&guide.label) / 2.0;
            taken.push((at - half, AREA.1 + 1.0, at + half, AREA.1 + 15.0));
            text(svg, (at, AREA.1 + 12.0), "middle", &colours.halo(), &guide.label);
        }
        let places: Vec<(f64, f64)> = self.points.iter().map(|p| (x.place(p.x), y.place(p.y))).collect();
        self.draw_front(svg, &places, colours);
        self.draw_points(svg, &places, &y, &mut taken, colours);
        svg.push_str("</svg>\n");
    }

    /// Labels, then points over them, so that no label hides a point.
    pub(super) fn draw_points(
        &self,
        svg: &mut String,
        places: &[(f64, f64)],
        y: &Axis,
        taken: &mut Vec<Area>,
        colours: &Colours,
    ) {
        let room = RADIUS + 2.0;
        taken.extend(places.iter().map(|(px, py)| (px - room, py - room, px + room, py + room)));
        for (point, place) in self.points.iter().zip(places) {
            label(svg, *place, &point.label, taken, colours);
        }
        for (point, (px, py)) in self.points.iter().zip(places) {
            let stroke = colours.point;
            let fill = if y.shows(point.y) { stroke } else { colours.paper };
            let _ = writeln!(
                svg,
                "<circle cx=\"{px:.1}\" cy=\"{py:.1}\" r=\"{RADIUS}\" fill=\"{fill}\" stroke=\"{stroke}\"/>"
            );
        }
    }

    /// All points and the guide, with some room on both sides.
    fn x_axis(&self) -> Axis {
        let all = self.points.iter().map(|p| p.x).chain(self.guide.iter().map(|g| g.x));
        let logs = all.filter(|x| *x > 0.0).map(f64::log10);
        let (low, high) = logs.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), x| (l.min(x), h.max(x)));
        let ends = if low <= high { (low - 0.08, high + 0.12) } else { (0.0, 1.0) };
        Axis { scale: Scale::Log, ends, at: (AREA.0, AREA.2) }
    }

    /// Whole decades around the points, at most [`DECADES_MAX`] from above; or from 0 to 1, with some room for points at both.
    fn y_axis(&self) -> Axis {
        // Upside down: large values are at the top.
        let at = (AREA.3, AREA.1);
        if self.y_scale == Scale::Part {
            return Axis { scale: Scale::Part, ends: (-0.03, 1.06), at };
        }
        let logs = self.points.iter().map(|p| p.y).filter(|y| *y > 0.0 && y.is_finite()).map(f64::log10);
        let (low, high) = logs.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), y| (l.min(y), h.max(y)));
        let high = if high.is_finite() { (high + 0.02).ceil() } else { 1.0 };
        let low = if low.is_finite() { low.floor().max(high - f64::from(DECADES_MAX)) } else { 0.0 };
        Axis { scale: Scale::Log, ends: (low.min(high - 1.0), high), at }
    }

    pub(super) fn draw_axes(&self, svg: &mut String, x: &Axis, y: &Axis, colours: &Colours) {
        let (left, top, right, bottom) = AREA;
        let [grid, ink] = [colours.grid, colours.ink].map(|colour| format!("stroke=\"{colour}\""));
        for tick in x.ticks(&[1.0, 2.0, 5.0]) {
            let at = x.place(tick);
            line(svg, (at, top), (at, bottom), &grid);
            text(svg, (at, bottom + 18.0), "middle", "", &thousands(tick));
        }
        let ticks: Vec<(f64, String)> = match y.scale {
            Scale::Log => y.ticks(&[1.0]).into_iter().map(|tick| (tick, format!("{tick:.0e}"))).collect(),
            Scale::Part => (0..=5).map(|fifths| (f64::from(fifths) / 5.0, format!("{} %", fifths * 20))).collect(),
        };
        for (tick, words) in ticks {
            let at = y.place(tick);
            line(svg, (left, at), (right, at), &grid);
            text(svg, (left - 8.0, at + 4.0), "end", "", &words);
        }
        let frame = [((left, top), (left, bottom)), ((left, bottom), (right, bottom))];
        frame.into_iter().for_each(|(from, to)| line(svg, from, to, &ink));
        let middle = (f64::midpoint(left, right), f64::midpoint(top, bottom));
        text(svg, (middle.0, 30.0), "middle", "font-size=\"15\"", &self.title);
        text(svg, (middle.0, bottom + 44.0), "middle", "font-size=\"13\"", &self.x_title);
        let turned = format!("font-size=\"13\" transform=\"rotate(-90 22 {})\"", middle.1);
        text(svg, (22.0, middle.1), "middle", &turned, &self.y_title);
    }

    /// Joins the points that no other one beats.
    fn draw_front(&self, svg: &mut String, places: &[(f64, f64)], colours: &Colours) {
        // What lies beyond the guide is beaten by what the guide stands for.
        let end = self.guide.as_ref().map_or(f64::INFINITY, |guide| guide.x);
        let candidate = |i: &usize| !self.points[*i].y.is_nan() && self.points[*i].x <= end;
        let mut order: Vec<usize> = (0..self.points.len()).filter(candidate).collect();
        let key = |i: &usize| (self.points[*i].x, self.points[*i].y);
        order.sort_by(|a, b| key(a).0.total_cmp(&key(b).0).then(key(a).1.total_cmp(&key(b).1)));
        let mut best = f64::INFINITY;
        order.retain(|i| {
            let better = self.points[*i].y < best;
            best = best.min(self.points[*i].y);
            better
        });
        let points: Vec<_> = order.iter().map(|i| format!("{:.1},{:.1}", places[*i].0, places[*i].1)).collect();
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"2\"/>",
            points.join(" "),
            colours.front
        );
    }
}

/// Puts a label where it hides nothing, as near to its point as there is room.
fn label(svg: &mut String, (x, y): (f64, f64), words: &str, taken: &mut Vec<Area>, colours: &Colours) {
    let (w, h) = (text_width(words), LETTER.1);
    let box_at = |dx: f64, dy: f64| {
        let left = if dx > 0.0 { x + dx } else { x + dx - w };
        let left = if dx == 0.0 { x - w / 2.0 } else { left };
        (left, y + dy - h / 2.0, left + w, y + dy + h / 2.0)
    };
    let inside = |a: &Area| a.0 > AREA.0 && a.1 > AREA.1 && a.2 < SIZE.0 && a.3 < AREA.3;
    let near = [(8.0, 0.0), (-8.0, 0.0), (0.0, -12.0), (0.0, 12.0), (7.0, -9.0), (7.0, 9.0), (-7.0, -9.0), (-7.0, 9.0)];
    let far = (2..9).flat_map(|ring| {
        let r = f64::from(ring) * 12.0;
        [(r, -r), (r, r), (-r, -r), (-r, r), (0.0, -r), (0.0, r), (r, 0.0), (-r, 0.0)]
    });
    let free = |(dx, dy): &(f64, f64)| {
        let area = box_at(*dx, *dy);
        inside(&area) && !taken.iter().any(|other| overlap(&area, other))
    };
    let (dx, dy) = near.into_iter().chain(far).find(free).unwrap_or(near[0]);
    let area = box_at(dx, dy);
    if dx.abs().max(dy.abs()) > 12.0 {
        let end = (x.clamp(area.0, area.2), y.clamp(area.1, area.3));
        line(svg, (x, y), end, &format!("stroke=\"{}\" stroke-width=\"0.7\"", colours.guide));
    }
    text(svg, (area.0, area.3 - 1.5), "start", &colours.halo(), words);
    taken.push(area);
}

fn text_width(words: &str) -> f64 {
    words.chars().count() as f64 * LETTER.0
}

fn line(svg: &mut String, from: (f64, f64), to: (f64, f64), style: &str) {
    let ((x1, y1), (x2, y2)) = (from, to);
    let _ = writeln!(svg, "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" {style}/>");
}

fn text(svg: &mut String, (x, y): (f64, f64), anchor: &str, style: &str, words: &str) {
    let words: String = words.chars().map(escaped).collect();
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" {style}>{words}</text>");
}

/// A character as XML text; control characters have no form there.
fn escaped(c: char) -> String {
    match c {
        '&' => "&amp;".to_owned(),
        '<' => "&lt;".to_owned(),
        '>' => "&gt;".to_owned(),
        c if c.is_control() => "\u{FFFD}".to_owned(),
        c => c.to_string(),
    }
}

/// A tick of a count: thousands as k.
fn thousands(tick: f64) -> String {
    match tick {
        t if t >= 1e6 => format!("{}M", t / 1e6),
        t if t >= 1e3 => format!("{}k", t / 1e3),
        t => format!("{t}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot(points: &[(f64, f64, &str)]) -> Plot {
        let point = |&(x, y, label): &(f64, f64, &str)| Point { x, y, label: label.to_owned() };
        Plot {
            title: "a < b & c".to_owned(),
            x_title: "bytes".to_owned(),
            y_title: "nats".to_owned(),
            y_scale: Scale::Log,
            guide: Some(Guide { x: 20_000.0, label: "full".to_owned() }),
            points: points.iter().map(point).collect(),
        }
    }

    #[test]
    fn a_picture_holds_every_point_and_its_label_within_its_edges() {
        let svg =
            plot(&[(3000.0, 0.2, "kivi2"), (6000.0, 1e-3, "kivi4"), (7000.0, 0.5, "worse"), (4e4, 1e-9, "f32")]).svg();
        assert_eq!(svg.matches("<circle").count(), 4, "points");
        for words in ["kivi2", "kivi4", "worse", "full", "bytes", "nats", "a &lt; b &amp; c", ">5k<", ">1e-2<"] {
            assert!(svg.contains(words), "'{words}' in {svg}");
        }
        let front = svg.split("<polyline points=\"").nth(1).and_then(|s| s.split('"').next()).expect("a front");
        assert_eq!(
            front.split(' ').count(),
            2,
            "neither what is beaten in both directions nor what is larger than full"
        );
        let shown = svg.split("cx=\"").skip(1).map(|s| s.split('"').next().expect("quoted").parse::<f64>());
        assert!(shown.into_iter().all(|x| (AREA.0..AREA.2).contains(&x.expect("a number"))), "{svg}");
    }

    #[test]
    fn what_has_no_place_on_a_logarithmic_axis_is_hollow() {
        let svg =
            plot(&[(3000.0, 0.2, "a"), (6000.0, 0.0, "zero"), (7000.0, 1e-30, "tiny"), (8000.0, f64::NAN, "nan")])
                .svg();
        assert_eq!(svg.matches("fill=\"white\" stroke=\"#1f5fa8\"").count(), 3, "{svg}");
        assert!(!svg.contains("\"NaN") && !svg.contains("inf"), "{svg}");
        assert!(plot(&[]).svg().contains("nats"), "no points, no panic");
    }

    #[test]
    fn a_picture_in_a_page_has_only_the_colours_of_the_page() {
        let plot = plot(&[(3000.0, 0.2, "a"), (6000.0, 0.0, "zero")]);
        let inline = plot.inline_svg();
        assert!(!inline.contains("=\"#") && !inline.contains("white") && !inline.contains("http"), "{inline}");
        assert!(plot.svg().contains("=\"#") && !plot.svg().contains("var("), "a file has its own");
        assert_eq!(inline.matches("<circle").count(), plot.svg().matches("<circle").count(), "the same points");
    }

    #[test]
    fn parts_lie_between_0_and_1() {
        let plot =
            Plot { y_scale: Scale::Part, ..plot(&[(3000.0, 0.4, "some"), (6000.0, 0.0, "none"), (7e3, 1.0, "all")]) };
        let svg = plot.svg();
        assert_eq!(svg.matches("fill=\"white\" stroke=\"#1f5fa8\"").count(), 0, "0 has a place: {svg}");
        assert!([">0 %<", ">40 %<", ">100 %<"].iter().all(|tick| svg.contains(tick)), "{svg}");
        let axis = plot.y_axis();
        let [none, all] = [0.0, 1.0].map(|part| axis.place(part));
        assert!(AREA.1 < all && all < none && none < AREA.3, "{all} and {none} should lie inside");
        assert!(!axis.shows(f64::NAN), "no number has no place");
    }

    #[test]
    fn labels_do_not_cover_one_another() {
        let (mut svg, mut taken) = (String::new(), Vec::new());
        (0..12).for_each(|_| label(&mut svg, (400.0, 300.0), "k:kivi2,v:rot4", &mut taken, &OWN));
        for (i, a) in taken.iter().enumerate() {
            assert!(taken[i + 1..].iter().all(|b| !overlap(a, b)), "label {i} lies over another");
        }
    }
}
