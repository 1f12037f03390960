// The model of train.py, one token at a time, with a cache of keys and values. Classes, functions and
// settings are named as there (next_logits is nextLogits here); what train.py takes from PyTorch is in
// tensors.js. C = n_embd; x is the stream, C numbers.

class Norm {
  constructor(cfg, weights, name) {
    this.centred = cfg.norm === "layernorm";
    this.eps = cfg.norm_eps;
    this.weight = weights[`${name}.weight`];
    this.bias = weights[`${name}.bias`];
  }

  forward(x) {
    const mean = this.centred ? x.reduce((sum, value) => sum + value, 0) / x.length : 0;
    const y = x.map((value) => value - mean);
    rmsNorm(y, this.eps, this.weight);
    if (this.bias) addTo(y, this.bias);
    return y;
  }
}

function headWidth(cfg) {
  return cfg.head_dim || cfg.n_embd / cfg.n_head;
}

function scaleFrequency(cfg, frequency) {
  if (cfg.rope_scaling === "none") return frequency;
  const slowed = frequency / cfg.rope_factor;
  if (cfg.rope_scaling === "linear") return slowed;
  const turns = cfg.rope_context * frequency / (2 * Math.PI);
  const kept = (turns - cfg.rope_low_freq) / (cfg.rope_high_freq - cfg.rope_low_freq);
  return slowed + (frequency - slowed) * Math.min(Math.max(kept, 0), 1);
}

// The frequencies (head_dim / 2) at which pairs of dimensions turn, in 32 bits as in training.
function rotaryFrequencies(cfg) {
  const pairs = headWidth(cfg) / 2;
  const turning = roundHalfToEven(cfg.rope_fraction * pairs);
  const frequencies = new Float32Array(pairs);
  for (let i = 0; i < turning; i++) frequencies[i] = scaleFrequency(cfg, cfg.rope_theta ** (-i / turning));
  return frequencies;
}

// Rotate the pairs (i, i + head_dim / 2) of one head, in place.
function rotate(head, cos, sin) {
  const pairs = cos.length;
  for (let i = 0; i < pairs; i++) {
    const a = head[i];
    const b = head[i + pairs];
    head[i] = a * cos[i] - b * sin[i];
    head[i + pairs] = b * cos[i] + a * sin[i];
  }
}

// The vectors of the n-grams that end at a token; see train.py for an example.
class NGrams {
  static FACTOR = 1_540_483_477;
  static PRIME = 2 ** 31 - 1;

  constructor(cfg, weight) {
    this.longest = cfg.ngrams;
    this.edges = cfg.ngram_edges;
    this.weight = weight;
  }

  // (key * FACTOR + added) % PRIME. The product has up to 62 bits, and a number in JavaScript holds 53:
  // so FACTOR is multiplied in two halves.
  static next(key, added) {
    const high = key * (NGrams.FACTOR >>> 16) % NGrams.PRIME;
    return (high * 65536 + key * (NGrams.FACTOR & 65535) + added) % NGrams.PRIME;
  }

  // Add to x the vectors of the n-grams that end at the last of ids.
  addTo(x, ids) {
    const position = ids.length - 1;
    let key = ids[position];
    for (let distance = 1; distance < this.longest; distance++) {
      const isInside = distance <= position;
      key = NGrams.next(key, isInside ? ids[position - distance] + 1 : 0);
      if (isInside || this.edges) this.weight.addRow(key % this.weight.rows, x);
    }
  }
}

class Attention {
  constructor(cfg, weights, name, layer) {
    this.layer = layer;
    this.nHead = cfg.n_head;
    this.nKvHead = cfg.n_kv_head || cfg.n_head;
    this.headDim = headWidth(cfg);
    this.qkNorm = cfg.qk_norm;
    this.qGain = weights[`${name}.q_gain`];
    this.kGain = weights[`${name}.k_gain`];
    this.normEps = cfg.norm_eps;
    this.q = new Linear(weights, `${name}.q`);
    this.k = new Linear(weights, `${name}.k`);
    this.v = new Linear(weights, `${name}.v`);
    this.out = new Linear(weights, `${name}.out`);
    this.valueMix = weights[`${name}.value_mix`];
  }

  // Map x, already normed, to the output. Returns it and this block's values; vFirst: the first block's.
  forward(x, rotation, vFirst, cache) {
    const q = this.q.forward(x);        // (n_head * head_dim)
    const k = this.k.forward(x);        // (n_kv_head * head_dim)
    let v = this.v.forward(x);          // (n_kv_head * head_dim)
    if (this.valueMix) v = blend(this.valueMix, v, vFirst);
    this.normAndRotate(q, this.qGain, rotation);
    this.normAndRotate(k, this.kGain, rotation);
    const [keys, values] = cache.extend(this.layer, k, v);
    return [this.out.forward(this.attend(q, keys, values, cache.ids.length)), v];
  }

  // The heads of q or k, in place.
  normAndRotate(heads, gain, rotation) {
    for (let start = 0; start < heads.length; start += this.headDim) {
      const head = heads.subarray(start, start + this.headDim);
      if (this.qkNorm) rmsNorm(head, this.normEps, gain);
      if (rotation) rotate(head, rotation.cos, rotation.sin);
    }
  }

