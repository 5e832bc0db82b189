//! Refusals: one kind for all protocols, said in the words of the one that was spoken.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header::RETRY_AFTER};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use crate::repository::Refused;
use crate::runner::RunError;

/// Which API was spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dialect {
    Oip,
    OpenAi,
}

impl Dialect {
    pub(crate) fn of(path: &str) -> Dialect {
        if path.starts_with("/v1/") { Dialect::OpenAi } else { Dialect::Oip }
    }
}

/// A refusal.
#[derive(Debug)]
pub(crate) struct Error {
    status: StatusCode,
    dialect: Dialect,
    message: String,
}

impl Error {
    pub(crate) fn new(status: StatusCode, dialect: Dialect, message: impl Into<String>) -> Error {
        Error { status, dialect, message: message.into() }
    }

    /// The request is wrong, and how.
    pub(crate) fn wrong(dialect: Dialect, message: impl Into<String>) -> Error {
        Error::new(StatusCode::BAD_REQUEST, dialect, message)
    }

    pub(crate) fn no_model(dialect: Dialect, name: &str, version: Option<&str>) -> Error {
        let version = version.map(|version| format!(" of version {version:.20}")).unwrap_or_default();
        Error::new(StatusCode::NOT_FOUND, dialect, format!("there is no model `{name:.100}`{version} here"))
    }

    /// Ours, not the request's.
    pub(crate) fn internal(message: impl Into<String>) -> Error {
        Error::new(StatusCode::INTERNAL_SERVER_ERROR, Dialect::Oip, message)
    }

    /// More than the worker takes at once.
    pub(crate) fn overloaded(dialect: Dialect) -> Error {
        Error::new(StatusCode::SERVICE_UNAVAILABLE, dialect, "the worker is at its limit of requests in flight")
    }

    #[must_use]
    pub(crate) fn in_dialect(self, dialect: Dialect) -> Error {
        Error { dialect, ..self }
    }
}

impl From<RunError> for Error {
    fn from(error: RunError) -> Error {
        let (status, message) = match &error {
            RunError::Full | RunError::Gone => (StatusCode::SERVICE_UNAVAILABLE, error.to_string()),
            RunError::Expired => (StatusCode::GATEWAY_TIMEOUT, error.to_string()),
            // The reason may name files and code of the model's makers: it is in the log.
            RunError::Failed(_) => (
                StatusCode::INTERNAL_SERVER_ERROR,
                "the model failed on this input; the worker's log says why".to_owned(),
            ),
        };
        Error::new(status, Dialect::Oip, message)
    }
}

impl From<Refused> for Error {
    fn from(refused: Refused) -> Error {
        let (status, message) = match refused {
            Refused::Unknown(message) => (StatusCode::NOT_FOUND, message),
            Refused::Bad(message) => (StatusCode::BAD_REQUEST, message),
        };
        Error::new(status, Dialect::Oip, message)
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let body = match self.dialect {
            Dialect::Oip => json!({ "error": self.message }),
            Dialect::OpenAi => {
                let kind = if self.status.is_client_error() { "invalid_request_error" } else { "server_error" };
                json!({ "error": { "message": self.message, "type": kind, "param": null, "code": null } })
            }
        };
        let mut response = (self.status, Json(body)).into_response();
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

impl From<Error> for tonic::Status {
    fn from(error: Error) -> tonic::Status {
        let code = match error.status {
            StatusCode::BAD_REQUEST => tonic::Code::InvalidArgument,
            StatusCode::UNAUTHORIZED => tonic::Code::Unauthenticated,
            StatusCode::FORBIDDEN => tonic::Code::PermissionDenied,
            StatusCode::NOT_FOUND => tonic::Code::NotFound,
            StatusCode::SERVICE_UNAVAILABLE => tonic::Code::ResourceExhausted,
            StatusCode::GATEWAY_TIMEOUT => tonic::Code::DeadlineExceeded,
            _ => tonic::Code::Internal,
        };
        tonic::Status::new(code, error.message)
    }
}
