"""Use little memory: one part of a bundle is loaded at a time, and one pipeline is closed before the next is loaded.

python low_memory.py BUNDLE [BUNDLE...] FOLDER
"""

import sys
from pathlib import Path

from arcflow_runtime import Pipeline

bundles, folder = [Path(name) for name in sys.argv[1:-1]], Path(sys.argv[-1])
for number, bundle in enumerate(bundles):
    # Leaving the block frees every part; memory="low" frees each one after its use.
    with Pipeline.load(bundle, memory="low") as pipe:
        # One call with many prompts loads each part once; a call for each prompt would load it each time.
        output = pipe(["a red circle", "a blue square"], seed=[1, 2])
        for i, image in enumerate(output.images):
            image.save(folder / f"bundle-{number}-image-{i}.png")
    print(f"{bundle.name}: {output.timings_ms['total']:.0f} ms, with loading")
