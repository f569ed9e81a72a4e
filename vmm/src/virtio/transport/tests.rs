use super::*;
use crate::virtio::fuzzing::{self, DESCRIPTORS, Guest};
use crate::virtio::{Block, Disk};
use proptest::prelude::*;
use std::sync::atomic::{AtomicBool, Ordering};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX};

fn disk() -> Disk {
    disk_that_is(false)
}

fn disk_that_is(read_only: bool) -> Disk {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(8192).unwrap();
    Disk::open(&fuzzing::drive("disk", file.path(), read_only)).unwrap()
}

fn guest() -> Guest<Block> {
    Guest::new(disk())
}

const ACTIVE: u32 = 0xf;

#[test]
fn the_identification_registers_are_those_of_a_modern_block_device() {
    let mut guest = guest();
    assert_eq!(guest.read(0x0), u32::from_le_bytes(*b"virt"));
    assert_eq!(guest.read(0x4), 2);
    assert_eq!(guest.read(0x8), 2);
    assert_eq!(guest.read(register::VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
}

#[test]
fn a_driver_that_follows_the_steps_gets_a_running_device() {
    let mut guest = guest();
    guest.set_up(1 << VIRTIO_BLK_F_SEG_MAX);
    assert_eq!(guest.read(register::VIRTIO_MMIO_STATUS), ACTIVE);
    assert_eq!(guest.read(register::VIRTIO_MMIO_QUEUE_READY), 1);
    // The device holds the memory now: this one's, the transport's and the device's.
    assert_eq!(Arc::strong_count(&guest.memory), 3);
}

#[test]
fn the_offered_features_come_in_two_halves() {
    let mut guest = guest();
    let mut halves = [0; 3];
    for (select, half) in (0..).zip(&mut halves) {
        guest.write(register::VIRTIO_MMIO_DEVICE_FEATURES_SEL, select);
        *half = guest.read(register::VIRTIO_MMIO_DEVICE_FEATURES);
    }
    assert_ne!(halves[0] & 1 << VIRTIO_RING_F_EVENT_IDX, 0);
    assert_eq!(halves[1..], [1, 0]);
}

#[test]
fn features_that_were_not_offered_or_lack_version_1_are_not_agreed_on() {
    let mut guest = guest();
    guest.negotiate(1 << VIRTIO_BLK_F_RO);
    assert_eq!(guest.read(register::VIRTIO_MMIO_STATUS), 3);
    guest.negotiate(0);
    assert_eq!(guest.read(register::VIRTIO_MMIO_STATUS), 11);
    guest.write(register::VIRTIO_MMIO_STATUS, 0);
    for status in [1, 3, 11] {
        guest.write(register::VIRTIO_MMIO_STATUS, status);
    }
    assert_eq!(guest.read(register::VIRTIO_MMIO_STATUS), 3);
}

#[test]
fn features_are_closed_once_agreed_on() {
    let mut guest = guest();
    guest.negotiate(0);
    guest.write(register::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
    guest.write(register::VIRTIO_MMIO_DRIVER_FEATURES, u32::MAX);
    guest.enable_queue();
    guest.driver_ok();
    assert_eq!(guest.registers.driver_features, 1 << VIRTIO_F_VERSION_1);
}

#[test]
fn queues_are_set_up_between_features_ok_and_driver_ok_only() {
    let mut guest = guest();
    guest.enable_queue();
    assert_eq!(guest.read(register::VIRTIO_MMIO_QUEUE_READY), 0);
    guest.set_up(0);
    guest.write(register::VIRTIO_MMIO_QUEUE_READY, 0);
    guest.write(register::VIRTIO_MMIO_QUEUE_DESC_LOW, 0x7000);
    assert_eq!(guest.read(register::VIRTIO_MMIO_QUEUE_READY), 1);
    assert_eq!(guest.registers.queues[0].descriptors, DESCRIPTORS);
}

#[test]
fn a_ready_queue_is_not_changed_until_it_is_disabled() {
    let mut guest = guest();
    guest.negotiate(0);
    guest.enable_queue();
    guest.write(register::VIRTIO_MMIO_QUEUE_USED_HIGH, 1);
    assert_eq!(guest.registers.queues[0].used >> 32, 0);
    guest.write(register::VIRTIO_MMIO_QUEUE_READY, 0);
    guest.write(register::VIRTIO_MMIO_QUEUE_USED_HIGH, 1);
    assert_eq!(guest.registers.queues[0].used >> 32, 1);
}

#[test]
fn a_queue_that_does_not_hold_water_stays_disabled_and_asks_for_a_reset() {
    let mut guest = guest();
    guest.negotiate(0);
    guest.write(register::VIRTIO_MMIO_QUEUE_DESC_HIGH, 1);
    guest.write(register::VIRTIO_MMIO_QUEUE_READY, 1);
    assert_eq!(guest.read(register::VIRTIO_MMIO_QUEUE_READY), 0);
    assert_eq!(guest.read(register::VIRTIO_MMIO_STATUS), 11 | 64);
    guest.write(register::VIRTIO_MMIO_STATUS, 0);
    assert_eq!(guest.read(register::VIRTIO_MMIO_STATUS), 0);
}

#[test]
fn queues_that_do_not_exist_have_no_size() {
    let mut guest = guest();
    for select in [1, 2, u32::MAX] {
        guest.write(register::VIRTIO_MMIO_QUEUE_SEL, select);
        assert_eq!(guest.read(register::VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
        guest.write(register::VIRTIO_MMIO_QUEUE_READY, 1);
        assert_eq!(guest.read(register::VIRTIO_MMIO_QUEUE_READY), 0);
    }
    guest.write(register::VIRTIO_MMIO_QUEUE_SEL, 0);
    assert_eq!(guest.read(register::VIRTIO_MMIO_QUEUE_NUM_MAX), 256);
}

#[test]
fn a_driver_that_gives_up_takes_its_memory_back() {
    let mut guest = guest();
    guest.set_up(0);
    guest.write(register::VIRTIO_MMIO_STATUS, ACTIVE | 128);
    assert_eq!(Arc::strong_count(&guest.memory), 2);
    assert_eq!(guest.read(register::VIRTIO_MMIO_STATUS), ACTIVE | 128);
}

#[test]
fn interrupts_are_acknowledged_bit_by_bit() {
    let mut guest = guest();
    guest.interrupt.signal_used_buffers();
    guest.interrupt.signal_config_change();
    assert_eq!(guest.read(register::VIRTIO_MMIO_INTERRUPT_STATUS), 3);
    assert_eq!(guest.read(register::VIRTIO_MMIO_CONFIG_GENERATION), 1);
    guest.write(register::VIRTIO_MMIO_INTERRUPT_ACK, 1);
    assert_eq!(guest.read(register::VIRTIO_MMIO_INTERRUPT_STATUS), 2);
}

#[test]
fn accesses_of_another_width_or_alignment_mean_nothing() {
    let mut guest = guest();
    let mut bytes = [0xaa; 8];
    guest.registers.read(0, &mut bytes);
    assert_eq!(bytes, [0; 8]);
    guest.registers.read(2, &mut bytes[..4]);
    assert_eq!(bytes, [0; 8]);
    guest
        .registers
        .write(u64::from(register::VIRTIO_MMIO_STATUS), &[1]);
    assert_eq!(guest.read(register::VIRTIO_MMIO_STATUS), 0);
}

#[test]
fn a_doorbell_that_reaches_the_registers_is_passed_on() {
    let mut guest = guest();
    guest.write(register::VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    guest.write(register::VIRTIO_MMIO_QUEUE_NOTIFY, 7);
    assert_eq!(guest.registers.doorbells[0].read().unwrap(), 1);
}

#[test]
fn dropping_the_parts_lets_go_of_guest_memory() {
    let Guest {
        registers,
        worker,
        device,
        memory,
        ..
    } = {
        let mut guest = guest();
        guest.set_up(0);
        guest
    };
    assert_eq!(Arc::strong_count(&memory), 3);
    drop((registers, worker, device));
    assert_eq!(Arc::strong_count(&memory), 1);
}

#[test]
fn after_a_reset_nobody_touches_guest_memory_also_while_the_queue_is_served() {
    let mut guest = guest();
    let mut worker = guest.take_worker();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                worker.serve(0);
            }
        });
        for round in 0..500_u16 {
            guest.poke(fuzzing::AVAIL, &[0; 4]);
            guest.set_up(0);
            // Sixteen chains without a status byte, or an index too far ahead.
            let index = if round % 2 == 0 { 16_u16 } else { 99 };
            guest.poke(fuzzing::AVAIL + 2, &index.to_le_bytes());
            // Another moment each time.
            (0..round * 8).for_each(|_| std::hint::spin_loop());
            guest.write(register::VIRTIO_MMIO_STATUS, 0);
            assert_eq!(Arc::strong_count(&guest.memory), 2);
            assert_eq!(guest.read(register::VIRTIO_MMIO_STATUS), 0);
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn seeds_of_the_fuzz_targets_are_no_findings() {
    for seed in crate::fuzz_seeds::of("virtio_registers") {
        fuzzing::registers(disk(), &seed);
    }
    for seed in crate::fuzz_seeds::of("virtio_block_requests") {
        fuzzing::any_requests(disk_that_is, &seed);
    }
}

proptest! {
    #[test]
    fn random_register_accesses_never_panic(input in prop::collection::vec(any::<u8>(), 0..2048)) {
        fuzzing::registers(disk(), &input);
    }

    #[test]
    fn random_rings_never_panic(
        features in any::<u64>(),
        input in prop::collection::vec(any::<u8>(), 0..1024),
    ) {
        fuzzing::requests(disk(), features & 1 << VIRTIO_RING_F_EVENT_IDX, &input);
    }
}
