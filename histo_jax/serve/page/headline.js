// What is always in sight: the score of the networks, and what it is based on.

import { byId, count, make } from "./dom.js";

function disjoint(scores) {
  if (scores.slide_disjoint === true && scores.patient_disjoint === false) return ["shares patients with training: optimistic", true];
  if (scores.slide_disjoint === true && scores.patient_disjoint === true) return ["patient-disjoint", false];
  if (scores.slide_disjoint === true) return ["slide-disjoint", false];
  if (scores.slide_disjoint === false) return ["not slide-disjoint: optimistic", true];
  return ["not known whether slide-disjoint", true];
}

function describe(scores, showsName) {
  const [text, isCaution] = disjoint(scores);
  const hasInterval = typeof scores.auc_low === "number";
  const patches = scores.count ? `, ${count(scores.count, "patch", "patches")}` : "";
  return make("p", {},
    make("span", { class: "score" }, `AUC ${scores.auc.toFixed(3)}`), " ",
    hasInterval ? `(95% interval ${scores.auc_low.toFixed(3)} to ${scores.auc_high.toFixed(3)}) ` : "",
    make("span", { class: isCaution ? "tag caution" : "tag" }, text),
    make("br"),
    make("span", { class: "soft" }, `${showsName ? `${scores.name}: ` : ""}${scores.split} split${patches}`));
}

export function showHeadline(model) {
  const single = model.scores.length === 1 && !model.name.includes(" + ");
  const parts = model.scores.filter((scores) => typeof scores.auc === "number").map((scores) => describe(scores, !single));
  if (!parts.length) parts.push(make("p", {}, make("span", { class: "tag caution" }, "not evaluated: no score is known")));
  else if (!single) parts.push(make("p", { class: "soft" }, "The ensemble itself was not evaluated."));
  byId("headline").replaceChildren(...parts);
  const positive = model.positive[0].toUpperCase() + model.positive.slice(1);
  byId("title").textContent = `${positive} classifier: ${model.name}`;
  document.title = `${positive} classifier: ${model.name}`;
  const region = model.label_region ? ` The probability is for the centre, ${model.label_region}x${model.label_region} pixels.` : "";
  const synthetic = model.is_synthetic ? " It was trained on synthetic slides: its results do not apply to real tissue." : "";
  byId("about").textContent =
    `A neural network estimates the probability of ${model.positive} in patches of ${model.size}x${model.size} pixels` +
    `${model.mpp ? ` at ${Number(model.mpp.toPrecision(4))} micrometres per pixel` : ""}.${region}${synthetic}`;
  byId("version").textContent = `histo_jax ${model.version}`;
}
