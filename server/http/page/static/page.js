// The page of a Concertina gateway. What models and people write becomes text, never markup.

const $ = (id) => document.getElementById(id);
const stored = (name) => JSON.parse(sessionStorage.getItem(name) ?? "null");
function store(name, value) {
  try {
    sessionStorage.setItem(name, JSON.stringify(value));
  } catch {
    sessionStorage.removeItem(name); // the tab has no room for it: a reload then begins anew
  }
}
const number = (value) => value.toLocaleString("en");
const COPIES = 3;

// ---- calls

async function call(method, path, body, signal) {
  const headers = {};
  const key = sessionStorage.getItem("api-key");
  if (key) headers.Authorization = `Bearer ${key}`;
  const isBytes = body instanceof Uint8Array;
  if (body !== undefined) headers["Content-Type"] = isBytes ? "application/octet-stream" : "application/json";
  const content = body === undefined || isBytes ? body : JSON.stringify(body);
  const answer = await fetch(path, { method, headers, signal, body: content });
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  throw Object.assign(new Error(told.error?.message ?? `${path} answers ${answer.status}`), { status: answer.status });
}

async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
  }
}

const bytesOf = (base64) => Uint8Array.from(atob(base64), (each) => each.charCodeAt(0));
function base64Of(bytes) {
  let text = "";
  for (let at = 0; at < bytes.length; at += 8192) text += String.fromCharCode(...bytes.subarray(at, at + 8192));
  return btoa(text);
}

// ---- what a stream holds, from the model's layout alone

function blocksOf(model, pushed) {
  const { span, keep_first: first, keep_newest: newest } = model.fold;
  const complete = Math.floor(pushed / span);
  const folded = Math.max(0, complete - first - newest);
  return { complete, folded, sinks: Math.min(first, complete), open: pushed % span, window: Math.min(newest, Math.max(0, complete - first)) };
}

function entriesOf(model, pushed, kept) {
  const fold = model.fold;
  if (!fold) return pushed;
  if (fold.binary) return pushed.toString(2).replaceAll("0", "").length;
  return pushed - blocksOf(model, pushed).folded * (fold.span - kept);
}

function bytesHeld(model, pushed) {
  const stacks = model.stacks.reduce((sum, each) => sum + each.entry_bytes * entriesOf(model, pushed, each.kept), 0);
  return stacks + model.row_bytes * pushed + model.fixed_bytes;
}

function bytesOfFullAttention(model, pushed) {
  return model.stacks.reduce((sum, each) => sum + each.entry_bytes * pushed, 0);
}

function described(model, pushed) {
  const words = [];
  const count = (n, one, many = `${one}s`) => `${number(n)} ${n === 1 ? one : many}`;
  for (const group of model.stacks) {
    const layers = model.stacks.length > 1 ? `in ${count(group.tensors / 2, "layer")} ` : "";
    if (!model.fold || group.kept >= model.fold.span) {
      words.push(`${layers}${count(pushed, "raw entry", "raw entries")}, every one kept`);
    } else if (model.fold.binary) {
      words.push(`${layers}${count(entriesOf(model, pushed, 1), "entry", "entries")}, folded like the digits of a binary number`);
    } else {
      const at = blocksOf(model, pushed);
      const raw = (at.sinks + at.window) * model.fold.span + at.open;
      const left = group.kept ? count(at.folded * group.kept, "summary", "summaries") : `${count(at.folded, "block")} dropped`;
      words.push(`${layers}${left}, ${count(raw, "raw entry", "raw entries")}`);
    }
  }
  if (model.row_bytes) words.push(`${count(pushed, "row")} of history`);
  if (!model.stacks.length && !model.row_bytes) words.push("one state that never grows");
  return `After ${count(pushed, "token")}: ${words.join("; ")}.`;
}

// ---- the drawing of it

const quiet = matchMedia("(prefers-reduced-motion: reduce)");
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const folds = { pushed: 0, at: -1e9, before: -1e9, run: null };

function sized(canvas) {
  const { clientWidth: width, clientHeight: height } = canvas;
  const scale = devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, height);
  return { pen, width, height };
}

function noteFolds(run, now) {
  const span = run.model.fold?.span;
  if (folds.run !== run || run.pushed < folds.pushed) Object.assign(folds, { run, at: -1e9, before: -1e9 });
  else if (span && Math.floor(run.pushed / span) > Math.floor(folds.pushed / span)) {
    folds.before = folds.at;
    folds.at = now;
  }
  folds.pushed = run.pushed;
}

/** Draws the lanes of a stream's state; whether a fold is still under way. */
function drawStack(run, now) {
  const { pen, width, height } = sized($("stack"));
  const model = run?.model ?? current;
  if (!model) return false;
  const pushed = run?.pushed ?? 0;
  const lanes = model.stacks.map((group) => ({ group }));
  if (model.row_bytes) lanes.push({ rows: true });
  if (model.fixed_bytes && !lanes.length) lanes.push({ fixed: true });
  const gap = 14, tall = (height - gap * (lanes.length - 1) - 8) / lanes.length;
  const lasts = Math.min(460, Math.max(120, 0.7 * (folds.at - folds.before)));
  const done = quiet.matches ? 1 : Math.min(1, (now - folds.at) / lasts);
  lanes.forEach((lane, index) => {
    const top = 4 + index * (tall + gap);
    drawLane(pen, model, lane, pushed, { top, tall, width, done: 1 - (1 - done) ** 3 });
  });
  return done < 1;
}

