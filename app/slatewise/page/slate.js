// The slate as cards, best first. They move when the order changes, and show how the slate looks without one of them.

import { arrange, byId, h, iconButton, moveMark, number, signed } from "./dom.js";

// A view of the slate: rows in the order shown. before: places in the answer before this one, by key.
export function slateView(state) {
  const { answer, keys, before, without, changed } = state;
  const scores = scoresOf(answer, keys);
  const order = answer.results.index.map((k) => keys[k]);
  if (!without || !changed)
    return {
      order,
      rows: order.map((key, k) => row(answer, k, key, before.has(key) ? before.get(key) - k : 0, null)),
      ghost: null,
    };
  const others = order.filter((key) => key !== without);
  const rest = keys.filter((key) => key !== without);
  const rows = changed.results.index.map((at, k) => {
    const key = rest[at];
    const delta = changed.results.scores && answer.results.scores ? changed.results.scores[k] - scores.get(key) : null;
    return row(changed, k, key, others.indexOf(key) - k, delta);
  });
  const place = order.indexOf(without);
  const ghost = { ...row(answer, place, without, 0, null), ghost: true };
  rows.splice(place, 0, ghost);
  return { order, rows, ghost };
}

function row(answer, k, key, move, delta) {
  const { scores, heads } = answer.results;
  return {
    key,
    move,
    delta,
    place: k + 1,
    score: scores ? scores[k] : null,
    heads: Object.entries(heads).map(([name, column]) => [name, column[k]]),
  };
}

export function scoresOf(answer, keys) {
  const { index, scores } = answer.results;
  return new Map(index.map((at, k) => [keys[at], scores ? scores[k] : null]));
}

// actions: {drop(key), toggle(key), hover(key or null)}. The functions in the second argument give what is shown of an item.
export function cardList(state, { titleOf, fieldsOf, whyOf }, actions) {
  const cards = new Map(); // key -> {element, parts}

  function make(candidate) {
    const title = titleOf(candidate.id);
    const parts = {
      place: h("span", { class: "n" }),
      move: h("span", { class: "moved" }),
      name: h("h3", {}, title),
      meta: h("p", { class: "meta" }),
      bars: h("div", { class: "bars" }),
      why: h("p", { class: "why", hidden: true }),
      without: iconButton(
        "without",
        `Rank without ${title}`,
        (event) => {
          event.stopPropagation();
          actions.toggle(candidate.key);
        },
        { "aria-pressed": "false", class: "icon gone" },
      ),
    };
    const drop = iconButton(
      "drop",
      `Drop ${title}`,
      (event) => {
        event.stopPropagation();
        actions.drop(candidate.key);
      },
      { class: "icon drop" },
    );
    const element = h(
      "li",
      {
        class: "card",
        "data-id": candidate.id,
        onclick: () => actions.toggle(candidate.key),
        onpointerenter: () => actions.hover(candidate.key),
        onpointerleave: () => actions.hover(null),
      },
      h("div", { class: "place" }, parts.place, parts.move),
      h("div", { class: "text" }, parts.name, parts.meta, parts.why),
      parts.bars,
      h("div", { class: "tools" }, parts.without, drop),
    );
    return { element, parts, title };
  }

  function bar(name, value, most, delta) {
    const filled = h("span", { class: "fill" });
    filled.style.setProperty("--share", String(most > 0 ? Math.max(0, value / most) : 0));
    return h(
      "div",
      { class: name === "score" ? "bar main" : "bar" },
      h("span", { class: "label" }, name),
      h("span", { class: "track", "aria-hidden": "true" }, filled),
      h("span", { class: "value" }, number(value)),
      delta === undefined
        ? null
        : h("span", { class: `delta ${direction(delta)}` }, direction(delta) ? signed(delta, 4) : "0"),
    );
  }

  const direction = (delta) => (Math.abs(delta) < 5e-5 ? "" : delta > 0 ? "up" : "down"); // of a change that is shown

  function update(card, row, most, candidate, unknown) {
    const { element, parts } = card;
    element.classList.toggle("ghost", Boolean(row.ghost));
    parts.place.textContent = row.ghost ? "–" : row.place;
    parts.move.replaceChildren(moveMark(row.move) ?? "");
    const fields = fieldsOf(candidate.id);
    const tags = Object.entries(fields)
      .filter(([name, value]) => name !== "title" && value !== null && value !== undefined)
      .map(([, value]) => (Array.isArray(value) ? value.join(", ") : value))
      .filter(Boolean);
    parts.meta.replaceChildren(
      ...(unknown ? [h("span", { class: "tag" }, "unknown id"), " "] : []),
      tags.join(" · ") || (fields.title ? `id ${candidate.id}` : ""),
    );
    const hasDelta = row.delta !== null;
    parts.bars.replaceChildren(
      ...(row.score === null
        ? [h("span", { class: "note" }, "not scored")]
        : [
            bar("score", row.score, most.score, hasDelta ? row.delta : undefined),
            ...row.heads.map(([name, value]) => bar(name, value, most[`head ${name}`])),
          ]),
    );
    parts.without.setAttribute("aria-pressed", String(state.without === candidate.key));
    const reason = whyOf(candidate.key);
    parts.why.hidden = !reason;
    parts.why.textContent = reason;
  }

  return function show() {
    const list = byId("cards");
    const present = new Set(state.candidates.map((candidate) => candidate.key));
    for (const key of cards.keys()) if (!present.has(key)) cards.delete(key);
    byId("size").textContent = state.candidates.length;
    byId("cards-empty").hidden = state.candidates.length > 0;
    if (!state.answer || !state.candidates.length) return arrange(list, []);
    const view = slateView(state);
    const most = {};
    for (const row of view.rows) {
      most.score = Math.max(most.score ?? 0, row.score ?? 0);
      for (const [name, value] of row.heads) most[`head ${name}`] = Math.max(most[`head ${name}`] ?? 0, value);
    }
    const unknown = new Set(state.answer.unknown_candidates.map((at) => state.keys[at]));
    const byKey = new Map(state.candidates.map((candidate) => [candidate.key, candidate]));
    const shown = view.rows.filter((row) => byKey.has(row.key));
    for (const row of shown) {
      const candidate = byKey.get(row.key);
      if (!cards.has(row.key) || cards.get(row.key).title !== titleOf(candidate.id))
        cards.set(row.key, make(candidate));
      update(cards.get(row.key), row, most, candidate, unknown.has(row.key));
    }
    arrange(
      list,
      shown.map((row) => cards.get(row.key).element),
    );
  };
}

export function withoutText(state, titleOf) {
  const view = slateView(state);
  const rows = view.rows.filter((row) => !row.ghost);
  const moved = rows.filter((row) => row.move).length;
  const most = rows.reduce((best, row) => (Math.abs(row.delta ?? 0) > Math.abs(best?.delta ?? 0) ? row : best), null);
  const ids = new Map(state.candidates.map((candidate) => [candidate.key, candidate.id]));
  const name = titleOf(ids.get(state.without));
  if (!moved && Math.abs(most?.delta ?? 0) < 1e-5) {
    const alone = ["dot", "point"].includes(state.answer.exit);
    return `Without ${name}: nothing changes.${alone ? ` At the exit ${state.answer.exit} each candidate is scored by itself; at set they see each other.` : ""}`;
  }
  const largest = most
    ? ` The largest change of a score is ${signed(most.delta, 4)}, of ${titleOf(ids.get(most.key))}.`
    : "";
  const places = moved
    ? `${moved} of ${rows.length} other candidates change their place.`
    : "no other candidate changes its place.";
  return `Without ${name}: ${places}${largest}`;
}
