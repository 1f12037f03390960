"""Models of other programs: a Hugging Face directory or a GGUF file of GPT-2, Llama or Qwen3, or
nanoGPT's ckpt.pt, to a checkpoint of Inkling; and a checkpoint to a Hugging Face directory, to a
GGUF file for llama.cpp and what is built on it, or to one web page that runs it.

    python convert.py page out/book/ckpt.pt --out=book.html
    python convert.py import gpt2       # or gpt2-medium, gpt2-large, gpt2-xl
    python convert.py import path/to/folder --out=out/llama
    python convert.py import nanoGPT/out/ckpt.pt --out=out/nano
    python convert.py import model.gguf --out=out/model
    python convert.py export out/book/ckpt.pt --out=book
    python convert.py gguf out/book/ckpt.pt --out=book.gguf

The folder to import holds config.json, model.safetensors and tokenizer.json; transformers loads the
folder that an export writes, tokenizer included. Weights keep their bytes in both directions:
matrices are only split, joined and transposed; a GGUF file holds fewer bits of them if --type says
so. What one side has and the other cannot express is refused by name, never dropped. Any checkpoint
can become a page; a directory or a GGUF file needs the switches of GPT-2, Llama or Qwen3, which a
model of config/portable.py has. A name is looked up in the local Hugging Face cache (HF_HOME,
HF_HUB_CACHE) and downloaded to it when it is not there; HF_ENDPOINT names another server.
"""

import json
import os
import re
import shutil
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from inkling.checkpoint import ForeignCheckpoint, RunFolder, load_checkpoint
from inkling.cli import FilePath, UserError, parse, run
from inkling.files import atomic_write
from inkling.gguf import (
    read_gguf,
    settings_from_gguf,
    tokenizer_from_gguf,
    weights_from_gguf,
    write_gguf,
)
from inkling.hints import closest, files_near, nearest_first, run_meant, there_is
from inkling.huggingface import (
    NAMES,
    load_tokenizer,
    model_folder,
    read_json,
    refuse_pointer,
    token_text,
    tokenizer_to_json,
)
from inkling.output import outlive_output
from inkling.tokenizer import Tokenizer

EXPORTED = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
            "tokenizer_config.json"}


@dataclass
class Options:
    # -- what is written
    out: FilePath = ""                  # import: folder of the run, empty: out/NAME; export: the
                                        # directory to write; gguf, page: the file
    tokenizer: FilePath = ""            # import: the model's tokenizer, if it is not in the
                                        # directory: byte, a name that tiktoken knows, or the path
                                        # of a meta.json or ckpt.pt of Inkling
    type: Literal["f32", "f16", "q8_0"] = "f32"  # gguf: of the matrices' weights; q8_0: 8 bits and
                                        # a scale for every 32 of them
    bits: Literal[8, 16] = 8            # page: of each weight


FIRST_IN_HELP = ("out", "bits", "type", "tokenizer")


# -- architectures ---------------------------------------------------------------------------------
# Dicts of settings are called config when they are ours, and hf when they are those of config.json.

TITLES = {"gpt2": "GPT-2", "llama": "Llama", "qwen3": "Qwen3"}

# The value that a switch of the model must have, since the architecture has nothing else. A switch
# that is not listed can be converted, whatever its value.
FIXED_IN_ALL = dict(embed_norm=False, head_bias=False, logit_cap=0.0, shortcuts=False, ngrams=0)
FIXED = {
    "gpt2": FIXED_IN_ALL | dict(positions="learned", norm="layernorm", head_dim=0, qk_norm=False),
    "llama": FIXED_IN_ALL | dict(positions="rope", rope_fraction=1.0, norm="rmsnorm", mlp="swiglu",
                                 qk_norm=False),
    "qwen3": FIXED_IN_ALL | dict(positions="rope", rope_fraction=1.0, norm="rmsnorm", mlp="swiglu",
                                 qk_norm=True, bias=False),
}

# Our settings that are sizes, and their names in config.json.
SIZES = {
    "gpt2": dict(block_size="n_positions", n_layer="n_layer", n_head="n_head", n_embd="n_embd"),
    "llama": dict(block_size="max_position_embeddings", n_layer="num_hidden_layers",
                  n_head="num_attention_heads", n_embd="hidden_size",
                  n_kv_head="num_key_value_heads", ffn_dim="intermediate_size"),
}
SIZES["qwen3"] = SIZES["llama"]

# GPT-2's activation_function, and our mlp. Of several names for one mlp, an export writes the
# first.
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu",
               "relu": "relu", "relu2": "relu2"}

# Switches of ours for weights that an architecture always has: what a model lacks is exported as
# zeros or ones.
OPTIONAL = ("bias", "qkv_bias", "norm_gain", "qk_norm_gain")

# Fields of config.json that say nothing about what the weights compute in evaluation: names and
# notes, what training did, how generate() is to sample, and what calls are to return.
HARMLESS = {
    "architectures", "auto_map", "bad_words_ids", "bos_token", "chunk_size_feed_forward",
    "diversity_penalty", "do_sample", "dtype", "early_stopping", "encoder_no_repeat_ngram_size",
    "eos_token", "exponential_decay_length_penalty", "finetuning_task", "gradient_checkpointing",
    "id2label", "initializer_range", "inkling", "is_decoder", "is_llama_config", "label2id",
    "length_penalty", "max_length", "max_new_tokens", "max_sequence_length", "min_length",
    "model_max_length", "model_type", "n_special", "name_or_path", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_labels", "num_return_sequences", "output_past",
    "predict_special_tokens", "prefix", "pretraining_tp", "problem_type", "remove_invalid_values",
    "reorder_and_upcast_attn", "repetition_penalty", "return_dict", "seq_length",
    "task_specific_params", "temperature", "tf_legacy_loss", "tokenizer_class", "top_k", "top_p",
    "torch_dtype", "torchscript", "transformers.js_config", "transformers_version", "typical_p",
    "use_bfloat16", "use_cache", "use_flash_attention"}
