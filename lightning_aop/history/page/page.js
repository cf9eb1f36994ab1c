// ---- another copy of this page asks for what is new -----------------------------------------------
const finished = () => elements("end").length > 0;
const asked = /^\?since=(\d+)(?:,(\d+))?$/.exec(location.search);
if (asked && parent !== window) {
  const texts = elements("record").map((element) => element.textContent).filter((text) => parsed(text).length);
  // Not to a stranger's page that has this one in a frame; files have no origin, and no strangers.
  const to = location.protocol === "file:" ? "*" : location.origin;
  const fell = elements("failures").map((element) => element.textContent).slice(Number(asked[2] ?? 0));
  parent.postMessage({ count: texts.length, fresh: texts.slice(Number(asked[1])), fell, finished: finished() }, to);
  return;
}

// ---- words ------------------------------------------------------------------------------------------
const VERDICTS = ["right", "wrong", "missed", "false positive", "absent"];
const when = (r) => {
  const { epoch, step, title } = records[r];
  if (step === 0) return "before training";
  return records.filter((other) => other.epoch === epoch && other.step > 0).length > 1 || !title.startsWith("epoch") ? `step ${step}` : `epoch ${epoch}`;
};
const date = (seconds) => new Date(1000 * seconds).toLocaleDateString("en-GB", { day: "numeric", month: "long", year: "numeric" });
const clock = (time) => time.toLocaleTimeString("en-GB");

// ---- two times, or two runs -------------------------------------------------------------------------
// What a time is compared with: a record of this run, or of another the one at about the same time.
const reference = (r) => {
  const [kind, at] = state.against.split(":");
  if (kind === "time" && records[at]) return { record: records[at], title: records[at].title };
  const other = kind === "run" ? runs[at] : null;
  if (!other?.records.length) return null;
  const { epoch, step } = records[r];
  const near = (record) => [Math.abs(record.epoch - epoch) + Math.abs((record.step > 0) - (step > 0)), Math.abs(record.step - step)];
  const record = other.records.reduce((best, each) => {
    const [a, b] = [near(best), near(each)];
    return b[0] < a[0] || (b[0] === a[0] && b[1] < a[1]) ? each : best;
  });
  return { record, title: `${other.title}, ${record.title}` };
};

// ---- a card -----------------------------------------------------------------------------------------
const fact = (label, value, title) => {
  const node = make("span", {}, `${label} `, make("b", {}, value));
  if (title) node.title = title;
  return node;
};
const badge = (verdict) => make("span", { class: "verdict", "data-verdict": verdict }, `${isWrong(verdict) ? "✗" : "✓"} ${verdict}`);
// What the model says instead, where it is wrong.
const said = (record, k) => {
  const predicted = record.predicted?.[k], score = record.predicted_scores?.[k];
  if (record.verdicts?.[k] !== "wrong" || !exists(predicted) || predicted === record.targets[k]) return null;
  return make("span", { class: "said" }, "said ", make("b", {}, className(predicted)), exists(score) ? ` ${number(score)}` : "");
};
const GAP = 4;
// Two canvases on one; a swipe shows the one on the left, the other on the right.
const joined = (canvas, now, then) => {
  const context = canvas.getContext("2d");
  if (state.layout === "beside") {
    context.clearRect(0, 0, canvas.width, H);
    context.drawImage(then, 0, 0);
    context.drawImage(now, W + GAP, 0);
    return;
  }
  const at = Math.round(state.split / 100 * W);
  context.drawImage(now, 0, 0);
  if (at > 0) context.drawImage(then, 0, 0, at, H, 0, 0, at, H);
  context.fillStyle = "#000";
  context.fillRect(at - 2, 0, 4, H);
  context.fillStyle = "#fff";
  context.fillRect(at - 1, 0, 2, H);
};
// How the canvas of a card is drawn: pixels first, and then all cards at once.
const paint = async (canvas, r, k, against) => {
  const record = records[r], j = against ? place(against.record, keyOf(record, k)) : -1;
  if (j >= 0 && state.layout === "difference") {
    const made = await difference(record, k, against.record, j);
    return () => canvas.getContext("2d").drawImage(made, 0, 0);
  }
  const [now, then] = await Promise.all([shown(record, k), j >= 0 ? shown(against.record, j) : null]);
  return () => {
    canvas.pair = then ? [now, then] : null;
    if (then) joined(canvas, now, then);
    else canvas.getContext("2d").drawImage(now, 0, 0);
  };
};
const card = (r, k, { label, click, film = false, why = [], against = null }) => {
  const record = records[r], blank = record.blank[k], score = record.scores[k], drift = record.drift[k];
  const j = against ? place(against.record, keyOf(record, k)) : -1;
  const wide = j >= 0 && state.layout === "beside";
  const canvas = make("canvas", { width: wide ? 2 * W + GAP : W, height: H, "aria-hidden": "true" });
  const button = make("button", { type: "button", class: "open" }, canvas);
  const verdict = record.verdicts?.[k] ?? null;
  button.setAttribute("aria-label", film
    ? `Go to ${label}` : `${label}, image ${record.images[k] + 1}${verdict ? `, ${verdict}` : ""}${blank ? ", blank" : ""}: show its history`);
  if (blank) button.append(make("span", { class: "blank" }, "blank"));
  else if (!record.sheet) button.append(make("span", { class: "blank" }, "left out"));
  button.addEventListener("click", click);
  const name = make("span", { class: "name", title: label }, label);
  const caption = make("figcaption", {}, film || !verdict ? name : make("div", { class: "top" }, name, badge(verdict)));
  if (!film) {
    const bar = make("i");
    bar.style.width = `${100 * Math.min(Math.max(score ?? 0, 0), 1)}%`;
    caption.append(make("div", { class: "meter", "aria-hidden": "true", "data-wrong": isWrong(verdict) }, bar));
  }
  const beside = (value, of) => {
    const other = j >= 0 ? of(against.record, j) : undefined;
    return exists(other) ? `${number(value)} (${number(other)})` : number(value);
  };
  const facts = make("span", { class: "facts" }, fact("score", beside(score, (record, k) => record.scores[k])), " ");
  const judged = overallAuc(record, k), energy = energyOf(record, k);
  if (exists(judged)) {
    facts.append(fact("AUC", beside(judged, overallAuc),
      "Insertion AUC minus deletion AUC: how far the map tells what the score hangs on. Higher is better; a map that knows nothing gets about 0."), " ");
  }
  if (exists(energy)) facts.append(fact("on object", beside(energy, energyOf), "The share of the heat that lies on the object"), " ");
  facts.append(fact("drift", number(drift), "How much the map changed since the time before: 1 minus the rank correlation"));
  if (film) for (const span of facts.children) span.style.display = "block";
  const instead = film ? null : said(record, k);
  if (instead) caption.append(instead);
  caption.append(facts);
  for (const reason of why) caption.append(make("span", { class: "why" }, tied(reason)));
  const figure = make("figure", {
    "data-record": r, "data-index": k, "data-image": record.images[k], "data-target": record.targets[k],
    "data-score": score ?? "", "data-drift": drift ?? "", "data-blank": blank, "data-verdict": verdict ?? "", "data-wide": wide,
  }, button, caption);
  if (!film) {
    const large = make("button", { type: "button", class: "expand", "aria-label": `Full size: ${label}, image ${record.images[k] + 1}`, title: "Full size" }, "⤢");
    large.addEventListener("click", () => enlarge(r, k));
    figure.append(large);
  }
  return { canvas, figure };
};

