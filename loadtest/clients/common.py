"""What the client scripts share: arguments, the reference numbers, and the counting of checks.

Each script uses one published client library, unmodified, because that is what users come with: a server is
compatible when their code runs, not when it agrees with its own idea of the protocol. A script exits 0 and says
`ok N checks`, or exits 1 and says what was expected and what came.
"""
import argparse
import contextlib
import json
import ssl
import sys
import traceback
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
# A vector that was computed with others, or by another program, differs by rounding.
ROUNDING = 1e-4


def run(about, body):
    """Calls `body(args, checks)`; each script uses the arguments that concern its library."""
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("--http", metavar="URL", default="http://127.0.0.1:9101", help="worker or gateway")
    parser.add_argument("--grpc", metavar="HOST:PORT", default="127.0.0.1:9111", help="worker or gateway")
    parser.add_argument("--grpc-tls", action="store_true", help="gRPC over TLS")
    parser.add_argument("--ca", metavar="PEM", help="certificates of the CA to trust, instead of the usual ones")
    parser.add_argument("--key", help="API key, sent as `Authorization: Bearer KEY`")
    parser.add_argument("--model", default="minilm", help="a model that answers as minilm.json says")
    parser.add_argument("--tensor-model", default="tiny", help="a model that answers as tiny.json says")
    parser.add_argument("--through-gateway", action="store_true", help="leave out what gateways do not pass on")
    checks = Checks()
    with checks.section("the script"):
        args = parser.parse_args()
        args.trust = ssl.create_default_context(cafile=args.ca)
        body(args, checks)
    for failure in checks.failures[:30]:
        print(f"FAILED {failure}")
    print(f"{len(checks.failures)} failed, {checks.count} checks" if checks.failures else f"ok {checks.count} checks")
    sys.exit(1 if checks.failures else 0)


def references(name):
    """Inputs and what the model must answer, computed once by the Python libraries that the models come from."""
    return json.loads((HERE.parent / "tests" / "data" / f"{name}.json").read_text())["cases"]


class Checks:
    """Counts what was checked and keeps what failed, so that one run tells everything that is wrong."""

    def __init__(self):
        self.count, self.failures = 0, []

    def holds(self, what, condition, expected, got):
        self.count += 1
        if not condition:
            self.failures.append(f"{what}: expected {expected}, got {got}")
        return condition

    def equal(self, what, got, expected):
        return self.holds(what, got == expected, repr(expected), repr(got))

    def contains(self, what, got, *expected):
        return self.holds(what, all(item in got for item in expected), f"{expected} in it", repr(got))

    def near(self, what, got, expected, tolerance=0.0):
        """The same shape, and no number further off than the tolerance."""
        got, expected = np.asarray(got, np.float32), np.asarray(expected, np.float32)
        if self.equal(f"{what}: shape", got.shape, expected.shape):
            off = float(np.abs(got - expected).max(initial=0.0))
            self.holds(what, off <= tolerance, f"no difference above {tolerance}", f"a difference of {off}")

    def unit_length(self, what, vectors):
        self.near(f"{what}: length", np.linalg.norm(vectors, axis=1), np.ones(len(vectors)), ROUNDING)

    def raises(self, what, kind, call):
        """The exception, for a closer look; None if there was none of that kind."""
        try:
            got = call()
        except Exception as error:
            got = error
        return got if self.holds(what, isinstance(got, kind), f"a {kind.__name__}", repr(got)) else None

    @contextlib.contextmanager
    def section(self, name):
        """An error that nobody expected fails this part; the others still run."""
        try:
            yield
        except Exception as error:
            frames = reversed(traceback.extract_tb(error.__traceback__)[1:])
            at = " in ".join(f"`{one.line}`, line {one.lineno}" for one in frames if Path(one.filename).parent == HERE)
            self.failures.append(f"{name}: expected no error, got {type(error).__name__}: {error} ({at})")
