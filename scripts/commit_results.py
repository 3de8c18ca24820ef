"""Store the results of a recipe whose seeds were run apart, and print them as a table for the documentation.

    python scripts/commit_results.py RUN [RUN ...] --out recipes/results/NAME.json

RUN is the folder of a run or its results.json: `apothecary run recipes/NAME.yaml --seeds=[0] --out RUN` and so on.  A
stored file is read again, and only the table printed, with

    python scripts/commit_results.py recipes/results/NAME.json [--base ARM] [--only PATTERN]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from apothecary.errors import ApothecaryError
from apothecary.pipeline.combined import combine, compact, text
from apothecary.pipeline.results import load_result
from apothecary.report.markdown import markdown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="file to write")
    parser.add_argument("--base", help="arm that the others are compared with, such as 'random, {align}'; else the "
                        "undefended one of each")
    parser.add_argument("--only", default="*",
                        help="patterns of the models in the table, such as 'vectors 100, *|undefended*'")
    asked = parser.parse_args()
    results = compact(combine([load_result(run).results for run in asked.runs]))
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(text(results), "utf-8")
    print(markdown(results, asked.base, asked.only))


if __name__ == "__main__":
    try:
        main()
    except ApothecaryError as error:
        sys.exit(f"error: {error}")
