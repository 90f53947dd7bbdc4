//! A cluster in which everything can be broken: what is there, what is broken now, and when it is mended.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use rustix::process::Signal;

use super::{
    brokers::{self, BROKERS, Brokers},
    fake,
    history::{History, Seen, Target},
    members::{self, MEMBERS, Member},
    plan::{Fault, Strike},
    switch::{self, Lan, Plug, Switch},
};
use crate::agent;

/// At most so many brokers are at fault at the same time: one is left.
const BROKEN_BROKERS: usize = 2;

/// The agents.
pub(super) enum Agents<'a> {
    Fake(Vec<fake::Agent>),
    Real(Vec<(agent::Agent<'a>, Plug)>),
}

impl Agents<'_> {
    fn count(&self) -> usize {
        match self {
            Agents::Fake(all) => all.len(),
            Agents::Real(all) => all.len(),
        }
    }

    fn plug(&self, number: usize) -> &Plug {
        match self {
            Agents::Fake(all) => &all[number].plug,
            Agents::Real(all) => &all[number].1,
        }
    }

    fn kill(&mut self, number: usize) {
        match self {
            Agents::Fake(all) => all[number].kill(),
            Agents::Real(all) => all[number].0.kill9(),
        }
    }

    fn start(&mut self, number: usize) {
        match self {
            Agents::Fake(all) => all[number].go_on(),
            Agents::Real(all) => all[number].0.restart(),
        }
    }

    fn stop(&self, number: usize) {
        match self {
            Agents::Fake(all) => all[number].stop(),
            Agents::Real(all) => all[number].0.freeze(true),
        }
    }

    fn go_on(&self, number: usize) {
        match self {
            Agents::Fake(all) => all[number].go_on(),
            Agents::Real(all) => all[number].0.freeze(false),
        }
    }
}

/// What is to be undone, to which of its kind.
#[derive(Clone, Copy, Debug)]
struct Mend {
    at: Instant,
    fault: Fault,
    target: Target,
    /// The broker that a member does not answer.
    other: usize,
}

/// The cluster. What is below in it depends on what is above.
pub(super) struct World<'a> {
    pub(super) agents: Agents<'a>,
    pub(super) brokers: Brokers,
    members: Vec<Member>,
    switch: Switch,
    history: History,
    broken: BTreeSet<Target>,
    to_mend: Vec<Mend>,
    /// How often there was which.
    pub(super) counts: BTreeMap<Fault, u32>,
}