function drawLane(pen, model, lane, pushed, { top, tall, width, done }) {
  const cap = 7, room = width - 2 * cap - 4, fold = model.fold;
  const caps = (end) => {
    pen.fillStyle = colour("ink");
    for (const x of [0, end + 2]) {
      pen.beginPath();
      pen.roundRect(x, top - 3, cap - 2, tall + 6, 2);
      pen.fill();
    }
  };
  const track = (most) => {
    pen.fillStyle = colour("ghost");
    pen.globalAlpha = 0.55;
    pen.fillRect(cap, top + tall - 2, Math.min(room, most), 2);
    pen.globalAlpha = 1;
  };
  const folding = lane.group && fold && !fold.binary && lane.group.kept < fold.span;
  if (!folding) {
    const most = lane.fixed ? 1 : fold?.binary && lane.group ? Math.ceil(Math.log2(model.context + 1)) : model.context;
    const units = lane.fixed ? 1 : lane.group ? entriesOf(model, pushed, 1) : pushed;
    const wide = lane.fixed ? 90 : (units / most) * (most < 64 ? Math.min(room, most * 26) : room);
    track(most < 64 ? Math.min(room, most * 26) : room);
    if (fold?.binary && lane.group) drawBits(pen, pushed, { top, tall, x: cap });
    else {
      pen.fillStyle = colour(lane.fixed ? "fold" : lane.rows ? "full" : "raw");
      pen.fillRect(cap, top, wide, tall);
    }
    caps(cap + wide);
    return;
  }
  const at = blocksOf(model, pushed), kept = lane.group.kept;
  const mostFolded = Math.max(1, (Math.floor(model.context / fold.span) - fold.keep_first - fold.keep_newest) * kept);
  const mostRaw = (fold.keep_first + fold.keep_newest + 1) * fold.span;
  const pleat = kept ? Math.min(16, (room * 0.45) / mostFolded) : 0;
  const card = Math.min(11, (room * 0.53) / mostRaw);
  track(mostFolded * pleat + mostRaw * card);
  let x = cap;
  const cards = (n, from, tone) => {
    pen.fillStyle = colour(tone);
    const thin = card >= 3 ? 1 : 0;
    for (let each = 0; each < n; each += 1) {
      pen.globalAlpha = 0.5 + 0.5 * ((from + each + 1) / fold.span);
      pen.fillRect(x + each * card, top, card - thin, tall);
    }
    pen.globalAlpha = 1;
    x += n * card;
  };
  for (let block = 0; block < at.sinks; block += 1) cards(fold.span, 0, "raw-dim");
  const isFolding = done < 1 && at.folded > 0;
  const pleats = at.folded * kept - (isFolding ? kept : 0);
  for (let each = 0; each < pleats; each += 1, x += pleat) drawPleat(pen, x, pleat, top, tall, each, 1);
  if (isFolding) {
    // The block that is folding: its cards are pressed into the width of their summary.
    const slice = (card + (pleat * kept / fold.span - card) * done);
    for (let each = 0; each < fold.span; each += 1) {
      const lean = done * 5 * (each % 2 ? 1 : -1) * (1 - done);
      pen.fillStyle = mixed(colour("raw"), colour("fold"), done);
      pen.globalAlpha = 0.6 + 0.4 * (each / fold.span);
      pen.fillRect(x + each * slice, top + 3 * done + lean, Math.max(slice - (slice > 3 ? 1 : 0), 0.6), tall - 6 * done);
    }
    pen.globalAlpha = 1;
    x += fold.span * slice;
  }
  for (let block = 0; block < at.window; block += 1) cards(fold.span, 0, "raw-dim");
  cards(at.open, 0, "raw");
  caps(x);
}

function drawPleat(pen, x, wide, top, tall, index) {
  const deep = Math.min(9, tall * 0.14), [near, far] = index % 2 ? [deep, 0] : [0, deep];
  pen.fillStyle = colour(index % 2 ? "fold-dim" : "fold");
  pen.beginPath();
  pen.moveTo(x, top + near);
  pen.lineTo(x + wide + 0.3, top + far);
  pen.lineTo(x + wide + 0.3, top + tall - far);
  pen.lineTo(x, top + tall - near);
  pen.fill();
}

function drawBits(pen, pushed, { top, tall, x }) {
  const bits = pushed.toString(2);
  [...bits].forEach((bit, index) => {
    if (bit === "0") return;
    const level = bits.length - 1 - index, height = tall * (0.35 + 0.65 * (level / Math.max(1, bits.length - 1)));
    pen.fillStyle = colour(level ? "fold" : "raw");
    pen.fillRect(x, top + tall - height, 24, height);
    x += 26;
  });
}

function mixed(from, to, share) {
  const parts = [from, to].map((each) => [1, 3, 5].map((at) => parseInt(each.slice(at, at + 2), 16)));
  const [a, b] = parts;
  return `rgb(${a.map((each, index) => Math.round(each + (b[index] - each) * share)).join(" ")})`;
}

