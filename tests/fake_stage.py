"""A fake of `arcflow STAGE ...`: writes a small output by a rename, and logs what it does to $FAKE/log.

Other files in $FAKE control it. While `STAGE.before` or `STAGE.after` exists, the stage waits before or after the
rename. `STAGE.code` holds its exit code, `STAGE.deaf` makes it ignore SIGTERM, and `plan.json` holds the output of
`plan`.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

FAKE = Path(os.environ["FAKE"])


def log(what: str) -> None:
    with (FAKE / "log").open("a") as f:
        f.write(f"{what} {STAGE} {os.getpid()}\n")


def wait(point: str) -> None:
    if (FAKE / f"{STAGE}.{point}").exists():
        log(point)
        end = time.monotonic() + 120  # a test that fails does not remove the file
        while (FAKE / f"{STAGE}.{point}").exists() and time.monotonic() < end:
            time.sleep(0.01)


def value(option: str) -> str:
    return sys.argv[sys.argv.index(option) + 1]


def write(out: Path, files: dict[str, str]) -> None:
    """Write `files` (name -> text) as the folder `out`, or a single file named "" as the file `out`."""
    partial = out.with_name(f".{out.name}.partial")
    if "" in files:
        partial.write_text(files[""])
        os.replace(partial, out)
        return
    partial.mkdir(exist_ok=True)
    for name, text in files.items():
        (partial / name).write_text(text)
    if out.exists():
        shutil.rmtree(out)
    os.rename(partial, out)


def contents(path: Path) -> str:
    """The contents of an input file or folder, which do not depend on when it was written."""
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    return "".join(f.read_text() for f in files)


STAGE = sys.argv[1]
if STAGE == "plan":
    if (FAKE / "plan.json").exists():
        print((FAKE / "plan.json").read_text())
        sys.exit(0)
    sys.exit(1)
if (FAKE / f"{STAGE}.deaf").exists():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
log("start")
wait("before")
place = "--report" if STAGE == "verify" else "--out"
words = [w for before, w in zip(sys.argv, sys.argv[1:], strict=False) if before != place]
text = "\n".join(contents(Path(word)) if Path(word).exists() else word for word in words)
text = hashlib.sha256(text.encode()).hexdigest()
code = int((FAKE / f"{STAGE}.code").read_text()) if (FAKE / f"{STAGE}.code").exists() else 0
if STAGE == "download":
    rows = []
    for name in ("base", "adapter"):
        asked = f"--{name}-revision"
        revision = value(asked) if asked in sys.argv else (FAKE / "commit").read_text()
        rows.append({"name": value(f"--{name}"), "revision": revision, "path": "/cache", "bytes": 7})
    print(json.dumps({"checkpoints": rows}))
elif STAGE in ("export", "quantize"):
    write(
        Path(value("--out")), {"weights": text, "manifest.json": json.dumps({"digest": text, "files": {"weights": 0}})}
    )
elif STAGE == "calibrate":
    write(Path(value("--out")), {"": text})
elif STAGE == "verify":
    write(Path(value("--report")), {"drift.json": json.dumps({"passed": code == 0, "text": text})})
elif STAGE == "build":
    (Path(sys.argv[2]) / "engines").mkdir(exist_ok=True)
    (Path(sys.argv[2]) / "engines" / "engine").write_text(text)
wait("after")
log("finish")
sys.exit(code)
