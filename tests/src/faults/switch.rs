//! A network whose cables can be pulled: namespaces on two bridges, that of etcd and that of the agents, as brokers have one
//! device for each.
//!
//! A device that is taken off its bridge keeps its carrier, and nothing passes: neither side is told.

use crate::net::Netns;

/// Which network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lan {
    /// Of the members of etcd and the brokers.
    Etcd,
    /// Of the brokers and the agents.
    Agents,
}

impl Lan {
    const ALL: [Lan; 2] = [Lan::Etcd, Lan::Agents];

    fn name(self) -> &'static str {
        match self {
            Lan::Etcd => "etcd",
            Lan::Agents => "agents",
        }
    }

    /// Of the station of that number.
    pub(super) fn address(self, number: u8) -> String {
        match self {
            Lan::Etcd => format!("10.201.1.{number}"),
            Lan::Agents => format!("10.201.2.{number}"),
        }
    }
}

/// Both networks.
pub(super) struct Switch {
    hub: Netns,
}

/// A cable of a station.
#[derive(Clone, Debug)]
pub(super) struct Plug {
    device: String,
    lan: Lan,
}

impl Switch {
    pub(super) fn new() -> Switch {
        let hub = Netns::new();
        for lan in Lan::ALL {
            hub.ip(&["link", "add", lan.name(), "type", "bridge"]);
            hub.ip(&["link", "set", lan.name(), "up"]);
        }
        Switch { hub }
    }

    /// Connects a station by a new cable. The number is its address's.
    pub(super) fn connect(&self, station: &Netns, name: &str, lan: Lan, number: u8) -> Plug {
        let device = format!("{}-{name}", lan.name());
        self.hub.connect(&device, station, lan.name());
        station.ip(&["address", "add", &format!("{}/24", lan.address(number)), "dev", lan.name()]);
        station.ip(&["link", "set", lan.name(), "up"]);
        self.hub.ip(&["link", "set", &device, "up"]);
        let plug = Plug { device, lan };
        self.plug_in(&plug);
        plug
    }

    /// Nothing passes any more.
    pub(super) fn pull(&self, plug: &Plug) {
        self.hub.ip(&["link", "set", &plug.device, "nomaster"]);
    }

    /// Everything passes again.
    pub(super) fn plug_in(&self, plug: &Plug) {
        self.hub.ip(&["link", "set", &plug.device, "master", plug.lan.name()]);
    }
}

/// What `station` answers to that one is lost; what it hears from there is not.
pub(super) fn mute(station: &Netns, towards: &str) {
    station.ip(&["route", "add", "blackhole", &format!("{towards}/32")]);
}

/// Undoes [`mute`].
pub(super) fn unmute(station: &Netns, towards: &str) {
    station.ip(&["route", "delete", "blackhole", &format!("{towards}/32")]);
}
