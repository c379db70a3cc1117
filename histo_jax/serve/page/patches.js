// The list of patches: probability, operating point, and attribution on demand.

import { call } from "./api.js";
import { byId, count, make, probability } from "./dom.js";

const shown = [];

function attributionPanel(patch, model, url) {
  const frame = model.label_region ? `${50 * (1 - model.label_region / model.size)}%` : "";
  const figure = (source, caption, alt) => make("figure", {},
    make("div", { class: frame ? "square framed" : "square", "--frame": frame || "0" }, make("img", { src: source, alt })),
    make("figcaption", {}, caption));
  const swatch = (kind, text) => make("li", {}, make("span", { class: `swatch ${kind}` }), text);
  return make("div", { class: "attribution" },
    figure(patch.preview, "patch", `Patch ${patch.name}`),
    figure(url, "attribution", `Attribution of ${patch.name}`),
    make("ul", { class: "legend" },
      swatch("raises", `raises the probability of ${model.positive}`),
      swatch("lowers", "lowers it"),
      swatch("grey", "has little effect"),
      frame ? swatch("frame", "what the probability is for") : null));
}

function attributionButton(patch, file, model, row) {
  const button = make("button", { type: "button", "aria-expanded": "false", "aria-label": `Attribution of ${patch.name}` }, "Attribution");
  let panel = null;
  button.addEventListener("click", async () => {
    if (!panel) {
      button.disabled = true;
      button.textContent = "Computing";
      try {
        const form = new FormData();
        form.append("file", file, file.name);
        const picture = await (await call("/v1/attribution", { form })).blob();
        panel = attributionPanel(patch, model, URL.createObjectURL(picture));
        panel.hidden = true;
        row.append(panel);
      } catch (error) {
        byId("status").textContent = `${patch.name}: ${error.message}`;
      }
      button.disabled = false;
      button.textContent = "Attribution";
      button.focus();
      if (!panel) return;
    }
    panel.hidden = !panel.hidden;
    button.setAttribute("aria-expanded", String(!panel.hidden));
  });
  return button;
}

function row(patch, file, model) {
  const value = probability(patch.probability);
  const word = patch.is_positive ? "at or above the operating point" : "below the operating point";
  const item = make("li", { class: "patch" },
    make("img", { src: patch.preview, alt: "", width: model.size, height: model.size }),
    make("div", {},
      make("p", { class: "name" }, patch.name),
      make("p", { class: "value" },
        make("span", { class: "number" }, value),
        make("span", { class: patch.is_positive ? "positive" : "soft" }, word)),
      make("div", {
        class: patch.is_positive ? "meter positive" : "meter", "aria-hidden": "true",
        "--value": `${100 * patch.probability}%`, "--threshold": `${100 * model.threshold}%`,
      }, make("i"), make("b")),
      patch.conversions.length ? make("p", { class: "soft" }, `changed: ${patch.conversions.join(", ")}`) : null));
  item.append(attributionButton(patch, file, model, item));
  return item;
}

function arrange() {
  const items = [...shown];
  if (byId("order").value === "highest") items.sort((a, b) => b.patch.probability - a.patch.probability);
  byId("patch-list").replaceChildren(...items.map((item) => item.row));
}

export function addPatch(patch, file, model) {
  shown.push({ patch, row: row(patch, file, model) });
}

export function showPatches(model) {
  byId("patches").hidden = !shown.length;
  if (!shown.length) return;
  arrange();
  const positive = shown.filter((item) => item.patch.is_positive).length;
  const values = shown.map((item) => item.patch.probability);
  byId("patches-summary").textContent =
    `${count(shown.length, "patch", "patches")}, ${positive.toLocaleString("en")} at or above the operating point of ` +
    `${probability(model.threshold)} (${model.threshold_source}), the mark on each bar; highest probability of ${model.positive} ${probability(Math.max(...values))}.`;
}

export function removePatches() {
  shown.length = 0;
  byId("patch-list").replaceChildren();
}

byId("order").addEventListener("change", arrange);
