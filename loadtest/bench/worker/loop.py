"""One engine in a loop, without a server: `python loop.py ENGINE DIR BATCH SECONDS` prints a line of JSON.

Tokenizing is done beforehand; what is timed is the forward pass with its pooling, on batches of consecutive texts,
each padded to its longest.
"""
import json
import os
import sys
import time

import numpy
import torch

from encoder import Encoder, Tokens


def onnxruntime_engine(directory):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    path = os.path.join(directory, "model.onnx")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    prepare = lambda ids, mask: {"ids": ids.numpy(), "mask": mask.numpy()}
    return prepare, lambda inputs: session.run(None, inputs)[0]


def torch_engine(directory):
    encoder = Encoder()
    return lambda *inputs: inputs, lambda inputs: encoder(*inputs).numpy()


def main(engine, directory, batch, seconds):
    with open(os.path.join(directory, "texts.txt")) as file:
        texts = file.read().splitlines()
    prepare, run = {"onnxruntime": onnxruntime_engine, "torch": torch_engine}[engine](directory)
    tokens = Tokens()
    batches = [prepare(*tokens(texts[at:at + batch])) for at in range(0, len(texts), batch)]
    reference = numpy.fromfile(os.path.join(directory, "reference.f32"), numpy.float32).reshape(len(texts), -1)
    with torch.inference_mode():
        vectors = numpy.concatenate([run(inputs) for inputs in batches])  # warms up, too
        lengths = numpy.linalg.norm(vectors, axis=1) * numpy.linalg.norm(reference, axis=1)
        cosine = float(((vectors * reference).sum(1) / lengths).min())
        took = []
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            at = time.perf_counter()
            run(batches[len(took) % len(batches)])
            took.append((time.perf_counter() - at) * 1e3)
        elapsed = time.perf_counter() - began
    forward = {"p50": float(numpy.percentile(took, 50)), "p99": float(numpy.percentile(took, 99))}
    rate = len(took) * batch / elapsed
    print(json.dumps({"batch": batch, "rows_per_s": rate, "forward_ms": forward, "cosine": cosine}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
