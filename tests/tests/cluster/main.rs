//! A real broker, real agents and real tasks, on the kernel of this machine, as root.

mod certificates;
mod crash;
mod epoch;
mod hog;
mod input;
mod nobody;
mod nodes;
