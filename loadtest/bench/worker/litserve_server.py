"""LitServe in front of the model, with its batching: `python litserve_server.py PORT`."""
import sys

import litserve

from encoder import Embedder, answer


class Embeddings(litserve.LitAPI):
    def setup(self, device):
        self.embed = Embedder()

    def decode_request(self, request):
        return request["input"]

    def predict(self, texts):
        return list(self.embed(texts))

    def encode_response(self, vector):
        return answer("minilm", vector)


if __name__ == "__main__":
    api = Embeddings(max_batch_size=32, batch_timeout=0.002, api_path="/v1/embeddings")
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=1)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning",
               access_log=False, timeout_keep_alive=60)
