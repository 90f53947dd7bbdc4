//! `shaper exec`.

use shaper_core::id::TaskId;

use super::LimitArgs;

const AFTER_HELP: &str = "\
Nothing stands between: the process keeps its process id, standard streams, environment, user and parent, so that whoever
started it and watches it sees no difference. Its children are in the task, too. The task ends with the last of them.

What the process had before stays charged where it was, so ask at its start. It cannot leave: a process that is in a task
already is refused. The command has one variable more, SHAPER_TASK_ID. SHAPER_SOCKET says which agent; where none answers, the command is not executed.

Examples:
  shaper exec --cpu 1 --memory 2Gi -- python3 worker.py
  exec shaper exec --name etl.load --label framework=airflow -- ./load.sh      in a shell script

Exit codes: those of the command; 126 if it cannot be executed, 127 if it is not there; 1 and 2 where shaper itself failed
or was refused, with a line `shaper: ...`.";

#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Exec {
    /// Name of the task; the agent makes one where none is given
    #[arg(long)]
    pub(crate) id: Option<TaskId>,
    /// What this is an execution of, such as the name of a function [default: the name of the program]
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<TaskId>,
    /// In which namespace [default: default]
    #[arg(long, value_name = "NAME")]
    pub(crate) namespace: Option<TaskId>,
    /// A label of what this is an execution of; may be repeated. `framework` says whose names these are
    #[arg(long = "label", value_name = "NAME=VALUE", value_parser = label)]
    pub(crate) labels: Vec<(String, String)>,
    #[command(flatten)]
    pub(crate) limits: LimitArgs,
    /// Program, looked up in PATH, and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    pub(crate) command: Vec<String>,
}

fn label(text: &str) -> Result<(String, String), &'static str> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("a label is NAME=VALUE"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_has_a_name_and_a_value() {
        assert_eq!(label("framework=ray"), Ok(("framework".into(), "ray".into())));
        assert_eq!(label("a=b=c"), Ok(("a".into(), "b=c".into())));
        assert!(label("=ray").is_err() && label("ray").is_err());
    }
}