HARMLESS_KINDS = re.compile(r"_.*|unsloth_.*|summary_.*|output_.*|return_.*|.*_token_ids?|.*suppress_tokens"
                            r"|(.*_)?(dropout|pdrop)|neftune_.*|(.*_)?attn_implementation|tokenizer_.*")


# -- config.json to our settings -------------------------------------------------------------------

class Fields:
    """Reads the fields of config.json, and collects in `refused` each one that has no counterpart
    here."""

    def __init__(self, hf: dict):
        self.hf = dict(hf)
        self.used = set()
        self.refused = []

    def get(self, name: str, default=None):
        """The field's value; a field that is null means the default."""
        self.used.add(name)
        value = self.hf.get(name)
        return default if value is None else value

    def choice(self, name: str, *allowed):
        """A value among `allowed`, whose first is the default."""
        value = self.get(name, allowed[0])
        if value in allowed:
            return value
        self.refused.append(f"{name}={value!r}")
        return allowed[0]

    def size(self, name: str, default: int | None = None) -> int:
        return self._positive(name, self.get(name, default), (int,))

    def number(self, name: str, default: float) -> float:
        return self._positive(name, self.get(name, default), (int, float))

    def _positive(self, name: str, value, types: tuple):
        if type(value) in types and 0 < value < 2**31:
            return value
        self.refused.append(f"{name}={value!r}")
        return 1

    def refuse_unread(self):
        """Whatever was not read could change what the model computes, unless it is off or
        harmless."""
        for name, value in self.hf.items():
            harmless = name in HARMLESS or HARMLESS_KINDS.fullmatch(name)
            is_off = value is None or value is False or value in ([], {})
            if name not in self.used and not harmless and not is_off:
                self.refused.append(f"{name}={value!r}")


def settings_from_hf(hf: dict) -> tuple:
    """(config, vocab_size): our settings of the model that config.json's content describes, with
    every bias and gain of its architecture. Raises ValueError naming each field that has no
    counterpart here."""
    kind = hf.get("model_type")
    if kind not in FIXED:
        raise ValueError(f"model_type={kind!r} is none of {', '.join(FIXED)}")
    fields = Fields(hf)
    config = FIXED[kind] | dict(qkv_bias="auto", norm_gain=True, qk_norm_gain=FIXED[kind]["qk_norm"],
                                ffn_dim=0, pad_vocab_to=1, init="gpt2", dropout=0.0, attn_dropout=False)
    vocab_size = fields.size("vocab_size")
    for ours, theirs in SIZES[kind].items():
        if ours != "n_kv_head":         # its default is n_head
            config[ours] = fields.size(theirs)
    config |= READERS[kind](fields, config)

    heads = config["n_head"]
    kv_heads = config["n_kv_head"] or heads
    head_dim = config["head_dim"] or config["n_embd"] / heads
    multiple = 2 if config["positions"] == "rope" else 1        # rope turns pairs of numbers
    if head_dim % multiple or heads % kv_heads:
        fields.refused.append(f"{heads} heads of {head_dim:g} dimensions, {kv_heads} of keys and "
                              f"values, in a width of {config['n_embd']}")
    fields.refuse_unread()
    if fields.refused:
        named = ", ".join(fields.refused)
        raise ValueError(f"Inkling's {TITLES[kind]} has no counterpart of {named}"[:500])
    return config, vocab_size


def gpt2_settings(fields: Fields, config: dict) -> dict:
    fields.choice("n_ctx", config["block_size"])
    fields.choice("scale_attn_weights", True)
    return dict(
        n_kv_head=0,
        bias=True,
        ffn_dim=fields.size("n_inner") if fields.get("n_inner") else 0,
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        mlp=ACTIVATIONS[fields.choice("activation_function", *ACTIVATIONS)],
        tie_weights=fields.choice("tie_word_embeddings", True, False),
    )


def llama_settings(fields: Fields, config: dict) -> dict:
    attention_bias = fields.choice("attention_bias", False, True)
    mlp_bias = fields.choice("mlp_bias", False, True)
    if mlp_bias and not attention_bias:
        fields.refused.append("mlp_bias=True with attention_bias=False")
    head_dim = fields.size("head_dim") if fields.get("head_dim") else 0
    return rotary_settings(fields, config) | dict(
        n_kv_head=fields.size("num_key_value_heads", config["n_head"]),
        head_dim=0 if is_usual_width(head_dim, config) else head_dim,
        bias=mlp_bias,
        qkv_bias="auto" if attention_bias == mlp_bias else True,
    )


def qwen3_settings(fields: Fields, config: dict) -> dict:
    fields.choice("attention_bias", False)
    if fields.choice("use_sliding_window", False) is False:
        fields.get("sliding_window")    # without use_sliding_window, these two do nothing
        fields.get("max_window_layers")
    windows = [layer for layer in fields.get("layer_types", []) if layer != "full_attention"]
    if windows:
        fields.refused.append(f"layer_types={windows[0]!r}")
    # transformers' Qwen3 has other defaults than its Llama: one for a field that is not there, and another for a null.
    kv_heads = config["n_head"] if "num_key_value_heads" in fields.hf else 32
    head_dim = fields.size("head_dim", 128)
    return rotary_settings(fields, config) | dict(
        n_kv_head=fields.size("num_key_value_heads", kv_heads),
        head_dim=0 if is_usual_width(head_dim, config) else head_dim,
    )


READERS = {"gpt2": gpt2_settings, "llama": llama_settings, "qwen3": qwen3_settings}


def rotary_settings(fields: Fields, config: dict) -> dict:
    """Our settings for the fields that Llama and Qwen3 share."""
    fields.choice("hidden_act", "silu")
    fields.choice("partial_rotary_factor", 1)
    return read_rope(fields, config["block_size"]) | dict(
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        tie_weights=fields.choice("tie_word_embeddings", False, True),
    )


def is_usual_width(head_dim: int, config: dict) -> bool:
    return head_dim * config["n_head"] == config["n_embd"]


