// What is told of an answer beside its cards: the facts, the reasons, the new order for a screen reader, a refusal.

import { byId, h, milliseconds, signed } from "./dom.js";
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
      historyText(history),
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

// Where the state of the history came from.
const CACHE = { hit: ", encoded before", extended: ", extended", miss: ", encoded now" };
const events = (count, kind = "") => `${count} ${kind}event${count === 1 ? "" : "s"}`;

function historyText({ used, source, cache }) {
  if (!used) return "no events read";
  return `history: ${events(used, source === "stored" ? "stored " : "")}${CACHE[cache] ?? ""}`;
}

// What the server ranks by: the events on screen, an empty history, or the stored events of the user.
export function historyTold() {
  const { user, history, sends, stored, read, examples } = state;
  const unread = !user
    ? ""
    : stored
      ? ` The ${events(stored, "stored ")} of ${user} ${stored === 1 ? "is" : "are"} not read.`
      : stored === null && !examples.some((body) => body.user === user)
        ? ` Stored events of ${user} are not read.`
        : "";
  byId("events").textContent = sends ? history.length : read?.source === "stored" ? `${read.used} stored` : 0;
  byId("stored").hidden = !sends || !user;
  byId("history-empty").hidden = history.length > 0;
  byId("history-note").textContent = history.length && unread ? `Ranked by the events below.${unread}` : "";
  byId("history-empty").textContent = sends
    ? `An empty history is sent: ranked without events.${unread}`
    : storedText(user, read);
}

function storedText(user, read) {
  if (!user) return "Without a user and events: no user vector, and no history. Add an event above.";
  if (!read) return `No history is sent: the server reads the stored events of ${user}.`;
  if (read.source === "stored") {
    const unknown = read.unknown ? `, ${read.unknown} of an unknown item` : "";
    return `Ranked by ${events(read.used, "stored ")} of ${user}${unknown}. The server does not list them. An event that you add is sent instead of them; Clear ranks without them.`;
  }
  if (state.answer?.degraded.includes("store_error"))
    return "The stored events could not be read: ranked without a history.";
  return `No stored events of ${user}: ranked without a history. Add an event above.`;
}

// Candidates that are in the slate more than once.
export function repeats() {
  const counts = new Map();
  for (const { id } of state.candidates) counts.set(id, (counts.get(id) ?? 0) + 1);
  const found = [...counts].filter(([, count]) => count > 1).map(([id, count]) => `${titleOf(id)} (${count} times)`);
  const more = found.length > 3 ? `, and ${found.length - 3} more` : "";
  byId("repeats").textContent = found.length
    ? `More than once in the slate: ${found.slice(0, 3).join(", ")}${more}. Each one is ranked.`
    : "";
}

export function whyLegend() {
  byId("why-legend").hidden = !state.explain || Boolean(state.changed) || !state.answer?.explanations;
}

// The ids of the events and neighbours that an answer names.
export function named(answer) {
  return (answer.explanations ?? []).flatMap(({ events, neighbours }) => [...events.item_ids, ...neighbours.item_ids]);
}

// The events and neighbours that moved a result most, from `explanations`; empty if the server sent none.
export function whyOf(key) {
  if (!state.explain || state.changed) return "";
  const found = (state.answer.explanations ?? []).find(({ index }) => state.keys[index] === key);
  if (!found) return "";
  const moves = (moved) => Math.abs(moved) >= 0.05;
  const byPlaces = [...found.events.places, ...found.neighbours.places].some(moves); // else only scores change
  const told = ({ item_ids: ids, places, delta }) =>
    ids
      .map((id, k) => [places[k], delta[k], titleOf(id)])
      .filter(([moved, score]) => (byPlaces ? moves(moved) : Math.abs(score) >= 0.0005))
      .map(
        ([moved, score, title]) =>
          `${(byPlaces ? moved : score) > 0 ? "▲" : "▼"}${byPlaces ? `${Math.abs(moved).toFixed(1)} ` : ""}(${signed(score)}) ${title}`,
      )
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
