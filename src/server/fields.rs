//! Reads the fields of a JSON request one by one, so that each error names its field. Fields that
//! nobody asks for are ignored, as OpenAI and vLLM do: routers add their own.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::ApiError;

/// The members of a JSON object; null counts as absent.
#[derive(Debug)]
pub(super) struct Fields(Map<String, Value>);

impl Fields {
    /// Parses a request body.
    pub(super) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let bad = |why: String| ApiError::new(axum::http::StatusCode::BAD_REQUEST, why);
        match serde_json::from_slice(body) {
            Ok(Value::Object(mut map)) => {
                map.retain(|_, value| !value.is_null());
                Ok(Self(map))
            }
            Ok(_) => Err(bad("the body is JSON but not an object; send an object".into())),
            Err(error) => Err(bad(format!("the body is not valid JSON: {error}"))),
        }
    }

    pub(super) fn of(value: Value, name: &'static str) -> Result<Self, ApiError> {
        match value {
            Value::Object(mut map) => {
                map.retain(|_, value| !value.is_null());
                Ok(Self(map))
            }
            _ => Err(ApiError::field(name, format!("{name} must be an object"))),
        }
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name)
    }

    pub(super) fn bool(&mut self, name: &'static str) -> Result<Option<bool>, ApiError> {
        let wrong = || ApiError::field(name, format!("{name} must be true or false"));
        self.take(name).map(|v| v.as_bool().ok_or_else(wrong)).transpose()
    }

    pub(super) fn int(
        &mut self,
        name: &'static str,
        range: RangeInclusive<i64>,
    ) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        whole(&value).filter(|n| range.contains(n)).map(Some).ok_or_else(|| {
            let (low, high) = (range.start(), range.end());
            ApiError::field(name, format!("{name} must be an integer from {low} to {high}"))
        })
    }

    pub(super) fn float(
        &mut self,
        name: &'static str,
        range: RangeInclusive<f64>,
    ) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        value.as_f64().filter(|n| range.contains(n)).map(|n| Some(n as f32)).ok_or_else(|| {
            let (low, high) = (range.start(), range.end());
            ApiError::field(name, format!("{name} must be a number from {low} to {high}"))
        })
    }

    pub(super) fn string(&mut self, name: &'static str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(ApiError::field(name, format!("{name} must be a string"))),
        }
    }

    /// An array of token ids.
    pub(super) fn ids(
        &mut self,
        name: &'static str,
        max: usize,
    ) -> Result<Option<Vec<u32>>, ApiError> {
        self.take(name).map(|value| token_ids(&value, name, max)).transpose()
    }

    /// Refuses fields that would change the answer but are not offered; `harmless` values pass.
    pub(super) fn refuse(
        &mut self,
        name: &'static str,
        harmless: impl Fn(&Value) -> bool,
    ) -> Result<(), ApiError> {
        match self.take(name) {
            Some(value) if !harmless(&value) => Err(ApiError::unsupported(name)),
            _ => Ok(()),
        }
    }
}

/// 3.0 is an integer too: JSON does not tell them apart.
fn whole(value: &Value) -> Option<i64> {
    let float = value.as_f64().filter(|f| f.fract() == 0.0 && f.abs() < 9e15);
    value.as_i64().or(float.map(|f| f as i64))
}

/// At most `max` token ids.
pub(super) fn token_ids(
    value: &Value,
    name: &'static str,
    max: usize,
) -> Result<Vec<u32>, ApiError> {
    let id = |v: &Value| whole(v).and_then(|id| u32::try_from(id).ok());
    let ids = value.as_array().filter(|ids| ids.len() <= max);
    ids.and_then(|ids| ids.iter().map(id).collect()).ok_or_else(|| {
        ApiError::field(name, format!("{name} must be an array of at most {max} token ids"))
    })
}
