// Objects without a prototype: a domain or checkpoint may be called __proto__ or constructor.
const bare = (_, v) =>
  v && typeof v === "object" && !Array.isArray(v) ? Object.assign(Object.create(null), v) : v;
const data = JSON.parse(document.getElementById("routing-data").textContent, bare);
for (const part of ["saturation", "vocabulary_specialization", "top_tokens"]) data[part] ??= Object.create(null);
const names = data.checkpoints.map(c => c.name),
  first = names[0],
  L = data.layers.length;
const layers = [...Array(L).keys()];
const byId = id => document.getElementById(id);
const idealShare = l => data.layers[l].experts_per_token / data.layers[l].num_experts;
const same = values => values.every(v => v === values[0]);
const mean = values => {
  const known = values.filter(v => v !== null);
  return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
};
const MEASURES = {
  mri: {label: "share of the tokens that visit the busiest expert", ideal: idealShare, words: "perfect balance"},
  mri_normalized: {
    label: "load of the busiest expert over the mean load",
    ideal: () => 1,
    words: "perfect balance"
  },
  load_entropy: {label: "entropy of the load over log E", ideal: () => 1, words: "perfect balance"},
  load_cv: {label: "standard deviation of the loads over their mean", ideal: () => 0, words: "perfect balance"},
  dead_experts: {label: "experts that no token visits", ideal: () => 0, words: "none"},
  router_entropy: {label: "entropy of the router's distribution"},
  router_confidence: {label: "probability of the expert that a router likes best"}
};
const WORDS = {domain: "all", measure: "mri_normalized", side: "input", step: "mean", order: "number", token: ""};
const state = {};

function readAddress() {
  Object.assign(state, WORDS, {layer: 0, off: new Set()});
  const given = new URLSearchParams(location.hash.slice(1));
  for (const key of Object.keys(WORDS)) if (given.has(key)) state[key] = given.get(key);
  if (!data.domains.includes(state.domain)) state.domain = "all";
  if (!Object.hasOwn(MEASURES, state.measure)) state.measure = WORDS.measure;
  if (given.has("layer")) state.layer = Math.max(0, Math.min(L - 1, Math.trunc(Number(given.get("layer"))) || 0));
  if (given.has("off")) state.off = new Set(given.get("off").split(",").filter(Boolean).map(Number));
}
function writeAddress() {
  const words = new URLSearchParams({...state, off: [...state.off].join(",")});
  history.replaceState(null, "", "#" + words);
}

const shown = () => names.map((name, i) => ({name, color: i})).filter(c => !state.off.has(c.color));
const curve = (c, y) => ({...c, x: layers, y});
const ideals = (ideal, words) => (same(layers.map(ideal)) ? [{at: ideal(0), label: words}] : []);
const byLayer = {xLabel: "MoE layer", wholeX: true, dots: L <= 64};
const hideSection = (id, why) => {
  byId(id).innerHTML = `<p class="quiet">${escapeText(why)}</p>`;
};
const reason = (part, otherwise) => (data.skipped && data.skipped[part]) || otherwise;

function drawSummary() {
  const head = [
    "checkpoint",
    "tokens",
    "MRI × E/K",
    "worst layer",
    "dead experts",
    "same experts as " + first,
    "vocabulary, input",
    "change of co-activation",
    "slowdown, estimate"
  ];
  const rows = shown().map(({name, color}) => {
    const m = data.metrics[name][state.domain],
      saturation = data.saturation[name]?.[state.domain];
    const worst = m.mri_normalized.indexOf(Math.max(...m.mri_normalized));
    const change = data.coactivation_change && data.coactivation_change[name];
    const parallel = data.expert_parallel && data.expert_parallel[name];
    return [
      {html: `<i class="dot b${color % PALETTE}"></i>${escapeText(name)}`},
      data.checkpoints[color].num_tokens,
      mean(m.mri_normalized),
      worst,
      m.dead_experts.reduce((a, b) => a + b, 0),
      saturation ? percent(mean(saturation)) : name === first ? "itself" : "–",
      data.vocabulary_specialization[name] ? percent(mean(data.vocabulary_specialization[name].input)) : "–",
      change ? mean(change) : null,
      parallel ? mean(parallel.contiguous.slowdown) : null
    ];
  });
  byId("summary").innerHTML = tableOf(head, rows);
}

