//! The drive's file, opened.

use super::*;

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
