//! The queue in which what arrives waits (docs/decisions/0022): a device of ours (ifb) with a class of HTB for each slot that
//! is limited. A filter at the ingress of each uplink sends there what is for the sockets of such a slot; from the device it
//! goes on as if it had just arrived at the uplink. Nothing of it is there while no slot is limited.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
    path::Path,
};

use shaper_core::units::BitsPerSec;

use super::{
    netlink::{
        self, LINK, NLM_F_ACK, NLM_F_CREATE, NLM_F_ECHO, NLM_F_EXCL, NLM_F_REPLACE, RTM_DELLINK,
        RTM_DELTCLASS, RTM_DELTFILTER, RTM_GETLINK, RTM_GETTCLASS, RTM_NEWLINK, RTM_NEWQDISC, RTM_NEWTCLASS,
        RTM_NEWTFILTER, RTM_SETLINK, Request, TRAFFIC_CONTROL, word,
    },
    qdisc::{self, CLSACT_INGRESS, PRIORITY, UplinkError},
};
use crate::opener::Opener;

/// What is to be done where the kernel lacks a part.
const REMEDY: &str = "load it (modprobe ifb sch_htb cls_bpf act_mirred), or use a kernel that has CONFIG_IFB, \
                      CONFIG_NET_SCH_HTB, CONFIG_NET_CLS_BPF and CONFIG_NET_ACT_MIRRED. Until then limit what is sent, at \
                      its sender";

/// What went wrong with the queue.
#[derive(Debug, thiserror::Error)]
pub enum IngressError {
    /// Nowhere to hold it.
    #[error(
        "net_ingress: no uplink of this node can be used. Start its agent with --uplink DEVICE, the device at which it arrives"
    )]
    NoUplink,
    /// The kernel does not take the program that tells whose a packet is.
    #[error(
        "net_ingress: this kernel does not take the program that tells whose a packet is (`shaper doctor` says why). \
         Limit what is sent, at its sender"
    )]
    NoProgram,
    /// The kernel lacks something.
    #[error("net_ingress: this kernel has no {what}: {REMEDY}")]
    Unsupported {
        /// What is missing.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// Somebody else's device has our name.
    #[error("net_ingress: there is a network device `{0}` that is no ifb, and not shaper's: rename it")]
    Foreign(String),
    /// A request of rtnetlink.
    #[error("net_ingress: cannot {verb} {device}")]
    Request {
        /// What was tried.
        verb: &'static str,
        /// The device.
        device: String,
        /// What went wrong.
        source: io::Error,
    },
    /// The qdisc of an uplink.
    #[error(transparent)]
    Uplink(#[from] UplinkError),
}

impl IngressError {
    /// Whether it is for the user to see to.
    pub fn is_refusal(&self) -> bool {
        matches!(
            self,
            IngressError::NoUplink
                | IngressError::NoProgram
                | IngressError::Unsupported { .. }
                | IngressError::Foreign(_)
        )
    }
}

/// How much a class has sent and not sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClassState {
    /// Its rate, bytes a second.
    pub rate: u64,
    /// Buffers that found the queue full.
    pub dropped: u32,
    /// Bytes that wait.
    pub waiting: u32,
}

/// The device and where it is fed from, by their names: whether they are there is asked of the kernel each time.
pub struct Queue {
    device: String,
    filter: u32,
}

