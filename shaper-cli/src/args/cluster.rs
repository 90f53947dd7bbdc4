//! What can be asked of a broker.

use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use shaper_core::{
    document::MAX_RETRIES,
    id::TaskId,
    spec::{DEFAULT_NAMESPACE, DecisionKind, Image, Priority},
};

use super::{DryRun, Format, ListFormat, TableFormat};
use crate::{time::Span, users::UserSpec};

const SUBMIT_AFTER_HELP: &str = "\
FILE is a task spec, or a bare task profile with a command after `--`, in YAML or JSON; `-` is the
standard input. The task gets the environment that the spec names, and PATH, HOME and USER where it
names none of them. To submit the same task again changes nothing.

Once the broker has the task on disk, that is all: whether a node takes it, and how it ends, say
`shaper get tasks`, `shaper explain`, and --wait.

With --wait, the phases of the task are said on standard error, and shaper exits with the task's
code; interrupted, it leaves the task to the broker.

Examples:
  shaper submit etl.yaml
  shaper submit profile.json -- python3 train.py
  shaper submit --wait --retries 3 etl.yaml";

#[derive(Debug, clap::Args)]
#[command(after_help = SUBMIT_AFTER_HELP)]
pub(crate) struct Submit {
    /// Task spec or task profile
    #[arg(value_name = "FILE|-")]
    pub(crate) file: PathBuf,
    /// Run it in a container of this image, by the Docker or Podman of its node; CMD is then given to the image
    #[arg(long, value_name = "IMAGE")]
    pub(crate) image: Option<Image>,
    /// Name under which its usage is remembered [default: the command's, or the image's]
    #[arg(long, value_parser = name)]
    pub(crate) name: Option<String>,
    /// Working directory of the task [default: the spec's, or the current one; the image's]
    #[arg(long, value_name = "DIR")]
    pub(crate) cwd: Option<PathBuf>,
    /// Whom the task runs as, with the user's groups; with GID, that group alone. Operator only
    #[arg(long, value_name = "NAME|UID[:GID]")]
    pub(crate) user: Option<UserSpec>,
    /// How often the task is placed again if it cannot be started, or its node is lost
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(..=MOST_RETRIES))]
    pub(crate) retries: Option<u32>,
    /// Return as soon as the broker has the task, which is the default
    #[arg(short, long, conflicts_with = "wait")]
    pub(crate) detach: bool,
    /// Wait until the task has ended, and exit with its code
    #[arg(long)]
    pub(crate) wait: bool,
    /// How the submitted task is shown
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub(crate) output: Format,
    /// Program and arguments, instead of the spec's
    #[arg(last = true, value_name = "CMD")]
    pub(crate) command: Vec<String>,
}

/// A node of the cluster.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum NodeCommand {
    /// Say that a node which does not answer is dead: its tasks are placed again. Operator only
    #[command(after_help = FENCE_AFTER_HELP)]
    Fence {
        /// The node
        node: String,
    },
    /// Place nothing more on a node; it keeps what it has. Operator only
    Cordon {
        /// The node
        node: String,
    },
    /// Place tasks on a node again. Operator only
    Uncordon {
        /// The node
        node: String,
    },
    /// Place nothing more on a node, and have its tasks end and be placed elsewhere. Operator only
    #[command(after_help = DRAIN_AFTER_HELP)]
    Drain {
        /// The node
        node: String,
        /// Only say which tasks would go, where to, and what that would cost
        #[arg(long)]
        dry_run: bool,
        /// Return when they all have left it
        #[arg(long, conflicts_with = "dry_run")]
        wait: bool,
    },
    /// Forget a node that is gone for good. Operator only
    Remove {
        /// The node
        node: String,
    },
}

const DRAIN_AFTER_HELP: &str = "\
Each of its tasks is asked to end (SIGTERM, SIGKILL after 10 s) and is placed again, without a retry
being used up. What a task has done so far is lost unless it keeps it itself. `shaper node uncordon`
lets the node take tasks again.";

const FENCE_AFTER_HELP: &str = "\
Power the node off first, or be sure that it is: what still runs there would run twice. Should the
node come back, what it still has of those tasks is ended, and it takes new work.";

