//! The connections of the API's socket: how many there may be, and who goes when one more comes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::net::UnixStream;
use tokio::task::{AbortHandle, JoinSet};

/// Most connections of the server's own socket at a time, console streams not counted. It bounds what all
/// of them can have buffered: a head and a body each.
pub const CONNECTIONS_MAX: usize = 512;

/// What a connection too many is told, before it is closed.
const TOO_MANY: &[u8] = b"HTTP/1.1 503 \r\nServer: Firecracker API\r\nConnection: close\r\n\
    Content-Type: application/json\r\nContent-Length: 47\r\n\r\n\
    {\"fault_message\":\"too many requests in hand\"}\r\n";

/// The open connections.
///
/// When one comes too many, the one goes whose client has let the server wait for longest: it is idle,
/// or sends its request slowly. Rejected: to refuse the new one. Some hundred clients that send nothing
/// would keep all others out.
#[derive(Debug)]
pub(crate) struct Connections {
    most: usize,
    tasks: JoinSet<()>,
    open: Vec<(AbortHandle, Arc<Turn>)>,
}

/// Whose turn it is on a connection: the client's, to send a request, or the server's.
#[derive(Debug)]
pub(crate) struct Turn {
    begun: Instant,
    /// Since when the server waits for the client, in microseconds since `begun`, or [`SERVERS`].
    waits_since_us: AtomicU64,
}

/// It is the server's turn.
const SERVERS: u64 = u64::MAX;

impl Turn {
    fn new() -> Turn {
        Turn {
            begun: Instant::now(),
            waits_since_us: AtomicU64::new(0),
        }
    }

    /// A whole request is there.
    pub(crate) fn request_came(&self) {
        self.waits_since_us.store(SERVERS, Ordering::Relaxed);
    }

    /// It was answered.
    pub(crate) fn answered(&self) {
        let now_us = u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(SERVERS - 1);
        self.waits_since_us.store(now_us, Ordering::Relaxed);
    }

    /// When the server began to wait for the client, if it does.
    fn waits_since(&self) -> Option<Instant> {
        let us = self.waits_since_us.load(Ordering::Relaxed);
        (us != SERVERS).then(|| self.begun + Duration::from_micros(us))
    }
}

impl Connections {
    /// None yet, and `most` at a time.
    pub(crate) fn at_most(most: usize) -> Connections {
        Connections {
            most,
            tasks: JoinSet::new(),
            open: Vec::new(),
        }
    }

    /// Has `converse` talk to a client, if there is room or can be made.
    pub(crate) fn add<F>(
        &mut self,
        stream: UnixStream,
        converse: impl FnOnce(UnixStream, Arc<Turn>) -> F,
    ) where
        F: Future<Output = ()> + Send + 'static,
    {
        while self.tasks.try_join_next().is_some() {}
        self.open.retain(|(task, _)| !task.is_finished());
        if self.open.len() >= self.most && !self.cut_one() {
            // A client that does not read it loses it: nothing waits for one.
            let _ = stream.try_write(TOO_MANY);
            return;
        }
        let turn = Arc::new(Turn::new());
        let task = self.tasks.spawn(converse(stream, Arc::clone(&turn)));
        self.open.push((task, turn));
    }

    /// Cuts the connection that has waited for its client for longest; false if none waits.
    fn cut_one(&mut self) -> bool {
        let waiting = self.open.iter().enumerate();
        let waiting = waiting.filter_map(|(place, (_, turn))| Some((turn.waits_since()?, place)));
        let Some((_, place)) = waiting.min() else {
            return false;
        };
        let (task, _) = self.open.swap_remove(place);
        task.abort();
        true
    }

    /// Waits until none is left.
    pub(crate) async fn ended(&mut self) {
        while self.tasks.join_next().await.is_some() {}
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;

    fn add(connections: &mut Connections) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        connections.add(ours, |stream, _| async move {
            let _stream = stream;
            pending::<()>().await;
        });
        theirs
    }

    #[tokio::test]
    async fn connection_that_let_the_server_wait_for_longest_goes_for_a_new_one() {
        let mut connections = Connections::at_most(CONNECTIONS_MAX);
        let _clients: Vec<_> = (0..CONNECTIONS_MAX)
            .map(|_| add(&mut connections))
            .collect();
        let turn = |place: usize| Arc::clone(&connections.open[place].1);
        let (first, second, third) = (turn(0), turn(1), turn(2));
        first.request_came();
        second.request_came();
        second.answered();
        let _new = add(&mut connections);
        let is_open = |turn: &Arc<Turn>| {
            connections
                .open
                .iter()
                .any(|(_, one)| Arc::ptr_eq(one, turn))
        };
        assert!(is_open(&first) && is_open(&second) && !is_open(&third));
        assert_eq!(connections.open.len(), CONNECTIONS_MAX);
    }

    #[tokio::test]
    async fn one_more_is_refused_where_all_requests_are_in_hand() {
        let mut connections = Connections::at_most(CONNECTIONS_MAX);
        let _clients: Vec<_> = (0..CONNECTIONS_MAX)
            .map(|_| add(&mut connections))
            .collect();
        connections
            .open
            .iter()
            .for_each(|(_, turn)| turn.request_came());
        let refused = add(&mut connections);
        refused.readable().await.unwrap();
        let mut told = [0; 1024];
        let length = refused.try_read(&mut told).unwrap();
        let told = std::str::from_utf8(&told[..length]).unwrap();
        let (head, body) = told.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 503 "), "{head}");
        assert!(
            head.contains(&format!("Content-Length: {}", body.len())),
            "{head}"
        );
        let body: crate::fault::FaultBody = serde_json::from_str(body).unwrap();
        assert!(!body.fault_message.is_empty());
    }
}
