// The page: what a person sees and does. The worker computes. Whatever comes from a person, a model or a
// checkpoint is set as textContent, so that it is text and nothing else.

const KEYS = "1234567890";              // of the likeliest tokens

const $ = (id) => document.getElementById(id);

let worker = null;
let model = null;                       // its config, tokenizer and card
let tokens = [];                        // of the text, as the worker describes them; each with its span
let arrived = [];                       // those that the next frame of the screen shows
let selected = null;                    // the place of the token that is looked at; null: the latest
let job = 0;                            // answers to former ones are ignored
let isWriting = false;
let began = {time: 0, count: 0};        // when the first new token came, for the speed

function element(tag, text, className = "") {
  const created = document.createElement(tag);
  created.textContent = text;
  created.className = className;
  return created;
}

// -- what stands on the page from the start

function translate() {
  document.documentElement.lang = LANGUAGE;
  for (const labelled of document.querySelectorAll("[data-text]")) labelled.textContent = SAY[labelled.dataset.text];
  for (const labelled of document.querySelectorAll("[data-label]")) {
    labelled.setAttribute("aria-label", SAY[labelled.dataset.label]);
  }
  $("write").textContent = SAY.write;
  $("text").dataset.hint = SAY.textHint;
}

function showCard({card, config}) {
  $("summary").textContent = SAY.summary(short(card.parameters));
  const {floor, round} = Math;
  const time = card.seconds && SAY.minutes(floor(round(card.seconds) / 60), round(card.seconds) % 60);
  const rows = {
    dataset: card.name,
    parameters: SAY.parametersOf(number(card.parameters), card.ngram_parameters && number(card.ngram_parameters)),
    shape: SAY.shapeOf(config.n_layer, config.n_head, config.n_embd, number(config.block_size)),
    vocabulary: SAY.vocabularyOf(number(card.vocab_size), card.tokenizer),
    valLoss: card.val_loss && SAY.nats(number(card.val_loss, 4)),
    training: card.step && SAY.trainingOf(number(card.step), card.tokens && number(card.tokens), time),
    date: card.date,
    weights: card.bits < 32 && SAY.bitsOf(card.bits),
    command: card.command,
  };
  for (const [name, text] of Object.entries(rows)) {
    if (text) $("card").append(element("dt", SAY[name]), element("dd", text, name));
  }
}

// -- the worker

function startWorker() {
  const code = new Blob([$("worker").textContent], {type: "text/javascript"});
  try {
    worker = new Worker(URL.createObjectURL(code));
  } catch {
    setStatus(SAY.noWorker);
    return;
  }
  worker.onmessage = ({data}) => answers[data.kind](data);
  worker.onerror = (event) => setStatus(SAY.error(event.message ?? ""));
  worker.postMessage({kind: "load", model, weights: $("weights").textContent});
  $("weights").remove();                // the worker has its own copy
}

// What the worker answers, by kind.
const answers = {
  ready() {
    setStatus("");
    setWriting(false);
  },
  token(data) {
    if (data.job !== job) return;
    arrived.push(data.token);
    if (arrived.length === 1) requestAnimationFrame(showArrived);
  },
  end(data) {
    if (data.job !== job) return;
    showArrived();
    setWriting(false);
  },
  error(data) {
    if (data.job !== undefined && data.job !== job) return;
    showArrived();
    setWriting(false);
    setStatus(data.unknown === undefined ? SAY.error(data.message) : SAY.unknown(data.unknown));
  },
};

function setStatus(text) {
  $("status").ariaLive = isWriting ? "off" : "polite";
  $("status").textContent = text;
}

function setWriting(on) {
  isWriting = on;
  document.body.classList.toggle("writing", on);
  $("write").disabled = false;
  $("write").textContent = on ? SAY.stop : SAY.write;
  $("continue").disabled = on || tokens.length === 0;
  $("edit").disabled = on || tokens.length === 0;
}

// -- writing

// A setting as a number within its field's bounds; what is no number becomes the default.
function setting(id) {
  const field = $(id);
  const value = field.value === "" ? Number(field.defaultValue) : Number(field.value);
  const most = field.max === "" ? Infinity : Number(field.max);
  return Math.min(Math.max(value, Number(field.min)), most);
}

function begin(beginning) {
  job += 1;
  selected = null;
  began = {time: 0, count: 0};
  setWriting(true);
  setStatus(SAY.reading);
  $("token").classList.remove("open");
  worker.postMessage({kind: "write", job, ...beginning, length: Math.round(setting("length")),
                      temperature: setting("temperature"), topK: Math.round(setting("top-k")),
                      seed: Math.round(setting("seed"))});
}

function write() {
  cut(0);
  begin({text: $("prompt").value});
}

function continueText() {
  begin({ids: tokens.map((token) => token.id), known: tokens.length});
}

// Continue with another token in the place of the one that is selected.
function replaceSelected(id) {
  const place = selected ?? tokens.length - 1;
  cut(place);
  begin({ids: [...tokens.map((token) => token.id), id], known: place});
}

