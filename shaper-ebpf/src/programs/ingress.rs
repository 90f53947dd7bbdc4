//! What arrives at the node's uplinks for a task with a limit on that: it is told apart here, and waits its turn in a queue
//! of a device of its own (docs/decisions/0022).

use core::mem::size_of;

use aya_ebpf::{
    bindings::{
        __sk_buff, bpf_fib_lookup, bpf_sock, bpf_sock_tuple, bpf_sock_tuple__bindgen_ty_1,
        bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2,
    },
    helpers::generated::{
        bpf_fib_lookup, bpf_sk_lookup_tcp, bpf_sk_lookup_udp, bpf_sk_release, bpf_skb_load_bytes_relative,
        bpf_skc_to_tcp_sock,
    },
    macros::classifier,
    programs::TcContext,
};
use shaper_common::abi::SLOT_NOBODY;

use crate::{kernel::TcpSock, maps::class_of_slot, slots};

/// Of a filter whose action is a redirection: not this one's.
const NO_MATCH: i32 = 0;
const MATCH: i32 = 1;

const PACKET_HOST: u32 = 0;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const TCP: u8 = 6;
const UDP: u8 = 17;
const IPV6_HEADER: u32 = 40;
/// BPF_HDR_START_NET
const FROM_NETWORK_HEADER: u32 = 1;
/// BPF_F_CURRENT_NETNS
const THIS_NAMESPACE: u64 = -1i32 as i64 as u64;
/// BPF_FIB_LKUP_RET_NOT_FWDED: it is for this machine.
const NOT_FORWARDED: i64 = 4;
/// BPF_FIB_LKUP_RET_FWD_DISABLED: nothing is forwarded that comes by this device.
const NO_FORWARDING: i64 = 5;

/// Gives a packet for a limited task the class of its slot, by which the queueing discipline behind knows it, and matches
/// it. All else goes on as if this were not here.
#[classifier]
pub fn uplink_ingress(ctx: TcContext) -> i32 {
    let skb = ctx.skb.skb;
    // SAFETY: the context.
    unsafe {
        let class = class_of(skb);
        if class == 0 {
            return NO_MATCH;
        }
        (*skb).priority = class;
    }
    MATCH
}

/// The class of the slot whose socket a packet is for; 0: it is not limited.
///
/// # Safety
/// `skb` is the context of the program.
#[inline(always)]
unsafe fn class_of(skb: *mut __sk_buff) -> u32 {
    // SAFETY: the caller's promise; what is read of the packet lies on the stack then.
    unsafe {
        if (*skb).pkt_type != PACKET_HOST {
            return 0;
        }
        match u16::from_be((*skb).protocol as u16) {
            IPV4 => of_ipv4(skb),
            IPV6 => of_ipv6(skb),
            _ => 0,
        }
    }
}

/// See [`class_of`].
#[inline(always)]
unsafe fn of_ipv4(skb: *mut __sk_buff) -> u32 {
    // SAFETY: as there.
    unsafe {
        let mut header = [0u32; 5];
        if !load(skb, 0, &mut header) {
            return 0;
        }
        let [length, ..] = header[0].to_ne_bytes();
        let [_, _, fragment, rest] = header[1].to_ne_bytes();
        let [_, protocol, ..] = header[2].to_ne_bytes();
        // The fragments behind the first have no ports: nobody knows yet whose they are.
        if fragment & 0x1f != 0 || rest != 0 {
            return 0;
        }
        let Some((sport, dport)) = ports(skb, (length & 15) as u32 * 4) else { return 0 };
        let (saddr, daddr) = (header[3], header[4]);
        let ipv4 = bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 { saddr, daddr, sport, dport };
        let mut tuple = bpf_sock_tuple { __bindgen_anon_1: bpf_sock_tuple__bindgen_ty_1 { ipv4 } };
        let socket = look_up(skb, protocol, &mut tuple, 12);
        if socket.is_null() {
            return 0;
        }
        let class = class_of_slot(slot_of(socket, protocol));
        let is_bound = (*socket).src_ip4 != 0;
        bpf_sk_release(socket.cast());
        if class == 0 || is_bound {
            return class;
        }
        // A socket that takes what is for any address of this machine is found for what is forwarded, too.
        let mut route = Route::new();
        let fields = route.fields();
        (*fields).family = AF_INET;
        (*fields).l4_protocol = protocol;
        (*fields).ifindex = (*skb).ifindex;
        (*fields).__bindgen_anon_3.ipv4_src = saddr;
        (*fields).__bindgen_anon_4.ipv4_dst = daddr;
        if route.ends_here(skb) { class } else { 0 }
    }
}

