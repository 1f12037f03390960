"""Generation with a cache equals running the whole model again at each position, and drawing is fair."""

import math
import shutil

import pytest
import torch
from conftest import TOY, pairwise, perturbed, trained

from inkling import cpu
from inkling.cpu import Linear, accelerate
from inkling.device import compile_step, compiler_missing
from train import GPT, Cache, Config, draw, load

VOCAB, SIZE = 50, 16
SMALL = dict(n_layer=3, n_head=4, n_embd=32, block_size=SIZE, dropout=0.1, ngrams=3, ngram_rows=97, init="gpt2")
SWITCHES = pairwise(
    positions=["rope", "learned"], rope_fraction=[0.0, 0.5, 1.0], n_kv_head=[0, 1, 2], qk_norm=[False, True],
    qk_norm_gain=[False, True],
    norm=["rmsnorm", "layernorm"], embed_norm=[False, True], shortcuts=[False, True], qkv_bias=[False, True],
    mlp=["relu2", "swiglu"], logit_cap=[0.0, 15.0], pad_vocab_to=[1, 64], tie_weights=[False, True],
    ngrams=[0, 2, 5], ngram_edges=[False, True])
TOY_LOGITS = torch.tensor([[4.51, .89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79]])     # of SEEDS.md


def small(**changes) -> GPT:
    torch.manual_seed(0)
    return perturbed(GPT(Config(**SMALL | changes), VOCAB)).eval()


def tokens(*shape):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(0))


