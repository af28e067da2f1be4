//! `POST /tokenize` and `/detokenize`, in vLLM's shape.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Request, State},
};
use serde_json::{Value, json};

use super::{
    ApiError, App, app::read_fields, blocking, chat_completions::read_prompt,
    sampling::check_prompt_chars, tools::Tools,
};

pub(super) async fn tokenize(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let _admission = app.admit()?;
    let mut fields = read_fields(&app, request).await?;
    app.check_model(fields.string("model")?.as_deref())?;
    let special = fields.bool("add_special_tokens")?;
    let spelled = fields.bool("return_token_strs")?.unwrap_or(false);
    let max_model_len = app.max_model_len;
    blocking(move || {
        let tokens = match fields.string("prompt")? {
            Some(_) if fields.has("messages") => {
                return Err(ApiError::field("messages", "give prompt or messages, not both"));
            }
            Some(text) => {
                check_prompt_chars(&app, &text, "prompt")?;
                let tokens = app.tokenizer()?.encode(&text, special.unwrap_or(true));
                tokens.map_err(|e| ApiError::of_prompt(&e.into(), "prompt"))?
            }
            None if !fields.has("messages") => {
                return Err(ApiError::field("prompt", "prompt or messages is missing"));
            }
            None => {
                let tools = Tools::read(&app, &mut fields)?;
                read_prompt(&app, &mut fields, tools.as_ref())?
            }
        };
        let mut body = json!({
            "count": tokens.len(),
            "max_model_len": max_model_len,
            "tokens": tokens,
            "token_strs": null,
        });
        if spelled {
            let tokenizer = app.tokenizer()?;
            let spell = |&id: &u32| tokenizer.id_to_token(id).unwrap_or_default();
            body["token_strs"] = tokens.iter().map(spell).collect();
        }
        Ok(Json(body))
    })
    .await
}

pub(super) async fn detokenize(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let _admission = app.admit()?;
    let mut fields = read_fields(&app, request).await?;
    app.check_model(fields.string("model")?.as_deref())?;
    let ids = fields.ids("tokens", 1 << 20)?;
    let ids = ids.ok_or_else(|| ApiError::field("tokens", "tokens is missing"))?;
    blocking(move || {
        let text = app.tokenizer()?.decode(&ids, false);
        let text = text.map_err(|e| ApiError::of_prompt(&e.into(), "tokens"))?;
        Ok(Json(json!({"prompt": text})))
    })
    .await
}
