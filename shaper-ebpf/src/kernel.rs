//! Fields of kernel structures, without CO-RE.
//!
//! Each offset is a global that the agent fills from the running kernel's BTF before the load.
//! `.rodata` is frozen then, so the verifier sees constants, pointers keep their type, and a wrong
//! offset of a *pointer* is refused at load. (Offsets of scalars are not checked by it.)

use core::{arch::asm, ptr::read_volatile};

use shaper_common::abi::IO_DISCARD;

macro_rules! offsets {
    ($($(#[$doc:meta])* $name:ident;)*) => {
        $($(#[$doc])* #[unsafe(no_mangle)] static $name: u64 = 0;)*
    };
}

offsets! {
    /// task_struct.cgroups
    OFF_TASK_CGROUPS;
    /// task_struct.pid
    OFF_TASK_PID;
    /// task_struct.sched_info.last_queued
    OFF_TASK_LAST_QUEUED;
    /// task_struct.se.cfs_rq
    OFF_TASK_CFS_RQ;
    /// cfs_rq.rq
    OFF_CFS_RQ_RQ;
    /// rq.clock
    OFF_RQ_CLOCK;
    /// task_struct.se.sum_exec_runtime
    OFF_TASK_EXEC_RUNTIME;
    /// task_struct.se.prev_sum_exec_runtime
    OFF_TASK_EXEC_RUNTIME_BEFORE;
    /// task_struct.sched_task_group; 0 where it, or one of the three that follow, is not known
    OFF_TASK_GROUP;
    /// task_group.parent
    OFF_TASK_GROUP_PARENT;
    /// task_group.cfs_bandwidth.quota
    OFF_TASK_GROUP_QUOTA;
    /// task_group.cfs_bandwidth.period_timer.node.expires
    OFF_TASK_GROUP_DUE;
    /// css_set.dfl_cgrp
    OFF_CSS_SET_DFL_CGRP;
    /// cgroup.kn
    OFF_CGROUP_KN;
    /// cgroup.root
    OFF_CGROUP_ROOT;
    /// cgroup.self.parent
    OFF_CGROUP_SELF_PARENT;
    /// cgroup_root.hierarchy_id
    OFF_CGROUP_ROOT_HIERARCHY_ID;
    /// cgroup_subsys_state.cgroup
    OFF_CSS_CGROUP;
    /// kernfs_node.id
    OFF_KERNFS_NODE_ID;
    /// sk_buff.sk
    OFF_SK_BUFF_SK;
    /// sock.__sk_common.skc_state
    OFF_SOCK_STATE;
    /// request.bio
    OFF_REQUEST_BIO;
    /// request.__data_len
    OFF_REQUEST_DATA_LEN;
    /// request.cmd_flags
    OFF_REQUEST_CMD_FLAGS;
    /// request.start_time_ns
    OFF_REQUEST_START_TIME_NS;
    /// request.alloc_time_ns; 0 on a kernel without it
    OFF_REQUEST_ALLOC_TIME_NS;
    /// request.q
    OFF_REQUEST_QUEUE;
    /// request_queue.disk
    OFF_REQUEST_QUEUE_DISK;
    /// gendisk.major
    OFF_GENDISK_MAJOR;
    /// gendisk.first_minor
    OFF_GENDISK_FIRST_MINOR;
    /// bio.bi_next
    OFF_BIO_NEXT;
    /// bio.bi_blkg
    OFF_BIO_BLKG;
    /// bio.bi_issue.value (6.18: bio.issue_time_ns); 0 on a kernel without it
    OFF_BIO_ISSUE;
    /// blkcg_gq.blkcg
    OFF_BLKG_BLKCG;
    /// blkcg.css.cgroup
    OFF_BLKCG_CGROUP;
    /// tcp_sock.inet_conn.icsk_inet.sk.sk_cgrp_data.cgroup
    OFF_TCP_SOCK_CGROUP;
    /// tcp_sock.inet_conn.icsk_inet.sk.sk_max_pacing_rate
    OFF_TCP_SOCK_MAX_PACING_RATE;
    /// tcp_sock.inet_conn.icsk_inet.sk.__sk_common.skc_family
    OFF_TCP_SOCK_FAMILY;
    /// tcp_sock.inet_conn.icsk_inet.sk.__sk_common.skc_daddr
    OFF_TCP_SOCK_DADDR;
    /// tcp_sock.inet_conn.icsk_inet.sk.__sk_common.skc_rcv_saddr
    OFF_TCP_SOCK_RCV_SADDR;
    /// tcp_sock.inet_conn.icsk_inet.sk.__sk_common.skc_v6_daddr
    OFF_TCP_SOCK_V6_DADDR;
    /// tcp_sock.inet_conn.icsk_inet.sk.__sk_common.skc_v6_rcv_saddr
    OFF_TCP_SOCK_V6_RCV_SADDR;
}

/// Reads the field of type `T` that lies `offset` behind `base`.
///
/// # Safety
/// `base` is a pointer that the verifier knows as trusted BTF pointer, and `offset` one of the globals
/// above, of the struct that `base` points to.
#[inline(always)]
unsafe fn field<T: Copy>(base: *const u8, offset: &'static u64) -> T {
    unsafe { read_volatile(base.add(read_volatile(offset) as usize).cast::<T>()) }
}

/// How far two pointers are apart. The verifier lets nobody calculate with a pointer, but for this; what comes out is a
/// plain number to it. (The compiler would also make a sum with a negated pointer of it, which is refused.)
#[inline(always)]
fn distance(pointer: *const u8, base: *const u8) -> u64 {
    let mut distance = pointer as u64;
    // SAFETY: one instruction on two registers.
    unsafe {
        asm!("{0} -= {1}", inout(reg) distance, in(reg) base, options(pure, nomem, nostack, preserves_flags));
    }
    distance
}

/// A `struct css_set`: the cgroups of a task, one in each hierarchy. Tasks of the same cgroups share one.
#[derive(Clone, Copy)]
pub struct CssSet(*const u8);

impl CssSet {
    /// How far it lies from `base`. Another can lie there when its last task is gone.
    #[inline(always)]
    pub fn distance(self, base: *const u8) -> u64 {
        distance(self.0, base)
    }

    /// The cgroup in the v2 hierarchy.
    #[inline(always)]
    pub fn cgroup(self) -> Cgroup {
        // SAFETY: every css_set has a cgroup of the default hierarchy.
        unsafe { Cgroup(field(self.0, &OFF_CSS_SET_DFL_CGRP)) }
    }
}

/// A `struct cgroup`.
#[derive(Clone, Copy)]
pub struct Cgroup(*const u8);

impl Cgroup {
    /// # Safety
    /// `pointer` is a `struct cgroup *` from a tracepoint argument.
    #[inline(always)]
    pub unsafe fn from_ptr(pointer: *const u8) -> Cgroup {
        Cgroup(pointer)
    }

    /// How far it lies from `base`. Another cgroup can lie there once this one was released.
    #[inline(always)]
    pub fn distance(self, base: *const u8) -> u64 {
        distance(self.0, base)
    }

    /// Its id: the inode number of its directory.
    #[inline(always)]
    pub fn id(self) -> u64 {
        // SAFETY: cgroup.kn is set for as long as the cgroup exists.
        unsafe {
            let node: *const u8 = field(self.0, &OFF_CGROUP_KN);
            field(node, &OFF_KERNFS_NODE_ID)
        }
    }

    /// Whether it belongs to the v2 hierarchy. Ids of v1 hierarchies are another number space.
    #[inline(always)]
    pub fn is_v2(self) -> bool {
        // SAFETY: every cgroup has a root; the default hierarchy has the id 0.
        unsafe {
            let root: *const u8 = field(self.0, &OFF_CGROUP_ROOT);
            field::<u32>(root, &OFF_CGROUP_ROOT_HIERARCHY_ID) == 0
        }
    }

    /// The cgroup above, unless this is a root.
    #[inline(always)]
    pub fn parent(self) -> Option<Cgroup> {
        // SAFETY: cgroup.self.parent is null at a root only, and css.cgroup is always set.
        unsafe {
            let css: *const u8 = field(self.0, &OFF_CGROUP_SELF_PARENT);
            if css.is_null() { None } else { Some(Cgroup(field(css, &OFF_CSS_CGROUP))) }
        }
    }
}

/// Groups above a task that are looked at for a quota.
const GROUPS: u32 = 8;
/// `RUNTIME_INF`: a group has no quota.
const UNLIMITED: u64 = u64::MAX;

/// A `struct task_struct`.
#[derive(Clone, Copy)]
pub struct Task(*const u8);

impl Task {
    /// # Safety
    /// `pointer` is a `struct task_struct *` from a tracepoint argument.
    #[inline(always)]
    pub unsafe fn from_ptr(pointer: *const u8) -> Task {
        Task(pointer)
    }

    /// Its thread id; 0 is a CPU's idle task.
    #[inline(always)]
    pub fn pid(self) -> u32 {
        // SAFETY: the verifier knows the type.
        unsafe { field(self.0, &OFF_TASK_PID) }
    }

    /// The clock of the run queue of the CPU that it is about to run on, ns.
    #[inline(always)]
    pub fn queue_clock(self) -> u64 {
        // SAFETY: plain words; whatever class a task has, se.cfs_rq is that of its group on its CPU, and its queue
        // is locked by whoever switches to it, who has just brought the clock up to date.
        unsafe {
            let cfs_rq: *const u8 = field(self.0, &OFF_TASK_CFS_RQ);
            let rq: *const u8 = field(cfs_rq, &OFF_CFS_RQ_RQ);
            field(rq, &OFF_RQ_CLOCK)
        }
    }

    /// How long it has waited in the run queue by now, which the queue's own clock tells, ns: since it was woken, made or
    /// preempted; the kernel's `run_delay` is the sum of these. (A queue does not look at its clock twice where a task
    /// is woken on an idle CPU: then it is 0.) `None` if that is not known.
    #[inline(always)]
    pub fn waited(self, now: u64) -> Option<u64> {
        // SAFETY: a plain word; the verifier knows the type.
        let queued: u64 = unsafe { field(self.0, &OFF_TASK_LAST_QUEUED) };
        if queued == 0 { None } else { Some(now.saturating_sub(queued)) }
    }

    /// The scheduler's own count of its CPU time, ns: up to date when it leaves the CPU.
    #[inline(always)]
    pub fn runtime(self) -> u64 {
        // SAFETY: a plain word; the verifier knows the type.
        unsafe { field(self.0, &OFF_TASK_EXEC_RUNTIME) }
    }

    /// The scheduler's own count of how long it has run, ns, since it was picked the last time. Of a task of
    /// another class than the fair one it is too long: since it was last fair, or since it began.
    #[inline(always)]
    pub fn ran_since_picked(self) -> u64 {
        // SAFETY: a plain word; the verifier knows the type.
        let before: u64 = unsafe { field(self.0, &OFF_TASK_EXEC_RUNTIME_BEFORE) };
        self.runtime().saturating_sub(before)
    }

    /// When the quota is filled up, `CLOCK_MONOTONIC` ns, of the nearest group above that has one: in the future while that is
    /// in use.
    #[inline(always)]
    pub fn quota_due_ns(self) -> Option<u64> {
        // SAFETY: plain words; the verifier knows the types. Only the root has no group above.
        unsafe {
            if read_volatile(&OFF_TASK_GROUP) == 0 {
                return None;
            }
            let mut group: *const u8 = field(self.0, &OFF_TASK_GROUP);
            for _ in 0..GROUPS {
                if group.is_null() {
                    break;
                }
                if field::<u64>(group, &OFF_TASK_GROUP_QUOTA) != UNLIMITED {
                    return Some(field(group, &OFF_TASK_GROUP_DUE));
                }
                group = field(group, &OFF_TASK_GROUP_PARENT);
            }
            None
        }
    }

    /// Its cgroups.
    #[inline(always)]
    pub fn css_set(self) -> CssSet {
        // SAFETY: every task has a css_set.
        unsafe { CssSet(field(self.0, &OFF_TASK_CGROUPS)) }
    }

    /// Its cgroup in the v2 hierarchy.
    #[inline(always)]
    pub fn cgroup(self) -> Cgroup {
        self.css_set().cgroup()
    }
}

/// States of what is no full socket (`enum` of include/net/tcp_states.h): it has no cgroup.
const TCP_TIME_WAIT: u8 = 6;
const TCP_NEW_SYN_RECV: u8 = 12;

/// The cgroup of the socket that a `struct sk_buff` of a tracepoint belongs to, if it still does.
///
/// # Safety
/// `skb` is a `struct sk_buff *` from a tracepoint argument.
#[inline(always)]
pub unsafe fn cgroup_of_buffer(skb: *const u8) -> Option<Cgroup> {
    // SAFETY: the verifier knows the types; a sock is the beginning of a tcp_sock, so that the offsets are the same.
    unsafe {
        let sk: *const u8 = field(skb, &OFF_SK_BUFF_SK);
        if sk.is_null() {
            return None;
        }
        let state: u8 = field(sk, &OFF_SOCK_STATE);
        if state == TCP_TIME_WAIT || state == TCP_NEW_SYN_RECV {
            return None;
        }
        let cgroup: *const u8 = field(sk, &OFF_TCP_SOCK_CGROUP);
        if cgroup.is_null() { None } else { Some(Cgroup(cgroup)) }
    }
}

/// A `struct request`, of block IO.
#[derive(Clone, Copy)]
pub struct Request(*const u8);

/// `req_op`: the low byte of cmd_flags.
const REQ_OP_MASK: u32 = 0xff;
const REQ_OP_DISCARD: u32 = 3;
const REQ_OP_SECURE_ERASE: u32 = 5;
/// Most bios of a merged request that are counted one by one.
const BIOS: u64 = 512;

/// The bits of `bio_issue.value` that are a time.
const ISSUE_TIME: u64 = (1 << 51) - 1;
/// No operation takes as long: 18 minutes.
const ISSUE_LONG: u64 = 1 << 40;

impl Request {
    /// # Safety
    /// `pointer` is a `struct request *` from a tracepoint argument.
    #[inline(always)]
    pub unsafe fn from_ptr(pointer: *const u8) -> Request {
        Request(pointer)
    }

    /// The cgroup that it is charged to, in the hierarchy that has the io (v1: blkio) controller; `None` for a
    /// request without data or owner, such as a flush of the kernel's.
    #[inline(always)]
    pub fn cgroup(self) -> Option<Cgroup> {
        // SAFETY: the verifier knows the types; a bio that is in a request has a blkg, unless it never had an owner.
        unsafe {
            let bio: *const u8 = field(self.0, &OFF_REQUEST_BIO);
            if bio.is_null() {
                return None;
            }
            let blkg: *const u8 = field(bio, &OFF_BIO_BLKG);
            if blkg.is_null() {
                return None;
            }
            let blkcg: *const u8 = field(blkg, &OFF_BLKG_BLKCG);
            let cgroup: *const u8 = field(blkcg, &OFF_BLKCG_CGROUP);
            if cgroup.is_null() { None } else { Some(Cgroup(cgroup)) }
        }
    }

    /// How many bios it was merged of, at most [`BIOS`].
    #[inline(always)]
    pub fn bios(self) -> u64 {
        // SAFETY: the verifier knows the types; the list ends with null.
        unsafe {
            let mut bio: *const u8 = field(self.0, &OFF_REQUEST_BIO);
            let mut count = 0;
            while count < BIOS {
                if bio.is_null() {
                    break;
                }
                count += 1;
                bio = field(bio, &OFF_BIO_NEXT);
            }
            count
        }
    }

    /// Bytes that it still has to carry.
    #[inline(always)]
    pub fn remaining_bytes(self) -> u32 {
        // SAFETY: a plain word.
        unsafe { field(self.0, &OFF_REQUEST_DATA_LEN) }
    }

    /// `IO_READ`, `IO_WRITE` or `IO_DISCARD`, told apart as io.stat does.
    #[inline(always)]
    pub fn direction(self) -> u32 {
        // SAFETY: a plain word.
        let operation = unsafe { field::<u32>(self.0, &OFF_REQUEST_CMD_FLAGS) } & REQ_OP_MASK;
        if operation == REQ_OP_DISCARD || operation == REQ_OP_SECURE_ERASE {
            IO_DISCARD
        } else {
            // An odd operation carries data to the device.
            operation & 1
        }
    }

    /// How long it took until now, ns; 0 if nobody knows.
    ///
    /// A request begins when it has got a place in the device's queue, and whoever waits for one waits for the device as
    /// well. The kernel keeps when its first bio was submitted (until 6.17), or when a place was asked for (while io.cost
    /// is in force): then it took since that.
    #[inline(always)]
    pub fn took_ns(self, now: u64) -> u64 {
        // SAFETY: plain words; the verifier knows the types. An offset of 0 is that of no field of these.
        unsafe {
            let mut took = 0;
            let start: u64 = field(self.0, &OFF_REQUEST_START_TIME_NS);
            if start != 0 {
                took = now.saturating_sub(start);
            }
            if read_volatile(&OFF_REQUEST_ALLOC_TIME_NS) != 0 {
                let asked: u64 = field(self.0, &OFF_REQUEST_ALLOC_TIME_NS);
                if asked != 0 {
                    took = now.saturating_sub(asked);
                }
            }
            if read_volatile(&OFF_BIO_ISSUE) != 0 {
                let bio: *const u8 = field(self.0, &OFF_REQUEST_BIO);
                if !bio.is_null() {
                    let issued = field::<u64>(bio, &OFF_BIO_ISSUE) & ISSUE_TIME;
                    let since = now.wrapping_sub(issued) & ISSUE_TIME;
                    if issued != 0 && since > took && since < ISSUE_LONG {
                        took = since;
                    }
                }
            }
            took
        }
    }

    /// The whole device, as the kernel numbers it inside; 0 for one without a disk.
    #[inline(always)]
    pub fn device(self) -> u32 {
        // SAFETY: the verifier knows the types; the reads of a null pointer give 0.
        unsafe {
            let queue: *const u8 = field(self.0, &OFF_REQUEST_QUEUE);
            let disk: *const u8 = field(queue, &OFF_REQUEST_QUEUE_DISK);
            if disk.is_null() {
                return 0;
            }
            field::<u32>(disk, &OFF_GENDISK_MAJOR) << 20 | field::<u32>(disk, &OFF_GENDISK_FIRST_MINOR)
        }
    }
}

/// A `struct tcp_sock`.
#[derive(Clone, Copy)]
pub struct TcpSock(*const u8);

impl TcpSock {
    /// # Safety
    /// `pointer` is what `bpf_skc_to_tcp_sock` returned, and not null.
    #[inline(always)]
    pub unsafe fn from_ptr(pointer: *const u8) -> TcpSock {
        TcpSock(pointer)
    }

    /// The cgroup that the socket is charged to: the one in which it was created.
    #[inline(always)]
    pub fn cgroup(self) -> Option<Cgroup> {
        // SAFETY: the verifier knows the type; the pointer is null for a kernel socket.
        unsafe {
            let cgroup: *const u8 = field(self.0, &OFF_TCP_SOCK_CGROUP);
            if cgroup.is_null() { None } else { Some(Cgroup(cgroup)) }
        }
    }

    /// Whether the other end is this machine: 127/8, ::1, or the address that it has itself.
    #[inline(always)]
    pub fn is_local(self) -> bool {
        // SAFETY: plain words; the verifier knows the size of the struct.
        unsafe {
            if field::<u16>(self.0, &OFF_TCP_SOCK_FAMILY) == AF_INET {
                let peer: u32 = field(self.0, &OFF_TCP_SOCK_DADDR);
                return is_loopback(peer) || peer == field::<u32>(self.0, &OFF_TCP_SOCK_RCV_SADDR);
            }
            let peer = v6(self.0, &OFF_TCP_SOCK_V6_DADDR);
            let own = v6(self.0, &OFF_TCP_SOCK_V6_RCV_SADDR);
            let mapped = peer[0] == 0 && peer[1] == 0 && u32::from_be(peer[2]) == 0xffff;
            let v6_loopback = peer[0] | peer[1] | peer[2] == 0 && u32::from_be(peer[3]) == 1;
            let same = peer[0] == own[0] && peer[1] == own[1] && peer[2] == own[2] && peer[3] == own[3];
            v6_loopback || same || (mapped && is_loopback(peer[3]))
        }
    }

    /// `SO_MAX_PACING_RATE`, bytes a second; `u64::MAX` when there is none.
    #[inline(always)]
    pub fn max_pacing_rate(self) -> u64 {
        // SAFETY: an unsigned long; the verifier knows the size of the struct.
        unsafe { field(self.0, &OFF_TCP_SOCK_MAX_PACING_RATE) }
    }
}

const AF_INET: u16 = 2;

/// Of an address in network byte order.
#[inline(always)]
fn is_loopback(address: u32) -> bool {
    u32::from_be(address) >> 24 == 127
}

/// The four words of an IPv6 address, in network byte order.
///
/// # Safety
/// As for [`field`].
#[inline(always)]
unsafe fn v6(base: *const u8, offset: &'static u64) -> [u32; 4] {
    unsafe {
        let at = base.add(read_volatile(offset) as usize).cast::<u32>();
        [read_volatile(at), read_volatile(at.add(1)), read_volatile(at.add(2)), read_volatile(at.add(3))]
    }
}
