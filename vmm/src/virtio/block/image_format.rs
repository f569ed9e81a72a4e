//! Formats of disk images that are not raw.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// What such a file begins with: the magic numbers of QEMU (`docs/interop/qcow2.rst`, `qed_spec.rst`,
/// `block/vmdk.c`), of Microsoft's VHD and VHDX specifications, and of VirtualBox (`VDICore.h`).
const MAGICS: [(&str, usize, &[u8]); 7] = [
    ("qcow2", 0, b"QFI\xfb"),
    ("QED", 0, b"QED\0"),
    ("VMDK", 0, b"KDMV"),
    ("VMDK", 0, b"# Disk DescriptorFile"),
    ("VHD", 0, b"conectix"),
    ("VHDX", 0, b"vhdxfile"),
    ("VDI", 64, b"\x7f\x10\xda\xbe"),
];

/// The name of the file's format, if it is known and not raw.
///
/// A guest may write such bytes to the start of its raw disk, so this is for a warning only.
/// Rejected: refusing the file, which would let a guest keep its own VM from starting again.
pub(crate) fn of(file: &File) -> Option<&'static str> {
    let mut head = [0; 128];
    let length = file.read_at(&mut head, 0).ok()?;
    let head = head.get(..length)?;
    let begins = |(_, at, magic): &&(&str, usize, &[u8])| {
        head.get(*at..).is_some_and(|rest| rest.starts_with(magic))
    };
    MAGICS.iter().find(begins).map(|(name, ..)| *name)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn images_are_known_by_their_first_bytes_and_raw_ones_are_not_named() {
        let format = |bytes: &[u8]| {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(bytes).unwrap();
            of(&file)
        };
        assert_eq!(format(b"QFI\xfb\0\0\0\x03"), Some("qcow2"));
        assert_eq!(format(b"conectix"), Some("VHD"));
        let mut vdi = vec![b' '; 64];
        vdi.extend(b"\x7f\x10\xda\xbe");
        assert_eq!(format(&vdi), Some("VDI"));
        for raw in [&b""[..], b"QFI", &[0; 512]] {
            assert_eq!(format(raw), None);
        }
    }
}
