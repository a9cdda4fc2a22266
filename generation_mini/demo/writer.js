// Lets the server write. The page has another writer.js where the model runs in the browser itself.

export const canLook = true;

export async function load() {}

// What browsers say of a broken connection ("Failed to fetch", "network error") does not help anybody.
async function received(answer, signal) {
  try {
    return await answer;
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Error("The server does not answer: it has ended, or the network is down.");
  }
}

async function post(path, request, signal) {
  const response = await received(fetch(path, { method: "POST", body: JSON.stringify(request), signal }), signal);
  if (!response.ok) {
    const { error } = await response.json().catch(() => ({}));
    throw new Error(error ?? `The server answers with error ${response.status}.`);
  }
  return response;
}

// The events of a text; generation_mini/demo/writing.py says what they are.
export async function* write(request, signal) {
  const response = await post("write", request, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await received(reader.read(), signal);
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}

// What happened within the model before a token.
export async function look(request) {
  return (await post("look", request)).json();
}
