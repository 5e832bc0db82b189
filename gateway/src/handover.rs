//! Listening sockets that outlive a process: those that the gateway that serves now passes on to its successor, and those
//! that a service manager passes to both.
//!
//! A socket that is closed takes the connections that wait in its queue along, and with `SO_REUSEPORT` every socket has a
//! queue of its own. So the descriptors themselves go from one process to the next, over a Unix socket that lies where the
//! accepted configuration is kept. It is a file, and not a name in the abstract namespace, because whoever shares the network
//! with the gateway, as a container may, does not for that reason share its files; and both sides hold the other to their own
//! user, or root.
//!
//! The successor takes the descriptors, finds out how its endpoints are, begins to accept, and only then says so; the
//! predecessor then drains and ends. If the successor ends before, nothing has happened.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};

/// The longest that either side waits for the other's next word, but for the last.
const PATIENCE: Duration = Duration::from_secs(5);

/// The longest from the descriptors to the successor's word that it serves.
const SUCCESSION: Duration = Duration::from_secs(60);

/// Between a successor that failed and the next.
const PAUSE: Duration = Duration::from_millis(100);

/// Between two attempts to listen.
const AGAIN: Duration = Duration::from_secs(1);

/// Descriptors in one message; the kernel takes at most 253.
const BATCH: usize = 64;

/// What is said, a byte each. The first two tell a version of this protocol apart from the next.
const MORE: u8 = 0x10;
const LAST: u8 = 0x11;
const SERVING: u8 = 0x12;
const YIELDED: u8 = 0x13;

/// Sockets that were there before this process, by their address.
#[derive(Debug, Default)]
pub(crate) struct Inherited(HashMap<SocketAddr, Vec<TcpListener>>);

/// The gateway that serves until this one does.
#[derive(Debug)]
pub(crate) struct Predecessor {
    stream: UnixStream,
    socket: PathBuf,
}

impl Inherited {
    fn of(sockets: Vec<TcpListener>) -> std::io::Result<Inherited> {
        let mut by_address: HashMap<SocketAddr, Vec<TcpListener>> = HashMap::new();
        for socket in sockets {
            socket.set_nonblocking(true)?;
            by_address.entry(socket.local_addr()?).or_default().push(socket);
        }
        Ok(Inherited(by_address))
    }

    /// The sockets of this address, which are then the caller's.
    pub(crate) fn take(&mut self, address: SocketAddr) -> Vec<TcpListener> {
        self.0.remove(&address).unwrap_or_default()
    }

    /// The addresses of those that nobody has taken.
    pub(crate) fn left(&self) -> impl Iterator<Item = &SocketAddr> {
        self.0.keys()
    }
}

/// What a service manager has passed to this process (`sd_listen_fds(3)`).
///
/// # Errors
/// Something passed is no TCP socket that listens.
pub(crate) fn passed() -> Result<Inherited, String> {
    let mut passed = listenfd::ListenFd::from_env();
    let mut sockets = Vec::new();
    for at in 0..passed.len() {
        let socket = passed.take_tcp_listener(at).map_err(|error| format!("socket {at} of LISTEN_FDS: {error}"))?;
        sockets.extend(socket);
    }
    Inherited::of(sockets).map_err(|error| format!("a socket of LISTEN_FDS: {error}"))
}

/// Asks the gateway that serves now for its sockets. `None`: there is none.
///
/// # Errors
/// There is one, and it does not give them.
pub(crate) fn take_over(socket: &Path) -> Result<Option<(Inherited, Predecessor)>, String> {
    let ask = || {
        let Some(stream) = reach(socket)? else { return Ok(None) };
        is_ours(&stream)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut sockets = Vec::new();
        while receive(&stream, &mut sockets)? {}
        Ok(Some((Inherited::of(sockets)?, Predecessor { stream, socket: socket.to_owned() })))
    };
    let told = |error: std::io::Error| {
        format!("{}: the gateway there does not pass its sockets on: {error}", socket.display())
    };
    ask().map_err(told)
}

impl Inherited {
    /// Adds those of addresses that are not among these.
    pub(crate) fn or(mut self, others: Inherited) -> Inherited {
        for (address, sockets) in others.0 {
            self.0.entry(address).or_insert(sockets);
        }
        self
    }
}

impl Predecessor {
    /// Whether it is there still.
    pub(crate) fn serves(&self) -> bool {
        !matches!(reach(&self.socket), Ok(None))
    }

    /// Tells it that this process serves, and waits until it has made room. Blocks.
    ///
    /// # Errors
    /// It serves on, because it has waited too long.
    pub(crate) fn release(mut self) -> Result<(), String> {
        if let Err(error) = self.stream.write_all(&[SERVING]) {
            // It has ended, or does not expect this process any more. Two that serve would each know half.
            return match reach(&self.socket) {
                Ok(None) => Ok(()),
                _ => Err(format!("the predecessor serves on: {error}")),
            };
        }
        let mut said = [0];
        if self.stream.read_exact(&mut said).is_err() || said != [YIELDED] {
            // It has been told, and leaves when it gets to it, or is dead.
            tracing::warn!("the predecessor has not answered");
        }
        Ok(())
    }
}

