use super::*;
use crate::config::Drive;
use crate::virtio::fuzzing::{self, AVAIL, DESCRIPTORS, Guest, HIGH_START, LOW_BYTES, USED};
use crate::virtio::{Doorbells, Unbounded};
use proptest::prelude::*;
use std::io::Write;
use std::path::Path;
use std::sync::Mutex;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_bindings::virtio_mmio as register;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, bitmap::Bitmap};

pub(super) const HEADER: u64 = 0x4000;
pub(super) const DATA: u64 = 0x5000;
pub(super) const STATUS: u64 = 0x7000;
const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const UNTOUCHED: u8 = 0xee;
const SECTORS: u64 = 8;

fn drive(path: &Path) -> Drive {
    Drive {
        cache_type: CacheType::Writeback,
        ..fuzzing::drive("rootfs", path, false)
    }
}

/// A file of eight sectors; each byte of sector n is n + 1.
fn file() -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    for sector in 0..SECTORS {
        file.write_all(&[u8::try_from(sector).unwrap() + 1; 512])
            .unwrap();
    }
    file
}

pub(super) struct Bench {
    pub(super) guest: Guest<Block>,
    file: tempfile::NamedTempFile,
    next_avail: u16,
}

fn bench_with(change: impl FnOnce(&mut Drive)) -> Bench {
    allowed(change, Arc::new(Unbounded))
}

fn allowed(change: impl FnOnce(&mut Drive), allowance: Arc<dyn Allowance>) -> Bench {
    let file = file();
    let mut drive = drive(file.path());
    change(&mut drive);
    let mut guest = Guest::allowed(Disk::open(&drive).unwrap(), allowance);
    guest.set_up(0);
    Bench {
        guest,
        file,
        next_avail: 0,
    }
}

pub(super) fn bench() -> Bench {
    bench_with(|_| ())
}

impl Bench {
    pub(super) fn header(&mut self, kind: u32, sector: u64) {
        self.guest.poke(HEADER, &kind.to_le_bytes());
        self.guest.poke(HEADER + 8, &sector.to_le_bytes());
        self.guest.poke(STATUS, &[UNTOUCHED]);
    }

    /// Puts a chain of (address, length, flags) into the table and rings.
    fn submit(&mut self, chain: &[(u64, u32, u16)]) {
        self.link(chain);
        self.ring();
    }

    pub(super) fn link(&mut self, chain: &[(u64, u32, u16)]) {
        for (index, &(address, length, flags)) in (0_u16..).zip(chain) {
            let last = usize::from(index) + 1 == chain.len();
            let flags = if last { flags } else { flags | NEXT };
            let at = DESCRIPTORS + 16 * u64::from(index);
            self.guest.poke(at, &address.to_le_bytes());
            self.guest.poke(at + 8, &length.to_le_bytes());
            self.guest.poke(at + 12, &flags.to_le_bytes());
            self.guest.poke(at + 14, &(index + 1).to_le_bytes());
        }
    }

    fn ring(&mut self) {
        self.make_available();
        self.guest.serve();
    }

    /// Sets the rings up anew.
    pub(super) fn reset(&mut self) {
        self.guest.set_up(0);
        self.next_avail = 0;
        for index in [AVAIL + 2, USED + 2] {
            self.guest.poke(index, &[0, 0]);
        }
    }

    pub(super) fn make_available(&mut self) {
        self.guest
            .poke(AVAIL + 4 + 2 * u64::from(self.next_avail % 16), &[0, 0]);
        self.next_avail += 1;
        self.guest.poke(AVAIL + 2, &self.next_avail.to_le_bytes());
    }

    /// Header, data and status in a descriptor each; returns the status byte.
    fn request(&mut self, kind: u32, sector: u64, length: u32, data_flags: u16) -> u8 {
        self.header(kind, sector);
        let data = (DATA, length, data_flags);
        self.submit(&[(HEADER, 16, 0), data, (STATUS, 1, WRITE)]);
        self.peek(STATUS, 1)[0]
    }

