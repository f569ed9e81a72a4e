//! A guest on KVM drives its disks: doorbells by ioeventfd, requests on the event loop, interrupts
//! by irqfd.
//!
//! The guest sets up each disk as virtio 1.2, 3.1.1 says, rings for requests that lie ready in its
//! image, waits until they are used, and prints what became of them on the serial port.

#![expect(
    clippy::unwrap_used,
    reason = "a test, also where it is not in a #[test] function"
)]

mod guest;

use std::path::Path;
use std::time::Instant;

use guest::{BASE, Code, LONG, Lab, skip};
use vmm::config::{CacheType, Drive};
use vmm::{EndReason, ErrorKind, MonitorError, VmId};

const SECTOR: usize = SECTOR_BYTES as usize;
const SECTOR_BYTES: u32 = 512;
const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;

/// The image: code, then a part for each disk.
const DISK_PART: u32 = 0x1_0000;
/// Inside a disk's part; the descriptors are at its start.
const AVAIL: u32 = 0x1000;
const USED: u32 = 0x2000;
const HEADERS: u32 = 0x3000;
const STATUSES: u32 = 0x4000;
const BUFFERS: u32 = 0x5000;

/// A request of one sector; the buffer is full of [`FILL`] before it.
struct Request {
    kind: u32,
    sector: u64,
}

const FILL: u8 = 0xab;

const fn request(kind: u32, sector: u64) -> Request {
    Request { kind, sector }
}

/// Rings and buffers of one disk, in the memory from `address` on.
struct Part {
    address: u32,
    bytes: Vec<u8>,
}

impl Part {
    fn new(address: u32) -> Part {
        let bytes = vec![0; DISK_PART as usize];
        Part { address, bytes }
    }

    fn put(&mut self, offset: u32, bytes: &[u8]) {
        let start = usize::try_from(offset).unwrap();
        self.bytes[start..start + bytes.len()].copy_from_slice(bytes);
    }

    /// Makes request number `number` available, in descriptors of its own.
    fn add(&mut self, number: u16, request: &Request) {
        let nth = u32::from(number);
        let (header, status, buffer) = (
            HEADERS + nth * 16,
            STATUSES + nth,
            BUFFERS + nth * SECTOR_BYTES,
        );
        self.put(header, &request.kind.to_le_bytes());
        self.put(header + 8, &request.sector.to_le_bytes());
        self.put(status, &[0xee]);
        self.put(buffer, &[FILL; SECTOR]);
        let (next, write) = (1_u16, 2_u16);
        let filled = if request.kind == READ { write } else { 0 };
        let chain = [
            (header, 16, next),
            (buffer, SECTOR_BYTES, next | filled),
            (status, 1, write),
        ];
        for (link, (at, length, flags)) in (number * 3..).zip(chain) {
            let descriptor = u32::from(link) * 16;
            self.put(descriptor, &u64::from(self.address + at).to_le_bytes());
            self.put(descriptor + 8, &length.to_le_bytes());
            self.put(descriptor + 12, &flags.to_le_bytes());
            self.put(descriptor + 14, &(link + 1).to_le_bytes());
        }
        self.put(AVAIL + 4 + nth * 2, &(number * 3).to_le_bytes());
        self.put(AVAIL + 2, &(number + 1).to_le_bytes());
    }
}

/// `opcode` with 32-bit operands.
fn with(code: Code, opcode: &[u8], operands: &[u32]) -> Code {
    let operands = operands.iter().flat_map(|operand| operand.to_le_bytes());
    code.raw(opcode).raw(&operands.collect::<Vec<u8>>())
}

/// `mov $0x3f8, %edx; out %al, %dx`
fn print_al(code: Code) -> Code {
    with(code, &[0xba], &[0x3f8]).raw(&[0xee])
}

