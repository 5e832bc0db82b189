//! A model on its thread: a bounded queue in front, batches of what waits, replies.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::{mpsc, oneshot};

use crate::runtime::{Failed, Input, Runtime};
use crate::tensor::Tensor;

/// How a model's work is bounded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// Requests that may wait; more are refused at once.
    pub(crate) queue: usize,
    /// Rows that are computed together, if so many wait.
    pub(crate) batch_rows: usize,
}

/// A request's result, with when its steps began and ended.
#[derive(Debug)]
pub(crate) struct Done {
    /// The model's outputs.
    pub(crate) outputs: Vec<Tensor>,
    /// When it was put into the queue, was taken out, and was computed.
    pub(crate) times: Times,
    /// Requests that were computed together with it, itself included.
    pub(crate) batch: usize,
}

/// The instants between a request's steps.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Times {
    /// Into the queue.
    pub(crate) queued: SystemTime,
    /// Out of it, into a batch.
    pub(crate) taken: SystemTime,
    /// The batch began to be computed.
    pub(crate) began: SystemTime,
    /// It was done.
    pub(crate) ended: SystemTime,
}

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RunError {
    /// The queue is full.
    #[error("the model's queue is full")]
    Full,
    /// The deadline passed before its turn; nothing was computed.
    #[error("the deadline passed while the request waited")]
    Expired,
    /// The model failed on this input.
    #[error(transparent)]
    Failed(#[from] Failed),
    /// The model's thread is gone.
    #[error("the model is not running")]
    Gone,
}

struct Job {
    input: Input,
    deadline: Option<Instant>,
    queued: SystemTime,
    reply: oneshot::Sender<Result<Done, RunError>>,
}

/// A handle to a running model. The thread ends with the last one.
#[derive(Clone, Debug)]
pub(crate) struct Runner {
    jobs: mpsc::Sender<Job>,
    waiting: Arc<AtomicUsize>,
}

impl Runner {
    /// Loads a model on a thread of its own and waits until it can compute.
    ///
    /// # Errors
    /// What kept it from loading.
    pub(crate) fn start(
        name: &str,
        bounds: Bounds,
        load: impl FnOnce() -> Result<Box<dyn Runtime>, String> + Send + 'static,
    ) -> Result<Runner, String> {
        let (jobs, queue) = mpsc::channel(bounds.queue);
        let (loaded, loading) = std::sync::mpsc::channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&waiting);
        let run = move || match load() {
            Ok(runtime) => {
                let told = loaded.send(Ok(()));
                if told.is_ok() {
                    work(runtime, queue, bounds, &counted);
                }
            }
            // The starter waits for this.
            Err(error) => drop(loaded.send(Err(error))),
        };
        std::thread::Builder::new().name(format!("model-{name}")).spawn(run).map_err(|error| error.to_string())?;
        loading.recv().map_err(|_| "the model's thread ended while loading".to_owned())??;
        Ok(Runner { jobs, waiting })
    }

    /// Requests that wait or are being computed.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.load(Relaxed)
    }

    /// Of these, the requests that have not been taken into a batch.
    pub(crate) fn queued(&self) -> usize {
        self.jobs.max_capacity() - self.jobs.capacity()
    }

    /// Runs one request. Dropping the future before its turn takes it out of the queue.
    ///
    /// # Errors
    /// See [`RunError`].
    pub(crate) async fn run(&self, input: Input, deadline: Option<Instant>) -> Result<Done, RunError> {
        let (reply, result) = oneshot::channel();
        let job = Job { input, deadline, queued: SystemTime::now(), reply };
        self.waiting.fetch_add(1, Relaxed);
        let sent = self.jobs.try_send(job).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => RunError::Full,
            mpsc::error::TrySendError::Closed(_) => RunError::Gone,
        });
        if let Err(error) = sent {
            self.waiting.fetch_sub(1, Relaxed);
            return Err(error);
        }
        result.await.unwrap_or(Err(RunError::Gone))
    }
}

