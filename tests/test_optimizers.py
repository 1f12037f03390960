"""Every parameter gets the update, the decay and the learning rate that the settings promise."""

import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import pairwise, perturbed
from hypothesis import assume, given
from hypothesis import strategies as st

from train import (
    GPT,
    LEAST_FORGETTING,
    NGRAM_FORGETTING,
    OPTIMIZERS,
    AdamW,
    Config,
    Muon,
    Origin,
    RowAdam,
    choose_ngram_decay,
    lr_factor,
    make_optimizers,
    orthogonalize,
    start,
    update,
)

VOCAB, T = 50, 16
SMALL = dict(n_layer=2, n_head=2, n_embd=32, block_size=T, dropout=0.0, ngrams=0, ngram_rows=97, init="gpt2",
             dtype="float32")
RATES = dict(learning_rate=0.01, embed_lr=0.02, head_lr=0.03, scalar_lr=0.04, weight_decay=0.5,
             ngram_lr=0.05, ngram_decay=0.7)
SWITCHES = pairwise(
    optimizer=list(OPTIMIZERS), decay_all=[False, True], tie_weights=[False, True],
    positions=["rope", "learned"], norm=["rmsnorm", "layernorm"], norm_gain=[False, True], bias=[False, True],
    head_bias=[False, True], mlp=["relu2", "swiglu"], n_kv_head=[0, 1], shortcuts=[False, True],
    pad_vocab_to=[1, 64], ngrams=[0, 3], qk_norm_gain=[False, True])


def small(**changes) -> tuple:
    """A perturbed model, and its optimizers."""
    torch.manual_seed(0)
    cfg = Config(**SMALL | RATES | changes)
    model = perturbed(GPT(cfg, VOCAB))
    return model, make_optimizers(model, cfg, "cpu")


