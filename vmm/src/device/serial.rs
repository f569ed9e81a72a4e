//! The serial port: a 16550A by vm-superio, its output on the VM's console, its input from there.
//!
//! Input has flow control: what the 64-byte FIFO cannot take waits in a bounded queue and follows
//! as the guest reads; beyond that the writer is told how much was taken.

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
        let value = uart.serial.read(register(offset));
        if uart.refill() {
            drop(uart);
            self.console.input_room();
        }
        value
    }

    /// Serves a write of register `offset` (0 to 7).
    pub(crate) fn write(&self, offset: u16, value: u8) {
        let written = self.lock().serial.write(register(offset), value);
        if let Err(error) = written {
            // The console takes everything, so this is the interrupt: the guest polls at worst.
            log::warn!("serial port: {error}");
        }
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
        if self.pending.is_empty() || self.serial.fifo_capacity() < FIFO_BYTES {
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
        if uart.pending.is_empty() {
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

    const DATA: u16 = 0;
    const LINE_STATUS: u16 = 5;
    const INTERRUPT_ENABLE: u16 = 1;

    fn port() -> (Arc<SerialPort>, Console) {
        let console = Console::new();
        (SerialPort::new(IrqLine::new().unwrap(), &console), console)
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
        let mut read = Vec::new();
        while port.read(LINE_STATUS) & 1 != 0 {
            read.push(port.read(DATA));
        }
        assert_eq!(read, text);
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
        port.write(INTERRUPT_ENABLE, 1);
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