// ---- which cards, and in which order ----------------------------------------------------------------
const FILTERS = {
  "": ["all", () => true],
  "not right": ["not right", (record, k) => isWrong(record.verdicts?.[k])],
  ...Object.fromEntries(VERDICTS.map((word) => [word, [word, (record, k) => record.verdicts?.[k] === word]])),
  blank: ["blank", (record, k) => record.blank[k]],
  off: ["heat off the object", isOff],
};
// The first comes first; what has no value comes last.
const ORDERS = {
  "": ["order of the probe", () => 0],
  score: ["score, lowest first", (record, k) => record.scores[k]],
  sure: ["score, highest first", (record, k) => exists(record.scores[k]) ? -record.scores[k] : null],
  auc: ["AUC, lowest first", overallAuc],
  changed: ["most changed", (record, k) => exists(record.drift[k]) ? -record.drift[k] : null],
  off: ["heat off the object", energyOf],
};
const chosen = (record) => {
  const fits = FILTERS[state.verdict][1], of = ORDERS[state.sort][1];
  return record.images.map((_, k) => k)
    .filter((k) => fits(record, k) && (state.target === "" || record.targets[k] === Number(state.target)))
    .map((k) => [of(record, k), k])
    .sort(([a, i], [b, j]) => (exists(a) ? 0 : 1) - (exists(b) ? 0 : 1) || (exists(a) && exists(b) ? a - b : 0) || i - j)
    .map(([, k]) => k);
};

// ---- what is shown ----------------------------------------------------------------------------------
const turn = { grid: 0, film: 0, cases: 0, hide: 0, failures: 0 };
const flags = { grid: "drawn", film: "filmed", cases: "cased", hide: "hidden", failures: "failed" };
// Pixels are made first and shown all at once, unless others were asked for meanwhile.
const show = async (part, jobs, done) => {
  const mine = ++turn[part];
  body.dataset[flags[part]] = "";
  try {
    const ready = await Promise.all(jobs);
    if (mine !== turn[part]) return;
    ready.forEach((put) => put());
    body.dataset[flags[part]] = done;
    performance.mark(flags[part]);
  } catch (error) {
    body.dataset.error = String(error);
    $("summary").textContent = "This browser could not draw the images.";
    console.error(error);
  }
};

