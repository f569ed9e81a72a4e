//! A guest on KVM drives its disks: doorbells by ioeventfd, requests on the event loop, interrupts
//! by irqfd.
//!
//! The guest is a program of a few instructions put together here. It sets up each disk as virtio
//! 1.2, 3.1.1 says, rings for requests that lie ready in memory, waits until they are used, and
//! prints what became of them on the serial port.

#![expect(
    clippy::unwrap_used,
    reason = "a test, also where it is not in a #[test] function"
)]

use std::io::Write;
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;
use vmm::config::{CacheType, Drive, VmConfig};
use vmm::{EndReason, MergeDomain, Monitor, VmId};

const SECTOR: usize = 512;
const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;

/// Where the image is loaded: the first address a kernel may have.
const LOAD_ADDRESS: u32 = 0x10_0000;
/// The image: code, then a part for each disk.
const DISK_PART: u32 = 0x1_0000;
const IMAGE_BYTES: usize = 0x4_0000;
/// Inside a disk's part.
const AVAIL: u32 = 0x1000;
const USED: u32 = 0x2000;
const HEADERS: u32 = 0x3000;
const STATUSES: u32 = 0x4000;
const BUFFERS: u32 = 0x5000;

/// A request of one sector.
struct Request {
    kind: u32,
    sector: u64,
    data: u8,
}

struct Guest {
    code: Vec<u8>,
    image: Vec<u8>,
}

impl Guest {
    fn new() -> Guest {
        Guest {
            code: Vec::new(),
            image: vec![0; IMAGE_BYTES],
        }
    }

    fn emit(&mut self, opcode: &[u8], operands: &[u32]) {
        self.code.extend_from_slice(opcode);
        for operand in operands {
            self.code.extend_from_slice(&operand.to_le_bytes());
        }
    }

