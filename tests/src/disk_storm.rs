//! A guest that has all of its disks work on untouched memory at once.

/// Where [`tiny_kernel`](crate::tiny_kernel) loads it.
const BASE: u32 = 0x10_0000;
/// The code's share of the image; a part for each disk follows.
const CODE_BYTES: u32 = 0x1_0000;
const PART_BYTES: u32 = 0x8000;
/// Inside of a part; descriptors are at its start.
const AVAIL: u32 = 0x1000;
const USED: u32 = 0x2000;
const HEADERS: u32 = 0x3000;
const STATUSES: u32 = 0x4000;
const QUEUE_SIZE: u32 = 256;
/// Where the disks' buffers begin.
const BUFFERS: u64 = 16 << 20;

/// What the requests ask for (virtio 1.2, section 5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// `VIRTIO_BLK_T_IN`: fills memory from the beginning of the disk.
    Read,
    /// `VIRTIO_BLK_T_OUT`: fills the beginning of the disk from memory, which is all zeros.
    Write,
    /// `VIRTIO_BLK_T_FLUSH`: has the disk make durable what was written; moves no data.
    Flush,
}

impl Access {
    fn request_type(self) -> u32 {
        match self {
            Access::Read => 0,
            Access::Write => 1,
            Access::Flush => 4,
        }
    }
}

/// What the guest does.
#[derive(Clone, Copy, Debug)]
pub struct DiskStorm {
    /// What it asks of its disks.
    pub access: Access,
    /// Disks, each with a queue of its own.
    pub disks: u32,
    /// Requests that are made of each disk before it is rung.
    pub requests: u16,
    /// Bytes that each of them moves between the beginning of the disk and memory of its own.
    pub request_bytes: u32,
}

impl DiskStorm {
    /// Guest memory that it takes, in MiB.
    pub fn mem_size_mib(&self) -> u64 {
        (BUFFERS + self.data_bytes()).div_ceil(1 << 20)
    }

    /// Memory that all requests name together.
    pub fn data_bytes(&self) -> u64 {
        u64::from(self.disks) * u64::from(self.requests) * u64::from(self.request_bytes)
    }

    /// Code and data, for [`KernelFile::new`](crate::tiny_kernel::KernelFile::new).
    ///
    /// # Panics
    /// If it asks for more than a queue holds.
    pub fn code(&self) -> Vec<u8> {
        self.code_with(false)
    }

    /// The same, for a guest that prints a disk's number once all its requests of that one are
    /// answered, beginning with the last disk, and `done` at the end.
    ///
    /// # Panics
    /// If it asks for more than a queue holds.
    pub fn code_that_tells(&self) -> Vec<u8> {
        self.code_with(true)
    }

    fn code_with(&self, tells: bool) -> Vec<u8> {
        assert!(u32::from(self.requests) * 3 <= QUEUE_SIZE, "{self:?}");
        let mut code = Vec::new();
        for disk in 0..self.disks {
            let part = part_address(disk);
            // mov $registers, %edi
            word(&mut code, &[0xbf], &[0xd000_0000 + 0x1000 * disk]);
            for (register, value) in [
                // Reset, ACKNOWLEDGE, DRIVER; VIRTIO_F_VERSION_1; FEATURES_OK.
                (0x70, 0),
                (0x70, 1),
                (0x70, 3),
                (0x24, 1),
                (0x20, 1),
                (0x70, 11),
                // The queue; DRIVER_OK; the doorbell.
                (0x38, QUEUE_SIZE),
                (0x80, part),
                (0x90, part + AVAIL),
                (0xa0, part + USED),
                (0x44, 1),
                (0x70, 15),
                (0x50, 0),
            ] {
                // movl $value, register(%rdi)
                word(&mut code, &[0xc7, 0x87], &[register, value]);
            }
        }
        if tells {
            self.wait_and_tell(&mut code);
        }
        // cli; hlt
        code.extend([0xfa, 0xf4]);
        assert!(code.len() <= CODE_BYTES as usize, "{self:?}");
        code.resize(CODE_BYTES as usize, 0);
        (0..self.disks).for_each(|disk| code.extend(self.part(disk)));
        code
    }

    fn wait_and_tell(&self, code: &mut Vec<u8>) {
        for disk in (0..self.disks).rev() {
            // cmpw $requests, index of the used ring; jne back to it
            word(
                code,
                &[0x66, 0x81, 0x3c, 0x25],
                &[part_address(disk) + USED + 2],
            );
            code.extend(self.requests.to_le_bytes());
            code.extend([0x75, 0xf4]);
            say(code, disk.to_string().as_bytes());
        }
        say(code, b"done");
    }

    /// Rings and headers of one disk.
    fn part(&self, disk: u32) -> Vec<u8> {
        let mut bytes = vec![0; PART_BYTES as usize];
        let mut put = |offset: u32, value: &[u8]| {
            bytes[offset as usize..][..value.len()].copy_from_slice(value);
        };
        put(AVAIL + 2, &self.requests.to_le_bytes());
        for number in 0..self.requests {
            let nth = u64::from(disk) * u64::from(self.requests) + u64::from(number);
            let buffer = BUFFERS + nth * u64::from(self.request_bytes);
            let number = u32::from(number);
            // Type, then zeros: sector 0.
            put(
                HEADERS + number * 16,
                &self.access.request_type().to_le_bytes(),
            );
            let at = |offset: u32| u64::from(part_address(disk) + offset);
            let (next, write) = (1_u16, 2_u16);
            let header = (at(HEADERS + number * 16), 16, next);
            let data = match self.access {
                Access::Read => Some((buffer, self.request_bytes, next | write)),
                Access::Write => Some((buffer, self.request_bytes, next)),
                Access::Flush => None,
            };
            let status = (at(STATUSES + number), 1, write);
            let chain = std::iter::once(header).chain(data).chain([status]);
            for (link, (address, length, flags)) in (number * 3..).zip(chain) {
                put(link * 16, &address.to_le_bytes());
                put(link * 16 + 8, &length.to_le_bytes());
                put(link * 16 + 12, &flags.to_le_bytes());
                put(link * 16 + 14, &(link + 1).to_le_bytes()[..2]);
            }
            put(AVAIL + 4 + number * 2, &(number * 3).to_le_bytes()[..2]);
        }
        bytes
    }
}

fn part_address(disk: u32) -> u32 {
    BASE + CODE_BYTES + disk * PART_BYTES
}

/// Prints `text` on the serial port.
fn say(code: &mut Vec<u8>, text: &[u8]) {
    for &byte in text {
        // mov $0x3f8, %dx; mov $byte, %al; out %al, %dx
        code.extend([0x66, 0xba, 0xf8, 0x03, 0xb0, byte, 0xee]);
    }
}

/// `opcode` with 32-bit operands.
fn word(code: &mut Vec<u8>, opcode: &[u8], operands: &[u32]) {
    code.extend(opcode);
    operands
        .iter()
        .for_each(|operand| code.extend(operand.to_le_bytes()));
}
