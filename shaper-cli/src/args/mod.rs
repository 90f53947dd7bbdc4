//! The command line: what can be said, and its help.

mod cluster;
mod context;
mod exec;
mod pki;
mod policy;
mod top;

use std::{path::PathBuf, str::FromStr};

use clap::{ArgGroup, Parser, Subcommand, ValueEnum};
use shaper_core::{
    gpu::CardSet,
    id::TaskId,
    limits::{Limit, LimitsChange},
    spec::Image,
    units::{BitsPerSec, Bytes, Iops, Micros, Millicores, Milliwatts, ParseQuantityError, Weight},
};

pub(crate) use self::{
    cluster::{
        Apply, Explain, GetEvents, GetNodes, GetPolicies, GetScale, NodeCommand, ProfileCommand, ProfileOf,
        Submit,
    },
    context::ContextCommand,
    exec::Exec,
    pki::{Pki, PkiCommand, PkiInit, PkiIssue, PkiJoin, PkiRenew, PkiRotate, PkiShow, PkiToken, Validity},
    policy::{DryRun, PolicyCommand, PolicyGet},
    top::{SortKey, Top},
};
use crate::{servers::BrokerAddress, time::Span, users::UserSpec};

const AFTER_HELP: &str = "\
Examples:
  shaper run --cpu 0.5 --net 10mbit -- ./backup.sh    run with limits, stay until it ends
  shaper run -d --id etl --memory 2Gi -- ./etl        run in the background
  shaper get tasks                                    what runs, and what it uses
  shaper top                                          watch where its CPUs, memory and IO go
  shaper set etl --cpu 2 --net max                    change limits while it runs
  shaper logs -f etl                                  follow its output
  shaper release --all                                lift every limit, leave no trace
  shaper submit profile.json -- python3 train.py      have a broker place a task
  shaper explain etl                                  why it is where it is
  shaper apply -f policy.yaml                         change what the cluster does by itself

Servers are those of the options, else of the environment, else of the context (`shaper context`),
else the usual sockets. `get`, `describe`, `logs`, `wait` and `cancel` ask the broker where there is one, and otherwise the
agent of this node; with --socket and without --broker, they ask that agent.

Exit codes:
  0  done
  1  the request failed, or the agent or broker is not available
  2  wrong usage or invalid input, or the request was refused: nothing was changed
`shaper run`, `shaper wait` and `shaper submit --wait` exit with the task's own code once it has
ended: 128+N for signal N, 127 for a command that was not found, 126 for one that could not be
started, 125 where nobody saw the end.";

const RUN_AFTER_HELP: &str = "\
The task gets PATH, HOME, USER, LANG and TERM of the caller, and what --env adds; with --user, HOME
and USER are those of that user. Standard input is not passed on.

In the foreground, SIGINT or SIGTERM cancels the task with a grace of 10 s, a second one kills it,
and a third one leaves it to the agent. If the agent is restarted meanwhile, the task goes on and so
does its output here.

Examples:
  shaper run -- make -j8
  shaper run --cpu 1.5 --memory 512Mi -- python3 train.py
  shaper run --net 10mbit --env TOKEN --env MODE=fast -- ./upload.sh
  shaper run -d --id nightly --user backup -- ./nightly.sh
  sudo shaper run --user 1000:1000 --cwd /srv/data -- ./index

Exit codes: those of the task (128+N for signal N, 127 not found, 126 not started, 125 unknown);
1 and 2 also where shaper itself failed or was refused, with a line `shaper: ...`.";

const SET_AFTER_HELP: &str = "\
All of the changes are made, or none. What is not named stays as it is. Operator only.

Examples:
  shaper set etl --cpu 2                  at most two cores
  shaper set etl --net 50mbit --cpu max   50 Mbit/s on the wire, CPU without a limit
  shaper set etl --cpu-weight 300         three times the usual share where CPUs are contended
  shaper set etl --reclaim-idle           take away the memory that it does not use
  shaper set etl --io 500                 500 reads and writes a second, all devices together";

/// Reshape the resources of tasks while they run.
#[derive(Debug, Parser)]
#[command(name = "shaper", version, after_help = AFTER_HELP, max_term_width = 100)]
pub(crate) struct Args {
    /// Socket of the agent [default: /run/shaper/agent.sock]
    #[arg(long, global = true, value_name = "PATH", env = "SHAPER_SOCKET", hide_env_values = true)]
    pub(crate) socket: Option<PathBuf>,

