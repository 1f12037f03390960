"""Weights of other programs: a Hugging Face directory of GPT-2 or Llama to a checkpoint of ours, and back.

    python convert.py import gpt2               # OpenAI's; also gpt2-xl ...
    python convert.py import path/to/folder --out=out/llama
    python convert.py export out/book/ckpt.pt --out=book

A folder to import holds config.json, model.safetensors and tokenizer.json; an exported one is what transformers and its
tokenizers load.
Weights keep their bytes in both directions: matrices are only split, joined and transposed. What one side has and the
other cannot express is refused by name, never dropped. A name is looked up in the local Hugging Face cache (HF_HOME,
HF_HUB_CACHE) and downloaded to it when it is not there; HF_ENDPOINT names another server.
"""

import json
import os
import re
import shutil
import sys
import warnings
from base64 import b64encode
from dataclasses import dataclass
from math import inf
from pathlib import Path

import torch

from inkling.checkpoint import claim_folder, load_checkpoint, save_checkpoint
from inkling.cli import UserError, parse, run
from inkling.download import download
from inkling.files import atomic_write, lock_folder
from inkling.tokenizer import END_OF_TEXT, Tokenizer

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")        # huggingface.co/openai-community/NAME
FILES = ("config.json", "model.safetensors", "tokenizer.json")  # of each, what is needed; the weights are one file
EXPORTED = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@dataclass
class Options:
    # -- what is written
    out: str = ""                       # import: folder of the run, empty: out/NAME; export: the directory to write
    tokenizer: str = ""                 # import: the tokenizer, if the directory's own cannot be used: byte, a name
                                        # that tiktoken knows, or the path of a meta.json or ckpt.pt of Inkling


# -- architectures: fields of config.json, switches of ours ----------------------------------------------------------
# Switches of a model that both architectures share, and then each one's own. What has no fixed value can be converted.

PLAIN = dict(embed_norm=False, head_bias=False, qk_norm=False, logit_cap=0.0, shortcuts=False, ngrams=0)
SWITCHES = {"gpt2": PLAIN | dict(positions="learned", norm="layernorm"),
            "llama": PLAIN | dict(positions="rope", rope_fraction=1.0, norm="rmsnorm", mlp="swiglu")}
TITLES = {"gpt2": "GPT-2", "llama": "Llama"}
SIZES = {"gpt2": dict(block_size="n_positions", n_layer="n_layer", n_head="n_head", n_embd="n_embd"),
         "llama": dict(block_size="max_position_embeddings", n_layer="num_hidden_layers", n_head="num_attention_heads",
                       n_embd="hidden_size", n_kv_head="num_key_value_heads", ffn_dim="intermediate_size")}
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu",
               "relu2": "relu2"}        # GPT-2's activation_function to our mlp; the first name of each goes back
OPTIONAL = ("bias", "qkv_bias", "norm_gain")    # of ours: what a model lacks is exported as zeros or ones

# Fields of config.json that say nothing about what the weights compute in evaluation.
HARMLESS = {
    "model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "use_cache", "initializer_range",
    "bos_token_id", "eos_token_id", "pad_token_id", "attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout",
    "task_specific_params", "n_special", "predict_special_tokens", "output_past", "id2label", "label2id", "_num_labels",
    "gradient_checkpointing", "pretraining_tp", "reorder_and_upcast_attn", "summary_type", "summary_use_proj",
    "summary_activation", "summary_proj_to_labels", "summary_first_dropout", "_name_or_path", "is_llama_config",
    "transformers.js_config", "tokenizer_class", "inkling"}


