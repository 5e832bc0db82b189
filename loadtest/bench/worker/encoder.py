"""The peers' model: transformers' own BertModel over our weights, mean-pooled to unit length.

`python encoder.py export DIR` writes what every other part is held to: DIR/reference.f32 (the vectors of
DIR/texts.txt, each text alone, so that no padding is involved) and DIR/model.onnx.
"""
import base64
import os
import sys

import torch
from tokenizers import Tokenizer
from transformers import BertModel

MODEL = os.environ["MODEL_DIR"]  # model.safetensors, config.json, tokenizer.json
MAX_TOKENS = 256

torch.set_num_threads(1)


class Encoder(torch.nn.Module):
    def __init__(self, attention="sdpa"):
        super().__init__()
        self.bert = BertModel.from_pretrained(MODEL, add_pooling_layer=False, attn_implementation=attention)
        self.eval()

    def forward(self, ids, mask):
        hidden = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1))


class Tokens:
    """Texts to token ids and mask, padded to the longest of them."""

    def __init__(self):
        self.tokenizer = Tokenizer.from_file(os.path.join(MODEL, "tokenizer.json"))
        self.tokenizer.enable_truncation(MAX_TOKENS)
        self.tokenizer.enable_padding()  # the file pads everything to 128

    def __call__(self, texts):
        encodings = self.tokenizer.encode_batch(texts)
        ids = torch.tensor([encoding.ids for encoding in encodings])
        return ids, torch.tensor([encoding.attention_mask for encoding in encodings])


class Embedder:
    """Texts to an array of vectors: the whole work of a request."""

    def __init__(self):
        self.tokens, self.encoder = Tokens(), Encoder()
        self(["the first pass allocates and chooses kernels"] * 2)

    def __call__(self, texts):
        with torch.inference_mode():
            return self.encoder(*self.tokens(texts)).numpy()


def answer(model, vector):
    """OpenAI's answer to one text, base64."""
    data = {"object": "embedding", "index": 0, "embedding": base64.b64encode(vector.tobytes()).decode()}
    return {"object": "list", "model": model, "data": [data]}


def export(directory):
    with open(os.path.join(directory, "texts.txt")) as file:
        texts = file.read().splitlines()
    embed = Embedder()
    with open(os.path.join(directory, "reference.f32"), "wb") as file:
        for text in texts:
            file.write(embed([text]).tobytes())
    # Of the graphs that torch 2.13 exports (either exporter, either attention), onnxruntime runs this one fastest.
    axes = {0: "rows", 1: "tokens"}
    torch.onnx.export(
        Encoder("eager"), embed.tokens(texts[:4]), os.path.join(directory, "model.onnx"), dynamo=False,
        opset_version=18, input_names=["ids", "mask"], output_names=["vectors"],
        dynamic_axes={"ids": axes, "mask": axes, "vectors": {0: "rows"}},
    )


if __name__ == "__main__":
    export(sys.argv[2])
