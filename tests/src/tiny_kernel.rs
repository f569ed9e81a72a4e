//! Kernels of a few bytes: 64-bit code at 1 MiB in an ELF file, for tests of the monitor around a
//! guest rather than of the guest.

use std::path::PathBuf;

use tempfile::TempDir;

/// Where the code is loaded and entered.
const LOAD_ADDRESS: u64 = 0x10_0000;
const ELF_HEADER_BYTES: u16 = 64;
const PROGRAM_HEADER_BYTES: u16 = 56;

/// Prints "hi" and a newline on the serial port, then resets by the keyboard controller.
pub const SAY_HI_AND_RESET: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, b'h', 0xee, // mov al, 'h'; out dx, al
    0xb0, b'i', 0xee, //
    0xb0, b'\n', 0xee, //
    0xb0, 0xfe, 0xe6, 0x64, // mov al, 0xfe; out 0x64, al
    0xf4, 0xeb, 0xfd, // 1: hlt; jmp 1b
];

/// Reports a panic by the pvpanic port.
pub const PANIC: &[u8] = &[
    0x66, 0xba, 0x05, 0x05, // mov dx, 0x505
    0xb0, 0x01, 0xee, // mov al, 1; out dx, al
    0xf4, 0xeb, 0xfd, // 1: hlt; jmp 1b
];

/// Echoes what is typed on the serial port; resets at a `q`.
pub const ECHO_UNTIL_Q: &[u8] = &[
    0x66, 0xba, 0xfd, 0x03, // 0: mov dx, 0x3fd
    0xec, 0xa8, 0x01, 0x74, 0xfb, // 1: in al, dx; test al, 1; jz 1b
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xec, 0x3c, b'q', 0x74, 0x03, // in al, dx; cmp al, 'q'; je 2f
    0xee, 0xeb, 0xeb, // out dx, al; jmp 0b
    0xb0, 0xfe, 0xe6, 0x64, // 2: mov al, 0xfe; out 0x64, al
    0xf4, 0xeb, 0xfd, // 3: hlt; jmp 3b
];

/// Does nothing for ever.
pub const IDLE: &[u8] = &[0xeb, 0xfe]; // 1: jmp 1b

/// Prints `text` on the serial port, then halts for good.
pub fn say_and_rest(text: &str) -> Vec<u8> {
    let mut code = vec![0x66, 0xba, 0xf8, 0x03]; // mov dx, 0x3f8
    for byte in text.bytes() {
        code.extend([0xb0, byte, 0xee]); // mov al, byte; out dx, al
    }
    code.extend([0xf4, 0xeb, 0xfd]); // 1: hlt; jmp 1b
    code
}

/// A kernel file, which goes away with this value.
#[derive(Debug)]
pub struct KernelFile {
    directory: TempDir,
}

impl KernelFile {
    /// Writes one.
    ///
    /// # Panics
    /// If the file cannot be written.
    pub fn new(code: &[u8]) -> KernelFile {
        let kernel = KernelFile {
            directory: tempfile::tempdir().expect("directory for a kernel"),
        };
        std::fs::write(kernel.path(), elf(code)).expect("write a kernel");
        kernel
    }

    /// Its path.
    pub fn path(&self) -> PathBuf {
        self.directory.path().join("kernel")
    }

    /// Its path as text.
    ///
    /// # Panics
    /// If the directory of temporary files is no text.
    pub fn argument(&self) -> String {
        self.path().to_str().expect("a path of text").to_owned()
    }
}

/// An ELF executable with one loadable segment (ELF-64 Object File Format, figures 2 and 6).
fn elf(code: &[u8]) -> Vec<u8> {
    let code_offset = u64::from(ELF_HEADER_BYTES + PROGRAM_HEADER_BYTES);
    let code_bytes = code.len() as u64;
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let half = |file: &mut Vec<u8>, value: u16| file.extend(value.to_le_bytes());
    let word = |file: &mut Vec<u8>, value: u32| file.extend(value.to_le_bytes());
    let long = |file: &mut Vec<u8>, value: u64| file.extend(value.to_le_bytes());
    half(&mut file, 2); // ET_EXEC
    half(&mut file, 62); // EM_X86_64
    word(&mut file, 1); // version
    long(&mut file, LOAD_ADDRESS); // entry
    long(&mut file, u64::from(ELF_HEADER_BYTES)); // program headers
    long(&mut file, 0); // no section headers
    word(&mut file, 0); // flags
    for value in [ELF_HEADER_BYTES, PROGRAM_HEADER_BYTES, 1, 0, 0, 0] {
        half(&mut file, value);
    }
    word(&mut file, 1); // PT_LOAD
    word(&mut file, 5); // readable, executable
    for value in [
        code_offset,
        LOAD_ADDRESS,
        LOAD_ADDRESS,
        code_bytes,
        code_bytes,
        1,
    ] {
        long(&mut file, value);
    }
    file.extend(code);
    file
}
