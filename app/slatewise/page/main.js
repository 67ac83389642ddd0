// The page: the ranking after each change, the changes that a person can make, and the start.

import * as api from "./api.js";
import { byId, fill, h, icon } from "./dom.js";
import { cardList, withoutText } from "./slate.js";
import { comparison } from "./compare.js";
import { historyList } from "./history.js";
import { searchBox } from "./search.js";
import { showModel, watchLatency } from "./model.js";
import { codePanel } from "./snippets.js";
import { bodyOf, candidate, event, fieldsOf, known, state, titleOf } from "./state.js";
import { announce, facts, historyTold, hover, named, repeats, showProblem, whyLegend, whyOf } from "./told.js";

const COMPARE_AFTER = 250; // milliseconds without a change until the comparison runs

let ranking = null; // AbortController of the ranking in flight; null without one
let leaving = null; // AbortController of the ranking without one candidate, after a click
let comparing = 0; // timer

const list = historyList(state, titleOf, changed);
const cards = cardList(state, { titleOf, fieldsOf, whyOf }, { drop: dropCandidate, toggle: toggleWithout, hover });
const compare = comparison(state, titleOf, hover);
const showCode = codePanel(bodyOf, () => !state.candidates.length);
const readLatency = watchLatency(() => state.ranker);
const context = { ranker: () => state.ranker, titleOf: (item) => item.fields.title || item.id };

// After each change of the user, the history, the candidates or the options.
async function changed() {
  list();
  historyTold();
  repeats();
  showCode();
  cancel();
  showProblem(null);
  if (!state.candidates.length) {
    Object.assign(state, { answer: null, keys: [], without: null, changed: null });
    byId("facts").replaceChildren();
    byId("without").hidden = true;
    byId("cards").setAttribute("aria-busy", "false");
    whyLegend();
    cards();
    return compare.clear();
  }
  const { signal } = (ranking = new AbortController());
  byId("cards").setAttribute("aria-busy", "true");
  try {
    const sent = state.candidates.map((candidate) => candidate.key);
    if (!sent.includes(state.without)) state.without = null;
    const answer = await api.rerank(bodyOf(), signal);
    const without =
      state.without && sent.length > 1 ? await api.rerank(bodyOf({ without: state.without }), signal) : null;
    const before = state.answer ? new Map(state.answer.results.index.map((at, k) => [state.keys[at], k])) : new Map();
    await learn(answer, signal);
    signal.throwIfAborted();
    Object.assign(state, { answer, keys: sent, before, changed: without, read: answer.history });
    if (!state.sends) state.stored = answer.history.source === "stored" ? answer.history.used : 0;
    if (!without) state.without = null;
    showAnswer();
    comparing = setTimeout(() => compare.run(bodyOf), COMPARE_AFTER);
  } catch (error) {
    if (error.name === "AbortError") return;
    failed(error);
  }
  if (signal.aborted) return;
  ranking = null;
  byId("cards").setAttribute("aria-busy", "false");
}

// No answer that is on its way belongs to what is on screen next.
function cancel() {
  ranking?.abort();
  leaving?.abort();
  ranking = leaving = null;
  clearTimeout(comparing);
  compare.wait();
}

// Keep the fields of the results, and ask for the titles of events that an explanation names.
async function learn(answer, signal) {
  const columns = answer.results.fields;
  if (columns)
    answer.results.item_ids.forEach((id, k) =>
      known.set(id, Object.fromEntries(Object.entries(columns).map(([name, column]) => [name, column[k]]))),
    );
  await learnTitles(named(answer), signal).catch((error) => {
    if (error.name === "AbortError") throw error; // after another fault the ids are shown
  });
}

async function learnTitles(ids, signal) {
  const missing = [...new Set(ids)].filter((id) => !known.has(id));
  if (missing.length && state.card.return_fields.length)
    for (const item of await api.items(state.ranker, missing, signal)) known.set(item.id, item.fields);
}

// What is shown

function showAnswer() {
  cards();
  facts(state.answer);
  historyTold();
  whyLegend();
  compare.show();
  const note = byId("without");
  note.hidden = !state.changed;
  if (state.changed) {
    const text = withoutText(state, titleOf);
    note.replaceChildren(
      h("span", {}, text),
      h("button", { type: "button", class: "quiet", onclick: () => toggleWithout(state.without) }, "Put it back"),
    );
  }
  announce();
}

