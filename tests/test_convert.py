"""Weights and tokenizers travel to Hugging Face directories and back: the same logits, the same bytes, the same ids;
what has no counterpart is refused by name. Compared with the installed transformers; no network."""

import contextlib
import hashlib
import json
import logging
import logging.handlers
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import threading
from base64 import b64encode
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from conftest import ROOT, convert_ok, expect_refusal, flags, inside, one_line_error, perturbed, serving
from huggingface_hub import constants, try_to_load_from_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Theirs
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import convert
import sample
import train
from inkling.checkpoint import save_checkpoint
from inkling.cli import UserError
from inkling.dataset import open_data
from inkling.huggingface import (
    FILES,
    GPT2_PATTERN,
    NAMES,
    cached_folder,
    download_folder,
    load_tokenizer,
    merge_pairs,
    tokenizer_from_json,
    tokenizer_to_json,
)
from inkling.tokenizer import END_OF_TEXT, Tokenizer
from prepare import check_set, decode_set, write_set
from train import GPT, Config

try:
    import resource
except ImportError:                     # Windows
    resource = None

TEXT = (ROOT / "data" / "fables" / "input.txt").read_text(encoding="utf-8")[:20_000]
VOCAB = 300
COMMIT = "0123456789" * 4
# What the programs load must be what the tests say, not what this machine has cached.
GPT2 = dict(vocab_size=VOCAB, n_positions=24, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
LLAMA = dict(vocab_size=VOCAB, max_position_embeddings=24, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=0)
CLASSES = {"gpt2": (GPT2LMHeadModel, GPT2Config, GPT2), "llama": (LlamaForCausalLM, LlamaConfig, LLAMA),
           "qwen3": (Qwen3ForCausalLM, Qwen3Config, LLAMA | dict(head_dim=12))}
THEIRS = {
    "gpt2": ("gpt2", {}),
    "gpt2 untied": ("gpt2", dict(tie_word_embeddings=False)),
    "gpt2 another width, exact gelu": ("gpt2", dict(n_inner=80, activation_function="gelu", layer_norm_epsilon=1e-3)),
    "gpt2 relu": ("gpt2", dict(activation_function="relu", n_layer=1, n_embd=24, n_head=3)),
    "gpt2 squared relu": ("gpt2", dict(activation_function="relu2")),
    "gpt2 tanh": ("gpt2", dict(activation_function="gelu_pytorch_tanh", reorder_and_upcast_attn=True)),
    "llama": ("llama", {}),
    "llama with as many kv heads": ("llama", dict(num_key_value_heads=4, rms_norm_eps=1e-3)),
    "llama with one kv head": ("llama", dict(num_key_value_heads=1, intermediate_size=56)),
    "llama tied": ("llama", dict(tie_word_embeddings=True)),
    "llama with biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama of another base": ("llama", dict(rope_parameters={"rope_type": "default", "rope_theta": 5e5})),
    "llama with heads wider than its width": ("llama", dict(head_dim=16)),
    "llama with heads narrower than its width": ("llama", dict(head_dim=6, hidden_size=36)),
    "llama of linear scaling": ("llama", dict(rope_parameters={"rope_type": "linear", "rope_theta": 1e4,
                                                               "factor": 3.0})),
    "llama 3.1": ("llama", dict(head_dim=16, rope_parameters={
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128})),
    "llama of odd shapes": ("llama", dict(hidden_size=30, num_attention_heads=5, num_key_value_heads=5,
                                          num_hidden_layers=3)),
    "qwen3": ("qwen3", {}),
    "qwen3 tied": ("qwen3", dict(tie_word_embeddings=True, rms_norm_eps=1e-3)),
    "qwen3 of the usual head width": ("qwen3", dict(head_dim=8, num_key_value_heads=4)),
    "qwen3 with one kv head, of another base": ("qwen3", dict(num_key_value_heads=1, rope_parameters={
        "rope_type": "default", "rope_theta": 1e6})),
    "qwen3 of linear scaling": ("qwen3", dict(rope_parameters={"rope_type": "linear", "rope_theta": 1e4,
                                                               "factor": 3.0})),
}
SMALL = dict(block_size=24, n_layer=2, n_head=4, n_embd=32, embed_norm=False, qk_norm=False, logit_cap=0.0,
             shortcuts=False, ngrams=0, init="torch")
OUR_GPT2 = SMALL | dict(positions="learned", norm="layernorm", norm_gain=True, norm_eps=1e-5, mlp="gelu_tanh",
                        bias=True)
OUR_LLAMA = SMALL | dict(norm_gain=True, mlp="swiglu", rope_fraction=1.0, ffn_dim=40)
OUR_QWEN3 = OUR_LLAMA | dict(qk_norm=True, qk_norm_gain=True)
OURS = {
    "gpt2": OUR_GPT2,
    "gpt2 tied": OUR_GPT2 | dict(tie_weights=True, ffn_dim=72),
    "nanoGPT without biases": OUR_GPT2 | dict(bias=False, tie_weights=True, mlp="gelu"),
    "the verdict": OUR_GPT2 | dict(qkv_bias=False),
    "biases of queries, keys and values": OUR_GPT2 | dict(bias=False, qkv_bias=True),
    "norms without gains": OUR_GPT2 | dict(norm_gain=False),
    "gpt2 padded": OUR_GPT2 | dict(pad_vocab_to=64, mlp="relu2"),
    "llama": OUR_LLAMA,
    "llama tied and padded": OUR_LLAMA | dict(tie_weights=True, pad_vocab_to=64, n_kv_head=2),
    "llama of the usual width, one kv head": OUR_LLAMA | dict(ffn_dim=0, n_kv_head=1),
    "llama with biases": OUR_LLAMA | dict(bias=True),
    "llama with biases of queries, keys and values": OUR_LLAMA | dict(qkv_bias=True),
    "llama with biases but of queries, keys and values": OUR_LLAMA | dict(bias=True, qkv_bias=False),
    "llama with scaled rotation": OUR_LLAMA | dict(rope_scaling="llama3", rope_context=64, rope_factor=4.0,
                                                   head_dim=10),
    "llama with linear rotation": OUR_LLAMA | dict(rope_scaling="linear", rope_factor=2.5, head_dim=4),
    "llama without gains": OUR_LLAMA | dict(norm_gain=False, norm_eps=1e-3, rope_theta=500.0),
    "qwen3": OUR_QWEN3,
    "qwen3 tied and padded": OUR_QWEN3 | dict(tie_weights=True, pad_vocab_to=64, n_kv_head=2, head_dim=20),
    "qwen3 without gains": OUR_QWEN3 | dict(norm_gain=False, qk_norm_gain=False, rope_theta=1024.0, ffn_dim=0),
}


@pytest.fixture(scope="module")
def their_bpe():
    """A byte-level BPE that the tokenizers library has trained: end-of-text, the 256 bytes, 43 merges."""
    theirs = Theirs(models.BPE())
    theirs.pre_tokenizer, theirs.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    theirs.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return theirs


@pytest.fixture
def saved(tmp_path, their_bpe, monkeypatch):
    """saved("gpt2", n_layer=3): a random model of transformers, none of its weights trivial, and its directory, with a
    tokenizer. The test stands in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def saved(kind="gpt2", folder="there", shard="1GB", **changes):
        torch.manual_seed(1)
        model_class, config_class, small = CLASSES[kind]
        model = model_class(config_class(**small | changes))
        perturbed(model.eval()).save_pretrained(folder, max_shard_size=shard)
        their_bpe.save(f"{folder}/tokenizer.json")
        return model, Path(folder)
    return saved


def ids(*shape, vocab=VOCAB):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(0))


def near(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def same_bytes(one: dict, other: dict):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].shape == other[name].shape, name
        assert one[name].numpy().tobytes() == other[name].numpy().tobytes(), name


def edit_json(path: Path, **changes):
    """A JSON file with some keys changed; a change to ... takes the key away."""
    content = {name: value for name, value in (json.loads(path.read_text()) | changes).items() if value is not ...}
    path.write_text(json.dumps(content))


# -- weights, both ways ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("kind", "changes"), THEIRS.values(), ids=THEIRS)
def test_their_model_has_the_same_logits_here_and_the_same_bytes_back(saved, kind, changes):
    theirs, folder = saved(kind, **changes)
    convert_ok("import", folder, "--out=ours")
    ours, tokenizer = train.load("ours")
    assert tokenizer.vocab_size == VOCAB
    near(ours(ids(3, 24))[0], theirs(ids(3, 24)).logits)
    convert_ok("export", "ours/ckpt.pt", "--out=back")
    same_bytes(load_file("back/model.safetensors"), load_file(folder / "model.safetensors"))
    near(AutoModelForCausalLM.from_pretrained("back")(ids(3, 24)).logits, theirs(ids(3, 24)).logits)


@pytest.mark.parametrize("switches", OURS.values(), ids=OURS)
def test_our_model_has_the_same_logits_there_and_the_same_bytes_back(tmp_path, monkeypatch, their_bpe, switches):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(2)
    tokenizer = tokenizer_from_json(json.loads(their_bpe.to_str()), {})
    model = perturbed(GPT(Config(**switches), VOCAB).eval())
    Path("run").mkdir()
    stored = dict(model.state_dict())
    save_checkpoint(dict(config=asdict(model.cfg), tokenizer=tokenizer.stored, vocab_size=VOCAB, step=7,
                                 model=stored), "run/ckpt.pt")
    convert_ok("export", "run/ckpt.pt", "--out=there")
    there, theirs = load_file("there/model.safetensors"), AutoModelForCausalLM.from_pretrained("there")
    near(theirs(ids(3, 24)).logits, model(ids(3, 24))[0])
    assert all(VOCAB in tensor.shape for name, tensor in there.items() if "embed_tokens" in name or "wte" in name)
    assert theirs.config.vocab_size == VOCAB
    convert_ok("import", "there", "--out=back")
    back = torch.load("back/ckpt.pt")
    assert back["tokenizer"] == tokenizer.stored
    cropped = {name: tensor[:VOCAB] if name in ("wte.weight", "head.weight") else tensor
               for name, tensor in stored.items()}
    same_bytes(back["model"], cropped)
    convert_ok("export", "back/ckpt.pt", "--out=again")
    same_bytes(load_file("again/model.safetensors"), there)


def test_a_bias_learned_elsewhere_is_kept(saved):
    """A model that was exported without biases and has them now is a GPT-2 with biases."""
    theirs, folder = saved()
    edit_json(folder / "config.json", inkling=dict(bias=False, qkv_bias="auto", norm_gain=False))
    config, tensors, _ = convert.model_from_hf(json.loads((folder / "config.json").read_text()),
                                         load_file(folder / "model.safetensors"))
    assert config["bias"] is config["norm_gain"] is True
    assert "blocks.0.attn.q.bias" in tensors


def test_weights_in_16_bits_become_float32_exactly(saved):
    theirs, folder = saved("llama")
    for dtype in (torch.bfloat16, torch.float16):
        theirs.to(dtype).save_pretrained(folder)
        convert_ok("import", folder, "--out=ours")
        weight = torch.load("ours/ckpt.pt")["model"]["blocks.1.mlp.gate.weight"]
        assert weight.dtype == torch.float32
        assert torch.equal(weight, theirs.model.layers[1].mlp.gate_proj.weight.float())
    save_file({name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()},
              folder / "model.safetensors")
    expect_refusal("import", folder, "--out=other", parts=["torch.float64"])


def test_the_names_of_the_bare_model_and_its_old_constants_are_understood(saved):
    theirs, folder = saved()
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in
               load_file(folder / "model.safetensors").items()}
    tensors |= {f"h.{layer}.attn.bias": torch.ones(24, 24).tril()[None, None] for layer in range(2)}
    save_file(tensors | {"h.0.attn.masked_bias": torch.tensor(-1e4), "lm_head.weight": theirs.lm_head.weight.clone()},
              folder / "model.safetensors")
    convert_ok("import", folder, "--out=ours")
    near(train.load("ours")[0](ids(2, 24))[0], theirs(ids(2, 24)).logits)


# -- files -----------------------------------------------------------------------------------------------------------

def test_shards_are_read_as_one(saved):
    theirs, folder = saved("llama", shard="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    convert_ok("import", folder, "--out=ours")
    near(train.load("ours")[0](ids(2, 24))[0], theirs(ids(2, 24)).logits)
    index = folder / "model.safetensors.index.json"
    first, second, *_ = sorted(folder.glob("model-*.safetensors"))
    whole = second.read_bytes()
    save_file(load_file(second) | dict(list(load_file(first).items())[:1]), second)
    expect_refusal("import", folder, "--out=other", parts=[second.name, "again"])
    second.write_bytes(whole)
    first.unlink()
    expect_refusal("import", folder, "--out=other", parts=["there holds no complete model.safetensors"])
    edit_json(index, weight_map={"wte.weight": "../elsewhere.safetensors"})
    expect_refusal("import", folder, "--out=other", parts=["outside its folder"])


def test_of_two_forms_of_weights_the_one_that_transformers_reads_is_taken(saved):
    """A folder may keep an old index beside model.safetensors, or a pickle beside both."""
    theirs, folder = saved("llama", shard="20KB")
    torch.save({name: torch.zeros_like(tensor) for name, tensor in theirs.state_dict().items()},
               folder / "pytorch_model.bin")
    convert_ok("import", folder, "--out=sharded")
    near(train.load("sharded")[0](ids(2, 24))[0], theirs(ids(2, 24)).logits)
    with torch.no_grad():
        theirs.model.norm.weight.mul_(2)
    save_file(dict(theirs.state_dict()), folder / "model.safetensors")
    expected = AutoModelForCausalLM.from_pretrained(folder)(ids(2, 24)).logits
    convert_ok("import", folder, "--out=single")
    near(expected, theirs(ids(2, 24)).logits)
    near(train.load("single")[0](ids(2, 24))[0], expected)


def test_shards_of_pickles_are_read_as_one(saved):
    theirs, folder = saved("llama")
    (folder / "model.safetensors").unlink()
    state = theirs.state_dict()
    parts = {"pytorch_model-00001-of-00002.bin": list(state)[:9], "pytorch_model-00002-of-00002.bin": list(state)[9:]}
    for name, names in parts.items():
        torch.save({key: state[key] for key in names}, folder / name)
    index = {key: name for name, names in parts.items() for key in names}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    convert_ok("import", folder, "--out=ours")
    near(train.load("ours")[0](ids(2, 24))[0], theirs(ids(2, 24)).logits)
    torch.save({"model.norm.weight": Hostile()}, folder / "pytorch_model-00002-of-00002.bin")
    expect_refusal("import", folder, "--out=other", parts=["pytorch_model-00002-of-00002.bin", "nothing was loaded"])
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    expect_refusal("import", folder, "--out=other", parts=["no complete model.safetensors"])


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_called_that(saved, name):
    _, folder = saved()
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n")
    expect_refusal("import", folder, "--out=other", parts=[f"there/{name}", "Git LFS", "git lfs pull"])


@pytest.mark.parametrize(("files", "said"), [
    (["adapter_config.json", "adapter_model.safetensors"], "adapter of peft"), (["model-Q4.gguf"], "model-Q4.gguf"),
    (["tf_model.h5"], "tf_model.h5"), (["consolidated.00.pth"], "consolidated.00.pth"), ([], "download finished"),
])
def test_weights_in_another_form_are_named(saved, files, said):
    _, folder = saved()
    (folder / "model.safetensors").unlink()
    for name in files:
        (folder / name).write_text("{}")
    expect_refusal("import", folder, "--out=other", parts=["there", said])
    expect_refusal("import", folder / "config.json", "--out=other", parts=["config.json is a file", "folder"])


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("it_ran",)


def test_a_pickle_is_read_when_it_holds_tensors_and_refused_when_it_runs_code(saved):
    theirs, folder = saved()
    (folder / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    convert_ok("import", folder, "--out=ours")
    near(train.load("ours")[0](ids(2, 24))[0], theirs(ids(2, 24)).logits)
    for content in (torch.save, lambda weights, path: path.write_bytes(pickle.dumps(weights))):
        content({"wte.weight": Hostile()}, folder / "pytorch_model.bin")
        expect_refusal("import", folder, "--out=other", parts=["pytorch_model.bin", "nothing was loaded"])
    torch.save({"wte.weight": "text"}, folder / "pytorch_model.bin")
    expect_refusal("import", folder, "--out=other", parts=["pytorch_model.bin"])


def test_a_damaged_directory_is_one_line(saved):
    _, folder = saved()
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for cut in (0, 5, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:cut])
        expect_refusal("import", folder, "--out=other", parts=["model.safetensors", "nothing was loaded"])
    weights.write_bytes(whole)
    for content in ("", "[]", "{", '{"a": NaN', "null", '{"model_type": "gpt2", "vocab_size": {}}'):
        (folder / "config.json").write_text(content)
        expect_refusal("import", folder, "--out=other", parts=["there"])
    expect_refusal("import", "nowhere", "--out=other", parts=["nowhere", "gpt2-xl"])
    (folder / "config.json").unlink()
    expect_refusal("import", folder, "--out=other", parts=["config.json"])


def test_weights_that_do_not_fit_are_named(saved):
    _, folder = saved()
    path = folder / "model.safetensors"
    whole = load_file(path)
    norm = "transformer.h.1.ln_1.weight"
    for changes, parts in (({norm: None}, [norm, "missing"]), ({norm: torch.ones(31)}, [norm, "(31,)", "(32,)"]),
                           ({"score.weight": torch.ones(2)}, ["transformer.score.weight", "not known"]),
                           ({"lm_head.weight": torch.ones(VOCAB, 32)}, ["tie_word_embeddings", "differs"])):
        save_file({name: tensor for name, tensor in (whole | changes).items() if tensor is not None}, path)
        expect_refusal("import", folder, "--out=other", parts=parts)


def test_a_notebook_survives_a_wrong_name():
    with pytest.raises(UserError, match="nowhere is neither a folder nor one of gpt2,"):
        convert.import_model("nowhere")


def test_without_safetensors_one_line_says_what_to_install(saved, monkeypatch):
    _, folder = saved()
    monkeypatch.setitem(sys.modules, "safetensors", None)
    expect_refusal("import", folder, "--out=other", parts=["pip install safetensors"])


# -- what has no counterpart -----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("kind", "changes", "said"), [
    ("gpt2", dict(activation_function="silu"), "activation_function='silu'"),
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
    ("gpt2", dict(scale_attn_weights=False), "scale_attn_weights=False"),
    ("gpt2", dict(add_cross_attention=True), "add_cross_attention=True"),
    ("gpt2", dict(n_ctx=12), "n_ctx=12"),
    ("gpt2", dict(n_layer="two"), "n_layer='two'"),
    ("gpt2", dict(n_embd=0), "n_embd=0"),
    ("gpt2", dict(n_layer=10**9), "1000000000 layers"),
    ("gpt2", dict(n_head=5), "5 heads"),
    ("llama", dict(num_attention_heads=32, head_dim=1), "32 heads"),
    ("llama", dict(num_key_value_heads=3), "3 of keys and values"),
    ("gpt2", dict(vocab_size=...), "vocab_size=None"),
    ("gpt2", dict(model_type="bert"), "model_type='bert'"),
    ("gpt2", dict(quantization_config={"bits": 4}), "quantization_config="),
    ("llama", dict(hidden_act="gelu"), "hidden_act='gelu'"),
    ("llama", dict(head_dim=15), "of 15 dimensions"),
    ("llama", dict(head_dim="wide"), "head_dim='wide'"),
    ("llama", dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}, rope_parameters=...), "llama3"),
    ("llama", dict(rope_scaling={"type": "linear"}, rope_parameters=...), "linear"),
    ("llama", dict(rope_scaling={"type": "dynamic", "factor": 2.0}, rope_parameters=...), "dynamic"),
    ("llama", dict(rope_parameters={"rope_type": "linear", "factor": 2.0, "beta": 1.0}), "beta"),
    ("llama", dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}), "yarn"),
    ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    ("llama", dict(mlp_bias=True), "mlp_bias=True with attention_bias=False"),
    ("llama", dict(sliding_window=128), "sliding_window=128"),
    ("llama", dict(some_new_switch="on"), "some_new_switch='on'"),
    ("llama", dict(rms_norm_eps="small"), "rms_norm_eps='small'"),
    ("qwen3", dict(use_sliding_window=True, sliding_window=8), "use_sliding_window=True"),
    ("qwen3", dict(layer_types=["full_attention", "sliding_attention"]), "layer_types='sliding_attention'"),
    ("qwen3", dict(attention_bias=True), "Qwen3 has no counterpart of attention_bias=True"),
    ("qwen3", dict(mlp_bias=True), "mlp_bias=True"),
    ("qwen3", dict(hidden_act="gelu"), "hidden_act='gelu'"),
    ("qwen3", dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}), "yarn"),
    ("qwen3", dict(num_experts=8), "num_experts=8"),
    ("qwen3", dict(num_key_value_heads=...), "32 of keys and values"),
])
def test_a_field_without_a_counterpart_is_refused_by_name(saved, kind, changes, said):
    _, folder = saved(kind)
    edit_json(folder / "config.json", **changes)
    expect_refusal("import", folder, "--out=other", parts=["there", said])


NOTES = dict(_model_name_or_path="x", unk_token_id=0, unsloth_fixed=True, unsloth_version="2025.1", max_length=20,
             do_sample=True, temperature=0.6, top_p=0.9, output_hidden_states=False, return_dict=True, sep_token_id=3,
             attention_dropout=0.1, hidden_dropout=0.1, problem_type="text", auto_map={"AutoModel": "other.Model"},
             pruned_heads={}, begin_suppress_tokens=[220], _attn_implementation_autoset=True, num_beams=1,
             decoder_start_token_id=1, tokenizer_class="X", neftune_noise_alpha=5, rope_interleaved=False)


@pytest.mark.parametrize("kind", CLASSES)
def test_fields_that_change_no_number_are_ignored(saved, kind):
    theirs, folder = saved(kind)
    edit_json(folder / "config.json", **NOTES)
    convert_ok("import", folder, "--out=ours")
    near(train.load("ours")[0](ids(2, 24))[0], theirs(ids(2, 24)).logits)


@pytest.mark.parametrize("scaling", [
    dict(type="linear", factor=2.0),
    dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
         original_max_position_embeddings=40)])
def test_the_older_spelling_of_scaled_rotation_is_read(saved, scaling):
    kind = scaling.get("rope_type", "linear")
    theirs, folder = saved("llama", rope_parameters=scaling | {"rope_type": kind, "rope_theta": 777.0})
    edit_json(folder / "config.json", rope_parameters=..., rope_theta=777.0, rope_scaling=scaling)
    convert_ok("import", folder, "--out=ours")
    near(train.load("ours")[0](ids(2, 24))[0], theirs(ids(2, 24)).logits)


def test_the_older_spelling_of_the_rotary_base_is_read(saved):
    theirs, folder = saved("llama", rope_parameters={"rope_type": "default", "rope_theta": 777.0})
    edit_json(folder / "config.json", rope_parameters=..., rope_theta=777.0, rope_scaling=None, torch_dtype="float32")
    convert_ok("import", folder, "--out=ours")
    near(train.load("ours")[0](ids(2, 24))[0], theirs(ids(2, 24)).logits)


def test_biases_of_all_of_attention_but_not_of_the_mlp_are_refused(saved):
    _, folder = saved("llama", attention_bias=True)
    expect_refusal("import", folder, "--out=other", parts=["attention_bias=True"])


@pytest.fixture
def run_of(tmp_path, monkeypatch):
    """run_of(settings): a checkpoint of an untrained byte model, in run/ckpt.pt."""
    monkeypatch.chdir(tmp_path)

    def run_of(settings, tokenizer="byte", text=""):
        tokenizer = Tokenizer.build(tokenizer, text)
        model = GPT(Config(**settings), tokenizer.vocab_size)
        Path("run").mkdir(exist_ok=True)
        save_checkpoint(dict(config=asdict(model.cfg), tokenizer=tokenizer.stored, step=0,
                                     vocab_size=tokenizer.vocab_size, model=dict(model.state_dict())), "run/ckpt.pt")
        return model, tokenizer
    return run_of


@pytest.mark.parametrize(("settings", "said"), [
    (dict(n_layer=1, n_embd=32), ["Qwen3", "embed_norm=True", "logit_cap=15.0", "shortcuts=True",
                                  "rope_fraction=0.5", "mlp=relu2"]),
    (OUR_QWEN3 | dict(bias=True), ["Qwen3", "bias=True"]),
    (OUR_QWEN3 | dict(qkv_bias=True), ["Qwen3", "qkv_bias=True"]),
    (OUR_GPT2 | dict(qk_norm=True), ["GPT-2", "qk_norm=True"]),
    (OUR_GPT2 | dict(head_bias=True), ["GPT-2", "head_bias=True"]),
    (OUR_GPT2 | dict(n_kv_head=2), ["n_kv_head=2"]),
    (OUR_GPT2 | dict(mlp="swiglu"), ["mlp=swiglu"]),
    (OUR_GPT2 | dict(norm="rmsnorm"), ["norm=rmsnorm"]),
    (OUR_LLAMA | dict(norm="layernorm", logit_cap=1.0), ["Llama", "norm=layernorm", "logit_cap=1.0"]),
])
def test_switches_without_a_counterpart_are_listed(run_of, settings, said):
    run_of(settings)
    ways_out = ["python convert.py page CKPT.pt", "config/portable.py"]
    expect_refusal("export", "run/ckpt.pt", "--out=there", parts=["run/ckpt.pt", *said, *ways_out])


def test_every_switch_of_the_model_is_accounted_for():
    """A new switch must be given a counterpart, or a value that it must have."""
    sizes = {name for known in convert.SIZES.values() for name in known}
    by_name = {"mlp", "norm_eps", "tie_weights", "rope_theta", "pad_vocab_to", *convert.OPTIONAL}
    scaling = {"rope_scaling", *(ours for known in convert.ROPE_FIELDS.values() for ours in known.values())}
    unread = {"learned": {"rope_fraction", "rope_theta", "ngram_rows", "ngram_edges"} | scaling,
              # llama_fields reads these but for the n-grams'
              "rope": {"ngram_rows", "ngram_edges", "head_dim"} | scaling}
    for fixed in convert.FIXED.values():
        assert sizes | by_name | set(fixed) | unread[fixed["positions"]] == train.MODEL_FIELDS


def test_weights_that_are_not_those_of_the_settings_are_not_exported(run_of):
    run_of(OUR_GPT2)
    whole = torch.load("run/ckpt.pt")
    for change in (dict(config=whole["config"] | dict(bias=False)), dict(config=whole["config"] | dict(n_layer=10**9)),
                   dict(config={}), dict(tokenizer={}),
                   dict(model={}), dict(model={name: 1 for name in whole["model"]}),
                   dict(model=whole["model"] | {"blocks.1.norm2.bias": torch.zeros(31)})):
        torch.save(whole | change, "run/ckpt.pt")
        expect_refusal("export", "run/ckpt.pt", "--out=there", parts=["run/ckpt.pt"])
    expect_refusal("export", "run/no.pt", "--out=there", parts=["run/no.pt"])


# -- tokenizers ------------------------------------------------------------------------------------------------------

anything = st.text(st.one_of(st.characters(exclude_categories=["Cs"]),
                             st.sampled_from(" \n\r\t'sStTlLrReEvV0123456789ab\u017f\u00a0\u3000\u0301")), max_size=60)


def in_transformers(content: dict) -> PreTrainedTokenizerFast:
    """transformers' tokenizer of what a tokenizer.json holds."""
    return PreTrainedTokenizerFast(tokenizer_object=Theirs.from_str(json.dumps(content)))


def their_ids(theirs, text: str) -> list:
    return theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids


@pytest.mark.parametrize("pattern", ["gpt2", "llama3"])
def test_their_tokenizer_has_the_same_ids_here(their_bpe, pattern):
    theirs = Theirs.from_str(their_bpe.to_str())
    if pattern == "llama3":
        words = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]+|\s+(?!\S)|\s+")
        theirs.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), "isolated"),
                                                        pre_tokenizers.ByteLevel(False, use_regex=False)])
    ours = tokenizer_from_json(json.loads(theirs.to_str()), {})
    assert ours.vocab_size == VOCAB
    assert ours.eot == 0
    wrapped = PreTrainedTokenizerFast(tokenizer_object=theirs)

    @given(anything)
    def same(text):
        assert ours.encode(text).tolist() == their_ids(wrapped, text)
        assert ours.decode(ours.encode(text)) == text
    same()
    assert ours.encode(TEXT).tolist() == their_ids(wrapped, TEXT)
    assert len(ours.encode(TEXT)) < 0.8 * len(TEXT)             # it does merge


