"""Write the seed inputs of bundle_fuzz, made of the tests' bundles and others: python corpus.py OUT [BUNDLE...]."""

import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent.parent.parent.parent / "tests"


def seeds(bundle: Path) -> list[bytes]:
    """Inputs of the fuzz target: the bundle's manifest, and the header of each of its safetensors files."""
    found = [b"m" + (bundle / "manifest.json").read_bytes()]
    for path in sorted(bundle.glob("*.safetensors")):
        with path.open("rb") as f:
            header = int.from_bytes(f.read(8), "little")
            data_bytes = path.stat().st_size - 8 - header
            if data_bytes >= 0:  # false for the tests' weights files, which are not in this format
                found.append(b"s" + data_bytes.to_bytes(8, "little") + f.read(header))
    return found


def main() -> None:
    """Write each seed to its own file in the folder OUT."""
    sys.path.insert(0, str(TESTS))
    from fake_bundle import make_bundle
    from test_straight_runtime import DYNAMIC, Schedule, make_straight

    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        made = [
            make_bundle(Path(folder) / "flux"),
            make_bundle(Path(folder) / "qwen", "qwen-image", baked=(2, 4)),
            make_straight(Path(folder) / "straight", schedule=Schedule(1.0, 1.0, 2, DYNAMIC, 0.1, (0.9, 0.3))),
        ]
        for bundle in [*made, *map(Path, sys.argv[2:])]:
            for i, seed in enumerate(seeds(bundle)):
                (out / f"{bundle.name}-{i}").write_bytes(seed)


if __name__ == "__main__":
    main()
