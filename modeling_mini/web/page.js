// The page: what is written, in colour, and which character of it is chosen.
import { load, write } from "./writer.js";
import * as details from "./details.js";

const element = (id) => document.getElementById(id);
const model = JSON.parse(element("model").textContent);
const text = element("text");

const EXPLANATIONS = {
  entropy:
    "Entropy is how unsure the model was before it wrote a character: where it is clear, the model knew what comes " +
    "next; where it is red, much was possible.",
  surprise:
    "Surprise is how unlikely a character was for the model: where it is clear, the model expected it; where it is " +
    "red, chance drew, or you wrote, what it thought unlikely.",
};
const SETTINGS = ["temperature", "top_p", "top_k", "max_new_tokens", "seed"];

let turns = []; // one for a model that continues, and one for each answer of a chat
let writing = null; // while a text is written: what aborts it, and a promise of its end
let chosen = null; // a piece

// A text of the model, with all that it has read. The pieces are those of ./writer.js, and know where they are:
// `at` is the index of the first token in `ids`, and `window` what of the ids the model saw there.
class Turn {
  ids = [];
  pieces = [];
  window = { dropped: 0, start: [] };

  constructor(said) {
    this.said = said;
    this.box = document.createElement("div");
    this.box.className = "turn";
    if (said !== undefined) {
      const line = document.createElement("div");
      line.className = "said";
      line.textContent = said;
      this.box.append(line);
    }
    text.append(this.box);
  }

  add(pieces, isPrompt = false) {
    for (const piece of pieces) {
      Object.assign(piece, { turn: this, at: this.ids.length, window: this.window });
      this.ids.push(...piece.tokens.map((token) => token.id));
      this.pieces.push(piece);
      piece.span = spanOf(piece, isPrompt);
      this.box.append(piece.span);
    }
    showScale();
  }

  // Forgets a piece and all after it.
  cutBefore(piece) {
    for (const gone of this.pieces.splice(this.pieces.indexOf(piece))) gone.span.remove();
    this.ids.length = piece.at;
    this.window = piece.window;
  }

  get answer() {
    return this.pieces.map((piece) => piece.text).join("");
  }
}

const pieceOf = new WeakMap();

function spanOf(piece, isPrompt) {
  const span = document.createElement("span");
  pieceOf.set(span, piece);
  span.className = "piece";
  span.classList.toggle("prompt", isPrompt);
  span.classList.toggle("newline", piece.text === "\n");
  span.classList.toggle("special", piece.text === "");
  span.textContent = piece.text || piece.tokens.at(-1).text;
  for (const measure of ["entropy", "surprise"]) {
    const values = piece.tokens.map((token) => token[measure]).filter((value) => value !== undefined);
    piece[measure] = values.length ? values.reduce((sum, value) => sum + value) / values.length : 0;
    span.style.setProperty(`--${measure}`, piece[measure]);
  }
  return span;
}

const allPieces = () => turns.flatMap((turn) => turn.pieces);

// The scale ends at the most that a piece of the text has.
function showScale() {
  for (const measure of ["entropy", "surprise"]) {
    const most = allPieces().reduce((most, piece) => Math.max(most, piece[measure]), 0);
    text.style.setProperty(`--most-${measure}`, most || 1);
    if (text.classList.contains(measure)) element("most").textContent = most.toFixed(1);
  }
}

function showMeasure() {
  const measure = document.querySelector("[name=measure]:checked").value;
  text.classList.toggle("entropy", measure === "entropy");
  text.classList.toggle("surprise", measure === "surprise");
  element("explanation").textContent = EXPLANATIONS[measure];
  showScale();
}

function choose(piece) {
  chosen?.span.classList.remove("chosen");
  chosen = piece;
  chosen?.span.classList.add("chosen");
  details.show(chosen, !writing);
  element("details").classList.toggle("open", chosen !== null);
  chosen?.span.scrollIntoView({ block: "nearest" });
}

function clear() {
  turns = [];
  text.replaceChildren();
  choose(null);
  showScale();
}

function setWriting(now) {
  writing = now;
  element("write").disabled = now !== null;
  const hadFocus = document.activeElement === element("stop");
  element("stop").hidden = now === null;
  if (hadFocus && now === null) element("write").focus();
  text.setAttribute("aria-busy", now !== null);
}

async function stop() {
  writing?.controller.abort();
  await writing?.end;
}

function settings() {
  const pairs = SETTINGS.map((name) => [name, element(name).valueAsNumber]);
  return Object.fromEntries(pairs.filter(([, value]) => !Number.isNaN(value)));
}

