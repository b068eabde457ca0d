// What is loaded, the live numbers and the cache map, all from /status.
import { bytes, colour, count, facts, legend, onThemeChange, seconds, sized, sparkline } from "./draw.js";

const SPAN = 120; // seconds that a sparkline shows
const $ = (id) => document.getElementById(id);
const seen = []; // { now, generated, prompt, occupancy }, oldest first
let latest = null;

export function show(status) {
  latest = status;
  seen.push({
    now: status.now,
    generated: status.tokens.generated,
    prompt: status.tokens.prompt,
    occupancy: status.cache.in_use / status.cache.blocks,
  });
  while (seen.length > 2 && seen[1].now < status.now - SPAN) seen.shift();
  showLoaded(status);
  showRequests(status);
  showFirstTokens(status);
  showThroughput(status);
  showOccupancy(status);
  showMap(status);
  showHostTier(status);
}

function showLoaded(status) {
  const engine = status.engine;
  $("version").textContent = status.version;
  $("model").textContent = status.model;
  const entries = [["Context", `${count.format(status.max_model_len)} tokens`]];
  if (engine) {
    const trained = engine.attention !== "nsa" || engine.trained_sparse;
    entries.unshift(["Attention", trained ? engine.attention : "nsa, on a dense checkpoint"]);
    entries.unshift(["Type and device", `${engine.dtype} on ${engine.device}`]);
    entries.push(
      ["Cache", `${count.format(status.cache.blocks * engine.page_size)} tokens`],
      ["Page", `${engine.page_size} tokens`],
      ["Layers", count.format(engine.num_layers)],
      ["Tokens of a step", `at most ${count.format(engine.token_budget)}`],
      ["Family", engine.family],
    );
  }
  facts($("facts"), entries);
}

function showRequests({ requests, cache, tokens, steps }) {
  const { prefix_queries: queries, prefix_hits: hits } = cache;
  const ended = requests.finished;
  facts($("requests"), [
    ["Running", count.format(requests.running)],
    ["Waiting", count.format(requests.waiting)],
    ["Answered", count.format((ended.stop ?? 0) + (ended.length ?? 0) + (ended.tool_calls ?? 0))],
    ["Aborted or failed", count.format((ended.abort ?? 0) + (ended.error ?? 0))],
    ["Refused", count.format(requests.rejected)],
    ["Preemptions", count.format(requests.preemptions)],
    ["Prefix hits", queries ? `${(100 * hits / queries).toFixed(1)} %` : "–"],
    ["Tokens generated", count.format(tokens.generated)],
    ["Steps", count.format(steps)],
  ]);
}

function showFirstTokens({ first_tokens: times }) {
  const shown = times.filter((time) => time.age < SPAN);
  const top = Math.max(0, ...shown.map((time) => time.seconds));
  const points = shown.map((time) => [1 - time.age / SPAN, time.seconds]);
  sparkline($("first-token-line"), points, { top, dots: true });
  if (times.length === 0) return;
  const sorted = times.map((time) => time.seconds).sort((a, b) => a - b);
  const median = seconds(sorted[sorted.length >> 1]);
  $("first-token").textContent = seconds(times[times.length - 1].seconds);
  $("first-token-note").textContent = `median of the last ${times.length}: ${median}`;
  $("first-token-line").setAttribute(
    "aria-label", `Time to first token, the last two minutes: ${shown.length} requests, at most ${seconds(top)}`,
  );
}

