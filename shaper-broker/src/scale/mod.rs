//! Who starts and ends nodes, and how each is told: a task for each group, which carries out one order at a time and, where its
//! provider can say how the group is, asks it.
//!
//! An order names a size. A provider that is told differences is asked first what it works towards, so that an order that
//! was carried out before an answer was lost is not carried out twice.

mod exec;
mod external_grpc;
mod keda;
#[cfg(test)]
mod tests;
mod webhook;

use std::{collections::BTreeMap, future::Future, time::Duration};

use shaper_core::{
    scale::{Group, Observed, Order, Outcome, Provider, Scaling},
    spec::Capacity,
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::{MissedTickBehavior, interval, timeout},
};

pub use self::keda::Keda;
use self::{exec::Exec, external_grpc::ExternalGrpc, webhook::Webhook};
use crate::{
    actor::{ActorError, Handle},
    reactor::{Event, ScaleEvent, scale::Wish},
    standing::Standing,
};

/// Between two looks at what waits.
const LOOK: Duration = Duration::from_secs(1);
/// Between two questions to a provider.
const ASK: Duration = Duration::from_secs(10);
/// Of what a provider says when it fails, so much is kept.
const MOST_WORDS: usize = 300;

/// What is wished of each group, by name, as it changes.
pub type Wishes = watch::Receiver<BTreeMap<String, Wish>>;

/// One who starts and ends nodes.
enum Driver {
    ExternalGrpc(Box<ExternalGrpc>),
    Webhook(Box<Webhook>),
    Exec(Exec),
    /// It asks by itself.
    Keda,
}

impl Driver {
    fn of(group: &Group) -> Driver {
        match &group.provider {
            Provider::ExternalGrpc { address, group: id, ca, identity } => Driver::ExternalGrpc(Box::new(
                ExternalGrpc::new(address, id, ca.as_deref(), identity.as_ref()),
            )),
            Provider::Webhook { url, secret_file, ca } => {
                Driver::Webhook(Box::new(Webhook::new(url, secret_file, ca.as_deref())))
            }
            Provider::Exec { command } => Driver::Exec(Exec::new(command)),
            Provider::Keda => Driver::Keda,
        }
    }

    async fn carry_out(&mut self, group: &Group, order: &Order) -> Outcome {
        match self {
            Driver::ExternalGrpc(provider) => provider.carry_out(order).await.map(Some),
            Driver::Webhook(webhook) => webhook.carry_out(group, order).await.map(|()| None),
            Driver::Exec(exec) => exec.carry_out(group, order).await.map(|()| None),
            Driver::Keda => Ok(None),
        }
    }

    async fn observe(&mut self) -> Result<Observed, String> {
        match self {
            Driver::ExternalGrpc(provider) => provider.observe().await,
            Driver::Webhook(_) | Driver::Exec(_) | Driver::Keda => std::future::pending().await,
        }
    }

    /// What a new node has, if it can say that.
    async fn template(&mut self) -> Result<Option<Capacity>, String> {
        match self {
            Driver::ExternalGrpc(provider) => provider.template().await,
            Driver::Webhook(_) | Driver::Exec(_) | Driver::Keda => Ok(None),
        }
    }
}

/// What has to do with groups of nodes while this broker lasts: nothing, before it leads.
pub async fn run(
    broker: Handle,
    scaling: Scaling,
    mut orders: mpsc::UnboundedReceiver<(String, Order)>,
    mut standing: watch::Receiver<Standing>,
    wishes: watch::Sender<BTreeMap<String, Wish>>,
) {
    // An error is the end of the broker.
    if standing.wait_for(|standing| *standing == Standing::Leads).await.is_err() {
        return;
    }
    let mut groups = JoinSet::new();
    let mut ways = BTreeMap::new();
    for group in scaling.groups {
        let (way, orders) = mpsc::unbounded_channel();
        ways.insert(group.name.clone(), way);
        groups.spawn(tend(broker.clone(), group, orders));
    }
    let mut looks = interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            order = orders.recv() => {
                let Some((group, order)) = order else { return };
                if let Some(way) = ways.get(&group) {
                    // A group lasts as long as this does.
                    let _ = way.send(order);
                }
            }
            _ = looks.tick() => {
                let told = broker.tell(vec![Event::Scale(ScaleEvent::Look)]).await;
                let wished = broker.read(|view| view.state.scale.wishes()).await;
                match (told, wished) {
                    (Ok(()), Ok(wished)) => {
                        wishes.send_if_modified(|before| std::mem::replace(before, wished.clone()) != wished);
                    }
                    // What it wishes is told with the next look.
                    (Ok(()), Err(ActorError::Busy)) => {}
                    _ => return,
                }
            }
        }
    }
}

/// One group.
async fn tend(broker: Handle, group: Group, mut orders: mpsc::UnboundedReceiver<Order>) {
    let mut driver = Driver::of(&group);
    let patience = Duration::from_nanos(group.timeout);
    let mut questions = interval(ASK);
    questions.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut needs_template = group.capacity.is_none();
    loop {
        let event = tokio::select! {
            order = orders.recv() => {
                let Some(order) = order else { return };
                let outcome = within(patience, driver.carry_out(&group, &order)).await;
                if let Err(why) = &outcome {
                    tracing::warn!(group = group.name, number = order.number, why, "the group was not changed");
                }
                ScaleEvent::Done { group: group.name.clone(), number: order.number, outcome }
            }
            _ = questions.tick(), if group.provider.tells() => {
                if needs_template && let Ok(Some(capacity)) = within(patience, driver.template()).await {
                    needs_template = false;
                    let event = ScaleEvent::Template { group: group.name.clone(), capacity };
                    if broker.tell(vec![Event::Scale(event)]).await.is_err() {
                        return;
                    }
                }
                let observed = within(patience, driver.observe()).await;
                ScaleEvent::Observed { group: group.name.clone(), observed }
            }
        };
        if broker.tell(vec![Event::Scale(event)]).await.is_err() {
            return;
        }
    }
}

/// What a provider answers, if it does in time.
async fn within<T>(patience: Duration, answer: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    match timeout(patience, answer).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(why)) => Err(words(&why)),
        Err(_) => Err(format!("its provider did not answer within {} s", patience.as_secs_f64())),
    }
}

/// What somebody says, as far as it is kept: one line, not too long.
fn words(text: &str) -> String {
    let line: String = text.trim().chars().map(|it| if it.is_control() { ' ' } else { it }).collect();
    match line.char_indices().nth(MOST_WORDS) {
        Some((end, _)) => format!("{} …", &line[..end]),
        None => line,
    }
}

/// An error and its causes in one line.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