def uniforms(n: int):
    return torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def near(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def dictated(model, prompt, ids, step=None):
    """The logits (B, n, vocab_size) that generate shows when it is told to continue with ids (B, n)."""
    shown = []

    def pick(logits):
        shown.append(logits)
        return ids[:, len(shown) - 1]

    yielded = list(model.generate(prompt, ids.size(1), pick, step))
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


def new_cache(model, size: int, batch_size: int = 2) -> Cache:
    return Cache(model.cfg, batch_size, size, "cpu", torch.float32)


@torch.no_grad()
def next_logits(model, cache, piece, fixed_shape: bool = False):
    """The logits after the next tokens of a text."""
    cache.advance(piece.size(1), fixed_shape)
    return model.next_logits(piece, cache)


@pytest.mark.parametrize("switches", SWITCHES)
def test_a_cache_filled_in_pieces_equals_one_pass(switches):
    model, idx = small(**switches), tokens(2, SIZE)
    whole = model(idx)[0]
    for sizes in ([SIZE], [1, 15], [5, 1, 1, 4, 5]):
        cache = new_cache(model, SIZE)
        for piece in idx.split(sizes, 1):
            near(next_logits(model, cache, piece), whole[:, cache.length - 1])
        assert cache.length == SIZE


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


@pytest.mark.parametrize("switches", SWITCHES)
def test_a_step_of_fixed_shapes_equals_the_growing_one(switches):
    model, ids = small(**switches), tokens(2, 3 * SIZE)
    for length in (1, 5, SIZE):
        positions, prompt, rest = [], ids[:, :length], ids[:, length:]

        def step(new, cache, positions=positions, model=model):
            assert cache.fixed_shape
            positions.append(cache.positions.item())
            return model.next_logits(new, cache)

        near(dictated(model, prompt, rest, step), dictated(model, prompt, rest))
        assert len(positions) > SIZE                # it has been taken, for one token at a time
        assert set(positions) <= set(range(1, SIZE))


def test_a_step_of_fixed_shapes_never_sees_what_lies_beyond_its_position():
    model, idx = small(), tokens(1, SIZE)
    cache = new_cache(model, SIZE, batch_size=1)
    next_logits(model, cache, idx)                  # what a window that has been left leaves in the cache
    for stored in (*cache.keys, *cache.values):
        stored[:, :, 6:] = 1e3
    cache.clear()
    cache.advance(5)
    near(next_logits(model, cache, idx[:, 5:6], fixed_shape=True), last_logits(model, idx[:, :6]))


@pytest.mark.skipif(bool(compiler_missing("cpu")), reason="there is nothing to compile with")
@pytest.mark.parametrize(("rows", "dtype", "atol"), [(2, "float32", 1e-5), (1, "float32", 1e-5), (1, "bfloat16", 0.1)])
def test_a_compiled_step_equals_the_eager_one(rows, dtype, atol):
    model = accelerate(small(n_layer=1, n_kv_head=2, bias=True)).to(getattr(torch, dtype))
    ids = tokens(rows, 3 * SIZE)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()                # other tests compile, too
    step = compile_step(model.next_logits, "cpu")
    compiled = dictated(model, ids[:, :5], ids[:, 5:], step)
    near(compiled, dictated(model, ids[:, :5], ids[:, 5:]), atol)
    near(dictated(model, ids[:, :3], ids[:, 3:9], step), dictated(model, ids[:, :3], ids[:, 3:9]), atol)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1      # for all positions and lengths


def test_without_a_compiler_the_reason_is_told(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert compiler_missing("cpu") == "there is no C++ compiler"
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert compiler_missing("cpu") == ""


class Watched(GPT):
    """Notes what each call of next_logits reads, and from which cache."""

    def __init__(self, *args):
        super().__init__(*args)
        self.lengths = []
        self.caches = []
        self.places = set()

    def next_logits(self, ids, cache):
        self.lengths.append(ids.size(1))
        if cache not in self.caches:
            self.caches.append(cache)
        self.places.add(tuple(tensor.data_ptr() for tensor in cache.tensors()))
        return super().next_logits(ids, cache)


def watched(**changes) -> Watched:
    torch.manual_seed(0)
    return perturbed(Watched(Config(**SMALL | changes), VOCAB)).eval()


def test_a_long_generation_needs_no_more_memory_than_a_short_one():
    model = watched()
    for _ in model.generate(tokens(2, 5), 200, lambda logits: draw(logits, 1.0)):
        pass
    cache, = model.caches                               # one, whose tensors are written in place
    assert len(model.places) == 1
    assert all(tensor.shape == (2, 4, SIZE, 8) for tensor in (*cache.keys, *cache.values))
    assert cache.ids.shape == (2, SIZE)                 # for the n-grams
    assert len(model.lengths) == 200
    assert set(model.lengths[1:]) == {1, SIZE // 2}     # and never more than half a window is computed again


def test_a_cache_is_little_larger_than_what_is_asked_for_and_has_few_sizes():
    model = watched(block_size=300)
    for count in (3, 123, 124, 400):
        next(model.generate(tokens(1, 5), count, lambda logits: draw(logits, 0)))
    assert [cache.size for cache in model.caches] == [128, 128, 256, 300]


# ---- a few rows


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(("bias", "outputs"), [(False, 12), (True, 12), (True, 10), (False, 4)])
def test_a_linear_layer_gives_the_same_for_few_rows_and_many(bias, outputs, gradient, monkeypatch):
    monkeypatch.setattr(cpu, "AS_COLUMNS_FROM", 0)
    torch.manual_seed(0)
    linear, x = Linear(24, outputs, bias=bias), torch.randn(17, 24)
    expected = torch.nn.functional.linear(x, linear.weight, linear.bias).detach()
    for rows in range(1, 18):
        with torch.set_grad_enabled(gradient):
            y = linear(x[:rows])
        near(y, expected[:rows], atol=1e-6)
        assert y.requires_grad == gradient
    with torch.set_grad_enabled(gradient):
        near(linear(x[:6].view(3, 2, 24)), expected[:6].view(3, 2, outputs), atol=1e-6)
        near(linear(x[3]), expected[3], atol=1e-6)
        near(linear(x[:12].view(2, 6, 24).transpose(0, 1)), expected[:12].view(2, 6, -1).transpose(0, 1), atol=1e-6)


def test_few_rows_without_gradient_take_the_way_of_their_own(monkeypatch):
    monkeypatch.setattr(cpu, "AS_COLUMNS_FROM", 24 * 12)
    taken, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: taken.append(b.size(-1)) or bmm(a, b))
    linear = Linear(24, 12)
    with torch.no_grad():
        for rows in (1, 16, 17):
            linear(torch.randn(rows, 24))
        Linear(24, 11)(torch.randn(1, 24))              # a small matrix
        Linear(240, 3)(torch.randn(1, 240))             # no four rows
        linear.bfloat16()(torch.randn(1, 24).bfloat16())
    Linear(24, 12)(torch.randn(1, 24))
    assert taken == [1, 16]


# ---- from Python


def test_generation_from_python_as_documented(data_dir, tmp_path):
    assert trained(data_dir, tmp_path / "x", max_iters=1, sample_tokens=0).returncode == 0
    for path in (tmp_path / "x", str(tmp_path / "x"), tmp_path / "x" / "ckpt.pt"):
        model, tokenizer = load(path)
        assert not model.training
        prompt = torch.from_numpy(tokenizer.encode("The fox").astype("int64"))[None]
        found = [ids.item() for ids in model.generate(prompt, 100, lambda logits: draw(logits, 0.8))]
        assert len(tokenizer.decode(found)) == 100
    assert TOY["block_size"] < 100                      # past the end of the window, too
    assert "for ids in model.generate(prompt, 100, lambda logits: draw(logits, 0.8))" in load.__doc__


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
    ids = draw(logits.expand(n, 6), temperature, uniforms(n))
    weights = [math.exp(z / temperature) for z in logits.tolist()]
    expected = torch.tensor(weights) * n / sum(weights)
    chi_square = ((torch.bincount(ids, minlength=6) - expected) ** 2 / expected).sum()
    assert chi_square < 15.09                           # once in 100 by chance, with 5 degrees of freedom


@pytest.mark.parametrize("temperature", [0, 1e-9, 1e-38, 1e-50, 1e-320])
def test_draw_near_temperature_0_is_greedy(temperature):
    logits = torch.randn(100, VOCAB, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(logits, temperature), logits.argmax(-1))


def test_draw_takes_the_id_at_which_the_sums_exceed_the_number():
    logits = torch.tensor([-torch.inf, 0.25, 0.25, 0.5, -torch.inf]).log().nan_to_num(nan=-torch.inf)
    below = 1 - 2**-53                                  # the largest number that a stream gives
    numbers = torch.tensor([0.0, 0.25 - 1e-9, 0.25 + 1e-9, 0.5 + 1e-9, below], dtype=torch.float64)
    assert draw(logits.expand(5, 5), 1.0, numbers).tolist() == [1, 1, 2, 3, 3]


def test_draw_loses_none_of_many_small_probabilities():
    # One of 0.5, and 2**20 that share the other half: in float32 each would vanish beside a sum near 1.
    logits = torch.zeros(1, 2**20 + 1)
    logits[:, 0] = 20 * math.log(2)
    numbers = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    ids = torch.stack([draw(logits, 1.0, number[None])[0] for number in numbers[[100, 499, 600, 750, 998]]])
    expected = (2 * numbers[[100, 499, 600, 750, 998]] - 1) * 2**20
    near(ids.double(), expected.clamp(min=0), atol=300)


def test_draw_never_takes_what_is_ruled_out():
    logits = torch.zeros(1000, 6)
    logits[:, ::2] = -torch.inf
    assert set(draw(logits, 1.0, uniforms(1000)).tolist()) == {1, 3, 5}


@pytest.mark.parametrize(("temperature", "likeliest"), [(0.1, .9910), (1.0, .5721), (5.0, .2421)])
def test_temperature_sharpens_and_flattens(temperature, likeliest):
    n = 20_000
    ids = draw(TOY_LOGITS.expand(n, 9), temperature, uniforms(n))
    error = 4 * math.sqrt(likeliest * (1 - likeliest) / n)
    assert (ids == 3).double().mean().item() == pytest.approx(likeliest, abs=error)