function showBytes(run) {
  const model = run?.model ?? current;
  if (!model) return;
  const pushed = run?.pushed ?? 0, held = bytesHeld(model, pushed), full = bytesOfFullAttention(model, pushed);
  let scale = 65536;
  while (scale < Math.max(held, full)) scale *= 2;
  const summaries = model.fold && !model.fold.binary
    ? model.stacks.reduce((sum, each) => sum + each.entry_bytes * blocksOf(model, pushed).folded * each.kept, 0) : 0;
  const set = (name, bytes, note = "") => {
    $(`bytes-${name}`).textContent = `${number(bytes)} B${note}`;
    $(`bytes-${name}`).dataset.bytes = bytes;
    $(`bar-${name}`).style.setProperty("--share", bytes / scale);
  };
  set("held", held);
  set("full", full);
  $("bar-held").style.setProperty("--split", held ? (summaries + model.fixed_bytes) / held : 0);
  for (const each of document.querySelectorAll(".full-row")) each.hidden = !model.stacks.length;
  const says = $("bytes-held");
  if (run?.counted !== undefined) {
    const same = run.counted === held;
    says.textContent += same ? " ✓" : ` (the server counts ${number(run.counted)})`;
    says.title = same ? "exactly what the server counts" : "";
  }
  $("stack-says").textContent = described(model, pushed);
  $("scale").textContent = full
    ? `Both bars are drawn on one scale, of ${sizeOf(scale)}.${full > held ? ` Full attention would hold ${(full / held).toFixed(1)} times as much.` : ""}`
    : `The bar is drawn on a scale of ${sizeOf(scale)}.`;
}

function sizeOf(bytes) {
  const [unit, name] = [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [1024, "KiB"], [1, "B"]].find(([each]) => bytes >= each) ?? [1, "B"];
  return `${Number((bytes / unit).toPrecision(3))} ${name}`;
}

function drawLine(canvas, values, tone) {
  const { pen, width, height } = sized(canvas);
  if (values.length < 2) return;
  const most = Math.max(...values) || 1, step = width / (values.length - 1);
  pen.beginPath();
  values.forEach((value, index) => pen.lineTo(index * step, height - 3 - (height - 8) * (value / most)));
  pen.strokeStyle = colour(tone);
  pen.lineWidth = 1.5;
  pen.stroke();
  pen.lineTo(width, height);
  pen.lineTo(0, height);
  pen.globalAlpha = 0.12;
  pen.fillStyle = colour(tone);
  pen.fill();
  pen.globalAlpha = 1;
}

// ---- a stream, and where it is written

const LEVELS = [0.5, 1.2, 2.2, 3.4, 4.8, 6.5];
const levelOf = (bits) => LEVELS.filter((each) => bits >= each).length;
let runs = [], shown = null, models = [], current = null, dialogue = [], picture = null;

class Run {
  /** before: tokens of before it was continued or copied; the first `base` of them are not its own. */
  constructor(model, { prompt = "", rows = "", label = "", seed = "", before = [], base = before.length, note = "" } = {}) {
    Object.assign(this, { model, prompt, rows, label, seed, before, base, note, id: "", phase: "starts", abort: null });
    this.sheet = document.createElement("section");
    this.sheet.className = "sheet";
    this.title = document.createElement("h3");
    this.sheet.append(this.title);
    if (model.image) this.prepareImage();
    else {
      this.text = document.createElement("pre");
      this.text.className = "text";
      this.text.tabIndex = 0;
      this.text.setAttribute("role", "group");
      this.text.setAttribute("aria-label", "Text; arrow keys show each token's alternatives");
      this.sheet.append(this.text);
    }
    $("paper").append(this.sheet);
    this.begin();
  }

  /** Back to the beginning, or to where it was continued: all that follows is sent again. */
  begin() {
    Object.assign(this, { tokens: [], pushed: 0, bits: 0, bytes: 0, waiting: [], counted: undefined, times: [], finished: null });
    this.decoder = new TextDecoder();
    this.samples = { rate: [], bits: [] };
    if (this.text) {
      this.text.textContent = "";
      const given = document.createElement("span");
      given.className = "given";
      given.textContent = this.prompt;
      this.text.append(given);
    } else this.blank();
    for (const token of this.before) this.add(token);
    this.times = [];
    this.flush();
    this.name();
  }

  name() {
    const parts = [this.note, this.seed && `seed ${this.seed}`];
    this.title.textContent = parts.filter(Boolean).join(" · ") || "\u00a0";
  }

  prepareImage() {
    const { width, height } = this.model.image;
    const holder = document.createElement("div");
    holder.className = "picture";
    const made = [["art", "the picture"], ["heat", "where the model was surprised"]].map(([name, says]) => {
      const figure = document.createElement("figure"), canvas = document.createElement("canvas"), caption = document.createElement("figcaption");
      Object.assign(canvas, { width, height, className: name });
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", says);
      caption.className = "quiet";
      caption.textContent = says;
      figure.append(canvas, caption);
      holder.append(figure);
      return canvas.getContext("2d");
    });
    [this.art, this.heat] = made;
    this.sheet.append(holder);
  }

  blank() {
    const { width, height } = this.model.image;
    for (const pen of [this.art, this.heat]) pen.clearRect(0, 0, width, height);
    const given = bytesOf(this.rows);
    for (let at = 0; 3 * at < given.length; at += 1) this.paint(at, given.subarray(3 * at, 3 * at + 3));
  }

  paint(pixel, [red, green, blue], pen = this.art) {
    const { width } = this.model.image;
    pen.fillStyle = `rgb(${red} ${green} ${blue})`;
    pen.fillRect(pixel % width, Math.floor(pixel / width), 1, 1);
  }