def export_tokenizer(tokenizer: Tokenizer, tmp_path: Path):
    """AutoTokenizer of what convert.py export writes for a tiny model with this tokenizer."""
    tmp_path.mkdir(exist_ok=True)
    cfg = Config(**OUR_LLAMA | dict(n_embd=4, n_head=1, n_layer=1, ffn_dim=4))
    with torch.no_grad():
        weights = dict(GPT(cfg, tokenizer.vocab_size).state_dict())
    save_checkpoint(dict(config=asdict(cfg), tokenizer=tokenizer.stored, vocab_size=tokenizer.vocab_size,
                                 step=0, model=weights), tmp_path / "ckpt.pt")
    convert_ok("export", tmp_path / "ckpt.pt", f"--out={tmp_path / 'there'}")
    convert_ok("import", tmp_path / "there", f"--out={tmp_path / 'back'}")
    assert torch.load(tmp_path / "back" / "ckpt.pt")["tokenizer"] == tokenizer.stored
    return AutoTokenizer.from_pretrained(tmp_path / "there")


PATTERNS = {                                            # as tiktoken spells those of GPT-2, GPT-4 and GPT-4o
    "gpt2": GPT2_PATTERN,
    "cl100k_base": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
                   r"|\s*[\r\n]|\s+(?!\S)|\s",
    "anything": r"[\s\S]+",
    "a last word": r"\w+$|\w|\W",
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_our_bpe_has_the_same_ids_there(tmp_path, pattern):
    """Every two of some letters are a token, and every two of these if they are the same: wherever a text is split at
    another place the ids differ. One token cannot be merged from two, and ids are left out before end-of-text."""
    letters = "12 \n'sLſá"
    pairs = [(a + b).encode() for a in letters for b in letters]
    tokens = [bytes([value]) for value in range(256)] + [pair for pair in pairs if len(pair) == 2]
    tokens += [pair + pair for pair in pairs] + [b"1 unheard-of word"]
    ranks = "\n".join(f"{b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens))
    ours = Tokenizer({"kind": "bpe", "name": f"mine of {pattern}", "pattern": PATTERNS[pattern], "ranks": ranks,
                      "special": {END_OF_TEXT: 700, "<|other|>": 600}})
    theirs = export_tokenizer(ours, tmp_path)
    assert (theirs.eos_token_id, theirs.bos_token_id, ours.vocab_size) == (700, 700, 701)
    assert theirs(f"a{END_OF_TEXT}b<|other|>").input_ids == [*ours.encode("a"), 700, *ours.encode("b"), 600]

    @given(st.one_of(anything, st.text(letters, max_size=20)))
    @settings(max_examples=300)
    def same(text):
        assert their_ids(theirs, text) == ours.encode(text).tolist()
        assert theirs.decode(ours.encode(text).tolist()) == text
    same()
    for text in (TEXT, "a\n", "a \n", "  \n\n x", "1212121 12", "x  ", "$ 5$\n", "1 unheard-of word"):
        assert their_ids(theirs, text) == ours.encode(text).tolist()


def test_char_and_byte_have_the_same_ids_there(tmp_path):
    ours = Tokenizer.build("char", TEXT + "é中🦊\t")
    theirs = export_tokenizer(ours, tmp_path / "char")
    for text in (TEXT[:500], "é\n\n  中 🦊\t.", ""):
        assert their_ids(theirs, text) == ours.encode(text).tolist()
        assert theirs.decode(ours.encode(text).tolist()) == text
    with pytest.raises(Exception, match="UNK"):         # a character that it lacks is refused there, too
        their_ids(theirs, "ß")
    with_bytes = Tokenizer(ours.stored | {"bytes": True})       # prepare.py --min_count: rare characters in bytes
    theirs_with_bytes = export_tokenizer(with_bytes, tmp_path / "rare")

    @given(anything)
    def alike(text):
        ids = with_bytes.encode(text).tolist()
        assert their_ids(theirs_with_bytes, text) == ids
        assert theirs_with_bytes.decode(ids) == text
    alike()
    ours = Tokenizer.build("byte", "")
    theirs = export_tokenizer(ours, tmp_path / "byte")

    @given(anything)
    def same(text):
        assert their_ids(theirs, text) == list(text.encode())
        assert theirs.decode(list(text.encode())) == text
    same()


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base"])
def test_named_tokenizers_have_the_same_ids_there(tmp_path, name):
    try:
        encoding = tiktoken.get_encoding(name)
    except Exception:                   # whatever its download raises
        pytest.skip(f"tiktoken has no {name} here, and tests need no network")
    ours = Tokenizer.build(name, "")
    if name == "gpt2":
        theirs = export_tokenizer(ours, tmp_path)
        assert theirs.eos_token_id == encoding.eot_token
    else:                               # its 100,000 merges take seconds in each direction
        theirs = in_transformers(tokenizer_to_json(ours))

    @given(anything)
    def same(text):
        assert their_ids(theirs, text) == encoding.encode_ordinary(text)
    same()
    text = TEXT + "\n\n  1234567 naïve 狐狸 🦊 don'T\n"
    assert their_ids(theirs, text) == encoding.encode_ordinary(text)


def test_the_pattern_of_gpt2_is_tiktokens():
    from tiktoken_ext import openai_public
    assert openai_public.r50k_pat_str == GPT2_PATTERN


def test_merge_pairs_are_what_two_tokens_are_made_of():
    ranks = {bytes([value]): value for value in range(256)} | {b"ab": 256, b"cd": 257, b"abc": 258, b"abcd": 259,
                                                               b"xyz": 260}
    assert merge_pairs(ranks) == [(b"a", b"b"), (b"c", b"d"), (b"ab", b"c"), (b"ab", b"cd")]


def test_a_file_of_the_first_versions_is_read(their_bpe):
    """As GPT-2's own was written: no type of the model, merges as texts, empty affixes, no use_regex."""
    content = json.loads(their_bpe.to_str())
    ours = tokenizer_from_json(content, {})
    content["model"] = {"dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
                        "fuse_unk": False, "vocab": content["model"]["vocab"],
                        "merges": [" ".join(pair) for pair in content["model"]["merges"]]}
    content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    content["added_tokens"][0]["normalized"] = True
    assert tokenizer_from_json(content, {}).stored == ours.stored
    assert their_ids(in_transformers(content), TEXT) == ours.encode(TEXT).tolist()


def test_a_kind_of_tokenizer_without_a_counterpart_is_not_exported():
    tokenizer = Tokenizer.build("byte", "")
    tokenizer.kind = "syllables"
    with pytest.raises(ValueError, match="syllables"):
        tokenizer_to_json(tokenizer)


def test_vocab_json_with_tokens_that_no_merge_makes_is_enough(saved):
    """As ByteLevelBPETokenizer.save_model writes it, beside a config.json that says which one ends a text."""
    whole = without_merges_for_some()
    _, folder = kept_whole(saved, whole)
    (folder / "tokenizer.json").unlink()
    whole.model.save(str(folder))
    edit_json(folder / "config.json", eos_token_id=whole.token_to_id("</s>"))
    edit_json(folder / "generation_config.json", eos_token_id=None)
    convert_ok("import", folder, "--out=ours")
    ours = train.load("ours")[1]
    assert ours.encode(TEXT).tolist() == whole.encode(TEXT).ids
    assert ours.decode(ours.encode(TEXT)) == TEXT
    assert ours.pieces[ours.eot] == b"</s>"


def test_vocab_json_and_merges_txt_are_enough(saved, their_bpe):
    theirs, folder = saved()
    (folder / "tokenizer.json").unlink()
    their_bpe.model.save(str(folder))
    assert (folder / "merges.txt").read_text().startswith("#version")
    convert_ok("import", folder, "--out=ours")
    ours = train.load("ours")[1]
    assert ours.stored == tokenizer_from_json(json.loads(their_bpe.to_str()), {}).stored


def kept_whole(saved, theirs: Theirs, **roles):
    """The directory of a tiny Llama with this tokenizer; roles: of its special tokens, for tokenizer_config.json."""
    model, folder = saved("llama", vocab_size=theirs.get_vocab_size())
    theirs.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | roles
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return model, folder


def trained(model, **parts) -> Theirs:
    """A tokenizer of 400 tokens, trained on TEXT; parts: its pre_tokenizer and so on."""
    theirs = Theirs(model)
    for name, part in parts.items():
        setattr(theirs, name, part)
    trainer = {"BPE": trainers.BpeTrainer, "Unigram": trainers.UnigramTrainer, "WordLevel": trainers.WordLevelTrainer}
    options = dict(unk_token="<unk>") if isinstance(model, models.Unigram) else {}
    theirs.train_from_iterator([TEXT], trainer[type(model).__name__](
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False, **options))
    return theirs


def byte_level(*before, prefix: bool = False, alphabet: bool = True, normalizer=None) -> Theirs:
    theirs = Theirs(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=prefix)])
    theirs.decoder = decoders.ByteLevel()
    if normalizer:
        theirs.normalizer = normalizer
    theirs.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=400, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet else []))
    return theirs