impl<'a> World<'a> {
    /// etcd and brokers. `agents` makes the agents, once there are brokers to connect to.
    pub(super) fn start(
        directory: &Path,
        identities: &Path,
        history: &History,
        agents: impl FnOnce(&Switch) -> Agents<'a>,
    ) -> World<'a> {
        let switch = Switch::new();
        let members = members::start(&switch, directory);
        let brokers = Brokers::start(&switch, directory, identities, history);
        let agents = agents(&switch);
        let (broken, to_mend, counts) = Default::default();
        World { agents, brokers, members, switch, history: history.clone(), broken, to_mend, counts }
    }

    /// Lets so much time pass, and mends what is due in it.
    pub(super) fn pass(&mut self, time: Duration) {
        let until = Instant::now() + time;
        loop {
            let due = self.to_mend.iter().map(|mend| mend.at).min().filter(|due| *due < until);
            thread::sleep(due.unwrap_or(until).saturating_duration_since(Instant::now()));
            if due.is_none() {
                return;
            }
            self.mend(|mend| mend.at <= Instant::now());
        }
    }

    /// Mends everything.
    pub(super) fn mend_all(&mut self) {
        self.mend(|_| true);
    }

    fn mend(&mut self, is_due: impl Fn(&Mend) -> bool) {
        let (due, later): (Vec<_>, Vec<_>) = self.to_mend.drain(..).partition(|mend| is_due(mend));
        self.to_mend = later;
        for mend in due {
            self.undo(mend);
            self.broken.remove(&mend.target);
            self.history.note(Seen::Mended { target: mend.target });
        }
    }

    /// Breaks something, unless that is broken already, or too much is. Whether it did.
    pub(super) fn strike(&mut self, strike: &Strike) -> bool {
        let targets = self.targets(strike);
        if targets.is_empty() {
            return false;
        }
        let leader = self.brokers.leader();
        let other = leader.filter(|_| strike.leader).unwrap_or(strike.number % BROKERS);
        for target in targets {
            // The others do not end its reign.
            let ends_reign =
                matches!(strike.fault, Fault::KillBroker | Fault::StopBroker | Fault::CutFromEtcd);
            let leads = ends_reign && matches!(target, Target::Broker(number) if Some(number) == leader);
            let fault = format!("{:?} for {:?}", strike.fault, strike.lasts);
            self.history.note(Seen::Struck { target, fault, leads });
            self.do_it(strike, target, other);
            let mend = Mend { at: Instant::now() + strike.lasts, fault: strike.fault, target, other };
            self.broken.insert(target);
            self.to_mend.push(mend);
        }
        *self.counts.entry(strike.fault).or_default() += 1;
        true
    }

    /// What it is done to; nothing where that cannot be.
    fn targets(&self, strike: &Strike) -> Vec<Target> {
        let is_whole = |target: &Target| !self.broken.contains(target);
        let one_of = |count: usize, target: fn(usize) -> Target| {
            Some(target(strike.number % count)).into_iter().filter(is_whole).collect::<Vec<_>>()
        };
        let count = |is: fn(&Target) -> bool| self.broken.iter().filter(|target| is(target)).count();
        match strike.fault {
            Fault::KillBroker
            | Fault::StopBroker
            | Fault::CutFromEtcd
            | Fault::CutFromAgents
            | Fault::JumpClock => {
                if count(|target| matches!(target, Target::Broker(_))) >= BROKEN_BROKERS {
                    return Vec::new();
                }
                let leader = self.brokers.leader().filter(|_| strike.leader);
                let number = leader.unwrap_or(strike.number % BROKERS);
                Some(Target::Broker(number)).into_iter().filter(is_whole).collect()
            }
            Fault::KillMember
            | Fault::StopMember
            | Fault::CutMember
            | Fault::MuteMember
            | Fault::StopMajority
                if count(|target| matches!(target, Target::Etcd(_))) > 0 =>
            {
                Vec::new()
            }
            Fault::KillMember | Fault::StopMember | Fault::CutMember | Fault::MuteMember => {
                one_of(MEMBERS, Target::Etcd)
            }
            Fault::StopMajority => {
                let majority = MEMBERS / 2 + 1;
                (0..majority).map(|next| Target::Etcd((strike.number + next) % MEMBERS)).collect()
            }
            Fault::Boot if matches!(self.agents, Agents::Real(_)) => Vec::new(),
            Fault::KillAgent | Fault::StopAgent | Fault::CutAgent | Fault::Boot => {
                one_of(self.agents.count(), Target::Agent)
            }
        }
    }

    fn do_it(&mut self, strike: &Strike, target: Target, other: usize) {
        match target {
            Target::Broker(number) => {
                let broker = &self.brokers.all[number];
                let [to_etcd, to_agents] = &broker.plugs;
                match strike.fault {
                    Fault::KillBroker => broker.kill(),
                    Fault::StopBroker => broker.signal(Signal::STOP),
                    Fault::CutFromEtcd => self.switch.pull(to_etcd),
                    Fault::CutFromAgents => self.switch.pull(to_agents),
                    _ => broker.set_clock(strike.jump),
                }
            }
            Target::Etcd(number) => {
                let member = &self.members[number];
                match strike.fault {
                    Fault::KillMember => member.kill(),
                    Fault::CutMember => self.switch.pull(&member.plug),
                    Fault::MuteMember => switch::mute(&member.netns, &brokers::address(Lan::Etcd, other)),
                    _ => member.signal(Signal::STOP),
                }
            }
            Target::Agent(number) => match strike.fault {
                Fault::StopAgent => self.agents.stop(number),
                Fault::CutAgent => self.switch.pull(self.agents.plug(number)),
                fault => {
                    self.agents.kill(number);
                    if let (Fault::Boot, Agents::Fake(all)) = (fault, &self.agents) {
                        all[number].machine.boot();
                    }
                }
            },
        }
    }

    fn undo(&mut self, Mend { fault, target, other, at: _ }: Mend) {
        match target {
            Target::Broker(number) => {
                let broker = &self.brokers.all[number];
                let [to_etcd, to_agents] = &broker.plugs;
                match fault {
                    Fault::KillBroker => broker.let_go(),
                    Fault::StopBroker => broker.signal(Signal::CONT),
                    Fault::CutFromEtcd => self.switch.plug_in(to_etcd),
                    Fault::CutFromAgents => self.switch.plug_in(to_agents),
                    // It stays wrong until it jumps again.
                    _ => {}
                }
            }
            Target::Etcd(number) => {
                let member = &self.members[number];
                match fault {
                    Fault::KillMember => member.start(),
                    Fault::CutMember => self.switch.plug_in(&member.plug),
                    Fault::MuteMember => switch::unmute(&member.netns, &brokers::address(Lan::Etcd, other)),
                    _ => member.signal(Signal::CONT),
                }
            }
            Target::Agent(number) => match fault {
                Fault::StopAgent => self.agents.go_on(number),
                Fault::CutAgent => self.switch.plug_in(self.agents.plug(number)),
                _ => self.agents.start(number),
            },
        }
    }
}
