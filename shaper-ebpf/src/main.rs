//! shaper's kernel programs.
//!
//! One file per subject under `programs`; what they share with the agent is in `shaper-common`.
//! They are attached once, for all tasks: a task is an entry in a map, never a program of its own.
//! Nothing here sends an event per packet or per switch.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch, core_intrinsics))]
#![cfg_attr(target_arch = "bpf", allow(internal_features, reason = "atomic.rs says why"))]

#[cfg(target_arch = "bpf")]
mod atomic;
#[cfg(target_arch = "bpf")]
mod kernel;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod pool;
#[cfg(target_arch = "bpf")]
mod programs;
#[cfg(target_arch = "bpf")]
mod shaping;
#[cfg(target_arch = "bpf")]
mod slots;

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // Unreachable: the programs have no panicking operation, and the verifier refuses a loop.
    loop {}
}

#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(not(target_arch = "bpf"))]
fn main() {
    eprintln!("this crate holds kernel programs; build them with `cargo xtask build-ebpf`");
}
