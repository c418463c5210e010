"""Read what a bundle holds, without loading a part; write it as JSON.

python read_manifest.py BUNDLE FOLDER
"""

import json
import sys
from pathlib import Path

from arcflow_runtime import Bundle, BundleError

path, folder = Path(sys.argv[1]), Path(sys.argv[2])
try:
    manifest = Bundle.open(path).manifest  # checks the digest, all sizes and the hashes of small files
except BundleError as e:
    sys.exit(f"not a usable bundle: {e}")
summary = {
    "family": manifest.family,
    "base": manifest.provenance.base.name,
    "steps": manifest.schedule.num_inference_steps,
    "largest image": [manifest.ranges.height_px.max, manifest.ranges.width_px.max],
    "bytes": sum(entry.bytes for entry in manifest.files.values()),
    "parts": {name: f"{part.parameters:,} in {part.precision}" for name, part in manifest.parts.items()},
}
(folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
print(json.dumps(summary, indent=2))
