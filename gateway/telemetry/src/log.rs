//! JSON lines to standard output, written off the request path.
//!
//! A request appends its line to a buffer of its own core and goes on; one thread collects the buffers ten times a
//! second and writes them out. So a line costs no system call and wakes no thread, and a reader of the log that stalls
//! costs dropped lines, which are counted, never a waiting request.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use parking_lot::Mutex;
use tracing_subscriber::fmt::MakeWriter;

/// The most that one buffer holds; further lines are dropped until it is collected.
const BUFFER_MAX: usize = 4 << 20;

const COLLECT_INTERVAL: Duration = Duration::from_millis(100);

/// The log of the process. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Log {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    buffers: Box<[Mutex<Vec<u8>>]>,
    dropped: AtomicU64,
    /// Held while the buffers are written, so that two writers never mix their lines.
    output: Mutex<Vec<u8>>,
    ended: AtomicBool,
}

impl Log {
    /// Starts the writing thread. `shards` is the number of threads that write many lines, each of which has its own
    /// buffer.
    pub fn start(shards: usize) -> Log {
        let shared = Arc::new(Shared {
            buffers: (0..shards.max(1)).map(|_| Mutex::default()).collect(),
            dropped: AtomicU64::new(0),
            output: Mutex::default(),
            ended: AtomicBool::new(false),
        });
        let collected = Arc::clone(&shared);
        let collect = move || {
            while !collected.ended.load(Relaxed) {
                std::thread::sleep(COLLECT_INTERVAL);
                collected.flush();
            }
        };
        // Without the thread nothing would ever be written; then lines are written by `flush` alone, at the end.
        let _ = std::thread::Builder::new().name("log".into()).spawn(collect);
        Log { shared }
    }

    /// Adds one line to a shard's buffer. `line` has no line break; this adds it.
    pub fn line(&self, shard: usize, line: &[u8]) {
        let buffers = &self.shared.buffers;
        let mut buffer = buffers[shard % buffers.len()].lock();
        if buffer.len() + line.len() + 1 > BUFFER_MAX {
            self.shared.dropped.fetch_add(1, Relaxed);
            return;
        }
        buffer.extend_from_slice(line);
        buffer.push(b'\n');
    }

    /// Lines dropped because their buffer was full.
    pub fn dropped(&self) -> u64 {
        self.shared.dropped.load(Relaxed)
    }

    /// Writes out what has been collected: at the end of the process, or before an exit.
    pub fn flush(&self) {
        self.shared.flush();
    }

    /// Writes out what there is and ends the thread.
    pub fn end(&self) {
        self.shared.ended.store(true, Relaxed);
        self.shared.flush();
    }
}

impl Shared {
    fn flush(&self) {
        let mut output = self.output.lock();
        for buffer in &self.buffers {
            let mut buffer = buffer.lock();
            if !buffer.is_empty() {
                // Swapped, so that a request never waits for the write below.
                std::mem::swap(&mut *buffer, &mut *output);
                drop(buffer);
                // Standard output that is closed or full has nobody to tell.
                let _ = std::io::stdout().write_all(&output);
                let _ = std::io::stdout().flush();
                output.clear();
            }
        }
    }
}

/// Takes in the events of `tracing`, one line each.
impl<'a> MakeWriter<'a> for Log {
    type Writer = LineWriter<'a>;

    fn make_writer(&'a self) -> LineWriter<'a> {
        LineWriter(self)
    }
}

/// Appends to the first shard: events are rare beside access lines.
#[derive(Debug)]
pub struct LineWriter<'a>(&'a Log);

impl Write for LineWriter<'_> {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        self.0.line(0, line.strip_suffix(b"\n").unwrap_or(line));
        Ok(line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_buffer_drops_and_counts_and_does_not_grow() {
        let log = Log {
            shared: Arc::new(Shared {
                buffers: [Mutex::default()].into(),
                dropped: AtomicU64::new(0),
                output: Mutex::default(),
                ended: AtomicBool::new(true),
            }),
        };
        let line = vec![b'x'; 1 << 20];
        (0..6).for_each(|_| log.line(0, &line));
        assert_eq!(log.dropped(), 3);
        assert!(log.shared.buffers[0].lock().len() <= BUFFER_MAX);
    }
}
