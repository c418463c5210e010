"""Make the seeds of bundle_fuzz from bundles: python corpus.py OUT BUNDLE [BUNDLE...]."""

import sys
from pathlib import Path


def seeds(bundle: Path) -> list[bytes]:
    """Inputs of the fuzz target: the bundle's manifest, and the header of each of its safetensors files."""
    found = [b"m" + (bundle / "manifest.json").read_bytes()]
    for path in sorted(bundle.glob("*.safetensors")):
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        found.append(b"s" + (len(data) - end).to_bytes(8, "little") + data[8:end])
    return found


def main() -> None:
    """Write each seed to its own file in the folder OUT."""
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for argument in sys.argv[2:]:
        for i, seed in enumerate(seeds(Path(argument))):
            (out / f"{Path(argument).name}-{i}").write_bytes(seed)


if __name__ == "__main__":
    main()
