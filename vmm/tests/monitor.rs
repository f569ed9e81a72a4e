//! The monitor's requests, on real VMs.

mod guest;

use std::time::{Duration, Instant};

use guest::{Code, LONG, Lab, skip, wait_for};
use vmm::{EndReason, ErrorKind, VmId, VmState};

fn id(name: &str) -> VmId {
    name.parse().expect("id")
}

#[test]
fn the_console_works_both_ways_and_keeps_its_history() {
    if skip() {
        return;
    }
    let lab = Lab::new();
    let vm = lab.run("vm", &Code::new().print("ready\n").echo());
    let console = lab.console(&vm);
    wait_for(&mut console.subscribe(), "ready\n");
    let long = "abcdefghijklmnopqrstuvwxyz0123456789".repeat(11);
    let deadline = Instant::now() + LONG;
    assert_eq!(
        console.write_input_all(long.as_bytes(), deadline),
        Ok(long.len())
    );
    wait_for(&mut console.subscribe(), &long);
    lab.monitor.stop(&vm).unwrap();
    assert!(console.history().ends_with(long.as_bytes()));
    console.write_input(b"x").unwrap_err();
}

#[test]
fn a_paused_vm_stands_still_and_goes_on_where_it_was() {
    if skip() {
        return;
    }
    let lab = Lab::new();
    let vm = lab.run("vm", &Code::new().print("ready\n").echo());
    let console = lab.console(&vm);
    let mut reader = console.subscribe();
    wait_for(&mut reader, "ready\n");
    for round in 0..20_u8 {
        lab.monitor.pause(&vm).unwrap();
        assert_eq!(lab.monitor.info(&vm).unwrap().state, VmState::Paused);
        let letter = [b'a' + round];
        assert_eq!(console.write_input(&letter), Ok(1));
        assert_eq!(
            reader.read(Duration::from_millis(5)),
            vmm::ConsoleRead::TimedOut
        );
        lab.monitor.pause(&vm).unwrap();
        lab.monitor.resume(&vm).unwrap();
        wait_for(&mut reader, std::str::from_utf8(&letter).unwrap());
    }
    lab.monitor.pause(&vm).unwrap();
    lab.monitor.stop(&vm).unwrap();
    assert_eq!(lab.end(&vm), EndReason::Stopped);
}

#[test]
fn reports_of_the_guest_are_in_its_info() {
    if skip() {
        return;
    }
    let lab = Lab::new();
    let commit = |code: Code, index, low, high| {
        code.out_word(0x680, index)
            .out_word(0x684, low)
            .out_word(0x688, high)
    };
    let code = commit(commit(Code::new(), 0, 3, 0), 6, 7, 1).reset().halt();
    let vm = lab.run("vm", &code);
    lab.end(&vm);
    let report = lab.monitor.info(&vm).unwrap().report.unwrap();
    assert_eq!((report.phase, report.verified_pages), (3, 1 << 32 | 7));
    assert_eq!(report.first_bad_page, None);
}

#[test]
fn requests_that_make_no_sense_are_refused_with_their_kind() {
    if skip() {
        return;
    }
    let lab = Lab::new();
    let monitor = &lab.monitor;
    let kind = |result: Result<(), vmm::MonitorError>| result.unwrap_err().kind();
    let vm = id("vm");
    assert_eq!(kind(monitor.start(&vm)), ErrorKind::NotFound);
    let config = lab.config(&Code::new().halt());
    monitor.create(vm.clone(), config.clone()).unwrap();
    assert_eq!(
        kind(monitor.create(vm.clone(), config.clone())),
        ErrorKind::Conflict
    );
    assert_eq!(kind(monitor.pause(&vm)), ErrorKind::Conflict);
    assert_eq!(kind(monitor.stop(&vm)), ErrorKind::Conflict);
    monitor.start(&vm).unwrap();
    assert_eq!(kind(monitor.start(&vm)), ErrorKind::Conflict);
    assert_eq!(kind(monitor.delete(&vm)), ErrorKind::Conflict);
    let no_keyboard = monitor.send_ctrl_alt_del(&vm).unwrap_err();
    assert!(
        no_keyboard.to_string().contains("keyboard"),
        "{no_keyboard}"
    );
    monitor.stop(&vm).unwrap();
    assert_eq!(kind(monitor.start(&vm)), ErrorKind::Conflict);
    assert_eq!(kind(monitor.resume(&vm)), ErrorKind::Conflict);
    monitor.delete(&vm).unwrap();
    assert_eq!(kind(monitor.delete(&vm)), ErrorKind::NotFound);
    let mut foreign = config;
    foreign.samepage.merge_domain = Some("other".parse().unwrap());
    assert_eq!(kind(monitor.create(vm, foreign)), ErrorKind::InvalidInput);
}

