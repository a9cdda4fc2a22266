// Writes with the model of this folder, by transformers.js. LIBRARY is where that is: a folder beside this file, or a CDN.
import { AutoModelForCausalLM, AutoTokenizer, Tensor, env, random } from "LIBRARY/transformers.min.js";

const library = "LIBRARY";
env.allowLocalModels = true;
env.allowRemoteModels = false;
// The files lie beside the page, and a cache of its own would go on giving those of an earlier export.
env.useBrowserCache = env.useWasmCache = false;
if (library.startsWith(".")) {
  const runtime = new URL(`${library}/ort-wasm-simd-threaded`, import.meta.url).href;
  env.backends.onnx.wasm.wasmPaths = { mjs: `${runtime}.mjs`, wasm: `${runtime}.wasm` };
}

const OTHERS = 5; // how many other tokens are named for each
const MILLISECONDS_BETWEEN_VIEWS = 50;
let tokenizer, model, labels, special, context, endIds;
let isStopped = false;

async function load() {
  const progress_callback = (info) => {
    if (info.status === "progress_total") postMessage({ progress: info.progress / 100 });
  };
  const names = await fetch("labels.json");
  if (!names.ok) throw new Error(`labels.json: ${names.status}`);
  ({ labels, special } = await names.json());
  tokenizer = await AutoTokenizer.from_pretrained(".");
  // WebAssembly, and not WebGPU: a small model is as fast there, and phones without WebGPU have it too.
  model = await AutoModelForCausalLM.from_pretrained(".", { device: "wasm", progress_callback });
  context = model.config.max_position_embeddings;
  endIds = [model.generation_config?.eos_token_id ?? []].flat();
  postMessage({ ready: true });
}

// One step of the model: `ids` after those in the cache. Gives log2 of the probabilities after each of them.
async function forward(ids, cache) {
  const past = cache?.length ?? 0;
  const integers = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
  const { logits, ...present } = await model({
    input_ids: integers(ids),
    attention_mask: integers(Array(past + ids.length).fill(1)),
    position_ids: integers(ids.map((_, i) => past + i)),
    past_key_values: cache?.tensors ?? null,
  });
  const tensors = Object.fromEntries(
    Object.entries(present).map(([name, tensor]) => [name.replace("present", "past_key_values"), tensor]),
  );
  const size = logits.dims[2];
  const rows = ids.map((_, i) => log2Softmax(logits.data.subarray(i * size, (i + 1) * size)));
  return { rows, cache: { tensors, length: past + ids.length } };
}

function log2Softmax(logits) {
  const most = logits.reduce((most, value) => Math.max(most, value), -Infinity);
  const total = logits.reduce((sum, value) => sum + Math.exp(value - most), 0);
  return Float64Array.from(logits, (value) => (value - most - Math.log(total)) / Math.LN2);
}

// The indices of the largest values, the largest first.
function largest(values, count) {
  if (count > OTHERS + 1) return [...values.keys()].sort((a, b) => values[b] - values[a]).slice(0, count);
  const found = [];
  for (let i = 0; i < values.length; i++) {
    if (found.length === count && values[i] <= values[found.at(-1)]) continue;
    const place = found.findIndex((other) => values[i] > values[other]);
    found.splice(place < 0 ? found.length : place, 0, i);
    found.length = Math.min(found.length, count);
  }
  return found;
}

// Draws a token as transformers does: temperature, then top k, then top p.
function draw(bits, { temperature, top_k, top_p }) {
  if (temperature === 0) return largest(bits, 1)[0];
  const scaled = log2Softmax(bits.map((value) => (value * Math.LN2) / temperature));
  const weights = scaled.map((value) => 2 ** value);
  let kept = [...weights.keys()];
  if (top_k > 0 || top_p < 1) {
    kept = largest(weights, top_k > 0 ? Math.min(top_k, weights.length) : weights.length);
    const total = kept.reduce((sum, id) => sum + weights[id], 0);
    let before = 0;
    kept = kept.filter((id) => {
      const isKept = before < top_p * total;
      before += weights[id];
      return isKept;
    });
  }
  let left = random.random() * kept.reduce((sum, id) => sum + weights[id], 0);
  return kept.find((id) => (left -= weights[id]) < 0) ?? kept.at(-1);
}

// What the model thought of a token before it was there; without figures where it predicted nothing.
function factsOf(id, bits) {
  if (!bits) return { id, text: labels[id] };
  const others = largest(bits, OTHERS + 1).filter((other) => other !== id);
  return {
    id,
    text: labels[id],
    probability: 2 ** bits[id],
    surprise: -bits[id],
    entropy: -bits.reduce((sum, value) => sum + (value > -1000 ? 2 ** value * value : 0), 0),
    others: others.slice(0, OTHERS).map((other) => ({ id: other, text: labels[other], probability: 2 ** bits[other] })),
  };
}

