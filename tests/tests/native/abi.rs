//! Both sides of the maps mean the same layout.

use std::{collections::BTreeSet, fs, mem::offset_of};

use aya::programs::loaded_programs;
use object::{File, Object, ObjectSection};
use shaper_agent::kernel::btf::Btf;
use shaper_common::{
    abi::{
        Admission, Budget, CgroupSlot, Claims, Clock, Control, CpuCount, CpuStat, CpuState, Event, IoKey,
        IoStat, NetStat, Pace, PacketCount, Pool, Share, SocketState,
    },
    hist::Histogram,
};
use shaper_tests::{agent::Agent, bins::bpf_object, pins::links};

fn btf_of_the_object() -> Btf {
    let data = fs::read(bpf_object()).expect("it was there a moment ago");
    let object = File::parse(data.as_slice()).expect("the object is ELF");
    let section = object.section_by_name(".BTF").expect("the object has BTF");
    Btf::parse(section.data().expect("the section is in the file").to_vec()).expect("its BTF is BTF")
}

/// Compares size and offsets; a field that is not named here fails to compile.
macro_rules! assert_same_layout {
    ($btf:expr, $name:ident { $($field:ident),+ }) => {
        let $name { $($field: _),+ } = $name::default();
        let name = stringify!($name);
        assert_eq!($btf.size_of(name).unwrap(), size_of::<$name>() as u64, "size of {name}");
        $({
            let field = stringify!($field);
            let offset = $btf.offset_of(name, &[field]).unwrap();
            assert_eq!(offset, offset_of!($name, $field) as u64, "offset of {name}.{field}");
        })+
    };
}

#[test]
fn the_kernel_programs_have_the_layout_of_the_agents_structs() {
    let btf = btf_of_the_object();
    assert_same_layout!(btf, CgroupSlot { slot, inherited });
    assert_same_layout!(
        btf,
        Control {
            epoch,
            generation,
            without_entry,
            inherited,
            events_lost,
            io_uncounted,
            instance,
            rates_are_ours
        }
    );
    assert_same_layout!(
        btf,
        CpuState { since_ns, runtime_ns, slot, pid, cgroup_id, clock_offset_ns, clock_read_at_ns, reserved }
    );
    assert_same_layout!(btf, CpuStat { count, waits });
    assert_same_layout!(
        btf,
        CpuCount {
            run_ns,
            switches,
            preemptions,
            preemptions_by_others,
            wait_ns,
            preempted_by,
            epoch,
            reserved
        }
    );
    assert_same_layout!(btf, Histogram { counts });
    assert_same_layout!(btf, Budget { warn_ns, period_ns, end_ns, used_ns });
    assert_same_layout!(btf, Event { at_ns, value, kind, slot });
    assert_same_layout!(btf, IoKey { slot, device, direction });
    assert_same_layout!(btf, IoStat { latency, bytes, operations, latency_ns, untimed });
    assert_same_layout!(btf, PacketCount { bytes, packets });
    assert_same_layout!(btf, NetStat { egress, ingress, egress_marks, ingress_marks, retransmits, drops });
    assert_same_layout!(
        btf,
        Pace { rate, mode, active_before, gain, aim, debt, epoch_start_ns, epoch, sent, active }
    );
    assert_same_layout!(btf, Admission { granted, refused, is_governed, refused_card });
    assert_same_layout!(btf, SocketState { epoch, ours, own });
    assert_same_layout!(
        btf,
        Clock {
            price,
            credit,
            stream_slack,
            datagrams_due,
            streams_due,
            datagrams_half,
            streams_half,
            datagram_at,
            datagrams_held,
            streams_held,
            reserved
        }
    );
    assert_same_layout!(btf, Pool { capacity, window, trim, since_ns, sent, unwanted, reserved });
    assert_same_layout!(btf, Claims { weights, guarantees, settled, reserved });
    assert_same_layout!(
        btf,
        Share {
            is_in,
            weight,
            guarantee,
            ceiling,
            window,
            grant,
            sent,
            since_ns,
            since_allowance,
            since_sent,
            noted,
            claimed,
            opens,
            claim,
            allowance,
            allowance_at_ns,
            epoch_allowance
        }
    );
}

/// The verifier's work on a program, on all that the paths through it can be: what an agent's start costs, and how near a program
/// is to the million instructions at which it is refused. Measured: 2,000 to 19,000 on 6.18.
#[test]
fn the_verifier_has_little_work_with_every_program() {
    const MOST: u32 = 40_000;
    let agent = Agent::start();
    agent.run("task", &[], &["tick", "6000", "0"]);
    let programs: BTreeSet<u32> = links(&agent.bpffs_dir()).values().map(|link| link.program).collect();
    let mut seen = 0;
    // Another may go between being listed and being opened.
    for info in loaded_programs().flatten().filter(|info| programs.contains(&info.id())) {
        let name = info.name_as_str().unwrap_or_default().to_owned();
        let verified = info.verified_instruction_count().expect("known since 5.16");
        println!("{name}: {verified}");
        assert!(verified <= MOST, "{name}: {verified} instructions, more than {MOST}");
        seen += 1;
    }
    assert_eq!(seen, programs.len());
}
