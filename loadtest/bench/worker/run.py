#!/usr/bin/env python3
"""Measures the worker beside its peers on one CPU core, the load generator on another. See README.md."""
import sys

sys.dont_write_bytecode = True  # leave no __pycache__ among the sources
import argparse
import array
import asyncio
import base64
import contextlib
import hashlib
import http.client
import json
import math
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import load
from texts import texts

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
BINARY = ROOT / "target" / "release" / "isochrone-backend"
MODEL = ROOT / ".local" / "models" / "minilm" / "1"
VENV = ROOT / ".local" / "bench" / "venv"
PYTHON = VENV / "bin" / "python"
LOADS = ("1", "8", "32")  # clients of a server, rows of a loop's batch
SHARE = 0.7  # of a server's capacity, offered in the open loop
START = 180  # seconds that a program may take before it is ready


class Failure(Exception):
    """Why a contender cannot be measured."""


def say(line):
    print(line, flush=True)


# ---- Contenders ---------------------------------------------------------------------------------------------


class Bench:
    """What all contenders share: the scratch folder, the server's core, the texts and their reference vectors."""

    def __init__(self, scratch, core):
        self.scratch, self.core, self.texts = scratch, core, texts()
        body = lambda text: json.dumps({"model": "minilm", "input": text, "encoding_format": "base64"}).encode()
        self.requests = [load.request("/v1/embeddings", body(text)) for text in self.texts]
        self.env = {**os.environ, "MODEL_DIR": str(MODEL), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
                    "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
                    "PYTHONDONTWRITEBYTECODE": "1"}

    def prepare(self):
        """The reference vectors and the ONNX graph come from Python torch, once."""
        shutil.copy2(BINARY, self.scratch)  # it may be rebuilt meanwhile
        (self.scratch / "texts.txt").write_text("\n".join(self.texts) + "\n")
        self.finish([PYTHON, HERE / "encoder.py", "export", self.scratch], START)
        flat = array.array("f", (self.scratch / "reference.f32").read_bytes())
        size = len(flat) // len(self.texts)
        self.reference = [flat[at:at + size] for at in range(0, len(flat), size)]

    def models(self, name, precision=None, batching=None):
        """A model directory with the same weights and other settings."""
        version = self.scratch / name / "minilm" / "1"
        if not version.exists():
            version.mkdir(parents=True)
            for file in ("model.safetensors", "tokenizer.json", "config.json"):
                (version / file).symlink_to(MODEL / file)
            toml = (MODEL / "model.toml").read_text()
            if precision:
                toml = f'precision = "{precision}"\n' + re.sub(r"(?m)^precision *=.*\n", "", toml)
            if batching:
                toml = re.sub(r"(?ms)^\[batching\]\n.*?(?=^\[|\Z)", "", toml) + f"\n[batching]\n{batching}\n"
            (version / "model.toml").write_text(toml)
        return self.scratch / name

    @contextlib.contextmanager
    def process(self, command, log):
        """A program on the server's core, in a process group of its own, which ends with the block or with us."""
        with open(log, "wb") as output:
            pinned = ["setpriv", "--pdeathsig", "KILL", "taskset", "-c", self.core, *command]
            child = subprocess.Popen(list(map(str, pinned)), stdin=subprocess.DEVNULL, stdout=output,
                                     stderr=subprocess.STDOUT, env=self.env, start_new_session=True)
        try:
            yield child
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):  # the second also for what it started itself
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(5)

    def finish(self, command, limit):
        """Runs a program to its end; what it printed."""
        log = self.scratch / "output"
        with self.process(command, log) as child:
            try:
                code = child.wait(limit)
            except subprocess.TimeoutExpired:
                raise Failure(f"not done in {limit} s")
        if code:
            raise Failure(self.complaint(log))
        return log.read_text()

    @contextlib.contextmanager
    def serving(self, command, ready):
        """A server, once it is ready: its port and its process id."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = self.scratch / "output"
        with self.process([str(word).replace("PORT", str(port)) for word in command], log) as child:
            until = time.monotonic() + START
            while not is_ready(port, ready):
                if child.poll() is not None:
                    raise Failure(self.complaint(log))
                if time.monotonic() > until:
                    raise Failure(f"not ready in {START} s")
                time.sleep(0.1)
            yield port, child.pid

    def complaint(self, log):
        lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        line = lines[0] if lines[0].startswith("error") else lines[-1]
        return line.replace(f"{self.scratch}/", "")[:200]


def is_ready(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", path)
        return connection.getresponse().status == 200


def cpu_seconds(group):
    """What a process group has used of the CPU, its members that still live."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            ticks += (int(fields[11]) + int(fields[12])) * (int(fields[2]) == group)
    return ticks / os.sysconf("SC_CLK_TCK")


