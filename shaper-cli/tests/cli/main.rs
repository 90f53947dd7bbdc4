//! The `shaper` binary against an agent and a broker that are only the contract on the wire.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod agent;
mod cluster;
mod documents;
mod fake;
mod host;
mod pki;
mod terminal;
mod top;
mod words;