    pub(super) fn peek(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.guest
            .memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    /// Entries in the used ring, and the length of the last.
    pub(super) fn used(&self) -> (u16, u32) {
        let index: u16 = self.guest.memory.read_obj(GuestAddress(USED + 2)).unwrap();
        let last = USED + 4 + 8 * u64::from(index.wrapping_sub(1) % 16);
        (
            index,
            self.guest.memory.read_obj(GuestAddress(last + 4)).unwrap(),
        )
    }

    fn contents(&self) -> Vec<u8> {
        std::fs::read(self.file.path()).unwrap()
    }
}

/// Leave for so many bytes, as the test says.
#[derive(Debug, Default)]
struct Ration {
    left_bytes: Mutex<u64>,
    put_off: Mutex<u32>,
}

impl Allowance for Ration {
    fn is_open(&self) -> bool {
        true
    }

    fn take(&self, bytes: u64) -> bool {
        let mut left_bytes = self.left_bytes.lock().unwrap();
        let rest = left_bytes.checked_sub(bytes);
        *left_bytes = rest.unwrap_or(*left_bytes);
        rest.is_some()
    }

    fn page_bytes(&self) -> u64 {
        4096
    }

    fn ring_later(&self, _doorbells: &Doorbells, _queue: usize) {
        *self.put_off.lock().unwrap() += 1;
    }
}

#[test]
fn a_request_waits_half_done_for_memory_and_is_used_once_when_it_is_there() {
    let ration = Arc::new(Ration::default());
    let mut bench = allowed(|_| (), ration.clone());
    // The second buffer is on a page of its own.
    let (first, second) = (DATA + 0xe00, HIGH_START);
    for address in [first, second, STATUS] {
        bench.guest.poke(address, &[UNTOUCHED; 512]);
    }
    // For what is read, and for the first buffer.
    *ration.left_bytes.lock().unwrap() = 2 * 4096;
    bench.header(VIRTIO_BLK_T_IN, 2);
    let chain = [
        (HEADER, 16, 0),
        (first, 512, WRITE),
        (second, 512, WRITE),
        (STATUS, 1, WRITE),
    ];
    bench.submit(&chain);
    assert_eq!(bench.used().0, 0, "nothing is told of it yet");
    assert_eq!(bench.peek(first, 512), [3; 512]);
    assert_eq!(bench.peek(second, 512), [UNTOUCHED; 512]);
    assert_eq!(bench.peek(STATUS, 1), [UNTOUCHED]);
    assert_eq!(*ration.put_off.lock().unwrap(), 1);

    // Enough for the data, then for the status byte.
    for (left_bytes, used) in [(0, 0), (4096, 0), (4096, 1)] {
        *ration.left_bytes.lock().unwrap() = left_bytes;
        bench.guest.serve();
        assert_eq!(bench.used().0, used);
    }
    assert_eq!(bench.peek(second, 512), [4; 512]);
    assert_eq!(bench.peek(STATUS, 1), [OK]);
    assert_eq!(bench.used(), (1, 1025));
    assert_eq!(bench.guest.interrupt.event().read().unwrap(), 1);
}

#[test]
fn a_reset_lets_go_of_a_request_that_waits_for_memory() {
    let ration = Arc::new(Ration::default());
    let mut bench = allowed(|_| (), ration.clone());
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 2, 512, WRITE), UNTOUCHED);
    bench.reset();
    *ration.left_bytes.lock().unwrap() = u64::MAX;
    bench.guest.serve();
    assert_eq!(bench.used().0, 0, "it is forgotten");
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 2, 512, WRITE), OK);
    assert_eq!(bench.used().0, 1);
}

#[test]
fn a_name_is_written_as_far_as_there_is_memory_for_its_pages() {
    let ration = Arc::new(Ration::default());
    let mut bench = allowed(|_| (), ration.clone());
    *ration.left_bytes.lock().unwrap() = 4096;
    bench.header(VIRTIO_BLK_T_GET_ID, 0);
    let (first, second) = (DATA + 0xffc, HIGH_START);
    bench.submit(&[
        (HEADER, 16, 0),
        (first, 4, WRITE),
        (second, 16, WRITE),
        (STATUS, 1, WRITE),
    ]);
    assert_eq!(
        (bench.peek(first, 4), bench.used().0),
        (b"root".to_vec(), 0)
    );
    *ration.left_bytes.lock().unwrap() = 2 * 4096;
    bench.guest.serve();
    assert_eq!(&bench.peek(second, 3), b"fs\0");
    assert_eq!(bench.used(), (1, 21));
}

