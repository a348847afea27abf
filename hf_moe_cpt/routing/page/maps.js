const logPlace = (ideal, doublings) => v => (v <= 0 ? -1 : Math.log2(v / ideal) / doublings);

function drawCoactivation() {
  if (!data.coactivation)
    return hideSection("coactivation", reason("coactivation", "Every token visits one expert only."));
  const l = state.layer,
    {num_experts: E, experts_per_token: K} = data.layers[l],
    ideal = (K - 1) / (E - 1);
  const experts = data.coactivation_experts[l],
    base = data.coactivation[first][l],
    holder = byId("coactivation");
  holder.replaceChildren();
  const row = document.createElement("div");
  row.className = "heats";
  const common = {
    rows: experts,
    columns: experts,
    width: 330,
    xLabel: "expert j; rows: expert i",
    yLabel: "expert i"
  };
  const masked = m => m.map((line, r) => line.map((v, c) => (r === c ? null : v)));
  for (const c of shown()) {
    const matrix = data.coactivation[c.name][l];
    row.append(
      heatMap(masked(matrix), {
        ...common,
        title: `${c.name}: P(j | i)`,
        place: logPlace(ideal, 3),
        hover: (r, k) => [
          `${c.name}, layer ${l}`,
          [
            ["", `of the tokens of expert ${experts[r]} visit expert ${experts[k]} too`, percent(matrix[r][k])],
            ["", "if independent", percent(ideal)]
          ]
        ]
      })
    );
  }
  holder.append(row, scaleBar(["never together", `as by chance, ${percent(ideal)}`, "8 times as often or more"]));
  const others = shown().filter(c => c.name !== first);
  if (!others.length) return;
  const change = document.createElement("div");
  change.className = "heats";
  const differences = others.map(c =>
    masked(data.coactivation[c.name][l].map((line, r) => line.map((v, k) => v - base[r][k])))
  );
  const most = Math.max(1e-6, ...differences.flat(2).map(v => Math.abs(v ?? 0)));
  others.forEach((c, i) =>
    change.append(
      heatMap(differences[i], {
        ...common,
        title: `${c.name}: change since ${first}`,
        place: v => v / most,
        hover: (r, k) => [
          `${c.name}, layer ${l}`,
          [["", `P(${experts[k]} | ${experts[r]}), change`, number(differences[i][r][k], 3)]]
        ]
      })
    )
  );
  holder.append(change, scaleBar(["-" + percent(most), "no change", "+" + percent(most)]));
  if (!data.coactivation_change) return;
  const lines = document.createElement("div");
  holder.append(lines);
  lineChart(
    lines,
    others.map(c => curve(c, data.coactivation_change[c.name])),
    {
      ...byLayer,
      fromZero: true,
      yLabel: `mean absolute change of P(j | i) since ${first}`,
      horizontal: [{at: 0, label: "unchanged"}]
    }
  );
}

function drawDomains() {
  const l = state.layer,
    ideal = idealShare(l),
    holder = byId("domains");
  if (!data.domain_specialization || !shown().length)
    return hideSection("domains", reason("domain_specialization", "It was not computed."));
  holder.replaceChildren();
  const row = document.createElement("div");
  row.className = "heats";
  holder.append(row);
  for (const c of shown()) {
    const matrix = data.domain_specialization[c.name][l];
    row.append(
      heatMap(matrix, {
        rows: data.domains,
        columns: matrix[0].map((_, e) => e),
        width: 900,
        xLabel: "expert",
        yLabel: "text",
        title: c.name,
        place: logPlace(ideal, 2),
        hover: (r, e) => [
          `${c.name}, layer ${l}`,
          [
            ["", `of the tokens of ${data.domains[r]} visit expert ${e}`, percent(matrix[r][e])],
            ["", "perfect balance", percent(ideal)]
          ]
        ]
      })
    );
  }
  holder.append(
    scaleBar(["a quarter of it or less", `perfect balance, ${percent(ideal)}`, "4 times as much or more"])
  );
}

