//! A tap device of the host (`Documentation/networking/tuntap.rst`).

use std::ffi::c_ulong;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use linux_raw_sys::if_tun::{IFF_NO_PI, IFF_TAP, IFF_VNET_HDR};
use linux_raw_sys::ioctl::{TUNSETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ};
use linux_raw_sys::net::{ifreq, ifreq__bindgen_ty_1, ifreq__bindgen_ty_2};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

use super::{HEADER_BYTES, Link};
use crate::config::HOST_DEV_NAME_LEN_MAX;

const DEVICE: &str = "/dev/net/tun";

/// A tap device that this process is the other end of. Frames have the header of virtio-net.
#[derive(Debug)]
pub struct Tap {
    file: File,
}

impl Tap {
    /// Opens the device `name` in the network namespace of the calling thread, or makes it, for as
    /// long as it is open.
    ///
    /// # Errors
    /// The system's answer; `EBUSY` when another program has it open.
    pub fn open(name: &str) -> io::Result<Tap> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(DEVICE)?;
        if name.is_empty() || name.len() > HOST_DEV_NAME_LEN_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // With a NUL at the end: the longest name is one byte shorter.
        let mut ifrn_name = [0; HOST_DEV_NAME_LEN_MAX + 1];
        for (to, byte) in ifrn_name.iter_mut().zip(name.bytes()) {
            *to = byte.cast_signed();
        }
        let flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
        let mut request = ifreq {
            ifr_ifrn: ifreq__bindgen_ty_1 { ifrn_name },
            ifr_ifru: ifreq__bindgen_ty_2 {
                ifru_slave: [0; HOST_DEV_NAME_LEN_MAX + 1],
            },
        };
        request.ifr_ifru.ifru_flags = i16::try_from(flags).map_err(io::Error::other)?;
        // SAFETY: the request reads and writes a struct ifreq, which is exclusively borrowed for the
        // call. Of it the kernel reads name and flags, which are set.
        let done = unsafe { ioctl_with_mut_ref(&file, c_ulong::from(TUNSETIFF), &mut request) };
        check(done)?;
        let header_bytes = i32::try_from(HEADER_BYTES).map_err(io::Error::other)?;
        // SAFETY: the request reads one int, which lives for the call.
        let done = unsafe { ioctl_with_ref(&file, c_ulong::from(TUNSETVNETHDRSZ), &header_bytes) };
        check(done)?;
        let tap = Tap { file };
        // One that stays when it is closed keeps what its last user set.
        tap.set_offload(0)?;
        Ok(tap)
    }
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

impl Link for Tap {
    fn receive(&mut self, frame: &mut [u8]) -> io::Result<usize> {
        self.file.read(frame)
    }

    fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        // A frame is taken as a whole or not at all.
        self.file.write(frame).map(|_| ())
    }

    fn set_offload(&self, flags: u32) -> io::Result<()> {
        // SAFETY: the request takes a number and touches no memory of ours.
        let done = unsafe {
            ioctl_with_val(
                &self.file,
                c_ulong::from(TUNSETOFFLOAD),
                c_ulong::from(flags),
            )
        };
        check(done)
    }

    fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}
