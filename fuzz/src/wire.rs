//! What comes over gRPC. The first byte says which message the others are of.

use std::fmt::Debug;

use prost::Message;
use shaper_broker::{
    reactor::{Event, SessionId},
    wire as broker,
};
use shaper_core::{
    doctor::Report,
    id::{ExecutionId, TaskId},
    idle,
    ledger::Entry,
    limits::{Limits, LimitsChange},
    shrink,
    snapshot::NodeSnapshot,
    spec::{Capacity, Decision, Demand, Policy, Profile, TaskSpec},
    task::{Phase, TaskStatus, Workload},
};
use shaper_proto::{convert::WireError, v1};

/// A message that becomes a `D`: what is accepted survives the way back, and the wire.
fn survives<D, W>(data: &[u8]) -> Option<D>
where
    D: Clone + PartialEq + Debug + TryFrom<W>,
    D::Error: Debug + std::fmt::Display,
    W: Message + Default + From<D>,
{
    let value = match D::try_from(W::decode(data).ok()?) {
        Ok(value) => value,
        Err(error) => {
            // It is sent to a stranger, and written to the log.
            assert!(error.to_string().len() < 2048, "{error}");
            return None;
        }
    };
    let bytes = W::from(value.clone()).encode_to_vec();
    let again = D::try_from(W::decode(bytes.as_slice()).expect("what was encoded can be decoded"));
    assert_eq!(again.expect("what was accepted is accepted again"), value);
    Some(value)
}

/// A name that comes alone.
fn name(text: &str) {
    if let Ok(id) = text.parse::<TaskId>() {
        assert_eq!(id.as_str(), text);
        assert!(!text.is_empty() && text.len() <= 63 && !text.contains('/') && !text.starts_with('.'));
    }
}

fn execution(execution: &ExecutionId) {
    assert_eq!(execution.to_string().parse().as_ref(), Ok(execution));
}

/// What the broker makes of an agent's messages.
fn agent_message(data: &[u8]) -> Result<(), WireError> {
    let Ok(message) = v1::AgentMessage::decode(data) else { return Ok(()) };
    if let Some(v1::agent_message::Kind::Hello(hello)) = &message.kind {
        let hello = broker::hello(hello.clone())?;
        name(&hello.node);
        assert!(hello.node.parse::<TaskId>().is_ok() && hello.boot_id.len() <= 64);
        hello.inventory.iter().for_each(|task| execution(&task.status.execution()));
        return Ok(());
    }
    match broker::event(SessionId(1), message)? {
        Event::DirectiveResult { result, .. } => execution(&result.execution),
        Event::TaskReport { report, .. } => execution(&report.status.execution()),
        Event::TaskDecision { execution: of, .. } => execution(&of),
        _ => {}
    }
    Ok(())
}

/// What an agent makes of the broker's messages.
fn broker_message(data: &[u8]) -> Option<()> {
    use v1::{broker_message::Kind, directive::Kind as Directive};
    match v1::BrokerMessage::decode(data).ok()?.kind? {
        Kind::Welcome(v1::Welcome { .. }) => {}
        Kind::Policies(v1::PolicySet { policies, .. }) => {
            for policy in policies {
                survives::<Policy, v1::Policy>(&policy.encode_to_vec());
            }
        }
        Kind::Directive(directive) => {
            name(&directive.task_id);
            let start = match directive.kind? {
                Directive::Start(start) => start,
                Directive::LeasedStart(leased) => leased.start?,
                Directive::Resize(resize) => {
                    survives::<Demand, v1::ResourceDemand>(&resize.request?.encode_to_vec());
                    return Some(());
                }
                Directive::Stop(_) | Directive::Forget(_) => return Some(()),
            };
            survives::<TaskSpec, v1::TaskSpec>(&start.spec?.encode_to_vec());
        }
        Kind::Contact(v1::Contact { .. }) => {}
    }
    Some(())
}

/// What the agent makes of a client's messages.
fn client_message(data: &[u8]) -> Option<()> {
    let (which, data) = data.split_first()?;
    match which % 5 {
        0 => {
            let v1::RunTaskRequest { task_id, limits, .. } = v1::RunTaskRequest::decode(data).ok()?;
            name(&task_id);
            survives::<Limits, v1::Limits>(&limits?.encode_to_vec());
        }
        1 => {
            let v1::AdoptCgroupRequest { task_id, limits, .. } = v1::AdoptCgroupRequest::decode(data).ok()?;
            name(&task_id);
            survives::<Limits, v1::Limits>(&limits?.encode_to_vec());
        }
        2 => {
            let v1::SetLimitsRequest { change, .. } = v1::SetLimitsRequest::decode(data).ok()?;
            let change = survives::<LimitsChange, v1::LimitsChange>(&change?.encode_to_vec())?;
            // A change that was made is no change any more.
            let after = Limits::default().with(&change);
            assert_eq!(after.with(&change), after);
        }
        3 => {
            let v1::EnterTaskRequest { task_id, workload, limits, .. } =
                v1::EnterTaskRequest::decode(data).ok()?;
            name(&task_id);
            survives::<Workload, v1::Workload>(&workload?.encode_to_vec());
            survives::<Limits, v1::Limits>(&limits?.encode_to_vec());
        }
        _ => {
            let v1::SubmitTaskRequest { spec } = v1::SubmitTaskRequest::decode(data).ok()?;
            survives::<TaskSpec, v1::TaskSpec>(&spec?.encode_to_vec());
        }
    }
    Some(())
}

/// Any message of either API that is checked when it comes.
pub fn wire(data: &[u8]) {
    let Some((which, data)) = data.split_first() else { return };
    match which % 18 {
        0 => drop(survives::<TaskSpec, v1::TaskSpec>(data)),
        1 => drop(survives::<Policy, v1::Policy>(data)),
        2 => drop(survives::<Limits, v1::Limits>(data)),
        3 => drop(survives::<LimitsChange, v1::LimitsChange>(data)),
        4 => drop(survives::<Profile, v1::TaskProfile>(data)),
        5 => drop(survives::<Demand, v1::ResourceDemand>(data)),
        6 => drop(survives::<Capacity, v1::Capacity>(data)),
        7 => drop(survives::<Decision, v1::Decision>(data)),
        8 => drop(survives::<TaskStatus, v1::Task>(data)),
        9 => drop(survives::<NodeSnapshot, v1::NodeSnapshot>(data)),
        10 => drop(survives::<Report, v1::DoctorReport>(data)),
        11 => {
            if let Some(entry) = survives::<Entry, v1::LedgerEntry>(data) {
                execution(&entry.execution);
            }
        }
        12 => drop(survives::<shrink::Status, v1::Shrink>(data)),
        13 => drop(survives::<idle::Status, v1::IdleReclaim>(data)),
        14 => {
            if let Ok(exit) = v1::Exit::decode(data)
                && let Ok(phase) = Phase::try_from(exit)
                && let Phase::Ended { status, .. } = &phase
            {
                let _ = status.shell_code();
                let again = shaper_proto::convert::exit(&phase).map(Phase::try_from);
                assert_eq!(again, Some(Ok(phase)));
            }
        }
        15 => drop(agent_message(data)),
        16 => drop(broker_message(data)),
        _ => drop(client_message(data)),
    }
}