/// Passes `sockets` to the successor, and ends when that serves.
pub(crate) async fn succeeded(socket: PathBuf, sockets: Vec<TcpListener>) {
    let listener = bound(&socket).await;
    let sockets = Arc::new(sockets);
    loop {
        let asked = listener.accept().await.and_then(|(stream, _)| stream.into_std());
        let sockets = Arc::clone(&sockets);
        let given = tokio::task::spawn_blocking(move || give(&asked?, &sockets));
        match given.await.unwrap_or_else(|error| Err(error.into())) {
            Ok(mut successor) => {
                // The place is the successor's from now on.
                let _ = std::fs::remove_file(&socket);
                drop(listener);
                // Whether it hears this or not, it serves.
                let _ = successor.write_all(&[YIELDED]);
                return;
            }
            Err(error) => {
                tracing::warn!(%error, "a successor has not come to serve; this process goes on");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// Listens at the socket's place, as soon as that can be had.
async fn bound(socket: &Path) -> tokio::net::UnixListener {
    let bind = || {
        if reach(socket)?.is_some() {
            return Err(std::io::Error::other("another gateway listens there"));
        }
        // Left over by one that was killed.
        match std::fs::remove_file(socket) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = short(socket, |path| UnixListener::bind(path))?;
        std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        tokio::net::UnixListener::from_std(listener)
    };
    let mut told = false;
    loop {
        match bind() {
            Ok(listener) => return listener,
            Err(error) if !told => {
                told = true;
                let place = socket.display();
                tracing::warn!(%place, %error, "no successor can take the sockets of this process over yet; --state names another place");
            }
            Err(_) => {}
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// Connects to whoever listens at a socket's place, if anybody does.
fn reach(socket: &Path) -> std::io::Result<Option<UnixStream>> {
    match short(socket, |path| UnixStream::connect(path)) {
        Ok(stream) => Ok(Some(stream)),
        Err(error) if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Acts on a socket's path by way of its directory's descriptor: a path of more than 107 bytes is no socket's.
fn short<T>(socket: &Path, act: impl FnOnce(&Path) -> std::io::Result<T>) -> std::io::Result<T> {
    let (Some(directory), Some(name)) = (socket.parent(), socket.file_name()) else {
        return Err(std::io::ErrorKind::InvalidInput.into());
    };
    let directory = std::fs::File::open(directory)?;
    act(&Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(name))
}

/// Gives one successor the descriptors, and waits until it serves.
fn give(stream: &UnixStream, sockets: &[TcpListener]) -> std::io::Result<UnixStream> {
    is_ours(stream)?;
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_read_timeout(Some(SUCCESSION))?;
    let batches = sockets.chunks(BATCH).count();
    for (at, batch) in sockets.chunks(BATCH).enumerate() {
        let descriptors: Vec<_> = batch.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
        let mut message = SendAncillaryBuffer::new(&mut space);
        message.push(SendAncillaryMessage::ScmRights(&descriptors));
        let word = [if at + 1 == batches { LAST } else { MORE }];
        sendmsg(stream, &[std::io::IoSlice::new(&word)], &mut message, SendFlags::NOSIGNAL)?;
    }
    let mut said = [0];
    let mut stream = stream.try_clone()?;
    stream.read_exact(&mut said)?;
    if said == [SERVING] { Ok(stream) } else { Err(std::io::Error::other("it said something else")) }
}

/// Takes in one message. Whether more follow.
fn receive(stream: &UnixStream, sockets: &mut Vec<TcpListener>) -> std::io::Result<bool> {
    let mut word = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
    let mut message = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(stream, &mut [std::io::IoSliceMut::new(&mut word)], &mut message, RecvFlags::CMSG_CLOEXEC)?;
    for part in message.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = part {
            sockets.extend(descriptors.map(TcpListener::from));
        }
    }
    match (received.bytes, word[0]) {
        (1, MORE) => Ok(true),
        (1, LAST) => Ok(false),
        (0, _) => Err(std::io::Error::other("it broke off")),
        _ => Err(std::io::Error::other("it is of a version that speaks otherwise")),
    }
}

/// Whoever is of another user gets nothing, and nothing is taken of them.
fn is_ours(stream: &UnixStream) -> std::io::Result<()> {
    let peer = rustix::net::sockopt::socket_peercred(stream)?;
    if peer.uid == rustix::process::geteuid() || peer.uid.is_root() {
        return Ok(());
    }
    let message = format!("process {} at the other end is of another user", peer.pid.as_raw_nonzero());
    Err(std::io::Error::new(std::io::ErrorKind::PermissionDenied, message))
}
