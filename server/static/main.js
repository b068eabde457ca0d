// Ask for a key where one is needed, then poll /status while somebody looks.
import { getJSON, hasKey, KeyNeeded, useKey } from "./api.js";
import { startChat } from "./chat.js";
import { show } from "./status.js";
import { showTrace, startTrace } from "./trace.js";

const PERIOD = 1000; // ms between two looks
const $ = (id) => document.getElementById(id);
let timer = null;

function setState(kind, text) {
  // Written only when it changes: it is announced.
  if ($("state").textContent === text) return;
  $("state").dataset.state = kind;
  $("state").textContent = text;
}

function askForKey() {
  clearTimeout(timer);
  timer = null;
  setState("bad", "key needed");
  $("content").hidden = true;
  $("key").hidden = false;
  if (hasKey()) $("key-hint").textContent = "That key is not valid here. Try another one.";
  $("key-input").focus();
}

async function look() {
  clearTimeout(timer);
  try {
    const status = await getJSON("/status", AbortSignal.timeout(10_000));
    $("key").hidden = true;
    $("content").hidden = false;
    const dense = status.engine !== null && status.engine.attention !== "nsa";
    $("want-trace").disabled = dense;
    $("trace-label").title = dense ? "Needs --attention nsa" : "";
    show(status);
    setState("ok", status.state === "ok" ? "serving" : status.state);
  } catch (error) {
    if (error instanceof KeyNeeded) return askForKey();
    setState("bad", "not answering");
  }
  timer = setTimeout(look, PERIOD);
}

function failed(error) {
  if (error instanceof KeyNeeded) askForKey();
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey($("key-input").value.trim());
  $("key-input").value = "";
  look();
});
document.addEventListener("visibilitychange", () => {
  clearTimeout(timer);
  if (!document.hidden && $("key").hidden) look();
});
startChat({ onTrace: showTrace, onFailure: failed });
startTrace();
look();
