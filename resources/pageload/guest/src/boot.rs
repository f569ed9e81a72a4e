//! Entry into user mode, and what comes back from kernel mode: faults and panics.

use core::arch::global_asm;
use core::panic::PanicInfo;

use pageload_workload::layout::IMAGE_ADDRESS;
use pageload_workload::port::{PVPANIC, PVPANIC_PANICKED, Phase, Register};

use crate::boot_params::BootParams;
use crate::console::print_line;
use crate::memory::Memory;
use crate::{port, report, run};

global_asm!(
    include_str!("boot.s"),
    image_address = const IMAGE_ADDRESS,
    pvpanic = const PVPANIC,
    pvpanic_panicked = const PVPANIC_PANICKED,
);

/// First code in user mode; the argument is the boot loader's RSI. boot.s enters it by its name, once,
/// with a stack of its own.
#[unsafe(no_mangle)]
extern "C" fn user_start(boot_params_address: u64) -> ! {
    // SAFETY:
    // 1. The boot protocol has the address of a boot_params structure in RSI.
    // 2. It and its command line are in the first GiB, below the image: mapped, and never written.
    let boot_params = unsafe { BootParams::at(boot_params_address) };
    // SAFETY: this is entered once, and image, stacks and boot parameters are below that memory.
    let memory = unsafe { Memory::new(&boot_params) };
    run::run(boot_params.command_line(), memory)
}

/// Any exception, in user or kernel mode. boot.s enters it by its name, at most once, with a stack of
/// its own.
#[unsafe(no_mangle)]
extern "C" fn user_fault(vector: u64, error_code: u64, rip: u64, address: u64) -> ! {
    report::write(Register::Exception, vector + 1);
    print_line(format_args!(
        "exception {vector} at rip {rip:#x}, error code {error_code:#x}, cr2 {address:#x}"
    ));
    fail()
}

#[panic_handler]
fn panicked(info: &PanicInfo<'_>) -> ! {
    print_line(format_args!("{info}"));
    fail()
}

/// Ends the guest as failed; the reason was printed.
pub(crate) fn fail() -> ! {
    report::write_phase(Phase::Failed);
    port::end(PVPANIC_PANICKED)
}