  async start(method, path, body) {
    this.abort = new AbortController();
    this.phase = "starts";
    this.isAccepted = method === "GET";
    let again = false, cuts = 0;
    controls();
    for (;;) {
      try {
        const answer = await call(again ? "GET" : method, again ? `c/streams/${this.id}` : path, again ? undefined : body, this.abort.signal);
        if (again) this.begin();
        for await (const event of eventsOf(answer)) this.take(event);
        if (this.phase === "runs") throw new TypeError("the connection was cut");
        break;
      } catch (error) {
        if (this.phase === "stopped") break;
        // A cut connection is none of the stream's business: the server keeps it.
        const isCut = error instanceof TypeError || (error.status === 503 && cuts < 20);
        if (!isCut || !this.isAccepted || this.phase === "failed") {
          // What was paused and could not go on is still paused.
          this.phase = this.id && !this.isAccepted ? "paused" : "failed";
          problem(this.failure ?? error.message);
          break;
        }
        $("says").textContent = "the connection was cut; going on";
        again = true;
        cuts += 1;
        await new Promise((wake) => setTimeout(wake, Math.min(5000, 500 * cuts)));
      }
    }
    this.flush();
    this.text?.classList.remove("writes");
    answered(this);
    remember();
    controls();
  }

  take(event) {
    if (event.error) {
      Object.assign(this, { phase: "failed", failure: event.error.message });
    } else if (event.type === "accepted") {
      if (!this.id || this.phase === "starts") this.at = performance.now();
      Object.assign(this, { id: event.id, phase: this.phase === "stopped" ? "stopped" : "runs", seed: event.seed, durable: event.durable });
      this.pushed = Math.max(this.pushed, event.prompt_tokens);
      this.isAccepted = true;
      this.sent = undefined;
      this.text?.classList.add("writes");
      this.name();
      if (this.phase === "stopped") this.leave();
      if (paceOf() !== null) this.keepPace();
      remember();
      controls();
    } else if (event.type === "resumed") {
      this.resumed(event);
    } else if (event.type === "tokens") {
      const pixels = event.rgb ? bytesOf(event.rgb) : null;
      event.ids.forEach((id, index) => {
        const token = { id, bits: event.bits[index], bytes: event.pieces[index]?.length ?? 0, top: event.top[index] };
        if (pixels) Object.assign(token, { at: event.at + index, rgb: pixels.slice(3 * index, 3 * index + 3) });
        else token.text = this.decoder.decode(Uint8Array.from(event.pieces[index] ?? []), { stream: true });
        this.add(token);
      });
      this.pushed = event.at + event.ids.length;
      redraw();
    } else if (event.type === "finished") {
      this.phase = event.reason === "paused" ? "paused" : "finished";
      const rest = this.phase === "finished" ? this.decoder.decode() : "";
      if (rest) this.add({ id: null, bits: 0, bytes: 0, text: rest });
      this.finished = event;
      this.pushed = event.prompt_tokens + event.generated_tokens;
      this.counted = event.state_bytes;
      redraw();
    }
  }

  add(token) {
    token.number = this.tokens.length;
    if (this.mark) [token.mark, this.mark] = [this.mark, ""];
    this.tokens.push(token);
    this.bits += token.bits;
    this.bytes += this.model.image ? 1 : token.bytes;
    this.times.push(performance.now());
    this.waiting.push(token);
  }

  /** Writes what has come since the last frame. */
  flush() {
    if (!this.waiting.length) return;
    if (this.model.image) {
      for (const token of this.waiting) {
        if (!token.rgb) continue;
        this.paint(token.at, token.rgb);
        this.paint(token.at, heatOf(token.bits), this.heat);
      }
    } else {
      const box = this.text, isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
      const made = document.createDocumentFragment();
      for (const token of this.waiting) {
        if (token.mark) made.append(markOf(token.mark));
        if (!token.text) continue;
        const span = document.createElement("span");
        span.className = token.number < this.base ? "given" : `s${levelOf(token.bits)}`;
        span.dataset.token = token.number;
        span.textContent = token.text;
        made.append(span);
      }
      box.append(made);
      if (isAtEnd) box.scrollTop = box.scrollHeight;
    }
    this.waiting = [];
  }

  /** What was generated, without the marks. */
  get written() {
    return this.tokens.map((each) => each.text ?? "").join("");
  }

  get rate() {
    const now = performance.now(), since = Math.max(now - 1500, this.at ?? now);
    let count = 0;
    for (let at = this.times.length - 1; at >= 0 && this.times[at] > since; at -= 1) count += 1;
    return now - since > 100 ? (1000 * count) / (now - since) : 0;
  }

  /** Another server went on with it: says so at the token where it did. */
  resumed() {
    this.resumes = (this.resumes ?? 0) + 1;
    const gap = this.times.length ? Math.round(performance.now() - this.times.at(-1)) : 0;
    this.mark = `another server goes on, after ${number(gap)} ms`;
  }

  async leave() {
    this.abort?.abort();
    // The connection goes first: a browser reports a stream that is cut while it is read.
    await new Promise((wake) => setTimeout(wake, 100));
    if (this.id) await call("DELETE", `c/streams/${this.id}`).catch(() => {});
  }

  stop() {
    const goes = this.phase === "runs";
    this.phase = "stopped";
    return goes || this.id ? this.leave() : Promise.resolve();
  }

  async pause() {
    await call("POST", `c/streams/${this.id}/pause`, {});
    await until(() => this.phase !== "runs");
  }

  goOn() {
    this.sent ??= this.before.length;
    this.before = this.tokens.map(({ number, mark, ...rest }) => rest);
    this.begin();
    const length = Number($("length").value) || undefined;
    const body = this.phase === "finished" || this.forked ? { max_tokens: this.model.image ? undefined : length } : {};
    return this.start("POST", `c/streams/${this.id}/continue`, { ...body, pace: paceOf() });
  }

