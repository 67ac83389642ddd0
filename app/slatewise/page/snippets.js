// The request on screen, as a shell command and as Python, to copy.

import { getKey } from "./api.js";
import { byId } from "./dom.js";

const server = () => new URL(".", document.baseURI).href.replace(/\/$/, "");

export function curl(body) {
  const key = getKey() ? ` -H "Authorization: Bearer $SLATEWISE_API_KEY"` : "";
  return `curl -s ${quoted(`${server()}/rerank`)} -H 'Content-Type: application/json'${key} -d ${quoted(json(body))}`;
}

// In single quotes for a POSIX shell.
const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

// One member a line.
function json(body) {
  return `{\n${Object.entries(body)
    .map(([name, value]) => ` ${JSON.stringify(name)}: ${spaced(value, literal)}`)
    .join(",\n")}\n}`;
}

export function python(body) {
  const members = Object.entries(body).map(([name, value]) => `        ${name}=${spaced(value, pythonLiteral)},`);
  const key = getKey() ? "  # the key: SLATEWISE_API_KEY" : "";
  return `from slatewise import Client\n\nwith Client(${pythonLiteral(server())}) as client:${key}\n    ranking = client.rerank(\n${members.join("\n")}\n    )\n${printed(body)}`;
}

// What the program shows: also the fields and the explanations, if the request asks for them.
function printed(body) {
  const rows = body.return_fields
    ? "for k, row in enumerate(ranking):\n    print(row.rank, row.item_id, row.score, *(column[k] for column in ranking.fields.values()))"
    : "for row in ranking:\n    print(row.rank, row.item_id, row.score)";
  if (!body.explain) return rows;
  return `${rows}\nfor row, why in zip(ranking, ranking.explanations or []):\n    print(row.item_id, "places by event:", dict(zip(why["events"]["item_ids"], why["events"]["places"])))`;
}

function spaced(value, write) {
  if (Array.isArray(value)) return `[${value.map((each) => spaced(each, write)).join(", ")}]`;
  if (value !== null && typeof value === "object")
    return `{${Object.entries(value)
      .map(([name, each]) => `${write(name)}: ${spaced(each, write)}`)
      .join(", ")}}`;
  return write(value);
}

const literal = (value) => JSON.stringify(value);

// JSON's escapes are valid in Python, except for pairs of surrogates, which JSON leaves as they are.
function pythonLiteral(value) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  return JSON.stringify(value);
}

const WRITERS = { curl, python };

// The panel with its tabs and its button. The function that is returned shows the code of the request now.
export function codePanel(body, isEmpty) {
  const tabs = Object.keys(WRITERS);
  let language = tabs[0];

  function show() {
    byId("code").textContent = isEmpty() ? "" : WRITERS[language](body());
    byId("copy").disabled = isEmpty();
  }

  function choose(name) {
    language = name;
    for (const each of tabs) {
      byId(`tab-${each}`).setAttribute("aria-selected", String(each === name));
      byId(`tab-${each}`).tabIndex = each === name ? 0 : -1;
    }
    byId("code").setAttribute("aria-labelledby", `tab-${name}`);
    show();
  }

  for (const name of tabs) {
    byId(`tab-${name}`).onclick = () => choose(name);
    byId(`tab-${name}`).onkeydown = (pressed) => {
      if (!["ArrowLeft", "ArrowRight"].includes(pressed.key)) return;
      const other = tabs[1 - tabs.indexOf(name)];
      choose(other);
      byId(`tab-${other}`).focus();
    };
  }
  byId("copy").onclick = async () => {
    const copied = await navigator.clipboard?.writeText(byId("code").textContent).then(
      () => true,
      () => false,
    );
    if (!copied) getSelection().selectAllChildren(byId("code")); // no clipboard without HTTPS: the text is selected instead
    byId("copy").textContent = copied ? "Copied" : "Selected";
    setTimeout(() => (byId("copy").textContent = "Copy"), 1500);
  };
  return show;
}
