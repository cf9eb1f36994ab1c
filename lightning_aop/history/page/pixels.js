// ---- pixels: images, maps and what is drawn of them ----------------------------------------------
const data = JSON.parse(document.getElementById("data").textContent);
const parsed = (text) => {
  try {
    return [JSON.parse(text)];
  } catch {
    return [];
  }
};
const elements = (name) => [...document.querySelectorAll(`script.${name}`)];
const records = elements("record").flatMap((element) => parsed(element.textContent));
// The worst samples of the validations, and their images.
const failures = elements("failures").flatMap((element) => parsed(element.textContent));
const pictured = new Map(failures.flatMap((each) => Object.entries(each.images)));
// The run of the page, and those that it is compared with.
const runs = [{ title: data.title, records }, ...elements("other").flatMap((element) => parsed(element.textContent))];
const $ = (id) => document.getElementById(id);
const body = document.body;

// Strings from the run reach the page by textContent or setAttribute only, so none is ever markup.
const make = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
};
const own = (object, key) => Object.prototype.hasOwnProperty.call(object, key) ? object[key] : undefined;
const className = (target) => own(data.class_names, String(target)) ?? `class ${target}`;

const palettes = Object.fromEntries(Object.entries(data.palettes).map(([name, hex]) =>
  [name, Uint8Array.from({ length: 768 }, (_, i) => parseInt(hex.slice(2 * i, 2 * i + 2), 16))]));
const gain = Float32Array.from({ length: 256 }, (_, i) => (i / 255) ** data.exponent);
const [height, width] = data.picture_size;
// Small images are upsampled, so that a map finer than they are is seen in full.
const zoom = width && height ? Math.max(1, Math.ceil(160 / Math.max(width, height))) : 1;
const W = width * zoom, H = height * zoom;
const LESS = [77, 166, 255], MORE = [255, 140, 40];  // of a difference; told apart with any colour blindness

const state = {
  record: records.length - 1, mode: "overlay", opacity: 0.85, palette: data.palette, outlines: true,
  verdict: "", target: "", sort: "", against: runs.length > 1 ? "run:1" : "", layout: "swipe", split: 50, page: 0, open: null, share: null,
};