  keepPace() {
    return call("POST", `c/streams/${this.id}/pace`, { pace: paceOf() }).catch(() => {});
  }
}

const until = async (condition) => { while (!condition()) await new Promise((wake) => setTimeout(wake, 30)); };

function heatOf(bits) {
  const hex = colour(`s${Math.max(1, levelOf(bits))}`);
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

function markOf(says) {
  const mark = document.createElement("b");
  mark.className = "went-on";
  mark.textContent = says;
  return mark;
}

// ---- what is going on

let asked = false;
function redraw() {
  if (asked) return;
  asked = true;
  requestAnimationFrame((now) => {
    asked = false;
    for (const run of runs) run.flush();
    if (shown) noteFolds(shown, now);
    const moves = drawStack(shown, now);
    showBytes(shown);
    figures();
    if (moves) redraw();
  });
}

function figures() {
  if (!shown) return;
  const made = shown.tokens.length - shown.base;
  $("f-tokens").textContent = number(Math.max(0, made));
  $("f-bits-name").textContent = shown.model.image ? "bits/pixel" : "bits/byte";
  $("f-bits").textContent = shown.bytes ? (shown.bits / shown.bytes).toFixed(2) : "–";
  const end = shown.finished;
  if (end) {
    $("f-first").textContent = `${Math.round(1000 * end.time_to_first_token)} ms`;
    const took = end.total_time - end.time_to_first_token;
    if (took > 0.05 && end.reason !== "paused") $("f-rate").textContent = number(Math.round(made / took));
  }
}

setInterval(() => {
  const run = shown;
  if (!run || run.phase !== "runs") return;
  const last = run.tokens.slice(-16);
  run.samples.rate.push(run.rate);
  run.samples.bits.push(last.length ? last.reduce((sum, each) => sum + each.bits, 0) / last.length : 0);
  $("f-rate").textContent = number(Math.round(run.rate));
  if (run.times.length && $("f-first").textContent === "–") $("f-first").textContent = `${Math.round(run.times[0] - run.asked)} ms`;
  drawCharts();
}, 250);

function drawCharts() {
  drawLine($("c-rate"), shown?.samples.rate ?? [], "fold");
  drawLine($("c-bits"), shown?.samples.bits ?? [], "raw");
}

const says = {
  starts: () => "waiting for the first token",
  runs: () => "writing",
  paused: () => "paused: it holds its state, and no slot",
  stopped: () => "stopped: the server has forgotten it",
  failed: () => "it ended with an error",
  finished: (run) => `${{ end: "it came to its end", stop: "it came to its end", max_tokens: "all tokens are written", time_limit: "its time is over" }[run.finished.reason] ?? "done"}, after ${run.finished.total_time.toFixed(1)} s`,
};

function controls() {
  const some = (...phases) => runs.some((each) => phases.includes(each.phase));
  const goes = some("runs", "starts"), rests = some("paused", "finished");
  $("stop").disabled = !goes;
  $("write").disabled = goes;
  const isWhole = runs.some((each) => each.model.image && each.phase === "finished");
  $("pause").disabled = isWhole || (!some("runs") && !rests);
  $("pause").textContent = some("runs") || !rests ? "Pause" : "Continue";
  $("fork").disabled = runs.length !== 1 || !(some("runs") || rests) || !!shown?.model.image;
  $("export").disabled = runs.length !== 1 || !(some("runs") || rests);
  $("says").textContent = shown ? says[shown.phase](shown) : "";
  document.body.classList.toggle("busy", goes);
  $("kill").disabled = !some("runs") || runs.length !== 1;
  redraw();
}

function problem(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

function show(run) {
  shown = run;
  for (const name of ["f-tokens", "f-rate", "f-bits", "f-first"]) $(name).textContent = "–";
  drawCharts();
  controls();
}

/** A token without what is only for this page: as an array of colours, since files hold no bytes. */
const portable = ({ id, bits, bytes, text, at, rgb }) => ({ id, bits, bytes, text, at, rgb: rgb && [...rgb] });

/** What a reload needs: the tab forgets it when it is closed. */
function remember() {
  store("runs", runs.filter((each) => each.id && ["runs", "paused", "finished"].includes(each.phase)).map((run) => ({
    id: run.id, model: run.model.name, prompt: run.prompt, rows: run.rows, label: run.label, note: run.note, seed: run.seed, phase: run.phase,
    base: run.base, before: run.before.slice(0, run.sent).map(portable), // the server sends the rest again
  })));
  store("dialogue", dialogue);
}

function clear() {
  for (const each of runs) if (each.phase !== "finished") unanswered(each);
  const gone = runs.map((each) => each.stop());
  runs = [];
  shown = null;
  $("paper").replaceChildren();
  problem("");
  return Promise.all(gone);
}

// ---- what is asked

async function write() {
  const model = current, seed = $("seed").value.trim();
  if (seed && !/^[0-9]{1,20}$/.test(seed)) return problem("Seed is no whole number: leave it empty for any, or give digits.");
  if (model.chats && !$("prompt").value.trim()) return problem("Say something first.");
  await clear();
  const body = { model: model.name, temperature: Number($("temperature").value), seed, pace: paceOf() };
  const given = {};
  if (model.image) {
    Object.assign(given, { label: $("label").value, rows: picture ?? "" });
    if (given.label) body.label = given.label;
    if (given.rows) body.rows = given.rows;
  } else {
    const text = $("prompt").value;
    body.max_tokens = Number($("length").value) || undefined;
    body.top_p = 0.98;
    if (model.chats) {
      dialogue.push({ role: "user", content: text });
      $("prompt").value = "";
      body.messages = dialogue;
      showDialogue();
    } else given.prompt = body.prompt = text;
  }
  const run = new Run(model, given);
  run.asked = performance.now();
  runs = [run];
  show(run);
  $("chaos-says").textContent = "";
  await run.start("POST", "c/streams", body);
  if (run.resumes && run.phase === "finished") await compare(run, { ...body, seed: run.seed });
}

/** An answer is part of the conversation once it is whole; what gets none was not asked. */
function answered(run) {
  if (!runs.includes(run)) return;
  if (["failed", "stopped"].includes(run.phase)) unanswered(run);
  if (!run.model.chats || run.phase !== "finished" || dialogue.at(-1)?.role !== "user") return;
  dialogue.push({ role: "assistant", content: run.written });
}

function unanswered(run) {
  if (run.model.chats && dialogue.at(-1)?.role === "user") dialogue.pop();
}

function showDialogue() {
  // The newest answer stands below, with its colours.
  const isBelow = runs.length && dialogue.at(-1)?.role === "assistant";
  const earlier = dialogue.slice(0, isBelow ? -1 : undefined).map(({ role, content }) => {
    const said = document.createElement("p");
    said.className = role;
    said.textContent = content;
    return said;
  });
  $("chat-log").replaceChildren(...earlier);
}

async function pauseOrGoOn() {
  const going = runs.filter((each) => each.phase === "runs");
  if (going.length) await Promise.all(going.map((each) => each.pause()));
  else await Promise.all(runs.filter((each) => ["paused", "finished"].includes(each.phase)).map((each) => each.goOn()));
  controls();
}

async function fork() {
  const [parent] = runs;
  if (parent.phase === "runs") await parent.pause();
  const answer = await call("POST", `c/streams/${parent.id}/fork`, { n: COPIES });
  const { ids } = await answer.json();
  const before = parent.tokens.map(({ number, mark, ...rest }) => rest);
  await clear();
  runs = ids.map((id, index) => {
    const run = new Run(parent.model, { prompt: parent.prompt, before, note: `${index + 1} of ${ids.length}` });
    return Object.assign(run, { id, forked: true, pushed: parent.pushed });
  });
  show(runs[0]);
  await Promise.all(runs.map((each) => each.goOn()));
}

// ---- a session as a file, and a link

async function save() {
  const [run] = runs;
  if (run.phase === "runs") await run.pause();
  const answer = await call("POST", `c/streams/${run.id}/export`, {});
  const snapshot = new Uint8Array(await answer.arrayBuffer());
  const told = {
    format: "concertina page 1", model: run.model.name, prompt: run.prompt, label: run.label, seed: run.seed, pushed: run.pushed, rows: run.rows,
    tokens: run.tokens.map(portable), kept: run.sent ?? run.before.length,
    snapshot: base64Of(snapshot),
  };
  const file = URL.createObjectURL(new Blob([JSON.stringify(told)], { type: "application/json" }));
  const link = document.createElement("a");
  Object.assign(link, { href: file, download: `${run.model.name}-${run.id.slice(0, 8)}.concertina` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(file), 10000);
}

async function open(file) {
  let told;
  try {
    told = JSON.parse(await file.text());
    if (told.format !== "concertina page 1" || !Array.isArray(told.tokens)) throw new Error();
  } catch {
    return problem(`${file.name} is no session that this page has saved.`);
  }
  const model = models.find((each) => each.name === told.model);
  if (!model) return problem(`${file.name} needs the model ${told.model}, which is not served here.`);
  const session = await (await call("POST", "c/sessions", bytesOf(told.snapshot))).json();
  await clear();
  choose(model);
  const run = new Run(model, { prompt: String(told.prompt), rows: told.rows, label: told.label, seed: told.seed, before: told.tokens, note: `from ${file.name}` });
  Object.assign(run, { id: session.id, sent: Number(told.kept) || 0, phase: session.phase === "finished" ? "finished" : "paused", pushed: told.pushed, counted: session.state_bytes });
  run.finished = { reason: "paused", total_time: 0, time_to_first_token: 0 };
  runs = [run];
  remember();
  show(run);
}

function linkOf() {
  const said = new URLSearchParams({ model: current.name, temperature: $("temperature").value, tokens: $("length").value });
  const seed = $("seed").value.trim() || shown?.seed || "";
  if (seed) said.set("seed", seed);
  if (current.image) said.set("label", $("label").value);
  else if (!current.chats) said.set("prompt", $("prompt").value);
  return said.toString();
}

async function copyLink() {
  history.replaceState(null, "", `#${linkOf()}`);
  try {
    await navigator.clipboard.writeText(location.href);
    $("says").textContent = "the link is copied";
  } catch {
    $("says").textContent = "the link is in the address bar";
  }
}

function readLink() {
  const said = new URLSearchParams(location.hash.slice(1));
  const model = models.find((each) => each.name === said.get("model"));
  if (!model) return;
  choose(model);
  for (const [name, id] of [["prompt", "prompt"], ["seed", "seed"], ["temperature", "temperature"], ["tokens", "length"], ["label", "label"]]) {
    if (said.has(name)) $(id).value = said.get(name);
  }
  knobs();
}

async function dropped(file) {
  if (!file) return;
  problem("");
  if (!file.type.startsWith("image/")) return open(file);
  const model = current.image ? current : models.find((each) => each.image);
  if (!model) return problem("No model here makes pictures.");
  choose(model);
  const { width, height } = model.image, kept = Math.floor(height / 2);
  const bitmap = await createImageBitmap(file), canvas = new OffscreenCanvas(width, height), pen = canvas.getContext("2d");
  pen.fillStyle = "white";
  pen.fillRect(0, 0, width, height);
  pen.drawImage(bitmap, 0, 0, width, height);
  const pixels = pen.getImageData(0, 0, width, kept).data, rows = new Uint8Array(3 * width * kept);
  for (let at = 0; at < width * kept; at += 1) rows.set(pixels.subarray(4 * at, 4 * at + 3), 3 * at);
  picture = base64Of(rows);
  $("no-picture").hidden = false;
  await write();
}

// ---- pace

function paceOf() {
  const at = Number($("pace").value);
  return at === 100 ? null : at === 0 ? 0 : Number((0.5 * 800 ** (at / 99)).toPrecision(2));
}

function knobs() {
  const pace = paceOf();
  $("temperature-is").textContent = $("temperature").value;
  $("pace-is").textContent = pace === null ? "as it comes" : pace === 0 ? "held" : `${pace} tokens/s`;
  $("pace").setAttribute("aria-valuetext", $("pace-is").textContent);
}

let lastGenerated = -1;
setInterval(async () => {
  const run = shown;
  if (!run || run.phase !== "runs" || paceOf() === null) {
    $("pace-says").textContent = "";
    return;
  }
  const session = await call("GET", `c/sessions/${run.id}`).then((answer) => answer.json()).catch(() => null);
  if (!session || shown !== run) return;
  const ahead = session.prompt_tokens + session.generated_tokens - run.pushed;
  const isParked = session.is_running && session.generated_tokens === lastGenerated && ahead > 0;
  lastGenerated = session.generated_tokens;
  $("pace-says").textContent = ahead <= 0 ? "" : isParked
    ? `parked: the server is ${number(ahead)} tokens ahead, and its slot is free for others`
    : `the server is ${number(ahead)} tokens ahead`;
}, 800);

// ---- killing servers, in a demo

async function admit() {
  const token = new URLSearchParams(location.hash.slice(1)).get("chaos");
  if (token) {
    history.replaceState(null, "", location.pathname);
    const { secret } = await (await call("POST", "c/chaos", { token })).json();
    sessionStorage.setItem("chaos", secret);
  }
  $("chaos").hidden = !sessionStorage.getItem("chaos");
}

async function kill() {
  const asked = { stream: runs[0].id, secret: sessionStorage.getItem("chaos") };
  const { killed } = await (await call("POST", "c/chaos/kill", asked)).json();
  $("chaos-says").textContent = `SIGKILL to server ${killed}; it starts again by itself.`;
}

/** The same request once more, to which nothing happens: does it write the same? */
async function compare(run, body) {
  $("chaos-says").textContent = "Asking for the same text, undisturbed …";
  const ids = [];
  let id = "";
  for await (const event of eventsOf(await call("POST", "c/streams", { ...body, pace: null }))) {
    if (event.error) throw new Error(`The twin failed: ${event.error.message}`);
    if (event.type === "accepted") id = event.id;
    if (event.type === "tokens") ids.push(...event.ids);
  }
  call("DELETE", `c/streams/${id}`).catch(() => {});
  const mine = run.tokens.map((each) => each.id).filter((each) => each !== null);
  const same = mine.length === ids.length && mine.every((each, index) => each === ids[index]);
  $("chaos-says").textContent = same
    ? `An undisturbed twin wrote the same ${number(ids.length)} tokens.`
    : `An undisturbed twin wrote something else: ${number(ids.length)} tokens.`;
  $("chaos-says").className = same ? "good" : "bad";
}

// ---- a token's alternatives

function tip(run, span) {
  document.querySelector(".text .at")?.classList.remove("at");
  const token = span && run.tokens[span.dataset.token];
  $("tip").hidden = !token?.top;
  if (!token?.top) return;
  span.classList.add("at");
  const head = document.createElement("p"), list = document.createElement("ol");
  head.textContent = `${token.bits.toFixed(2)} bits, token ${number(token.number + 1)}`;
  const rows = token.top.some(([id]) => id === token.id) ? token.top : [...token.top, [token.id, token.text, token.bits]];
  for (const [id, name, bits] of rows) {
    const row = document.createElement("li"), code = document.createElement("code"), bar = document.createElement("i"), share = document.createElement("span");
    code.textContent = printed(name, id);
    bar.style.setProperty("--share", 2 ** -bits);
    share.textContent = `${(100 * 2 ** -bits).toFixed(1)}%`;
    row.classList.toggle("drawn", id === token.id);
    row.append(code, bar, share);
    list.append(row);
  }
  $("tip").replaceChildren(head, list);
  const box = span.getBoundingClientRect(), own = $("tip").getBoundingClientRect();
  const left = Math.max(8, Math.min(innerWidth - own.width - 8, box.left));
  const top = box.bottom + own.height + 14 > innerHeight ? box.top - own.height - 8 : box.bottom + 8;
  $("tip").style.setProperty("transform", `translate(${Math.round(left)}px, ${Math.round(top)}px)`);
}

const printed = (name, id) => (name || `#${id}`).replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");
const runOf = (node) => runs.find((each) => each.sheet.contains(node));

$("paper").addEventListener("pointerover", (event) => {
  const run = runOf(event.target);
  if (run && run !== shown) show(run);
  tip(run, event.target.closest("[data-token]"));
});
$("paper").addEventListener("pointerleave", () => tip(null, null));
$("paper").addEventListener("focusout", () => tip(null, null));
$("paper").addEventListener("keydown", (event) => {
  const run = runOf(event.target);
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (event.key === "Escape") return tip(null, null);
  if (!run?.text || !step) return;
  event.preventDefault();
  const all = [...run.text.querySelectorAll("[data-token]")];
  const at = all.findIndex((each) => each.classList.contains("at"));
  const next = all[at < 0 ? (step > 0 ? 0 : all.length - 1) : Math.max(0, Math.min(all.length - 1, at + step))];
  next?.scrollIntoView({ block: "nearest" });
  tip(run, next);
});

// ---- the rest of the page

function choose(model) {
  current = model;
  $("model").value = model.name;
  const stored = Object.entries(model.metrics)[0];
  $("about").textContent = [
    `${(model.parameters / 1e6).toPrecision(2)} M weights`, `${model.attention} attention`, `${number(model.context)} ${model.image ? "pixels" : "tokens"}`,
    stored && `${stored[1].toFixed(2)} ${stored[0]}`,
  ].filter(Boolean).join(" · ");
  $("text-ask").hidden = !!model.image;
  $("image-ask").hidden = !model.image;
  $("legend").hidden = !!model.image;
  $("chat-log").hidden = !model.chats;
  document.querySelector(".writing").classList.toggle("prose", model.chats);
  $("length").parentElement.classList.toggle("image", !!model.image);
  $("length").disabled = !!model.image;
  $("prompt-label").textContent = model.chats ? "You say" : "It goes on from";
  if (model.image) {
    const any = new Option("anything", "");
    $("label").replaceChildren(any, ...model.labels.map((each) => new Option(each, each)));
    $("label").value = model.labels.includes("Smileys & Emotion") ? "Smileys & Emotion" : "";
  } else if (!$("prompt").value) $("prompt").value = model.chats ? "" : model.name.includes("python") ? "def " : "The ";
  if (!runs.length) show(null);
}

function act(work) {
  return async (event) => {
    event?.preventDefault();
    problem("");
    try {
      await work(event);
    } catch (error) {
      problem(error.message);
      controls();
    }
  };
}

$("ask").addEventListener("submit", act(write));
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey || (current.chats && !event.shiftKey))) {
    event.preventDefault();
    if (!$("write").disabled) $("ask").requestSubmit();
  }
});
$("stop").addEventListener("click", act(async () => {
  await Promise.all(runs.map((each) => each.stop()));
  remember();
  controls();
}));
$("pause").addEventListener("click", act(pauseOrGoOn));
$("fork").addEventListener("click", act(fork));
$("export").addEventListener("click", act(save));
$("import").addEventListener("change", act((event) => dropped(event.target.files[0])));
$("picture").addEventListener("change", act((event) => dropped(event.target.files[0])));
$("no-picture").addEventListener("click", () => {
  picture = null;
  $("no-picture").hidden = true;
});
$("link").addEventListener("click", act(copyLink));
$("kill").addEventListener("click", act(kill));
$("model").addEventListener("change", act(async () => {
  await clear();
  dialogue = [];
  picture = null;
  $("no-picture").hidden = true;
  $("prompt").value = "";
  showDialogue();
  remember();
  choose(models.find((each) => each.name === $("model").value));
}));
$("temperature").addEventListener("input", knobs);
$("pace").addEventListener("input", () => {
  knobs();
  for (const run of runs) if (run.phase === "runs") run.keepPace();
});
$("key-form").addEventListener("submit", act(async () => {
  sessionStorage.setItem("api-key", $("key").value.trim());
  $("access").open = false;
  await load();
}));
$("theme").addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme !== "dark";
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  localStorage.setItem("theme", dark ? "dark" : "light");
  drawCharts();
  redraw();
});
for (const name of ["dragenter", "dragover"]) addEventListener(name, (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("dropping"); });
addEventListener("drop", (event) => {
  document.body.classList.remove("dropping");
  act(() => dropped(event.dataTransfer.files[0]))(event);
});
addEventListener("resize", () => { drawCharts(); redraw(); });

