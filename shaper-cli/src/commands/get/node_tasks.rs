//! Tasks of the agent of this node: what runs, and what it uses.

use shaper_core::task::{TaskStatus, UnixNanos};

use crate::{
    args::GetTasks,
    client::Client,
    error::Error,
    output::{self, Column},
    show, time,
};

pub(super) async fn list(client: &Client, args: &GetTasks) -> Result<(), Error> {
    let mut tasks = Vec::with_capacity(args.ids.len());
    if args.ids.is_empty() {
        tasks = client.list_tasks().await?;
        tasks.sort_by(|a, b| a.task_id.cmp(&b.task_id));
    }
    for id in &args.ids {
        tasks.push(client.get_task(id).await?);
    }
    super::show(args.output, &tasks, "tasks", |wide| {
        let now = time::now();
        if wide { wide_table(&tasks, now) } else { table(&tasks, now) }
    })
}

fn table(tasks: &[TaskStatus], now: UnixNanos) -> String {
    output::table(COLUMNS, tasks.iter().map(|task| row(task, now)))
}

fn wide_table(tasks: &[TaskStatus], now: UnixNanos) -> String {
    let [id, phase, user, cpu, memory, net_out, net_in, age] = COLUMNS;
    let (pid, attempt) = (Column::Number("PID"), Column::Number("ATTEMPT"));
    let (weight, cgroup) = (Column::Number("WEIGHT"), Column::Text("CGROUP"));
    let columns = [id, phase, user, cpu, memory, net_out, net_in, age, pid, attempt, weight, cgroup];
    let rows = tasks.iter().map(|task| {
        let [id, phase, user, cpu, memory, net_out, net_in, age] = row(task, now);
        let pid = task.pid.map_or_else(|| "-".into(), |pid| pid.to_string());
        let weight = task.limits.cpu_weight.map_or_else(|| "-".into(), |weight| weight.to_string());
        let (attempt, cgroup) = (task.attempt.to_string(), task.cgroup.clone());
        [id, phase, user, cpu, memory, net_out, net_in, age, pid, attempt, weight, cgroup]
    });
    output::table(columns, rows)
}

const COLUMNS: [Column; 8] = [
    Column::Text("ID"),
    Column::Text("PHASE"),
    Column::Text("USER"),
    Column::Number("CPU"),
    Column::Number("MEMORY"),
    Column::Number("NET OUT"),
    Column::Number("NET IN"),
    Column::Number("AGE"),
];

fn row(task: &TaskStatus, now: UnixNanos) -> [String; 8] {
    let show::Now { cpu, memory, net_out, net_in } = show::Now::of(task);
    let age = time::age(task.created_at, now);
    let user = show::user(&task.runs_as);
    [task.task_id.to_string(), show::phase(&task.phase), user, cpu, memory, net_out, net_in, age]
}

#[cfg(test)]
mod tests {
    use shaper_core::{
        limits::{Limit, Limits},
        task::{ExitStatus, Origin, Owner, Phase, Usage},
        units::{BitsPerSec, Bytes, Millicores, Weight},
    };

    use super::*;

    const SECOND: UnixNanos = 1_000_000_000;

    fn etl() -> TaskStatus {
        TaskStatus {
            task_id: "etl.load".parse().unwrap(),
            attempt: 2,
            owner: Owner { uid: 0, gid: 0 },
            runs_as: Owner { uid: 0, gid: 0 },
            origin: Origin::Launched { command: vec!["etl".into()] },
            workload: None,
            adopted_by: None,
            phase: Phase::Running,
            pid: Some(4711),
            cgroup: "/sys/fs/cgroup/shaper/etl.load.2".into(),
            created_at: 100 * SECOND,
            limits: Limits {
                cpu: Limit::At(Millicores(500)),
                cpu_weight: Weight::new(300),
                memory: Limit::At(Bytes(512 << 20)),
                net_egress: Limit::At(BitsPerSec(10_000_000)),
                storage_io: Limit::Unlimited,
                storage_io_weight: None,
                storage_io_latency: Limit::Unlimited,
                reclaim_idle: None,
                net_egress_guarantee: None,
                net_egress_weight: None,
                net_ingress: Limit::Unlimited,
                gpu_cards: None,
                gpu_memory: Limit::Unlimited,
                gpu_power: Limit::Unlimited,
            },
            enforcement: vec![],
            usage: Usage {
                memory_bytes: Some(120 << 20),
                cpu_now_millicores: 480,
                egress_now_bps: 9_840_000,
                ingress_now_bps: 128_000,
                egress_granted_bps: None,
                ..Usage::default()
            },
            shrink: None,
            idle: None,
            oom_kill: None,
            notes: vec![],
        }
    }

    #[test]
    fn a_task_in_a_row() {
        let expected = "\
ID        PHASE    USER       CPU         MEMORY         NET OUT   NET IN    AGE
etl.load  Running  root  0.48/0.5  120MiB/512MiB  9.8Mbit/10Mbit  128kbit  3m12s
";
        assert_eq!(table(&[etl()], 292 * SECOND), expected);
    }

    #[test]
    fn a_wide_row_adds_where_it_runs() {
        let ended = TaskStatus {
            task_id: "web".parse().unwrap(),
            phase: Phase::Ended { status: ExitStatus::Code(3), at: 0 },
            pid: None,
            limits: Limits::default(),
            usage: Usage::default(),
            ..etl()
        };
        let expected = "\
ID        PHASE      USER       CPU         MEMORY         NET OUT   NET IN    AGE   PID  ATTEMPT  WEIGHT  CGROUP
etl.load  Running    root  0.48/0.5  120MiB/512MiB  9.8Mbit/10Mbit  128kbit  3m12s  4711        2     300  /sys/fs/cgroup/shaper/etl.load.2
web       Exited(3)  root     0/max          -/max        0bit/max     0bit  3m12s     -        2       -  /sys/fs/cgroup/shaper/etl.load.2
";
        assert_eq!(wide_table(&[etl(), ended], 292 * SECOND), expected);
    }
}
