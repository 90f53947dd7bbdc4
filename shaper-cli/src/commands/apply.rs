//! `shaper apply`: creates or replaces policies, or says what that would do.

use std::{fmt::Write as _, path::PathBuf};

use shaper_core::{document, spec::Policy};
use shaper_proto::v1::{OverruledPolicy, PolicySetting};

use super::document::Document;
use crate::{
    args::{Apply, DryRun},
    client::Broker,
    cluster::TaskPolicies,
    error::Error,
    output::{self, printable},
    servers::Servers,
};

pub(super) async fn apply(servers: &Servers, args: &Apply) -> Result<(), Error> {
    let policies = read(&args.files)?;
    let broker = servers.broker().await?;
    if args.dry_run == Some(DryRun::Server) {
        return output::print(&previewed(&broker.preview_policies(policies).await?));
    }
    for policy in policies {
        let (namespace, name) = (policy.namespace.clone(), policy.policy_name.clone());
        let outcome = apply_one(&broker, policy).await?;
        output::print(&format!("{namespace}/{name} {outcome}\n"))?;
    }
    Ok(())
}

/// All of these files, before anything is done with the first.
pub(super) fn read(files: &[PathBuf]) -> Result<Vec<Policy>, Error> {
    let mut policies = Vec::with_capacity(files.len());
    for file in files {
        let Document { name, text } = Document::read(file)?;
        policies.push(document::policy(&name, text).map_err(Box::new)?);
    }
    Ok(policies)
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

/// A paragraph for each task: what it would get, from whom, and who would be overruled.
fn previewed(tasks: &[TaskPolicies]) -> String {
    if tasks.is_empty() {
        return "no task that waits or runs would be covered\n".to_owned();
    }
    let mut text = String::new();
    for TaskPolicies { task_id, node, settings } in tasks {
        let place =
            node.as_ref().map_or_else(|| "waits".to_owned(), |node| format!("on {}", printable(node)));
        // Writing to a String does not fail.
        let _ = writeln!(text, "{} ({place})", printable(task_id));
        if settings.is_empty() {
            let _ = writeln!(text, "  nothing");
        }
        for PolicySetting { setting, policy, says, overruled } in settings {
            let (setting, policy, says) = (printable(setting), printable(policy), printable(says));
            let _ = writeln!(text, "  {setting}: {says}, from {policy}");
            for OverruledPolicy { policy: other, says, because_the_other } in overruled {
                let (other, says) = (printable(other), printable(says));
                let because = printable(because_the_other);
                let _ = writeln!(text, "    not from {other} ({says}): {policy} {because}");
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_preview_says_who_gives_what_and_who_does_not() {
        let overruled = OverruledPolicy {
            policy: "all".into(),
            says: "at most 3 cores".into(),
            because_the_other: "names the task more exactly".into(),
        };
        let setting = PolicySetting {
            setting: "limits.cpu".into(),
            policy: "etl".into(),
            says: "at most 2 cores".into(),
            overruled: vec![overruled],
        };
        let task = |task_id: &str, node: Option<&str>, settings| TaskPolicies {
            task_id: task_id.into(),
            node: node.map(Into::into),
            settings,
        };
        let expected = "\
a (on n1)
  limits.cpu: at most 2 cores, from etl
    not from all (at most 3 cores): etl names the task more exactly
b (waits)
  nothing
";
        assert_eq!(previewed(&[task("a", Some("n1"), vec![setting]), task("b", None, vec![])]), expected);
        assert_eq!(previewed(&[]), "no task that waits or runs would be covered\n");
    }
}