const load = async (source) => {
  const image = new Image();
  image.src = source;
  await image.decode();
  return image;
};
const sized = (w, h) => make("canvas", { width: w, height: h });
const pixels = (image, w, h) => {
  const context = sized(w, h).getContext("2d", { willReadFrequently: true });
  context.imageSmoothingEnabled = false;
  context.drawImage(image, 0, 0, w, h);
  return context.getImageData(0, 0, w, h).data;
};
const remembered = (make) => {
  const known = new Map();
  return (key) => {
    if (!known.has(key)) known.set(key, make(key));
    return known.get(key);
  };
};
const drawn = remembered((source) => load(source).then((image) => pixels(image, W, H)));
const photo = (i) => drawn(data.images[i]);
const dilated = (bits, radius) => {  // of the canvas's size, by a square
  const wide = new Uint8Array(bits.length), result = new Uint8Array(bits.length);
  for (let y = 0, i = 0; y < H; y++) for (let x = 0; x < W; x++, i++) {
    if (bits[i]) wide.fill(1, i - Math.min(radius, x), i + Math.min(radius, W - 1 - x) + 1);
  }
  for (let y = 0, i = 0; y < H; y++) for (let x = 0; x < W; x++, i++) {
    if (!wide[i]) continue;
    for (let d = -Math.min(radius, y); d <= Math.min(radius, H - 1 - y); d++) result[i + d * W] = 1;
  }
  return result;
};
const masks = new Map(data.masks.map(([image, target, source]) => [`${image} ${target}`, source]));
const areas = new Map(data.masks.map(([image, target, , area]) => [`${image} ${target}`, area]));
// The inner border of a mask, ready to be laid over a canvas, with a dark halo to be seen on any ground.
const outline = remembered((key) => !masks.has(key) ? null : load(masks.get(key)).then((mask) => {
  const inside = new Uint8Array(W * H), rgba = pixels(mask, W, H);
  for (let i = 0; i < inside.length; i++) inside[i] = rgba[4 * i] > 127;
  const thick = Math.max(Math.round(Math.max(W, H) / 112), 1);
  const outer = dilated(inside.map((bit) => 1 - bit), thick), line = inside.map((bit, i) => bit & outer[i]);
  const halo = dilated(line, Math.ceil(thick / 2));
  const canvas = sized(W, H), context = canvas.getContext("2d");
  const result = context.createImageData(W, H);
  for (let i = 0; i < line.length; i++) {
    if (line[i]) result.data.set([...data.outline, 255], 4 * i);
    else if (halo[i]) result.data[4 * i + 3] = 191;
  }
  context.putImageData(result, 0, 0);
  return canvas;
}));
const greyed = (image) => {
  const w = image.naturalWidth, h = image.naturalHeight, rgba = pixels(image, w, h);
  const grey = new Uint8Array(rgba.length / 4);
  for (let i = 0; i < grey.length; i++) grey[i] = rgba[4 * i];
  return { grey, w, h };
};
const sheets = new Map();
const sheet = (record) => {  // all its maps, decoded; the least recently used are let go
  let found = sheets.get(record);
  sheets.delete(record);
  found ??= load(record.sheet).then(greyed);
  sheets.set(record, found);
  if (sheets.size > 64) sheets.delete(sheets.keys().next().value);
  return found;
};
// Where each pixel lies between two of the map's (bilinear, pixel centres at one half).
const between = (n, m) => Array.from({ length: n }, (_, i) => {
  const at = Math.min(Math.max((i + 0.5) * m / n - 0.5, 0), m - 1), low = Math.floor(at);
  return [low, Math.min(low + 1, m - 1), at - low];
});
const grids = remembered((size) => {
  const [h, w] = size.split(" ").map(Number);
  return { rows: between(H, h), columns: between(W, w) };
});
// The map of an explanation at the size of the canvas, 0 to 255; null where it is blank or left out.
const heat = async (record, k) => {
  if (record.blank[k] || !record.sheet) return null;
  const [mapHeight, mapWidth] = record.map_size;
  const left = k % record.columns * mapWidth, top = Math.floor(k / record.columns) * mapHeight;
  return enlarged(await sheet(record), record.map_size, left, top);
};
const enlarged = ({ grey, w }, size, left, top) => {
  const { rows, columns } = grids(size.join(" ")), result = new Float32Array(W * H);
  for (let y = 0, o = 0; y < H; y++) {
    const [y0, y1, fy] = rows[y];
    const upper = (top + y0) * w + left, lower = (top + y1) * w + left;
    for (let x = 0; x < W; x++, o++) {
      const [x0, x1, fx] = columns[x];
      const a = grey[upper + x0], b = grey[upper + x1], c = grey[lower + x0], d = grey[lower + x1];
      result[o] = (a + (b - a) * fx) * (1 - fy) + (c + (d - c) * fx) * fy;
    }
  }
  return result;
};

const coloured = (picture, fill) => {
  const canvas = sized(W, H), context = canvas.getContext("2d"), result = context.createImageData(W, H);
  fill(result.data, picture);
  context.putImageData(result, 0, 0);
  return canvas;
};
const luma = (picture, o) => 0.299 * picture[o] + 0.587 * picture[o + 1] + 0.114 * picture[o + 2];
// No colour of the scale, but stripes: there is no map here, which is not the value 0.
const striped = (out, picture) => {
  for (let y = 0, o = 0; y < H; y++) for (let x = 0; x < W; x++, o += 4) {
    const stripe = (x + y) * 224 / W % 16 < 8 ? 0 : 14;
    out[o] = out[o + 1] = out[o + 2] = (state.mode === "map" ? 128 : 96 + 0.25 * luma(picture, o)) + stripe;
    out[o + 3] = 255;
  }
};
// The photo is greyed and darkened as the heat grows opaque: an orange cat is no hot region.
const lay = (out, picture, values, colourOf, alphaOf) => {
  const { opacity, mode } = state, { brightness, saturation } = data, plain = mode === "map";
  for (let n = 0, o = 0; n < values.length; n++, o += 4) {
    const value = values[n], colour = colourOf(value), alpha = alphaOf(value), grey = (1 - saturation) * luma(picture, o);
    for (let i = 0; i < 3; i++) {
      const p = picture[o + i], ground = plain ? 0 : p + opacity * (brightness * (saturation * p + grey) - p);
      out[o + i] = ground + alpha * (colour[i] - ground);
    }
    out[o + 3] = 255;
  }
};
const ofPalette = remembered((name) => Array.from({ length: 256 }, (_, i) => palettes[name].subarray(3 * i, 3 * i + 3)));

