"""The model computes what its switches say, for every pair of their values and as GPT-2 and Llama do."""

import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from conftest import pairwise, perturbed

from inkling import cpu
from inkling.cli import problems
from inkling.cpu import dropout, in_blocks
from inkling.device import compiler_missing
from train import GPT, Config, NGrams, draw

VOCAB, T = 50, 16
SMALL = dict(n_layer=3, n_head=4, n_embd=32, block_size=T, dropout=0.0, ngrams=0, ngram_rows=97, init="gpt2",
             rope_factor=3.0, rope_context=256)
PLAIN = dict(norm_gain=True, embed_norm=False, qk_norm=False, logit_cap=0.0, shortcuts=False, ngrams=0)
GPT2 = PLAIN | dict(positions="learned", norm="layernorm", norm_eps=1e-5, mlp="gelu_tanh", bias=True,
                    tie_weights=True, init="gpt2")
LLAMA = PLAIN | dict(positions="rope", rope_fraction=1.0, norm="rmsnorm", norm_eps=1e-6, mlp="swiglu",
                     bias=False, init="kaiming")
SWITCHES = pairwise(
    positions=["rope", "learned"], rope_fraction=[0.5, 1.0], norm=["rmsnorm", "layernorm"],
    norm_gain=[False, True], embed_norm=[False, True], mlp=["relu2", "relu", "gelu", "gelu_tanh", "swiglu"],
    bias=[False, True], qkv_bias=["auto", False, True], head_bias=[False, True], tie_weights=[False, True],
    qk_norm=[False, True], qk_norm_gain=[False, True], logit_cap=[0.0, 15.0], shortcuts=[False, True],
    n_kv_head=[0, 1, 2], pad_vocab_to=[1, 64], ngrams=[0, 2, 5], ngram_edges=[False, True],
    head_dim=[0, 12], rope_scaling=["none", "linear", "llama3"])


def small(**changes) -> GPT:
    torch.manual_seed(0)
    return GPT(Config(**SMALL | changes), VOCAB).eval()


def fast(**changes) -> GPT:
    """As train.py and sample.py have it on a CPU."""
    return cpu.accelerate(small(**changes))


WITH_BOTH = pytest.mark.parametrize("make", [small, fast])


def tokens(*shape, seed=0):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def count(model) -> int:
    return sum(p.numel() for p in model.parameters())


def near(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=atol)


def loaded(weights: dict, **changes) -> GPT:
    """A small model with these weights, that must be all it has."""
    model = small(**changes)
    model.load_state_dict(weights)
    return model


# ---- the whole model against plain formulas, one sequence and one head at a time, in float64


def plain_norm(cfg, x, w, name):
    if cfg.norm == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + cfg.norm_eps).sqrt()
    return x * w.get(f"{name}.weight", 1) + w.get(f"{name}.bias", 0)


def plain_linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def plain_frequency(cfg, frequency: float) -> float:
    """What rope_scaling makes of a frequency, by its wavelength, as in Meta's llama3 code."""
    if cfg.rope_scaling == "linear":
        return frequency / cfg.rope_factor
    wavelength = 2 * math.pi / frequency
    if cfg.rope_scaling == "none" or wavelength < cfg.rope_context / cfg.rope_high_freq:
        return frequency
    if wavelength > cfg.rope_context / cfg.rope_low_freq:
        return frequency / cfg.rope_factor
    smooth = (cfg.rope_context / wavelength - cfg.rope_low_freq) / (cfg.rope_high_freq - cfg.rope_low_freq)
    return (1 - smooth) * frequency / cfg.rope_factor + smooth * frequency


def plain_turn(cfg, x):
    """Rotary positions as complex numbers: the halves of x (T, head_dim) are real and imaginary part."""
    pairs = x.size(1) // 2
    turning = round(pairs * cfg.rope_fraction)
    for t in range(len(x)):
        for i in range(turning):
            angle = t * plain_frequency(cfg, cfg.rope_theta ** (-i / turning))
            z = complex(x[t, i], x[t, i + pairs]) * complex(math.cos(angle), math.sin(angle))
            x[t, i], x[t, i + pairs] = z.real, z.imag
    return x


def plain_mlp(cfg, x, w, name):
    up = plain_linear(x, w, f"{name}.up")
    if cfg.mlp == "swiglu":
        gate = plain_linear(x, w, f"{name}.gate")
        hidden = up * gate / (1 + torch.exp(-gate))
    elif cfg.mlp == "gelu":
        hidden = up * (1 + torch.erf(up / math.sqrt(2))) / 2
    elif cfg.mlp == "gelu_tanh":
        hidden = up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up ** 3))) / 2
    else:
        hidden = torch.where(up > 0, up, 0) ** {"relu": 1, "relu2": 2}[cfg.mlp]
    return plain_linear(hidden, w, f"{name}.down")


