//! Clusters by name.

use super::TableFormat;

/// Named clusters, in a file of the caller's own.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum ContextCommand {
    /// List the contexts; `*` is before the current one
    List {
        /// How they are shown
        #[arg(short, long, value_name = "FORMAT", default_value = "table")]
        output: TableFormat,
    },
    /// Keep what --broker, --socket and --tls-dir (or their variables) say under a name
    #[command(after_help = SET_AFTER_HELP)]
    Set {
        /// The name: letters, digits, `-`, `_` and `.`
        name: String,
    },
    /// Have commands talk to this one from now on; without a name, to none of them
    Use {
        /// The name
        name: Option<String>,
    },
    /// Forget one
    Delete {
        /// The name
        name: String,
    },
}

const SET_AFTER_HELP: &str = "\
Examples:
  shaper context set prod --broker https://b1:7070,https://b2:7070 --tls-dir ~/shaper/ann
  shaper context use prod
  shaper --context lab get nodes

They are kept in $XDG_CONFIG_HOME/shaper/contexts.json, ~/.config/shaper/contexts.json without it.";