const MAJOR: u32 = 0x5a9e_0000;
const ROOT: u32 = u32::MAX;
const FIRST_MINOR: u32 = 1;
const IFF_UP: u32 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_TXQLEN: u16 = 13;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_IFALIAS: u16 = 20;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const AF_INET6: u16 = 10;
const NO_ADDRESSES: u8 = 1;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_STATS2: u16 = 7;
const TCA_STATS_QUEUE: u16 = 3;
const TCA_HTB_PARMS: u16 = 1;
const TCA_HTB_INIT: u16 = 2;
const TCA_HTB_RATE64: u16 = 6;
const TCA_HTB_CEIL64: u16 = 7;
const TCA_BPF_ACT: u16 = 1;
const TCA_BPF_OPS_LEN: u16 = 4;
const TCA_BPF_OPS: u16 = 5;
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const TCA_MIRRED_PARMS: u16 = 2;
const TCA_EGRESS_REDIR: u32 = 1;
const TC_ACT_STOLEN: u32 = 4;
/// ETH_P_ALL in the order of the network.
const ALL_PROTOCOLS: u32 = 0x0003u16.to_be() as u32;
const TC_LINKLAYER_ETHERNET: u8 = 1;
/// The kernel counts these times so.
const NS_PER_TICK: u64 = 64;
/// After silence so much is let through at once: what wakes the queue may come that late.
const BURST_NS: u64 = 10_000_000;
/// Two of the largest frames.
const BURST_MIN: u64 = 2 * 1514;
/// So much may wait …
const WAIT_NS: u64 = 50_000_000;
/// … and in any case two of the largest buffers: one that never fits never arrives.
const WAITING_MIN: u64 = 128 << 10;
/// What a class sends in its turn.
const QUANTUM: u32 = 64 << 10;

