//! On the kernel of this machine, as root: the real agent, the real command, real limits.

mod abi;
mod admission;
mod adopt;
mod adoption;
mod births;
mod burst;
mod card_memory;
mod ceiling;
mod corners;
mod cpu;
mod enter;
mod gpu;
mod identity;
mod ingress;
mod input;
mod kills;
mod knobs;
mod ledger;
mod measure;
mod net;
mod release;
mod restart;
mod second_writer;
mod share;
mod tasks;
