//! A small bounded queue for requests that find every permitted endpoint full for a moment.
//!
//! A short wait beats a refusal; a long one only moves the refusal to where it costs more. When the queue is full, the
//! request with the nearest deadline is shed: it is the one that is least likely to be answered in time.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use crate::{Time, invariant};

/// The waiting requests, first come first.
#[derive(Debug, Default)]
pub struct Waiting {
    waiters: Mutex<VecDeque<Arc<Waiter>>>,
    /// As many as there are: most requests end while nobody waits, and then take no lock.
    count: AtomicUsize,
    shed: AtomicUsize,
}

#[derive(Debug)]
struct Waiter {
    deadline: Time,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    Waiting(Option<Waker>),
    /// It may look again; so many others may be passed the turn if it is of no use to it.
    Turn(usize),
    Shed,
}

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Something has been released. If it is of no use here, [`Waiting::pass`] it on, so often.
    Look(usize),
    /// The queue was full, and this deadline the nearest.
    Shed,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Waiting {
    /// Joins the queue of at most `bound`. Dropping the place leaves it.
    pub fn join(self: &Arc<Self>, deadline: Time, bound: usize) -> Place {
        let waiter = Arc::new(Waiter { deadline, state: Mutex::new(State::Waiting(None)) });
        let mut waiters = lock(&self.waiters);
        waiters.push_back(Arc::clone(&waiter));
        // More than one, if the bound has been lowered.
        while waiters.len() > bound {
            let nearest = waiters.iter().enumerate().min_by_key(|(_, waiter)| waiter.deadline).map(|(at, _)| at);
            let Some(shed) = nearest.and_then(|at| waiters.remove(at)) else { break };
            self.shed.fetch_add(1, Relaxed);
            shed.become_(State::Shed);
        }
        debug_assert!(invariant::is_bounded(waiters.len(), bound));
        self.count.store(waiters.len(), Relaxed);
        Place { waiting: Arc::clone(self), waiter }
    }

    /// A request ended somewhere: whoever waits longest may look again.
    pub fn released(&self) {
        if self.count.load(Relaxed) > 0 {
            self.turn(usize::MAX);
        }
    }

    /// What was released was of no use to the one whose turn it was: the next may look, if anybody is left to.
    pub fn pass(&self, turns: usize) {
        if turns > 0 {
            self.turn(turns);
        }
    }

    fn turn(&self, turns: usize) {
        let mut waiters = lock(&self.waiters);
        let next = waiters.pop_front();
        self.count.store(waiters.len(), Relaxed);
        // Everybody who waits now may be asked once, and nobody twice.
        let others = waiters.len().min(turns.saturating_sub(1));
        drop(waiters);
        if let Some(next) = next {
            next.become_(State::Turn(others));
        }
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.count.load(Relaxed)
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many have been shed so far.
    pub fn shed(&self) -> usize {
        self.shed.load(Relaxed)
    }
}

impl Waiter {
    fn become_(&self, state: State) {
        if let State::Waiting(Some(waker)) = std::mem::replace(&mut *lock(&self.state), state) {
            waker.wake();
        }
    }
}

/// One place in the queue; a future that ends when it is this one's turn.
#[derive(Debug)]
pub struct Place {
    waiting: Arc<Waiting>,
    waiter: Arc<Waiter>,
}

impl Future for Place {
    type Output = Turn;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Turn> {
        let mut state = lock(&self.waiter.state);
        match &mut *state {
            State::Waiting(waker) => {
                *waker = Some(context.waker().clone());
                Poll::Pending
            }
            State::Turn(others) => {
                let others = *others;
                // Taken: the drop below has nothing to pass on.
                *state = State::Shed;
                Poll::Ready(Turn::Look(others))
            }
            State::Shed => Poll::Ready(Turn::Shed),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut waiters = lock(&self.waiting.waiters);
        waiters.retain(|waiter| !Arc::ptr_eq(waiter, &self.waiter));
        self.waiting.count.store(waiters.len(), Relaxed);
        drop(waiters);
        // A turn that came as its owner left is somebody else's.
        let unused = match &*lock(&self.waiter.state) {
            State::Turn(others) => Some(*others),
            State::Waiting(_) | State::Shed => None,
        };
        if let Some(others) = unused {
            self.waiting.pass(others.max(1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn poll(place: &mut Place) -> Poll<Turn> {
        Pin::new(place).poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn first_come_first_and_the_nearest_deadline_is_shed() {
        let waiting = Arc::<Waiting>::default();
        let mut places: Vec<Place> = [50, 20, 90].map(|deadline| waiting.join(Time(deadline), 3)).into();
        let mut fourth = waiting.join(Time(70), 3);
        assert_eq!(poll(&mut places[1]), Poll::Ready(Turn::Shed));
        assert_eq!((waiting.len(), waiting.shed()), (3, 1));
        // The newest may be the one.
        let mut fifth = waiting.join(Time(10), 3);
        assert_eq!(poll(&mut fifth), Poll::Ready(Turn::Shed));
        waiting.released();
        assert_eq!(poll(&mut places[0]), Poll::Ready(Turn::Look(2)));
        assert_eq!(poll(&mut places[2]), Poll::Pending);
        // Of no use to the first: the next two may look, and then it is enough.
        waiting.pass(2);
        assert_eq!(poll(&mut places[2]), Poll::Ready(Turn::Look(1)));
        waiting.pass(1);
        assert_eq!(poll(&mut fourth), Poll::Ready(Turn::Look(0)));
        waiting.pass(0);
        assert!(waiting.is_empty());
    }

    #[test]
    fn a_turn_whose_owner_has_left_is_passed_on() {
        let waiting = Arc::<Waiting>::default();
        let first = waiting.join(Time(50), 8);
        let mut second = waiting.join(Time(60), 8);
        let third = waiting.join(Time(70), 8);
        waiting.released();
        drop((first, third));
        assert!(poll(&mut second).is_ready());
        drop(second);
        assert!(waiting.is_empty());
    }
}