#[test]
fn files_that_cannot_be_used_are_named_with_their_field() {
    if skip() {
        return;
    }
    let lab = Lab::new();
    let good = lab.config(&Code::new().halt());
    let cases: Vec<(&str, vmm::VmConfig)> = vec![
        ("kernel_image_path", {
            let mut config = good.clone();
            config.boot_source.kernel_image_path = "/nonexistent/kernel".into();
            config
        }),
        ("initrd_path", {
            let mut config = good.clone();
            config.boot_source.initrd_path = Some("/".into());
            config
        }),
        ("kernel_image_path", {
            let mut config = good.clone();
            config.boot_source.kernel_image_path = lab.file("text", &[b'x'; 4096]);
            config
        }),
        ("kernel_image_path", {
            let mut config = good.clone();
            config.boot_source.kernel_image_path = lab.file("short", b"\x7fELF\x02\x01\x01");
            config
        }),
        ("mem_size_mib", {
            let mut config = good.clone();
            config.machine_config.mem_size_mib = 1;
            config
        }),
        ("mem_size_mib", {
            let mut config = good.clone();
            config.boot_source.initrd_path = Some(lab.file("initrd", &vec![0; 15 << 20]));
            config
        }),
        ("boot_args", {
            let mut config = good.clone();
            config.boot_source.boot_args = Some("x".repeat(4000));
            config
        }),
    ];
    for (field, config) in cases {
        let created = lab.monitor.create(id("vm"), config);
        let error = match created {
            Err(error) => error,
            Ok(()) => {
                let error = lab.monitor.start(&id("vm")).unwrap_err();
                assert_eq!(
                    lab.monitor.info(&id("vm")).unwrap().state,
                    VmState::NotStarted
                );
                lab.monitor.delete(&id("vm")).unwrap();
                error
            }
        };
        assert!(error.to_string().contains(field), "{field}: {error}");
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    }
}

#[test]
fn many_vms_run_side_by_side_and_end_with_their_monitor() {
    if skip() {
        return;
    }
    let lab = Lab::new();
    let code = Code::new().print("up").halt();
    let mut config = lab.config(&code);
    config.machine_config.vcpu_count = 2;
    let vms: Vec<VmId> = (0..8)
        .map(|i| lab.start(&format!("vm{i}"), config.clone()))
        .collect();
    vms.iter()
        .for_each(|vm| wait_for(&mut lab.console(vm).subscribe(), "up"));
    assert_eq!(lab.monitor.list().len(), 8);
    let console = lab.console(&vms[0]);
    drop(lab);
    let mut reader = console.subscribe();
    assert_eq!(reader.read(LONG), vmm::ConsoleRead::Bytes(b"up".to_vec()));
    assert_eq!(reader.read(LONG), vmm::ConsoleRead::Ended);
}

#[test]
fn the_guest_can_start_its_other_vcpus() {
    if skip() {
        return;
    }
    // At 0x8000, in real mode: print 'A' (mov $0x3f8, %dx; mov $'A', %al; out %al, %dx), then
    // reset (mov $0xfe, %al; out %al, $0x64; hlt). Copied there 8 bytes at a time (movabs).
    let application = [
        0xba, 0xf8, 0x03, 0xb0, b'A', 0xee, 0xb0, 0xfe, 0xe6, 0x64, 0xf4,
    ];
    let mut code = Code::new();
    for (chunk, address) in application.chunks(8).zip([0x8000_u64, 0x8008]) {
        let mut word = [0x90; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        code = code
            .raw(&[0x48, 0xb8])
            .raw(&word)
            .raw(&[0x48, 0xa3])
            .raw(&address.to_le_bytes());
    }
    // LAPIC: software enable, then INIT and start-up at page 8 to all but itself.
    for (register, value) in [(0xf0_u32, 0x1ff_u32), (0x300, 0xc_4500), (0x300, 0xc_4608)] {
        let address = (0xfee0_0000 | register).to_le_bytes();
        code = code
            .raw(&[0xbf])
            .raw(&address)
            .raw(&[0xc7, 0x07])
            .raw(&value.to_le_bytes());
    }
    let lab = Lab::new();
    let mut config = lab.config(&code.halt());
    config.machine_config.vcpu_count = 2;
    let vm = lab.start("vm", config);
    assert_eq!(lab.end(&vm), EndReason::GuestReset);
    assert_eq!(lab.console(&vm).history(), b"A");
}

#[test]
fn memory_beyond_the_mmio_hole_is_the_guests() {
    if skip() {
        return;
    }
    let high = 0x1_0000_0000_u64;
    let value = 0x5a17_u64;
    // movabs $word, %rax; movabs %rax, address
    let store = |code: Code, word: u64, address: u64| {
        code.raw(&[0x48, 0xb8])
            .raw(&word.to_le_bytes())
            .raw(&[0x48, 0xa3])
            .raw(&address.to_le_bytes())
    };
    // A page directory at 0x10000 maps the fifth GiB; its pointer goes beside the boot ones.
    let code = store(Code::new(), high | 0x83, 0x1_0000);
    let code = store(code, 0x1_0003, 0xa000 + 4 * 8);
    let code = store(code, value, high + 0x1000);
    // movabs address, %rax; cmp $value, %rax; jne over the report
    let code = code.raw(&[0x48, 0xa1]).raw(&(high + 0x1000).to_le_bytes());
    let code = code
        .raw(&[0x48, 0x3d, 0x17, 0x5a, 0, 0, 0x75, 0x07])
        .print("!")
        .reset()
        .halt();
    let lab = Lab::new();
    let mut config = lab.config(&code);
    config.machine_config.mem_size_mib = 3 * 1024 + 16;
    let vm = lab.start("vm", config);
    assert_eq!(lab.end(&vm), EndReason::GuestReset);
    assert_eq!(lab.console(&vm).history(), b"!");
}

#[test]
fn no_pause_of_a_busy_guest_is_lost() {
    if skip() {
        return;
    }
    let lab = Lab::new();
    // One guest never leaves guest mode by itself, the other does so all the time.
    let spinning = lab.run("spinning", &Code::new().spin());
    // .: in $0x80, %al; jmp .
    let exiting = lab.run("exiting", &Code::new().raw(&[0xe4, 0x80, 0xeb, 0xfc]));
    for _ in 0..500 {
        for vm in [&spinning, &exiting] {
            lab.monitor.pause(vm).unwrap();
            lab.monitor.resume(vm).unwrap();
        }
    }
}
