//! What can be asked of the set of policies.

use std::path::PathBuf;

use clap::ValueEnum;

use super::{Format, ListFormat};

/// The policies of the cluster.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum PolicyCommand {
    /// List the policies, or show one of them field by field
    Get(PolicyGet),
    /// Delete policies
    Delete {
        /// Their names
        #[arg(value_name = "NAME", required = true)]
        names: Vec<String>,
    },
    /// Show what was changed, by whom and when, oldest first
    History {
        /// How the changes are shown
        #[arg(short, long, value_name = "FORMAT", default_value = "text")]
        output: Format,
    },
    /// Make all policies what they were after a revision. Operator only
    #[command(after_help = ROLLBACK_AFTER_HELP)]
    Rollback {
        /// The revision, as `shaper policy history` shows it; 0 is the time before the first
        revision: u64,
    },
    /// Show what `shaper apply` would change
    Diff {
        /// Policies, in YAML or JSON, one a file; `-` is the standard input
        #[arg(value_name = "FILE|-", required = true)]
        files: Vec<PathBuf>,
    },
}

const ROLLBACK_AFTER_HELP: &str = "\
To go back is itself a change, with a revision of its own: to undo it, roll back to the revision
before it.";

#[derive(Debug, clap::Args)]
pub(crate) struct PolicyGet {
    /// Only this one
    pub(crate) name: Option<String>,
    /// How they are shown
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    pub(crate) output: ListFormat,
}

/// Who says what would happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DryRun {
    /// The broker, of the tasks that wait and run now
    Server,
}
