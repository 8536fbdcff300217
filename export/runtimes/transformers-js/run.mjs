// One exported folder in transformers.js: logits with its cache and greedy generation. Reads one JSON request from standard
// input, writes logits float32 little-endian to `out` and prints the generated ids and the versions as JSON.
import { closeSync, openSync, readFileSync, writeSync } from "node:fs";
import { dirname, basename } from "node:path";
import { AutoModelForCausalLM, DynamicCache, Tensor, env } from "@huggingface/transformers";

const request = JSON.parse(readFileSync(0, "utf-8")); // {folder, windows, prompt, steps, out}
env.allowRemoteModels = false;
env.localModelPath = dirname(request.folder);

const int64 = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
const ones = (n) => new Tensor("int64", new BigInt64Array(n).fill(1n), [1, n]);

const config = JSON.parse(readFileSync(`${request.folder}/config.json`, "utf-8"));
const dtype = config["transformers.js_config"].dtype;
const model = await AutoModelForCausalLM.from_pretrained(basename(request.folder), { dtype, device: "cpu" });

// The first window as a prompt and then id by id, the others whole.
const { windows, prompt } = request;
const file = openSync(request.out, "w");
for (const [i, ids] of windows.entries()) {
  const steps = Array.from({ length: ids.length - prompt }, (_, j) => [prompt + j, prompt + j + 1]);
  let past = null;
  for (const [start, stop] of i ? [[0, ids.length]] : [[0, prompt], ...steps]) {
    const out = await model({ input_ids: int64(ids.slice(start, stop)), attention_mask: ones(stop), past_key_values: past });
    writeSync(file, Buffer.from(new Float32Array(out.logits.data).buffer));
    const entries = Object.entries(out).filter(([name]) => name.startsWith("present"));
    past = new DynamicCache(Object.fromEntries(entries.map(([name, value]) => [name.replace("present", "past_key_values"), value])));
  }
}
closeSync(file);

const begun = performance.now();
const made = await model.generate({
  inputs: int64(windows[0].slice(0, prompt)),
  attention_mask: ones(prompt),
  max_new_tokens: request.steps,
  do_sample: false,
});
const seconds = (performance.now() - begun) / 1000;
const greedy = Array.from(made.data, Number).slice(prompt);
console.log(JSON.stringify({ greedy, tok_s: greedy.length / seconds, versions: { "transformers.js": env.version, node: process.versions.node } }));
