//! A hung endpoint told from a slow one, and when another attempt starts beside a slow one.
//!
//! Both are silent. A server that computes answers a question about its health meanwhile; one that hangs does not. So after
//! a silence it is asked, and what is pending there goes elsewhere only if it does not answer that either. Waiting for a
//! timeout instead would cost every pending client that timeout; moving at the first silence would double the load of a
//! worker that is only busy.
//!
//! One that answers is slow. Only when it has taken several times as long as nearly all others did is the request sent to
//! another as well ("The Tail at Scale", Dean and Barroso, 2013, with a question before the second request).

use std::time::Duration;

use crate::Time;
use crate::load::ModelLive;

/// How long to wait.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Silence after which the endpoint is asked.
    pub silence: Duration,
    /// The longest wait for its answer.
    pub answer: Duration,
    /// From an answer to the next question, while the silence lasts.
    pub again: Duration,
    /// So many times the 99th percentile is slow.
    pub slow_factor: f32,
    /// What is slow while there are fewer than [`SAMPLES`] answers to go by.
    pub slow_unknown: Duration,
}

/// Answers from which on the percentiles of a model at an endpoint are believed.
pub const SAMPLES: u32 = 100;

/// When a hedge starts.
#[derive(Clone, Copy, Debug)]
pub struct Hedge {
    /// Never earlier.
    pub floor: Duration,
    /// Never later.
    pub ceiling: Duration,
    /// Hedges as a share of the model's requests.
    pub share: f32,
}

impl Hedge {
    /// How long to wait for the first attempt: the rolling 95th percentile, within floor and ceiling.
    pub fn delay(&self, model: Option<&ModelLive>) -> Duration {
        let p95 = model.and_then(|model| model.p95(SAMPLES)).unwrap_or(self.ceiling);
        p95.clamp(self.floor, self.ceiling.max(self.floor))
    }
}

/// What is to be done about an attempt that has not been answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// Start a hedge.
    Hedge,
    /// Ask the endpoint whether it lives.
    Ask,
    /// It lives and is slow: start another attempt beside it.
    Slow,
}

/// The watch over one attempt.
#[derive(Clone, Copy, Debug)]
pub struct Watch {
    ask_at: Time,
    again: Duration,
    /// The longest wait for an answer to the question.
    pub answer: Duration,
    slow_at: Option<Time>,
    hedge_at: Option<Time>,
    /// It has said that it lives.
    alive: bool,
}

impl Watch {
    /// Begins with the attempt. The two waits for a sign of life grow by twice the measured round trip of the network.
    pub fn new(
        began: Time,
        rules: &Rules,
        round_trip_ms: Option<f32>,
        model: Option<&ModelLive>,
        hedge_after: Option<Duration>,
    ) -> Watch {
        let margin = Duration::try_from_secs_f32(round_trip_ms.unwrap_or(0.0) * 2.0 / 1000.0).unwrap_or_default();
        let p99 = model.and_then(|model| model.p99(SAMPLES));
        let slow = p99.map_or(rules.slow_unknown, |p99| p99.mul_f32(rules.slow_factor));
        Watch {
            ask_at: began + rules.silence + margin,
            again: rules.again,
            answer: rules.answer + margin,
            slow_at: Some(began + slow.max(rules.silence) + margin),
            hedge_at: hedge_after.map(|delay| began + delay),
            alive: false,
        }
    }

    /// When something is due next.
    pub fn next(&self) -> Time {
        let slow_at = self.slow_at.filter(|_| self.alive);
        [self.hedge_at, slow_at].into_iter().flatten().fold(self.ask_at, Time::min)
    }

    /// What is due now, each once.
    pub fn due(&mut self, now: Time) -> Option<Due> {
        if self.hedge_at.is_some_and(|at| at <= now) {
            self.hedge_at = None;
            return Some(Due::Hedge);
        }
        if self.alive && self.slow_at.is_some_and(|at| at <= now) {
            self.slow_at = None;
            return Some(Due::Slow);
        }
        (self.ask_at <= now).then_some(Due::Ask)
    }

    /// The endpoint has said that it lives.
    pub fn lives(&mut self, now: Time) {
        self.alive = true;
        self.ask_at = now + self.again;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn at(n: u64) -> Time {
        Time(n * 1_000_000)
    }

    fn rules() -> Rules {
        Rules { silence: ms(100), answer: ms(100), again: ms(500), slow_factor: 4.0, slow_unknown: ms(1000) }
    }

    #[test]
    fn it_is_asked_first_and_only_one_that_lives_is_slow() {
        let mut watch = Watch::new(at(0), &rules(), None, None, None);
        assert_eq!((watch.next(), watch.due(at(99)), watch.due(at(100))), (at(100), None, Some(Due::Ask)));
        assert_eq!(watch.due(at(5000)), Some(Due::Ask), "whoever has not said that it lives is not slow");
        watch.lives(at(120));
        assert_eq!((watch.next(), watch.due(at(619)), watch.due(at(620))), (at(620), None, Some(Due::Ask)));
        watch.lives(at(620));
        assert_eq!((watch.next(), watch.due(at(1000)), watch.due(at(1000))), (at(1000), Some(Due::Slow), None));
        assert_eq!(watch.next(), at(1120));
    }

    #[test]
    fn slow_is_four_times_the_percentile_once_there_is_one() {
        let model = ModelLive::default();
        (0..200).for_each(|_| model.answered(ms(100), at(0)));
        let _ = model.refresh(at(1));
        let mut watch = Watch::new(at(0), &rules(), None, Some(&model), None);
        watch.lives(at(100));
        let slow_at = watch.next().0 / 1_000_000;
        assert!((400..=500).contains(&slow_at), "{slow_at}");
    }

    #[test]
    fn far_endpoints_are_given_longer_and_nonsense_changes_nothing() {
        let far = Watch::new(at(0), &rules(), Some(150.0), None, None);
        assert_eq!((far.next().0 / 1_000_000, far.answer.as_millis()), (400, 400));
        for nonsense in [None, Some(f32::NAN), Some(-5.0), Some(f32::INFINITY)] {
            assert_eq!(Watch::new(at(0), &rules(), nonsense, None, None).next(), at(100));
        }
    }

    #[test]
    fn a_hedge_starts_at_the_percentile_within_its_bounds() {
        let hedge = Hedge { floor: ms(20), ceiling: ms(300), share: 0.05 };
        assert_eq!(hedge.delay(None), ms(300), "nothing is known: late rather than early");
        let model = ModelLive::default();
        (0..200).for_each(|_| model.answered(ms(1), at(0)));
        let _ = model.refresh(at(1));
        assert_eq!(hedge.delay(Some(&model)), ms(20));
        let mut watch = Watch::new(at(0), &rules(), None, None, Some(ms(20)));
        assert_eq!((watch.next(), watch.due(at(20)), watch.due(at(20))), (at(20), Some(Due::Hedge), None));
    }
}
