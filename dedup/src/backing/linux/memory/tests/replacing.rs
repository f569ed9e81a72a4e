//! Mapping calls that fail with the old mapping gone.

use super::*;

/// Each way to put a mapping over pages, with the kernel failing half-way a few times. The guest
/// finds its content, whoever came to a page meanwhile goes on, and nothing else is left.
#[test]
fn a_mapping_that_fails_when_the_old_one_is_gone_is_made_again_until_it_succeeds() {
    type Put = fn(&LinuxMemory, &LinuxPool) -> io::Result<()>;
    let puts: [Put; 3] = [
        |memory, pool| memory.map(pool, 2..12, PoolPage(2)),
        |memory, pool| build(memory, pool, 2..12, Some(PoolPage(2)), &[4..6, 7..8]),
        |memory, pool| build(memory, pool, 2..12, None, &[2..6, 6..12]),
    ];
    let scenario = fail::FailScenario::setup();
    for put in puts {
        let (memory, pool) = filled();
        memory.protect(0..PAGES).expect("it is registered");
        let writer = sleeping_writer(&memory, 6);
        fail::cfg("unmapped", "4*return").expect("a known action");
        put(&memory, &pool).expect("it is made again");
        memory.release(0..PAGES, true);
        assert_eq!(writer.recv_timeout(LONG), Ok(6));
        for page in (0..PAGES).filter(|&page| page != 6) {
            assert_eq!(read(&memory, page), content(page), "page {page}");
        }
        write(&memory, 3, 1);
        memory.protect(0..PAGES).expect("it is one range");
        memory.release(0..PAGES, true);
    }
    scenario.teardown();
}

/// Who reads a page while it is gone sleeps instead of reading zeros.
#[test]
fn who_comes_to_a_page_whose_mapping_is_gone_waits_for_it() {
    let scenario = fail::FailScenario::setup();
    let (memory, pool) = filled();
    memory.protect(0..PAGES).expect("it is registered");
    fail::cfg("unmapped", "1*return->1*pause").expect("a known action");
    thread::scope(|scope| {
        let sharer = scope.spawn(|| memory.map(&pool, 2..12, PoolPage(2)));
        let [start, end] = [2, 12].map(|page| memory.mapping.address(page).addr());
        wait_until("the hole is plugged", || {
            let maps = fs::read_to_string("/proc/self/maps").expect("this is Linux");
            maps.contains(&format!("{start:x}-{end:x} rw-p"))
        });
        let reader = sleeping(&memory, |memory| read(memory, 6));
        fail::remove("unmapped");
        sharer.join().expect("no panic").expect("it is made again");
        memory.release(0..PAGES, true);
        assert_eq!(reader.recv_timeout(LONG), Ok(content(6)));
    });
    scenario.teardown();
}
