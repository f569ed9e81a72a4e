//! The keyboard controller: CPU reset, and a keyboard with three keys: ctrl, alt and del.
//!
//! vm-superio's i8042 knows the reset alone; ctrl-alt-del needs an output buffer and an interrupt,
//! which are not much more. What is modelled is what `drivers/input/serio/i8042.c` and
//! `drivers/input/keyboard/atkbd.c` of Linux touch with Firecracker's default boot arguments.

use std::collections::VecDeque;

use vm_superio::Trigger;

use super::irq::IrqLine;
use crate::state::EndReason;

/// Data port.
pub(crate) const PORT_DATA: u16 = 0x60;
/// Status (read) and command (write) port.
pub(crate) const PORT_COMMAND: u16 = 0x64;
/// The keyboard's interrupt line.
pub(crate) const IRQ: u32 = 1;

const STATUS_OUTPUT_FULL: u8 = 1 << 0;
const STATUS_LAST_WAS_COMMAND: u8 = 1 << 3;
const STATUS_NOT_LOCKED: u8 = 1 << 4;

const COMMAND_READ_CONTROL: u8 = 0x20;
const COMMAND_WRITE_CONTROL: u8 = 0x60;
const COMMAND_SELF_TEST: u8 = 0xaa;
const COMMAND_KEYBOARD_TEST: u8 = 0xab;
const COMMAND_READ_OUTPUT_PORT: u8 = 0xd0;
const COMMAND_WRITE_OUTPUT_PORT: u8 = 0xd1;
const COMMAND_RESET_CPU: u8 = 0xfe;

const CONTROL_KEYBOARD_INTERRUPT: u8 = 1 << 0;
const CONTROL_POST_OK: u8 = 1 << 2;

const OUTPUT_PORT_NO_RESET: u8 = 1 << 0;

const KEYBOARD_ACK: u8 = 0xfa;

/// Bytes that wait to be read; a guest that writes without reading loses the newest, as hardware.
const OUTPUT_BYTES_MAX: usize = 16;

/// Scan code set 2: ctrl, alt and del (extended) pressed.
const CTRL_ALT_DEL: [u8; 4] = [0x14, 0x11, 0xe0, 0x71];

/// The guest never enabled its keyboard's interrupt: no driver would see a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NobodyListens;

/// The controller of one VM.
#[derive(Debug)]
pub(crate) struct I8042 {
    irq: IrqLine,
    control: u8,
    output_port: u8,
    /// The command whose data byte comes next.
    awaiting: Option<u8>,
    last_was_command: bool,
    output: VecDeque<u8>,
}

impl I8042 {
    /// A controller as firmware leaves it: self-test passed, interrupts off.
    pub(crate) fn new(irq: IrqLine) -> I8042 {
        I8042 {
            irq,
            control: CONTROL_POST_OK,
            output_port: OUTPUT_PORT_NO_RESET,
            awaiting: None,
            last_was_command: false,
            output: VecDeque::new(),
        }
    }

    /// The interrupt line.
    pub(crate) fn irq(&self) -> &IrqLine {
        &self.irq
    }

    /// Presses ctrl, alt and del.
    pub(crate) fn press_ctrl_alt_del(&mut self) -> Result<(), NobodyListens> {
        if self.control & CONTROL_KEYBOARD_INTERRUPT == 0 {
            return Err(NobodyListens);
        }
        self.output.clear();
        self.output.extend(CTRL_ALT_DEL);
        self.interrupt();
        Ok(())
    }

    /// Serves a read of the data port.
    pub(crate) fn read_data(&mut self) -> u8 {
        let byte = self.output.pop_front().unwrap_or(0);
        if !self.output.is_empty() {
            self.interrupt();
        }
        byte
    }

    /// Serves a read of the status port.
    pub(crate) fn read_status(&self) -> u8 {
        let mut status = STATUS_NOT_LOCKED;
        if !self.output.is_empty() {
            status |= STATUS_OUTPUT_FULL;
        }
        if self.last_was_command {
            status |= STATUS_LAST_WAS_COMMAND;
        }
        status
    }

