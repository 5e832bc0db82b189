#!/usr/bin/env python3
"""Make `silero.json`: reference outputs of the Silero voice activity detector.

    python make_silero.py WHEEL

WHEEL is the file that `pip download --no-deps silero-vad` brings; the model
is taken from inside it. Needs Python torch on the CPU.

The model keeps state from one call to the next (an LSTM state and the last
samples it heard), so a case is a SEQUENCE of calls: `reset_states()` first,
then `forward(x, sr)` with x = [batch, samples] for each chunk in turn, and
`outputs` has one [batch, 1] answer a call. `audio_forward(x, sr)` resets by
itself and answers [batch, chunks] for the whole at once.

The input is a recipe, not samples: sample n of the whole signal is, in
float64 and in this order, `amplitude * sin(2 * pi * hertz * n / sr)`, then
rounded to float32. `crc32` is that of the little-endian float32 bytes. The
recipe says the same bits everywhere: the script checks that no sample lies
so near the middle of two float32 values that another sin() could round it to
the other one.
"""

import hashlib
import io
import json
import math
import struct
import sys
import zipfile
import zlib
from email.parser import Parser
from importlib.metadata import version
from pathlib import Path

import torch

OUTPUT = Path(__file__).resolve().parent / "silero.json"
MEMBER = "silero_vad/data/silero_vad.jit"

# (name, sr, samples in a chunk, chunks, batch, hertz, amplitude)
CASES = [
    ("sine", 16000, 512, 4, 1, 440.0, 0.5),
    ("batch of 3, each the same sine", 16000, 512, 2, 3, 440.0, 0.5),
    ("silence", 16000, 512, 2, 1, 440.0, 0.0),
    ("sine at 8 kHz", 8000, 256, 2, 1, 440.0, 0.5),
    ("three times 16 kHz: the model takes every third sample", 48000, 1536, 2, 1, 440.0, 0.5),
]


def to_f32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def sine(sr: int, count: int, hertz: float, amplitude: float) -> list[float]:
    samples = []
    for n in range(count):
        exact = amplitude * math.sin(2.0 * math.pi * hertz * n / sr)
        slack = 8 * math.ulp(exact)  # far more than any libm is off by
        if to_f32(exact - slack) != to_f32(exact + slack):
            sys.exit(f"make_silero: sample {n} at {sr} Hz is not surely the same everywhere")
        samples.append(to_f32(exact))
    return samples


def rounded(tensor: torch.Tensor) -> list[list[float]]:
    """Nested lists; 9 significant digits give back the same float32."""
    return [[float(f"{value:.9g}") for value in row] for row in tensor.tolist()]


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__.split("\n\n")[1].strip())
    wheel = Path(sys.argv[1])
    torch.set_num_threads(1)
    with zipfile.ZipFile(wheel) as archive:
        jit = archive.read(MEMBER)
        meta = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        package = Parser().parsestr(archive.read(meta).decode())
    model = torch.jit.load(io.BytesIO(jit), map_location="cpu").eval()

    cases = []
    for name, sr, chunk, chunks, batch, hertz, amplitude in CASES:
        signal = sine(sr, chunk * chunks, hertz, amplitude)
        whole = torch.tensor([signal] * batch, dtype=torch.float32)
        outputs = []
        with torch.no_grad():
            model.reset_states()
            for start in range(0, chunk * chunks, chunk):
                outputs.append(model(whole[:, start : start + chunk], sr))
            if not torch.equal(model.audio_forward(whole, sr), torch.cat(outputs, 1)):
                sys.exit("make_silero: audio_forward and forward in turn differ")
        cases.append(
            {
                "name": name,
                "sr": sr,
                "batch": batch,
                "samples": chunk,
                "calls": chunks,
                "hertz": hertz,
                "amplitude": amplitude,
                "crc32": zlib.crc32(struct.pack(f"<{len(signal)}f", *signal)),
                "outputs": [rounded(output) for output in outputs],
            }
        )

    head = {
        "model": "Silero VAD",
        "source": f"make_silero.py: torch.jit.load on the CPU, one thread; torch {version('torch')}",
        "licence": "MIT",
        "wheel": {
            "name": package["Name"],
            "version": package["Version"],
            "file": wheel.name,
            "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        },
        "jit": {"path": MEMBER, "bytes": len(jit), "sha256": hashlib.sha256(jit).hexdigest()},
        "forward": "forward(Tensor x, int sr) -> Tensor",
        "input": "x[b][n] = float32(amplitude * sin(2 * pi * hertz * n / sr)), n counted on "
        "from one call to the next",
    }
    with OUTPUT.open("w", encoding="ascii") as out:
        out.write("{\n")
        for key, value in head.items():
            out.write(f"{json.dumps(key)}: {json.dumps(value)},\n")
        out.write('"cases": [\n')
        out.write(",\n".join(json.dumps(case, separators=(",", ":")) for case in cases))
        out.write("\n]\n}\n")


if __name__ == "__main__":
    main()
