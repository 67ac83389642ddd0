// The same slate at each exit and by each variant: places, moves and milliseconds, side by side.

import { rerank } from "./api.js";
import { byId, h, milliseconds, moveMark } from "./dom.js";

const SHOWN = 12; // rows, until all are asked for
const MOST = 12; // columns: a ranker may have many variants
const STAGES = ["parse", "features", "embed", "queue", "encode", "score"];

export function comparison(state, titleOf, hover) {
  let columns = [];
  let asking = null;
  let all = false;
  const toggle = byId("rows");
  toggle.addEventListener("click", () => {
    all = !all;
    show();
  });

  // bodyOf({exit, variant}) is the request on screen with another exit or variant. Requests run one after the other, so
  // that none of them waits for another.
  async function run(bodyOf) {
    asking?.abort();
    const { signal } = (asking = new AbortController());
    const { answer, keys, card } = state;
    const { exit } = answer;
    const variant = answer.variant ?? card.default_variant;
    const known = columns;
    columns = [
      ...card.exits.map((name) => ({ group: `exit, by ${variant}`, name, exit: name, variant })),
      ...Object.keys(card.variants).map((name) => ({ group: `variant, at ${exit}`, name, exit, variant: name })),
    ]
      .slice(0, MOST)
      .map((column, k) => ({
        ...column,
        keys,
        answer: known[k]?.name === column.name ? known[k].answer : null,
        stale: true,
      }));
    if (exit === "input_order") columns = columns.filter((column) => column.exit !== exit);
    show();
    for (const column of columns) {
      const same = column.exit === exit && column.variant === answer.variant && !state.explain; // explaining takes time
      try {
        column.answer = same
          ? answer
          : await rerank(bodyOf({ exit: column.exit, variant: column.variant, explain: false }), signal);
        column.error = null;
      } catch (error) {
        if (error.name === "AbortError") return;
        column.error = error;
        column.answer = null;
      }
      if (signal.aborted) return;
      column.stale = false;
      show();
    }
    byId("compare").setAttribute("aria-busy", "false");
  }

  // The columns belong to an earlier slate until `run` has asked again.
  function wait() {
    asking?.abort();
    byId("compare").setAttribute("aria-busy", "true");
  }

  function head(column) {
    const times = column.answer?.timings_ms;
    const label = h(
      "th",
      {
        scope: "col",
        "data-exit": column.exit,
        "data-variant": column.variant,
        "aria-busy": column.stale ? "true" : null,
      },
      column.name,
    );
    if (column.error) label.append(h("span", { class: "ms error", title: column.error.detail }, "error"));
    else if (times) {
      const stages = h(
        "span",
        { class: "stages", "aria-hidden": "true" },
        ...STAGES.map((stage) => {
          const part = h("i", { class: stage });
          part.style.setProperty("--share", String(times[stage] ?? 0));
          return part;
        }),
      );
      const told = STAGES.map((stage) => `${stage} ${times[stage] ?? 0} ms`).join(", ");
      const changed = column.answer.exit === column.exit ? "" : `, answered by ${column.answer.exit}`;
      label.append(
        h(
          "span",
          { class: "ms", title: `${told}; history ${column.answer.history.cache}${changed}` },
          milliseconds(times.total),
          changed ? "*" : "",
        ),
        stages,
      );
    } else label.append(h("span", { class: "ms" }, "…"));
    return label;
  }

  function cell(column, key, place) {
    const at = column.answer ? placesOf(column).get(key) : undefined;
    if (at === undefined) return h("td", {}, "…");
    const move = place - at;
    const element = h(
      "td",
      { class: move > 0 ? "up" : move < 0 ? "down" : null, "data-place": at + 1 },
      h("span", { class: "n" }, at + 1),
      moveMark(move) ?? "",
    );
    element.style.setProperty("--size", String(Math.min(1, Math.abs(move) / 6)));
    return element;
  }

  function placesOf(column) {
    if (column.placed !== column.answer) {
      column.placed = column.answer;
      column.places = new Map(column.answer.results.index.map((at, k) => [column.keys[at], k]));
    }
    return column.places;
  }

  function show() {
    const { answer, keys } = state;
    const order = answer.results.index.map((k) => keys[k]);
    const ids = new Map(state.candidates.map((candidate) => [candidate.key, candidate.id]));
    const shown = order.filter((key) => ids.has(key)).slice(0, all ? order.length : SHOWN);
    const groups = [...new Set(columns.map((column) => column.group))];
    toggle.hidden = order.length <= SHOWN;
    toggle.textContent = all ? `First ${SHOWN}` : `All ${order.length}`;
    toggle.setAttribute("aria-expanded", String(all));
    byId("compare").replaceChildren(
      h(
        "table",
        {},
        h(
          "thead",
          {},
          h(
            "tr",
            {},
            h("td", {}),
            ...groups.map((group) =>
              h("th", { scope: "colgroup", colspan: columns.filter((column) => column.group === group).length }, group),
            ),
          ),
          h("tr", {}, h("th", { scope: "col", class: "first" }, "item"), ...columns.map(head)),
        ),
        h(
          "tbody",
          {},
          ...shown.map((key, place) =>
            h(
              "tr",
              { "data-key": key, onpointerenter: () => hover(key), onpointerleave: () => hover(null) },
              h("th", { scope: "row", title: titleOf(ids.get(key)) }, titleOf(ids.get(key))),
              ...columns.map((column) => cell(column, key, place)),
            ),
          ),
        ),
      ),
    );
  }

  function stop() {
    asking?.abort();
    byId("compare").setAttribute("aria-busy", "false");
  }

  function clear() {
    stop();
    columns = [];
    toggle.hidden = true;
    byId("compare").replaceChildren(h("p", { class: "empty" }, "Nothing to compare yet."));
  }

  return { run, wait, stop, show, clear };
}
