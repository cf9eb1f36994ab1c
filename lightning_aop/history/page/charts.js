// ---- charts ---------------------------------------------------------------------------------------
const draw = (tag, attributes = {}, text = "") => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
};
const known = {
  overall_auc: ["Overall AUC", "Higher is better; a map that does not depend on the model gets about 0"],
  overall_auc_normalised: ["Overall AUC, normalised", "Relative to the scores of the image and of its blur: being sure alone does not raise it"],
  energy_in_mask: ["Energy in mask", "Share of the heat on the object; higher is better"],
  pointing_game: ["Pointing game", "Hottest pixel on the object; higher is better"],
  grid_pointing: ["Grid pointing", "Heat on the right one of four images; chance is 0.25"],
  drift: ["Drift", "How much maps changed since the time before; two seeds differ by as much at the same weights"],
  insertion_auc: ["Insertion AUC", "Higher is better"],
  deletion_auc: ["Deletion AUC", "Lower is better"],
  blank_maps: ["Blank maps", "Maps that show nothing, or NaN"],
  overall_auc_undefined: ["Without a normalised AUC", "Images that score no more than their blur"],
  seconds: ["Seconds", "What explaining took"],
  overhead: ["Overhead", "Share of the training time"],
  skipped: ["Skipped", "Explanations left out since the last"],
};
// What counts images or maps; where it stays 0 it is for who asks.
const counts = ["blank_maps", "overall_auc_undefined"];
const costs = ["seconds", "overhead", "skipped"];
// The values of which a chart shows the mean, for its interval.
const behind = {
  overall_auc: overallAuc,
  energy_in_mask: energyOf,
  insertion_auc: (record, k) => record.insertion_auc?.[k],
  deletion_auc: (record, k) => record.deletion_auc?.[k],
};

// An axis has 0 and, of a share, 1: a change of a hundredth must not look like a trend.
const axis = (values, whole, share) => {
  const low = Math.min(0, ...values), high = Math.max(share && values.every((v) => Math.abs(v) <= 1) ? 1 : 0, ...values) || 1;
  const rough = (high - low) / 3, power = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough * 0.75);
  if (whole) step = Math.max(1, Math.round(step));
  const ticks = [];
  for (let n = Math.ceil(low / step - 1e-9); n <= Math.floor(high / step + 1e-9); n++) ticks.push(n * step);
  return { low, high, ticks, step };
};
const tick = (value, step) => {
  const text = Math.abs(value) >= 1e5 ? value.toExponential(0) : value.toFixed(Math.max(0, Math.min(6, -Math.floor(Math.log10(step) + 1e-9))));
  return Number(text) === 0 ? "0" : text.replace("-", "−");
};

const span = () => {
  const steps = runs.flatMap((run) => run.records.map((record) => record.step));
  return [Math.min(...steps), Math.max(...steps)];
};
const across = (left, right) => {
  const [first, last] = span();
  return (step) => last > first ? left + (step - first) / (last - first) * (right - left) : (left + right) / 2;
};
// The path of a series, with gaps where it has no value.
const trace = (points) => {
  let path = "", pen = "M";
  for (const [x, y] of points) {
    if (y === null) { pen = "M"; continue; }
    path += `${pen}${x.toFixed(2)} ${y.toFixed(2)}${pen === "M" ? "h0" : ""}`;
    pen = "L";
  }
  return path;
};
// A click goes to the point that was hit, or to the record that is nearest across.
const clickable = (svg, X, go) => svg.addEventListener("click", (event) => {
  const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
  const near = records.map((record) => Math.abs(X(record.step) - x));
  const hit = event.target.dataset?.record;
  go(hit === undefined ? near.indexOf(Math.min(...near)) : Number(hit));
});
// Names beside the ends of their lines, a line of text apart, as near as that allows.
const spread = (heights, gap, low, high) => {
  const order = heights.map((y, i) => [y, i]).sort((a, b) => a[0] - b[0]), result = [];
  let last = -Infinity;
  for (const [y, i] of order) result[i] = last = Math.max(y, last + gap, low);
  let limit = high;
  for (const [, i] of [...order].reverse()) limit = (result[i] = Math.min(result[i], limit)) - gap;
  return result;
};
// Where two lines cross, dashes tell them apart.
const dashes = ["5 4", "1.5 3", "9 3 1.5 3", "2 2"];

