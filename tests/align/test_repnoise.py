"""RepNoise: the properties of methods.md 4.4, two steps against independent maths, and the authors' bugs."""

from __future__ import annotations

import math

import pytest
import torch
from benches import (
    Recorder,
    count_hooks,
    float64_model,
    furthest,
    largest,
    make_batch,
    make_bench,
    make_context,
    make_pairs,
    make_rows,
    parts,
    same_bits,
    snapshot,
    without_key_biases,
)
from reference import repnoise as reference
from tiny import FAMILIES, HIDDEN, LAYERS, VOCAB, tiny_model

from apothecary.align.repnoise import RepNoise, differing
from apothecary.align.sft import Sft
from apothecary.data.chat import Rendered
from apothecary.data.rows import Row
from apothecary.errors import ConfigError, DataError
from apothecary.models.adapters import add_adapter
from apothecary.models.anatomy import logit_head
from apothecary.models.settings import LoraSettings
from apothecary.train.batch import collate
from apothecary.train.config import TrainConfig
from apothecary.train.context import Output
from apothecary.train.fit import fit, train
from apothecary.train.heads import head_loss

SHAPE = (LAYERS, 4)
EVIDENCE = "align/repnoise"
PAIRS = {"pairs": make_pairs(7)}


def scene(tmp_path, model=None, pairs=PAIRS, **config):
    bench = make_bench(tmp_path, model, aux=pairs)
    return make_context(bench, ("pairs",), **{"aux_batch_size": 3, **config}), make_batch(bench, make_rows("row", 4))


def gradient(ctx, method, batch):
    """(loss, gradient) of one step on the same pairs at every call."""
    ctx.model.zero_grad()
    ctx.auxiliary.drawn.clear()
    ctx.begin_step(1)
    ctx.begin_micro_step(0)
    loss = method.step(ctx, batch, method.init(ctx))
    return loss, {name: p.grad.clone() for name, p in ctx.parameters().items() if p.grad is not None}


def noise_of(ctx, harmful):
    """eps of every layer, drawn row by row: each row goes through the layers with a source of its own."""
    noise = [torch.zeros(*harmful.input_ids.shape, HIDDEN, dtype=torch.float64) for _ in range(LAYERS)]
    for i, row in enumerate(harmful.row_ids):
        source = ctx.generator(row, ctx.auxiliary.drawn["pairs"])
        length = int(harmful.attention_mask[i].sum())
        for layer in noise:
            layer[i, :length] = torch.randn(length, HIDDEN, generator=source).double()
    return noise


def untied(model):
    return {name: p for name, p in snapshot(model).items() if name != "lm_head.weight"}


# -- the formula ------------------------------------------------------------------------------------------------------


@pytest.mark.evidence(EVIDENCE, "reference", "definition")
def test_two_steps_equal_the_reference(tmp_path):
    bench = make_bench(tmp_path, float64_model(), aux=PAIRS)
    before, recorder = untied(bench.loaded.model), Recorder(RepNoise(alpha=0.7, beta=0.4))
    config = TrainConfig(max_steps=2, batch_size=4, learning_rate=1e-2, schedule="constant", warmup_ratio=0.0,
                         parameters="full", max_grad_norm=0.0, save_every=0, aux_batch_size=3, log_every=1)  # fmt: skip
    result = train(bench, recorder, make_rows("row", 8), config)
    steps, draws = [], bench.context(config, ("pairs",))
    for (align,) in recorder.batches:
        draws.begin_step(1)
        draws.begin_micro_step(0)
        refusal, harmful = draws.pairs()
        steps.append((parts(align), parts(refusal), parts(harmful), noise_of(draws, harmful)))
    expected, wanted = reference.train(before, steps, SHAPE, 0.7, 0.4, 1e-2)
    for got, logged, entry, (grads, terms) in zip(recorder.gradients, recorder.logged, result.history, wanted,
                                                  strict=True):  # fmt: skip
        assert largest({name: got[name] for name in grads}, grads) < 1e-9
        assert logged == pytest.approx(terms, rel=1e-9)
        loss = terms["stability"] + 0.4 * terms["noise"] - 0.7 * terms["ascent"]
        assert entry["loss"] == pytest.approx(loss, rel=1e-5), "logged in fp32"
    after = {name: p for name, p in snapshot(bench.loaded.model).items() if name in expected}
    assert furthest(without_key_biases(after), without_key_biases(expected)) < 1e-9
    for alpha, beta in ((0.0, 0.4), (0.7, 0.0)):
        other, _ = reference.train(before, steps, SHAPE, alpha, beta, 1e-2)
        assert furthest(other, expected) > 1e-3, "both terms matter"