def hold(cosine, floor=0.9999):
    if not cosine > floor:
        raise Failure(f"its vectors are others: cosine {cosine:.6f} to the reference")
    return cosine


class Server:
    """Answers /v1/embeddings. Below the cosine `floor` to the reference it is not the same model."""

    def __init__(self, command, ready="/health", floor=0.9999):
        self.command, self.ready, self.floor = command, ready, floor

    def measure(self, bench, seconds, seed):
        with bench.serving(self.command(bench), self.ready) as (port, group):
            # Warms it up with every text there is, and holds each answer against the reference.
            least = min(map(cosine, load.answers(port, bench.requests), bench.reference))
            cells = {"cosine": hold(least, self.floor)}
            for clients in LOADS:
                before = cpu_seconds(group)
                cells[clients] = cell = load.closed(port, bench.requests, int(clients), seconds)
                cell["per_cpu_s"] = cell["answers"] / (cpu_seconds(group) - before)
            rate = SHARE * cells[LOADS[-1]]["rate"]
            cells["open"] = load.open_loop(port, bench.requests, rate, seconds, seed)
            return cells


def cosine(body, reference):
    if body is None:
        raise Failure("it refused a text")
    vector = array.array("f", base64.b64decode(json.loads(body)["data"][0]["embedding"]))
    dot = lambda a, b: sum(x * y for x, y in zip(a, b))
    return dot(vector, reference) / math.sqrt(dot(vector, vector) * dot(reference, reference))


class Loop:
    """A program that computes batches in a loop and prints a line of JSON."""

    def __init__(self, command):
        self.command = command

    def measure(self, bench, seconds, seed):
        cells = {}
        for batch in LOADS:
            output = bench.finish(self.command(bench, batch, seconds), START + seconds)
            told = json.loads(output.strip().splitlines()[-1])
            cells[batch] = {"rate": told["rows_per_s"], **told["forward_ms"]}
            if "cosine" in told:
                cells["cosine"] = min(hold(told["cosine"]), cells.get("cosine", 1))
        return cells


def isochrone(name, *options, floor=0.9999, **settings):
    return Server(lambda bench: [
        bench.scratch / BINARY.name, "serve", "--models", bench.models(name, **settings), "--region", "bench",
        "--listen", "127.0.0.1:PORT", *options], "/v2/health/ready", floor)


def ceiling(name, **settings):
    return Loop(lambda bench, batch, seconds: [
        bench.scratch / BINARY.name, "bench", "--models", bench.models(name, **settings), "--model", "minilm",
        "--texts", bench.scratch / "texts.txt", "--batch", batch, "--seconds", seconds, "--json"])


def python_loop(engine):
    return Loop(lambda bench, batch, seconds: [PYTHON, HERE / "loop.py", engine, bench.scratch, batch, seconds])


CONTENDERS = {  # in this order in each round: what is compared is measured close together
    "fastapi": Server(lambda bench: [
        PYTHON, "-m", "uvicorn", "fastapi_server:app", "--app-dir", HERE, "--host", "127.0.0.1", "--port", "PORT",
        "--no-access-log", "--log-level", "warning", "--timeout-keep-alive", "60"]),
    "isochrone": isochrone("models"),
    "ceiling": ceiling("models"),
    "isochrone-slowmkl": isochrone("models", "--no-fast-matrices"),
    "isochrone-nobatch": isochrone("models-nobatch", batching='max_batch_size = 1\nmax_queue_delay = "0ms"'),
    "isochrone-bf16": isochrone("models-bf16", floor=0.99, precision="bf16"),
    "ceiling-bf16": ceiling("models-bf16", precision="bf16"),
    "litserve": Server(lambda bench: [PYTHON, HERE / "litserve_server.py", "PORT"]),
    "torch": python_loop("torch"),
    "onnxruntime": python_loop("onnxruntime"),
}