let updates = [], filmCharts = [];
const openCase = (r, k) => {
  state.record = r;
  state.open = keyOf(records[r], k);
  refresh(true);
  $("detail-title").focus({ preventScroll: true });
  $("detail").scrollIntoView({ block: "nearest" });
};
const film = (whole) => {
  const key = state.open;
  $("detail").hidden = !key;
  const open = key ? place(records[state.record], key) : -1;
  for (const figure of $("grid").children) figure.dataset.open = Number(figure.dataset.index) === open;
  if (!key) return;
  if (whole) {
    const jobs = [];
    $("detail-title").textContent = className(key.target);
    $("detail-sub").textContent = `image ${key.image + 1}, from ${records[0].title} to ${records.at(-1).title}`;
    const of = (value) => records.map((record) => {
      const k = place(record, key);
      return k < 0 ? null : value(record, k);
    });
    $("film").replaceChildren(...records.map((record, r) => {
      const k = place(record, key);
      if (k < 0) {
        return make("figure", { "data-record": r, "data-missing": "true" },
          make("div", { class: "gone" }, "not explained"),
          make("figcaption", {}, make("span", { class: "name" }, record.title)));
      }
      const made = card(r, k, { label: record.title, click: () => go(r), film: true });
      jobs.push(paint(made.canvas, r, k, null));
      return made.figure;
    }));
    const aucs = of(overallAuc), energy = of(energyOf);
    filmCharts = [chart("score", "Score of this class", "Where it is near 0, the map says little", of((record, k) => record.scores[k]), [], go)];
    if (aucs.some(exists)) filmCharts.push(chart("auc", ...known.overall_auc, aucs, [], go));
    if (energy.some(exists)) filmCharts.push(chart("energy", ...known.energy_in_mask, energy, [], go));
    $("detail-charts").replaceChildren(...filmCharts.map((each) => each.box));
    show("film", jobs, jobs.length);
  }
  for (const figure of $("film").children) {
    const current = Number(figure.dataset.record) === state.record;
    figure.dataset.current = current;
    if (current) $("film").scrollLeft = figure.offsetLeft - ($("film").clientWidth - figure.offsetWidth) / 2;
  }
  filmCharts.forEach((each) => each.update(state.record));
  hide();
};

// What the score hangs on: the images are made here, of image, blur and map; the scores are stored.
const hide = () => {
  const record = records[state.record], k = state.open ? place(record, state.open) : -1;
  const deletion = record.deletion?.[k], insertion = record.insertion?.[k];
  const ready = k >= 0 && deletion && insertion && deletion.length === insertion.length && deletion.length > 1 && !record.blank[k] && record.sheet;
  $("hide").hidden = !ready;
  $("detail-large").disabled = k < 0;
  if (!ready) return;
  const n = deletion.length - 1;
  state.share ??= 0.25;
  const plot = hidingChart(deletion, insertion, (i) => { state.share = i / n; refreshShare(); });
  $("hide-chart").replaceChildren(plot.svg);
  $("share").max = n;
  for (const id of ["deleted", "inserted"]) { $(id).width = W; $(id).height = H; }
  const plain = (data.configuration.metrics ?? "").startsWith("Faithfulness(steps=");
  $("hide-note").textContent = plain ? "The scores are the model's, stored with the run. The images are drawn again from the image, its blur and the stored map."
    : "The scores are the model's, stored with the run. The images are drawn with the default blur, which this run's metric may not use.";
  const order = Promise.all([photo(record.images[k]), blurred(record.images[k]), heat(record, k).then(ranks)]);
  const refreshShare = () => {
    const i = Math.round(state.share * n), percent = Math.round(100 * i / n);
    $("share").value = i;
    $("share").setAttribute("aria-valuetext", `hottest ${percent} %, score ${number(deletion[i])} without, ${number(insertion[i])} alone`);
    $("share-text").textContent = `The hottest ${percent} %`;
    $("deleted-caption").replaceChildren("blurred: score ", make("b", {}, number(deletion[i])));
    $("inserted-caption").replaceChildren("shown alone: score ", make("b", {}, number(insertion[i])));
    plot.update(i);
    show("hide", [order.then(([picture, blur, rank]) => () => {
      const many = Math.min(i * Math.ceil(W * H / n), W * H);
      const put = (id, inside) => {
        const canvas = coloured(picture, (out) => {
          for (let p = 0, o = 0; p < rank.length; p++, o += 4) {
            const from = (rank[p] < many) === inside ? picture : blur;
            out[o] = from[o]; out[o + 1] = from[o + 1]; out[o + 2] = from[o + 2]; out[o + 3] = 255;
          }
        });
        $(id).getContext("2d").drawImage(canvas, 0, 0);
      };
      put("deleted", false);
      put("inserted", true);
    })], i);
  };
  $("share").oninput = (event) => { state.share = Number(event.target.value) / n; refreshShare(); };
  refreshShare();
};

// The worst samples of the validation at this time, each once for every class that is explained.
const worst = () => {
  const step = records[state.record].step, now = failures.filter((each) => each.step <= step).at(-1);
  $("failures").hidden = !failures.length;
  if (!failures.length) return;
  const samples = now?.samples ?? [], since = (title) => title === now.title ? "new" : `since ${title}`;
  $("failures-none").hidden = samples.length > 0;
  $("failures-sub").textContent = now ? `of the validation at ${now.title}; no part of the numbers of this page` : "";
  const jobs = [], figures = [];
  for (const sample of samples) {
    sample.targets.forEach((target, n) => {
      if (!exists(target) || !sample.maps[n] || !pictured.has(sample.id)) return;
      const canvas = make("canvas", { width: W, height: H, role: "img", "aria-label": `What speaks for ${className(target)}` });
      const labelled = sample.labels.includes(target);
      const caption = make("figcaption", {},
        make("div", { class: "top" }, make("span", { class: "name", title: className(target) }, className(target)),
          make("span", { class: "verdict", "data-verdict": labelled ? "missed" : "wrong" }, labelled ? "label" : "said instead")),
        make("span", { class: "facts" }, fact("score", number(sample.scores[n])), " ", fact("loss", number(sample.loss)), " ", make("span", {}, since(sample.entered))),
        make("span", { class: "why" }, sample.why));
      figures.push(make("figure", { "data-failure": sample.id, "data-target": target }, canvas, caption));
      jobs.push(shownFailure(sample, n).then((made) => () => canvas.getContext("2d").drawImage(made, 0, 0)));
    });
  }
  $("failures-grid").replaceChildren(...figures);
  const left = now?.left ?? [];
  $("failures-left").hidden = !left.length;
  const came = [...new Set(left.map((each) => each.entered))].map((title) => `${left.filter((each) => each.entered === title).length} that came at ${title}`);
  $("failures-left").textContent = `No longer among them: ${came.join(", ")}.`;
  show("failures", jobs, state.record);
};

