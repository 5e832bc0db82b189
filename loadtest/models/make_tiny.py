#!/usr/bin/env python3
"""Make the tiny TorchScript test model and its reference outputs.

    python make_tiny.py

writes, beside this script, `tiny/1/model.pt` (a two-layer perceptron with a
ReLU between, 8 floats in, 4 out, any batch) and `../tests/data/tiny.json`
(inputs and what the model answers to them). Needs Python torch 2.x on the
CPU; the files kept here were made with torch 2.13.0. The weights come from a
fixed seed and the file carries no time or path, so running it again with the
same torch writes the same bytes.
"""

import io
import json
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
MODEL = HERE / "tiny" / "1" / "model.pt"
REFERENCE = HERE.parent / "tests" / "data" / "tiny.json"
SEED = 20240501


class Tiny(torch.nn.Module):
    """y = W2 relu(W1 x + b1) + b2, with 16 hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.nn.Linear(8, 16)
        self.out = torch.nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.hidden(x)))


def strip_debug(archive: bytes) -> bytes:
    """The same TorchScript archive without its `.debug_pkl` records.

    Those only map the code back to the Python source it came from: they hold
    the paths of the machine that made the file, and would change its bytes
    from one machine to the next. Loading does not need them.
    """
    reader = torch._C.PyTorchFileReader(io.BytesIO(archive))
    stripped = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(stripped)
    for name in reader.get_all_records():
        # The writer adds its own version and serialization id.
        if name.endswith(".debug_pkl") or name in ("version", ".data/serialization_id"):
            continue
        record = reader.get_record(name)
        writer.write_record(name, record, len(record))
    writer.write_end_of_file()
    return stripped.getvalue()


def inputs() -> list[torch.Tensor]:
    """Three inputs: batches of 1, 2 and 3, every value exact in float32."""
    one = torch.tensor([[1.0, -2.0, 0.5, 0.25, -0.125, 3.0, 0.0, -1.5]])
    two = torch.stack([torch.zeros(8), torch.ones(8)])
    three = torch.arange(24, dtype=torch.float32).reshape(3, 8) / 8 - 1.5
    return [one, two, three]


def rows(tensor: torch.Tensor) -> list[list[float]]:
    """Nested lists; 9 significant digits give back the same float32."""
    return [[float(f"{value:.9g}") for value in row] for row in tensor.tolist()]


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    scripted = torch.jit.script(Tiny().eval())

    archive = io.BytesIO()
    torch.jit.save(scripted, archive)
    MODEL.parent.mkdir(parents=True, exist_ok=True)
    MODEL.write_bytes(strip_debug(archive.getvalue()))

    # The reference is what the file says, not what the module in memory says.
    model = torch.jit.load(str(MODEL), map_location="cpu").eval()
    with torch.no_grad():
        cases = [{"x": rows(x), "y": rows(model(x))} for x in inputs()]
    REFERENCE.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    REFERENCE.write_text('{"cases":[\n' + lines + "\n]}\n")


if __name__ == "__main__":
    main()