@pytest.mark.evidence(EVIDENCE, "finite_difference")
def test_the_step_is_the_slope_of_the_objective_with_noise_and_bandwidths_fixed(tmp_path):
    ctx, batch = scene(tmp_path, float64_model())
    _, found = gradient(ctx, RepNoise(alpha=0.7, beta=0.4), batch)
    ctx.begin_micro_step(0)  # the same pairs again
    refusal, harmful = ctx.pairs()
    weights = untied(ctx.model)
    given = (parts(batch), parts(refusal), parts(harmful), noise_of(ctx, harmful))
    spreads = reference.components(weights, *given, SHAPE)[3]
    source, eps = torch.Generator().manual_seed(1), 1e-5
    for _ in range(3):
        way = {name: torch.randn(p.shape, generator=source, dtype=p.dtype) for name, p in weights.items()}

        def objective(t, way=way):
            moved = {name: p + t * way[name] for name, p in weights.items()}
            return reference.objective(moved, *given, alpha=0.7, beta=0.4, shape=SHAPE, spreads=spreads).item()

        slope = (objective(eps) - objective(-eps)) / (2 * eps)
        assert slope == pytest.approx(sum((found[name] * way[name]).sum().item() for name in way), rel=1e-5)


@pytest.mark.evidence(EVIDENCE, "definition")
def test_without_alpha_and_beta_it_is_sft_to_the_bit_under_dropout(tmp_path):
    model = add_adapter(tiny_model("llama"), "trained", LoraSettings(dropout=0.5), 0).train()
    ctx, batch = scene(tmp_path, model)
    torch.manual_seed(3)
    loss, plain = gradient(ctx, Sft(), batch)
    torch.manual_seed(3)
    same, defended = gradient(ctx, RepNoise(alpha=0.0, beta=0.0), batch)
    assert torch.equal(loss, same) and same_bits(plain, defended) and not ctx.auxiliary.drawn


@pytest.mark.evidence(EVIDENCE, "definition")
def test_refusals_of_the_pairs_as_alignment_rows_are_the_papers_stability_batch(tmp_path):
    """With weights near 0 the step is SFT on the refusals, tokens included that both answers share."""
    ctx, _ = scene(tmp_path, float64_model())
    refusals = make_batch(make_bench(tmp_path), PAIRS["pairs"][:3])
    loss, plain = gradient(ctx, Sft(), refusals)
    _, near = gradient(ctx, RepNoise(alpha=1e-12, beta=1e-12), refusals)
    assert ctx.logged["stability"] == pytest.approx(loss.item(), rel=1e-12) and largest(near, plain) < 1e-9


# -- the ascent -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 4, 7])
@pytest.mark.evidence(EVIDENCE, "definition")
def test_a_head_that_knows_nothing_gives_the_logarithm_of_1_plus_log_v(tmp_path, window):
    """Every l_k is log V: this pins the number of losses, the divisor, the 1, and that shares of a step add up to 1."""
    ctx, batch = scene(tmp_path, tiny_model("llama", dtype=torch.float64), aux_batch_size=7)
    with torch.no_grad():
        ctx.model.lm_head.weight.zero_()
    method = RepNoise()
    state = method.init(ctx)
    ctx.begin_step(window)
    for micro in range(window):
        ctx.begin_micro_step(micro)
        method.step(ctx, batch, state)
    assert ctx.logged["ascent"] == pytest.approx(math.log(1 + math.log(VOCAB)), rel=1e-6), "the norm computes in fp32"
    if window == 7:  # one pair each: its distance is the bandwidth, so the value of its MMD is known
        single = 10 - 2 * sum(math.exp(-(2.0 ** (2 - i))) for i in range(5))
        assert ctx.logged["noise"] == pytest.approx(single, rel=1e-6)


def test_the_argument_of_the_logarithm_is_1_plus_the_mean_loss(tmp_path, monkeypatch):
    """So that it stays above 1 even where the harmful answer is predicted almost surely."""
    ctx, batch = scene(tmp_path)
    method = RepNoise()
    method.init(ctx)
    monkeypatch.setattr("apothecary.train.heads.head_loss", lambda *_: torch.tensor(0.1))
    assert method.terms(ctx, batch)[2].item() == pytest.approx(math.log(1.1), rel=1e-6)


