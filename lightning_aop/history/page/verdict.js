// ---- what the numbers of a run carry, in sentences, and the explanations that need a look --------
const SURE = 0.8;      // a score that is sure
const AWAY = 0.1;      // of the longer side: a hottest pixel further than this from the object is off it
const LITTLE = 0.5;    // of the heat on the object
const SETTLED = 0.1;   // drift: a rank correlation of 0.9
const FALL = 1 / 3;    // of what a mean was, which is sudden between two times

// An explanation is known by its image, its class, and which of several such it is.
const same = (record, k, j) => record.images[j] === record.images[k] && record.targets[j] === record.targets[k];
const keyOf = (record, k) => ({
  image: record.images[k], target: record.targets[k],
  nth: record.images.filter((_, j) => j < k && same(record, k, j)).length,
});
const place = (record, key) => {
  let left = key.nth;
  return record.images.findIndex((image, k) => image === key.image && record.targets[k] === key.target && left-- === 0);
};

const overallAuc = (record, k) => {
  const insertion = record.insertion_auc?.[k], deletion = record.deletion_auc?.[k];
  return exists(insertion) && exists(deletion) ? insertion - deletion : null;
};
const energyOf = (record, k) => record.energy?.[k] ?? null;
const hitOf = (record, k) => record.hits?.[k] ?? null;
const samples = (record, of) => record.images
  .map((image, k) => ({ image, value: of(record, k) })).filter(({ value }) => exists(value));
// The change of each explanation that both times have.
const changes = (before, after, of) => after.images.flatMap((image, k) => {
  const earlier = place(before, keyOf(after, k)), now = of(after, k);
  const then = earlier < 0 ? null : of(before, earlier);
  return exists(now) && exists(then) ? [{ image, value: now - then }] : [];
});

// The overall AUC of a control for the same image and class, as last measured.
const controlAuc = (records, name, k) => {
  const key = keyOf(records.at(-1), k);
  for (let r = records.length - 1; r >= 0; r--) {
    const aucs = records[r].control_aucs?.[name], value = aucs?.[place(records[r], key)];
    if (exists(value)) return value;
  }
  return null;
};

const isOff = (record, k) => {
  const away = record.away?.[k], energy = energyOf(record, k);
  return exists(away) && exists(energy) && away > AWAY && energy < LITTLE;
};
const isWrong = (verdict) => verdict === "wrong" || verdict === "missed" || verdict === "false positive";

const ZONES = [
  ["upper left corner", "upper edge", "upper right corner"],
  ["left edge", "centre", "right edge"],
  ["lower left corner", "lower edge", "lower right corner"],
];
// A ninth of the image in which far more maps are hottest than chance puts there, off the objects; where
// no object is known only the corners count, since objects may well lie at an edge.
const hotspot = (record) => {
  const best = new Map();  // one map an image, that of its highest score
  record.images.forEach((image, k) => {
    if (!record.peaks?.[k]) return;
    if (!best.has(image) || record.scores[k] > record.scores[best.get(image)]) best.set(image, k);
  });
  const found = new Map();
  for (const k of best.values()) {
    const [y, x] = record.peaks[k].map((at) => Math.min(Math.floor(3 * at), 2));
    const away = record.away?.[k], known = exists(away);
    if (known ? away <= AWAY : y === 1 || x === 1) continue;
    const zone = ZONES[y][x];
    found.set(zone, [...found.get(zone) ?? [], k]);
  }
  for (const [zone, places] of found) {
    if (places.length >= 3 && 9 * tail(best.size, places.length, 1 / 9) < 0.01) return { zone, places, of: best.size };
  }
  return null;
};

// The largest sudden fall of a mean that is clear, and has not been made good since.
const fall = (records, of) => {
  let found = null;
  const clear = (each) => each && each.half !== null && each.mean + each.half < 0;
  for (let r = 1; r < records.length; r++) {
    const before = estimate(samples(records[r - 1], of)), drop = estimate(changes(records[r - 1], records[r], of));
    if (records[r - 1].step === 0 || !clear(drop) || drop.mean > -FALL * before.mean) continue;
    const since = estimate(changes(records[r - 1], records.at(-1), of));
    if (clear(since) && since.mean < drop.mean / 2 && (!found || drop.mean < found.mean)) found = { ...drop, before: before.mean, r };
  }
  return found;
};

