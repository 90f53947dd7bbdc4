//! Figures that tests measure anyway, for whoever wants them: `cargo xtask bench io` reads them from the VM's console.

/// Prints a figure, beside its goal if it has one.
pub fn tell(metric: &str, value: f64, unit: &str, goal: &str, ok: bool) {
    let value = (value * 1e4).round() / 1e4;
    let row = serde_json::json!({ "metric": metric, "value": value, "unit": unit, "goal": goal, "ok": ok });
    println!("shaper-vm: figure {row}");
}
