//! `shaper describe`: all that is known of one task.

use std::{fmt::Write as _, time::Duration};

use shaper_core::{
    task::{Enforcement, ExitStatus, Origin, Owner, Phase, TaskStatus, Traffic, UnixNanos, Usage},
    units::{BitsPerSec, Bytes, Millicores},
};

use crate::{
    args::{Describe, Format},
    client::Client,
    error::Error,
    output::{self, Column, printable},
    show,
    time::{self, Utc},
};

pub(super) async fn describe(client: &Client, args: &Describe) -> Result<(), Error> {
    let task = client.get_task(&args.id).await?;
    match args.output {
        Format::Text => output::print(&text(&task, time::now())),
        Format::Json => output::print_json(&task),
    }
}

fn text(task: &TaskStatus, now: UnixNanos) -> String {
    let TaskStatus {
        task_id,
        attempt,
        owner,
        runs_as,
        origin,
        phase,
        pid,
        cgroup,
        created_at,
        limits: _,
        enforcement: _,
        usage,
        notes,
    } = task;
    let mut text = String::new();
    let mut field = |name: &str, value: &str| {
        // Writing to a String does not fail.
        let _ = writeln!(text, "{:<11}{}", format!("{name}:"), printable(value));
    };
    field("Task", &format!("{task_id} (attempt {attempt})"));
    field("Phase", &ended(phase, now));
    field("Origin", &origin_of(origin));
    field("Runs as", &credentials(runs_as));
    field("Owner", &credentials(owner));
    if let Some(pid) = pid {
        field("PID", &pid.to_string());
    }
    field("Cgroup", cgroup);
    field("Created", &format!("{} ({} ago)", Utc(*created_at), time::age(*created_at, now)));
    section(&mut text, "Limits", &limits(task));
    section(&mut text, "Usage", &usage_table(usage));
    if !notes.is_empty() {
        let notes: String = notes.iter().map(|note| format!("{}\n", printable(note))).collect();
        section(&mut text, "Notes", &notes);
    }
    text
}

fn section(text: &mut String, title: &str, body: &str) {
    let _ = writeln!(text, "\n{title}:");
    for line in body.lines() {
        let _ = writeln!(text, "  {line}");
    }
}

fn ended(phase: &Phase, now: UnixNanos) -> String {
    let shown = show::phase(phase);
    match phase {
        Phase::Running => shown,
        Phase::Ended { status: ExitStatus::NotStarted { stage, error, code: _ }, at } => {
            format!("{shown}, {} ago: {stage}: {error}", time::age(*at, now))
        }
        Phase::Ended { status: _, at } => format!("{shown}, {} ago", time::age(*at, now)),
    }
}

fn origin_of(origin: &Origin) -> String {
    match origin {
        Origin::Launched { command } => {
            command.iter().map(|word| shell_word(word)).collect::<Vec<_>>().join(" ")
        }
        Origin::Adopted => "adopted".into(),
    }
}

/// A word as a shell would have to be given it.
fn shell_word(word: &str) -> String {
    let plain = |letter: char| letter.is_alphanumeric() || "-_./=:,+@%".contains(letter);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

fn credentials(owner: &Owner) -> String {
    format!("{} (uid {}, gid {})", show::user(owner), owner.uid, owner.gid)
}

fn limits(task: &TaskStatus) -> String {
    let columns = [
        Column::Text("RESOURCE"),
        Column::Number("LIMIT"),
        Column::Text("ENFORCED BY"),
        Column::Text("IN FORCE, READ BACK"),
    ];
    let rows = show::limits(&task.limits).into_iter().flat_map(|show::NamedLimit { resource, limit }| {
        let mut rows: Vec<[String; 4]> = show::enforcement(task, resource)
            .map(|Enforcement { resource, mechanism, in_force }| {
                [resource.clone(), limit.clone(), mechanism.clone(), in_force.clone()]
            })
            .collect();
        if rows.is_empty() {
            rows.push([resource.into(), limit, "-".into(), "-".into()]);
        }
        rows
    });
    output::table(columns, rows)
}

fn usage_table(usage: &Usage) -> String {
    let Usage {
        at_monotonic_ns: _,
        cpu_time_ns,
        egress,
        ingress,
        uplink_egress,
        memory_bytes,
        cpu_now_millicores,
        egress_now_bps,
        ingress_now_bps,
    } = usage;
    let columns =
        [Column::Text("RESOURCE"), Column::Number("NOW"), Column::Number("TOTAL"), Column::Number("PACKETS")];
    let none = || "-".to_owned();
    let memory = memory_bytes.map_or_else(none, |bytes| Bytes(bytes).to_string());
    let traffic = |name: &str, now: Option<&u64>, Traffic { bytes, packets }: &Traffic| {
        let now = now.map_or_else(none, |bits| BitsPerSec(*bits).to_string());
        [name.to_owned(), now, Bytes(*bytes).to_string(), packets.to_string()]
    };
    let cpu_time = Duration::from_nanos(*cpu_time_ns);
    let rows = [
        [
            "cpu".into(),
            format!("{} cores", Millicores(*cpu_now_millicores)),
            format!("{}.{:03} s", cpu_time.as_secs(), cpu_time.subsec_millis()),
            none(),
        ],
        ["memory".into(), memory, none(), none()],
        traffic("sent", Some(egress_now_bps), egress),
        traffic("sent by uplink", None, uplink_egress),
        traffic("received", Some(ingress_now_bps), ingress),
    ];
    output::table(columns, rows)
}
