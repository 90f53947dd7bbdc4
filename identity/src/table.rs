//! Which role may make which call: the one table. `docs/authorization.md` shows it, the listeners ask it, and what is not
//! in it is refused to everybody.

use std::fmt;

use crate::Role;

/// As what somebody asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asker {
    /// uid 0 on the Unix socket, as the kernel says.
    Root,
    /// Any other uid on the Unix socket.
    User,
    /// With a certificate.
    Role(Role),
    /// Without one: only where there is something for them, which is to join.
    Stranger,
}

impl Asker {
    /// The columns of the table. An authority has none: it may do nothing.
    pub const ALL: [Asker; 8] = [
        Asker::Root,
        Asker::User,
        Asker::Role(Role::Submitter),
        Asker::Role(Role::Operator),
        Asker::Role(Role::Node),
        Asker::Role(Role::Reader),
        Asker::Role(Role::Broker),
        Asker::Stranger,
    ];
}

impl fmt::Display for Asker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Asker::Root => "root",
            Asker::User => "user",
            Asker::Role(role) => role.as_str(),
            Asker::Stranger => "stranger",
        })
    }
}

/// What the table says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// No.
    Refused,
    /// Yes, for what is their own; the service knows what that is.
    Own,
    /// Yes.
    Allowed,
}

/// A call.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// As gRPC names it.
    pub path: &'static str,
    /// It changes something: each of them is in the audit log, also those that were allowed.
    pub changes: bool,
    /// It may last as long as a task does, or as memory takes to be given back: it has no deadline.
    pub is_long: bool,
    verdicts: [Verdict; 8],
}

const N: Verdict = Verdict::Refused;
const O: Verdict = Verdict::Own;
const Y: Verdict = Verdict::Allowed;

const fn reads(path: &'static str, verdicts: [Verdict; 8]) -> Call {
    Call { path, changes: false, is_long: false, verdicts }
}

const fn changes(path: &'static str, verdicts: [Verdict; 8]) -> Call {
    Call { changes: true, ..reads(path, verdicts) }
}

const fn long(call: Call) -> Call {
    Call { is_long: true, ..call }
}