@pytest.mark.evidence(EVIDENCE, "definition")
def test_every_response_token_and_every_hidden_state_is_ascended_once(tmp_path):
    """The first token, tokens of id 0, tokens shared with the refusal; the last state is not normed twice."""
    answer = Row("id 0", (("user", "hm"),), "A<|pad|>c", rejected="A<|pad|>bcd")
    ctx, _ = scene(tmp_path, float64_model(), {"pairs": [answer]})
    _, harmful = ctx.pairs()
    with torch.no_grad():
        ctx.model.transformer.ln_f.weight.normal_(1, 0.5)  # a norm of ones would hide that it is met twice
    assert 0 in harmful.input_ids[0, int((harmful.labels[0] < 0).sum()) :]
    states = ctx.forward(harmful, ("embedded", "hidden")).states
    for state in states:
        state.retain_grad()
    head = logit_head(ctx.model)
    ordinary = ctx.loss(harmful, grad=False).item()
    assert head_loss(ctx, head, states[-1:], harmful).item() == pytest.approx(ordinary, rel=1e-12)
    mean = head_loss(ctx, head, states, harmful)
    each = [head_loss(ctx, head, [state], harmful).item() for state in states]
    assert len(each) == LAYERS + 1 and mean.item() == pytest.approx(sum(each) / len(each), rel=1e-12)
    mean.backward()
    predicting = torch.nn.functional.pad(harmful.labels[:, 1:] >= 0, (0, 1))
    assert torch.equal(states[-1].grad.abs().sum(-1) > 0, predicting)


# -- the noise --------------------------------------------------------------------------------------------------------


def rendered(*ids, start=2):
    return Rendered(str(ids), ids, start)


def test_m_compares_sequences_of_any_lengths():
    refusal = collate([rendered(5, 6, 7, 8, 1), rendered(5, 6, 7, 1), rendered(5, 6, 9, 9, 9, 9, 1)], 0, 1.0)
    harmful = collate([rendered(5, 6, 9, 8, 7, 0, 1), rendered(5, 6, 7, 0, 0, 1), rendered(5, 6, 9, 1)], 0, 1.0)
    assert differing(refusal, harmful).int().tolist() == [
        [0, 0, 1, 0, 1, 1, 1],  # the refusal has ended: tokens count, also those of the pad's id
        [0, 0, 0, 1, 1, 1, 0],  # padding does not
        [0, 0, 0, 1, 0, 0, 0],
    ]
    shorter = collate([rendered(5, 6, 7, 1)], 0, 1.0), collate([rendered(5, 6, 1)], 0, 1.0)
    assert differing(*shorter).int().tolist() == [[0, 0, 1]]
    assert differing(*reversed(shorter)).int().tolist() == [[0, 0, 1, 1]]


@pytest.mark.evidence(EVIDENCE, "definition")
def test_masked_positions_have_no_gradient_through_the_noise_loss(tmp_path):
    ctx, _ = scene(tmp_path)
    refusal, harmful = ctx.pairs()
    mask = differing(refusal, harmful)
    outs = {layer: torch.randn(*mask.shape, HIDDEN, requires_grad=True) for layer in range(LAYERS)}
    output = Output(torch.empty(0), {"mlp_out": outs})
    RepNoise().noise_loss(ctx, output, mask, harmful).backward()
    for out in outs.values():
        assert torch.equal(out.grad.abs().sum(-1) > 0, mask)
    assert 0 < mask.sum() < harmful.attention_mask.sum()


def test_noise_follows_from_seed_row_draw_and_layer_alone(tmp_path):
    def draw(rows, width, seed=0, drawn=1):
        ctx = make_context(make_bench(tmp_path, seed=seed))
        batch = collate([Rendered(f"row{i}", tuple(range(length)), 1) for i, length in rows], 0, 1.0)
        sources = [ctx.generator(row, drawn) for row in batch.row_ids]
        return [RepNoise.noise(sources, batch, width) for _ in range(LAYERS)]

    first, second = draw([(0, 5), (1, 9)], 64)
    (alone, _), (padded, _) = draw([(1, 9)], 64), draw([(1, 9), (2, 12)], 64)
    assert torch.equal(alone[0], first[1]) and torch.equal(padded[0, :9], first[1]), "whoever shares the batch"
    others = (draw([(1, 9)], 64, seed=1), draw([(1, 9)], 64, drawn=2), [second[1:]], [draw([(2, 9)], 64)[0]])
    assert all((other[0][0] - first[1]).abs().max() > 1 for other in others)
    assert torch.equal(first[0, 5:], torch.zeros(4, 64))
    large = draw([(0, 100)], 1000)[0]
    assert abs(large.mean().item()) < 0.02 and large.std().item() == pytest.approx(1, rel=0.01)


