//! The hook: the agent is asked for a container that was made and waits to be started.

use std::{
    collections::{BTreeMap, HashMap},
    io::{self, Read},
    path::{Path, PathBuf},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use serde::Deserialize;
use shaper_core::adopt::ANNOTATION_PREFIX;
use shaper_proto::v1::{AdmitContainerRequest, agent_client::AgentClient};
use tokio::net::UnixStream;
use tonic::transport::Endpoint;

use crate::settings::Chosen;

/// Longer is no container's state.
const STATE_MAX: u64 = 4 << 20;

#[derive(Debug, thiserror::Error)]
pub(crate) enum AdmitError {
    #[error("cannot read the container's state, which its runtime writes to a hook")]
    Read(#[source] io::Error),
    #[error("what its runtime says is no container's state")]
    State(#[source] serde_json::Error),
    #[error("its runtime does not say which process is the container's first")]
    NoProcess,
    #[error("cannot begin")]
    Runtime(#[source] io::Error),
    #[error("the agent is not there, at {}: start shaper-agent", .0.display())]
    Away(PathBuf, #[source] tonic::transport::Error),
    #[error("the agent does not answer within {} s", .0.as_secs_f64())]
    Slow(Duration),
    #[error("the agent: {}", .0.message())]
    Refused(Box<tonic::Status>),
}

/// What a hook reads (runtime.md of the OCI runtime specification, State).
#[derive(Deserialize)]
struct State {
    #[serde(default)]
    pid: u32,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

/// Asks for the container whose state that is.
pub(crate) fn admit(chosen: &Chosen, state: impl Read) -> Result<(), AdmitError> {
    let mut text = Vec::new();
    state.take(STATE_MAX).read_to_end(&mut text).map_err(AdmitError::Read)?;
    let State { pid, annotations } = serde_json::from_slice(&text).map_err(AdmitError::State)?;
    if pid == 0 {
        return Err(AdmitError::NoProcess);
    }
    let annotations = annotations.unwrap_or_default().into_iter();
    let annotations = annotations.filter(|(name, _)| name.starts_with(ANNOTATION_PREFIX)).collect();
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(AdmitError::Runtime)?;
    let patience = chosen.settings.patience;
    let asked = ask(&chosen.settings.agent, pid, annotations);
    runtime
        .block_on(async { tokio::time::timeout(patience, asked).await })
        .map_err(|_| AdmitError::Slow(patience))?
}

async fn ask(socket: &Path, pid: u32, annotations: HashMap<String, String>) -> Result<(), AdmitError> {
    let path = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    // The address goes into a header that nobody reads.
    let channel = Endpoint::from_static("http://shaper")
        .connect_with_connector(connector)
        .await
        .map_err(|error| AdmitError::Away(socket.to_owned(), error))?;
    let request = AdmitContainerRequest { pid, annotations };
    let answered = AgentClient::new(channel).admit_container(request).await;
    // Which task it is says `shaper describe`; a container that no rule takes is started all the same.
    answered.map(drop).map_err(|status| AdmitError::Refused(Box::new(status)))
}

#[cfg(test)]
mod tests {
    use shaper_core::document::RuntimeSettings;

    use super::*;

    #[test]
    fn what_is_not_said_or_not_there_is_told() {
        let settings = RuntimeSettings { agent: "/none/agent.sock".into(), ..RuntimeSettings::default() };
        let chosen = Chosen { file: None, settings, runtime: "/bin/true".into() };
        let refused = |text: &str| admit(&chosen, text.as_bytes()).unwrap_err();
        assert!(matches!(refused(""), AdmitError::State(_)));
        assert!(matches!(refused(r#"{"id":"c","status":"creating"}"#), AdmitError::NoProcess));
        let error = refused(r#"{"pid":1,"annotations":null}"#);
        assert!(
            matches!(error, AdmitError::Away(..)) && error.to_string().contains("/none/agent.sock"),
            "{error}"
        );
    }
}
