// Elements and their arrangement. Text from the server becomes text nodes only: nothing here reads HTML.

const SVG = "http://www.w3.org/2000/svg";
const ICONS = {
  drop: "M6 6l12 12M18 6L6 18",
  up: "M12 19V6M6 11l6-6 6 6",
  down: "M12 5v13M6 13l6 6 6-6",
  without:
    "M4 4l16 16M9.9 5.6A9.6 9.6 0 0 1 12 5.4c5 0 8.4 4 9.4 6.6a11 11 0 0 1-2.6 3.6M6.3 7.4A11.6 11.6 0 0 0 2.6 12c1 2.6 4.4 6.6 9.4 6.600a9 9 0 0 0 4.3-1.1",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM12 2v2.5M12 19.5V22M2 12h2.5M19.5 12H22M5 5l1.7 1.7M17.3 17.3L19 19M5 19l1.7-1.7M17.3 6.7L19 5",
  moon: "M20 14.5A8 8 0 0 1 9.5 4a8 8 0 1 0 10.5 10.5z",
};

export const byId = (id) => document.getElementById(id);

// h("li", {class: "card", onclick: f, "aria-label": text}, child, "text", null): children that are null are left out.
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const path = document.createElementNS(SVG, "path");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

export function iconButton(name, label, onclick, more = {}) {
  return h(
    "button",
    { type: "button", class: "icon", "aria-label": label, title: label, onclick, ...more },
    icon(name),
  );
}

export function fill(select, values, chosen) {
  select.replaceChildren(...values.map(([value, text]) => h("option", { value, selected: value === chosen }, text)));
}

const still = matchMedia("(prefers-reduced-motion: reduce)");

// Make `wanted` the children of `parent`, in this order. Those that move glide from their old place (FLIP). The focus
// stays on its element.
export function arrange(parent, wanted) {
  const focused = document.activeElement;
  const places = new Map([...parent.children].map((child) => [child, child.getBoundingClientRect()]));
  const kept = new Set(wanted);
  for (const child of [...parent.children]) if (!kept.has(child)) child.remove();
  wanted.forEach((element, k) => {
    if (parent.children[k] !== element) parent.insertBefore(element, parent.children[k] ?? null);
  });
  if (focused !== document.activeElement && parent.contains(focused)) focused.focus({ preventScroll: true });
  if (still.matches) return;
  for (const element of wanted) element.getAnimations().forEach((running) => running.cancel());
  for (const [element, now] of wanted.map((each) => [each, each.getBoundingClientRect()])) {
    const old = places.get(element);
    if (!old) element.animate([{ opacity: 0 }, { opacity: 1 }], { duration: 250 });
    else if (Math.abs(old.top - now.top) > 1)
      element.animate([{ transform: `translateY(${old.top - now.top}px)` }, { transform: "none" }], {
        duration: 450,
        easing: "cubic-bezier(.2,.7,.2,1)",
      });
  }
}

export const number = (value, digits = 3) => value.toFixed(digits).replace("-", "−");
export const signed = (value, digits = 3) => (value > 0 ? "+" : "") + number(value, digits);
export const milliseconds = (value) => `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;

// ▲2 for two places up, ▼1 for one down, nothing for 0.
export function moveMark(move, label = "") {
  if (!move) return null;
  const words = `${Math.abs(move)} ${Math.abs(move) === 1 ? "place" : "places"} ${move > 0 ? "up" : "down"}${label}`;
  return h(
    "span",
    { class: `move ${move > 0 ? "up" : "down"}`, title: words },
    h("span", { "aria-hidden": "true" }, `${move > 0 ? "▲" : "▼"}${Math.abs(move)}`),
    h("span", { class: "sr" }, words),
  );
}

export function details(pairs) {
  return h("dl", {}, ...pairs.filter(Boolean).flatMap(([term, value]) => [h("dt", {}, term), h("dd", {}, value)]));
}
