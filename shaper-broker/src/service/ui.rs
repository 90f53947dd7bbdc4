//! The way to the web page: who asks gets a code that opens it once, as the one who asks.

use shaper_identity::{
    serve::{Asking, Peer},
    table::Asker,
};
use shaper_proto::v1;
use tonic::{Request, Response, Status};

use super::{BrokerService, caller};
use crate::web::{CODE_SECONDS, Pass};

pub(super) fn open(
    service: &BrokerService,
    request: &Request<v1::OpenUiRequest>,
) -> Result<Response<v1::OpenUiResponse>, Status> {
    let door = service.door.as_ref().ok_or_else(|| {
        Status::failed_precondition(
            "this broker serves no web page; start it with --web tcp://127.0.0.1:9780",
        )
    })?;
    let (who, caller) = (Asking::of(request)?.who.clone(), caller(request)?);
    let (asker, holder) = match request.extensions().get::<Peer>() {
        Some(Peer::Certified(holder)) => (Asker::Role(holder.identity.role()), Some(holder.clone())),
        Some(Peer::Local(_)) if caller.uid == 0 => (Asker::Root, None),
        Some(Peer::Local(_)) => (Asker::User, None),
        Some(Peer::Stranger(_)) | None => {
            return Err(Status::unauthenticated("nobody knows who asks"));
        }
    };
    let url = door
        .invite(Pass { who, asker, caller, holder })
        .map_err(|error| Status::unavailable(error.to_string()))?;
    Ok(Response::new(v1::OpenUiResponse { url, valid_seconds: CODE_SECONDS }))
}