def added() -> Theirs:
    theirs = byte_level()
    theirs.add_tokens(["<tool>", "    "])
    theirs.add_special_tokens(["<|im_end|>"])
    return theirs


def without_merges_for_some() -> Theirs:
    """As ByteLevelBPETokenizer saves it: <s>, <pad> and </s> are in the vocabulary, and no merges lead to them."""
    content = json.loads(byte_level().to_str())
    vocab = content["model"]["vocab"]
    vocab |= {name: len(vocab) + place for place, name in enumerate(("<s>", "<pad>", "</s>"))}
    content["added_tokens"] = []
    return Theirs.from_str(json.dumps(content))


def llama2(**changes) -> Theirs:
    """SentencePiece's BPE as Llama 2's was converted: a space before the text, spaces as \u2581, rare letters in
    bytes."""
    spaces = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                 decoders.Strip(" ", 1, 0)])
    content = json.loads(trained(models.BPE(unk_token="<unk>"), pre_tokenizer=pre_tokenizers.Metaspace(),
                                 decoder=decoder).to_str())
    vocab = content["model"]["vocab"]
    vocab |= {f"<0x{value:02X}>": len(vocab) + value for value in range(256)}
    content["model"] |= {"byte_fallback": True, "fuse_unk": True}
    content |= {"pre_tokenizer": None, "normalizer": json.loads(normalizers.Sequence(spaces).__getstate__())}
    return Theirs.from_str(json.dumps(content | changes))


METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
WHOLE = {
    "digits by themselves": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True)),
    "a vocabulary that lacks bytes": lambda: byte_level(alphabet=False),
    "a space before the text": lambda: byte_level(prefix=True),
    "NFC": lambda: byte_level(normalizer=normalizers.NFC()),
    "added tokens": added,
    "<s> <pad> </s>": without_merges_for_some,
    "possessive repeats": lambda: byte_level(pre_tokenizers.Split(Regex(r"\w++$"), "isolated")),
    "Llama 2's": llama2,
    "Llama 2's by Metaspace": lambda: llama2(normalizer=None, pre_tokenizer=METASPACE),
    "Unigram": lambda: trained(models.Unigram(), pre_tokenizer=pre_tokenizers.Metaspace(),
                               decoder=decoders.Metaspace()),
    "whole words": lambda: trained(models.WordLevel(unk_token="<unk>"),
                                   pre_tokenizer=pre_tokenizers.WhitespaceSplit()),
}
ROUND_TRIP = {"digits by themselves", "added tokens", "<s> <pad> </s>", "possessive repeats", "Llama 2's"}


@pytest.mark.parametrize("name", WHOLE)
def test_any_tokenizer_json_gives_the_ids_of_transformers(saved, name):
    """Whatever Inkling has no kind of its own for is kept whole: same ids, same text, same file back."""
    _, folder = kept_whole(saved, WHOLE[name]())
    assert "tokenizer.json, kept whole" in convert_ok("import", folder, "--out=ours").stdout
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = train.load("ours")[1]
    assert ours.kind == "json"
    assert json.loads(ours.stored["json"]) == json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    convert_ok("export", "ours/ckpt.pt", "--out=back")
    assert (json.loads(Path("back/tokenizer.json").read_text(encoding="utf-8"))
            == json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))
    again = AutoTokenizer.from_pretrained("back")

    def compare(text):
        expected = their_ids(theirs, text)
        back = theirs.decode(expected, clean_up_tokenization_spaces=False)
        lost = theirs.convert_tokens_to_ids("<unk>") in expected
        if lost or (name == "a vocabulary that lacks bytes" and back != text):
            assert name not in ROUND_TRIP
            with pytest.raises(ValueError, match="the tokenizer has no"):
                ours.encode(text)
            return
        ids = ours.encode(text).tolist()
        assert ids == expected
        assert ours.decode(ids) == back
        assert their_ids(again, text) == expected
        push = ours.stream()
        streamed = [push(value) for value in [*ids, None]]
        assert "".join(streamed) in (back, f" {back}")
        if name in ROUND_TRIP:
            assert back == text.replace("\u2581", " ")

    hypothesis_settings = settings(max_examples=60, deadline=None)
    hypothesis_settings(given(anything)(compare))()
    for text in (TEXT[:3000], "nothing", "the  old ",
                 "The fox  is 1234\tcaf\u00e9 cafe\u0301 \u72d0\u72f8 \U0001f98a</s><s>", " x", "", "\n"):
        compare(text)


@pytest.mark.parametrize("name", ["Llama 2's", "Unigram", "a space before the text"])
def test_a_long_text_is_cut_where_no_id_changes(name, monkeypatch):
    """A piece in the middle gets no space before it."""
    theirs = WHOLE[name]()
    ours = Tokenizer({"kind": "json", "json": theirs.to_str()})
    whole = ours.encode(TEXT[:5000]).tolist()
    monkeypatch.setattr("inkling.tokenizer.BOUNDED", 300)
    assert ours.encode(TEXT[:5000]).tolist() == whole
    assert ours.decode(ours.encode("x" * 700)).strip() == "x" * 700         # nor where there is no space to cut at


