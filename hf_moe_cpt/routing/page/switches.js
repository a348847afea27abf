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