pub(super) const OK: u8 = VIRTIO_BLK_S_OK.to_le_bytes()[0];
const IOERR: u8 = VIRTIO_BLK_S_IOERR.to_le_bytes()[0];
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP.to_le_bytes()[0];

#[test]
fn the_guest_reads_what_the_file_holds() {
    let mut bench = bench();
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 2, 1024, WRITE), OK);
    assert_eq!(
        bench.peek(DATA, 1025),
        [vec![3; 512], vec![4; 512], vec![0]].concat()
    );
    assert_eq!(bench.used(), (1, 1025));
    assert_eq!(bench.guest.interrupt.event().read().unwrap(), 1);
}

#[test]
fn what_the_guest_writes_is_in_the_file() {
    let mut bench = bench();
    bench.guest.poke(DATA, &[0x5a; 512]);
    assert_eq!(bench.request(VIRTIO_BLK_T_OUT, 7, 512, 0), OK);
    assert_eq!(bench.contents()[7 * 512..], [0x5a; 512]);
    assert_eq!(bench.contents()[6 * 512..7 * 512], [7; 512]);
    assert_eq!(bench.used(), (1, 1));
    assert_eq!(bench.request(VIRTIO_BLK_T_FLUSH, 0, 0, 0), OK);
}

#[test]
fn pages_the_device_fills_are_marked_for_the_merge_engine() {
    let mut bench = bench();
    bench.request(VIRTIO_BLK_T_IN, 0, 512, WRITE);
    let region = bench.guest.memory.find_region(GuestAddress(DATA)).unwrap();
    let offset = usize::try_from(DATA).unwrap();
    assert!(region.bitmap().dirty_at(offset));
    assert!(!region.bitmap().dirty_at(offset + 0x1000));
}

#[test]
fn a_request_may_be_cut_into_descriptors_anywhere() {
    let mut bench = bench();
    bench.header(VIRTIO_BLK_T_IN, 1);
    // Header in two pieces, the last data byte together with the status.
    bench.submit(&[
        (HEADER, 3, 0),
        (HEADER + 3, 13, 0),
        (DATA, 100, WRITE),
        (HIGH_START, 413, WRITE),
    ]);
    assert_eq!(bench.peek(DATA, 100), [2; 100]);
    assert_eq!(
        bench.peek(HIGH_START, 413),
        [vec![2; 412], vec![OK]].concat()
    );
    // Header and data in one piece.
    bench.header(VIRTIO_BLK_T_OUT, 0);
    bench.submit(&[(HEADER, 16 + 512, 0), (STATUS, 1, WRITE)]);
    assert_eq!(bench.peek(STATUS, 1), [OK]);
    assert_eq!(bench.contents()[..512], [0; 512]);
}

#[test]
fn an_indirect_table_is_followed_once() {
    let mut bench = bench();
    bench.header(VIRTIO_BLK_T_FLUSH, 0);
    let table = 0x6000_u64;
    bench.guest.poke(table, &HEADER.to_le_bytes());
    bench.guest.poke(table + 8, &[16, 0, 0, 0, 1, 0, 1, 0]);
    bench.guest.poke(table + 16, &STATUS.to_le_bytes());
    bench.guest.poke(table + 24, &[1, 0, 0, 0, 2, 0, 0, 0]);
    bench.submit(&[(table, 32, 4)]);
    assert_eq!(bench.peek(STATUS, 1), [OK]);
    // A table in a table is no request.
    bench.guest.poke(STATUS, &[UNTOUCHED]);
    bench.guest.poke(table + 28, &[4]);
    bench.submit(&[(table, 32, 4)]);
    assert_eq!(bench.peek(STATUS, 1), [UNTOUCHED]);
    assert_eq!(bench.used(), (2, 0));
}

