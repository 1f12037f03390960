// What the code of a page computes, asked from outside of the page: by tests/test_web_page.py in node,
//
//     node bench/page.js < questions.json
//
// with {"pages": [{"path": ..., "questions": [...]}]} as its input, and by bench/page.py in Chromium.
// A question is a method of Answers and its arguments: ["logits", [1, 2, 3]].

const CODE = /<script id="worker" type="text\/plain">\n(.*?)\n<\/script>/s;
const MODEL = /<script id="model" type="application\/json">(.*?)<\/script>/s;
const WEIGHTS = /<script id="weights" type="text\/plain">(.*?)<\/script>/s;

class Answers {
  // library: the classes and functions of the page's worker.
  constructor(library, model, weights) {
    this.library = library;
    this.writer = new library.Writer(model, weights);
  }

  // The logits (tokens, vocab_size) after each of ids.
  logits(ids) {
    const cache = new this.library.Cache(this.writer.cfg);
    return ids.map((id) => Array.from(this.writer.model.nextLogits(id, cache)));
  }

  // The ids of a prompt, or the characters that the tokenizer lacks.
  encode(text) {
    try {
      return this.writer.tokenizer.encodePrompt(text);
    } catch (error) {
      return {unknown: error.unknown};
    }
  }

  // What each id completes, and their names.
  decode(ids) {
    const complete = this.writer.tokenizer.stream();
    return {texts: ids.map(complete), names: ids.map((id) => this.writer.tokenizer.name(id))};
  }

  // The tokens of an order, as the page gets them.
  write(order) {
    return [...this.writer.write(order)].filter((token) => token !== null);
  }

  // How often each id is drawn.
  draws(logits, temperature, topK, count) {
    const drawn = logits.map(() => 0);
    for (let place = 0; place < count; place++) {
      drawn[this.library.draw(Float32Array.from(logits), temperature, topK, this.library.uniform(7, place))]++;
    }
    return drawn;
  }

  // Seconds for `count` tokens after `warmUp` others.
  seconds(warmUp, count) {
    const order = {text: "", length: warmUp, temperature: 0.8, topK: 200, seed: 1};
    const ids = this.write(order).map((token) => token.id);
    const start = performance.now();
    this.write({...order, ids, known: ids.length, length: count});
    return (performance.now() - start) / 1000;
  }
}

function answerInNode() {
  const fs = require("fs");
  const vm = require("vm");
  const input = JSON.parse(fs.readFileSync(0, "utf-8"));
  const answers = input.pages.map(({path, questions}) => {
    const html = fs.readFileSync(path, "utf-8");
    const world = {atob, TextEncoder, TextDecoder, performance, MessageChannel};
    const library = vm.runInNewContext(`${CODE.exec(html)[1]}\n;({Writer, Cache, draw, uniform})`, world);
    const subject = new Answers(library, JSON.parse(MODEL.exec(html)[1]), WEIGHTS.exec(html)[1]);
    return questions.map(([name, ...words]) => subject[name](...words));
  });
  process.stdout.write(JSON.stringify(answers));
}

if (typeof window === "undefined") answerInNode();
