//! Whether this broker leads. One that stands by answers every call with where the leader is.

use tokio::sync::watch;
use tonic::{Request, Status, metadata::MetadataValue, service::Interceptor};

/// The metadata of a refusal: where the leader is.
pub const LEADER: &str = "shaper-leader";

/// What this broker is among those of its cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Another leads, if that is known: where.
    Standby(Option<String>),
    /// This one leads.
    Leads,
}

impl Standing {
    fn refusal(&self) -> Option<Status> {
        match self {
            Standing::Leads => None,
            Standing::Standby(None) => {
                Some(Status::unavailable("this broker stands by, and none leads yet; try again"))
            }
            Standing::Standby(Some(leader)) => {
                let text = format!("this broker stands by: the one that leads is at {leader}");
                let mut status = Status::unavailable(text);
                // Where it is no ASCII, the text has it.
                if let Ok(leader) = MetadataValue::try_from(leader.as_str()) {
                    status.metadata_mut().insert(LEADER, leader);
                }
                Some(status)
            }
        }
    }
}

/// Lets calls through to a broker that leads.
#[derive(Clone, Debug)]
pub struct Gate(pub watch::Receiver<Standing>);

impl Interceptor for Gate {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        self.0.borrow().refusal().map_or(Ok(request), Err)
    }
}
