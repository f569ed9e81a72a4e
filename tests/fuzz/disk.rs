// A disk of a few sectors, made once: a file for each input would be most of the time.
fn disk(is_read_only: bool) -> vmm::virtio::Disk {
    static FILE: std::sync::OnceLock<tempfile::NamedTempFile> = std::sync::OnceLock::new();
    let file = FILE.get_or_init(|| {
        let file = tempfile::NamedTempFile::new().expect("temporary file");
        file.as_file().set_len(8192).expect("temporary file");
        file
    });
    let drive = vmm::virtio::fuzzing::drive("fuzz", file.path(), is_read_only);
    vmm::virtio::Disk::open(&drive).expect("temporary file")
}
