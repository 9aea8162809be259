"""The command line: python -m oasis_vq COMMAND. Errors are one line on stderr; exit status 0 or 1."""

import contextlib
import functools
import io
import os
import re
import sys
from collections.abc import Callable

import tyro

from oasis_vq.data_commands import check, download, phantom, prepare
from oasis_vq.model_commands import (
    encode,
    evaluate,
    generate,
    recipes,
    reconstruct,
    search,
    train_prior,
    train_vqvae,
)

COMMANDS = {
    "phantom": phantom,
    "download": download,
    "prepare": prepare,
    "check": check,
    "recipes": recipes,
    "train-vqvae": train_vqvae,
    "encode": encode,
    "train-prior": train_prior,
    "search": search,
    "reconstruct": reconstruct,
    "generate": generate,
    "evaluate": evaluate,
}
RESUMES = (phantom, download, prepare, train_vqvae, train_prior, search)
"""Commands that go on from where they were stopped when they are given again."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status, 0 or 1."""
    try:
        status = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # of `| head`, which reads no further; what is left is not to be said at the exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _run(arguments: list[str] | None) -> int:
    words = io.StringIO()
    try:
        with contextlib.redirect_stderr(words):
            command = tyro.extras.subcommand_cli_from_dict(
                {name: _later(function) for name, function in COMMANDS.items()},
                args=arguments,
                prog="python -m oasis_vq",
                description=__doc__,
            )
    except SystemExit as stop:  # tyro's: --help, or words that do not fit, which it says in a box
        text = " ".join(re.sub(r"[─│╭╮╰╯]|\[/?bold\]", " ", words.getvalue()).split())
        if stop.code:
            asked = (sys.argv[1:] if arguments is None else arguments)[:1]
            own = "".join(f"{word} " for word in asked if word in COMMANDS)
            print(re.sub("For full helptext, .*", f"Help: python -m oasis_vq {own}--help", text), file=sys.stderr)
        return 1 if stop.code else 0
    try:
        command()
    except KeyboardInterrupt as stop:
        hint = "The same command again goes on from there." if command.func in RESUMES else ""
        print(f"Stopped. {str(stop) or hint}".rstrip(), file=sys.stderr)
        return 1
    except BrokenPipeError:
        raise
    except Exception as error:
        if not isinstance(error, (ValueError, OSError, FloatingPointError, MemoryError, *_native_errors())):
            raise  # a fault of ours: its traceback is wanted
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _native_errors() -> tuple[type[Exception], ...]:
    """Return the errors of TensorFlow's native code, if TensorFlow has been imported."""
    return (sys.modules["tensorflow"].errors.OpError,) if "tensorflow" in sys.modules else ()


def _later(function: Callable) -> Callable:
    """Return a function with the same signature that only remembers its arguments."""

    @functools.wraps(function)
    def remember(*values, **named) -> Callable:
        return functools.partial(function, *values, **named)

    return remember


if __name__ == "__main__":
    sys.exit(main())