def plain_ngrams(cfg, ids: list, table):
    """The vectors (T, C) that runs of 2 to cfg.ngrams tokens add, by Rabin and Karp's hash of each run."""
    total = torch.zeros(len(ids), cfg.n_embd, dtype=table.dtype)
    for t in range(len(ids)):
        for length in range(2, cfg.ngrams + 1):
            if length > t + 1 and not cfg.ngram_edges:
                continue                                        # it reaches before the first token
            key = ids[t]
            for place in range(t - 1, t - length, -1):          # backwards; before the text there is a 0
                key = (key * 1_540_483_477 + (ids[place] + 1 if place >= 0 else 0)) % (2 ** 31 - 1)
            total[t] += table[key % len(table)]
    return total


def plain_logits(model, idx):
    """Logits (T, VOCAB) of one sequence idx (T)."""
    cfg, w = model.cfg, {name: tensor.double() for name, tensor in model.state_dict().items()}
    width, group = cfg.head_dim or cfg.n_embd // cfg.n_head, cfg.n_head // (cfg.n_kv_head or cfg.n_head)
    x = w["wte.weight"][idx]
    if cfg.ngrams:
        x = x + plain_ngrams(cfg, idx.tolist(), w["ngrams.weight"])
    if cfg.positions == "learned":
        x = x + w["wpe.weight"][:len(idx)]
    if cfg.embed_norm:
        x = plain_norm(cfg, x, w, "embed_norm")
    first_x, first_v = x, None
    for name in (f"blocks.{layer}" for layer in range(cfg.n_layer)):
        if cfg.shortcuts:
            x = w[f"{name}.embed_mix"][0] * x + w[f"{name}.embed_mix"][1] * first_x
        y = plain_norm(cfg, x, w, f"{name}.norm1")
        q, k, v = (plain_linear(y, w, f"{name}.attn.{part}") for part in "qkv")
        if cfg.shortcuts and first_v is not None:
            v = w[f"{name}.attn.value_mix"][0] * v + w[f"{name}.attn.value_mix"][1] * first_v
        first_v = v if first_v is None else first_v
        heads = []
        for head in range(cfg.n_head):
            qh, kh, vh = (z[:, at * width:(at + 1) * width].clone()
                          for z, at in ((q, head), (k, head // group), (v, head // group)))
            if cfg.qk_norm:
                qh, kh = (z / (z.square().mean(-1, keepdim=True) + cfg.norm_eps).sqrt()
                          * w.get(f"{name}.attn.{part}_gain", 1) for z, part in ((qh, "q"), (kh, "k")))
            if cfg.positions == "rope":
                qh, kh = plain_turn(cfg, qh), plain_turn(cfg, kh)
            scores = (qh @ kh.T / math.sqrt(width)).exp().tril()
            heads.append(scores / scores.sum(-1, keepdim=True) @ vh)
        x = x + plain_linear(torch.cat(heads, -1), w, f"{name}.attn.out")
        x = x + plain_mlp(cfg, plain_norm(cfg, x, w, f"{name}.norm2"), w, f"{name}.mlp")
    z = plain_linear(plain_norm(cfg, x, w, "norm"), w, "head")[:, :VOCAB]
    return cfg.logit_cap * z / (z ** 2 + cfg.logit_cap ** 2).sqrt() if cfg.logit_cap else z


@WITH_BOTH
@pytest.mark.parametrize("switches", [*SWITCHES, GPT2, LLAMA])
def test_logits_equal_plain_formulas(switches, make):
    model, idx = perturbed(make(**switches)), tokens(T)
    near(model(idx[None])[0][0], plain_logits(model, idx), atol=1e-3)


def test_the_docstrings_example_of_ngrams_is_right():
    """The ids 5, 7, 9: which rows the 9 reads."""
    table = NGrams(1000, 1, longest=3)
    with torch.no_grad():
        table.weight.copy_(torch.arange(1000.0)[:, None])
    pair = 9 * NGrams.FACTOR + 8
    triple = pair * NGrams.FACTOR + 6
    rows = [key % NGrams.PRIME % 1000 for key in (pair, triple)]
    with torch.no_grad():
        assert table(torch.tensor([[5, 7, 9]]), torch.tensor([2])).item() == sum(rows)


def test_ngrams_that_reach_before_the_first_token_add_nothing():
    table = NGrams(1000, 4, longest=3)
    ids = torch.tensor([[5, 7, 9]])
    with torch.no_grad():
        x = table(ids, torch.arange(3))[0]
        pair = (7 * NGrams.FACTOR + 6) % NGrams.PRIME % 1000
        assert not x[0].any()
        assert torch.equal(x[1], table.weight[pair])
    table(ids, torch.arange(3)).sum().backward()
    assert table.weight.grad.any(dim=1).sum() == 3              # the rows of (5, 7), (7, 9) and (5, 7, 9)


def test_ngrams_are_the_same_wherever_they_stand_and_differ_by_what_stands_in_them():
    """Three tokens are told apart by what they are and by their order, not by what comes before them."""
    table = NGrams(2 ** 20, 8, longest=3)
    ids = torch.tensor([[1, 2, 3, 1, 2, 3, 2, 1, 3, 2]])
    with torch.no_grad():
        x = table(ids, torch.arange(10))[0]
    same = [(a, b) for a in range(10) for b in range(a) if torch.equal(x[a], x[b])]
    assert same == [(5, 2)]                             # only 1 2 3 is there twice
    with torch.no_grad():
        assert torch.equal(table(ids, torch.tensor([4, 9]))[0], x[[4, 9]])


def test_ngrams_spread_over_their_table_evenly():
    """All pairs of 256 tokens in a table of 1,024 rows: no row has many more than its share of 64."""
    ids = torch.cartesian_prod(torch.arange(256), torch.arange(256))
    table = NGrams(1024, 1, longest=2)
    with torch.no_grad():
        table.weight.copy_(torch.arange(1024.0)[:, None])
        seen = table(ids, torch.tensor([1])).flatten().long()
    counts = torch.bincount(seen, minlength=1024)
    assert counts.sum() == 256 * 256
    assert counts.max() < 128
    assert counts.min() > 16


# ---- GPT-2 and Llama as transformers computes them


def split(module, name, *parts):
    """Names and tensors of the linear layers `parts` in a transformers Conv1D, whose weight is (in, out)."""
    for kind in ("weight", "bias"):
        tensor = module.weight.T if kind == "weight" else module.bias
        for part, piece in zip(parts, tensor.chunk(len(parts)), strict=True):
            yield f"{name}.{part}.{kind}", piece


def test_logits_equal_those_of_gpt2_in_transformers():
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(1)
    theirs = perturbed(GPT2LMHeadModel(GPT2Config(
        vocab_size=VOCAB, n_positions=T, n_embd=32, n_layer=3, n_head=4, bos_token_id=0,
        eos_token_id=0)).eval())
    body = theirs.transformer
    weights = {"wte.weight": body.wte.weight, "wpe.weight": body.wpe.weight,
               "head.weight": theirs.lm_head.weight, "norm.weight": body.ln_f.weight,
               "norm.bias": body.ln_f.bias}
    for layer, block in enumerate(body.h):
        name = f"blocks.{layer}"
        weights |= dict(split(block.attn.c_attn, f"{name}.attn", "q", "k", "v"))
        weights |= dict(split(block.attn.c_proj, f"{name}.attn", "out"))
        weights |= dict(split(block.mlp.c_fc, f"{name}.mlp", "up"))
        weights |= dict(split(block.mlp.c_proj, f"{name}.mlp", "down"))
        for ours, norm in (("norm1", block.ln_1), ("norm2", block.ln_2)):
            weights |= {f"{name}.{ours}.weight": norm.weight, f"{name}.{ours}.bias": norm.bias}
    idx = tokens(3, T)
    near(loaded(weights, **GPT2)(idx)[0], theirs(idx).logits, atol=1e-4)


@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_logits_equal_those_of_llama_in_transformers(n_kv_head):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(1)
    theirs = perturbed(LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB, max_position_embeddings=T, hidden_size=32, intermediate_size=48,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=n_kv_head, rms_norm_eps=1e-6)).eval())
    body = theirs.model
    weights = {"wte.weight": body.embed_tokens.weight, "norm.weight": body.norm.weight,
               "head.weight": theirs.lm_head.weight}
    for layer, block in enumerate(body.layers):
        attn, mlp = block.self_attn, block.mlp
        parts = {"attn.q": attn.q_proj, "attn.k": attn.k_proj, "attn.v": attn.v_proj,
                 "attn.out": attn.o_proj, "mlp.gate": mlp.gate_proj, "mlp.up": mlp.up_proj,
                 "mlp.down": mlp.down_proj, "norm1": block.input_layernorm,
                 "norm2": block.post_attention_layernorm}
        weights |= {f"blocks.{layer}.{name}.weight": module.weight for name, module in parts.items()}
    ours = loaded(weights, **LLAMA, n_kv_head=n_kv_head, ffn_dim=48, rope_theta=10_000.0)
    idx = tokens(3, T)
    near(ours(idx)[0], theirs(idx).logits, atol=1e-4)


# ---- attention


@pytest.mark.parametrize("switches", SWITCHES)
def test_a_later_token_never_changes_earlier_logits(switches):
    model, idx = perturbed(small(**switches)), tokens(2, T)
    before = model(idx)[0]
    for t in (1, T // 2, T - 1):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCAB
        after = model(changed)[0]
        near(after[:, :t], before[:, :t])
        assert all((after[:, later] - before[:, later]).abs().max() > 1e-3 for later in range(t, T))


def test_as_many_kv_heads_as_heads_is_plain_multi_head_attention():
    model, idx = perturbed(small()), tokens(2, T)
    near(loaded(model.state_dict(), n_kv_head=4)(idx)[0], model(idx)[0])


@pytest.mark.parametrize("n_kv_head", [1, 2])
def test_grouped_heads_equal_a_model_with_repeated_keys_and_values(n_kv_head):
    grouped = perturbed(small(n_kv_head=n_kv_head, bias=True))
    weights = grouped.state_dict()
    for name in weights:
        if ".attn.k." in name or ".attn.v." in name:
            heads = weights[name].unflatten(0, (n_kv_head, 8))
            weights[name] = heads.repeat_interleave(4 // n_kv_head, 0).flatten(0, 1)
    idx = tokens(2, T)
    near(loaded(weights, bias=True)(idx)[0], grouped(idx)[0])


def queries_and_keys(monkeypatch, model, idx):
    """What the first block's attention compares: queries and keys (B, heads, T, head_dim)."""
    seen, attend = [], F.scaled_dot_product_attention
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention",
                      lambda q, k, *rest, **options: seen.append((q, k)) or attend(q, k, *rest, **options))
        model(idx)
    return seen[0]


def test_rotary_attention_depends_on_relative_position_only(monkeypatch):
    model = perturbed(small(positions="rope"))
    q, k = queries_and_keys(monkeypatch, model, torch.full((1, T), 7))      # one token, everywhere
    scores = (q @ k.mT)[0]                                                  # (heads, T, T)
    near(scores[:, 1:, 1:], scores[:, :-1, :-1])
    assert (scores[:, 5, :5] - scores[:, 5, 5:6]).abs().min() > 1e-4        # and does depend on it


@pytest.mark.parametrize(("fraction", "turning"), [(0.0, 0), (0.25, 2), (0.5, 4), (1.0, 8)])
def test_rope_fraction_leaves_the_rest_unturned(monkeypatch, fraction, turning):
    model = perturbed(small(positions="rope", rope_fraction=fraction))
    for z in queries_and_keys(monkeypatch, model, torch.full((1, T), 7)):
        turned = (z[:, :, 1:] - z[:, :, :1]).abs().amax((0, 1, 2)) > 1e-4   # (head_dim,)
        assert turned.sum() == turning


# ---- the parts


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_norms_equal_plain_formulas(norm, gain):
    model = perturbed(small(norm=norm, norm_gain=gain, bias=True, norm_eps=0.1))
    x = 3 * torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)) + 1
    weights = {f"norm.{name}": p for name, p in model.norm.named_parameters()}
    expected = {("rmsnorm", False): set(), ("layernorm", False): set(), ("rmsnorm", True): {"norm.weight"},
                ("layernorm", True): {"norm.weight", "norm.bias"}}
    assert set(weights) == expected[norm, gain]
    near(model.norm(x), plain_norm(model.cfg, x, weights, "norm"))