impl Queue {
    /// That of the agent whose pins are in `directory`: several may be on one machine.
    pub fn of(directory: &Path) -> Queue {
        // FNV-1a
        let hash = directory
            .as_os_str()
            .as_encoded_bytes()
            .iter()
            .fold(0x811c_9dc5u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
        Queue { device: format!("shaper-{hash:08x}"), filter: hash & 0x7fff_ffff | 1 }
    }

    /// Its device.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// The class of a slot: what a packet is marked with.
    pub fn class(slot: u32) -> u32 {
        MAJOR | (slot + FIRST_MINOR)
    }

    /// Makes what is missing of the device.
    pub fn make(&self) -> Result<u32, IngressError> {
        let index = match self.find()? {
            Some(index) => index,
            None => self.make_device()?,
        };
        let root = Request::traffic_control(RTM_NEWQDISC, MAKE, index, MAJOR, ROOT, 0);
        // struct tc_htb_glob: version, rate2quantum, no default class
        let glob = words(&[3, 10, 0, 0, 0]);
        let root =
            root.with_text(TCA_KIND, "htb").with_nested(TCA_OPTIONS, |it| it.with(TCA_HTB_INIT, &glob));
        match root.send() {
            Ok(_) => Ok(index),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(index),
            Err(source) => {
                Err(self.refused("queueing discipline `htb`", "put a queueing discipline on", source))
            }
        }
    }

    fn make_device(&self) -> Result<u32, IngressError> {
        let made = Request::link(RTM_NEWLINK, MAKE, 0, 0)
            .with_text(IFLA_IFNAME, &self.device)
            .with(IFLA_TXQLEN, &1000u32.to_ne_bytes())
            .with_nested(IFLA_LINKINFO, |it| it.with_text(IFLA_INFO_KIND, "ifb"))
            .send();
        made.map_err(|source| self.refused("network device of the kind `ifb`", "make the device", source))?;
        let index = self.find()?.ok_or_else(|| self.failed("find", io::ErrorKind::NotFound.into()))?;
        let named = Request::link(RTM_SETLINK, NLM_F_ACK, index, 0)
            .with_text(IFLA_IFALIAS, "shaper: where what limited tasks receive waits")
            .send();
        named.map_err(|source| self.failed("name", source))?;
        // It is nobody's neighbour. (Without IPv6 it has no address anyway.)
        let _ = Request::link(RTM_SETLINK, NLM_F_ACK, index, 0)
            .with_nested(IFLA_AF_SPEC, |it| {
                it.with_nested(AF_INET6, |it| it.with(IFLA_INET6_ADDR_GEN_MODE, &[NO_ADDRESSES]))
            })
            .send();
        let up = Request::link(RTM_SETLINK, NLM_F_ACK, index, IFF_UP).send();
        up.map_err(|source| self.failed("start", source))?;
        Ok(index)
    }

    /// Index of the device, if it is there.
    pub fn find(&self) -> Result<Option<u32>, IngressError> {
        let found = Request::link(RTM_GETLINK, NLM_F_ACK, 0, 0).with_text(IFLA_IFNAME, &self.device).send();
        let found = match found {
            Ok(found) => found,
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(None),
            Err(source) => return Err(self.failed("look for", source)),
        };
        let Some(link) = found.first() else { return Ok(None) };
        match link.attribute(LINK, &[IFLA_LINKINFO, IFLA_INFO_KIND]) {
            Some(b"ifb\0") => Ok(Some(link.word(4))),
            _ => Err(IngressError::Foreign(self.device.clone())),
        }
    }

    /// Gives a slot a class with that rate, bytes a second, or another rate to that which it has.
    pub fn limit(&self, index: u32, slot: u32, rate: u64) -> Result<(), IngressError> {
        let class = Queue::class(slot);
        let request =
            Request::traffic_control(RTM_NEWTCLASS, NLM_F_ACK | NLM_F_CREATE, index, class, MAJOR, 0);
        let request = request.with_text(TCA_KIND, "htb").with_nested(TCA_OPTIONS, |it| {
            it.with(TCA_HTB_PARMS, &parameters(rate))
                .with(TCA_HTB_RATE64, &rate.to_ne_bytes())
                .with(TCA_HTB_CEIL64, &rate.to_ne_bytes())
        });
        request.send().map_err(|source| self.failed("give a class to", source))?;
        let waiting = u32::try_from(of(rate, WAIT_NS).max(WAITING_MIN)).unwrap_or(u32::MAX);
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
        let queue = Request::traffic_control(RTM_NEWQDISC, flags, index, 0, class, 0)
            .with_text(TCA_KIND, "bfifo")
            .with(TCA_OPTIONS, &waiting.to_ne_bytes())
            .send();
        queue.map(drop).map_err(|source| self.failed("set the length of a queue of", source))
    }

    /// What the class of a slot has, if it has one.
    pub fn state(&self, slot: u32) -> Result<Option<ClassState>, IngressError> {
        let Some(index) = self.find()? else { return Ok(None) };
        let found =
            Request::traffic_control(RTM_GETTCLASS, NLM_F_ACK | NLM_F_ECHO, index, Queue::class(slot), 0, 0)
                .send();
        let found = match found {
            Ok(found) => found,
            Err(error) if is_missing(&error) => return Ok(None),
            Err(source) => return Err(self.failed("read a class of", source)),
        };
        let Some(class) = found.iter().find(|message| message.kind == RTM_NEWTCLASS) else { return Ok(None) };
        let option = |kind| class.attribute(TRAFFIC_CONTROL, &[TCA_OPTIONS, kind]);
        // The kernel says the long form only where the short one has no room for it.
        let long = option(TCA_HTB_RATE64).and_then(|bytes| Some(u64::from_ne_bytes(bytes.try_into().ok()?)));
        let short = option(TCA_HTB_PARMS).and_then(|parameters| word(parameters, 8)).map(u64::from);
        // struct gnet_stats_queue: length, bytes, drops
        let count = |at| {
            let queue = class.attribute(TRAFFIC_CONTROL, &[TCA_STATS2, TCA_STATS_QUEUE]);
            queue.and_then(|queue| word(queue, at)).unwrap_or(0)
        };
        Ok(long.or(short).map(|rate| ClassState { rate, waiting: count(4), dropped: count(8) }))
    }

    /// Takes the class of a slot away, with what waits in it: TCP sends that again.
    pub fn lift(&self, slot: u32) -> Result<(), IngressError> {
        let Some(index) = self.find()? else { return Ok(()) };
        match Request::traffic_control(RTM_DELTCLASS, NLM_F_ACK, index, Queue::class(slot), MAJOR, 0).send() {
            Err(error) if is_missing(&error) => Ok(()),
            other => other.map(drop).map_err(|source| self.failed("take a class from", source)),
        }
    }

    /// Has the filter at the ingress of each uplink send to the device what `program` matches; takes the place of an earlier
    /// agent's. An uplink that is not there is left out; one at least must be. Returns those that were used.
    pub fn feed<'a>(
        &self,
        index: u32,
        uplinks: &'a [String],
        marks: &Path,
        program: BorrowedFd<'_>,
    ) -> Result<Vec<&'a str>, IngressError> {
        let mut fed = Vec::new();
        for uplink in uplinks {
            let failed = |verb, source| IngressError::Request { verb, device: uplink.clone(), source };
            let from = match qdisc::ifindex(uplink) {
                Ok(from) => from,
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {
                    tracing::warn!(
                        device = uplink,
                        "an uplink is not there: what arrives by it is not limited"
                    );
                    continue;
                }
                Err(source) => return Err(failed("find", source)),
            };
            qdisc::add_clsact(uplink, marks)?;
            let program = (program.as_raw_fd() as u32).to_ne_bytes();
            let added = filter(from, self.filter, index, |it| {
                it.with(TCA_BPF_FD, &program).with_text(TCA_BPF_NAME, "shaper_ingress")
            });
            added.map_err(|source| match source.raw_os_error() {
                Some(libc::ENOENT) => {
                    IngressError::Unsupported { what: "classifier `bpf` or action `mirred`", source }
                }
                _ => failed("filter what arrives at", source),
            })?;
            fed.push(uplink.as_str());
        }
        if fed.is_empty() { Err(IngressError::NoUplink) } else { Ok(fed) }
    }

    /// Whether every uplink that is there has our filter.
    pub fn is_fed(&self, uplinks: &[String]) -> bool {
        let mut there = uplinks.iter().filter_map(|uplink| qdisc::ifindex(uplink).ok()).peekable();
        there.peek().is_some()
            && there
                .all(|index| qdisc::has_filter(index, CLSACT_INGRESS, PRIORITY, self.filter).unwrap_or(false))
    }

    /// Takes everything away: the filters, the qdiscs of the uplinks that are ours and that nothing else needs, the device.
    pub fn remove(&self, marks: &Path) -> Result<Vec<String>, IngressError> {
        let mut done = Vec::new();
        for uplink in qdisc::marked(marks)? {
            let failed = |source| IngressError::Request {
                verb: "take the filter of what arrives off",
                device: uplink.clone(),
                source,
            };
            if let Ok(from) = qdisc::ifindex(&uplink)
                && qdisc::has_filter(from, CLSACT_INGRESS, PRIORITY, self.filter).map_err(failed)?
            {
                let info = u32::from(PRIORITY) << 16 | ALL_PROTOCOLS;
                let request = Request::traffic_control(
                    RTM_DELTFILTER,
                    NLM_F_ACK,
                    from,
                    self.filter,
                    CLSACT_INGRESS,
                    info,
                );
                request.with_text(TCA_KIND, "bpf").send().map_err(failed)?;
                done.push(format!("uplink {uplink}: what arrives is not limited any more"));
            }
            qdisc::remove_clsact(&uplink, marks)?;
        }
        match self.find() {
            Ok(Some(index)) => {
                let gone = Request::link(RTM_DELLINK, NLM_F_ACK, index, 0).send();
                gone.map_err(|source| self.failed("remove", source))?;
                done.push(format!("{}: removed", self.device));
            }
            // Not ours to remove.
            Ok(None) | Err(IngressError::Foreign(_)) => {}
            Err(error) => return Err(error),
        }
        Ok(done)
    }

    fn failed(&self, verb: &'static str, source: io::Error) -> IngressError {
        IngressError::Request { verb, device: self.device.clone(), source }
    }

    /// What the kernel says of kinds that it does not know.
    fn refused(&self, what: &'static str, verb: &'static str, source: io::Error) -> IngressError {
        match source.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::ENOENT) => IngressError::Unsupported { what, source },
            _ => self.failed(verb, source),
        }
    }
}

