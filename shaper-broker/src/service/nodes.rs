//! Nodes that are cordoned, drained and removed.

use shaper_proto::v1;
use tonic::{Request, Response, Status};

use super::{BrokerService, another_answer, caller};
use crate::{
    reactor::{Answer, Denied, Event, NodeWish, Refusal, leaving, query},
    wire,
};

fn wish(wish: v1::NodeWish) -> Result<NodeWish, Status> {
    match wish {
        v1::NodeWish::Unspecified => Err(Status::invalid_argument(
            "`wish` is missing: say whether the node is to be open, cordoned or drained",
        )),
        v1::NodeWish::Open => Ok(NodeWish::Open),
        v1::NodeWish::Cordoned => Ok(NodeWish::Cordoned),
        v1::NodeWish::Drained => Ok(NodeWish::Drained),
    }
}

pub(super) async fn cordon(
    service: &BrokerService,
    request: Request<v1::CordonNodeRequest>,
) -> Result<Response<v1::CordonNodeResponse>, Status> {
    let caller = caller(&request)?;
    let wish = wish(request.get_ref().wish())?;
    let v1::CordonNodeRequest { node, wish: _, dry_run } = request.into_inner();
    let leaves = if dry_run {
        let look = move |view: &crate::actor::View<'_>| {
            if !query::is_operator(&caller) {
                return Err(Refusal::Denied(Denied::Nodes));
            }
            let there = view.state.nodes.get(&node).ok_or_else(|| Refusal::NoSuchNode(node.clone()))?;
            Ok(if wish == NodeWish::Drained { leaving(view.state, there) } else { Vec::new() })
        };
        service.read(look).await?
    } else {
        match service.ask(Event::CordonNode { caller, node, wish }).await? {
            Answer::Leaves(leaves) => leaves,
            _ => return Err(another_answer()),
        }
    };
    let tasks = leaves.into_iter().map(wire::leaving_task).collect();
    Ok(Response::new(v1::CordonNodeResponse { tasks }))
}

pub(super) async fn remove(
    service: &BrokerService,
    request: Request<v1::RemoveNodeRequest>,
) -> Result<Response<v1::RemoveNodeResponse>, Status> {
    let caller = caller(&request)?;
    let v1::RemoveNodeRequest { node } = request.into_inner();
    service.ask(Event::RemoveNode { caller, node }).await?;
    Ok(Response::new(v1::RemoveNodeResponse {}))
}
