"""The official Python client against a running server: `./x clients` starts one and calls this.

Every answer must fit the client's own types, strictly. Usage: conformance.py BASE_URL KEY
"""

import asyncio
import json
import sys
import time
from typing import Literal

import openai
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

BASE_URL, KEY = sys.argv[1:]
CONNECTION = dict(base_url=f"{BASE_URL}/v1", api_key=KEY, max_retries=0, timeout=120)
client = OpenAI(**CONNECTION)
# What is not OpenAI's lies beside /v1.
root = client.with_options(base_url=BASE_URL)
MODEL = client.models.list().data[0].id
HELLO = [{"role": "user", "content": "Hello!"}]
STORY = [{"role": "user", "content": "Tell me a story."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Kiel", "Bonn"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}


def checked(answer):
    """The answer, whose every field has the type that the client declares."""
    type(answer).model_validate(answer.to_dict(mode="python"), strict=True)
    return answer


def chat(messages=HELLO, of=client, **fields):
    fields = {"model": MODEL, "temperature": 0, "max_tokens": 24, **fields}
    answer = of.chat.completions.create(messages=messages, **fields)
    return answer if fields.get("stream") else checked(answer)


def complete(prompt, **fields):
    fields = {"model": MODEL, "temperature": 0, "max_tokens": 12, **fields}
    return checked(client.completions.create(prompt=prompt, **fields))


def n_open():
    return root.get("/load", cast_to=object)["server_load"]


def tokenize(text):
    return root.post("/tokenize", cast_to=object, body={"prompt": text})["tokens"]


def becomes_idle():
    """Whether no request is open within five seconds."""
    deadline = time.monotonic() + 5
    while n_open() and time.monotonic() < deadline:
        time.sleep(0.05)
    return n_open() == 0


def fails(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def models():
    model = checked(client.models.retrieve(MODEL))
    assert model.id == MODEL and model.object == "model"
    assert [m.id for m in client.models.list()] == [MODEL]


def chat_whole():
    answer = chat()
    choice = answer.choices[0]
    assert answer.object == "chat.completion" and answer.model == MODEL
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason == "stop" and choice.message.tool_calls is None
    usage = answer.usage
    assert usage.prompt_tokens > 0 and usage.completion_tokens > 0
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert answer._request_id
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello!"}]}]
    assert chat(parts).choices[0].message.content == choice.message.content
    short = chat(STORY, max_tokens=None, max_completion_tokens=3)
    assert short.usage.completion_tokens == 3 and short.choices[0].finish_reason == "length"


def developer_role_and_unknown_fields():
    opening = [{"role": "developer", "content": "Be kind."}]
    assert chat(opening + HELLO).choices[0].message.content
    chat(store=False, metadata={"a": "b"}, user="u", extra_body={"no_such_field": 1})


def streaming():
    whole = chat(logprobs=True, top_logprobs=2)
    options = {"include_usage": True}
    stream = chat(logprobs=True, top_logprobs=2, stream=True, stream_options=options)
    chunks = [checked(chunk) for chunk in stream]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    *others, last = chunks
    assert last.choices == [] and last.usage == whole.usage, (last.usage, whole.usage)
    assert all(chunk.usage is None for chunk in others)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in others)
    assert text == whole.choices[0].message.content
    assert others[-1].choices[0].finish_reason == "stop"
    told = [c.choices[0].logprobs for c in others if c.choices[0].logprobs]
    tokens = [token for logprobs in told for token in logprobs.content]
    assert [t.token for t in tokens] == [t.token for t in whole.choices[0].logprobs.content]
    # The client's own adding up.
    with client.chat.completions.stream(
        model=MODEL, messages=HELLO, temperature=0, max_tokens=24
    ) as events:
        deltas = [event.delta for event in events if event.type == "content.delta"]
        final = events.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content == text


def logprobs():
    answer = chat(logprobs=True, top_logprobs=5, max_tokens=4)
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == answer.usage.completion_tokens == 4
    for token in tokens:
        best = token.top_logprobs
        assert len(best) == 5 and best[0].token == token.token  # greedy
        assert 0 >= token.logprob == best[0].logprob >= best[1].logprob
        assert bytes(token.bytes).decode() == token.token
    assert chat().choices[0].logprobs is None


def n_answers():
    answer = chat(STORY, n=3, temperature=1, seed=5)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    streamed = ["", "", ""]
    for chunk in chat(STORY, n=3, temperature=1, seed=5, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def stop():
    text = chat(STORY, max_tokens=60).choices[0].message.content
    word = text.split()[4]
    for stops in (word, [word, "never said"]):
        answer = chat(STORY, max_tokens=60, stop=stops).choices[0]
        assert answer.message.content == text[: text.index(word)]
        assert answer.finish_reason == "stop"


def seed():
    def say(seed):
        return chat(STORY, temperature=1, seed=seed).choices[0].message.content

    assert say(1) == say(1)
    assert len({say(seed) for seed in range(4)}) > 1


def penalties_and_bias():
    first = chat(logprobs=True, max_tokens=1).choices[0].logprobs.content[0].token
    banned = {str(tokenize(first)[-1]): -100}
    other = chat(logprobs=True, max_tokens=1, logit_bias=banned).choices[0].logprobs.content[0]
    assert other.token != first
    chat(frequency_penalty=1, presence_penalty=1, top_p=0.5)


def tools():
    fields = dict(tools=[WEATHER], max_tokens=200, parallel_tool_calls=False)
    named = {"type": "function", "function": {"name": "get_weather"}}
    for choice in ("required", named):
        answer = chat(tool_choice=choice, **fields).choices[0]
        (call,) = answer.message.tool_calls
        assert answer.finish_reason == "tool_calls" and answer.message.content is None
        assert call.type == "function" and call.function.name == "get_weather"
        arguments = json.loads(call.function.arguments)
        assert arguments["city"] in ("Kiel", "Bonn")
        name, spelled, finish = "", "", None
        for chunk in chat(tool_choice=choice, stream=True, **fields):
            delta = checked(chunk).choices[0].delta
            for part in delta.tool_calls or []:
                assert part.index == 0
                name += part.function.name or ""
                spelled += part.function.arguments or ""
            finish = chunk.choices[0].finish_reason or finish
        assert (name, json.loads(spelled), finish) == ("get_weather", arguments, "tool_calls")
    said = answer.message.to_dict()
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    last = chat([*HELLO, said, result], tools=[WEATHER], tool_choice="none").choices[0]
    assert last.message.tool_calls is None
    assert chat(tools=[WEATHER], tool_choice="auto").choices[0].finish_reason


class Bird(BaseModel):
    name: Literal["gull", "tern"]
    can_fly: bool


def json_schema():
    parse = client.chat.completions.parse
    answer = parse(model=MODEL, messages=HELLO, response_format=Bird, temperature=0, max_tokens=200)
    assert isinstance(answer.choices[0].message.parsed, Bird)
    answer = chat(response_format={"type": "json_object"}, max_tokens=200).choices[0]
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.message.content), dict)
    assert chat(response_format={"type": "text"}).choices[0].message.content


def completions():
    answer = complete("Once upon a time")
    assert answer.object == "text_completion" and answer.choices[0].text
    prompts = ["Once upon a time", "The sea"]
    complete(prompts, logprobs=2)
    two = client.completions.create(
        model=MODEL, prompt=prompts, temperature=0, max_tokens=12, echo=True, logprobs=2
    )
    assert [choice.index for choice in two.choices] == [0, 1]
    assert two.choices[0].text == "Once upon a time" + answer.choices[0].text
    told = two.choices[0].logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.text_offset)
    # Nothing precedes the first token. OpenAI's API says null too, its client's types do not.
    assert told.token_logprobs[0] is None and told.token_logprobs[1] < 0
    assert "".join(told.tokens) == two.choices[0].text
    assert complete(tokenize("Once upon a time")).choices[0].text == answer.choices[0].text
    stream = client.completions.create(
        model=MODEL, prompt="Once upon a time", temperature=0, max_tokens=12, stream=True
    )
    # Not checked: a chunk's finish_reason is null before the end, which the types do not know.
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def errors():
    wrong = OpenAI(**{**CONNECTION, "api_key": "wrong"})
    fails(openai.AuthenticationError, lambda: chat(of=wrong))
    error = fails(openai.NotFoundError, lambda: chat(model="no-such-model"))
    assert error.param == "model" and error.status_code == 404
    error = fails(openai.BadRequestError, lambda: chat(temperature=-1))
    assert error.param == "temperature" and "temperature" in error.message
    assert error.type == "BadRequestError" and error.request_id
    for fields in (
        dict(messages=[]),
        dict(n=1000),
        dict(top_logprobs=3),
        dict(max_tokens=10**6),
        dict(tool_choice="required"),
        dict(stop=["a"] * 5),
        dict(modalities=["audio"]),
        dict(response_format={"type": "json_schema", "json_schema": {"name": "x"}}),
    ):
        error = fails(openai.BadRequestError, lambda: chat(**fields))
        assert error.param, (fields, error)
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    fails(openai.BadRequestError, lambda: chat([{"role": "user", "content": [image]}]))
    fails(openai.NotFoundError, lambda: client.embeddings.create(model=MODEL, input="a"))
    fails(openai.NotFoundError, lambda: client.responses.create(model=MODEL, input="a"))


