"""Several threads use one pipeline, and a request that is wrong is an error of that request only.

python thread_pool.py BUNDLE FOLDER
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from arcflow_runtime import Pipeline, RequestError

REQUESTS = [
    {"prompt": "a red circle", "seed": 1},
    {"prompt": "a green triangle", "seed": 2},
    {"prompt": "a blue heart", "seed": 3, "height": 63},  # not a multiple of 16
]


bundle, folder = Path(sys.argv[1]), Path(sys.argv[2])
# One thread in each engine and several calls at a time.
with Pipeline.load(bundle, threads=1) as pipe, ThreadPoolExecutor(max_workers=2) as pool:
    futures = [pool.submit(pipe, **request) for request in REQUESTS]
    for i, future in enumerate(futures):
        try:
            future.result().images[0].save(folder / f"request-{i}.png")
        except RequestError as e:
            print(f"request {i}: {e}")
