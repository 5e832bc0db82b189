//! A model's threads: one bounded queue in front of all its instances, batches of what waits, replies.

use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::{Condvar, Mutex};
use tokio::sync::oneshot;

use crate::batch::{Decision, Policy, Waiting, decide};
use crate::runtime::{Failed, Input, Runtime};
use crate::statistics::Statistics;
use crate::tensor::Tensor;

/// How a model's work is bounded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// Requests that may wait; more are refused at once.
    pub(crate) queue: usize,
    /// Copies of the model that compute at once.
    pub(crate) instances: usize,
    /// What is computed together.
    pub(crate) batch: Policy,
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
    /// The deadline passed.
    #[error("the deadline passed before the model had answered")]
    Expired,
    /// The model failed on this input.
    #[error(transparent)]
    Failed(#[from] Failed),
    /// The model's threads are gone.
    #[error("the model is not running")]
    Gone,
}

struct Job {
    input: Input,
    /// The input's rows, cost and class, and when it came: counted once.
    waiting: Waiting,
    queued: SystemTime,
    reply: oneshot::Sender<Result<Done, RunError>>,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    /// Instances that wait for work.
    idle: usize,
    /// Requests that are being computed.
    computing: usize,
    /// No handle is left: what waits is still computed, and then the threads end.
    closed: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
    statistics: Statistics,
    bounds: Bounds,
}

/// A handle to a running model. Its threads end with it, once nothing waits any more.
pub(crate) struct Runner {
    shared: Arc<Shared>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Drop for Runner {
    fn drop(&mut self) {
        self.shared.queue.lock().closed = true;
        self.shared.wake.notify_all();
    }
}

impl Runner {
    /// Loads each instance of a model on a thread of its own and waits until all can compute.
    ///
    /// # Errors
    /// What kept it from loading.
    pub(crate) fn start(
        name: &str,
        bounds: Bounds,
        load: impl Fn() -> Result<Box<dyn Runtime>, String> + Send + Sync + 'static,
    ) -> Result<Runner, String> {
        let shared = Shared {
            queue: Mutex::new(Queue::default()),
            wake: Condvar::new(),
            statistics: Statistics::default(),
            bounds,
        };
        let mut runner = Runner { shared: Arc::new(shared), threads: Vec::new() };
        let load = Arc::new(load);
        let (loaded, loading) = std::sync::mpsc::channel();
        for at in 0..bounds.instances {
            let (load, shared, loaded) = (Arc::clone(&load), Arc::clone(&runner.shared), loaded.clone());
            let run = move || match load() {
                Ok(runtime) => {
                    // The starter waits for this; if it has gone, the queue is closed and the thread ends.
                    let _ = loaded.send(Ok(()));
                    drop(loaded);
                    work(runtime, &shared);
                }
                Err(error) => drop(loaded.send(Err(error))),
            };
            let thread = std::thread::Builder::new().name(format!("model-{name}-{at}"));
            runner.threads.push(thread.spawn(run).map_err(|error| error.to_string())?);
        }
        drop(loaded);
        for _ in 0..bounds.instances {
            loading.recv().map_err(|_| "a model's thread ended while loading".to_owned())??;
        }
        Ok(runner)
    }

    /// Requests that wait or are being computed, and of these the ones that wait.
    pub(crate) fn load(&self) -> (usize, usize) {
        let queue = self.shared.queue.lock();
        (queue.jobs.len() + queue.computing, queue.jobs.len())
    }

    /// What it has done so far.
    pub(crate) fn statistics(&self) -> &Statistics {
        &self.shared.statistics
    }

    /// Lets its threads end, once nothing waits any more, and gives them away to be waited for.
    pub(crate) fn stop(mut self) -> Vec<std::thread::JoinHandle<()>> {
        std::mem::take(&mut self.threads)
    }

