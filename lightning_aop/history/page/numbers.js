// ---- numbers: how they are written, and how far they reach -------------------------------------
const exists = (x) => typeof x === "number";
const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
const total = (values) => values.reduce((sum, value) => sum + value, 0);
const average = (values) => values.length ? total(values) / values.length : null;
// A few images say nothing about a third decimal.
const number = (x, whole = false) => {
  if (!exists(x)) return "–";
  if (whole) return String(x);
  const size = Math.abs(x);
  if (size >= 1e6) return x.toExponential(2);
  const text = x.toFixed(size >= 99.95 ? 0 : size >= 9.995 ? 1 : 2);
  return Number(text) === 0 ? text.replace("-", "") : text.replace("-", "−");
};
// No line begins with a number whose name ends the line before.
const tied = (text) => text.replace(/ (?=[\d±−→])|(?<=[±→]) /g, "\u00a0");
const signed = (x) => `${x > 0 ? "+" : ""}${number(x)}`;

// Student's t, two-sided 95 %, for 1 to 30 degrees of freedom; beyond, its expansion around the normal's.
const STUDENT = [
  12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
  2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
];
const student = (freedom) => STUDENT[freedom - 1] ?? 1.95996 + 2.37227 / freedom + 2.8225 / freedom ** 2;

// The mean of values and half of its 95 % interval over images: several maps of one image are not
// independent, so that their deviations are added up first. Of one image there is no interval.
const estimate = (samples) => {
  if (!samples.length) return null;
  const mean = average(samples.map(({ value }) => value));
  const byImage = new Map();
  for (const { image, value } of samples) byImage.set(image, (byImage.get(image) ?? 0) + value - mean);
  const images = byImage.size, count = samples.length;
  if (images < 2) return { mean, half: null, images, count };
  const squares = total([...byImage.values()].map((each) => each * each));
  const half = student(images - 1) * Math.sqrt(images / (images - 1) * squares) / count;
  return { mean, half, images, count };
};
const within = ({ mean, half }) => half === null ? number(mean) : `${number(mean)} ± ${number(half)}`;

// How likely k or more of n are hits, where each is one with probability p.
const tail = (n, k, p) => {
  let sum = 0;
  for (let i = k; i <= n; i++) {
    let ways = 1;
    for (let j = 0; j < i; j++) ways *= (n - j) / (j + 1);
    sum += ways * p ** i * (1 - p) ** (n - i);
  }
  return sum;
};
