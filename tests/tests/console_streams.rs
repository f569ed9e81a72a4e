//! Console streams, against a real server process: how many there may be, and when they end.

use rustix::process::Signal;
use samepage::console_stream::STREAMS_MAX;
use samepage_tests::http::Connection;
use samepage_tests::kvm;
use samepage_tests::server::Server;
use samepage_tests::tiny_kernel::{IDLE, KernelFile, SAY_HI_AND_RESET};
use samepage_tests::wait::{PATIENCE, wait_until};
use serde_json::json;

fn put_vm(server: &Server, id: &str, kernel: &KernelFile) {
    let config = json!({
        "boot-source": {"kernel_image_path": kernel.argument()},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 32},
    });
    server.done("PUT", &format!("/vms/{id}"), &config.to_string());
}

/// Asks for the stream of a VM's console: the status, and the connection it is on.
fn ask_for_stream(server: &Server, id: &str) -> (u16, Connection) {
    let mut connection = server.connect();
    let request = format!(
        "GET /vms/{id}/console HTTP/1.1\r\nHost: localhost\r\n\
         Connection: Upgrade\r\nUpgrade: samepage-console\r\n\r\n"
    );
    connection.send(request.as_bytes()).expect("send a request");
    let reply = connection.reply();
    if reply.status != 101 {
        assert!(reply.fault().contains(&STREAMS_MAX.to_string()));
    }
    (reply.status, connection)
}

fn open_stream(server: &Server, id: &str) -> Connection {
    let (status, connection) = ask_for_stream(server, id);
    assert_eq!(status, 101);
    connection
}

#[test]
fn as_many_streams_as_there_may_be_hold_up_neither_requests_nor_the_servers_end() {
    if !kvm::is_present() {
        return;
    }
    // This process holds the other end of each.
    samepage::limits::raise().expect("descriptors for a thousand streams");
    let mut server = Server::start(&[]);
    let (idle, talker) = (KernelFile::new(IDLE), KernelFile::new(SAY_HI_AND_RESET));
    put_vm(&server, "idle", &idle);
    put_vm(&server, "talker", &talker);
    let mut streams: Vec<Connection> = (1..STREAMS_MAX)
        .map(|_| open_stream(&server, "idle"))
        .collect();
    let mut heard = open_stream(&server, "talker");
    assert_eq!(ask_for_stream(&server, "idle").0, 503);

    // What needs a thread still gets one, and a stream its bytes.
    let start = r#"{"action_type": "InstanceStart"}"#;
    server.done("PUT", "/vms/talker/actions", start);
    assert_eq!(heard.read_to_end(), b"hi\n");
    drop((heard, streams.pop()));
    wait_until("a stream that was left has made room", PATIENCE, || {
        let (status, stream) = ask_for_stream(&server, "idle");
        streams.push(stream);
        status == 101
    });

    assert_eq!(server.stop(Signal::TERM).code(), Some(0));
    for mut stream in streams {
        assert_eq!(stream.read_to_end(), b"");
    }
}

#[test]
fn stream_of_a_vm_that_was_never_started_ends_when_the_vm_is_deleted() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&[]);
    let kernel = KernelFile::new(IDLE);
    put_vm(&server, "a", &kernel);
    let mut stream = open_stream(&server, "a");
    server.done("DELETE", "/vms/a", "");
    assert_eq!(stream.read_to_end(), b"");
}

#[test]
fn client_that_does_not_read_does_not_hold_up_the_servers_end() {
    if !kvm::is_present() {
        return;
    }
    let mut server = Server::start(&[]);
    // Prints for ever, many bytes an exit.
    let chatter = KernelFile::new(&[
        0xbe, 0x00, 0x00, 0x10, 0x00, // 1: mov esi, 0x100000
        0xb9, 0x00, 0x10, 0x00, 0x00, // mov ecx, 0x1000
        0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xf3, 0x6e, // rep outsb
        0xeb, 0xee, // jmp 1b
    ]);
    put_vm(&server, "a", &chatter);
    let deaf = open_stream(&server, "a");
    let start = r#"{"action_type": "InstanceStart"}"#;
    server.done("PUT", "/vms/a/actions", start);
    // Each piece, however small, takes a kilobyte of the socket's buffer of some 200.
    wait_until("much output", PATIENCE, || {
        let history = server.call("GET", "/vms/a/console", "").body;
        history.len() >= 64 << 10
    });
    assert_eq!(server.stop(Signal::TERM).code(), Some(0));
    drop(deaf);
}

#[test]
fn client_that_reads_too_late_is_told_how_much_it_missed() {
    const PIECES: u16 = 128;
    const PIECE_BYTES: usize = 4096;
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&[]);
    let [low, high] = PIECES.to_le_bytes();
    let chatter = KernelFile::new(&[
        0xbf, low, high, 0x00, 0x00, // mov edi, PIECES
        0xbe, 0x00, 0x00, 0x10, 0x00, // 1: mov esi, 0x100000
        0xb9, 0x00, 0x10, 0x00, 0x00, // mov ecx, PIECE_BYTES
        0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xf3, 0x6e, // rep outsb
        0xff, 0xcf, 0x75, 0xec, // dec edi; jnz 1b
        0xb0, 0xfe, 0xe6, 0x64, // mov al, 0xfe; out 0x64, al
        0xf4, 0xeb, 0xfd, // 2: hlt; jmp 2b
    ]);
    put_vm(&server, "a", &chatter);
    let mut late = open_stream(&server, "a");
    let start = r#"{"action_type": "InstanceStart"}"#;
    server.done("PUT", "/vms/a/actions", start);
    wait_until("the guest has said all", PATIENCE, || {
        server.call("GET", "/vms/a", "").json()["state"] == "Ended"
    });
    // Each byte a character: what it prints is its own code.
    let read: String = late.read_to_end().into_iter().map(char::from).collect();
    let mut parts = read.split("\r\n[samepage: ");
    let mut bytes = parts.next().expect("the beginning").chars().count();
    let mut lost_bytes = 0;
    for part in parts {
        let (lost, rest) = part
            .split_once(" bytes of output are lost]\r\n")
            .expect("a note");
        lost_bytes += lost.parse::<usize>().expect("a number");
        bytes += rest.chars().count();
    }
    assert!(lost_bytes > 0, "{bytes} bytes were read");
    assert_eq!(bytes + lost_bytes, usize::from(PIECES) * PIECE_BYTES);
}
