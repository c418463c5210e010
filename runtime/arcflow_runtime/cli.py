"""The `arcflow` command: run the subcommand named by the first argument and return an exit code.

Exit codes: 0 done, 1 failed, 2 wrong arguments, 130 Ctrl-C, 143 terminated by SIGTERM.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import signal
import sys
from collections.abc import Sequence
from types import ModuleType

from arcflow_runtime.errors import ArcFlowError, RequestError
from arcflow_runtime.installing import install_command

#: Subcommand -> its module. The module's docstring is the help text; it has `add_arguments(parser)` and
#: `run(args) -> int`.
COMMANDS = {
    "doctor": "arcflow_export.commands.doctor",
    "compile": "arcflow_export.commands.compile",
    "plan": "arcflow_export.commands.plan",
    "download": "arcflow_export.commands.download",
    "export": "arcflow_export.commands.export",
    "calibrate": "arcflow_calibration.commands.calibrate",
    "generate": "arcflow_runtime.commands.generate",
    "serve": "arcflow_serve.commands.serve",
    "quantize": "arcflow_export.commands.quantize",
    "build": "arcflow_runtime.commands.build",
    "verify": "arcflow_export.commands.verify",
    "push": "arcflow_runtime.commands.push",
    "inspect": "arcflow_runtime.commands.inspect",
    "lora": "arcflow_runtime.commands.lora",
    "bench": "arcflow_runtime.commands.bench",
    "profile": "arcflow_runtime.commands.profile",
    "distill": "arcflow_distill.commands.distill",
    "eval": "arcflow_distill.commands.eval",
    "train-shapes": "arcflow_distill.commands.train_shapes",
}
DONE, FAILED, BAD_USAGE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143


class _Parser(argparse.ArgumentParser):
    """An argument parser that suggests the nearest option when one is misspelt."""

    def parse_strictly(self, argv: Sequence[str]) -> argparse.Namespace:
        args, rest = self.parse_known_intermixed_args(argv)
        if rest:
            known = [option for action in self._actions for option in action.option_strings]
            self.error(f"unknown argument {rest[0]!r}{_suggest(rest[0].split('=')[0], known)}")
        return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code; `argv` defaults to `sys.argv[1:]`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return DONE if argv else BAD_USAGE
    name = argv[0]
    if name not in COMMANDS:
        print(f"arcflow: error: unknown command {name!r}{_suggest(name, COMMANDS)}", file=sys.stderr)
        print(f"the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return BAD_USAGE
    # SIGTERM raises an exception, so that `finally` blocks remove unfinished files.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        return _run(name, argv[1:])
    except KeyboardInterrupt:
        print(f"arcflow {name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as e:  # argparse's help and errors
        return e.code if isinstance(e.code, int) else FAILED


def _run(name: str, argv: list[str]) -> int:
    debug = "--debug" in argv
    try:
        module = importlib.import_module(COMMANDS[name])
        args = _parser(name, module).parse_strictly(argv)
        return int(module.run(args))
    except ModuleNotFoundError as e:
        if debug or (e.name or "").startswith("arcflow_runtime"):
            raise
        command = install_command(_package(name), e.name or "")
        return _fail(name, f"needs {e.name}, which is not installed; run: {command}", FAILED)
    except RequestError as e:
        if debug:
            raise
        return _fail(name, str(e), BAD_USAGE)
    except (ArcFlowError, OSError) as e:
        if debug:
            raise
        return _fail(name, str(e), FAILED)


def check_usage(argv: Sequence[str]) -> None:
    """Check the arguments of the subcommand `argv[0]` without running it.

    Raises:
        SystemExit: the arguments are wrong; the reason was printed.
    """
    name, *rest = argv
    _parser(name, importlib.import_module(COMMANDS[name])).parse_strictly(rest)


def _parser(name: str, module: ModuleType) -> _Parser:
    parser = _Parser(
        prog=f"arcflow {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _overview() -> str:
    lines = ["usage: arcflow COMMAND ...", "", "Compile and run two-step ArcFlow students.", ""]
    for name, path in COMMANDS.items():
        try:
            summary = (importlib.import_module(path).__doc__ or "").strip().splitlines()[0]
        except ModuleNotFoundError:
            summary = f"(not installed: {install_command(_package(name))})"
        lines.append(f"  {name:14}{summary}")
    return "\n".join([*lines, "", "Run `arcflow COMMAND --help` for the options of a command."])


def _package(name: str) -> str:
    """The package that holds the command `name`."""
    return COMMANDS[name].split(".")[0]


def _suggest(word: str, known: Sequence[str] | dict[str, str]) -> str:
    close = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""


def _fail(name: str, message: str, code: int) -> int:
    print(f"arcflow {name}: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
