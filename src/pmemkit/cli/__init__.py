"""The ``pmem`` command. Each command is a module of its own, loaded when it is asked for.

Exit codes: 0, 2 for wrong usage, those of :mod:`pmemkit.errors`, 130 after Ctrl-C, 141 when nobody
reads the output any more. An error is one line on standard error.

What this does not do: anything but choosing the module and turning exceptions into exit codes. It
imports nothing heavy, because ``pmem --version`` waits for it.
"""

import sys

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "create-image": ("create_image", "make a sparse image"),
    "list": ("list_namespaces", "regions, namespaces and dimms, as JSON in ndctl's shape"),
    "info": ("show_info", "what a region is and what it promises"),
    "serve": ("serve_exports", "serve regions over NBD"),
    "copy": ("copy_bytes", "copy between regions, files, standard input and output"),
    "bench": ("run_bench", "benchmarks against peers"),
}

_EXIT_USAGE = 2
_EXIT_SYSTEM = 11
_EXIT_INTERRUPT = 130
_EXIT_PIPE = 141


def _help() -> str:
    lines = ["usage: pmem COMMAND [OPTION...]", ""]
    lines += [f"  {name:14} {what}" for name, (_, what) in COMMANDS.items()]
    lines += [
        "",
        "  pmem COMMAND --help   options and examples of a command",
        "  pmem --version        the version",
        "",
        "Sizes are written as people do: 4096, 512M, 1.5G (powers of 1024).",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; gives the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        return _run(words)
    except KeyboardInterrupt:
        _complain(words, "interrupted")
        return _EXIT_INTERRUPT
    except BrokenPipeError:
        _drop_output()
        return _EXIT_PIPE
    except OSError as error:
        _complain(words, _sentence(error))
        code: int = getattr(error, "exit_code", _EXIT_SYSTEM)
        return code


def _run(words: list[str]) -> int:
    if not words:
        print(_help(), file=sys.stderr)
        return _EXIT_USAGE
    if words[0] in ("--version", "-V"):
        from pmemkit import __version__

        print(f"pmem {__version__}")
        return 0
    if words[0] in ("--help", "-h", "help"):
        print(_help())
        return 0
    command = COMMANDS.get(words[0])
    if command is None:
        known = ", ".join(COMMANDS)
        print(f"pmem: {words[0]!r} is not a command; commands are {known}", file=sys.stderr)
        return _EXIT_USAGE
    import importlib

    module = importlib.import_module(f"pmemkit.cli.{command[0]}")
    code: int = module.run(words[1:])
    # A reader that is gone is noticed here and not when the interpreter shuts down.
    sys.stdout.flush()
    return code


def _sentence(error: OSError) -> str:
    """What went wrong, in one line, with the path."""
    if hasattr(error, "kind"):
        return " ".join(str(error).split())
    path = f"{error.filename}: " if error.filename else ""
    return f"{path}{error.strerror or error}"


def _complain(words: list[str], text: str) -> None:
    command = f" {words[0]}" if words and words[0] in COMMANDS else ""
    print(f"pmem{command}: {text}", file=sys.stderr)


def _drop_output() -> None:
    """Points standard output to nowhere, so that flushing it at exit cannot fail."""
    import os

    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