def read_settings(hf: dict) -> tuple:
    """(config, vocab_size): our settings of the model that config.json's content `hf` describes, with every bias and
    gain of its architecture. Raises ValueError naming each field that has no counterpart here."""
    kind = hf.get("model_type")
    if kind not in SWITCHES:
        raise ValueError(f"model_type={kind!r} is neither gpt2 nor llama")
    refused, used = [], set()

    def take(name, default=None):
        used.add(name)
        return default if hf.get(name) is None else hf[name]

    def number(name, default=None, whole=True):
        value = take(name, default)
        if type(value) is not int and (whole or type(value) is not float) or not 0 < value < 2**31:
            refused.append(f"{name}={value!r}")
            return 1
        return value

    def must(name, *allowed):
        """The field's value; allowed[0] is what it means when it is not there."""
        value = take(name, allowed[0])
        if value not in allowed:
            refused.append(f"{name}={value!r}")
        return value

    config = SWITCHES[kind] | dict(qkv_bias="auto", norm_gain=True, ffn_dim=0, pad_vocab_to=1, init="gpt2", dropout=0.0,
                                      attn_dropout=False)
    vocab_size = number("vocab_size")
    config |= {ours: number(theirs) for ours, theirs in SIZES[kind].items() if ours != "n_kv_head"}
    if kind == "gpt2":
        act = must("activation_function", *ACTIVATIONS)
        must("n_ctx", config["block_size"])
        must("scale_attn_weights", True)
        config |= dict(n_kv_head=0, bias=True, norm_eps=number("layer_norm_epsilon", 1e-5, False),
                       mlp=ACTIVATIONS.get(act), tie_weights=must("tie_word_embeddings", True, False))
        if take("n_inner"):
            config["ffn_dim"] = number("n_inner")
    else:
        rope = dict(take("rope_scaling", {})) | dict(take("rope_parameters", {}))
        hf = hf | {"rope_theta": rope.pop("rope_theta", None) or hf.get("rope_theta")}
        kinds = {rope.pop(name, "default") for name in ("rope_type", "type")}
        if kinds != {"default"} or rope.pop("partial_rotary_factor", 1) != 1 or any(rope.values()):
            refused.append(f"rope_parameters={hf.get('rope_parameters') or hf.get('rope_scaling')}")
        must("hidden_act", "silu")
        must("partial_rotary_factor", 1)
        must("head_dim", config["n_embd"] / config["n_head"])
        attention, mlp = must("attention_bias", False, True), must("mlp_bias", False, True)
        if mlp and not attention:
            refused.append("mlp_bias=True with attention_bias=False")
        config |= dict(n_kv_head=number("num_key_value_heads", config["n_head"]), bias=mlp,
                       qkv_bias="auto" if attention == mlp else True,
                       rope_theta=float(number("rope_theta", 10_000.0, False)),
                       norm_eps=number("rms_norm_eps", 1e-6, False),
                       tie_weights=must("tie_word_embeddings", False, True))
    heads, kv_heads = config["n_head"], config["n_kv_head"] or config["n_head"]
    if config["n_embd"] % (heads * (2 if kind == "llama" else 1)) or heads % kv_heads:      # rope turns pairs
        refused.append(f"{heads} heads, {kv_heads} of keys and values, in a width of {config['n_embd']}")
    refused += [f"{name}={value!r}" for name, value in hf.items()
                if name not in used | HARMLESS and value is not None and value is not False]
    if refused:
        raise ValueError(f"Inkling's {TITLES[kind]} has no counterpart of {', '.join(refused)}"[:500])
    return config, vocab_size


def write_settings(config: dict, width: int, vocab_size: int, eot: int | None) -> dict:
    """config.json's content for our settings. width: of the MLP. Raises ValueError naming every switch that neither
    GPT-2 nor Llama has."""
    kind = "llama" if config["positions"] == "rope" else "gpt2"
    refused = [name for name, value in SWITCHES[kind].items() if config[name] != value]
    backwards = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    if kind == "gpt2":
        refused += ["mlp"] * (config["mlp"] not in backwards)
        refused += ["n_kv_head"] * (config["n_kv_head"] not in (0, config["n_head"]))
    if refused:
        raise ValueError(f"{TITLES[kind]} (positions={config['positions']}) has no counterpart of "
                         f"{', '.join(f'{name}={config[name]}' for name in refused)}; a model trained with "
                         "config/shakespeare_char_nanogpt.py has none of these")
    sizes = config | dict(ffn_dim=width, n_kv_head=config["n_kv_head"] or config["n_head"])
    hf = {"model_type": kind, "vocab_size": vocab_size, "bos_token_id": eot, "eos_token_id": eot,
          "tie_word_embeddings": config["tie_weights"], "dtype": "float32"}
    hf |= {theirs: sizes[ours] for ours, theirs in SIZES[kind].items()}
    hf["inkling"] = {name: config[name] for name in OPTIONAL}
    attn_dropout = config["dropout"] if config["attn_dropout"] else 0.0
    if kind == "gpt2":
        return hf | dict(architectures=["GPT2LMHeadModel"], activation_function=backwards[config["mlp"]], n_inner=width,
                         layer_norm_epsilon=config["norm_eps"], resid_pdrop=config["dropout"],
                         embd_pdrop=config["dropout"], attn_pdrop=attn_dropout)
    theta = config["rope_theta"]        # transformers 4 reads it by itself, 5 in rope_parameters
    bias = config["bias"]
    return hf | dict(architectures=["LlamaForCausalLM"], hidden_act="silu", rms_norm_eps=config["norm_eps"],
                     head_dim=config["n_embd"] // config["n_head"], attention_bias=bias or config["qkv_bias"] is True,
                     mlp_bias=bias, attention_dropout=attn_dropout, rope_theta=theta,
                     rope_parameters={"rope_theta": theta, "rope_type": "default"})


