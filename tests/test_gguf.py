"""Weights and tokenizers travel to GGUF files and back: what the package gguf reads are the names, the order and the
numbers that llama.cpp expects, and what it cannot express is refused by name. bench/exported.py asks llama.cpp."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, convert_ok, expect_refusal, perturbed

import inkling.gguf
import train
from inkling.checkpoint import save_checkpoint
from inkling.huggingface import GPT2_PATTERN
from inkling.tokenizer import END_OF_TEXT, PATTERN, SINGLE_BYTES, Tokenizer, rank_lines
from inkling.tokenizer_json import LETTERS
from train import GPT, Config

gguf = pytest.importorskip("gguf")

TEXT = (ROOT / "data" / "fables" / "input.txt").read_text(encoding="utf-8")[:3000]
SMALL = dict(block_size=24, n_layer=2, n_head=4, n_embd=32, embed_norm=False, qk_norm=False, logit_cap=0.0,
             shortcuts=False, ngrams=0, init="torch")
OUR_GPT2 = SMALL | dict(positions="learned", norm="layernorm", norm_gain=True, norm_eps=1e-5, mlp="gelu_tanh",
                        bias=True)
OUR_LLAMA = SMALL | dict(norm_gain=True, mlp="swiglu", rope_fraction=1.0, ffn_dim=64, head_dim=16, n_kv_head=2)
OUR_QWEN3 = OUR_LLAMA | dict(qk_norm=True, qk_norm_gain=True)
OURS = {
    "gpt2": OUR_GPT2,
    "gpt2 tied, padded, of another width": OUR_GPT2 | dict(tie_weights=True, pad_vocab_to=64, ffn_dim=96),
    "nanoGPT without biases": OUR_GPT2 | dict(bias=False, tie_weights=True),
    "the verdict": OUR_GPT2 | dict(qkv_bias=False),
    "llama": OUR_LLAMA,
    "llama tied and padded, of the usual head width": OUR_LLAMA | dict(tie_weights=True, pad_vocab_to=64, head_dim=0),
    "llama with biases": OUR_LLAMA | dict(bias=True),
    "llama with biases of queries, keys and values": OUR_LLAMA | dict(qkv_bias=True),
    "llama without gains": OUR_LLAMA | dict(norm_gain=False, norm_eps=1e-3, rope_theta=500.0),
    "llama of linear rotation": OUR_LLAMA | dict(rope_scaling="linear", rope_factor=2.5),
    "llama 3.1": OUR_LLAMA | dict(rope_scaling="llama3", rope_factor=4.0, rope_context=64, rope_low_freq=1.5),
    "qwen3": OUR_QWEN3,
    "qwen3 tied and padded": OUR_QWEN3 | dict(tie_weights=True, pad_vocab_to=64),
    "qwen3 without gains": OUR_QWEN3 | dict(qk_norm_gain=False, norm_gain=False, rope_theta=1024.0),
    "qwen3 of linear rotation": OUR_QWEN3 | dict(rope_scaling="linear", rope_factor=2.5),
}


def bpe(pattern: str = PATTERN, more=(b"th", b"the", b" the", b"\n\n", b" a", b" an"), special: bool = True) -> dict:
    ranks = {token: rank for rank, token in enumerate([*SINGLE_BYTES, *more])}
    return {"kind": "bpe", "name": "bpe:300", "pattern": pattern, "ranks": rank_lines(ranks),
            "special": {END_OF_TEXT: len(ranks)} if special else {}}


@pytest.fixture
def run_of(tmp_path, monkeypatch):
    """run_of(settings, tokenizer): a model with noise for weights, in run/ckpt.pt, and its tokenizer. The test stands
    in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run_of(settings, stored=None):
        tokenizer = Tokenizer(stored or bpe())
        torch.manual_seed(2)
        model = perturbed(GPT(Config(**settings), tokenizer.vocab_size).eval().requires_grad_(False))
        Path("run").mkdir(exist_ok=True)
        save_checkpoint(dict(config=asdict(model.cfg), tokenizer=tokenizer.stored, vocab_size=tokenizer.vocab_size,
                             step=7, model=dict(model.state_dict())), "run/ckpt.pt")
        return model, tokenizer
    return run_of


def read(path="x.gguf") -> tuple:
    """(fields, tensors) as the package reads them."""
    reader = gguf.GGUFReader(path)
    return ({name: field.contents() for name, field in reader.fields.items()},
            {tensor.name: tensor for tensor in reader.tensors})


