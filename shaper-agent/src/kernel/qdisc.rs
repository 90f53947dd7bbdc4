//! The counting program on a device's egress: tcx where the kernel has it, else a filter on clsact.

use std::{
    fmt, fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use aya::programs::{
    LinkOrder, ProgramError, SchedClassifier, TcAttachType,
    links::Link,
    tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle},
};
use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice::name_to_index, socket_with};

use super::{
    bpf::{self, BpfError},
    netlink::{
        Message, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, RTM_DELQDISC, RTM_GETTFILTER, RTM_NEWQDISC,
        RTM_NEWTFILTER, Request,
    },
    sys,
};

/// Where our filter is on clsact, so that a later agent finds it again.
pub(super) const PRIORITY: u16 = 0x5a9e;
const HANDLE: TcHandle = TcHandle::new(0, 1);

/// How a device is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UplinkForm {
    /// A tcx link, pinned.
    Tcx,
    /// A filter on the clsact qdisc.
    Clsact,
}

impl fmt::Display for UplinkForm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            UplinkForm::Tcx => "tcx",
            UplinkForm::Clsact => "clsact",
        })
    }
}

/// What went wrong with an uplink.
#[derive(Debug, thiserror::Error)]
pub enum UplinkError {
    /// The device, its qdisc or our note of it.
    #[error("cannot {verb} the network device `{device}` of the agent's network namespace")]
    Device {
        /// What was tried.
        verb: &'static str,
        /// The device.
        device: String,
        /// What went wrong.
        source: io::Error,
    },
    /// The program.
    #[error("cannot attach to, or detach from, the egress of {device}")]
    Attach {
        /// The device.
        device: String,
        /// What went wrong.
        source: ProgramError,
    },
}

/// Index of a device in this network namespace.
pub fn ifindex(device: &str) -> io::Result<u32> {
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    Ok(name_to_index(&socket, device)?)
}

/// Whether the kernel has tcx.
pub fn has_tcx() -> io::Result<bool> {
    match sys::query_tcx(ifindex("lo")?) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(false),
        Err(error) => Err(error),
    }
}

/// Attaches to the egress of `device`, or takes the place of an earlier agent's program there.
/// `links` is the directory of the pins; `marks` remembers a qdisc that we made.
pub fn attach_egress(
    program: &mut SchedClassifier,
    device: &str,
    links: &Path,
    marks: &Path,
) -> Result<UplinkForm, BpfError> {
    let io = |verb| move |source| UplinkError::Device { verb, device: device.to_owned(), source };
    let index = ifindex(device).map_err(io("find"))?;
    if has_tcx().map_err(io("look for tcx on"))? {
        attach_tcx(program, device, index, links)?;
        return Ok(UplinkForm::Tcx);
    }

    let attach = |source| UplinkError::Attach { device: device.to_owned(), source };
    add_clsact(device, marks)?;
    let earlier = our_filter(device).map_err(io("find"))?;
    let id = match program.attach_to_link(earlier) {
        Ok(id) => id,
        Err(_) => {
            let options = NlOptions { priority: PRIORITY, handle: HANDLE, classid: None };
            program
                .attach_with_options(device, TcAttachType::Egress, TcAttachOptions::Netlink(options))
                .map_err(attach)?
        }
    };
    // A filter lives in the qdisc, not in a descriptor: forget aya's link without detaching it.
    std::mem::forget(program.take_link(id).map_err(attach)?);
    Ok(UplinkForm::Clsact)
}

/// Sees to it that `device` has the qdisc clsact, for a filter of ours.
pub(super) fn add_clsact(device: &str, marks: &Path) -> Result<(), UplinkError> {
    let io = |verb| move |source| UplinkError::Device { verb, device: device.to_owned(), source };
    // A mark for every device that has a filter of ours; it says whether the qdisc is ours, too. It is
    // there first: after a crash in between, a qdisc that was there is taken for ours, and is still
    // only removed when nothing hangs on it.
    let mark = mark(marks, device);
    let earlier_mark = fs::read_to_string(&mark).ok();
    if earlier_mark.is_none() {
        fs::write(&mark, OURS).map_err(io("note the qdisc of"))?;
    }
    match tc::qdisc_add_clsact(device) {
        Ok(()) => Ok(()),
        Err(error) if is_there(&error) && earlier_mark.is_some() => Ok(()),
        Err(error) if is_there(&error) => fs::write(&mark, NOT_OURS).map_err(io("note the qdisc of")),
        Err(error) => Err(UplinkError::Attach { device: device.to_owned(), source: error.into() }),
    }
}

fn attach_tcx(program: &mut SchedClassifier, device: &str, index: u32, links: &Path) -> Result<(), BpfError> {
    let attach = |source| UplinkError::Attach { device: device.to_owned(), source };
    // By number: the name of a device may have a dot, and a name on bpffs may not.
    let pin = links.join(format!("uplink_egress_{index}"));
    let fd = program.fd().and_then(|fd| Ok(fd.try_clone()?)).map_err(attach)?;
    if bpf::replace(&pin, fd.as_fd(), "uplink_egress")? {
        return Ok(());
    }
    let options = TcAttachOptions::TcxOrder(LinkOrder::default());
    let link = program
        .attach_with_options(device, TcAttachType::Egress, options)
        .and_then(|link| program.take_link(link))
        .map_err(attach)?;
    bpf::pin_link(link, &pin, "uplink_egress")
}

const MARK: &str = "clsact@";
const OURS: &str = "ours\n";
const NOT_OURS: &str = "not ours\n";

