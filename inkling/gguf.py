"""GGUF, the file of llama.cpp: the config.json, the weights and the tokenizer of a Hugging Face model by the names that
they have there, and back.

Names and layouts are those of llama.cpp's convert_hf_to_gguf.py and of its loader (github.com/ggml-org/llama.cpp).
The package gguf reads, writes and quantizes; it is imported when it is needed. Dicts called hf hold what config.json
does, and tensors have their names in model.safetensors; convert.py makes both.
"""

import json
import math
import re
from pathlib import Path

import numpy as np
import torch

from inkling.cli import UserError
from inkling.files import atomic_write
from inkling.huggingface import (
    BYTE_LEVEL,
    GPT2_PATTERN,
    added_token,
    bos_template,
    bpe_model,
    pattern_to_json,
    refuse_pointer,
    split_step,
    tokenizer_to_json,
    whole_or_plain_tokenizer,
)
from inkling.tokenizer import PATTERN, Tokenizer
from inkling.tokenizer_json import BYTES, steps

MODEL_NOTES = "inkling.model"           # keys of our own, in JSON: what the names there cannot say
TOKENIZER_NOTES = "inkling.tokenizer"


def import_gguf():
    try:
        import gguf
    except ImportError:
        raise UserError("reading and writing .gguf files needs the package gguf: pip install gguf")
    return gguf


# -- names ---------------------------------------------------------------------------------------------

# Parts of a model by their names in model.safetensors and in a GGUF; N stands for the number of a layer.
LLAMA_PARTS = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "model.layers.N.input_layernorm": "blk.N.attn_norm", "model.layers.N.post_attention_layernorm": "blk.N.ffn_norm",
    "model.layers.N.self_attn.q_proj": "blk.N.attn_q", "model.layers.N.self_attn.k_proj": "blk.N.attn_k",
    "model.layers.N.self_attn.v_proj": "blk.N.attn_v", "model.layers.N.self_attn.o_proj": "blk.N.attn_output",
    "model.layers.N.self_attn.q_norm": "blk.N.attn_q_norm", "model.layers.N.self_attn.k_norm": "blk.N.attn_k_norm",
    "model.layers.N.mlp.gate_proj": "blk.N.ffn_gate", "model.layers.N.mlp.up_proj": "blk.N.ffn_up",
    "model.layers.N.mlp.down_proj": "blk.N.ffn_down",
}
GPT2_PARTS = {
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
    "lm_head": "output", "transformer.h.N.ln_1": "blk.N.attn_norm", "transformer.h.N.ln_2": "blk.N.ffn_norm",
    "transformer.h.N.attn.c_attn": "blk.N.attn_qkv", "transformer.h.N.attn.c_proj": "blk.N.attn_output",
    "transformer.h.N.mlp.c_fc": "blk.N.ffn_up", "transformer.h.N.mlp.c_proj": "blk.N.ffn_down",
}
PARTS = {"gpt2": GPT2_PARTS, "llama": LLAMA_PARTS, "qwen3": LLAMA_PARTS}
ROPE_FACTORS = "rope_freqs.weight"      # what Llama 3's scaling divides the rotary frequencies by, (head_dim / 2)

# Fields of config.json and their keys, which begin with the name of the architecture.
LLAMA_KEYS = {
    "max_position_embeddings": "context_length", "hidden_size": "embedding_length", "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length", "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv", "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "head_dim": "attention.key_length", "rope_theta": "rope.freq_base",
}
GPT2_KEYS = {
    "n_positions": "context_length", "n_embd": "embedding_length", "n_layer": "block_count",
    "n_inner": "feed_forward_length", "n_head": "attention.head_count",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
}
KEYS = {"gpt2": GPT2_KEYS, "llama": LLAMA_KEYS, "qwen3": LLAMA_KEYS}
OPTIONAL_KEYS = {"attention.head_count_kv", "attention.key_length", "rope.freq_base"}   # llama.cpp has defaults


def renamed(name: str, parts: dict) -> str:
    """A weight's name on the other side; one that is not known stays as it is."""
    part, _, end = name.rpartition(".")
    number = re.search(r"(?<=\.)\d+(?=\.)", part)
    general = re.sub(r"(?<=\.)\d+(?=\.)", "N", part, count=1)
    if general not in parts:
        return name
    return f"{parts[general].replace('N', number[0]) if number else parts[general]}.{end}"


