//! What a driver is told, and what becomes of the device when it begins anew.

use super::*;

#[test]
fn the_configuration_space_has_what_is_configured_and_features_say_so() {
    let configured = bench_with(0, Arc::new(Unbounded), |config| {
        config.guest_mac = "06:00:ac:10:00:02".parse().ok();
        config.mtu = Some(1400);
    });
    let mut space = [0xee; 16];
    let device = configured.guest.device.lock().unwrap();
    device.read_config(0, &mut space);
    assert_eq!(space[..6], [6, 0, 0xac, 0x10, 0, 2]);
    assert_eq!(space[6..], [0, 0, 0, 0, 0x78, 5, 0, 0, 0, 0]);
    let wanted = 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_MTU;
    assert_eq!(device.features() & wanted, wanted);
    let plain = bench(0);
    assert_eq!(plain.guest.device.lock().unwrap().features() & wanted, 0);
}

const CSUM: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM;
const TSO: u64 = 1 << VIRTIO_NET_F_GUEST_TSO4;

#[test]
fn the_link_leaves_to_the_driver_what_it_took_and_no_more() {
    let with_both = bench(CSUM | TSO);
    assert_eq!(with_both.wire.state().offload, TUN_F_CSUM | TUN_F_TSO4);
    let mut without = bench(TSO);
    assert_eq!(without.wire.state().offload, 0);
    without.guest.set_up(CSUM);
    assert_eq!(without.wire.state().offload, TUN_F_CSUM);
}

#[test]
fn drivers_that_want_the_same_leave_the_link_alone() {
    let mut bench = bench(CSUM);
    for _ in 0..1000 {
        bench.guest.set_up(CSUM);
    }
    assert_eq!(bench.wire.state().offload_changes, 1);
}

#[test]
fn a_guest_that_changes_its_offloads_all_the_time_loses_its_interface() {
    let mut bench = bench(0);
    for _ in 0..OFFLOAD_CHANGES_MAX {
        bench.guest.set_up(CSUM);
        bench.guest.set_up(0);
    }
    assert_eq!(bench.wire.state().offload_changes, OFFLOAD_CHANGES_MAX);
    bench.guest.set_up(CSUM);
    bench.offer(TX, &[(DATA, 64, 0)]);
    bench.guest.worker.serve(TX);
    assert!(bench.used(TX).is_empty());
    // As it was when the changes ran out it still works.
    bench.guest.set_up(0);
    bench.guest.worker.serve(TX);
    assert_eq!(bench.used(TX).len(), 1);
}

#[test]
fn frames_for_a_driver_with_other_offloads_do_not_reach_the_next_one() {
    let mut bench = bench(CSUM);
    bench.wire.bring(frame(&[1; 20]));
    bench.guest.set_up(0);
    bench.wire.bring(frame(&[2; 20]));
    bench.offer(RX, &[(DATA, 64, WRITE)]);
    bench.guest.worker.serve(RX);
    assert_eq!(bench.bytes(DATA + 12, 20), [2; 20]);
}

#[test]
fn a_driver_that_resets_under_load_leaves_no_reference_to_its_memory() {
    let mut bench = bench(MERGEABLE);
    for _ in 0..1000 {
        bench.start_over(MERGEABLE);
        bench.offer(RX, &[(DATA, 30, WRITE)]);
        bench.offer(TX, &[(DATA, 64, 0)]);
        bench.wire.bring(frame(&[1; 52]));
        bench.guest.worker.serve(RX);
        bench.guest.worker.serve(TX);
        bench
            .guest
            .write(virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS, 0);
        assert_eq!(Arc::strong_count(&bench.guest.memory), 2);
    }
}
