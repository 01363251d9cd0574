"""The script `concertina`, which is `python -m concertina.cli` too."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line; says what to install where the packages it needs are missing."""
    try:
        from concertina.cli.main import main as run
    except ModuleNotFoundError as missing:
        sys.exit(
            f"error: the command concertina needs the 'cli' extra ({missing}): "
            "run pip install './protos[cli]' in its checkout"
        )
    run()


if __name__ == "__main__":
    main()
