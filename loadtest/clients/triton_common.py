"""What Triton's two clients, HTTP and gRPC, are asked alike. Both have the same classes under the same names."""
import numpy as np
from google.protobuf.json_format import MessageToDict
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from common import ROUNDING, references


def plain(answer):
    """A dict of either client's answer. Protobuf writes 64-bit numbers as texts."""
    if isinstance(answer, (dict, list)):
        return answer
    return MessageToDict(answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


class Suite:
    """One of the clients. Statuses are given as HTTP's; `statuses` has another protocol's words for them."""

    def __init__(self, module, client, args, checks, statuses, first=None):
        self.module, self.client, self.args, self.checks, self.statuses = module, client, args, checks, statuses
        texts, tensors = references("minilm")[:16], references("tiny")
        self.texts = np.array([case["text"] for case in texts], np.object_)
        self.vectors = np.array([case["embedding"] for case in texts], np.float32)
        self.tensors = [(np.array(case["x"], np.float32), np.array(case["y"], np.float32)) for case in tensors]
        self.wrong_input = [self.input("z", self.tensors[0][0], "FP32")]
        self.first = first  # the answer that all others must equal
        if args.key:
            client.register_plugin(self.authorize)

    def authorize(self, request):
        """A plugin is Triton's own way to add a header to every request. gRPC wants the name in lower case."""
        request.headers["authorization"] = f"Bearer {self.args.key}"

    def input(self, name, array, datatype, shape=None, **options):
        """With `shape`, an input whose data does not have the shape that it says."""
        made = self.module.InferInput(name, list(array.shape), datatype)
        made.set_data_from_numpy(array, **options)
        return made.set_shape(list(shape)) if shape else made

    def text_input(self, **options):
        return self.input("text", self.texts, "BYTES", **options)

    def x(self, array=None, **options):
        return self.input("x", self.tensors[0][0] if array is None else array, "FP32", **options)

    def infer(self, *inputs, **options):
        return self.client.infer(self.args.tensor_model, inputs or [self.x()], **options)

    def embed(self, *inputs, **options):
        return self.client.infer(self.args.model, inputs or [self.text_input()], **options)

    def same(self, what, *inputs, **options):
        """Whatever way the numbers travel, they are the same to the last bit."""
        with self.checks.section(what):
            self.checks.near(what, self.embed(*inputs, **options).as_numpy("embedding"), self.first)

    def answered(self, what, at, result, request_id):
        """The answer to the tensor at this place of the reference."""
        self.checks.near(what, result.as_numpy("y"), self.tensors[at][1], ROUNDING)
        self.checks.equal(f"{what}: id", plain(result.get_response())["id"], request_id)

    def refused(self, what, status, word, call):
        error = self.checks.raises(what, InferenceServerException, call)
        if error:
            self.checks.equal(f"{what}: status", error.status(), self.statuses.get(status, status))
            self.checks.contains(f"{what}: message", error.message(), word)

    def everything(self):
        with self.checks.section("server"):
            server = plain(self.client.get_server_metadata())
            self.checks.contains("server metadata", server, "name", "version", "extensions")
            self.checks.equal("alive", (self.client.is_server_live(), self.client.is_server_ready()), (True, True))
            extensions = ("binary_tensor_data", "model_repository", "statistics", "model_configuration")
            self.checks.contains("extensions", server["extensions"], *extensions)
        self.descriptions(self.args.model, ("text", "BYTES", [-1]), ("embedding", "FP32", [-1, 384]))
        self.descriptions(self.args.tensor_model, ("x", "FP32", [-1, 8]), ("y", "FP32", [-1, 4]))
        self.errors()
        self.counts()
        self.repository()

    def descriptions(self, model, *tensors):
        checks, client = self.checks, self.client
        with checks.section(f"descriptions of {model}"):
            checks.equal("ready", (client.is_model_ready(model), client.is_model_ready(model, "1")), (True, True))
            metadata, config = plain(client.get_model_metadata(model)), plain(client.get_model_config(model))
            checks.equal("the same for version 1", plain(client.get_model_metadata(model, "1")), metadata)
            config = config.get("config", config)  # gRPC wraps it
            told = metadata["name"], metadata["versions"], type(metadata["platform"]), config["name"]
            checks.equal("names, versions, platform", told, (model, ["1"], str, model))
            # With a batch dimension (max_batch_size > 0), `dims` leaves it out while metadata shows it.
            batch = [-1] if config["max_batch_size"] > 0 else []
            for kind, (name, datatype, shape) in zip(("input", "output"), tensors):
                [told], [put] = metadata[f"{kind}s"], config[kind]
                told = told["name"], told["datatype"], [int(size) for size in told["shape"]]
                checks.equal(f"metadata: {kind}", told, (name, datatype, shape))
                put = put["name"], put["data_type"], batch + [int(size) for size in put["dims"]]
                in_config = "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
                checks.equal(f"config: {kind}", put, (name, in_config, shape))

    def inference(self):
        with self.checks.section("inference"):
            result = self.embed(request_id="a request/1")
            self.first, answer = result.as_numpy("embedding"), plain(result.get_response())
            self.checks.near("vectors", self.first, self.vectors, ROUNDING)
            self.checks.unit_length("vectors", self.first)
            told = [answer[name] for name in ("id", "model_name", "model_version")]
            self.checks.equal("id, model, version", told, ["a request/1", self.args.model, "1"])
        self.same("bytes instead of str", self.input("text", np.char.encode(self.texts.astype(str)), "BYTES"))
        self.same("a requested output", outputs=[self.module.InferRequestedOutput("embedding")])
        self.same("a version", model_version="1")
        own = {"text": "a", "number": 1, "flag": True}
        self.same("parameters", priority=1, timeout=20_000_000, parameters=own, headers={"x-client": "triton"})
        with self.checks.section("tensors"):
            for at, (x, _) in enumerate(self.tensors):
                self.answered(f"tensor {x.shape}", at, self.infer(self.x(x), request_id=str(at)), str(at))
            self.checks.near("no rows", self.infer(self.x(x[:0])).as_numpy("y"), np.zeros((0, 4)))

    def counts(self):
        """Gateways spread requests over workers, which count each for itself: there only the form is certain."""
        checks, client, model = self.checks, self.client, self.args.tensor_model
        with checks.section("statistics"):
            [before] = plain(client.get_inference_statistics(model))["model_stats"]
            self.infer()
            [after] = plain(client.get_inference_statistics(model, "1"))["model_stats"]
            told = after["name"], after["version"], type(after["batch_stats"])
            checks.equal("statistics: name, version, batches", told, (model, "1", list))
            for name in ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output"):
                checks.contains(f"statistics: {name}", after["inference_stats"][name], "count", "ns")
            if not self.args.through_gateway:
                counted = [(one["inference_stats"]["success"]["count"], one["inference_count"], one["execution_count"])
                           for one in (before, after)]
                grew = all(int(now) > int(then) for then, now in zip(*counted))
                checks.holds("statistics: each count grew", grew, f"more than {counted[0]}", counted[1])
                last = int(after["last_inference"])
                checks.holds("statistics: last_inference", 1e12 < last < 1e13, "milliseconds since 1970", last)
                every = [stats["name"] for stats in plain(client.get_inference_statistics())["model_stats"]]
                checks.contains("statistics of all models", every, model, self.args.model)

    def errors(self):
        client, x = self.client, self.tensors[0][0]
        self.refused("infer of no version", "404", "model", lambda: self.infer(model_version="9"))
        self.refused("infer of no model", "404", "model", lambda: client.infer("no-such", [self.x()]))
        for get in (client.get_model_metadata, client.get_model_config, client.get_inference_statistics):
            self.refused(f"{get.__name__} of no model", "404", "model", lambda: get("no-such"))
        others = "BOOL UINT8 UINT16 UINT32 UINT64 INT8 INT16 INT32 INT64 FP16 BF16 FP64 BYTES".split()
        zeros = [(name, np.zeros((1, 8)).astype(triton_to_np_dtype(name))) for name in others]
        for what, word, *inputs in [
            ("an unknown input", "`z`", self.x(), *self.wrong_input),
            ("an input twice", "`x`", self.x(), self.x()),
            ("too few columns", "`x`", self.x(x[:, :7])),
            ("too few dimensions", "`x`", self.x(x[0])),
            ("less data than the shape says", "`x`", self.x(shape=(2, 8))),
            ("more data than the shape says", "`x`", self.x(self.tensors[1][0], shape=(1, 8))),
            *((f"{name} for FP32", "`x`", self.input("x", array, name)) for name, array in zeros),
        ]:
            self.refused(what, "400", word, lambda: self.infer(*inputs))
        fewer = self.text_input(shape=[len(self.texts) + 1])
        self.refused("fewer texts than the shape says", "400", "`text`", lambda: self.embed(fewer))
        self.refused("numbers for texts", "400", "`text`", lambda: self.embed(self.input("text", x, "FP32")))
        named = [self.module.InferRequestedOutput("no-such")]
        self.refused("an unknown output", "400", "`no-such`", lambda: self.infer(outputs=named))

    def repository(self):
        """Loading and unloading is for those who reach the worker."""
        client, model = self.client, self.args.tensor_model
        if self.args.through_gateway:
            self.refused("load", "403", "gateway", lambda: client.load_model(model))
            self.refused("unload", "403", "gateway", lambda: client.unload_model(model))
            if self.args.key:
                client.unregister_plugin()
                self.refused("no key", "401", "key", self.infer)
                client.register_plugin(self.authorize)
            return
        with self.checks.section("repository"):
            index = plain(client.get_model_repository_index())
            index = index["models"] if isinstance(index, dict) else index  # gRPC wraps it
            states = [(entry["name"], entry["version"], entry["state"]) for entry in index]
            self.checks.contains("index", states, (model, "1", "READY"), (self.args.model, "1", "READY"))
