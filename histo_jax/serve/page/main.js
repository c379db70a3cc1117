// Takes files, sends them to the server one after the other, and shows the results.

import { ServerError, call, lines } from "./api.js";
import { byId, count, make } from "./dom.js";
import { showHeadline } from "./headline.js";
import { addPatch, removePatches, showPatches } from "./patches.js";
import { addRegion, removeRegions } from "./regions.js";

const GROUP_FILES = 32, GROUP_BYTES = 8 * 2 ** 20;
const waiting = [];
let model = null, aborter = null, total = 0;
let patches = 0, maps = []; // done since files were added

const say = (text) => { byId("status").textContent = text; };
const sleep = (seconds) => new Promise((resolve) => { setTimeout(resolve, 1000 * seconds); });

function showWork(text, part) {
  byId("work").hidden = false;
  byId("work-text").textContent = text;
  if (part === undefined) byId("progress").removeAttribute("value");
  else byId("progress").value = part;
}

function addProblem(name, message) {
  byId("problems").hidden = false;
  byId("problems").querySelector("ul").append(make("li", {}, `${name}: ${message}`));
}

// A patch without compression has 3 bytes a pixel.
const mayBePatch = (file) => model.is_scaled || file.size < 6 * model.size ** 2 + 2 ** 18;

function isRegion(job) {
  const kind = byId("kind").value;
  return Boolean(job.slide) || kind === "region" || job.isRegion || (kind === "auto" && !mayBePatch(job.file));
}

// Waits and tries again where the server is busy.
async function patiently(request) {
  for (let attempt = 0; ; attempt += 1) {
    try {
      return await request();
    } catch (error) {
      if (!(error instanceof ServerError) || ![429, 503].includes(error.status) || attempt > 4) throw error;
      showWork(`Waiting: ${error.message}`);
      await sleep(error.seconds || 2);
    }
  }
}

async function predict(jobs) {
  const form = new FormData();
  for (const { file } of jobs) form.append("files", file, file.name);
  form.append("previews", "true");
  showWork(`Patches: ${total - waiting.length - jobs.length} of ${total} done`, (total - waiting.length - jobs.length) / total);
  const answer = await patiently(() => call("/v1/predict", { form, signal: aborter.signal }));
  const { results } = await answer.json();
  const larger = [];
  results.forEach((result, number) => {
    const { file } = jobs[number];
    if (!result.error) addPatch(result, file, model);
    else if (result.is_larger && byId("kind").value === "auto") larger.push({ file, isRegion: true });
    else addProblem(file.name, result.error);
  });
  waiting.unshift(...larger);
  showPatches(model);
  patches += results.filter((result) => !result.error).length;
}

async function mapRegion(job) {
  const name = job.slide ?? job.file.name;
  const form = new FormData();
  if (job.slide) form.append("slide", job.slide);
  else form.append("file", job.file, job.file.name);
  form.append("mpp", byId("mpp").value);
  form.append("tissue", byId("tissue").value);
  form.append("stride", Number(byId("stride").value) * (model.label_region ?? model.size));
  form.append("probabilities", "true");
  showWork(`${name}: reading`);
  const answer = await patiently(() => call("/v1/heatmap", { form, accept: "application/x-ndjson", signal: aborter.signal }));
  for await (const line of lines(answer)) {
    if (line.error) throw new ServerError(422, line.error);
    if (line.map) {
      maps.push(addRegion(line));
      return;
    }
    if (line.cells) showWork(`${name}: ${line.done.toLocaleString("en")} of ${count(line.cells, "cell", "cells")}`, line.done / line.cells);
  }
  throw new ServerError(0, "the server has closed the connection");
}

function nextGroup() {
  const group = [waiting.shift()];
  if (isRegion(group[0])) return group;
  let bytes = group[0].file.size;
  while (waiting.length && group.length < GROUP_FILES && !isRegion(waiting[0])) {
    bytes += waiting[0].file.size;
    if (bytes > GROUP_BYTES) break;
    group.push(waiting.shift());
  }
  return group;
}

async function work() {
  if (aborter) return;
  aborter = new AbortController();
  while (waiting.length && !aborter.signal.aborted) {
    const group = nextGroup();
    try {
      await (isRegion(group[0]) ? mapRegion(group[0]) : predict(group));
      say([...(patches ? [`${count(patches, "patch", "patches")} computed.`] : []), ...maps].join(" "));
    } catch (error) {
      if (aborter.signal.aborted) break;
      for (const job of group) addProblem(job.slide ?? job.file.name, error.message);
    }
  }
  const isCancelled = aborter.signal.aborted;
  waiting.length = 0;
  aborter = null;
  total = patches = 0;
  maps = [];
  byId("work").hidden = true;
  if (isCancelled) say("Cancelled.");
  else if (!byId("status").textContent) say("Done.");
}

function add(jobs) {
  if (!model || !jobs.length) return;
  say("");
  byId("problems").hidden = true;
  byId("problems").querySelector("ul").replaceChildren();
  for (const job of jobs) {
    if (job.file && job.file.size > model.limits.body - 2 ** 16) {
      addProblem(job.file.name, `has more than ${Math.floor(model.limits.body / 2 ** 20)} MiB, the limit: send a smaller picture`);
    } else {
      waiting.push(job);
      total += 1;
    }
  }
  work();
}

const addFiles = (files) => add([...files].map((file) => ({ file })));

function listen() {
  const input = byId("files"), drop = byId("drop");
  byId("choose").addEventListener("click", () => input.click());
  input.addEventListener("change", () => {
    addFiles(input.files);
    input.value = "";
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) drop.classList.remove("over");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    addFiles(event.dataTransfer.files);
  });
  byId("cancel").addEventListener("click", () => {
    aborter?.abort();
    byId("choose").focus();
  });
  byId("clear").addEventListener("click", () => {
    removePatches();
    removeRegions();
    showPatches(model);
    say("All results are removed.");
    byId("choose").focus();
  });
  byId("slide-form").addEventListener("submit", (event) => {
    event.preventDefault();
    add([{ slide: byId("slide").value }]);
  });
}

async function connect() {
  for (;;) {
    try {
      model = await (await call("/v1/model")).json();
    } catch (error) {
      say(`${error.message}.`);
      await sleep(2);
      continue;
    }
    showHeadline(model);
    if (model.is_ready) break;
    say("The server is starting.");
    await sleep(1);
  }
  say("");
  const megapixels = Math.round(model.limits.pixels / 1e6);
  byId("accepted").textContent = `TIFF, PNG or JPEG: ${model.is_scaled ? "patches" : `patches of ${model.size}x${model.size} pixels`}, several at once, or pictures of up to ${megapixels} megapixels for a heat map`;
  if (model.mpp) {
    byId("mpp").placeholder = Number(model.mpp.toPrecision(4));
    byId("mpp-help").textContent = `Empty: as the file states, else the network's, ${Number(model.mpp.toPrecision(4))}.`;
  } else {
    byId("mpp").disabled = true;
    byId("mpp-help").textContent = "The network's scale is not known: pictures are used at their own.";
  }
  const { slides } = await (await call("/v1/slides")).json();
  byId("slide").replaceChildren(...slides.map(({ id }) => make("option", { value: id }, id)));
  byId("slide-form").hidden = !slides.length;
}

listen();
connect();
