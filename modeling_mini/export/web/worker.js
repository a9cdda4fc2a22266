// Writes with the model of this folder, by transformers.js. LIBRARY is where that is: a folder beside this file, or a CDN.
import {
  AutoModelForCausalLM,
  AutoTokenizer,
  InterruptableStoppingCriteria,
  TextStreamer,
  env,
} from "LIBRARY/transformers.min.js";

const library = "LIBRARY";
env.allowLocalModels = true;
env.allowRemoteModels = false;
// The files lie beside the page, and a cache of its own would go on giving those of an earlier export.
env.useBrowserCache = env.useWasmCache = false;
if (library.startsWith(".")) {
  const runtime = new URL(`${library}/ort-wasm-simd-threaded`, import.meta.url).href;
  env.backends.onnx.wasm.wasmPaths = { mjs: `${runtime}.mjs`, wasm: `${runtime}.wasm` };
}

const stopping = new InterruptableStoppingCriteria();
let tokenizer, model;

// Ends once the messages that came meanwhile are read.
function messagesRead() {
  const { port1, port2 } = new MessageChannel();
  return new Promise((resolve) => {
    port1.onmessage = resolve;
    port2.postMessage(null);
  });
}

async function load() {
  tokenizer = await AutoTokenizer.from_pretrained(".");
  model = await AutoModelForCausalLM.from_pretrained(".", { device: "wasm" });
  const forward = model.forward.bind(model);
  // generate() awaits nothing that lets a worker read its messages, and one may say to stop.
  model.forward = async (inputs) => {
    await messagesRead();
    return forward(inputs);
  };
  postMessage({ context: model.config.max_position_embeddings });
}

async function write({ prompt, tokens, temperature }) {
  const ids = [];
  const streamer = new TextStreamer(tokenizer, {
    skip_prompt: true,
    token_callback_function: (next) => {
      ids.push(...next);
      // All of them anew: a character may have several tokens, and the last one may be incomplete.
      const text = tokenizer.decode(ids, { skip_special_tokens: true }).replace(/\uFFFD+$/, "");
      postMessage({ text: prompt + text });
    },
    callback_function: () => {},
  });
  postMessage({ text: prompt });
  stopping.reset();
  const started = performance.now();
  await model.generate({
    ...tokenizer(prompt),
    max_new_tokens: tokens,
    ...(temperature > 0 ? { do_sample: true, temperature } : { do_sample: false }),
    streamer,
    stopping_criteria: stopping,
  });
  postMessage({ done: true, tokens: ids.length, seconds: (performance.now() - started) / 1000 });
}

const report = (error) => postMessage({ error: error.message });
onmessage = ({ data }) => {
  if (data.stop) stopping.interrupt();
  else write(data).catch(report);
};
load().catch(report);