function stop() {
  job += 1;
  worker.postMessage({kind: "stop"});
  showArrived();
  setWriting(false);
}

// Keep the first `length` tokens of the text.
function cut(length) {
  arrived = [];
  for (const token of tokens.splice(length)) token.span.remove();
}

function showArrived() {
  if (arrived.length === 0) return;
  const text = $("text");
  const isAtEnd = text.scrollHeight - text.scrollTop - text.clientHeight < 40;
  for (const token of arrived) addToken(token);
  if (isAtEnd) text.scrollTop = text.scrollHeight;
  showSpeed(arrived.filter((token) => token.isNew).length);
  if (selected === null) showToken(tokens.length - 1);
  arrived = [];
}

function addToken(token) {
  token.span = element("span", token.isEnd ? "" : token.text, classOf(token));
  token.span.style.setProperty("--surprise", token.p === null ? 0 : 1 - 2 ** (bits(token.p) / -3));
  token.span.dataset.place = tokens.length;
  tokens.push(token);
  $("text").append(token.span);
}

function classOf(token) {
  if (token.isEnd) return "end";
  if (token.text === "") return "part"; // of a character that the next tokens complete
  return [token.isNew ? "new" : "given", token.text.includes("\n") ? "line" : ""].join(" ");
}

function bits(p) {
  return -Math.log2(Math.max(p, 1e-30));
}

function showSpeed(count) {
  if (count === 0) return;
  began.time ||= performance.now();
  began.count += count;
  const seconds = (performance.now() - began.time) / 1000;
  if (seconds > 0.1) setStatus(SAY.speed(number(began.count), number((began.count - 1) / seconds)));
}

// -- the token that is looked at

function showToken(place) {
  const token = tokens[place];
  const facts = token.p === null ? SAY.first
    : SAY.facts(percent(token.p), number(bits(token.p), 1), number(token.rank), number(model.card.vocab_size));
  $("token-facts").replaceChildren(element("b", visible(token.name)), ` ${facts}`);
  const rows = token.likeliest.map((other, i) => likeliestRow(other, KEYS[i], other.id === token.id));
  if (token.rank > rows.length) rows.push(likeliestRow(token, "", true));
  $("likeliest").replaceChildren(...rows);
}

function likeliestRow({id, name, p}, key, isTaken) {
  const button = element("button", "", isTaken ? "taken" : "");
  button.type = "button";
  button.style.setProperty("--p", p);
  button.append(element("kbd", key), element("span", visible(name), "name"), element("span", percent(p), "p"));
  button.onclick = () => replaceSelected(id);
  const row = document.createElement("li");
  row.append(button);
  return row;
}

function select(place) {
  if (selected !== null) tokens[selected]?.span.classList.remove("selected");
  selected = place;
  $("token").classList.toggle("open", place !== null);
  if (place === null) return;
  tokens[place].span.classList.add("selected");
  tokens[place].span.scrollIntoView({block: "nearest"});
  showToken(place);
}

// -- what a person does

function onTextKey(event) {
  const last = tokens.length - 1;
  const place = selected ?? last;
  const moves = {ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: last};
  const choice = KEYS.indexOf(event.key);
  if (event.ctrlKey || event.altKey || event.metaKey || last < 0) return;
  if (event.key in moves) select(Math.min(Math.max(moves[event.key], 0), last));
  else if (choice >= 0 && tokens[place].likeliest[choice]) replaceSelected(tokens[place].likeliest[choice].id);
  else return;
  event.preventDefault();
}

function onKey(event) {
  if (event.key === "Escape" && isWriting) stop();
  else if (event.key === "Escape" && tokens.length > 0) select(null);
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && worker && !isWriting) write();
}

function listen() {
  $("form").onsubmit = (event) => {
    event.preventDefault();
    if (isWriting) stop();
    else write();
  };
  $("continue").onclick = continueText;
  $("edit").onclick = () => {
    $("prompt").value = tokens.map((token) => token.isEnd ? "" : token.text).join("");
    $("prompt").focus();
  };
  $("dice").onclick = () => {
    $("seed").value = Math.floor(Math.random() * 1e6);
  };
  $("temperature").oninput = () => {
    $("temperature-value").textContent = number(Number($("temperature").value), 2);
  };
  $("colours").onchange = () => $("text").classList.toggle("plain", !$("colours").checked);
  $("close").onclick = () => select(null);
  $("text").onclick = ({target}) => {
    if (target.dataset.place !== undefined && getSelection().isCollapsed) select(Number(target.dataset.place));
  };
  $("text").onkeydown = onTextKey;
  document.onkeydown = onKey;
}

document.addEventListener("DOMContentLoaded", () => {
  translate();
  setStatus(SAY.loading);
  model = JSON.parse($("model").textContent);
  showCard(model);
  listen();
  $("temperature").oninput();
  startWorker();
});