    /// Runs one request. Dropping the future before its turn takes it out of the queue.
    ///
    /// # Errors
    /// See [`RunError`].
    pub(crate) async fn run(&self, input: Input, deadline: Option<Instant>) -> Result<Done, RunError> {
        let (reply, result) = oneshot::channel();
        let (rows, cost, class) = (input.rows(), input.cost(), input.class());
        let waiting = Waiting { rows, cost, class, since: Instant::now(), deadline };
        let job = Job { input, waiting, queued: SystemTime::now(), reply };
        {
            let mut queue = self.shared.queue.lock();
            if queue.jobs.len() >= self.shared.bounds.queue {
                // Those whose clients have left hold no place against those who wait.
                sweep(&mut queue.jobs, Instant::now());
            }
            if queue.jobs.len() >= self.shared.bounds.queue {
                return Err(RunError::Full);
            }
            queue.jobs.push_back(job);
        }
        self.shared.wake.notify_one();
        let answered = async { result.await.unwrap_or(Err(RunError::Gone)) };
        match deadline {
            // Not only when an instance comes round: it may be busy for longer than the client waits.
            Some(deadline) => {
                tokio::time::timeout_at(deadline.into(), answered).await.unwrap_or(Err(RunError::Expired))
            }
            None => answered.await,
        }
    }
}

/// Takes out what nobody waits for: computed would be for nobody.
fn sweep(jobs: &mut VecDeque<Job>, now: Instant) {
    let expired = |job: &Job| job.waiting.deadline.is_some_and(|deadline| deadline <= now);
    if !jobs.iter().any(|job| job.reply.is_closed() || expired(job)) {
        return;
    }
    for job in std::mem::take(jobs) {
        if expired(&job) {
            // The client may have left just now.
            let _ = job.reply.send(Err(RunError::Expired));
        } else if !job.reply.is_closed() {
            jobs.push_back(job);
        }
    }
}

/// Computes until the queue is closed and empty.
fn work(mut runtime: Box<dyn Runtime>, shared: &Shared) {
    while let Some(batch) = next(shared) {
        let size = batch.len();
        compute(&mut *runtime, batch, shared);
        shared.queue.lock().computing -= size;
    }
}

/// Waits for the next batch; `None` when there will be none.
fn next(shared: &Shared) -> Option<Vec<Job>> {
    let mut queue = shared.queue.lock();
    queue.idle += 1;
    let batch = loop {
        let now = Instant::now();
        sweep(&mut queue.jobs, now);
        // Nobody new will come to a closed queue, so nobody is waited for.
        let delay = if queue.closed { Duration::ZERO } else { shared.bounds.batch.delay };
        let policy = Policy { delay, ..shared.bounds.batch };
        match decide(queue.jobs.iter().map(|job| job.waiting), policy, queue.idle, now) {
            Decision::Take(count) => break Some(queue.jobs.drain(..count).collect::<Vec<_>>()),
            Decision::Wait(None) if queue.closed => break None,
            Decision::Wait(None) => shared.wake.wait(&mut queue),
            Decision::Wait(Some(until)) => drop(shared.wake.wait_until(&mut queue, until)),
        }
    };
    queue.idle -= 1;
    queue.computing += batch.as_ref().map_or(0, Vec::len);
    if !queue.jobs.is_empty() {
        // One call woke this thread; what is left over is for another.
        shared.wake.notify_one();
    }
    batch
}

fn compute(runtime: &mut dyn Runtime, batch: Vec<Job>, shared: &Shared) {
    let taken = SystemTime::now();
    let size = batch.len();
    let (inputs, replies): (Vec<Input>, Vec<_>) =
        batch.into_iter().map(|job| (job.input, (job.reply, job.queued, job.waiting))).unzip();
    let (began, clock) = (SystemTime::now(), Instant::now());
    // A panic below costs this batch, not the model's thread.
    let results = std::panic::catch_unwind(AssertUnwindSafe(|| runtime.run(&inputs)));
    let (ended, took) = (SystemTime::now(), clock.elapsed());
    let results =
        results.unwrap_or_else(|_| inputs.iter().map(|_| Err(Failed("the runtime panicked".into()))).collect());
    debug_assert_eq!(results.len(), size, "a runtime answers each request of its batch");
    let rows: usize = replies.iter().map(|(_, _, waiting)| waiting.rows).sum();
    let cost: usize = replies.iter().map(|(_, _, waiting)| waiting.cost).sum();
    shared.statistics.batch(rows, took);
    for (result, (reply, queued, waiting)) in results.into_iter().zip(replies) {
        let times = Times { queued, taken, began, ended };
        let done = result.map(|outputs| Done { outputs, times, batch: size }).map_err(RunError::Failed);
        if reply.send(done).is_err() {
            // Its client left, or its deadline passed, while it was computed.
            shared.statistics.wasted(took.mul_f64(waiting.cost as f64 / cost.max(1) as f64));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use bytes::Bytes;

    use super::*;
    use crate::tensor::Datatype;

    /// Tells how many rows each request had; computes a batch only when let.
    struct Held {
        let_go: Arc<Mutex<Receiver<()>>>,
        batches: Sender<Vec<usize>>,
    }

    impl Runtime for Held {
        fn run(&mut self, batch: &[Input]) -> Vec<Result<Vec<Tensor>, Failed>> {
            self.let_go.lock().recv().expect("the test lets it go");
            self.batches.send(batch.iter().map(Input::rows).collect()).expect("the test listens");
            batch
                .iter()
                .map(|input| {
                    let rows = input.rows();
                    if rows == 13 {
                        return Err(Failed("thirteen".into()));
                    }
                    assert_ne!(rows, 7, "a panic in the runtime");
                    let data = Bytes::copy_from_slice(&(rows as u64).to_le_bytes());
                    Ok(vec![Tensor { name: "n".into(), datatype: Datatype::Uint64, shape: vec![1], data }])
                })
                .collect()
        }
    }

    fn start(queue: usize, batch_rows: usize) -> (Arc<Runner>, Sender<()>, Receiver<Vec<usize>>) {
        started(queue, 1, Policy { rows_max: batch_rows, cost_max: 1000, delay: Duration::ZERO })
    }

    fn started(queue: usize, instances: usize, batch: Policy) -> (Arc<Runner>, Sender<()>, Receiver<Vec<usize>>) {
        let ((go, let_go), (batches, seen)) = (channel(), channel());
        let let_go = Arc::new(Mutex::new(let_go));
        let load = move || -> Result<Box<dyn Runtime>, String> {
            Ok(Box::new(Held { let_go: Arc::clone(&let_go), batches: batches.clone() }))
        };
        let runner = Runner::start("held", Bounds { queue, instances, batch }, load).expect("loads");
        (Arc::new(runner), go, seen)
    }

    fn rows(count: usize) -> Input {
        Input::Tokens(vec![vec![1]; count])
    }

    async fn answer(runner: &Runner, count: usize) -> Result<u64, RunError> {
        let done = runner.run(rows(count), None).await?;
        Ok(u64::from_le_bytes(done.outputs[0].data[..].try_into().expect("eight bytes")))
    }

    fn ask(runner: &Arc<Runner>, count: usize) -> tokio::task::JoinHandle<Result<u64, RunError>> {
        let runner = Arc::clone(runner);
        tokio::spawn(async move { answer(&runner, count).await })
    }

    /// Runs the futures until they wait, so that their requests are in the queue in order.
    async fn settled(runner: &Runner, in_flight: usize) {
        while runner.load().0 < in_flight {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn what_waits_is_batched_in_order_up_to_the_bound() {
        let (runner, go, seen) = start(16, 4);
        let mut tasks = Vec::new();
        for (at, count) in [1, 2, 2, 1, 9].into_iter().enumerate() {
            tasks.push((count, ask(&runner, count)));
            settled(&runner, at + 1).await;
        }
        (0..5).for_each(|_| go.send(()).expect("the model listens"));
        for (count, task) in tasks {
            assert_eq!(task.await.expect("no panic").expect("computed"), count as u64);
        }
        drop(runner);
        let batches: Vec<Vec<usize>> = seen.iter().collect();
        assert_eq!(batches.concat(), [1, 2, 2, 1, 9], "nothing lost, doubled or reordered");
        assert!(batches.iter().all(|batch| batch.len() == 1 || batch.iter().sum::<usize>() <= 4), "{batches:?}");
    }

    #[tokio::test]
    async fn several_instances_and_a_delay_lose_and_mix_up_nothing() {
        let batch = Policy { rows_max: 8, cost_max: 1000, delay: Duration::from_millis(2) };
        let (runner, go, seen) = started(1000, 3, batch);
        (0..2000).for_each(|_| go.send(()).expect("the model listens"));
        // Bursts, so that instances wait for company, find too much, and sleep in between.
        for burst in 0..40 {
            let tasks: Vec<_> = (0..burst % 9).map(|at| (at % 5 + 1, ask(&runner, at % 5 + 1))).collect();
            for (count, task) in tasks {
                assert_eq!(task.await.expect("no panic").expect("computed"), count as u64);
            }
        }
        while runner.load() != (0, 0) {
            tokio::task::yield_now().await;
        }
        drop((runner, go));
        let batches: Vec<Vec<usize>> = seen.iter().collect();
        assert_eq!(batches.concat().len(), (0..40).map(|burst| burst % 9).sum::<usize>());
        assert!(batches.iter().all(|batch| batch.iter().sum::<usize>() <= 8), "{batches:?}");
        assert!(batches.iter().any(|batch| batch.len() > 1), "nothing was ever batched");
    }

    #[tokio::test]
    async fn a_deadline_is_answered_though_the_model_is_busy() {
        let (runner, go, seen) = start(4, 1);
        let soon = Instant::now() + Duration::from_millis(20);
        let holding = runner.run(rows(1), Some(soon)).await;
        assert!(matches!(holding, Err(RunError::Expired)) && soon.elapsed() < Duration::from_secs(5));
        go.send(()).expect("the model listens");
        seen.recv().expect("computed");
        while runner.load().0 > 0 {
            tokio::task::yield_now().await;
        }
        assert!(runner.statistics().snapshot().wasted > Duration::ZERO);
    }

    #[tokio::test]
    async fn a_full_queue_refuses_at_once() {
        let (runner, go, _seen) = start(2, 1);
        let tasks: Vec<_> = (0..6).map(|_| ask(&runner, 1)).collect();
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
    async fn the_expired_and_the_abandoned_are_not_computed_and_hold_no_place() {
        let (runner, go, seen) = start(2, 1);
        let holding = ask(&runner, 1);
        while runner.load() != (1, 0) {
            tokio::task::yield_now().await;
        }
        let expired = tokio::spawn({
            let runner = Arc::clone(&runner);
            async move { runner.run(rows(2), Some(Instant::now())).await.map(|_| ()) }
        });
        settled(&runner, 2).await;
        let abandoned = ask(&runner, 3);
        settled(&runner, 3).await;
        abandoned.abort();
        assert!(abandoned.await.expect_err("aborted").is_cancelled());
        // The queue of two is full of requests that nobody waits for: the next finds a place all the same.
        let next = ask(&runner, 4);
        assert!(matches!(expired.await.expect("no panic"), Err(RunError::Expired)));
        (0..2).for_each(|_| go.send(()).expect("the model listens"));
        assert!(holding.await.expect("no panic").is_ok());
        assert!(next.await.expect("no panic").is_ok());
        drop(runner);
        assert_eq!(seen.iter().collect::<Vec<_>>().concat(), [1, 4]);
    }

    #[tokio::test]
    async fn what_is_computed_for_nobody_is_counted() {
        let (runner, go, seen) = start(2, 1);
        let leaving = ask(&runner, 1);
        while runner.load() != (1, 0) {
            tokio::task::yield_now().await;
        }
        leaving.abort();
        assert!(leaving.await.expect_err("aborted").is_cancelled());
        go.send(()).expect("the model listens");
        seen.recv().expect("computed");
        while runner.load().0 > 0 {
            tokio::task::yield_now().await;
        }
        assert!(runner.statistics().snapshot().wasted > Duration::ZERO);
    }

    #[tokio::test]
    async fn a_failure_and_a_panic_cost_their_batch_only() {
        let (runner, go, _seen) = start(16, 1);
        (0..3).for_each(|_| go.send(()).expect("the model listens"));
        assert!(matches!(answer(&runner, 13).await, Err(RunError::Failed(_))));
        assert!(matches!(answer(&runner, 7).await, Err(RunError::Failed(_))));
        assert_eq!(answer(&runner, 2).await.expect("computed"), 2);
    }

    #[tokio::test]
    async fn what_waits_when_the_last_handle_goes_is_still_computed() {
        let (runner, go, seen) = start(16, 1);
        let waiting = [ask(&runner, 1), ask(&runner, 2)];
        settled(&runner, 2).await;
        drop(runner);
        (0..2).for_each(|_| go.send(()).expect("the model listens"));
        for task in waiting {
            assert!(task.await.expect("no panic").is_ok());
        }
        // The threads have ended: nobody sends any more.
        assert_eq!(seen.iter().count(), 2);
    }

    #[test]
    fn a_model_that_does_not_load_says_why() {
        let batch = Policy { rows_max: 1, cost_max: 1, delay: Duration::ZERO };
        let started = Runner::start("bad", Bounds { queue: 1, instances: 2, batch }, || Err("no such file".into()));
        assert_eq!(started.err().as_deref(), Some("no such file"));
    }
}
