//! The MP table: which CPUs, buses and interrupt lines there are (Intel MultiProcessor
//! Specification 1.4, chapter 4). It spares the guest ACPI.

/// Address of the LAPICs.
const LAPIC_ADDRESS: u32 = 0xfee0_0000;
/// Address of the IOAPIC.
const IOAPIC_ADDRESS: u32 = 0xfec0_0000;
/// Pins of KVM's IOAPIC.
const IOAPIC_PINS: u8 = 24;
const ISA_BUS: u8 = 0;
const SPEC_REVISION: u8 = 4;
/// Version of an integrated APIC, as KVM's.
const APIC_VERSION: u8 = 0x14;

const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IOAPIC: u8 = 2;
const ENTRY_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;

const PROCESSOR_ENABLED: u8 = 1;
const PROCESSOR_BOOT: u8 = 2;
const INTERRUPT_INT: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTINT: u8 = 3;
const ALL_LAPICS: u8 = 0xff;

/// The floating pointer and the table behind it, to be placed at `address` for `vcpus` vCPUs.
pub(crate) fn build(address: u32, vcpus: u8) -> Vec<u8> {
    const POINTER_BYTES: u32 = 16;
    let mut bytes = floating_pointer(address + POINTER_BYTES);
    bytes.extend(table(vcpus));
    bytes
}

/// MP specification 4.1.
fn floating_pointer(table: u32) -> Vec<u8> {
    let mut bytes = b"_MP_".to_vec();
    bytes.extend(table.to_le_bytes());
    // Length in units of 16 bytes, revision, checksum, five feature bytes.
    bytes.extend([1, SPEC_REVISION, 0, 0, 0, 0, 0, 0]);
    bytes[10] = checksum(&bytes);
    bytes
}

/// MP specification 4.2 and 4.3.
fn table(vcpus: u8) -> Vec<u8> {
    // An id that no LAPIC has.
    let ioapic_id = vcpus;
    let mut entries: Vec<Vec<u8>> = Vec::new();
    for id in 0..vcpus {
        let boot = if id == 0 { PROCESSOR_BOOT } else { 0 };
        let mut entry = vec![ENTRY_PROCESSOR, id, APIC_VERSION, PROCESSOR_ENABLED | boot];
        // Signature and features (FPU, APIC): informative, Linux asks CPUID.
        entry.extend(0x0600_u32.to_le_bytes());
        entry.extend(0x0201_u32.to_le_bytes());
        entry.extend([0; 8]);
        entries.push(entry);
    }
    let mut bus = vec![ENTRY_BUS, ISA_BUS];
    bus.extend(b"ISA   ");
    entries.push(bus);
    let mut ioapic = vec![ENTRY_IOAPIC, ioapic_id, 0x11, 1];
    ioapic.extend(IOAPIC_ADDRESS.to_le_bytes());
    entries.push(ioapic);
    // Every pin is an edge-triggered ISA line of its own number: the virtio devices use those
    // that ISA left free.
    for pin in 0..IOAPIC_PINS {
        entries.push(vec![
            ENTRY_INTERRUPT,
            INTERRUPT_INT,
            0,
            0,
            ISA_BUS,
            pin,
            ioapic_id,
            pin,
        ]);
    }
    let local = |kind, lapic, pin| vec![ENTRY_LOCAL_INTERRUPT, kind, 0, 0, ISA_BUS, 0, lapic, pin];
    entries.push(local(INTERRUPT_EXTINT, 0, 0));
    entries.push(local(INTERRUPT_NMI, ALL_LAPICS, 1));
    with_header(&entries)
}

fn with_header(entries: &[Vec<u8>]) -> Vec<u8> {
    const HEADER_BYTES: usize = 44;
    let length = HEADER_BYTES + entries.iter().map(Vec::len).sum::<usize>();
    // 32 vCPUs make 924 bytes and 60 entries (tested).
    let length = u16::try_from(length).unwrap_or(u16::MAX);
    let count = u16::try_from(entries.len()).unwrap_or(u16::MAX);
    let mut bytes = b"PCMP".to_vec();
    bytes.extend(length.to_le_bytes());
    bytes.extend([SPEC_REVISION, 0]);
    bytes.extend(b"SAMEPAGEMICROVM     ");
    // No OEM table.
    bytes.extend([0; 6]);
    bytes.extend(count.to_le_bytes());
    bytes.extend(LAPIC_ADDRESS.to_le_bytes());
    // No extended entries.
    bytes.extend([0; 4]);
    entries.iter().for_each(|entry| bytes.extend(entry));
    bytes[7] = checksum(&bytes);
    bytes
}

/// The byte that makes all bytes add up to zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0_u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::VCPU_COUNT_MAX;
    use crate::memory::layout::{EBDA_ADDRESS, EBDA_END};

    fn adds_up(bytes: &[u8]) -> bool {
        bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)) == 0
    }

    #[test]
    fn pointer_and_table_have_right_lengths_and_checksums() {
        for vcpus in 1..=VCPU_COUNT_MAX {
            let bytes = build(u32::try_from(EBDA_ADDRESS).unwrap(), vcpus);
            let (pointer, table) = bytes.split_at(16);
            assert!(adds_up(pointer) && adds_up(table));
            assert_eq!(&pointer[..4], b"_MP_");
            assert_eq!(pointer[4..8], (0x9_fc10_u32).to_le_bytes());
            assert_eq!(&table[..4], b"PCMP");
            let length = u16::from_le_bytes([table[4], table[5]]);
            assert_eq!(usize::from(length), table.len());
            assert_eq!(table[36..40], LAPIC_ADDRESS.to_le_bytes());
        }
    }

    #[test]
    fn the_table_of_the_most_vcpus_fits_the_ebda() {
        let bytes = build(0, VCPU_COUNT_MAX);
        assert!(
            bytes.len() as u64 <= EBDA_END - EBDA_ADDRESS,
            "{}",
            bytes.len()
        );
    }

    #[test]
    fn entries_are_counted_and_in_order_of_type() {
        let bytes = build(0, 2);
        let table = &bytes[16..];
        let count = usize::from(u16::from_le_bytes([table[34], table[35]]));
        let mut rest = &table[44..];
        let mut types = Vec::new();
        while !rest.is_empty() {
            types.push(rest[0]);
            rest = &rest[if rest[0] == ENTRY_PROCESSOR { 20 } else { 8 }..];
        }
        assert_eq!(types.len(), count);
        assert!(types.is_sorted());
        assert_eq!(
            types
                .iter()
                .filter(|kind| **kind == ENTRY_PROCESSOR)
                .count(),
            2
        );
    }
}