@pytest.mark.parametrize("ffn_dim", [0, 24])
@pytest.mark.parametrize("mlp", ["relu2", "relu", "gelu", "gelu_tanh", "swiglu"])
def test_each_mlp_equals_a_plain_formula(mlp, ffn_dim):
    model = perturbed(small(mlp=mlp, ffn_dim=ffn_dim, bias=True))
    part = model.blocks[0].mlp
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    near(part(x), plain_mlp(model.cfg, x, {f"mlp.{name}": p for name, p in part.named_parameters()}, "mlp"))
    assert part.up.out_features == (ffn_dim or (128 if mlp == "swiglu" else 4 * 32))    # 8/3 32 -> 128


@pytest.mark.parametrize("n_embd", [32, 256, 384])
def test_swiglu_is_8_thirds_wide_rounded_up_to_128(n_embd):
    with torch.device("meta"):
        model = GPT(Config(mlp="swiglu", n_embd=n_embd), VOCAB)
    assert model.blocks[0].mlp.up.out_features == {32: 128, 256: 768, 384: 1024}[n_embd]


def test_logit_cap_bounds_the_logits_and_keeps_their_order():
    model, idx = perturbed(small(logit_cap=0.0, head_bias=True)), tokens(2, T)
    with torch.no_grad():
        model.head.weight *= 20
    z = model(idx)[0]
    capped = loaded(model.state_dict(), logit_cap=5.0, head_bias=True)(idx)[0]
    assert z.abs().max() > 10 > 5 > capped.abs().max()
    near(capped, 5 * z / (z ** 2 + 25).sqrt())
    assert torch.equal(capped.argmax(-1), z.argmax(-1))


