//! `shaper policy`: the set of policies, what was changed in it, and back.

use std::{collections::BTreeMap, fmt::Write as _};

use shaper_core::{document, spec::Policy};

use super::{apply, get};
use crate::{
    args::{Format, GetPolicies, ListFormat, PolicyCommand, PolicyGet},
    client::Broker,
    cluster::{PolicyChange, PolicyRevision, PolicyStatus},
    error::Error,
    output::{self, printable},
    servers::Servers,
    time::Utc,
};

pub(super) async fn policy(servers: &Servers, command: &PolicyCommand) -> Result<(), Error> {
    if let PolicyCommand::Diff { files } = command {
        // A document that is wrong needs no broker.
        let policies = apply::read(files)?;
        let present = servers.broker().await?.list_policies().await?;
        return output::print(&compared(&present, &policies));
    }
    let broker = servers.broker().await?;
    match command {
        PolicyCommand::Get(args) => get_policies(&broker, args).await,
        PolicyCommand::Delete { names } => {
            for name in names {
                let revision = broker.delete_policy(name).await?;
                output::print(&text(&revision))?;
            }
            Ok(())
        }
        PolicyCommand::History { output: Format::Json } => {
            output::print_json(&broker.policy_history().await?)
        }
        PolicyCommand::History { output: Format::Yaml } => {
            output::print_yaml(&broker.policy_history().await?)
        }
        PolicyCommand::History { output: Format::Text } => {
            let revisions = broker.policy_history().await?;
            if revisions.is_empty() {
                output::remark("no policy was changed yet");
            }
            output::print(&revisions.iter().map(text).collect::<String>())
        }
        PolicyCommand::Rollback { revision } => {
            output::print(&text(&broker.roll_back_policies(*revision).await?))
        }
        PolicyCommand::Diff { .. } => Ok(()),
    }
}

async fn get_policies(broker: &Broker, args: &PolicyGet) -> Result<(), Error> {
    let PolicyGet { name, output } = args;
    let Some(name) = name else {
        return get::policies(broker, &GetPolicies { output: *output }).await;
    };
    let mut policies = broker.list_policies().await?;
    policies.retain(|status| status.policy.policy_name == *name);
    let Some(PolicyStatus { policy, revision }) = policies.first() else {
        return Err(Error::NoSuchPolicy(name.clone()));
    };
    match output {
        ListFormat::Json => output::print_json(&policies),
        ListFormat::Yaml => output::print_yaml(&policies),
        ListFormat::Name => output::print(&format!("{name}\n")),
        ListFormat::Table | ListFormat::Wide => {
            let mut text = format!("policy_name: {name}\n");
            for (path, value) in document::policy_fields(policy) {
                let _ = writeln!(text, "{path}: {}", printable(&value));
            }
            output::print(&format!("{text}revision {revision}\n"))
        }
    }
}

/// A change, and below it what it changed.
fn text(revision: &PolicyRevision) -> String {
    let PolicyRevision { revision, at, uid, rolled_back_to, changes } = revision;
    let back = rolled_back_to.map_or_else(String::new, |to| format!(", back to revision {to}"));
    let mut text = format!("revision {revision}  {:.3}  uid {uid}{back}\n", Utc(*at));
    for PolicyChange { policy_name, before, after } in changes {
        text.push_str(&changed(policy_name, before.as_ref(), after.as_ref()));
    }
    text
}

/// What applying these would change.
fn compared(present: &[PolicyStatus], policies: &[Policy]) -> String {
    let compare = |policy: &Policy| {
        let named = |status: &&PolicyStatus| status.policy.policy_name == policy.policy_name;
        let before = present.iter().find(named).map(|status| &status.policy);
        match before {
            Some(before) if before == policy => format!("  {} unchanged\n", policy.policy_name),
            before => changed(&policy.policy_name, before, Some(policy)),
        }
    };
    policies.iter().map(compare).collect()
}

/// A policy, field by field: `-` before what was there, `+` before what is.
fn changed(name: &str, before: Option<&Policy>, after: Option<&Policy>) -> String {
    let fields = |policy: Option<&Policy>| -> BTreeMap<String, String> {
        policy.map(document::policy_fields).unwrap_or_default().into_iter().collect()
    };
    let what = match (before, after) {
        (None, _) => "created",
        (_, None) => "deleted",
        _ => "changed",
    };
    let (before, after) = (fields(before), fields(after));
    let mut text = format!("  {} {what}\n", printable(name));
    let mut paths: Vec<&String> = before.keys().chain(after.keys()).collect();
    paths.sort();
    paths.dedup();
    for path in paths {
        let (was, is) = (before.get(path), after.get(path));
        if was == is {
            continue;
        }
        for (sign, value) in [('-', was), ('+', is)] {
            if let Some(value) = value {
                let _ = writeln!(text, "  {sign} {}: {}", printable(path), printable(value));
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(text: &str) -> Policy {
        document::policy("p", text).unwrap()
    }

    #[test]
    fn what_changed_is_shown_field_by_field() {
        let before = policy("policy_name: a\npriority: high\nlimits: {cpu: 2}\nselector: {name: web}\n");
        let after =
            policy("policy_name: a\npriority: high\nlimits: {cpu: 2.5}\nbehavior: {window_seconds: 5}\n");
        let revision = PolicyRevision {
            revision: 7,
            at: 1_500_000_000,
            uid: 1000,
            rolled_back_to: Some(3),
            changes: vec![PolicyChange {
                policy_name: "a".into(),
                before: Some(before.clone()),
                after: Some(after.clone()),
            }],
        };
        let expected = "\
revision 7  1970-01-01T00:00:01.500Z  uid 1000, back to revision 3
  a changed
  + behavior.window_seconds: 5
  - limits.cpu: 2
  + limits.cpu: 2.5
  - selector.name: web
";
        assert_eq!(text(&revision), expected);
        let present = [PolicyStatus { policy: before.clone(), revision: 1 }];
        let other = Policy { policy_name: "b".into(), ..policy("policy_name: b\npriority: low\n") };
        assert_eq!(compared(&present, &[before, other]), "  a unchanged\n  b created\n  + priority: low\n");
        assert_eq!(changed("a", Some(&after), None).lines().next(), Some("  a deleted"));
    }
}