def ids(*shape, vocab=263):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(0))


# -- weights

@pytest.mark.parametrize("switches", OURS.values(), ids=OURS)
def test_a_model_comes_back_with_the_same_bytes_and_the_same_logits(run_of, switches):
    model, tokenizer = run_of(switches)
    convert_ok("gguf", "run/ckpt.pt", "--out=x.gguf")
    convert_ok("import", "x.gguf", "--out=back")
    back = torch.load("back/ckpt.pt")
    assert back["tokenizer"] == tokenizer.stored
    cropped = {name: tensor[:tokenizer.vocab_size] if name in ("wte.weight", "head.weight") else tensor
               for name, tensor in model.state_dict().items()}
    assert back["model"].keys() == cropped.keys()
    assert all(torch.equal(back["model"][name], cropped[name]) for name in cropped)
    assert torch.equal(train.load("back")[0](ids(3, 24))[0], model(ids(3, 24))[0])


# What llama.cpp's loader reads: without one of these it refuses the file, and of others it says nothing.
REQUIRED = {
    "gpt2": {"context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
             "attention.layer_norm_epsilon"},
    "llama": {"context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
              "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length",
              "attention.value_length", "rope.dimension_count", "rope.freq_base"},
}


@pytest.mark.parametrize(("kind", "switches"), [
    ("gpt2", OUR_GPT2 | dict(bias=False)), ("llama", OUR_LLAMA | dict(bias=True)), ("qwen3", OUR_QWEN3),
    ("llama", OURS["llama 3.1"]), ("qwen3", OURS["qwen3 of linear rotation"])])
def test_names_and_shapes_are_those_of_llama_cpp(run_of, kind, switches):
    model, tokenizer = run_of(switches)
    convert_ok("gguf", "run/ckpt.pt", "--out=x.gguf")
    fields, tensors = read()
    assert fields["general.architecture"] == kind
    own = {name.removeprefix(f"{kind}.") for name in fields if name.startswith(f"{kind}.")}
    scaling = {"rope.scaling.type", "rope.scaling.factor"} if switches.get("rope_scaling") == "linear" else set()
    assert own == REQUIRED["gpt2" if kind == "gpt2" else "llama"] | scaling | {"vocab_size"}
    known = {value for group in vars(gguf.Keys).values() if isinstance(group, type)
             for value in vars(group).values() if isinstance(value, str)}
    assert {name.replace(f"{kind}.", "{arch}.", 1) if name.startswith(f"{kind}.") else name for name in fields
            if not name.startswith(("inkling.", "GGUF."))} <= known
    architecture = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    expected = {gguf.TENSOR_NAMES[part].format(bid=layer) for part in gguf.MODEL_TENSORS[architecture]
                for layer in range(2)}
    assert {name.rpartition(".")[0] for name in tensors} <= expected
    needed = {"gpt2": 2 * 6 + 4, "llama": 2 * 9 + 3, "qwen3": 2 * 11 + 3}[kind]
    assert len([name for name in tensors if name.endswith(".weight") and name != "rope_freqs.weight"]) == needed
    if kind == "gpt2":                  # whose biases llama.cpp requires
        assert len([name for name in tensors if name.endswith(".bias")]) == 2 * 6 + 1
    block = model.blocks[1]
    assert np.array_equal(tensors["blk.1.ffn_down.weight"].data, block.mlp.down.weight.numpy())
    assert np.array_equal(tensors["blk.1.attn_output.weight"].data, block.attn.out.weight.numpy())
    assert np.array_equal(tensors["output.weight"].data, model.head.weight.numpy())
    assert np.array_equal(tensors["token_embd.weight"].data, model.wte.weight.numpy())
    if kind == "gpt2":
        fused = torch.cat([block.attn.q.weight, block.attn.k.weight, block.attn.v.weight])
        assert np.array_equal(tensors["blk.1.attn_qkv.weight"].data, fused.numpy())
    if kind == "qwen3":                 # rotates the halves of a head, as we do
        assert np.array_equal(tensors["blk.1.attn_q.weight"].data, block.attn.q.weight.numpy())
        assert np.array_equal(tensors["blk.0.attn_k_norm.weight"].data, model.blocks[0].attn.k_gain.numpy())


