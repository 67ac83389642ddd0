// The model card: verdict, quality with intervals, limits; and live latency from the histograms of /metrics.

import { metrics } from "./api.js";
import { byId, details, h, milliseconds, number } from "./dom.js";

const GRADES = {
  better: "better than the baselines",
  unclear: "not clearly better than the baselines",
  worse: "worse than a baseline",
};
const TABLES = { leave_one_out: "Next item, among all items", slates: "Order within a slate" };
const EVERY = 4000; // milliseconds between two readings
const WINDOW = 60000; // milliseconds that the live figures cover

export function showModel(card) {
  const { verdict, limits, report } = card;
  const tables = Object.entries(TABLES)
    .map(([name, title]) => quality(title, report[name], card))
    .filter(Boolean);
  byId("model").replaceChildren(
    h(
      "p",
      { class: "lead" },
      h("strong", {}, card.name),
      ` version ${card.version}`,
      GRADES[verdict?.grade] ? h("span", { class: `grade ${verdict.grade}` }, GRADES[verdict.grade]) : measured(card),
    ),
    verdict ? h("p", { class: "note" }, verdict.line) : "",
    ...(verdict?.warnings ?? []).map((warning) => h("p", { class: "problem" }, warning)),
    ...(tables.length ? tables : [h("p", { class: "note" }, "The bundle has no measured quality.")]),
    h("h3", {}, "Live"),
    h("div", { id: "live-details" }, h("p", { class: "note" }, "Waiting for the first reading.")),
    h("h3", {}, "Limits"),
    details([
      ["candidates", `${limits.max_candidates}, of which ${card.set_wise ? limits.set_wise : 0} in one slate`],
      ["history", `${limits.max_history} events, the newest ${limits.history_used} are read`],
      [
        "weights",
        Object.entries(card.heads)
          .map(([name, weight]) => `${name} ${weight}`)
          .join(", "),
      ],
      ["features", card.features.join(", ") || "none"],
      [
        "fields",
        Object.entries(card.fields)
          .map(([name, values]) => `${name} (${values.length})`)
          .join(", ") || "none",
      ],
      ["trained on", card.trained_on || "not stated"],
    ]),
    ...Object.entries(card.refused_variants).map(([name, reason]) =>
      h("p", { class: "problem" }, `Variant ${name} is not served: ${reason}`),
    ),
  );
}

// Without a verdict: the quality of the default exit, or nothing if none was measured.
function measured({ report, default_exit: exit }) {
  const name = Object.keys(TABLES).find((table) => Array.isArray(report[table]?.[exit]?.ndcg10));
  if (!name) return null;
  const figures = [
    ["HR@10", report[name][exit].hr10],
    ["NDCG@10", report[name][exit].ndcg10],
  ]
    .filter(([, values]) => Array.isArray(values))
    .map(([label, [mean, low, high]]) => `${label} ${number(mean)} (${number(low)}–${number(high)})`);
  return h(
    "span",
    { class: "grade", title: `${TABLES[name]}, exit ${exit}; in brackets the 95 % interval` },
    figures.join(", "),
  );
}

// A table of the report: {exit or baseline: {ndcg10: [mean, low, high], hr10: ...}}, drawn with its intervals.
function quality(title, table, card) {
  const rows = Object.entries(table ?? {}).filter(([, row]) => Array.isArray(row?.ndcg10));
  if (!rows.length) return null;
  const most = Math.max(...rows.map(([, row]) => row.ndcg10[2]));
  const least = Math.min(...rows.map(([, row]) => row.ndcg10[1]));
  const from = least > most / 2 ? least - (most - least) / 4 : 0; // a cut axis where all values are alike
  const share = (value) => String((value - from) / (most - from));
  const count = Object.values(table)[0].users ?? Object.values(table)[0].slates;
  return h(
    "div",
    { class: "quality" },
    h("h3", {}, title),
    h(
      "p",
      { class: "note" },
      `NDCG@10 with its 95 % interval${count ? `, ${count} held-out ${table[rows[0][0]].users ? "users" : "slates"}` : ""}`,
    ),
    h(
      "table",
      {},
      h(
        "tbody",
        {},
        ...rows.map(
          ([
            name,
            {
              ndcg10: [mean, low, high],
            },
          ]) => {
            const track = h("span", { class: "interval", "aria-hidden": "true" }, h("i", {}), h("b", {}));
            for (const [variable, value] of [
              ["--low", low],
              ["--high", high],
              ["--mean", mean],
            ])
              track.style.setProperty(variable, share(value));
            return h(
              "tr",
              { class: card.exits.includes(name) ? "exit" : "baseline" },
              h("th", { scope: "row" }, name, name === card.default_exit ? h("span", { class: "tag" }, "default") : ""),
              h("td", { class: "drawn" }, track),
              h("td", {}, number(mean), " ", h("small", {}, `${number(low)}–${number(high)}`)),
            );
          },
        ),
      ),
    ),
  );
}

