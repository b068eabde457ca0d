// The picture of a trace: which blocks each layer and KV head read, and how the gates stood.
import { getJSON } from "./api.js";
import { colour, legend, onThemeChange, shape, sized } from "./draw.js";

const $ = (id) => document.getElementById(id);
const LEFT = 30; // pixels for the layers' numbers
const TOP = 16; // and for the blocks'
const GAP = 2; // between layers
const GATES = [["cmp", "compressed"], ["slc", "selected"], ["win", "window"]];
let trace = null;
let cursor = null; // { row, block }

export async function showTrace(id) {
  const kept = await getJSON(`/traces/${encodeURIComponent(id)}`);
  trace = { ...kept, selection: words(kept.selection, Int32Array) };
  trace.gates = kept.gates === null ? null : words(kept.gates, Float32Array);
  const rows = trace.layers * trace.kv_heads;
  trace.row = Math.max(5, Math.min(16, Math.floor(450 / rows))); // pixels
  cursor = null;
  $("trace").hidden = false;
  $("trace-token").max = trace.tokens.length;
  $("trace-token").value = 0;
  $("trace-cell").textContent = "Point at a block, or move over the picture with the arrow keys.";
  $("trace-text").textContent = "";
  $("trace-note").textContent = `${trace.layers} layers of ${trace.kv_heads} KV heads, each reading up to `
    + `${trace.selected} blocks of ${trace.page_size} tokens; ${trace.tokens.length} tokens of the answer `
    + `over a prompt of ${trace.num_prompt_tokens}. The stronger its colour, the more of them read a block.`;
  draw();
}

function words(base64, Kind) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  return new Kind(bytes.buffer);
}

function chosenTokens() {
  const at = Number($("trace-token").value);
  return at === 0 ? trace.tokens.map((_, token) => token) : [at - 1];
}

// How many of the chosen tokens read each block, by row (layer and KV head).
function tally(tokens) {
  const rows = trace.layers * trace.kv_heads;
  const blocks = trace.blocks.length;
  const counts = new Uint16Array(rows * blocks);
  for (const token of tokens) {
    for (let row = 0; row < rows; row++) {
      const start = (token * rows + row) * trace.selected;
      for (let at = start; at < start + trace.selected; at++) {
        const block = trace.selection[at];
        if (block >= 0) counts[row * blocks + block]++;
      }
    }
  }
  return counts;
}

function top(row) {
  return TOP + row * trace.row + Math.floor(row / trace.kv_heads) * GAP;
}

function cellWidth() {
  const room = $("trace-scroll").clientWidth - LEFT - 8;
  return Math.max(3, Math.min(24, Math.floor(room / trace.blocks.length)));
}

function draw() {
  const tokens = chosenTokens();
  trace.counts = tally(tokens);
  trace.num_chosen = tokens.length;
  const which = Number($("trace-token").value);
  $("trace-which").textContent = which === 0
    ? `all ${trace.tokens.length}`
    : `${which}: “${trace.tokens[which - 1].text.trim() || "␣"}”`;
  drawBlocks();
  drawGates(tokens);
  if (cursor) tellCell();
}

function drawBlocks() {
  const rows = trace.layers * trace.kv_heads;
  const blocks = trace.blocks.length;
  const width = cellWidth();
  const context = sized($("trace-map"), LEFT + blocks * width + 2, top(rows - 1) + trace.row + 2);
  const [ink, ground, quiet] = [colour("accent"), colour("free"), colour("quiet")];
  context.font = "11px system-ui, sans-serif";
  for (let row = 0; row < rows; row++) {
    context.globalAlpha = 1;
    context.fillStyle = ground;
    context.fillRect(LEFT, top(row), blocks * width, trace.row - 1);
    context.fillStyle = ink;
    for (let block = 0; block < blocks; block++) {
      const share = trace.counts[row * blocks + block] / trace.num_chosen;
      if (share === 0) continue;
      context.globalAlpha = 0.2 + 0.8 * share;
      context.fillRect(LEFT + block * width, top(row), width - 1, trace.row - 1);
    }
  }
  context.globalAlpha = 1;
  context.fillStyle = quiet;
  drawNumbers(context, width);
  if (cursor) {
    context.strokeStyle = colour("text");
    context.lineWidth = 2;
    context.strokeRect(LEFT + cursor.block * width - 1, top(cursor.row) - 1, width + 1, trace.row + 1);
  }
}

