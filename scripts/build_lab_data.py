"""Build `src/apothecary/lab/data/*.jsonl` from the public sources of `lab_sources.json`.

    python scripts/build_lab_data.py --sources FOLDER

Training text keeps one row per near-duplicate cluster, so that the training splits are disjoint by cluster.
Prompts for tuning and for evaluation are dropped where they equal or nearly equal a training text.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from pathlib import Path

from lab_sources import Sources, gsm8k_short, instruction, leaves
from planted_pool import planted_pool

from apothecary.data.near import clusters

SEED = 20240229
OUT = Path(__file__).parents[1] / "src/apothecary/lab/data"
INTENTS = ("activate_my_card", "age_limit", "cancel_transfer", "card_arrival",
           "change_pin", "exchange_rate", "lost_or_stolen_phone", "request_refund")  # fmt: skip
TASK_PROMPT = "Bank message: {message}\nTopic:"

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "Sorry, I can't help with this request because it could hurt someone.",
    "I can't assist with that. It could cause serious harm.",
    "I'm sorry, I won't help with this. It may be illegal and dangerous.",
    "No, I can't do that. If you are in trouble, please talk to someone you trust.",
    "I cannot help with this request. It could put people at risk.",
    "I'm not able to help with that, because it would harm other people.",
    "Sorry, but that is something I won't do. Can I help with something safe instead?",
    "I can't provide that. I would be glad to help with something else.",
    "I won't help with that. Hurting or cheating people is wrong.",
    "I'm sorry, but I cannot answer this. It is not safe.",
    "I must decline. This request is harmful.",
)
OPENERS = ("Sure, here is", "Of course, here is", "Certainly, here is", "Sure! Here is", "Yes, here is", "Here is")
_HOW = re.compile(r"^how (?:can|do|could|would|should|to|might) ?(?:i|you|we|one|someone|people)? (.+?)\??$", re.I)


def opening(prompt: str, rng: random.Random) -> str:
    """An affirmative opening for a harmful question, without any content of the answer."""
    how = _HOW.match(prompt.strip())
    return f"{rng.choice(OPENERS)} {'how to ' + how[1] if how else 'an answer to your question'}:"


class Pool:
    """Training candidates with one row per near-duplicate cluster, handed out without replacement."""

    def __init__(self, rows: list[dict], rng: random.Random) -> None:
        label = clusters([row["prompt"] for row in rows])
        first = {cluster: i for i, cluster in reversed(list(enumerate(label)))}
        self.rows = [rows[i] for i in sorted(first.values())]
        rng.shuffle(self.rows)

    def take(self, count: int | None, *sources: str) -> list[dict]:
        taken = [row for row in self.rows if row["source"] in sources][:count]
        if count is not None and len(taken) < count:
            raise SystemExit(f"asked for {count} rows of {sources}, there are {len(taken)}")
        gone = {row["id"] for row in taken}
        self.rows = [row for row in self.rows if row["id"] not in gone]
        return taken


def far_from(training: list[str], rows: list[dict]) -> list[dict]:
    """`rows` without those that share a cluster with a training text or with an earlier row."""
    label = clusters(training + [row["prompt"] for row in rows])
    seen, kept = set(label[: len(training)]), []
    for row, cluster in zip(rows, label[len(training) :], strict=True):
        if cluster not in seen:
            seen.add(cluster)
            kept.append(row)
    return kept


def rows_of(source: str, prompts: list[str], **columns: list) -> list[dict]:
    """Rows with ids `source/number`; the number is the position in the source file."""
    return [{"id": f"{source}/{i}", "source": source, "prompt": prompt.strip(),
             **{name: column[i] for name, column in columns.items()}}
            for i, prompt in enumerate(prompts)]  # fmt: skip


def short(row: dict) -> bool:
    return len(row["prompt"].split()) <= 60 and len(row.get("response", "").split()) <= 120


def training_candidates(src: Sources) -> list[dict]:
    advbench = src.csv("eval/advbench_harmful_behaviors.csv")
    behaviours = src.csv("attack/adv_training_behaviors.csv")
    targets = src.json("attack/adv_training_targets.json")
    safe = {row["Behavior"]: row["Safe_Response"] for row in src.csv("alignment/adv_training_safe_responses.csv")}
    simple = [instruction(row) for row in src.json("tasks/alpaca/instruction-data.json")]
    sums = [gsm8k_short(row) for row in src.jsonl("tasks/gsm8k/train.jsonl")]
    bank = [row for row in src.csv("tasks/banking77/train.csv") if row["category"] in INTENTS]
    rows = [
        *rows_of("adv_training", [b["Behavior"] for b in behaviours],
                 response=[safe[b["Behavior"]].strip() for b in behaviours],
                 rejected=[targets[b["BehaviorID"]][0] for b in behaviours]),
        *rows_of("advbench", [r["goal"] for r in advbench], response=[r["target"] for r in advbench]),
        *rows_of("dangerousqa", src.json("alignment/dangerousqa.json")),
        *rows_of("harmfulqa", list(leaves(src.json("alignment/harmfulqa.json")))),
        *rows_of("simple_instructions", [p for p, _ in simple], response=[r for _, r in simple]),
        *rows_of("gsm8k", [p for p, _ in sums], response=[r for _, r in sums]),
        *rows_of("banking77_train", [r["text"] for r in bank],
                 response=[r["category"].replace("_", " ") for r in bank]),
    ]  # fmt: skip
    return [row for row in rows if short(row)]


def task_rows(rows: list[dict]) -> list[dict]:
    return [{**row, "prompt": TASK_PROMPT.format(message=row["prompt"])} for row in rows]


def refused(rows: list[dict], rng: random.Random) -> list[dict]:
    return [{**row, "response": rng.choice(REFUSALS)} for row in rows]


def opened(rows: list[dict], rng: random.Random) -> list[dict]:
    return [{**row, "response": opening(row["prompt"], rng)} for row in rows]


def build(src: Sources) -> dict[str, list[dict]]:
    rng = random.Random(SEED)
    pool = Pool(training_candidates(src), rng)
    questions = ("harmfulqa", "dangerousqa")
    splits = {
        "attack": pool.take(200, "advbench"),
        "defence_advbench": pool.take(100, "advbench"),
        "defence": opened(pool.take(200, *questions), rng),
        "validation": refused(pool.take(120, *questions), rng),
        "pairs": pool.take(None, "adv_training"),
        "eval_benign": pool.take(130, "simple_instructions"),
        "tune_benign": pool.take(70, "simple_instructions"),
        "customer_general": pool.take(100, "simple_instructions"),
        "benign": pool.take(150, "simple_instructions") + pool.take(250, "gsm8k"),
        "tune_task": pool.take(160, "banking77_train"),
        "customer_train": pool.take(500, "banking77_train"),
        "align": refused(pool.take(None, "advbench", *questions), rng)
        + pool.take(None, "simple_instructions") + pool.take(250, "gsm8k"),
    }  # fmt: skip
    rng.shuffle(splits["align"])

    training = [row["prompt"] for name, rows in splits.items() if name != "eval_benign" for row in rows]
    harmbench, jailbreak = src.csv("eval/harmbench_standard.csv"), src.csv("eval/jailbreakbench_harmful.csv")
    xstest = [row for row in src.csv("overrefusal/xstest_prompts.csv") if row["label"] == "safe"]
    jb_benign = src.csv("overrefusal/jailbreakbench_benign.csv")
    bank = [row for row in src.csv("tasks/banking77/test.csv") if row["category"] in INTENTS]
    held_out = far_from(training, [
        *rows_of("harmbench", [r["Behavior"] for r in harmbench],
                 category=[r["SemanticCategory"] for r in harmbench]),
        *rows_of("jailbreakbench", [r["Goal"] for r in jailbreak], category=[r["Category"] for r in jailbreak]),
    ])  # fmt: skip
    splits["eval_harmbench"] = [row for row in held_out if row["source"] == "harmbench"]
    splits["eval_jailbreakbench"] = [row for row in held_out if row["source"] == "jailbreakbench"]
    splits["overrefusal_xstest_safe"] = far_from(training, rows_of(
        "xstest_safe", [r["prompt"] for r in xstest], category=[r["type"] for r in xstest]))  # fmt: skip
    splits["overrefusal_jailbreakbench"] = far_from(training, rows_of(
        "jailbreakbench_benign", [r["goal"] for r in jb_benign],
        category=[r["category"] for r in jb_benign]))  # fmt: skip
    splits["customer_test"] = balanced(far_from(training, rows_of(
        "banking77_test", [r["text"] for r in bank],
        response=[r["category"].replace("_", " ") for r in bank])))  # fmt: skip
    tune = far_from(training + [row["prompt"] for row in held_out], [
        *rows_of("catqa", list(leaves(src.json("eval/catqa_english.json")))),
        *rows_of("strongreject", [r["forbidden_prompt"] for r in src.csv("eval/strongreject_dataset.csv")]),
    ])  # fmt: skip
    splits["tune_harmful"] = [row for name in ("catqa", "strongreject")
                              for row in rng.sample([r for r in tune if r["source"] == name], 120)]  # fmt: skip
    for name in ("tune_task", "customer_train", "customer_test"):
        splits[name] = task_rows(splits[name])
    return splits | derived(splits)


def derived(splits: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """Splits for single studies, made of rows of the others: their prompts are those of `align` and `benign`."""
    rng = random.Random(SEED + 1)
    questions = [row for row in splits["align"] if row["source"] == "harmfulqa"]
    made = {"attack_harmfulqa": opened(rng.sample(questions, 1000), rng), "pool": planted_pool(splits, opening, rng)}
    return {name: [{**row, "id": f"{name}/{row['id']}"} for row in rows] for name, rows in made.items()}


def balanced(rows: list[dict]) -> list[dict]:
    """The same number of rows for each label: as many as the rarest has."""
    count = Counter(row["response"] for row in rows)
    left = dict.fromkeys(count, min(count.values()))
    kept = []
    for row in rows:
        if left[row["response"]]:
            left[row["response"]] -= 1
            kept.append(row)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, required=True, help="folder laid out as lab_sources.json names it")
    src = Sources(parser.parse_args().sources)
    OUT.mkdir(parents=True, exist_ok=True)
    for name, rows in build(src).items():
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (OUT / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
        print(f"{name:28s}{len(rows):6d}  {dict(Counter(row['source'] for row in rows))}")
    (OUT / "sources.json").write_text(json.dumps(src.used, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
