"""Drawing functions of the routing report, as a script for the page: curves, bars, heat maps, tables, hover values.

They draw with the classes and colours of `page_assets`, so charts look as those of `line_chart` and follow the theme.
Every curve carries its numbers in the attribute data-points, as those of `line_chart` do. Source: ours.

The routing report's views of single experts, as a script for the page: heat maps, loads, tokens, placements.

State and curves: routing_page_script.py; drawing itself: routing_page_drawing.py. Source: ours.

The routing report's table and curves, and how its switches act, as a script for the page.

The state of all switches stands in the address behind the # sign, so a view can be sent to somebody else. Heat maps,
bars and tokens: routing_page_maps.py; drawing itself: routing_page_drawing.py. Source: ours.
"""

DRAWING_JS = r"""
const SVG = "http://www.w3.org/2000/svg";
const escapeText = text =>
  String(text).replace(/[&<>"]/g, c => ({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"})[c]);
const theme = name =>
  getComputedStyle(document.documentElement)
    .getPropertyValue("--" + name)
    .trim();
const number = (v, digits = 4) => {
  if (v === null || v === undefined || Number.isNaN(v)) return "–";
  if (Number.isInteger(v)) return v.toLocaleString("en");
  return Math.abs(v) < 1e-3 ? v.toExponential(2) : String(+v.toPrecision(digits));
};
const percent = v => (v === null || v === undefined ? "–" : +(100 * v).toPrecision(3) + " %");

const tip = document.createElement("div");
tip.id = "tip";
document.body.append(tip);
const hideTip = () => {
  tip.style.display = "none";
};
function showTip(event, head, rows) {
  tip.innerHTML =
    `<table><tr><td colspan="3">${escapeText(head)}</td></tr>` +
    rows
      .map(
        ([color, name, value]) =>
          `<tr><td>${color ? `<i style="background:${color}"></i>` : ""}</td><td>${escapeText(name)}</td>` +
          `<td class="number">${escapeText(value)}</td></tr>`
      )
      .join("") +
    "</table>";
  tip.style.display = "block";
  const flip = event.clientX + tip.offsetWidth + 30 > innerWidth;
  tip.style.left = event.clientX + (flip ? -tip.offsetWidth - 14 : 14) + "px";
  tip.style.top = Math.max(0, Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)) + "px";
}

function ticks(low, high, count) {
  const raw = (high - low) / count,
    power = 10 ** Math.floor(Math.log10(raw));
  const size = [1, 2, 5, 10].map(f => f * power).find(s => raw <= s * (1 + 1e-9));
  const found = [];
  for (let i = Math.ceil(low / size - 1e-9); i <= Math.floor(high / size + 1e-9); i++)
    found.push(+(i * size).toPrecision(10));
  return found;
}
const tickText = v => (Math.abs(v) >= 1e4 ? +(v / 1e3).toPrecision(4) + "k" : String(v));

function rangeOf(values, fromZero) {
  let low = Infinity,
    high = -Infinity;
  for (const v of values)
    if (v !== null && Number.isFinite(v)) {
      low = Math.min(low, v);
      high = Math.max(high, v);
    }
  if (low > high) return [0, 1];
  if (fromZero) {
    low = Math.min(low, 0);
    high = Math.max(high, 0);
  }
  const margin = 0.06 * (high - low) || 0.05 * Math.abs(high) || 0.5;
  return [fromZero && low === 0 ? 0 : low - margin, fromZero && high === 0 ? 0 : high + margin];
}

// The empty chart: axes, grid, marks; x and y map values to pixels.
function frame(options, xRange, yRange) {
  const width = options.width || 1080,
    height = options.height || 330;
  const left = 64,
    right = width - 20,
    top = 40,
    bottom = height - 48;
  const x = v => left + ((v - xRange[0]) / (xRange[1] - xRange[0])) * (right - left);
  const y = v => bottom - ((v - yRange[0]) / (yRange[1] - yRange[0])) * (bottom - top);
  const line = (name, x1, y1, x2, y2) =>
    `<line class="${name}" x1="${x1.toFixed(1)}" y1="${y1.toFixed(1)}" x2="${x2.toFixed(1)}" y2="${y2.toFixed(1)}"/>`;
  const text = (name, px, py, words) =>
    `<text class="${name}" x="${px.toFixed(1)}" y="${py.toFixed(1)}">${escapeText(words)}</text>`;
  const back = [text("label", left, top - 16, options.yLabel)],
    front = [];
  for (const v of ticks(...yRange, 5))
    back.push(
      line("grid", left, y(v), right, y(v)),
      text("tick end", left - 8, y(v) + 4, (options.format || tickText)(v))
    );
  const whole = options.wholeX ? v => Number.isInteger(v) : () => true;
  for (const v of ticks(...xRange, 10).filter(whole)) {
    back.push(line("axis", x(v), bottom, x(v), bottom + 4), text("tick middle", x(v), bottom + 18, tickText(v)));
  }
  back.push(
    line("axis", left, bottom, right, bottom),
    text("label middle", (left + right) / 2, bottom + 38, options.xLabel)
  );
  for (const mark of options.horizontal || []) {
    back.push(line("mark", left, y(mark.at), right, y(mark.at)));
    const below = y(mark.at) - 5 < top + 8;
    front.push(text("note end", right - 4, y(mark.at) + (below ? 13 : -5), mark.label));
  }
  (options.vertical || []).forEach((mark, i) => {
    back.push(line("mark", x(mark.at), top, x(mark.at), bottom));
    const fits = x(mark.at) + 6 + 6.5 * mark.label.length < right;
    front.push(text(fits ? "note" : "note end", x(mark.at) + (fits ? 6 : -6), top + 12 + 14 * i, mark.label));
  });
  return {width, height, left, right, top, bottom, x, y, back, front};
}

function chartElement(f, inner, label) {
  const holder = document.createElement("div");
  holder.innerHTML =
    `<svg xmlns="${SVG}" class="chart" viewBox="0 0 ${f.width} ${f.height}" width="${f.width}" ` +
    `height="${f.height}" role="img" aria-label="${escapeText(label)}">${f.back.join("")}${inner}${f.front.join("")}` +
    `<line class="cursor" y1="${f.top}" y2="${f.bottom}"/></svg>`;
  return holder.firstChild;
}
const inChart = (svg, event) => {
  const box = svg.getBoundingClientRect(),
    view = svg.viewBox.baseVal;
  return {
    x: ((event.clientX - box.left) * view.width) / box.width,
    y: ((event.clientY - box.top) * view.height) / box.height
  };
};

function legendOf(series) {
  const row = document.createElement("div");
  row.className = "legend";
  row.innerHTML = series
    .map(
      s =>
        `<span><i class="stroke${s.dashed ? " broken" : ""}" style="border-color:` +
        `var(--c${s.color % PALETTE})"></i>${escapeText(s.name)}</span>`
    )
    .join("");
  return row;
}

// series: [{name, color, x, y, dashed}]
// options: xLabel, yLabel, fromZero, horizontal, vertical, dots, wholeX, format.
function lineChart(target, series, options) {
  const format = options.format || number;
  const xs = series.flatMap(s => s.x).concat((options.vertical || []).map(m => m.at));
  let xRange = [Math.min(...xs), Math.max(...xs)];
  if (!(xRange[1] > xRange[0])) xRange = xs.length ? [xRange[0] - 0.5, xRange[0] + 0.5] : [0, 1];
  const yRange = rangeOf(
    series.flatMap(s => s.y).concat((options.horizontal || []).map(m => m.at)),
    options.fromZero
  );
  const f = frame(options, xRange, yRange);
  const paths = series.map(s => {
    let d = "",
      down = false,
      dots = "";
    s.x.forEach((v, i) => {
      if (s.y[i] === null || s.y[i] === undefined) {
        down = false;
        return;
      }
      const point = `${f.x(v).toFixed(1)} ${f.y(s.y[i]).toFixed(1)}`;
      d += down ? "L" + point : "M" + point + "l0 0";
      down = true;
      if (options.dots) dots += `M${point}h0`;
    });
    const kind = `curve c${s.color % PALETTE}`,
      points = escapeText(JSON.stringify({name: s.name, x: s.x, y: s.y}));
    return (
      `<path class="${kind}${s.dashed ? " dashed" : ""}" data-points="${points}" d="${d}"/>` +
      (dots ? `<path class="${kind} dots" d="${dots}"/>` : "")
    );
  });
  const svg = chartElement(f, paths.join(""), options.yLabel),
    cursor = svg.querySelector(".cursor");
  svg.addEventListener("mouseleave", () => {
    hideTip();
    cursor.style.visibility = "hidden";
  });
  svg.addEventListener("mousemove", event => {
    const at = inChart(svg, event),
      hits = [];
    for (const s of series) {
      let best = -1;
      s.x.forEach((v, i) => {
        if (s.y[i] !== null && (best < 0 || Math.abs(f.x(v) - at.x) < Math.abs(f.x(s.x[best]) - at.x))) best = i;
      });
      if (best >= 0 && Math.abs(f.x(s.x[best]) - at.x) < 50) hits.push({s, i: best});
    }
    if (!hits.length || at.x < f.left - 8 || at.x > f.right + 8) {
      hideTip();
      cursor.style.visibility = "hidden";
      return;
    }
    const near = hits.reduce((a, b) =>
      Math.abs(f.x(b.s.x[b.i]) - at.x) < Math.abs(f.x(a.s.x[a.i]) - at.x) ? b : a
    );
    const px = f.x(near.s.x[near.i]);
    cursor.setAttribute("x1", px);
    cursor.setAttribute("x2", px);
    cursor.style.visibility = "visible";
    showTip(
      event,
      `${options.xLabel} ${number(near.s.x[near.i])}`,
      hits.map(({s, i}) => [theme("c" + (s.color % PALETTE)), s.name, format(s.y[i])])
    );
  });
  target.replaceChildren(legendOf(series), svg);
}

// One group of bars for each expert, one bar for each series; with many experts the bars become steps of a line.
function barChart(target, series, labels, options) {
  const yRange = rangeOf(series.flatMap(s => s.y).concat(options.horizontal.map(m => m.at)), true);
  const f = frame({...options, wholeX: true}, [-0.5, labels.length - 0.5], yRange);
  const group = f.x(1) - f.x(0),
    thick = Math.max(0.8, (group * 0.8) / Math.max(1, series.length)),
    wide = thick - (thick > 4 ? 1 : 0);
  const bars = series.map((s, k) =>
    s.y
      .map((v, i) => {
        const x = f.x(i) - group * 0.4 + k * thick;
        return (
          `<rect class="bar b${s.color % PALETTE}" x="${x.toFixed(1)}" width="${wide.toFixed(1)}" ` +
          `y="${f.y(v).toFixed(1)}" height="${Math.max(0, f.bottom - f.y(v)).toFixed(1)}"/>`
        );
      })
      .join("")
  );
  f.back = f.back.filter(part => options.plainTicks || !part.includes("tick middle"));
  if (!options.plainTicks) {
    const every = Math.ceil(labels.length / 40);
    labels.forEach((l, i) => {
      if (i % every === 0)
        f.back.push(
          `<text class="tick middle" x="${f.x(i).toFixed(1)}" y="${f.bottom + 18}">${escapeText(l)}</text>`
        );
    });
  }
  const svg = chartElement(f, bars.join(""), options.yLabel);
  svg.addEventListener("mouseleave", hideTip);
  svg.addEventListener("mousemove", event => {
    const i = Math.floor((inChart(svg, event).x - f.left) / group);
    if (i < 0 || i >= labels.length) return hideTip();
    showTip(
      event,
      `expert ${labels[i]}`,
      series.map(s => [theme("c" + (s.color % PALETTE)), s.name, percent(s.y[i])])
    );
  });
  target.replaceChildren(legendOf(series), svg);
}

const channels = hex => [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16));
function mixed(to, share) {
  const from = channels(theme("paper")),
    goal = channels(theme(to));
  return from.map((c, i) => Math.round(c + (goal[i] - c) * share));
}
// Colour of -1..1: below the reference warm, at it the paper, above it blue.
function colorTable() {
  const table = [];
  for (let i = -50; i <= 50; i++) table.push(mixed(i < 0 ? "c1" : "c0", Math.pow(Math.abs(i) / 50, 0.8)));
  return at => table[50 + Math.round(50 * Math.max(-1, Math.min(1, at)))];
}

// values[r][c]; place(value) in -1..1 chooses the colour; hover(r, c) gives [head, rows].
function heatMap(values, {rows, columns, place, hover, xLabel, yLabel, title, width, cell}) {
  const holder = document.createElement("div");
  holder.className = "heat";
  const R = values.length,
    C = values[0].length,
    size = cell || Math.max(2, Math.min(36, Math.floor(width / C)));
  const tall = Math.max(size, R <= 12 ? 24 : size),
    left = 14 + 6.6 * Math.max(...rows.map(r => String(r).length));
  const rowStep = Math.ceil(14 / tall),
    columnStep = Math.ceil(Math.max(14, 7 * Math.max(...columns.map(c => String(c).length)) + 6) / size);
  const rowText = rows.map((r, i) =>
    i % rowStep
      ? ""
      : `<text class="tick end" x="${left - 6}" y="${22 + tall * (i + 0.5) + 4}">${escapeText(r)}</text>`
  );
  const columnText = columns.map((c, i) =>
    i % columnStep
      ? ""
      : `<text class="tick middle" x="${left + size * (i + 0.5)}" y="${22 + tall * R + 14}">${escapeText(c)}</text>`
  );
  const W = Math.max(left + size * C + 8, 150),
    H = 22 + tall * R + 36;
  holder.style.width = W + "px";
  holder.style.height = H + "px";
  holder.innerHTML =
    `<svg class="chart" width="${W}" height="${H}">` +
    `<text class="label strong" x="${left}" y="14">${escapeText(title)}</text>${rowText.join("")}` +
    `${columnText.join("")}<text class="label" x="${left}" y="${H - 4}">${escapeText(xLabel)}</text></svg>`;
  const canvas = document.createElement("canvas");
  canvas.width = C;
  canvas.height = R;
  canvas.setAttribute("aria-label", `${title}: ${yLabel} by ${xLabel}`);
  Object.assign(canvas.style, {left: left + "px", top: "22px", width: size * C + "px", height: tall * R + "px"});
  const picture = new ImageData(C, R),
    color = colorTable();
  values.forEach((line, r) =>
    line.forEach((v, c) => {
      const [red, green, blue] = v === null ? channels(theme("grid")) : color(place(v));
      picture.data.set([red, green, blue, 255], 4 * (r * C + c));
    })
  );
  canvas.getContext("2d").putImageData(picture, 0, 0);
  canvas.addEventListener("mouseleave", hideTip);
  canvas.addEventListener("mousemove", event => {
    const box = canvas.getBoundingClientRect();
    const c = Math.min(C - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * C)));
    const r = Math.min(R - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * R)));
    showTip(event, ...hover(r, c));
  });
  holder.append(canvas);
  return holder;
}

// The colour scale of a heat map with its meaning in words.
function scaleBar(words) {
  const color = colorTable(),
    stops = [-1, -0.5, 0, 0.5, 1].map(v => `rgb(${color(v).join(",")})`);
  const bar = document.createElement("div");
  bar.className = "scale";
  bar.innerHTML =
    `<span>${escapeText(words[0])}</span><b style="background:linear-gradient(90deg,${stops.join(",")})"></b>` +
    `<span>${escapeText(words[2])}</span><em>middle: ${escapeText(words[1])}</em>`;
  return bar;
}

function tableOf(head, rows) {
  const cells = (line, tag) =>
    line
      .map(
        v =>
          `<${tag}${typeof v === "number" || v === null || /^[\d.]+ %$|^–$/.test(v) ? ' class="number"' : ""}>` +
          (v && v.html !== undefined
            ? v.html
            : escapeText(typeof v === "number" ? number(v) : v === null ? "–" : v)) +
          `</${tag}>`
      )
      .join("");
  return (
    `<div class="table"><table><thead><tr>${cells(head, "th")}</tr></thead><tbody>` +
    rows.map(line => `<tr>${cells(line, "td")}</tr>`).join("") +
    "</tbody></table></div>"
  );
}
"""


