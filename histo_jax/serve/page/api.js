// Calls the server. A token, where it needs one, is kept until the tab is closed.

import { byId } from "./dom.js";

const KEY = "histo_jax token";
let token = null;
let asking = null;
try { token = sessionStorage.getItem(KEY); } catch { /* storage may be switched off */ }

export class ServerError extends Error {
  constructor(status, message, seconds) {
    super(message);
    this.status = status;
    this.seconds = seconds;
  }
}

function askForToken(text) {
  if (asking) return asking;
  const dialog = byId("token-dialog"), form = byId("token-form"), field = byId("token");
  if (text) byId("token-text").textContent = text;
  field.value = "";
  dialog.showModal();
  asking = new Promise((resolve) => {
    const submit = (event) => {
      event.preventDefault();
      token = field.value.trim();
      try { sessionStorage.setItem(KEY, token); } catch { /* only this page then knows it */ }
      form.removeEventListener("submit", submit);
      dialog.close();
      asking = null;
      resolve();
    };
    form.addEventListener("submit", submit);
  });
  dialog.addEventListener("cancel", (event) => event.preventDefault());
  return asking;
}

export async function call(path, { form, accept, signal } = {}) {
  for (;;) {
    const headers = {};
    if (token) headers.Authorization = `Bearer ${token}`;
    if (accept) headers.Accept = accept;
    let response;
    try {
      response = await fetch(path, { method: form ? "POST" : "GET", body: form, headers, signal });
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new ServerError(0, "the server cannot be reached, or a file has changed: check both and try again");
    }
    if (response.ok) return response;
    if (response.status === 401) {
      await askForToken(token ? "That token is not right. The person who started the server has it." : "");
      continue;
    }
    let message = `the server has answered ${response.status}`;
    try { message = (await response.json()).error || message; } catch { /* no JSON */ }
    throw new ServerError(response.status, message, Number(response.headers.get("Retry-After")) || 0);
  }
}

// Yields the objects of an answer with one line of JSON for each.
export async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    rest += value ?? "";
    const parts = rest.split("\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
    if (done) return;
  }
}
