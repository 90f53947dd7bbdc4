//! Nodes over time, and how long tasks waited, drawn.

use std::path::Path;

use anyhow::Result;
use plotters::prelude::*;

use super::world::Outcome;

const SIZE: (u32, u32) = (960, 420);
const FIRST: RGBColor = RGBColor(0x1f, 0x77, 0xb4);
const ALONE: RGBColor = RGBColor(0xd6, 0x27, 0x28);

/// Two charts beside each other: how many nodes there were, and which share of the tasks waited for longer than that.
pub(super) fn draw(path: &Path, alone: &Outcome, first: &Outcome) -> Result<()> {
    let both = [(alone, ALONE, "requests alone"), (first, FIRST, "reserving less first")];
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let (left, right) = area.split_horizontally(SIZE.0 / 2);
    let days = |seconds: u64| seconds as f64 / 86_400.0;
    let last =
        both.iter().flat_map(|(outcome, ..)| outcome.nodes.last()).map(|at| days(at.0)).fold(0.0, f64::max);
    let most = both.iter().map(|(outcome, ..)| outcome.most_nodes()).max().unwrap_or(1);
    let mut chart = ChartBuilder::on(&left)
        .caption("Nodes of 64 cores", ("sans-serif", 16))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(52)
        .build_cartesian_2d(0.0..last, 0.0..f64::from(most) * 1.05)?;
    chart.configure_mesh().x_desc("Days").light_line_style(WHITE).draw()?;
    for (outcome, colour, name) in both {
        // A step each: as it was until then, and as it is from then on.
        let steps = outcome
            .nodes
            .windows(2)
            .flat_map(|two| [(days(two[1].0), f64::from(two[0].1)), (days(two[1].0), f64::from(two[1].1))]);
        chart
            .draw_series(LineSeries::new(steps, colour.stroke_width(1)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    chart.configure_series_labels().border_style(BLACK.mix(0.3)).background_style(WHITE).draw()?;

    let longest = both.iter().flat_map(|(outcome, ..)| &outcome.waits).copied().fold(60.0, f64::max);
    let mut chart = ChartBuilder::on(&right)
        .caption("Tasks that waited for longer, %", ("sans-serif", 16))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(52)
        .build_cartesian_2d(0.0..longest, 0.0..100.0)?;
    chart.configure_mesh().x_desc("Seconds").light_line_style(WHITE).draw()?;
    for (outcome, colour, name) in both {
        let mut waits = outcome.waits.clone();
        waits.sort_by(f64::total_cmp);
        let count = waits.len() as f64;
        let points = waits.iter().enumerate().map(|(at, wait)| (*wait, 100.0 - 100.0 * at as f64 / count));
        chart
            .draw_series(LineSeries::new(points, colour.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    chart.configure_series_labels().border_style(BLACK.mix(0.3)).background_style(WHITE).draw()?;
    area.present()?;
    Ok(())
}
