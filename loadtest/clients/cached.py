"""The same tensors by tritonclient over HTTP, in binary and in JSON, compressed and not, and over gRPC: each client reads
the same numbers, its own id and its own encoding. How often a worker was asked is its own to say, and the caller's to
check: once."""
import numpy as np
import tritonclient.grpc
import tritonclient.http
from urllib.parse import urlsplit

from common import run


def main(args, checks):
    numbers = np.arange(16, dtype=np.float32).reshape(2, 8) / 3
    http = tritonclient.http.InferenceServerClient(
        urlsplit(args.http).netloc, ssl=True, ssl_options={"ca_certs": args.ca})
    grpc = tritonclient.grpc.InferenceServerClient(args.grpc, ssl=True, root_certificates=args.ca)
    seen = []
    for name, client, triton, options in [
        ("binary", http, tritonclient.http, {"binary_data": True}),
        ("JSON", http, tritonclient.http, {"binary_data": False}),
        ("gRPC", grpc, tritonclient.grpc, {}),
    ]:
        for compressed in (False, True):
            with checks.section(f"{name}, compressed: {compressed}"):
                given = triton.InferInput("x", numbers.shape, "FP32")
                given.set_data_from_numpy(numbers, **options)
                wanted = triton.InferRequestedOutput("y", **options)
                more = {}
                if compressed:
                    more = {"compression_algorithm": "gzip"} if client is grpc else {
                        "response_compression_algorithm": "gzip"}
                answer = client.infer(args.tensor_model, [given], outputs=[wanted], request_id=f"{name}-{compressed}",
                                      # Its own each time: the library adds to it.
                                      headers={"authorization": f"Bearer {args.key}"}, **more)
                seen.append(answer.as_numpy("y"))
                head = answer.get_response()
                got = head["id"] if isinstance(head, dict) else head.id
                checks.equal(f"{name}: id", got, f"{name}-{compressed}")
                checks.near(f"{name}: the same numbers", seen[-1], seen[0])


run(__doc__, main)
