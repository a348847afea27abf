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