# -- architectures: names and shapes of the weights ------------------------------------------------------------------
# A linear layer there: which of ours it holds, one after another, and its number of inputs and outputs.

def layout(kind: str, config: dict, rows: int, width: int) -> dict:
    """Every weight of an architecture: its name there -> (our names, its shape there, whether it is turned). Turned
    matrices are stored (in, out) there, as GPT-2 has them, and (out, in) here. rows: of the embedding."""
    C, gpt2 = config["n_embd"], kind == "gpt2"
    KV = C // config["n_head"] * (config["n_kv_head"] or config["n_head"])
    biased = {"attn": gpt2 or config["bias"] or config["qkv_bias"] is True, "mlp": gpt2 or config["bias"]}
    if gpt2:
        embedding, blocks, last = "transformer.wte", "transformer.h", "transformer.ln_f"
        norms = {"ln_1": "norm1", "ln_2": "norm2"}
        linears = {"attn.c_attn": ("attn", "q k v", C, 3 * C), "attn.c_proj": ("attn", "out", C, C),
                   "mlp.c_fc": ("mlp", "up", C, width), "mlp.c_proj": ("mlp", "down", width, C)}
    else:
        embedding, blocks, last = "model.embed_tokens", "model.layers", "model.norm"
        norms = {"input_layernorm": "norm1", "post_attention_layernorm": "norm2"}
        linears = {"self_attn.q_proj": ("attn", "q", C, C), "self_attn.k_proj": ("attn", "k", C, KV),
                   "self_attn.v_proj": ("attn", "v", C, KV), "self_attn.o_proj": ("attn", "out", C, C),
                   "mlp.gate_proj": ("mlp", "gate", C, width), "mlp.up_proj": ("mlp", "up", C, width),
                   "mlp.down_proj": ("mlp", "down", width, C)}
    table = {f"{embedding}.weight": (["wte.weight"], (rows, C), False)}
    if gpt2:
        table["transformer.wpe.weight"] = (["wpe.weight"], (config["block_size"], C), False)
    for layer in range(config["n_layer"]):
        for theirs, (half, ours, inputs, outputs) in linears.items():
            names = [f"blocks.{layer}.{half}.{name}" for name in ours.split()]
            table[f"{blocks}.{layer}.{theirs}.weight"] = (
                [f"{name}.weight" for name in names], (inputs, outputs) if gpt2 else (outputs, inputs), gpt2)
            if biased[half]:
                table[f"{blocks}.{layer}.{theirs}.bias"] = ([f"{name}.bias" for name in names], (outputs,), False)
    norms = {f"{blocks}.{layer}.{theirs}": f"blocks.{layer}.{ours}" for theirs, ours in norms.items()
             for layer in range(config["n_layer"])} | {last: "norm"}
    for theirs, ours in norms.items():
        table |= {f"{theirs}.{part}": ([f"{ours}.{part}"], (C,), False) for part in ("weight", "bias")[:1 + gpt2]}
    if not config["tie_weights"]:
        table["lm_head.weight"] = (["head.weight"], (rows, C), False)
    return table


def present(name: str, config: dict) -> bool:
    """Whether a model of ours with these settings has the weight `name`."""
    *_, module, part = name.split(".")
    if module.startswith("norm"):
        return config["norm_gain"] and (part == "weight" or config["bias"])
    of_qkv = module in ("q", "k", "v") and config["qkv_bias"] != "auto"
    return part == "weight" or (config["qkv_bias"] if of_qkv else config["bias"])


def neutral(name: str, shape) -> torch.Tensor:
    """What a weight that a model lacks would hold: a gain is 1, a bias 0."""
    return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)


