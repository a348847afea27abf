"""Style and script shared by charts and reports: light and dark colours, hover values, legend switches.

Curve colours are Okabe and Ito's colour-blind-safe set, lightened where the ground is dark. Source: ours.
"""

LIGHT_COLORS = ("#0072b2", "#d55e00", "#009e73", "#b0558a", "#b07d00", "#3a9bd9", "#4d4d4d")
DARK_COLORS = ("#58a9e0", "#f28a4b", "#3cc79a", "#dd92bb", "#e0b03f", "#8fd0f5", "#b8b8b8")
NUM_COLORS = len(LIGHT_COLORS)


def _variables(colors: tuple[str, ...], paper: str, ink: str, faint: str, grid: str) -> str:
    palette = "".join(f"--c{i}:{color};" for i, color in enumerate(colors))
    return f"{palette}--paper:{paper};--ink:{ink};--faint:{faint};--grid:{grid};"


_LIGHT = _variables(LIGHT_COLORS, "#ffffff", "#1c2128", "#5b6570", "#e3e6ea")
_DARK = _variables(DARK_COLORS, "#16191e", "#e6e9ed", "#9aa4af", "#2c323a")

CHART_CSS = (
    f":root{{{_LIGHT}}}@media(prefers-color-scheme:dark){{:root{{{_DARK}}}}}"
    + """
.chart{font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;max-width:100%;height:auto;display:block}
.chart .paper{fill:var(--paper)}
.chart text{fill:var(--faint)}
.chart .title{fill:var(--ink);font-size:15px;font-weight:600}
.chart .label,.chart .note{fill:var(--ink)}
.chart .tick{font-variant-numeric:tabular-nums}
.chart .end{text-anchor:end}
.chart .middle{text-anchor:middle}
.chart .grid{stroke:var(--grid)}
.chart .axis{stroke:var(--faint)}
.chart .mark{stroke:var(--faint);stroke-dasharray:5 4}
.chart .note{font-size:11px;paint-order:stroke;stroke:var(--paper);stroke-width:3px}
.chart .curve{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.chart .dashed{stroke-dasharray:6 5}
.chart .key{cursor:pointer}
.chart .hit{fill:transparent}
.chart .key.off{opacity:.35}
.chart .curve.off{display:none}
.chart .cursor{stroke:var(--faint);visibility:hidden}
"""
    + "".join(f".chart .c{i}{{stroke:var(--c{i})}}\n" for i in range(NUM_COLORS))
)

PAGE_CSS = """
:root{color-scheme:light dark}
body{margin:0;background:var(--paper);color:var(--ink);
  font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:800px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:1.7rem;line-height:1.25;margin:0 0 .6em}
h2{font-size:1.2rem;margin:2.2em 0 .5em;padding-top:.9em;border-top:1px solid var(--grid)}
p{margin:.6em 0;max-width:68ch}
figure{margin:1.4em 0}
.table{overflow-x:auto;margin:1em 0}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:5px 12px;text-align:left;border-bottom:1px solid var(--grid);white-space:nowrap}
th{color:var(--faint);font-weight:600;border-bottom:2px solid var(--grid)}
th.number,td.number{text-align:right}
#tip{position:fixed;display:none;pointer-events:none;background:var(--paper);color:var(--ink);font-size:12px;
  border:1px solid var(--grid);border-radius:6px;padding:6px 9px;box-shadow:0 2px 10px #0004;white-space:nowrap}
#tip td{border:0;padding:1px 6px}
#tip i{display:inline-block;width:10px;height:10px;border-radius:50%}
"""

CHART_JS = """
(() => {
  const tip = document.createElement("div"); tip.id = "tip"; document.body.append(tip);
  const show = v => Math.abs(v) >= 1e5 || (v && Math.abs(v) < 1e-3) ? v.toExponential(3) : String(+v.toPrecision(5));
  const cell = (row, text) => { const td = row.insertCell(); td.textContent = text; return td; };
  for (const svg of document.querySelectorAll("svg.chart")) {
    const [left, top, right, bottom] = svg.dataset.area.split(" ").map(Number);
    const cursor = svg.querySelector(".cursor");
    const curves = [...svg.querySelectorAll("path.curve")].map(path => ({path, ...JSON.parse(path.dataset.points)}));
    const hide = () => { tip.style.display = "none"; cursor.style.visibility = "hidden"; };
    svg.addEventListener("mouseleave", hide);
    svg.addEventListener("mousemove", event => {
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      if (at.x < left || at.x > right || at.y < top || at.y > bottom) return hide();
      const hits = [];
      for (const c of curves) {
        if (c.path.classList.contains("off")) continue;
        let best = -1;
        c.px.forEach((p, i) => {
          if (c.y[i] !== null && (best < 0 || Math.abs(p - at.x) < Math.abs(c.px[best] - at.x))) best = i;
        });
        if (best >= 0 && Math.abs(c.px[best] - at.x) < 40) hits.push({c, i: best, d: Math.abs(c.px[best] - at.x)});
      }
      if (!hits.length) return hide();
      const near = hits.reduce((a, b) => b.d < a.d ? b : a);
      const table = document.createElement("table");
      const head = cell(table.insertRow(), svg.dataset.xLabel + " " + near.c.x[near.i].toLocaleString());
      head.colSpan = 3;
      for (const {c, i} of hits) {
        const row = table.insertRow(), dot = document.createElement("i");
        dot.style.background = getComputedStyle(c.path).stroke;
        cell(row, "").append(dot); cell(row, c.name); cell(row, show(c.y[i])).className = "number";
      }
      tip.replaceChildren(table);
      tip.style.display = "block";
      const flip = event.clientX + tip.offsetWidth + 30 > innerWidth;
      tip.style.left = event.clientX + (flip ? -tip.offsetWidth - 14 : 14) + "px";
      tip.style.top = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8) + "px";
      const x = near.c.px[near.i];
      cursor.setAttribute("x1", x); cursor.setAttribute("x2", x); cursor.style.visibility = "visible";
    });
    for (const key of svg.querySelectorAll(".key")) {
      const toggle = () => {
        const off = key.classList.toggle("off");
        svg.querySelector(`path[data-series="${key.dataset.series}"]`).classList.toggle("off", off);
      };
      key.addEventListener("click", toggle);
      key.addEventListener("keydown", event => {
        if (event.key === "Enter" || event.key === " ") { event.preventDefault(); toggle(); }
      });
    }
  }
})();
"""
