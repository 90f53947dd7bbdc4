//! `shaper describe`: all that is known of one task.

use std::{
    fmt::{self, Write as _},
    time::Duration,
};

use shaper_core::{
    gpu::CardRequest,
    idle,
    limits::{Limit, Limits},
    policy::{self, Given, Overruled, Subject},
    shrink::Status,
    spec::{Demand, OnNodeLost, Profile, TaskSpec},
    task::{Enforcement, ExitStatus, Origin, Owner, Phase, TaskStatus, Traffic, UnixNanos, Usage, Workload},
    units::{BitsPerSec, Bytes, Millicores},
};

use crate::{
    args::{Describe, Format},
    cluster::{ClusterPhase, ClusterTask, PolicyStatus},
    error::Error,
    output::{self, Column, printable},
    servers::{Found, Servers},
    show,
    time::{self, Utc},
};

pub(super) async fn describe(servers: &Servers, args: &Describe) -> Result<(), Error> {
    match servers.find(&args.id).await? {
        Found::Node(agent) => {
            let task = agent.get_task(&args.id).await?;
            match args.output {
                Format::Text => output::print(&text(&task, time::now())),
                Format::Json => output::print_json(&task),
                Format::Yaml => output::print_yaml(&task),
            }
        }
        Found::Cluster(broker, task) => match args.output {
            Format::Text => {
                let policies = broker.list_policies().await?;
                output::print(&(cluster_text(&task, time::now()) + &settings(&task, &policies)))
            }
            Format::Json => output::print_json(&task),
            Format::Yaml => output::print_yaml(&task),
        },
    }
}

fn cluster_text(task: &ClusterTask, now: UnixNanos) -> String {
    let ClusterTask {
        spec,
        owner,
        attempt,
        phase,
        node,
        submitted_at,
        revision: _,
        cancel_requested,
        on_node,
        reserved,
        gpu_cards,
    } = task;
    let TaskSpec {
        profile,
        command,
        env: _,
        cwd,
        name,
        namespace,
        labels,
        limits,
        run_as,
        retries,
        on_node_lost,
        gpus,
        image,
    } = spec;
    let Profile { task_id, demand, priority, estimated_runtime_seconds } = profile;
    let mut text = String::new();
    field(&mut text, "Task", &format!("{task_id} (attempt {attempt}, {retries} retries)"));
    field(&mut text, "Name", &format!("{namespace}/{name}"));
    field(&mut text, "Phase", &cluster_ended(phase, *cancel_requested, now));
    if let Some(node) = node {
        field(&mut text, "Node", node);
    }
    field(&mut text, "Priority", &priority.to_string());
    if let Some(seconds) = estimated_runtime_seconds {
        field(&mut text, "Estimate", &format!("{seconds} s"));
    }
    if *on_node_lost == OnNodeLost::Rerun {
        field(&mut text, "Lost node", "ended there, and run again elsewhere");
    }
    let CardRequest { count, model } = gpus;
    let model = if model.is_empty() { String::new() } else { format!(" of a model `{model}`") };
    let asked = match (count, demand.gpu_memory) {
        (1.., _) => Some(format!("{count} to itself{model}")),
        (0, Some(_)) => Some(format!("a part of one{model}")),
        (0, None) => None,
    };
    match asked {
        Some(asked) if gpu_cards.is_empty() => field(&mut text, "GPU cards", &asked),
        Some(asked) => field(&mut text, "GPU cards", &format!("{gpu_cards} ({asked})")),
        None => {}
    }
    // What is not said is the image's.
    let said = |text: &str| if text.is_empty() { "the image's".to_owned() } else { text.to_owned() };
    if let Some(image) = image {
        field(&mut text, "Image", image.as_str());
    }
    field(&mut text, "Command", &said(&command_line(command)));
    field(&mut text, "Directory", &said(cwd));
    let run_as = run_as.as_ref().map(|run_as| Owner { uid: run_as.uid, gid: run_as.gid });
    field(&mut text, "Runs as", &credentials(&run_as.unwrap_or(*owner)));
    field(&mut text, "Owner", &credentials(owner));
    if !labels.is_empty() {
        let labels: Vec<String> = labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
        field(&mut text, "Labels", &labels.join(", "));
    }
    field(&mut text, "Submitted", &format!("{} ({} ago)", Utc(*submitted_at), time::age(*submitted_at, now)));
    section(&mut text, "Resources", &requests(demand, limits));
    if let Some(Demand { cpu, memory, .. }) = reserved {
        let less =
            format!("{cpu} cores and {memory}, for others need the room: see `shaper explain {task_id}`");
        field(&mut text, "Reserved", &less);
    }
    if let Some(task) = on_node {
        let title = format!("Limits on {}, as last reported", node.as_deref().unwrap_or("its node"));
        section(&mut text, &printable(&title), &self::limits(task));
        shrink(&mut text, task.shrink.as_ref(), now);
        idle(&mut text, task.idle.as_ref());
        section(&mut text, "Usage", &usage_table(&task.usage));
        notes(&mut text, &task.notes);
    }
    text
}

/// What the policies give a task that is not over.
fn settings(task: &ClusterTask, policies: &[PolicyStatus]) -> String {
    if task.is_over() {
        return String::new();
    }
    let policies = policies.iter().map(|status| &status.policy);
    let (mut text, mut lines) = (String::new(), String::new());
    for Given { setting, policy, overruled } in policy::resolve(policies, &Subject::of(&task.spec)) {
        let (name, says) = (&policy.policy_name, setting.shown(policy).unwrap_or_default());
        // Writing to a String does not fail.
        let _ = writeln!(lines, "{setting}: {says}, from {}", printable(name));
        for Overruled { policy: other, rule } in overruled {
            let _ =
                writeln!(lines, "  not from {}: {} {rule}", printable(&other.policy_name), printable(name));
        }
    }
    if !lines.is_empty() {
        section(&mut text, "Policies", &lines);
    }
    text
}