function drawBalance() {
  const measure = MEASURES[state.measure];
  const has = shown().filter(c => data.metrics[c.name][state.domain][state.measure]);
  if (!has.length)
    return hideSection("balance", "No probabilities of the routers were recorded: this measure needs them.");
  lineChart(
    byId("balance"),
    has.map(c => curve(c, data.metrics[c.name][state.domain][state.measure])),
    {
      ...byLayer,
      yLabel: measure.label,
      horizontal: measure.ideal ? ideals(measure.ideal, measure.words) : [],
      fromZero: ["dead_experts", "load_cv"].includes(state.measure),
      format: state.measure === "mri" ? percent : number
    }
  );
}

function drawTraining() {
  if (!data.training.length) return hideSection("training", "No training log was given (--log_history).");
  const vertical = [],
    seen = new Set();
  const note = (at, label) => {
    if (!seen.has(at + label)) {
      seen.add(at + label);
      vertical.push({at, label});
    }
  };
  const pick = run => (state.step === "mean" ? run.mean : run.layers[Number(state.step)]);
  for (const run of data.training) {
    if (run.shift_step === null) continue;
    note(run.shift_step, "the data changes");
    if (run.recovery_step !== null && run.recovery_step > 0) {
      note(
        run.shift_step + run.recovery_step,
        `${run.name} has recovered after ${run.recovery_step.toLocaleString("en")} step` +
          (run.recovery_step > 1 ? "s" : "")
      );
    }
  }
  lineChart(
    byId("training"),
    data.training
      .map((run, i) => ({name: run.name, color: i, x: run.steps, y: pick(run)}))
      .filter(line => line.y),
    {
      xLabel: "training step",
      yLabel: MEASURES.mri.label,
      vertical,
      format: percent,
      horizontal: [...new Set(data.training.map(run => run.ideal))].map(at => ({at, label: "perfect balance"}))
    }
  );
  byId("training").insertAdjacentHTML(
    "beforeend",
    tableOf(
      ["run", "data changes at step", "recovered after steps", "highest after the change"],
      data.training.map(run => [
        run.name,
        run.shift_step,
        run.recovery_step === null ? (run.shift_step === null ? "–" : "not within the run") : run.recovery_step,
        percent(
          Math.max(
            ...run.mean.filter((v, i) => v !== null && (run.shift_step === null || run.steps[i] >= run.shift_step))
          )
        )
      ])
    )
  );
}

function drawSaturation() {
  const has = shown().filter(c => data.saturation[c.name]?.[state.domain]);
  if (!has.length)
    return hideSection(
      "saturation",
      reason("saturation", "There is one checkpoint only, or all others are switched off.")
    );
  lineChart(
    byId("saturation"),
    has.map(c => curve(c, data.saturation[c.name][state.domain])),
    {
      ...byLayer,
      yLabel: `share of a token's experts that ${first} chose too`,
      format: percent,
      horizontal: [{at: 1, label: "unchanged"}, ...ideals(idealShare, "chance")]
    }
  );
}

function drawVocabulary() {
  const has = shown().filter(
    c => data.vocabulary_specialization[c.name] && data.vocabulary_specialization[c.name][state.side]
  );
  if (!has.length) return hideSection("vocabulary", reason("vocabulary_specialization", "It was not computed."));
  lineChart(
    byId("vocabulary"),
    has.map(c => curve(c, data.vocabulary_specialization[c.name][state.side])),
    {
      ...byLayer,
      yLabel: `share of the visits of a token id to its usual expert, ${state.side} token`,
      format: percent,
      horizontal: [{at: 1, label: "each token id has its experts"}, ...ideals(idealShare, "chance")]
    }
  );
}