// Puts tokens together until the text of them is complete; a special token is a piece without text.
class PieceMaker {
  tokens = [];

  add(token) {
    this.tokens.push(token);
    const text = this.text();
    const isSpecial = this.tokens.length === 1 && special.includes(token.id);
    return (text && !text.endsWith("\uFFFD")) || isSpecial ? this.finish() : [];
  }

  finish() {
    if (!this.tokens.length) return [];
    const piece = { text: this.text(), tokens: this.tokens };
    this.tokens = [];
    return [piece];
  }

  text() {
    return tokenizer.decode(this.tokens.map(({ id }) => id), { skip_special_tokens: true });
  }
}

// The ids to continue; of a conversation, the oldest turns leave until there is room for an answer.
function idsOf({ prompt, messages, ids, max_new_tokens }) {
  if (ids) return ids;
  const encode = (text, options) => tokenizer(text, options).input_ids.tolist()[0].map(Number);
  if (prompt !== undefined) return prompt === "" && !tokenizer.bos_token ? [tokenizer.eos_token_id] : encode(prompt);
  const room = Math.min(max_new_tokens, context >> 1);
  for (let forgotten = 0; ; forgotten += 2) {
    const kept = messages.slice(forgotten);
    const text = tokenizer.apply_chat_template(kept, { tokenize: false, add_generation_prompt: true });
    const read = encode(text, { add_special_tokens: false });
    if (read.length <= context - room || kept.length === 1) {
      if (forgotten) {
        const notice = `The oldest ${forgotten / 2} of the turns did not fit the context and were not read.`;
        postMessage({ notice });
      }
      return read;
    }
  }
}

// Ends once the messages that came meanwhile are read: one may say to stop.
function messagesRead() {
  const { port1, port2 } = new MessageChannel();
  return new Promise((resolve) => {
    port1.onmessage = resolve;
    port2.postMessage(null);
  });
}

async function write(request) {
  const started = performance.now();
  const ids = [...idsOf(request)]; // all that was read and written
  const promptLength = ids.length;
  const count = request.max_new_tokens + (request.first === undefined ? 0 : 1);
  const bos = model.generation_config?.bos_token_id ?? null;
  const pieces = new PieceMaker();
  const waiting = [];
  let lastView = 0;
  const tell = (more) => {
    waiting.push(...more);
    if (!waiting.length || performance.now() - lastView < MILLISECONDS_BETWEEN_VIEWS) return;
    postMessage({ pieces: waiting.splice(0) });
    lastView = performance.now();
  };
  const flush = () => {
    lastView = 0;
    tell([]);
  };

  if (request.seed !== undefined) random.seed(request.seed);
  let window = { dropped: 0, start: [] };
  let cache = null;
  let reason = "length";
  let written = 0;
  for (; written < count; written++) {
    await messagesRead();
    if (isStopped) {
      reason = "stop";
      break;
    }
    // When the context is full, the last half of it becomes the beginning of a new one, as in generate.py.
    let isNewWindow = false;
    if (window.start.length + ids.length - window.dropped >= context) {
      const start = bos === null ? [] : [bos];
      window = { start, dropped: ids.length - (Math.max(1, context >> 1) - start.length) };
      cache = null;
      isNewWindow = true;
    }
    const unread = cache ? [ids.at(-1)] : [...window.start, ...ids.slice(window.dropped)];
    const result = await forward(unread, cache);
    cache = result.cache;
    if (written === 0 && request.first === undefined) {
      const rowOf = (i) => (i < window.dropped ? undefined : result.rows[i - window.dropped + window.start.length - 1]);
      const maker = new PieceMaker();
      const read = ids.flatMap((id, i) => maker.add(factsOf(id, rowOf(i)))).concat(maker.finish());
      postMessage({ read: { ids: [...ids], pieces: request.messages ? undefined : read } });
      if (isNewWindow) postMessage({ notice: longPrompt(promptLength, promptLength - window.dropped) });
    }
    if (isNewWindow) {
      flush();
      postMessage({ window });
    }
    const bits = result.rows.at(-1);
    const next = written === 0 && request.first !== undefined ? request.first : draw(bits, request);
    ids.push(next);
    tell(pieces.add(factsOf(next, bits)));
    if (endIds.includes(next) && next !== request.first) {
      reason = "end";
      written++;
      break;
    }
  }
  tell(pieces.finish());
  flush();
  postMessage({ end: { reason, tokens: written, seconds: (performance.now() - started) / 1000 } });
}

const longPrompt = (length, kept) =>
  `The prompt has ${length} tokens and the context ${context}: only the last ${kept} tokens are used.`;

onmessage = ({ data }) => {
  isStopped = data.stop ?? false;
  if (!data.stop) write(data).catch((error) => postMessage({ error: error.message }));
};
load().catch((error) => {
  const advice = "if it is still being written, load the page again when that is done";
  postMessage({ error: `The model beside this page could not be loaded: ${advice} (${error.message}).` });
});
