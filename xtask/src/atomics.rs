//! Refuses BPF objects with an atomic read-modify-write that does not fetch.
//!
//! LLVM's BPF backend compiles a relaxed `fetch_add` whose result is used into the plain `lock *(u64 *)(r1) += r2`,
//! which leaves `r2` as it was: the program goes on with the addend in place of the old value, and no diagnostic
//! says so. The first rate limiter of this project let through ninety times its rate for that reason. Whether the
//! result of one instruction is used is not visible in it, so the rule is simpler than the bug: every atomic
//! read-modify-write in `shaper-ebpf` is SeqCst, which always fetches, and this check holds it to that.

use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use object::read::elf::ElfFile64;
use object::{Endianness, Object, ObjectSection, ObjectSymbol, SectionKind, SymbolKind, elf};

/// Bytes in one instruction slot.
const SLOT: usize = 8;

/// `BPF_LD | BPF_IMM | BPF_DW`, the one instruction of two slots.
const LOAD_IMMEDIATE_64: u8 = 0x18;

/// `BPF_STX | BPF_ATOMIC`, and the bits that say so: the others are the operand's size.
const ATOMIC: u8 = 0xc3;
const ATOMIC_MASK: u8 = 0xe7;

/// An atomic instruction that leaves its register as it was.
#[derive(Debug, PartialEq, Eq)]
struct PlainAtomic {
    offset: usize,
    operation: &'static str,
}

/// A refused instruction, with its place in the object.
struct Finding {
    section: String,
    function: String,
    at: PlainAtomic,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { section, function, at } = self;
        write!(f, "  {function} (section {section}, offset {:#x}): {} without fetch", at.offset, at.operation)
    }
}

/// Checks every executable section of the object at `path`.
pub(crate) fn check(path: &Path) -> Result<()> {
    let data = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let findings = findings(&data).with_context(|| format!("cannot check {}", path.display()))?;
    if findings.is_empty() {
        return Ok(());
    }
    let list = findings.iter().map(Finding::to_string).collect::<Vec<_>>().join("\n");
    bail!(
        "{} atomic operations in {} do not fetch:\n{list}\n\
         LLVM miscompiles a relaxed fetch_add whose result is used: it becomes a plain add, which hands back the \
         addend in place of the old value.\nMake these operations SeqCst; that always fetches.",
        findings.len(),
        path.display(),
    );
}

fn findings(data: &[u8]) -> Result<Vec<Finding>> {
    let file = ElfFile64::<Endianness>::parse(data).context("not a 64-bit ELF object")?;
    if file.elf_header().e_machine.get(file.endian()) != elf::EM_BPF || !file.is_little_endian() {
        bail!("not an object for little-endian BPF");
    }
    let mut findings = Vec::new();
    let mut instructions = 0;
    for section in file.sections().filter(|section| section.kind() == SectionKind::Text) {
        let name = section.name().context("a section has no readable name")?;
        let code = section.data().with_context(|| format!("section {name} has no readable data"))?;
        instructions += code.len() / SLOT;
        let plain = plain_atomics(code).with_context(|| format!("section {name} is not BPF code"))?;
        findings.extend(plain.into_iter().map(|at| {
            // Symbols of a relocatable object are addressed from their section's start.
            let function = file
                .symbols()
                .filter(|s| s.kind() == SymbolKind::Text && s.section_index() == Some(section.index()))
                .filter(|s| s.address() <= at.offset as u64)
                .max_by_key(|s| s.address())
                .and_then(|s| s.name().ok())
                .unwrap_or("?");
            Finding { section: name.to_owned(), function: function.to_owned(), at }
        }));
    }
    if instructions == 0 {
        bail!("it has no instructions");
    }
    Ok(findings)
}

/// The atomic read-modify-writes in `code` that do not fetch.
fn plain_atomics(code: &[u8]) -> Result<Vec<PlainAtomic>> {
    let (slots, rest) = code.as_chunks::<SLOT>();
    if !rest.is_empty() {
        bail!("{} bytes are no whole number of instructions", code.len());
    }
    let mut found = Vec::new();
    let mut slots = slots.iter().enumerate();
    while let Some((index, &[opcode, _, _, _, imm @ ..])) = slots.next() {
        if opcode == LOAD_IMMEDIATE_64 && slots.next().is_none() {
            bail!("the last instruction is cut off");
        }
        if opcode & ATOMIC_MASK != ATOMIC {
            continue;
        }
        // With BPF_FETCH these are 0x01, 0x41, 0x51 and 0xa1; XCHG (0xe1) and CMPXCHG (0xf1) always fetch.
        let operation = match i32::from_le_bytes(imm) {
            0x00 => "add",
            0x40 => "or",
            0x50 => "and",
            0xa0 => "xor",
            _ => continue,
        };
        found.push(PlainAtomic { offset: index * SLOT, operation });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXIT: [u8; SLOT] = [0x95, 0, 0, 0, 0, 0, 0, 0];

    /// `lock *(u64 *)(r1 + 0) op r2`
    const fn atomic64(imm: u8) -> [u8; SLOT] {
        [0xdb, 0x21, 0, 0, imm, 0, 0, 0]
    }

    const fn atomic32(imm: u8) -> [u8; SLOT] {
        [0xc3, 0x21, 0, 0, imm, 0, 0, 0]
    }

    fn found(code: &[[u8; SLOT]]) -> Vec<PlainAtomic> {
        plain_atomics(code.as_flattened()).unwrap()
    }

    #[test]
    fn operations_that_fetch_pass() {
        for imm in [0x01, 0x41, 0x51, 0xa1, 0xe1, 0xf1] {
            assert_eq!(found(&[atomic64(imm), atomic32(imm), EXIT]), [], "{imm:#x}");
        }
    }

    #[test]
    fn plain_operations_are_found_in_both_sizes() {
        for (imm, operation) in [(0x00, "add"), (0x40, "or"), (0x50, "and"), (0xa0, "xor")] {
            let expected = [PlainAtomic { offset: 0, operation }, PlainAtomic { offset: 16, operation }];
            assert_eq!(found(&[atomic64(imm), EXIT, atomic32(imm)]), expected);
        }
    }

    #[test]
    fn the_second_slot_of_a_wide_instruction_is_data() {
        let wide = [LOAD_IMMEDIATE_64, 0x01, 0, 0, 0, 0, 0, 0];
        assert_eq!(found(&[wide, atomic64(0), EXIT]), []);
        // … and what follows it is decoded in step again.
        assert_eq!(found(&[wide, atomic64(0), atomic64(0)]), [PlainAtomic { offset: 16, operation: "add" }]);
    }

    #[test]
    fn ordinary_stores_and_other_classes_pass() {
        let store = [0x7b, 0x21, 0, 0, 0, 0, 0, 0];
        let add = [0x0f, 0x21, 0, 0, 0, 0, 0, 0];
        let jump = [0xdd, 0x21, 0, 0, 0, 0, 0, 0];
        assert_eq!(found(&[store, add, jump, EXIT]), []);
    }

    #[test]
    fn an_immediate_is_four_bytes_little_endian() {
        // 0x100, a load-acquire: not an add, though its low byte is 0x00.
        assert_eq!(found(&[[0xdb, 0x21, 0, 0, 0, 1, 0, 0], EXIT]), []);
    }

    #[test]
    fn what_is_not_whole_instructions_is_an_error() {
        assert!(plain_atomics(&EXIT[..7]).is_err());
        assert!(plain_atomics(&[LOAD_IMMEDIATE_64, 0, 0, 0, 0, 0, 0, 0]).is_err());
        assert!(findings(b"no object").is_err());
    }
}
