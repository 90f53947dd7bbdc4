//! `cargo xtask dashboards`: writes the dashboards for Grafana, `deploy/grafana/*.json`, from what is here. A test finds those
//! that are not as written here, and others that panels and alerts ask for nothing but what the daemons tell.

mod boards;
mod panel;
#[cfg(test)]
mod queries;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::workspace;

fn folder() -> PathBuf {
    workspace::root().join("deploy/grafana")
}

/// The names of the files, and what is in them.
fn all() -> [(&'static str, Value); 3] {
    [("cluster.json", boards::cluster()), ("node.json", boards::node()), ("task.json", boards::task())]
}

fn text(board: &Value) -> Result<String> {
    Ok(serde_json::to_string_pretty(board)? + "\n")
}

pub(crate) fn run() -> Result<()> {
    let folder = folder();
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    for (name, board) in all() {
        let file = folder.join(name);
        fs::write(&file, text(&board)?).with_context(|| format!("cannot write {}", file.display()))?;
        println!("wrote {}", file.display());
    }
    Ok(())
}
