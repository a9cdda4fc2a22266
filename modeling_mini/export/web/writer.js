// Lets a worker write, so that the page stays awake while the model computes.

export const canLook = false; // the graph gives logits, and nothing of what happens within the model
export const look = undefined;

let worker;

// Resolves once the model is there; `onProgress` gets the share of it that is loaded, from 0 to 1.
export function load(onProgress) {
  if (typeof WebAssembly === "undefined") {
    throw new Error("This browser runs no WebAssembly, which the model needs: please use another one.");
  }
  worker = new Worker("worker.js", { type: "module" });
  return new Promise((resolve, reject) => {
    worker.onerror = (event) => {
      event.preventDefault();
      const reason = event.message || "worker.js, or what it imports, could not be loaded";
      reject(new Error(`The page could not load transformers.js, which runs the model (${reason}).`));
    };
    worker.onmessage = ({ data }) => {
      if (data.progress !== undefined) onProgress(data.progress);
      else if (data.error) reject(new Error(data.error));
      else resolve();
    };
  });
}

// The events of a text; generation_mini/demo/writing.py says what they are. Aborting ends the text, not the events.
export async function* write(request, signal) {
  const events = [];
  let wake = () => {};
  worker.onmessage = ({ data }) => {
    events.push(data);
    wake();
  };
  signal.addEventListener("abort", () => worker.postMessage({ stop: true }));
  worker.postMessage(request);
  for (;;) {
    while (!events.length) await new Promise((resolve) => (wake = resolve));
    const event = events.shift();
    yield event;
    if (event.end || event.error) return;
  }
}