/// Computes until the last handle is gone.
fn work(mut runtime: Box<dyn Runtime>, mut queue: mpsc::Receiver<Job>, bounds: Bounds, waiting: &AtomicUsize) {
    let mut left_over: Option<Job> = None;
    while let Some(first) = left_over.take().or_else(|| queue.blocking_recv()) {
        let taken = SystemTime::now();
        let mut rows = 0;
        let mut batch: Vec<Job> = Vec::new();
        let mut next = Some(first);
        // What waits already goes along while it fits; nobody is waited for.
        while let Some(job) = next {
            if job.reply.is_closed() {
                // Its client has left: nothing is computed for nobody.
                waiting.fetch_sub(1, Relaxed);
            } else if job.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                waiting.fetch_sub(1, Relaxed);
                // The client may have left just now.
                let _ = job.reply.send(Err(RunError::Expired));
            } else if !batch.is_empty() && rows + job.input.rows() > bounds.batch_rows {
                left_over = Some(job);
                break;
            } else {
                rows += job.input.rows();
                batch.push(job);
            }
            next = if rows < bounds.batch_rows { queue.try_recv().ok() } else { None };
        }
        if !batch.is_empty() {
            compute(&mut *runtime, batch, taken, waiting);
        }
    }
}

fn compute(runtime: &mut dyn Runtime, batch: Vec<Job>, taken: SystemTime, waiting: &AtomicUsize) {
    let (inputs, replies): (Vec<_>, Vec<_>) = batch.into_iter().map(|job| (job.input, (job.reply, job.queued))).unzip();
    let size = inputs.len();
    let began = SystemTime::now();
    // A panic below costs this batch, not the model's thread.
    let results = std::panic::catch_unwind(AssertUnwindSafe(|| runtime.run(&inputs)));
    let ended = SystemTime::now();
    let results =
        results.unwrap_or_else(|_| inputs.iter().map(|_| Err(Failed("the runtime panicked".into()))).collect());
    debug_assert_eq!(results.len(), size, "a runtime answers each request of its batch");
    for (result, (reply, queued)) in results.into_iter().zip(replies) {
        waiting.fetch_sub(1, Relaxed);
        let times = Times { queued, taken, began, ended };
        // A client that left meanwhile is answered into the void.
        let _ = reply.send(result.map(|outputs| Done { outputs, times, batch: size }).map_err(RunError::Failed));
    }
}

