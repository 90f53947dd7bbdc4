//! The trade-off of both rules, drawn.

use std::path::Path;

use anyhow::Result;
use plotters::prelude::*;

use super::replay::Outcome;

const SIZE: (u32, u32) = (960, 420);
const OURS: RGBColor = RGBColor(0x1f, 0x77, 0xb4);
const VPA: RGBColor = RGBColor(0xd6, 0x27, 0x28);

/// Two charts beside each other: unserved demand, and samples over the limit, by slack.
pub(super) fn draw(path: &Path, ours: &[Outcome], vpa: &[Outcome]) -> Result<()> {
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let (left, right) = area.split_horizontally(SIZE.0 / 2);
    chart(&left, "Unserved demand, % of use", ours, vpa, |outcome| outcome.unserved)?;
    chart(&right, "Samples over the limit, %", ours, vpa, |outcome| outcome.over)?;
    area.present()?;
    Ok(())
}

fn chart(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    title: &str,
    ours: &[Outcome],
    vpa: &[Outcome],
    figure: fn(&Outcome) -> f64,
) -> Result<()> {
    let points = |outcomes: &[Outcome]| -> Vec<(f64, f64)> {
        let mut points: Vec<_> = outcomes.iter().map(|outcome| (outcome.slack, figure(outcome))).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        points
    };
    let (ours, vpa) = (points(ours), points(vpa));
    let every = || ours.iter().chain(&vpa);
    let least = every().map(|point| point.0).fold(f64::INFINITY, f64::min).floor();
    let most = every().map(|point| point.0).fold(0.0, f64::max).ceil();
    let low = every().map(|point| point.1).fold(f64::INFINITY, f64::min).max(0.01);
    let high = every().map(|point| point.1).fold(0.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 16))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(52)
        .build_cartesian_2d(least..most, (low / 1.5..high * 1.5).log_scale())?;
    chart.configure_mesh().x_desc("Slack: unused share of the limit, %").light_line_style(WHITE).draw()?;
    for (points, colour, name) in
        [(&vpa, VPA, "VPA's rule, p50 to p99"), (&ours, OURS, "shaper, other prices")]
    {
        chart
            .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)).point_size(3))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    chart.configure_series_labels().border_style(BLACK.mix(0.3)).background_style(WHITE).draw()?;
    Ok(())
}
