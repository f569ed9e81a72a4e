//! The serial port: a 16550A by vm-superio, its output on the VM's console, its input from there.
//!
//! Input has flow control: what the 64-byte FIFO cannot take waits in a bounded queue and follows
//! as the guest reads; beyond that the writer is told how much was taken.
//!
//! A driver throws away what it finds in the FIFO when it begins. So input also waits until the
//! guest has the receive interrupt on, or polls the line status for it.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use vm_superio::Serial;
use vm_superio::serial::{Error as SerialError, NoEvents};

use super::irq::IrqLine;
use crate::console::{Console, ConsoleError, InputSink};

/// First port of COM1.
pub(crate) const BASE: u16 = 0x3f8;
/// Last port of COM1.
pub(crate) const LAST: u16 = 0x3ff;
/// COM1's interrupt line.
pub(crate) const IRQ: u32 = 4;

/// vm-superio's receive FIFO.
const FIFO_BYTES: usize = 64;

/// Registers, by their offset; the second one only while the divisor latch is closed.
const DATA: u16 = 0;
const INTERRUPT_ENABLE: u16 = 1;
const LINE_CONTROL: u16 = 3;
const LINE_STATUS: u16 = 5;
/// In the line control: the first two registers are the divisor's.
const DIVISOR_LATCH: u8 = 0x80;
/// In the interrupt enable register: an interrupt for received data.
const RECEIVE_INTERRUPT: u8 = 1;
/// What drivers write there for a moment, to see which bits stay.
const ALL_INTERRUPTS: u8 = 0x0f;
/// Reads of the line status, with none of another register but the data's, by which a guest polls for
/// input. A guest that prints reads it once before each byte.
const POLLS: u32 = 16;

/// Most input that waits for the guest, beside the FIFO.
const PENDING_BYTES_MAX: usize = 4096;

/// COM1 of one VM.
#[derive(Debug)]
pub(crate) struct SerialPort {
    uart: Mutex<Uart>,
    console: Console,
}

#[derive(Debug)]
struct Uart {
    serial: Serial<IrqLine, NoEvents, ConsoleOut>,
    pending: VecDeque<u8>,
    readiness: Readiness,
}

/// Whether the guest is ready for input, by what it does to the registers.
#[derive(Debug, Default)]
struct Readiness {
    is_latch_open: bool,
    has_interrupt: bool,
    /// The interrupt is on, and nothing else was done since: it may be a test of the register.
    is_in_doubt: bool,
    polls: u32,
}

impl Readiness {
    fn note_read(&mut self, offset: u16) {
        match offset {
            LINE_STATUS => self.polls = self.polls.saturating_add(1),
            DATA => {}
            _ => self.polls = 0,
        }
        self.is_in_doubt &= offset == INTERRUPT_ENABLE;
    }

    fn note_write(&mut self, offset: u16, value: u8) {
        self.polls = 0;
        self.is_in_doubt &= offset == INTERRUPT_ENABLE;
        match offset {
            LINE_CONTROL => self.is_latch_open = value & DIVISOR_LATCH != 0,
            INTERRUPT_ENABLE if !self.is_latch_open => {
                self.has_interrupt = value & RECEIVE_INTERRUPT != 0;
                self.is_in_doubt = value & ALL_INTERRUPTS == ALL_INTERRUPTS;
            }
            _ => {}
        }
    }

    fn is_ready(&self) -> bool {
        self.has_interrupt && !self.is_in_doubt || self.polls >= POLLS
    }
}

#[derive(Debug)]
struct ConsoleOut(Console);