/// Takes every egress filter of ours off clsact, whatever devices this agent was told of, and the qdisc with it
/// if we made it and nothing else hangs on it. Returns the devices. (A tcx link goes with its pin.)
pub fn detach_all_clsact(marks: &Path) -> Result<Vec<String>, UplinkError> {
    let devices = marked(marks)?;
    for device in &devices {
        detach_clsact(device, marks)?;
    }
    Ok(devices)
}

/// The devices that have a filter of ours on clsact.
pub(super) fn marked(marks: &Path) -> Result<Vec<String>, UplinkError> {
    let mut devices = Vec::new();
    let listed = |source| UplinkError::Device {
        verb: "list the marks of",
        device: marks.display().to_string(),
        source,
    };
    for entry in fs::read_dir(marks).map_err(listed)? {
        let name = entry.map_err(listed)?.file_name();
        if let Some(device) = name.to_str().and_then(|name| name.strip_prefix(MARK)) {
            devices.push(device.to_owned());
        }
    }
    Ok(devices)
}

fn detach_clsact(device: &str, marks: &Path) -> Result<(), UplinkError> {
    let io = |verb| move |source| UplinkError::Device { verb, device: device.to_owned(), source };
    // A device that is gone took its qdisc along; where there is tcx, no such filter was ever there.
    if let Ok(index) = ifindex(device)
        && has_our_egress(index).map_err(io("list the filters of"))?
    {
        let filter = our_filter(device).map_err(io("find"))?;
        filter.detach().map_err(|source| UplinkError::Attach { device: device.to_owned(), source })?;
    }
    remove_clsact(device, marks)
}

/// Once a filter of ours is off: takes the qdisc away if we made it and nothing else hangs on it, and forgets it if nothing of
/// ours does.
pub(super) fn remove_clsact(device: &str, marks: &Path) -> Result<(), UplinkError> {
    let io = |verb| move |source| UplinkError::Device { verb, device: device.to_owned(), source };
    let mark = mark(marks, device);
    if let Ok(index) = ifindex(device) {
        if has_our_egress(index).map_err(io("list the filters of"))? {
            return Ok(());
        }
        let ours = fs::read_to_string(&mark).map_err(io("read the note of"))? == OURS;
        if ours && !has_filters(index).map_err(io("list the filters of"))? {
            delete_clsact(index).map_err(io("remove the qdisc of"))?;
        }
    }
    fs::remove_file(&mark).map_err(io("forget the qdisc of"))
}

/// Whether our filter of what leaves is there.
fn has_our_egress(index: u32) -> io::Result<bool> {
    has_filter(index, CLSACT_EGRESS, PRIORITY, 1)
}

/// Whether a filter is there. (A device without clsact has none.)
pub(super) fn has_filter(index: u32, parent: u32, priority: u16, handle: u32) -> io::Result<bool> {
    let found = Request::traffic_control(RTM_GETTFILTER, NLM_F_DUMP, index, 0, parent, 0).send()?;
    let is_it = |message: &Message| {
        message.kind == RTM_NEWTFILTER
            && message.word(4) == index
            && message.word(8) == handle
            && message.word(16) >> 16 == u32::from(priority)
    };
    Ok(found.iter().any(is_it))
}

/// Gives a device without it the qdisc clsact, where nobody has to know of it.
pub(super) fn make_clsact(index: u32) -> io::Result<()> {
    let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
    let request = Request::traffic_control(RTM_NEWQDISC, flags, index, CLSACT_HANDLE, CLSACT_PARENT, 0);
    request.with_text(TCA_KIND, "clsact").send().map(drop)
}

/// Whether the qdisc was there before. (aya 0.14 gives the kernel's EEXIST as it is.)
fn is_there(error: &TcError) -> bool {
    match error {
        TcError::AlreadyAttached => true,
        TcError::NetlinkError(error) => error.raw_os_error() == Some(libc::EEXIST),
        _ => false,
    }
}

fn our_filter(device: &str) -> io::Result<SchedClassifierLink> {
    SchedClassifierLink::attached(device, TcAttachType::Egress, PRIORITY, HANDLE, None)
}

fn mark(marks: &Path, device: &str) -> PathBuf {
    marks.join(format!("{MARK}{device}"))
}

/// TC_H_CLSACT: the qdisc's handle is ffff:, its parent ffff:fff1; ingress and egress are below it.
const CLSACT_HANDLE: u32 = 0xffff_0000;
const CLSACT_PARENT: u32 = 0xffff_fff1;
const TCA_KIND: u16 = 1;
/// Where filters of what arrives are …
pub(super) const CLSACT_INGRESS: u32 = 0xffff_fff2;
/// … and of what leaves.
const CLSACT_EGRESS: u32 = 0xffff_fff3;

fn has_filters(index: u32) -> io::Result<bool> {
    for parent in [CLSACT_INGRESS, CLSACT_EGRESS] {
        let filters = Request::traffic_control(RTM_GETTFILTER, NLM_F_DUMP, index, 0, parent, 0).send()?;
        if filters.iter().any(|message| message.kind == RTM_NEWTFILTER) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn delete_clsact(index: u32) -> io::Result<()> {
    let request = Request::traffic_control(RTM_DELQDISC, NLM_F_ACK, index, CLSACT_HANDLE, CLSACT_PARENT, 0);
    match request.send() {
        // Somebody else was faster.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => Ok(()),
        other => other.map(drop),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_has_an_index_and_others_do_not() {
        assert!(ifindex("lo").unwrap() > 0);
        assert!(ifindex("no-such-device").is_err());
    }
}
