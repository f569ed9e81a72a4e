//! The kernel command line: what was configured, then what the monitor adds, as Firecracker does.

use linux_loader::cmdline::Cmdline;

use crate::config::VmConfig;
use crate::virtio::{Slot, SlotError};

/// Longest command line in bytes without its final NUL: what 64-bit Linux takes
/// (`COMMAND_LINE_SIZE` in `arch/x86/include/asm/setup.h`).
pub const CMDLINE_LEN_MAX: usize = 2047;

/// Errors of [`compose`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CmdlineError {
    /// Too long, or not what a command line may hold.
    #[error("boot_args: {0}, at most {CMDLINE_LEN_MAX} characters with what the devices add")]
    Text(#[from] linux_loader::cmdline::Error),
    /// More devices than places for them.
    #[error(transparent)]
    Slot(#[from] SlotError),
}

/// Composes the command line: `boot_args`, `root=` and `ro` or `rw` for a root drive, one
/// `virtio_mmio.device=` for each device. What follows a word `--` in `boot_args` stays at the end: it is
/// for init, and the kernel reads nothing behind it.
///
/// The user's words win: a `root=` of theirs keeps ours away, and so does a `ro` or `rw`. The kernel
/// takes the last of several, which would be ours.
///
/// # Errors
/// [`CmdlineError`] when the whole is longer than [`CMDLINE_LEN_MAX`] or there are too many devices.
pub fn compose(config: &VmConfig) -> Result<Cmdline, CmdlineError> {
    let (for_kernel, for_init) = split(config.boot_source.boot_args());
    let mut cmdline = Cmdline::new(CMDLINE_LEN_MAX + 1)?;
    if !for_kernel.is_empty() {
        cmdline.insert_str(for_kernel)?;
    }
    let drives = config.ordered_drives();
    if let Some(root) = drives.first().filter(|drive| drive.is_root_device) {
        let root_arg = match &root.partuuid {
            Some(uuid) => format!("root=PARTUUID={uuid}"),
            None => "root=/dev/vda".to_owned(),
        };
        let user: Vec<&str> = words(for_kernel).collect();
        if !user.iter().any(|word| word.starts_with("root=")) {
            cmdline.insert_str(root_arg)?;
        }
        if !user.iter().any(|&word| word == "ro" || word == "rw") {
            cmdline.insert_str(if root.is_read_only { "ro" } else { "rw" })?;
        }
    }
    for index in 0..config.virtio_devices().len() {
        cmdline.insert_str(Slot::new(index)?.kernel_parameter())?;
    }
    // Not as linux-loader's `init_args`, which it has no line for where nothing is for the kernel.
    if !for_init.is_empty() {
        cmdline.insert_str(format!("-- {for_init}"))?;
    }
    Ok(cmdline)
}

/// What is for the kernel, and what is for init: behind the first word `--`.
fn split(boot_args: &str) -> (&str, &str) {
    let mut start = 0;
    for word in words(boot_args) {
        let end = start + word.len();
        if word == "--" {
            return (boot_args[..start].trim(), boot_args[end..].trim());
        }
        start = end + 1;
    }
    (boot_args.trim(), "")
}

/// The words of a command line, a quoted value in one piece (`lib/cmdline.c` of Linux, `next_arg`).
fn words(line: &str) -> impl Iterator<Item = &str> {
    let mut is_quoted = false;
    line.split(move |c: char| {
        is_quoted ^= c == '"';
        c == ' ' && !is_quoted
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Drive, MergeMode};

    fn drive(id: &str, is_root_device: bool) -> Drive {
        let json = format!(
            r#"{{"drive_id": "{id}", "path_on_host": "f", "is_root_device": {is_root_device}}}"#
        );
        serde_json::from_str(&json).unwrap()
    }

    /// A VM without the balloon that nobody asked for.
    fn vm() -> VmConfig {
        let mut config = VmConfig::new("k");
        config.samepage.merge = MergeMode::Off;
        config
    }

    fn text(config: &VmConfig) -> String {
        compose(config)
            .unwrap()
            .as_cstring()
            .unwrap()
            .into_string()
            .unwrap()
    }

    #[test]
    fn without_drives_the_boot_args_stand_alone() {
        let mut config = vm();
        config.boot_source.boot_args = Some("console=ttyS0 quiet".to_owned());
        assert_eq!(text(&config), "console=ttyS0 quiet");
    }

    #[test]
    fn the_root_drive_comes_first_and_is_named() {
        let mut config = vm();
        config.boot_source.boot_args = Some("quiet -- arg".to_owned());
        config.drives = vec![drive("data", false), drive("rootfs", true)];
        assert_eq!(config.ordered_drives()[0].drive_id, "rootfs");
        assert_eq!(
            text(&config),
            "quiet root=/dev/vda rw virtio_mmio.device=4K@0xd0000000:5 \
             virtio_mmio.device=4K@0xd0001000:6 -- arg"
        );
        config.drives[1].partuuid = Some("1234-01".to_owned());
        config.drives[1].is_read_only = true;
        assert!(text(&config).contains(" root=PARTUUID=1234-01 ro "));
    }

    #[test]
    fn what_is_for_init_comes_last_wherever_it_begins() {
        let mut config = vm();
        let mut line = |boot_args: &str, drives: &[Drive]| {
            config.boot_source.boot_args = Some(boot_args.to_owned());
            config.drives = drives.to_vec();
            text(&config)
        };
        let root = [drive("rootfs", true)];
        let ours = "root=/dev/vda rw virtio_mmio.device=4K@0xd0000000:5";
        assert_eq!(line(" -- arg", &[]), "-- arg");
        for for_init in ["-- arg", "  --  arg "] {
            assert_eq!(line(for_init, &root), format!("{ours} -- arg"));
        }
        assert_eq!(line("quiet --", &root), format!("quiet {ours}"));
        let quoted = "a=\" -- \" -- b -- c";
        let expected = format!("a=\" -- \" {ours} -- b -- c");
        assert_eq!(line(quoted, &root), expected);
    }

    #[test]
    fn what_the_user_says_of_the_root_is_not_said_again() {
        let mut config = vm();
        config.drives = vec![drive("rootfs", true)];
        let mut composed = |boot_args: &str| {
            config.boot_source.boot_args = Some(boot_args.to_owned());
            let text = text(&config);
            let (user, ours) = text.split_once(" virtio_mmio.device=").unwrap();
            assert!(ours.starts_with("4K@"), "{text}");
            user.to_owned()
        };
        assert_eq!(composed("root=/dev/vda1 quiet"), "root=/dev/vda1 quiet rw");
        assert_eq!(composed("ro quiet"), "ro quiet root=/dev/vda");
        assert_eq!(composed("rw root=LABEL=x"), "rw root=LABEL=x");
        // Words that only look alike, words in quotes, and those for init say nothing of the root.
        for boot_args in [
            "rootfstype=ext4 rootwait",
            "dyndbg=\"file ro +p\"",
            "rows=ro",
        ] {
            let expected = format!("{boot_args} root=/dev/vda rw");
            assert_eq!(composed(boot_args), expected);
        }
        assert_eq!(composed("quiet -- ro root=x"), "quiet root=/dev/vda rw");
    }

    #[test]
    fn a_line_that_gets_too_long_is_an_error() {
        let mut config = vm();
        config.boot_source.boot_args = Some("x".repeat(CMDLINE_LEN_MAX));
        assert_eq!(text(&config).len(), CMDLINE_LEN_MAX);
        config.drives = vec![drive("data", false)];
        compose(&config).unwrap_err();
    }

    #[test]
    fn a_line_does_not_get_too_long_by_a_device_that_nobody_asked_for() {
        let mut config = VmConfig::new("k");
        config.boot_source.boot_args = Some("quiet".to_owned());
        assert_eq!(text(&config), "quiet virtio_mmio.device=4K@0xd0000000:5");
        config.boot_source.boot_args = Some("x".repeat(CMDLINE_LEN_MAX));
        assert_eq!(text(&config).len(), CMDLINE_LEN_MAX);
    }
}