# What a rope_type needs, by the names in config.json, and our settings for it.
ROPE_FIELDS = {"linear": {"factor": "rope_factor"},
               "llama3": {"factor": "rope_factor", "low_freq_factor": "rope_low_freq",
                          "high_freq_factor": "rope_high_freq",
                          "original_max_position_embeddings": "rope_context"}}


def read_rope(fields: Fields, block_size: int) -> dict:
    """Our settings of the rotary angles: transformers 5 has them in rope_parameters, transformers 4
    beside and in rope_scaling. Any scaling but linear and Llama 3's is refused."""
    rope = dict(fields.get("rope_scaling", {})) | dict(fields.get("rope_parameters", {}))
    if theta := rope.pop("rope_theta", None):
        fields.hf["rope_theta"] = theta
    types = {rope.pop(name, "default") for name in ("rope_type", "type")} - {"default"}
    kind = types.pop() if len(types) == 1 else "default"
    factor = rope.pop("partial_rotary_factor", 1)
    config = {"rope_theta": float(fields.number("rope_theta", 10_000.0))}
    for theirs, ours in ROPE_FIELDS.get(kind, {}).items():
        default = block_size if ours == "rope_context" else None
        value = rope.pop(theirs, default)
        if type(value) not in (int, float) or not 0 < value < 2**31:
            types.add(kind)
            continue
        config[ours] = int(value) if ours == "rope_context" else float(value)
    known = kind == "default" or kind in ROPE_FIELDS
    if kind != "default":
        rope.pop("original_max_position_embeddings", None)      # linear scaling does not use it
        config["rope_scaling"] = kind
    if not known or types or factor != 1 or any(rope.values()):
        scaling = fields.get("rope_parameters") or fields.get("rope_scaling")
        fields.refused.append(f"rope_parameters={scaling}")
    return config


# -- our settings to config.json -------------------------------------------------------------------

def settings_to_hf(config: dict, width: int, vocab_size: int) -> dict:
    """config.json's content for our settings. width: of the MLP. Raises ValueError naming every
    switch that the architecture lacks."""
    kind = architecture(config)
    refuse_switches(kind, config)
    sizes = config | dict(ffn_dim=width, n_kv_head=config["n_kv_head"] or config["n_head"])
    hf = {"model_type": kind, "vocab_size": vocab_size, "bos_token_id": None, "eos_token_id": None,
          "tie_word_embeddings": config["tie_weights"], "dtype": "float32"}
    for ours, theirs in SIZES[kind].items():
        hf[theirs] = sizes[ours]
    hf["inkling"] = {name: config.get(name, False) for name in OPTIONAL}
    if kind == "gpt2":
        return hf | gpt2_fields(config, width)
    return hf | (llama_fields(config) if kind == "llama" else qwen3_fields(config))


def architecture(config: dict) -> str:
    """The architecture that is nearest to our settings."""
    if config["positions"] == "learned":
        return "gpt2"
    return "qwen3" if config["qk_norm"] else "llama"


def refuse_switches(kind: str, config: dict):
    """Raise ValueError naming the switches that the architecture does not have."""
    refused = [name for name, value in FIXED[kind].items() if config.get(name, value) != value]
    if kind == "gpt2" and config["mlp"] not in ACTIVATIONS.values():
        refused.append("mlp")
    if kind == "gpt2" and config["n_kv_head"] not in (0, config["n_head"]):
        refused.append("n_kv_head")
    if kind == "qwen3" and config["qkv_bias"] is True:
        refused.append("qkv_bias")
    if refused:
        named = ", ".join(f"{name}={config[name]}" for name in refused)
        raise ValueError(f"{TITLES[kind]} (positions={config['positions']}) has no counterpart of "
                         f"{named}: a web page has (python convert.py page CKPT.pt --out=NAME.html), and a model "
                         "trained with config/portable.py has none of these")


def gpt2_fields(config: dict, width: int) -> dict:
    names = [theirs for theirs, ours in ACTIVATIONS.items() if ours == config["mlp"]]
    return dict(
        architectures=["GPT2LMHeadModel"],
        activation_function=names[0],
        n_inner=width,
        layer_norm_epsilon=config["norm_eps"],
        resid_pdrop=config["dropout"],
        embd_pdrop=config["dropout"],
        attn_pdrop=config["dropout"] if config["attn_dropout"] else 0.0,
    )


def llama_fields(config: dict) -> dict:
    theta = config["rope_theta"]        # transformers 4 reads it by itself, 5 in rope_parameters
    kind = config.get("rope_scaling", "none")
    rope = {"rope_type": "default" if kind == "none" else kind}
    rope |= {theirs: config[ours] for theirs, ours in ROPE_FIELDS.get(kind, {}).items()}
    scaling = {} if kind == "none" else {"rope_scaling": rope}
    return scaling | dict(
        architectures=["LlamaForCausalLM"],
        hidden_act="silu",
        rms_norm_eps=config["norm_eps"],
        head_dim=head_width(config),
        attention_bias=config["bias"] or config["qkv_bias"] is True,
        mlp_bias=config["bias"],
        attention_dropout=config["dropout"] if config["attn_dropout"] else 0.0,
        rope_theta=theta,
        rope_parameters={"rope_theta": theta} | rope,
    )


def qwen3_fields(config: dict) -> dict:
    fields = llama_fields(config) | dict(architectures=["Qwen3ForCausalLM"], use_sliding_window=False)
    del fields["mlp_bias"]              # there is no such field
    return fields


def head_width(config: dict) -> int:
    return config.get("head_dim") or config["n_embd"] // config["n_head"]


# -- names and shapes of the weights ---------------------------------------------------------------

class Weight(NamedTuple):
    """A weight of an architecture. GPT-2 stores its matrices (in, out); Inkling and Llama store
    them (out, in)."""
    ours: list                          # names of our weights that it joins, one after another
    shape: tuple                        # there
    transposed: bool = False


def linear(theirs: str, ours: list, inputs: int, outputs: int, bias: bool,
           transposed: bool = False) -> dict:
    """A linear layer, by the names that its weights have there."""
    shape = (inputs, outputs) if transposed else (outputs, inputs)
    weights = {f"{theirs}.weight": Weight([f"{name}.weight" for name in ours], shape, transposed)}
    if bias:
        weights[f"{theirs}.bias"] = Weight([f"{name}.bias" for name in ours], (outputs,))
    return weights