const MAKE: u16 = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;

/// A filter of what arrives at a device that sends what it matches to another. `program` says by what.
fn filter(from: u32, handle: u32, to: u32, program: impl FnOnce(Request) -> Request) -> io::Result<()> {
    // struct tc_mirred: index, capabilities, what becomes of the packet here, two counts; where it goes.
    let mirred = words(&[0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR, to]);
    let info = u32::from(PRIORITY) << 16 | ALL_PROTOCOLS;
    let flags = NLM_F_ACK | NLM_F_CREATE;
    let request = Request::traffic_control(RTM_NEWTFILTER, flags, from, handle, CLSACT_INGRESS, info);
    let request = request.with_text(TCA_KIND, "bpf").with_nested(TCA_OPTIONS, |it| {
        program(it).with_nested(TCA_BPF_ACT, |it| {
            it.with_nested(1, |it| {
                it.with_text(TCA_ACT_KIND, "mirred")
                    .with_nested(TCA_ACT_OPTIONS, |it| it.with(TCA_MIRRED_PARMS, &mirred))
            })
        })
    });
    request.send().map(drop)
}

/// `struct tc_htb_opt`: rate and ceiling, how much of either is let through at once, and the turn.
fn parameters(rate: u64) -> Vec<u8> {
    let short = u32::try_from(rate).unwrap_or(u32::MAX);
    // struct tc_ratespec: cell_log, link layer, overhead, cell_align, mpu, rate. The link layer keeps the kernel from asking
    // for a table of times.
    let speed = [&[0, TC_LINKLAYER_ETHERNET, 0, 0, 0, 0, 0, 0], &short.to_ne_bytes()[..]].concat();
    let burst_ns = BURST_NS.max((BURST_MIN * 1_000_000_000).div_ceil(rate.max(1)));
    let burst = u32::try_from(burst_ns / NS_PER_TICK).unwrap_or(u32::MAX);
    [&speed[..], &speed, &words(&[burst, burst, QUANTUM, 0, 0])].concat()
}