// Cumulative counts of /rerank by upper edge in seconds, of one ranker, over its variants.
export function bucketsOf(text, ranker) {
  const counts = new Map();
  for (const line of text.split("\n")) {
    const found = /^slatewise_request_duration_seconds_bucket\{(.*)\} (\S+)$/.exec(line);
    if (!found) continue;
    const labels = Object.fromEntries(
      [...found[1].matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map(([, name, value]) => [name, value]),
    );
    if (labels.endpoint !== "/rerank" || labels.ranker !== ranker) continue;
    const edge = labels.le === "+Inf" ? Infinity : Number(labels.le);
    counts.set(edge, (counts.get(edge) ?? 0) + Number(found[2]));
  }
  return new Map([...counts].sort(([a], [b]) => a - b));
}

// The quantile in seconds, linear within its bucket; null without requests.
export function quantile(buckets, share) {
  const total = buckets.get(Infinity) ?? 0;
  if (!(total > 0)) return null;
  let edge = 0;
  let below = 0;
  for (const [upper, count] of buckets) {
    if (count >= share * total)
      return upper === Infinity ? edge : edge + ((upper - edge) * (share * total - below)) / Math.max(count - below, 1);
    [edge, below] = [upper, count];
  }
  return edge;
}

export function minus(newer, older) {
  return new Map([...newer].map(([edge, count]) => [edge, count - (older?.get(edge) ?? 0)]));
}

// Reads /metrics every few seconds while the tab is visible.
export function watchLatency(ranker) {
  let readings = []; // [time, buckets], oldest first
  let of = null;

  async function read() {
    if (document.visibilityState !== "visible" || !ranker()) return;
    try {
      const found = bucketsOf(await metrics(), ranker());
      const now = performance.now();
      const first = readings.length ? readings[0][1] : null;
      const restarted = first && (first.get(Infinity) ?? 0) > (found.get(Infinity) ?? 0);
      if (of !== ranker() || restarted) readings = [];
      of = ranker();
      readings = [...readings.filter(([time]) => now - time < WINDOW), [now, found]];
      const recent = minus(found, readings[0][1]);
      const count = recent.get(Infinity) ?? 0;
      show(
        count > 0 ? recent : found,
        count > 0
          ? `${count} in the last ${Math.round((now - readings[0][0]) / 1000)} s`
          : `${found.get(Infinity) ?? 0} since the start`,
      );
    } catch {
      byId("live").replaceChildren(h("span", { class: "tag warn" }, "no /metrics"));
    }
  }

  function show(buckets, told) {
    const [p50, p99] = [0.5, 0.99].map((share) => quantile(buckets, share));
    const text = (value) => (value === null ? "–" : milliseconds(value * 1000));
    byId("live").replaceChildren(
      h("span", { class: "dot" }),
      "p50 ",
      h("b", {}, text(p50)),
      " p99 ",
      h("b", {}, text(p99)),
    );
    byId("live-details")?.replaceChildren(
      details([
        ["p50, p99", `${text(p50)}, ${text(p99)}`],
        ["requests", told],
      ]),
      h(
        "p",
        { class: "note" },
        "From the histogram slatewise_request_duration_seconds; POST /rerank, this page included.",
      ),
    );
  }

  setInterval(read, EVERY);
  document.addEventListener("visibilitychange", read);
  return read;
}