#[test]
fn sectors_past_the_end_are_refused() {
    let mut bench = bench();
    let before = bench.contents();
    for (sector, length) in [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (u64::MAX / 512 + 1, 512),
    ] {
        assert_eq!(bench.request(VIRTIO_BLK_T_IN, sector, length, WRITE), IOERR);
        assert_eq!(bench.request(VIRTIO_BLK_T_OUT, sector, length, 0), IOERR);
    }
    assert_eq!(bench.contents(), before);
}

#[test]
fn parts_of_sectors_and_huge_requests_are_refused() {
    let mut bench = bench();
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 0, 511, WRITE), IOERR);
    assert_eq!(bench.request(VIRTIO_BLK_T_OUT, 0, 513, 0), IOERR);
    let huge = u32::try_from(MAX_REQUEST_BYTES).unwrap() + 512;
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 0, huge, WRITE), IOERR);
}

#[test]
fn buffers_outside_of_memory_are_an_i_o_error() {
    let mut bench = bench();
    let end_of_low = LOW_BYTES as u64 - 256;
    for address in [end_of_low, 0x9000, 0xffff_ffff_0000] {
        bench.header(VIRTIO_BLK_T_IN, 0);
        bench.submit(&[(HEADER, 16, 0), (address, 512, WRITE), (STATUS, 1, WRITE)]);
        assert_eq!(bench.peek(STATUS, 1), [IOERR], "{address:#x}");
    }
}

#[test]
fn a_read_only_disk_says_so_and_refuses_writes() {
    let mut bench = bench_with(|drive| drive.is_read_only = true);
    let before = bench.contents();
    bench
        .guest
        .write(register::VIRTIO_MMIO_DEVICE_FEATURES_SEL, 0);
    let features = bench.guest.read(register::VIRTIO_MMIO_DEVICE_FEATURES);
    assert_ne!(features & 1 << VIRTIO_BLK_F_RO, 0);
    assert_eq!(bench.request(VIRTIO_BLK_T_OUT, 0, 512, 0), IOERR);
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 0, 512, WRITE), OK);
    assert_eq!(bench.request(VIRTIO_BLK_T_FLUSH, 0, 0, 0), OK);
    assert_eq!(bench.contents(), before);
}

#[test]
fn flush_is_offered_where_it_is_honoured() {
    for (cache, offered) in [(CacheType::Writeback, true), (CacheType::Unsafe, false)] {
        let mut bench = bench_with(|drive| drive.cache_type = cache);
        let features = bench.guest.read(register::VIRTIO_MMIO_DEVICE_FEATURES);
        assert_eq!(features & 1 << VIRTIO_BLK_F_FLUSH != 0, offered);
        assert_eq!(bench.request(VIRTIO_BLK_T_FLUSH, 0, 0, 0), OK);
    }
}

#[test]
fn the_serial_number_is_the_drive_id() {
    let mut bench = bench();
    assert_eq!(bench.request(VIRTIO_BLK_T_GET_ID, 0, 20, WRITE), OK);
    assert_eq!(bench.peek(DATA, 20), b"rootfs\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    let mut long = bench_with(|drive| drive.drive_id = "x".repeat(40));
    assert_eq!(long.request(VIRTIO_BLK_T_GET_ID, 0, 20, WRITE), OK);
    assert_eq!(long.peek(DATA, 21), [vec![b'x'; 20], vec![0]].concat());
}

#[test]
fn unknown_requests_are_unsupported() {
    let mut bench = bench();
    for kind in [2, 11, 13, u32::MAX] {
        assert_eq!(bench.request(kind, 0, 512, WRITE), UNSUPP);
    }
}

#[test]
fn chains_that_are_no_request_go_back_with_nothing_written() {
    let mut bench = bench();
    bench.header(VIRTIO_BLK_T_IN, 0);
    let header = (HEADER, 16, 0);
    let broken: [&[(u64, u32, u16)]; 7] = [
        // No status byte, no header, a short one, one that is not memory.
        &[header],
        &[(STATUS, 1, WRITE)],
        &[(HEADER, 15, 0), (STATUS, 1, WRITE)],
        &[(0x9000, 16, 0), (STATUS, 1, WRITE)],
        // Status not in memory, readable after writable, a buffer that wraps around.
        &[header, (0x9000, 1, WRITE)],
        &[(DATA, 512, WRITE), header],
        &[header, (u64::MAX, 512, WRITE), (STATUS, 1, WRITE)],
    ];
    for (count, chain) in (1..).zip(broken) {
        bench.submit(chain);
        assert_eq!(bench.used(), (count, 0), "{chain:x?}");
        assert_eq!(bench.peek(STATUS, 1), [UNTOUCHED]);
    }
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 0, 512, WRITE), OK);
}