    /// Socket of the broker, or https://HOST:PORT; of several, of which one leads, all, separated by commas; empty for none
    /// [default: /run/shaper/broker.sock, where it exists]
    #[arg(long, global = true, value_name = "ADDRESSES", env = "SHAPER_BROKER", hide_env_values = true)]
    pub(crate) broker: Option<BrokerAddress>,

    /// Directory with your certificate, for a broker at https://HOST:PORT (see `shaper pki`)
    #[arg(long, global = true, value_name = "DIR", env = "SHAPER_TLS_DIR", hide_env_values = true)]
    pub(crate) tls_dir: Option<PathBuf>,

    /// Cluster to talk to, of those that `shaper context set` keeps [default: the current one]
    #[arg(long, global = true, value_name = "NAME", env = "SHAPER_CONTEXT", hide_env_values = true)]
    pub(crate) context: Option<String>,

    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a command as a task; without limits, those of its measured profile are used, where a broker has one
    Run(Run),
    /// Become a task of its own, and then a command: the same process, in its own cgroup with these limits
    Exec(Exec),
    /// Have the broker place a task on a node
    Submit(Submit),
    /// List objects
    #[command(subcommand)]
    Get(Get),
    /// Show all that is known of a task
    Describe(Describe),
    /// Show why a task is where it is: the decisions about it
    Explain(Explain),
    /// Print the output of a task
    Logs(Logs),
    /// Change limits of a running task
    Set(Set),
    /// Wait until a task has ended, and exit with its code
    Wait(Wait),
    /// End a task: SIGTERM first, SIGKILL after a grace
    Cancel(Cancel),
    /// Put an existing cgroup under management
    Adopt(Adopt),
    /// Lift the limits of tasks and forget them; their processes go on
    Release(Release),
    /// Create or replace policies
    Apply(Apply),
    /// Show, delete, compare and roll back policies
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Say whether a node takes tasks, and what became of it
    #[command(subcommand)]
    Node(NodeCommand),
    /// Show what tasks need, by what those of the same name have used
    #[command(subcommand)]
    Profile(ProfileCommand),
    /// Show what this node and its tasks use, each second
    Top(Top),
    /// Print the address of the broker's web page, which opens it once
    Ui,
    /// Show what was done to tasks of this node: who changed what, why, and what came of it
    Ledger(Ledger),
    /// Show what this node offers, and what degrades
    Doctor(Doctor),
    /// Make and replace the certificates by which broker, nodes and people know each other over TCP
    Pki(Pki),
    /// Keep the addresses of several clusters under names, and choose among them
    #[command(subcommand)]
    Context(ContextCommand),
    /// Print what has a shell complete `shaper` and its options
    #[command(after_help = COMPLETIONS_AFTER_HELP)]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages of all commands
    Man {
        /// Directory to write them into; it is made
        #[arg(value_name = "DIR")]
        directory: PathBuf,
    },
}

const COMPLETIONS_AFTER_HELP: &str = "\
Debian's packages bring them. Elsewhere:
  shaper completions bash > ~/.local/share/bash-completion/completions/shaper
  shaper completions zsh > ~/.zfunc/_shaper                 (a directory of $fpath)
  shaper completions fish > ~/.config/fish/completions/shaper.fish";

