//! How VMs end, each way by a guest that does just that.

mod guest;

use guest::{Code, Lab, skip};
use vmm::{EndReason, VmState};

fn ends_with(code: &Code) -> EndReason {
    let lab = Lab::new();
    let id = lab.run("vm", code);
    let reason = lab.end(&id);
    assert_eq!(
        lab.monitor.info(&id).expect("info").state,
        VmState::Ended(reason.clone())
    );
    reason
}

#[test]
fn a_reset_by_the_keyboard_controller_is_a_guest_reset() {
    if !skip() {
        assert_eq!(
            ends_with(&Code::new().reset().halt()),
            EndReason::GuestReset
        );
    }
}

#[test]
fn a_panic_event_is_a_guest_panic() {
    if !skip() {
        assert_eq!(
            ends_with(&Code::new().out_byte(0x505, 1).halt()),
            EndReason::GuestPanic
        );
    }
}

#[test]
fn a_shutdown_event_is_a_guest_shutdown() {
    if !skip() {
        assert_eq!(
            ends_with(&Code::new().out_byte(0x505, 4).halt()),
            EndReason::GuestShutdown
        );
    }
}

#[test]
fn a_fault_that_cannot_be_delivered_is_a_triple_fault() {
    if !skip() {
        assert_eq!(
            ends_with(&Code::new().triple_fault()),
            EndReason::TripleFault
        );
    }
}

/// `int3` at offset 8, with an IDT whose #BP handler checks the saved RIP.
fn breakpoint_guest() -> Code {
    const HANDLER: usize = 0x100;
    const IDT_POINTER: usize = 0x200;
    let at = |offset: usize| u32::try_from(0x10_0000 + offset).expect("address");
    let lidt = Code::new()
        .raw(&[0x0f, 0x01, 0x1c, 0x25])
        .raw(&at(IDT_POINTER).to_le_bytes());
    let code = lidt
        .raw(&[0xcc])
        .print("not raised")
        .reset()
        .pad_to(HANDLER);
    // pop %rax; cmp $9 + base, %rax; jne to the reset
    let handler = code
        .raw(&[0x58, 0x48, 0x3d])
        .raw(&at(9).to_le_bytes())
        .raw(&[0x75, 0x07]);
    let handler = handler.print("!").reset().halt().pad_to(IDT_POINTER);
    let table = at(IDT_POINTER + 16);
    let pointer = handler
        .raw(&63_u16.to_le_bytes())
        .raw(&u64::from(table).to_le_bytes());
    // Gate 3: a present interrupt gate to the handler in the code segment.
    let [low0, low1, high0, high1] = at(HANDLER).to_le_bytes();
    let gate = [
        low0, low1, 0x10, 0, 0, 0x8e, high0, high1, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    pointer.pad_to(IDT_POINTER + 16).raw(&[0; 48]).raw(&gate)
}

#[test]
fn a_breakpoint_is_raised_even_where_kvm_cannot_execute_it() {
    if !skip() {
        let lab = Lab::new();
        let id = lab.run("vm", &breakpoint_guest());
        assert_eq!(lab.end(&id), EndReason::GuestReset);
        assert_eq!(String::from_utf8_lossy(&lab.console(&id).history()), "!");
    }
}

#[test]
fn an_instruction_kvm_cannot_execute_is_named_with_its_bytes() {
    if !skip() {
        // mov $0xd0000000, %edi; popcnt (%rdi), %eax: memory that is not RAM makes KVM emulate, and
        // its emulator has no popcnt, on any host.
        let popcnt = [0xbf, 0x00, 0x00, 0x00, 0xd0, 0xf3, 0x0f, 0xb8, 0x07];
        match ends_with(&Code::new().raw(&popcnt).halt()) {
            EndReason::EmulationFailure { rip, bytes } => {
                assert_eq!(rip, 0x10_0005);
                assert_eq!(bytes[..4], [0xf3, 0x0f, 0xb8, 0x07]);
            }
            other => panic!("{other}"),
        }
    }
}

#[test]
fn a_stop_is_a_stop_even_of_a_guest_that_spins() {
    if !skip() {
        for code in [Code::new().spin(), Code::new().halt()] {
            let lab = Lab::new();
            let id = lab.run("vm", &code);
            lab.monitor.stop(&id).unwrap();
            assert_eq!(
                lab.monitor.info(&id).unwrap().state,
                VmState::Ended(EndReason::Stopped)
            );
        }
    }
}

#[test]
fn a_vm_that_ended_by_itself_keeps_its_reason_when_it_is_stopped() {
    if !skip() {
        let lab = Lab::new();
        let id = lab.run("vm", &Code::new().reset().halt());
        assert_eq!(lab.end(&id), EndReason::GuestReset);
        lab.monitor.stop(&id).unwrap();
        assert_eq!(lab.end(&id), EndReason::GuestReset);
    }
}