#[test]
fn chains_without_an_end_are_no_request() {
    let mut bench = bench();
    // The third descriptor links to itself, past the table, and to one that cannot be followed.
    for (count, next) in (1..).zip([2_u16, 16, u16::MAX, 3]) {
        bench.header(VIRTIO_BLK_T_IN, 0);
        let status = (STATUS, 1, WRITE | NEXT);
        bench.link(&[(HEADER, 16, 0), (DATA, 512, WRITE), status]);
        bench
            .guest
            .poke(DESCRIPTORS + 2 * 16 + 14, &next.to_le_bytes());
        // A table of indirect descriptors with half a descriptor in it.
        bench
            .guest
            .poke(DESCRIPTORS + 3 * 16 + 8, &[24, 0, 0, 0, 4]);
        bench.ring();
        assert_eq!(bench.used(), (count, 0), "link to {next}");
        assert_eq!(bench.peek(STATUS, 1), [UNTOUCHED]);
    }
}

#[test]
fn a_file_cut_short_under_us_is_an_i_o_error() {
    let mut bench = bench();
    bench.file.as_file().set_len(512).unwrap();
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 4, 512, WRITE), IOERR);
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 0, 512, WRITE), OK);
}

#[test]
fn a_reset_device_lets_go_of_guest_memory_and_starts_again() {
    let mut bench = bench();
    let held = Arc::strong_count(&bench.guest.memory);
    bench.guest.write(register::VIRTIO_MMIO_STATUS, 0);
    assert_eq!(Arc::strong_count(&bench.guest.memory), held - 1);
    bench.guest.serve();
    bench.guest.poke(AVAIL, &[0; 64]);
    bench.guest.poke(USED, &[0; 256]);
    bench.next_avail = 0;
    bench.guest.set_up(1 << VIRTIO_RING_F_EVENT_IDX);
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 0, 512, WRITE), OK);
}

#[test]
fn the_configuration_space_holds_the_capacity() {
    let mut bench = bench();
    assert_eq!(bench.guest.read(register::VIRTIO_MMIO_CONFIG), 8);
    assert_eq!(bench.guest.read(register::VIRTIO_MMIO_CONFIG + 8), SIZE_MAX);
    assert_eq!(bench.guest.read(register::VIRTIO_MMIO_CONFIG + 12), SEG_MAX);
    assert_eq!(bench.guest.read(register::VIRTIO_MMIO_CONFIG + 16), 0);
    assert_eq!(bench.guest.read(register::VIRTIO_MMIO_CONFIG + 0xe00), 0);
}

#[test]
fn a_size_that_is_not_whole_sectors_loses_the_rest() {
    let file = file();
    file.as_file().set_len(1500).unwrap();
    assert_eq!(
        Disk::open(&drive(file.path())).unwrap().capacity_sectors(),
        2
    );
}

#[test]
fn open_errors_name_the_drive_and_the_path() {
    let directory = tempfile::tempdir().unwrap();
    let message = |path: &Path, is_read_only| {
        let drive = Drive {
            is_read_only,
            ..drive(path)
        };
        Disk::open(&drive).unwrap_err().to_string()
    };
    let missing = directory.path().join("missing.img");
    let prefix = |path: &Path| format!("drives[rootfs].path_on_host {}: ", path.display());
    assert_eq!(
        message(&missing, true),
        prefix(&missing) + "No such file or directory (os error 2)"
    );
    for is_read_only in [true, false] {
        let expected = prefix(directory.path()) + "directory, not a regular file or block device";
        assert_eq!(message(directory.path(), is_read_only), expected);
    }
    let null = Path::new("/dev/null");
    assert!(message(null, true).contains("character device, not a regular"));
}

