"""Load from Locust, and an example to start from:

    export ISOCHRONE_KEY=iso_... ISOCHRONE_CA=ca.pem
    locust -f locustfile.py --host https://localhost:8443 --headless -u 8 -r 8 -t 30s

Both are optional: a worker asks for no key, and a public CA needs no file. `ISOCHRONE_MODEL` names another model than
minilm. Locust exits with 1 if any request failed.
"""
import os
import random

from locust import HttpUser, between, task

MODEL = os.environ.get("ISOCHRONE_MODEL", "minilm")


def texts():
    words = "caravan dune wind letter river glass clock orchard violin harbour".split()
    return [" ".join(random.choices(words, k=8)) for _ in range(random.randint(1, 4))]


class Embedder(HttpUser):
    wait_time = between(0.01, 0.1)

    def on_start(self):
        self.client.verify = os.environ.get("ISOCHRONE_CA") or True
        if key := os.environ.get("ISOCHRONE_KEY"):
            self.client.headers["Authorization"] = f"Bearer {key}"

    @task
    def openai_embeddings(self):
        given = texts()
        self.ask("/v1/embeddings", {"model": MODEL, "input": given}, lambda answer: len(answer["data"]) == len(given))

    @task
    def infer(self):
        given = texts()
        body = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [len(given)], "data": given}]}
        self.ask(f"/v2/models/{MODEL}/infer", body, lambda answer: answer["outputs"][0]["shape"][0] == len(given))

    def ask(self, path, body, is_right):
        """A good status is not enough: the answer must hold as many vectors as texts were sent."""
        with self.client.post(path, json=body, timeout=30, catch_response=True) as answer:
            # Locust counts other statuses, and connections that fail, as failures by itself.
            if answer.status_code == 200 and not is_right(answer.json()):
                answer.failure(f"not what was asked for: {answer.text[:200]}")