# ---- the vocabulary


def padded(model, value):
    """The model with its rows padded to 64 (from 50) by `value`."""
    weights = model.state_dict()
    for name in ("wte.weight", "head.weight", "head.bias"):
        extra = torch.full((14, *weights[name].shape[1:]), value)
        weights[name] = torch.cat((weights[name], extra))
    return loaded(weights, pad_vocab_to=64, head_bias=True)


def test_padding_the_vocabulary_changes_no_logits():
    model, idx = perturbed(small(head_bias=True)), tokens(2, T)
    wide = padded(model, 1e3)                           # would win by far, if it took part
    assert wide.wte.num_embeddings == wide.head.out_features == 64
    near(wide(idx)[0], model(idx)[0])
    near(wide(idx, idx)[1], model(idx, idx)[1])


@pytest.mark.parametrize("temperature", [0, 1, 100])
def test_padding_is_never_sampled(temperature):
    model = padded(perturbed(small(head_bias=True)), 1e3)
    ids = torch.stack(list(model.generate(tokens(50, 3), 30, lambda z: draw(z, temperature))))
    assert ids.max() < VOCAB


def test_tied_weights_are_one_tensor():
    tied, untied = small(tie_weights=True), small()
    assert tied.head.weight is tied.wte.weight
    assert untied.head.weight.data_ptr() != untied.wte.weight.data_ptr()
    assert count(untied) - count(tied) == VOCAB * 32
    tied(tokens(2, T), tokens(2, T))[1].backward()
    assert tied.wte.weight.grad.abs().sum(-1).min() > 0     # the output layer reaches every row