MAPS_JS = r"""
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
"""


CURVES_JS = r"""
const data = JSON.parse(document.getElementById("routing-data").textContent);
for (const part of ["saturation", "vocabulary_specialization", "top_tokens"]) data[part] ??= {};
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
  if (!(state.measure in MEASURES)) state.measure = WORDS.measure;
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
      saturation = (data.saturation[name] || {})[state.domain];
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
  const has = shown().filter(c => (data.saturation[c.name] || {})[state.domain]);
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
"""

SWITCHES_JS = r"""
function drawAll() {
  for (const draw of [
    drawSummary,
    drawBalance,
    drawTraining,
    drawSaturation,
    drawVocabulary,
    drawCoactivation,
    drawDomains,
    drawLoad,
    drawTokens,
    drawParallel
  ])
    draw();
  document.querySelectorAll(".layer-name").forEach(span => {
    span.textContent = `layer ${state.layer}, ${data.layers[state.layer].name}`;
  });
  document.querySelectorAll(".domain-name").forEach(span => {
    span.textContent = state.domain === "all" ? "all text" : state.domain;
  });
  document
    .querySelectorAll("#checkpoints button")
    .forEach((b, i) => b.setAttribute("aria-pressed", !state.off.has(i)));
  for (const id of ["domain", "measure", "side", "step", "order", "layer", "token"]) {
    const control = byId("set-" + id);
    if (control && control.value !== String(state[id])) control.value = state[id];
  }
}
function change(key, value) {
  state[key] = value;
  writeAddress();
  drawAll();
}

function fillSwitches() {
  const options = (id, list) => {
    byId("set-" + id).innerHTML = list
      .map(([v, t]) => `<option value="${escapeText(v)}">${escapeText(t)}</option>`)
      .join("");
  };
  options("domain", [["all", "all text"], ...data.domains.map(d => [d, d])]);
  options("step", [
    ["mean", "mean over layers"],
    ...[...Array(Math.max(0, ...data.training.map(run => run.layers.length))).keys()].map(l => [l, "layer " + l])
  ]);
  byId("set-layer").max = L - 1;
  byId("checkpoints").innerHTML = names
    .map((name, i) => `<button type="button"><i class="dot b${i % PALETTE}"></i>${escapeText(name)}</button>`)
    .join("");
  document.querySelectorAll("#checkpoints button").forEach((button, i) =>
    button.addEventListener("click", () => {
      state.off.has(i) ? state.off.delete(i) : state.off.add(i);
      change("off", state.off);
    })
  );
  for (const id of ["domain", "measure", "side", "step", "order"])
    byId("set-" + id).addEventListener("change", e => change(id, e.target.value));
  byId("set-layer").addEventListener("input", e => change("layer", Number(e.target.value)));
  byId("set-token").addEventListener("input", e => change("token", e.target.value));
}

fillSwitches();
readAddress();
drawAll();
addEventListener("hashchange", () => {
  readAddress();
  drawAll();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
"""
