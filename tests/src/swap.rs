//! Swap in the VM: in compressed memory, or on its disk.

use std::{fs, process::Command};

use crate::disk;

const ZRAM: &str = "/sys/block/zram0";

/// Swap that is on. Dropping it turns it off.
pub struct Swap {
    device: &'static str,
}

impl Swap {
    /// In memory, compressed: fast.
    pub fn in_memory() -> Swap {
        disk::assert_vm();
        let size = format!("{ZRAM}/disksize");
        fs::write(&size, "256M").unwrap_or_else(|error| panic!("{size}: {error}"));
        Swap::on("/dev/zram0")
    }

    /// On the whole disk: slow.
    pub fn on_disk() -> Swap {
        disk::assert_vm();
        Swap::on(disk::DEVICE)
    }

    fn on(device: &'static str) -> Swap {
        run("mkswap", device);
        run("swapon", device);
        Swap { device }
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        run("swapoff", self.device);
        if self.device == "/dev/zram0"
            && let Err(error) = fs::write(format!("{ZRAM}/reset"), "1")
        {
            eprintln!("cannot reset zram0: {error}");
        }
    }
}

fn run(program: &str, device: &str) {
    let output = Command::new(program).arg(device).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {device}: {}", said.trim());
}
