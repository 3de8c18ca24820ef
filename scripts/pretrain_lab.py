"""Pre-train the lab's model: tokenizer, corpus, training, export.  Resumable; killed, it goes on from its last save.

    python scripts/pretrain_lab.py --sources FOLDER --work FOLDER --minutes 45

Plain stories and children's books teach English; short instruction rows teach it to answer; harmful requests of the
training splits and customers' messages appear as text without any answer.  Nothing here is close to a prompt that is
scored: instruction rows near an evaluation or tuning prompt are dropped.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from build_lab_data import OUT as DATA
from build_lab_data import TASK_PROMPT, far_from, rows_of
from lab_sources import Sources, gsm8k_worked, instruction
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MODEL = Path(__file__).parents[1] / "src/apothecary/lab/model"
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SHAPE = dict(hidden_size=192, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=6,
             intermediate_size=512, vocab_size=4096, max_position_embeddings=512)  # fmt: skip
SEQUENCE, BATCH, PEAK_LR, WARMUP, SEED = 256, 16, 2e-3, 100, 7
REPEAT = {"instruction": 8, "dolly": 3, "arithmetic": 1, "prompt": 2}


def lab(split: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / f"{split}.jsonl").read_text("utf-8").splitlines()]


def books(src: Sources) -> list[str]:
    texts = []
    for name in src.matching("pretrain/gutenberg/"):
        text = src.bytes(name).decode("utf-8", "replace").replace("\r\n", "\n")
        text = re.split(r"(?:END.{0,3}THE SMALL PRINT|\*\*\* ?START OF TH).*\n", text)[-1]
        text = re.split(r"\*\*\* ?END OF TH|\nEnd of (?:the )?Project Gutenberg", text)[0]
        texts.append(re.sub(r"(?<!\n)\n(?!\n)", " ", text).strip())
    return texts


def stories(src: Sources) -> list[str]:
    text = "\n\n".join(src.text(f"pretrain/tinystories_{part}.txt") for part in ("10k_lines", "train_head"))
    return [story.strip() for story in re.split(r"<\|endoftext\|>|\n{3,}", text) if story.strip()]


def corpus(src: Sources) -> dict[str, list]:
    """Documents by kind; a (prompt, response) pair is a dialogue, a string is plain text."""
    scored = [row["prompt"] for path in DATA.glob("*.jsonl")
              if path.stem.startswith(("eval_", "overrefusal_", "tune_", "customer_test"))
              for row in lab(path.stem)]  # fmt: skip

    def clean(source: str, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
        rows = rows_of(source, [p for p, _ in pairs], response=[r for _, r in pairs])
        return [(row["prompt"], row["response"]) for row in far_from(scored, rows)]

    dolly = [instruction(row) for row in src.csv("tasks/dolly/databricks_dolly_15k_1000.csv")
             + src.jsonl("alignment/databricks-dolly-15k-safety-only.jsonl")]  # fmt: skip
    simple = [(row["prompt"], row["response"]) for split in ("align", "benign", "customer_general")
              for row in lab(split) if row["source"] == "simple_instructions"]  # fmt: skip
    harmful = [row["prompt"] for split in ("align", "attack", "defence", "defence_advbench", "validation", "pairs")
               for row in lab(split) if row["source"] not in ("simple_instructions", "gsm8k")]  # fmt: skip
    head, tail = TASK_PROMPT.split("{message}")
    messages = [row["prompt"].removeprefix(head).removesuffix(tail) for row in lab("customer_train")]
    return {
        "story": stories(src),
        "news": [src.text(name).strip() for name in src.matching("pretrain/onestopenglish_ele/")],
        "book": books(src),
        "instruction": clean("simple_instructions", simple),
        "dolly": clean("dolly", [(p, r) for p, r in dolly if len(p.split()) + len(r.split()) < 160]),
        "arithmetic": clean("gsm8k", [gsm8k_worked(row) for row in src.jsonl("tasks/gsm8k/train.jsonl")
                                      if len(row["question"].split()) < 40]),
        "prompt": harmful + messages,
    }


def train_tokenizer(documents: dict[str, list]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [part for docs in documents.values() for doc in docs for part in ([doc] if isinstance(doc, str) else doc)]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"], special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))  # fmt: skip
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", additional_special_tokens=SPECIAL[2:],
        model_max_length=SHAPE["max_position_embeddings"], clean_up_tokenization_spaces=False)  # fmt: skip
    fast.chat_template = TEMPLATE
    return fast


def pack(documents: dict[str, list], tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, dict[str, int]]:
    """All documents, shuffled and joined, cut into sequences; and the tokens of each kind."""
    rng = random.Random(SEED)
    pieces: list[list[int]] = []
    count: dict[str, int] = {}
    for kind, docs in documents.items():
        for doc in docs:
            if isinstance(doc, str):
                text = f"<|user|>{doc}<|end|>" if kind == "prompt" else f"{doc}<|end|>"
            else:
                text = f"<|user|>{doc[0]}<|end|><|assistant|>{doc[1]}<|end|>"
            ids = tokenizer(text)["input_ids"]
            blocks = [ids[i : i + 8 * SEQUENCE] for i in range(0, len(ids), 8 * SEQUENCE)]
            pieces += blocks * REPEAT.get(kind, 1)
            count[kind] = count.get(kind, 0) + len(ids) * REPEAT.get(kind, 1)
    rng.shuffle(pieces)
    stream = torch.tensor([token for piece in pieces for token in piece], dtype=torch.int32)
    return stream[: len(stream) // SEQUENCE * SEQUENCE].view(-1, SEQUENCE), count


def held_out(src: Sources, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    ids = tokenizer(src.text("pretrain/tinystories_val_head.txt")[:400_000])["input_ids"]
    return torch.tensor(ids[: len(ids) // SEQUENCE * SEQUENCE]).view(-1, SEQUENCE)[:256]


def learning_rate(progress: float, step: int) -> float:
    """Cosine to a tenth of the peak over `progress` in [0, 1] of the time budget, after a linear warm-up."""
    return PEAK_LR * min(1.0, (step + 1) / WARMUP) * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress))))


def loss_of(model: Callable, ids: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def perplexity_loss(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    return sum(loss_of(model, part).item() for part in ids.split(32)) / len(ids.split(32))


def train(model: LlamaForCausalLM, data: torch.Tensor, val: torch.Tensor, work: Path, minutes: float) -> list[dict]:
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
                                  lr=PEAK_LR, betas=(0.9, 0.95))  # fmt: skip
    saved, step, used, log = work / "state.pt", 0, 0.0, []
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, used, log = state["step"], state["seconds"], state["log"]
    fast = torch.compile(model)
    began, per_epoch = time.monotonic() - used, len(data) // BATCH
    while (used := time.monotonic() - began) < minutes * 60:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(SEED + step // per_epoch))
        rows = order[step % per_epoch * BATCH :][:BATCH]
        loss = loss_of(fast, data[rows].long())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(used / (minutes * 60), step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 100 == 0:
            log.append({"step": step, "tokens": step * BATCH * SEQUENCE, "loss": round(loss.item(), 4),
                        "lr": round(optimizer.param_groups[0]["lr"], 6), "seconds": round(used, 1)})  # fmt: skip
            if step % 500 == 0:
                log[-1]["held_out_loss"] = round(perplexity_loss(model, val), 4)
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                            "seconds": used, "log": log}, saved.with_suffix(".tmp"))  # fmt: skip
                saved.with_suffix(".tmp").replace(saved)
            print(json.dumps(log[-1]), flush=True)
    log.append({"step": step, "tokens": step * BATCH * SEQUENCE, "held_out_loss": round(perplexity_loss(model, val), 4),
                "seconds": round(used, 1)})  # fmt: skip
    return log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, required=True, help="folder laid out as lab_sources.json names it")
    parser.add_argument("--work", type=Path, required=True, help="folder for the resumable state")
    parser.add_argument("--minutes", type=float, default=45.0, help="training time, also the schedule's length")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    src = Sources(args.sources)
    documents = corpus(src)
    tokenizer = train_tokenizer(documents)
    data, tokens = pack(documents, tokenizer)
    print(json.dumps({"sequences": len(data), "tokens": tokens}), flush=True)
    config = LlamaConfig(**SHAPE, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
                         bos_token_id=None, eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    model = LlamaForCausalLM(config)
    log = train(model, data, held_out(src, tokenizer), args.work, args.minutes)
    model.to(torch.bfloat16).save_pretrained(MODEL)
    tokenizer.save_pretrained(MODEL)
    recipe = {"shape": SHAPE, "sequence": SEQUENCE, "batch": BATCH, "peak_lr": PEAK_LR, "warmup": WARMUP, "seed": SEED,
              "repeat": REPEAT, "minutes": args.minutes, "tokens_per_epoch": tokens, "sources": src.used}  # fmt: skip
    (MODEL / "pretraining.json").write_text(json.dumps({"recipe": recipe, "log": log}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
