"use strict";
(() => {
  const facts = JSON.parse(document.getElementById("facts").textContent);
  const main = document.getElementById("main");
  const MOST = 40; // rows of a chart that names each; the table has all
  const COLOURS = { 2: "#b2182b", 3: "#e0603f", 4: "#f4a15d", 5: "#d8c25a", 6: "#8fbf6a", 7: "#4a9fa8", 8: "#2f6db5", 32: "#8a8f98" };
  const FLOAT_BITS = 32;
  const charts = []; // functions that draw, run at the end and whenever the colours change
  const siteOf = new Map(facts.sites.map((site) => [site.key, site]));

  // Text goes in as text alone: names come from models.
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }
  const say = (text) => { document.getElementById("said").textContent = text; };
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const short = (value) => {
    if (typeof value !== "number") return value ?? "";
    if (Number.isInteger(value)) return value.toLocaleString("en");
    return Math.abs(value) < 1e-3 ? value.toExponential(2) : Number(value.toPrecision(4)).toString();
  };
  const decibels = (noise) => noise === null ? "exact" : noise.toFixed(1);
  // a path that is too long for a label loses whole modules from its start, where the rest says enough
  const cut = (text) => text.length <= 44 ? text : "…" + text.slice(-43).replace(/^[^.]*\.(?=.{12})/, "");
  vega.expressionFunction("nameOf", (key) => cut(siteOf.get(key).name));

  function section(id, title, note) {
    const heading = make("h2", { id, tabindex: "-1" }, title);
    const part = make("section", { "aria-labelledby": id }, heading);
    document.getElementById("contents").append(make("li", {}, make("a", { href: "#" + id }, title)));
    main.append(part);
    if (facts.absent[id] !== undefined) {
      part.append(make("p", { class: "absent" }, facts.absent[id]));
      return null;
    }
    if (note) part.append(make("p", { class: "note" }, note));
    return part;
  }

  // --- tables: columns are [title, value of a row, text of the value]
  function table(part, name, columns, rows, open = false) {
    const details = make("details", open ? { open: "" } : {}, make("summary", {}, `Table: ${name} (${rows.length})`));
    part.append(details);
    const fill = () => {
      if (details.dataset.filled) return;
      details.dataset.filled = "yes";
      let shown = [...rows];
      const numeric = columns.map(([, value]) => rows.some((row) => typeof value(row) === "number"));
      const body = make("tbody");
      const write = () => body.replaceChildren(...shown.map((row) => make("tr", {}, ...columns.map(([, value, text], k) =>
        make("td", numeric[k] ? { class: "number" } : {}, String((text ?? ((cell) => short(cell)))(value(row))))))));
      const heads = columns.map(([title, value], k) => {
        const button = make("button", { type: "button" }, title);
        const head = make("th", { scope: "col", "aria-sort": "none", ...(numeric[k] ? { class: "number" } : {}) }, button);
        button.addEventListener("click", () => {
          const up = head.getAttribute("aria-sort") !== "ascending";
          heads.forEach((other) => other.setAttribute("aria-sort", "none"));
          head.setAttribute("aria-sort", up ? "ascending" : "descending");
          const empty = (cell) => cell === null || cell === undefined || cell === "";
          shown.sort((one, other) => {
            const [a, b] = [value(one), value(other)];
            if (empty(a) || empty(b)) return empty(a) - empty(b); // last, whichever way
            const order = numeric[k] ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
            return up ? order : -order;
          });
          write();
          say(`${name}: sorted by ${title}, ${up ? "ascending" : "descending"}`);
        });
        return head;
      });
      const copy = make("button", { type: "button" }, "Copy as CSV");
      copy.addEventListener("click", async () => {
        // a spreadsheet runs cells that begin like a formula
        const guard = (cell) => typeof cell === "string" && /^[=+\-@\t\r]/.test(cell) ? "'" + cell : cell;
        const quote = (cell) => { const text = String(guard(cell ?? "")); return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text; };
        const lines = [columns.map(([title]) => title), ...shown.map((row) => columns.map(([, value]) => value(row)))];
        await toClipboard(lines.map((line) => line.map(quote).join(",")).join("\r\n") + "\r\n");
        copy.textContent = "Copied";
        say(`${name}: copied as CSV`);
        setTimeout(() => { copy.textContent = "Copy as CSV"; }, 2000);
      });
      write();
      details.append(make("div", { class: "bar" }, copy), make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": name },
        make("table", {}, make("caption", { class: "unseen" }, name), make("thead", {}, make("tr", {}, ...heads)), body)));
    };
    if (open) fill(); else details.addEventListener("toggle", fill);
  }

  async function toClipboard(text) {
    try { await navigator.clipboard.writeText(text); } catch { // without leave, by a selection
      const area = make("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
  }

  // --- charts
  function chart(part, description, spec) {
    const place = make("div", { class: "chart" });
    part.append(place);
    const draw = () => vegaEmbed(place, {
      $schema: "https://vega.github.io/schema/vega-lite/v6.json", width: "container",
      description, background: "transparent", ...spec(),
      config: {
        font: "system-ui, sans-serif", view: { stroke: null },
        axis: { labelFlush: false, labelColor: colour("--text"), titleColor: colour("--text"), gridColor: colour("--line"), domainColor: colour("--line"), tickColor: colour("--line"), labelLimit: 320, labelFontSize: 12, titleFontSize: 12 },
        legend: { columns: innerWidth < 600 ? 2 : 0, labelColor: colour("--text"), titleColor: colour("--text"), labelFontSize: 12, titleFontSize: 12, orient: "top" },
      },
    }, { actions: false, renderer: "svg", tooltip: { theme: document.documentElement.dataset.theme } })
      .catch((error) => place.append(make("p", { class: "absent" }, `The chart cannot be drawn: ${error.message}`)));
    charts.push(draw);
  }
  const byBits = (rows) => {
    const domain = [...new Set(rows.map((row) => row.bits))].sort((a, b) => a - b);
    const legend = { columns: 0, labelExpr: `datum.value == ${FLOAT_BITS} ? 'float' : datum.label` };
    return { field: "bits", type: "ordinal", title: "bits", scale: { domain, range: domain.map((bits) => COLOURS[bits]) }, legend };
  };
  const bySite = { field: "key", type: "nominal", title: null, sort: null, axis: { labelExpr: "nameOf(datum.value)" } };
  // powers of ten, all written in one way
  const logAxis = (values) => ({ format: Math.min(...values) < 1e-4 ? "~e" : "~g", tickCount: 6, gridOpacity: 0.5 });
  const tips = (...pairs) => pairs.map(([field, title, format]) => ({ field, title, ...(format ? { format } : {}) }));

  // --- headline
  const head = section("headline", "Headline");
  head.append(make("dl", { class: "cards" }, ...facts.headline.map((figure) => make("div", { class: "card" },
    make("dt", {}, figure.label), make("dd", {}, figure.value), make("dd", { class: "remark" }, figure.note)))));
  head.append(make("details", {}, make("summary", {}, "The summary in words"), make("pre", {}, facts.summary)));

  // --- frontier
  const frontier = section("frontier", "Frontier", "The least predicted loss increase for every amount, this network, and uniform bits (activations at 8 bits) beside it. Lower and further left is better.");
  if (frontier) {
    const { limit, unit, points } = facts.curve;
    const positive = points.map((point) => point.loss).filter((loss) => loss > 0);
    const log = positive.length > 0, floor = log ? Math.min(...positive) / 3 : 0; // zero is nowhere on a logarithmic axis
    if (log && points.some((point) => point.loss !== null && point.loss <= 0)) frontier.append(make("p", { class: "note" }, "Plans that are predicted to lose nothing are drawn at the bottom."));
    chart(frontier, `Predicted loss increase against ${limit}`, () => ({
      height: 320, data: { values: points.filter((point) => point.loss !== null).map((point) => ({ ...point, drawn: Math.max(point.loss, floor) })) },
      encoding: {
        x: { field: "amount", type: "quantitative", title: `${limit} (${unit})`, scale: { zero: false }, axis: { tickCount: 10 } },
        y: { field: "drawn", type: "quantitative", title: "predicted loss increase", scale: { type: log ? "log" : "linear" }, axis: log ? logAxis([floor]) : { format: ".2g" } },
        color: { field: "kind", title: null, scale: { domain: ["mixed precision", "uniform bits", "this network"], range: ["#2f7ed8", "#d98a1f", "#d6336c"] } },
        tooltip: tips(["kind", "plan"], ["name", "name"], ["amount", limit, ",.6~g"], ["share", "of float32", ".1%"], ["loss", "loss increase", ".3~g"]),
      },
      layer: [
        { transform: [{ filter: "datum.kind == 'mixed precision'" }], mark: { type: "line", point: { size: 25 } } },
        { transform: [{ filter: "datum.kind == 'uniform bits'" }], mark: { type: "point", filled: true, shape: "square", size: 70, opacity: 1 } },
        { transform: [{ filter: "datum.kind == 'uniform bits'" }], mark: { type: "text", align: "left", dx: 8, dy: -6, fontSize: 12 }, encoding: { text: { field: "name" } } },
        { transform: [{ filter: "datum.kind == 'this network'" }], mark: { type: "point", filled: true, shape: "diamond", size: 220, opacity: 1 } },
      ],
    }));
    table(frontier, "plans", [["plan", (p) => p.kind], ["name", (p) => p.name], [`${limit}, ${unit}`, (p) => p.amount], ["of float32", (p) => p.share], ["predicted loss increase", (p) => p.loss]], points);
  }

  // --- bits
  const bits = section("bits", "Bits", "Each box is a site, in the order of the network; its width is its part of all parameters, or of all elements of activations.");
  const strip = ["weight", "activation"].flatMap((kind) => {
    const rows = facts.sites.filter((site) => site.kind === kind);
    const total = rows.reduce((sum, site) => sum + site.elements, 0);
    let start = 0;
    return rows.map((site) => ({ ...site, start: start / total, end: (start += site.elements) / total, row: kind === "weight" ? "weights" : "activations" }));
  });
  chart(bits, "Bits of every site along the network", () => ({
    height: 120, data: { values: strip }, mark: { type: "rect", stroke: colour("--page"), strokeWidth: strip.length > 200 ? 0.2 : 1 },
    encoding: {
      x: { field: "start", type: "quantitative", title: "part of all elements", axis: { format: "%", tickCount: 10 }, scale: { domain: [0, 1], nice: false } }, x2: { field: "end" },
      y: { field: "row", type: "nominal", title: null, sort: ["weights", "activations"] },
      color: byBits(strip),
      tooltip: tips(["name", "site"], ["format", "format"], ["operator", "operator"], ["shape", "shape"], ["elements", "elements", ","]),
    },
  }));
  const siteColumns = [
    ["site", (s) => s.name], ["kind", (s) => s.kind], ["operator", (s) => s.operator], ["shape", (s) => s.shape], ["elements", (s) => s.elements], ["bits", (s) => s.bits],
    ["format", (s) => s.format], ["bytes", (s) => s.bytes], ["predicted loss increase", (s) => s.increase],
    ["signal to noise, dB", (s) => s.noise, decibels],
  ];
  table(bits, "sites", siteColumns, facts.sites);

  // --- sensitivities
  const sensitive = section("sensitivities", "Sensitivities", "The curvature of the loss per squared element of a site, with two standard errors on each side; the most sensitive first.");
  if (sensitive) {
    const known = facts.sites.filter((site) => site.curvature !== null);
    const positive = known.filter((site) => site.curvature > 0).sort((a, b) => b.curvature - a.curvature);
    const rows = positive.slice(0, MOST).map((site) => ({ ...site, low: Math.max(site.curvature - 2 * (site.stderr ?? 0), site.curvature / 100), high: site.curvature + 2 * (site.stderr ?? 0) }));
    const left = known.length - rows.length;
    if (left) sensitive.append(make("p", { class: "note" }, `${rows.length} of ${known.length} are drawn; the table has all${positive.length < known.length ? `, with ${known.length - positive.length} that are not above zero` : ""}.`));
    if (rows.length) chart(sensitive, "Sensitivity of sites with error bars", () => ({
      height: 18 * rows.length, data: { values: rows },
      encoding: { y: bySite, color: { field: "kind", title: null, scale: { domain: ["weight", "activation"], range: ["#2f7ed8", "#d98a1f"] } },
        tooltip: tips(["name", "site"], ["curvature", "mean trace", ".3~g"], ["stderr", "its error", ".2~g"], ["format", "format"]) },
      layer: [
        { mark: { type: "rule", strokeWidth: 2 }, encoding: { x: { field: "low", type: "quantitative", scale: { type: "log" }, title: "mean trace", axis: logAxis(rows.map((row) => row.low)) }, x2: { field: "high" } } },
        { mark: { type: "point", filled: true, size: 60, opacity: 1 }, encoding: { x: { field: "curvature", type: "quantitative", scale: { type: "log" } } } },
      ],
    }));
    table(sensitive, "sensitivities", [["site", (s) => s.name], ["kind", (s) => s.kind], ["mean trace", (s) => s.curvature], ["standard error", (s) => s.stderr]], known);
  }

  // --- noise
  const noise = section("noise", "Signal to noise", `Tensors of the float network against those of the compiled one, on ${facts.noise_data}; worst first.`);
  const noisy = facts.sites.filter((site) => site.noise !== null).sort((a, b) => a.noise - b.noise);
  if (noisy.length > MOST) noise.append(make("p", { class: "note" }, `The worst ${MOST} of ${noisy.length} are drawn; the table has all.`));
  if (!noisy.length) noise.append(make("p", { class: "absent" }, "All tensors are equal to those of the float network."));
  if (noisy.length) chart(noise, "Signal to noise of sites, worst first", () => ({
    height: 18 * Math.min(MOST, noisy.length), data: { values: noisy.slice(0, MOST) }, mark: { type: "bar" },
    encoding: {
      y: bySite,
      x: { field: "noise", type: "quantitative", title: "signal to noise (dB)", axis: { tickCount: 10 } },
      color: byBits(noisy.slice(0, MOST)),
      tooltip: tips(["name", "site"], ["noise", "dB", ".1f"], ["format", "format"], ["kind", "kind"]),
    },
  }));
  table(noise, "signal to noise", [["site", (s) => s.name], ["kind", (s) => s.kind], ["format", (s) => s.format], ["signal to noise, dB", (s) => s.noise, decibels]],
    [...noisy, ...facts.sites.filter((site) => site.noise === null)]);

  // --- graph
  const graph = section("network", "Graph", "Drag to move, scroll to zoom, click a node for its facts. With the keyboard: arrows go along the edges and to the nodes beside, Home and End to both ends, Enter shows the facts. Search by name, operator or weight; Enter goes to the next match. Every node is also in the table.");
  drawGraph(graph);

  function drawGraph(part) {
    const search = make("input", { type: "search", id: "search", placeholder: "Search", "aria-label": "Search the graph" });
    const mode = make("select", { "aria-label": "Colour by", id: "colour-by" }, make("option", { value: "bits" }, "Colour by bits"), make("option", { value: "noise" }, "Colour by noise"));
    const whole = make("button", { type: "button" }, "Show all");
    const legend = make("span", { class: "key" });
    const place = make("div", { id: "graph", tabindex: "0", role: "application", "aria-label": "The graph of the network: arrow keys move between its nodes, Enter shows the facts of one; the table below has every node" });
    const chosen = make("div", { id: "chosen", tabindex: "-1", role: "region", "aria-label": "Facts of the chosen node", "aria-live": "polite" }, make("p", { class: "note" }, "Choose a node to see its facts."));
    part.append(make("div", { class: "bar" }, search, mode, whole, legend), make("div", { class: "network" }, place, chosen));
    const bitsOf = (node) => (siteOf.get(node.weight) ?? siteOf.get(node.site))?.bits;
    const noiseOf = (node) => { const site = siteOf.get(node.site) ?? siteOf.get(node.weight); return site ? site.noise ?? Infinity : undefined; };
    const labelOf = (node) => cut(node.name) + (node.name.replace(/#\d+$/, "").endsWith(node.operator) ? "" : "\n" + node.operator);
    const worst = Math.min(...noisy.map((site) => site.noise), 60), best = Math.max(...noisy.map((site) => site.noise), worst + 1);
    const shade = (level) => level === undefined ? undefined : vega.scheme("viridis")(0.15 + 0.8 * Math.min(1, (level - worst) / (best - worst)));

    const layout = new dagre.graphlib.Graph();
    layout.setGraph({ rankdir: "TB", nodesep: 24, ranksep: 34, ranker: facts.nodes.length > 300 ? "longest-path" : "network-simplex" });
    layout.setDefaultEdgeLabel(() => ({}));
    const width = (node) => Math.max(70, 8 * Math.max(...labelOf(node).split("\n").map((line) => line.length)) + 16);
    facts.nodes.forEach((node) => layout.setNode(node.key, { width: width(node), height: 40 }));
    facts.nodes.forEach((node) => node.inputs.forEach((input) => layout.setEdge(input, node.key)));
    dagre.layout(layout);
    const simple = facts.nodes.length > 500; // straight edges are drawn faster
    // Edges bend where dagre leads them around nodes: its points, as parts of the way and distances from the straight line.
    const edge = (source, target, k) => {
      const [from, to] = [layout.node(source), layout.node(target)], [dx, dy] = [to.x - from.x, to.y - from.y], length = Math.hypot(dx, dy) || 1;
      const bends = layout.edge(source, target).points.slice(1, -1).map(({ x, y }) => ({
        along: ((x - from.x) * dx + (y - from.y) * dy) / length ** 2, aside: ((y - from.y) * dx - (x - from.x) * dy) / length }));
      const bent = !simple && bends.some(({ aside }) => Math.abs(aside) > 1);
      return { data: { id: `${source} > ${target} ${k}`, source, target, along: bends.map(({ along }) => along), aside: bends.map(({ aside }) => aside) }, classes: bent ? "bent" : "" };
    };
    const cy = cytoscape({
      container: place, layout: { name: "preset", fit: true, padding: 20 }, minZoom: 0.02, maxZoom: 3,
      hideEdgesOnViewport: facts.nodes.length > 1500, textureOnViewport: simple, pixelRatio: simple ? 1 : "auto",
      elements: [
        ...facts.nodes.map((node) => ({ data: { id: node.key, label: labelOf(node), width: width(node), fill: "#888", ink: "#fff", rim: "#888" }, position: { x: layout.node(node.key).x, y: layout.node(node.key).y } })),
        ...facts.nodes.flatMap((node) => node.inputs.map((input, k) => edge(input, node.key, k))),
      ],
    });
    place.cy = cy; // for tests and the console
    const luminous = (fill) => { const [r, g, b] = rgb(fill); return 0.299 * r + 0.587 * g + 0.114 * b > 140; };
    const rgb = (text) => text.startsWith("#") ? [1, 3, 5].map((k) => parseInt(text.slice(k, k + 2), 16)) : text.match(/\d+/g).slice(0, 3).map(Number);
    const paint = () => {
      const blank = { fill: colour("--page"), ink: colour("--text"), rim: colour("--faint") };
      cy.batch(() => facts.nodes.forEach((node) => {
        const fill = mode.value === "bits" ? COLOURS[bitsOf(node)] : shade(noiseOf(node));
        cy.getElementById(node.key).data(fill ? { fill, ink: luminous(fill) ? "#111" : "#fff", rim: fill } : blank);
      }));
      cy.style([
        { selector: "node", style: { shape: "round-rectangle", width: "data(width)", height: 40, label: "data(label)", "text-wrap": "wrap", "text-valign": "center", "font-size": 12, "font-family": "system-ui, sans-serif", color: "data(ink)", "background-color": "data(fill)", "border-width": 1, "border-color": "data(rim)", "min-zoomed-font-size": 6 } },
        { selector: "edge", style: { width: 1.5, "line-color": colour("--faint"), "target-arrow-color": colour("--faint"), "target-arrow-shape": "triangle", "curve-style": simple ? "haystack" : "bezier" } },
        { selector: "edge.bent", style: { "curve-style": "round-segments", "segment-weights": "data(along)", "segment-distances": "data(aside)", "segment-radii": 20, "edge-distances": "node-position" } },
        { selector: "node.found", style: { "border-width": 4, "border-color": colour("--accent") } },
        { selector: "node:selected", style: { "border-width": 5, "border-color": colour("--text") } },
      ]);
      const item = (fill, text) => make("span", {}, Object.assign(make("i"), { style: `background:${fill}` }), text);
      const none = (text) => make("span", {}, make("i", { class: "none" }), text);
      if (mode.value === "bits") {
        const used = [...new Set(facts.nodes.map(bitsOf))].filter((width) => width !== undefined).sort((a, b) => a - b);
        legend.replaceChildren(...used.map((width) => item(COLOURS[width], width === FLOAT_BITS ? "float" : `${width} bits`)), none("no bits"));
      } else legend.replaceChildren(item(shade(worst), `${worst.toFixed(0)} dB`), item(shade(best), `${best.toFixed(0)} dB`), none("no site"));
    };
    const nodeOf = new Map(facts.nodes.map((node) => [node.key, node]));
    const show = (key) => {
      const node = nodeOf.get(key);
      const list = make("dl");
      const add = (label, value) => { if (value !== "" && value !== null && value !== undefined) list.append(make("dt", {}, label), make("dd", {}, String(value))); };
      add("operator", node.operator); add("shape", node.shape); add("reads", node.inputs.map((input) => nodeOf.get(input).name).join(", ")); add("in float", node.floating);
      chosen.replaceChildren(make("h3", {}, node.name), list);
      for (const site of [siteOf.get(node.weight), siteOf.get(node.site)]) {
        if (!site) continue;
        const own = make("dl");
        for (const [label, value] of [["format", site.format], ["elements", short(site.elements)], ["bytes", short(site.bytes)], ["loss increase", short(site.increase)], ["noise", site.noise === null ? "exact" : `${decibels(site.noise)} dB`]]) own.append(make("dt", {}, label), make("dd", {}, value));
        chosen.append(make("h3", {}, `${site.kind === "weight" ? "Weight" : "Activation"} ${site.name}`), own, make("pre", {}, site.reason));
      }
    };
    const go = (node) => {
      cy.elements().unselect();
      node.select();
      cy.stop().animate({ center: { eles: node }, zoom: Math.max(cy.zoom(), 0.8), duration: matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : 200 });
      const { name, operator } = nodeOf.get(node.id()), width = bitsOf(nodeOf.get(node.id()));
      say(`${name}, ${operator}${width === undefined ? "" : width === FLOAT_BITS ? ", float" : `, ${width} bits`}`);
    };
    const choose = (key) => { go(cy.getElementById(key)); show(key); };
    cy.on("tap", "node", (event) => show(event.target.id()));
    // where a key leads from a node: along edges to the nearest layer, or to the nearest node of the same layer
    const beside = (node, side) => cy.nodes().filter((other) => other.position("y") === node.position("y") && side * (other.position("x") - node.position("x")) > 0);
    const ways = { ArrowDown: (node) => node.outgoers("node"), ArrowUp: (node) => node.incomers("node"), ArrowLeft: (node) => beside(node, -1), ArrowRight: (node) => beside(node, 1) };
    place.addEventListener("keydown", (event) => {
      const here = cy.nodes(":selected").first(), from = here.nonempty() ? here.position() : null;
      const far = (other) => 1e3 * Math.abs(other.position("y") - from.y) + Math.abs(other.position("x") - from.x);
      if (event.ctrlKey || event.altKey || event.metaKey) return;
      if (event.key === "Enter" && from) show(here.id());
      else if (event.key === "Home" || (event.key in ways && !from)) go(cy.nodes().first());
      else if (event.key === "End") go(cy.nodes().last());
      else if (event.key in ways) {
        const found = ways[event.key](here);
        if (found.empty()) say("There is no node that way"); else go(found.min(far).ele);
      } else return;
      event.preventDefault();
    });
    // a canvas is not as wide as paper: there its picture stands in its place
    addEventListener("beforeprint", () => place.append(make("img", { src: cy.png({ scale: 2 }), alt: "The part of the graph that was shown" })));
    addEventListener("afterprint", () => place.querySelectorAll("img").forEach((picture) => picture.remove()));
    let matches = [], at = 0;
    search.addEventListener("input", () => {
      const text = search.value.toLowerCase();
      matches = text ? facts.nodes.filter((node) => [node.name, node.operator, node.weight ?? ""].some((each) => each.toLowerCase().includes(text))) : [];
      at = -1;
      cy.batch(() => { cy.nodes().removeClass("found"); matches.forEach((node) => cy.getElementById(node.key).addClass("found")); });
      say(text ? matches.length === 1 ? "1 node matches" : `${matches.length} nodes match` : "");
    });
    search.addEventListener("keydown", (event) => { if (event.key === "Enter" && matches.length) choose(matches[at = (at + 1) % matches.length].key); });
    mode.addEventListener("change", paint);
    whole.addEventListener("click", () => cy.fit(undefined, 20));
    charts.push(paint);
    // a long network is read from its start: all of it at once would be a thread
    if (cy.zoom() < 0.5) { cy.zoom(0.9); const first = cy.nodes().first(); cy.center(first); cy.panBy({ x: 0, y: 40 - first.renderedBoundingBox().y1 }); }
    table(part, "nodes", [["node", (n) => n.name], ["operator", (n) => n.operator], ["shape", (n) => n.shape], ["weight", (n) => n.weight], ["bits", (n) => bitsOf(n)], ["signal to noise, dB", (n) => siteOf.get(n.site)?.noise], ["in float, because", (n) => n.floating],
      ["reason", (n) => siteOf.get(n.weight ?? n.site)?.reason ?? ""]], facts.nodes);
  }

  // --- memory
  const memory = section("memory", "Activation memory", "Bytes of one sample that are live at each step of the schedule, packed in the chosen formats, beside float32.");
  chart(memory, "Activation memory over the schedule", () => ({
    height: 240, data: { values: facts.memory.flatMap((row) => [{ ...row, kind: "float32", taken: row.floating }, { ...row, kind: "this network", taken: row.bytes }]) },
    mark: { type: "area", interpolate: "step-after", line: true, opacity: 0.5 },
    encoding: {
      x: { field: "step", type: "quantitative", title: "step", scale: { nice: false }, axis: { tickMinStep: 1, tickCount: 12, format: "d" } },
      y: { field: "taken", type: "quantitative", title: "bytes", stack: null, axis: { format: "~s" } },
      color: { field: "kind", title: null, scale: { domain: ["float32", "this network"], range: ["#8a8f98", "#2f7ed8"] } },
      tooltip: tips(["node", "node"], ["kind", "network"], ["taken", "bytes", ","]),
    },
  }));
  table(memory, "memory", [["step", (row) => row.step], ["node", (row) => row.node], ["bytes", (row) => row.bytes], ["float32", (row) => row.floating]], facts.memory);

  // --- latency
  const latency = section("latency", "Latency", "Kernels of onnxruntime as they were timed on this machine, in the chosen formats and in float; slowest first. Conversions between float and integers come on top.");
  if (latency) {
    const nameOf = (row) => row.weight ? `${row.node} (${row.weight})` : row.node;
    const slow = facts.kernels.slice(0, MOST);
    if (slow.length < facts.kernels.length) latency.append(make("p", { class: "note" }, `The slowest ${MOST} of ${facts.kernels.length} are drawn; the table has all.`));
    chart(latency, "Latency of kernels", () => ({
      height: 26 * slow.length, mark: { type: "bar" },
      data: { values: slow.flatMap((row) => [{ ...row, name: nameOf(row), kind: "chosen", time: 1e3 * row.seconds }, { ...row, name: nameOf(row), kind: "float", time: 1e3 * row.floating }]) },
      encoding: {
        y: { field: "name", type: "nominal", title: null, sort: null }, yOffset: { field: "kind" },
        x: { field: "time", type: "quantitative", title: "ms" },
        color: { field: "kind", title: null, scale: { domain: ["chosen", "float"], range: ["#2f7ed8", "#8a8f98"] } },
        tooltip: tips(["node", "node"], ["weight", "weight"], ["kernel", "kernel"], ["kind", "formats"], ["time", "ms", ".3~g"]),
      },
    }));
    table(latency, "kernels", [["node", (row) => row.node], ["weight", (row) => row.weight], ["kernel", (row) => row.kernel], ["seconds", (row) => row.seconds], ["float, seconds", (row) => row.floating]], facts.kernels);
  }

  // --- how to reproduce it
  const reproduce = section("reproduce", "How to reproduce it", "Not every argument of compile() is on this page; the digests tell whether weights, data and codes are the same.");
  table(reproduce, "versions, seed and digests", [["what", (row) => row.label], ["value", (row) => row.value], ["remark", (row) => row.note]], facts.reproduce, true);

  // --- light and dark
  const theme = document.getElementById("theme");
  const prefers = matchMedia("(prefers-color-scheme: dark)");
  function wear(name) {
    document.documentElement.dataset.theme = name;
    theme.setAttribute("aria-pressed", String(name === "dark"));
    charts.forEach((draw) => draw());
  }
  theme.addEventListener("click", () => wear(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  prefers.addEventListener("change", (event) => wear(event.matches ? "dark" : "light"));
  wear(prefers.matches ? "dark" : "light");
})();
