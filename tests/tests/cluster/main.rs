//! A real broker, real agents and real tasks, on the kernel of this machine, as root.

mod card;
mod certificates;
mod crash;
mod epoch;
#[path = "../../../shaper-broker/tests/etcd_process/mod.rs"]
mod etcd_process;
mod hog;
mod input;
mod leader;
mod metrics;
mod nobody;
mod nodes;
mod reshape;
mod room;
mod scale;
mod silent;
mod traces;