const refresh = (whole) => {
  const r = state.record, record = records[r], count = record.images.length, against = reference(r);
  body.dataset.record = r;
  $("record").value = r;
  $("record").setAttribute("aria-valuetext", record.title);
  $("title").textContent = record.title;
  $("place").textContent = `${r + 1} of ${records.length}`;
  for (const id of ["first", "previous"]) $(id).disabled = r === 0;
  for (const id of ["next", "last"]) $(id).disabled = r === records.length - 1;
  const blanks = record.blank.filter(Boolean).length;
  $("blank-count").textContent = `${blanks} of ${plural(count, "map")} blank`;
  $("blank-count").dataset.some = blanks > 0;
  body.dataset.blank = blanks;
  choices(record);
  const places = chosen(record), size = places.length > 64 ? 32 : 64, pages = Math.max(1, Math.ceil(places.length / size));
  state.page = Math.min(state.page, pages - 1);
  const start = state.page * size, stop = Math.min(places.length, start + size);
  $("shown-count").textContent = `${places.length} of ${count} shown`;
  $("shown-count").hidden = places.length === count;
  $("none").hidden = places.length > 0;
  $("pager").hidden = pages < 2;
  $("page-place").textContent = `${start + 1}–${stop} of ${places.length}`;
  $("page-previous").disabled = state.page === 0;
  $("page-next").disabled = state.page === pages - 1;
  body.dataset.page = state.page;
  const two = against !== null;
  $("layout-choice").hidden = !two;
  $("split-choice").hidden = !two || state.layout !== "swipe";
  $("against-note").hidden = !two;
  if (two) {
    $("against-note").textContent = {
      swipe: `Left of the line: ${against.title}. Right of it: ${record.title}. Values of the first are in brackets.`,
      beside: `Left: ${against.title}. Right: ${record.title}. Values of the first are in brackets.`,
      difference: `Orange: more heat than ${against.title}; blue: less. Values of that are in brackets.`,
    }[state.layout];
  }
  body.dataset.against = two ? against.title : "";
  scale(two && state.layout === "difference");

  const jobs = [], figures = [];
  const focused = $("grid").contains(document.activeElement) ? document.activeElement : null;
  const refocus = focused && [focused.closest("figure").dataset.index, focused.className];
  const old = new Map([...$("grid").children].map((figure) => [figure.dataset.index, figure.querySelector("canvas")]));
  for (const k of places.slice(start, stop)) {
    const made = card(r, k, { label: className(record.targets[k]), click: () => openCase(r, k), against });
    // Until the new pixels are ready the old ones stay: an empty canvas between two would flicker.
    const before = old.get(String(k));
    if (before && !record.blank[k] && before.width === made.canvas.width) made.canvas.getContext("2d").drawImage(before, 0, 0);
    jobs.push(paint(made.canvas, r, k, against));
    figures.push(made.figure);
  }
  $("grid").replaceChildren(...figures);
  $("grid").dataset.wide = two && state.layout === "beside";
  if (refocus) $("grid").querySelector(`[data-index="${refocus[0]}"] .${refocus[1]}`)?.focus({ preventScroll: true });
  updates.forEach((update) => update(r));
  film(whole);
  worst();
  show("grid", jobs, r);
};
const go = (r) => {
  const to = Math.min(Math.max(r, 0), records.length - 1);
  if (to === state.record) return;
  state.record = to;
  refresh(false);
};
const fill = (select, options, value) => {
  const wanted = JSON.stringify(options);
  if (select.dataset.options !== wanted) {
    select.dataset.options = wanted;
    select.replaceChildren(...options.map(([key, text]) => make("option", { value: key }, text)));
  }
  select.value = value;
};
// Only what there is can be chosen, and what is chosen.
const choices = (record) => {
  const places = record.images.map((_, k) => k);
  const filters = Object.entries(FILTERS).map(([key, [text, fits]]) => [key, text, places.filter((k) => fits(record, k)).length])
    .filter(([key, , many]) => key === "" || key === state.verdict || (many && many < places.length) || (many && key === "right"))
    .map(([key, text, many]) => [key, `${text} (${many})`]);
  fill($("only-verdict"), filters, state.verdict);
  const targets = [...new Set([...record.targets, ...state.target === "" ? [] : [Number(state.target)]])];
  fill($("only-class"), [["", "all"], ...targets.map((target) => [String(target), className(target)]).sort((a, b) => a[1].localeCompare(b[1], "en", { numeric: true }))], state.target);
  fill($("sort"), Object.entries(ORDERS).filter(([key, [, of]]) => key === "" || key === state.sort || places.some((k) => exists(of(record, k)))).map(([key, [text]]) => [key, text]), state.sort);
};
const scale = (difference) => {
  const context = $("colours").getContext("2d"), result = context.createImageData(256, 1);
  for (let i = 0; i < 256; i++) {
    const t = (i - 127.5) / 127.5, grey = 110, to = t < 0 ? LESS : MORE, share = Math.abs(t) ** data.exponent;
    result.data.set(difference ? [...to.map((c) => grey + share * (c - grey)), 255] : [...palettes[state.palette].slice(3 * i, 3 * i + 3), 255], 4 * i);
  }
  context.putImageData(result, 0, 0);
  $("scale-low").textContent = difference ? "−1" : "0";
  $("colours").setAttribute("aria-label", difference ? "Colours from less heat to more" : "Colours from 0 to 1");
};