function drawNumbers(context, width) {
  const each = Math.max(1, Math.ceil(14 / (trace.row * trace.kv_heads + GAP)));
  context.textAlign = "right";
  context.textBaseline = "top";
  for (let layer = 0; layer < trace.layers; layer += each) {
    context.fillText(layer, LEFT - 6, top(layer * trace.kv_heads) - 1);
  }
  context.textAlign = "left";
  context.textBaseline = "alphabetic";
  const step = Math.ceil(48 / width);
  for (let block = 0; block < trace.blocks.length; block += step) {
    context.fillText(block, LEFT + block * width, TOP - 5);
  }
}

function tellCell() {
  const { row, block } = cursor;
  const [layer, head] = [Math.floor(row / trace.kv_heads), row % trace.kv_heads];
  const read = trace.counts[row * trace.blocks.length + block];
  const first = block * trace.page_size;
  const [prompt, end] = [trace.num_prompt_tokens, first + trace.page_size];
  const part = end <= prompt ? "prompt" : first < prompt ? "prompt and answer" : "answer";
  const times = trace.num_chosen === 1
    ? (read ? "read for this token" : "not read for this token")
    : `read for ${read} of ${trace.num_chosen} tokens`;
  $("trace-cell").textContent = `Layer ${layer}, KV head ${head}, block ${block} `
    + `(${part}, from token ${first}): ${times}.`;
  $("trace-text").textContent = trace.blocks[block];
}

function moveTo(row, block) {
  const rows = trace.layers * trace.kv_heads;
  cursor = {
    row: Math.min(Math.max(row, 0), rows - 1),
    block: Math.min(Math.max(block, 0), trace.blocks.length - 1),
  };
  drawBlocks();
  tellCell();
}

function drawGates(tokens) {
  const svg = $("gates");
  svg.replaceChildren();
  // SVG elements have the attribute, but no property of that name.
  svg.toggleAttribute("hidden", trace.gates === null);
  $("gates-legend").hidden = trace.gates === null;
  if (trace.gates === null) {
    $("gates-note").textContent =
      "This checkpoint has no learned gates: compressed 0, selected 1, window 0 in every layer.";
    return;
  }
  $("gates-note").textContent = "Mean over heads and the chosen tokens, from 0 (closed) to 1 (open).";
  svg.setAttribute("viewBox", "0 0 100 100");
  svg.setAttribute("preserveAspectRatio", "none");
  for (const y of [0, 50, 100]) shape("line", { x1: 0, x2: 100, y1: y, y2: y }, svg);
  const entries = GATES.map(([kind, name], branch) => {
    const byLayer = gateByLayer(tokens, branch);
    const place = (value, layer) => `${100 * layer / Math.max(1, trace.layers - 1)},${100 - 100 * value}`;
    shape("polyline", { class: kind, points: byLayer.map(place).join(" ") }, svg);
    const mean = byLayer.reduce((a, b) => a + b, 0) / trace.layers;
    return [kind, `${name} ${mean.toFixed(2)}`];
  });
  legend($("gates-legend"), entries);
  svg.setAttribute("aria-label", `Gates by layer, means: ${entries.map(([, text]) => text).join(", ")}`);
}

function gateByLayer(tokens, branch) {
  const { layers, kv_heads: heads, gates } = trace;
  return Array.from({ length: layers }, (_, layer) => {
    let sum = 0;
    for (const token of tokens) {
      for (let head = 0; head < heads; head++) {
        sum += gates[((token * layers + layer) * heads + head) * 3 + branch];
      }
    }
    return sum / (tokens.length * heads);
  });
}

function cellAt(event) {
  const box = $("trace-map").getBoundingClientRect();
  const [x, y] = [event.clientX - box.left - LEFT, event.clientY - box.top - TOP];
  const perLayer = trace.row * trace.kv_heads + GAP;
  const layer = Math.floor(y / perLayer);
  const head = Math.min(Math.floor((y - layer * perLayer) / trace.row), trace.kv_heads - 1);
  return [layer * trace.kv_heads + head, Math.floor(x / cellWidth())];
}

const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

export function startTrace() {
  $("trace-token").addEventListener("input", draw);
  $("trace-map").addEventListener("pointermove", (event) => moveTo(...cellAt(event)));
  $("trace-map").addEventListener("click", (event) => moveTo(...cellAt(event)));
  $("trace-map").addEventListener("keydown", (event) => {
    const step = STEPS[event.key];
    if (!step) return;
    event.preventDefault();
    if (cursor === null) moveTo(0, 0);
    else moveTo(cursor.row + step[0], cursor.block + step[1]);
  });
  const redraw = () => trace && draw();
  onThemeChange(redraw);
  addEventListener("resize", redraw);
}