/// Sets up disk number `index` with its rings at `part`, rings, and waits for `count` requests.
/// Prints the interrupt status and the interrupt controller's pending lines, then for each request
/// the status and the first byte of the buffer.
fn use_disk(mut code: Code, index: u32, part: u32, count: u16) -> Code {
    // mov $registers, %edi; mov $part, %esi
    code = with(code, &[0xbf], &[0xd000_0000 + 0x1000 * index]);
    code = with(code, &[0xbe], &[part]);
    for (register, value) in [
        // Reset, ACKNOWLEDGE, DRIVER; VIRTIO_F_VERSION_1; FEATURES_OK.
        (0x70, 0),
        (0x70, 1),
        (0x70, 3),
        (0x24, 1),
        (0x20, 1),
        (0x70, 11),
        // A queue of 16; DRIVER_OK; the doorbell.
        (0x38, 16),
        (0x80, part),
        (0x90, part + AVAIL),
        (0xa0, part + USED),
        (0x44, 1),
        (0x70, 15),
        (0x50, 0),
    ] {
        // movl $value, register(%rdi)
        code = with(code, &[0xc7, 0x87], &[register, value]);
    }
    // .: cmpw $count, USED+2(%rsi); jne .
    code = with(code, &[0x66, 0x81, 0xbe], &[USED + 2]);
    code = code.raw(&count.to_le_bytes()).raw(&[0x75, 0xf5]);
    // .: mov InterruptStatus(%rdi), %eax; test %al, %al; je .
    code = with(code, &[0x8b, 0x87], &[0x60]).raw(&[0x84, 0xc0, 0x74, 0xf6]);
    code = print_al(code);
    // .: in $0x20, %al; test $line, %al; je . (the interrupt request register of the first 8259.)
    // The device sets its status before the line goes up.
    let line = 1_u8 << (5 + index);
    code = print_al(code.raw(&[0xe4, 0x20, 0xa8, line, 0x74, 0xfa]));
    for nth in 0..u32::from(count) {
        for offset in [STATUSES + nth, BUFFERS + nth * SECTOR_BYTES] {
            // mov offset(%rsi), %al
            code = print_al(with(code, &[0x8a, 0x86], &[offset]));
        }
    }
    code
}

/// A guest that has each of its disks carry out its requests and then powers off.
fn guest_using(disks: &[&[Request]]) -> Code {
    let mut code = Code::new();
    let mut image = Vec::new();
    for (index, requests) in (0..).zip(disks) {
        let address = u32::try_from(BASE).unwrap() + DISK_PART * (1 + index);
        let mut part = Part::new(address);
        for (number, request) in (0..).zip(*requests) {
            part.add(number, request);
        }
        image.extend(part.bytes);
        code = use_disk(code, index, address, requests.len().try_into().unwrap());
    }
    code.out_byte(0x505, 4)
        .halt()
        .padded_to(DISK_PART as usize)
        .raw(&image)
}

/// A disk of four sectors, each byte of sector n being n + 1.
fn four_sectors() -> Vec<u8> {
    (1..=4).flat_map(|sector| [sector; SECTOR]).collect()
}

fn drive(drive_id: &str, path: &Path, is_read_only: bool) -> Drive {
    let json = serde_json::json!({
        "drive_id": drive_id,
        "path_on_host": path,
        "is_root_device": false,
        "is_read_only": is_read_only,
    });
    serde_json::from_value(json).unwrap()
}

#[test]
fn a_guest_reads_and_writes_its_disks_and_cannot_write_a_read_only_one() {
    if skip() {
        return;
    }
    let lab = Lab::new();
    let code = guest_using(&[
        &[
            request(READ, 1),
            request(WRITE, 2),
            request(FLUSH, 0),
            request(READ, 4),
        ],
        &[request(READ, 3), request(WRITE, 3)],
    ]);
    let writable = lab.file("data", &four_sectors());
    let read_only = lab.file("fixed", &four_sectors());
    let mut config = lab.config(&code);
    let data = Drive {
        cache_type: CacheType::Writeback,
        ..drive("data", &writable, false)
    };
    config.drives = vec![data, drive("fixed", &read_only, true)];
    let id = lab.start("vm", config);
    assert_eq!(lab.end(&id), EndReason::GuestShutdown);

    let (ok, error) = (0, 1);
    // Lines 5 and 6 of the interrupt controller went up, one after the other.
    let (line_5, lines_5_and_6) = (0x20, 0x60);
    let first = [1, line_5, ok, 2, ok, FILL, ok, FILL, error, FILL];
    let second = [1, lines_5_and_6, ok, 4, error, FILL];
    let printed = lab.console(&id).history();
    assert_eq!(printed, [&first[..], &second[..]].concat());
    let written = std::fs::read(writable).unwrap();
    assert_eq!(written[2 * SECTOR..3 * SECTOR], [FILL; SECTOR]);
    assert_eq!(written[3 * SECTOR..], [4; SECTOR]);
    assert_eq!(std::fs::read(read_only).unwrap(), four_sectors());
}