// ---- in full size -----------------------------------------------------------------------------------
const enlarge = async (r, k) => {
  const record = records[r], canvas = $("large-canvas"), at = { x: W / 2, y: H / 2 };
  $("large-title").textContent = `${className(record.targets[k])}, image ${record.images[k] + 1}, ${record.title}`;
  const [made, values] = await Promise.all([shown(record, k), heat(record, k)]);
  canvas.width = W;
  canvas.height = H;
  canvas.style.width = `min(92vw, 1100px, ${(82 * W / H).toFixed(2)}vh)`;
  const put = (pointed) => {
    const context = canvas.getContext("2d");
    context.drawImage(made, 0, 0);
    $("large-value").textContent = values ? "Point at the map, or use the arrow keys, for its value" : "There is no map here";
    if (!pointed || !values) return;
    const x = Math.min(Math.max(Math.floor(at.x), 0), W - 1), y = Math.min(Math.max(Math.floor(at.y), 0), H - 1);
    $("large-value").textContent = `map ${number(values[y * W + x] / 255)} at ${Math.floor(x / zoom)}, ${Math.floor(y / zoom)}`;
    const arm = Math.max(3, Math.round(W / 40));
    for (const [colour, thick] of [["#000", 3], ["#fff", 1]]) {
      context.strokeStyle = colour;
      context.lineWidth = thick;
      context.beginPath();
      context.moveTo(x + 0.5 - arm, y + 0.5); context.lineTo(x + 0.5 + arm, y + 0.5);
      context.moveTo(x + 0.5, y + 0.5 - arm); context.lineTo(x + 0.5, y + 0.5 + arm);
      context.stroke();
    }
  };
  put(false);
  canvas.onpointermove = (event) => {
    const box = canvas.getBoundingClientRect();
    at.x = (event.clientX - box.left) / box.width * W;
    at.y = (event.clientY - box.top) / box.height * H;
    put(true);
  };
  canvas.onkeydown = (event) => {
    const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!by) return;
    event.preventDefault();
    event.stopPropagation();
    const far = event.shiftKey ? Math.ceil(W / 20) : 1;
    at.x = Math.min(Math.max(at.x + far * by[0], 0), W - 1);
    at.y = Math.min(Math.max(at.y + far * by[1], 0), H - 1);
    put(true);
  };
  if (!$("large").open) $("large").showModal();
  body.dataset.enlarged = `${r} ${k}`;
};

// ---- playing ----------------------------------------------------------------------------------------
let timer = null;
const stop = () => {
  clearInterval(timer);
  timer = null;
  $("play").setAttribute("aria-label", "Play");
  $("play-shape").setAttribute("d", "M3 1v12l9-6z");
  body.dataset.playing = "false";
};
const play = () => {
  if (timer !== null) { stop(); return; }
  if (records.length < 2) return;
  if (state.record === records.length - 1) go(0);
  timer = setInterval(() => {
    go(state.record + 1);
    if (state.record === records.length - 1) stop();
  }, 700);
  $("play").setAttribute("aria-label", "Pause");
  $("play-shape").setAttribute("d", "M2 1h4v12H2zM8 1h4v12H8z");
  body.dataset.playing = "true";
};
// A long film takes a moment to paint: it waits until a slider rests.
let later = null;
const restyle = () => {
  refresh(false);
  if (!state.open) return;
  clearTimeout(later);
  body.dataset.filmed = "";
  later = setTimeout(() => film(true), 150);
};
const close = () => {
  clearTimeout(later);
  body.dataset.filmed = "0";
  const opened = $("grid").querySelector("[data-open=true] button");
  state.open = null;
  film(false);
  opened?.focus();
};

