//! Why a request is refused. Each answers: whose fault it is (by its status), and what the client may read.
//!
//! What may be tried again and what counts against an endpoint is `isochrone_core::retry`'s to say, of an attempt; by the
//! time there is an error here, nothing more will be tried.

use http::StatusCode;

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Error {
    #[error("the request is malformed: {0}")]
    Malformed(&'static str),
    #[error("the body did not arrive in time")]
    SlowBody,
    #[error("the body ended before its end")]
    BrokenBody,
    #[error("the head is larger than it may be")]
    OversizeHead,
    #[error("the body is larger than this call may be")]
    OversizeBody,
    #[error("no credentials: send an API key as `Authorization: Bearer KEY` or `x-api-key: KEY`")]
    NoKey,
    #[error("these credentials are not known")]
    UnknownKey,
    #[error("this tenant may not use this model")]
    ModelForbidden,
    #[error("models are loaded and unloaded at the worker, not through the gateway")]
    CallForbidden,
    #[error("there is nothing at this path")]
    NoRoute,
    #[error("this path takes {0}")]
    MethodNotAllowed(&'static str),
    #[error("no region serves this model")]
    UnknownModel,
    #[error("this gateway stands where this tenant's data may not be; use one inside its zones")]
    GatewayOutside,
    #[error("no region that serves this model may see this tenant's or this client's data")]
    Residency,
    #[error("no permitted region can take the request now")]
    Unavailable,
    #[error("the gateway is at its limit of requests in flight")]
    Overloaded,
    #[error("the connection to the region broke before an answer")]
    Broken,
    #[error("the request reached two endpoints that then broke off; it is not sent to a third")]
    Poisonous,
    #[error("no answer within the deadline")]
    Deadline,
    #[error("nothing is kept that could be given, and the request takes nothing else")]
    NotKept,
    #[error("something went wrong in the gateway")]
    Internal,
}

impl Error {
    /// The HTTP status.
    pub(crate) fn status(self) -> StatusCode {
        match self {
            Error::Malformed(_) | Error::BrokenBody => StatusCode::BAD_REQUEST,
            Error::SlowBody => StatusCode::REQUEST_TIMEOUT,
            Error::OversizeHead => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Error::OversizeBody => StatusCode::PAYLOAD_TOO_LARGE,
            Error::NoKey | Error::UnknownKey => StatusCode::UNAUTHORIZED,
            Error::ModelForbidden | Error::CallForbidden => StatusCode::FORBIDDEN,
            Error::NoRoute | Error::UnknownModel => StatusCode::NOT_FOUND,
            Error::MethodNotAllowed(_) => StatusCode::METHOD_NOT_ALLOWED,
            Error::GatewayOutside => StatusCode::MISDIRECTED_REQUEST,
            Error::Residency => StatusCode::UNAVAILABLE_FOR_LEGAL_REASONS,
            Error::Unavailable | Error::Overloaded => StatusCode::SERVICE_UNAVAILABLE,
            Error::Broken | Error::Poisonous => StatusCode::BAD_GATEWAY,
            // RFC 9111, section 5.2.1.7.
            Error::Deadline | Error::NotKept => StatusCode::GATEWAY_TIMEOUT,
            Error::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The gRPC status code (<https://grpc.github.io/grpc/core/md_doc_statuscodes.html>).
    pub(crate) fn grpc_code(self) -> u8 {
        match self {
            Error::Malformed(_) | Error::BrokenBody => 3,
            Error::SlowBody | Error::Deadline => 4,
            Error::UnknownModel | Error::NotKept => 5,
            Error::ModelForbidden | Error::CallForbidden | Error::Residency => 7,
            Error::OversizeHead | Error::OversizeBody | Error::Overloaded => 8,
            Error::GatewayOutside => 9,
            Error::NoRoute | Error::MethodNotAllowed(_) => 12,
            Error::Internal => 13,
            Error::Unavailable | Error::Broken | Error::Poisonous => 14,
            Error::NoKey | Error::UnknownKey => 16,
        }
    }

    /// Seconds after which it may be worth trying again.
    pub(crate) fn retry_after(self) -> Option<u32> {
        matches!(self, Error::Unavailable | Error::Overloaded).then_some(1)
    }

    /// The word for it in the OpenAI dialect's `code` and in metrics.
    pub(crate) fn code(self) -> &'static str {
        match self {
            Error::Malformed(_) => "malformed_request",
            Error::SlowBody => "slow_body",
            Error::BrokenBody => "broken_body",
            Error::OversizeHead => "oversize_head",
            Error::OversizeBody => "oversize_body",
            Error::NoKey => "no_api_key",
            Error::UnknownKey => "invalid_api_key",
            Error::ModelForbidden => "model_forbidden",
            Error::CallForbidden => "call_forbidden",
            Error::NoRoute => "no_route",
            Error::MethodNotAllowed(_) => "method_not_allowed",
            Error::UnknownModel => "model_not_found",
            Error::GatewayOutside => "gateway_outside_residency",
            Error::Residency => "residency",
            Error::Unavailable => "unavailable",
            Error::Overloaded => "overloaded",
            Error::Broken => "broken_response",
            Error::Poisonous => "poisonous_request",
            Error::Deadline => "deadline_exceeded",
            Error::NotKept => "not_kept",
            Error::Internal => "internal",
        }
    }
}

impl From<isochrone_core::residency::Refused> for Error {
    fn from(refused: isochrone_core::residency::Refused) -> Error {
        use isochrone_core::residency::Refused;
        match refused {
            Refused::UnknownModel => Error::UnknownModel,
            Refused::Residency => Error::Residency,
            Refused::GatewayOutside => Error::GatewayOutside,
        }
    }
}