function failed(error) {
  byId("cards").setAttribute("aria-busy", "false");
  if (error.status === 401) return askForKey(error);
  if (!(error instanceof api.ApiError)) console.error(error);
  showProblem(error, changed);
  compare.stop();
}

// Changes

async function loadExample(body) {
  const { item_ids: ids = [], actions, timestamps } = body.history ?? {};
  const columns = Object.entries(body.candidates.features ?? {});
  cancel();
  Object.assign(state, {
    user: body.user ?? "",
    requestTime: body.request_time ?? null,
    without: null,
    changed: null,
    answer: null,
    keys: [],
    history: ids.map((id, k) => event(String(id), actions?.[k], timestamps?.[k])),
    sends: "history" in body,
    read: null,
    stored: null,
    candidates: body.candidates.item_ids.map((id, k) =>
      candidate(String(id), Object.fromEntries(columns.map(([name, column]) => [name, column[k]]))),
    ),
  });
  state.given = new Set(state.history.map((each) => each.key));
  byId("new-action").value = state.history.at(-1)?.action ?? "";
  byId("user").value = state.user;
  byId("demo").value = String(state.examples.indexOf(body));
  await learnTitles(state.history.map((each) => each.id));
  await changed();
  byId("history").scrollTop = byId("history").scrollHeight;
}

function setUser(user) {
  const example = state.examples.find((body) => body.user === user);
  if (example) return loadExample(example).catch(failed);
  Object.assign(state, { user, stored: null, without: null, changed: null });
  byId("demo").value = "-1";
  return setHistory(false);
}

// Without events: rank by an empty history that is sent, or send none, so that the server reads the stored events.
function setHistory(sends) {
  Object.assign(state, { history: [], sends, read: null, requestTime: null, given: new Set() });
  return changed();
}

function addEvent(id, item) {
  if (!known.has(id)) known.set(id, item.fields);
  const last = state.history.at(-1);
  const time = !last || last.time === null ? null : last.time + 60;
  if (time !== null && state.requestTime !== null) state.requestTime = Math.max(state.requestTime, time);
  state.history.push(event(id, byId("new-action").value || null, time));
  state.sends = true;
  changed();
  byId("history").scrollTop = byId("history").scrollHeight;
}

function addCandidate(id, item) {
  if (!known.has(id)) known.set(id, item.fields);
  const told = state.examples.flatMap((body) => {
    const k = body.candidates.item_ids.indexOf(id);
    return k < 0
      ? []
      : [Object.fromEntries(Object.entries(body.candidates.features ?? {}).map(([name, column]) => [name, column[k]]))];
  });
  state.candidates.push(candidate(id, told[0]));
  changed();
}

function dropCandidate(key) {
  const order = [...byId("cards").children];
  const at = order.findIndex((element) => element.contains(document.activeElement));
  state.candidates = state.candidates.filter((each) => each.key !== key);
  const next = order[at + 1] ?? order[at - 1];
  cards();
  if (at >= 0) (next?.querySelector(".drop") ?? byId("cards")).focus();
  changed();
}

async function toggleWithout(key) {
  state.without = state.without === key || state.candidates.length < 2 ? null : key;
  state.before = new Map();
  if (ranking) return changed(); // asks for both answers, of the same slate
  leaving?.abort();
  if (!state.without) {
    state.changed = null;
    byId("cards").setAttribute("aria-busy", "false");
    return showAnswer();
  }
  const { signal } = (leaving = new AbortController());
  byId("cards").setAttribute("aria-busy", "true");
  try {
    state.changed = await api.rerank(bodyOf({ without: state.without }), signal);
    showAnswer();
  } catch (error) {
    if (error.name === "AbortError") return;
    state.without = null;
    failed(error);
  }
  if (!signal.aborted) byId("cards").setAttribute("aria-busy", "false");
}

// Start