// ---- the parts that all times make -------------------------------------------------------------------
const summarise = () => {
  const about = data.configuration, made = records.find((record) => exists(record.time))?.time;
  const pictures = new Set(records.flatMap((record) => record.images)).size;
  const parts = [about.model && `model ${about.model}`, about.data && `data ${about.data}`, exists(made) && date(made)].filter(Boolean);
  $("run").textContent = data.title || "Explanations";
  document.title = [data.title || "Explanations", about.model].filter(Boolean).join(" · ");
  if (runs.length > 1) {
    $("run").textContent += ` beside ${runs.slice(1).map((run) => run.title).join(", ")}`;
    parts.push(...runs.slice(1).map((run) => `${run.title} shares ${plural(run.shared, "image")}`));
  }
  parts.push(records.length ? `${plural(pictures, "probe image")}, explained ${plural(records.length, "time")}` : "no explanations");
  $("summary").textContent = tied(parts.join(" · "));
  const smaller = data.picture_size[0] < data.image_size[0];
  const left = records.filter((record) => !record.sheet).length;
  $("coding").textContent = [
    records.some((record) => record.lossy) ? "The maps of this page are stored with slight loss." : "",
    left ? `To keep the page small, it has no maps of ${left} of the ${plural(records.length, "time")}: maps.npy has all.` : "",
    smaller ? `Images are shown at ${data.picture_size[1]} × ${data.picture_size[0]} of ${data.image_size[1]} × ${data.image_size[0]} pixels.` : "",
  ].filter(Boolean).join(" ");
};

const judged = () => {
  const { answers, cases, images } = judge(records, { when, areas });
  const last = records.length - 1;
  const follow = ({ to, chart, verdict, sort, record }) => {
    if (to === "cases") { $("cases").scrollIntoView({ block: "nearest" }); $("cases-grid").querySelector("button")?.focus({ preventScroll: true }); return; }
    state.record = record ?? last;
    if (verdict !== undefined) state.verdict = verdict;
    if (sort !== undefined) state.sort = sort;
    refresh(false);
    const target = chart ? document.querySelector(`.curves [data-metric="${chart}"]`) : $("probe");
    const folded = target?.closest("#costs");
    if (folded) folded.open = true;
    target?.scrollIntoView({ block: "center" });
    target?.querySelector("summary, select")?.focus({ preventScroll: true });
  };
  $("answers").replaceChildren(...answers.map(([question, sentences]) => make("div", { class: "answer" },
    make("h3", {}, question),
    make("ul", {}, ...sentences.map((each) => {
      const leads = each.to || each.verdict !== undefined || each.sort || (each.chart && own(records.at(-1).values, each.chart) !== undefined);
      const node = leads ? make("button", { type: "button" }, tied(each.text)) : make("span", {}, tied(each.text));
      if (leads) node.addEventListener("click", () => follow(each));
      const item = make("li", { "data-bad": each.bad }, node);
      if (each.bad) node.prepend(make("span", { class: "unseen" }, "Wrong: "));
      return item;
    })))));
  $("verdict-note").textContent = `${records[last].title[0].toUpperCase()}${records[last].title.slice(1)}. ${images > 1
    ? `± is half of a 95 % interval over ${plural(images, "image")}: what other images like these would give.` : "Of a single image there is no interval."}`;
  $("cases").hidden = !cases.length;
  const few = cases.slice(0, 6), jobs = [];
  $("cases-sub").textContent = cases.length > few.length ? `${few.length} of ${cases.length}` : "";
  $("cases-grid").replaceChildren(...few.map(({ k, why }) => {
    const made = card(last, k, { label: className(records[last].targets[k]), click: () => openCase(last, k), why });
    jobs.push(paint(made.canvas, last, k, null));
    return made.figure;
  }));
  show("cases", jobs, few.length);
};

const curves = () => {
  const controls = [...new Set(records.flatMap((record) => Object.keys(record.controls ?? {})))];
  const all = [...new Set(records.flatMap((record) => Object.keys(record.values)))];
  const order = [...Object.keys(known).filter((name) => !costs.includes(name)), ...costs];
  const rank = (name) => order.includes(name) ? order.indexOf(name) : order.length - costs.length - 0.5;
  // A control that is a scalar of its own is a line in the chart of what it controls.
  const names = all.filter((name) => name !== "drift_floor" && !controls.some((label) => all.some((other) => name === `${other}_${label.replaceAll(" ", "_")}`)))
    .sort((a, b) => rank(a) - rank(b));
  $("metrics").hidden = !names.length;
  const made = names.map((name) => {
    const [heading, hint] = own(known, name) ?? [name.replaceAll("_", " ").replace(/^./, (c) => c.toUpperCase()), ""];
    const lines = controls.map((label) => [label, records.map((record) => [record.step, own(own(record.controls ?? {}, label) ?? {}, name) ?? null]), true]);
    if (name === "drift") lines.push(["two seeds", records.map((record) => [record.step, own(record.values, "drift_floor") ?? null]), true]);
    const others = runs.slice(1).map((run) => [run.title, run.records.map((record) => [record.step, own(record.values, name) ?? null]), false]);
    // Before training there is no training time to have a share of.
    const values = records.map((record) => name === "overhead" && record.step === 0 ? null : own(record.values, name) ?? null);
    const of = own(behind, name), share = ![...costs, ...counts].includes(name) && values.every((v) => !exists(v) || Math.abs(v) <= 1);
    return chart(name, heading, hint, values, [...lines, ...others].filter(([, points]) => points.some(([, value]) => exists(value))), go,
      { share, band: of ? records.map((record) => estimate(samples(record, of))) : [] });
  });
  $("metrics-sub").textContent = `Over the steps of the logs. Click a point to go there.${records.some((record) => samples(record, overallAuc).length) ? " The shaded band is the 95 % interval over the images." : ""}`;
  // What explaining took, and counts that stay 0, are for who asks.
  const aside = (name) => costs.includes(name) || (counts.includes(name) && records.every((record) => !own(record.values, name)));
  $("curves").replaceChildren(...made.filter((_, i) => !aside(names[i])).map((each) => each.box));
  $("costs-curves").replaceChildren(...made.filter((_, i) => aside(names[i])).map((each) => each.box));
  $("costs").hidden = !names.some(aside);
  return made.map((each) => each.update);
};