/// The limits that a command line names.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct LimitArgs {
    /// CPU time per time, in cores: 0.5, 2, 250m
    #[arg(long, value_name = "CORES|max", value_parser = limit(Millicores::parse), help_heading = "Limits")]
    cpu: Option<Limit<Millicores>>,
    /// Share of contended CPUs, 1 to 10000; usual is 100
    #[arg(long, value_name = "N", value_parser = Weight::parse, help_heading = "Limits")]
    cpu_weight: Option<Weight>,
    /// Memory: 512Mi, 1.5Gi, 64M
    #[arg(long, value_name = "SIZE|max", value_parser = limit(Bytes::parse), help_heading = "Limits")]
    memory: Option<Limit<Bytes>>,
    /// Sent on the wire: 100mbit, 1.5gbit, 500kbit
    #[arg(long, value_name = "RATE|max", value_parser = limit(BitsPerSec::parse), help_heading = "Limits")]
    net: Option<Limit<BitsPerSec>>,
    /// Of what the node sends: so much in any case, 0 for nothing. Only where the agent divides its network
    /// (--capacity network=RATE)
    #[arg(long, value_name = "RATE|0", value_parser = guarantee, help_heading = "Limits")]
    net_guarantee: Option<BitsPerSec>,
    /// Share of the rest of what the node sends, 1 to 10000; usual is 100. Likewise
    #[arg(long, value_name = "N", value_parser = Weight::parse, help_heading = "Limits")]
    net_weight: Option<Weight>,
    /// Received from the network by TCP and UDP together: 20M, 1gbit
    #[arg(long, value_name = "RATE|max", value_parser = limit(BitsPerSec::parse), help_heading = "Limits")]
    net_in: Option<Limit<BitsPerSec>>,
    /// Reads and writes a second, of all block devices together: 500
    #[arg(long, value_name = "N|max", value_parser = limit(Iops::parse), help_heading = "Limits")]
    io: Option<Limit<Iops>>,
    /// Share of contended block devices, 1 to 10000; usual is 100
    #[arg(long, value_name = "N", value_parser = Weight::parse, help_heading = "Limits")]
    io_weight: Option<Weight>,
    /// Promise that 99 of 100 reads and writes take at most so long, on each device: 5ms, 500us. Others are held back
    #[arg(long, value_name = "TIME|max", value_parser = limit(Micros::parse_latency), help_heading = "Limits")]
    io_latency: Option<Limit<Micros>>,
    /// GPU cards that the task may open, by number as `shaper doctor` shows them: 0,2. Others are refused to it
    #[arg(long, value_name = "LIST|none", value_parser = CardSet::from_str, help_heading = "Limits")]
    cards: Option<CardSet>,
    /// Memory of each of those cards: 20Gi. `shaper describe` says what holds the task to it
    #[arg(long, value_name = "SIZE|max", value_parser = limit(Bytes::parse), help_heading = "Limits")]
    gpu_memory: Option<Limit<Bytes>>,
    /// Power that each of those cards draws, which nobody else can have then: 250W
    #[arg(long, value_name = "WATTS|max", value_parser = limit(Milliwatts::parse), help_heading = "Limits")]
    gpu_power: Option<Limit<Milliwatts>>,
    /// Take away memory that the task does not use, step by step, as long as it does not miss it [default: as the
    /// agent was told to do for all]
    #[arg(
        long,
        value_name = "true|false",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        help_heading = "Limits"
    )]
    reclaim_idle: Option<bool>,
}

impl From<LimitArgs> for LimitsChange {
    fn from(args: LimitArgs) -> LimitsChange {
        let LimitArgs {
            cpu,
            cpu_weight,
            memory,
            net,
            net_guarantee,
            net_weight,
            net_in,
            io,
            io_weight,
            io_latency,
            cards,
            gpu_memory,
            gpu_power,
            reclaim_idle,
        } = args;
        LimitsChange {
            cpu,
            cpu_weight,
            memory,
            net_egress: net,
            storage_io: io,
            storage_io_weight: io_weight,
            storage_io_latency: io_latency,
            reclaim_idle,
            net_egress_guarantee: net_guarantee,
            net_egress_weight: net_weight,
            net_ingress: net_in,
            gpu_cards: cards,
            gpu_memory,
            gpu_power,
        }
    }
}

/// Nothing can be guaranteed, too.
fn guarantee(text: &str) -> Result<BitsPerSec, ParseQuantityError> {
    if text == "0" { Ok(BitsPerSec(0)) } else { BitsPerSec::parse(text) }
}

/// A parser of `max` and of what `parse` takes.
fn limit<T: Clone + Send + Sync + 'static>(
    parse: fn(&str) -> Result<T, ParseQuantityError>,
) -> impl Fn(&str) -> Result<Limit<T>, ParseQuantityError> + Clone + Send + Sync + 'static {
    move |input| if input == "max" { Ok(Limit::Unlimited) } else { parse(input).map(Limit::At) }
}

/// How a result is shown: to people, or to programs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    #[default]
    Text,
    Json,
    Yaml,
}

