// The worker: it computes, so that the page stays alive. The page sends {kind: "load", ...}, then
// {kind: "write", job, ...} and {kind: "stop"}; the answers are "ready", "token", "end" and "error".

const SHOWN = 10;                       // likeliest tokens that are told beside each one

// -- the weights

// The bytes of text in base64, a piece at a time: their text may be too long for one call.
function decodeBase64(text) {
  const padding = text.endsWith("==") ? 2 : text.endsWith("=") ? 1 : 0;
  const bytes = new Uint8Array(text.length / 4 * 3 - padding);
  const most = 2 ** 20;
  for (let start = 0; start < text.length; start += most) {
    const piece = atob(text.slice(start, start + most));
    const place = start / 4 * 3;
    for (let i = 0; i < piece.length; i++) bytes[place + i] = piece.charCodeAt(i);
  }
  return bytes;
}

// {name: Matrix or Float32Array} of the tensors, as web_page.py has packed them.
function unpackWeights(tensors, bytes) {
  const weights = {};
  for (const {name, shape, bits, offset} of tensors) {
    const [rows, columns] = shape;
    const count = shape.reduce((product, size) => product * size, 1);
    const numbers = {8: Int8Array, 16: Int16Array, 32: Float32Array}[bits];
    const hasScales = bits < 32;
    const start = offset + (hasScales ? 4 * rows : 0);
    const values = new numbers(bytes.buffer, start, count);
    if (shape.length === 1) {
      weights[name] = values;
      continue;
    }
    const scales = hasScales ? new Float32Array(bytes.buffer, offset, rows) : null;
    weights[name] = new Matrix(rows, columns, values, scales);
  }
  return weights;
}

// -- choosing tokens

// The places of the k largest numbers, the largest first.
function largest(numbers, k) {
  const places = [];
  for (let place = 0; place < numbers.length; place++) {
    if (places.length === k && numbers[place] <= numbers[places[k - 1]]) continue;
    let low = 0;                        // binary search for where it belongs
    let high = places.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (numbers[places[middle]] >= numbers[place]) low = middle + 1;
      else high = middle;
    }
    places.splice(low, 0, place);
    if (places.length > k) places.pop();
  }
  return places;
}

// A number in [0, 1) for a seed and a place of the text, so that a text can be written again from any
// place. The finalizer of MurmurHash3 (Austin Appleby).
function uniform(seed, place) {
  return mix(mix(seed) + place) / 2 ** 32;
}

function mix(number) {
  let bits = (number + 0x9e3779b9) | 0;
  bits = Math.imul(bits ^ (bits >>> 16), 0x85ebca6b);
  bits = Math.imul(bits ^ (bits >>> 13), 0xc2b2ae35);
  return (bits ^ (bits >>> 16)) >>> 0;
}

// An id drawn from softmax(logits / temperature) among the topK largest (0: all); at temperature 0 the
// likeliest. random: the number to draw with.
function draw(logits, temperature, topK, random) {
  if (temperature === 0) return largest(logits, 1)[0];
  const isCut = topK > 0 && topK < logits.length;
  const ids = isCut ? largest(logits, topK) : Array.from(logits.keys());
  const most = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const p = Float64Array.from(ids, (id) => (logits[id] - most) / temperature);
  softmax(p);
  let left = random;
  let place = 0;
  while (place + 1 < p.length && left >= p[place]) left -= p[place++];
  return ids[place];
}

// -- writing

class Writer {
  constructor({config, tensors, tokenizer}, base64) {
    this.cfg = config;
    this.model = new GPT(config, unpackWeights(tensors, decodeBase64(base64)));
    this.tokenizer = new Tokenizer(tokenizer);
    this.cache = new Cache(config);
    this.start = 0;                     // where in the text the cache begins
    this.logits = null;                 // for the token after those in the cache
  }

  // Where the window of a text of `count` tokens begins. When the context is full, the last half of
  // the window is kept and computed anew, as in train.py's generate.
  windowStart(count) {
    const size = this.cfg.block_size;
    const step = size + 1 - Math.max(1, size >> 1);
    return Math.max(0, Math.ceil((count - size) / step)) * step;
  }

  // The logits for the token that follows ids. Yields before each token that is computed.
  * logitsAfter(ids) {
    const start = this.windowStart(ids.length);
    const window = ids.slice(start);
    let same = 0;
    if (start === this.start) {
      while (same < this.cache.ids.length && same < window.length && this.cache.ids[same] === window[same]) same++;
    }
    if (same < window.length || this.cache.ids.length > window.length) {
      this.start = start;
      this.cache.cut(Math.min(same, window.length - 1));
    }
    for (const id of window.slice(this.cache.ids.length)) {
      yield null;
      this.logits = this.model.nextLogits(id, this.cache);
    }
    return this.logits;
  }

  // What the page shows of a token: its id, its probability, the likeliest others. logits: of its place.
  describe(id, logits) {
    if (!logits) return {id, name: this.tokenizer.name(id), p: null, rank: null, likeliest: []};
    const p = Float64Array.from(logits);
    softmax(p);
    const likeliest = largest(p, SHOWN).map((other) => ({id: other, name: this.tokenizer.name(other), p: p[other]}));
    const rank = 1 + p.reduce((count, other) => count + (other > p[id]), 0);
    return {id, name: this.tokenizer.name(id), p: p[id], rank, likeliest};
  }

  // Tokens one after another, as the page shows them, and null before each step of the computation.
  // text, or given: the ids with which it begins, of which the page knows the first `known`. length:
  // how many tokens to write.
  * write({text, ids: given, known = 0, length, temperature, topK, seed}) {
    const ids = given ?? this.tokenizer.encodePrompt(text);
    const complete = this.tokenizer.stream();
    const first = ids.length;           // of the new ones
    for (let place = 0; place < first + length; place++) {
      const isNew = place >= first;
      const isKnown = place < known;
      const logits = place === 0 || isKnown ? null : yield* this.logitsAfter(ids.slice(0, place));
      if (isNew) ids.push(draw(logits, temperature, topK, uniform(seed, place)));
      const id = ids[place];
      const completed = complete(id);
      const isEnd = this.tokenizer.stops.includes(id);
      if (!isKnown) yield {...this.describe(id, logits), text: completed, isNew, isEnd};
      if (isNew && isEnd) return;
    }
  }
}

// -- messages

let writer = null;
let job = null;                         // the latest one; it ends those before

// Let messages come in; a timer would wait for 4 ms.
const channel = new MessageChannel();

function breathe() {
  return new Promise((resolve) => {
    channel.port1.onmessage = resolve;
    channel.port2.postMessage(null);
  });
}

async function write(order) {
  job = order.job;
  let rested = performance.now();
  try {
    for (const token of writer.write(order)) {
      if (token) postMessage({kind: "token", job: order.job, token});
      if (performance.now() - rested < 15) continue;
      await breathe();
      if (job !== order.job) return;
      rested = performance.now();
    }
    postMessage({kind: "end", job: order.job});
  } catch (error) {
    postMessage({kind: "error", job: order.job, message: error.message, unknown: error.unknown});
  }
}

function load({model, weights}) {
  try {
    writer = new Writer(model, weights);
    postMessage({kind: "ready"});
  } catch (error) {
    postMessage({kind: "error", message: error.message});
  }
}

onmessage = ({data}) => {
  if (data.kind === "load") load(data);
  if (data.kind === "write") write(data);
  if (data.kind === "stop") job = null;
};