def test_training_moves_harmful_activations_towards_noise(tmp_path):
    bench = make_bench(tmp_path, aux=PAIRS)
    config = TrainConfig(max_steps=12, batch_size=2, aux_batch_size=7, parameters="full", save_every=0,
                         learning_rate=5e-3, warmup_ratio=0.0, schedule="constant")  # fmt: skip
    recorder = Recorder(RepNoise(alpha=0.0, beta=1.0))
    train(bench, recorder, make_rows("row", 8), config)
    values = [step["noise"] for step in recorder.logged]
    assert values[-1] < 0.9 * values[0]


# -- everywhere -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_defended_and_left_without_hooks(tmp_path, family, parameters):
    """Adapters prefix the names of modules; the first step's B = 0 leaves A without gradient."""
    model = tiny_model(family)
    if parameters == "lora":
        model = add_adapter(model, "trained", LoraSettings(), 0)
    ctx, batch = scene(tmp_path, model, parameters=parameters)
    _, plain = gradient(ctx, Sft(), batch)
    for _ in range(3):
        _, defended = gradient(ctx, RepNoise(beta=1.0), batch)
        assert count_hooks(ctx.model) == 0, "constant over steps"
    learning = [name for name in plain if "lora_A" not in name]
    assert furthest({n: defended[n] for n in learning}, {n: plain[n] for n in learning}) > 1e-3
    assert all(g.isfinite().all() for g in defended.values())
    assert ctx.logged["noise"] > 0 and ctx.logged["ascent"] > 0


@pytest.mark.parametrize("parameters", ["lora", "full"])
@pytest.mark.parametrize("change", ["checkpointing", "bf16"])
def test_checkpointing_and_bf16_change_the_gradient_by_rounding_only(tmp_path, change, parameters):
    def run(change=None):
        model = tiny_model("llama")
        if parameters == "lora":
            model = add_adapter(model, "trained", LoraSettings(targets=("q_proj", "down_proj", "lm_head")), 0)
        ctx, batch = scene(tmp_path, model.train(), precision="bf16" if change == "bf16" else "fp32")
        if change == "checkpointing":
            ctx.plain.gradient_checkpointing_enable({"use_reentrant": False})
        return gradient(ctx, RepNoise(beta=1.0), batch)[1]

    plain, changed = run(), run(change)
    known = [name for name in plain if plain[name].abs().max() > 1e-6]
    assert any("lm_head" in name for name in known)
    for name in known:
        similar = torch.nn.functional.cosine_similarity(plain[name].flatten(), changed[name].flatten(), dim=0)
        assert similar > (0.98 if change == "bf16" else 1 - 1e-5), name
        ratio = (changed[name].norm() / plain[name].norm()).item()
        assert ratio == pytest.approx(1, rel=0.1 if change == "bf16" else 1e-4), name


def test_it_trains_with_dropout_checkpointing_and_bf16(tmp_path):
    config = TrainConfig(max_steps=8, batch_size=4, accumulation=2, learning_rate=3e-2, precision="bf16", save_every=0,
                         aux_batch_size=3, gradient_checkpointing=True, lora=LoraSettings(dropout=0.1))  # fmt: skip
    bench = make_bench(tmp_path, aux=PAIRS)
    recorder = Recorder(RepNoise(alpha=0.5))
    fit(bench, recorder, make_rows("row", 8), config, tmp_path / "out")
    first, last = recorder.logged[0], recorder.logged[-1]
    assert last["stability"] < 0.9 * first["stability"] and last["ascent"] > first["ascent"]
    assert count_hooks(bench.loaded.model) == 0


@pytest.mark.parametrize(
    ("rejected", "sentence"),
    [(None, "row 'lone' has no rejected answer"), ("No.", "row 'lone' has one text as response and as rejected")],
)
def test_unpaired_rows_are_refused_by_name(tmp_path, rejected, sentence):
    bench = make_bench(tmp_path, aux={"pairs": [*make_pairs(2), Row("lone", (("user", "a"),), "No.", rejected)]})
    with pytest.raises(DataError, match=sentence):
        fit(bench, RepNoise(), make_rows("row", 4), TrainConfig(max_steps=1), tmp_path / "out")
    with pytest.raises(ConfigError, match="'repnoise' needs rows of role pairs"):
        fit(make_bench(tmp_path), RepNoise(), make_rows("row", 4), TrainConfig(max_steps=1), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [{"alpha": -1.0}, {"beta": -0.1}, {"kernels": 0}, {"factor": 1.0}])
def test_ranges_are_checked(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        RepNoise(**wrong)