# ---- initial weights


WIDE = dict(n_embd=256, bias=True, head_bias=True, positions="learned")     # enough elements for statistics


def linears(model) -> dict:
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def adds(name) -> bool:
    return name.endswith((".attn.out", ".mlp.down"))


def has_std(module, expected) -> bool:
    return module.weight.std().item() == pytest.approx(expected, rel=0.05)


def is_uniform(module, bound) -> bool:
    return has_std(module, bound / math.sqrt(3)) and 0.98 * bound < module.weight.abs().max() <= bound


def test_init_gpt2_is_normal_and_narrower_where_blocks_add():
    model = small(init="gpt2", **WIDE)
    for name, module in linears(model).items():
        assert has_std(module, 0.02 / math.sqrt(6) if adds(name) else 0.02), name
        assert not module.bias.any()
    assert has_std(model.wte, 0.02)
    assert has_std(model.wpe, 0.02)


def test_init_zero_starts_outputs_at_zero():
    model = small(init="zero", **WIDE)
    for name, module in linears(model).items():
        if adds(name) or name == "head":
            assert not module.weight.any()
        else:
            assert has_std(module, math.sqrt(0.33 / 256)), name
        assert not module.bias.any()
    assert has_std(model.wte, 1.0)
    assert has_std(model.wpe, 1.0)


@pytest.mark.parametrize("init", ["zero", "gpt2", "torch", "kaiming"])
def test_ngram_vectors_begin_at_0(init):
    assert not small(init=init, ngrams=3).ngrams.weight.any()


def test_init_torch_is_pytorchs_own():
    model = small(init="torch", **WIDE)
    for name, module in linears(model).items():
        bound = 1 / math.sqrt(module.in_features)
        assert is_uniform(module, bound), name
        assert 0 < module.bias.abs().max() <= bound
    assert has_std(model.wte, 1.0)
    assert has_std(model.wpe, 1.0)


def test_init_kaiming_is_uniform_by_fan_in():
    model = small(init="kaiming", **WIDE)
    for name, module in linears(model).items():
        assert is_uniform(module, math.sqrt(6 / module.in_features)), name
        assert not module.bias.any()
    assert is_uniform(model.wte, math.sqrt(6 / 256))
    assert is_uniform(model.wpe, math.sqrt(6 / 256))


