//! Pictures of reports, in SVG: tokens per second over the number of sequences, time of the
//! mixture-of-experts layer over the number of tokens, and how near its kernels come to the
//! device's ceilings. Other programs' figures are drawn beside those of the same shape.

use plotters::{coord::Shift, prelude::*};

use super::{DECODE_PEERS, KernelRow, LAYER_PEERS, MoeLayerRow, Peer, Report};

/// A picture that cannot be drawn.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlotError {
    /// Nothing to draw.
    #[error("the reports have neither generation rows nor layer rows; run `moewe bench -o json`")]
    Empty,
    /// The drawing library's words.
    #[error("the picture cannot be drawn: {0}")]
    Draw(String),
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn std::error::Error + Send + Sync>>;

/// One line of a chart: its name and its points.
type Series = (String, Vec<(f64, f64)>);

const WIDTH: u32 = 900;
const HEIGHT: u32 = 440;
const BAR_HEIGHT: u32 = 22;
/// Kernels that take less than this share of a layer are not drawn.
const LEAST_SHARE: f64 = 0.03;

/// Draws all that `reports` hold, one panel below the other.
///
/// # Errors
/// [`PlotError`].
pub fn plot(reports: &[Report]) -> Result<String, PlotError> {
    let mut panels: Vec<(u32, Panel<'_>)> = Vec::new();
    for report in reports {
        if report.rows.iter().any(|row| row.n_gen > 0) {
            panels.push((HEIGHT, Panel::Decode(report)));
        }
        if !report.moe_layer.is_empty() {
            panels.push((HEIGHT, Panel::Layer(report)));
            let n_bars = report.moe_layer.iter().map(|row| 1 + bars(row).count() as u32);
            panels.push((90 + BAR_HEIGHT * n_bars.sum::<u32>(), Panel::Kernels(report)));
        }
    }
    let height = panels.iter().map(|panel| panel.0).sum();
    if height == 0 {
        return Err(PlotError::Empty);
    }
    let mut svg = String::new();
    let drawn = || -> Drawn {
        let root = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        root.fill(&WHITE)?;
        let mut rest = root.clone();
        for (height, panel) in panels {
            let (area, below) = rest.split_vertically(height);
            panel.draw(&area)?;
            rest = below;
        }
        root.present()?;
        Ok(())
    }();
    drawn.map_err(|e| PlotError::Draw(e.to_string()))?;
    Ok(svg)
}

enum Panel<'a> {
    Decode(&'a Report),
    Layer(&'a Report),
    Kernels(&'a Report),
}

impl Panel<'_> {
    fn draw(&self, area: &Area<'_>) -> Drawn {
        match self {
            Self::Decode(report) => decode(area, report),
            Self::Layer(report) => layer(area, report),
            Self::Kernels(report) => kernels(area, report),
        }
    }
}

/// Peers' lines for a report's shape.
fn peers(all: &[Peer], report: &Report) -> Vec<Series> {
    let same = |peer: &&Peer| {
        peer.shape == report.model && peer.layers.is_none_or(|layers| layers == report.layers)
    };
    let points = |peer: &Peer| peer.points.iter().map(|&(x, y)| (x as f64, y)).collect();
    all.iter().filter(same).map(|peer| (format!("{}, H200", peer.name), points(peer))).collect()
}

fn decode(area: &Area<'_>, report: &Report) -> Drawn {
    let mut series: Vec<Series> = Vec::new();
    for row in report.rows.iter().filter(|row| row.n_gen > 0) {
        let name = format!("moewe {}", row.test);
        let at = series.iter().position(|line| line.0 == name).unwrap_or_else(|| {
            series.push((name, Vec::new()));
            series.len() - 1
        });
        series[at].1.push((row.batch as f64, row.mean()));
    }
    let n_own = series.len();
    series.extend(peers(DECODE_PEERS, report));
    let most = series.iter().flat_map(|line| &line.1).map(|p| p.1).fold(1.0, f64::max);
    let last = series.iter().flat_map(|line| &line.1).map(|p| p.0).fold(2.0, f64::max);
    let mut chart = builder(area, "tokens per second", report)?
        .build_cartesian_2d((1.0..last).log_scale().base(2.0), 0.0..most * 1.1)?;
    let whole = |n: &f64| format!("{n:.0}");
    chart
        .configure_mesh()
        .x_desc("sequences at a time")
        .x_label_formatter(&whole)
        .y_label_formatter(&whole)
        .light_line_style(TRANSPARENT)
        .draw()?;
    lines(&mut chart, series, n_own)
}

fn layer(area: &Area<'_>, report: &Report) -> Drawn {
    let own = report.moe_layer.iter().map(|row| (row.tokens as f64, row.microseconds)).collect();
    // Nothing can be faster than reading the weights once, or than the products themselves.
    let (copy, matmul) = (report.ceilings.copy_bytes_per_s, report.ceilings.matmul_flops);
    let floor = |row: &MoeLayerRow| (row.weight_bytes / copy).max(row.flops / matmul) * 1e6;
    let floor = report.moe_layer.iter().map(|row| (row.tokens as f64, floor(row))).collect();
    let mut series: Vec<Series> =
        vec![("moewe".into(), own), ("this device's ceilings".into(), floor)];
    let n_own = series.len();
    series.extend(peers(LAYER_PEERS, report));
    let points = || series.iter().flat_map(|line| &line.1);
    let last = points().map(|p| p.0).fold(2.0, f64::max);
    let least = points().map(|p| p.1).fold(f64::MAX, f64::min).max(0.1);
    let most = points().map(|p| p.1).fold(1.0, f64::max);
    let mut chart = builder(area, "mixture-of-experts layer, microseconds", report)?
        .build_cartesian_2d(
            (1.0..last).log_scale().base(2.0),
            (least * 0.8..most * 1.2).log_scale(),
        )?;
    let whole = |n: &f64| format!("{n:.0}");
    chart
        .configure_mesh()
        .x_desc("tokens at a time")
        .x_label_formatter(&whole)
        .y_label_formatter(&whole)
        .light_line_style(TRANSPARENT)
        .draw()?;
    lines(&mut chart, series, n_own)
}

fn builder<'a, 'b>(
    area: &'a Area<'b>,
    what: &str,
    report: &Report,
) -> Result<ChartBuilder<'a, 'b, SVGBackend<'b>>, Box<dyn std::error::Error + Send + Sync>> {
    area.draw(&Text::new(report.title(), (16, 12), ("sans-serif", 13)))?;
    let mut builder = ChartBuilder::on(area);
    builder
        .margin(16)
        .margin_top(36)
        .caption(what, ("sans-serif", 18))
        .x_label_area_size(40)
        .y_label_area_size(64);
    Ok(builder)
}

/// Draws lines with points; the first `n_own` are moewe's, thick, the others thin.
fn lines<'a, X, Y>(
    chart: &mut ChartContext<'a, SVGBackend<'a>, Cartesian2d<X, Y>>,
    series: Vec<Series>,
    n_own: usize,
) -> Drawn
where
    X: Ranged<ValueType = f64>,
    Y: Ranged<ValueType = f64>,
{
    for (i, (name, points)) in series.into_iter().enumerate() {
        let color = Palette99::pick(i).to_rgba();
        let style = color.stroke_width(if i < n_own { 3 } else { 1 });
        chart
            .draw_series(LineSeries::new(points.clone(), style))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], style));
        let dots = points.into_iter().map(|point| Circle::new(point, 3, color.filled()));
        chart.draw_series(dots)?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    Ok(())
}