#[test]
fn a_named_pipe_is_refused_without_waiting_for_its_other_end() {
    let directory = tempfile::tempdir().unwrap();
    let pipe = directory.path().join("pipe");
    let made = std::process::Command::new("mkfifo")
        .arg(&pipe)
        .status()
        .unwrap();
    assert!(made.success());
    let error = Disk::open(&Drive {
        is_read_only: true,
        ..drive(&pipe)
    })
    .unwrap_err();
    assert!(error.to_string().contains("named pipe"), "{error}");
}

/// Descriptors of which a good part makes sense.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![
        4 => 0x4000..0x8000_u64,
        2 => HIGH_START..HIGH_START + 0x8000,
        1 => 0x8000..HIGH_START,
        1 => any::<u64>(),
    ];
    let length = prop_oneof![Just(16), Just(512), Just(1), 0..2048_u32, any::<u32>()];
    let flags = prop_oneof![8 => 0..4_u16, 1 => Just(4)];
    (address, length, flags, 0..20_u16)
}

fn is_memory(address: u64) -> bool {
    (0x4000..0x8000).contains(&address) || (HIGH_START..HIGH_START + 0x8000).contains(&address)
}

proptest! {
    /// Whatever the descriptors and headers say, the device writes to the used ring and to buffers
    /// marked as writable, and to nothing else: not to other memory, not past the end of the file.
    #[test]
    fn only_writable_buffers_and_the_used_ring_change(
        table in prop::collection::vec(descriptor(), 16),
        kinds in prop::collection::vec(0..6_u8, 64),
        is_read_only in any::<bool>(),
    ) {
        let mut bench = bench_with(|drive| drive.is_read_only = is_read_only);
        // Types and sectors are small numbers wherever a header may be.
        let pattern: Vec<u8> = kinds.iter().flat_map(|&kind| [kind, 0, 0, 0]).collect();
        for start in (0x4000..0x8000).chain(HIGH_START..HIGH_START + 0x8000).step_by(256) {
            bench.guest.poke(start, &pattern);
        }
        let before = (bench.peek(0x4000, 0x4000), bench.peek(HIGH_START, 0x8000));
        let mut writable = Vec::new();
        for (index, &(address, length, flags, next)) in (0_u16..).zip(&table) {
            let at = DESCRIPTORS + 16 * u64::from(index);
            bench.guest.poke(at, &address.to_le_bytes());
            bench.guest.poke(at + 8, &length.to_le_bytes());
            // An indirect table may make any memory writable: covered by the fuzz functions.
            let flags = flags & 3;
            bench.guest.poke(at + 12, &flags.to_le_bytes());
            bench.guest.poke(at + 14, &next.to_le_bytes());
            bench.guest.poke(AVAIL + 4 + 2 * u64::from(index), &index.to_le_bytes());
            if flags & WRITE != 0 {
                writable.push(address..address.saturating_add(u64::from(length)));
            }
        }
        bench.guest.poke(AVAIL + 2, &16_u16.to_le_bytes());
        while bench.used().0 < 16 {
            bench.guest.serve();
            prop_assert!(!bench.guest.interrupt.needs_reset());
        }
        let after = (bench.peek(0x4000, 0x4000), bench.peek(HIGH_START, 0x8000));
        let changed = |start: u64, before: &[u8], after: &[u8]| -> Vec<u64> {
            let pairs = (start..).zip(before.iter().zip(after));
            pairs.filter(|(_, (a, b))| a != b).map(|(address, _)| address).collect()
        };
        let low = changed(0x4000, &before.0, &after.0);
        for address in low.into_iter().chain(changed(HIGH_START, &before.1, &after.1)) {
            prop_assert!(is_memory(address));
            prop_assert!(writable.iter().any(|range| range.contains(&address)), "{address:#x}");
        }
        prop_assert_eq!(bench.contents().len() as u64, SECTORS * 512);
        if is_read_only {
            prop_assert_eq!(bench.contents(), std::fs::read(file().path()).unwrap());
        }
    }
}
