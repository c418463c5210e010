"""Sends requests to a Triton server with its client libraries, all at once: JSON on the standard input -> JSON."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

MODULES = {"http": tritonclient.http, "grpc": tritonclient.grpc}
TYPES = {"width": "INT32", "height": "INT32", "num_inference_steps": "INT32", "guidance_scale": "FP64"}
TYPES |= {"negative_prompt": "BYTES", "true_cfg_scale": "FP64", "loras": "BYTES"}
DTYPES = {"INT32": np.int32, "FP64": np.float64, "UINT64": np.uint64, "BYTES": object}
TIMEOUT_S = 300


def ask(asked: dict, addresses: dict) -> dict:
    module = MODULES[asked["protocol"]]
    prompts = asked["prompts"]
    values = {"prompt": ("BYTES", prompts)}
    if asked["seeds"] is not None:
        values["seed"] = ("UINT64", asked["seeds"])
    values |= {name: (TYPES[name], [value] * len(prompts)) for name, value in asked["inputs"].items()}
    inputs = []
    for name, (kind, column) in values.items():
        tensor = module.InferInput(name, [len(column), 1], kind)
        tensor.set_data_from_numpy(np.array([[encoded(value)] for value in column], DTYPES[kind]))
        inputs.append(tensor)
    address = addresses[asked["protocol"]]
    options = {"network_timeout": TIMEOUT_S} if asked["protocol"] == "http" else {}
    client = module.InferenceServerClient(address, **options)
    try:
        reply = client.infer("shapes", inputs)
    except InferenceServerException as e:
        return {"error": str(e)}
    finally:
        client.close()
    images = reply.as_numpy("image")
    return {
        "shape": list(images.shape),
        "pixels": [image.tobytes().hex() for image in images],
        "seeds": reply.as_numpy("image_seed")[:, 0].tolist(),
        "batch_sizes": reply.as_numpy("batch_size")[:, 0].tolist(),
    }


def encoded(value):
    return value.encode() if isinstance(value, str) else value


def main() -> None:
    asked = json.load(sys.stdin)
    with ThreadPoolExecutor(len(asked["cases"])) as pool:
        json.dump(list(pool.map(lambda one: ask(one, asked), asked["cases"])), sys.stdout)


if __name__ == "__main__":
    main()
