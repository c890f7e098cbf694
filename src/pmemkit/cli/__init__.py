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
    "init-machine": ("init_machine", "write a machine file: which dimms there are"),
    "qemu-args": ("print_qemu_args", "the QEMU options that attach these dimms"),
    "list": ("list_namespaces", "regions, namespaces and dimms, as JSON in ndctl's shape"),
    "info": ("show_info", "what a region is and what it promises"),
    "explain": ("explain_region", "storage or memory by nature, and how that is known"),
    "plan": ("plan_policy", "what a policy would change, step by step"),
    "apply": ("apply_policy", "make a machine what its policy wants"),
    "undo": ("undo_policy", "take back what apply changed"),
    "diff": ("plan_policy:run_diff", "is a machine as its policy wants it?"),
    "create-namespace": ("create_namespace", "make a namespace on an image"),
    "destroy-namespace": ("destroy_namespace", "remove one"),
    "reconfigure": ("reconfigure_namespace", "turn one into another mode"),
    "check-namespace": ("check_namespace", "check and repair a sector namespace"),
    "inject-error": ("inject_error", "make blocks of an image unreadable, or readable again"),
    "enable-namespace": ("switch_namespace:run_enable", "would a kernel enable it?"),
    "disable-namespace": ("switch_namespace:run_disable", "does nobody have it open?"),
    "init-labels": ("edit_labels:run_init", "make a label area ready for namespaces"),
    "read-labels": ("show_labels:run_read", "labels as JSON, or the bytes of the area"),
    "write-labels": ("edit_labels:run_write", "put a dump of the area back"),
    "zero-labels": ("edit_labels:run_zero", "make a dimm label-less"),
    "check-labels": ("show_labels:run_check", "are the index blocks and labels good?"),
    "recookie": ("edit_labels:run_recookie", "adopt the labels of an image that was moved"),
    "read-infoblock": ("show_infoblock:run_read", "info blocks as JSON"),
    "write-infoblock": ("show_infoblock:run_write", "make a PFN or DAX info block"),
    "serve": ("serve_exports", "serve regions over NBD"),
    "export-region": ("export_region", "serve regions to other processes, byte by byte"),
    "mount": ("mount_namespace", "a file system on a namespace, mounted (root)"),
    "umount": ("umount_namespace", "unmount what mount mounted"),
    "wear": ("show_wear", "what was written to an image, and the life that used"),
    "copy": ("copy_bytes", "copy between regions, files, standard input and output"),
    "memory": ("memory_pool", "the pool of a running program: stat, map, add, remove, blocks"),
    "top": ("memory_pool:run_top", "a pool's regions and blocks, live"),
    "bench": ("run_bench", "benchmarks against peers"),
}

_EXIT_USAGE = 2
_EXIT_SYSTEM = 11
_EXIT_INTERRUPT = 130
_EXIT_PIPE = 141


def _help() -> str:
    lines = ["usage: pmem COMMAND [OPTION...]", ""]
    lines += [f"  {name:18} {what}" for name, (_, what) in COMMANDS.items()]
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

    name, _, function = command[0].partition(":")
    module = importlib.import_module(f"pmemkit.cli.{name}")
    code: int = getattr(module, function or "run")(words[1:])
    # A reader that is gone is noticed here and not when the interpreter shuts down.
    sys.stdout.flush()
    return code


def _sentence(error: OSError) -> str:
    """What went wrong, with the path: one line, or one for each problem of a file."""
    if hasattr(error, "kind"):
        return "\n".join(" ".join(line.split()) for line in str(error).splitlines())
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
