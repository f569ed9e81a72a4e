//! Boots one guest with its console on standard input and output.
//!
//! ```text
//! cargo run -p vmm --example boot -- --kernel vmlinux --initrd initramfs.cpio \
//!     --cmdline "console=ttyS0" --mem 128 --vcpus 1 [--drive rootfs.ext4] [--timeout 120]
//! ```

use std::error::Error;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use vmm::config::Drive;
use vmm::{ConsoleRead, EndReason, Monitor, VmConfig, VmId};

struct Options {
    config: VmConfig,
    timeout: Duration,
}

fn options() -> Result<Options, Box<dyn Error>> {
    let mut config = VmConfig::new("");
    let mut timeout = Duration::from_secs(365 * 24 * 3600);
    let mut args = std::env::args().skip(1);
    while let Some(name) = args.next() {
        let value = args.next().ok_or(format!("{name}: value missing"))?;
        match name.as_str() {
            "--kernel" => config.boot_source.kernel_image_path = PathBuf::from(value),
            "--initrd" => config.boot_source.initrd_path = Some(PathBuf::from(value)),
            "--cmdline" => config.boot_source.boot_args = Some(value),
            "--mem" => config.machine_config.mem_size_mib = value.parse()?,
            "--vcpus" => config.machine_config.vcpu_count = value.parse()?,
            "--timeout" => timeout = Duration::from_secs(value.parse()?),
            "--drive" => {
                let drive_id = format!("drive{}", config.drives.len());
                let is_root_device = config.drives.is_empty();
                config.drives.push(Drive {
                    drive_id,
                    path_on_host: PathBuf::from(value),
                    is_root_device,
                    is_read_only: false,
                    partuuid: None,
                    cache_type: vmm::config::CacheType::Unsafe,
                    samepage: vmm::config::DriveSamepage::default(),
                    io_engine: vmm::config::IoEngine::Sync,
                    rate_limiter: vmm::config::Unsupported::ABSENT,
                    socket: vmm::config::Unsupported::ABSENT,
                });
            }
            _ => return Err(format!("{name}: unknown option").into()),
        }
    }
    Ok(Options { config, timeout })
}

fn main() -> Result<(), Box<dyn Error>> {
    let Options { config, timeout } = options()?;
    let monitor = Monitor::new("example".parse()?, dedup::Settings::default())?;
    let id: VmId = "guest".parse()?;
    monitor.create(id.clone(), config)?;
    let console = monitor.console(&id)?;
    let mut output = console.subscribe();
    let begin = Instant::now();
    monitor.start(&id)?;
    // Ends with the process: a blocking read of standard input cannot be called off.
    std::thread::spawn(move || {
        let mut buffer = [0; 256];
        while let Ok(count @ 1..) = std::io::stdin().read(&mut buffer) {
            let deadline = Instant::now() + Duration::from_secs(3600);
            if console.write_input_all(&buffer[..count], deadline).is_err() {
                break;
            }
        }
    });
    let deadline = begin + timeout;
    loop {
        match output.read(Duration::from_millis(500)) {
            ConsoleRead::Bytes(bytes) => {
                std::io::stdout().write_all(&bytes)?;
                std::io::stdout().flush()?;
            }
            ConsoleRead::Ended => break,
            ConsoleRead::TimedOut if Instant::now() >= deadline => monitor.stop(&id)?,
            ConsoleRead::TimedOut => {}
        }
    }
    let reason = monitor.wait_ended(&id, Instant::now() + Duration::from_secs(60));
    let seconds = begin.elapsed().as_secs_f64();
    let text = reason
        .as_ref()
        .map_or("still running".to_owned(), EndReason::to_string);
    eprintln!(
        "\n[{text} after {seconds:.3} s; report {:?}]",
        monitor.info(&id)?.report
    );
    Ok(())
}
