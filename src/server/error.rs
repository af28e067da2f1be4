//! What a client is told when a request fails: OpenAI's error object with the right status.
//! A fault that would repeat on every replica is a 4xx; 5xx invites routers to try elsewhere.

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use crate::{Error, engine::EngineError, llm::FilesError};

/// A failed request.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// Cause and cure, one sentence.
    pub message: String,
    /// The request's field at fault.
    pub param: Option<&'static str>,
}

impl ApiError {
    /// An error without a field at fault.
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None }
    }

    /// 400 because of one field.
    pub fn field(param: &'static str, message: impl Into<String>) -> Self {
        Self { status: StatusCode::BAD_REQUEST, message: message.into(), param: Some(param) }
    }

    /// 400 because of a field that OpenAI or vLLM know and this server does not offer.
    pub fn unsupported(param: &'static str) -> Self {
        Self::field(param, format!("{param} is not supported here; leave it out"))
    }

    /// 503: another replica, or this one later, may take the request.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, message)
    }

    /// The error of a request whose `param` field holds the prompt.
    pub(super) fn of_prompt(error: &Error, param: &'static str) -> Self {
        match error {
            Error::Text(_) | Error::Files(FilesError::NoTemplate) => {
                Self::field(param, error.to_string())
            }
            Error::Files(FilesError::NoTokenizer { .. }) => no_tokenizer(),
            Error::Engine(EngineError::QueueFull { .. }) => Self::unavailable(error.to_string()),
            Error::Engine(EngineError::NonFinite) => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
            }
            Error::Engine(EngineError::Mask) => {
                Self::new(StatusCode::BAD_REQUEST, error.to_string())
            }
            Error::Engine(EngineError::Sampling { name, .. }) => {
                Self::field(name, error.to_string())
            }
            Error::Engine(_) => Self::field(param, error.to_string()),
            // Messages of devices and files may name paths and drivers: they stay in the log.
            _ => Self::new(StatusCode::INTERNAL_SERVER_ERROR, "the engine failed; try again"),
        }
    }

    /// vLLM's name of the kind of error.
    fn kind(&self) -> &'static str {
        match self.status.as_u16() {
            400 | 411 | 413 | 415 | 431 => "BadRequestError",
            401 => "authentication_error",
            403 => "PermissionDeniedError",
            404 => "NotFoundError",
            405 => "MethodNotAllowedError",
            408 | 504 => "Timeout",
            422 => "UnprocessableEntityError",
            429 => "rate_limit_error",
            501 => "NotImplementedError",
            503 => "ServiceUnavailable",
            _ => "InternalServerError",
        }
    }

    /// `{"error": {message, type, param, code}}`.
    pub fn body(&self) -> Value {
        json!({"error": {
            "message": self.message,
            "type": self.kind(),
            "param": self.param,
            "code": self.status.as_u16(),
        }})
    }
}

/// 400 of a model without tokenizer.json.
pub(super) fn no_tokenizer() -> ApiError {
    let message = "this model has no tokenizer; send the prompt as token ids to /v1/completions";
    ApiError::new(StatusCode::BAD_REQUEST, message)
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
