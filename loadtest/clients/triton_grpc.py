"""Triton's gRPC client: the inference protocol with Triton's extensions, its stream, and gRPC's own services."""
import functools
import queue

import grpc
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from common import run
from triton_common import Suite

SERVICE = "inference.GRPCInferenceService"
STATUSES = {"400": "INVALID_ARGUMENT", "401": "UNAUTHENTICATED", "403": "PERMISSION_DENIED", "404": "NOT_FOUND",
            "504": "DEADLINE_EXCEEDED"}


def calls(suite):
    """How a call is made: compressed, with a deadline, and without waiting for it."""
    suite.same("gzip", compression_algorithm="gzip")
    suite.same("a deadline", client_timeout=60)
    suite.refused("a deadline that has passed", "504", "", lambda: suite.embed(client_timeout=1e-6))
    with suite.checks.section("async_infer"):
        done = [queue.Queue() for _ in range(len(suite.tensors) + 1)]
        for at, inputs in enumerate([*([suite.x(x)] for x, _ in suite.tensors), suite.wrong_input]):
            put = functools.partial(lambda done, result, error: done.put(result or error), done[at])
            suite.client.async_infer(suite.args.tensor_model, inputs, put, request_id=str(at), client_timeout=60)
        *good, bad = [one.get(timeout=60) for one in done]
        for at, result in enumerate(good):
            suite.answered(f"async_infer {at}", at, result, str(at))
        suite.checks.equal("async_infer: status", bad.status(), suite.statuses["400"])


def stream(suite, compression):
    """An error within a stream comes as a message and does not end it. It names no request, so that only the order of
    answers tells which request failed: as with Triton's models that answer once, it is the order of the requests."""
    checks, client, done = suite.checks, suite.client, queue.Queue()
    with checks.section(f"stream ({compression})"):
        options = {"stream_timeout": 60, "compression_algorithm": compression}
        client.start_stream(lambda result, error: done.put(result or error), **options)
        asked = [*([suite.x(x)] for x, _ in suite.tensors), suite.wrong_input, [suite.x()]]
        try:
            for at, inputs in enumerate(asked):
                options = {"request_id": str(at), "enable_empty_final_response": inputs is asked[-1]}
                client.async_stream_infer(suite.args.tensor_model, inputs, **options)
        finally:
            client.stop_stream()  # when all is answered
        checks.equal("stream: answers", done.qsize(), len(asked))
        *good, bad, last = [done.get_nowait() for _ in asked]
        for at, result in enumerate(good):
            suite.answered(f"stream {at}", at, result, str(at))
        checks.contains("stream: error", bad.message(), "`z`")
        suite.answered("stream: after an error", 0, last, str(len(asked) - 1))
        final = last.get_response().parameters["triton_final_response"].bool_param
        checks.equal("stream: the only answer to a request is its final one", final, True)


def services(args, checks):
    """Health and reflection, of the worker itself, by the clients that gRPC publishes for them."""
    with checks.section("health and reflection"), grpc.insecure_channel(args.grpc) as worker:
        health, ask = health_pb2_grpc.HealthStub(worker), health_pb2.HealthCheckRequest
        serving = health_pb2.HealthCheckResponse.SERVING
        for service in ("", SERVICE):
            checks.equal(f"health of `{service}`", health.Check(ask(service=service), timeout=10).status, serving)
        checks.equal("health, watched", next(health.Watch(ask(), timeout=10)).status, serving)
        unknown = ask(service="no-such")
        error = checks.raises("health of none", grpc.RpcError, lambda: health.Check(unknown, timeout=10))
        checks.equal("health of none: status", error and error.code(), grpc.StatusCode.NOT_FOUND)
        database = ProtoReflectionDescriptorDatabase(worker)
        checks.contains("reflection", list(database.get_services()), SERVICE)
        described = database.FindFileContainingSymbol(SERVICE).service
        checks.contains("reflection: services", [service.name for service in described], SERVICE.split(".")[1])


def main(args, checks):
    statuses = {status: f"StatusCode.{word}" for status, word in STATUSES.items()}
    client = triton.InferenceServerClient(args.grpc, ssl=args.grpc_tls, root_certificates=args.ca)
    suite = Suite(triton, client, args, checks, statuses)
    suite.inference()
    calls(suite)
    for compression in (None, "gzip"):
        stream(suite, compression)
    suite.everything()
    if not args.through_gateway:
        services(args, checks)


run(__doc__, main)