# ---- Report -------------------------------------------------------------------------------------------------


RATIOS = [  # of what, of the first to the second: contender and clients (or batch)
    ("rate", ("isochrone", "32"), ("ceiling", "32")),
    ("rate", ("isochrone-nobatch", "32"), ("ceiling", "1")),
    ("rate", ("isochrone-bf16", "32"), ("ceiling-bf16", "32")),
    ("rate", ("isochrone", "32"), ("isochrone-nobatch", "32")),
    ("rate", ("isochrone-bf16", "32"), ("isochrone", "32")),
    ("rate", ("isochrone", "32"), ("fastapi", "32")),
    ("per_cpu_s", ("isochrone", "32"), ("fastapi", "32")),
    ("per_cpu_s", ("isochrone-slowmkl", "32"), ("fastapi", "32")),
    ("rate", ("isochrone", "32"), ("litserve", "32")),
    ("p99", ("isochrone", "1"), ("ceiling", "1")),
    ("p99", ("isochrone", "1"), ("fastapi", "1")),
    ("p99", ("isochrone", "open"), ("fastapi", "open")),
    ("rate", ("ceiling", "1"), ("onnxruntime", "1")),
    ("rate", ("ceiling", "32"), ("onnxruntime", "32")),
    ("rate", ("ceiling", "32"), ("onnxruntime", "1")),
    ("rate", ("torch", "1"), ("onnxruntime", "1")),
]


def markdown(rows):
    rows.insert(1, ["---"] + ["---:"] * (len(rows[0]) - 1))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def table(results, kind, columns):
    """A row for each contender: medians over its rounds."""
    rows = [["", *(title for title, *_ in columns), "least cosine"]]
    for name in (name for name in CONTENDERS if isinstance(CONTENDERS[name], kind) and name in results):
        rounds = results[name]
        median = lambda cell, key: statistics.median(cells[cell][key] for cells in rounds)
        errors = sum(cell.get("errors", 0) for cells in rounds for at, cell in cells.items() if at != "cosine")
        least = min((cells["cosine"] for cells in rounds if "cosine" in cells), default=None)
        rows.append([f"`{name}`" + (f" ({errors} errors)" if errors else ""),
                     *(" / ".join(f"{median(*value):.1f}" for value in values) for _, *values in columns),
                     f"{least:.6f}" if least else "not told"])
    return markdown(rows)


def ratios(results):
    """Within each round, so that the machine's drift falls out; then the median, and the range."""
    rows = [["", "median", "range"]]
    for key, (one, at), (other, other_at) in RATIOS:
        pairs = zip(results.get(one, []), results.get(other, []))
        values = [mine[at][key] / theirs[other_at][key] for mine, theirs in pairs]
        told = [f"{statistics.median(values):.2f}", f"{min(values):.2f} to {max(values):.2f}"] if values else ["–", "–"]
        rows.append([f"{key}: `{one}` at {at} ÷ `{other}` at {other_at}", *told])
    return markdown(rows)


def report(told):
    results = told["results"]
    both = [("emb/s at 1 / 8 / 32", *((at, "rate") for at in LOADS))]
    both += [(f"p50 / p99 ms at {at}", (at, "p50"), (at, "p99")) for at in LOADS]
    servers = both + [(f"open loop at {SHARE:.0%}, p50 / p99 ms", ("open", "p50"), ("open", "p99")),
                      ("emb per CPU second at 1 / 8 / 32", *((at, "per_cpu_s") for at in LOADS))]
    say(f"\n{told['machine']}; medians of {told['rounds']} rounds, {told['seconds']} s for each number\n")
    say("Servers, by clients:\n\n" + table(results, Server, servers))
    say("In process, by rows of a batch:\n\n" + table(results, Loop, both))
    say("Ratios:\n\n" + ratios(results))
    for name, why in told["missing"].items():
        say(f"`{name}` is not available: {why}")


