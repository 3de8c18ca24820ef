"""How many times more prompts a second an evaluation answers than generation of one prompt at a time.

    python benchmarks/generation.py --out benchmarks/results/generation.json --rounds 5
    python benchmarks/generation.py --out benchmarks/results/generation_1_thread.json --rounds 5 --threads 1

    batched   apothecary.models.generate.generate, as every evaluation calls it
    single    transformers' own generate, greedy and with its cache, on each prompt by itself

Every round answers the same prompts of the lab in both ways, in an order that alternates, and the texts must be equal.
The model is the lab's, in fp32.  Throughput is by the clock on the wall with every core, as evaluations run; with one
thread it is processor time, which other load disturbs little.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers import GenerationConfig

from apothecary.data.chat import eos_id, render_prompt
from apothecary.evals.suites import PROMPTS, EvalConfig, load_suites, spread
from apothecary.models.generate import generate
from apothecary.models.load import LoadedModel, ModelConfig, load_model
from benchmarks.rounds import clock
from benchmarks.step_cost import CLOCKS, machine, opened, versions, write

WALL = "wall time"
TARGET = 10.0  # times the throughput of one prompt at a time
Texts = list[list[int]]


def prompts(loaded: LoadedModel, limit: int) -> list[list[int]]:
    """Token ids of the held-out prompts of all suites, at most `limit` of them, spread evenly."""
    suites = load_suites(EvalConfig())
    rows = [row for name in PROMPTS for row in suites[name]]
    return [list(render_prompt(row, loaded.tokenizer).ids) for row in spread(rows, limit)]


@torch.no_grad()
def one_at_a_time(loaded: LoadedModel, asked: list[list[int]], tokens: int) -> Texts:
    end = eos_id(loaded.tokenizer)
    settings: Any = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=end, pad_token_id=loaded.tokenizer.pad_token_id
    )
    found = []
    for ids in asked:
        given = torch.tensor([ids], device=loaded.model.device)
        output = loaded.model.generate(given, generation_config=settings)[0, len(ids) :].tolist()  # type: ignore
        found.append(output[: output.index(end)] if end in output else output)
    return found


def run_round(loaded: LoadedModel, asked: list[list[int]], settings: dict[str, Any], number: int) -> dict[str, Any]:
    """Seconds of both ways; stops where they do not give the same texts."""
    tokens, batch = settings["max_new_tokens"], settings["batch"]
    ways: dict[str, Callable[[], Texts]] = {
        "batched": lambda: generate(loaded.model, loaded.tokenizer, asked, tokens, batch),
        "single": lambda: one_at_a_time(loaded, asked, tokens),
    }
    seconds, texts = {}, {}
    for name in list(ways)[:: -1 if number % 2 else 1]:
        now = time.perf_counter if settings["clock"] == WALL else lambda: clock(settings["device"])
        start = now()
        texts[name] = ways[name]()
        seconds[name] = now() - start
    if texts["batched"] != texts["single"]:
        sys.exit("the two ways gave different texts; their times cannot be compared")
    return {"seconds": seconds, "tokens": sum(map(len, texts["single"]))}


def summarise(result: dict[str, Any]) -> dict[str, Any]:
    """The median ratio over rounds, the least and the most, and prompts a second of both ways."""
    rounds, count = [entry["seconds"] for entry in result["rounds"]], result["settings"]["prompts"]
    ratios = [seconds["single"] / seconds["batched"] for seconds in rounds]
    speed = {name: count / median(seconds[name] for seconds in rounds) for name in ("batched", "single")}
    return {"ratio": median(ratios), "least": min(ratios), "most": max(ratios), "target": TARGET,
            "met": median(ratios) >= TARGET, "prompts a second": speed}  # fmt: skip


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file, continued where it exists")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that the file shall hold (default 3)")
    parser.add_argument("--prompts", type=int, default=300, help="of the lab's held-out ones (default 300)")
    parser.add_argument("--batch", type=int, default=EvalConfig().batch_size, help="prompts of a batch (default 64)")
    parser.add_argument("--device", choices=CLOCKS, default="cpu")
    parser.add_argument("--threads", type=int, help="of a CPU (default: one for each core)")
    options = parser.parse_args(given)
    if options.threads:
        torch.set_num_threads(options.threads)
    several = options.device == "cpu" and torch.get_num_threads() > 1
    loaded = load_model(ModelConfig("lab", device=options.device, dtype="float32"))
    asked = prompts(loaded, options.prompts)
    settings = {"model": "lab", "dtype": "fp32", "device": options.device,
                "clock": WALL if several else CLOCKS[options.device],
                "threads": torch.get_num_threads(), "prompts": len(asked), "batch": options.batch,
                "max_new_tokens": EvalConfig().max_new_tokens}  # fmt: skip
    wanted = {"machine": machine(options.device), "versions": versions(), "settings": settings}
    result = opened(options.out, wanted)
    generate(loaded.model, loaded.tokenizer, asked[:4], 2, 4)  # what is loaded at the first call is not counted
    for number in range(len(result["rounds"]), options.rounds):
        result["rounds"].append(run_round(loaded, asked, settings, number))
        result["summary"] = summarise(result)
        write(options.out, result)
        print(f"round {number + 1} of {options.rounds} is in {options.out}", flush=True)


if __name__ == "__main__":
    main()