impl Write for ConsoleOut {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Lock order: serial port -> console log.
        self.0.print(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl SerialPort {
    /// A port that prints on `console` and becomes its input.
    pub(crate) fn new(irq: IrqLine, console: &Console) -> Arc<SerialPort> {
        let serial = Serial::new(irq, ConsoleOut(console.clone()));
        let uart = Mutex::new(Uart {
            serial,
            pending: VecDeque::new(),
            readiness: Readiness::default(),
        });
        let port = Arc::new(SerialPort {
            uart,
            console: console.clone(),
        });
        let weak: Weak<dyn InputSink> = Arc::downgrade(&(port.clone() as Arc<dyn InputSink>));
        console.connect(weak);
        port
    }

    fn lock(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves a read of register `offset` (0 to 7).
    pub(crate) fn read(&self, offset: u16) -> u8 {
        let mut uart = self.lock();
        uart.readiness.note_read(offset);
        let value = uart.serial.read(register(offset));
        self.refill(uart);
        value
    }

    fn refill(&self, mut uart: MutexGuard<'_, Uart>) {
        if uart.refill() {
            drop(uart);
            self.console.input_room();
        }
    }

    /// Serves a write of register `offset` (0 to 7).
    pub(crate) fn write(&self, offset: u16, value: u8) {
        let mut uart = self.lock();
        uart.readiness.note_write(offset, value);
        if let Err(error) = uart.serial.write(register(offset), value) {
            // The console takes everything, so this is the interrupt: the guest polls at worst.
            log::warn!("serial port: {error}");
        }
        self.refill(uart);
    }

    /// Connects the interrupt line by `register`.
    pub(crate) fn with_irq<T>(&self, register: impl FnOnce(&IrqLine) -> T) -> T {
        register(self.lock().serial.interrupt_evt())
    }

    #[cfg(test)]
    pub(crate) fn console(&self) -> &Console {
        &self.console
    }
}

fn register(offset: u16) -> u8 {
    // The caller matched the port against the device's eight.
    u8::try_from(offset & 7).unwrap_or_default()
}

impl Uart {
    /// Moves waiting input into the FIFO once the guest emptied it. Returns whether any moved.
    ///
    /// Rejected: topping the FIFO up at every read, an interrupt per byte instead of one per 64.
    fn refill(&mut self) -> bool {
        let is_due = !self.pending.is_empty() && self.readiness.is_ready();
        if !is_due || self.serial.fifo_capacity() < FIFO_BYTES {
            return false;
        }
        let (front, _) = self.pending.as_slices();
        match self.serial.enqueue_raw_bytes(front) {
            Ok(taken) => {
                self.pending.drain(..taken);
                taken > 0
            }
            Err(error) => {
                log::warn!("serial port: {error}");
                false
            }
        }
    }
}

impl InputSink for SerialPort {
    fn write_input(&self, input: &[u8]) -> Result<usize, ConsoleError> {
        let mut uart = self.lock();
        let mut taken = 0;
        if uart.pending.is_empty() && uart.readiness.is_ready() {
            taken = match uart.serial.enqueue_raw_bytes(input) {
                Ok(taken) => taken,
                Err(SerialError::FullFifo) => 0,
                Err(error) => return Err(ConsoleError::Interrupt(error.to_string())),
            };
        }
        let rest = &input[taken..];
        let room = PENDING_BYTES_MAX - uart.pending.len();
        let waiting = &rest[..rest.len().min(room)];
        uart.pending.extend(waiting);
        Ok(taken + waiting.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The port as a guest has it that has begun nothing yet.
    fn fresh_port() -> (Arc<SerialPort>, Console) {
        let console = Console::new();
        (SerialPort::new(IrqLine::new().unwrap(), &console), console)
    }

    /// The port of a guest that is ready for input.
    fn port() -> (Arc<SerialPort>, Console) {
        let (port, console) = fresh_port();
        port.write(INTERRUPT_ENABLE, RECEIVE_INTERRUPT);
        (port, console)
    }

    fn read_all(port: &SerialPort) -> Vec<u8> {
        let mut read = Vec::new();
        while port.read(LINE_STATUS) & 1 != 0 {
            read.push(port.read(DATA));
        }
        read
    }

    #[test]
    fn a_driver_that_begins_finds_none_of_the_input_and_then_all_of_it() {
        let (port, console) = fresh_port();
        assert_eq!(console.write_input(b"exit\n"), Ok(5));
        // As Linux does (`autoconfig` and `serial8250_do_startup` of 8250_port.c).
        port.write(INTERRUPT_ENABLE, 0);
        port.write(INTERRUPT_ENABLE, ALL_INTERRUPTS);
        port.read(INTERRUPT_ENABLE);
        port.write(INTERRUPT_ENABLE, 0);
        port.write(LINE_CONTROL, DIVISOR_LATCH);
        port.write(INTERRUPT_ENABLE, 1);
        port.write(LINE_CONTROL, 3);
        for register in [LINE_STATUS, DATA, 2, 6, LINE_STATUS, DATA] {
            port.read(register);
        }
        assert_eq!(port.read(LINE_STATUS) & 1, 0);
        port.write(INTERRUPT_ENABLE, 5);
        assert_eq!(read_all(&port), b"exit\n");
    }

    #[test]
    fn a_guest_that_polls_gets_input_without_interrupts() {
        let (port, console) = fresh_port();
        console.write_input(b"k").unwrap();
        let polled = (0..=POLLS).any(|_| port.read(LINE_STATUS) & 1 != 0);
        assert!(polled);
        assert_eq!(port.read(DATA), b'k');
    }

    #[test]
    fn what_the_guest_writes_is_on_the_console() {
        let (port, console) = port();
        b"ok\n".iter().for_each(|byte| port.write(DATA, *byte));
        assert_eq!(console.history(), b"ok\n");
    }

    #[test]
    fn long_input_reaches_the_guest_whole_and_in_order() {
        let (port, console) = port();
        let text: Vec<u8> = (0..500_u32)
            .map(|i| u8::try_from(i % 251).unwrap())
            .collect();
        assert_eq!(console.write_input(&text), Ok(text.len()));
        assert_eq!(read_all(&port), text);
    }

    #[test]
    fn input_beyond_the_queue_is_not_taken_until_the_guest_reads() {
        let (port, console) = port();
        let much = vec![b'x'; 10_000];
        let taken = console.write_input(&much).unwrap();
        assert_eq!(taken, 64 + PENDING_BYTES_MAX);
        assert_eq!(console.write_input(b"y"), Ok(0));
        (0..64).for_each(|_| assert_eq!(port.read(DATA), b'x'));
        assert_eq!(console.write_input(b"y"), Ok(1));
    }

    #[test]
    fn input_raises_the_interrupt_when_the_guest_asked_for_it() {
        let (port, console) = port();
        console.write_input(b"z").unwrap();
        assert_eq!(port.with_irq(|irq| irq.event().read()).unwrap(), 1);
    }

    #[test]
    fn a_port_that_is_gone_takes_no_input() {
        let (port, console) = port();
        drop(port);
        assert_eq!(console.write_input(b"z"), Err(ConsoleError::NotRunning));
    }
}