function drawLoad() {
  const l = state.layer,
    E = data.layers[l].num_experts;
  const load = c => data.metrics[c.name][state.domain].load;
  const experts = [...Array(E).keys()],
    reference = shown()[0];
  if (!reference) return hideSection("load", "All checkpoints are switched off.");
  if (state.order === "busiest") experts.sort((a, b) => load(reference)[l][b] - load(reference)[l][a]);
  barChart(
    byId("load"),
    shown().map(c => ({...c, y: experts.map(e => load(c)[l][e])})),
    experts,
    {
      xLabel: "expert",
      yLabel: "share of the visits",
      format: percent,
      horizontal: [{at: 1 / E, label: `perfect balance, ${percent(1 / E)}`}]
    }
  );
  const widest = Math.max(...data.layers.map(x => x.num_experts)),
    holder = byId("load-map");
  const row = document.createElement("div");
  row.className = "heats";
  holder.replaceChildren(row);
  for (const c of shown()) {
    const matrix = load(c).map(line => [...line, ...Array(widest - line.length).fill(null)]);
    const places = layers.map(k => logPlace(1 / data.layers[k].num_experts, 2));
    const scaled = matrix.map((line, k) => line.map(v => (v === null ? null : places[k](v))));
    row.append(
      heatMap(scaled, {
        rows: layers,
        columns: [...Array(widest).keys()],
        width: 900,
        xLabel: "expert; rows: MoE layer",
        yLabel: "layer",
        title: `${c.name}: every layer`,
        place: v => v,
        hover: (r, e) => [
          `${c.name}, layer ${r}, expert ${e}`,
          [
            ["", "share of the visits", percent(matrix[r][e])],
            ["", "perfect balance", percent(1 / data.layers[r].num_experts)]
          ]
        ]
      })
    );
  }
  holder.append(scaleBar(["a quarter of it or less", "perfect balance", "4 times as much or more"]));
}

const visible = token => token.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥");
function drawTokens() {
  const l = state.layer,
    wanted = state.token.toLowerCase(),
    has = shown().filter(c => data.top_tokens[c.name]);
  if (!has.length) return hideSection("tokens", reason("top_tokens", "No tokens were listed."));
  const chips = entries => ({
    html:
      entries
        .map(
          ([t, share, count]) =>
            `<span class="token" title="${number(count)} visits">` +
            `${escapeText(visible(data.tokens[t]))} <b>${percent(share)}</b></span>`
        )
        .join(" ") || "–"
  });
  const rows = [];
  for (let e = 0; e < data.layers[l].num_experts; e++) {
    const lists = has.map(c => data.top_tokens[c.name][l][e]);
    if (wanted && !lists.some(list => list.some(([t]) => data.tokens[t].toLowerCase().includes(wanted)))) continue;
    rows.push([e, ...lists.map(chips)]);
  }
  byId("tokens").innerHTML = rows.length
    ? tableOf(["expert", ...has.map(c => c.name)], rows)
    : `<p class="quiet">No expert of this layer lists it.</p>`;
}

function drawParallel() {
  const has = data.expert_parallel ? shown().filter(c => data.expert_parallel[c.name]) : [];
  if (!has.length) return hideSection("parallel", reason("expert_parallel", "It was not estimated."));
  const lines = has.flatMap(c => [
    {...curve(c, data.expert_parallel[c.name].contiguous.slowdown), name: `${c.name}, experts in order`},
    {
      ...curve(c, data.expert_parallel[c.name].suggested.slowdown),
      name: `${c.name}, suggested placement`,
      dashed: true
    }
  ]);
  const ranks = data.expert_parallel[has[0].name].num_ranks;
  lineChart(byId("parallel"), lines, {
    ...byLayer,
    yLabel: `load of the busiest of ${ranks} ranks over the mean, an estimate`,
    horizontal: [{at: 1, label: "no waiting"}]
  });
  const placed = has.filter(c => data.expert_parallel[c.name].suggested.placement);
  byId("parallel").insertAdjacentHTML(
    "beforeend",
    tableOf(
      ["suggested for layer " + state.layer, ...[...Array(ranks).keys()].map(r => "rank " + r)],
      placed.map(c => [
        c.name,
        ...[...Array(ranks).keys()].map(r =>
          data.expert_parallel[c.name].suggested.placement[state.layer]
            .map((rank, e) => (rank === r ? e : -1))
            .filter(e => e >= 0)
            .join(" ")
        )
      ])
    )
  );
}