@pytest.mark.parametrize("switches", [row for row in SWITCHES if not row["tie_weights"]])
def test_untrained_loss_is_ln_vocab_under_init_zero(switches):
    loss = small(init="zero", **switches)(tokens(3, T), tokens(3, T, seed=1))[1]
    assert loss.item() == pytest.approx(math.log(VOCAB), rel=1e-6)


def test_loss_is_the_mean_cross_entropy_in_nats():
    model, x, y = perturbed(small()), tokens(3, T), tokens(3, T, seed=1)
    logits = model(x)[0]
    nothing, loss = model(x, y)
    assert nothing is None
    picked = [logits[b, t].double().softmax(-1)[y[b, t]].log().item() for b in range(3) for t in range(T)]
    assert loss.item() == pytest.approx(-sum(picked) / len(picked), rel=1e-5)
    assert model(x)[1] is None


VERDICT = GPT2 | dict(vocab=50_257, block_size=256, n_embd=768, n_head=12, n_layer=12, qkv_bias=False,
                      tie_weights=False, init="torch")
PRETRAINED = GPT2 | dict(vocab=50_257, block_size=1024)
TINYSTORIES = LLAMA | dict(vocab=32_000, block_size=2048, n_embd=256, n_head=16, n_kv_head=8, n_layer=4)
LECTURE = VERDICT | dict(vocab=65, block_size=32, n_embd=64, n_head=4, n_layer=4, mlp="relu", head_bias=True)
NANOGPT = GPT2 | dict(vocab=65, block_size=256, n_embd=384, n_head=6, n_layer=6, bias=False, mlp="gelu")


@pytest.mark.parametrize(("settings", "expected"), [
    (VERDICT, 162_419_712), (TINYSTORIES, 19_532_032), (LECTURE, 209_729),
    (NANOGPT, (65 + 256) * 384 + 6 * (12 * 384 ** 2 + 2 * 384) + 384),      # 10.65M without the positions
    (PRETRAINED | dict(n_embd=768, n_head=12, n_layer=12), 124_439_808),
    (PRETRAINED | dict(n_embd=1024, n_head=16, n_layer=24), 354_823_168),
    (PRETRAINED | dict(n_embd=1280, n_head=20, n_layer=36), 774_030_080),
    (PRETRAINED | dict(n_embd=1600, n_head=25, n_layer=48), 1_557_611_200)])
def test_parameter_counts(settings, expected):
    vocab = settings["vocab"]
    cfg = Config(**{name: value for name, value in settings.items() if name != "vocab"})
    with torch.device("meta"):
        assert count(GPT(cfg, vocab)) == expected


# ---- gradients


@pytest.mark.parametrize("switches", SWITCHES)
def test_gradient_reaches_every_parameter(switches):
    model, idx = perturbed(small(**switches)), tokens(4, T + 1)
    model(idx[:, :-1], idx[:, 1:])[1].backward()
    # A bias on all keys alike shifts all scores of a query alike, which softmax does not see.
    unseen = ".attn.k.bias" if switches["positions"] == "learned" and not switches["qk_norm"] else "none"
    lost = []
    for name, p in model.named_parameters():
        reached = p.grad.abs() if p.grad is not None else torch.zeros(1)
        least = reached.min() if name.endswith("_mix") else reached.max()       # both of a pair that mixes
        if least < 1e-6 and not name.endswith(unseen):
            lost.append(name)
    assert lost == []


# ---- dropout


@pytest.mark.parametrize("p", [0.001, 0.1, 0.2, 0.5, 0.9])
def test_dropout_keeps_the_mean_and_has_its_rate(p):
    torch.manual_seed(0)
    n = 1_000_003                                       # no multiple of 8
    x = dropout(torch.ones(n), p)
    kept = (x != 0).double()
    error = 4 * math.sqrt(p * (1 - p) / n)              # four standard deviations
    assert abs(1 - p - kept.mean()) < error + 1 / 512   # the rate comes in steps of 1/256
    assert abs(x.double().mean() - 1) < error / (1 - p)
    assert len(x.unique()) == 2                         # all that stays is scaled alike
    assert abs((kept[1:] * kept[:-1]).mean() - kept.mean() ** 2) < error        # neighbours are independent


@WITH_BOTH
@pytest.mark.parametrize("p", [0.99, 0.997, 0.999, 0.99999])
def test_any_dropout_that_is_accepted_works(p, make):
    model = perturbed(make(dropout=p))
    assert problems(model.cfg) or model.train()(tokens(2, T))[0].isfinite().all()