def test_what_a_vocabulary_lacks_is_named_and_never_dropped():
    ours = Tokenizer({"kind": "json", "json": byte_level(alphabet=False).to_str()})
    with pytest.raises(ValueError, match=r"the tokenizer has no '\\x04' '\u72d0'"):
        ours.encode("The \u72d0 fox\x04")
    unigram = Tokenizer({"kind": "json", "json": WHOLE["Unigram"]().to_str()})
    with pytest.raises(ValueError, match="the tokenizer has no '\u72d0'"):
        unigram.encode("The \u72d0 fox")


def test_a_missing_package_is_named_when_it_is_needed(saved, monkeypatch):
    _, folder = kept_whole(saved, byte_level(prefix=True))
    convert_ok("import", folder, "--out=ours")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    expect_refusal("import", folder, "--out=other", parts=["pip install tokenizers", "ByteLevel"])
    one_line_error(inside(sample.main, "--ckpt=ours/ckpt.pt", "--device=cpu"), "pip install tokenizers")
    _, plain = saved(folder="plain")
    convert_ok("import", plain, "--out=other")              # whose tokenizer is of Inkling's own kinds


def test_a_byte_level_bpe_in_tiktokens_form_needs_no_package(saved, monkeypatch):
    _, folder = saved()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    convert_ok("import", folder, "--out=ours")
    assert torch.load("ours/ckpt.pt")["tokenizer"]["kind"] == "bpe"


@pytest.mark.parametrize(("change", "said"), [
    (lambda t: t["model"].update(type="Unigram"), "Unigram"),
    (lambda t: t["model"].update(merges=[["no", "such"]]), "vocabulary"),
    (lambda t: t.update(pre_tokenizer={"type": "Guess"}), "Guess"),
    (lambda t: t.update(decoder={"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
                        pre_tokenizer=None), "decoder"),
    (lambda t: t.update(model=[]), "damaged"),
    (lambda t: t.update(model={}), "damaged"),
])
def test_a_tokenizer_that_cannot_be_used_is_refused_by_name(saved, change, said):
    theirs, folder = saved()
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    expect_refusal("import", folder, "--out=other", parts=["there", said, "--tokenizer=NAME"])


@pytest.mark.parametrize("change", [
    dict(json=None), dict(json="["), dict(json="{}"), dict(json="[]"), dict(json='{"model": 1}'), dict(eot=[10**9]),
    dict(eot=5), dict(eot=["</s>"]), dict(eot=[-1]), dict(bos=400), dict(bos=True), dict(bos=[1])])
def test_a_kept_tokenizer_that_is_damaged_is_refused_where_it_is_read(run_of, change):
    model, _ = run_of(OUR_GPT2)
    stored = {"kind": "json", "json": byte_level(prefix=True).to_str()}
    content = torch.load("run/ckpt.pt")
    torch.save(content | {"tokenizer": stored | change}, "run/ckpt.pt")
    one_line_error(inside(sample.main, "--ckpt=run/ckpt.pt", "--device=cpu"), "run/ckpt.pt")


def test_a_named_tokenizer_must_have_the_models_vocabulary(saved):
    _, folder = saved()
    expect_refusal("import", folder, "--out=other", "--tokenizer=byte", parts=["byte", "256", "300"])
    (folder / "tokenizer.json").unlink()
    expect_refusal("import", folder, "--out=other", "--tokenizer=byte", parts=["byte", "256", "300"])
    _, small = saved(folder="small", vocab_size=256)
    (small / "tokenizer.json").unlink()
    convert_ok("import", small, "--out=ours", "--tokenizer=byte")
    assert torch.load("ours/ckpt.pt")["tokenizer"] == {"kind": "byte"}
    _, other = saved(folder="other")
    convert_ok("import", other, "--out=named", f"--tokenizer={other}")
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {"a": content["model"]["vocab"]["b"], "b": content["model"]["vocab"]["a"]}
    (other / "tokenizer.json").write_text(json.dumps(content))
    expect_refusal("import", other, "--out=another", "--tokenizer=named/ckpt.pt", parts=["other tokens", "leave"])


# -- the tokens that begin and end a text ----------------------------------------------------------------------------

def ends_of(folder: Path, **files) -> Tokenizer:
    """The tokenizer of a directory whose JSON files say so: config=..., generation_config=..."""
    for name, content in files.items():
        path = folder / f"{name}.json"
        old = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(old | content))
    return load_tokenizer(folder)


@pytest.mark.parametrize("kind", [byte_level, llama2])
def test_the_models_own_end_of_text_tokens_are_known(saved, kind):
    theirs = kind()
    theirs.add_special_tokens(["</s>", "<|im_end|>", "<|eot_id|>"])
    _, folder = kept_whole(saved, theirs)
    edit_json(folder / "generation_config.json", eos_token_id=None)
    end, turn, other = (theirs.token_to_id(token) for token in ("</s>", "<|im_end|>", "<|eot_id|>"))
    ours = ends_of(folder, config=dict(eos_token_id=end))
    assert (ours.eot, ours.stops) == (end, {end})
    ours = ends_of(folder, generation_config=dict(eos_token_id=[end, other]))
    assert (ours.eot, ours.stops) == (end, {end, other})
    ours = ends_of(folder, tokenizer_config=dict(eos_token="<|im_end|>"))
    assert (ours.eot, ours.stops) == (turn, {end, turn, other})
    ours = ends_of(folder, tokenizer_config=dict(eos_token={"content": "</s>", "lstrip": False}))
    assert (ours.eot, ours.stops) == (end, {end, other})
    assert Tokenizer(json.loads(json.dumps(ours.stored))).stops == ours.stops
    ours = ends_of(folder, config=dict(eos_token_id=10**6), generation_config=dict(eos_token_id=None),
                   tokenizer_config=dict(eos_token=None))
    assert ours.eot == (None if kind is llama2 else theirs.token_to_id(END_OF_TEXT))        # no such id: as before


def test_end_of_text_comes_back_from_an_export(saved):
    theirs = with_template(llama2())
    theirs.add_special_tokens(["<|im_end|>"])
    _, folder = kept_whole(saved, theirs, eos_token="<|im_end|>", bos_token="<s>")
    edit_json(folder / "config.json", eos_token_id=[2, 1])
    edit_json(folder / "generation_config.json", eos_token_id=None)
    convert_ok("import", folder, "--out=ours")
    convert_ok("export", "ours/ckpt.pt", "--out=back")
    end = theirs.token_to_id("<|im_end|>")
    for name in ("config.json", "generation_config.json"):
        content = json.loads(Path("back", name).read_text())
        assert (content["eos_token_id"], content["bos_token_id"]) == ([end, 1, 2], 1)
    assert AutoTokenizer.from_pretrained("back").eos_token_id == end
    assert AutoModelForCausalLM.from_pretrained("back").generation_config.eos_token_id == [end, 1, 2]
    convert_ok("import", "back", "--out=again")
    first, second = (torch.load(f"{run}/ckpt.pt")["tokenizer"] for run in ("ours", "again"))
    assert set(first.pop("eot")) == set(second.pop("eot"))
    assert first == second


BOS_TEMPLATE = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                                                         {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}


def with_template(theirs: Theirs) -> Theirs:
    if theirs.token_to_id("<s>") is None:
        theirs.add_special_tokens(["<s>"])
    template = json.loads(json.dumps(BOS_TEMPLATE))
    template["special_tokens"]["<s>"]["ids"] = [theirs.token_to_id("<s>")]
    return Theirs.from_str(json.dumps(json.loads(theirs.to_str()) | {"post_processor": template}))


@pytest.mark.parametrize("name", ["Llama 2's", "digits by themselves", "tiktoken's form"])
@pytest.mark.parametrize("said", ["template", "add_bos_token=False", "neither"])
def test_a_prompt_begins_as_it_does_in_transformers(saved, their_bpe, name, said):
    theirs = Theirs.from_str(their_bpe.to_str()) if name == "tiktoken's form" else WHOLE[name]()
    theirs = with_template(theirs) if said != "neither" else theirs
    if theirs.token_to_id("<s>") is None:
        theirs.add_special_tokens(["<s>"])
    roles = {"add_bos_token": said == "neither"} if "template" not in said else {}
    _, folder = kept_whole(saved, theirs, bos_token="<s>", **roles)
    convert_ok("import", folder, "--out=ours")
    ours = train.load("ours")[1]
    expected = AutoTokenizer.from_pretrained(folder)("The fox").input_ids
    assert ours.encode_prompt("The fox").tolist() == expected
    assert (expected[0] == theirs.token_to_id("<s>")) == (said != "neither")
    convert_ok("export", "ours/ckpt.pt", "--out=back")
    assert AutoTokenizer.from_pretrained("back")("The fox").input_ids == expected
    convert_ok("import", "back", "--out=again")
    assert train.load("again")[1].encode_prompt("The fox").tolist() == expected


def test_sampling_ends_at_the_models_own_token(saved):
    """Each end-of-text token in turn is the likeliest next one."""
    model, folder = kept_whole(saved, llama2(), eos_token="</s>")
    edit_json(folder / "config.json", eos_token_id=[2, 1])
    words = ["--ckpt=ours/ckpt.pt", "--start=The fox", "--temperature=0", "--max_new_tokens=9", "--json",
             "--device=cpu"]
    for end, finish in ((2, "eot"), (1, "eot"), (5, "length")):
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"].zero_()
        weights["model.norm.weight"].zero_()        # the last layer sees nothing: all logits are 0
        save_file(weights, folder / "model.safetensors")
        convert_ok("import", folder, "--out=ours")
        content = torch.load("ours/ckpt.pt")
        content["config"]["head_bias"] = True
        content["model"]["head.bias"] = torch.nn.functional.one_hot(torch.tensor(end), 656 + 3).float()[
            :content["model"]["head.weight"].size(0)]
        torch.save(content, "ours/ckpt.pt")
        record = json.loads(inside(sample.main, *words).stdout)
        assert (record["finish"], len(record["tokens"])) == (finish, 0 if finish == "eot" else 9)


def test_documents_are_separated_by_the_models_own_tokens(saved, tmp_path, capsysbinary):
    """In a data set for fine-tuning: the end of one, the beginning of the next."""
    _, folder = kept_whole(saved, with_template(llama2()), eos_token="</s>", bos_token="<s>")
    convert_ok("import", folder, "--out=ours")
    rows = ["First.", "Second one.", "Third."]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    for tokenizer in ("ours/ckpt.pt", str(folder)):
        write_set(tmp_path / "sets" / "rows", [tmp_path / "rows.jsonl"], tokenizer, 0.0)
        data = np.fromfile(tmp_path / "sets" / "rows" / "train.bin", "uint16").tolist()
        theirs = AutoTokenizer.from_pretrained(folder)
        expected = []
        for row in rows:
            expected += [*theirs(row).input_ids, 2]
        assert data == expected[:-1]
        check_set(tmp_path / "sets" / "rows")
        capsysbinary.readouterr()
        decode_set(tmp_path / "sets" / "rows")
        assert capsysbinary.readouterr().out == b"First.</s>Second one.</s>Third."


