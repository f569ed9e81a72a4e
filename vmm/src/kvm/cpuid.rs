//! CPUID of a vCPU: what KVM supports, with the vCPU's own number and the VM's topology.
//!
//! Leaf numbers and bits: Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// How many vCPUs there are and how they hang together: one package, `smt` threads a core.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Topology {
    /// Number of vCPUs.
    pub(crate) vcpus: u8,
    /// Whether two vCPUs make a core.
    pub(crate) smt: bool,
}

impl Topology {
    fn threads_per_core(self) -> u32 {
        if self.smt && self.vcpus > 1 { 2 } else { 1 }
    }

    /// vCPUs that share a cache: up to level 2 it belongs to a core, above to the package.
    fn sharers(self, level: u32) -> u32 {
        if level <= 2 {
            self.threads_per_core()
        } else {
            u32::from(self.vcpus)
        }
    }

    fn cores(self) -> u32 {
        u32::from(self.vcpus) / self.threads_per_core()
    }
}

/// Bits needed to number `count` things from 0.
fn bits_for(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

/// CPUID for the vCPU whose LAPIC has `apic_id`.
pub(crate) fn for_vcpu(supported: &CpuId, apic_id: u8, topology: Topology) -> CpuId {
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            0x1 => leaf_1(entry, apic_id, topology),
            0x4 => leaf_4(entry, topology),
            0xb | 0x1f => leaf_b(entry, apic_id, topology),
            0x8000_001d => leaf_8000_001d(entry, topology),
            0x8000_001e => leaf_8000_001e(entry, apic_id, topology),
            0x8000_0008 => leaf_8000_0008(entry, topology),
            _ => {}
        }
    }
    cpuid
}

/// APIC id, number of APIC ids in the package, and the bits that depend on being a guest.
fn leaf_1(entry: &mut kvm_cpuid_entry2, apic_id: u8, topology: Topology) {
    const ECX_HYPERVISOR: u32 = 1 << 31;
    const ECX_TSC_DEADLINE: u32 = 1 << 24;
    const EDX_HTT: u32 = 1 << 28;
    let ids = 1_u32 << bits_for(u32::from(topology.vcpus));
    entry.ebx = entry.ebx & 0x0000_ffff | ids << 16 | u32::from(apic_id) << 24;
    // KVM's LAPIC has the deadline timer on every host; KVM_GET_SUPPORTED_CPUID leaves the bit out
    // because it depends on the LAPIC being KVM's (Documentation/virt/kvm/api.rst).
    entry.ecx |= ECX_HYPERVISOR | ECX_TSC_DEADLINE;
    if topology.vcpus > 1 {
        entry.edx |= EDX_HTT;
    } else {
        entry.edx &= !EDX_HTT;
    }
}

/// Caches (Intel): which vCPUs share each, and how many cores the package has.
fn leaf_4(entry: &mut kvm_cpuid_entry2, topology: Topology) {
    let level = entry.eax >> 5 & 7;
    if entry.eax & 0x1f == 0 {
        return;
    }
    let id_fields = (topology.cores().next_power_of_two() - 1) << 26
        | (topology.sharers(level).next_power_of_two() - 1) << 14;
    entry.eax = entry.eax & 0x3fff | id_fields;
}

/// Caches (AMD): which vCPUs share each.
fn leaf_8000_001d(entry: &mut kvm_cpuid_entry2, topology: Topology) {
    let level = entry.eax >> 5 & 7;
    if entry.eax & 0x1f != 0 {
        entry.eax = entry.eax & 0x3fff | (topology.sharers(level) - 1) << 14;
    }
}

/// Core and node (AMD): one node.
fn leaf_8000_001e(entry: &mut kvm_cpuid_entry2, apic_id: u8, topology: Topology) {
    let threads = topology.threads_per_core();
    entry.eax = u32::from(apic_id);
    entry.ebx = ((threads - 1) << 8) | (u32::from(apic_id) / threads);
    entry.ecx = 0;
}