const byClass = () => {
  // A blank map shows nothing, so that its AUC and its drift say nothing of the class.
  const measures = [
    ["score", "Mean score", (record, k) => record.scores[k]],
    ["AUC", "Mean overall AUC", (record, k) => record.blank[k] ? null : overallAuc(record, k)],
    ["on object", "Mean on object", energyOf],
    ["drift", "Mean drift", (record, k) => record.blank[k] ? null : record.drift[k]],
  ];
  const found = [], classes = new Map();
  records.forEach((record, r) => record.targets.forEach((target, k) => {
    if (!classes.has(target)) classes.set(target, records.map(() => []));
    classes.get(target)[r].push(k);
  }));
  const ordered = [...classes].map(([target, places]) => ({ target, places, name: className(target), count: places.flat().length }))
    .sort((a, b) => b.count - a.count || a.name.localeCompare(b.name, "en", { numeric: true }));
  $("classes").hidden = !ordered.length;
  for (const id of ["classes-first", "classes-rest"]) $(id).replaceChildren();
  $("classes-head").replaceChildren(make("th", { scope: "col" }, "Class"));
  const lines = ordered.map(({ target, places, name }, i) => {
    const count = make("span", { class: "small muted" });
    const row = make("tr", { "data-class": target }, make("th", { scope: "row" }, make("span", { class: "name", title: name }, name), count));
    $(i < 12 ? "classes-first" : "classes-rest").append(row);
    found.push((r) => { count.textContent = plural(places[r].length, "explanation"); });
    return row;
  });
  for (const [label, heading, of] of measures) {
    const trends = ordered.map(({ places }) =>
      records.map((record, r) => average(places[r].map((k) => of(record, k)).filter(exists))));
    const all = trends.flat().filter(exists);
    if (!all.length) continue;
    const low = all.reduce((a, b) => Math.min(a, b), 0), high = all.reduce((a, b) => Math.max(a, b), 1);
    const range = `${number(low, low === 0)} to ${number(high, Number.isInteger(high))}`;
    $("classes-head").append(make("th", { scope: "col" }, heading, " ", make("span", { class: "muted" }, range)));
    trends.forEach((values, i) => {
      const trend = spark(`${heading} of ${ordered[i].name} at every time`, values, [low, high], go);
      lines[i].append(make("td", { "data-label": label }, make("div", { class: "trend" }, trend.value, trend.svg)));
      found.push(trend.update);
    });
  }
  $("classes-more").hidden = ordered.length <= 12;
  const unfold = (open) => {
    $("classes-rest").hidden = !open;
    $("classes-more").setAttribute("aria-expanded", open);
    $("classes-more").textContent = open ? "Show fewer" : `Show all ${ordered.length} classes`;
  };
  $("classes-more").onclick = () => unfold($("classes-rest").hidden);
  unfold(false);
  return found;
};

// Make all of the page anew, for the times that there are now.
const build = () => {
  body.dataset.records = records.length;
  body.dataset.record = state.record;
  summarise();
  $("nothing").hidden = records.length > 0;
  if (!records.length) {
    body.dataset.drawn = "-1";
    return;
  }
  $("record").max = records.length - 1;
  $("record").disabled = $("play").disabled = $("pin").disabled = records.length < 2;
  for (const id of ["player", "verdict", "probe", "keys"]) $(id).hidden = false;
  const times = records.map((record, r) => [`time:${r}`, record.title]), others = runs.slice(1).map((run, i) => [`run:${i + 1}`, run.title]);
  $("against-choice").hidden = times.length < 2 && !others.length;
  fill($("against"), [["", "nothing"], ...others, ...times], state.against);
  updates = [...curves(), ...byClass()];
  judged();
  refresh(true);
};

