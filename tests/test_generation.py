"""Generation with a cache equals running the whole model afresh at each position, and drawing is fair."""

import math

import pytest
import torch
from conftest import TOY, flags, pairwise, perturbed

import sample
import train
from train import GPT, Cache, Config, draw

VOCAB, SIZE = 50, 16
SMALL = dict(n_layer=3, n_head=4, n_embd=32, block_size=SIZE, dropout=0.1, init="gpt2")
SWITCHES = pairwise(
    positions=["rope", "learned"], rope_fraction=[0.0, 0.5, 1.0], n_kv_head=[0, 1, 2], qk_norm=[False, True],
    norm=["rmsnorm", "layernorm"], embed_norm=[False, True], shortcuts=[False, True], qkv_bias=[False, True],
    mlp=["relu2", "swiglu"], logit_cap=[0.0, 15.0], pad_vocab_to=[1, 64], tie_weights=[False, True])
TOY_LOGITS = torch.tensor([[4.51, .89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79]])     # of SEEDS.md


def small(**changes) -> GPT:
    torch.manual_seed(0)
    return perturbed(GPT(Config(**SMALL | changes), VOCAB)).eval()


def tokens(*shape):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(0))


def near(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def dictated(model, prompt, ids):
    """The logits (B, n, vocab_size) that generate shows when it is told to continue with ids (B, n)."""
    shown = []

    def pick(logits):
        shown.append(logits)
        return ids[:, len(shown) - 1]

    yielded = list(model.generate(prompt, ids.size(1), pick))
    assert torch.equal(torch.stack(yielded, 1), ids)
    return torch.stack(shown, 1)


@torch.no_grad()
def last_logits(model, window):
    return model(window)[0][:, -1]


# ---- cached = uncached


@pytest.mark.parametrize("switches", SWITCHES)
def test_cached_logits_equal_uncached_at_every_position(switches):
    model, idx = small(**switches), tokens(2, SIZE + 1)
    whole = model(idx[:, :SIZE])[0]
    for length in (1, 2, 7, SIZE):
        near(dictated(model, idx[:, :length], idx[:, length:]), whole[:, length - 1:])


@pytest.mark.parametrize("switches", SWITCHES)
def test_a_cache_filled_in_pieces_equals_one_pass(switches):
    model, idx = small(**switches), tokens(2, SIZE)
    for sizes in ([SIZE], [1, 15], [5, 1, 1, 4, 5]):
        cache = Cache(model.cfg)
        pieces = [model.logits(model.trunk(piece, cache)) for piece in idx.split(sizes, 1)]
        near(torch.cat(pieces, 1), model(idx)[0])


@pytest.mark.parametrize("size", [1, 2, 7, 8])
@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_past_block_size_the_last_half_of_the_window_is_kept(positions, size):
    model, ids = small(positions=positions, block_size=size), tokens(2, 40)
    for length in (1, size, size + 1, 3 * size):
        prompt, rest = ids[:, :length], ids[:, length:]
        window, expected = prompt[:, -size:], []
        for new in rest.unbind(1):
            expected.append(last_logits(model, window))
            window = torch.cat((window, new[:, None]), 1)
            if window.size(1) > size:
                window = window[:, -max(1, size // 2):]
        near(dictated(model, prompt, rest), torch.stack(expected, 1))


def test_generation_leaves_the_prompt_and_the_weights_alone():
    model, prompt = small(), tokens(2, 5)
    kept, weights = prompt.clone(), {name: p.clone() for name, p in model.state_dict().items()}
    first = list(model.generate(prompt, 40, lambda logits: draw(logits, 0)))
    again = list(model.generate(prompt, 40, lambda logits: draw(logits, 0)))
    assert torch.equal(torch.stack(first), torch.stack(again))
    assert torch.equal(prompt, kept)
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize("count", [0, 1, 40])
def test_generation_yields_as_many_tokens_as_asked(count):
    ids = list(small().generate(tokens(3, 5), count, lambda logits: draw(logits, 1.0)))
    assert [token.shape for token in ids] == [(3,)] * count


# ---- draw


def test_greedy_is_the_argmax_of_the_uncached_logits():
    model, window = small(), tokens(2, 5)
    for token in model.generate(window, SIZE - 5, lambda logits: draw(logits, 0)):
        assert torch.equal(token, last_logits(model, window).argmax(-1))
        window = torch.cat((window, token[:, None]), 1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draw_follows_softmax(temperature):
    logits, n = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0]), 20_000
    ids = draw(logits.expand(n, 6), temperature, torch.Generator().manual_seed(0))
    weights = [math.exp(z / temperature) for z in logits.tolist()]
    expected = torch.tensor(weights) * n / sum(weights)
    chi_square = ((torch.bincount(ids, minlength=6) - expected) ** 2 / expected).sum()
    assert chi_square < 15.09                           # once in 100 by chance, with 5 degrees of freedom


@pytest.mark.parametrize("temperature", [0, 1e-9, 1e-38])
def test_draw_near_temperature_0_is_greedy(temperature):
    logits = torch.randn(100, VOCAB, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(logits, temperature), logits.argmax(-1))


def test_draw_never_takes_what_is_ruled_out():
    logits = torch.zeros(1000, 6)
    logits[:, ::2] = -torch.inf
    assert set(draw(logits, 1.0, torch.Generator().manual_seed(0)).tolist()) == {1, 3, 5}


# ---- top_k and top_p


def kept(logits) -> list:
    return [row.isfinite().nonzero()[:, 0].tolist() for row in logits]


def test_top_k_keeps_the_k_largest():
    logits = sample.filtered(TOY_LOGITS, top_k=3)
    assert logits.topk(3).indices.tolist() == [[3, 7, 0]]
    near(logits.topk(3).values, torch.tensor([[6.75, 6.28, 4.51]]))
    p = logits.softmax(-1)[0]
    near(p[[3, 7, 0]], torch.tensor([.5775, .3610, .0615]), atol=5e-5)
    assert kept(p.log()[None]) == [[0, 3, 7]]


@pytest.mark.parametrize("top_k", [0, 9, 200])
def test_top_k_of_0_or_more_than_the_vocabulary_keeps_all(top_k):
    assert torch.equal(sample.filtered(TOY_LOGITS, top_k=top_k), TOY_LOGITS)


@pytest.mark.parametrize(("temperature", "likeliest"), [(0.1, .9910), (1.0, .5721), (5.0, .2421)])
def test_temperature_sharpens_and_flattens(temperature, likeliest):
    n = 20_000
    ids = draw(TOY_LOGITS.expand(n, 9), temperature, torch.Generator().manual_seed(0))
    error = 4 * math.sqrt(likeliest * (1 - likeliest) / n)
    assert (ids == 3).double().mean().item() == pytest.approx(likeliest, abs=error)


@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p):
    logits = 3 * torch.randn(20, VOCAB, generator=torch.Generator().manual_seed(0))
    expected = []
    for p in logits.double().softmax(-1):
        nucleus, total = [], 0.0
        for at in p.argsort(descending=True).tolist():
            if total < top_p:
                nucleus.append(at)
            total += p[at]
        expected.append(sorted(nucleus))
    filtered = sample.filtered(logits, top_p=top_p)
    assert kept(filtered) == expected
    assert torch.equal(filtered[filtered.isfinite()], logits[filtered.isfinite()])      # as before


def test_top_p_of_1_keeps_all():
    logits = torch.tensor([[50.0, 0.0, -50.0]])         # the sum of the first is 1 in float32
    assert torch.equal(sample.filtered(logits, top_p=1.0), logits)


def test_top_p_counts_the_probabilities_of_top_k():
    # Of the top 3, .5775 and .3610 make .9385 > .93; of all 9 they make .9297.
    assert kept(sample.filtered(TOY_LOGITS, top_k=3, top_p=0.93)) == [[3, 7]]
    assert kept(sample.filtered(TOY_LOGITS, top_p=0.93)) == [[0, 3, 7]]


def picks(options: sample.Options, n=2000) -> set:
    pick = sample.picker(options, 0, "cpu")
    return {pick(TOY_LOGITS).item() for _ in range(n)}


def test_top_p_counts_the_probabilities_at_the_temperature():
    assert picks(sample.Options(temperature=0.1, top_k=0, top_p=0.95)) == {3}
    assert picks(sample.Options(temperature=5.0, top_k=0, top_p=0.4)) == {3, 7}
    assert picks(sample.Options(temperature=5.0, top_k=1)) == {3}
    assert picks(sample.Options(temperature=0, top_k=0)) == {3}


# ---- one stream of random numbers for each sample


def test_each_picker_has_random_numbers_of_its_own():
    logits, options = torch.zeros(1, 1000), sample.Options(top_k=0)
    alone = sample.picker(options, 5, "cpu")
    expected = [alone(logits).item() for _ in range(20)]
    one, other, seen = sample.picker(options, 5, "cpu"), sample.picker(options, 6, "cpu"), []
    for _ in range(20):
        torch.rand(3)
        other(logits)
        seen.append(one(logits).item())
    assert seen == expected
    assert expected != [other(logits).item() for _ in range(20)]


def test_a_later_sample_is_that_of_the_next_seed(data_dir, tmp_path, capsys):
    words = flags(**TOY | dict(max_iters=1, sample_tokens=0), data_dir=data_dir, out_dir=tmp_path / "run")
    assert train.main(words) == 0

    def texts(**options):
        capsys.readouterr()
        assert sample.main(flags(out_dir=tmp_path / "run", device="cpu", max_new_tokens=40, **options)) == 0
        return [text.strip() for text in capsys.readouterr().out.split("\n---------------\n") if text.strip()]

    three = texts(seed=10, num_samples=3, start="The fox")
    assert len(set(three)) == 3
    assert three == [texts(seed=seed, start="The fox")[0] for seed in (10, 11, 12)]