function showThroughput(status) {
  const rates = seen.slice(1).map((sample, at) => {
    const passed = sample.now - seen[at].now;
    return {
      now: sample.now,
      generated: (sample.generated - seen[at].generated) / passed,
      prompt: (sample.prompt - seen[at].prompt) / passed,
    };
  });
  const top = Math.max(0, ...rates.map((rate) => rate.generated));
  const points = rates.map((rate) => [1 - (status.now - rate.now) / SPAN, rate.generated]);
  sparkline($("throughput-line"), points, { top });
  if (rates.length === 0) return;
  const last = rates[rates.length - 1];
  $("throughput").textContent = `${last.generated.toFixed(1)} tokens/s`;
  $("throughput-note").textContent =
    `generated, at most ${top.toFixed(1)} · prompts ${count.format(Math.round(last.prompt))} tokens/s`;
  $("throughput-line").setAttribute(
    "aria-label", `Tokens per second, the last two minutes: now ${last.generated.toFixed(1)}, at most ${top.toFixed(1)}`,
  );
}

function showOccupancy(status) {
  const points = seen.map((sample) => [1 - (status.now - sample.now) / SPAN, sample.occupancy]);
  const now = (100 * seen[seen.length - 1].occupancy).toFixed(1);
  sparkline($("occupancy-line"), points, { top: Math.max(...points.map(([, y]) => y), 0.01) });
  $("occupancy").textContent = `${now} %`;
  $("occupancy-note").textContent =
    `${count.format(status.cache.in_use)} of ${count.format(status.cache.blocks)} blocks`;
  $("occupancy-line").setAttribute("aria-label", `Share of the cache in use: now ${now} %`);
}

const STATES = { "-": "free", k: "kept", u: "used", s: "shared" };

function showHostTier({ cache, host_tier: tier }) {
  $("host-tier").hidden = tier === null;
  if (tier === null) return;
  facts($("host-facts"), [
    ["Blocks there alone", count.format(cache.spilled ?? 0)],
    ["Selected pieces", count.format(tier.lookups)],
    ["Found hot", tier.lookups ? `${(100 * tier.hits / tier.lookups).toFixed(1)} %` : "–"],
    ["Fetched", bytes(tier.fetched_bytes)],
    ["Pages out", bytes(tier.out_bytes)],
    ["Pages back", bytes(tier.in_bytes)],
    ["Steps waited", seconds(tier.stall_seconds)],
  ]);
}

function showMap({ cache, cells, host_tier: tier }) {
  if (cells === null) return;
  drawCells($("map"), cells);
  const free = cache.blocks - cache.in_use - cache.kept;
  const entries = [
    ["free", `free ${count.format(free)}`],
    ["kept", `kept for its content ${count.format(cache.kept)}`],
    ["used", `used by one request ${count.format(cache.in_use - cache.shared)}`],
    ["shared", `shared by several ${count.format(cache.shared)}`],
  ];
  if (tier !== null) entries.push(["host", `in host memory ${count.format(cache.spilled)}`]);
  legend($("map-legend"), entries);
  $("map").setAttribute("aria-label", `Cache map: ${entries.map(([, text]) => text).join(", ")}`);
  const width = cells.blocks_per_cell;
  $("map-note").textContent = width === 1
    ? "A square is a block of the cache, in the order of their numbers."
    : `A square stands for ${width} neighbouring blocks and shows what most of them are.`;
}

function drawCells(canvas, { states, places }) {
  const width = canvas.parentElement.clientWidth - 32;
  const side = Math.max(5, Math.min(16, Math.floor(Math.sqrt(width * 170 / states.length))));
  const columns = Math.max(1, Math.floor(width / side));
  const context = sized(canvas, width, Math.ceil(states.length / columns) * side);
  const fills = Object.fromEntries(Object.entries(STATES).map(([k, name]) => [k, colour(name)]));
  const host = colour("host");
  for (let at = 0; at < states.length; at++) {
    const [x, y] = [(at % columns) * side, Math.floor(at / columns) * side];
    context.fillStyle = fills[states[at]];
    context.fillRect(x, y, side - 1, side - 1);
    if (places[at] === "h") {
      // A corner, so that place and sharing are seen together.
      context.fillStyle = host;
      context.fillRect(x, y, Math.ceil(side / 2), Math.ceil(side / 2));
    }
  }
}

function redraw() {
  if (latest) showMap(latest);
}
onThemeChange(redraw);
addEventListener("resize", redraw);