def test_the_tokenizer_can_come_from_a_data_set_or_a_checkpoint(saved, tmp_path):
    _, folder = saved(vocab_size=256)
    shutil.rmtree(folder / "none", ignore_errors=True)
    (folder / "tokenizer.json").unlink()
    expect_refusal("import", folder, "--out=other", parts=["tokenizer.json", "--tokenizer=NAME"])
    (tmp_path / "t.txt").write_text(TEXT)
    meta = write_set(tmp_path / "set", [tmp_path / "t.txt"], "char", 0.1)
    convert_ok("import", folder, "--out=one", "--tokenizer=set/meta.json")
    convert_ok("import", folder, "--out=two", "--tokenizer=one/ckpt.pt")
    assert torch.load("one/ckpt.pt")["tokenizer"] == torch.load("two/ckpt.pt")["tokenizer"] == meta["tokenizer"]
    expect_refusal("import", folder, "--out=other", "--tokenizer=char", parts=["char"])
    expect_refusal("import", folder, "--out=other", "--tokenizer=gpt3", parts=["gpt3"])


@pytest.mark.parametrize("kind", [byte_level, llama2])
def test_a_special_token_that_the_model_has_no_row_for_is_left_out(saved, kind):
    """A <pad> that was added to the tokenizer and never to the model, as with many a fine-tuned Llama 2."""
    theirs = kind()
    rows = theirs.get_vocab_size()
    theirs.add_special_tokens(["<pad>"])
    _, folder = kept_whole(saved, theirs, pad_token="<pad>")
    model, other = saved("llama", folder="other", vocab_size=rows)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(other / name, folder / name)
    outcome = convert_ok("import", folder, "--out=ours")
    assert "no row for '<pad>'" in outcome.stderr
    ours = train.load("ours")[1]
    assert ours.vocab_size == rows
    assert ours.encode("The <pad> fox").tolist() == their_ids(AutoTokenizer.from_pretrained(folder), "The <pad> fox")


def test_a_folder_that_has_the_name_of_a_tokenizer_and_is_none_does_not_hide_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("gpt3").mkdir()
    with pytest.raises(UserError, match="tokenizer='gpt3' is none of: char, byte"):
        Tokenizer.build("gpt3", "")


def test_rows_beyond_the_tokenizer_are_padding(saved):
    theirs, folder = saved("llama", vocab_size=320)
    convert_ok("import", folder, "--out=ours")
    ours, tokenizer = train.load("ours")
    assert (ours.vocab_size, tokenizer.vocab_size, ours.cfg.pad_vocab_to) == (VOCAB, VOCAB, 320)
    assert ours.wte.weight.shape == (320, 32)
    near(ours(ids(2, 24))[0], theirs(ids(2, 24)).logits[..., :VOCAB])
    convert_ok("export", "ours/ckpt.pt", "--out=back")
    assert json.loads(Path("back/config.json").read_text())["vocab_size"] == VOCAB
    _, folder = saved(folder="small", vocab_size=299)
    expect_refusal("import", folder, "--out=other", parts=["300", "299", "--tokenizer"])


# -- nanoGPT ---------------------------------------------------------------------------------------------------------

class NanoBlock(torch.nn.Module):
    """nanoGPT's, from its model.py, in the shortest form."""

    def __init__(self, n_embd: int, n_head: int, bias: bool):
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = (torch.nn.LayerNorm(n_embd, bias=bias) for _ in range(2))
        self.attn, self.mlp = torch.nn.Module(), torch.nn.Module()
        self.attn.c_attn = torch.nn.Linear(n_embd, 3 * n_embd, bias=bias)
        self.attn.c_proj = torch.nn.Linear(n_embd, n_embd, bias=bias)
        self.mlp.c_fc = torch.nn.Linear(n_embd, 4 * n_embd, bias=bias)
        self.mlp.c_proj = torch.nn.Linear(4 * n_embd, n_embd, bias=bias)

    def forward(self, x):
        q, k, v = (z.unflatten(-1, (self.n_head, -1)).transpose(1, 2)
                   for z in self.attn.c_attn(self.ln_1(x)).chunk(3, -1))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn.c_proj(y.transpose(1, 2).flatten(2))
        return x + self.mlp.c_proj(torch.nn.functional.gelu(self.mlp.c_fc(self.ln_2(x))))