/// Everything that can be asked of either daemon.
#[rustfmt::skip]
pub const CALLS: &[Call] = &[
    //                                                     root user subm oper node read brok strn
    changes("/shaper.v1.Broker/SubmitTask",               [Y,   O,   O,   Y,   N,   N,   N,   N]),
    long(changes("/shaper.v1.Broker/SubmitTasks",         [Y,   O,   O,   Y,   N,   N,   N,   N])),
    reads(  "/shaper.v1.Broker/GetClusterTask",           [Y,   O,   O,   Y,   N,   Y,   N,   N]),
    reads(  "/shaper.v1.Broker/ListClusterTasks",         [Y,   O,   O,   Y,   N,   Y,   N,   N]),
    long(reads("/shaper.v1.Broker/WatchClusterTasks",     [Y,   O,   O,   Y,   N,   Y,   N,   N])),
    changes("/shaper.v1.Broker/CancelClusterTask",        [Y,   O,   O,   Y,   N,   N,   N,   N]),
    reads(  "/shaper.v1.Broker/ExplainTask",              [Y,   O,   O,   Y,   N,   Y,   N,   N]),
    long(reads("/shaper.v1.Broker/WatchEvents",           [Y,   O,   O,   Y,   N,   Y,   N,   N])),
    reads(  "/shaper.v1.Broker/ListNodes",                [Y,   Y,   Y,   Y,   N,   Y,   N,   N]),
    changes("/shaper.v1.Broker/FenceNode",                [Y,   N,   N,   Y,   N,   N,   N,   N]),
    changes("/shaper.v1.Broker/CordonNode",               [Y,   N,   N,   Y,   N,   N,   N,   N]),
    changes("/shaper.v1.Broker/RemoveNode",               [Y,   N,   N,   Y,   N,   N,   N,   N]),
    reads(  "/shaper.v1.Broker/GetScale",                 [Y,   Y,   Y,   Y,   N,   Y,   N,   N]),
    changes("/shaper.v1.Broker/ApplyPolicy",              [Y,   N,   O,   Y,   N,   N,   N,   N]),
    reads(  "/shaper.v1.Broker/ListPolicies",             [Y,   Y,   O,   Y,   N,   Y,   N,   N]),
    changes("/shaper.v1.Broker/DeletePolicy",             [Y,   N,   O,   Y,   N,   N,   N,   N]),
    reads(  "/shaper.v1.Broker/ListPolicyRevisions",      [Y,   Y,   O,   Y,   N,   Y,   N,   N]),
    changes("/shaper.v1.Broker/RollBackPolicies",         [Y,   N,   N,   Y,   N,   N,   N,   N]),
    reads(  "/shaper.v1.Broker/PreviewPolicies",          [Y,   N,   O,   Y,   N,   N,   N,   N]),
    reads(  "/shaper.v1.Broker/GetProfile",               [Y,   O,   O,   Y,   N,   Y,   N,   N]),
    reads(  "/shaper.v1.Broker/ListProfiles",             [Y,   O,   O,   Y,   N,   Y,   N,   N]),
    reads(  "/externalscaler.ExternalScaler/IsActive",    [Y,   N,   N,   Y,   N,   Y,   N,   N]),
    long(reads("/externalscaler.ExternalScaler/StreamIsActive", [Y, N, N,  Y,   N,   Y,   N,   N])),
    reads(  "/externalscaler.ExternalScaler/GetMetricSpec", [Y, N,   N,   Y,   N,   Y,   N,   N]),
    reads(  "/externalscaler.ExternalScaler/GetMetrics",  [Y,   N,   N,   Y,   N,   Y,   N,   N]),
    changes("/shaper.v1.Broker/OpenUi",                   [Y,   O,   O,   Y,   N,   O,   N,   N]),
    long(changes("/shaper.v1.AgentSession/Attach",        [Y,   N,   N,   N,   O,   N,   N,   N])),
    changes("/shaper.v1.Enrolment/CreateToken",           [Y,   N,   N,   Y,   N,   N,   N,   N]),
    changes("/shaper.v1.Enrolment/Join",                  [N,   N,   N,   N,   N,   N,   N,   O]),
    changes("/shaper.v1.Enrolment/Renew",                 [N,   N,   O,   O,   O,   O,   O,   N]),
    changes("/shaper.v1.Agent/RunTask",                   [Y,   O,   N,   Y,   N,   N,   N,   N]),
    changes("/shaper.v1.Agent/EnterTask",                 [Y,   O,   N,   N,   N,   N,   N,   N]),
    changes("/shaper.v1.Agent/AdoptCgroup",               [Y,   N,   N,   Y,   N,   N,   N,   N]),
    changes("/shaper.v1.Agent/AdmitContainer",            [Y,   N,   N,   Y,   N,   N,   N,   N]),
    reads(  "/shaper.v1.Agent/ListTasks",                 [Y,   O,   N,   Y,   N,   Y,   N,   N]),
    reads(  "/shaper.v1.Agent/GetTask",                   [Y,   O,   N,   Y,   N,   Y,   N,   N]),
    long(reads("/shaper.v1.Agent/WaitTask",               [Y,   O,   N,   Y,   N,   Y,   N,   N])),
    long(reads("/shaper.v1.Agent/ReadLogs",               [Y,   O,   N,   Y,   N,   N,   N,   N])),
    long(changes("/shaper.v1.Agent/SetLimits",            [Y,   N,   N,   Y,   N,   N,   N,   N])),
    changes("/shaper.v1.Agent/CancelTask",                [Y,   O,   N,   Y,   N,   N,   N,   N]),
    long(changes("/shaper.v1.Agent/ReleaseTask",          [Y,   O,   N,   Y,   N,   N,   N,   N])),
    long(changes("/shaper.v1.Agent/ReleaseAll",           [Y,   N,   N,   Y,   N,   N,   N,   N])),
    reads(  "/shaper.v1.Agent/Doctor",                    [Y,   Y,   N,   Y,   N,   Y,   N,   N]),
    reads(  "/shaper.v1.Agent/GetSnapshot",               [Y,   O,   N,   Y,   N,   Y,   N,   N]),
    long(reads("/shaper.v1.Agent/WatchSnapshots",         [Y,   O,   N,   Y,   N,   Y,   N,   N])),
    reads(  "/shaper.v1.Agent/GetLedger",                 [Y,   O,   N,   Y,   N,   Y,   N,   N]),
    reads(  "/grpc.health.v1.Health/Check",               [Y,   Y,   Y,   Y,   Y,   Y,   Y,   N]),
    long(reads("/grpc.health.v1.Health/Watch",            [Y,   Y,   Y,   Y,   Y,   Y,   Y,   N])),
    reads(  "/grpc.health.v1.Health/List",                [Y,   Y,   Y,   Y,   Y,   Y,   Y,   N]),
    long(reads("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
                                                          [Y,   Y,   Y,   Y,   N,   Y,   N,   N])),
];