fn cluster_ended(phase: &ClusterPhase, cancel_requested: bool, now: UnixNanos) -> String {
    let shown = match phase {
        ClusterPhase::Pending { reason } if !reason.is_empty() => format!("Pending: {reason}"),
        ClusterPhase::Ended { status, at } => ended(&Phase::Ended { status: status.clone(), at: *at }, now),
        phase => show::cluster_phase(phase),
    };
    let over = matches!(phase, ClusterPhase::Ended { .. } | ClusterPhase::Cancelled);
    if cancel_requested && !over { format!("{shown} (is to end)") } else { shown }
}

/// What a task asks for, and what it may have at most.
fn requests(demand: &Demand, limits: &Limits) -> String {
    fn requested<T: fmt::Display>(amount: Option<T>) -> String {
        amount.map_or_else(|| "-".into(), |amount| amount.to_string())
    }
    /// Where none is given, the node and the policies decide.
    fn limit<T: Copy + fmt::Display>(limit: Limit<T>) -> String {
        requested(limit.at())
    }
    let Demand { cpu, memory, gpu_memory, network, storage_io } = demand;
    let columns = [Column::Text("RESOURCE"), Column::Number("REQUEST"), Column::Number("LIMIT")];
    let ingress = limits.net_ingress.at().map(|it| ["network_ingress".into(), "-".into(), it.to_string()]);
    let rows = [
        ["cpu".into(), cpu.to_string(), limit(limits.cpu)],
        ["cpu_weight".into(), "-".into(), requested(limits.cpu_weight)],
        ["memory".into(), memory.to_string(), limit(limits.memory)],
        ["gpu_memory".into(), requested(*gpu_memory), limit(limits.gpu_memory)],
        ["network".into(), requested(*network), limit(limits.net_egress)],
        ["storage_io".into(), requested(*storage_io), limit(limits.storage_io)],
        ["storage_io_weight".into(), "-".into(), requested(limits.storage_io_weight)],
        ["storage_io_latency".into(), "-".into(), limit(limits.storage_io_latency)],
    ];
    output::table(columns, rows.into_iter().chain(ingress))
}

fn text(task: &TaskStatus, now: UnixNanos) -> String {
    let TaskStatus {
        task_id,
        attempt,
        owner,
        runs_as,
        origin,
        workload,
        adopted_by,
        phase,
        pid,
        cgroup,
        created_at,
        limits: _,
        enforcement: _,
        usage,
        shrink,
        idle,
        // It is among the notes.
        oom_kill: _,
        notes,
    } = task;
    let mut text = String::new();
    let mut field = |name: &str, value: &str| field(&mut text, name, value);
    field("Task", &format!("{task_id} (attempt {attempt})"));
    field("Phase", &ended(phase, now));
    field("Origin", &origin_of(origin));
    if let Some(rule) = adopted_by {
        field("By rule", rule.as_str());
    }
    if let Some(workload) = workload {
        field("Workload", &workload_of(workload));
    }
    field("Runs as", &credentials(runs_as));
    field("Owner", &credentials(owner));
    if let Some(pid) = pid {
        field("PID", &pid.to_string());
    }
    field("Cgroup", cgroup);
    field("Created", &format!("{} ({} ago)", Utc(*created_at), time::age(*created_at, now)));
    section(&mut text, "Limits", &limits(task));
    self::shrink(&mut text, shrink.as_ref(), now);
    self::idle(&mut text, idle.as_ref());
    section(&mut text, "Usage", &usage_table(usage));
    self::notes(&mut text, notes);
    text
}

fn field(text: &mut String, name: &str, value: &str) {
    // Writing to a String does not fail.
    let _ = writeln!(text, "{:<11}{}", format!("{name}:"), printable(value));
}

fn notes(text: &mut String, notes: &[String]) {
    if !notes.is_empty() {
        let notes: String = notes.iter().map(|note| format!("{}\n", printable(note))).collect();
        section(text, "Notes", &notes);
    }
}

fn shrink(text: &mut String, shrink: Option<&Status>, now: UnixNanos) {
    if let Some(shrink) = shrink {
        let line = format!("{shrink} (since {} ago)\n", time::age(shrink.began_at, now));
        section(text, "Memory limit below use", &line);
    }
}

fn idle(text: &mut String, idle: Option<&idle::Status>) {
    if let Some(idle) = idle {
        section(text, "Idle memory", &format!("{idle}\n"));
    }
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
        Origin::Launched { command } => command_line(command),
        Origin::Adopted => "adopted".into(),
        Origin::Entered { command } => format!("entered by itself: {}", command_line(command)),
    }
}

fn workload_of(Workload { name, namespace, labels }: &Workload) -> String {
    let labels: String = labels.iter().map(|(name, value)| format!(", {name}={value}")).collect();
    format!("{namespace}/{name}{labels}")
}

fn command_line(command: &[String]) -> String {
    command.iter().map(|word| shell_word(word)).collect::<Vec<_>>().join(" ")
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
        let of_devices = show::io_of_devices(task).filter(|_| resource == show::resource::STORAGE_IO);
        let mut rows: Vec<[String; 4]> = show::enforcement(task, resource)
            .chain(of_devices)
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
        egress_granted_bps,
        cpu_throttled_ns: _,
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
    let mut rows = vec![
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
    if let Some(granted) = egress_granted_bps {
        rows.push(["may send".into(), BitsPerSec(*granted).to_string(), none(), none()]);
    }
    output::table(columns, rows)
}
