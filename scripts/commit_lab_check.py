"""Store the lab's check: merge the results of its seeds, write lab/check.json and log the attempt.

    python scripts/commit_lab_check.py RESULTS_JSON [RESULTS_JSON ...]

The seeds may have been run apart, `apothecary run recipes/lab_check.yaml --seeds=[0]` and so on.
"""

from __future__ import annotations

import json
import sys

from apothecary.pipeline.combined import combine
from apothecary.pipeline.lab_check import COMMITTED, LAB, render, summarise
from apothecary.pipeline.results import load_result

ATTEMPTS = LAB / "attempts.jsonl"


def main() -> None:
    found = summarise(combine([load_result(path).results for path in sys.argv[1:]]))
    COMMITTED.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    attempt = {"lab": found["lab"], "seeds": found["seeds"], "passed": found["passed"], "versions": found["versions"],
               "means": {one["criterion"]: one["mean"] for one in found["criteria"]}}  # fmt: skip
    with ATTEMPTS.open("a", encoding="utf-8") as log:
        log.write(json.dumps(attempt) + "\n")
    print(render(found))


if __name__ == "__main__":
    main()
