// A disk of a few sectors, made once: a file for each input would be most of the time. In memory, so
// that a flush costs nothing.

const DISK_BYTES: u64 = 8192;

fn file() -> &'static std::os::fd::OwnedFd {
    static FILE: std::sync::OnceLock<std::os::fd::OwnedFd> = std::sync::OnceLock::new();
    FILE.get_or_init(|| {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = rustix::fs::memfd_create("fuzz", flags).expect("file in memory");
        rustix::fs::ftruncate(&file, DISK_BYTES).expect("room in memory");
        file
    })
}

fn disk(is_read_only: bool) -> vmm::virtio::Disk {
    let number = std::os::fd::AsRawFd::as_raw_fd(file());
    let path = format!("/proc/self/fd/{number}");
    let drive = vmm::virtio::fuzzing::drive("fuzz", path.as_ref(), is_read_only);
    vmm::virtio::Disk::open(&drive).expect("a disk in memory")
}

/// No guest writes past the end of its disk.
fn check_size() {
    let status = rustix::fs::fstat(file()).expect("status of a file in memory");
    assert_eq!(u64::try_from(status.st_size), Ok(DISK_BYTES));
}