def norm(theirs: str, ours: str, width: int, bias: bool = False) -> dict:
    weights = {f"{theirs}.weight": Weight([f"{ours}.weight"], (width,))}
    if bias:
        weights[f"{theirs}.bias"] = Weight([f"{ours}.bias"], (width,))
    return weights


def gpt2_layout(config: dict, rows: int, width: int) -> dict:
    """Every weight of a GPT-2, by its name there, the embedding first. rows: of the embedding;
    width: of the MLP."""
    n_embd = config["n_embd"]
    conv1d = partial(linear, bias=True, transposed=True)        # GPT-2's name of a linear layer
    layout = {"transformer.wte.weight": Weight(["wte.weight"], (rows, n_embd)),
              "transformer.wpe.weight": Weight(["wpe.weight"], (config["block_size"], n_embd))}
    for layer in range(config["n_layer"]):
        theirs = f"transformer.h.{layer}"
        ours = f"blocks.{layer}"
        qkv = [f"{ours}.attn.{name}" for name in ("q", "k", "v")]
        layout |= conv1d(f"{theirs}.attn.c_attn", qkv, n_embd, 3 * n_embd)
        layout |= conv1d(f"{theirs}.attn.c_proj", [f"{ours}.attn.out"], n_embd, n_embd)
        layout |= conv1d(f"{theirs}.mlp.c_fc", [f"{ours}.mlp.up"], n_embd, width)
        layout |= conv1d(f"{theirs}.mlp.c_proj", [f"{ours}.mlp.down"], width, n_embd)
        layout |= norm(f"{theirs}.ln_1", f"{ours}.norm1", n_embd, bias=True)
        layout |= norm(f"{theirs}.ln_2", f"{ours}.norm2", n_embd, bias=True)
    layout |= norm("transformer.ln_f", "norm", n_embd, bias=True)
    if not config["tie_weights"]:
        layout["lm_head.weight"] = Weight(["head.weight"], (rows, n_embd))
    return layout


def llama_layout(config: dict, rows: int, width: int) -> dict:
    """Every weight of a Llama, or of a Qwen3, likewise."""
    n_embd = config["n_embd"]
    head_dim = head_width(config)
    q_dim = head_dim * config["n_head"]
    kv_dim = head_dim * (config["n_kv_head"] or config["n_head"])
    mlp_bias = config["bias"]
    attention_bias = config["bias"] or config["qkv_bias"] is True
    layout = {"model.embed_tokens.weight": Weight(["wte.weight"], (rows, n_embd))}
    for layer in range(config["n_layer"]):
        theirs = f"model.layers.{layer}"
        attention = f"{theirs}.self_attn"
        mlp = f"{theirs}.mlp"
        ours = f"blocks.{layer}"
        layout |= linear(f"{attention}.q_proj", [f"{ours}.attn.q"], n_embd, q_dim, attention_bias)
        layout |= linear(f"{attention}.k_proj", [f"{ours}.attn.k"], n_embd, kv_dim, attention_bias)
        layout |= linear(f"{attention}.v_proj", [f"{ours}.attn.v"], n_embd, kv_dim, attention_bias)
        layout |= linear(f"{attention}.o_proj", [f"{ours}.attn.out"], q_dim, n_embd, attention_bias)
        if config["qk_norm"]:           # Qwen3's
            layout[f"{attention}.q_norm.weight"] = Weight([f"{ours}.attn.q_gain"], (head_dim,))
            layout[f"{attention}.k_norm.weight"] = Weight([f"{ours}.attn.k_gain"], (head_dim,))
        layout |= linear(f"{mlp}.gate_proj", [f"{ours}.mlp.gate"], n_embd, width, mlp_bias)
        layout |= linear(f"{mlp}.up_proj", [f"{ours}.mlp.up"], n_embd, width, mlp_bias)
        layout |= linear(f"{mlp}.down_proj", [f"{ours}.mlp.down"], width, n_embd, mlp_bias)
        layout |= norm(f"{theirs}.input_layernorm", f"{ours}.norm1", n_embd)
        layout |= norm(f"{theirs}.post_attention_layernorm", f"{ours}.norm2", n_embd)
    layout |= norm("model.norm", "norm", n_embd)
    if not config["tie_weights"]:
        layout["lm_head.weight"] = Weight(["head.weight"], (rows, n_embd))
    return layout


LAYOUTS = {"gpt2": gpt2_layout, "llama": llama_layout, "qwen3": llama_layout}


def has_weight(name: str, config: dict) -> bool:
    """Whether a model of ours with these settings has the weight `name`."""
    *_, module, part = name.split(".")
    if module.startswith("norm"):
        return config["norm_gain"] and (part == "weight" or config["bias"])
    if part in ("q_gain", "k_gain"):
        return config["qk_norm"] and config.get("qk_norm_gain", False)
    if part == "weight":
        return True
    if module in ("q", "k", "v") and config["qkv_bias"] != "auto":
        return config["qkv_bias"]
    return config["bias"]


def neutral(name: str, shape) -> torch.Tensor:
    """What a weight that a model lacks would hold: a gain is 1, a bias 0."""
    return torch.ones(shape) if name.endswith(("weight", "_gain")) else torch.zeros(shape)


# -- weights from there ----------------------------------------------------------------------------

def model_from_hf(hf: dict, tensors: dict) -> tuple:
    """(config, tensors, vocab_size) of ours, from config.json's content and the tensors by name.
    float32 keeps its bytes, 16-bit weights become float32. Raises ValueError when they do not fit
    each other, or Inkling."""
    config, vocab_size = settings_from_hf(hf)
    kind = hf["model_type"]
    if config["n_layer"] > len(tensors):
        raise ValueError(f"its {len(tensors)} tensors are not those of {config['n_layer']} layers")
    width = config["ffn_dim"] or 4 * config["n_embd"]
    layout = LAYOUTS[kind](config, vocab_size, width)
    tensors = full_names(kind, tensors)
    if config["tie_weights"]:
        drop_tied_head(tensors, embedding=next(iter(layout)))
    check_tensors(layout, tensors)
    ours = split_tensors(layout, tensors)
    config = switch_off_neutral(config, hf, ours)
    if config["tie_weights"]:
        ours["head.weight"] = ours["wte.weight"]
    return config, ours, vocab_size