/// How much comes at a rate in a time.
fn of(rate: u64, ns: u64) -> u64 {
    u64::try_from(u128::from(rate) * u128::from(ns) / 1_000_000_000).unwrap_or(u64::MAX)
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// Whether a class, or what it was to be on, is not there.
fn is_missing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::EINVAL))
}

/// Index of the loopback device, in every network namespace.
const LO: u32 = 1;

/// Whether the kernel has all that the queue is made of: makes one, in a network namespace that ends with it.
pub fn probe(opener: &Opener) -> Result<(), IngressError> {
    let socket = opener.network().map_err(|source| IngressError::Request {
        verb: "make a namespace to try",
        device: "it in".into(),
        source,
    })?;
    netlink::through(socket, || {
        let queue = Queue::of(Path::new("probe"));
        let index = queue.make()?;
        queue.limit(index, 0, BitsPerSec(1_000_000).bytes_per_sec())?;
        qdisc::make_clsact(LO).map_err(|source| queue.refused("qdisc clsact", "give lo", source))?;
        // One instruction of the old kind: it matches all.
        let ops = [&6u16.to_ne_bytes()[..], &[0, 0], &u32::MAX.to_ne_bytes()].concat();
        filter(LO, queue.filter, index, |it| {
            it.with(TCA_BPF_OPS_LEN, &1u16.to_ne_bytes()).with(TCA_BPF_OPS, &ops)
        })
        .map_err(|source| queue.refused("classifier `bpf` or action `mirred`", "filter for", source))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_agent_has_a_device_of_its_own_whose_name_the_kernel_takes() {
        let [one, other] = ["/sys/fs/bpf/shaper", "/sys/fs/bpf/other"].map(|path| Queue::of(Path::new(path)));
        assert_ne!((one.device(), one.filter), (other.device(), other.filter));
        assert!(one.device().len() < 16 && one.filter != 0 && one.filter < 1 << 31);
    }

    #[test]
    fn a_class_lets_two_frames_through_at_once_or_ten_milliseconds() {
        let burst = |rate| word(&parameters(rate), 24).unwrap();
        assert_eq!(burst(12_500_000), 10_000_000 / 64);
        // 3,028 bytes at 1 kbit/s.
        assert_eq!(u64::from(burst(125)), 3028 * 1_000_000_000 / 125 / 64);
        assert_eq!(burst(0), u32::MAX);
        assert_eq!(word(&parameters(5_000_000_000), 8), Some(u32::MAX));
        assert_eq!((of(2_500_000, WAIT_NS), parameters(1).len()), (125_000, 44));
    }
}
