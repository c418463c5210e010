"""A plain service around PyTorch, as one writes it first: FastAPI, one image at a time, PIL's PNG. Prints its address.

    python benchmarks/serve_torch.py BASE ADAPTER

Its model is diffusers' pipeline with the adapter unmerged in peft, as in `cpu_vs_torch.py`.
"""

from __future__ import annotations

import argparse
import base64
import io
import socket
import sys
import threading

import uvicorn
from fastapi import FastAPI
from PIL import Image
from pydantic import BaseModel

from arcflow_export.checkpoint.sources import Location
from arcflow_export.commands.sources import quiet_libraries
from arcflow_export.student.load import load_student
from arcflow_export.student.reference import TorchStudent


class Request(BaseModel):
    """The fields that the benchmark sends."""

    prompt: str
    size: str
    seed: int
    num_inference_steps: int


def create_app(student: TorchStudent, max_sequence_length: int) -> FastAPI:
    """The application; FastAPI calls `generate` in a pool of threads, and the lock lets one at a time use torch."""
    app, lock = FastAPI(), threading.Lock()

    @app.post("/v1/images/generations")
    def generate(request: Request) -> dict[str, object]:
        width, height = map(int, request.size.split("x"))
        with lock:
            run = student.generate(
                request.prompt,
                height,
                width,
                request.num_inference_steps,
                request.seed,
                max_sequence_length=max_sequence_length,
            )
        levels = (run.images[0] * 255).round().byte().numpy()
        file = io.BytesIO()
        Image.fromarray(levels).save(file, "PNG")
        return {"data": [{"b64_json": base64.b64encode(file.getvalue()).decode(), "batch_size": 1}]}

    return app


def main() -> int:
    """Serve on a free port of this machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("adapter")
    parser.add_argument("--max-sequence-length", type=int, default=12)
    args = parser.parse_args()
    quiet_libraries()
    student = TorchStudent(load_student(Location(args.base), Location(args.adapter), []))
    bound = socket.create_server(("127.0.0.1", 0))
    print(f"serving PyTorch on http://127.0.0.1:{bound.getsockname()[1]}", flush=True)
    config = uvicorn.Config(create_app(student, args.max_sequence_length), log_level="warning", access_log=False)
    uvicorn.Server(config).run([bound])
    return 0


if __name__ == "__main__":
    sys.exit(main())
