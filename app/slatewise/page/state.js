// What the page holds: the ranker, the user, the history, the candidates, the last answer. And the request that they make.

export const state = {
  ranker: null,
  card: null,
  examples: [],
  user: "",
  history: [],
  sends: true, // whether the request has the history, also an empty one; else the server reads the stored events
  given: new Set(), // keys of the events that the example had
  read: null, // `history` of the last answer: what the server ranked by
  stored: null, // number of stored events that the server read for this user; null: not asked yet
  candidates: [],
  requestTime: null,
  exit: "auto",
  variant: "auto",
  answer: null, // of the last ranking
  keys: [], // keys of its candidates, in the order of the request
  before: new Map(), // key -> place in the answer before
  without: null, // key of the candidate that is left out
  changed: null, // the answer without it
  explain: false,
};
export const known = new Map(); // id -> fields
let keys = 0;

export const titleOf = (id) => known.get(id)?.title || id;
export const fieldsOf = (id) => known.get(id) ?? {};
export const event = (id, action, time) => ({ key: `event-${++keys}`, id, action: action ?? null, time: time ?? null });
export const candidate = (id, features = {}) => ({ key: `candidate-${++keys}`, id, features });

export function bodyOf({
  exit = state.exit,
  variant = state.variant,
  without = null,
  explain = state.explain && !without,
} = {}) {
  const { history } = state;
  const candidates = state.candidates.filter((candidate) => candidate.key !== without);
  const body = { ranker: state.ranker };
  if (state.user) body.user = state.user;
  if (state.sends) {
    body.history = { item_ids: history.map((event) => event.id) };
    if (history.some((event) => event.action)) body.history.actions = history.map((event) => event.action);
    if (history.some((event) => event.time !== null)) body.history.timestamps = history.map((event) => event.time);
  }
  body.candidates = { item_ids: candidates.map((candidate) => candidate.id) };
  const features = state.card.features.filter((name) => candidates.some((candidate) => name in candidate.features));
  if (features.length)
    body.candidates.features = Object.fromEntries(
      features.map((name) => [name, candidates.map((candidate) => candidate.features[name] ?? null)]),
    );
  const ofExample = state.given.size ? history.some(({ key }) => state.given.has(key)) : !history.length;
  if (state.requestTime !== null && ofExample) body.request_time = state.requestTime;
  if (exit !== "auto") body.exit = exit;
  if (variant !== "auto") body.variant = variant;
  if (state.card.return_fields.length) body.return_fields = state.card.return_fields;
  if (explain) body.explain = true;
  return body;
}
