// The panel beside the text: what the model thought of one piece, what else was likely, and what happened inside.
import { canLook, look } from "./writer.js";

const element = (id) => document.getElementById(id);
const NAMES = { " ": "space", "\n": "new line", "\t": "tab", "·": "space", "↵": "new line", "⇥": "tab" };

let shown = null; // the piece in the panel
let inside = null; // what the model did before the piece: see generation_mini/demo/inside.py
let goOn; // what a click on another token calls

const nameOf = (text) => NAMES[text] ?? `“${text}”`;

function percent(probability) {
  const percents = 100 * probability;
  const number = percents >= 9.5 ? percents.toFixed(0) : Number(percents.toPrecision(2));
  return percents < 0.01 ? "<\u00a00.01\u00a0%" : `${number}\u00a0%`; // no line ends before the sign
}

function newElement(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

export function setUp(onOther) {
  goOn = onOther;
  element("layer").onchange = element("head").onchange = showAttention;
}

// Shows a piece, or nothing; `canAsk` says whether the model may be asked what happened inside, which takes a moment.
export function show(piece, canAsk) {
  if (piece !== shown) inside = null;
  shown = piece;
  element("alternatives").hidden = !piece?.tokens[0].others;
  if (piece === null) {
    element("chosen").textContent = "A character";
    element("figures").textContent = "Point at a character of the text, or touch it, to see what else was likely.";
  } else {
    element("chosen").textContent = nameOf(piece.text || piece.tokens.at(-1).text);
    element("figures").textContent = figuresOf(piece);
    element("others").replaceChildren(...(piece.tokens[0].others ?? []).map((other) => itemOf(piece, other)));
  }
  const mayLook = canLook && piece !== null && piece.at > 0;
  if (mayLook && canAsk && inside === null) ask(piece);
  else if (!inside) element("inside").hidden = true;
}

function figuresOf(piece) {
  const known = piece.tokens.filter((token) => token.probability !== undefined);
  if (!known.length) return "The text begins here, so the model had nothing to predict it from.";
  const probability = known.reduce((product, token) => product * token.probability, 1);
  const several = piece.tokens.length > 1 ? `; it has ${piece.tokens.length} tokens` : "";
  return (
    `The model gave it a probability of ${percent(probability)}: a surprise of ${piece.surprise.toFixed(2)} bits, where ` +
    `it was unsure by ${piece.entropy.toFixed(2)} bits of entropy${several}.`
  );
}

function itemOf(piece, other) {
  const button = newElement("button", "", { type: "button", style: `--probability: ${other.probability}` });
  button.setAttribute("aria-label", `Go on with ${nameOf(other.text)}, ${percent(other.probability)}`);
  button.append(newElement("span", nameOf(other.text)), newElement("span", percent(other.probability)));
  button.onclick = () => goOn(piece, other);
  const item = document.createElement("li");
  item.append(button);
  return item;
}

async function ask(piece) {
  const { turn, window, at } = piece;
  const ids = [...window.start, ...turn.ids.slice(window.dropped, at)];
  let answer;
  try {
    answer = await look({ ids, token: piece.tokens[0].id });
  } catch (error) {
    answer = { pieces: [], attention: [], lens: [], notice: error.message };
  }
  if (piece !== shown) return; // another one is shown by now
  inside = answer;
  element("inside").hidden = false;
  element("inside-notice").textContent = answer.notice;
  fillSelect("layer", answer.attention.length);
  fillSelect("head", answer.attention[0]?.length ?? 0);
  showAttention();
  showLens(piece);
}

function fillSelect(id, count) {
  const select = element(id);
  if (select.options.length === count + 1) return; // what was selected stays
  const options = Array.from({ length: count }, (_, i) => new Option(i + 1, i));
  select.replaceChildren(new Option("mean of all", "mean"), ...options);
}

// The mean over the layers and heads that are selected, for each token.
function selectedAttention() {
  const pick = (list, id) => (element(id).value === "mean" ? list : [list[element(id).value]]);
  const maps = pick(inside.attention, "layer").flatMap((heads) => pick(heads, "head"));
  return maps[0].map((_, token) => maps.reduce((sum, map) => sum + map[token], 0) / maps.length);
}

function showAttention() {
  const box = element("attention");
  box.replaceChildren();
  element("looked-most").textContent = "";
  if (!inside?.attention.length) return;
  const weights = selectedAttention();
  let at = 0;
  const pieces = inside.pieces.map((piece) => {
    const weight = weights.slice(at, (at += piece.tokens)).reduce((sum, each) => sum + each, 0);
    return { ...piece, weight };
  });
  const order = [...pieces].sort((a, b) => b.weight - a.weight);
  box.style.setProperty("--most", order[0].weight || 1);
  for (const { text, special, weight } of pieces) {
    const kind = special ? " special" : text === "\n" ? " newline" : "";
    box.append(newElement("span", text, { class: `piece${kind}`, style: `--weight: ${weight}`, title: percent(weight) }));
  }
  const most = order.slice(0, 3).map(({ text, weight }) => `${nameOf(text)} ${percent(weight)}`);
  element("looked-most").textContent = `Most at ${most.join(", ")}.`;
  box.scrollTop = box.scrollHeight;
}

function showLens(piece) {
  element("lens-chosen").textContent = nameOf(piece.tokens[0].text);
  const last = inside.lens.length - 1;
  const rows = inside.lens.map(({ text, probability, chosen }, layer) => {
    const row = document.createElement("tr");
    const name = layer === 0 ? "embedding" : layer === last ? `layer ${layer}, the model` : `layer ${layer}`;
    row.append(
      newElement("th", name, { scope: "row" }),
      newElement("td", `${nameOf(text)} ${percent(probability)}`),
      newElement("td", percent(chosen)),
    );
    return row;
  });
  element("lens").tBodies[0].replaceChildren(...rows);
  element("lens").hidden = rows.length === 0;
}