def cancellation():
    stream = chat(STORY, max_tokens=500, stream=True, extra_body={"ignore_eos": True})
    for _ in range(3):
        next(stream)
    assert n_open() == 1
    stream.close()
    assert becomes_idle()
    hurried = client.with_options(timeout=0.3)
    long = dict(max_tokens=900, extra_body={"ignore_eos": True})
    fails(openai.APITimeoutError, lambda: chat(STORY, of=hurried, **long))
    assert becomes_idle()


async def many_streams():
    """64 at once agree with one alone; the server takes no more, and forgets all that leave."""
    alone = chat(STORY, max_tokens=8).choices[0].message.content
    async with AsyncOpenAI(**CONNECTION) as many:

        async def open_one(**fields):
            return await many.chat.completions.create(
                model=MODEL, messages=STORY, temperature=0, stream=True, **fields
            )

        async def read():
            stream = await open_one(max_tokens=8)
            return "".join([c.choices[0].delta.content or "" async for c in stream])

        texts = await asyncio.gather(*(read() for _ in range(64)))
        assert texts == [alone] * 64
        long = dict(max_tokens=900, extra_body={"ignore_eos": True})
        streams = await asyncio.gather(*(open_one(**long) for _ in range(64)))
        try:
            await open_one(max_tokens=1)
        except openai.InternalServerError as error:
            assert error.status_code == 503 and error.response.headers["retry-after"]
        else:
            raise AssertionError("a 65th request was taken")
        # A patient client is served once there is room.
        later = asyncio.create_task(
            many.with_options(max_retries=5).chat.completions.create(
                model=MODEL, messages=HELLO, max_tokens=1
            )
        )
        await asyncio.gather(*(stream.close() for stream in streams))
        assert (await later).choices
    assert await asyncio.to_thread(becomes_idle)


def concurrent_streams():
    asyncio.run(many_streams())


CHECKS = [
    models,
    chat_whole,
    developer_role_and_unknown_fields,
    streaming,
    logprobs,
    n_answers,
    stop,
    seed,
    penalties_and_bias,
    tools,
    json_schema,
    completions,
    errors,
    cancellation,
    concurrent_streams,
]


def main():
    failed = 0
    for check in CHECKS:
        start = time.monotonic()
        try:
            check()
            verdict = "ok"
        except Exception as error:
            failed += 1
            verdict = f"FAILED: {type(error).__name__}: {error}"
            at = error.__traceback__
            while at:
                if at.tb_frame.f_code.co_filename == __file__:
                    verdict += f"\n    line {at.tb_lineno}"
                at = at.tb_next
        print(f"python {check.__name__} {time.monotonic() - start:.1f} s: {verdict}", flush=True)
    sys.exit(failed > 0)


main()