def groups_of(optimizers) -> list:
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def near(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def snapshot(tensors) -> list:
    return [tensor.detach().clone() for tensor in tensors]


def is_block_matrix(name, p) -> bool:
    return name.startswith("blocks.") and p.dim() == 2


# ---- who updates what


@pytest.mark.parametrize("switches", SWITCHES)
def test_every_parameter_is_in_exactly_one_group(switches):
    model, optimizers = small(**switches)
    grouped = [id(p) for group in groups_of(optimizers) for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("switches", SWITCHES)
def test_each_parameter_has_its_rate_and_its_decay(switches):
    model, optimizers = small(**switches)
    muon = switches["optimizer"] == "muon"
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups_of(optimizers)
             for p in group["params"]}
    for name, p in model.named_parameters():
        if not muon or is_block_matrix(name, p):
            rate = 0.01
        elif p.dim() == 1:
            rate = 0.04
        else:
            rate = 0.03 if name == "head.weight" else 0.02      # tied, it has the embedding's name
        decays = switches["decay_all"] or (is_block_matrix(name, p) if muon else p.dim() == 2)
        decay = 0.5 if decays else 0.0
        if name == "ngrams.weight" and muon:
            rate, decay = 0.05, 0.7
        assert found[id(p)] == (rate, decay), name


def test_an_optimizer_that_leaves_out_a_parameter_is_refused(monkeypatch):
    """It would never train, and nothing on the screen would say so."""
    def leave_one_out(model, cfg, device, dtype, map_stacked):
        [adamw] = OPTIMIZERS["adamw"](model, cfg, device, dtype, map_stacked)
        adamw.param_groups[0]["params"].pop()
        return [adamw]

    monkeypatch.setitem(OPTIMIZERS, "forgetful", leave_one_out)
    with pytest.raises(AssertionError, match="head.weight is in 0 parameter groups"):
        small(optimizer="forgetful")


def test_muon_takes_the_matrices_of_the_blocks_and_nothing_else():
    model, (adamw, muon) = small(optimizer="muon", positions="learned", bias=True, norm_gain=True)
    assert type(adamw) is AdamW
    assert type(muon) is Muon
    expected = {id(p) for name, p in model.named_parameters() if is_block_matrix(name, p)}
    assert {id(p) for group in muon.param_groups for p in group["params"]} == expected


def test_adamw_has_the_betas_and_epsilon_of_the_settings():
    _, (adamw,) = small(optimizer="adamw", beta1=0.7, beta2=0.8, adam_eps=1e-5)
    assert {(group["betas"], group["eps"]) for group in adamw.param_groups} == {((0.7, 0.8), 1e-5)}


def test_an_update_that_does_not_compile_is_made_without(monkeypatch, capsys):
    """Compiling shows only in the first step whether it works."""
    def compile(function, **how):
        def fail(*arguments):
            raise RuntimeError("no such compiler")
        return fail

    monkeypatch.setattr(torch, "compile", compile)
    compiled, plain = torch.ones(4, 4), torch.ones(4, 4)
    optimizer = muon_of([compiled])
    optimizer.compile_update()
    steps(optimizer, [compiled], 2)
    steps(muon_of([plain]), [plain], 2)
    assert torch.equal(compiled, plain)
    assert "not compiled: RuntimeError: no such compiler" in capsys.readouterr().err


# ---- Muon


def spread(n, rows, cols) -> torch.Tensor:
    """n matrices whose singular values lie evenly between 0.05 and 1."""
    u, _, v = torch.linalg.svd(noise(n, rows, cols), full_matrices=False)
    return u * torch.linspace(1, 0.05, min(rows, cols)) @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("shape", [(3, 24, 24), (3, 64, 16), (3, 16, 64), (1, 8, 32)])
def test_orthogonalized_matrices_have_singular_values_near_1(shape, scale, dtype):
    m = spread(*shape)
    result = orthogonalize((scale * m).to(dtype))
    assert result.dtype == dtype
    u, values, v = torch.linalg.svd(result.float())
    assert values.min() > 0.65                          # the quintic itself has its low at 0.68
    assert values.max() < 1.2
    # Its singular vectors are those of m: u' m v is diagonal, with m's own singular values.
    near((u.mT @ m @ v.mT).diagonal(dim1=1, dim2=2).sum(-1), torch.linalg.svdvals(m).sum(-1), atol=0.05)


def quintic(m, steps=5):
    """The iteration of Keller Jordan's Muon on one matrix, in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = m / np.linalg.norm(m)
    for _ in range(steps):
        x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
    return x


def muon_of(params, **changes) -> Muon:
    return Muon(params, **dict(lr=0.1, weight_decay=0.0, momentum=0.9, cautious=False) | changes)


def steps(optimizer, params, count=5, seed=0):
    """Steps on gradients that depend on seed, step and place only."""
    for step in range(count):
        for at, p in enumerate(params):
            p.grad = noise(*p.shape, seed=1000 * seed + 10 * step + at)
        optimizer.step()


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(8, 8), (12, 6), (6, 12)])
def test_muon_equals_a_plain_loop(shape, decay, cautious):
    p = torch.nn.Parameter(noise(*shape, seed=99))
    w, average, m = p.detach().double().numpy(), 0, 0.9
    steps(muon_of([p], weight_decay=decay, cautious=cautious), [p])
    for step in range(5):
        grad = noise(*shape, seed=10 * step).double().numpy()
        average = m * average + (1 - m) * grad
        update = quintic(m * average + (1 - m) * grad) * math.sqrt(max(1, shape[0] / shape[1]))     # Nesterov
        decayed = w * (w * update > 0) if cautious else w
        w = w - 0.1 * (update + decay * decayed)
    near(p.detach().double(), torch.from_numpy(w))


def test_row_adam_equals_a_plain_loop():
    """Rows that a step does not read stay, but for the decay, and a row's step has the size of the rate."""
    rows, width, lr, decay, beta2 = 6, 4, 0.1, 0.5, 0.9
    table = torch.nn.Parameter(noise(rows, width, seed=99))
    w, mean_square = table.detach().double().numpy(), np.zeros(rows)
    optimizer = RowAdam(table, lr, decay, beta2, eps=1e-10)
    for step in range(1, 6):
        table.grad = noise(rows, width, seed=step)
        table.grad[step % rows] = 0
        grad = table.grad.double().numpy()
        optimizer.step()
        mean_square = beta2 * mean_square + (1 - beta2) * (grad**2).mean(1)
        size = np.sqrt(mean_square / (1 - beta2**step))
        w = (1 - lr * decay) * w - lr * grad / np.maximum(size, 1e-10)[:, None]
        near(table.detach().double(), torch.from_numpy(w))
        if step == 1:                   # its size is that of the gradient itself
            moved = w - (1 - lr * decay) * noise(rows, width, seed=99).double().numpy()
            assert np.sqrt((moved[0]**2).mean()) == pytest.approx(lr, rel=1e-5)
            assert not moved[1].any()


@pytest.mark.parametrize(("tokens", "batch_size", "accumulation"), [
    (200_000, 12, 1), (900_000, 24, 1), (900_000, 4, 6), (10**7, 64, 4), (18_000, 8, 1)])
@pytest.mark.parametrize("rate", [0.01, 0.05])
def test_ngram_vectors_are_forgotten_within_one_reading_of_the_text(tokens, batch_size, accumulation, rate):
    cfg = Config(batch_size=batch_size, gradient_accumulation_steps=accumulation, ngram_lr=rate)
    decay = choose_ngram_decay(cfg, tokens, Origin())
    steps = tokens / (batch_size * accumulation * cfg.block_size)
    left = (1 - rate * decay) ** steps
    assert math.log(left) == pytest.approx(-NGRAM_FORGETTING, rel=0.1)


def test_ngram_vectors_of_a_long_text_forget_within_some_steps():
    assert Config.ngram_lr * choose_ngram_decay(Config(), 10**9, Origin()) == pytest.approx(LEAST_FORGETTING)


@pytest.mark.parametrize("rate", [0.015, 0.05, 0.06, 1.0])
def test_ngram_vectors_do_not_change_sign_when_a_step_reads_all_of_the_text(rate):
    cfg = Config(batch_size=64, ngram_lr=rate)
    assert 0.9 < rate * choose_ngram_decay(cfg, 10_000, Origin()) <= 1


def test_the_decay_of_ngram_vectors_is_what_a_checkpoint_may_hold():
    for cfg in (Config(ngram_decay=1), Config(ngram_lr=1e-11), Config(ngram_lr=1e-320)):
        decay = choose_ngram_decay(cfg, 10**6, Origin())
        assert isinstance(decay, float)
        assert decay <= 2**31


def test_the_decay_of_ngram_vectors_is_that_which_was_given_or_stored():
    stored = Origin(stored_plan={"ngram_decay": 0.25})
    assert choose_ngram_decay(Config(ngram_decay=1.5), 10**6, stored) == 1.5
    assert choose_ngram_decay(Config(), 10**6, stored) == 0.25
    assert choose_ngram_decay(Config(ngram_lr=0.0), 10**6, Origin()) == 0
    trained = Origin(checkpoint={"model": {}})
    assert choose_ngram_decay(Config(ngram_lr=0.01), 10**6, trained) == choose_ngram_decay(Config(), 10**6, Origin())
    of_adamw = choose_ngram_decay(Config(ngram_optimizer="adamw"), 10**6, Origin())
    assert of_adamw == choose_ngram_decay(Config(ngram_lr=Config.embed_lr), 10**6, Origin())


def test_what_row_adam_remembers_is_one_number_a_row():
    _, optimizers = small(optimizer="muon", ngrams=3)
    _, _, row_adam = optimizers
    [table] = row_adam.param_groups[0]["params"]
    steps(row_adam, [table], 1)
    assert sum(value.numel() for value in row_adam.state[table].values()) == len(table) + 1


def test_what_row_adam_remembers_is_restored_on_the_device_of_the_table():
    """PyTorch leaves a state of the name `step` on the CPU."""
    optimizer = RowAdam(torch.nn.Parameter(noise(6, 4)), lr=0.1, weight_decay=0.5, beta2=0.9, eps=1e-10)
    steps(optimizer, optimizer.param_groups[0]["params"], 1)
    restored = RowAdam(torch.nn.Parameter(torch.empty(6, 4, device="meta")), 0.1, 0.5, 0.9, 1e-10)
    restored.load_state_dict(optimizer.state_dict())
    [state] = restored.state.values()
    assert {value.device.type for value in state.values()} == {"meta"}


def test_adamw_can_move_the_ngram_vectors_as_it_once_did():
    model, (adamw, _) = small(optimizer="muon", ngrams=3, ngram_optimizer="adamw")
    [group] = [group for group in adamw.param_groups if any(p is model.ngrams.weight for p in group["params"])]
    assert (group["lr"], group["weight_decay"]) == (0.02, 0.7)


def test_without_momentum_muon_follows_the_gradient_alone():
    p, q = (torch.nn.Parameter(noise(8, 8, seed=99)) for _ in range(2))
    steps(muon_of([p], momentum=0.0), [p], 1)
    optimizer = muon_of([q], momentum=0.0)
    q.grad = 100 * noise(8, 8, seed=7)
    optimizer.step()                                    # the past that must leave no trace
    with torch.no_grad():
        q.copy_(noise(8, 8, seed=99))
    steps(optimizer, [q], 1)
    near(p, q)


@pytest.mark.parametrize("cautious", [False, True])
def test_cautious_decay_acts_only_where_it_agrees_with_the_update(cautious):
    start = noise(8, 8, seed=99)
    after = {}
    for decay in (0.0, 0.5):
        p = torch.nn.Parameter(start.clone())
        steps(muon_of([p], weight_decay=decay, cautious=cautious), [p], 1)
        after[decay] = p.detach()
    toward_zero = (start - after[0.0]) * start > 0      # the update itself makes the weight smaller
    assert 0 < toward_zero.sum() < 64
    expected = 0.1 * 0.5 * start * (toward_zero if cautious else 1)
    near(after[0.0] - after[0.5], expected)


def test_stacked_matrices_are_updated_as_one_by_one():
    shapes = [(8, 8), (16, 8), (8, 8), (8, 16), (16, 8), (8, 8)]
    together = [torch.nn.Parameter(noise(*shape, seed=at)) for at, shape in enumerate(shapes)]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    stacked, single = muon_of(together, weight_decay=0.5), [muon_of([p], weight_decay=0.5) for p in alone]
    for step in range(5):
        for at, pair in enumerate(zip(together, alone, strict=True)):
            for p in pair:
                p.grad = noise(*p.shape, seed=100 + 10 * step + at)
        for optimizer in (stacked, *single):
            optimizer.step()
    assert len(stacked.param_groups) == 3               # shapes
    for p, q in zip(together, alone, strict=True):
        near(p, q)


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_a_restored_optimizer_continues_as_the_original(optimizer):
    (model, originals), (copy, copies) = (small(optimizer=optimizer, ngrams=3) for _ in range(2))
    for original in originals:
        steps(original, list(model.parameters()), 2)
    copy.load_state_dict(model.state_dict())
    for original, restored in zip(originals, copies, strict=True):
        restored.load_state_dict(deepcopy(original.state_dict()))       # as from a file
        steps(original, list(model.parameters()), 2, seed=1)
        steps(restored, list(copy.parameters()), 2, seed=1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), copy.parameters(), strict=True))


