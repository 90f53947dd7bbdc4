//! What the kernel programs and the agent share: the layout of the maps, and the integer
//! arithmetic that runs in the kernel, so that the host can test it.
//!
//! Rules of this crate: `no_std`, no dependency, no allocation, no float, no signed division and
//! no panic (the BPF target has none of them). Every struct is `repr(C)` without implicit padding;
//! its size is asserted here and compared with the BTF of the built object by a test.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod abi;
pub mod clock;
pub mod hist;
pub mod pace;
pub mod period;
pub mod pool;
pub mod wire;
