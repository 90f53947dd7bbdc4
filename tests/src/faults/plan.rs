//! Which faults there are, and which comes next: drawn from a seed alone, so that the same seed asks for the same.

use std::time::Duration;

use super::LEASE;
use crate::random::Random;

/// Something that breaks, or is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fault {
    /// SIGKILL of a broker.
    KillBroker,
    /// SIGSTOP of a broker, and SIGCONT.
    StopBroker,
    /// A broker is cut off from etcd, and not from agents and clients.
    CutFromEtcd,
    /// A broker is cut off from the agents.
    CutFromAgents,
    /// The wall clock of a broker jumps.
    JumpClock,
    /// SIGKILL of a member of etcd.
    KillMember,
    /// SIGSTOP of a member, and SIGCONT.
    StopMember,
    /// A member is cut off from everybody.
    CutMember,
    /// What a member answers to a broker is lost.
    MuteMember,
    /// Two members are stopped: what is left is no majority.
    StopMajority,
    /// SIGKILL of an agent.
    KillAgent,
    /// SIGSTOP of an agent, and SIGCONT.
    StopAgent,
    /// An agent is cut off from the brokers.
    CutAgent,
    /// A node is started anew.
    Boot,
}

impl Fault {
    pub(super) fn is_of_etcd(self) -> bool {
        matches!(
            self,
            Fault::KillMember
                | Fault::StopMember
                | Fault::CutMember
                | Fault::MuteMember
                | Fault::StopMajority
        )
    }
}

/// How often each is drawn, relative to the others.
const SHARES: [(Fault, u64); 14] = [
    (Fault::KillBroker, 5),
    (Fault::StopBroker, 4),
    (Fault::CutFromEtcd, 3),
    (Fault::CutFromAgents, 2),
    (Fault::JumpClock, 2),
    (Fault::KillMember, 2),
    (Fault::StopMember, 2),
    (Fault::CutMember, 2),
    (Fault::MuteMember, 1),
    (Fault::StopMajority, 1),
    (Fault::KillAgent, 3),
    (Fault::StopAgent, 2),
    (Fault::CutAgent, 3),
    (Fault::Boot, 2),
];

/// Longest pause after another fault: in a burst, and else.
const BURST_MILLIS: u64 = 300;
const CALM_MILLIS: u64 = 2_500;
/// Longer than it takes to find out by pings that the other side is gone.
const SILENCE: Duration = Duration::from_secs(22);
/// For so long etcd may have no majority.
const MAJORITY: Duration = Duration::from_secs(3);
/// A clock jumps by at most so much, either way.
const JUMP_SECONDS: i64 = 5 * 3600;

/// A fault that is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Strike {
    /// Since the one before.
    pub(super) after: Duration,
    pub(super) fault: Fault,
    /// It is the broker that leads that is meant, if it is a broker.
    pub(super) leader: bool,
    /// Else one by this number.
    pub(super) number: usize,
    /// Until it is mended.
    pub(super) lasts: Duration,
    /// By how many seconds a clock jumps.
    pub(super) jump: i64,
}

impl Strike {
    /// The next one. Everything is drawn each time, so that what is made of one does not change the others.
    pub(super) fn draw(random: &mut Random) -> Strike {
        let whole: u64 = SHARES.iter().map(|(_, share)| share).sum();
        let mut at = random.below(whole);
        let fault = SHARES.iter().find(|(_, share)| match at.checked_sub(*share) {
            Some(rest) => {
                at = rest;
                false
            }
            None => true,
        });
        let fault = fault.map_or(Fault::KillBroker, |(fault, _)| *fault);
        let millis = Duration::from_millis;
        let longest = if random.once_in(3) { BURST_MILLIS } else { CALM_MILLIS };
        let after = millis(random.below(longest));
        let leader = !random.once_in(3);
        let number = random.below(1 << 16) as usize;
        let lease = LEASE.as_millis() as u64;
        // Shorter than the lease, or longer.
        let short = millis(lease / 20 + random.below(lease * 17 / 20));
        let long = LEASE + millis(lease / 10 + random.below(lease * 2));
        let is_of_agent = matches!(fault, Fault::CutAgent | Fault::CutFromAgents | Fault::StopAgent);
        let lasts = match (random.below(20), fault) {
            (_, Fault::StopMajority) => MAJORITY.min(long),
            // Nothing is to be mended.
            (_, Fault::JumpClock) => Duration::ZERO,
            (0, _) if is_of_agent => SILENCE,
            (0..10, _) => short,
            _ => long,
        };
        let jump = random.below(2 * JUMP_SECONDS.unsigned_abs()).cast_signed() - JUMP_SECONDS;
        Strike { after, fault, leader, number, lasts, jump }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_seed_repeats_what_is_drawn_and_every_fault_comes() {
        let draw = |seed| {
            let mut random = Random(seed);
            (0..950).map(|_| Strike::draw(&mut random)).collect::<Vec<_>>()
        };
        let strikes = draw(7);
        assert_eq!(strikes, draw(7));
        assert_ne!(strikes, draw(8));
        let drawn: BTreeSet<Fault> = strikes.iter().map(|strike| strike.fault).collect();
        assert_eq!(drawn.len(), SHARES.len(), "{drawn:?}");
        for bound in [|it: &Strike| it.lasts < LEASE, |it: &Strike| it.lasts > LEASE] {
            let stopped: Vec<_> = strikes.iter().filter(|it| it.fault == Fault::StopBroker).collect();
            assert!(stopped.iter().any(|it| bound(it)), "{stopped:?}");
        }
    }
}