@WITH_BOTH
@pytest.mark.parametrize(("part", "other"), [("attn", "mlp.down"), ("mlp", "attn.out")])
def test_dropout_acts_on_what_each_half_block_adds(part, other, make):
    added, model = [], perturbed(make(dropout=0.25, shortcuts=False))
    for block in model.blocks:
        torch.nn.init.zeros_(block.get_submodule(other).weight)         # the other half adds nothing
        block.register_forward_hook(lambda _, args, out: added.append(out[0] - args[0]))
    model.train()(tokens(64, T))
    assert [(x == 0).float().mean().item() for x in added] == pytest.approx([0.25] * 3, abs=0.02)


@WITH_BOTH
def test_dropout_acts_on_the_embedding(make):
    seen, model = [], perturbed(make(dropout=0.25))
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.train()(tokens(64, T))
    assert (seen[0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)


@WITH_BOTH
@pytest.mark.parametrize("attn_dropout", [False, True])
def test_dropout_is_off_in_evaluation(attn_dropout, make):
    model, idx = perturbed(make(dropout=0.3, attn_dropout=attn_dropout)), tokens(2, T)
    sure = loaded(model.state_dict(), dropout=0.0)(idx)[0]
    assert torch.equal(model(idx)[0], sure)
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


def test_attn_dropout_drops_attention_weights_at_its_rate():
    # One head and one token: its only weight is 1, so dropping it leaves a row of zeros.
    seen, model = [], perturbed(small(n_head=1, dropout=0.25, attn_dropout=True))
    first = model.blocks[0].attn
    first.register_forward_hook(lambda _, args, out: seen.append(out[0][:, 0]))
    idx = tokens(1, 1).expand(4000, 1)
    model(idx)
    first.train()                                       # all else stays in evaluation mode
    model(idx)
    sure, y = seen
    dropped = (y == 0).all(-1)
    assert dropped.double().mean().item() == pytest.approx(0.25, abs=0.03)
    near(y[~dropped], sure[~dropped] / 0.75)


def test_attention_weights_are_not_dropped_by_default():
    model, idx = perturbed(small(dropout=0.25)), tokens(2, T)
    sure = model(idx)[0]
    for block in model.blocks:
        block.attn.train()
    assert torch.equal(model(idx)[0], sure)


# ---- what a CPU computes in another way


def test_acceleration_keeps_weights_names_and_gradients():
    model, idx = perturbed(small(bias=True)), tokens(2, T)
    faster = cpu.accelerate(deepcopy(model))
    assert type(faster.head) is cpu.Linear
    assert type(faster.dropout) is cpu.Dropout
    assert type(model.head) is torch.nn.Linear
    assert faster.state_dict().keys() == model.state_dict().keys()
    for candidate in (model, faster):
        candidate.train()(idx, idx)[1].backward()
    for plain, other in zip(model.parameters(), faster.parameters(), strict=True):
        assert torch.equal(plain, other)
        assert torch.equal(plain.grad, other.grad)


@pytest.mark.parametrize("length", [1, 64, 100, 256, 700])
def test_attention_in_blocks_is_attention(length):
    """What a CPU computes in 16 bits, here in float32: values and gradients."""
    generator = torch.Generator().manual_seed(length)
    q, k, v, grad = (torch.randn(2, 3, length, 8, generator=generator) for _ in range(4))
    results = []
    for function in (in_blocks, lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True)):
        inputs = [z.clone().requires_grad_() for z in (q, k, v)]
        y = function(*inputs)
        y.backward(grad)
        results.append([y, *(z.grad for z in inputs)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_attention_in_blocks_drops_weights_at_their_rate():
    q, k = (torch.randn(8, 3, 200, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    v = torch.eye(200).expand(8, 3, 200, 200)           # so that the output is the weights
    torch.manual_seed(0)
    sure, some = (in_blocks(q, k, v, p) for p in (0.0, 0.25))
    seen = torch.ones(200, 200, dtype=torch.bool).tril()
    assert not some[..., ~seen].any()
    kept = some != 0
    assert kept[..., seen].double().mean().item() == pytest.approx(0.75, abs=0.01)
    assert torch.allclose(some[kept], sure[kept] / 0.75, atol=1e-6)
    assert not torch.equal(kept[0], kept[1])


@pytest.mark.parametrize(("dtype", "p", "taken"), [
    (torch.float32, 0.0, False), (torch.float32, 0.25, True), (torch.bfloat16, 0.0, True),
    (torch.bfloat16, 0.25, True)])
def test_attention_goes_in_blocks_where_that_is_faster(dtype, p, taken, monkeypatch):
    seen, (q, k, v) = [], torch.randn(3, 1, 2, 8, 4)
    monkeypatch.setattr(cpu, "in_blocks", lambda *args: seen.append(args[3]) or in_blocks(*args))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        cpu.attention(q, k, v, None, True, p)
    assert seen == [p] * taken


@pytest.mark.parametrize("switches", [dict(n_layer=2), dict(n_kv_head=2), dict(attn_dropout=True, dropout=0.5)],
                         ids=["heads", "shared keys", "dropout"])
def test_the_compiled_model_is_the_eager_one(switches):
    """In bfloat16, whose last digits differ; with dropout, which is drawn anew, near it. A second layer, which takes
    values of the first, has to be compiled once."""
    model = perturbed(small(**dict(n_layer=1, block_size=80) | switches)).train()
    x = tokens(2, 80)
    losses = []
    for candidate in (model, torch.compile(model, dynamic=False)):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(candidate(x, x.flip(1))[1].item())
    assert losses[1] == pytest.approx(losses[0], abs=0.3 if switches.get("dropout") else 0.02)
    assert abs(losses[0] - math.log(VOCAB)) > 0.05      # so that there was something to get wrong


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.02), (torch.float16, 0.002)], ids=str)
def test_attention_in_blocks_is_as_exact_as_16_bits_are(dtype, error):
    """Beside attention in float32; and products that float16 cannot hold are scaled before."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 100, 64, generator=generator) for _ in range(3))
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(in_blocks(*(z.to(dtype) for z in (q, k, v))).float(), exact, atol=error)
    large = torch.full((1, 1, 4, 64), 33.0, dtype=dtype)
    assert in_blocks(large, large, large).isfinite().all()


# ---- the loss of a large vocabulary, in pieces


def loss_and_gradients(model, idx, targets, at_once: int, monkeypatch, dtype=None) -> list:
    """The loss and all gradients, computed in pieces where a batch has more than `at_once` logits."""
    monkeypatch.setattr("train.LOGITS_AT_ONCE", at_once)
    monkeypatch.setattr("train.PIECE_ON_CPU", 500 * VOCAB)
    model.zero_grad()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(idx, targets)[1]
    (1000 * loss).backward()                            # as a GradScaler does
    return [loss.detach()] + [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("switches", [{}, dict(logit_cap=0.0, head_bias=True, pad_vocab_to=64), dict(tie_weights=True)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-6), (torch.bfloat16, 0.02), (torch.float16, 0.005)])
def test_the_loss_in_pieces_and_its_gradients_are_those_of_the_plain_formula(switches, dtype, tolerance, monkeypatch):
    model = perturbed(small(**switches))
    idx = tokens(70, T)                                 # 1,120 rows: two pieces of 500 and a rest
    targets = tokens(70, T, seed=1)
    plain = loss_and_gradients(model, idx, targets, 2**40, monkeypatch, dtype)
    pieces = loss_and_gradients(model, idx, targets, 0, monkeypatch, dtype)
    near(pieces[0], plain[0], atol=tolerance)
    largest = max(gradient.abs().max().item() for gradient in plain[1:])
    for expected, actual in zip(plain[1:], pieces[1:], strict=True):
        near(actual, expected, atol=tolerance * largest)


def test_the_loss_in_pieces_never_holds_all_logits(monkeypatch):
    """Nor gradients, where none are asked for: an evaluation."""
    sizes = []
    whole = torch.nn.functional.softmax
    monkeypatch.setattr("torch.nn.functional.softmax", lambda z, dim: sizes.append(len(z)) or whole(z, dim=dim))
    monkeypatch.setattr("train.LOGITS_AT_ONCE", 0)
    monkeypatch.setattr("train.PIECE_ON_CPU", 500 * VOCAB)
    model = small()
    with torch.no_grad():
        loss = model(tokens(70, T), tokens(70, T, seed=1))[1]
    assert sizes == [500, 500, 120]
    assert loss.grad_fn is None
    assert math.isclose(loss.item(), math.log(VOCAB), abs_tol=0.1)


def test_the_loss_in_pieces_of_compiled_code(monkeypatch):
    if why := compiler_missing("cpu"):
        pytest.skip(why)
    model = perturbed(small(n_layer=1))
    idx = tokens(70, T)
    targets = tokens(70, T, seed=1)
    expected = loss_and_gradients(model, idx, targets, 2**40, monkeypatch)
    compiled = torch.compile(model, dynamic=False)
    for actual, plain in zip(loss_and_gradients(compiled, idx, targets, 0, monkeypatch), expected, strict=True):
        near(actual, plain, atol=1e-5 * max(1.0, plain.abs().max().item()))