def full_names(kind: str, tensors: dict) -> dict:
    """The tensors without the constants that old versions stored with the weights, by their full
    names: the bare models, as OpenAI's are stored, leave out the prefix."""
    prefix = "transformer." if kind == "gpt2" else "model."
    full = {}
    for name, tensor in tensors.items():
        if re.search(r"\.attn\.(bias|masked_bias)$|rotary_emb\.inv_freq$", name):
            continue
        if not name.startswith((prefix, "lm_head.")):
            name = prefix + name
        full[name] = tensor
    return full


def drop_tied_head(tensors: dict, embedding: str):
    """Some programs store a tied matrix twice."""
    head = tensors.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, tensors.get(embedding, torch.empty(0))):
        raise ValueError("tie_word_embeddings=True, but lm_head.weight differs from the embedding")


def check_tensors(layout: dict, tensors: dict):
    """Raise ValueError naming the tensors that are not what the layout says."""
    wrong = [f"{name} is missing" for name in layout if name not in tensors]
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if name not in layout:
            wrong.append(f"{name} is not known")
        elif shape != layout[name].shape:
            wrong.append(f"{name} is {shape}, not {layout[name].shape}")
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            wrong.append(f"{name} is of {tensor.dtype}")
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(f"the weights do not fit config.json: {'; '.join(wrong[:4])}{more}")


def split_tensors(layout: dict, tensors: dict) -> dict:
    """Our weights. Takes each tensor out of `tensors`, so that a large model is not in memory
    twice."""
    ours = {}
    for name, weight in layout.items():
        tensor = tensors.pop(name).float()
        if weight.transposed:
            tensor = tensor.T
        pieces = tensor.chunk(len(weight.ours))
        for our_name, piece in zip(weight.ours, pieces, strict=True):
            ours[our_name] = piece.contiguous()
    return ours


def switch_off_neutral(config: dict, hf: dict, ours: dict) -> dict:
    """Our settings for these weights. Weights that a model of ours lacked were exported as neutral,
    and the switches beside them: while they are still neutral, they are taken out of `ours` again,
    and the model gets its own switches. Raises ValueError when weights remain that no switches can
    express."""
    stored = dict(hf.get("inkling") or {})
    exported = {name: stored[name] for name in OPTIONAL if name in stored}
    for switches in (config | exported, config):
        extra = [name for name in ours if not has_weight(name, switches)]
        if all(torch.equal(ours[name], neutral(name, ours[name].shape)) for name in extra):
            for name in extra:
                del ours[name]
            return switches
    raise ValueError("Inkling's Llama has no counterpart of attention_bias=True with "
                     "mlp_bias=False, but for biases of queries, keys and values alone")


# -- weights to there ------------------------------------------------------------------------------

def model_to_hf(config: dict, tensors: dict, vocab_size: int) -> tuple:
    """(config.json's content, tensors by their name there) of a model of ours, without the rows
    that pad its vocabulary. Raises ValueError naming the switches that its architecture lacks."""
    rows = tensors["wte.weight"].size(0)
    width = tensors["blocks.0.mlp.up.weight"].size(0)
    hf = settings_to_hf(config, width, vocab_size)
    if config["n_layer"] > len(tensors):
        raise ValueError(f"its {len(tensors)} tensors are not those of {config['n_layer']} layers")
    layout = LAYOUTS[hf["model_type"]](config, rows, width)
    needed = {"head.weight"}
    for weight in layout.values():
        needed |= {name for name in weight.ours if has_weight(name, config)}
    if needed != set(tensors):
        differing = sorted(needed ^ set(tensors))
        raise ValueError(f"its weights do not fit its settings: {differing[:4]}")
    theirs = {}
    for name, weight in layout.items():
        tensor = join_tensors(name, weight, tensors)
        if weight.ours[0] in ("wte.weight", "head.weight"):
            tensor = tensor[:vocab_size]
        theirs[name] = tensor.contiguous()
    return hf, theirs