const judge = (records, { when, areas }) => {
  const since = (r) => records[r].step ? `since ${when(r)}` : "since the start";
  const at = records.length - 1, record = records[at], count = record.images.length;
  const trained = record.step > 0, blank = record.blank.filter(Boolean).length;
  const looks = [], learns = [], trust = [], reasons = new Map();
  const say = (list, text, more = {}) => list.push({ text, bad: false, ...more });
  const suspect = (k, reason) => reasons.set(k, [...reasons.get(k) ?? [], reason]);

  // What it looks at.
  const spot = trained ? hotspot(record) : null;
  if (spot) {
    say(looks, `The ${spot.zone} is hottest in ${spot.places.length} of ${plural(spot.of, "image")}`, { bad: true, to: "cases" });
    for (const k of spot.places) suspect(k, `hottest in the ${spot.zone}, as in ${spot.places.length - 1} others`);
  }
  const hits = samples(record, hitOf);
  const energy = estimate(samples(record, energyOf));
  const covered = samples(record, (_, k) => exists(energyOf(record, k)) ? areas.get(`${record.images[k]} ${record.targets[k]}`) ?? null : null);
  if (hits.length) {
    const sum = total(hits.map(({ value }) => value)), chance = total(covered.map(({ value }) => value));
    const blind = covered.length === hits.length ? `, by chance ${chance.toFixed(1)}` : "";
    say(looks, `Hottest pixel on the object in ${number(sum, Number.isInteger(sum))} of ${hits.length}${blind}`,
      { bad: trained && sum <= chance, sort: "off" });
  }
  if (energy) {
    const area = average(covered.map(({ value }) => value));
    say(looks, `${within(energy)} of the heat on the objects${exists(area) ? `, which cover ${number(area)} of the image` : ""}`,
      { bad: trained && exists(area) && energy.mean <= area, chart: "energy_in_mask" });
  }
  if (blank === count) say(looks, `All ${plural(count, "map")} are blank: they show nothing`, { bad: trained, chart: "blank_maps" });
  else if (!areas.size) say(looks, "The data has no masks: whether the heat is on the objects is for you to see");

  // Whether it gets better.
  const verdicts = (record.verdicts ?? []).filter((each) => each !== null && each !== undefined);
  const many = (word) => verdicts.filter((each) => each === word).length;
  const right = many("right"), wrong = many("wrong"), missed = many("missed"), invented = many("false positive");
  if (right + wrong + missed) {
    const parts = [`${right} of ${right + wrong + missed} right`];
    if (missed) parts.push(`${missed} missed`);
    if (invented) parts.push(plural(invented, "false positive"));
    say(learns, parts.join(" · "), { bad: trained && records.length > 1 && right === 0, verdict: wrong + missed + invented ? "not right" : "right" });
  }
  if (at > 0) {
    // What an untrained model got right it got by chance.
    const lost = records[at - 1].step === 0 ? [] : record.images.flatMap((_, k) => {
      const k0 = place(records[at - 1], keyOf(record, k));
      return k0 >= 0 && records[at - 1].verdicts?.[k0] === "right" && isWrong(record.verdicts?.[k]) ? [k] : [];
    });
    for (const k of lost) suspect(k, `right at ${when(at - 1)}, now ${record.verdicts[k]}`);
    if (lost.length) say(learns, `${lost.length} newly ${record.verdicts[lost[0]]} ${since(at - 1)}`, { bad: true, to: "cases" });

    const start = records.findIndex((each) => samples(each, overallAuc).length);
    if (start >= 0 && start < at) {
      const gain = estimate(changes(records[start], record, overallAuc));
      if (gain) {
        const clear = gain.half === null || Math.abs(gain.mean) > gain.half;
        say(learns, clear ? `Overall AUC ${gain.mean < 0 ? "fell" : "rose"} by ${within({ ...gain, mean: Math.abs(gain.mean) })} ${since(start)}`
          : `Overall AUC no different ${since(start)}: ${signed(gain.mean)} ± ${number(gain.half)}`,
          { bad: clear && gain.mean < 0 && gain.half !== null, chart: "overall_auc" });
      }
    }
    const watched = [
      ["pointing_game", hitOf, "Hottest pixels on the object"], ["energy_in_mask", energyOf, "Energy in mask"], ["overall_auc", overallAuc, "Overall AUC"],
    ];
    for (const [name, of, heading] of watched) {
      const drop = fall(records, of);
      if (drop) say(learns, `${heading} fell at ${when(drop.r)}, from ${number(drop.before)} by ${within({ ...drop, mean: -drop.mean })}`, { bad: true, chart: name, record: drop.r });
    }
    const drifts = records.map((each) => average((each.drift ?? []).filter(exists)));
    let from = records.length;
    while (from > 0 && exists(drifts[from - 1]) && drifts[from - 1] <= SETTLED) from--;
    const drift = { chart: "drift" };
    if (from < at) say(learns, `Maps settled ${since(from - 1)}`, drift);
    else if (exists(drifts[at])) say(learns, from === at ? `Maps hardly changed ${since(at - 1)}` : `Maps still change: drift ${number(drifts[at])} ${since(at - 1)}`, drift);
  } else say(learns, trained ? "Explained once: nothing to compare with yet" : "Not trained yet");

  // Whether to trust it.
  const faithful = estimate(samples(record, overallAuc));
  if (blank === count) say(trust, "Blank maps can't be trusted or doubted");
  else if (faithful) {
    const controls = (name) => records.map((each) => each.controls?.[name]?.overall_auc).filter(exists).at(-1);
    const name = ["centre gaussian", "random map"].find((each) => exists(controls(each)));
    const to = { chart: "overall_auc" };
    if (!name) say(trust, `Overall AUC ${within(faithful)}; no control was measured`, to);
    else {
      // What makes an image easy makes it so for both, so that their differences vary less.
      const pairs = samples(record, (_, k) => {
        const auc = overallAuc(record, k), control = controlAuc(records, name, k);
        return exists(auc) && exists(control) ? auc - control : null;
      });
      const paired = pairs.length === faithful.count;
      const gain = paired ? estimate(pairs) : { ...faithful, mean: faithful.mean - controls(name) };
      const line = faithful.mean - gain.mean, alone = paired ? "" : " (± of the maps alone)";
      const both = `Overall AUC ${number(faithful.mean)}, ${name} ${number(line)}`;
      const clear = gain.half !== null && Math.abs(gain.mean) > gain.half;
      const guess = name === "random map" ? "chance" : "a guess";
      if (!trained) say(trust, both, to);
      else if (gain.half === null) say(trust, `${both}: ${signed(gain.mean)} for one image, which proves nothing`, to);
      else if (clear && gain.mean > 0) say(trust, `${both}: maps beat ${guess} by ${within(gain)}${alone}`, { ...to, beats: true });
      else if (clear) say(trust, `${both}: maps are worse than ${guess} by ${within({ ...gain, mean: -gain.mean })}${alone}`, { ...to, bad: true });
      else say(trust, `${both}: not clearly better than ${guess}, ${signed(gain.mean)} ± ${number(gain.half)}${alone}`, { ...to, bad: true });
    }
  } else say(trust, "How faithful the maps are was not measured");
  // A faithful map of the wrong thing.
  const line = trust.at(-1);
  if (line.beats && looks.some(({ bad }) => bad)) say(trust, "The maps show what the model uses: it is the model that looks elsewhere", { to: "cases" });
  if (blank && blank < count) say(trust, `${blank} of ${plural(count, "map")} blank`, { bad: trained, chart: "blank_maps" });
  const shares = record.scores.every((score) => !exists(score) || (score >= 0 && score <= 1));
  const low = record.scores.filter((score, k) => !record.blank[k] && exists(score) && score < 0.1).length;
  if (low && shares) say(trust, `${low} of ${plural(count, "score")} below 0.10: there is little to explain`, { sort: "score" });

  // Cases that no mean shows.
  record.images.forEach((_, k) => {
    if (trained && record.verdicts?.[k] === "right" && record.scores[k] >= SURE && isOff(record, k)) {
      suspect(k, `right with ${number(record.scores[k])}, the heat off the object`);
    }
    const key = keyOf(record, k), series = records.map((each) => {
      const j = place(each, key);
      return j < 0 ? null : energyOf(each, j);
    });
    let deepest = null;
    for (let r = 1; r < series.length; r++) {
      const [before, after] = [series[r - 1], series[r]], by = before - after;
      if (records[r - 1].step === 0 || !exists(before) || !exists(after)) continue;
      const stays = exists(series[at]) && series[at] < before / 2;
      if (by >= 0.2 && after < before / 2 && stays && (!deepest || by > deepest.by)) deepest = { r, before, after, by };
    }
    if (deepest) suspect(k, `energy in mask ${number(deepest.before)} → ${number(deepest.after)} at ${when(deepest.r)}`);
  });
  const cases = [...reasons].map(([k, why]) => ({ k, why })).sort((a, b) => b.why.length - a.why.length || a.k - b.k);
  return { answers: [["What it looks at", looks], ["Whether it gets better", learns], ["Whether to trust it", trust]], cases, images: new Set(record.images).size };
};