# -- weights -------------------------------------------------------------------------------------------

def is_transposed(kind: str, name: str) -> bool:
    """Whether model.safetensors holds the matrix (in, out); a GGUF holds all of them (out, in)."""
    return kind == "gpt2" and bool(re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name))


def heads_of_rotated(kind: str, name: str, hf: dict) -> int:
    """How many heads turn in a weight whose rows llama.cpp has in another order; 0: in none.

    Its Llama rotates neighbours (2i, 2i + 1) where transformers, and llama.cpp's own Qwen3, rotate
    (i, i + head_dim / 2)."""
    if kind != "llama":
        return 0
    if ".q_proj." in name:
        return hf["num_attention_heads"]
    return hf["num_key_value_heads"] if ".k_proj." in name else 0


def to_neighbours(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (heads * head_dim, ...) in llama.cpp's order: the partners side by side."""
    halves = tensor.unflatten(0, (heads, 2, -1))                # (heads, 2, head_dim / 2, ...)
    return halves.transpose(1, 2).reshape(tensor.shape)


def to_halves(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """The way back."""
    pairs = tensor.unflatten(0, (heads, -1, 2))                 # (heads, head_dim / 2, 2, ...)
    return pairs.transpose(1, 2).reshape(tensor.shape)


def weights_to_gguf(hf: dict, tensors: dict) -> dict:
    """The float32 weights by their names in a GGUF."""
    kind = hf["model_type"]
    theirs = {}
    for name, tensor in tensors.items():
        if is_transposed(kind, name):
            tensor = tensor.T
        if heads := heads_of_rotated(kind, name, hf):
            tensor = to_neighbours(tensor, heads)
        theirs[renamed(name, PARTS[kind])] = tensor.contiguous()
    if hf.get("rope_parameters", {}).get("rope_type") == "llama3":
        theirs[ROPE_FACTORS] = rope_factors(hf["rope_parameters"], hf["head_dim"])
    return theirs


def weights_from_gguf(hf: dict, theirs: dict) -> dict:
    """The weights by their names in model.safetensors."""
    kind = hf["model_type"]
    parts = {there: here for here, there in PARTS[kind].items()}
    tensors = {}
    for their_name, tensor in theirs.items():
        name = renamed(their_name, parts)
        if is_transposed(kind, name):
            tensor = tensor.T
        if heads := heads_of_rotated(kind, name, hf):
            tensor = to_halves(tensor, heads)
        tensors[name] = tensor.contiguous()
    return tensors


def rope_factors(rope: dict, head_dim: int) -> torch.Tensor:
    """What Llama 3's scaling divides each rotary frequency by, (head_dim / 2); see scale_frequency in
    train.py."""
    pairs = head_dim // 2
    frequency = rope["rope_theta"] ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low = rope["low_freq_factor"]
    kept = ((turns - low) / (rope["high_freq_factor"] - low)).clamp(0, 1)
    return (1 / (kept + (1 - kept) / rope["factor"])).float()


def check_type(theirs: dict, weight_type: str):
    """Raise ValueError for weights that the type cannot hold."""
    for name, tensor in theirs.items():
        if not is_narrowed(name, tensor):
            continue
        if weight_type == "q8_0" and tensor.size(-1) % 32:
            raise ValueError(f"--type=q8_0 stores 32 weights of a row together, and the rows of {name} have "
                             f"{tensor.size(-1)}: use --type=f16")
        if weight_type == "f16" and tensor.abs().amax() > 65_504:
            raise ValueError(f"{name} has weights above 65,504, the largest number of 16 bits: use --type=f32")


def is_narrowed(name: str, tensor: torch.Tensor) -> bool:
    """Whether --type counts for a weight: as in llama.cpp's own files, vectors and learned positions stay
    in 32 bits."""
    return tensor.dim() == 2 and name != "position_embd.weight"


# -- settings ------------------------------------------------------------------------------------------

def settings_to_gguf(hf: dict) -> dict:
    """The keys that describe the model. Raises ValueError for what llama.cpp's architecture of that name
    lacks, though transformers has it."""
    kind = hf["model_type"]
    rope = hf.get("rope_parameters", {})
    if kind == "gpt2" and not hf["activation_function"].startswith("gelu"):
        raise ValueError(f"llama.cpp's GPT-2 has no counterpart of mlp={hf['activation_function']}: train with "
                         "--mlp=gelu_tanh, or with config/portable.py")
    if kind == "qwen3" and rope["rope_type"] == "llama3":
        raise ValueError("llama.cpp's Qwen3 has no counterpart of rope_scaling=llama3: its Llama has "
                         "(--qk_norm=False)")
    fields = {f"{kind}.{key}": hf[name] for name, key in KEYS[kind].items()}
    fields[f"{kind}.vocab_size"] = hf["vocab_size"]
    if rope:
        fields[f"{kind}.rope.dimension_count"] = hf["head_dim"]
        fields[f"{kind}.attention.value_length"] = hf["head_dim"]
        fields[f"{kind}.rope.freq_base"] = float(hf["rope_theta"])
    if rope.get("rope_type") == "linear":
        fields[f"{kind}.rope.scaling.type"] = "linear"
        fields[f"{kind}.rope.scaling.factor"] = float(rope["factor"])
    notes = {"inkling": hf["inkling"], "rope_parameters": rope or None}
    return fields | {MODEL_NOTES: json.dumps(notes)}


# Llama 3.1, 3.2 and 3.3 differ in the factor alone.
LLAMA3_SCALINGS = [dict(rope_type="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0,
                        original_max_position_embeddings=8192) for factor in (8.0, 32.0)]


def settings_from_gguf(fields: dict, theirs: dict) -> dict:
    """config.json's content for the keys and the weights of a GGUF. Takes the rope's factors out of
    `theirs`. Raises ValueError naming what has no counterpart."""
    kind = fields.get("general.architecture")
    if kind not in KEYS:
        raise ValueError(f"its architecture {kind!r} is none of {', '.join(KEYS)}")
    if fields.get("split.count", 0) > 1:
        raise ValueError("it is one of several parts: join them with llama.cpp's llama-gguf-split --merge")
    own = {name.removeprefix(f"{kind}."): value for name, value in fields.items() if name.startswith(f"{kind}.")}
    hf = {"model_type": kind, "tie_word_embeddings": "output.weight" not in theirs,
          "vocab_size": len(theirs.get("token_embd.weight", []))}
    missing = [f"{kind}.{key}" for key in KEYS[kind].values() if key not in own and key not in OPTIONAL_KEYS]
    if missing:
        raise ValueError(f"{', '.join(missing)} is missing")
    for name, key in KEYS[kind].items():
        if key in own:
            hf[name] = in_decimals(own.pop(key))
    notes = json.loads(fields.get(MODEL_NOTES, "{}"))
    if notes.get("inkling"):
        hf["inkling"] = notes["inkling"]
    if kind == "gpt2":
        hf["activation_function"] = "gelu_new"
    else:
        hf |= rotary_from_gguf(hf, own, theirs, notes)
    refused = [f"{kind}.{name}={value!r}" for name, value in own.items()
               if name not in ("vocab_size", "tensor_data_layout") and value not in (0, False)
               and (name, value) != ("attention.causal", True)]
    if refused:
        raise ValueError(f"Inkling has no counterpart of {', '.join(refused)}"[:500])
    return hf


def in_decimals(value):
    """A number of 32 bits as it was written: 1e-05 and not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def rotary_from_gguf(hf: dict, own: dict, theirs: dict, notes: dict) -> dict:
    """The fields of Llama and Qwen3 that have no key of their own. Takes the keys that it reads out of
    `own`."""
    heads = hf["num_attention_heads"]
    head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key) == head_dim:
            own.pop(key)
    rope = {"rope_type": "default"}
    if own.get("rope.scaling.type") in ("linear", "none"):
        rope["rope_type"] = {"linear": "linear", "none": "default"}[own.pop("rope.scaling.type")]
        factor = own.pop("rope.scaling.factor", 1.0)
        if rope["rope_type"] == "linear":
            rope["factor"] = in_decimals(factor)
    theta = hf.get("rope_theta", 10_000.0)
    if ROPE_FACTORS in theirs:
        rope = scaling_of_factors(theirs.pop(ROPE_FACTORS), theta, head_dim, notes)
    has_bias = {part: any(f".{part}.bias" in name for name in theirs) for part in ("attn_q", "attn_output", "ffn_up")}
    if has_bias["attn_q"] and not has_bias["attn_output"]:      # in config.json, the two are one switch
        for layer in range(hf["num_hidden_layers"]):
            theirs[f"blk.{layer}.attn_output.bias"] = torch.zeros(hf["hidden_size"])
    return dict(head_dim=head_dim, num_key_value_heads=hf.get("num_key_value_heads", heads), rope_theta=theta,
                rope_parameters={"rope_theta": theta} | rope, attention_bias=has_bias["attn_q"],
                mlp_bias=has_bias["ffn_up"])


def scaling_of_factors(factors: torch.Tensor, theta: float, head_dim: int, notes: dict) -> dict:
    """Llama 3's scaling that has these factors: the one in our own notes, or one of those that Meta
    published."""
    for rope in [notes.get("rope_parameters") or {}, *LLAMA3_SCALINGS]:
        if rope.get("rope_type") != "llama3":
            continue
        expected = rope_factors(rope | {"rope_theta": theta}, head_dim)
        if expected.shape == factors.shape and torch.allclose(expected, factors, rtol=1e-4):
            return rope
    raise ValueError(f"{ROPE_FACTORS} is not Llama 3.1's scaling of the rotary angles, and has no counterpart here")


# -- tokenizers ----------------------------------------------------------------------------------------

# llama.cpp knows the ways to split a text by names (tokenizer.ggml.pre). The steps of a tokenizer.json that do the
# same, the first of each name for the way back.
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
# cl100k_base's, as tiktoken has it; llama-bpe differs in white space at the very end of a text.
CL100K_PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
                  r"|\s*[\r\n]|\s+(?!\S)|\s")
GPT2_STEP = BYTE_LEVEL | {"use_regex": True}
DIGITS_STEP = {"type": "Digits", "individual_digits": True}
PRE_TOKENIZERS = [
    ("gpt-2", [GPT2_STEP]),
    ("gpt-2", [split_step(pattern_to_json(GPT2_PATTERN)), BYTE_LEVEL]),
    ("smollm", [DIGITS_STEP, GPT2_STEP]),
    ("llama-bpe", [split_step(LLAMA3_PATTERN), BYTE_LEVEL]),
    ("llama-bpe", [split_step(pattern_to_json(PATTERN)), BYTE_LEVEL]),
    ("llama-bpe", [split_step(pattern_to_json(CL100K_PATTERN)), BYTE_LEVEL]),
    ("qwen2", [split_step(QWEN2_PATTERN), BYTE_LEVEL]),
]
TAKES_WHOLE_WORDS = {"llama-bpe"}       # a word that is a token is that token, whatever the merges say
NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6     # types of tokens
WAY_OUT = "prepare the text with another: python prepare.py TEXT --name=NAME --tokenizer=bpe:4096"


def tokenizer_to_gguf(tokenizer: Tokenizer) -> dict:
    """The keys that describe a tokenizer. Raises ValueError for one that llama.cpp has no counterpart
    of."""
    if tokenizer.kind in ("char", "byte"):
        return trie_fields(tokenizer)
    content = tokenizer_to_json(tokenizer)
    fields = bpe_fields(tokenizer, content)
    if tokenizer.eot is None:
        raise ValueError("its tokenizer has no end-of-text token, and llama.cpp would take another for it: "
                         + WAY_OUT)
    fields["tokenizer.ggml.bos_token_id"] = tokenizer.eot if tokenizer.bos is None else tokenizer.bos
    ends = [tokenizer.eot, *sorted(tokenizer.stops - {tokenizer.eot})]
    for role, end in zip(("eos", "eot", "eom"), ends, strict=False):
        fields[f"tokenizer.ggml.{role}_token_id"] = end
    fields["tokenizer.ggml.add_bos_token"] = tokenizer.bos is not None
    fields["tokenizer.ggml.add_eos_token"] = False
    if tokenizer.kind == "bpe":
        fields[TOKENIZER_NOTES] = json.dumps({key: tokenizer.stored[key] for key in ("name", "pattern")})
    return fields


def trie_fields(tokenizer: Tokenizer) -> dict:
    """The tokenizer of RWKV, which takes the longest token that fits. It is the only one in llama.cpp that
    needs no end-of-text token; any other would take some character for it."""
    lone = tokenizer.kind == "char" and tokenizer.fallback is None
    if lone and not tokenizer.stored["chars"].isascii():
        raise ValueError("its characters are not all of one byte, and llama.cpp needs a token for each byte, too: "
                         "python prepare.py TEXT --name=NAME --min_count=2 adds them where there are rare characters, "
                         "--tokenizer=byte or bpe:4096 in any case")
    chars = set(tokenizer.pieces[:tokenizer.fallback]) if tokenizer.kind == "char" else set()
    tokens = []
    for value, piece in enumerate(tokenizer.pieces):
        # A byte that is a character, too, never stands for itself. No text has a byte 255.
        is_hidden = tokenizer.fallback is not None and value >= tokenizer.fallback and piece in chars
        tokens.append(escape(b"\xff" + piece if is_hidden else piece))
    return {"tokenizer.ggml.model": "rwkv", "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [NORMAL] * len(tokens), TOKENIZER_NOTES: json.dumps(tokenizer.stored)}


def escape(piece: bytes) -> str:
    """A token as RWKV's vocabulary spells it."""
    try:
        return piece.decode("utf-8").replace("\\", "\\\\")
    except UnicodeDecodeError:
        return "".join(f"\\x{value:02x}" for value in piece)


def bpe_fields(tokenizer: Tokenizer, content: dict) -> dict:
    """The keys of a byte-level BPE, from what its tokenizer.json holds."""
    model = content["model"]
    byte_level = set("".join(model["vocab"])) if model.get("type", "BPE") == "BPE" else set()
    added = {token["content"]: token for token in content.get("added_tokens") or []}
    plain = {text: value for text, value in model["vocab"].items() if text not in added}
    if not byte_level or not set("".join(plain)) <= BYTES.keys() or model.get("byte_fallback"):
        raise ValueError(f"its tokenizer.json is not byte-level BPE, and no other of it is carried yet: {WAY_OUT}")
    if content.get("normalizer"):
        raise ValueError(f"its tokenizer normalizes a text ({content['normalizer']['type']}), which llama.cpp does "
                         f"not: {WAY_OUT}")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    name = pre_tokenizer_name(content)
    if not merges:
        raise ValueError(f"its tokenizer has no merges, and llama.cpp needs some: {WAY_OUT}")
    made = {merge.replace(" ", "") for merge in merges}
    unmade = [text for text in plain if len(text) > 1 and text not in made]
    if unmade and name not in TAKES_WHOLE_WORDS:
        raise ValueError(f"its token {unmade[0]!r} comes from no merge, and llama.cpp needs one: {WAY_OUT}")
    tokens = [f"[unused{value}]" for value in range(tokenizer.vocab_size)]
    types = [UNUSED] * tokenizer.vocab_size
    for text, value in plain.items():
        tokens[value] = text
        types[value] = NORMAL
    for text, token in added.items():
        tokens[token["id"]] = text
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": merges}


def pre_tokenizer_name(content: dict) -> str:
    """llama.cpp's name of the way in which a tokenizer.json splits a text."""
    found = [comparable(step) for step in steps(content.get("pre_tokenizer"))]
    for name, known in PRE_TOKENIZERS:
        if found == [comparable(step) for step in known]:
            return name
    described = "nothing"
    if found:
        described = found[0].get("pattern", {}).get("Regex") or found[0]["type"]
    raise ValueError(f"its tokenizer splits a text by {str(described)[:200]}, which llama.cpp has no name for: "
                     + WAY_OUT)


def comparable(step: dict) -> dict:
    """A step of a pre_tokenizer without what changes no id, and with its defaults."""
    if step["type"] == "ByteLevel":
        return {"type": "ByteLevel", "use_regex": step.get("use_regex", True),
                "add_prefix_space": step.get("add_prefix_space", True)}
    return step


def tokenizer_from_gguf(fields: dict) -> Tokenizer:
    """The tokenizer of a GGUF. Raises ValueError for a kind that is not read."""
    notes = json.loads(fields.get(TOKENIZER_NOTES, "{}"))
    kind = fields.get("tokenizer.ggml.model")
    if kind == "rwkv" and notes:
        return Tokenizer(notes)
    names = dict(reversed(PRE_TOKENIZERS))
    pre = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}.get(fields.get("tokenizer.ggml.pre"),
                                                               fields.get("tokenizer.ggml.pre"))
    if kind != "gpt2" or pre not in names:
        raise ValueError(f"its tokenizer is {kind} ({pre}), of which only gpt2 ({', '.join(names)}) can be read: name "
                         "another with --tokenizer=NAME, one that tiktoken knows, or a folder with the tokenizer.json")
    pre_steps = names[pre]
    noted = [split_step(pattern_to_json(notes.get("pattern", ""))), BYTE_LEVEL]
    if (pre, noted) in PRE_TOKENIZERS:  # of several patterns that do the same, the one that was exported
        pre_steps = noted
    content = json_of_bpe(fields, pre_steps, ignore_merges=pre in TAKES_WHOLE_WORDS)
    tokenizer = whole_or_plain_tokenizer(content, notes)
    stored = dict(tokenizer.stored)
    roles = [fields.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
    ends = [value for value in dict.fromkeys(roles) if value is not None]
    if ends and ends != [tokenizer.eot]:
        stored["eot"] = ends
    if content["post_processor"]:
        stored["bos"] = fields["tokenizer.ggml.bos_token_id"]
    return Tokenizer(stored)


def json_of_bpe(fields: dict, pre_steps: list, ignore_merges: bool) -> dict:
    """tokenizer.json's content for the keys of a byte-level BPE."""
    tokens = fields["tokenizer.ggml.tokens"]
    types = fields.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    vocab = {}
    added = []
    for value, (text, token_type) in enumerate(zip(tokens, types, strict=True)):
        if token_type in (CONTROL, USER_DEFINED):
            added.append(added_token(text, value) | {"special": token_type == CONTROL})
        if token_type != UNUSED:
            vocab[text] = value
    merges = [merge.split(" ", 1) for merge in fields["tokenizer.ggml.merges"]]
    pre_tokenizer = pre_steps[0] if len(pre_steps) == 1 else {"type": "Sequence", "pretokenizers": pre_steps}
    bos = fields.get("tokenizer.ggml.bos_token_id") if fields.get("tokenizer.ggml.add_bos_token") else None
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": pre_tokenizer, "decoder": BYTE_LEVEL,
            "post_processor": None if bos is None else bos_template(tokens[bos], bos),
            "model": bpe_model(vocab, merges) | {"ignore_merges": ignore_merges}}


# -- files ---------------------------------------------------------------------------------------------

def write_gguf(path: Path, hf: dict, tensors: dict, tokenizer: Tokenizer, weight_type: str, name: str):
    """Write a model to `path`. weight_type: f32, f16 or q8_0. name: what llama.cpp shows. Raises
    ValueError for what a GGUF cannot hold."""
    gguf = import_gguf()
    fields = settings_to_gguf(hf) | tokenizer_to_gguf(tokenizer)
    theirs = weights_to_gguf(hf, tensors)
    check_type(theirs, weight_type)
    writer = gguf.GGUFWriter(None, hf["model_type"])
    file_types = {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16,
                  "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(file_types[weight_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in fields.items():
        add_field(writer, key, value)
    for tensor_name, tensor in theirs.items():
        stored_type = weight_type if is_narrowed(tensor_name, tensor) else "f32"
        quantized_type = gguf.GGMLQuantizationType[stored_type.upper()]
        data = gguf.quants.quantize(tensor.numpy(), quantized_type)
        writer.add_tensor(tensor_name, data, raw_dtype=quantized_type)
    try:
        with atomic_write(path) as file:
            writer.write_header_to_file(Path(file.name))
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
    except OSError as error:
        raise UserError(f"could not write {path}: {error.strerror or error}")


def add_field(writer, key: str, value):
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def read_gguf(path: Path) -> tuple:
    """(fields, weights) of a GGUF by their names there, the weights in float32. Raises UserError."""
    gguf = import_gguf()
    refuse_pointer(path)
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        weights = {tensor.name: dequantize(gguf, tensor) for tensor in reader.tensors}
    except NotImplementedError as error:
        raise UserError(f"{path}: {error}: let llama.cpp's llama-quantize write it with --allow-requantize as F16")
    except Exception as error:          # a damaged file can fail anywhere in the package
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise UserError(f"{path} is damaged or no GGUF file ({reason}); nothing was loaded")
    return fields, weights


def dequantize(gguf, tensor) -> torch.Tensor:
    data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(np.array(data, np.float32))
