"""Triton's HTTP client: the inference protocol in JSON, in binary and compressed, and Triton's extensions of it."""
import contextlib
import io
import itertools
from urllib.parse import urlsplit

import tritonclient.http as triton

from common import run
from triton_common import Suite


def encodings(suite, verbose):
    in_json, named = suite.text_input(binary_data=False), triton.InferRequestedOutput
    out_json, out_binary = [named("embedding", binary_data=False)], [named("embedding", binary_data=True)]
    with suite.checks.section("binary and JSON"):
        # Without `outputs`, the client asks for binary by the request's own parameter binary_data_output.
        binary, given = suite.first.nbytes, {"binary in": suite.text_input(), "JSON in": in_json}
        answers = {"out left open": (None, binary), "binary out": (out_binary, binary), "JSON out": (out_json, None)}
        for way, answer in itertools.product(given, answers):
            result = suite.embed(given[way], outputs=answers[answer][0])
            suite.checks.near(f"{way}, {answer}", result.as_numpy("embedding"), suite.first)
            size = result.get_output("embedding").get("parameters", {}).get("binary_data_size")
            suite.checks.equal(f"{way}, {answer}: binary_data_size", size, answers[answer][1])
    for algorithm in ("gzip", "deflate"):
        both = {"request_compression_algorithm": algorithm, "response_compression_algorithm": algorithm}
        suite.same(f"{algorithm} in", in_json, outputs=out_json, request_compression_algorithm=algorithm)
        for what, outputs in [("binary", None), ("JSON", out_json)]:
            # The client hides an answer's headers; only what it prints when verbose tells whether it came compressed.
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                verbose.same(f"{algorithm} both ways, {what}", outputs=outputs, **both)
            came = [line for line in printed.getvalue().lower().splitlines() if "status=" in line]
            suite.checks.contains(f"{algorithm}, {what}: headers", "".join(came), f"'content-encoding': '{algorithm}'")
        # The client does not decompress refusals: they must come as they are.
        suite.refused(f"{algorithm}, refused", "400", "`z`", lambda: suite.infer(*suite.wrong_input, **both))
    with suite.checks.section("JSON tensors"):
        for at, (x, _) in enumerate(suite.tensors):
            given, outputs = suite.x(x, binary_data=False), [named("y", binary_data=False)]
            suite.answered(f"JSON tensor {x.shape}", at, suite.infer(given, outputs=outputs, request_id="j"), "j")


def asynchronous(suite):
    with suite.checks.section("async_infer"):
        ask, model = suite.client.async_infer, suite.args.tensor_model
        asked = [ask(model, [suite.x(x)], request_id=str(at)) for at, (x, _) in enumerate(suite.tensors)]
        bad = ask(model, suite.wrong_input)
        for at, request in enumerate(asked):
            suite.answered(f"async_infer {at}", at, request.get_result(timeout=60), str(at))
        suite.refused("async_infer", "400", "`z`", lambda: bad.get_result(timeout=60))


def main(args, checks):
    url, trust = urlsplit(args.http), {"ca_certs": args.ca} if args.ca else {}
    options = {"ssl": url.scheme == "https", "ssl_options": trust, "concurrency": 4}
    suite = Suite(triton, triton.InferenceServerClient(url.netloc, **options), args, checks, {})
    suite.inference()
    loud = triton.InferenceServerClient(url.netloc, verbose=True, **options)
    encodings(suite, Suite(triton, loud, args, checks, {}, suite.first))
    asynchronous(suite)
    suite.everything()


run(__doc__, main)