/// How a table is shown; `Wide` is for a broad terminal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum TableFormat {
    #[default]
    Table,
    Wide,
    Json,
    Yaml,
}

/// How a list of things that have names is shown; `Name` is a name a line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum ListFormat {
    #[default]
    Table,
    Wide,
    Json,
    Yaml,
    Name,
}

#[derive(Debug, clap::Args)]
#[command(after_help = RUN_AFTER_HELP)]
pub(crate) struct Run {
    /// Name of the task; the agent makes one where none is given
    #[arg(long)]
    pub(crate) id: Option<TaskId>,
    #[command(flatten)]
    pub(crate) limits: LimitArgs,
    /// Run it in a container of this image, by the node's Docker or Podman; CMD is then given to the image
    #[arg(long, value_name = "IMAGE")]
    pub(crate) image: Option<Image>,
    /// So many GPU cards that no other task has; the task may open no others
    #[arg(long, value_name = "N", conflicts_with = "cards")]
    pub(crate) gpus: Option<u32>,
    /// Of a model whose name contains this: H100
    #[arg(long, value_name = "TEXT")]
    pub(crate) gpu_model: Option<String>,
    /// Whom the task runs as, with the user's groups; with GID, that group alone. Operator only
    #[arg(long, value_name = "NAME|UID[:GID]")]
    pub(crate) user: Option<UserSpec>,
    /// Add a variable to the environment, or pass on one of the caller's; may be repeated
    #[arg(long = "env", value_name = "NAME=VALUE|NAME")]
    pub(crate) environment: Vec<Variable>,
    /// Working directory of the task [default: the current one; the image's]
    #[arg(long, value_name = "DIR")]
    pub(crate) cwd: Option<PathBuf>,
    /// Print the id of the task and return at once
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// How the detached task is shown
    #[arg(short, long, value_name = "FORMAT", default_value = "text", requires = "detach")]
    pub(crate) output: Format,
    /// Program, looked up in PATH, and its arguments
    #[arg(last = true, required_unless_present = "image", value_name = "CMD")]
    pub(crate) command: Vec<String>,
}

/// A variable of the task's environment, as `--env` names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Variable {
    /// With this value.
    Set {
        /// Its name.
        name: String,
        /// Its value.
        value: String,
    },
    /// With the value that it has for the caller.
    Inherit(String),
}

/// Why an `--env` was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a variable is NAME=VALUE, or NAME to pass on the caller's")]
pub(crate) struct NamelessVariable;

impl FromStr for Variable {
    type Err = NamelessVariable;