def from_hf(hf: dict, tensors: dict) -> tuple:
    """(config, tensors, vocab_size) of ours, from config.json's content and the tensors by name. float32 keeps its
    bytes, 16-bit weights become float32. Raises ValueError when they do not fit one another, or Inkling."""
    config, vocab_size = read_settings(hf)
    kind = hf["model_type"]
    if config["n_layer"] > len(tensors):
        raise ValueError(f"its {len(tensors)} tensors are not those of {config['n_layer']} layers")
    prefix = "transformer." if kind == "gpt2" else "model."
    found = {}
    for name, tensor in tensors.items():
        if re.search(r"\.attn\.(bias|masked_bias)$|rotary_emb\.inv_freq$", name):
            continue                    # constants that old versions stored with the weights
        # The bare models, as OpenAI's are stored, leave out what comes first in the names.
        found[name if name.startswith((prefix, "lm_head.")) else prefix + name] = tensor
    width = config["ffn_dim"] or 4 * config["n_embd"]
    table = layout(kind, config, vocab_size, width)
    head = found.pop("lm_head.weight", None) if config["tie_weights"] else None     # some store a tied matrix twice
    if head is not None and not torch.equal(head, found.get(next(iter(table)), torch.empty(0))):
        raise ValueError("tie_word_embeddings=True, but lm_head.weight differs from the embedding")
    wrong = [f"{name} is missing" for name in table if name not in found]
    wrong += [f"{name} is not known" for name in found if name not in table]
    wrong += [f"{name} is {tuple(found[name].shape)}, not {shape}" for name, (_, shape, _) in table.items()
              if name in found and tuple(found[name].shape) != shape]
    wrong += [f"{name} is of {tensor.dtype}" for name, tensor in found.items()
              if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16)]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(f"the weights do not fit config.json: {'; '.join(wrong[:4])}{more}")
    ours = {}
    for name, (names, _, turned) in table.items():
        tensor = found.pop(name).float()
        ours |= zip(names, (piece.contiguous() for piece in (tensor.T if turned else tensor).chunk(len(names))),
                    strict=True)
    # What a model of ours lacked was exported as neutral; while it still is, the model gets its own switches back.
    lacked = {name: value for name, value in dict(hf.get("inkling") or {}).items() if name in OPTIONAL}
    for switches in (config | lacked, config):
        extra = [name for name in ours if not present(name, switches)]
        given = [name for name in extra if not torch.equal(ours[name], neutral(name, ours[name].shape))]
        if not given:
            break
    else:
        raise ValueError("Inkling's Llama has no counterpart of attention_bias=True with mlp_bias=False, but for "
                         "biases of queries, keys and values alone")
    config, ours = switches, {name: tensor for name, tensor in ours.items() if name not in extra}
    if config["tie_weights"]:
        ours["head.weight"] = ours["wte.weight"]
    return config, ours, vocab_size


