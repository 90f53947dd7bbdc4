//! What `shaper-runtime` is told: `runtime`, `agent`, `fail`, `patience_seconds`.

use std::{path::PathBuf, time::Duration};

use super::{
    error::{DocumentError, quoted},
    read::{Field, Item, Kind},
};

const FILE: &[Field] = &[
    Field::optional("runtime", Kind::Unpublished, "\"/usr/bin/runc\""),
    Field::optional("agent", Kind::Unpublished, "\"/run/shaper/agent.sock\""),
    Field::optional("fail", Kind::Unpublished, "\"open\""),
    Field::optional("patience_seconds", Kind::Unpublished, "2"),
];

/// What happens to a container that the agent cannot adopt before it starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Failing {
    /// It is started.
    #[default]
    Open,
    /// It is not.
    Closed,
}

/// How an OCI runtime asks the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuntimeSettings {
    /// The runtime that does the work; `None`: the first of those that are usual.
    pub runtime: Option<PathBuf>,
    /// The agent's socket.
    pub agent: PathBuf,
    /// What happens where it does not adopt.
    pub fail: Failing,
    /// How long its answer may take.
    pub patience: Duration,
}

impl Default for RuntimeSettings {
    fn default() -> RuntimeSettings {
        RuntimeSettings {
            runtime: None,
            agent: "/run/shaper/agent.sock".into(),
            fail: Failing::Open,
            patience: Duration::from_secs(5),
        }
    }
}

pub(super) fn settings(root: &Item<'_>) -> Result<RuntimeSettings, DocumentError> {
    let fields = root.fields("the settings of shaper-runtime", FILE)?;
    let defaults = RuntimeSettings::default();
    Ok(RuntimeSettings {
        runtime: fields.map("runtime", path)?,
        agent: fields.map("agent", path)?.unwrap_or(defaults.agent),
        fail: match fields.map("fail", |item| item.word(&["open", "closed"]))? {
            Some("closed") => Failing::Closed,
            _ => Failing::Open,
        },
        patience: fields
            .map("patience_seconds", |item| item.whole(1, 60, "a number of seconds from 1 to 60"))?
            .map_or(defaults.patience, Duration::from_secs),
    })
}

fn path(item: &Item<'_>) -> Result<PathBuf, DocumentError> {
    let text = item.text("an absolute path")?;
    if !text.starts_with('/') {
        let error = item.error(format!("{} is no absolute path", quoted(text)));
        return Err(error.with_remedy("write it from the root on, such as /usr/bin/runc"));
    }
    Ok(text.into())
}

#[cfg(test)]
mod tests {
    use super::{super::runtime_settings, *};

    #[test]
    fn settings_are_read_and_what_is_not_said_is_usual() {
        let text = "runtime: /usr/bin/crun\nagent: /run/a.sock\nfail: closed\npatience_seconds: 2\n";
        let expected = RuntimeSettings {
            runtime: Some("/usr/bin/crun".into()),
            agent: "/run/a.sock".into(),
            fail: Failing::Closed,
            patience: Duration::from_secs(2),
        };
        assert_eq!(runtime_settings("r.yaml", text), Ok(expected));
        assert_eq!(runtime_settings("r.yaml", "fail: open"), Ok(RuntimeSettings::default()));
    }

    #[test]
    fn what_is_refused_is_pointed_at() {
        for (text, said) in [
            ("runtime: runc", "from the root on"),
            ("fail: shut", "open"),
            ("patience_seconds: 0", "from 1 to 60"),
            ("runtimes: /bin/runc", "did you mean `runtime`"),
            ("", "the document is empty"),
        ] {
            let error = runtime_settings("r.yaml", text).unwrap_err().to_string();
            assert!(error.contains(said), "{text}: {error}");
        }
    }
}
