//! What tells connections apart.

/// No port: `VMADDR_PORT_ANY`.
pub(super) const NO_PORT: u32 = u32::MAX;
/// Where the host's ports for its clients begin, as with Firecracker: below lie those of servers.
pub(super) const FIRST_PORT: u32 = 1 << 30;

/// The two ports of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

impl Ports {
    /// The socket that clients connect to. A client that has not said its port yet has the port of
    /// the host's that it will have, and [`NO_PORT`].
    pub(super) const LISTENER: Ports = Ports {
        host: NO_PORT,
        guest: NO_PORT,
    };

    pub(super) fn token(self) -> u64 {
        u64::from(self.host) << 32 | u64::from(self.guest)
    }

    pub(super) fn of_token(token: u64) -> Ports {
        let [host, guest] = [token >> 32, token & u64::from(u32::MAX)];
        let port = |half| u32::try_from(half).unwrap_or(NO_PORT);
        Ports {
            host: port(host),
            guest: port(guest),
        }
    }
}

/// The port to try after `port`, one of the host's for its clients.
pub(super) fn after(port: u32) -> u32 {
    FIRST_PORT | (port + 1) & (FIRST_PORT - 1)
}
