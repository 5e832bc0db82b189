"""LangChain's `OpenAIEmbeddings`, synchronous and asynchronous.

`check_embedding_ctx_length=False` is how LangChain is used with any model but OpenAI's own: left on, it cuts texts
into the tokens of another model's vocabulary and sends their ids.
"""
import asyncio

import openai
from langchain_openai import OpenAIEmbeddings

from common import ROUNDING, references, run


def main(args, checks):
    cases = references("minilm")[:10]
    texts, vectors = [case["text"] for case in cases], [case["embedding"] for case in cases]

    def embedder(model=args.model, **options):
        return OpenAIEmbeddings(
            model=model, base_url=f"{args.http}/v1", api_key=args.key or "none", max_retries=0, timeout=60,
            http_client=openai.DefaultHttpxClient(verify=args.trust),
            http_async_client=openai.DefaultAsyncHttpxClient(verify=args.trust),
            check_embedding_ctx_length=False, **options,
        )

    model = embedder(chunk_size=4)  # so that the texts take more than one request
    with checks.section("synchronous"):
        checks.near("embed_documents", model.embed_documents(texts), vectors, ROUNDING)
        checks.near("embed_query", model.embed_query(texts[0]), vectors[0], ROUNDING)
    with checks.section("asynchronous"):
        async def both():
            return await asyncio.gather(model.aembed_documents(texts), model.aembed_query(texts[0]))

        documents, query = asyncio.run(both())
        checks.near("aembed_documents", documents, vectors, ROUNDING)
        checks.near("aembed_query", query, vectors[0], ROUNDING)
    with checks.section("dimensions"):
        short = embedder(dimensions=128).embed_query(texts[0])
        checks.equal("dimensions", len(short), 128)
        checks.unit_length("dimensions", [short])
    checks.raises("an unknown model", openai.NotFoundError, lambda: embedder("no-such-model").embed_query("hi"))


run(__doc__, main)