def to_hf(config: dict, tensors: dict, vocab_size: int, eot: int | None = None) -> tuple:
    """(config.json's content, tensors by their name there) of a model of ours, without the rows that pad its
    vocabulary. Raises ValueError naming the switches that neither architecture has."""
    rows, width = (tensors[name].size(0) for name in ("wte.weight", "blocks.0.mlp.up.weight"))
    hf = write_settings(config, width, vocab_size, eot)
    if config["n_layer"] > len(tensors):
        raise ValueError(f"its {len(tensors)} tensors are not those of {config['n_layer']} layers")
    table = layout(hf["model_type"], config, rows, width)
    needed = {name for names, _, _ in table.values() for name in names if present(name, config)} | {"head.weight"}
    if needed != set(tensors):
        raise ValueError(f"its weights do not fit its settings: {sorted(needed ^ set(tensors))[:4]}")
    theirs = {}
    for name, (names, shape, turned) in table.items():
        # Only biases and gains can be absent.
        pieces = [tensors[part] if part in tensors else neutral(part, shape[0] // len(names)) for part in names]
        tensor = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        tensor = tensor.T if turned else tensor
        if tuple(tensor.shape) != shape:
            raise ValueError(f"its weights do not fit its settings: {names[0]} gives {name} {tuple(tensor.shape)}, "
                             f"not {shape}")
        theirs[name] = (tensor[:vocab_size] if names[0] in ("wte.weight", "head.weight") else tensor).contiguous()
    return hf, theirs


# -- tokenizers ------------------------------------------------------------------------------------------------------
# Both sides split a text by a regular expression and merge bytes pair by pair. tiktoken's ranks are the ids, and it may
# merge any two neighbours that form a token, the lowest rank first; tokenizer.json lists the pairs.

# GPT-2's way to split a text, as tiktoken spells it.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def byte_letters() -> list:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's encoder.py)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(value if value in printable else next(others)) for value in range(256)]


LETTERS = byte_letters()
BYTES = {letter: value for value, letter in enumerate(LETTERS)}


def spelled(token: bytes) -> str:
    return "".join(LETTERS[value] for value in token)


def merged_pairs(ranks: dict) -> list:
    """[(left, right)] in the order of ranks (bytes -> id): the last two parts that each token is merged from,
    which are the only ones in any text, since a token's inside is merged before and without its outside. A token that
    lower ranks do not merge into two parts can only be met as a whole, and is left out."""
    pairs = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best, at = min((ranks.get(left + right, inf), i)
                           for i, (left, right) in enumerate(zip(parts, parts[1:], strict=False)))
            if best >= rank:
                break
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            pairs.append(tuple(parts))
    return pairs


def pattern_there(pattern: str) -> str:
    """A pattern of tiktoken's in the dialect of the tokenizers library, where {1,3}+ repeats instead of being
    possessive and $ also matches before a line break."""
    pattern = re.sub(r"(\{\d+(?:,\d*)?\})\+", r"\1", pattern)
    return re.sub(r"(?<!\\)\$(?=[|)]|$)", r"\\z", pattern)


def split_by(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def write_tokenizer(tokenizer: Tokenizer) -> dict:
    """tokenizer.json's content, for the same ids of any text (one that looks like a special token aside: there it
    becomes that token)."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
               "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level}
    if tokenizer.kind == "char":
        vocab = {char: value for value, char in enumerate(tokenizer.stored["chars"])}
        if tokenizer.fallback is not None:              # rare characters are spelled in bytes
            vocab |= {f"<0x{value:02X}>": tokenizer.fallback + value for value in range(256)}
            return content | {"pre_tokenizer": split_by(r"[\s\S]"),
                              "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
                              "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": True}}
        return content | {"pre_tokenizer": split_by(r"[\s\S]"), "decoder": {"type": "Fuse"},
                          "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}}
    ranks = {bytes([value]): value for value in range(256)}
    if tokenizer.kind == "bpe":
        ranks = tokenizer.bpe["mergeable_ranks"]
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers":
                                    [split_by(pattern_there(tokenizer.bpe["pat_str"])), byte_level]}
    vocab = {spelled(token): rank for token, rank in ranks.items()}
    for text, value in tokenizer.bpe["special_tokens"].items() if tokenizer.kind == "bpe" else ():
        vocab[text] = value             # its place in the vocabulary is what gives it this id
        content["added_tokens"].append({"id": value, "content": text, "single_word": False, "lstrip": False,
                                        "rstrip": False, "normalized": False, "special": True})
    merges = [[spelled(left), spelled(right)] for left, right in merged_pairs(ranks)]
    return content | {"model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                                "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                                "ignore_merges": True, "vocab": vocab, "merges": merges}}


def read_pattern(content: dict, ours: dict) -> str:
    """The pattern by which tokenizer.json's content splits a text, in tiktoken's dialect, or ValueError."""
    steps = content.get("pre_tokenizer") or {"type": "nothing"}
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    *first, last = steps
    if last["type"] == "ByteLevel" and not last.get("add_prefix_space"):
        if not first and last.get("use_regex", True):
            return GPT2_PATTERN
        if len(first) == 1 and not last.get("use_regex", True) and first[0]["type"] == "Split":
            there = first[0]["pattern"].get("Regex", "")
            if first[0] == split_by(there):
                if pattern_there(ours.get("pattern", "")) == there:
                    return ours["pattern"]
                # Possessive repeats and anchors differ between the dialects; all else that is in use does not.
                if not re.search(r"([?*+]|\{\d+(,\d*)?\})\+|\\[zZAG]|(?<!\\)[$^]", there.replace("[^", "")):
                    return there
                raise ValueError(f"it splits a text by {there!r}, which may mean something else in tiktoken")
    raise ValueError(f"it prepares a text by {', '.join(str(step['type']) for step in steps)}, unlike byte-level BPE")


def read_tokenizer(content: dict, ours: dict) -> Tokenizer:
    """The tokenizer in tokenizer.json's content, or ValueError with what Inkling cannot express. `ours`: name and
    pattern, if it was exported by Inkling. One that has no name is called bpe, or gpt2 where it is that."""
    model, added = content["model"], content.get("added_tokens") or []
    kind = model.get("type", "BPE")     # files older than tokenizers 0.10, as GPT-2's own, leave it out
    fallback = bool(model.get("byte_fallback"))
    if kind not in ("BPE", "WordLevel") or fallback and model.get("merges"):
        raise ValueError(f"it is {kind}, {'with byte_fallback, ' * fallback}"
                         "not byte-level BPE")
    if not model.get("merges"):         # char and byte: ours, if we would write the same
        chars = "".join(sorted((one for one in model["vocab"] if len(one) == 1), key=model["vocab"].get))
        tokenizer = Tokenizer({"kind": "char", "chars": chars, "bytes": True} if fallback else {"kind": "byte"}
                              if kind == "BPE" else {"kind": "char", "chars": chars})
        same = write_tokenizer(tokenizer)
        if any(content.get(part) != same[part] for part in ("pre_tokenizer", "normalizer")) or added or (
                model["vocab"] != same["model"]["vocab"]):
            raise ValueError(f"it is {kind} without merges, and was not exported by Inkling")
        return tokenizer
    unlike = [f"{key}={model[key]!r}" for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
              if model.get(key)]
    unlike += [f"the normalizer {content['normalizer']['type']}"] if content.get("normalizer") else []
    unlike += [f"the added token {token['content']!r} that is not special" for token in added if not token["special"]]
    if unlike:
        raise ValueError(f"it has {', '.join(unlike[:5])}")
    pattern, special = read_pattern(content, ours), {token["content"]: token["id"] for token in added}
    plain = {token: value for token, value in model["vocab"].items() if token not in special}
    if strange := {letter for token in plain for letter in token} - BYTES.keys():
        raise ValueError(f"its vocabulary is not spelled in bytes: it has {min(strange)!r}")
    ranks = {bytes(BYTES[letter] for letter in token): value for token, value in plain.items()}
    if lacking := [value for value in range(256) if bytes([value]) not in ranks]:
        raise ValueError(f"its vocabulary lacks byte {lacking[0]:#04x}")
    # tiktoken merges in the order of the ids, and knows every pair that forms a token.
    listed = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    order = [plain[left + right] for left, right in listed]
    pairs = [(spelled(left), spelled(right)) for left, right in merged_pairs(ranks)]
    by_merges = len(pairs) == len(ranks) - 256 or model.get("ignore_merges")
    if order != sorted(order) or not set(pairs) <= set(listed) or not by_merges:
        raise ValueError("its merges are not in the order of its ids, as tiktoken needs them")
    # Sets that prepare.py made with tiktoken's gpt2 are to have the very same tokenizer.
    gpt2 = pattern == GPT2_PATTERN and special == {END_OF_TEXT: 50_256} and len(ranks) == 50_256
    name = ours.get("name", "gpt2" if gpt2 else "bpe")
    return Tokenizer({"kind": "bpe", "name": name, "pattern": pattern, "special": special,
                      "ranks": "\n".join(f"{b64encode(token).decode()} {rank}"
                                         for token, rank in sorted(ranks.items(), key=lambda item: item[1]))})


# -- directories -----------------------------------------------------------------------------------------------------

def safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise UserError("reading and writing model.safetensors needs the package safetensors: pip install safetensors")
    return safetensors


def read_json(path: Path) -> dict:
    """A JSON object, or one line."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
        return content
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; a Hugging Face directory has {', '.join(FILES)}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {str(error)[:100]}")


def shards(folder: Path) -> list:
    """The files that hold the weights in `folder`, or [] when any is missing."""
    if (folder / "model.safetensors.index.json").is_file():
        names = set(dict(read_json(folder / "model.safetensors.index.json").get("weight_map") or {}).values())
        if any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise UserError(f"{folder / 'model.safetensors.index.json'} names files outside its folder")
        paths = [folder / name for name in sorted(names)]
        return paths if all(path.is_file() for path in paths) else []
    return [path for name in ("model.safetensors", "pytorch_model.bin") if (path := folder / name).is_file()][:1]


def read_weights(folder: Path) -> dict:
    """Every tensor of a Hugging Face directory by its name there, on the CPU, or one line. Pickles are read with
    weights_only=True, so that nothing in them can run."""
    paths, tensors = shards(folder), {}
    if not paths:
        raise UserError(f"{folder} holds no complete model.safetensors (nor pytorch_model.bin): is the download finished?")
    for path in paths:
        try:
            if path.suffix == ".bin":
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    part = torch.load(path, map_location="cpu", weights_only=True)
                if not all(isinstance(tensor, torch.Tensor) for tensor in part.values()):
                    raise ValueError("it holds more than tensors")
            else:
                part = safetensors().torch.load_file(path)
        except Exception as error:      # a damaged file can fail anywhere in these libraries
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
            raise UserError(f"{path} is damaged or holds no weights ({reason}); nothing was loaded from it")
        if twice := tensors.keys() & part.keys():
            raise UserError(f"{path} holds {min(twice)} again, which an earlier part of the weights has")
        tensors |= part
    return tensors


def folder_tokenizer(folder: Path, hf: dict) -> Tokenizer:
    """The tokenizer of a Hugging Face directory, or one line that says how to name another."""
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    try:
        if (folder / "tokenizer.json").is_file():
            content = read_json(folder / "tokenizer.json")
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            vocab = read_json(folder / "vocab.json")
            lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
            eot = [{"content": END_OF_TEXT, "id": vocab[END_OF_TEXT], "special": True}] if END_OF_TEXT in vocab else []
            content = {"model": {"type": "BPE", "vocab": vocab,
                                 "merges": [line for line in lines if line and not line.startswith("#version")]},
                       "added_tokens": eot, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": bool(
                           settings.get("add_prefix_space"))}}
        elif hf.get("model_type") == "gpt2" and hf.get("vocab_size") == 50_257:
            return Tokenizer.build("gpt2", "")
        else:
            raise ValueError("neither tokenizer.json nor vocab.json with merges.txt is there")
        tokenizer = read_tokenizer(content, dict(settings.get("inkling") or {}))
        if "TemplateProcessing" in str(content.get("post_processor")):
            print(f"note     the tokenizer in {folder} puts special tokens around every text; Inkling does not",
                  file=sys.stderr, flush=True)
        if tokenizer.kind == "bpe":
            tokenizer.encode("Once")    # tiktoken reads the pattern here
        return tokenizer
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"damaged ({type(error).__name__}: {error})"
        raise UserError(f"the tokenizer in {folder} cannot be used: {reason[:300]}; name another with --tokenizer=NAME, one that "
             "tiktoken knows, or the path of a meta.json or ckpt.pt that has it")


def named_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that --tokenizer asks for."""
    if name == "char":
        raise UserError("--tokenizer=char: a char tokenizer comes from a text; name the meta.json of its data set")
    return Tokenizer.build(name, "")


def imported(source: str, tokenizer: str = "") -> dict:
    """The content of a checkpoint with the weights of a Hugging Face directory, or of one of NAMES. `fail`s in one line
    on what is not there, is damaged, or has no counterpart in Inkling."""
    folder = Path(source)
    if source in NAMES and not (folder / "config.json").is_file():
        folder = cached(source) or downloaded(source)
    elif not folder.is_dir():
        raise UserError(f"{source} is neither a folder nor one of {', '.join(NAMES)}")
    hf = read_json(folder / "config.json")
    try:
        read_settings(hf)                               # says in a moment what gigabytes are not needed for
        config, tensors, rows = from_hf(hf, read_weights(folder))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{folder}: {error}")
    found = named_tokenizer(tokenizer) if tokenizer else folder_tokenizer(folder, hf)
    if found.vocab_size > rows:
        raise UserError(f"{folder}: the tokenizer has {found.vocab_size:,} tokens, the model only {rows:,}: name its own with "
             "--tokenizer")
    if found.vocab_size < rows:                         # rows that stand for no token
        config["pad_vocab_to"] = rows
    return {"config": config, "vocab_size": found.vocab_size, "tokenizer": found.stored, "model": tensors, "step": 0}


# -- the Hugging Face cache, and downloads to it ----------------------------------------------------------------------

def hub() -> Path:
    """The folder of the cache, found as huggingface_hub finds it."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def cached(name: str) -> Path | None:
    """The newest whole copy of a named model in the cache, under its present or its former name."""
    for repository in (f"openai-community--{name}", name):
        folder = hub() / f"models--{repository}"
        snapshots = sorted(folder.glob("snapshots/*"), key=lambda path: path.stat().st_mtime, reverse=True)
        with_refs = [folder / "snapshots" / path.read_text(encoding="utf-8").strip()
                     for path in folder.glob("refs/main")]
        for snapshot in with_refs + snapshots:
            if (snapshot / "config.json").is_file() and shards(snapshot):
                return snapshot
    return None


def bring(url: str, path: Path) -> str:
    """Bring `url` to `path`, whole and checked. Returns the server's commit, or ""."""
    reason, commit = download(url, path)
    if reason:
        raise UserError(f"could not download {url} ({reason}); try again, which goes on from what has arrived, or bring a folder "
             f"with {', '.join(FILES)} here by other means and name it: python convert.py import FOLDER --out=out/NAME")
    return commit


def downloaded(name: str) -> Path:
    """Download a named model to the cache, laid out as huggingface_hub does, so that it is found there next time."""
    folder, server = hub() / f"models--openai-community--{name}", os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        raise UserError(f"{name} is not in {hub()}, and HF_HUB_OFFLINE forbids a download")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock_folder(folder, wait=True):           # of the processes of torchrun, one downloads
            if found := cached(name):
                return found
            url = f"{server.rstrip('/')}/openai-community/{name}/resolve"
            commit = bring(f"{url}/main/{FILES[0]}", folder / FILES[0])
            revision = commit if re.fullmatch("[0-9a-f]{40}", commit) else "main"
            snapshot = folder / "snapshots" / revision
            snapshot.mkdir(parents=True, exist_ok=True)
            for file in FILES[1:]:
                if not (snapshot / file).is_file():
                    bring(f"{url}/{revision}/{file}", snapshot / file)
            os.replace(folder / FILES[0], snapshot / FILES[0])      # last: with it the copy is whole
            (folder / "refs").mkdir(exist_ok=True)
            (folder / "refs" / "main").write_text(revision, encoding="utf-8")
            return snapshot
    except OSError as error:
        raise UserError(f"cannot use the cache {folder}: {error.strerror or error}: set HF_HOME to a folder that can be written")


# -- commands --------------------------------------------------------------------------------------------------------

def import_folder(source: str, options: Options):
    out = Path(options.out or Path("out") / (Path(source).resolve().name or "model"))
    content = imported(source, options.tokenizer)
    config, tensors = content["config"], content["model"]
    lock = claim_folder(out, resuming=False)
    if problem := save_checkpoint(content, out / "ckpt.pt"):
        raise UserError(problem)
    lock.close()
    parameters = sum(tensor.numel() for name, tensor in tensors.items()
                     if name != "head.weight" or not config["tie_weights"])
    print(f"{out / 'ckpt.pt'}: {parameters:,} parameters, {config['n_layer']} layers, {config['n_head']} heads, "
          f"{config['n_embd']} wide, context {config['block_size']:,}, vocabulary {content['vocab_size']:,}\n"
          f"next     python sample.py --out_dir={out}", flush=True)


def export_folder(source: str, options: Options):
    if not options.out:
        raise UserError(f"say where to: python convert.py export {source} --out=DIR")
    out = Path(options.out)
    if out.exists() and not replaceable(out):
        raise UserError(f"{out} is there and holds something other than an export: name a new folder with --out")
    content = load_checkpoint(source)
    config = content["config"]
    try:
        tokenizer = Tokenizer(content["tokenizer"])
        hf, tensors = to_hf(config, content["model"], content["vocab_size"], tokenizer.eot)
    except ValueError as error:
        raise UserError(f"{source}: {error}")
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise UserError(f"{source}: its parts do not fit together ({type(error).__name__}: {str(error)[:200]})")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config["block_size"],
                "clean_up_tokenization_spaces": False}
    if tokenizer.eot is not None:
        settings |= {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    if tokenizer.kind == "bpe":
        settings["inkling"] = {key: tokenizer.stored[key] for key in ("name", "pattern")}
    beside, old = out.with_name(out.name + ".tmp"), out.with_name(out.name + ".old.tmp")
    try:
        shutil.rmtree(beside, ignore_errors=True)       # a killed process may have left it
        beside.mkdir(parents=True)
        for name, part in (("config.json", hf), ("tokenizer.json", write_tokenizer(tokenizer)),
                           ("tokenizer_config.json", settings), ("generation_config.json", {
                               "bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot})):
            with atomic_write(beside / name) as file:
                file.write(json.dumps(part, ensure_ascii=False, indent=1).encode("utf-8"))
        safetensors().torch.save_file(tensors, beside / "model.safetensors", metadata={"format": "pt"})
        (beside / "model.safetensors").chmod((beside / "config.json").stat().st_mode)     # it is its owner's alone
        if out.exists():
            os.rename(out, old)
        os.rename(beside, out)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"could not write {out}: {getattr(error, 'strerror', None) or error}")
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    print(f"{out}: {TITLES[hf['model_type']]}, {sum(map(torch.numel, tensors.values())):,} parameters, and its "
          f"tokenizer ({tokenizer.kind})\nnext     hf upload USER/NAME {out}", flush=True)


def replaceable(folder: Path) -> bool:
    """Whether all that is in `folder` is a former export."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {""}
    return not names or names <= EXPORTED and "inkling" in read_json(folder / "config.json")


def main(argv: list):
    parsed = parse(Options, argv, __doc__, takes="words")
    if len(parsed.words) != 2 or parsed.words[0] not in ("import", "export"):
        raise UserError("say what to convert: python convert.py import DIR_OR_NAME, or export CKPT.pt --out=DIR; see --help")
    (import_folder if parsed.words[0] == "import" else export_folder)(parsed.words[1], Options(**parsed.values))


if __name__ == "__main__":
    run(main)