  // softmax(q k^T / sqrt(head_dim)) v over `length` tokens: (n_head * head_dim).
  attend(q, keys, values, length) {
    const {nHead, nKvHead, headDim} = this;
    const width = nKvHead * headDim;
    const y = new Float32Array(q.length);
    const p = new Float64Array(length);
    for (let head = 0; head < nHead; head++) {
      const start = head * headDim;
      const kvStart = Math.floor(head * nKvHead / nHead) * headDim;
      for (let t = 0; t < length; t++) {
        let score = 0;
        for (let i = 0; i < headDim; i++) score += q[start + i] * keys[t * width + kvStart + i];
        p[t] = score / Math.sqrt(headDim);
      }
      softmax(p);
      for (let t = 0; t < length; t++) {
        for (let i = 0; i < headDim; i++) y[start + i] += p[t] * values[t * width + kvStart + i];
      }
    }
    return y;
  }
}

class MLP {
  constructor(cfg, weights, name) {
    this.activation = ACTIVATIONS[cfg.mlp];
    this.up = new Linear(weights, `${name}.up`);
    this.gate = cfg.mlp === "swiglu" ? new Linear(weights, `${name}.gate`) : null;
    this.down = new Linear(weights, `${name}.down`);
  }

  forward(x) {
    const up = this.up.forward(x);
    if (!this.gate) return this.down.forward(up.map(this.activation));
    const gate = this.gate.forward(x).map(this.activation);
    return this.down.forward(up.map((value, i) => gate[i] * value));
  }
}

class Block {
  constructor(cfg, weights, name, layer) {
    this.norm1 = new Norm(cfg, weights, `${name}.norm1`);
    this.attn = new Attention(cfg, weights, `${name}.attn`, layer);
    this.norm2 = new Norm(cfg, weights, `${name}.norm2`);
    this.mlp = new MLP(cfg, weights, `${name}.mlp`);
    this.embedMix = weights[`${name}.embed_mix`];
  }

  forward(x, xFirst, rotation, vFirst, cache) {
    const stream = this.embedMix ? blend(this.embedMix, x, xFirst) : x.slice();
    const [y, v] = this.attn.forward(this.norm1.forward(stream), rotation, vFirst, cache);
    addTo(stream, y);
    addTo(stream, this.mlp.forward(this.norm2.forward(stream)));
    return [stream, v];
  }
}

class GPT {
  // cfg: train.py's ModelConfig. weights: by their names in a checkpoint, each a Matrix or, with one
  // dimension, a Float32Array.
  constructor(cfg, weights) {
    this.cfg = cfg;
    this.wte = weights["wte.weight"];
    this.ngrams = cfg.ngrams > 1 ? new NGrams(cfg, weights["ngrams.weight"]) : null;
    this.wpe = weights["wpe.weight"];
    this.embedNorm = cfg.embed_norm ? new Norm(cfg, weights, "embed_norm") : null;
    this.blocks = Array.from({length: cfg.n_layer},
                             (_, layer) => new Block(cfg, weights, `blocks.${layer}`, layer));
    this.norm = new Norm(cfg, weights, "norm");
    this.head = new Linear(weights, "head");
    if (cfg.tie_weights) this.head.weight = this.wte;
    this.frequencies = cfg.positions === "rope" ? rotaryFrequencies(cfg) : null;
  }

  // The logits (vocab_size) for the token that follows id, the next one of the text in the cache.
  nextLogits(id, cache) {
    cache.ids.push(id);
    let x = this.embed(cache.ids);
    const rotation = this.rotation(cache.ids.length - 1);
    const xFirst = x;
    let vFirst = null;
    for (const block of this.blocks) {
      const [next, v] = block.forward(x, xFirst, rotation, vFirst, cache);
      x = next;
      vFirst ??= v;
    }
    return this.logits(this.norm.forward(x));
  }

  // The last of ids, as it enters the first block.
  embed(ids) {
    const x = new Float32Array(this.cfg.n_embd);
    this.wte.addRow(ids[ids.length - 1], x);
    if (this.ngrams) this.ngrams.addTo(x, ids);
    if (this.wpe) this.wpe.addRow(ids.length - 1, x);
    return this.embedNorm ? this.embedNorm.forward(x) : x;
  }

  rotation(position) {
    if (!this.frequencies) return null;
    const angles = this.frequencies.map((frequency) => position * frequency);
    return {cos: angles.map(Math.cos), sin: angles.map(Math.sin)};
  }

  logits(x) {
    const z = this.head.forward(x);
    const cap = this.cfg.logit_cap;
    return cap ? z.map((value) => cap * value / Math.hypot(value, cap)) : z;
  }
}

// The tokens so far, and for each block their keys and values: n_kv_head * head_dim numbers for each
// token, one after another.
class Cache {
  constructor(cfg) {
    this.ids = [];
    this.width = (cfg.n_kv_head || cfg.n_head) * headWidth(cfg);
    this.keys = Array.from({length: cfg.n_layer}, () => new Float32Array(64 * this.width));
    this.values = Array.from({length: cfg.n_layer}, () => new Float32Array(64 * this.width));
  }

  // Keep the first `length` tokens.
  cut(length) {
    this.ids.length = length;
  }

  // Store the latest token's k and v, and return those of all tokens.
  extend(layer, k, v) {
    const start = (this.ids.length - 1) * this.width;
    this.keys[layer] = withRoom(this.keys[layer], start + this.width);
    this.values[layer] = withRoom(this.values[layer], start + this.width);
    this.keys[layer].set(k, start);
    this.values[layer].set(v, start);
    return [this.keys[layer], this.values[layer]];
  }
}
