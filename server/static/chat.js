// A conversation with the model. Messages are kept in this page and nowhere else.
import { streamChat } from "./api.js";

const $ = (id) => document.getElementById(id);
const messages = [];
let running = null; // AbortController of the answer that is coming

export function startChat({ onTrace, onFailure }) {
  $("chat-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = $("message").value.trim();
    if (text && running === null) ask(text, onTrace, onFailure);
  });
  $("message").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      $("chat-form").requestSubmit();
    }
  });
  $("stop").addEventListener("click", () => running?.abort());
  $("clear").addEventListener("click", () => {
    running?.abort();
    messages.length = 0;
    $("log").replaceChildren();
    $("message").focus();
  });
}

async function ask(text, onTrace, onFailure) {
  const wantsTrace = $("want-trace").checked && !$("want-trace").disabled;
  messages.push({ role: "user", content: text });
  turn("user", "You").textContent = text;
  $("message").value = "";
  const answer = turn("assistant", "Model");
  setRunning(new AbortController());
  $("chat-note").textContent = "";
  let told = "";
  try {
    const started = performance.now();
    let [first, id, usage] = [null, null, null];
    const body = { messages: [...messages], stream_options: { include_usage: true } };
    body.temperature = $("temperature").valueAsNumber || 0;
    if (wantsTrace) body.nsa_trace = true;
    for await (const event of streamChat(body, running.signal)) {
      id = event.id;
      usage = event.usage ?? usage;
      const piece = event.choices[0]?.delta?.content ?? "";
      if (piece && first === null) first = performance.now();
      told += piece;
      answer.textContent = told;
      $("log").scrollTop = $("log").scrollHeight;
    }
    $("chat-note").textContent = summary(started, first, usage);
    if (wantsTrace) await onTrace(id);
  } catch (error) {
    if (error.name !== "AbortError") fail(answer, error, onFailure);
  } finally {
    // What was said stays in the conversation, also where it was stopped.
    if (told) messages.push({ role: "assistant", content: told });
    else messages.pop();
    setRunning(null);
  }
}

function summary(started, first, usage) {
  if (first === null || usage === null) return "The answer is empty.";
  const took = (performance.now() - first) / 1000;
  const rate = usage.completion_tokens > 1 ? (usage.completion_tokens - 1) / took : 0;
  const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  return `${usage.prompt_tokens} prompt tokens (${cached} from the cache), `
    + `${usage.completion_tokens} generated; first after ${((first - started) / 1000).toFixed(2)} s, `
    + `then ${rate.toFixed(1)} tokens/s.`;
}

function fail(answer, error, onFailure) {
  answer.parentElement.classList.add("failed");
  if (!answer.textContent) answer.textContent = error.message;
  $("chat-note").textContent = `The answer failed: ${error.message}`;
  onFailure(error);
}

function turn(role, who) {
  const box = document.createElement("div");
  const [name, body] = [document.createElement("span"), document.createElement("span")];
  box.className = `turn ${role}`;
  name.className = "who";
  name.textContent = who;
  box.append(name, body);
  $("log").append(box);
  return body;
}

function setRunning(controller) {
  running = controller;
  // A reader is told the answer once it is whole, not at each token.
  $("log").setAttribute("aria-busy", String(controller !== null));
  $("stop").disabled = controller === null;
  $("send").disabled = controller !== null;
}
