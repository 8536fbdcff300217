// Loads an exported `web` folder into onnxruntime-web, writes greedily from a prompt, streams the text and counts tokens a
// second. Everything is local: the page, the runtime and the model come from the server that serves this file.
// Where request.json asks for a check, logits of its windows go back too, to be compared with torch's.
import * as ort from "./ort/ort.wasm.min.mjs";

const $ = (id) => document.getElementById(id);
const get = async (path) => {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer;
};

ort.env.wasm.wasmPaths = new URL("./ort/", location.href).href;
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;

const config = await (await get("model/config.json")).json();
const manifest = await (await get("model/manifest.json")).json();
const name = manifest.model;
const data = `${name}_data`;
const started = performance.now();
const [graph, weights] = await Promise.all([name, data].map(async (n) => new Uint8Array(await (await get(`model/${n}`)).arrayBuffer())));
const session = await ort.InferenceSession.create(graph, {
  executionProviders: ["wasm"],
  externalData: [{ path: data.split("/").pop(), data: weights }],
});
const loaded = (performance.now() - started) / 1000;

const int64 = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
const entries = session.inputMetadata.filter((input) => input.name.startsWith("past_key_values."));
const empty = () => Object.fromEntries(entries.map(({ name, shape }) => [name, new ort.Tensor("float32", new Float32Array(0), [1, shape[1], 0, shape[3]])]));

class Stepper {
  constructor() {
    this.past = empty();
    this.length = 0;
  }
  async step(ids) {
    this.length += ids.length;
    const out = await session.run({ ...this.past, input_ids: int64(ids), attention_mask: int64(new Array(this.length).fill(1)) });
    this.past = Object.fromEntries(entries.map(({ name }) => [name, out[name.replace("past_key_values", "present")]]));
    return out.logits.data;
  }
}

const best = (logits, vocab) => {
  const last = logits.subarray(logits.length - vocab);
  let top = 0;
  for (let i = 1; i < vocab; i++) if (last[i] > last[top]) top = i;
  return top;
};

// Token ids to text, for the vocabularies Llama models have: byte-level BPE, or SentencePiece with <0x41> bytes.
const tokenizer = await fetch("model/tokenizer.json").then((answer) => (answer.ok ? answer.json() : null));
const pieces = [];
if (tokenizer) for (const [piece, id] of Object.entries(tokenizer.model.vocab)) pieces[id] = piece;
const byteLevel = JSON.stringify(tokenizer?.decoder ?? "").includes("ByteLevel");
const letters = new Map();
for (let byte = 0, extra = 0; byte < 256; byte++) {
  const plain = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
  letters.set(String.fromCharCode(plain ? byte : 256 + extra++), byte);
}
const bytesOf = (id) => {
  const piece = pieces[id];
  if (piece === undefined) return new TextEncoder().encode(tokenizer ? "" : `${id} `);
  if (byteLevel) return Uint8Array.from([...piece], (letter) => letters.get(letter) ?? 63);
  const byte = /^<0x([0-9A-F]{2})>$/.exec(piece);
  return byte ? Uint8Array.of(parseInt(byte[1], 16)) : new TextEncoder().encode(piece.replaceAll("\u2581", " "));
};

async function write(prompt, count) {
  $("again").disabled = true;
  const decoder = new TextDecoder();
  const shown = document.createElement("span");
  shown.className = "prompt";
  shown.textContent = prompt.map((id) => decoder.decode(bytesOf(id), { stream: true })).join("");
  $("text").replaceChildren(shown);
  const stepper = new Stepper();
  const ends = [config.eos_token_id].flat();
  const ids = [];
  let begun = 0;
  let token = best(await stepper.step(prompt), config.vocab_size);
  begun = performance.now();
  for (let i = 0; i < count && !ends.includes(token); i++) {
    ids.push(token);
    $("text").append(decoder.decode(bytesOf(token), { stream: true }));
    token = best(await stepper.step([token]), config.vocab_size);
    $("speed").textContent = `${ids.length} tokens, ${(ids.length / ((performance.now() - begun) / 1000)).toFixed(1)} tokens/s`;
  }
  $("again").disabled = false;
  return { greedy: ids, tok_s: ids.length / ((performance.now() - begun) / 1000) };
}

// The first window as a prompt and then id by id, the others whole; logits are posted as they come.
async function check(windows, prompt) {
  for (const [i, ids] of windows.entries()) {
    const stepper = new Stepper();
    const parts = i ? [ids] : [ids.slice(0, prompt), ...ids.slice(prompt).map((id) => [id])];
    for (const part of parts) await fetch("logits", { method: "POST", body: await stepper.step(part) });
  }
}

const megabytes = (graph.length + weights.length) / 1e6;
$("about").textContent = `${manifest.scheme}, ${megabytes.toFixed(1)} MB, loaded in ${loaded.toFixed(1)} s, onnxruntime-web ${ort.env.versions.web}, ${ort.env.wasm.numThreads} threads`;
const request = await fetch("request.json").then((answer) => (answer.ok ? answer.json() : { windows: [[1]], prompt: 1, steps: 64 }));
const prompt = request.windows[0].slice(0, request.prompt);
$("again").onclick = () => write(prompt, request.steps);
const written = await write(prompt, request.steps);
const answer = { ...written, loaded, versions: { "onnxruntime-web": ort.env.versions.web, browser: navigator.userAgent.match(/Chrome\/[\d.]+/)?.[0] ?? "?" } };
if (request.check) await check(request.windows, request.prompt);
await fetch("answer", { method: "POST", body: JSON.stringify(answer) });
document.title = "done";