#[test]
fn a_guest_that_ends_with_its_disks_in_use_gives_its_memory_back() {
    if skip() {
        return;
    }
    let lab = Lab::new();
    let mut config = lab.config(&guest_using(&[&[request(READ, 0)]]));
    config.drives = vec![drive("data", &lab.file("data", &four_sectors()), false)];
    let id = lab.start("vm", config);
    assert_eq!(lab.end(&id), EndReason::GuestShutdown);
    // A device that still held the memory would have made the monitor leak it, in its slot.
    let deadline = Instant::now() + LONG;
    while lab.monitor.engine().stats().slots > 0 {
        assert!(Instant::now() < deadline, "the memory was not given back");
        std::thread::yield_now();
    }
}

#[test]
fn a_drive_that_cannot_be_opened_is_named_when_the_vm_is_created() {
    if skip() {
        return;
    }
    let lab = Lab::new();
    let path = lab.file("kernel", b"").with_file_name("missing.img");
    let mut config = lab.config(&Code::new().halt());
    config.drives = vec![drive("data", &path, false)];
    let error = lab
        .monitor
        .create("vm".parse().unwrap(), config)
        .unwrap_err();
    let expected = format!(
        "vm vm: drives[data].path_on_host {}: No such file",
        path.display()
    );
    assert!(error.to_string().starts_with(&expected), "{error}");
    assert!(lab.monitor.list().is_empty());
}

#[test]
fn an_image_that_one_vm_may_write_is_no_other_vms() {
    if skip() {
        return;
    }
    let lab = Lab::new();
    let image = lab.file("data", &four_sectors());
    let start = |name: &str, is_read_only, lock| {
        let mut config = lab.config(&Code::new().spin());
        let mut drive = drive("data", &image, is_read_only);
        drive.samepage.lock = lock;
        config.drives = vec![drive];
        let id: VmId = name.parse().unwrap();
        lab.monitor.create(id.clone(), config).unwrap();
        lab.monitor.start(&id).map(|()| id)
    };
    let refused = |started: Result<VmId, MonitorError>| {
        let error = started.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse);
        let path = format!("drives[data].path_on_host {}: locked", image.display());
        assert!(error.to_string().contains(&path), "{error}");
    };

    let writer = start("writer", false, true).unwrap();
    refused(start("second-writer", false, true));
    refused(start("reader", true, true));
    let careless = start("careless", false, false).unwrap();
    for id in [writer, careless] {
        lab.monitor.stop(&id).unwrap();
        lab.end(&id);
    }
    let readers = ["reader-1", "reader-2"].map(|name| start(name, true, true).unwrap());
    refused(start("late-writer", false, true));
    for id in readers {
        lab.monitor.stop(&id).unwrap();
    }
}

#[test]
fn one_vm_cannot_have_an_image_twice_for_writing() {
    if skip() {
        return;
    }
    let lab = Lab::new();
    let image = lab.file("data", &four_sectors());
    let mut config = lab.config(&Code::new().spin());
    config.drives = ["one", "two"]
        .map(|drive_id| drive(drive_id, &image, false))
        .into();
    let id: VmId = "vm".parse().unwrap();
    lab.monitor.create(id.clone(), config).unwrap();
    let error = lab.monitor.start(&id).unwrap_err();
    assert!(error.to_string().contains("drives[two]"), "{error}");
    // Nothing of the start that failed holds the lock.
    let mut config = lab.config(&Code::new().spin());
    config.drives = vec![drive("data", &image, false)];
    let id = lab.start("other", config);
    lab.monitor.stop(&id).unwrap();
}