@pytest.mark.parametrize(("name", "part", "heads"), [("attn_q", "q", 4), ("attn_k", "k", 2)])
def test_a_llama_has_the_partners_of_a_rotation_side_by_side(run_of, name, part, heads):
    model, _ = run_of(OUR_LLAMA | dict(bias=True))
    convert_ok("gguf", "run/ckpt.pt", "--out=x.gguf")
    _, tensors = read()
    layer = getattr(model.blocks[0].attn, part)
    for there, ours in ((tensors[f"blk.0.{name}.weight"].data, layer.weight), (tensors[f"blk.0.{name}.bias"].data,
                                                                              layer.bias)):
        for head in range(heads):
            for i in range(8):          # of 16 dimensions
                assert np.array_equal(there[16 * head + 2 * i], ours[16 * head + i].numpy())
                assert np.array_equal(there[16 * head + 2 * i + 1], ours[16 * head + 8 + i].numpy())
    assert np.array_equal(tensors["blk.0.attn_v.weight"].data, model.blocks[0].attn.v.weight.numpy())


def test_the_factors_of_llama_3_are_what_the_frequencies_are_divided_by(run_of):
    model, _ = run_of(OURS["llama 3.1"])
    convert_ok("gguf", "run/ckpt.pt", "--out=x.gguf")
    factors = read()[1]["rope_freqs.weight"].data
    plain = model.cfg.rope_theta ** (-torch.arange(8) / 8)
    near = dict(rtol=1e-5, atol=0)
    torch.testing.assert_close(plain / train.scale_frequency(model.cfg, plain), torch.tensor(factors), **near)
    assert 1 in factors
    assert 4 in factors


def test_of_a_tied_model_the_head_is_left_out_and_no_row_pads_the_vocabulary(run_of):
    for tied in (True, False):
        run_of(OUR_QWEN3 | dict(tie_weights=tied, pad_vocab_to=64))
        convert_ok("gguf", "run/ckpt.pt", "--out=x.gguf")
        fields, tensors = read()
        assert ("output.weight" in tensors) is not tied
        assert len(tensors["token_embd.weight"].data) == 263 == len(fields["tokenizer.ggml.tokens"])
        assert fields["qwen3.vocab_size"] == 263


@pytest.mark.parametrize(("weight_type", "file_type", "bound", "share"), [
    ("f16", 1, 2**-11, 0.005), ("q8_0", 7, 1 / 254 + 2**-11, 0.1)])
def test_fewer_bits_round_the_matrices_and_nothing_else(run_of, weight_type, file_type, bound, share):
    """bound: of a weight's error, relative to it or to the largest of its 32; share: of the logits' deviation."""
    model, _ = run_of(OUR_GPT2)
    convert_ok("gguf", "run/ckpt.pt", "--out=x.gguf", f"--type={weight_type}")
    fields, tensors = read()
    assert fields["general.file_type"] == file_type
    assert {name for name, tensor in tensors.items() if tensor.tensor_type.name.lower() == weight_type} == {
        name for name, tensor in tensors.items() if len(tensor.shape) == 2} - {"position_embd.weight"}
    convert_ok("import", "x.gguf", "--out=back")
    back = torch.load("back/ckpt.pt")["model"]
    for name, ours in model.state_dict().items():
        error = (back[name] - ours).abs()
        if ours.dim() < 2 or name == "wpe.weight":
            assert error.max() == 0
            continue
        assert error.max() > 0
        blocks = ours.unflatten(-1, (-1, 32)).abs().amax(-1).repeat_interleave(32, dim=-1)
        # The smallest number of 16 bits is 2^-24. The scale of a block has 16 bits as well.
        largest = ours.abs() if weight_type == "f16" else blocks
        assert (error <= 1.01 * bound * largest + 2**-25).all()
    logits = model(ids(3, 24))[0]
    assert (train.load("back")[0](ids(3, 24))[0] - logits).abs().max() < share * logits.std()


def test_a_type_that_cannot_hold_the_weights_is_refused(run_of):
    run_of(OUR_LLAMA | dict(ffn_dim=40))
    expect_refusal("gguf", "run/ckpt.pt", "--out=x.gguf", "--type=q8_0", parts=["ffn_down", "40", "--type=f16"])
    convert_ok("gguf", "run/ckpt.pt", "--out=x.gguf", "--type=f16")
    content = torch.load("run/ckpt.pt")
    content["model"]["blocks.0.mlp.up.weight"][3, 4] = 70_000
    save_checkpoint(content, "run/ckpt.pt")
    expect_refusal("gguf", "run/ckpt.pt", "--out=x.gguf", "--type=f16", parts=["ffn_up", "65,504", "--type=f32"])


