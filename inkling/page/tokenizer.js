// Text to token ids and back, as inkling/tokenizer.py has it: characters, bytes, or byte-pair merges.
// Bytes are kept as binary strings, a character for each byte, which can be keys of a Map.

function toBinary(text) {
  return Array.from(new TextEncoder().encode(text), (byte) => String.fromCharCode(byte)).join("");
}

function toBytes(binary) {
  return Uint8Array.from(binary, (char) => char.charCodeAt(0));
}

const SINGLE_BYTES = Array.from({length: 256}, (_, byte) => String.fromCharCode(byte));

class Tokenizer {
  // stored: what web_page.py writes; its pattern is already JavaScript's.
  constructor(stored) {
    Object.assign(this, stored);        // kind, bos, stops, lineBreak, emptyPrompt, and what the kind needs
    this.ids = new Map();               // of a character or of a token's bytes
    this.pieces = [];                   // the bytes of each id
    if (this.kind === "char") {
      for (const char of this.chars) this.add(char, toBinary(char));
    }
    if (this.kind === "byte" || this.fallback !== null) this.pieces.push(...SINGLE_BYTES);
    if (this.kind === "bpe") {
      for (const line of this.ranks.split("\n")) {
        const [token, rank] = line.split(" ");
        this.ids.set(atob(token), Number(rank));
        this.pieces[rank] = atob(token);
      }
      for (const [text, id] of Object.entries(this.special)) this.pieces[id] = toBinary(text);
      this.pattern = new RegExp(this.pattern, "gu");
    }
  }

  add(key, piece) {
    this.ids.set(key, this.pieces.length);
    this.pieces.push(piece);
  }

  // -- text to ids. Text that looks like a special token is ordinary text.

  // Throws an Error whose `unknown` holds the characters that the tokenizer lacks.
  encodePrompt(typed) {
    const text = this.fitForm(typed.replace(/\r\n|\r|\n/g, this.lineBreak));
    if (text === "") return [...this.emptyPrompt];
    const ids = this.encode(text);
    return this.bos === null ? ids : [this.bos, ...ids];
  }

  encode(text) {
    if (this.kind === "char") return this.encodeChars(text);
    if (this.kind === "byte") return [...new TextEncoder().encode(text)];
    const parts = text.match(this.pattern) ?? [];
    if (parts.join("") !== text) throw this.lacks(text);        // the pattern skips some of it
    return parts.flatMap((part) => this.merge(toBinary(part)));
  }

  encodeChars(text) {
    const unknown = this.unknownIn(text);
    if (unknown.length > 0 && this.fallback === null) throw this.lacks([...new Set(unknown)].join(" "));
    return Array.from(text).flatMap((char) => this.ids.get(char) ?? this.spell(char));
  }

  // The ids of a character's bytes.
  spell(char) {
    return Array.from(new TextEncoder().encode(char), (byte) => this.fallback + byte);
  }

  // Join the two neighbours whose token has the lowest rank, until none have one.
  merge(binary) {
    if (this.ids.has(binary)) return [this.ids.get(binary)];
    const parts = [...binary];
    for (;;) {
      let lowest = Infinity;
      let place = 0;
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.ids.get(parts[i] + parts[i + 1]) ?? Infinity;
        if (rank < lowest) [lowest, place] = [rank, i];
      }
      if (lowest === Infinity) return parts.map((part) => this.ids.get(part));
      parts.splice(place, 2, parts[place] + parts[place + 1]);
    }
  }

  unknownIn(text) {
    return this.kind === "char" ? Array.from(text).filter((char) => !this.ids.has(char)) : [];
  }

  lacks(unknown) {
    return Object.assign(new Error(`the tokenizer lacks ${unknown}`), {unknown});
  }

  // é is one character, or e and an accent: the form of which the tokenizer lacks the fewest.
  fitForm(text) {
    const forms = [text, text.normalize("NFC"), text.normalize("NFD")];
    const lacking = forms.map((form) => this.unknownIn(form).length);
    return forms[lacking.indexOf(Math.min(...lacking))];
  }

  // -- ids to text

  // A function from one id to the text that it completes: a character spread over several tokens is
  // held back until it is whole. Called without an id it returns what is held back.
  stream() {
    const decoder = new TextDecoder("utf-8", {ignoreBOM: true});
    return (id) => id === undefined ? decoder.decode() : decoder.decode(toBytes(this.pieces[id] ?? ""), {stream: true});
  }

  // A token by itself: its text, or its bytes where they are only part of a character.
  name(id) {
    const bytes = toBytes(this.pieces[id] ?? "");
    try {
      return new TextDecoder("utf-8", {ignoreBOM: true, fatal: true}).decode(bytes);
    } catch {
      return Array.from(bytes, (byte) => `\\x${byte.toString(16).padStart(2, "0")}`).join("");
    }
  }
}
