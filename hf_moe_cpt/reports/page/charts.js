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
