//! `shaper node fence`: what an operator knows of a node, and the broker cannot.

use crate::{args::NodeCommand, client::Broker, error::Error, output};

pub(super) async fn node(broker: &Broker, args: &NodeCommand) -> Result<(), Error> {
    let NodeCommand::Fence { node } = args;
    let tasks = broker.fence_node(node).await?;
    output::print(&fenced(node, &tasks))
}

fn fenced(node: &str, tasks: &[String]) -> String {
    match tasks {
        [] => format!("node {node} had no tasks\n"),
        tasks => format!("node {node} had {}: to be placed again\n", output::printable(&tasks.join(", "))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_said_what_becomes_of_which_tasks() {
        assert_eq!(fenced("n1", &["a".into(), "b".into()]), "node n1 had a, b: to be placed again\n");
        assert_eq!(fenced("n1", &[]), "node n1 had no tasks\n");
    }
}
