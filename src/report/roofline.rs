//! Rooflines: what kernels reach against what the device gives, over their FLOP per byte (Williams et al., 2009).

use std::fmt::Write as _;

use super::plot::{AREA, Axis, OWN, Plot, Point, SIZE, Scale};
use crate::eval::kernels::{KernelRow, Outcome, Roof};

/// One picture per kernel, below one another, as one file.
pub(super) fn svg(rows: &[KernelRow], roof: &Roof, device: &str) -> String {
    let mut kernels: Vec<&str> = Vec::new();
    // What moves bytes alone has no place over FLOP per byte.
    for row in rows.iter().filter(|row| matches!(row.outcome, Outcome::Measured(f) if f.flop > 0.0)) {
        if !kernels.contains(&row.kernel) {
            kernels.push(row.kernel);
        }
    }
    let (width, height) = (SIZE.0, SIZE.1 * kernels.len() as f64);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} \
         {height}\" font-family=\"sans-serif\" font-size=\"12\" fill=\"#222\">\n<rect width=\"{width}\" \
         height=\"{height}\" fill=\"white\"/>\n"
    );
    for (at, kernel) in kernels.into_iter().enumerate() {
        let _ = writeln!(svg, "<g transform=\"translate(0 {})\">", SIZE.1 * at as f64);
        draw(&mut svg, &picture(rows, kernel, device), roof);
        svg.push_str("</g>\n");
    }
    svg.push_str("</svg>\n");
    svg
}

/// The points of a kernel.
fn picture(rows: &[KernelRow], kernel: &str, device: &str) -> Plot {
    let of_kernel = rows.iter().filter(|row| row.kernel == kernel);
    let point = |row: &KernelRow| {
        let Outcome::Measured(figures) = &row.outcome else { return None };
        let codec = row.codec.as_deref().map_or_else(String::new, |codec| format!(" {codec}"));
        let candidate = if row.chosen { String::new() } else { format!(" [{}]", row.candidate) };
        let label = format!("{}{codec}{candidate}", row.shape);
        Some(Point { x: figures.intensity(), y: figures.flop_per_s, label })
    };
    Plot {
        title: format!("{kernel} on {device}"),
        x_title: "FLOP per byte".to_owned(),
        y_title: "FLOP/s".to_owned(),
        y_scale: Scale::Log,
        guide: None,
        points: of_kernel.filter_map(point).collect(),
    }
}

fn draw(svg: &mut String, plot: &Plot, roof: &Roof) {
    let ridge = roof.flop_per_s / roof.read_bytes_per_s;
    let ends = |values: &mut dyn Iterator<Item = f64>, spare: f64| {
        let logs = values.filter(|v| *v > 0.0 && v.is_finite()).map(f64::log10);
        let (low, high) = logs.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        (low - spare, high + spare)
    };
    let x_ends = ends(&mut plot.points.iter().map(|p| p.x).chain([ridge]), 0.3);
    let x = Axis { scale: Scale::Log, ends: x_ends, at: (AREA.0, AREA.2) };
    let (first, last) = (10_f64.powf(x_ends.0), 10_f64.powf(x_ends.1));
    let tops = [first * roof.read_bytes_per_s, roof.flop_per_s];
    let y_ends = ends(&mut plot.points.iter().map(|p| p.y).chain(tops), 0.2);
    let y = Axis { scale: Scale::Log, ends: y_ends, at: (AREA.3, AREA.1) };
    plot.draw_axes(svg, &x, &y, &OWN);
    let corners = [(first, tops[0]), (ridge, roof.flop_per_s), (last, roof.flop_per_s)];
    let corners = corners.map(|(fx, fy)| format!("{:.1},{:.1}", x.place(fx), y.place(fy)));
    let _ = writeln!(
        svg,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"2\"/>",
        corners.join(" "),
        OWN.front
    );
    let places: Vec<_> = plot.points.iter().map(|p| (x.place(p.x), y.place(p.y))).collect();
    plot.draw_points(svg, &places, &y, &mut Vec::new(), &OWN);
}

#[cfg(test)]
mod tests {
    use super::super::kernel_record::tests::row;
    use super::*;

    #[test]
    fn points_lie_below_the_roof_and_each_kernel_has_a_picture() {
        let roof = Roof { read_bytes_per_s: 1e12, copy_bytes_per_s: 1e12, flop_per_s: 1e13 };
        let rows = [row("decode", "a", 0.9), row("decode", "b", 0.5), row("merge_states", "c", 0.3)];
        let svg = svg(&rows, &roof, "a device");
        assert_eq!(svg.matches("<polyline").count(), 2, "a roof per kernel: {svg}");
        assert_eq!(svg.matches("<circle").count(), 3, "points: {svg}");
        assert!(svg.contains("decode on a device") && svg.contains("FLOP per byte"), "{svg}");
        let number = |text: &str, name: &str| -> f64 {
            let rest = text.split(&format!("{name}=\"")).nth(1).expect("it is there");
            rest.split('"').next().and_then(|n| n.parse().ok()).expect("a number")
        };
        // The same FLOP per byte at 0.9 and 0.5 of the roof: the first stands higher.
        let heights: Vec<f64> = svg.split("<circle").skip(1).map(|circle| number(circle, "cy")).collect();
        assert!(heights[0] < heights[1], "{heights:?}");
        let roof_line = svg.split("<polyline points=\"").nth(1).and_then(|s| s.split('"').next()).expect("a roof");
        let top = roof_line.split([' ', ',']).nth(3).and_then(|n| n.parse::<f64>().ok()).expect("a number");
        assert!(top < heights[0], "the roof is above all: {roof_line}");
    }
}