/// The call of that name, exactly.
pub fn call(path: &str) -> Option<&'static Call> {
    CALLS.iter().find(|call| call.path == path)
}

impl Call {
    /// What the table says of `asker`.
    pub fn verdict(&self, asker: Asker) -> Verdict {
        let column = Asker::ALL.iter().position(|of| *of == asker);
        column.map_or(Verdict::Refused, |column| self.verdicts[column])
    }

    /// Who may, for those who may not.
    pub fn who_may(&self) -> String {
        let may = Asker::ALL.into_iter().filter(|asker| self.verdict(*asker) != Verdict::Refused);
        may.map(|asker| asker.to_string()).collect::<Vec<_>>().join(", ")
    }
}

/// The table as it stands in docs/authorization.md.
pub fn markdown() -> String {
    let names: Vec<String> = Asker::ALL.iter().map(ToString::to_string).collect();
    let mut text =
        format!("| call | {} | audited |\n|---|{}---|\n", names.join(" | "), "---|".repeat(names.len()));
    for call in CALLS {
        let words = call.verdicts.map(|verdict| match verdict {
            Verdict::Refused => "–",
            Verdict::Own => "own",
            Verdict::Allowed => "yes",
        });
        let name = call.path.trim_start_matches('/').trim_start_matches("shaper.v1.");
        let audited = if call.changes { "always" } else { "refusals" };
        text.push_str(&format!("| {name} | {} | {audited} |\n", words.join(" | ")));
    }
    text
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    #[test]
    fn every_call_of_every_service_is_in_the_table_once() {
        let set = prost_types::FileDescriptorSet::decode(shaper_proto::FILE_DESCRIPTOR_SET).unwrap();
        let mut paths = Vec::new();
        for file in &set.file {
            for service in &file.service {
                for method in &service.method {
                    paths.push(format!("/{}.{}/{}", file.package(), service.name(), method.name()));
                }
            }
        }
        paths.sort();
        let mut known: Vec<_> = CALLS
            .iter()
            .map(|call| call.path.to_owned())
            .filter(|path| path.starts_with("/shaper."))
            .collect();
        known.sort();
        assert_eq!(known, paths, "a call without a row is refused to everybody: give it one in {}", file!());
    }

    #[test]
    fn what_is_not_in_the_table_is_nobodys() {
        for path in [
            "",
            "/",
            "/shaper.v1.Broker",
            "/shaper.v1.Broker/",
            "/shaper.v1.Broker/SubmitTaskX",
            "/shaper.v1.Broker/submittask",
            "//shaper.v1.Broker/SubmitTask",
            "/shaper.v1.Broker/SubmitTask/",
        ] {
            assert!(call(path).is_none(), "{path}");
        }
    }

    #[test]
    fn readers_and_strangers_change_nothing_but_what_is_theirs() {
        for call in CALLS.iter().filter(|call| call.changes) {
            let own = |role| matches!(call.verdict(Asker::Role(role)), Verdict::Refused | Verdict::Own);
            assert!(own(Role::Reader) && own(Role::Node) && own(Role::Broker), "{}", call.path);
            assert_eq!(call.verdict(Asker::Role(Role::Authority)), Verdict::Refused, "{}", call.path);
            let joins = call.path == "/shaper.v1.Enrolment/Join";
            assert_eq!(call.verdict(Asker::Stranger) != Verdict::Refused, joins, "{}", call.path);
        }
        for call in CALLS.iter().filter(|call| !call.changes) {
            assert_eq!(call.verdict(Asker::Stranger), Verdict::Refused, "{}", call.path);
        }
    }

    #[test]
    fn the_document_shows_this_table() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/authorization.md");
        let (begin, end) = ("<!-- table: begin -->\n", "<!-- table: end -->");
        let text = std::fs::read_to_string(path).unwrap();
        let (before, rest) = text.split_once(begin).expect("the document has a place for the table");
        let (shown, after) = rest.split_once(end).expect("which ends");
        if std::env::var_os("SHAPER_REGENERATE").is_some() {
            std::fs::write(path, format!("{before}{begin}{}{end}{after}", markdown())).unwrap();
            return;
        }
        let remedy =
            "regenerate it: SHAPER_REGENERATE=1 cargo test -p shaper-identity the_document_shows_this_table";
        assert!(shown == markdown(), "docs/authorization.md differs from the table; {remedy}");
    }
}
