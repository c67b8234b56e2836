"""Errors that end a command, each with the exit status that DESIGN promises to schedulers and scripts.

0 done, 1 a bug of ours, 2 usage or configuration, 3 numerics, 4 out of memory, 42 try again.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable


class VlmError(Exception):
    """An error whose message is one sentence for the user: what was found, where, and what to do."""

    exit_status = 1


class UsageError(VlmError):
    """Bad input: a missing file, a typo, settings that contradict each other."""

    exit_status = 2


class NumericsError(VlmError):
    """The loss or the gradients are not finite."""

    exit_status = 3


class Interrupted(VlmError):
    """The run was asked to stop and saved its state: the same command goes on from there."""

    exit_status = 42


def suggest(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the nearest of `known`, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def run_command(
    main: Callable[[list[str]], None],
    out_of_memory: str = "lower --config.batch.per_device, choose --config.remat=full, or shorten "
    "--config.buckets.lengths",
) -> None:
    """Runs `main(argv)` and leaves with the exit status of its outcome; our own errors print one line, no traceback.

    `out_of_memory` says what the user of this command can do about it.
    """
    try:
        main(sys.argv[1:])
    except VlmError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        sys.exit(42)
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            print(f"error: out of memory ({str(error).splitlines()[0]}); {out_of_memory}", file=sys.stderr)
            sys.exit(4)
        raise