/// Kernels worth a bar.
fn bars(row: &MoeLayerRow) -> impl Iterator<Item = &KernelRow> {
    let total: f64 = row.kernels.iter().map(|kernel| kernel.microseconds).sum();
    row.kernels.iter().filter(move |kernel| kernel.microseconds >= LEAST_SHARE * total)
}

fn kernels(area: &Area<'_>, report: &Report) -> Drawn {
    let what = "kernels: share of the copy or matrix product ceiling, whichever is larger";
    let n_bars: usize = report.moe_layer.iter().map(|row| 1 + bars(row).count()).sum();
    let mut chart =
        builder(area, what, report)?.build_cartesian_2d(0.0..100.0, n_bars as f64..0.0)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_labels(0)
        .x_label_formatter(&|share| format!("{share:.0} %"))
        .light_line_style(TRANSPARENT)
        .draw()?;
    let font = ("sans-serif", 12);
    let mut y = 0.0;
    for row in &report.moe_layer {
        let text = format!("{} tokens, {:.0} us", row.tokens, row.microseconds);
        chart.draw_series([Text::new(text, (0.5, y + 0.3), (font.0, 13, FontStyle::Bold))])?;
        y += 1.0;
        for kernel in bars(row) {
            let bandwidth = kernel.bandwidth() / report.ceilings.copy_bytes_per_s * 100.0;
            let rate = kernel.rate() / report.ceilings.matmul_flops * 100.0;
            let color = Palette99::pick(if rate > bandwidth { 1 } else { 0 }).mix(0.45);
            let (share, unit) = match rate > bandwidth {
                true => (rate, format!("{:.3} TFLOP/s", kernel.rate() / 1e12)),
                false => (bandwidth, format!("{:.1} GB/s", kernel.bandwidth() / 1e9)),
            };
            let bar = [(0.0, y + 0.1), (share.min(100.0), y + 0.9)];
            chart.draw_series([Rectangle::new(bar, color.filled())])?;
            let text = format!("{}: {:.1} us, {unit}", kernel.label, kernel.microseconds);
            chart.draw_series([Text::new(text, (1.0, y + 0.28), font)])?;
            y += 1.0;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{Ceilings, Memory, Row};

    fn report() -> Report {
        let row = |test: &str, n_gen, batch, rate| Row {
            test: test.into(),
            n_prompt: 512,
            n_gen,
            n_depth: 0,
            batch,
            samples_ts: vec![rate],
        };
        let kernel = |label: &str, microseconds| KernelRow {
            label: label.into(),
            microseconds,
            bytes: 4e7,
            flops: 1e9,
        };
        Report {
            version: "0".into(),
            model: "qwen3-30b-a3b".into(),
            layers: 12,
            weights: "w8a16".into(),
            device: "a card".into(),
            driver: "1".into(),
            ceilings: Ceilings { copy_bytes_per_s: 4e12, matmul_flops: 2e14 },
            memory: Memory {
                peak_bytes: 1,
                expert_bytes: 1,
                expert_bytes_f16: 2,
                expert_bytes_f32: 4,
            },
            rows: vec![row("tg128", 128, 1, 500.0), row("tg128", 128, 64, 6000.0)],
            moe_layer: vec![MoeLayerRow {
                tokens: 8,
                microseconds: 30.0,
                weight_bytes: 1e7,
                flops: 1e9,
                kernels: vec![kernel("expert_gemv gate_up", 20.0), kernel("too little", 0.1)],
            }],
        }
    }

    #[test]
    fn a_picture_holds_lines_bars_and_peers() {
        let text = serde_json::to_string(&report()).unwrap();
        let report: Report = serde_json::from_str(&text).unwrap();
        let svg = plot(&[report]).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        for part in ["a card", "moewe tg128", "llama.cpp Vulkan", "gate_up", "GB/s", "8 tokens"] {
            assert!(svg.contains(part), "{part}");
        }
        assert!(!svg.contains("too little"));
        let other = Report { model: "olmoe".into(), ..self::report() };
        assert!(!plot(&[other]).unwrap().contains("llama.cpp"));
    }

    #[test]
    fn nothing_to_draw_is_an_error() {
        let prompts = Report { rows: Vec::new(), moe_layer: Vec::new(), ..report() };
        assert!(matches!(plot(&[prompts]), Err(PlotError::Empty)));
        assert!(matches!(plot(&[]), Err(PlotError::Empty)));
    }
}