// Writes what a request asks for into a turn.
async function run(turn, request) {
  const controller = new AbortController();
  const { promise, resolve } = Promise.withResolvers();
  setWriting({ controller, end: promise });
  element("status").textContent = "Writing";
  element("notice").textContent = element("problem").textContent = "";
  const before = turn.pieces.length;
  try {
    for await (const event of write({ ...request, ...settings() }, controller.signal)) {
      if (event.read?.pieces) turn.add(event.read.pieces, true);
      else if (event.read) turn.ids = event.read.ids;
      if (event.window) turn.window = event.window;
      if (event.pieces) turn.add(event.pieces);
      if (event.notice) element("notice").textContent = event.notice;
      if (event.error) throw new Error(event.error);
      if (event.end) element("status").textContent = summary(event.end);
    }
  } catch (error) {
    element("status").textContent = controller.signal.aborted ? "Stopped." : "";
    if (!controller.signal.aborted) element("problem").textContent = error.message;
  } finally {
    if (turn.pieces.length === before && model.is_chat && !turn.pieces.length) {
      turns.splice(turns.indexOf(turn), 1); // nothing was answered, so nothing was said
      turn.box.remove();
    }
    setWriting(null);
    resolve();
    if (chosen) details.show(chosen, true);
  }
}

function summary({ reason, tokens, seconds }) {
  const speed = `${tokens} tokens, ${(tokens / seconds).toFixed(0)} per second.`;
  return { end: `${speed} The model ended the text.`, stop: `Stopped. ${speed}` }[reason] ?? speed;
}

async function submit() {
  await stop();
  const said = element("prompt").value;
  if (!model.is_chat) {
    clear();
    turns = [new Turn()];
    return run(turns[0], { prompt: said });
  }
  if (!said.trim()) return;
  const messages = turns.flatMap((turn) => [
    { role: "user", content: turn.said },
    { role: "assistant", content: turn.answer },
  ]);
  const turn = new Turn(said);
  turns.push(turn);
  element("prompt").value = "";
  return run(turn, { messages: [...messages, { role: "user", content: said }] });
}

// Goes on from a piece with another token in its place; what came after it goes.
async function goOn(piece, other) {
  if (!element("form").reportValidity()) return; // a setting is empty, or out of its range
  await stop();
  const { turn } = piece;
  for (const later of turns.splice(turns.indexOf(turn) + 1)) later.box.remove();
  choose(null);
  turn.cutBefore(piece);
  text.focus();
  return run(turn, { ids: [...turn.ids], first: other.id });
}

function setUp() {
  element("prompt-label").textContent = model.is_chat ? "Message" : "Prompt";
  element("new").hidden = !model.is_chat;
  if (!model.is_chat) element("prompt").value = model.prompts[0];
  for (const name of ["temperature", "top_p", "top_k"]) element(name).value = model[name];
  if (model.most_tokens) element("max_new_tokens").max = model.most_tokens;
  element("examples").hidden = false;
  for (const prompt of model.prompts) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = prompt;
    button.onclick = () => {
      element("prompt").value = prompt;
      element("prompt").focus();
    };
    element("examples").append(button);
  }
  showMeasure();
  element("settings").open = matchMedia("(min-width: 60rem)").matches;

  element("form").onsubmit = (event) => {
    event.preventDefault();
    submit();
  };
  document.onkeydown = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !element("write").disabled) {
      event.preventDefault();
      element("form").requestSubmit();
    }
    if (event.key === "Escape") writing ? stop() : choose(null);
  };
  element("stop").onclick = stop;
  element("new").onclick = async () => {
    await stop();
    clear();
    element("prompt").focus();
  };
  for (const radio of document.querySelectorAll("[name=measure]")) radio.onchange = showMeasure;

  text.onclick = (event) => {
    const piece = pieceOf.get(event.target);
    if (piece) choose(piece === chosen ? null : piece);
  };
  text.onpointerover = (event) => {
    if (event.pointerType === "mouse" && pieceOf.has(event.target)) details.show(pieceOf.get(event.target), false);
  };
  text.onpointerleave = (event) => event.pointerType === "mouse" && details.show(chosen, !writing);
  text.onkeydown = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const pieces = allPieces();
    const at = pieces.indexOf(chosen);
    const to = {
      ArrowRight: at + 1,
      ArrowLeft: at < 0 ? pieces.length - 1 : at - 1,
      Home: 0,
      End: pieces.length - 1,
    }[event.key];
    if (to !== undefined) {
      event.preventDefault();
      if (pieces[to]) choose(pieces[to]);
    } else if (event.key === "Enter" && chosen) {
      event.preventDefault();
      element("others").querySelector("button")?.focus();
    }
  };
  details.setUp(goOn);
}

setUp();
try {
  await load((share) => {
    element("progress").hidden = false;
    element("progress").value = share;
    element("status").textContent = `Loading the model: ${Math.round(100 * share)} %`;
  });
  element("status").textContent = "Ready.";
  element("write").disabled = false;
} catch (error) {
  element("status").textContent = "";
  element("problem").textContent = error.message;
}
element("progress").hidden = true;
