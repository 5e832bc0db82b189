"""FastAPI in front of the model, as people write it: a plain `def` endpoint, which FastAPI runs on its threads."""
from fastapi import FastAPI
from pydantic import BaseModel

from encoder import Embedder, answer

app = FastAPI()
embed = Embedder()


class EmbeddingsRequest(BaseModel):
    model: str
    input: str
    encoding_format: str = "base64"


@app.get("/health")
def health():
    return {}


@app.post("/v1/embeddings")
def embeddings(request: EmbeddingsRequest):
    return answer(request.model, embed([request.input])[0])
