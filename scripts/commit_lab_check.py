"""Store the lab's check: merge the results of its seeds, write lab/check.json and log the attempt.

    python scripts/commit_lab_check.py RESULTS_JSON [RESULTS_JSON ...]

The seeds may have been run apart, `apothecary run recipes/lab_check.yaml --seeds=[0]` and so on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from apothecary.pipeline.lab_check import COMMITTED, LAB, render, summarise

ATTEMPTS = LAB / "attempts.jsonl"


def merged(paths: list[Path]) -> dict:
    """One results dictionary with the models of all, in the order of the first one's arms."""
    runs = [json.loads(path.read_text("utf-8")) for path in paths]
    incomplete = [path for path, run in zip(paths, runs, strict=True) if not run["complete"]]
    if incomplete:
        raise SystemExit(f"{incomplete[0]} is not complete; finish that run first")
    first = {**runs[0], "models": [model for run in runs for model in run["models"]]}
    seen: dict[tuple, dict] = {}
    for model in first["models"]:
        key = (model["arm"], model["stage"], model["p"], None if model["stage"] == "base" else model["seed"])
        seen.setdefault(key, model)
    return {**first, "models": list(seen.values())}


def main() -> None:
    found = summarise(merged([Path(name) for name in sys.argv[1:]]))
    COMMITTED.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    attempt = {"lab": found["lab"], "seeds": found["seeds"], "passed": found["passed"], "versions": found["versions"],
               "means": {one["criterion"]: one["mean"] for one in found["criteria"]}}  # fmt: skip
    with ATTEMPTS.open("a", encoding="utf-8") as log:
        log.write(json.dumps(attempt) + "\n")
    print(render(found))


if __name__ == "__main__":
    main()