    fn poke(&mut self, address: u32, bytes: &[u8]) {
        let offset = usize::try_from(address - LOAD_ADDRESS).unwrap();
        self.image[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// `mov dword [rdi + offset], value`: a register of the disk that RDI points to.
    fn set_register(&mut self, offset: u32, value: u32) {
        self.emit(&[0xc7, 0x87], &[offset, value]);
    }

    /// Prints AL: `mov edx, 0x3f8; out dx, al`.
    fn print_al(&mut self) {
        self.emit(&[0xba], &[0x3f8]);
        self.emit(&[0xee], &[]);
    }

    /// Lays out `requests` and the code that has disk number `index` carry them out. Prints the
    /// interrupt status and the interrupt controller's pending lines, and for each request the
    /// status and the first byte of the buffer.
    fn use_disk(&mut self, index: u32, requests: &[Request]) {
        let part = LOAD_ADDRESS + DISK_PART * (1 + index);
        for (number, request) in (0_u16..).zip(requests) {
            let nth = u32::from(number);
            let buffer = part + BUFFERS + nth * 512;
            let header = [
                &request.kind.to_le_bytes()[..],
                &[0; 4],
                &request.sector.to_le_bytes(),
            ];
            self.poke(part + HEADERS + nth * 16, &header.concat());
            self.poke(part + STATUSES + nth, &[0xee]);
            self.poke(buffer, &[request.data; SECTOR]);
            let data_flags = if request.kind == READ { 3 } else { 1 };
            let chain = [
                (part + HEADERS + nth * 16, 16, 1),
                (buffer, 512, data_flags),
                (part + STATUSES + nth, 1, 2),
            ];
            for (link, (address, length, flags)) in (number * 3..).zip(chain) {
                let at = part + u32::from(link) * 16;
                self.poke(at, &u64::from(address).to_le_bytes());
                self.poke(at + 8, &u32::to_le_bytes(length));
                self.poke(at + 12, &u16::to_le_bytes(flags));
                self.poke(at + 14, &(link + 1).to_le_bytes());
            }
            self.poke(part + AVAIL + 4 + nth * 2, &(number * 3).to_le_bytes());
        }
        let count = u16::try_from(requests.len()).unwrap();
        self.poke(part + AVAIL + 2, &count.to_le_bytes());

        // mov edi, registers; mov esi, part
        self.emit(&[0xbf], &[0xd000_0000 + 0x1000 * index]);
        self.emit(&[0xbe], &[part]);
        for (offset, value) in [
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
            self.set_register(offset, value);
        }
        // again: cmp word [rsi + USED + 2], count; jne again
        self.emit(&[0x66, 0x81, 0xbe], &[USED + 2]);
        self.code.extend_from_slice(&count.to_le_bytes());
        self.emit(&[0x75, 0xf5], &[]);
        // again: mov eax, [rdi + InterruptStatus]; test al, al; je again
        self.emit(&[0x8b, 0x87], &[0x60]);
        self.emit(&[0x84, 0xc0, 0x74, 0xf6], &[]);
        self.print_al();
        // again: in al, 0x20; test al, line; je again: the interrupt request register of the first
        // 8259. The status is set before the line goes up.
        let line = 1_u8 << (5 + index);
        self.emit(&[0xe4, 0x20, 0xa8, line, 0x74, 0xfa], &[]);
        self.print_al();
        for nth in 0..u32::from(count) {
            for offset in [STATUSES + nth, BUFFERS + nth * 512] {
                // mov al, [rsi + offset]
                self.emit(&[0x8a, 0x86], &[offset]);
                self.print_al();
            }
        }
    }

    /// Ends the program with a power-off by the pvpanic port and returns it as an ELF file.
    fn into_elf(mut self) -> NamedTempFile {
        self.emit(&[0xb8], &[4]);
        self.emit(&[0xba], &[0x505]);
        self.emit(&[0xee, 0xf4], &[]);
        let code = std::mem::take(&mut self.code);
        assert!(code.len() < 0x1_0000);
        self.poke(LOAD_ADDRESS, &code);

        let load = u64::from(LOAD_ADDRESS);
        let size = self.image.len() as u64;
        let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        // Executable, x86-64, version; entry, program headers, no sections; flags and sizes.
        elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
        elf.extend([load, 64, 0].map(u64::to_le_bytes).concat());
        elf.extend([0_u8, 0, 0, 0, 64, 0, 56, 0, 1, 0, 64, 0, 0, 0, 0, 0]);
        // One loadable segment.
        elf.extend([1, 0, 0, 0, 7, 0, 0, 0]);
        elf.extend(
            [120, load, load, size, size, 1]
                .map(u64::to_le_bytes)
                .concat(),
        );
        elf.extend(&self.image);
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(&elf).unwrap();
        file
    }
}

/// A disk of four sectors, each byte of sector n being n + 1.
fn disk() -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    for sector in 1..=4_u8 {
        file.write_all(&[sector; SECTOR]).unwrap();
    }
    file
}

fn drive(drive_id: &str, file: &NamedTempFile, is_read_only: bool) -> Drive {
    let json = serde_json::json!({
        "drive_id": drive_id,
        "path_on_host": file.path(),
        "is_root_device": false,
        "is_read_only": is_read_only,
    });
    serde_json::from_value(json).unwrap()
}

fn monitor() -> Option<Monitor> {
    let skip = std::env::var_os("SAMEPAGE_SKIP_KVM").is_some_and(|value| value == "1");
    if !std::path::Path::new("/dev/kvm").exists() {
        assert!(
            skip,
            "/dev/kvm is missing; set SAMEPAGE_SKIP_KVM=1 to skip the tests that need it"
        );
        return None;
    }
    let domain: MergeDomain = "disks".parse().unwrap();
    Some(Monitor::new(domain, dedup::Settings::default()).unwrap())
}

/// Runs `config` to its end; returns what it printed.
fn run(monitor: &Monitor, config: VmConfig) -> Vec<u8> {
    let id: VmId = "guest".parse().unwrap();
    monitor.create(id.clone(), config).unwrap();
    monitor.start(&id).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    let end = monitor.wait_ended(&id, deadline);
    let printed = monitor.console(&id).unwrap().history();
    assert_eq!(end, Some(EndReason::GuestShutdown), "{printed:x?}");
    printed
}

#[test]
fn a_guest_reads_and_writes_its_disks_and_cannot_write_a_read_only_one() {
    let Some(monitor) = monitor() else { return };
    let (writable, read_only) = (disk(), disk());
    let mut guest = Guest::new();
    let request = |kind, sector| Request {
        kind,
        sector,
        data: 0xab,
    };
    let requests = [
        request(READ, 1),
        request(WRITE, 2),
        request(FLUSH, 0),
        request(READ, 4),
    ];
    guest.use_disk(0, &requests);
    guest.use_disk(1, &[request(READ, 3), request(WRITE, 3)]);
    let kernel = guest.into_elf();

    let mut config = VmConfig::new(kernel.path());
    config.machine_config.mem_size_mib = 32;
    let data = Drive {
        cache_type: CacheType::Writeback,
        ..drive("data", &writable, false)
    };
    config.drives = vec![data, drive("fixed", &read_only, true)];
    let printed = run(&monitor, config);

    let (ok, error) = (0, 1);
    // Lines 5 and 6 of the interrupt controller went up, one after the other.
    let (line_5, lines_5_and_6) = (0x20, 0x60);
    let first = [1, line_5, ok, 2, ok, 0xab, ok, 0xab, error, 0xab];
    let second = [1, lines_5_and_6, ok, 4, error, 0xab];
    assert_eq!(printed, [&first[..], &second[..]].concat());
    let after = std::fs::read(writable.path()).unwrap();
    assert_eq!(after[2 * SECTOR..3 * SECTOR], [0xab; SECTOR]);
    assert_eq!(after[3 * SECTOR..], [4; SECTOR]);
    assert_eq!(
        std::fs::read(read_only.path()).unwrap(),
        std::fs::read(disk().path()).unwrap()
    );
}

#[test]
fn a_guest_that_ends_with_its_disks_in_use_gives_its_memory_back() {
    let Some(monitor) = monitor() else { return };
    let file = disk();
    let mut guest = Guest::new();
    let read = Request {
        kind: READ,
        sector: 0,
        data: 0,
    };
    guest.use_disk(0, &[read]);
    let kernel = guest.into_elf();
    let mut config = VmConfig::new(kernel.path());
    config.drives = vec![drive("data", &file, false)];
    run(&monitor, config);
    // A device that still held the memory would have made the monitor leak it, in its slot.
    let deadline = Instant::now() + Duration::from_secs(60);
    while monitor.engine().stats().slots > 0 {
        assert!(Instant::now() < deadline, "the memory was not given back");
        std::thread::yield_now();
    }
}

#[test]
fn a_drive_that_cannot_be_opened_is_named_when_the_vm_is_created() {
    let Some(monitor) = monitor() else { return };
    let kernel = Guest::new().into_elf();
    let missing = disk();
    let mut config = VmConfig::new(kernel.path());
    config.drives = vec![drive("data", &missing, false)];
    let path = missing.path().to_owned();
    drop(missing);
    let error = monitor
        .create("guest".parse().unwrap(), config)
        .unwrap_err()
        .to_string();
    let expected = format!(
        "vm guest: drives[data].path_on_host {}: No such file",
        path.display()
    );
    assert!(error.starts_with(&expected), "{error}");
    assert!(monitor.list().is_empty());
}