class NanoGPT(torch.nn.Module):
    def __init__(self, vocab_size: int, bias: bool):
        super().__init__()
        self.transformer = torch.nn.ModuleDict(dict(
            wte=torch.nn.Embedding(vocab_size, 32), wpe=torch.nn.Embedding(24, 32),
            h=torch.nn.ModuleList(NanoBlock(32, 4, bias) for _ in range(2)), ln_f=torch.nn.LayerNorm(32, bias=bias)))
        self.lm_head = torch.nn.Linear(32, vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight

    def forward(self, ids):
        x = self.transformer.wte(ids) + self.transformer.wpe.weight[:ids.size(1)]
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


@pytest.fixture
def nano(tmp_path, monkeypatch):
    """nano(vocab_size, bias): a model of nanoGPT, and its ckpt.pt in nano/. The test stands in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def nano(vocab_size: int, bias: bool = False, prefix: str = ""):
        torch.manual_seed(3)
        model = perturbed(NanoGPT(vocab_size, bias).eval())
        sizes = dict(n_layer=2, n_head=4, n_embd=32, block_size=24, bias=bias, vocab_size=vocab_size, dropout=0.2)
        Path("nano").mkdir(exist_ok=True)
        weights = {prefix + name: tensor for name, tensor in model.state_dict().items()}
        torch.save({"model": weights, "optimizer": {"state": {}}, "model_args": sizes, "iter_num": 9,
                    "best_val_loss": torch.tensor(1.5), "config": {"dataset": "x"}}, "nano/ckpt.pt")
        return model
    return nano


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_checkpoint_of_nanogpt_is_taken_over(nano, bias, prefix):
    theirs = nano(256, bias, prefix)
    expect_refusal("import", "nano/ckpt.pt", "--out=ours", parts=["256 tokens", "--tokenizer=NAME"])
    convert_ok("import", "nano/ckpt.pt", "--out=ours", "--tokenizer=byte")
    ours = train.load("ours")[0]
    near(ours(ids(3, 24, vocab=256))[0], theirs(ids(3, 24, vocab=256)))
    assert ours.cfg.bias == bias
    convert_ok("export", "ours/ckpt.pt", "--out=there")                 # and from there to transformers
    near(AutoModelForCausalLM.from_pretrained("there")(ids(3, 24, vocab=256)).logits, theirs(ids(3, 24, vocab=256)))
    expect_refusal("import", "nano/ckpt.pt", "--out=other", "--tokenizer=nothing", parts=["nothing"])
    expect_refusal("import", "ours/ckpt.pt", "--out=other", parts=["already", "--ckpt=ours/ckpt.pt"])


def test_the_characters_of_nanogpt_are_those_of_the_same_text(nano, tmp_path):
    (tmp_path / "t.txt").write_text("To be, or not to be", encoding="utf-8")
    meta = write_set(tmp_path / "set", [tmp_path / "t.txt"], "char", 0.1)
    nano(meta["vocab_size"])
    convert_ok("import", "nano/ckpt.pt", "--out=ours", "--tokenizer=set/meta.json")
    assert inside(sample.main, "--ckpt=ours", "--start=To be", "--device=cpu", "--max_new_tokens=3").returncode == 0
    nano(99)
    expect_refusal("import", "nano/ckpt.pt", "--out=other", "--tokenizer=set/meta.json",
                   parts=["set/meta.json", f"{meta['vocab_size']} tokens", "99"])


@pytest.mark.parametrize("rows", [50_257, 50_304])
def test_a_model_of_nanogpt_with_gpt2s_vocabulary_has_its_tokenizer(nano, rows, monkeypatch):
    theirs = nano(rows)
    gpt2 = Tokenizer({"kind": "bpe", "name": "gpt2", "pattern": GPT2_PATTERN, "special": {END_OF_TEXT: 50_256},
                      "ranks": "\n".join(f"{b64encode(bytes([value])).decode()} {value}" for value in range(256))})
    monkeypatch.setattr(Tokenizer, "build", lambda name, *_: {"gpt2": gpt2}[name])
    words = ["--max_new_tokens=5", "--temperature=0", "--start=Once", "--device=cpu", "--json"]
    record = json.loads(inside(sample.main, "--ckpt=nano/ckpt.pt", *words).stdout)      # without a conversion
    window = list(b"Once")
    for _ in range(5):
        window.append(theirs(torch.tensor([window]))[0, -1, :50_257].argmax().item())
    assert record["tokens"] == window[4:]
    assert json.loads(inside(sample.main, "--ckpt=nano", *words).stdout) == record


def test_what_is_no_checkpoint_of_nanogpt_is_one_line(nano):
    nano(256)
    whole = torch.load("nano/ckpt.pt")
    weights = whole["model"]
    for change in (dict(model_args={}), dict(model_args=None), dict(model={}), dict(model=None),
                   dict(model_args=whole["model_args"] | dict(n_layer=10**9)),
                   dict(model_args=whole["model_args"] | dict(n_embd="wide")),
                   dict(model_args=whole["model_args"] | dict(n_head=5)),
                   dict(model=weights | {"more": torch.ones(2)}),
                   dict(model=weights | {"transformer.ln_f.weight": torch.ones(31)}),
                   dict(model=weights | {"lm_head.weight": torch.ones(256, 32)}),
                   dict(model={name: 1 for name in weights})):
        torch.save(whole | change, "nano/ckpt.pt")
        expect_refusal("import", "nano/ckpt.pt", "--out=other", "--tokenizer=byte", parts=["nano/ckpt.pt"])
    torch.save(whole | {"config": Hostile()}, "nano/ckpt.pt")
    expect_refusal("import", "nano/ckpt.pt", "--out=other", "--tokenizer=byte", parts=["nothing was loaded"])


# -- what is written -------------------------------------------------------------------------------------------------

def test_an_export_replaces_an_export_and_nothing_else(run_of):
    run_of(OUR_GPT2)
    convert_ok("export", "run/ckpt.pt", "--out=there")
    first = Path("there/model.safetensors").read_bytes()
    run_of(OUR_GPT2)
    convert_ok("export", "run/ckpt.pt", "--out=there")
    assert Path("there/model.safetensors").read_bytes() != first
    assert {path.name for path in Path("there").iterdir()} == convert.EXPORTED
    assert len({path.stat().st_mode for path in Path("there").iterdir()}) == 1         # whoever reads one reads all
    assert {path.name for path in Path().iterdir()} == {"run", "there"}
    Path("there/README.md").write_text("my notes")
    expect_refusal("export", "run/ckpt.pt", "--out=there", parts=["there", "--out"])
    expect_refusal("export", "run/ckpt.pt", "--out=run", parts=["run", "--out"])
    expect_refusal("export", "run/ckpt.pt", "--out=run/ckpt.pt", parts=["run/ckpt.pt", "--out"])
    expect_refusal("export", "run/ckpt.pt", parts=["--out=DIR"])
    Path("empty").mkdir()
    convert_ok("export", "run/ckpt.pt", "--out=empty")


@contextlib.contextmanager
def full_disk(room: int):
    """No file grows beyond `room` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(resource is None, reason="Windows limits no sizes of files")
@pytest.mark.parametrize("room", [100, 10_000])             # the first file, and the weights, do not fit
def test_a_full_disk_leaves_the_former_export(run_of, room):
    run_of(OUR_GPT2)
    convert_ok("export", "run/ckpt.pt", "--out=there")
    with full_disk(room):
        outcome = inside(convert.main, "export", "run/ckpt.pt", "--out=there")
    one_line_error(outcome, "could not write there", "File too large")
    assert {path.name for path in Path().iterdir()} == {"run", "there"}
    assert AutoModelForCausalLM.from_pretrained("there").config.n_layer == 2


def test_an_import_sets_a_former_run_aside(saved):
    _, folder = saved()
    convert_ok("import", folder, "--out=ours")
    assert "ours.1" in convert_ok("import", folder, "--out=ours").stdout
    same_bytes(torch.load("ours/ckpt.pt")["model"], torch.load("ours.1/ckpt.pt")["model"])
    assert {path.name for path in Path("ours").iterdir()} == {".lock", "ckpt.pt"}


@pytest.mark.parametrize("words", [[], ["import"], ["export", "a", "b"], ["convert", "a"], ["import", "gpt3"]])
def test_a_wrong_command_is_one_line(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expect_refusal(*words)


# -- names: the cache and downloads ----------------------------------------------------------------------------------

@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty Hugging Face cache and no network. huggingface_hub has read the environment when it was imported."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def fill_cache(cache: Path, folder: Path, repository: str = "models--openai-community--gpt2") -> Path:
    """Copy a model to where huggingface_hub looks for its main revision."""
    place = cache / repository
    shutil.copytree(folder, place / "snapshots" / COMMIT)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    return place / "snapshots" / COMMIT


@pytest.mark.parametrize("repository", ["models--gpt2", "models--openai-community--gpt2"])
def test_a_name_is_found_in_the_cache_without_a_network(cache, saved, repository):
    theirs, folder = saved()
    snapshot = fill_cache(cache, folder, repository)
    convert_ok("import", "gpt2", "--out=ours")
    near(train.load("ours")[0](ids(2, 24))[0], theirs(ids(2, 24)).logits)
    assert cached_folder("gpt2") == snapshot
    assert cached_folder("gpt2-xl") is None
    (snapshot / "model.safetensors").rename(snapshot / "pytorch_model.bin")     # as an old program cached it
    assert cached_folder("gpt2") == snapshot
    (snapshot / "pytorch_model.bin").unlink()                                   # a download that was interrupted
    assert cached_folder("gpt2") is None


def test_what_is_not_in_the_cache_needs_a_network(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expect_refusal("import", "gpt2-large", parts=["gpt2-large", str(cache), "HF_HUB_OFFLINE", "HF_HUB_CACHE"])


def test_without_huggingface_hub_one_line_says_what_to_install(saved, monkeypatch):
    _, folder = saved()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    expect_refusal("import", "gpt2", parts=["gpt2", "pip install huggingface_hub"])
    convert_ok("import", folder, "--out=ours")              # a folder needs no hub


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks of huggingface.co: HEAD tells commit, ETag and size of a file, GET sends its bytes.

    faults: of the first answers to GET about the weights; absent: files that the hub does not have."""

    def do_HEAD(self):
        if name := self.present():
            self.send_headers(200, name, len(self.server.files[name]))

    def do_GET(self):
        name = self.present()
        if not name:
            return
        content = self.server.files[name]
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.server.asked.append((self.path, start))
        fault = self.server.faults.pop(0) if self.server.faults and name == "model.safetensors" else ""
        if fault == "flipped":
            content = content[:-1] + bytes([content[-1] ^ 1])
        rest = content[start:]
        self.send_headers(206 if start else 200, name, len(rest), start)
        if fault == "cut":
            rest = rest[:len(rest) // 2]
        if fault != "nothing":
            self.wfile.write(rest)

    def present(self) -> str:
        """The name of the file that is asked for; "" after an answer that there is none."""
        self.server.requests += 1
        name = self.path.rsplit("/", 1)[-1]
        if name in self.server.files and name not in self.server.absent:
            return name
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()
        return ""

    def send_headers(self, status: int, name: str, size: int, start: int = 0):
        content = self.server.files[name]
        digest = hashlib.sha256(content) if name == "model.safetensors" else hashlib.sha1(content)
        self.send_response(status)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{digest.hexdigest()}"')
        self.send_header("Content-Length", str(size))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(cache, saved, monkeypatch):
    """A hub on 127.0.0.1 that has a tiny `gpt2`."""
    _, folder = saved()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {name: (folder / name).read_bytes() for name in FILES}
    server.asked, server.faults, server.absent = [], [], set()
    server.requests = 0
    server.address = f"http://127.0.0.1:{server.server_port}"
    set_endpoint(monkeypatch, server.address)
    yield from serving(server)


def set_endpoint(monkeypatch, address: str):
    """What HF_ENDPOINT does. The waits between tries take no time."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def cached_bytes() -> dict:
    """What the cache holds of gpt2 by file name."""
    found = {name: try_to_load_from_cache("openai-community/gpt2", name) for name in FILES}
    return {name: Path(path).read_bytes() for name, path in found.items() if path}


def test_a_name_is_downloaded_once_and_only_what_is_needed(hub):
    hub.files |= {"README.md": b"", "pytorch_model.bin": b""}
    convert_ok("import", "gpt2", "--out=one")
    assert cached_bytes() == {name: hub.files[name] for name in FILES}
    asked = [("/openai-community/gpt2/resolve/main/config.json", 0),
             (f"/openai-community/gpt2/resolve/{COMMIT}/tokenizer.json", 0),
             (f"/openai-community/gpt2/resolve/{COMMIT}/model.safetensors", 0)]
    assert hub.asked == asked
    requests = hub.requests
    convert_ok("import", "gpt2", "--out=two")
    assert hub.requests == requests
    same_bytes(torch.load("one/ckpt.pt")["model"], torch.load("two/ckpt.pt")["model"])


def test_pretrained_weights_need_no_more_than_requirements_txt(hub, tmp_path):
    """In a process of its own, where the packages of requirements-dev.txt are hidden, and the environment names the
    hub and the cache."""
    (tmp_path / "hidden").mkdir()
    for package in re.findall(r"^[a-z_]+", (ROOT / "requirements-dev.txt").read_text(), re.M):
        (tmp_path / "hidden" / f"{package}.py").write_text(f"raise ImportError('{package} is hidden')")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    env |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(tmp_path / "hidden")}
    process = subprocess.run([sys.executable, ROOT / "sample.py", "--init_from=gpt2", "--start=The fox", "--device=cpu",
                              "--max_new_tokens=4"], env=env, text=True, capture_output=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert "The fox" in process.stdout
    assert process.stdout.count(f"downloading {hub.address}/openai-community/gpt2/resolve/") == 3
    snapshot = tmp_path / "home" / "hub" / "models--openai-community--gpt2" / "snapshots" / COMMIT
    assert {path.name for path in snapshot.iterdir()} == set(FILES)


def test_processes_that_start_together_download_once(hub):
    threads = [threading.Thread(target=download_folder, args=["gpt2"]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cached_bytes() == hub.files
    assert [path.rsplit("/", 1)[-1] for path, _ in hub.asked].count("model.safetensors") == 1


def expect_failed_download(*parts):
    """One line that names the file and a way out, no warnings before it, and no copy that would be taken for whole."""
    logger = logging.getLogger("huggingface_hub")
    logger.setLevel(logging.WARNING)                        # as in a new process
    warnings = logging.handlers.BufferingHandler(1000)
    logger.addHandler(warnings)
    outcome = inside(convert.main, "import", "gpt2", "--out=one")
    logger.removeHandler(warnings)
    assert not warnings.buffer
    one_line_error(outcome, f"{constants.ENDPOINT}/openai-community/gpt2/resolve/", "try again",
                   "python convert.py import FOLDER", *parts)
    assert not Path("one").exists()
    assert cached_folder("gpt2") is None


def test_a_download_that_is_cut_continues_where_it_was(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)         # what is counted as arrived
    hub.faults = ["cut", "cut"]
    convert_ok("import", "gpt2", "--out=one")
    starts = [start for path, start in hub.asked if path.endswith("model.safetensors")]
    assert starts == sorted(set(starts))
    assert len(starts) == 3
    assert cached_bytes() == hub.files


def test_a_download_that_cannot_be_finished_is_one_line(hub):
    hub.faults = ["cut"] + ["nothing"] * 20
    expect_failed_download("model.safetensors")
    hub.faults = []
    convert_ok("import", "gpt2", "--out=one")


def test_bytes_with_another_sha256_are_refused_and_not_kept(hub, cache):
    hub.faults = ["flipped"]
    expect_failed_download("model.safetensors", "SHA-256")
    assert len(list(cache.glob("*/blobs/*"))) == len(FILES) - 1
    convert_ok("import", "gpt2", "--out=one")
    assert cached_bytes() == hub.files


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_the_hub_lacks_is_named(hub, name):
    hub.absent = {name}
    expect_failed_download(name, "404")


def test_no_network_is_one_line(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket() as closed:                         # bound, but it does not listen
        closed.bind(("127.0.0.1", 0))
        set_endpoint(monkeypatch, f"http://127.0.0.1:{closed.getsockname()[1]}")
        expect_failed_download("config.json", "refused")


def test_a_cache_that_cannot_be_written_is_one_line(hub, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    expect_refusal("import", "gpt2", "--out=one", parts=[str(tmp_path / "file" / "hub"), "HF_HUB_CACHE"])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "writable"))     # the way out works
    convert_ok("import", "gpt2", "--out=one")


# -- folders, without a conversion first -------------------------------------------------------------------------------

@pytest.mark.parametrize("words", [["--ckpt=there"], ["--init_from=there"], ["--out_dir=there"]])
def test_sample_takes_a_hugging_face_folder(saved, words):
    theirs, _ = saved("llama")
    more = ["--start=The fox", "--temperature=0", "--max_new_tokens=8", "--json", "--device=cpu"]
    outcome = inside(sample.main, *words, *more)
    assert outcome.returncode == 0, outcome.stderr
    convert_ok("import", "there", "--out=ours")
    assert outcome.stdout == inside(sample.main, "--ckpt=ours", *more).stdout
    window = load_tokenizer(Path("there")).encode("The fox").tolist()
    for _ in range(8):
        window.append(theirs(torch.tensor([window])).logits[0, -1].argmax().item())
    assert json.loads(outcome.stdout)["tokens"] == window[-8:]


def test_train_takes_a_hugging_face_folder(saved, tmp_path):
    theirs, _ = saved("llama")
    (tmp_path / "tale.txt").write_text(TEXT, encoding="utf-8")
    write_set(tmp_path / "sets" / "tale", [tmp_path / "tale.txt"], "byte", 0.1)
    one_line_error(fine_tune(init_from="there"), "another tokenizer", "prepare.py --tokenizer=there")
    write_set(tmp_path / "sets" / "tale", [tmp_path / "tale.txt"], "there", 0.1)       # the way out
    outcome = fine_tune(init_from="there", max_iters=0)
    assert outcome.returncode == 0, outcome.stderr
    near(train.load("tuned")[0](ids(2, 24))[0], theirs(ids(2, 24)).logits)
    write_set(tmp_path / "sets" / "tale", [tmp_path / "tale.txt"], "there/tokenizer.json", 0.1)
    assert fine_tune(init_from="there").returncode == 0
    assert fine_tune(init_from="tuned", out_dir="more").returncode == 0                 # a run's folder


@pytest.mark.parametrize(("program", "word", "command"), [
    (train, "my book.txt", "python prepare.py 'my book.txt' --name=my_book && python train.py --dataset=my_book"),
    (train, "there", "python train.py --init_from=there --dataset=NAME"),
    (train, "old/ckpt.pt", "python train.py --init_from=old/ckpt.pt --dataset=NAME"),
    (train, "sets/tale", "python train.py --dataset=tale --data_dir="),
    (train, "sets/tale/meta.json", "python train.py --dataset=tale --data_dir="),
    (sample, "my book.txt", "python sample.py --start='FILE:my book.txt'"),
    (sample, "there", "python sample.py --ckpt=there"),
    (sample, "old/ckpt.pt", "python sample.py --ckpt=old/ckpt.pt"),
    (sample, "old", "python sample.py --out_dir=old"),
    (sample, "The fox", "python sample.py --start='The fox'"),
])
def test_a_word_that_is_no_config_file_gets_the_command_that_was_meant(saved, tmp_path, program, word, command):
    saved()
    Path("old").mkdir()
    Path("old/ckpt.pt").write_bytes(b"")
    Path("my book.txt").write_text(TEXT, encoding="utf-8")
    write_set(tmp_path / "sets" / "tale", [Path("my book.txt")], "byte", 0.1)
    one_line_error(inside(program.main, word), "neither a config file", command)
    assert "you may want" not in inside(train.main, "no such file.txt").stderr


# -- --init_from=gpt2 ------------------------------------------------------------------------------------------------

@pytest.fixture
def pretrained(cache, saved, tmp_path):
    """A tiny random `gpt2` in the cache, and a data set `tale` with its tokens. Returns the model of transformers."""
    theirs, folder = saved()
    fill_cache(cache, folder)
    (tmp_path / "tale.txt").write_text(TEXT, encoding="utf-8")
    convert_ok("import", "gpt2", "--out=imported")
    write_set(tmp_path / "sets" / "tale", [tmp_path / "tale.txt"], "imported/ckpt.pt", 0.1)
    return theirs


TUNE = dict(dataset="tale", data_dir="sets", out_dir="tuned", init_from="gpt2", batch_size=2, eval_iters=1, max_iters=2,
            eval_interval=2, log_interval=1, sample_tokens=4, optimizer="adamw", learning_rate=1e-3, device="cpu",
            dtype="float32", compile=False)


def fine_tune(*words, **settings):
    return inside(train.main, *flags(**TUNE | settings), *words)


def test_train_evaluates_pretrained_weights(pretrained, tmp_path):
    outcome = inside(train.main, ROOT / "config" / "gpt2.py", *flags(dataset="tale", data_dir="sets", device="cpu",
                                                                     dtype="float32", sample_tokens=0))
    assert outcome.returncode == 0, outcome.stderr
    val = torch.from_numpy(open_data(tmp_path / "sets" / "tale", 24)[0]["val"].astype("int64"))
    whole = (len(val) - 1) // 24
    x, y = val[:whole * 24].view(whole, 24), val[1:whole * 24 + 1].view(whole, 24)
    expected = torch.nn.functional.cross_entropy(pretrained(x).logits.flatten(0, 1), y.flatten()).item()
    assert f"val {expected:.4f}" in outcome.stdout
    assert not (tmp_path / "out" / "gpt2" / "ckpt.pt").exists()


def test_train_fine_tunes_pretrained_weights(pretrained):
    outcome = fine_tune(max_iters=0, dropout=0.2)
    assert outcome.returncode == 0, outcome.stderr
    ours = train.load("tuned")[0]
    assert ours.cfg.dropout == 0.2
    near(ours(ids(2, 24))[0], pretrained(ids(2, 24)).logits)
    assert fine_tune().returncode == 0
    assert torch.load("tuned/last.pt")["step"] == 2
    assert fine_tune(init_from="resume", max_iters=3).returncode == 0       # its last.pt is a run like any other


def test_the_configs_run(pretrained):
    for name in NAMES:
        said = (ROOT / "config" / f"{name.replace('-', '_')}.py").read_text()
        assert f'init_from = "{name}"' in said
        assert f"--init_from={name}" in said
    small = dict(TUNE, max_iters=1, gradient_accumulation_steps=2, out_dir="fine")
    for name in ("optimizer", "learning_rate", "init_from", "batch_size", "eval_interval"):
        small.pop(name)
    outcome = inside(train.main, ROOT / "config" / "finetune_shakespeare.py", *flags(**small))
    assert outcome.returncode == 0, outcome.stderr
    assert "the first loss should be" not in outcome.stdout             # it is that of trained weights
    assert train.load("fine")[0].cfg.learning_rate == 3e-5


def test_block_size_may_be_lowered(pretrained):
    outcome = fine_tune("--block_size=8", max_iters=0)
    assert outcome.returncode == 0, outcome.stderr
    assert "block_size 24 -> 8" in outcome.stdout
    ours = train.load("tuned")[0]
    assert ours.wpe.weight.shape == (8, 32)
    near(ours(ids(2, 8))[0], pretrained(ids(2, 8)).logits)
    # so of a path, learned positions or not
    assert fine_tune("--block_size=4", init_from="tuned/ckpt.pt", out_dir="less", max_iters=0).returncode == 0
    near(train.load("less")[0](ids(2, 4))[0], pretrained(ids(2, 4)).logits)
    one_line_error(fine_tune("--block_size=9", init_from="tuned/ckpt.pt", out_dir="more"), "block_size=9", "8")
    one_line_error(fine_tune("--block_size=0", out_dir="more"), "block_size=0")
    one_line_error(fine_tune("--n_layer=1", out_dir="more"), "n_layer=1", "2")


def test_block_size_of_a_rotary_model_may_be_lowered(pretrained, saved):
    theirs, folder = saved("llama", folder="llama")
    convert_ok("import", folder, "--out=ours")
    outcome = fine_tune("--block_size=8", init_from="ours/ckpt.pt", max_iters=0)
    assert outcome.returncode == 0, outcome.stderr
    near(train.load("tuned")[0](ids(2, 8))[0], theirs(ids(2, 8)).logits)


def test_another_tokenizer_than_the_pretrained_one_is_refused(pretrained, tmp_path):
    write_set(tmp_path / "sets" / "bytes", [tmp_path / "tale.txt"], "byte", 0.1)
    one_line_error(fine_tune(dataset="bytes"), "bytes", "tokenizer")


def test_sample_continues_a_prompt_with_pretrained_weights(pretrained):
    words = ["--init_from=gpt2", "--start=The fox", "--num_samples=2", "--max_new_tokens=12", "--device=cpu"]
    greedy = inside(sample.main, *words, "--temperature=0")
    assert greedy.returncode == 0, greedy.stderr
    tokenizer = load_tokenizer(cached_folder("gpt2"), {})
    window = tokenizer.encode("The fox").tolist()
    for _ in range(12):
        window.append(pretrained(torch.tensor([window])).logits[0, -1].argmax().item())
    assert tokenizer.decode(window) in greedy.stdout
    one_line_error(inside(sample.main, "--init_from=gpt2-medium", "--device=cpu"), "gpt2-medium", "HF_HUB_OFFLINE")
    one_line_error(inside(sample.main, "--init_from=gpt3"), "gpt2-xl")
    one_line_error(fine_tune(init_from="gpt2-huge"), "gpt2-huge", "gpt2-xl")


# The published config.json of each, as far as sizes go.
PUBLISHED = {"gpt2": (768, 12, 12, 124_439_808), "gpt2-medium": (1024, 24, 16, 354_823_168),
             "gpt2-large": (1280, 36, 20, 774_030_080), "gpt2-xl": (1600, 48, 25, 1_557_611_200)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_the_four_sizes(name):
    """Without allocating: from a published config.json to our settings, to the model, and the file's own count."""
    n_embd, n_layer, n_head, expected = PUBLISHED[name]
    config, vocab_size = convert.settings_from_hf(dict(
        activation_function="gelu_new", architectures=["GPT2LMHeadModel"], attn_pdrop=0.1, bos_token_id=50256,
        embd_pdrop=0.1, eos_token_id=50256, initializer_range=0.02, layer_norm_epsilon=1e-05, model_type="gpt2",
        n_ctx=1024, n_embd=n_embd, n_head=n_head, n_layer=n_layer, n_positions=1024, n_special=0, output_past=True,
        predict_special_tokens=True, resid_pdrop=0.1, summary_activation=None, summary_first_dropout=0.1,
        summary_proj_to_labels=True, summary_type="cls_index", summary_use_proj=True, vocab_size=50257,
        task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}}))
    with torch.device("meta"):
        model = GPT(Config(**config), vocab_size)
        theirs = GPT2LMHeadModel(GPT2Config(n_embd=n_embd, n_layer=n_layer, n_head=n_head))
    assert sum(p.numel() for p in model.parameters()) == expected
    layout = convert.gpt2_layout(config, vocab_size, 4 * n_embd)
    assert {name: weight.shape for name, weight in layout.items()} == {
        name: tuple(p.shape) for name, p in theirs.named_parameters()}
    assert f"{expected:,}" in (ROOT / "config" / f"{name.replace('-', '_')}.py").read_text()
