// Calls of the server. Paths are relative to the page, so that it works behind a prefix.

const KEY = "slatewise-key";

export class ApiError extends Error {
  constructor(status, title, detail, faults = []) {
    super(detail);
    Object.assign(this, { status, title, detail, faults });
  }
}

export const getKey = () => sessionStorage.getItem(KEY);
export const setKey = (key) => sessionStorage.setItem(KEY, key);

export async function call(path, body = null, signal = undefined) {
  const headers = body === null ? {} : { "Content-Type": "application/json" };
  if (getKey()) headers.Authorization = `Bearer ${getKey()}`;
  let answer;
  try {
    answer = await fetch(new URL(path, document.baseURI), {
      method: body === null ? "GET" : "POST",
      headers,
      body: body === null ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "No answer", "The server does not answer.");
  }
  if (!answer.ok) throw await problemOf(answer);
  return (answer.headers.get("Content-Type") ?? "").includes("json") ? answer.json() : answer.text();
}

async function problemOf(answer) {
  const problem = await answer.json().catch(() => ({}));
  const title = typeof problem.title === "string" ? problem.title : answer.statusText;
  const detail = typeof problem.detail === "string" ? problem.detail : `status ${answer.status}`;
  return new ApiError(answer.status, title, detail, Array.isArray(problem.errors) ? problem.errors : []);
}

export const rerank = (body, signal) => call("rerank", body, signal);
const of = (ranker) => `models/${encodeURIComponent(ranker)}`;
export const listModels = async () => (await call("models")).models;
export const modelCard = (ranker) => call(of(ranker));
export const examples = async (ranker) => (await call(`${of(ranker)}/examples`)).examples;
export const metrics = () => call("metrics");
export const takesExplain = async () =>
  "explain" in ((await call("openapi.json")).components?.schemas?.RankRequest?.properties ?? {});

export function search(ranker, query, signal) {
  return call(`${of(ranker)}/items?${new URLSearchParams({ query, limit: "12" })}`, null, signal).then(rows);
}

const CHUNK = 100; // ids of one call: an address has a limited length

export async function items(ranker, ids, signal) {
  const found = [];
  for (let k = 0; k < ids.length; k += CHUNK) {
    const query = new URLSearchParams(ids.slice(k, k + CHUNK).map((id) => ["id", id]));
    found.push(...rows(await call(`${of(ranker)}/items?${query}`, null, signal)));
  }
  return found;
}

// Columns to [{id, known, fields: {title, ...}}].
function rows(answer) {
  return answer.item_ids.map((id, k) => ({
    id,
    known: answer.known[k],
    fields: Object.fromEntries(Object.entries(answer.fields).map(([name, column]) => [name, column[k]])),
  }));
}