    /// Serves a write of the command port.
    pub(crate) fn write_command(&mut self, command: u8) -> Option<EndReason> {
        self.last_was_command = true;
        self.awaiting = None;
        match command {
            COMMAND_RESET_CPU => return Some(EndReason::GuestReset),
            COMMAND_READ_CONTROL => self.answer(self.control),
            COMMAND_SELF_TEST => self.answer(0x55),
            COMMAND_KEYBOARD_TEST => self.answer(0x00),
            COMMAND_READ_OUTPUT_PORT => self.answer(self.output_port),
            COMMAND_WRITE_CONTROL | COMMAND_WRITE_OUTPUT_PORT => self.awaiting = Some(command),
            _ => {}
        }
        None
    }

    /// Serves a write of the data port: the data of a command, else a byte for the keyboard,
    /// which acknowledges whatever it is told.
    pub(crate) fn write_data(&mut self, byte: u8) {
        self.last_was_command = false;
        match self.awaiting.take() {
            Some(COMMAND_WRITE_CONTROL) => self.control = byte,
            Some(_) => self.output_port = byte | OUTPUT_PORT_NO_RESET,
            None => {
                self.push(KEYBOARD_ACK);
                self.interrupt();
            }
        }
    }

    /// Queues the controller's own answer; drivers poll for it.
    fn answer(&mut self, byte: u8) {
        self.output.clear();
        self.push(byte);
    }

    fn push(&mut self, byte: u8) {
        if self.output.len() < OUTPUT_BYTES_MAX {
            self.output.push_back(byte);
        }
    }

    fn interrupt(&self) {
        if self.control & CONTROL_KEYBOARD_INTERRUPT != 0
            && let Err(error) = self.irq.trigger()
        {
            log::warn!("keyboard controller: cannot raise its interrupt: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn controller() -> I8042 {
        I8042::new(IrqLine::new().unwrap())
    }

    #[test]
    fn the_reset_command_ends_the_vm_and_no_other_does() {
        let mut i8042 = controller();
        for command in 0..=0xff {
            let reset = i8042.write_command(command) == Some(EndReason::GuestReset);
            assert_eq!(reset, command == 0xfe, "{command:#x}");
        }
    }

    #[test]
    fn the_control_byte_reads_back_as_written() {
        let mut i8042 = controller();
        i8042.write_command(COMMAND_WRITE_CONTROL);
        i8042.write_data(0x61);
        i8042.write_command(COMMAND_READ_CONTROL);
        assert_eq!(i8042.read_status() & STATUS_OUTPUT_FULL, STATUS_OUTPUT_FULL);
        assert_eq!(i8042.read_data(), 0x61);
        assert_eq!(i8042.read_status() & STATUS_OUTPUT_FULL, 0);
    }

    #[test]
    fn ctrl_alt_del_needs_a_guest_that_listens() {
        let mut i8042 = controller();
        assert_eq!(i8042.press_ctrl_alt_del(), Err(NobodyListens));
        i8042.write_command(COMMAND_WRITE_CONTROL);
        i8042.write_data(CONTROL_KEYBOARD_INTERRUPT);
        i8042.press_ctrl_alt_del().unwrap();
        assert_eq!(i8042.irq().event().read().unwrap(), 1);
        let keys: Vec<u8> = (0..4).map(|_| i8042.read_data()).collect();
        assert_eq!(keys, CTRL_ALT_DEL);
        assert_eq!(
            i8042.irq().event().read().unwrap(),
            3,
            "one interrupt per byte"
        );
    }

    #[test]
    fn a_guest_that_writes_without_reading_fills_a_bounded_buffer() {
        let mut i8042 = controller();
        (0..1000).for_each(|_| i8042.write_data(0xed));
        assert_eq!(i8042.output.len(), OUTPUT_BYTES_MAX);
        assert_eq!(i8042.read_data(), KEYBOARD_ACK);
    }
}