def test_what_llama_cpp_computes_otherwise_is_said_or_refused(run_of):
    model, _ = run_of(OUR_GPT2 | dict(mlp="gelu"))
    assert "tanh form" in convert_ok("gguf", "run/ckpt.pt", "--out=x.gguf").stdout
    convert_ok("import", "x.gguf", "--out=back")
    back = train.load("back")[0]
    assert back.cfg.mlp == "gelu_tanh"
    assert 0 < (back(ids(3, 24))[0] - model(ids(3, 24))[0]).abs().max() < 0.01
    run_of(OUR_GPT2)
    assert "tanh" not in convert_ok("gguf", "run/ckpt.pt", "--out=x.gguf").stdout
    Path("x.gguf").unlink()
    run_of(OUR_GPT2 | dict(mlp="relu2"))
    expect_refusal("gguf", "run/ckpt.pt", "--out=x.gguf", parts=["mlp=relu2", "--mlp=gelu_tanh"])
    run_of(OUR_QWEN3 | dict(rope_scaling="llama3"))
    expect_refusal("gguf", "run/ckpt.pt", "--out=x.gguf", parts=["Qwen3", "rope_scaling=llama3"])
    run_of(SMALL | dict(shortcuts=True))
    expect_refusal("gguf", "run/ckpt.pt", "--out=x.gguf", parts=["shortcuts=True", "config/portable.py"])


# -- tokenizers

def unescaped(token: str) -> bytes:
    """A token of RWKV's vocabulary, as llama.cpp reads it."""
    done, place = b"", 0
    while place < len(token):
        if token[place] != "\\":
            done += token[place].encode()
            place += 1
        elif token[place + 1] == "x":
            done += bytes([int(token[place + 2:place + 4], 16)])
            place += 4
        else:
            done += {"n": b"\n", "t": b"\t", "r": b"\r"}.get(token[place + 1], token[place + 1].encode())
            place += 2
    return done


def longest_matches(tokens: list, text: str) -> list:
    """The ids that RWKV's tokenizer gives. Of equal tokens the later one counts."""
    known = {unescaped(token): value for value, token in enumerate(tokens)}
    data, found = text.encode(), []
    while data:
        size = max(size for size in range(1, 5) if data[:size] in known)
        found.append(known[data[:size]])
        data = data[size:]
    return found


@pytest.mark.parametrize("stored", [
    {"kind": "byte"}, {"kind": "char", "chars": "\t\n\r !\\abcntx0"},
    {"kind": "char", "chars": "\n !\\abx\u00e9\u4e2d\U0001f98a", "bytes": True}],
    ids=["byte", "char", "rare characters"])
def test_characters_and_bytes_are_the_longest_matches_of_a_trie(run_of, stored):
    _, tokenizer = run_of(OUR_QWEN3, stored)
    convert_ok("gguf", "run/ckpt.pt", "--out=x.gguf")
    fields, _ = read()
    assert fields["tokenizer.ggml.model"] == "rwkv"
    assert "tokenizer.ggml.eos_token_id" not in fields          # there is none, and none is made up
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(set(tokens)) == tokenizer.vocab_size             # llama.cpp asserts it
    text = "a\\x b!\n\\ab ba\\n"
    if len(tokenizer.pieces) > 255:
        text += "caf\u00e9 \u4e2d\u4e3c\U0001f98a\U0001f98bzz\x00\x7f"
    assert longest_matches(tokens, text) == tokenizer.encode(text).tolist()
    convert_ok("import", "x.gguf", "--out=back")
    assert torch.load("back/ckpt.pt")["tokenizer"] == stored


def merged(text: str, fields: dict) -> list:
    """The ids of a word by the merges of the file, lowest first, as llama.cpp finds them."""
    vocab = {token: value for value, token in enumerate(fields["tokenizer.ggml.tokens"])}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(fields["tokenizer.ggml.merges"])}
    parts = [LETTERS[value] for value in text.encode()]
    while True:
        pairs = list(zip(parts, parts[1:], strict=False))
        known = [(ranks[pair], place) for place, pair in enumerate(pairs) if pair in ranks]
        if not known:
            return [vocab[part] for part in parts]
        place = min(known)[1]
        parts[place:place + 2] = [parts[place] + parts[place + 1]]


