"""What the commands' options have in common beyond what tyro does."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def refuse_repeated(arguments: Sequence[str], names: Sequence[str]) -> None:
    """End with status 2 where an option that takes several values is given twice: the first ones would be lost.

    Args:
        arguments: the words of the command line.
        names: such options, with their dashes.
    """
    for name in names:
        if sum(word.partition("=")[0] == name for word in arguments) > 1:
            print(f"error: {name} is given twice; it takes all its values at once: {name} A B", file=sys.stderr)
            sys.exit(2)
