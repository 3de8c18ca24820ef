"""`python -m apothecary` equals `apothecary`."""

from __future__ import annotations

import sys


def main() -> None:
    from apothecary.cli import main as cli

    sys.exit(cli())


if __name__ == "__main__":
    main()
