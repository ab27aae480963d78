// A mixture for a JavaScript engine with a compiler: objects, closures, strings, regular expressions, JSON, typed arrays, maps, big integers.
'use strict';
let seed = 12345;
const random = () => (seed = (Math.imul(seed, 1103515245) + 12345) & 0x7fffffff) / 0x80000000;

class Body {
  constructor() { this.x = random(); this.y = random(); this.vx = 0; this.vy = 0; this.m = 1 + random(); }
  pull(o, dt) {
    const dx = o.x - this.x, dy = o.y - this.y, d2 = dx * dx + dy * dy + 0.01, f = o.m / (d2 * Math.sqrt(d2)) * dt;
    this.vx += dx * f; this.vy += dy * f;
  }
  move(dt) { this.x += this.vx * dt; this.y += this.vy * dt; }
}
function bodies() {
  const all = Array.from({ length: 40 }, () => new Body());
  for (let t = 0; t < 300; t++) {
    for (const a of all) for (const b of all) if (a !== b) a.pull(b, 0.0001);
    for (const a of all) a.move(0.0001);
  }
  return all.reduce((s, a) => s + a.x * a.y, 0).toFixed(9);
}
function sieve(n) {
  const marks = new Uint8Array(n + 1);
  let count = 0;
  for (let i = 2; i <= n; i++) {
    if (marks[i]) continue;
    count++;
    for (let j = i * 2; j <= n; j += i) marks[j] = 1;
  }
  return count;
}
function tree(depth) { return depth ? { l: tree(depth - 1), r: tree(depth - 1), v: depth } : null; }
function sum(t) { return t ? sum(t.l) + sum(t.r) + t.v : 0; }
function text() {
  const words = Array.from({ length: 40000 }, () => Math.floor(random() * 3000).toString(36));
  const counts = new Map();
  for (const w of words) counts.set(w, (counts.get(w) || 0) + 1);
  const joined = words.join(' ');
  const matches = joined.match(/\b[a-m][0-9a-z]*\d\b/g).length;
  const json = JSON.stringify([...counts].sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1)));
  return [matches, JSON.parse(json).length, joined.replace(/(\w+) (\w+)/g, '$2-$1').length].join();
}
function big() { let a = 1n; for (let i = 1n; i < 900n; i++) a *= i; return (a % 1000000007n).toString() + a.toString().length; }
const compose = fs => x => fs.reduce((v, f) => f(v), x);
function closures() {
  const f = compose([x => x + 1, x => x ^ 0x55, x => x * 3 & 0xffff, x => x - 7]);
  let s = 0;
  for (let i = 0; i < 1500000; i++) s = s + f(i) | 0;
  return s;
}
for (let i = 0; i < 2; i++) console.log(bodies(), sieve(2000000), sum(tree(17)), text(), big(), closures());
