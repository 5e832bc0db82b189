"""OpenAI's Python SDK: embeddings in each form it can ask for, models, and its exceptions.

The SDK decides much by itself: it asks for base64 unless told otherwise and decodes that as little-endian floats,
and it turns statuses into exceptions and the error's members into their fields.
"""
import base64

import numpy as np
import openai

from common import ROUNDING, references, run


def answers(checks, client, args):
    cases = references("minilm")[:8]
    texts, tokens = [case["text"] for case in cases], [case["tokens"] for case in cases]
    vectors = [case["embedding"] for case in cases]

    def create(given, **options):
        answer = client.embeddings.create(model=args.model, input=given, **options)
        return answer, [row.embedding for row in answer.data]

    with checks.section("a text"):
        answer, rows = create(texts[0])
        told = answer.object, answer.data[0].object, answer.model
        checks.equal("a text: kinds, model", told, ("list", "embedding", args.model))
        checks.near("a text: vector", rows, vectors[:1], ROUNDING)
        checks.unit_length("a text", rows)
        checks.equal("a text: usage", (answer.usage.prompt_tokens, answer.usage.total_tokens), (tokens[0],) * 2)
    with checks.section("texts"):
        answer, rows = create(texts)
        checks.equal("texts: order", [row.index for row in answer.data], list(range(len(texts))))
        checks.near("texts: vectors", rows, vectors, ROUNDING)
        checks.equal("texts: usage", answer.usage.prompt_tokens, sum(tokens))
        checks.near("the default (base64) and `float`", create(texts, encoding_format="float")[1], rows)
        encoded = create(texts, encoding_format="base64")[1]
        checks.near("base64 asked for", [np.frombuffer(base64.b64decode(text), "<f4") for text in encoded], rows)
        checks.near("`user` changes nothing", create(texts, user="me")[1], rows)
    with checks.section("token ids"):
        hello, cat = [101, 7592, 2088, 102], [101, 4937, 102]
        answer, rows = create(hello)
        checks.near("token ids: vector", rows, vectors[:1], ROUNDING)
        checks.equal("token ids: usage", answer.usage.prompt_tokens, 4)
        answer, rows = create([cat, hello])
        checks.near("lists of token ids: vectors", rows, [vectors[texts.index("cat")], vectors[0]], ROUNDING)
        checks.equal("lists of token ids: usage", answer.usage.prompt_tokens, 7)
    with checks.section("dimensions and headers"):
        _, [short] = create(texts[0], dimensions=128)
        expected = vectors[0][:128] / np.linalg.norm(vectors[0][:128])
        checks.near("dimensions: direction and length", short, expected, ROUNDING)
        raw = client.embeddings.with_raw_response.create(model=args.model, input=texts[0])
        checks.contains("headers", raw.headers, "isochrone-region")
    with checks.section("models"):
        checks.contains("models.list", [model.id for model in client.models.list()], args.model)
        checks.raises("models.retrieve of none", openai.NotFoundError, lambda: client.models.retrieve("no-such-model"))
        model = client.models.retrieve(args.model)
        checks.equal("models.retrieve", (model.id, model.object), (args.model, "model"))


def errors(checks, client, args):
    def create(client=client, **changes):
        return client.embeddings.create(**{"model": args.model, "input": "hi", **changes})

    for what, kind, changes in [
        ("an unknown model", openai.NotFoundError, {"model": "no-such-model"}),
        ("an empty input", openai.BadRequestError, {"input": []}),
        ("too many dimensions", openai.BadRequestError, {"dimensions": 100_000}),
        ("an unknown token", openai.BadRequestError, {"input": [99_999_999]}),
    ]:
        error = checks.raises(what, kind, lambda: create(**changes))
        if error:
            # The SDK takes `body` out of the member `error`; without that member it is the whole answer.
            checks.contains(f"{what}: members", error.body or (), "message", "type", "param", "code")
            checks.equal(f"{what}: type", error.type, "invalid_request_error")
    if args.through_gateway and args.key:
        stranger = client.with_options(api_key="not-a-key")
        checks.raises("an unknown key", openai.AuthenticationError, lambda: create(stranger))


def main(args, checks):
    options = {"max_retries": 0, "timeout": 60, "http_client": openai.DefaultHttpxClient(verify=args.trust)}
    client = openai.OpenAI(base_url=f"{args.http}/v1", api_key=args.key or "none", **options)
    answers(checks, client, args)
    errors(checks, client, args)


run(__doc__, main)
