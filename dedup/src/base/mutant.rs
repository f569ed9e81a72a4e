//! Ways in which the shutdown protocol could have been got wrong: the models must catch each.
//!
//! No product build has any of them: there, [`is`] is the constant `false`. One of them can be built
//! in by the feature `lock-before-free`, for a test with real memory.

/// A mistake in the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutant {
    /// The lock pass comes before the memory is given back.
    LockBeforeFree,
    /// The flag is not tested once the region lock is held.
    EnteredUntested,
    /// The hand-over moves a slot that the cursor is on.
    CursorUnchecked,
    /// The fast path is judged in one ring-lock section, and taken in the next.
    #[cfg(loom)]
    JudgedOutside,
    /// The fast path does not care for items.
    ItemsIgnored,
    /// The flag is published after the lock pass.
    PublishedLate,
    /// Nobody is told of a slot that was handed over to a worker that does not scan.
    ReapForgotten,
    /// `merge now` gives a slot items without saying so to the exit path.
    ItemsUnmarked,
    /// A pin does not wait for the replacement in hand.
    PinUnwaited,
    /// Pages are replaced without a look at the pins.
    PinUnlooked,
    /// Stopping returns while a window is still being scanned.
    StopUnawaited,
}

/// Whether this mistake is to be made: the one that the environment names.
#[cfg(loom)]
pub(crate) fn is(mutant: Mutant) -> bool {
    static CHOSEN: std::sync::LazyLock<Option<String>> =
        std::sync::LazyLock::new(|| std::env::var("SAMEPAGE_MUTANT").ok());
    CHOSEN
        .as_ref()
        .is_some_and(|chosen| *chosen == format!("{mutant:?}"))
}

/// Whether this mistake is to be made: never, but for what the test of the exit's order asks for.
#[cfg(not(loom))]
pub(crate) const fn is(mutant: Mutant) -> bool {
    cfg!(feature = "lock-before-free") && matches!(mutant, Mutant::LockBeforeFree)
}