/// See [`class_of`].
#[inline(always)]
unsafe fn of_ipv6(skb: *mut __sk_buff) -> u32 {
    // SAFETY: as there.
    unsafe {
        let mut header = [0u32; 10];
        if !load(skb, 0, &mut header) {
            return 0;
        }
        let Some((sport, dport)) = ports(skb, IPV6_HEADER) else { return 0 };
        // (Headers between it and the transport's hide that.)
        let [_, _, protocol, _] = header[1].to_ne_bytes();
        let saddr = [header[2], header[3], header[4], header[5]];
        let daddr = [header[6], header[7], header[8], header[9]];
        let ipv6 = bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 { saddr, daddr, sport, dport };
        let mut tuple = bpf_sock_tuple { __bindgen_anon_1: bpf_sock_tuple__bindgen_ty_1 { ipv6 } };
        let socket = look_up(skb, protocol, &mut tuple, 36);
        if socket.is_null() {
            return 0;
        }
        let class = class_of_slot(slot_of(socket, protocol));
        let own = (*socket).src_ip6;
        let is_bound = own[0] | own[1] | own[2] | own[3] != 0;
        bpf_sk_release(socket.cast());
        if class == 0 || is_bound {
            return class;
        }
        let mut route = Route::new();
        let fields = route.fields();
        (*fields).family = AF_INET6;
        (*fields).l4_protocol = protocol;
        (*fields).ifindex = (*skb).ifindex;
        (*fields).__bindgen_anon_3.ipv6_src = saddr;
        (*fields).__bindgen_anon_4.ipv6_dst = daddr;
        if route.ends_here(skb) { class } else { 0 }
    }
}

/// The slot of a socket of that transport. Here nobody tells the cgroup of a socket that was looked up: that of TCP can be
/// read from it; a socket of UDP remembers its slot since its first packet ([`slots::remember`]).
#[inline(always)]
unsafe fn slot_of(socket: *mut bpf_sock, protocol: u8) -> u32 {
    // SAFETY: a socket that the program holds; the verifier demands the null check.
    unsafe {
        if protocol == UDP {
            return slots::remembered_by(socket);
        }
        let tcp = bpf_skc_to_tcp_sock(socket.cast());
        if tcp.is_null() {
            return SLOT_NOBODY;
        }
        match TcpSock::from_ptr(tcp.cast()).cgroup() {
            Some(cgroup) => slots::of(cgroup, cgroup.id()),
            None => SLOT_NOBODY,
        }
    }
}

/// Reads what lies so far behind the network header.
#[inline(always)]
unsafe fn load<T>(skb: *mut __sk_buff, offset: u32, to: &mut T) -> bool {
    // SAFETY: the context, and room for as much as is read.
    unsafe {
        let to: *mut T = to;
        bpf_skb_load_bytes_relative(skb.cast(), offset, to.cast(), size_of::<T>() as u32, FROM_NETWORK_HEADER)
            == 0
    }
}

/// Source and destination, as they are on the wire: TCP and UDP begin with them.
#[inline(always)]
unsafe fn ports(skb: *mut __sk_buff, offset: u32) -> Option<(u16, u16)> {
    let mut ports = [0u16; 2];
    // SAFETY: the context.
    if unsafe { load(skb, offset, &mut ports) } { Some((ports[0], ports[1])) } else { None }
}

/// The socket that a packet of that transport is for, to be released; null: none of this namespace.
#[inline(always)]
unsafe fn look_up(skb: *mut __sk_buff, protocol: u8, tuple: &mut bpf_sock_tuple, size: u32) -> *mut bpf_sock {
    // SAFETY: the context, and a tuple of at least that size.
    unsafe {
        match protocol {
            TCP => bpf_sk_lookup_tcp(skb.cast(), tuple, size, THIS_NAMESPACE, 0),
            UDP => bpf_sk_lookup_udp(skb.cast(), tuple, size, THIS_NAMESPACE, 0),
            _ => core::ptr::null_mut(),
        }
    }
}

/// Where a packet goes to, by the tables of routes.
struct Route([u64; size_of::<bpf_fib_lookup>() / 8]);

impl Route {
    #[inline(always)]
    fn new() -> Route {
        Route([0; size_of::<bpf_fib_lookup>() / 8])
    }

    #[inline(always)]
    fn fields(&mut self) -> *mut bpf_fib_lookup {
        self.0.as_mut_ptr().cast()
    }

    /// Whether it is for this machine.
    #[inline(always)]
    unsafe fn ends_here(&mut self, skb: *mut __sk_buff) -> bool {
        let size = size_of::<bpf_fib_lookup>() as i32;
        // SAFETY: the context, and a whole structure.
        let found = unsafe { bpf_fib_lookup(skb.cast(), self.fields(), size, 0) } as i64;
        found == NOT_FORWARDED || found == NO_FORWARDING
    }
}
