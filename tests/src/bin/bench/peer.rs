//! What our programs are measured against: `shaper-ebpf/src/bench.rs`.

use std::{env, fs::File, path::PathBuf};

use anyhow::{Context, Result, bail};
use aya::{
    Btf, Ebpf, EbpfLoader,
    programs::{CgroupAttachMode, CgroupSkbAttachType, Program},
};
use shaper_agent::kernel::btf::{Btf as KernelBtf, OFFSETS};
use shaper_tests::{bins::bpf_object, cgroup::mounts};

/// Programs that do nothing.
pub(crate) const EMPTY_SWITCH: &str = "empty_switch";
pub(crate) const EMPTY_BLOCK: &str = "empty_block";
pub(crate) const EMPTY_EGRESS: &str = "empty_egress";
pub(crate) const EMPTY_INGRESS: &str = "empty_ingress";
/// Run-queue delay as tools usually measure it.
pub(crate) const CLASSIC: [&str; 3] = ["classic_wakeup", "classic_wakeup_new", "classic_switch"];

/// Attached for as long as this lives.
pub(crate) struct Peer(Ebpf);

impl Peer {
    pub(crate) fn attach(names: &[&str]) -> Result<Peer> {
        let path = env::var_os("SHAPER_BENCH_OBJECT")
            .map_or_else(|| bpf_object().with_file_name("bench.bpf.o"), PathBuf::from);
        let (kernel, btf) = (KernelBtf::of_kernel()?, Btf::from_sys_fs()?);
        let mut offsets = Vec::new();
        for (global, of, field) in OFFSETS {
            offsets.push((*global, kernel.offset_of(of, field)?));
        }
        let mut loader = EbpfLoader::new();
        loader.btf(Some(&btf));
        for (global, offset) in &offsets {
            // It has those that its programs use.
            loader.override_global(global, offset, false);
        }
        let mut ebpf = loader.load_file(&path).with_context(|| format!("cannot load {}", path.display()))?;
        for name in names {
            attach(&mut ebpf, &btf, name).with_context(|| format!("cannot attach {name}"))?;
        }
        Ok(Peer(ebpf))
    }

    /// The id of one of its programs.
    pub(crate) fn program(&self, name: &str) -> Result<u32> {
        let program = self.0.program(name).with_context(|| format!("the object has no program {name}"))?;
        Ok(program.info().with_context(|| format!("cannot look at {name}"))?.id())
    }
}

fn attach(ebpf: &mut Ebpf, btf: &Btf, name: &str) -> Result<()> {
    match ebpf.program_mut(name) {
        Some(Program::BtfTracePoint(program)) => {
            let tracepoint = match name {
                "classic_wakeup" => "sched_wakeup",
                "classic_wakeup_new" => "sched_wakeup_new",
                EMPTY_BLOCK => "block_rq_complete",
                _ => "sched_switch",
            };
            program.load(tracepoint, btf)?;
            program.attach()?;
        }
        Some(Program::CgroupSkb(program)) => {
            program.load()?;
            let direction =
                if name == EMPTY_EGRESS { CgroupSkbAttachType::Egress } else { CgroupSkbAttachType::Ingress };
            program.attach(File::open(mounts().0)?, direction, CgroupAttachMode::default())?;
        }
        _ => bail!("the object has no such program"),
    }
    Ok(())
}