// `lines` are drawn beside the values: [name, [[step, value], …], whether a value holds until the next].
const chart = (name, heading, hint, values, lines, go, { band = [], share = true } = {}) => {
  const named = lines.length > 0, w = 380, h = 196, left = 40, right = named ? 272 : 366, top = 10, bottom = 158;
  const present = values.filter(exists), whole = present.length > 0 && present.every(Number.isInteger) && !share;
  const spans = band.filter((each) => each && each.half !== null);
  const all = [...present, ...lines.flatMap(([, points]) => points.map(([, value]) => value)).filter(exists), ...spans.flatMap(({ mean, half }) => [mean - half, mean + half])];
  const { low, high, ticks, step } = axis(share ? all.map((v) => Math.min(Math.max(v, -1), Math.max(1, ...present))) : all, whole, share);
  const X = across(left + 8, right - 8);
  const Y = (v) => exists(v) ? bottom - (Math.min(Math.max(v, low), high) - low) / (high - low) * (bottom - top) : null;
  const latest = present.length ? number(values.findLast(exists), whole) : "none";
  const svg = draw("svg", { class: "plot", viewBox: `0 0 ${w} ${h}`, role: "img", "aria-label": `${heading} at every time, from ${number(present[0] ?? null, whole)} to ${latest}` });
  const label = (text, x, y, anchor, cls = "") => svg.append(draw("text", { x, y, "text-anchor": anchor, class: cls }, text));
  for (const value of ticks) {
    svg.append(draw("line", { class: value === 0 ? "axis" : "rule", x1: left, x2: right, y1: Y(value), y2: Y(value) }));
    label(tick(value, step), left - 7, Y(value) + 4, "end", "tick");
  }
  const cursor = draw("line", { class: "cursor", y1: top, y2: bottom });
  svg.append(cursor);
  const [first, last] = span();
  if (last > first) label(String(first), left + 8, bottom + 18, "middle", "step");
  label(String(last), last > first ? right - 8 : (left + right) / 2, bottom + 18, "middle", "step");
  label("step", (left + right) / 2, bottom + (last > first ? 18 : 32), "middle", "axis-name");
  if (!present.length) label("no value yet", (left + right) / 2, (top + bottom) / 2, "middle");
  // The interval of the mean over images, as far as there is one.
  const limits = records.map((record, i) => [X(record.step), band[i] && band[i].half !== null && exists(values[i]) ? band[i].half : null]);
  for (let i = 0; i < limits.length;) {
    let j = i;
    while (j < limits.length && limits[j][1] !== null) j++;
    const part = limits.slice(i, j).map(([x, half], n) => [x, Y(values[i + n] + half), Y(values[i + n] - half)]);
    if (part.length === 1) svg.append(draw("line", { class: "whisker", x1: part[0][0], x2: part[0][0], y1: part[0][1], y2: part[0][2] }));
    else if (part.length) svg.append(draw("polygon", { class: "band", points: [...part.map(([x, y]) => `${x},${y}`), ...part.reverse().map(([x, , y]) => `${x},${y}`)].join(" ") }));
    i = j + 1;
  }
  lines.forEach(([text, points, held], n) => {
    let path = "", previous = null;
    for (const [at, value] of points) {
      if (!exists(value) || (held && value === previous)) continue;
      const [x, y] = [X(at).toFixed(2), Y(value).toFixed(2)];
      path += !path ? `M${x} ${y}` : held ? `H${x}V${y}` : `L${x} ${y}`;
      previous = value;
    }
    svg.append(draw("path", { class: "ref", "data-name": text, "stroke-dasharray": dashes[n % dashes.length], d: held ? `${path}H${right}` : path }));
  });
  svg.append(draw("path", { class: "path", d: trace(values.map((v, i) => [X(records[i].step), Y(v)])) }));
  const radius = values.length > 60 ? 1.5 : values.length > 25 ? 2.2 : 3.4;
  const points = values.map((v, i) => {
    if (!exists(v)) return null;
    const point = draw("circle", { class: "point", cx: X(records[i].step), cy: Y(v), r: radius, "data-record": i });
    point.append(draw("title", {}, `${records[i].title}: ${number(v, whole)}`));
    svg.append(point);
    return point;
  });
  const ends = lines.map(([, points]) => Y(points.findLast(([, value]) => exists(value))[1]));
  spread(ends, 15, top + 4, bottom).forEach((y, n) => {
    if (Math.abs(y - ends[n]) > 2) svg.append(draw("path", { class: "leader", d: `M${right + 1} ${ends[n]}L${right + 6} ${y}` }));
    label(lines[n][0].length > 16 ? `${lines[n][0].slice(0, 15)}…` : lines[n][0], right + 8, y + 4, "start", "ref-text");
  });
  clickable(svg, X, go);
  const value = make("span", { class: "value" });
  const table = make("details", { class: "values" }, make("summary", {}, `Table: ${heading}`));
  table.addEventListener("toggle", () => {
    if (!table.open || table.children.length > 1) return;
    const ranged = spans.length > 0;
    const head = make("tr", {}, ...["Time", "Step", heading, ...ranged ? ["95 % interval"] : [], ...lines.map(([text]) => text)].map((text) => make("th", { scope: "col" }, text)));
    const rows = records.map((record, i) => make("tr", {}, make("th", { scope: "row" }, record.title),
      ...[String(record.step), number(values[i], whole), ...ranged ? [band[i] && band[i].half !== null && exists(values[i]) ? `± ${number(band[i].half)}` : "–"] : [],
        ...lines.map(([, points]) => number(points.findLast(([at, v]) => at <= record.step && exists(v))?.[1] ?? null))].map((text) => make("td", {}, text))));
    table.append(make("div", { class: "rows", tabindex: "0", role: "group", "aria-label": `Values of ${heading}` }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows))));
  });
  const box = make("div", { class: "curve", "data-metric": name },
    make("header", {}, make("h3", {}, heading), value), make("p", {}, hint), svg, table);
  const update = (r) => {
    const half = band[r] && band[r].half !== null && exists(values[r]) ? make("span", { class: "half" }, ` ± ${number(band[r].half)}`) : "";
    value.replaceChildren(number(values[r], whole), half);
    box.dataset.value = values[r] ?? "";
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, X(records[r].step));
    points.forEach((point, i) => {
      point?.setAttribute("data-current", i === r);
      point?.setAttribute("r", i === r ? 5.5 : radius);
    });
    if (points[r]) svg.append(points[r]);
  };
  return { box, update };
};
const spark = (text, values, [low, high], go) => {
  const w = 140, h = 34, X = across(4, w - 4), Y = (v) => exists(v) ? h - 5 - (v - low) / (high - low || 1) * (h - 10) : null;
  const svg = draw("svg", { class: "plot spark", viewBox: `0 0 ${w} ${h}`, role: "img", "aria-label": text });
  const cursor = draw("line", { class: "cursor", y1: 0, y2: h }), point = draw("circle", { class: "point", r: 3.2, "data-current": "true" });
  svg.append(draw("line", { class: "axis", x1: 0, x2: w, y1: Y(0), y2: Y(0) }), cursor);
  svg.append(draw("path", { class: "path", d: trace(values.map((v, i) => [X(records[i].step), Y(v)])) }), point);
  clickable(svg, X, go);
  const value = make("b", {});
  const update = (r) => {
    value.textContent = number(values[r]);
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, X(records[r].step));
    point.setAttribute("visibility", exists(values[r]) ? "visible" : "hidden");
    point.setAttribute("cx", X(records[r].step));
    point.setAttribute("cy", Y(values[r] ?? 0));
  };
  return { value, svg, update };
};
// The score of an explanation while its hottest pixels go, and while they come.
const hidingChart = (deletion, insertion, go) => {
  const w = 380, h = 210, left = 40, right = 292, top = 10, bottom = 172, n = deletion.length - 1;
  const { low, high, ticks, step } = axis([...deletion, ...insertion], false, true);
  const X = (i) => left + i / n * (right - left), Y = (v) => bottom - (v - low) / (high - low) * (bottom - top);
  const svg = draw("svg", { class: "plot", viewBox: `0 0 ${w} ${h}`, role: "img", "aria-label": `Score while the hottest pixels are blurred, from ${number(deletion[0])} to ${number(deletion[n])}, and while they are shown, from ${number(insertion[0])} to ${number(insertion[n])}` });
  const label = (text, x, y, anchor, cls = "") => svg.append(draw("text", { x, y, "text-anchor": anchor, class: cls }, text));
  for (const value of ticks) {
    svg.append(draw("line", { class: value === 0 ? "axis" : "rule", x1: left, x2: right, y1: Y(value), y2: Y(value) }));
    label(tick(value, step), left - 7, Y(value) + 4, "end");
  }
  for (const share of [0, 50, 100]) label(`${share} %`, X(share / 100 * n), bottom + 18, "middle");
  label("of the pixels, hottest first", (left + right) / 2, bottom + 34, "middle");
  const cursor = draw("line", { class: "cursor", y1: top, y2: bottom });
  svg.append(cursor);
  const dots = [["path", deletion], ["path other", insertion]].map(([cls, values]) => {
    svg.append(draw("path", { class: cls, d: trace(values.map((v, i) => [X(i), Y(v)])) }));
    return [values, draw("circle", { class: cls.includes("other") ? "point other" : "point", r: 5, "data-current": "true" })];
  });
  const middle = [Y(deletion[n]), Y(insertion[n])];
  spread(middle, 15, top + 4, bottom).forEach((y, i) => label(["blurred", "shown alone"][i], right + 6, y + 4, "start", "ref-text"));
  for (const [, dot] of dots) svg.append(dot);
  svg.addEventListener("click", (event) => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * w;
    go(Math.min(Math.max(Math.round((x - left) / (right - left) * n), 0), n));
  });
  const update = (i) => {
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, X(i));
    for (const [values, dot] of dots) { dot.setAttribute("cx", X(i)); dot.setAttribute("cy", Y(values[i])); }
  };
  return { svg, update };
};
