"""Generate a batch, each image with a seed of its own, then one of them again alone.

python batch_with_seeds.py BUNDLE FOLDER
"""

import sys
from pathlib import Path

from arcflow_runtime import Pipeline

PROMPTS = ["a large red circle", "a small yellow heart"]


bundle, folder = Path(sys.argv[1]), Path(sys.argv[2])
with Pipeline.load(bundle) as pipe:
    # Two images of each prompt: four seeds, in the order of the images.
    batch = pipe(PROMPTS, num_images_per_prompt=2, seed=[1, 2, 3, 4])
    for seed, image in zip(batch.seed, batch.images, strict=True):
        image.save(folder / f"seed-{seed}.png")

    alone = pipe(PROMPTS[1], seed=[3]).images[0]
assert alone.tobytes() == batch.images[2].tobytes(), "an image depends on its own prompt and seed only"
print(f"{len(batch.images)} images in {batch.timings_ms['total']:.0f} ms")
