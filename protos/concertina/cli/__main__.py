"""The script `concertina`; `python -m concertina.cli` is the same."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line, or says what to install if its packages are missing."""
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
