//! Tiny guests in machine code, and a monitor to run them in.

#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    missing_debug_implementations,
    clippy::allow_attributes,
    reason = "shared by several test programs, each of which uses a part of it"
)]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use vmm::{Console, ConsoleRead, ConsoleReader, EndReason, Monitor, VmConfig, VmId};

/// How long anything in these tests may take at most: only a hang is longer.
pub const LONG: Duration = Duration::from_secs(120);

/// Guests are loaded and started here.
pub const BASE: u64 = 0x10_0000;

/// Whether to skip tests that need KVM; fails where it is missing and nobody said to skip.
pub fn skip() -> bool {
    if std::env::var("SAMEPAGE_SKIP_KVM").is_ok_and(|value| value == "1") {
        return true;
    }
    // Asked rather than looked for: in a container the path may be a stand-in.
    let version = kvm_ioctls::Kvm::new().map(|kvm| kvm.get_api_version());
    assert!(
        version.is_ok_and(|version| version == 12),
        "this test needs /dev/kvm ({version:?}); set SAMEPAGE_SKIP_KVM=1 to skip it"
    );
    false
}

/// Machine code by its mnemonics: as much of an assembler as these guests need. 64-bit mode,
/// kernel mode, interrupts off, first 4 GiB mapped.
#[derive(Clone, Default)]
pub struct Code(Vec<u8>);

impl Code {
    pub fn new() -> Code {
        Code::default()
    }

    pub fn raw(mut self, bytes: &[u8]) -> Code {
        self.0.extend(bytes);
        self
    }

    /// `mov $port, %dx; mov $value, %al; out %al, %dx`
    pub fn out_byte(self, port: u16, value: u8) -> Code {
        let [low, high] = port.to_le_bytes();
        self.raw(&[0x66, 0xba, low, high, 0xb0, value, 0xee])
    }

    /// `mov $port, %dx; mov $value, %eax; out %eax, %dx`
    pub fn out_word(self, port: u16, value: u32) -> Code {
        let [low, high] = port.to_le_bytes();
        self.raw(&[0x66, 0xba, low, high, 0xb8])
            .raw(&value.to_le_bytes())
            .raw(&[0xef])
    }

    pub fn print(self, text: &str) -> Code {
        text.bytes()
            .fold(self, |code, byte| code.out_byte(0x3f8, byte))
    }

    /// i8042 reset.
    pub fn reset(self) -> Code {
        self.out_byte(0x64, 0xfe)
    }

    /// `lidt` of an empty table, then `ud2`: the fault cannot be delivered, nor the double fault.
    pub fn triple_fault(self) -> Code {
        // xor %eax,%eax; push %rax; push %rax; lidt (%rsp); ud2
        self.raw(&[0x31, 0xc0, 0x50, 0x50, 0x0f, 0x01, 0x1c, 0x24, 0x0f, 0x0b])
    }

    /// No-ops up to `length` bytes.
    pub fn pad_to(mut self, length: usize) -> Code {
        self.0.resize(length, 0x90);
        self
    }

    /// Address of what comes next.
    pub fn here(&self) -> u64 {
        BASE + self.0.len() as u64
    }

    /// `jmp .`
    pub fn spin(self) -> Code {
        self.raw(&[0xeb, 0xfe])
    }

    /// Waits for a byte on the serial port and prints it, for ever: `.: mov $0x3fd, %dx; in %dx,
    /// %al; test $1, %al; jz .; mov $0x3f8, %dx; in %dx, %al; out %al, %dx; jmp .`
    pub fn echo(self) -> Code {
        self.raw(&[0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf7])
            .raw(&[0x66, 0xba, 0xf8, 0x03, 0xec, 0xee, 0xeb, 0xef])
    }

    /// `cli; hlt`
    pub fn halt(self) -> Code {
        self.raw(&[0xfa, 0xf4])
    }

    /// Zeros up to `offset` from the start, for data at a known address.
    pub fn padded_to(mut self, offset: usize) -> Code {
        assert!(self.0.len() <= offset);
        self.0.resize(offset, 0);
        self
    }

    /// An ELF image with one segment.
    pub fn elf(&self) -> Vec<u8> {
        let mut image = b"\x7fELF\x02\x01\x01".to_vec();
        image.resize(16, 0);
        for half in [2_u16, 62] {
            image.extend(half.to_le_bytes());
        }
        image.extend(1_u32.to_le_bytes());
        // Entry, program headers, section headers.
        [BASE, 64, 0]
            .iter()
            .for_each(|value| image.extend(value.to_le_bytes()));
        image.extend(0_u32.to_le_bytes());
        [64_u16, 56, 1, 0, 0, 0]
            .iter()
            .for_each(|value| image.extend(value.to_le_bytes()));
        // PT_LOAD, read, write and execute.
        [1_u32, 7]
            .iter()
            .for_each(|value| image.extend(value.to_le_bytes()));
        let size = self.0.len() as u64;
        let fields = [120, BASE, BASE, size, size, 0x1000];
        fields
            .iter()
            .for_each(|value: &u64| image.extend(value.to_le_bytes()));
        image.extend(&self.0);
        image
    }
}

/// A monitor and a directory for its guests' files.
pub struct Lab {
    // Dropped first: its VMs read files in the directory.
    pub monitor: Monitor,
    dir: tempfile::TempDir,
}

impl Lab {
    pub fn new() -> Lab {
        let monitor = Monitor::new(domain(), dedup::Settings::default()).expect("monitor");
        Lab {
            monitor,
            dir: tempfile::tempdir().expect("temporary directory"),
        }
    }

    pub fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, bytes).expect("guest file");
        path
    }

    pub fn config(&self, code: &Code) -> VmConfig {
        let mut config = VmConfig::new(self.file("kernel", &code.elf()));
        config.machine_config.mem_size_mib = 16;
        config
    }

    pub fn start(&self, name: &str, config: VmConfig) -> VmId {
        let id: VmId = name.parse().expect("id");
        self.monitor.create(id.clone(), config).expect("create");
        self.monitor.start(&id).expect("start");
        id
    }

    pub fn run(&self, name: &str, code: &Code) -> VmId {
        self.start(name, self.config(code))
    }

    pub fn end(&self, id: &VmId) -> EndReason {
        let ended = self.monitor.wait_ended(id, Instant::now() + LONG);
        ended.unwrap_or_else(|| panic!("{id} did not end: {:?}", self.monitor.info(id)))
    }

    pub fn console(&self, id: &VmId) -> Console {
        self.monitor.console(id).expect("console")
    }
}

pub fn domain() -> vmm::MergeDomain {
    "lab".parse().expect("domain")
}

/// Reads until `text` was printed.
pub fn wait_for(reader: &mut ConsoleReader, text: &str) {
    let deadline = Instant::now() + LONG;
    let mut seen = Vec::new();
    while !seen
        .windows(text.len())
        .any(|window| window == text.as_bytes())
    {
        let left = deadline.saturating_duration_since(Instant::now());
        match reader.read(left) {
            ConsoleRead::Bytes(bytes) => seen.extend(bytes),
            other => panic!(
                "{other:?} before {text:?}: {}",
                String::from_utf8_lossy(&seen)
            ),
        }
    }
}
