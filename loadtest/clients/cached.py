"""The same tensors by tritonclient over HTTP, in binary and in JSON, compressed and not, and over gRPC: each client reads
the same numbers, its own id and its own encoding. How often a worker was asked is its own to say, and the caller's to
check: twice, once for each of two questions."""
from urllib.parse import urlsplit

import numpy as np
import tritonclient.grpc
import tritonclient.http

from common import run


def main(args, checks):
    http = tritonclient.http.InferenceServerClient(
        urlsplit(args.http).netloc, ssl=True, ssl_options={"ca_certs": args.ca})
    grpc = tritonclient.grpc.InferenceServerClient(args.grpc, ssl=True, root_certificates=args.ca)
    ways = [(name, client, triton, options, compressed)
            for name, client, triton, options in [
                ("binary", http, tritonclient.http, {"binary_data": True}),
                ("JSON", http, tritonclient.http, {"binary_data": False}),
                ("gRPC", grpc, tritonclient.grpc, {}),
            ] for compressed in (False, True)]
    # Whoever comes first asks the worker, and the others are given what that was told.
    for part, ordered in [(3, ways), (7, list(reversed(ways)))]:
        numbers, first = np.arange(16, dtype=np.float32).reshape(2, 8) / part, None
        for name, client, triton, options, compressed in ordered:
            what = f"{name}-{compressed}-{part}"
            with checks.section(what):
                given = triton.InferInput("x", numbers.shape, "FP32")
                given.set_data_from_numpy(numbers, **options)
                more = {}
                if compressed:
                    more = {"compression_algorithm": "gzip"} if client is grpc else {
                        "response_compression_algorithm": "gzip"}
                answer = client.infer(args.tensor_model, [given], outputs=[triton.InferRequestedOutput("y", **options)],
                                      # Headers of their own each time: the library adds to them.
                                      request_id=what, headers={"authorization": f"Bearer {args.key}"}, **more)
                first = answer.as_numpy("y") if first is None else first
                head = answer.get_response()
                checks.equal(f"{what}: id", head["id"] if isinstance(head, dict) else head.id, what)
                checks.near(f"{what}: the same numbers", answer.as_numpy("y"), first)


run(__doc__, main)
