// What is told of an answer beside its cards: the facts, the reasons, the new order for a screen reader, a refusal.

import { byId, h, milliseconds } from "./dom.js";
import { slateView } from "./slate.js";
import { state, titleOf } from "./state.js";

export function facts({ exit, variant, history, meta_embedding: meta, degraded, timings_ms: times, version }) {
  const tag = (text, title, kind = "") => h("span", { class: `tag ${kind}`, title }, text);
  byId("facts").replaceChildren(
    ...degraded.map((reason) => tag(`degraded: ${reason}`, "The answer is cheaper than was asked for", "warn")),
    tag(`exit ${exit}`, "The exit that answered"),
    tag(variant ?? "no model", "The variant that answered"),
    tag(
      milliseconds(times.total),
      Object.entries(times)
        .map(([stage, value]) => `${stage} ${value} ms`)
        .join(", "),
      "strong",
    ),
    tag(
      `history ${history.used}${history.source && history.source !== "request" ? ` ${history.source}` : ""}, ${history.cache}`,
      `${history.used} events read, ${history.dropped} too old, ${history.unknown} with an unknown item; cache: ${history.cache}`,
    ),
    history.unknown_actions
      ? tag(`unknown actions ${history.unknown_actions}`, "Events whose action the ranker does not know", "warn")
      : "",
    tag(
      `user vector ${meta.status}`,
      `Meta-embedding of the user: ${meta.status}${meta.version === null ? "" : `, version ${meta.version}`}`,
      meta.status === "error" ? "warn" : "",
    ),
    tag(`v${version}`, "Version of the ranker"),
  );
}

// The events and neighbours that moved a result most, from `explanations`; empty if the server sent none.
export function whyOf(key) {
  if (!state.explain || state.changed) return "";
  const found = (state.answer.explanations ?? []).find(({ index }) => state.keys[index] === key);
  if (!found) return "";
  const told = ({ item_ids: ids, places }) =>
    ids
      .map((id, k) => [places[k], titleOf(id)])
      .filter(([moved]) => Math.abs(moved) >= 0.05)
      .map(([moved, title]) => `${moved > 0 ? "▲" : "▼"}${Math.abs(moved).toFixed(1)} ${title}`)
      .join(", ");
  const parts = [
    ["Events", told(found.events)],
    ["Neighbours", told(found.neighbours)],
  ].filter(([, text]) => text);
  return parts.map(([name, text]) => `${name}: ${text}`).join(". ") || "No single event or neighbour moves it.";
}

export function announce() {
  const view = slateView(state);
  const ids = new Map(state.candidates.map((candidate) => [candidate.key, candidate.id]));
  const first = view.rows
    .filter((row) => !row.ghost)
    .slice(0, 3)
    .map((row) => `${row.place} ${titleOf(ids.get(row.key))}`);
  const moved = view.rows.filter((row) => row.move).length;
  byId("announce").textContent =
    `New order: ${first.join(", ")}. ${moved} moved. ${state.changed ? byId("without").firstChild.textContent : ""}`;
}

// again: called by the button "Try again".
export function showProblem(error, again) {
  const place = byId("problem");
  place.hidden = !error;
  if (!error) return;
  const where = (error.faults ?? [])
    .filter((fault) => fault && !String(error.detail).includes(fault.pointer))
    .map((fault) => h("li", {}, `${fault.pointer} ${fault.detail}`));
  place.replaceChildren(
    h("strong", {}, error.status ? `${error.title} (${error.status})` : (error.title ?? "Error")),
    h("p", {}, error.detail ?? error.message),
    ...(where.length ? [h("ul", {}, ...where)] : []),
    h("button", { type: "button", onclick: again }, "Try again"),
  );
}

export function hover(key) {
  const ids = new Map(state.candidates.map((candidate) => [candidate.key, candidate.id]));
  for (const element of document.querySelectorAll(".hovered")) element.classList.remove("hovered");
  if (key === null) return;
  document.querySelector(`#compare [data-key="${key}"]`)?.classList.add("hovered");
  for (const element of document.querySelectorAll("#cards > .card"))
    if (element.dataset.id === ids.get(key)) element.classList.add("hovered");
}
