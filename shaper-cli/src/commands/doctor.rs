//! `shaper doctor`: what this node offers, and what degrades.

use std::fmt::Write as _;

use shaper_core::doctor::{Availability, Report, Rung};

use crate::{
    args::{Doctor, Format},
    client::Client,
    error::Error,
    output::{self, Column, printable},
};

pub(super) async fn doctor(client: &Client, args: &Doctor) -> Result<(), Error> {
    let report = client.doctor().await?;
    match args.output {
        Format::Text => output::print(&text(report)),
        Format::Json => output::print_json(&report),
        Format::Yaml => output::print_yaml(&report),
    }
}

fn text(report: Report) -> String {
    let Report { kernel, node, cgroups, cgroup_root, bpffs_dir, uplinks, gpus, rungs } = report;
    let listed = |list: Vec<String>| if list.is_empty() { "none".into() } else { list.join(", ") };
    let mut text = String::new();
    let fields = [
        ("Node", node),
        ("Kernel", kernel),
        ("Cgroups", format!("{cgroups}, below {cgroup_root}")),
        ("BPF pins", bpffs_dir),
        ("Uplinks", listed(uplinks)),
        ("GPUs", listed(gpus)),
    ];
    for (name, value) in fields {
        // Writing to a String does not fail.
        let _ = writeln!(text, "{:<10}{}", format!("{name}:"), printable(&value));
    }
    let columns = [
        Column::Text("FEATURE"),
        Column::Text("STATUS"),
        Column::Text("USED FOR"),
        Column::Text("WITHOUT IT"),
    ];
    let rows = rungs.into_iter().map(|Rung { feature, used_for, availability, degrades_to }| {
        let status = match availability {
            Availability::Available => "available".into(),
            Availability::Missing { evidence } => format!("missing: {evidence}"),
            Availability::Unusable { reason } => format!("unusable: {reason}"),
        };
        [feature, status, used_for, degrades_to]
    });
    let _ = write!(text, "\n{}", output::table(columns, rows));
    text
}
