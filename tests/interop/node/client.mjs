// Greedy tokens of a growing graph in onnxruntime-node. Standard input, one JSON object:
//   {"file": path of the graph, "prompts": [[ids], ...], "count": new tokens of every row}
// Standard output: [[new ids], ...]. Rows of different length are padded on the left.

import { readFileSync } from "node:fs";
import * as ort from "onnxruntime-node";

const { file, prompts, count } = JSON.parse(readFileSync(0, "utf8"));
const rows = prompts.length;
const session = await ort.InferenceSession.create(file, { intraOpNumThreads: 1 });
const pasts = session.inputMetadata.filter((input) => input.name.startsWith("past_key_values."));

function integers(table) {
  return new ort.Tensor("int64", BigInt64Array.from(table.flat(), BigInt), [table.length, table[0].length]);
}

// [rows, heads, 0 slots, size of a head]
function empty({ type, shape }) {
  const data = type === "float16" ? new Uint16Array(0) : new Float32Array(0);
  return new ort.Tensor(type, data, [rows, shape[1], 0, shape[3]]);
}

// Numbers of half precision come as their 16 bits.
function half(bits) {
  const [exponent, fraction] = [(bits >> 10) & 31, bits & 1023];
  const size = exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24;
  return bits & 0x8000 ? -size : size;
}

// The id with the largest of each row's last logits, the lowest such id.
function best(logits) {
  const [, columns, size] = logits.dims;
  const value = logits.data instanceof Uint16Array ? half : Number;
  return prompts.map((_, row) => {
    const start = (row * columns + columns - 1) * size;
    let found = 0;
    for (let id = 1; id < size; id++) {
      if (value(logits.data[start + id]) > value(logits.data[start + found])) found = id;
    }
    return found;
  });
}

const width = Math.max(...prompts.map((prompt) => prompt.length));
let ids = prompts.map((prompt) => [...Array(width - prompt.length).fill(0), ...prompt]);
let positions = prompts.map((prompt) => ids[0].map((_, column) => Math.max(0, column - (width - prompt.length))));
const mask = prompts.map((prompt) => ids[0].map((_, column) => Number(column >= width - prompt.length)));
const caches = Object.fromEntries(pasts.map((input) => [input.name, empty(input)]));
const made = prompts.map(() => []);
for (let step = 0; step < count; step++) {
  const output = await session.run({
    input_ids: integers(ids),
    attention_mask: integers(mask),
    position_ids: integers(positions),
    ...caches,
  });
  ids = best(output.logits).map((id) => [id]);
  ids.forEach(([id], row) => made[row].push(id));
  positions = positions.map((row) => [row.at(-1) + 1]);
  mask.forEach((row) => row.push(1));
  for (const name of Object.keys(caches)) caches[name] = output[name.replace("past_key_values", "present")];
}
console.log(JSON.stringify(made));
