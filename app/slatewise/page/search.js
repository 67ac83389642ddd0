// A box that finds items by title or id: a combobox with a list of options, by mouse and by keyboard.

import { search } from "./api.js";
import { h } from "./dom.js";

let boxes = 0;

// context: {ranker(), titleOf(item)}. onpick(id, item) is called for each item; a text that is no title is added as an id.
export function searchBox(label, context, onpick) {
  const name = `search-${++boxes}`;
  let options = [];
  let active = -1;
  let waiting = 0;
  let asking = null;
  const input = h("input", {
    id: name,
    type: "text",
    role: "combobox",
    placeholder: label,
    "aria-label": label,
    "aria-autocomplete": "list",
    "aria-expanded": "false",
    "aria-controls": `${name}-list`,
    autocomplete: "off",
    spellcheck: "false",
    maxlength: "256",
  });
  const list = h("ul", { id: `${name}-list`, role: "listbox", "aria-label": "Items found", hidden: true });

  function show(found) {
    options = found;
    active = -1; // nothing is selected yet: an arrow goes to the first, and Enter takes the first
    list.replaceChildren(
      ...found.map((item, k) =>
        h(
          "li",
          {
            id: `${name}-${k}`,
            role: "option",
            "aria-selected": "false",
            onpointerdown: (event) => {
              event.preventDefault();
              pick(k);
            },
          },
          item.typed ? `Add the id ${item.id}` : h("span", {}, context.titleOf(item)),
          item.typed ? null : h("small", {}, item.id),
        ),
      ),
    );
    list.hidden = found.length === 0;
    input.setAttribute("aria-expanded", String(found.length > 0));
    mark();
  }

  function mark() {
    [...list.children].forEach((option, k) => option.setAttribute("aria-selected", String(k === active)));
    if (active >= 0) {
      input.setAttribute("aria-activedescendant", `${name}-${active}`);
      list.children[active].scrollIntoView({ block: "nearest" });
    } else input.removeAttribute("aria-activedescendant");
  }

  function pick(k) {
    const item = options[k];
    input.value = "";
    show([]);
    onpick(item.id, item);
  }

  async function ask() {
    const text = input.value.trim();
    asking?.abort();
    asking = new AbortController();
    if (!text) return show([]);
    const typed = { id: text, typed: true, fields: {} };
    try {
      const found = await search(context.ranker(), text, asking.signal);
      show(found.some((item) => item.id === text) ? found : [...found, typed]);
    } catch (error) {
      if (error.name !== "AbortError") show([typed]);
    }
  }

  input.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(ask, 120);
  });
  input.addEventListener("blur", () => show([]));
  input.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step && options.length)
      active = active < 0 && step < 0 ? options.length - 1 : (active + step + options.length) % options.length;
    else if (event.key === "Enter" && options.length) pick(Math.max(0, active));
    else if (event.key === "Escape" && options.length) show([]);
    else return;
    event.preventDefault();
    mark();
  });
  return h("div", { class: "search" }, input, list);
}
