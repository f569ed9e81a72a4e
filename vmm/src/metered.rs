//! A file that is loaded into guest memory a piece at a time, as its VM may take memory.

use std::io::{self, Read, Seek, SeekFrom};

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice};

use crate::guard::room::VmAllowance;

/// Bytes of a piece: what is loaded before the start looks again whether it may go on.
const PIECE_BYTES: usize = 256 << 10;

/// A kernel or an initrd on its way into guest memory, through a buffer of a piece.
///
/// Rejected: reading straight into guest memory, as [`ReadVolatile`] of a file does. Some file systems
/// (FUSE with direct I/O) have the kernel fill the pages by their frames, long after it was asked, and
/// a page that was merged meanwhile is another frame: the piece would be lost.
///
/// While guests are held for want of memory, loading stands still too, and it ends with an error
/// when the start is the one to go.
#[derive(Debug)]
pub(crate) struct Metered<'a, F> {
    file: F,
    allowance: &'a VmAllowance,
    piece: Vec<u8>,
}

impl<'a, F> Metered<'a, F> {
    pub(crate) fn new(file: F, allowance: &'a VmAllowance) -> Metered<'a, F> {
        Metered {
            file,
            allowance,
            piece: Vec::new(),
        }
    }
}

/// Headers, which do not go into guest memory.
impl<F: Read> Read for Metered<'_, F> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.file.read(bytes)
    }
}

impl<F: Seek> Seek for Metered<'_, F> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

impl<F: Read> ReadVolatile for Metered<'_, F> {
    /// Fills all of `buffer` unless the file ends: vm-memory takes less for a file cut short.
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buffer: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        let mut done = 0;
        while done < buffer.len() {
            let length = PIECE_BYTES.min(buffer.len() - done);
            self.allowance
                .load(length as u64)
                .map_err(|error| VolatileMemoryError::IOError(io::Error::other(error)))?;
            self.piece.resize(length, 0);
            let read = loop {
                match self.file.read(&mut self.piece) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    read => break read.map_err(VolatileMemoryError::IOError)?,
                }
            };
            if read == 0 {
                break;
            }
            buffer.subslice(done, read)?.copy_from(&self.piece[..read]);
            done += read;
        }
        Ok(done)
    }
}

#[cfg(test)]
#[expect(dead_code, reason = "shared with tests that use more of it")]
#[path = "../../tests/tests/hung_storage/held_file.rs"]
mod held_file;

#[cfg(test)]
mod tests {
    use super::held_file::{HeldFile, Reads, Silence, own_mounts};
    use super::*;
    use crate::admission::GivenUp;
    use crate::guard::Watch;
    use crate::memory::ram::{Merger, Ram};
    use std::fs::File;
    use std::io::Cursor;
    use std::sync::Arc;
    use std::time::{Duration, Instant};
    use vm_memory::{Bytes, GuestAddress};

    fn allowance() -> VmAllowance {
        let engine = dedup::Engine::new(&dedup::Settings::default()).unwrap();
        let watch = Watch::new(Arc::new(engine), Arc::default()).unwrap();
        VmAllowance::new(&watch, 4096)
    }

    #[test]
    fn a_file_is_loaded_whole_and_counted() {
        let allowance = allowance();
        let memory =
            crate::memory::GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let length = 2 * PIECE_BYTES + 5;
        let mut file = Metered::new(Cursor::new(vec![7_u8; length + 1]), &allowance);
        memory
            .read_exact_volatile_from(GuestAddress(3), &mut file, length)
            .unwrap();
        let last = GuestAddress(2 + length as u64);
        let ends: [u8; 2] = memory.read_obj(last).unwrap();
        assert_eq!(ends, [7, 0]);
        assert_eq!(allowance.loaded_bytes(), length as u64);
        let short = memory.read_exact_volatile_from(GuestAddress(0), &mut file, 9);
        short.unwrap_err();
    }

    #[test]
    fn loading_ends_when_the_start_is_the_one_to_go() {
        let allowance = allowance();
        let memory =
            crate::memory::GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        allowance.close(GivenUp::NoMemory);
        let mut file = Metered::new(Cursor::new(vec![7_u8; 100]), &allowance);
        let error = memory
            .read_exact_volatile_from(GuestAddress(0), &mut file, 100)
            .unwrap_err();
        assert!(error.to_string().contains("ran out of memory"), "{error}");
    }

    /// The pages that an initrd is read into hold zeros until the file system answers, and zeros are
    /// what the engine gives back first.
    #[test]
    fn a_file_on_a_slow_file_system_is_whole_while_the_engine_merges() {
        let length = 16 * 4096;
        let content: Vec<u8> = (1..=251).cycle().take(length).collect();
        own_mounts();
        let file = HeldFile::mount(content.clone(), Reads::Direct);
        let settings = dedup::Settings {
            run: dedup::Run::Stop,
            ..dedup::Settings::default()
        };
        let engine = dedup::Engine::new(&settings).unwrap();
        let ram = Ram::new(16 << 20, Merger::Engine(&engine)).unwrap();
        let (memory, allowance) = (ram.memory(), allowance());
        file.hold(Silence::ReadsBehind(0));
        let deadline = Instant::now() + Duration::from_secs(120);
        std::thread::scope(|scope| {
            let loading = scope.spawn(|| {
                let opened = File::open(file.path()).unwrap();
                let mut metered = Metered::new(opened, &allowance);
                memory.read_exact_volatile_from(GuestAddress(0), &mut metered, length)
            });
            while !file.is_waited_for() {
                assert!(Instant::now() < deadline, "nobody reads");
                std::thread::yield_now();
            }
            engine.set_run(dedup::Run::Merge).unwrap();
            assert!(engine.wait_full_scans(4, deadline), "passes go by");
            file.let_go();
            loading.join().unwrap().unwrap();
        });
        let mut found = vec![0; length];
        memory.read_slice(&mut found, GuestAddress(0)).unwrap();
        assert!(found == content, "the file lost a page");
        ram.release().unwrap();
    }
}