def test_a_bpe_has_its_merges_its_pattern_by_name_and_its_end_of_text(run_of):
    for pattern, name in ((PATTERN, "llama-bpe"), (GPT2_PATTERN, "gpt-2")):
        _, tokenizer = run_of(OUR_QWEN3, bpe(pattern))
        convert_ok("gguf", "run/ckpt.pt", "--out=x.gguf")
        fields, _ = read()
        assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", name)
        assert fields["tokenizer.ggml.tokens"][262] == END_OF_TEXT
        assert fields["tokenizer.ggml.token_type"][-2:] == [1, 3]
        assert fields["tokenizer.ggml.eos_token_id"] == 262 == tokenizer.eot
        assert fields["tokenizer.ggml.add_bos_token"] is False
        for word in ("the", " the", " another", "\n\n", "caf\u00e9", "thth"):
            assert merged(word, fields) == tokenizer.encode(word).tolist()
        convert_ok("import", "x.gguf", "--out=back")
        assert torch.load("back/ckpt.pt")["tokenizer"] == tokenizer.stored


def test_several_ends_and_a_first_token_are_inside(run_of):
    _, tokenizer = run_of(OUR_LLAMA, bpe() | {"special": {END_OF_TEXT: 262, "<s>": 263, "<stop>": 265}, "bos": 263,
                                              "eot": [265, 262]})
    convert_ok("gguf", "run/ckpt.pt", "--out=x.gguf")
    fields, _ = read()
    found = [fields[f"tokenizer.ggml.{role}_token_id"] for role in ("bos", "eos", "eot")]
    assert found == [263, 265, 262]
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.tokens"][264] == "[unused264]"
    assert fields["tokenizer.ggml.token_type"][264] == 5
    convert_ok("import", "x.gguf", "--out=back")
    back = Tokenizer(torch.load("back/ckpt.pt")["tokenizer"])
    assert (back.bos, back.eot, back.stops) == (263, 265, {262, 265})


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base"])
def test_named_tokenizers_are_carried(name):
    tokenizer = Tokenizer.build(name)
    fields = inkling.gguf.tokenizer_to_gguf(tokenizer)
    assert fields["tokenizer.ggml.pre"] == {"gpt2": "gpt-2", "cl100k_base": "llama-bpe"}[name]
    assert len(fields["tokenizer.ggml.tokens"]) == len(set(fields["tokenizer.ggml.tokens"])) == tokenizer.vocab_size
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eot
    if name == "gpt2":
        assert merged(" strawberries", fields) == tokenizer.encode(" strawberries").tolist()
        back = inkling.gguf.tokenizer_from_gguf({key: value for key, value in fields.items()
                                                 if key != inkling.gguf.TOKENIZER_NOTES})
        assert back.stored == tokenizer.stored


def json_tokenizer(kind: str) -> dict:
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {letters: value for value, letters in enumerate([*LETTERS, "th"])}
    model = tokenizers.models.BPE(vocab, [("t", "h")])
    made = tokenizers.Tokenizer(model)
    made.decoder = tokenizers.decoders.ByteLevel()
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "digits":
        made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
            tokenizers.pre_tokenizers.Digits(individual_digits=True), byte_level])
        made.add_special_tokens([END_OF_TEXT])
    elif kind == "words":
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    elif kind == "lower case":
        made.pre_tokenizer = byte_level
        made.normalizer = tokenizers.normalizers.Lowercase()
    return {"kind": "json", "json": made.to_str()} | ({"eot": [257]} if kind == "digits" else {})


def test_a_tokenizer_json_whose_steps_llama_cpp_knows_is_carried(run_of):
    _, tokenizer = run_of(OUR_LLAMA, json_tokenizer("digits"))
    convert_ok("gguf", "run/ckpt.pt", "--out=x.gguf")
    fields, _ = read()
    assert fields["tokenizer.ggml.pre"] == "smollm"
    convert_ok("import", "x.gguf", "--out=back")
    back = Tokenizer(torch.load("back/ckpt.pt")["tokenizer"])
    assert back.kind == "json"
    assert back.encode(TEXT + " 1234").tolist() == tokenizer.encode(TEXT + " 1234").tolist()
    assert back.eot == tokenizer.eot == 257