/// Extended topology: threads, then cores.
fn leaf_b(entry: &mut kvm_cpuid_entry2, apic_id: u8, topology: Topology) {
    const TYPE_THREAD: u32 = 1 << 8;
    const TYPE_CORE: u32 = 2 << 8;
    let (shift, count, kind) = match entry.index {
        0 => (
            bits_for(topology.threads_per_core()),
            topology.threads_per_core(),
            TYPE_THREAD,
        ),
        1 => (
            bits_for(u32::from(topology.vcpus)),
            u32::from(topology.vcpus),
            TYPE_CORE,
        ),
        _ => (0, 0, 0),
    };
    entry.eax = shift;
    entry.ebx = count;
    entry.ecx = entry.index | kind;
    entry.edx = u32::from(apic_id);
}

/// Number of threads in the package (AMD), keeping the address widths.
fn leaf_8000_0008(entry: &mut kvm_cpuid_entry2, topology: Topology) {
    let vcpus = u32::from(topology.vcpus);
    entry.ecx = bits_for(vcpus) << 12 | (vcpus - 1);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuId {
        let leaf = |function, index, eax| kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ..kvm_cpuid_entry2::default()
        };
        let leaves = [
            leaf(0x1, 0, 0),
            leaf(0x4, 0, 1 << 5 | 1),
            leaf(0x4, 1, 3 << 5 | 3),
            leaf(0xb, 0, 0),
            leaf(0xb, 1, 0),
            leaf(0x8000_0008, 0, 0x3030),
            leaf(0x8000_001d, 3, 3 << 5 | 3),
            leaf(0x8000_001e, 0, 0),
        ];
        CpuId::from_entries(&leaves).unwrap()
    }

    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        let mut leaves = cpuid.as_slice().iter();
        *leaves
            .find(|entry| entry.function == function && entry.index == index)
            .unwrap()
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id_everywhere() {
        let topology = Topology {
            vcpus: 4,
            smt: false,
        };
        for id in 0..4 {
            let cpuid = for_vcpu(&supported(), id, topology);
            assert_eq!(leaf(&cpuid, 1, 0).ebx >> 24, u32::from(id));
            assert_eq!(leaf(&cpuid, 0xb, 0).edx, u32::from(id));
        }
    }

    #[test]
    fn topology_counts_threads_and_cores() {
        let cpuid = for_vcpu(
            &supported(),
            0,
            Topology {
                vcpus: 6,
                smt: true,
            },
        );
        let (threads, cores) = (leaf(&cpuid, 0xb, 0), leaf(&cpuid, 0xb, 1));
        assert_eq!((threads.eax, threads.ebx, threads.ecx), (1, 2, 0x100));
        assert_eq!((cores.eax, cores.ebx, cores.ecx), (3, 6, 0x201));
        assert_eq!(leaf(&cpuid, 1, 0).ebx >> 16 & 0xff, 8);
        assert_eq!(leaf(&cpuid, 4, 0).eax >> 14 & 0xfff, 1);
        assert_eq!(leaf(&cpuid, 4, 1).eax >> 14 & 0xfff, 7);
        assert_eq!(leaf(&cpuid, 4, 1).eax >> 26, 3);
        assert_eq!(leaf(&cpuid, 0x8000_001d, 3).eax >> 14, 5);
        let last = for_vcpu(
            &supported(),
            5,
            Topology {
                vcpus: 6,
                smt: true,
            },
        );
        let core = leaf(&last, 0x8000_001e, 0);
        assert_eq!((core.eax, core.ebx), (5, 0x102));
    }

    #[test]
    fn a_single_vcpu_is_a_package_of_one_in_a_guest() {
        let cpuid = for_vcpu(
            &supported(),
            0,
            Topology {
                vcpus: 1,
                smt: true,
            },
        );
        let one = leaf(&cpuid, 1, 0);
        assert_eq!(
            (one.ebx >> 16 & 0xff, one.edx >> 28 & 1, one.ecx >> 31),
            (1, 0, 1)
        );
        assert_eq!(leaf(&cpuid, 0x8000_0008, 0).eax, 0x3030);
    }
}
