"""Rules between fields that the OpenAPI document cannot say, for its fuzzer: requests that break
one are answered with 400, and so are not made where only valid ones should be."""

import json

import schemathesis

# Bytes of a prompt that fit the context of 128 tokens beside the chat template, however they are
# tokenized.
MOST_BYTES = 90


def names(tools) -> list:
    """Of the functions that a request offers."""
    return [tool["function"].get("name") for tool in tools or []]


@schemathesis.hook
def filter_case(context, case) -> bool:
    """Whether to send a request."""
    body = case.body
    if not isinstance(body, dict):
        return True
    try:
        choice = body.get("tool_choice")
        if isinstance(choice, dict) and choice["function"]["name"] not in names(body.get("tools")):
            return False
        prompt = [body.get("messages"), body.get("prompt"), body.get("tools")]
        if len(json.dumps(prompt).encode()) > MOST_BYTES:
            return False
    except (AttributeError, KeyError, TypeError):
        return True  # One of the wrong ones.
    # Together they may leave no token.
    limits = ("min_tokens", "bad_words", "logit_bias", "structured_outputs", "response_format")
    return not (body.get("allowed_token_ids") and any(body.get(name) for name in limits))
