// Heat maps over their pictures, with opacity and zoom.

import { byId, count, make, probability } from "./dom.js";

const LARGEST_ZOOM = 16;

const percent = (value) => `${(100 * value).toFixed(1)}%`;

function numbers(map) {
  const rows = [["cells", map.cells.toLocaleString("en")]];
  if (map.cells) {
    rows.unshift(["highest probability", probability(map.highest)], ["mean of the top 1%", probability(map.mean_top_percent)],
      ["operating point", probability(map.threshold)], ["cells at or above it", percent(map.share_above)]);
  }
  rows.push(["picture", `${map.width.toLocaleString("en")} × ${map.height.toLocaleString("en")} pixels`],
    ["width", `${(map.width * map.mpp_x / 1000).toPrecision(3)} mm`],
    ["µm per pixel", String(Number(map.mpp_x.toPrecision(4)))],
    ["tissue", `${map.tissue_mm2.toPrecision(3)} mm²`]);
  return make("dl", {}, ...rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
}

function scaleSource(map) {
  const given = { given: "as given in the settings", assumed: "the network's, as the file states none" };
  return `Micrometres per pixel are ${given[map.mpp_source] ?? `those of the file (${map.mpp_source})`}.`;
}

function zoomable(view, layers) {
  let zoom = 1;
  function zoomTo(wanted, x = view.clientWidth / 2, y = view.clientHeight / 2) {
    const next = Math.min(LARGEST_ZOOM, Math.max(1, wanted));
    const left = (view.scrollLeft + x) / zoom, top = (view.scrollTop + y) / zoom;
    layers.style.setProperty("--zoom", next);
    view.scrollTo(left * next - x, top * next - y);
    zoom = next;
  }
  view.addEventListener("keydown", (event) => {
    const factors = { "+": 1.5, "=": 1.5, "-": 1 / 1.5, 0: 0 };
    if (!(event.key in factors) || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    zoomTo(zoom * factors[event.key]);
  });
  view.addEventListener("wheel", (event) => {
    if (!event.ctrlKey) return;
    event.preventDefault();
    const box = view.getBoundingClientRect();
    zoomTo(zoom * Math.exp(-event.deltaY / 200), event.clientX - box.left, event.clientY - box.top);
  }, { passive: false });
  view.addEventListener("pointerdown", (event) => {
    if (event.pointerType !== "mouse" || event.button) return;
    const start = [event.clientX + view.scrollLeft, event.clientY + view.scrollTop];
    const move = (moved) => view.scrollTo(start[0] - moved.clientX, start[1] - moved.clientY);
    const end = () => {
      view.classList.remove("dragging");
      window.removeEventListener("pointermove", move);
    };
    view.classList.add("dragging");
    window.addEventListener("pointermove", move);
    window.addEventListener("pointerup", end, { once: true });
  });
  return { by: (factor) => zoomTo(zoom * factor), fit: () => zoomTo(1) };
}

function follow(view, picture, map, readout) {
  const text = "Point at the map to read a cell.";
  readout.textContent = text;
  view.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left) / box.width * map.columns);
    const row = Math.floor((event.clientY - box.top) / box.height * map.rows);
    const value = map.probabilities[row]?.[column];
    readout.textContent = value === undefined ? text : value === null ? "Not computed here" : `Probability here: ${probability(value)}`;
  });
  view.addEventListener("pointerleave", () => { readout.textContent = text; });
}

export function addRegion(map) {
  const opacity = make("input", { type: "range", min: 0, max: 100, value: 50 });
  const shownOpacity = make("output", {}, "50%");
  const picture = make("img", { class: "map", src: map.map, alt: `Map of the probability of ${map.positive}` });
  const layers = make("div", { class: "layers", "--map-width": `${map.map_width}%`, "--map-height": `${map.map_height}%`, "--aspect": map.width / map.height },
    make("img", { src: map.thumbnail, alt: `Picture ${map.name}` }), picture);
  const view = make("div", { class: "view", tabIndex: 0, role: "region", "aria-label": `Heat map of ${map.name}; keys + and - zoom, arrows move` }, layers);
  const zoom = zoomable(view, layers);
  opacity.addEventListener("input", () => {
    layers.style.setProperty("--opacity", opacity.value / 100);
    shownOpacity.textContent = `${opacity.value}%`;
  });
  const button = (text, label, action) => make("button", { type: "button", "aria-label": label, on: { click: action } }, text);
  const readout = make("p", { class: "readout soft" });
  const article = make("article", { class: "region", "aria-label": `Heat map of ${map.name}` },
    make("h3", {}, map.name),
    make("div", { class: "controls" },
      make("label", {}, "Opacity of the map", opacity, shownOpacity),
      make("div", { class: "buttons" },
        button("−", "Zoom out", () => zoom.by(1 / 1.5)), button("+", "Zoom in", () => zoom.by(1.5)), button("Fit", "Show the whole picture", zoom.fit)),
      button("Remove", `Remove the heat map of ${map.name}`, () => {
        article.remove();
        byId("regions").hidden = !byId("regions").querySelector("article");
        byId("choose").focus();
      })),
    view,
    make("div", {},
      make("div", { class: "scale" }, "0",
        make("div", { class: "ramp", role: "img", "aria-label": `Colours from dark blue, probability 0, to yellow, probability 1; the operating point is ${probability(map.threshold)}`, "--threshold": `${100 * map.threshold}%` }, make("b")), "1"),
      make("p", { class: "soft" }, `probability of ${map.positive}; orange: operating point`),
      map.cells ? null : make("p", { class: "problem" }, "No tissue was found. If there is some, choose all of the picture in the settings."),
      numbers(map), make("p", { class: "soft note" }, scaleSource(map)), readout));
  if (map.probabilities) follow(view, picture, map, readout);
  byId("regions").hidden = false;
  byId("regions-title").after(article);
  return `${map.name}: ${count(map.cells, "cell", "cells")}${map.cells ? `, highest probability ${probability(map.highest)}` : ""}.`;
}

export function removeRegions() {
  byId("regions").querySelectorAll("article").forEach((article) => article.remove());
  byId("regions").hidden = true;
}