# ---- a gradient that is not finite


def stopped(optimizer, value) -> tuple:
    """A model and optimizers after two good steps, and two with found_inf on gradients that are all `value`;
    and copies, made in between, of the weights and of what the optimizers remember."""
    model, optimizers = small(optimizer=optimizer, bias=True, ngrams=3)
    for one in optimizers:
        steps(one, list(model.parameters()), 2)
    before = snapshot(model.parameters()), snapshot(memory(optimizers))
    for p in model.parameters():
        p.grad = torch.full_like(p, value)
    for one in optimizers * 2:
        one.found_inf = torch.tensor(1.0)
        one.step()
    return model, optimizers, *before


def memory(optimizers) -> list:
    return [tensor for one in optimizers for state in one.state.values() for tensor in state.values()]


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.0])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_found_inf_keeps_the_weights(optimizer, value):
    model, _, weights, _ = stopped(optimizer, value)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))


def test_found_inf_in_the_first_step_keeps_the_ngram_vectors():
    table = torch.nn.Parameter(noise(6, 4))
    optimizer = RowAdam(table, lr=0.1, weight_decay=0.5, beta2=0.9, eps=1e-10)
    optimizer.found_inf = torch.tensor(1.0)
    table.grad = torch.full_like(table, math.nan)
    optimizer.step()
    assert torch.equal(table, noise(6, 4))


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.0])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_found_inf_keeps_what_the_optimizers_remember(optimizer, value):
    _, optimizers, _, remembered = stopped(optimizer, value)
    assert all(torch.equal(p, q) for p, q in zip(memory(optimizers), remembered, strict=True))


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_found_inf_of_0_changes_nothing(optimizer):
    results = []
    for found_inf in (None, torch.tensor(0.0)):
        model, optimizers = small(optimizer=optimizer, bias=True, ngrams=3)
        for one in optimizers:
            one.found_inf = found_inf
            steps(one, list(model.parameters()), 2)
        results.append(snapshot(model.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


# ---- the learning rate over time


def factors(count, **settings) -> list:
    cfg = Config(**settings)
    return [lr_factor(step, cfg, [[0, cfg.max_iters]]) for step in range(count)]


def nanogpt_rate(it, learning_rate, warmup_iters, lr_decay_iters, min_lr):
    """The schedule of nanoGPT, as its README's command lines expect it."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    done = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * done)) * (learning_rate - min_lr)


@pytest.mark.parametrize(("warmup", "end"), [(0, 50), (10, 50), (10, 80), (49, 50)])
def test_cosine_is_nanogpts_schedule(warmup, end):
    ours = factors(100, schedule="cosine", learning_rate=1e-3, min_lr=1e-4, warmup_iters=warmup,
                   lr_decay_iters=end)
    theirs = [nanogpt_rate(it, 1e-3, warmup, end, 1e-4) for it in range(100)]
    assert [1e-3 * factor for factor in ours] == pytest.approx(theirs)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_warmup_rises_in_equal_steps_to_the_full_rate(schedule):
    ours = factors(11, schedule=schedule, warmup_iters=9, max_iters=1000)
    assert ours[:10] == pytest.approx([n / 10 for n in range(1, 11)], abs=1e-4)


def test_linear_is_flat_and_then_falls_evenly_to_min_lr():
    ours = factors(120, schedule="linear", learning_rate=1.0, min_lr=0.1, max_iters=100, cooldown=0.4)
    assert ours[:61] == [1.0] * 61
    falls = [a - b for a, b in zip(ours[60:100], ours[61:101], strict=True)]
    assert falls == pytest.approx([0.9 / 40] * 40)
    assert ours[99] == pytest.approx(0.1 + 0.9 / 40)    # the last update is a step away from min_lr
    assert ours[100:] == pytest.approx([0.1] * 20)


@pytest.mark.parametrize(("cooldown", "expected"), [
    (0.0, [1.0] * 10), (1.0, [1 - n / 10 for n in range(10)])])
def test_linear_at_the_bounds_of_cooldown(cooldown, expected):
    assert factors(10, schedule="linear", max_iters=10, cooldown=cooldown) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_lr_decay_iters_of_0_means_max_iters(schedule):
    ours = factors(60, schedule=schedule, max_iters=50)
    assert ours == factors(60, schedule=schedule, max_iters=500, lr_decay_iters=50)
    assert ours[50:] == [0.0] * 10
    assert ours[49] > 0


def test_constant_stays_at_the_full_rate():
    assert factors(60, schedule="constant", max_iters=50, min_lr=1e-4) == [1.0] * 60


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_decay_lr_false_is_the_full_rate_at_every_step(schedule):
    ours = factors(60, schedule=schedule, decay_lr=False, warmup_iters=20, max_iters=50, min_lr=1e-4)
    assert ours == [1.0] * 60


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_schedules_are_pure_functions_of_the_step(schedule):
    cfg = Config(schedule=schedule, warmup_iters=10)
    forward = {step: lr_factor(step, cfg, [[0, 50], [30, 55]]) for step in range(60)}
    backward = {step: lr_factor(step, cfg, [[0, 50], [30, 55]]) for step in reversed(range(60))}
    assert forward == backward
    assert cfg == Config(schedule=schedule, warmup_iters=10)


@st.composite
def moving_ends(draw_from):
    """Breakpoints of a run by the clock: each end lies behind its step."""
    steps = sorted(draw_from(st.sets(st.integers(1, 100), max_size=5)))
    breakpoints = [[0, draw_from(st.integers(1, 200))]]
    for step in steps:
        if step >= breakpoints[-1][1]:
            break
        breakpoints.append([step, step + draw_from(st.integers(1, 200))])
    return breakpoints


@given(moving_ends(), st.sampled_from(["linear", "cosine", "constant"]), st.sampled_from([0.0, 0.3, 1.0]),
       st.sampled_from([0, 7]))
def test_a_moving_end_makes_no_jump_and_is_cooled_down_to(breakpoints, schedule, cooldown, warmup):
    """The factor never rises after the warm-up, and is 0 at the last end."""
    assume(all(end > warmup for _, end in breakpoints))
    cfg = Config(schedule=schedule, cooldown=cooldown, warmup_iters=warmup)
    end = breakpoints[-1][1]
    ours = [lr_factor(step, cfg, breakpoints) for step in range(end + 2)]
    assert all(0 <= factor <= 1 for factor in ours)
    for step in range(warmup, end):
        assert ours[step + 1] <= ours[step] + 1e-12
    if schedule != "constant":
        assert ours[end] == 0
    for step, new_end in breakpoints[1:]:
        before = lr_factor(step, cfg, [pair for pair in breakpoints if pair[0] < step])
        assert ours[step] == pytest.approx(before)          # the breakpoint itself changes nothing
        if schedule == "linear" and cooldown and before < 1 and step >= warmup:
            later = [pair[0] for pair in breakpoints if pair[0] > step]
            until = min([new_end, *later])
            for at in range(step, until):                   # a straight line to the new end
                flat_until = (1 - cooldown) * new_end
                if step >= flat_until:
                    assert ours[at] == pytest.approx(before * (new_end - at) / (new_end - step))


def test_one_end_is_the_schedule_of_max_iters():
    cfg = Config(schedule="linear", cooldown=0.5)
    assert [lr_factor(step, cfg, [[0, 50], [10, 50]]) for step in range(60)] == [
        lr_factor(step, cfg, [[0, 50]]) for step in range(60)]


def test_a_rate_of_0_is_no_error():
    assert factors(3, learning_rate=0.0, schedule="constant") == [1.0] * 3


# ---- in a step of a run


def seen_in_updates(cfg, look) -> list:
    """What look(group) says of each optimizer's groups, as each makes its step: a list for each optimizer of a list for
    each update."""
    run = start(cfg)
    seen = [[] for _ in run.optimizers]
    for optimizer, groups_seen in zip(run.optimizers, seen, strict=True):
        optimizer.register_step_pre_hook(
            lambda one, *_, groups_seen=groups_seen: groups_seen.append([look(group) for group in one.param_groups]))
    for step in range(cfg.max_iters):
        update(run, step)
    return seen


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_the_learning_rate_reaches_every_group(toy, optimizer):
    cfg = toy(**RATES, optimizer=optimizer, schedule="cosine", warmup_iters=2, max_iters=6, min_lr=0.001)
    adamw, *others = seen_in_updates(cfg, lambda group: group["lr"])
    factor = [nanogpt_rate(it, 1.0, 2, 6, 0.1) for it in range(6)]
    if optimizer == "adamw":
        assert adamw == [pytest.approx([0.01 * f] * 2) for f in factor]
    else:
        muon, row_adam = others
        assert adamw == [pytest.approx([0.02 * f, 0.03 * f, 0.04 * f]) for f in factor]
        assert muon == [pytest.approx([0.01 * f] * len(muon[0])) for f in factor]
        assert row_adam == [pytest.approx([0.05 * f]) for f in factor]


@pytest.mark.parametrize(("momentum", "expected"), [
    (0.95, [0.85, 0.851, 0.852, 0.853]), (0.5, [0.5] * 4)])
def test_muons_momentum_rises_from_085_in_100_steps(toy, momentum, expected):
    _, muon, _ = seen_in_updates(toy(max_iters=4, momentum=momentum), lambda group: group.get("momentum"))
    assert [groups[0] for groups in muon] == pytest.approx(expected)


def gradient_norm(group) -> float:
    return math.sqrt(sum(p.grad.double().square().sum().item() for p in group["params"]))


def test_clipping_bounds_the_norm_of_the_gradient(toy):
    norms = {}
    for clip in (0.0, 1e6, 0.01):
        cfg = toy(optimizer="adamw", max_iters=4, learning_rate=1e-3, grad_clip=clip)
        adamw, = seen_in_updates(cfg, gradient_norm)
        norms[clip] = [math.hypot(*groups) for groups in adamw]
    assert min(norms[0.0]) > 0.02
    assert norms[1e6] == norms[0.0]
    assert norms[0.01] == pytest.approx([0.01] * 4, rel=1e-3)


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_a_few_steps_reduce_the_loss(optimizer):
    torch.manual_seed(0)
    cfg = Config(**SMALL | dict(optimizer=optimizer, init="zero", learning_rate=0.01))
    model = GPT(cfg, VOCAB)
    optimizers, losses = make_optimizers(model, cfg, "cpu"), []
    x = torch.arange(4 * T).view(4, T) % 7
    for _ in range(30):
        loss = model(x, (x + 1) % 7)[1]
        loss.backward()
        for one in optimizers:
            one.step()
            one.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(VOCAB), abs=1e-4)
    assert losses[-1] < 0.5 * losses[0]
