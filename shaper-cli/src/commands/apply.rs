//! `shaper apply`: creates or replaces policies.

use shaper_core::{document, spec::Policy};

use super::document::Document;
use crate::{args::Apply, client::Broker, error::Error, output, servers::Servers};

pub(super) async fn apply(servers: &Servers, args: &Apply) -> Result<(), Error> {
    // All of them are read before the first is applied.
    let mut policies = Vec::with_capacity(args.files.len());
    for file in &args.files {
        let Document { name, text } = Document::read(file)?;
        policies.push(document::policy(&name, text).map_err(Box::new)?);
    }
    let broker = servers.broker().await?;
    for policy in policies {
        let (namespace, name) = (policy.namespace.clone(), policy.policy_name.clone());
        let outcome = apply_one(&broker, policy).await?;
        output::print(&format!("{namespace}/{name} {outcome}\n"))?;
    }
    Ok(())
}

async fn apply_one(broker: &Broker, policy: Policy) -> Result<&'static str, Error> {
    let present = broker.list_policies().await?;
    let named =
        |other: &Policy| (&other.namespace, &other.policy_name) == (&policy.namespace, &policy.policy_name);
    let outcome = match present.iter().map(|status| &status.policy).find(|other| named(other)) {
        Some(same) if *same == policy => return Ok("unchanged"),
        Some(_) => "changed",
        None => "created",
    };
    broker.apply_policy(policy).await?;
    Ok(outcome)
}