// What is shown of one explanation, on a canvas of its own.
const shown = async (record, k) => {
  const key = `${record.images[k]} ${record.targets[k]}`;
  const line = state.outlines ? outline(key) : null;
  const picture = await photo(record.images[k]);
  const values = state.mode === "picture" ? null : await heat(record, k);
  const canvas = explained(picture, values);
  const above = await line;
  if (above) canvas.getContext("2d").drawImage(above, 0, 0);
  return canvas;
};
const explained = (picture, values) => coloured(picture, (out) => {
  if (state.mode === "picture") out.set(picture);
  else if (!values) striped(out, picture);
  else {
    const colours = ofPalette(state.palette);
    lay(out, picture, values, (value) => colours[Math.round(value)],
      state.mode === "map" ? () => 1 : (value) => state.opacity * gain[Math.round(value)]);
  }
});
// What is shown of a failure: its image, and the map of one of its classes.
const shownFailure = async (sample, n) => {
  const [picture, map] = await Promise.all([drawn(pictured.get(sample.id)), load(sample.maps[n]).then(greyed)]);
  const blank = map.grey.every((value) => value === 0);
  return explained(picture, blank ? null : enlarged(map, [map.h, map.w], 0, 0));
};
// Where one map has more heat than another of the same image, and where less.
const difference = async (record, k, other, j) => {
  const picture = await photo(record.images[k]), line = state.outlines ? outline(`${record.images[k]} ${record.targets[k]}`) : null;
  const [now, then] = await Promise.all([heat(record, k), heat(other, j)]);
  const canvas = coloured(picture, (out) => {
    if (!now || !then) striped(out, picture);
    else lay(out, picture, now.map((value, n) => value - then[n]), (value) => value < 0 ? LESS : MORE,
      (value) => gain[Math.round(Math.abs(value))]);
  });
  const above = await line;
  if (above) canvas.getContext("2d").drawImage(above, 0, 0);
  return canvas;
};

// ---- deletion and insertion ----------------------------------------------------------------------
// The paper's blur: a gaussian of 51 pixels of the model's image, sigma 50, reflected at the borders.
const blurred = remembered(async (i) => {
  const source = pixels(await load(data.images[i]), width, height);
  const scale = width / data.image_size[1], radius = Math.max(1, Math.round(25 * scale)), sigma = 50 * scale;
  const weights = Array.from({ length: 2 * radius + 1 }, (_, n) => Math.exp(-0.5 * ((n - radius) / sigma) ** 2));
  const sum = total(weights);
  const reflected = (at, n) => {
    const period = Math.max(2 * (n - 1), 1), rest = ((at % period) + period) % period;
    return rest < n ? rest : period - rest;
  };
  const pass = (from, n, stride, lines, across) => {
    const to = new Float32Array(from.length);
    for (let line = 0; line < lines; line++) for (let at = 0; at < n; at++) {
      let r = 0, g = 0, b = 0;
      for (let d = 0; d < weights.length; d++) {
        const o = line * across + reflected(at + d - radius, n) * stride;
        r += weights[d] * from[o]; g += weights[d] * from[o + 1]; b += weights[d] * from[o + 2];
      }
      const o = line * across + at * stride;
      to[o] = r / sum; to[o + 1] = g / sum; to[o + 2] = b / sum;
    }
    return to;
  };
  const rows = pass(Float32Array.from(source), width, 4, height, 4 * width);
  const all = pass(rows, height, 4 * width, width, 4);
  const result = new Uint8ClampedArray(4 * W * H);
  for (let y = 0, o = 0; y < H; y++) for (let x = 0; x < W; x++, o += 4) {
    const from = 4 * (Math.floor(y / zoom) * width + Math.floor(x / zoom));
    for (let c = 0; c < 3; c++) result[o + c] = all[from + c];
    result[o + 3] = 255;
  }
  return result;
});
// The place of each pixel in the order of falling heat.
const ranks = (values) => {
  const order = Uint32Array.from(values, (_, n) => n).sort((a, b) => values[b] - values[a] || a - b);
  const result = new Uint32Array(order.length);
  order.forEach((n, at) => { result[n] = at; });
  return result;
};
