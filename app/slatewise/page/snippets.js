// The request on screen, as a shell command and as Python.

import { getKey } from "./api.js";

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
  return `from slatewise import Client\n\nwith Client(${pythonLiteral(server())}) as client:${key}\n    ranking = client.rerank(\n${members.join("\n")}\n    )\nfor row in ranking:\n    print(row)`;
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