# ---- The run ------------------------------------------------------------------------------------------------


def install():
    """The venv of the peers, made anew when the pins or the Python change."""
    pins = HERE / "requirements.txt"
    stamp, mark = VENV / "stamp", hashlib.sha256(pins.read_bytes() + sys.version.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == mark:
        return
    say(f"installing the peers into {VENV.relative_to(ROOT)}: about 3 GB to download, 5 GB on disk")
    shutil.rmtree(VENV, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", VENV], check=True, timeout=300)
    pip = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", "-r", pins]
    subprocess.run(pip, check=True, timeout=3600)
    stamp.write_text(mark)


def check_load(bench):
    """The load generator against a server that does nothing: what it could offer, and what it adds."""
    with bench.serving([sys.executable, HERE / "load.py", "PORT"], "/") as (port, _):
        one, many = (load.closed(port, bench.requests, clients, 2) for clients in (1, 32))
    say(f"load generator alone: {many['rate']:.0f} requests/s with 32 clients, p50 {one['p50']:.2f} ms with 1")
    if many["rate"] < 3000:
        say("WARNING: below 3000 requests/s it may hold fast servers back")
    return {"1": one, "32": many}


def machine():
    info = Path("/proc/cpuinfo").read_text()
    name = re.search(r"model name\s*: (.*)", info)
    flags = sorted(set(re.findall(r"\b(?:avx2|avx512f|avx512_bf16|avx512_vnni|amx_bf16|asimd|bf16)\b", info)))
    return f"{name.group(1) if name else 'unknown CPU'}, {os.cpu_count()} cores, {' '.join(flags)}"


def run(bench, seconds, rounds, names):
    told = {"machine": machine(), "seconds": seconds, "rounds": rounds, "load": check_load(bench)}
    say("computing the reference vectors, exporting to ONNX")
    bench.prepare()
    results, missing = told["results"], told["missing"] = {}, {}
    for number in range(1, rounds + 1):
        say(f"round {number} of {rounds}; load average {os.getloadavg()[0]:.1f}")
        for name in (name for name in names if name not in missing):
            try:
                cells = CONTENDERS[name].measure(bench, seconds, seed=number)
            except (Failure, OSError, ValueError, LookupError, asyncio.TimeoutError) as error:
                missing[name] = str(error) if isinstance(error, Failure) else repr(error)
                say(f"  {name} is not available: {missing[name]}")
                continue
            results.setdefault(name, []).append(cells)
            say(f"  {name}: " + ", ".join(f"{at} {cell['rate']:.1f}/s p99 {cell['p99']:.1f} ms"
                                          for at, cell in cells.items() if at != "cosine"))
    return told


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=6, help="for each number (6)")
    parser.add_argument("--rounds", type=int, default=3, help="each measures every contender once (3)")
    parser.add_argument("--only", type=lambda names: names.split(","), default=list(CONTENDERS), metavar="A,B",
                        help="some of " + ", ".join(CONTENDERS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="every number of every round")
    arguments = parser.parse_args()
    unknown = ", ".join(sorted(set(arguments.only) - set(CONTENDERS)))
    cores = sorted(os.sched_getaffinity(0))
    for wrong, problem in (
        (unknown, f"there is no {unknown}; there are {', '.join(CONTENDERS)}"),
        (len(cores) < 2, "two CPU cores are needed, one for the server and one for the load"),
        (not (shutil.which("taskset") and shutil.which("setpriv")), "taskset and setpriv are needed (util-linux)"),
        (not MODEL.exists(), "the model is missing: ./deploy/local/install"),
        (not BINARY.exists(), "the worker is missing: cargo build --release"),
    ):
        if wrong:
            sys.exit(f"error: {problem}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that every `finally` runs
    install()
    os.sched_setaffinity(0, {cores[1]})
    with tempfile.TemporaryDirectory(prefix="isochrone-bench-") as scratch:
        told = run(Bench(Path(scratch), cores[0]), arguments.seconds, arguments.rounds, arguments.only)
    report(told)
    if arguments.json:
        arguments.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped")
    except (Failure, subprocess.SubprocessError) as error:
        sys.exit(f"error: {error}")
