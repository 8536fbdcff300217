// One exported folder in transformers.js: logits with its cache and greedy generation. Reads one JSON request from the
// command line, writes logits float32 little-endian to `out` and prints the generated ids and the versions as JSON.
import { readFileSync, writeFileSync } from "node:fs";
import { dirname, basename } from "node:path";
import { AutoModelForCausalLM, DynamicCache, Tensor, env } from "@huggingface/transformers";

const request = JSON.parse(process.argv[2]); // {folder, ids, prompt, steps, out}
env.allowRemoteModels = false;
env.localModelPath = dirname(request.folder);

const int64 = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
const ones = (n) => new Tensor("int64", new BigInt64Array(n).fill(1n), [1, n]);

const config = JSON.parse(readFileSync(`${request.folder}/config.json`, "utf-8"));
const dtype = config["transformers.js_config"].dtype;
const model = await AutoModelForCausalLM.from_pretrained(basename(request.folder), { dtype, device: "cpu" });

const { ids, prompt } = request;
const spans = [[0, prompt], ...Array.from({ length: ids.length - prompt }, (_, i) => [prompt + i, prompt + i + 1])];
const rows = [];
let past = null;
for (const [start, stop] of spans) {
  const out = await model({ input_ids: int64(ids.slice(start, stop)), attention_mask: ones(stop), past_key_values: past });
  rows.push(Buffer.from(new Float32Array(out.logits.data).buffer));
  const entries = Object.entries(out).filter(([name]) => name.startsWith("present"));
  past = new DynamicCache(Object.fromEntries(entries.map(([name, value]) => [name.replace("present", "past_key_values"), value])));
}
writeFileSync(request.out, Buffer.concat(rows));

const begun = performance.now();
const made = await model.generate({
  inputs: int64(ids.slice(0, prompt)),
  attention_mask: ones(prompt),
  max_new_tokens: request.steps,
  do_sample: false,
});
const seconds = (performance.now() - begun) / 1000;
const greedy = Array.from(made.data, Number).slice(prompt);
console.log(JSON.stringify({ greedy, tok_s: greedy.length / seconds, versions: { "transformers.js": env.version, node: process.versions.node } }));
