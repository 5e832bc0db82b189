//! What an attempt's outcome means: may the request go again, and what does it say about the endpoint.

/// How one attempt ended, before any byte of a response went to the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A response with this status.
    Status(u16),
    /// No connection: nothing of the request was sent.
    ConnectFailed,
    /// No connection either, for a reason of this gateway's own: no descriptor or port left, a name that could not be resolved.
    Unconnected,
    /// The endpoint let the request go unprocessed (HTTP/2's REFUSED_STREAM, a GOAWAY before it).
    Refused,
    /// The connection broke after something of the request may have been sent.
    Reset,
    /// The same while the client's body was still being sent on: the endpoint may have refused it, as one that is too large.
    CutOff,
    /// A response began and broke off, or was not whole, before any of it went to the client.
    Broken,
    /// The endpoint was silent, and did not answer a question about its health either.
    Hung,
    /// It was slow, another endpoint answered first, and it finished nothing else meanwhile.
    Outrun,
    /// Another endpoint answered first. That says nothing about this one.
    Cancelled,
    /// The endpoint answered nothing until the gateway's own deadline.
    TimedOut,
    /// Nor until one that the client chose, or while the client was still sending: that says nothing about the endpoint.
    /// A client could otherwise eject any endpoint for everybody by asking for a millisecond.
    ClientTimedOut,
    /// The client's own body broke off; the endpoint is not to blame.
    ClientBody,
}

/// What to do with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Who may try again.
    pub retry: Retry,
    /// What it says about the endpoint.
    pub endpoint: Mark,
}

/// Whether another attempt makes sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// This is the answer.
    No,
    /// Any request may whose body is still at hand: nothing of it was processed.
    Any,
    /// Only a request that is safe to do twice and whose body is still at hand.
    Replayable,
}

/// What an outcome says about the endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// It works.
    Success,
    /// It counts towards ejection.
    Failure,
    /// The same, and nobody was there: enough of it, and only a probe can find the endpoint again.
    Unreachable,
    /// It has more than it can do: it is given less, and is not ejected for it.
    Overload,
    /// It is to be ejected at once: whatever else is sent there waits in vain.
    Dead,
    /// It says nothing: a client's fault is the client's.
    None,
}

impl Outcome {
    /// Judges the outcome.
    pub fn verdict(self) -> Verdict {
        let (retry, endpoint) = match self {
            // RFC 9110, section 15.6.3: the endpoint is a gateway to something that failed.
            Outcome::Status(502) => (Retry::Replayable, Mark::Failure),
            // RFC 9110, section 15.6.4, and RFC 6585, section 4: it was not taken on, whatever it was.
            Outcome::Status(503 | 429) => (Retry::Any, Mark::Overload),
            // RFC 9110, section 15.6.5: late, but perhaps done. It may have been the client's own deadline.
            Outcome::Status(504) => (Retry::Replayable, Mark::None),
            // Any other answer, a 500 included, is the model's own: doing it again elsewhere gives it again. Nor does it
            // count: an input that a model cannot bear would otherwise eject every endpoint that it visits.
            Outcome::Status(500..) => (Retry::No, Mark::None),
            Outcome::Status(_) => (Retry::No, Mark::Success),
            Outcome::ConnectFailed => (Retry::Any, Mark::Unreachable),
            Outcome::Refused | Outcome::Unconnected => (Retry::Any, Mark::None),
            Outcome::Reset | Outcome::Broken => (Retry::Replayable, Mark::Failure),
            Outcome::CutOff => (Retry::No, Mark::None),
            Outcome::Outrun => (Retry::No, Mark::Failure),
            Outcome::Cancelled => (Retry::No, Mark::None),
            Outcome::Hung => (Retry::Replayable, Mark::Dead),
            Outcome::TimedOut => (Retry::No, Mark::Failure),
            Outcome::ClientTimedOut | Outcome::ClientBody => (Retry::No, Mark::None),
        };
        Verdict { retry, endpoint }
    }

    /// The word in traces, logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::Status(429 | 503 | 504) => "unavailable",
            Outcome::Status(..500) => "ok",
            Outcome::Status(_) => "server_error",
            Outcome::ConnectFailed => "connect_failed",
            Outcome::Refused => "refused",
            Outcome::Unconnected => "unconnected",
            Outcome::Reset => "reset",
            Outcome::CutOff => "cut_off",
            Outcome::Broken => "broken",
            Outcome::Outrun => "outrun",
            Outcome::Cancelled => "cancelled",
            Outcome::Hung => "hung",
            Outcome::TimedOut | Outcome::ClientTimedOut => "timed_out",
            Outcome::ClientBody => "client_body",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_not_sent_is_retried_without_being_replayable() {
        let all = [200, 400, 404, 429, 500, 501, 502, 503, 504].map(Outcome::Status).into_iter().chain([
            Outcome::ConnectFailed,
            Outcome::Unconnected,
            Outcome::Refused,
            Outcome::Reset,
            Outcome::Broken,
            Outcome::Hung,
            Outcome::Outrun,
            Outcome::Cancelled,
            Outcome::TimedOut,
            Outcome::ClientBody,
        ]);
        for outcome in all {
            let unprocessed = matches!(
                outcome,
                Outcome::ConnectFailed | Outcome::Unconnected | Outcome::Refused | Outcome::Status(429 | 503)
            );
            assert_eq!(outcome.verdict().retry == Retry::Any, unprocessed, "{outcome:?}");
        }
    }

    #[test]
    fn nothing_that_a_client_can_cause_by_itself_counts_against_an_endpoint() {
        let own = [500, 504, 400].map(Outcome::Status).into_iter();
        for outcome in own.chain([Outcome::CutOff, Outcome::ClientTimedOut, Outcome::ClientBody, Outcome::Cancelled]) {
            assert!(matches!(outcome.verdict().endpoint, Mark::None | Mark::Success), "{outcome:?}");
        }
    }

    #[test]
    fn overload_steers_and_does_not_eject() {
        for status in [429, 503] {
            assert_eq!(Outcome::Status(status).verdict().endpoint, Mark::Overload);
            assert_ne!(Outcome::Status(status).verdict().retry, Retry::No);
        }
    }
}