    fn from_str(text: &str) -> Result<Variable, NamelessVariable> {
        match text.split_once('=') {
            Some(("", _)) => Err(NamelessVariable),
            None if text.is_empty() => Err(NamelessVariable),
            Some((name, value)) => Ok(Variable::Set { name: name.into(), value: value.into() }),
            None => Ok(Variable::Inherit(text.into())),
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Get {
    /// Tasks: your own, or all of them for the operator
    #[command(alias = "task")]
    Tasks(GetTasks),
    /// Nodes of the cluster
    #[command(alias = "node")]
    Nodes(GetNodes),
    /// Policies of the cluster
    #[command(alias = "policy")]
    Policies(GetPolicies),
    /// The latest decisions about tasks: what was placed, made smaller or larger, ended, and why
    #[command(alias = "event")]
    Events(GetEvents),
    /// Groups of nodes that are started and ended as tasks need them, and who waits for them
    Scale(GetScale),
}

#[derive(Debug, clap::Args)]
pub(crate) struct GetTasks {
    /// Only these
    #[arg(value_name = "ID")]
    pub(crate) ids: Vec<TaskId>,
    /// Go on, with a line for each change; with `-o json`, an object a line. Needs a broker
    #[arg(short, long)]
    pub(crate) watch: bool,
    /// How they are shown
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    pub(crate) output: ListFormat,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Describe {
    /// The task
    pub(crate) id: TaskId,
    /// How it is shown
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub(crate) output: Format,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Logs {
    /// The task
    pub(crate) id: TaskId,
    /// Go on until the task has ended
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Begin each line with the time at which it was read from the task, in UTC
    #[arg(long)]
    pub(crate) timestamps: bool,
}

#[derive(Debug, clap::Args)]
#[command(
    after_help = SET_AFTER_HELP,
    group = ArgGroup::new("change").required(true).multiple(true).args(["cpu", "cpu_weight", "memory", "net", "net_guarantee", "net_weight", "net_in", "io", "io_weight", "io_latency", "reclaim_idle", "cards", "gpu_memory", "gpu_power"])
)]
pub(crate) struct Set {
    /// The task
    pub(crate) id: TaskId,
    #[command(flatten)]
    pub(crate) limits: LimitArgs,
    /// Where a memory limit comes below use: return when it is in force, or has been given up
    #[arg(long)]
    pub(crate) wait: bool,
    /// How the task is shown after the change
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub(crate) output: Format,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Wait {
    /// The task
    pub(crate) id: TaskId,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Cancel {
    /// The task
    pub(crate) id: TaskId,
    /// Time between SIGTERM and SIGKILL: 10s, 500ms, 2m
    #[arg(long, value_name = "TIME", default_value = "10s")]
    pub(crate) grace: Span,
    /// SIGKILL at once
    #[arg(long, conflicts_with = "grace")]
    pub(crate) now: bool,
    /// Return without waiting for the end
    #[arg(long)]
    pub(crate) no_wait: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Adopt {
    /// Directory of a cgroup v2
    #[arg(value_name = "CGROUP_PATH")]
    pub(crate) cgroup: PathBuf,
    /// Name that the task gets
    #[arg(long)]
    pub(crate) id: TaskId,
    #[command(flatten)]
    pub(crate) limits: LimitArgs,
}

#[derive(Debug, clap::Args)]
#[command(group = ArgGroup::new("which").required(true).args(["ids", "all"]))]
pub(crate) struct Release {
    /// The tasks
    #[arg(value_name = "ID")]
    pub(crate) ids: Vec<TaskId>,
    /// Every task, and all that the agent made in the kernel
    #[arg(long)]
    pub(crate) all: bool,
    /// How it is shown what was done
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub(crate) output: Format,
}

const LEDGER_AFTER_HELP: &str = "\
Each change is written down before it takes effect. Its outcome is `done`; `rolled back`, where it
failed and everything is as it was before; `failed`, where not everything could be put back; or
`unknown`, where the agent died meanwhile. A `summary` stands for older entries: what was there before
anything was changed, and what stood then.

Examples:
  shaper ledger etl                  what was done to one task, one that was released too
  shaper ledger --since 10m -o wide  everything of the last ten minutes, with errors";

#[derive(Debug, clap::Args)]
#[command(after_help = LEDGER_AFTER_HELP)]
pub(crate) struct Ledger {
    /// The task; without it, all of the caller's
    #[arg(value_name = "TASK")]
    pub(crate) id: Option<TaskId>,
    /// Nothing older than this, such as 10s, 5m or 2h
    #[arg(long, value_name = "TIME")]
    pub(crate) since: Option<Span>,
    /// How it is shown
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    pub(crate) output: TableFormat,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Doctor {
    /// How the report is shown
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub(crate) output: Format,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn a_variable_has_a_name_and_may_have_a_value() {
        let set = |name: &str, value: &str| Variable::Set { name: name.into(), value: value.into() };
        assert_eq!("A=b=c".parse(), Ok(set("A", "b=c")));
        assert_eq!("A=".parse(), Ok(set("A", "")));
        assert_eq!("A".parse(), Ok(Variable::Inherit("A".into())));
        assert_eq!("=b".parse::<Variable>(), Err(NamelessVariable));
        assert_eq!("".parse::<Variable>(), Err(NamelessVariable));
    }

    #[test]
    fn max_lifts_a_limit_and_the_rest_stays() {
        let args = Args::try_parse_from(["shaper", "set", "etl", "--cpu", "max", "--net", "5mbit"]).unwrap();
        let Command::Set(set) = args.command else { panic!("{args:?}") };
        let change = LimitsChange {
            cpu: Some(Limit::Unlimited),
            net_egress: Some(Limit::At(BitsPerSec(5_000_000))),
            ..LimitsChange::default()
        };
        assert_eq!(LimitsChange::from(set.limits), change);
    }
}