/// The deadline that a client's `x-request-timeout-ms` asks for.
pub(crate) fn deadline(timeout_ms: Option<u64>) -> Option<Instant> {
    Instant::now().checked_add(Duration::from_millis(timeout_ms?))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;
    use crate::tensor::Data;

    /// Tells how many rows each request had; computes a batch only when let.
    struct Held {
        let_go: Receiver<()>,
        batches: Sender<Vec<usize>>,
    }

    impl Runtime for Held {
        fn run(&mut self, batch: &[Input]) -> Vec<Result<Vec<Tensor>, Failed>> {
            self.let_go.recv().expect("the test lets it go");
            self.batches.send(batch.iter().map(Input::rows).collect()).expect("the test listens");
            batch
                .iter()
                .map(|input| {
                    let rows = input.rows();
                    if rows == 13 {
                        return Err(Failed("thirteen".into()));
                    }
                    assert_ne!(rows, 7, "a panic in the runtime");
                    Ok(vec![Tensor { name: "n".into(), shape: vec![1], data: Data::Int64(vec![rows as i64]) }])
                })
                .collect()
        }
    }

    fn start(bounds: Bounds) -> (Runner, Sender<()>, Receiver<Vec<usize>>) {
        let ((go, let_go), (batches, seen)) = (channel(), channel());
        let runner = Runner::start("held", bounds, move || Ok(Box::new(Held { let_go, batches }))).expect("loads");
        (runner, go, seen)
    }

    fn rows(count: usize) -> Input {
        Input::Tokens(vec![vec![1]; count])
    }

    async fn answer(runner: &Runner, count: usize) -> Result<Data, RunError> {
        runner.run(rows(count), None).await.map(|done| done.outputs[0].data.clone())
    }

    /// Runs the futures until they wait, so that their requests are in the queue in order.
    async fn settled(runner: &Runner, waiting: usize) {
        while runner.waiting() < waiting {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn what_waits_is_batched_in_order_up_to_the_bound() {
        let (runner, go, seen) = start(Bounds { queue: 16, batch_rows: 4 });
        let mut tasks = Vec::new();
        for (at, count) in [1, 2, 2, 1, 9].into_iter().enumerate() {
            let runner_ = runner.clone();
            tasks.push(tokio::spawn(async move { (count, answer(&runner_, count).await) }));
            settled(&runner, at + 1).await;
        }
        // The first is taken alone: nobody else waited yet, or those that did went along. Its batch is let go last.
        (0..5).for_each(|_| go.send(()).expect("the model listens"));
        for task in tasks {
            let (count, result) = task.await.expect("no panic");
            assert_eq!(result.expect("computed"), Data::Int64(vec![count as i64]));
        }
        drop((runner, go));
        let batches: Vec<Vec<usize>> = seen.iter().collect();
        assert_eq!(batches.concat(), [1, 2, 2, 1, 9], "nothing lost, doubled or reordered");
        assert!(batches.iter().all(|batch| batch.len() == 1 || batch.iter().sum::<usize>() <= 4), "{batches:?}");
    }

    #[tokio::test]
    async fn a_full_queue_refuses_at_once() {
        let (runner, go, _seen) = start(Bounds { queue: 2, batch_rows: 1 });
        let ask = |_| {
            let runner = runner.clone();
            tokio::spawn(async move { answer(&runner, 1).await })
        };
        let tasks: Vec<_> = (0..6).map(ask).collect();
        // Nothing is computed yet: one at the model and two in the queue, or the model has not even begun.
        while tasks.iter().filter(|task| task.is_finished()).count() < 3 {
            tokio::task::yield_now().await;
        }
        (0..6).for_each(|_| go.send(()).expect("the model listens"));
        let mut refused = 0;
        for task in tasks {
            match task.await.expect("no panic") {
                Ok(_) => {}
                Err(RunError::Full) => refused += 1,
                Err(other) => panic!("{other}"),
            }
        }
        assert!((3..=4).contains(&refused), "{refused}");
    }

    #[tokio::test]
    async fn the_expired_and_the_abandoned_are_not_computed() {
        let (runner, go, seen) = start(Bounds { queue: 16, batch_rows: 1 });
        let holding = tokio::spawn({
            let runner = runner.clone();
            async move { answer(&runner, 1).await }
        });
        settled(&runner, 1).await;
        let expired = tokio::spawn({
            let runner = runner.clone();
            async move { runner.run(rows(2), Some(Instant::now())).await.map(|_| ()) }
        });
        settled(&runner, 2).await;
        let abandoned = tokio::spawn({
            let runner = runner.clone();
            async move { answer(&runner, 3).await }
        });
        settled(&runner, 3).await;
        abandoned.abort();
        assert!(abandoned.await.expect_err("aborted").is_cancelled());
        (0..2).for_each(|_| go.send(()).expect("the model listens"));
        assert!(holding.await.expect("no panic").is_ok());
        assert!(matches!(expired.await.expect("no panic"), Err(RunError::Expired)));
        assert!(answer(&runner, 4).await.is_ok());
        drop((runner, go));
        assert_eq!(seen.iter().collect::<Vec<_>>().concat(), [1, 4]);
    }

    #[tokio::test]
    async fn a_failure_and_a_panic_cost_their_batch_only() {
        let (runner, go, _seen) = start(Bounds { queue: 16, batch_rows: 1 });
        (0..3).for_each(|_| go.send(()).expect("the model listens"));
        assert!(matches!(answer(&runner, 13).await, Err(RunError::Failed(_))));
        assert!(matches!(answer(&runner, 7).await, Err(RunError::Failed(_))));
        assert_eq!(answer(&runner, 2).await.expect("computed"), Data::Int64(vec![2]));
        assert_eq!(runner.waiting(), 0);
    }

    #[test]
    fn a_model_that_does_not_load_says_why() {
        let started = Runner::start("bad", Bounds { queue: 1, batch_rows: 1 }, || Err("no such file".into()));
        assert_eq!(started.err().as_deref(), Some("no such file"));
    }
}