def join_tensors(name: str, weight: Weight, tensors: dict) -> torch.Tensor:
    """One tensor as it is there; a bias or gain that the model lacks is neutral."""
    pieces = []
    for ours in weight.ours:
        if ours in tensors:
            pieces.append(tensors[ours])
        else:
            pieces.append(neutral(ours, weight.shape[0] // len(weight.ours)))
    tensor = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
    if weight.transposed:
        tensor = tensor.T
    shape = tuple(tensor.shape)
    if shape != weight.shape:
        raise ValueError(f"its weights do not fit its settings: {weight.ours[0]} gives {name} "
                         f"{shape}, not {weight.shape}")
    return tensor


# -- import ----------------------------------------------------------------------------------------

def import_safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise UserError("reading and writing model.safetensors needs the package safetensors: "
                        "pip install safetensors")
    return safetensors


def weight_files(folder: Path) -> list:
    """The files that hold the weights in `folder`, which are those that transformers reads; [] when
    any is missing."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return indexed_files(index)
    return []


def indexed_files(index: Path) -> list:
    """The files that an index names; [] when any is missing."""
    names = set(dict(read_json(index).get("weight_map") or {}).values())
    if any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise UserError(f"{index} names files outside its folder")
    paths = [index.parent / name for name in sorted(names)]
    return paths if all(path.is_file() for path in paths) else []


def load_tensors(folder: Path) -> dict:
    """Every tensor of a Hugging Face directory by its name there, on the CPU."""
    paths = weight_files(folder)
    if not paths:
        raise UserError(f"{folder} holds no complete model.safetensors (nor pytorch_model.bin){other_weights(folder)}")
    tensors = {}
    for path in paths:
        content = load_weight_file(path)
        if twice := tensors.keys() & content.keys():
            raise UserError(f"{path} holds {min(twice)} again, which is in an earlier part, too")
        tensors |= content
    return tensors


def other_weights(folder: Path) -> str:
    """What to do about weights in another form, or about none."""
    if (folder / "adapter_config.json").is_file():
        return ", but an adapter of peft: merge it into its model first (merge_and_unload, save_pretrained)"
    if found := sorted(folder.glob("*.gguf")):
        return f", but {found[0].name}: python convert.py import {found[0]}"
    for pattern in ("tf_model.h5", "flax_model.msgpack", "*.safetensors", "*.bin", "*.pth"):
        if found := sorted(folder.glob(pattern)):
            return (f", but {found[0].name}: let transformers load it and write a folder with "
                    "save_pretrained")
    return ": is the download finished?"


def load_weight_file(path: Path) -> dict:
    """The tensors in one file."""
    refuse_pointer(path)
    load_file = load_pickle if path.suffix == ".bin" else import_safetensors().torch.load_file
    try:
        return load_file(path)
    except Exception as error:          # a damaged file can fail anywhere in these libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise UserError(f"{path} is damaged or holds no weights ({reason}); nothing was loaded")


def load_pickle(path: Path) -> dict:
    """The tensors in a pickle, read with weights_only=True, so that nothing in it can run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise ValueError("it holds more than tensors")
    return content


def find_folder(source: str) -> Path:
    """The directory that holds the model: a folder, or the cache's of one of NAMES."""
    folder = Path(source)
    if source in NAMES and not (folder / "config.json").is_file():
        return model_folder(source)
    if os.path.isfile(source):
        raise UserError(f"{source} is a file: name the folder that holds it with its config.json, a "
                        ".gguf file, or a ckpt.pt of nanoGPT")
    if not os.path.isdir(source):
        near = there_is(source, files_near(source))
        raise UserError(f"{source} is neither a folder nor one of {', '.join(nearest_first(source, NAMES))}{near}")
    if not (folder / "config.json").is_file() and (folder / "ckpt.pt").is_file():
        raise UserError(f"{folder} holds a run of Inkling already: python sample.py --out_dir={folder}; nanoGPT's is "
                        f"named by its file: {folder / 'ckpt.pt'}")
    if not (folder / "config.json").is_file() and (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds no model{other_weights(folder)}")
    return folder


def import_model(source: str, tokenizer: str = "") -> dict:
    """A checkpoint's content with the weights of a Hugging Face directory, of one of NAMES, of a GGUF
    file, or of a ckpt.pt of nanoGPT. Raises UserError about what is not there, is damaged, or has no counterpart
    in Inkling."""
    source = str(source)
    if tokenizer == "char":
        raise UserError("--tokenizer=char: a char tokenizer comes from a text; name the meta.json "
                        "of its data set")
    if source.endswith(".pt"):
        return import_checkpoint(source, tokenizer)
    if source.endswith(".gguf") and not os.path.isdir(source):
        return import_gguf_file(source, tokenizer)
    folder = find_folder(source)
    hf = read_json(folder / "config.json")
    try:
        settings_from_hf(hf)            # says in a moment what needs no gigabytes
        chosen = choose_tokenizer(folder, hf, tokenizer)
        config, tensors, rows = model_from_hf(hf, load_tensors(folder))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{folder}: {error}")
    return checkpoint_of(folder, config, tensors, rows, chosen)


def checkpoint_of(source, config: dict, tensors: dict, rows: int, tokenizer: Tokenizer) -> dict:
    """A checkpoint's content. rows: of the embedding; those beyond the vocabulary stand for no
    token."""
    vocab_size = tokenizer.vocab_size
    if vocab_size > rows:
        raise UserError(f"{source}: the tokenizer has {vocab_size:,} tokens, the model only "
                        f"{rows:,}: name its own with --tokenizer")
    if vocab_size < rows:
        config["pad_vocab_to"] = rows
    return {"config": config, "vocab_size": vocab_size, "tokenizer": tokenizer.stored,
            "model": tensors, "step": 0}


def choose_tokenizer(folder: Path, hf: dict, name: str) -> Tokenizer:
    """The directory's own tokenizer, or the named one, which must have the model's vocabulary."""
    if not name:
        return load_tokenizer(folder, hf)
    tokenizer = Tokenizer.build(name, "")
    check_vocabulary(folder, name, tokenizer, hf["vocab_size"])
    try:
        own = load_tokenizer(folder, hf)
    except UserError:                   # none, or one that cannot be used
        return tokenizer
    if own.pieces[:tokenizer.vocab_size] != tokenizer.pieces[:own.vocab_size]:
        raise UserError(f"--tokenizer={name} has other tokens than the tokenizer in {folder}: leave "
                        "the flag out")
    return tokenizer


# What programs round a vocabulary up to a multiple of: GPT-2's 50,257 tokens have 50,304 rows in
# nanoGPT.
PADDED_TO = (1, 8, 16, 32, 64, 128, 256, 512)


def check_vocabulary(source, name: str, tokenizer: Tokenizer, rows: int):
    """Raise UserError unless a model with so many rows may have the named tokenizer."""
    size = tokenizer.vocab_size
    if rows not in {-(-size // multiple) * multiple for multiple in PADDED_TO}:
        raise UserError(f"--tokenizer={name} has {size:,} tokens, but the model in {source} has "
                        f"{rows:,}: name the tokenizer that it was trained with")


# -- GGUF ------------------------------------------------------------------------------------------

def import_gguf_file(path: str, tokenizer: str = "") -> dict:
    """A checkpoint's content from a GGUF file, with its own tokenizer or the named one."""
    if not os.path.isfile(path):
        raise UserError(f"no file {path}")
    fields, theirs = read_gguf(Path(path))
    try:
        hf = settings_from_gguf(fields, theirs)
        settings_from_hf(hf)            # names what there is no counterpart of
        chosen = Tokenizer.build(tokenizer) if tokenizer else tokenizer_from_gguf(fields)
        config, tensors, rows = model_from_hf(hf, weights_from_gguf(hf, theirs))
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, RuntimeError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"damaged ({type(error).__name__}: {error})"
        raise UserError(f"{path}: {reason[:400]}")
    if tokenizer:
        check_vocabulary(path, tokenizer, chosen, rows)
    return checkpoint_of(path, config, tensors, rows, chosen)


def checkpoint_meant(source: str) -> str:
    """The checkpoint that `source` names in a command to type: itself if it is there, out/book for book."""
    return source if os.path.exists(source) else run_meant(source) or source


def export_gguf(source: str, options: Options):
    """The command: a checkpoint to a GGUF file."""
    if not options.out:
        raise UserError(f"say where to: python convert.py gguf {checkpoint_meant(source)} --out=NAME.gguf")
    out = Path(options.out)
    config, tokenizer, hf, tensors = read_for_export(source)
    try:
        write_gguf(out, hf, tensors, tokenizer, options.type, name=out.stem)
    except ValueError as error:
        raise UserError(f"{source}: {error}")
    if config["mlp"] == "gelu":
        print("note     mlp=gelu goes out as its tanh form, the only one that llama.cpp has for GPT-2; they differ by "
              "less than 0.0005", flush=True)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    print(f"{out}: {TITLES[hf['model_type']]}, {parameters:,} parameters in {options.type}, and its tokenizer "
          f"({tokenizer.kind})")
    print(f"next     llama-cli -m {out} --no-conversation -p Once", flush=True)


# -- nanoGPT ---------------------------------------------------------------------------------------

NANOGPT = dict(positions="learned", norm="layernorm", norm_gain=True, norm_eps=1e-5, mlp="gelu", tie_weights=True,
               n_kv_head=0, qkv_bias="auto", ffn_dim=0, pad_vocab_to=1, init="gpt2", dropout=0.0, attn_dropout=False)


def import_checkpoint(path: str, tokenizer: str = "") -> dict:
    """A checkpoint's content from a file: nanoGPT's becomes one of Inkling's, which needs nothing."""
    try:
        load_checkpoint(Path(path))
    except ForeignCheckpoint as error:
        return import_nanogpt(path, error.content, tokenizer)
    raise UserError(f"{path} is a checkpoint of Inkling already: python sample.py --ckpt={path}")


def import_nanogpt(path: str, content: dict, tokenizer: str = "") -> dict:
    """A checkpoint's content from nanoGPT's, whose linear layers are stored (out, in), whose head is
    tied, and which has no tokenizer in it."""
    try:
        sizes = content["model_args"]
        rows = sizes["vocab_size"]
        config = FIXED["gpt2"] | NANOGPT | {name: sizes[name] for name in SIZES["gpt2"]}
        config["bias"] = bool(sizes.get("bias", True))
        for name in ("vocab_size", *SIZES["gpt2"]):
            if type(sizes[name]) is not int or not 0 < sizes[name] < 2**31:
                raise ValueError(f"{name}={sizes[name]!r}")
        if config["n_embd"] % config["n_head"]:
            raise ValueError(f"{config['n_head']} heads in a width of {config['n_embd']}")
        if config["n_layer"] > len(content["model"]):
            raise ValueError(f"its {len(content['model'])} tensors are not those of {config['n_layer']} layers")
        layout = nanogpt_layout(config, rows)
        tensors = {name.removeprefix("_orig_mod."): tensor for name, tensor in content["model"].items()}
        tensors = full_names("gpt2", tensors)
        drop_tied_head(tensors, embedding="transformer.wte.weight")
        check_tensors(layout, tensors)
        ours = split_tensors(layout, tensors)
        ours["head.weight"] = ours["wte.weight"]
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{path} is not what nanoGPT writes: {type(error).__name__}: {error}")
    return checkpoint_of(path, config, ours, rows, nanogpt_tokenizer(path, rows, tokenizer))


def nanogpt_layout(config: dict, rows: int) -> dict:
    """Every weight of nanoGPT's GPT: those of GPT-2, not transposed, and the biases if it has any."""
    layout = {}
    for name, weight in gpt2_layout(config, rows, 4 * config["n_embd"]).items():
        if not has_weight(weight.ours[0], config):
            continue
        if weight.transposed:
            weight = Weight(weight.ours, weight.shape[::-1])
        layout[name] = weight
    return layout


def nanogpt_tokenizer(path: str, rows: int, name: str) -> Tokenizer:
    """GPT-2's for a model of its size, or the named one."""
    if not name and rows not in (50_257, 50_304):
        raise UserError(f"{path} has {rows:,} tokens, and its tokenizer is not in it: python convert.py import {path} "
                        "--tokenizer=NAME. For nanoGPT's characters, prepare the same text here (python prepare.py "
                        "input.txt --name=chars) and name data/chars/meta.json")
    tokenizer = Tokenizer.build(name or "gpt2", "")
    check_vocabulary(path, name, tokenizer, rows)
    return tokenizer


def import_folder(source: str, options: Options):
    """The command: a Hugging Face directory to a run's folder."""
    name = Path(source).resolve().name.removesuffix(".gguf")
    out = Path(options.out or Path("out") / (name or "model"))
    content = import_model(source, options.tokenizer)
    config = content["config"]
    folder = RunFolder(out)
    folder.claim()
    folder.move_old_run()
    if problem := folder.save(content, "ckpt.pt"):
        folder.take_back()
        raise UserError(problem)
    folder.release()
    parameters = sum(tensor.numel() for tensor in content["model"].values())
    if config["tie_weights"]:
        parameters -= content["model"]["head.weight"].numel()
    print(f"{out / 'ckpt.pt'}: {parameters:,} parameters, {config['n_layer']} layers, "
          f"{config['n_head']} heads, {config['n_embd']} wide, context {config['block_size']:,}, "
          f"vocabulary {content['vocab_size']:,}")
    tokenizer = Tokenizer(content["tokenizer"])
    ends = ", ".join(repr(tokenizer.pieces[end].decode("utf-8", "replace")) for end in sorted(tokenizer.stops))
    kinds = {"json": "tokenizer.json, kept whole", "bpe": f"BPE, {tokenizer.stored.get('name')}"}
    print(f"tokenizer {kinds.get(tokenizer.kind, tokenizer.kind)}; a text ends at {ends or 'no token'}"
          + ("" if tokenizer.bos is None else f" and begins with {tokenizer.pieces[tokenizer.bos].decode()!r}"))
    print(f"next     python sample.py --out_dir={out}", flush=True)


# -- export ----------------------------------------------------------------------------------------

def export_folder(source: str, options: Options):
    """The command: a checkpoint to a Hugging Face directory."""
    if not options.out:
        raise UserError(f"say where to: python convert.py export {checkpoint_meant(source)} --out=DIR")
    out = Path(options.out)
    if out.exists() and not is_replaceable(out):
        raise UserError(f"{out} is there and holds something other than an export: name a new "
                        "folder with --out")
    config, tokenizer, hf, tensors = read_for_export(source)
    try:
        ends = end_tokens(tokenizer)
        files = {
            "config.json": hf | ends,
            "tokenizer.json": tokenizer_to_json(tokenizer),
            "tokenizer_config.json": tokenizer_config(tokenizer, config["block_size"]),
            "generation_config.json": ends,
        }
    except ValueError as error:
        raise UserError(f"{source}: {error}")
    write_folder(out, files, tensors)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    print(f"{out}: {TITLES[hf['model_type']]}, {parameters:,} parameters, and its tokenizer "
          f"({tokenizer.kind})")
    print(f"next     hf upload USER/NAME {out}", flush=True)


def read_for_export(source: str) -> tuple:
    """(config, tokenizer, config.json's content, tensors by their names there) of a checkpoint."""
    content = load_checkpoint(source)
    config = content["config"]
    try:
        tokenizer = Tokenizer(content["tokenizer"])
        hf, tensors = model_to_hf(config, content["model"], content["vocab_size"])
    except ValueError as error:
        raise UserError(f"{source}: {error}")
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(f"{source}: its parts do not fit together ({reason})")
    return config, tokenizer, hf, tensors


def is_replaceable(path: Path) -> bool:
    """Whether all that is there is an empty folder or a former export."""
    if not path.is_dir():
        return False
    names = {entry.name for entry in path.iterdir()}
    if not names:
        return True
    return names <= EXPORTED and "inkling" in read_json(path / "config.json")


def end_tokens(tokenizer: Tokenizer) -> dict:
    """The ids that begin and end a text, as config.json and generation_config.json have them."""
    ends = [tokenizer.eot, *sorted(tokenizer.stops - {tokenizer.eot})]
    bos = tokenizer.eot if tokenizer.bos is None else tokenizer.bos
    return {"bos_token_id": bos, "eos_token_id": ends if len(ends) > 1 else tokenizer.eot}


def tokenizer_config(tokenizer: Tokenizer, block_size: int) -> dict:
    """tokenizer_config.json's content."""
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size,
                "clean_up_tokenization_spaces": False}
    ends = end_tokens(tokenizer)
    if ends["bos_token_id"] is not None:
        settings["bos_token"] = token_text(tokenizer, ends["bos_token_id"])
    if tokenizer.eot is not None:
        settings["eos_token"] = token_text(tokenizer, tokenizer.eot)
    if tokenizer.kind == "bpe":
        settings["inkling"] = {key: tokenizer.stored[key] for key in ("name", "pattern")}
    return settings


def write_folder(out: Path, files: dict, tensors: dict):
    """Write an export beside `out`, and let it take the place of a former one when it is whole."""
    safetensors = import_safetensors()
    beside = out.with_name(out.name + ".tmp")
    old = out.with_name(out.name + ".old.tmp")
    try:
        shutil.rmtree(beside, ignore_errors=True)       # a killed process may have left it
        beside.mkdir(parents=True)
        for name, content in files.items():
            with atomic_write(beside / name) as file:
                file.write(json.dumps(content, ensure_ascii=False, indent=1).encode("utf-8"))
        weights = beside / "model.safetensors"
        safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
        weights.chmod((beside / "config.json").stat().st_mode)      # save_file makes it private
        if out.exists():
            os.rename(out, old)
        os.rename(beside, out)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"could not write {out}: {getattr(error, 'strerror', None) or error}")
    finally:
        shutil.rmtree(beside, ignore_errors=True)


# -- page ------------------------------------------------------------------------------------------

def export_page(source: str, options: Options):
    """The command: a checkpoint to a web page."""
    if not options.out:
        raise UserError(f"say where to: python convert.py page {checkpoint_meant(source)} --out=NAME.html")
    from inkling.web_page import write_page  # imports train.py, which imports this module

    write_page(source, options.out, options.bits)


# -- commands --------------------------------------------------------------------------------------

COMMANDS = {"import": import_folder, "export": export_folder, "gguf": export_gguf, "page": export_page}
FLAGS = {"import": {"out", "tokenizer"}, "export": {"out"}, "gguf": {"out", "type"}, "page": {"out", "bits"}}


def main(argv: list):
    parsed = parse(Options, argv, __doc__, takes="words", first=FIRST_IN_HELP)
    if len(parsed.words) != 2 or parsed.words[0] not in COMMANDS:
        meant = closest(parsed.words[0], COMMANDS) if parsed.words and parsed.words[0] not in COMMANDS else ""
        guess = f"; did you mean {meant}?" if meant else "; see --help"
        raise UserError("say what to convert: python convert.py import DIR_OR_NAME, export CKPT.pt --out=DIR, gguf "
                        f"CKPT.pt --out=NAME.gguf, or page CKPT.pt --out=NAME.html{guess}")
    command, source = parsed.words
    if unused := sorted(parsed.typed - FLAGS[command]):
        raise UserError(f"--{', --'.join(unused)} would change nothing in {command} (see --help): leave it out")
    outlive_output()
    COMMANDS[command](source, Options(**parsed.values))


if __name__ == "__main__":
    run(main)