async function load() {
  const told = await (await call("GET", "c/models")).json();
  models = told.models;
  $("model").replaceChildren(...models.map((each) => new Option(each.name, each.name)));
  $("models").tBodies[0].replaceChildren(...models.map((each) => {
    const row = document.createElement("tr");
    for (const text of [each.name, `${(each.parameters / 1e6).toPrecision(2)} M, ${each.weights}`, `${sizeOf(each.max_state_bytes)}, ${each.state}`]) row.insertCell().textContent = text;
    return row;
  }));
  if (!models.length) return problem("This server serves no model.");
  choose(models.find((each) => !each.image) ?? models[0]);
  readLink();
  await admit().catch((error) => problem(error.message));
}

/** Streams of before a reload go on: the server sends them again, from their beginning. */
function comeBack() {
  dialogue = stored("dialogue") ?? [];
  for (const told of stored("runs") ?? []) {
    const model = models.find((each) => each.name === told.model);
    if (!model) continue;
    choose(model);
    const run = Object.assign(new Run(model, told), { id: told.id, phase: told.phase });
    runs.push(run);
    run.asked = performance.now();
    run.start("GET", `c/streams/${told.id}`);
  }
  if (runs.length) show(runs[0]);
  showDialogue();
}

document.documentElement.dataset.theme = localStorage.getItem("theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
knobs();
act(async () => {
  try {
    await load();
  } catch (error) {
    if (error.status === 401) $("access").open = true;
    throw error;
  }
  comeBack();
})();