@pytest.mark.parametrize(("stored", "said"), [
    ({"kind": "char", "chars": "\n ab\u00e9"}, ["not all of one byte", "--min_count=2", "--tokenizer=byte"]),
    (bpe(r"\w+|\W"), [r"\w+|\W", "no name", "python prepare.py"]),
    (bpe(special=False), ["no end-of-text token", "python prepare.py"]),
    (bpe(GPT2_PATTERN, more=(b"th", b"abcd")), ["'abcd'", "comes from no merge", "python prepare.py"]),
    (bpe(more=()), ["no merges", "python prepare.py"]),
    ("words", ["not byte-level BPE", "python prepare.py"]),
    ("lower case", ["Lowercase", "python prepare.py"]),
    ("plain", ["nothing", "python prepare.py"]),
], ids=["char", "pattern", "no end", "no merge for a token", "no merges", "words", "lower case", "no pre_tokenizer"])
def test_a_tokenizer_that_llama_cpp_lacks_is_refused_with_a_way_out(run_of, stored, said):
    run_of(OUR_LLAMA, json_tokenizer(stored) if isinstance(stored, str) else stored)
    expect_refusal("gguf", "run/ckpt.pt", "--out=x.gguf", parts=["run/ckpt.pt", *said])


# -- files of others

def write_theirs(path="theirs.gguf", kind="llama", change=lambda fields: None, quantized="Q4_0", drop=()):
    """A GGUF as other programs write it: without our notes, quantized, with a tokenizer of GPT-2's kind."""
    rng = np.random.default_rng(0)
    fields = {f"{kind}.context_length": 24, f"{kind}.embedding_length": 32, f"{kind}.block_count": 1,
              f"{kind}.feed_forward_length": 64, f"{kind}.attention.head_count": 4,
              f"{kind}.attention.layer_norm_rms_epsilon": 1e-5, "tokenizer.ggml.model": "gpt2",
              "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": [*LETTERS, "th", END_OF_TEXT],
              "tokenizer.ggml.token_type": [1] * 257 + [3], "tokenizer.ggml.merges": ["t h"],
              "tokenizer.ggml.eos_token_id": 257, "tokenizer.chat_template": "..."}
    change(fields)
    shapes = {"token_embd": (258, 32), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (32, 32), "blk.0.attn_v": (32, 32),
              "blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32),
              "blk.0.ffn_down": (32, 64), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,), "output_norm": (32,)}
    writer = gguf.GGUFWriter(path, kind)
    for key, value in fields.items():
        inkling.gguf.add_field(writer, key, value)
    matrices = {}
    for name, shape in shapes.items():
        if name in drop:
            continue
        matrix = rng.normal(size=shape).astype(np.float32)
        stored = gguf.GGMLQuantizationType[quantized if len(shape) == 2 else "F32"]
        data = gguf.quants.quantize(matrix, stored)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=stored)
        matrices[name] = gguf.quants.dequantize(data, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return matrices


@pytest.mark.parametrize("quantized", ["Q4_0", "Q5_1", "BF16", "F32"])
def test_whatever_the_package_dequantizes_is_read(tmp_path, monkeypatch, quantized):
    monkeypatch.chdir(tmp_path)
    matrices = write_theirs(quantized=quantized)
    convert_ok("import", "theirs.gguf")
    content = torch.load("out/theirs/ckpt.pt")
    config = content["config"]
    assert (config["norm_eps"], config["rope_theta"], config["n_kv_head"]) == (1e-5, 10_000.0, 4)
    assert config["tie_weights"] is True
    weights = content["model"]
    assert np.array_equal(weights["blocks.0.mlp.gate.weight"].numpy(), matrices["blk.0.ffn_gate"].reshape(64, 32))
    q = matrices["blk.0.attn_q"].reshape(32, 32)
    assert np.array_equal(weights["blocks.0.attn.q.weight"][8 + 3].numpy(), q[8 + 6])   # the second head
    assert Tokenizer(content["tokenizer"]).encode("the").tolist() == [256, ord("e")]
    assert Tokenizer(content["tokenizer"]).eot == 257


@pytest.mark.parametrize(("change", "said"), [
    (dict(kind="mamba"), "mamba"),
    (dict(change=lambda fields: fields.update({"llama.expert_count": 8})), "llama.expert_count=8"),
    (dict(change=lambda fields: fields.update({"llama.rope.scaling.type": "yarn"})), "llama.rope.scaling.type='yarn'"),
    (dict(change=lambda fields: fields.update({"llama.rope.dimension_count": 4})), "llama.rope.dimension_count=4"),
    (dict(change=lambda fields: fields.update({"split.count": 3})), "llama-gguf-split"),
    (dict(change=lambda fields: fields.update({"tokenizer.ggml.model": "llama"})), "--tokenizer=NAME"),
    (dict(change=lambda fields: fields.update({"tokenizer.ggml.pre": "tekken"})), "tekken"),
    (dict(change=lambda fields: fields.pop("llama.embedding_length")), "llama.embedding_length is missing"),
    (dict(drop=["blk.0.ffn_up"]), "model.layers.0.mlp.up_proj.weight is missing"),
])
def test_what_has_no_counterpart_is_refused_by_name(tmp_path, monkeypatch, change, said):
    monkeypatch.chdir(tmp_path)
    write_theirs(**change)
    expect_refusal("import", "theirs.gguf", parts=["theirs.gguf", said])


def test_a_scaling_of_llama_3_is_known_by_its_factors(tmp_path, monkeypatch):
    scaling = inkling.gguf.LLAMA3_SCALINGS[1]
    factors = inkling.gguf.rope_factors(scaling | {"rope_theta": 5e5}, 128)
    assert inkling.gguf.scaling_of_factors(factors, 5e5, 128, {}) == scaling
    with pytest.raises(ValueError, match="rope_freqs"):
        inkling.gguf.scaling_of_factors(1.01 * factors, 5e5, 128, {})


def test_a_named_tokenizer_must_have_the_models_vocabulary(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_theirs(change=lambda fields: fields.update({"tokenizer.ggml.model": "llama"}))
    expect_refusal("import", "theirs.gguf", "--tokenizer=gpt2", parts=["theirs.gguf", "258"])
    save_checkpoint(dict(config=asdict(Config()), tokenizer=bpe(more=(b"th",)), vocab_size=258, step=0, model={}),
                    "other.pt")
    convert_ok("import", "theirs.gguf", "--tokenizer=other.pt", "--out=out")
    assert torch.load("out/ckpt.pt")["tokenizer"] == bpe(more=(b"th",))


def test_a_damaged_file_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_theirs()
    whole = Path("theirs.gguf").read_bytes()
    for content in (b"", b"GGUF", b"no model at all", whole[:len(whole) // 2]):
        Path("theirs.gguf").write_bytes(content)
        expect_refusal("import", "theirs.gguf", parts=["theirs.gguf", "damaged"])
    expect_refusal("import", "none.gguf", parts=["none.gguf"])
    Path("theirs.gguf").write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n")
    expect_refusal("import", "theirs.gguf", parts=["git lfs pull"])


def test_without_the_package_one_line_says_what_to_install(run_of, monkeypatch):
    run_of(OUR_LLAMA)
    monkeypatch.setitem(sys.modules, "gguf", None)
    expect_refusal("gguf", "run/ckpt.pt", "--out=x.gguf", parts=["pip install gguf"])
    Path("y.gguf").write_bytes(b"GGUF")
    expect_refusal("import", "y.gguf", parts=["pip install gguf"])


def test_wrong_words_are_one_line_and_a_former_file_stays(run_of):
    run_of(OUR_LLAMA)
    convert_ok("gguf", "run/ckpt.pt", "--out=x.gguf")
    before = Path("x.gguf").read_bytes()
    expect_refusal("gguf", "run/ckpt.pt", parts=["--out=NAME.gguf"])
    expect_refusal("gguf", "run/ckpt.pt", "--out=x.gguf", "--type=q4_0", parts=["q4_0", "q8_0"])
    expect_refusal("gguf", "run/ckpt.pt", "--out=x.gguf", "--bits=8", parts=["--bits"])
    expect_refusal("export", "run/ckpt.pt", "--out=there", "--type=f16", parts=["--type"])
    expect_refusal("gguf", "run/ckpt.pt", "--out=none/x.gguf", parts=["none/x.gguf"])
    run_of(OUR_LLAMA, bpe(special=False))
    expect_refusal("gguf", "run/ckpt.pt", "--out=x.gguf", parts=["end-of-text"])
    assert Path("x.gguf").read_bytes() == before
    notes = json.loads(read()[0][inkling.gguf.MODEL_NOTES])
    assert notes["inkling"]["norm_gain"] is True
