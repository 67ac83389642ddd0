// The user's events as chips: add, drop, move, and choose the action.

import { arrange, byId, fill, h, iconButton } from "./dom.js";

// state.history: [{key, id, action, time}], oldest first. changed() is called after each change.
export function historyList(state, titleOf, changed) {
  const chips = new Map(); // key -> element
  let dragged = null;

  // Times stay at their positions: the server reads events in the order of time.
  function move(event, to) {
    const from = state.history.indexOf(event);
    if (to < 0 || to >= state.history.length || to === from) return;
    const times = state.history.map((each) => each.time);
    state.history.splice(from, 1);
    state.history.splice(to, 0, event);
    state.history.forEach((each, k) => (each.time = times[k]));
    changed();
  }

  function drop(event) {
    const at = state.history.indexOf(event);
    state.history.splice(at, 1);
    changed();
    const next = state.history[Math.min(at, state.history.length - 1)];
    (next ? chips.get(next.key).querySelector(".drop") : byId("history")).focus();
  }

  function chip(event) {
    const title = titleOf(event.id);
    const actions = h("select", {
      "aria-label": `Action of ${title}`,
      onchange: () => {
        event.action = actions.value || null;
        changed();
      },
    });
    const element = h(
      "li",
      { class: "chip", draggable: "true" },
      h("span", { class: "name", title: event.id }, title),
      iconButton("up", `Move ${title} earlier`, () => move(event, state.history.indexOf(event) - 1), {
        class: "icon up",
      }),
      iconButton("down", `Move ${title} later`, () => move(event, state.history.indexOf(event) + 1), {
        class: "icon down",
      }),
      state.card.actions.length ? actions : null,
      iconButton("drop", `Drop ${title}`, () => drop(event), { class: "icon drop" }),
    );
    element.addEventListener("keydown", (pressed) => {
      const step = { ArrowUp: -1, ArrowDown: 1 }[pressed.key];
      if (step && pressed.altKey) {
        pressed.preventDefault();
        move(event, state.history.indexOf(event) + step);
      } else if (pressed.key === "Delete" && pressed.target.tagName === "BUTTON") {
        pressed.preventDefault();
        drop(event);
      }
    });
    element.addEventListener("dragstart", () => {
      dragged = event;
      element.classList.add("dragged");
    });
    element.addEventListener("dragend", () => element.classList.remove("dragged"));
    element.addEventListener("dragover", (over) => over.preventDefault());
    element.addEventListener("drop", (over) => {
      over.preventDefault();
      if (dragged) move(dragged, state.history.indexOf(event));
      dragged = null;
    });
    return element;
  }

  return function show() {
    const keys = new Set(state.history.map((event) => event.key));
    for (const key of chips.keys()) if (!keys.has(key)) chips.delete(key);
    for (const event of state.history) {
      if (!chips.has(event.key)) chips.set(event.key, chip(event));
      const element = chips.get(event.key);
      const name = element.querySelector(".name");
      if (name.textContent !== titleOf(event.id)) {
        chips.set(event.key, chip(event));
      }
      const select = chips.get(event.key).querySelector("select");
      if ((select && (select.value || null) !== event.action) || select?.options.length === 0) {
        const known = [...new Set([...state.card.actions, ...(event.action ? [event.action] : [])])];
        fill(select, [["", "no action"], ...known.map((action) => [action, action])], event.action ?? "");
      }
    }
    arrange(
      byId("history"),
      state.history.map((event) => chips.get(event.key)),
    );
  };
}