/// As clap takes it.
const MOST_RETRIES: i64 = MAX_RETRIES as i64;

fn name(text: &str) -> Result<String, &'static str> {
    text.parse::<TaskId>()
        .map(String::from)
        .map_err(|_| "use 1 to 63 characters out of a-z, A-Z, 0-9, `-`, `_` and `.`")
}

#[derive(Debug, clap::Args)]
pub(crate) struct GetNodes {
    /// How they are shown
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    pub(crate) output: ListFormat,
}

#[derive(Debug, clap::Args)]
#[command(after_help = EVENTS_AFTER_HELP)]
pub(crate) struct GetEvents {
    /// Only about these tasks
    #[arg(value_name = "TASK")]
    pub(crate) tasks: Vec<TaskId>,
    /// Only of this kind; may be repeated
    #[arg(long = "kind", value_name = "KIND", value_parser = decision_kind())]
    pub(crate) kinds: Vec<DecisionKind>,
    /// Nothing older than this, such as 10s, 5m or 2h
    #[arg(long, value_name = "TIME")]
    pub(crate) since: Option<Span>,
    /// Go on, with a line for each decision; with `-o json`, an object a line
    #[arg(short, long)]
    pub(crate) watch: bool,
    /// How they are shown
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    pub(crate) output: TableFormat,
}

/// One of the names of them.
fn decision_kind() -> impl TypedValueParser<Value = DecisionKind> {
    PossibleValuesParser::new(DecisionKind::ALL.map(DecisionKind::name)).try_map(|name| {
        let kind = DecisionKind::ALL.into_iter().find(|kind| kind.name() == name);
        kind.ok_or("there is no such kind of decision")
    })
}

const EVENTS_AFTER_HELP: &str = "\
The broker keeps the latest 512 decisions about all tasks since it began to lead, and those about each
task with the task (`shaper explain`).

Examples:
  shaper get events --watch                         what is decided, as it is decided
  shaper get events --kind evicted --kind lost      which tasks had to go, and why";

#[derive(Debug, clap::Args)]
pub(crate) struct GetScale {
    /// How they are shown; `wide` with what happened to each
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    pub(crate) output: TableFormat,
}

#[derive(Debug, clap::Args)]
pub(crate) struct GetPolicies {
    /// How they are shown
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    pub(crate) output: ListFormat,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Explain {
    /// The task
    pub(crate) id: TaskId,
    /// How the decisions are shown
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub(crate) output: Format,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Apply {
    /// Policies, in YAML or JSON, one a file; `-` is the standard input
    #[arg(short = 'f', long = "file", value_name = "FILE|-", required = true, num_args = 1..)]
    pub(crate) files: Vec<PathBuf>,
    /// Change nothing: show what the tasks that they cover would get, and from which policy
    #[arg(long, value_name = "WHO")]
    pub(crate) dry_run: Option<DryRun>,
}

/// A priority.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum PriorityArg {
    High,
    Medium,
    Low,
}

impl From<PriorityArg> for Priority {
    fn from(priority: PriorityArg) -> Priority {
        match priority {
            PriorityArg::High => Priority::High,
            PriorityArg::Medium => Priority::Medium,
            PriorityArg::Low => Priority::Low,
        }
    }
}

/// What tasks have used.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum ProfileCommand {
    /// Show what tasks of a name need, as the profile of the next one, in JSON. Tasks that were cancelled do not count
    Get(ProfileOf),
    /// Show where each figure of a profile comes from
    Explain(ProfileOf),
    /// List the names of which something is known
    List {
        /// How they are shown
        #[arg(short, long, value_name = "FORMAT", default_value = "table")]
        output: ListFormat,
    },
}

#[derive(Debug, clap::Args)]
pub(crate) struct ProfileOf {
    /// Name of the tasks; where none was given, that of their command
    pub(crate) name: String,
    /// Their namespace
    #[arg(long, default_value = DEFAULT_NAMESPACE)]
    pub(crate) namespace: String,
    /// The priority of the task that it is for: high, medium or low
    #[arg(long, value_name = "PRIORITY", default_value = "medium")]
    pub(crate) priority: PriorityArg,
}