async function start() {
  byId("notice").hidden = true;
  byId("key-form").hidden = true;
  try {
    const models = await api.listModels();
    const asked = new URLSearchParams(location.search).get("ranker");
    fill(
      byId("ranker"),
      models.map(({ name }) => [name, name]),
      models.some(({ name }) => name === asked) ? asked : models[0]?.name,
    );
    byId("ranker").disabled = models.length < 2;
    if (asked !== null && asked !== byId("ranker").value) keepInAddress(byId("ranker").value);
    await loadRanker(byId("ranker").value);
  } catch (error) {
    if (error.status === 401) return askForKey(error);
    notice(error);
  }
}

function keepInAddress(ranker) {
  const address = new URL(location.href);
  address.searchParams.set("ranker", ranker);
  history.replaceState(null, "", address);
}

async function loadRanker(name) {
  const [card, examples] = await Promise.all([api.modelCard(name), api.examples(name)]);
  if (byId("ranker").value !== name) return; // another one was chosen meanwhile
  known.clear();
  Object.assign(state, { ranker: name, card, examples, exit: "auto", variant: "auto", explain: false });
  fill(
    byId("demo"),
    [
      ...examples.map((body, k) => [String(k), `${body.user ?? "no user"} (${body.history?.item_ids?.length ?? 0})`]),
      ["-1", "another"],
    ],
    "0",
  );
  fill(byId("exit"), [["auto", `auto (${card.default_exit})`], ...card.exits.map((exit) => [exit, exit])], "auto");
  fill(
    byId("variant"),
    [["auto", `auto (${card.default_variant})`], ...Object.keys(card.variants).map((variant) => [variant, variant])],
    "auto",
  );
  fill(
    byId("new-action"),
    [["", "no action"], ...card.actions.map((action) => [action, action])],
    card.actions[0] ?? "",
  );
  byId("new-action").hidden = !card.actions.length;
  byId("main").hidden = false;
  showModel(card);
  readLatency();
  api.takesExplain().then(
    (taken) => (byId("explain").hidden = !taken),
    () => {},
  );
  await loadExample(examples[0]);
  readLatency();
}

function notice(error) {
  const place = byId("notice");
  place.hidden = false;
  place.replaceChildren(
    h("p", {}, h("strong", {}, error.title ?? "Error"), ` ${error.detail ?? error.message}`),
    h("button", { type: "button", onclick: start }, "Try again"),
  );
}

function askForKey(error) {
  if (api.getKey()) notice({ title: error.title, detail: error.detail });
  byId("key-form").hidden = false;
  byId("key").focus();
}

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  const dark = theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const label = dark ? "Light colours" : "Dark colours";
  byId("theme").replaceChildren(icon(dark ? "sun" : "moon"));
  byId("theme").setAttribute("aria-label", label);
  byId("theme").title = label;
  byId("theme").onclick = () => {
    localStorage.setItem("slatewise-theme", dark ? "light" : "dark");
    setTheme(dark ? "light" : "dark");
  };
}

function wire() {
  byId("history-search").replaceWith(searchBox("Add an event: title or id", context, addEvent));
  byId("candidate-search").replaceWith(searchBox("Add a candidate: title or id", context, addCandidate));
  byId("ranker").onchange = () => {
    keepInAddress(byId("ranker").value);
    loadRanker(byId("ranker").value).catch(notice);
  };
  byId("demo").onchange = () =>
    byId("demo").value === "-1"
      ? byId("user").focus()
      : loadExample(state.examples[Number(byId("demo").value)]).catch(failed);
  byId("user").onchange = () => setUser(byId("user").value.trim());
  byId("reset").onclick = () => loadExample(state.examples[Math.max(0, Number(byId("demo").value))]).catch(failed);
  byId("clear").onclick = () => setHistory(true);
  byId("stored").onclick = () => {
    setHistory(false);
    byId("clear").focus(); // this button is gone now
  };
  for (const name of ["exit", "variant"])
    byId(name).onchange = () => {
      state[name] = byId(name).value;
      changed();
    };
  byId("explain").onclick = () => {
    state.explain = !state.explain;
    byId("explain").setAttribute("aria-pressed", String(state.explain));
    changed();
  };
  byId("key-form").onsubmit = (submitted) => {
    submitted.preventDefault();
    api.setKey(byId("key").value.trim());
    byId("key").value = "";
    start();
  };
}

setTheme(localStorage.getItem("slatewise-theme"));
wire();
start();