// ---- while the run goes on ---------------------------------------------------------------------------
// No server, so the page opens itself again, unseen, and that copy says what is new.
const live = () => {
  const every = 1000 * (Number(/^#every-(\d+)/.exec(location.hash)?.[1]) || 10);
  let answered = null, failed = 0, ended = finished();
  const tell = () => {
    const last = records.at(-1), of = data.epochs, done = last ? last.epoch + (last.step > 0) : 0;
    const progress = of ? `${Math.min(done, of)} of ${plural(of, "epoch")}` : plural(done, "epoch");
    $("live").hidden = ended;
    body.dataset.live = ended ? "ended" : failed > 1 ? "blind" : "watching";
    if (ended) return;
    const old = exists(last?.time) && Date.now() / 1000 - last.time > 3600;
    const state = old ? `Not finished: ${progress} when this was last written, on ${date(last.time)}` : `Training: ${progress} explained`;
    $("live").textContent = failed > 1 ? `${state}. This browser does not let a page look at its own file: reload to see what is new.`
      : `${state}. ${answered ? `Looked for more at ${clock(answered)}.` : "New times appear by themselves."}`;
  };
  const frame = make("iframe", { hidden: "", title: "What is new", "aria-hidden": "true", tabindex: "-1" });
  let waiting = null;
  const look = () => {
    if (ended || document.hidden) return;
    frame.remove();
    // Not at the same address: a browser shows no page within itself.
    frame.src = `${location.href.split(/[?#]/)[0]}?since=${records.length},${failures.length}`;
    body.append(frame);
    waiting = setTimeout(() => { failed++; frame.remove(); tell(); }, Math.max(0.8 * every, 900));
  };
  addEventListener("message", (event) => {
    if (event.source !== frame.contentWindow || !frame.isConnected) return;
    clearTimeout(waiting);
    frame.remove();
    const { count, fresh, fell, finished } = event.data;
    [answered, failed, ended] = [new Date(), 0, finished];
    if (count < records.length) { location.reload(); return; }  // another run has taken the place of this one
    const more = fresh.flatMap(parsed), newest = state.record === records.length - 1;
    const worst = fell.flatMap(parsed);
    failures.push(...worst);
    for (const each of worst) for (const [id, url] of Object.entries(each.images)) pictured.set(id, url);
    if (more.length || worst.length) {
      records.push(...more);
      if (newest) state.record = records.length - 1;
      build();
    }
    tell();
  });
  tell();
  if (!ended && location.protocol !== "about:") setInterval(look, every);
};

// ---- start -------------------------------------------------------------------------------------------
const entries = Object.entries(data.configuration).filter(([, value]) => value !== "");
$("setup").hidden = !entries.length;
for (const [key, value] of entries) $("configuration").append(make("div", {}, make("dt", {}, key), make("dd", {}, value)));
for (const name of Object.keys(palettes)) $("palette").append(make("option", { value: name }, name));
$("palette").value = state.palette;
$("outline-choice").hidden = !masks.size;
$("outline-sample").style.background = `rgb(${data.outline})`;
$("record").addEventListener("input", (event) => { stop(); go(Number(event.target.value)); });
for (const [id, to] of [["first", () => 0], ["previous", () => state.record - 1], ["next", () => state.record + 1], ["last", () => records.length - 1]]) {
  $(id).addEventListener("click", () => { stop(); go(to()); });
}
$("play").addEventListener("click", play);
$("outlines").addEventListener("change", (event) => { state.outlines = event.target.checked; restyle(); });
$("opacity").addEventListener("input", (event) => { state.opacity = Number(event.target.value); restyle(); });
$("palette").addEventListener("change", (event) => { state.palette = event.target.value; restyle(); });
for (const input of document.getElementsByName("mode")) {
  input.addEventListener("change", () => { state.mode = input.value; body.dataset.mode = state.mode; $("opacity").disabled = state.mode !== "overlay"; restyle(); });
}
for (const [id, name] of [["only-verdict", "verdict"], ["only-class", "target"], ["sort", "sort"]]) {
  $(id).addEventListener("change", (event) => { state[name] = event.target.value; state.page = 0; refresh(false); });
}
$("against").addEventListener("change", (event) => { state.against = event.target.value; refresh(false); });
$("pin").addEventListener("click", () => { state.against = `time:${state.record}`; $("against").value = state.against; refresh(false); });
for (const input of document.getElementsByName("layout")) {
  input.addEventListener("change", () => { state.layout = input.value; refresh(false); });
}
const swipe = (split) => {
  state.split = split;
  $("split").value = split;
  for (const canvas of $("grid").querySelectorAll("canvas")) if (canvas.pair) joined(canvas, ...canvas.pair);
};
$("split").addEventListener("input", (event) => swipe(Number(event.target.value)));
$("grid").addEventListener("pointermove", (event) => {
  if (state.layout !== "swipe" || !event.target.closest(".open")?.querySelector("canvas").pair) return;
  const box = event.target.closest(".open").getBoundingClientRect();
  swipe(Math.round(Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1) * 100));
});
$("page-previous").addEventListener("click", () => { state.page--; refresh(false); });
$("page-next").addEventListener("click", () => { state.page++; refresh(false); });
$("detail-close").addEventListener("click", close);
$("detail-large").addEventListener("click", () => {
  const k = place(records[state.record], state.open);
  if (k >= 0) enlarge(state.record, k);
});
$("large-close").addEventListener("click", () => $("large").close());
$("large").addEventListener("close", () => { body.dataset.enlarged = ""; });
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.shiftKey || $("large").open || !records.length) return;
  const at = event.target, tag = at.tagName, slider = at === $("record");
  if (event.key === "Escape" && state.open) { close(); return; }
  // Other sliders, choices and buttons keep their own keys; the slider of time moves by itself.
  if ((tag === "INPUT" || tag === "SELECT") && !slider) return;
  if (event.key === " ") { if (tag !== "BUTTON" && tag !== "SUMMARY") { event.preventDefault(); play(); } return; }
  const to = { ArrowLeft: state.record - 1, ArrowRight: state.record + 1, Home: 0, End: records.length - 1 }[event.key];
  if (to === undefined || slider) return;
  event.preventDefault();
  stop();
  go(to);
});
body.dataset.mode = state.mode;
body.dataset.playing = "false";
build();
performance.mark("opened");
live();
